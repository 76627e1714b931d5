"""Training a network on labels alone: the teacher, and the baseline that a distilled student is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric
from typing_extensions import override

from kd_lightning.losses import CrossEntropyLoss
from kd_lightning.metrics import ClassificationMetrics
from kd_lightning.teachers import call_model, extract_logits
from kd_lightning.training import configure_with_groups, is_logging_step

__all__ = ["ClassificationModule", "SupervisedModule"]

_PLAIN = (int, float, str, bool, type(None))


class SupervisedModule(LightningModule):
    """What :class:`ClassificationModule` and :class:`~kd_lightning.DistillationModule` share.

    Batches, logits, optimisers, metrics and hyper-parameters. Two methods adapt it to other data and models:
    :meth:`unpack_batch` and :meth:`extract_logits`.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        lr_scheduler_interval: Literal["epoch", "step"],
    ) -> None:
        super().__init__()
        if lr_scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"lr_scheduler_interval must be 'epoch' or 'step', got {lr_scheduler_interval!r}.")
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.metrics = nn.ModuleDict()

    @property
    def network(self) -> nn.Module:
        """The network that is trained."""
        raise NotImplementedError

    @property
    def class_dim(self) -> int:
        """The class dimension of the logits."""
        return -1

    @property
    def ignore_index(self) -> int:
        """The target value of positions without a label."""
        return -100

    # ---- what a user may override ---------------------------------------------------------------------------------

    def unpack_batch(self, batch: Any) -> tuple[Any, Tensor | None]:
        """Split a batch into the networks' inputs and the targets. Override for batches of another shape.

        By default ``(inputs, targets)``; or a mapping, whose ``labels`` (or ``targets``) are the targets and the rest
        the networks' keywords; or a bare tensor of inputs, as in prediction.

        Args:
            batch: What the data loader gives.

        Returns:
            Inputs (a tensor; a tuple for positional arguments; a mapping for keywords), and targets or None.

        Raises:
            TypeError: A batch of another shape.
        """
        if isinstance(batch, Tensor):
            return batch, None
        if isinstance(batch, Mapping):
            rest = dict(batch)
            for key in ("labels", "targets"):
                if key in rest:
                    return rest, rest.pop(key)
            return rest, None
        if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
            return batch[0], batch[1] if len(batch) == 2 else None
        size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            "expected a batch (inputs, targets), a mapping with 'labels' or a tensor, got "
            f"{type(batch).__name__}{size}. "
            "Override unpack_batch(batch) to say what its inputs and targets are."
        )

    def extract_logits(self, output: Any) -> Tensor:
        """The logits in a network's output, the student's and the teacher's. Override for outputs of another kind.

        By default the tensor itself, ``.logits`` as in Hugging Face's outputs, ``["logits"]`` or ``["out"]``.
        """
        return extract_logits(output)

    # ---- Lightning ------------------------------------------------------------------------------------------------

    @override
    def forward(self, inputs: Any) -> Tensor:
        """The logits of the network that is trained."""
        return self.extract_logits(call_model(self.network, inputs))

    @override
    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Logits, in the batch's order."""
        return self(self.unpack_batch(batch)[0])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups: by default one, of all parameters that require a gradient."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    @override
    def configure_optimizers(self) -> Any:
        """The optimiser given; else the network's own, if it is a LightningModule with one; else AdamW, lr 0.001."""
        first, *rest = self.parameter_groups()
        if not first["params"]:
            raise ValueError(
                f"{type(self.network).__name__} has no parameter that requires a gradient: there is nothing to train. "
                "Was it frozen, or shared with the teacher?"
            )
        if self.optimizer is None and self._network_optimizers is not None:
            return configure_with_groups(self._network_optimizers, rest)
        parameters = [first, *rest] if rest else first["params"]
        optimizer = self.optimizer(parameters) if self.optimizer else torch.optim.AdamW(parameters, lr=1e-3)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        config = {"scheduler": scheduler, "interval": self.lr_scheduler_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", "val_task_loss")
        return {"optimizer": optimizer, "lr_scheduler": config}

    @property
    def _network_optimizers(self) -> Any:
        network = self.network
        if isinstance(network, LightningModule) and is_overridden("configure_optimizers", network, LightningModule):
            return network.configure_optimizers
        return None

    @override
    def on_train_epoch_end(self) -> None:
        self._log_metrics("train")

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    # ---- for the subclasses ---------------------------------------------------------------------------------------

    def _update_metrics(
        self,
        stage: str,
        logits: Tensor,
        targets: Tensor | None,
        teacher_logits: Tensor | None = None,
        dataloader_idx: int = 0,
    ) -> None:
        if targets is None:
            return
        logits = logits.movedim(self.class_dim, -1)
        if targets.shape not in (logits.shape[:-1], logits.shape):
            return  # a task whose targets are no classes has no accuracy
        if teacher_logits is not None:
            teacher_logits = teacher_logits.movedim(self.class_dim, -1)
        key = f"{stage}_{dataloader_idx}"
        if key not in self.metrics:
            metrics = ClassificationMetrics(
                logits.shape[-1], self.ignore_index, teacher_logits is not None, calibration=stage != "train"
            )
            self.metrics[key] = metrics.to(self.device)
        metrics = self.metrics[key]
        assert isinstance(metrics, ClassificationMetrics)
        metrics.observe(logits, targets, teacher_logits)

    def _log_metrics(self, stage: str) -> None:
        keys = [key for key in self.metrics if key.startswith(f"{stage}_")]
        for key in keys:
            suffix = f"/dataloader_idx_{key.rpartition('_')[2]}" if len(keys) > 1 else ""
            metrics = self.metrics[key]
            assert isinstance(metrics, ClassificationMetrics)
            for name, metric in metrics.items():
                assert isinstance(metric, Metric)
                if not metric.update_called:
                    continue  # an epoch without optimisation, such as StochasticWeightAveraging adds
                self.log(
                    f"{stage}_{name}{suffix}",
                    metric,
                    metric_attribute=f"metrics.{key}.{name}",  # made after Lightning listed the metrics there are
                    add_dataloader_idx=False,
                    prog_bar=name == "acc" and stage != "train",
                )

    def _save_plain_hyperparameters(self) -> None:
        """Save the arguments of the ``__init__`` that calls this, so that checkpoints load with ``weights_only=True``.

        From the command line that is the whole configuration, as Lightning gives it. In Python it is the arguments that
        are primitives: networks and functions are given again to ``load_from_checkpoint``.
        """
        frame = inspect.currentframe()
        init = frame.f_back if frame is not None else None
        assert init is not None
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters(frame=init)
            return
        complex_arguments, caller = [], init
        while caller is not None and caller.f_code.co_name == "__init__" and caller.f_locals.get("self") is self:
            names = inspect.getargvalues(caller)[0]
            complex_arguments += [name for name in names if not isinstance(caller.f_locals[name], _PLAIN)]
            caller = caller.f_back
        self.save_hyperparameters(ignore=complex_arguments, frame=init)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        hparams = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if hparams and "_instantiator" in hparams and self._trainer is None:
            # load_from_checkpoint of a file from the command line: keep its plain configuration rather than the objects
            # that were made of it, or the next checkpoint could not be loaded
            self._set_hparams(dict(hparams))
            self._hparams_name = "kwargs"


class ClassificationModule(SupervisedModule):
    r"""Trains a network on labels: :math:`L = L_{task}(\text{model}(x), y)`.

    It has the recipe of :class:`~kd_lightning.DistillationModule` without the teacher, so that the teacher and the
    no-teacher baseline are trained in the same way as the student. Logs ``train_loss`` and, for validation and test,
    ``val_loss``, ``val_acc``, ``val_acc_top5``, ``val_calibration_error``.

    Args:
        model: The network.
        task_loss: ``(logits, targets) -> scalar``, cross-entropy by default; logits of more than two dimensions come
            with the class dimension second.
        optimizer: A function from parameters to an optimiser. None: the network's own ``configure_optimizers`` if it is
            a LightningModule, else AdamW with a learning rate of 0.001.
        lr_scheduler: A function from the optimiser to a scheduler.
        lr_scheduler_interval: Whether the scheduler steps each ``"epoch"`` or each ``"step"``.

    Raises:
        ValueError: An unknown interval; at fit, a network without trainable parameters.

    Example:
        >>> module = ClassificationModule(nn.Linear(4, 3), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> module(torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        task_loss: nn.Module | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_scheduler_interval)
        self._save_plain_hyperparameters()
        self.model = model
        self.task_loss = CrossEntropyLoss() if task_loss is None else task_loss

    @property
    @override
    def network(self) -> nn.Module:
        return self.model

    @override
    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        loss, logits, targets = self._loss(batch)
        if is_logging_step(self.trainer):
            self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(logits))
        self._update_metrics("train", logits, targets)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, dataloader_idx)

    def _evaluate(self, stage: str, batch: Any, dataloader_idx: int) -> None:
        loss, logits, targets = self._loss(batch)
        self.log(f"{stage}_loss", loss, sync_dist=True, batch_size=len(logits))
        self._update_metrics(stage, logits, targets, dataloader_idx=dataloader_idx)

    def _loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets = self.unpack_batch(batch)
        if targets is None:
            raise ValueError(
                "ClassificationModule learns from targets, but the batch has none: give (inputs, targets)."
            )
        logits = self(inputs)
        return self.task_loss(logits.movedim(-1, 1) if logits.dim() > 2 else logits, targets), logits, targets
