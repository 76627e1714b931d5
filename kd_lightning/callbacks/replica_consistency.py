"""A check that the temperature is the same on every rank."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from kd_lightning._lightning import callbacks_of
from kd_lightning.callbacks.common import find_holder
from kd_lightning.modules.run import gather

__all__ = ["ReplicaConsistency"]


class ReplicaConsistency(Callback):
    """Stops a run whose ranks no longer agree on the temperature.

    Every ``every_n_steps`` optimiser steps, and at the end of training, ranks compare a hash of the policy's parameters
    and buffers (its ``multiplier`` among them), of whether distillation is on, and of the counters of
    :class:`AdaptiveTemperature` and :class:`EarlyStopDistillation`. They drift apart where a policy keeps a statistic
    of its own rank's batches without reducing it, or where code moves a buffer on one rank; training goes on without
    a sign, on several temperatures. With one process there is nothing to compare.

    The comparison waits for the device and for the other ranks, which is why it is not made in every step.

    Args:
        every_n_steps: Optimiser steps between comparisons.

    Raises:
        ValueError: ``every_n_steps`` below 1.
        RuntimeError: The ranks differ; names the tensors and the ranks.
        TypeError: No Distiller in this run.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ReplicaConsistency(50)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._checked_step = 0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._checked_step:  # once, where gradients accumulate
            self._checked_step = step
            self.check(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer, pl_module)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare now. A collective: every rank must call it.

        Raises:
            RuntimeError: The ranks differ.
        """
        if trainer.world_size == 1:
            return
        state = _replicated_state(trainer, pl_module)
        digests = {name: _digest(value) for name, value in state.items()}
        if len(set(gather(trainer, _digest(repr(digests))))) == 1:
            return
        ranks = gather(trainer, {name: (digests[name], _show(value)) for name, value in state.items()})
        names = sorted({name for rank in ranks for name in rank})
        lines = [line for name in names if (line := _difference(name, [rank.get(name) for rank in ranks]))]
        raise RuntimeError(
            f"the ranks differ after step {trainer.global_step}:\n  " + "\n  ".join(lines) + "\nState that the "
            "temperature depends on must be reduced over ranks before it is kept (torch.distributed.all_reduce), and "
            "moved on all of them."
        )


def _replicated_state(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    distiller = find_holder(trainer, pl_module).distiller
    policy = distiller.temperature
    state: dict[str, Any] = {
        f"distiller.temperature.{name}": tensor
        for name, tensor in [*policy.named_parameters(), *policy.named_buffers()]
    }
    state["distiller.kd_enabled"] = distiller.kd_enabled
    for callback in callbacks_of(trainer):
        counters = getattr(callback, "replicated_state", None)
        if counters is not None:
            state |= {f"{callback.state_key}.{name}": value for name, value in counters().items()}
    return state


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())
    return digest.hexdigest()


def _show(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.item():.9g}" if value.numel() == 1 else f"mean {value.detach().double().mean().item():.9g}"


def _difference(name: str, ranks: list[tuple[str, str] | None]) -> str:
    """``name: rank 0 has 1, ranks 1, 2 have 2``; nothing where all have the same."""
    groups: dict[tuple[str, str] | None, list[int]] = {}
    for rank, value in enumerate(ranks):
        groups.setdefault(value, []).append(rank)
    if len(groups) == 1:
        return ""
    parts = []
    for value, members in groups.items():
        shown = "nothing of this name" if value is None else value[1]
        who = f"rank {members[0]} has" if len(members) == 1 else f"ranks {', '.join(map(str, members))} have"
        parts.append(f"{who} {shown}")
    return f"{name}: {', '.join(parts)}"
