"""Knowledge distillation for PyTorch Lightning with temperature as a first-class object.

The names below are imported on first use, so that the losses alone do not wait for Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_lightning.calibration import calibrate
    from kd_lightning.distiller import DistillationOutput, Distiller
    from kd_lightning.layers import FeatureExtractor, LayerTerm
    from kd_lightning.modules import ClassificationModule, DistillationModule, ShardedDistillationModule
    from kd_lightning.outputs_distiller import OutputsKDLoss, OutputTerm
    from kd_lightning.preflight import check
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
    "OutputTerm",
    "OutputsKDLoss",
    "ShardedDistillationModule",
    "TeacherCache",
    "TeacherEnsemble",
    "calibrate",
    "check",
]

_ROOMS = {
    "ClassificationModule": "modules",
    "DistillationModule": "modules",
    "DistillationOutput": "distiller",
    "Distiller": "distiller",
    "FeatureExtractor": "layers",
    "FrozenTeacher": "teachers",
    "LayerTerm": "layers",
    "OutputTerm": "outputs_distiller",
    "OutputsKDLoss": "outputs_distiller",
    "ShardedDistillationModule": "modules",
    "TeacherCache": "teachers",
    "TeacherEnsemble": "teachers",
    "calibrate": "calibration",
    "check": "preflight",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
