"""Teachers: frozen networks, how they are called, and where their weights come from."""

from kd_lightning.teachers.calls import Call, call_model, extract_logits
from kd_lightning.teachers.frozen import FrozenTeacher, as_teacher
from kd_lightning.teachers.weights import fingerprint, load_weights

__all__ = ["Call", "FrozenTeacher", "as_teacher", "call_model", "extract_logits", "fingerprint", "load_weights"]
