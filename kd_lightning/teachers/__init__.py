"""Teachers: frozen networks, how they are called, and where their weights come from."""

from kd_lightning.teachers.calls import HiddenStates, call_model, check_hidden_states, extract_logits, hidden_states
from kd_lightning.teachers.frozen import FrozenTeacher, as_teacher
from kd_lightning.teachers.weights import fingerprint, load_weights

__all__ = [
    "FrozenTeacher",
    "HiddenStates",
    "as_teacher",
    "call_model",
    "check_hidden_states",
    "extract_logits",
    "fingerprint",
    "hidden_states",
    "load_weights",
]
