"""Policies that look at where the logits come from: the group of a sample, the depth of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature
from kd_lightning.functional.temperature import check_values
from kd_lightning.schedules import Progress, as_schedule, value_at
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.scheduled import ScheduleLike
from kd_lightning.temperature.signals import Signals


class GroupTemperature(TemperaturePolicy):
    """One temperature for each group of samples: by source, language, difficulty or whatever the batch says of them.

    The column is a part of the batch, which neither student nor teacher sees: a key of a mapping, or a position in a
    tuple. :class:`~kd_lightning.DistillationModule` and :class:`~kd_lightning.DistillationCallback` take it from there;
    a bare :class:`~kd_lightning.Distiller` is called with ``extra={key: column}``.

    Shapes:
        Column ``(N,)``, or one entry per position, ``(…,)``; logits ``(…, C)`` → T ``(N, 1, …)`` or ``(…, 1)``.

    Args:
        key: Key of a mapping, or position in a tuple.
        temperatures: A number or a schedule for each group, by the values of the column: whole numbers, or, for
            columns that are lists, strings.
        default: T of the samples of any other group. None: another group is an error.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If there is no group or a number is outside the bounds; on the call, if the batch has no such
            column, if its shape does not fit the logits, or if a group is unknown and there is no default (for tensors
            on an accelerator an assertion of the device, without a host sync).
        TypeError: On the call, if the column is neither whole numbers nor a list.

    Interacts badly with: ``torch.compile`` where the column is a list, for whose values it compiles anew: give whole
    numbers as a tensor. And the T² factor, which weighs a group at T = 8 16 times as much as one at T = 2:
    ``KDLoss(scale="none")`` switches that off.

    Source: this package; no published evidence.

    Example:
        >>> policy = GroupTemperature("source", {"math": 1.0, "chat": 4.0}, default=2.0)
        >>> policy(Signals(torch.zeros(3, 2), torch.zeros(3, 2), extra={"source": ["chat", "math", "code"]})).student
        tensor([[4.],
                [1.],
                [2.]])
    """

    reads_logits = False

    def __init__(
        self,
        key: str | int,
        temperatures: Mapping[Any, ScheduleLike],
        default: ScheduleLike | None = None,
        **bounds: Unpack[Bounds],
    ) -> None:
        super().__init__(**bounds)
        if not isinstance(temperatures, Mapping) or not temperatures:
            raise ValueError(
                "temperatures must name a temperature for each group, such as {'math': 1.0, 'chat': 4.0}, got "
                f"{temperatures!r}."
            )
        self.key = key
        self.temperatures = dict(temperatures)
        self.default = default
        self._schedules = {group: self._schedule(group, value) for group, value in self.temperatures.items()}
        self._default = None if default is None else self._schedule("default", default)

    def _schedule(self, group: str | int, value: ScheduleLike) -> Callable[[Progress], float]:
        name = f"the temperature of {group!r}"
        if isinstance(value, (int, float)):
            self._check_within_bounds(**{name: value})
        return as_schedule(value, name)

    @property
    @override
    def batch_keys(self) -> tuple[str | int, ...]:
        return (self.key,)

    @override
    def compute(self, signals: Signals) -> Temperature:
        if self.key not in signals.extra:
            raise ValueError(
                f"GroupTemperature reads {self.key!r} of the batch, which has no such part. Have the dataset and its "
                f"collate function put it there, or call the Distiller with extra={{{self.key!r}: …}}; the logits of "
                "layers have no groups."
            )
        column, logits = signals.extra[self.key], signals.student_logits
        by_group = {group: value_at(schedule, signals.progress) for group, schedule in self._schedules.items()}
        default = math.nan if self._default is None else value_at(self._default, signals.progress)
        of_column = self._of_tensor if isinstance(column, Tensor) else self._of_list
        values = of_column(column, by_group, default, logits)
        positions = logits.shape[:-1]
        if values.shape not in (positions, positions[:1]):
            raise ValueError(
                f"the groups in {self.key!r} must have the shape {tuple(positions[:1])}, one per sample, or "
                f"{tuple(positions)}, one per position, got {tuple(values.shape)}."
            )
        temperature = values.reshape(*values.shape, *[1] * (len(positions) + 1 - values.dim()))
        return Temperature(temperature, temperature)

    def _of_tensor(self, column: Tensor, by_group: dict[Any, float], default: float, like: Tensor) -> Tensor:
        if column.is_floating_point() or column.is_complex():
            raise TypeError(self._unusable(f"a tensor of {column.dtype}"))
        column = column.to(like.device, non_blocking=True)
        values = like.new_full(column.shape, default)
        for group, value in by_group.items():
            if isinstance(group, int):
                values = torch.where(column == group, value, values)
        check_values(values.isnan().logical_not().all(), self._unknown("another"))
        return values

    def _of_list(self, column: Any, by_group: dict[Any, float], default: float, like: Tensor) -> Tensor:
        if isinstance(column, str) or not isinstance(column, Sequence):
            raise TypeError(self._unusable(type(column).__name__))
        unknown = [group for group in column if group not in by_group]
        if unknown and math.isnan(default):
            raise ValueError(self._unknown(repr(unknown[0])))
        values = torch.tensor([by_group.get(group, default) for group in column], dtype=like.dtype)
        return values.to(like.device, non_blocking=True)

    def _unusable(self, received: str) -> str:
        return (
            f"the groups in {self.key!r} must be a tensor of whole numbers, or a list of strings or whole numbers, got "
            f"{received}. Have the collate function make one of them."
        )

    def _unknown(self, received: str) -> str:
        known = ", ".join(map(repr, self.temperatures))
        return (
            f"GroupTemperature knows the groups {known} of {self.key!r} and has no default, got {received}. Name its "
            "temperature, or give a default."
        )


class DepthTemperature(TemperaturePolicy):
    r"""One temperature for shallow layers, another for deep ones: :math:`T = T_0 + (T_1 - T_0) \, d`.

    .. math:: T_s = T_t = T, \qquad d \in [0, 1]

    :math:`d` is the depth of the student's layer among those with a :class:`~kd_lightning.LayerTerm`, in the order of
    the network's modules: 0 for the first, 1 for the last, evenly between, 0.5 for one alone. The logits are at 1. One
    policy may serve all terms.

    Shapes:
        ``(1,)``.

    Args:
        shallow: :math:`T_0`, within the bounds.
        deep: :math:`T_1`, within the bounds.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If a temperature is outside the bounds.

    Suggested values: 8 and 2 for channel-wise losses, by the thought that shallow features are alike in kind rather
    than in place. To move it along the run: ``ProductTemperature([DepthTemperature(), CosineSchedule(1.0, 0.5)])``.

    Interacts badly with: terms of different losses: rows of cosines need a T far below that of activations.

    Source: ours.

    Example:
        >>> policy, logits = DepthTemperature(shallow=8.0, deep=2.0), torch.zeros(2, 3)
        >>> [policy(Signals(logits, logits, depth=depth)).student.item() for depth in (0.0, 0.5, 1.0)]
        [8.0, 5.0, 2.0]
    """

    reads_logits = False

    def __init__(self, shallow: float = 8.0, deep: float = 2.0, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        self._check_within_bounds(shallow=shallow, deep=deep)
        self.shallow = float(shallow)
        self.deep = float(deep)

    @override
    def compute(self, signals: Signals) -> Temperature:
        temperature = signals.full(self.shallow + (self.deep - self.shallow) * signals.depth)
        return Temperature(student=temperature, teacher=temperature)
