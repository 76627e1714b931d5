"""The temperature of a loss term, and the distributions it softens."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Temperature(NamedTuple):
    """The temperatures of one loss term.

    Each field is a tensor that has one element, or the rank of the logits with every dimension 1 or full:
    ``()``, ``(1,)``, ``(N, 1)``, ``(1, C)``, ``(N, C)``, ``(B, L, 1)``. Values are positive and finite.

    Attributes:
        student: Divides the student's logits.
        teacher: Divides the teacher's logits.
        scale: Factor of the loss per sample, for a method whose publication fixes it (constant over classes).
            ``None``: the loss applies its own rule, ``T_s · T_t`` by default.

    Example:
        >>> temperature = Temperature(student=torch.tensor(4.0), teacher=torch.tensor(2.0))
        >>> temperature.scale is None
        True
    """

    student: Tensor
    teacher: Tensor
    scale: Tensor | None = None


def tempered_log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``log softmax(logits / T)`` over the last dimension, in float32 (float64 stays).

    Finite for every finite logit and ``T`` from 0.05 to 100; a logit of −inf keeps probability 0 and passes no NaN to
    the gradient of the logits or of the temperature.

    Args:
        logits: ``(…, C)``.
        temperature: A positive number or a tensor that broadcasts to the logits.

    Example:
        >>> tempered_log_softmax(torch.tensor([0.0, float("-inf"), 0.0]), 2.0)
        tensor([-0.6931,    -inf, -0.6931])
    """
    return torch.log_softmax(widened_over(logits, temperature), dim=-1)


def tempered_softmax(logits: Tensor, temperature: float | Tensor, *, class_dim: int = -1) -> Tensor:
    r"""Return the softened probabilities :math:`\mathrm{softmax}(z / T)`.

    ``T → ∞`` gives the uniform distribution, ``T → 0`` all mass on the largest logit.

    Args:
        logits: Any shape with a class dimension.
        temperature: A positive number, or a tensor of one element or of the logits' rank (dimensions 1 or full).
        class_dim: The dimension of the classes.

    Returns:
        Probabilities in the logits' shape, float32 (float64 stays).

    Raises:
        ValueError: If the temperature is not positive and finite, or if its shape does not fit.

    Example:
        >>> tempered_softmax(torch.tensor([[2.0, 0.0]]), 2.0)
        tensor([[0.7311, 0.2689]])
    """
    t = class_last(as_temperature(temperature, logits).student, class_dim)
    return tempered_log_softmax(logits.movedim(class_dim, -1), t).exp().movedim(-1, class_dim)


def predictive_entropy(
    logits: Tensor, temperature: float | Tensor = 1.0, *, class_dim: int = -1, normalize: bool = False
) -> Tensor:
    r"""Return the entropy :math:`H = -\sum_k p_k \log p_k` of the softened :math:`p = \mathrm{softmax}(z / T)`.

    Args:
        logits: Any shape with a class dimension.
        temperature: As in :func:`tempered_softmax`.
        class_dim: The dimension of the classes.
        normalize: Divide by ``log C``, so that 0 is certain and 1 uniform.

    Returns:
        Entropy in nats (0 to ``log C``), or normalised (0 to 1), in the logits' shape without the class dimension.

    Raises:
        ValueError: If :func:`tempered_softmax` raises, or if ``normalize`` is set for a single class.

    Example:
        >>> predictive_entropy(torch.zeros(1, 4))  # uniform over four: log 4
        tensor([1.3863])
        >>> predictive_entropy(torch.zeros(1, 4), normalize=True)
        tensor([1.])
    """
    num_classes = logits.shape[class_dim]
    if normalize and num_classes < 2:
        raise ValueError("predictive_entropy: normalize=True needs at least two classes, got 1.")
    t = class_last(as_temperature(temperature, logits).student, class_dim)
    log_p = tempered_log_softmax(logits.movedim(class_dim, -1), t)
    p = log_p.exp()
    entropy = -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)
    return entropy / math.log(num_classes) if normalize else entropy


