"""Teachers: frozen networks, how they are called, where their weights come from, and their logits on file."""

from kd_lightning.teachers.batch import BatchTeacher
from kd_lightning.teachers.cache import TeacherCache
from kd_lightning.teachers.calibration import Calibration
from kd_lightning.teachers.calls import Call, extract_logits
from kd_lightning.teachers.classes import MappedClasses
from kd_lightning.teachers.ema import EMATeacher
from kd_lightning.teachers.ensemble import TeacherEnsemble
from kd_lightning.teachers.frozen import FrozenTeacher
from kd_lightning.teachers.function import FunctionTeacher
from kd_lightning.teachers.indexed import IndexedDataset
from kd_lightning.teachers.logits_file import LogitsFile
from kd_lightning.teachers.onnx import OnnxTeacher
from kd_lightning.teachers.placement import Placement
from kd_lightning.teachers.served import ServedTeacher
from kd_lightning.teachers.sharded import Sharded
from kd_lightning.teachers.teacher import LossTerm, Opinions, Teacher
from kd_lightning.teachers.transforms import Renormalize

__all__ = [
    "BatchTeacher",
    "Calibration",
    "Call",
    "EMATeacher",
    "FrozenTeacher",
    "FunctionTeacher",
    "IndexedDataset",
    "LogitsFile",
    "LossTerm",
    "MappedClasses",
    "OnnxTeacher",
    "Opinions",
    "Placement",
    "Renormalize",
    "ServedTeacher",
    "Sharded",
    "Teacher",
    "TeacherCache",
    "TeacherEnsemble",
    "extract_logits",
]
