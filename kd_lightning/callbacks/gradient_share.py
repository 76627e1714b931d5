"""A weight that keeps distillation's share of the gradient constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from typing_extensions import override

from kd_lightning._lightning import accumulates
from kd_lightning.callbacks.common import find_distiller
from kd_lightning.distiller import DistillationOutput
from kd_lightning.functional.across_ranks import sum_over_ranks
from kd_lightning.modules.readings import is_logging_step
from kd_lightning.schedules import ConstantSchedule, Progress


class GradientShare(Callback):
    r"""A callback that sets ``kd_weight`` so that distillation keeps its share of the gradient at any temperature.

    .. math::
        \frac{\|w_{kd} \, g_{kd}\|}{\|w_{kd} \, g_{kd}\| + \|w_{task} \, g_{task}\|} = \rho
        \quad\Longleftrightarrow\quad
        w_{kd} = w_{task} \, \frac{\|g_{task}\|}{\|g_{kd}\|} \, \frac{\rho}{1 - \rho}

    with the gradients of the two unweighted terms with respect to the student's parameters; layer terms are left out.
    The first step and each step that the loggers write measure them, with two further backward passes, and set the
    weight of the next step. No other step has a cost. The weight's logarithm is averaged over the measurements,
    :math:`\log w \leftarrow \delta \log w + (1 - \delta) \log w_{kd}`, with the norms' mean square over the ranks, so
    that ranks agree.

    The callback replaces the schedule of ``kd_weight``, whose value the first step uses. The weight stays where a
    gradient is 0 or not finite, or distillation is off. A :class:`~kd_lightning.callbacks.TemperatureMonitor` logs the
    share as ``kd_gradient_share``.

    Args:
        target: :math:`\rho`, between 0 and 1.
        decay: :math:`\delta` in [0, 1): 0 follows the last measurement alone, 0.9 about the last ten.

    Raises:
        ValueError: If an argument is outside its range; at fit, if ``task_weight`` is 0, or if the strategy shards the
            parameters.
        TypeError: At fit, if the run has no Distiller.
        RuntimeError: In the first step, if the loss gives no separate terms, as FusedLinearKDLoss.

    State: the weight.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = GradientShare(target=0.5)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(self, target: float = 0.5, decay: float = 0.5) -> None:
        super().__init__()
        if not 0 < target < 1:
            raise ValueError(
                f"target is distillation's share of the gradient, between 0 and 1, got {target}. For the ends set "
                "kd_weight or task_weight to 0."
            )
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}: with 1 the weight would never move.")
        self.target = target
        self.decay = decay
        self.kd_weight: float | None = None
        """The latest weight; None before the first measurement."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # in every stage, because loading compares a checkpoint with the settings
        distiller = find_distiller(trainer, pl_module)
        before = distiller.kd_weight
        if not (isinstance(before, _Weight) and before.share is self):
            distiller.kd_weight = _Weight(self, before)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        distiller = find_distiller(trainer, pl_module)
        distiller.keeps_output = True
        if distiller.task_weight == ConstantSchedule(0):
            raise ValueError(
                "GradientShare shares the gradient between distillation and the task, but task_weight is 0. Give it a "
                "weight, or leave GradientShare out."
            )
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise ValueError(
                f"GradientShare differentiates by whole parameters, which {type(trainer.strategy).__name__} shards. "
                "Take ddp, or a schedule for kd_weight."
            )

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        due = self.kd_weight is None or is_logging_step(trainer)
        distiller = find_distiller(trainer, pl_module)
        out = distiller.last_output
        if not due or accumulates(trainer) or out is None or not (out.kd_weight and out.task_weight):
            return
        if not out.kd_loss.requires_grad:
            raise RuntimeError(
                f"GradientShare differentiates distillation and task apart, but {type(distiller.kd_loss).__name__} "
                "gives the gradient of their sum alone. Take KDLoss, or a schedule for kd_weight."
            )
        own = {id(parameter) for parameter in distiller.parameters()}
        parameters = [p for p in pl_module.parameters() if p.requires_grad and id(p) not in own]
        kd, task = sum_over_ranks(gradient_norms(out, parameters).square()).sqrt().tolist()
        if not (0 < kd < math.inf and 0 < task < math.inf):
            return
        weight = out.kd_weight * (task / kd) * self.target / (1 - self.target)
        if self.kd_weight is not None:
            weight = math.exp(self.decay * math.log(self.kd_weight) + (1 - self.decay) * math.log(weight))
        self.kd_weight = weight

    def replicated_state(self) -> dict[str, Any]:
        """Return the state that must be the same on every rank."""
        return self.state_dict()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"kd_weight": self.kd_weight}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kd_weight = state_dict["kd_weight"]


class _Weight:
    """The schedule of a :class:`GradientShare`: the run's weight until the first measurement, then the callback's.

    Its text, which checkpoints compare, does not hold the weight.
    """

    def __init__(self, share: GradientShare, before: Callable[[Progress], float]) -> None:
        self.share = share
        self.before = before

    def __call__(self, progress: Progress) -> float:
        return self.before(progress) if self.share.kd_weight is None else self.share.kd_weight

    def __repr__(self) -> str:
        return f"GradientShare(target={self.share.target}, decay={self.share.decay})"


def gradient_norms(output: DistillationOutput, parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient norms of the weighted distillation term and of the weighted task term, ``(2,)`` in float32.

    Args:
        output: An output whose loss is not yet differentiated, and can be afterwards.
        parameters: The parameters to differentiate by; their ``grad`` is not changed.
    """
    norms = []
    for term in (output.kd_weight * output.kd_loss, output.task_weight * output.task_loss):
        if not term.requires_grad:
            norms.append(torch.zeros((), device=term.device))
            continue
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        norms.append(torch.stack([grad.float().square().sum() for grad in grads if grad is not None]).sum().sqrt())
    return torch.stack(norms)


def gradient_share(output: DistillationOutput, parameters: Sequence[Tensor]) -> Tensor:
    r"""Return the distillation term's share :math:`\|g_{kd}\| / (\|g_{kd}\| + \|g_{task}\|)` in the gradient norm.

    Args:
        output: An output whose loss is not yet differentiated, and can be afterwards.
        parameters: The parameters to differentiate by; their ``grad`` is not changed.

    Returns:
        A float32 scalar in [0, 1]; NaN where both gradients are 0.

    Example:
        >>> from kd_lightning import Distiller
        >>> weight = torch.eye(3, requires_grad=True)
        >>> distiller = Distiller(None, temperature=1.0, kd_weight=1.0, task_weight=1.0)
        >>> x, targets = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
        >>> hard = torch.tensor([[99.0, 0.0, 0.0]])  # a teacher as certain as the label
        >>> gradient_share(distiller(x, x @ weight, targets, teacher_logits=hard), [weight])
        tensor(0.5000)
    """
    norms = gradient_norms(output, parameters)
    return norms[0] / norms.sum()
