"""The base class of the LightningModules with and without a teacher."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric
from typing_extensions import Self, override

from kd_lightning._lightning import accumulates, attached_trainer, batches_done
from kd_lightning.export import describe_inputs, inputs_like
from kd_lightning.functional import next_token_targets
from kd_lightning.functional.rows import gathered, is_sharded
from kd_lightning.losses.task import as_targets
from kd_lightning.metrics import ClassificationMetrics, Task, task_of
from kd_lightning.modules.between_ranks import local_gradients
from kd_lightning.modules.checkpoints import CheckpointedModule, as_code
from kd_lightning.modules.optimization import (
    LRSchedulerConfig,
    add_groups,
    check_optimization,
    configure,
    pass_lr_on,
)
from kd_lightning.modules.readings import check_monitors, metric_name
from kd_lightning.modules.run_length import check_batches
from kd_lightning.teachers import extract_logits
from kd_lightning.teachers.calls import by_name, call_model, padding_mask, positional_names

LABEL_KEYS = ("labels", "label", "targets", "target", "y", "mask")
"""The keys of a batch under which labels are looked for, the first that is there."""


class SupervisedModule(CheckpointedModule):
    r"""The base of :class:`~kd_lightning.ClassificationModule` and :class:`~kd_lightning.DistillationModule`.

    It has their batches, logits, optimisers, metrics and hyper-parameters. :meth:`unpack_batch` and
    :meth:`extract_logits` adapt it to other data and models.

    With ``mean_over="step"`` the gradient of an optimiser step is that of the mean over all its labelled positions,
    :math:`\sum_{b,i} \nabla \ell_{b,i} / \sum_b n_b`, with :math:`n_b` positions in each accumulated batch :math:`b` of
    each rank: what one batch of them all would give. ``"batch"`` takes the mean of the batches' means, in which a token
    of a short batch weighs more. The two differ only where batches are accumulated, or spread over ranks, whose counts
    differ. Exact for losses that are a mean over labelled positions, given their temperatures.
    """

    _plateau_loss = "loss"
    """The loss of validation that ``ReduceLROnPlateau`` follows where no other metric is named."""

    def __init__(
        self,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerConfig | LRSchedulerCallable | None,
        shift_labels: bool = False,
        mean_over: Literal["batch", "step"] = "batch",
    ) -> None:
        super().__init__()
        if mean_over not in ("batch", "step"):
            raise ValueError(f"mean_over must be 'batch' or 'step', got {mean_over!r}.")
        check_optimization(optimizer, lr_scheduler)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr: float | None = None
        """The learning rate in place of the optimiser's; None leaves that one. Lightning's ``lr_find`` sets it."""
        self.shift_labels = shift_labels
        self.mean_over = mean_over
        self.metrics = nn.ModuleDict()
        self._tasks: dict[str, Task | None] = {}
        self._earlier_in_epoch: dict[str, Any] | None = None  # a checkpoint's metrics, until the first batch
        self._input_description: Any = None
        self._last_targets: Tensor | None = None
        self._step_items: Tensor | None = None  # labelled positions of the optimiser step so far

    @property
    def network(self) -> nn.Module:
        """The network that is trained."""
        raise NotImplementedError

    @property
    def _task_loss(self) -> nn.Module:
        """The task loss, which tells what targets are."""
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

        By default ``(inputs, targets)``; or a mapping, whose ``labels``, ``label``, ``targets``, ``target``, ``y`` or
        ``mask`` are the targets and the rest the networks' keywords, or a single input of any name; or a bare tensor
        of inputs, as in prediction.

        Args:
            batch: What the data loader gives.

        Returns:
            Inputs (a tensor; a tuple for positional arguments; a mapping for keywords), and targets or None.

        Raises:
            TypeError: If the batch is none of these.
        """
        if isinstance(batch, Tensor):
            return batch, None
        if isinstance(batch, Mapping):
            rest, parameters = dict(batch), inspect.signature(self.network.forward).parameters
            keys = [key for key in LABEL_KEYS if key in rest and (key != "mask" or key not in parameters)]
            targets = rest.pop(keys[0]) if keys else None
            if len(rest) == 1 and not set(rest) & set(parameters):  # {"image": …} for forward(x)
                return next(iter(rest.values())), targets
            return rest, targets
        if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
            return batch[0], batch[1] if len(batch) == 2 else None
        size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            "expected a batch (inputs, targets), a mapping with 'labels' or a tensor, got "
            f"{type(batch).__name__}{size}. "
            "Override unpack_batch(batch) to say what its inputs and targets are."
        )

    def unpack(self, batch: Any) -> tuple[Any, Tensor | None]:
        """Return what :meth:`unpack_batch` makes of the batch without the parts that no network sees."""
        return self.unpack_batch(batch)

    def extract_logits(self, output: Any) -> Tensor:
        """Return the logits in an output of the student or the teacher. Override for outputs of another kind.

        By default the tensor itself, ``.logits`` as in Hugging Face's outputs, ``["logits"]`` or ``["out"]``.
        """
        return extract_logits(output)

    def inputs_and_targets(self, batch: Any) -> tuple[Any, Tensor | None]:
        """Return the result of :meth:`unpack_batch`, completed as the network's kind asks for.

        Under ``shift_labels`` the targets are shifted by one; an encoder–decoder network of Hugging Face's gets the
        decoder's inputs that it makes of its labels.

        Raises:
            ValueError: If the batch has no labels to shift, labels that are not ``(B, L)`` indices, or labels that an
                encoder–decoder network has shifted.
        """
        inputs, targets = self.unpack(batch)
        targets = as_targets(targets, self.device)
        if self._is_encoder_decoder:
            return self._with_decoder_inputs(inputs, targets), targets
        one_or_named = isinstance(inputs, (Tensor, Mapping))  # needs no look at the network's signature in each step
        mask = padding_mask(by_name(inputs, () if one_or_named else positional_names(self.network)))
        if not self.shift_labels:
            return inputs, self._without_padding(targets, mask)
        if targets is None:
            raise ValueError(
                "shift_labels=True shifts the batch's labels, but it has none: give (input_ids, labels) or a mapping "
                "with 'labels', such as input_ids.clone() with -100 at what is not to be learnt."
            )
        return inputs, next_token_targets(targets, mask, self.ignore_index)

    def _without_padding(self, targets: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Return targets that are ignored at padding, where there is one for each position of the inputs' mask."""
        ignore = getattr(self._task_loss, "ignore_index", None)
        if targets is None or mask is None or ignore is None:
            return targets
        if targets.shape != mask.shape or targets.is_floating_point():
            return targets
        return targets.masked_fill(~mask, ignore)

    @property
    def _is_encoder_decoder(self) -> bool:
        return getattr(getattr(self.network, "config", None), "is_encoder_decoder", False)

    def _with_decoder_inputs(self, inputs: Any, labels: Tensor | None) -> Any:
        if self.shift_labels:
            raise ValueError(
                f"shift_labels=True is for causal models, but {type(self.network).__name__} is an encoder–decoder, "
                "whose labels stand at their places. Leave shift_labels out."
            )
        name = getattr(self.network, "main_input_name", "input_ids")
        keywords = inputs if isinstance(inputs, Mapping) else {name: inputs}
        shift: Any = getattr(self.network, "prepare_decoder_input_ids_from_labels", None)
        if labels is None or shift is None or {"decoder_input_ids", "decoder_inputs_embeds"} & keywords.keys():
            return inputs
        return {**keywords, "decoder_input_ids": shift(labels)}

    # ---- Lightning ------------------------------------------------------------------------------------------------

    @override
    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """Give memory to what is on the meta device, as Lightning does for a student made there, and move the rest.

        torch's own would also empty the teacher and the temperature, which have values.
        """
        return self._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device), recurse)

    @override
    def forward(self, inputs: Any) -> Tensor:
        """Return the logits of the network that is trained."""
        return self.extract_logits(call_model(self.network, self.network_inputs(inputs)))

    def network_inputs(self, inputs: Any) -> Any:
        """Return the part of a batch's inputs that the network is called with."""
        return inputs

    @override
    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Logits, in the batch's order."""
        return self(self._inputs(batch))

    def _inputs(self, batch: Any) -> Any:
        """Return the inputs of a batch, whose targets may be anything unless a decoder's inputs are made of them."""
        return self.inputs_and_targets(batch)[0] if self._is_encoder_decoder else self.unpack(batch)[0]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups: by default one, of all parameters that require a gradient."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    @override
    def configure_optimizers(self) -> Any:
        """Return the optimiser given, else the network's own (a LightningModule with one), else AdamW, lr 0.001."""
        groups = self.parameter_groups()
        if not groups[0]["params"]:
            raise ValueError(
                f"{type(self.network).__name__} has no parameter that requires a gradient: there is nothing to train. "
                "Was it frozen, or shared with the teacher?"
            )
        network = self.network
        if (
            self.optimizer is None
            and isinstance(network, LightningModule)
            and is_overridden("configure_optimizers", network, LightningModule)
        ):
            if self.lr_scheduler is not None:
                raise ValueError(
                    f"lr_scheduler was given without an optimizer, but {type(network).__name__} configures both "
                    "itself. Give an optimizer too, or leave the scheduler to the network."
                )
            if self.lr is not None:
                pass_lr_on(network, self.lr)
            return add_groups(network.configure_optimizers(), groups[1:])
        monitor = metric_name(attached_trainer(self), "val", self._plateau_loss)
        return configure(self.optimizer, self.lr_scheduler, groups, self.lr, monitor)

    # ---- what the network is called with, for an export of it -----------------------------------------------------

    @property
    def example_inputs(self) -> Any:
        """Inputs of the shapes and types of the first training batch, in this run or the checkpoint's; None before."""
        return None if self._input_description is None else inputs_like(self._input_description)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._input_description is None:
            self._input_description = describe_inputs(self.network_inputs(self._inputs(batch)))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["example_inputs"] = self._input_description
        trainer = attached_trainer(self)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.is_last_batch:
            sums = {key: metrics.sums() for key, metrics in self._metrics_of("train")}
            over_ranks = lambda value: trainer.strategy.reduce(value.clone(), reduce_op="sum")  # noqa: E731
            checkpoint["train_metrics"] = tree_map_only(Tensor, over_ranks, sums)
        checkpoint["task_loss"] = as_code(self._task_loss)

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.mean_over == "batch":
            super().backward(loss, *args, **kwargs)
            return
        targets = self._last_targets
        if targets is None or targets.is_floating_point():
            raise ValueError(
                "mean_over='step' counts the labelled positions of the step: it needs targets that are class indices. "
                "Take mean_over='batch' for other targets, or none."
            )
        items = (targets != self.ignore_index).sum()
        super().backward(loss.float() * items, *args, **kwargs)  # of the sum
        self._step_items = items if self._step_items is None else self._step_items + items
        if not accumulates(self.trainer):  # here, before any hook or clipping looks at gradients
            # Lightning has divided by the accumulated batches, and the strategy by the ranks
            means = self.trainer.accumulate_grad_batches * self.trainer.world_size
            total = self.trainer.strategy.reduce(self._step_items, reduce_op="sum")
            gradients = local_gradients(self.parameters())
            torch._foreach_mul_(gradients, means / total.clamp(min=1))  # pyright: ignore[reportPrivateImportUsage]

    @override
    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        self._step_items = None

    @override
    def on_fit_end(self) -> None:
        check_batches(self.trainer)

    @override
    def on_train_start(self) -> None:
        check_batches(self.trainer)
        check_monitors(self.trainer)  # here, where the loaders of validation are made
        if self.mean_over == "step" and self.trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                "mean_over='step' divides the accumulated gradients itself, but they are out of reach under "
                f"{type(self.trainer.strategy).__name__}. Take ddp, say, or mean_over='batch'."
            )

        for _, metrics in self._metrics_of("train"):
            metrics.reset()  # because a fit before may have ended within an epoch
        if batches_done(self.trainer) == 0:
            self._earlier_in_epoch = None
        elif self._earlier_in_epoch is None:
            rank_zero_info(
                "Resumed within an epoch: its train_ metrics cover the rest of the epoch only, because checkpoints of "
                "earlier versions hold no metrics."
            )

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
        if targets is None or (stage == "train" and is_sharded(logits)):  # because metrics gather rows
            return
        logits, teacher_logits = gathered(logits), gathered(teacher_logits)
        logits = logits.movedim(self.class_dim, -1)
        if targets.dim() == logits.dim():
            targets = targets.movedim(self.class_dim, -1)
        key = f"{stage}_{dataloader_idx}"
        if key not in self._tasks:
            self._tasks[key] = task_of(self._task_loss, logits, targets)
        if (task := self._tasks[key]) is None:
            return
        if teacher_logits is not None:  # empty where the teacher gave the probabilities of a few classes only
            teacher_logits = teacher_logits.movedim(self.class_dim, -1) if len(teacher_logits) else None
        if key not in self.metrics:
            with_teacher, evaluation, tokens = teacher_logits is not None, stage != "train", logits.dim() == 3
            metrics = ClassificationMetrics(logits.shape[-1], self.ignore_index, with_teacher, evaluation, tokens, task)
            self.metrics[key] = metrics.to(self.device)
        metrics = self.metrics[key]
        assert isinstance(metrics, ClassificationMetrics)
        if self._earlier_in_epoch and stage == "train":
            metrics.restore(self._earlier_in_epoch.pop(key, {}))
        metrics.observe(logits, targets, teacher_logits)

    def _metrics_of(self, stage: str) -> list[tuple[str, ClassificationMetrics]]:
        return [
            (key, metrics)
            for key, metrics in self.metrics.items()
            if key.startswith(f"{stage}_") and isinstance(metrics, ClassificationMetrics)
        ]

    def _log_metrics(self, stage: str) -> None:
        every = self._metrics_of(stage)
        for key, metrics in every:
            suffix = f"/dataloader_idx_{key.rpartition('_')[2]}" if len(every) > 1 else ""
            if not self.trainer.strategy.reduce(metrics["acc"].total.clone(), reduce_op="sum"):  # pyright: ignore
                continue  # no rank had a labelled position: no value, rather than 0 or NaN
            for name, metric in metrics.items():
                assert isinstance(metric, Metric)
                if not metric.update_called:
                    continue  # an epoch without optimisation, such as StochasticWeightAveraging adds
                self.log(
                    metric_name(self.trainer, stage, name) + suffix,
                    metric,
                    metric_attribute=f"metrics.{key}.{name}",  # made after Lightning listed the metrics there are
                    add_dataloader_idx=False,
                    prog_bar=stage != "train" and name == ("perplexity" if "perplexity" in metrics else "acc"),
                )

    def _weight(self, logits: Tensor, targets: Tensor | None) -> int:
        """Return the weight of a batch's mean losses: labelled positions if a sample has several, else samples."""
        if targets is None or targets.is_floating_point() or targets.dim() < 2:
            return len(logits)
        # times the ranks: Lightning takes the weights' mean over them in integers, and cuts what is left over
        return int((targets != self.ignore_index).sum()) * self.trainer.world_size

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._input_description = checkpoint.get("example_inputs")
        trainer, earlier = attached_trainer(self), checkpoint.get("train_metrics")
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            # one rank goes on from the sums over all
            self._earlier_in_epoch = {} if earlier is not None and trainer.global_rank else earlier
        before, now = checkpoint.get("task_loss"), as_code(self._task_loss)
        if before is not None and _plain_parts(before) != _plain_parts(now):
            rank_zero_warn(
                f"the checkpoint was trained with task_loss={before}, but now task_loss={now}, which is used from here "
                f"on. To go on as before, give {type(self).__name__} the same task_loss."
            )


def _plain_parts(code: str) -> list[str]:
    """Return the name and the plain arguments of a loss; class weights are compared by their values."""
    return [part for part in re.split(r"[(), ]+", code) if not part.endswith("=...")]
