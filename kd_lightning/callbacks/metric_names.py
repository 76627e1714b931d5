"""Other names for the logged metrics."""

from __future__ import annotations

from string import Formatter

from kd_lightning.modules.readings import NamesMetrics


class MetricNames(NamesMetrics):
    """A pattern for the names of this library's metrics, such as ``val/acc`` for ``val_acc``.

    Metrics of a stage are renamed: ``train/kd_loss``, ``val/acc``, ``test/acc``. Others keep their names, such as
    ``temperature_student``. Callbacks that follow a metric need its new name: ``EarlyStopping(monitor="val/acc")``. A
    ``ModelCheckpoint`` whose ``filename`` has such a metric needs ``auto_insert_metric_name=False``, because ``/``
    would create a folder.

    Args:
        pattern: A format string with ``{stage}`` (train, val or test) and ``{name}``.

    Raises:
        ValueError: If the pattern lacks one of the two fields or has a third.

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
