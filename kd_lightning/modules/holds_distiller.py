"""The settings of a Distiller as attributes of the object that holds it."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from kd_lightning.distiller import Distiller
from kd_lightning.temperature import Progress


def _of_distiller(name: str, doc: str) -> Any:
    def get(self: HoldsDistiller) -> Any:
        return getattr(self.distiller, name)

    def set(self: HoldsDistiller, value: Any) -> None:
        setattr(self.distiller, name, value)

    return property(get, set, doc=doc)


class HoldsDistiller:
    """The settings of a Distiller, read and set on the object that holds it."""

    distiller: Distiller
    teacher: Any = _of_distiller("teacher", "The :class:`~kd_lightning.teachers.Teacher`, or None.")
    temperature: Any = _of_distiller("temperature", "The temperature policy.")
    kd_loss: Any = _of_distiller("kd_loss", "The distillation loss.")
    kd_weight: Any = _of_distiller("kd_weight", "The schedule of the distillation term's weight.")
    task_weight: Any = _of_distiller("task_weight", "The schedule of the task term's weight.")
    last_output: Any = _of_distiller(
        "last_output", "The output for the current training batch, until the ``on_train_batch_end`` of callbacks."
    )

    @property
    def progress(self) -> Progress:
        """The progress of training."""
        raise NotImplementedError

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # because nn.Module registers a network past the property
        else:
            super().__setattr__(name, value)
