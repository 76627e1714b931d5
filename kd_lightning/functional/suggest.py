"""A temperature to start from: the one at which the teacher's targets are as soft as stated."""

from __future__ import annotations

import math

from torch import Tensor

from kd_lightning.functional.temperature import check_number, predictive_entropy

_LOWEST, _HIGHEST = 0.05, 100.0  # a policy's bounds by default
_HALVINGS = 40  # of log T: to 1e-11


def suggest_temperature(
    teacher_logits: Tensor, *, entropy: float | None = None, top_probability: float | None = None, class_dim: int = -1
) -> float:
    r"""Return the temperature at which the teacher's targets are as soft as stated.

    The entropy of :math:`p = \mathrm{softmax}(t/T)` rises with T: :math:`\partial H / \partial T = \mathrm{Var}_p(t) /
    T^3 \geq 0`. So exactly one T solves

    .. math:: \frac1N \sum_i \frac{H\big(\mathrm{softmax}(t_i/T)\big)}{\log C_i} = h

    and bisection on :math:`\log T` finds it, between 0.05 and 100. :math:`C_i` counts the classes of row i that are not
    masked; a row with a single such class is left out. With ``top_probability`` the mean of the largest probability is
    set instead, which falls with T.

    It is a place to start a search from: the best T depends on the number of labels and on the length of training,
    which the teacher's logits do not tell. With few labels and a training that is not short, 0.5 or more is better.

    Args:
        teacher_logits: Logits of some batches, ``(N, C)`` or any shape with a class dimension; a class of logit −inf is
            masked.
        entropy: The mean entropy h as a part of the largest possible one, in (0, 1); 0.1 where neither is given,
            the value with the smallest mean regret over the 24 settings of the atlas (``benchmarks/suggest.py``).
        top_probability: The mean of the largest probability, in (0, 1), in place of ``entropy``.
        class_dim: The dimension of the classes.

    Returns:
        The temperature; logits that are k times as large give k times the temperature.

    Raises:
        TypeError: If ``teacher_logits`` is no tensor, or a setting is no number.
        ValueError: If both settings are given or one is outside (0, 1); if a logit is NaN or +inf, or no row has two
            classes; or if no temperature in [0.05, 100] gives targets that soft, because the logits of a row are all
            the same, or too far apart.

    Source: this library; Hinton et al. 2015 for why targets should be neither one-hot nor uniform.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[6.0, 2.0, 1.0, 0.0], [3.0, 9.0, 1.0, 2.0]])
        >>> t = suggest_temperature(logits, entropy=0.5)
        >>> entropy = torch.special.entr((logits / t).softmax(-1)).sum(-1).mean() / math.log(4)
        >>> round(t, 2), round(entropy.item(), 3)
        (2.3, 0.5)
    """
    if not isinstance(teacher_logits, Tensor):
        raise TypeError(f"teacher_logits must be a tensor of logits, got {type(teacher_logits).__name__}.")
    if entropy is not None and top_probability is not None:
        raise ValueError(
            f"give entropy or top_probability, not both, got {entropy} and {top_probability}: one temperature sets one "
            "of them."
        )
    name, wanted = ("top_probability", top_probability) if entropy is None else ("entropy", entropy)
    name, wanted = ("entropy", 0.1) if wanted is None else (name, wanted)
    check_number(name, wanted)
    if not 0 < wanted < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {wanted}.")
    rows = teacher_logits.detach().movedim(class_dim, -1).double()
    rows = rows.reshape(-1, rows.shape[-1])
    if rows.isnan().any() or (rows == math.inf).any():
        raise ValueError("the teacher's logits must be finite, or -inf for a masked class, got NaN or +inf.")
    classes = (rows > -math.inf).sum(-1)
    rows, classes = rows[classes > 1], classes[classes > 1]
    if not len(rows):
        raise ValueError(
            f"no row of the teacher's logits, of shape {tuple(teacher_logits.shape)}, has two classes that are not "
            "masked, so that no temperature changes a target."
        )
    rises = name == "entropy"

    def softness(temperature: float) -> float:
        if rises:
            return (predictive_entropy(rows, temperature) / classes.double().log()).mean().item()
        return (rows / temperature).softmax(-1).amax(-1).mean().item()

    softest, hardest = softness(_HIGHEST), softness(_LOWEST)
    low, high = (hardest, softest) if rises else (softest, hardest)
    if not low <= wanted <= high:
        spread = rows.masked_fill(rows == -math.inf, math.nan).nan_to_num(0.0).std(-1).mean().item()
        raise ValueError(
            f"no temperature between {_LOWEST:g} and {_HIGHEST:g} gives {name}={wanted:g}: the teacher's logits, whose "
            f"standard deviation over the classes is {spread:.3g}, give {low:.3g} to {high:.3g}. Give logits of a "
            "trained network."
        )
    below, above = math.log(_LOWEST), math.log(_HIGHEST)
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        too_hard = (softness(math.exp(middle)) < wanted) == rises
        below, above = (middle, above) if too_hard else (below, middle)
    return math.exp((below + above) / 2)
