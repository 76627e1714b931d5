"""Teachers: frozen networks, how they are called, and where their weights come from."""

from kd_lightning.teachers.cache import TeacherCache
from kd_lightning.teachers.calls import call_model, extract_logits
from kd_lightning.teachers.frozen import FrozenTeacher, as_teacher
from kd_lightning.teachers.indexed import Indexed, IndexedDataset, split_index
from kd_lightning.teachers.weights import fingerprint, load_weights

__all__ = [
    "FrozenTeacher",
    "Indexed",
    "IndexedDataset",
    "TeacherCache",
    "as_teacher",
    "call_model",
    "extract_logits",
    "fingerprint",
    "load_weights",
    "split_index",
]
