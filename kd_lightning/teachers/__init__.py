"""Teachers: frozen networks, how they are called, where their weights come from, and their logits on file."""

from kd_lightning.teachers.cache import TeacherCache
from kd_lightning.teachers.calls import Call, call_model, extract_logits
from kd_lightning.teachers.ensemble import TeacherEnsemble
from kd_lightning.teachers.frozen import FrozenTeacher, as_teacher
from kd_lightning.teachers.indexed import Indexed, IndexedDataset, split_index
from kd_lightning.teachers.weights import fingerprint, load_weights

__all__ = [
    "Call",
    "FrozenTeacher",
    "Indexed",
    "IndexedDataset",
    "TeacherCache",
    "TeacherEnsemble",
    "as_teacher",
    "call_model",
    "extract_logits",
    "fingerprint",
    "load_weights",
    "split_index",
]
