"""A callback that skips optimiser steps whose gradients are not finite."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.optimizer import Optimizer
from typing_extensions import override

from kd_lightning.modules.between_ranks import is_distributed, local_gradients
from kd_lightning.modules.non_finite import NonFiniteHandler
from kd_lightning.ranking import check_counts


class SkipNonFinite(NonFiniteHandler):
    """A callback that skips an optimiser step on all ranks if a gradient is NaN or infinite on one.

    A skipped step changes neither weights nor moments, and counts for schedules. Without this callback the run stops at
    a loss that is not finite. Skipping is not the default, because it needs a host sync in each step. Under
    ``16-mixed`` precision Lightning's scaler skips steps itself.

    Args:
        max_consecutive: Largest number of steps to skip in a row; more stop the run, because the weights or the data
            are damaged.

    Raises:
        ValueError: If ``max_consecutive`` is below 1; at fit, under DeepSpeedStrategy.
        FloatingPointError: If more than ``max_consecutive`` steps are skipped in a row.

    State: ``skipped``, the number of steps skipped so far.

    Example:
        >>> trainer = Trainer(callbacks=[SkipNonFinite()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, max_consecutive: int = 10) -> None:
        super().__init__()
        check_counts(max_consecutive=max_consecutive)
        self.max_consecutive = max_consecutive
        self.skipped = 0
        self._consecutive = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                "SkipNonFinite reads the gradients, but they are out of reach under "
                f"{type(trainer.strategy).__name__}. Leave it out, so that a loss that is not finite stops the run, or "
                "take ddp, say."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = local_gradients(p for group in optimizer.param_groups for p in group["params"])
        found = [(~torch.isfinite(gradient)).any() for gradient in gradients]
        # a rank may have no part of any gradient, and takes part in the collective
        bad = torch.stack(found).any().float() if found else torch.zeros((), device=pl_module.device)
        if is_distributed(trainer):
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if not bad:
            self._consecutive = 0
            return
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self._consecutive += 1
        rank_zero_warn(f"step {trainer.global_step} is left out, because its gradients are not finite.")
        if self._consecutive > self.max_consecutive:
            raise FloatingPointError(
                f"{self._consecutive} steps in a row had gradients that are not finite: the data or the weights are "
                "damaged. Look at the batches, and go on from an earlier checkpoint with a lower learning rate."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
