"""The base class of temperature policies, and the temperature that they return."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

from kd_lightning.functional import Temperature
from kd_lightning.functional.rows import is_sharded
from kd_lightning.functional.temperature import as_temperature, check_number, check_values, is_number
from kd_lightning.temperature.signals import Signals
from kd_lightning.temperature.statistics import mean_over_valid

Temperatures: TypeAlias = Temperature | Sequence[Temperature]


def as_terms(temperatures: Temperatures) -> tuple[Temperature, ...]:
    """Return a policy's temperatures as a tuple, one for each loss term."""
    return (temperatures,) if isinstance(temperatures, Temperature) else tuple(temperatures)


def mean_temperature(temperatures: Temperatures, side: Literal["student", "teacher"] = "student") -> Tensor:
    """Return the student's or the teacher's temperature, averaged over the batch and then over the loss terms."""
    return torch.stack([getattr(term, side).detach().mean() for term in as_terms(temperatures)]).mean()


class Bounds(TypedDict, total=False):
    """Keyword arguments of every policy: ``**bounds: Unpack[Bounds]``, passed on to :class:`TemperaturePolicy`.

    Attributes:
        min_temperature: Lower bound of every temperature; positive. Default: 0.05.
        max_temperature: Upper bound of every temperature; finite. Default: 100.
    """

    min_temperature: float
    max_temperature: float


