"""The temperature at which a network's probabilities are the most honest: temperature scaling."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.functional.temperature import tempered_log_softmax

_LOWEST, _HIGHEST = 0.05, 100.0


def fit_temperature(logits: Tensor, targets: Tensor, *, per_class: bool = False) -> Tensor:
    r"""Return the temperature that minimises the negative log-likelihood of held-out labels (temperature scaling).

    .. math:: T^* = \arg\min_T -\frac1N \sum_i \log \mathrm{softmax}(z_i / T)_{y_i}

    found by LBFGS in :math:`\log T`. The accuracy stays. With ``per_class`` each class has a temperature for its
    log-probability, :math:`\mathrm{softmax}_k(\log p_k / T_k)`, which does not see a shift of the logits; the accuracy
    may change, and many labels of each class are needed.

    Args:
        logits: ``(N, C)``; −inf masks a class.
        targets: ``(N,)`` class indices.
        per_class: Whether to fit a temperature for each class.

    Returns:
        ``(1,)``, or ``(C,)`` per class, in float64.

    Raises:
        ValueError: If the shapes do not fit, there is no label or one outside the classes; or if no temperature between
            0.05 and 100 is the best, as where every prediction is right.

    Source: C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
        >>> fit_temperature(logits, torch.tensor([0, 0, 0, 1]))  # right in 3 of 4: 4 / log 3
        tensor([3.6410], dtype=torch.float64)
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.is_floating_point() or not len(targets):
        raise ValueError(
            "fit_temperature takes logits (N, C) and N class indices, one or more, got logits of shape "
            f"{tuple(logits.shape)} and {str(targets.dtype).removeprefix('torch.')} targets of shape "
            f"{tuple(targets.shape)}."
        )
    classes = logits.shape[1]
    low, high = (int(value) for value in targets.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"targets must be class indices from 0 to {classes - 1}, got {low if low < 0 else high}. Leave out the "
            "positions without a label."
        )
    z = logits.detach().double()
    raw = torch.zeros(classes if per_class else 1, dtype=torch.float64, device=z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [raw], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.nll_loss(scaled_logits(z, raw.exp()).log_softmax(-1), targets)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    found = raw.detach().exp()
    right = float((z.argmax(-1) == targets).double().mean())
    if right == 1 or not bool(((found > _LOWEST) & (found < _HIGHEST)).all()):
        raise ValueError(
            f"no temperature between {_LOWEST:g} and {_HIGHEST:g} is the best for these {len(targets)} labels, of "
            f"which {right:.1%} are predicted: where all are, colder is always better. Give more labels, of data that "
            "the network was not trained on."
        )
    return found


def scaled_logits(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return ``logits / T`` for one temperature, ``log_softmax(logits) / T_k`` for one of each class."""
    if temperature.numel() == 1:
        return logits / temperature
    return tempered_log_softmax(logits, 1.0) / temperature
