"""Knowledge distillation for PyTorch Lightning with temperature as a first-class object."""

from kd_lightning.distiller import DistillationOutput, Distiller
from kd_lightning.layers import FeatureExtractor, LayerTerm
from kd_lightning.modules import ClassificationModule, DistillationModule
from kd_lightning.teachers import FrozenTeacher, TeacherCache, TeacherEnsemble

__version__ = "0.1.0"

__all__ = [
    "ClassificationModule",
    "DistillationModule",
    "DistillationOutput",
    "Distiller",
    "FeatureExtractor",
    "FrozenTeacher",
    "LayerTerm",
    "TeacherCache",
    "TeacherEnsemble",
]