def as_temperature(temperature: float | Tensor | Temperature, logits: Tensor, owner: str = "") -> Temperature:
    """Bring a number, a tensor or a :class:`Temperature` to a checked :class:`Temperature` for these logits.

    Shapes are checked on the host. Values are checked on the host where that is free (numbers, CPU tensors) and by an
    asynchronous device assertion elsewhere, so that no training step has a host sync. Under ``torch.compile`` and
    ``torch.func`` values are not checked. ``owner`` begins the messages, as in ``"MyPolicy: "``.

    Example:
        >>> as_temperature(2.0, torch.zeros(4, 3))
        Temperature(student=tensor(2.), teacher=tensor(2.), scale=None)
        >>> as_temperature(torch.ones(4), torch.zeros(4, 3))
        Traceback (most recent call last):
        ...
        ValueError: temperature has shape (4,), which does not fit logits of shape (4, 3): ...
    """
    if isinstance(temperature, Temperature):
        student, teacher, scale = temperature
        _check_temperature(student, logits, f"{owner}student temperature")
        return Temperature(
            student,
            teacher if teacher is student else _check_temperature(teacher, logits, f"{owner}teacher temperature"),
            None if scale is None else _check_temperature(scale, logits, f"{owner}scale", minimum_included=True),
        )
    if isinstance(temperature, Tensor):
        shared = _check_temperature(temperature, logits, "temperature")
        return Temperature(shared, shared)
    if is_number(temperature):
        shared = torch.full((), checked_number(temperature), dtype=compute_dtype(logits), device=logits.device)
        return Temperature(shared, shared)
    raise TypeError(
        f"temperature must be a number, a tensor or a Temperature, got {type(temperature).__name__}. A schedule or "
        "policy is called first: policy(Signals(...))."
    )


def is_number(temperature: object) -> TypeGuard[float]:
    """Return True if the temperature is a Python number; a bool is none."""
    return isinstance(temperature, Real) and not isinstance(temperature, bool)


def check_number(name: str, value: object) -> None:
    """Raise if a value is no number; ``name`` begins the message."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}.")


def check_weights(**weights: float) -> None:
    """Raise if a weight of a term in a loss is no number, negative or not finite, or if all of several are 0."""
    for name, weight in weights.items():
        check_number(name, weight)
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {weight}.")
    if len(weights) > 1 and not any(weights.values()):
        raise ValueError(f"{' and '.join(weights)} are both 0, which trains nothing. Give one of them a weight.")


def checked_number(temperature: float) -> float:
    """Return the temperature as a float, or raise if it is not positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive, finite number, got {temperature}. {_USUAL}")
    return float(temperature)


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Return float64 for float64 logits, and float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def widened_over(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``logits / T``, the logits widened first. A logit of −inf stays and passes no NaN to the temperature."""
    if logits.dtype != (dtype := compute_dtype(logits)):
        logits = logits.to(dtype)
    if not isinstance(temperature, Tensor) or not (temperature.requires_grad and torch.is_grad_enabled()):
        return logits / temperature
    masked = logits == -math.inf  # because −inf · 0 in the temperature's gradient is NaN
    return (logits.masked_fill(masked, 0.0) / temperature).masked_fill(masked, -math.inf)


_USUAL = "Usual values lie between 1 and 20; T = 1 is the plain softmax."


def _check_temperature(value: Tensor, logits: Tensor, name: str, minimum_included: bool = False) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}: torch.tensor({value!r}).")
    if value.numel() != 1 and (
        value.dim() != logits.dim()
        or any(have not in (1, full) for have, full in zip(value.shape, logits.shape, strict=True))
    ):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, which does not fit logits of shape {tuple(logits.shape)}: it must "
            "have one element, or the logits' rank with every dimension 1 or full, such as (N, 1) per sample or "
            "(1, C) per class. Add the missing dimension: temperature.unsqueeze(-1) for one value per row."
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}.")
    _check_range(value, name, minimum_included)
    return value


def _check_range(value: Tensor, name: str, minimum_included: bool) -> None:
    rule = "finite and not negative" if minimum_included else "positive and finite"
    if not _has_values(value):
        return
    if value.device.type != "cpu":
        value = value.detach()
        fits = (torch.isfinite(value) & (value >= 0 if minimum_included else value > 0)).all()
        check_values(fits, f"{name} must be {rule}")
        return
    if value.numel() == 0:
        return
    low, high = (value.item(),) * 2 if value.numel() == 1 else (x.item() for x in value.detach().aminmax())
    if not ((low >= 0 if minimum_included else low > 0) and high < math.inf):  # NaN fails both
        received = f"{low:g}" if value.numel() == 1 else f"values from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {rule}, got {received}. {_USUAL}")


def check_values(fits: Tensor, message: str) -> None:
    """Raise a ValueError if a condition on values, ``()``, does not hold; on an accelerator without a host sync."""
    if not _has_values(fits):
        return
    if fits.device.type != "cpu":
        torch._assert_async(fits, message)  # pyright: ignore[reportPrivateImportUsage]
    elif not fits:
        raise ValueError(message)


def _has_values(tensor: Tensor) -> bool:
    """Return True if the tensor has values to read: not on the meta device, while tracing, or in a transform."""
    return not (torch.compiler.is_compiling() or tensor.device.type == "meta" or in_transform())


def in_transform() -> bool:
    """Return True while a ``torch.func`` transform (vmap, grad, jvp) or forward-mode differentiation is running."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def class_last(value: Tensor, class_dim: int) -> Tensor:
    """Bring a checked temperature to the class-last layout; a single element fits any layout as a 0-d tensor."""
    return value.reshape(()) if value.numel() == 1 else value.movedim(class_dim, -1)
