"""The task loss, with which the student would be trained without a teacher."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning.functional.logit_losses import soft_cross_entropy_loss
from kd_lightning.functional.rows import is_sharded
from kd_lightning.functional.temperature import in_transform


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss``, except that a batch without a labelled position gives 0 where torch gives NaN.

    So samples without a label (target ``ignore_index``) can be distilled without spoiling the task loss. Arguments,
    shapes (class dimension second) and soft targets are torch's.

    Example:
        >>> loss = CrossEntropyLoss()
        >>> loss(torch.zeros(2, 3), torch.tensor([-100, -100]))
        tensor(0.)
    """

    @override
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if is_sharded(input):
            return self._of_shards(input, target)
        if input.dim() > 2 and input.stride(1) == 1 and target.dim() == input.dim() - 1 and self.reduction != "none":
            # (B, V, L) that is a view of (B, L, V): row by row, as it lies in memory, takes a quarter of the time
            input, target = input.movedim(1, -1).flatten(0, -2), target.flatten()
        loss = super().forward(input, target)
        if target.is_floating_point() or self.reduction != "mean":
            return loss
        labelled = (target != self.ignore_index).any()
        return torch.where(labelled, loss, input.sum() * 0.0)  # keeps the graph: DDP expects every gradient

    def _of_shards(self, input: Any, target: Tensor) -> Tensor:
        """Return the loss of logits whose classes are sharded over ranks, by sums over ranks alone."""
        if self.weight is not None or self.label_smoothing or target.is_floating_point():
            raise ValueError(
                "the cross-entropy of logits whose classes are sharded over ranks takes class indices, without weight "
                "and label_smoothing. Leave them out, or gather the logits: logits.full_tensor()."
            )
        from kd_lightning.functional.sharded import one_hot_logits  # because DTensor is slow to import

        hot = one_hot_logits(target, input, 1)
        options: Any = {"class_dim": 1, "ignore_index": self.ignore_index, "reduction": self.reduction}
        return soft_cross_entropy_loss(input, hot, 1.0, targets=target, **options)


def is_readable() -> bool:
    """Return False while values cannot be read: under ``torch.compile`` and in a ``torch.func`` transform."""
    return not torch.compiler.is_compiling() and not in_transform()


def as_targets(targets: Any, device: torch.device, may_be_mask: bool = False) -> Tensor | None:
    """Return targets as torch's losses take them: tensors, integers of any width and booleans as int64.

    Args:
        targets: A tensor, a list, a NumPy array, or None.
        device: Where targets that are no tensor go.
        may_be_mask: Whether boolean targets select positions, and stay as they are.

    Raises:
        TypeError: If the targets cannot be a tensor.
    """
    if targets is None:
        return None
    if not isinstance(targets, Tensor):
        try:
            targets = torch.as_tensor(targets, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"targets must be a tensor, an array or a list of numbers, got {type(targets).__name__}. Override "
                "unpack_batch(batch) to return inputs and targets of your batches."
            ) from error
    is_mask = may_be_mask and targets.dtype == torch.bool
    return targets if is_mask or targets.is_floating_point() else targets.long()


def task_term(task_loss: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the task loss of logits with the class dimension second; labels in the logits' shape become floats.

    Raises:
        ValueError: If the loss cannot take the targets.
    """
    if targets.shape == logits.shape and not targets.is_floating_point():
        targets = targets.to(logits.dtype)
    if targets.is_cpu:
        check_soft_targets(task_loss, logits, targets)
    if torch.compiler.is_compiling():
        return task_loss(logits, targets)
    try:
        return task_loss(logits, targets)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{type(task_loss).__name__} cannot take targets of shape {tuple(targets.shape)} and {targets.dtype} with "
            f"logits of shape {tuple(logits.shape)}: {' '.join(str(error).split()).rstrip('.')}. Return other targets "
            "from unpack_batch(batch), class indices from 0 to C - 1 for cross-entropy, or give another task_loss."
        ) from error


def check_soft_targets(task_loss: nn.Module, logits: Tensor, targets: Tensor) -> None:
    """Raise if targets in the logits' shape, which a cross-entropy takes for probabilities, are none.

    A row of zeros is a sample without a label. Reads values, which is a host sync on an accelerator.
    """
    if not isinstance(task_loss, nn.CrossEntropyLoss) or targets.shape != logits.shape or not is_readable():
        return
    sums = targets.detach().float().sum(min(1, targets.dim() - 1))
    wrong = sums[((sums - 1).abs() > 0.01) & (sums != 0)]
    negative = targets[targets < 0]
    if len(wrong) or len(negative):
        found = f"a row sums to {wrong[0]:g}" if len(wrong) else f"one is {negative[0]:g}"
        raise ValueError(
            f"a cross-entropy takes targets in the logits' shape, {tuple(targets.shape)}, for probabilities, not "
            f"negative and of sum 1 in each row, but {found}. For several labels at once give "
            "task_loss=BCEWithLogitsLoss() and kd_loss=BernoulliKDLoss()."
        )


def check_targets(targets: Tensor | None, task_weight: float) -> None:
    """Raise if a task term is weighted but the batch has no targets for it."""
    if targets is None and task_weight:
        raise ValueError(
            f"task_weight is {task_weight:g} but the batch has no targets. Give targets or a task_loss, or set "
            "task_weight=0 to learn from the teacher alone."
        )


def check_ignore_index(kd_loss: Any, task_loss: Any) -> None:
    """Raise if the losses leave out different target values; a loss without ``ignore_index`` leaves out any."""
    ours, theirs = getattr(kd_loss, "ignore_index", -100), getattr(task_loss, "ignore_index", None)
    if ours is not None and theirs is not None and ours != theirs:
        raise ValueError(
            f"kd_loss has ignore_index={ours}, task_loss has ignore_index={theirs}, but a position counts for both "
            "or for neither. Give both losses the same ignore_index."
        )


def check_scalar(loss: Tensor) -> None:
    """Raise if a training loss has a value per sample."""
    if loss.dim() > 0 and loss.numel() > 1:
        raise ValueError(
            f"a training loss must be a scalar, got shape {tuple(loss.shape)}. Give kd_loss and task_loss "
            "reduction='mean', or average them; reduction='none' is for a Distiller in a loop of your own."
        )


def as_loss(loss: Any, name: str) -> Any:
    """Return a loss as it is, or raise if it is none.

    Raises:
        TypeError: If the loss cannot be called, is a class, or takes other arguments than it will be given.
    """
    if not callable(loss) or isinstance(loss, type):
        received = loss.__name__ if isinstance(loss, type) else repr(loss)
        raise TypeError(
            f"{name} must be a loss, a module that returns a scalar, got {received}. Build one, such as KDLoss() for "
            "kd_loss or CrossEntropyLoss() for task_loss."
        )
    with suppress(ValueError):  # raised for a function without a readable signature
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
        distils = name == "kd_loss"
        try:
            signature.bind(*((None, None, None) if distils else (None, None)), **({"targets": None} if distils else {}))
        except TypeError as error:
            given = "student_logits, teacher_logits, temperature, targets=..." if distils else "student_logits, targets"
            title = type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", repr(loss))
            raise TypeError(
                f"{name} is called with ({given}), but {title} takes ({', '.join(signature.parameters)}). Take a loss "
                f"of kd_lightning.losses, or write a module whose forward takes these arguments."
            ) from error
    return loss
