"""Training a network on labels alone: the teacher, and the baseline that a distilled student is compared with."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning.functional.rows import check_labels, check_layout
from kd_lightning.losses import CrossEntropyLoss
from kd_lightning.losses.first_batch import check_first_batch
from kd_lightning.losses.task import as_loss, check_scalar, is_readable, task_term
from kd_lightning.modules.optimization import LRSchedulerConfig
from kd_lightning.modules.readings import is_logging_step, metric_name
from kd_lightning.modules.run import check_network
from kd_lightning.modules.supervised import SupervisedModule


class ClassificationModule(SupervisedModule):
    r"""Trains a network on labels: :math:`L = L_{task}(\text{model}(x), y)`.

    It has the recipe of :class:`~kd_lightning.DistillationModule` without the teacher, so that the teacher and the
    no-teacher baseline are trained in the same way as the student. Logs ``train_loss`` and, for validation and test,
    ``val_loss``, ``val_acc``, ``val_acc_top5``, ``val_calibration_error``; for ``(B, L, V)`` logits ``val_perplexity``
    in place of the last.

    Args:
        model: The network.
        task_loss: ``(logits, targets) -> scalar``, cross-entropy by default; logits of more than two dimensions come
            with the class dimension second.
        optimizer: A function from parameters to an optimiser. None: the network's own ``configure_optimizers`` if it is
            a LightningModule, else AdamW with a learning rate of 0.001.
        lr_scheduler: A function from the optimiser to a scheduler, or Lightning's dictionary with such a function:
            ``{"scheduler": function, "interval": "step", "frequency": 1, "monitor": "val_acc", "strict": True}``.
            ``ReduceLROnPlateau`` follows ``val_loss`` unless ``monitor`` says otherwise.
        shift_labels: Whether the target of a position is the next one's label, as causal language models are trained
            and as Hugging Face's data collators leave it to the model; see
            :func:`~kd_lightning.functional.next_token_targets`. Logs ``val_perplexity``.
        mean_over: What a loss is the mean over: the labelled positions of the ``"batch"``, or of the whole optimiser
            ``"step"``, all its accumulated batches and ranks; see :class:`SupervisedModule`.
        class_dim: The class dimension of the logits; 1 for the ``(N, C, H, W)`` of a segmentation.

    Raises:
        ValueError: If the interval or ``mean_over`` is unknown; at fit, if the network has no trainable parameters; in
            a step, if the logits fit several layouts, or the targets do not fit the logits.

    Example:
        >>> import torch
        >>> module = ClassificationModule(nn.Linear(4, 3), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> module(torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        task_loss: nn.Module | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerConfig | LRSchedulerCallable | None = None,
        shift_labels: bool = False,
        mean_over: Literal["batch", "step"] = "batch",
        class_dim: int = -1,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, shift_labels, mean_over)
        self._save_plain_hyperparameters()
        check_network("model", model)
        self.model = model
        self.task_loss = as_loss(CrossEntropyLoss() if task_loss is None else task_loss, "task_loss")
        self._class_dim = class_dim
        self._looked = False  # at the values of a first batch

    @property
    @override
    def network(self) -> nn.Module:
        return self.model

    @property
    @override
    def _task_loss(self) -> nn.Module:
        return self.task_loss

    @property
    @override
    def ignore_index(self) -> int:
        return getattr(self.task_loss, "ignore_index", -100)

    @property
    @override
    def class_dim(self) -> int:
        return self._class_dim

    @override
    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        loss, logits, self._last_targets = self._loss(batch)
        if is_logging_step(self.trainer):
            self.log(metric_name(self.trainer, "train", "loss"), loss.detach(), prog_bar=True, batch_size=len(logits))
        self._update_metrics("train", logits, self._last_targets)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, dataloader_idx)

    def _evaluate(self, stage: str, batch: Any, dataloader_idx: int) -> None:
        loss, logits, targets = self._loss(batch)
        name = metric_name(self.trainer, stage, "loss")
        self.log(name, loss, sync_dist=True, batch_size=self._weight(logits, targets))
        self._update_metrics(stage, logits, targets, dataloader_idx=dataloader_idx)

    def _loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets = self.inputs_and_targets(batch)
        if targets is None:
            raise ValueError(
                "ClassificationModule learns from targets, but the batch has none: give (inputs, targets)."
            )
        logits = self(inputs)
        check_layout(logits, self.class_dim, targets)
        check_labels(targets, logits, self.class_dim, self.ignore_index)
        if is_readable() and not self._looked:
            self._looked = True
            softened = isinstance(self.task_loss, nn.CrossEntropyLoss)
            check_first_batch(logits, (), self.class_dim, softened, self.task_loss, targets)
        loss = task_term(self.task_loss, logits.movedim(self.class_dim, 1) if logits.dim() > 2 else logits, targets)
        check_scalar(loss)
        return loss, logits, targets
