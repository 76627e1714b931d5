"""The names under which metrics are logged."""

from __future__ import annotations

from string import Formatter

from kd_lightning.modules.metric_names import NamesMetrics

__all__ = ["MetricNames"]


class MetricNames(NamesMetrics):
    """Names the metrics of the modules and callbacks of this library after a pattern, ``val/acc`` for ``val_acc``.

    What belongs to a stage is renamed: ``train/kd_loss``, ``val/acc``, ``test/acc``. What belongs to none keeps its
    name: ``temperature_student``, ``effective_kd_weight``. Give callbacks that follow a metric the new name:
    ``EarlyStopping(monitor="val/acc")``. A ``ModelCheckpoint`` whose ``filename`` has such a metric needs
    ``auto_insert_metric_name=False``, because ``/`` would make a folder.

    Args:
        pattern: A format string with ``{stage}``, which is train, val or test, and ``{name}``.

    Raises:
        ValueError: If the pattern lacks one of the two fields or has another.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MetricNames("{stage}/{name}")], logger=False, enable_checkpointing=False)
    """

    def __init__(self, pattern: str = "{stage}/{name}") -> None:
        super().__init__()
        fields = sorted(field for _, field, _, _ in Formatter().parse(pattern) if field is not None)
        if fields != ["name", "stage"]:
            raise ValueError(
                "the pattern of MetricNames must have the fields {stage} and {name}, once each, and no other, "
                f"got {pattern!r}. '{{stage}}/{{name}}' gives val/acc."
            )
        self.pattern = pattern
