"""The student's own moving average as a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from typing_extensions import Self, override

from kd_lightning.functional.rows import gathered, local_part
from kd_lightning.functional.sharded import sharded_as
from kd_lightning.schedules import Progress, Schedule
from kd_lightning.teachers.calls import HiddenStates, call_model, extract_logits, hidden_states
from kd_lightning.teachers.sharded import shard_as
from kd_lightning.teachers.teacher import Teacher
from kd_lightning.teachers.weights import hashed, is_without_values
from kd_lightning.temperature import TemperaturePolicy, as_policy


class EMATeacher(Teacher):
    r"""The student's exponential moving average as its teacher (mean teacher, self-distillation).

    After optimiser step :math:`t = 1, 2, …`, with the student's weights and buffers :math:`w_t` (integer buffers are
    copied),

    .. math:: \bar w_t = d_t \, \bar w_{t-1} + (1 - d_t) \, w_t, \quad \bar w_0 = w_0, \quad
        d_t = \min\bigl(d, \tfrac{t}{t + 1}\bigr)

    so that with ``warmup`` the first :math:`1 / (1 - d)` averages are the plain mean of all weights so far. Without it
    :math:`d_t = d`.

    The average is in eval mode, without gradient, and in checkpoints, from which a run resumes exactly. Averages of
    bfloat16 and float16 weights are kept in float32. All ranks have the same: buffers, which differ between ranks, are
    rank 0's. Under FSDP2 the average is sharded as the student is, if :meth:`follow` was called before ``fully_shard``
    and again after it, as the module does. :class:`~kd_lightning.DistillationModule` and
    :class:`~kd_lightning.callbacks.DistillationCallback` call :meth:`follow` and, after each optimiser step,
    :meth:`update`, as a loop of your own does; the callback averages the layer that ``student_layer`` names.

    Args:
        decay: :math:`d`, in [0, 1).
        warmup: Whether the decay grows to :math:`d`.
        temperature: The average's own temperature, a number, schedule or policy; the Distiller's is the student's.
            None: the Distiller's for both.

    Raises:
        ValueError: If ``decay`` is outside its range.
        RuntimeError: On the call, if :meth:`follow` was not called.

    Source: A. Tarvainen & H. Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv 1703.01780.

    Example:
        >>> student = nn.Linear(1, 1, bias=False)
        >>> _ = student.weight.data.fill_(0.0)
        >>> teacher = EMATeacher(decay=0.9)
        >>> teacher.follow(student)
        >>> for weight in (3.0, 6.0):  # stands for two optimiser steps
        ...     _ = student.weight.data.fill_(weight)
        ...     teacher.update()
        >>> teacher.logits(torch.ones(1, 1))  # (0 + 3 + 6) / 3
        tensor([[3.]])
    """

    def __init__(
        self,
        decay: float = 0.999,
        warmup: bool = True,
        temperature: float | Schedule | TemperaturePolicy | Callable[[Progress], float] | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay must be in [0, 1), the weight of the average so far, got {decay!r}. Usual are 0.99 to 0.9999."
            )
        self.decay = decay
        self.warmup = warmup
        self.settings = f"decay={decay:g}, warmup={warmup}"
        self.gives_hidden_states = temperature is None
        if temperature is not None:
            self.temperatures = [as_policy(temperature)]
            self.settings += f", temperature={self.temperatures[0]!r}"
        self._student: nn.Module | None = None
        self._average: nn.Module | None = None
        self._wide: dict[str, Tensor] = {}  # averages in float32 of narrower tensors, in which they would stand still
        self._updates = 0
        self._restored: Mapping[str, Any] | None = None

    # ---- the average ----------------------------------------------------------------------------------------------

    @override
    def follow(self, student: nn.Module) -> None:
        """Start the average at the student's weights, unless it was updated or restored."""
        if self._student is not student:
            if any(isinstance(part, FSDPModule) for part in student.modules()):
                raise ValueError(
                    "an EMATeacher copies the student, and a network that is sharded over ranks cannot be copied. Call "
                    "teacher.follow(student) before fully_shard(student), and once more after it."
                )
            self._average = copy.deepcopy(student).requires_grad_(False).eval()
            self._student, self._wide, self._updates = student, {}, 0
        self._place(student)
        if self._restored is not None:
            self._restore(self._restored)
        elif not self._updates:
            for _, average, value in self._pairs():
                average.copy_(value)

    @override
    def update(self) -> None:
        self._network()
        self._updates += 1
        decay = min(self.decay, self._updates / (self._updates + 1)) if self.warmup else self.decay
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for name, average, value in self._pairs():
            if not average.is_floating_point():
                average.copy_(value)
                continue
            wide = self._widened(name, average)
            averages.append(local_part(wide))
            values.append(local_part(value.to(wide.dtype)))
        get_ema_multi_avg_fn(decay)(averages, values, None)
        self._narrow()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for buffer in self._network().buffers():
                dist.broadcast(buffer, src=0)

    def _place(self, student: nn.Module) -> None:
        """Shard the average as the student is, and give it memory if it was copied without."""
        average = self._network()
        shard_as(average, student)
        if is_without_values(average) and not is_without_values(student):
            average.to_empty(device=next(student.parameters()).device)
        averages = dict(_tensors(average))
        self._wide = {name: sharded_as(averages[name], wide) for name, wide in self._wide.items()}

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, average and value of each parameter and buffer."""
        assert self._student is not None
        student = dict(_tensors(self._student))
        for name, average in _tensors(self._network()):
            yield name, average, student[name].to(average.device)

    def _widened(self, name: str, average: Tensor) -> Tensor:
        if average.element_size() >= 4:
            return average
        wide = self._wide.get(name)
        if wide is None or wide.device != average.device:
            self._wide[name] = wide = (average if wide is None else wide).to(average.device, torch.float32)
        return wide

    def _narrow(self) -> None:
        averages = dict(_tensors(self._network()))
        for name, wide in self._wide.items():
            averages[name].copy_(wide)

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        saved = state_dict["average"]
        in_file = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        here = {name: tuple(tensor.shape) for name, tensor in _tensors(self._network())}
        if in_file != here:
            other = dict(sorted(in_file.items() ^ here.items()))
            raise ValueError(
                "the checkpoint's EMATeacher averaged another student than the one that this one follows: they differ "
                f"in {', '.join(list(other)[:4])}. Resume with that student, and with a new EMATeacher."
            )
        self._restored, self._updates = None, state_dict["updates"]
        for name, average in _tensors(self._network()):
            value = sharded_as(average, saved[name].to(average.device))
            average.copy_(value)
            if average.dtype != value.dtype:
                self._wide[name] = value

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the average; a sharded one is gathered, a tensor at a time, to the host of rank 0. A collective."""
        if self._average is None:
            return {}
        saved = dict(_tensors(self._average)) | self._wide
        return {"updates": self._updates, "average": {name: _whole_copy(tensor) for name, tensor in saved.items()}}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if self._average is None or is_without_values(self._average):
            self._restored = state_dict  # until the student is known and has values
        else:
            self._restore(state_dict)

    # ---- the teacher ----------------------------------------------------------------------------------------------

    @property
    @override
    def loaded(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._average is not None

    @override
    def logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> Tensor:
        return extract(self(inputs))

    @override
    def __call__(self, inputs: Any) -> Any:
        """Return the averaged network's own output for these inputs."""
        with torch.no_grad():
            return call_model(self._network(), inputs)

    @override
    def hidden_states(self, inputs: Any, check: bool = False) -> HiddenStates:
        with torch.no_grad():
            return hidden_states(self._network(), inputs)

    @override
    def fingerprint(self) -> str:
        """Hash how the average is taken; ranks start from one student, and the average itself is in checkpoints."""
        return hashed(f"ema {self.decay} {self.warmup}")

    @override
    def network(self) -> nn.Module:
        raise ValueError(
            "layers are hooked before training, and the network of an EMATeacher is a copy that training makes: leave "
            "them out."
        )

    @override
    def index(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise, since logits of a moving average cannot be kept."""
        raise ValueError(
            "the logits of an EMATeacher change with each step, so that no cache can keep them: leave the cache out."
        )

    @override
    def modules(self) -> Iterable[nn.Module]:
        return () if self._average is None else (self._average,)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self._average is not None:
            self._average._apply(fn)

    def _network(self) -> nn.Module:
        if self._average is None:
            raise RuntimeError(
                "an EMATeacher must know the student that it averages before it teaches: call teacher.follow(student), "
                "and teacher.update() after each optimiser step."
            )
        return self._average

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))  # of its own, because this teacher changes
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield name, cast(Tensor, tensor).detach()


def _whole_copy(tensor: Tensor) -> Tensor:
    """Return a copy; of a sharded tensor the whole on the host of rank 0, and no rows of it on other ranks."""
    if not isinstance(tensor, DTensor):
        return tensor.clone()
    whole = gathered(tensor)  # by all ranks
    return (whole if dist.get_rank() == 0 else whole[:0]).cpu()