class TemperaturePolicy(nn.Module, ABC):
    """Sets the temperature of each step. Subclasses implement :meth:`compute`; users call the policy itself.

    ``policy(signals)`` = ``compute`` → ``× multiplier`` → ``clamp(min_temperature, max_temperature)`` → shape and
    value check. The buffer ``multiplier`` (1 at the start) is what callbacks move, so that every policy, scheduled and
    per-sample ones included, can follow a validation metric. A ``scale`` that the policy sets is in units of T², and
    so is multiplied by ``multiplier²``.

    Positions whose target is ``ignore_index`` may hold anything, NaN included: ``compute`` sees zeros there (policies
    that do not look at the logits set ``reads_logits = False`` and save the copy), and what it returns for them is
    replaced by the mean over the others, so that the logged mean and range are those of the positions that count.

    Parameters and buffers have shape ``(1,)`` or more (FSDP refuses 0-d ones), travel in checkpoints and stay float32
    under every trainer precision: in bfloat16 a slow moving average would stand still.

    Args:
        min_temperature: Lower bound of every temperature; positive. Far below 0.05 the loss has no gradient left.
        max_temperature: Upper bound; finite. Far above 100 T²·KL drowns in float32 rounding.

    Raises:
        ValueError: If the bounds are not ``0 < min_temperature <= max_temperature < inf``.

    Example:
        >>> class HotWhenWrong(TemperaturePolicy):
        ...     '''T = 4 where the teacher errs, else 2, per sample.'''
        ...     def compute(self, signals):
        ...         wrong = signals.teacher_logits.argmax(-1, keepdim=True) != signals.targets.unsqueeze(-1)
        ...         t = torch.where(wrong, 4.0, 2.0)
        ...         return Temperature(student=t, teacher=t)
        >>> policy = HotWhenWrong()
        >>> teacher_logits = torch.tensor([[5.0, 0.0], [5.0, 0.0]])
        >>> policy(Signals(torch.zeros(2, 2), teacher_logits, torch.tensor([0, 1]))).teacher
        tensor([[2.],
                [4.]])
        >>> _ = policy.multiplier.mul_(0.5)
        >>> policy(Signals(torch.zeros(2, 2), teacher_logits, torch.tensor([0, 1]))).teacher
        tensor([[1.],
                [2.]])
    """

    multiplier: Tensor
    reads_logits: ClassVar[bool] = True

    def __init__(self, *, min_temperature: float = 0.05, max_temperature: float = 100.0) -> None:
        super().__init__()
        for name, value in (("min_temperature", min_temperature), ("max_temperature", max_temperature)):
            check_number(f"{type(self).__name__}: {name}", value)
        if not 0 < min_temperature <= max_temperature < math.inf:
            raise ValueError(
                "temperature bounds must satisfy 0 < min_temperature <= max_temperature < inf, got "
                f"min_temperature={min_temperature}, max_temperature={max_temperature}."
            )
        self.min_temperature = float(min_temperature)
        self.max_temperature = float(max_temperature)
        self.register_buffer("multiplier", torch.ones(1, dtype=torch.float32))
        self.register_load_state_dict_post_hook(_check_multiplier)

    @abstractmethod
    def compute(self, signals: Signals) -> Temperatures:
        """Return the temperature by the policy's own rule, before the multiplier and the bounds.

        Args:
            signals: Logits in float32 (or float64), class dimension last.

        Returns:
            One :class:`Temperature`, or a sequence of them: one loss term each.
        """

    @property
    def needs_logits(self) -> bool:
        """Return True if the policy, or one within it, reads the logits or changes them."""
        parts = [part for part in self.modules() if isinstance(part, TemperaturePolicy)]
        return any(part.reads_logits or type(part).transform is not TemperaturePolicy.transform for part in parts)

    def transform(self, logits: Tensor) -> Tensor:
        """Return the logits that the loss sees (class dimension last).

        Default: the same, transformed by the policies within this one; a class-wise policy must centre them.
        """
        for policy in self._inner_policies():
            logits = policy.transform(logits)
        return logits

    def loss_scale(self, temperature: Temperature) -> Tensor | None:
        """Return the factor of the loss at the bounded temperatures, for a method that publishes one.

        Default: what :meth:`compute` set, times ``multiplier²``.
        """
        return None if temperature.scale is None else temperature.scale * self.multiplier.square()

    def setup_data(self, datamodule: object) -> None:
        """Take from the data module what the policy needs. Default: forward to the policies within this one.

        Called before a fit, once the training part of the data is chosen; None where there is no data module. A policy
        that reads, say, ``class_counts`` leaves its state alone where there is no such attribute.
        """
        for policy in self._inner_policies():
            policy.setup_data(datamodule)

    @property
    def batch_keys(self) -> tuple[str | int, ...]:
        """The parts of the batch that :meth:`compute` finds in ``signals.extra``: keys of a mapping, or positions.

        Default: those of the policies within this one.
        """
        return tuple(dict.fromkeys(key for policy in self._inner_policies() for key in policy.batch_keys))

    def param_groups(self) -> list[dict[str, Any]]:
        """Return optimiser groups of the policy's parameters, without weight decay. Empty if it learns nothing.

        The policy's own parameters are one group; the policies within a combination give theirs, with their own
        learning rates. No parameter is in two groups.
        """
        groups, taken = [], set()
        for group in (group for policy in self._inner_policies() for group in policy.param_groups()):
            parameters = [p for p in group["params"] if id(p) not in taken]
            taken.update(map(id, parameters))
            if parameters:
                groups.append({**group, "params": parameters})
        own = [p for p in self.parameters() if p.requires_grad and id(p) not in taken]
        return [{"params": own, "weight_decay": 0.0}, *groups] if own else groups

    def _inner_policies(self) -> list[TemperaturePolicy]:
        """Return the policies directly within this one, each once."""

        def within(module: nn.Module) -> Iterator[TemperaturePolicy]:
            for child in module.children():
                if isinstance(child, TemperaturePolicy):
                    yield child
                else:
                    yield from within(child)

        return list(dict.fromkeys(within(self)))

    def forward(self, signals: Signals) -> Temperatures:
        """Compute, multiply, bound and check the temperature for one batch."""
        if is_sharded(signals.student_logits, signals.teacher_logits):
            signals = self._without_logits(signals)
        dtype = torch.promote_types(signals.student_logits.dtype, torch.float32)
        if signals.student_logits.dtype != dtype or signals.teacher_logits.dtype != dtype:
            signals = signals.replace(
                student_logits=signals.student_logits.to(dtype), teacher_logits=signals.teacher_logits.to(dtype)
            )
        if self.reads_logits and (valid := signals.valid) is not None:
            left_out = ~valid.unsqueeze(-1)
            signals = signals.replace(
                student_logits=signals.student_logits.masked_fill(left_out, 0.0),
                teacher_logits=signals.teacher_logits.masked_fill(left_out, 0.0),
            )
        computed = self.compute(signals)
        if isinstance(computed, Temperature):
            return self._finish(computed, signals)
        if not isinstance(computed, (tuple, list)) or not computed:
            raise TypeError(self._wrong_type(computed))
        return tuple(self._finish(term, signals) for term in computed)

    def _without_logits(self, signals: Signals) -> Signals:
        """Return signals with zeros, which take no memory, in the place of logits that are sharded over ranks."""
        if self.needs_logits:
            raise ValueError(
                f"{type(self).__name__} reads the logits, whose classes are sharded over ranks, so that no rank has a "
                "row. Take a number, a schedule or a policy with reads_logits=False, or gather both sides: "
                "logits.full_tensor()."
            )
        like = signals.student_logits
        zeros = torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
        return signals.replace(student_logits=zeros, teacher_logits=zeros)

    def _wrong_type(self, computed: object) -> str:
        return (
            f"{type(self).__name__}.compute must return a Temperature of two tensors, or a sequence of them, got "
            f"{computed!r}. Write Temperature(student=t, teacher=t) with t = signals.full(4.0), or a tensor (N, 1) for "
            "one temperature per sample."
        )

    def _finish(self, computed: Temperature, signals: Signals) -> Temperature:
        if not (isinstance(computed, Temperature) and all(isinstance(t, Tensor) or is_number(t) for t in computed[:2])):
            raise TypeError(self._wrong_type(computed))
        student = self._finish_side(computed.student, signals)
        shared = computed.teacher is computed.student
        teacher = student if shared else self._finish_side(computed.teacher, signals)
        scale = None if computed.scale is None else _fill_left_out(computed.scale, signals)
        scale = self.loss_scale(Temperature(student, teacher, scale))
        temperature = Temperature(student, teacher, scale)
        return as_temperature(temperature, signals.student_logits, f"{type(self).__name__}: ")

    def _finish_side(self, temperature: Tensor | float, signals: Signals) -> Tensor:
        message = (  # because the bounds would hide the sign
            f"{type(self).__name__}.compute returned a negative temperature. Temperatures are positive: bring "
            "values of any sign there by softplus or exp."
        )
        if isinstance(temperature, Tensor):
            check_values(~(temperature.detach() < 0).any(), message)
        elif temperature < 0:
            raise ValueError(message)
        return _fill_left_out(self._bound(temperature), signals)

    def _bound(self, temperature: Tensor | float) -> Tensor:
        return (temperature * self.multiplier).clamp(self.min_temperature, self.max_temperature)

    def _check_within_bounds(self, **values: float) -> None:
        for name, value in values.items():
            check_number(f"{type(self).__name__}: {name}", value)
            if not self.min_temperature <= value <= self.max_temperature:  # NaN fails too
                raise ValueError(
                    f"{type(self).__name__}: {name} must be a temperature within the policy's bounds "
                    f"[{self.min_temperature:g}, {self.max_temperature:g}], got {value}. Usual values lie between 1 "
                    "and 20; the bounds are the arguments min_temperature and max_temperature."
                )

    def _set_range(self, min_value: float, max_value: float) -> None:
        """Store the range of the policy's own rule, or raise if it is not within the bounds."""
        self._check_within_bounds(min_value=min_value, max_value=max_value)
        if min_value > max_value:
            raise ValueError(
                f"{type(self).__name__}: min_value must not be above max_value, got min_value={min_value:g}, "
                f"max_value={max_value:g}."
            )
        self.min_value = float(min_value)
        self.max_value = float(max_value)

    def _within_range(self, share: Tensor) -> Temperature:
        """Return a share of the way from ``min_value`` to ``max_value`` as the temperature of both sides."""
        temperature = self.min_value + (self.max_value - self.min_value) * share
        return Temperature(temperature, temperature)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemperaturePolicy:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        """Return ``name=value`` of the constructor's arguments, and of the bounds where they are not the defaults.

        An argument is shown if the policy has an attribute of its name that is neither a module nor a tensor. A
        ``sync`` that is off is not, as older checkpoints do not have it.
        Checkpoints compare this text with that of the run that resumes from them.
        """
        defaults = inspect.signature(TemperaturePolicy).parameters
        names: dict[str, None] = {}
        for policy in type(self).__mro__[: type(self).__mro__.index(TemperaturePolicy)]:
            names |= dict.fromkeys(inspect.signature(policy.__init__).parameters if "__init__" in vars(policy) else ())
        values = {name: getattr(self, name) for name in names if name not in defaults and hasattr(self, name)}
        values |= {name: getattr(self, name) for name, p in defaults.items() if getattr(self, name) != p.default}
        values = {name: value for name, value in values.items() if not isinstance(value, (nn.Module, Tensor))}
        shown = (f"{name}={_shown(value)}" for name, value in values.items())
        return ", ".join(text for text in shown if text != "sync=False")


def _check_multiplier(policy: nn.Module, _: object) -> None:
    assert isinstance(policy, TemperaturePolicy)
    value = 1.0 if policy.multiplier.is_meta else policy.multiplier.item()
    if not 0 < value < math.inf:
        raise ValueError(
            f"the multiplier of {type(policy).__name__} must be positive and finite, but the checkpoint has {value:g}: "
            "the checkpoint was damaged or edited. Load another, or set the multiplier in it to 1."
        )


def _shown(value: object) -> str:
    """Return a number without trailing zeros, a string with its quotes, and the text of any other value."""
    if type(value) is float:
        return f"{value:g}"
    return repr(value) if isinstance(value, str) else str(value)


def _fill_left_out(values: Tensor, signals: Signals) -> Tensor:
    """Return values per position, with the mean over the valid positions in place of those left out."""
    per_position = values.shape == (*signals.student_logits.shape[:-1], 1)
    if not per_position or (valid := signals.valid) is None:
        return values
    return torch.where((valid | ~valid.any()).unsqueeze(-1), values, mean_over_valid(values.detach(), valid))
