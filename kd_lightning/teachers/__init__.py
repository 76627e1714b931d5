"""Teachers: frozen networks, how they are called, where their weights come from, and their logits on file."""

from kd_lightning.teachers.batch import BatchTeacher
from kd_lightning.teachers.cache import TeacherCache
from kd_lightning.teachers.calibration import Calibration
from kd_lightning.teachers.calls import (
    Call,
    HiddenStates,
    call_model,
    check_hidden_states,
    extract_logits,
    hidden_states,
)
from kd_lightning.teachers.classes import MappedClasses
from kd_lightning.teachers.ema import EMATeacher
from kd_lightning.teachers.ensemble import TeacherEnsemble
from kd_lightning.teachers.frozen import FrozenTeacher, as_teacher
from kd_lightning.teachers.function import FunctionTeacher
from kd_lightning.teachers.indexed import Indexed, IndexedDataset, split_index
from kd_lightning.teachers.logits_file import LogitsFile
from kd_lightning.teachers.made_at import Output
from kd_lightning.teachers.onnx import OnnxTeacher
from kd_lightning.teachers.served import ServedTeacher
from kd_lightning.teachers.teacher import GivenLogits, LossTerm, Opinions, Teacher
from kd_lightning.teachers.transforms import Renormalize
from kd_lightning.teachers.weights import fingerprint, load_weights

__all__ = [
    "BatchTeacher",
    "Calibration",
    "Call",
    "EMATeacher",
    "FrozenTeacher",
    "FunctionTeacher",
    "GivenLogits",
    "HiddenStates",
    "Indexed",
    "IndexedDataset",
    "LogitsFile",
    "LossTerm",
    "MappedClasses",
    "OnnxTeacher",
    "Opinions",
    "Output",
    "Renormalize",
    "ServedTeacher",
    "Teacher",
    "TeacherCache",
    "TeacherEnsemble",
    "as_teacher",
    "call_model",
    "check_hidden_states",
    "extract_logits",
    "fingerprint",
    "hidden_states",
    "load_weights",
    "split_index",
]
