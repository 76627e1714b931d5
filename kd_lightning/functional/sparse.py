r"""Targets that name a few of the teacher's classes: top-k log-probabilities, or samples of the distribution.

:class:`Sparse` takes the place of the teacher's logits in the losses between distributions. The student's classes that
it does not name are merged into one by a logsumexp, which turns the loss into the same loss on k + 1 classes; where
they have to stay apart (``tail="uniform"``), the teacher's row is spread out, a chunk of rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from typing_extensions import Self, override

from kd_lightning.functional.class_divergences import log_sum, softmax_and_log_z
from kd_lightning.functional.divergences import ClosedForm, Divergence
from kd_lightning.functional.rows import check_option
from kd_lightning.functional.temperature import Temperature, check_values, compute_dtype

Tail = Literal["bucket", "uniform", "renormalize", "drop"]
TAILS: tuple[Tail, ...] = get_args(Tail)
TOLERANCE = 0.01  # of the sum of the probabilities, because bfloat16 rounds each of them by up to 0.004


@dataclass(frozen=True, eq=False)
class Sparse:
    r"""A teacher's probabilities :math:`q_k` of k of the V classes, in place of its logits.

    The rest has the probability :math:`r = 1 - \sum_k q_k`, and ``tail`` says how it enters a loss:

    - ``"bucket"``: the rest is one class for teacher and student. The loss is exact for the two distributions on
      k + 1 classes, and a lower bound of the loss on all V.
    - ``"uniform"``: each class of the rest has :math:`r / (V - k)`.
    - ``"renormalize"``: the classes of the rest have probability 0, the k classes :math:`q_k / \sum_k q_k`. The
      student learns to be too sure, by a factor of :math:`1 / \sum_k q_k`.
    - ``"drop"``: :math:`\sum_k q_k (\log q_k - \log p_k)` as it is, with the student's :math:`p` over all V classes;
      the sum may be negative. It is what Axolotl computes where it does not normalise (there averaged over k, too).

    Probabilities made at the temperature :math:`T_0` are brought to the loss's :math:`T_t` by
    :math:`q_k^{T_0 / T_t}`. ``"renormalize"`` is exact then among the k classes, and ``"uniform"`` is as good as its
    assumption. What ``"bucket"`` and ``"drop"`` need, the rest at :math:`T_t`, does not follow from the rest at
    :math:`T_0`, so that they take :math:`T_t = T_0` only: another temperature is an error.

    Losses that compare distributions take such targets: :func:`kd_loss` and :func:`multi_temperature_kd_loss` with
    every tail, :func:`jsd_loss`, :func:`total_variation_loss` and :func:`soft_cross_entropy_loss` all but ``"drop"``,
    :func:`reverse_kd_loss` ``"bucket"`` and ``"uniform"`` (it is infinite where the teacher has a 0). A loss raises
    where a tail does not define it. A run on such targets has no entropy, accuracy or perplexity of the teacher and no
    agreement with it, which need all classes.

    Attributes:
        indices: ``(…, k)`` class numbers, each named once, ``k < V``. The classes are last whatever ``class_dim`` is.
        log_probs: ``(…, k)`` natural logarithms of the probabilities; their sum may fall short of 1. An entry of −inf
            names no class: it is padding where rows have fewer than k classes.
        temperature: :math:`T_0`; positive and finite.
        tail: See above.
        log_rest: ``(…, 1)``, the logarithm of the rest, where it is known better than by :math:`1 - \sum_k q_k`, which
            has no digits left below 1e-7. None: that difference.

    Raises:
        ValueError: If an argument is outside its range, or if shapes or types do not fit; in a loss, if positions or
            classes do not fit the student's, if probabilities of a row sum to more than 1 or to 0, if a class is named
            twice, or if the loss or its temperature does not go with the tail.

    Example:
        >>> from kd_lightning.functional import kd_loss
        >>> teacher = Sparse(torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.2]]).log())
        >>> kd_loss(torch.zeros(1, 4), teacher, 1.0)  # .7 log .7/.25 + .2 log .2/.25 + .1 log .1/.5
        tensor(0.5152)
    """

    indices: Tensor
    log_probs: Tensor
    temperature: float = 1.0
    tail: Tail = "bucket"
    log_rest: Tensor | None = None

    def __post_init__(self) -> None:
        check_option("tail", self.tail, TAILS)
        indices, log_probs, rest = self.indices, self.log_probs, self.log_rest
        if not (isinstance(indices, Tensor) and isinstance(log_probs, Tensor)):
            raise TypeError(
                "Sparse takes tensors of class numbers and of log-probabilities, got "
                f"{type(indices).__name__} and {type(log_probs).__name__}."
            )
        integers = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
        if indices.shape != log_probs.shape or not indices.shape or not integers or not log_probs.is_floating_point():
            raise ValueError(
                "Sparse takes integers (…, k) as class numbers and floating-point log-probabilities of the same shape, "
                f"got {indices.dtype} {tuple(indices.shape)} and {log_probs.dtype} {tuple(log_probs.shape)}."
            )
        if rest is not None and (rest.shape != (*indices.shape[:-1], 1) or not rest.is_floating_point()):
            raise ValueError(
                f"log_rest must be floating point of shape {(*indices.shape[:-1], 1)}, got {rest.dtype} "
                f"{tuple(rest.shape)}."
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                "temperature is the one at which the log-probabilities were made: it must be positive and finite, got "
                f"{self.temperature!r}. A plain softmax has 1."
            )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the targets on another device, as trainers move batches."""
        indices, log_probs = (x.to(device, non_blocking=non_blocking) for x in (self.indices, self.log_probs))
        rest = None if self.log_rest is None else self.log_rest.to(device, non_blocking=non_blocking)
        return type(self)(indices, log_probs, self.temperature, self.tail, rest)

    def detach(self) -> Self:
        """Return the targets, which are constants for every loss."""
        return self

    def movedim(self, source: int, destination: int) -> Self:
        """Return the targets, whose classes are last in every layout of the logits."""
        return self

    @classmethod
    def top_k(cls, logits: Tensor, k: int, temperature: float = 1.0, tail: Tail = "bucket") -> Self:
        r"""Return the k largest of :math:`\mathrm{softmax}(z / T_0)`, and the rest to the last digit.

        Args:
            logits: ``(…, V)``.
            k: Number of classes, from 1 to V − 1.
            temperature: :math:`T_0`; that of the loss, for a tail that cannot be brought to another.
            tail: See :class:`Sparse`.

        Raises:
            ValueError: If ``k`` or another argument is outside its range.

        Example:
            >>> Sparse.top_k(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), 2).indices
            tensor([[1, 3]])
        """
        if not 1 <= k < logits.shape[-1]:
            raise ValueError(f"k must be from 1 to {logits.shape[-1] - 1}, one less than the classes, got {k}.")
        log_probs = (logits.to(compute_dtype(logits)) / temperature).log_softmax(-1)
        values, indices = log_probs.topk(k, -1)
        rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
        return cls(indices, values, temperature, tail, rest)

    @classmethod
    def sampled(
        cls, logits: Tensor, count: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Self:
        r"""Draw classes from :math:`q = \mathrm{softmax}(z / T_0)`, each with its share of the draws as probability.

        The shares :math:`\hat q` are right on average, :math:`\mathrm{E}[\hat q] = q`, and so is the gradient of
        :func:`kd_loss`, :math:`p - \hat q`, where a top-k forgets the rest in every step. The loss itself lies above
        that of q, by the entropy that few draws lack. No power of :math:`\hat q` is right on average, so that other
        losses and other temperatures than :math:`T_0` are errors, as of every ``tail="drop"``.

        Args:
            logits: ``(…, V)``.
            count: Number of draws, with replacement, from 1 to V − 1.
            temperature: :math:`T_0`, that of the loss.
            generator: On the device of the logits. None: torch's own.

        Raises:
            ValueError: If ``count`` or another argument is outside its range.

        Source: Anshumann et al., "Sparse Logit Sampling", ACL 2025, arXiv 2503.16870.

        Example:
            >>> Sparse.sampled(torch.tensor([[0.0, 50.0, 0.0, 0.0]]), 2).log_probs  # the second class, twice
            tensor([[0., -inf]])
        """
        if not 1 <= count < logits.shape[-1]:
            raise ValueError(f"count must be from 1 to {logits.shape[-1] - 1}, one less than the classes, got {count}.")
        q = (logits.detach().to(compute_dtype(logits)) / temperature).softmax(-1)
        draws = torch.multinomial(q.flatten(0, -2), count, replacement=True, generator=generator).sort(-1).values
        is_new = torch.cat([torch.ones_like(draws[:, :1]), draws.diff(dim=-1).ne(0).long()], -1)
        place = is_new.cumsum(-1) - 1  # of the class of each draw, among those of its row
        ones = torch.ones_like(draws, dtype=q.dtype)
        times = torch.zeros_like(ones).scatter_add(-1, place, ones)
        shape = (*logits.shape[:-1], count)
        indices = torch.zeros_like(draws).scatter(-1, place, draws)
        return cls(indices.view(shape), (times / count).log().view(shape), temperature, "drop")


TeacherTarget: TypeAlias = Tensor | Sparse
"""The teacher's side of a loss between logits."""


def sparse_rows(
    divergence: Divergence,
    student: Tensor,
    target: Sparse,
    temperature: Temperature,
    valid: Tensor | None,
    class_dim: int,
) -> tuple[Divergence, Tensor, Tensor]:
    """Return the divergence of rows ``(…, V)`` from targets, the targets as its second argument, and their indices.

    ``valid`` is a mask of the positions that count, its class dimension of size 1, or None. Raises as :class:`Sparse`
    says.
    """
    positions = student.movedim(class_dim, -1).shape[:-1]
    num_classes, k = student.shape[class_dim], target.indices.shape[-1]
    if target.indices.shape[:-1] != positions or not 1 <= k < num_classes:
        raise ValueError(
            f"Sparse targets for student logits of shape {tuple(student.shape)} with class_dim={class_dim} must be of "
            f"shape {(*positions, 'k')} with 1 ≤ k < {num_classes}, got {tuple(target.indices.shape)}."
        )
    _check_temperature(target, temperature.teacher, class_dim)
    dtype = compute_dtype(student)
    indices, log_probs = target.indices.detach().long(), target.log_probs.detach().to(dtype)
    rest = None if target.log_rest is None else target.log_rest.detach().to(dtype)
    if valid is not None:  # because a masked position may hold anything
        valid = valid.movedim(class_dim, -1)
        filler = log_probs.new_full((k,), -torch.inf)
        filler[0] = -1.0
        indices, log_probs = indices.masked_fill(~valid, 0), torch.where(valid, log_probs, filler)
        rest = None if rest is None else rest.masked_fill(~valid, -1.0)
    named = log_probs > -torch.inf
    total = log_probs.exp().sum(-1, keepdim=True)
    _check_rows(indices, named, total, num_classes)
    best = indices.gather(-1, log_probs.argmax(-1, keepdim=True))
    indices = torch.where(named, indices, best)  # an entry without a class repeats the best, and counts nowhere
    if target.tail in ("renormalize", "drop"):
        rest = torch.full_like(total, -torch.inf)
    elif rest is None:
        rest = torch.log1p(-total.clamp(max=1.0))
    if target.tail == "uniform":
        rest = rest - (num_classes - named.sum(-1, keepdim=True)).to(dtype).log()
    logits = torch.cat([log_probs, rest], -1) * target.temperature
    kind = _Spread(divergence) if target.tail == "uniform" else _Merged(divergence, target.tail == "drop")
    return kind, logits.movedim(-1, class_dim), indices.movedim(-1, class_dim)


def check_tail(divergence: Divergence, target: Sparse) -> None:
    """Raise if the divergence is not defined for targets with this tail."""
    name, tails = type(divergence).__name__, divergence.tails
    if not tails:
        raise ValueError(
            f"{name} needs the logits of all classes, got Sparse targets. Take a loss that compares distributions, "
            "such as KDLoss."
        )
    if target.tail not in tails:
        raise ValueError(
            f"{name} takes Sparse targets with tail {' or '.join(map(repr, tails))}, got {target.tail!r}. KDLoss takes "
            "every tail."
        )


def _check_temperature(target: Sparse, temperature: Any, class_dim: int) -> None:
    made_at = target.temperature
    if isinstance(temperature, Tensor) and temperature.dim() > 0 and temperature.shape[class_dim] > 1:
        raise ValueError(
            "Sparse targets do not name all classes, so the teacher's temperature must be one for each row, got shape "
            f"{tuple(temperature.shape)}. Take another policy, or the teacher's logits."
        )
    if target.tail in ("uniform", "renormalize"):
        return
    message = (
        f"Sparse targets with tail={target.tail!r} were made at the teacher's temperature {made_at:g}, and how the "
        "rest of the probability changes with the temperature cannot be told: the loss's teacher temperature must be "
        "the same{}. Set it so, have the targets made at that of the loss, or take tail='uniform' or 'renormalize'."
    )
    if not isinstance(temperature, Tensor):
        if abs(temperature - made_at) > 1e-5 * made_at:
            raise ValueError(message.format(f", got {temperature:g}"))
    elif temperature.requires_grad:
        raise ValueError(message.format(", got one that is learnt"))
    else:
        check_values(((temperature - made_at).abs() <= 1e-5 * made_at).all(), message.format(""))


def _check_rows(indices: Tensor, named: Tensor, total: Tensor, num_classes: int) -> None:
    check_values(
        (total <= 1 + TOLERANCE).all() & (total > 0).all(),  # NaN fails
        "the probabilities of each row of Sparse targets must sum to more than 0 and to at most 1 (within 0.01). "
        "log_probs are natural logarithms of probabilities; positions without any are to be masked by the targets.",
    )
    known = torch.where(named, indices, 0)
    check_values(
        ((known >= 0) & (known < num_classes)).all(),
        f"the indices of Sparse targets must be class numbers from 0 to {num_classes - 1}, those of the student. "
        "Entries that stand for no class have a log-probability of −inf.",
    )
    ordered = torch.where(named, indices, -1).sort(-1).values
    check_values(
        ~((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(),
        "each row of Sparse targets must name a class once: add up the probabilities of a class that is named again, "
        "or set the others to −inf.",
    )


@dataclass(frozen=True)
class _Merged(Divergence):
    r"""A divergence after all classes that the teacher does not name have become one, for the student too.

    It is exact for every divergence :math:`\sum_k p_k f(q_k / p_k)` where the ratio is the same in the whole rest:
    because the rest is one class (``"bucket"``), or because q is 0 there. With ``drop`` the teacher's row has the mass
    :math:`m = \sum_k q_k`, not 1: :math:`m \, \mathrm{KL}(q / m \| p) + m \log m`.
    """

    divergence: Divergence
    drop: bool

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        assert labels is not None
        unnamed = b.narrow(dim, 0, labels.shape[dim]) == -torch.inf
        top = a.gather(dim, labels).masked_fill(unnamed, -torch.inf)
        merged = torch.cat([top, log_sum(a.scatter(dim, labels, -torch.inf), dim)], dim)
        value = self.divergence.definition(merged, b, dim, None)
        return self._weighted(value, self._mass(b, dim)) if self.drop else value

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        assert labels is not None
        k = labels.shape[dim]
        top = a.gather(dim, labels).masked_fill_(b.narrow(dim, 0, k) == -torch.inf, -torch.inf)
        peak = a.scatter_(dim, labels, -torch.inf).amax(dim, keepdim=True)
        within, rest = softmax_and_log_z(a, peak, dim)
        mass = self._mass(b, dim) if self.drop else None
        value, gradient, of_teacher = self.divergence.closed_form(torch.cat([top, rest], dim), b, dim, None, teacher)
        if mass is not None:
            value, gradient = self._weighted(value, mass), gradient * mass
        within.mul_(gradient.narrow(dim, k, 1)).scatter_add_(dim, labels, gradient.narrow(dim, 0, k))
        return ClosedForm(value, within, of_teacher)

    @staticmethod
    def _mass(b: Tensor, dim: int) -> Tensor:
        return b.exp().sum(dim, keepdim=True)

    @staticmethod
    def _weighted(value: Tensor, mass: Tensor) -> Tensor:
        return mass * (value + mass.log())


@dataclass(frozen=True)
class _Spread(Divergence):
    """A divergence from a teacher whose unnamed classes share one logit, the last of ``b``."""

    divergence: Divergence

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return self.divergence.definition(a, self._spread(a, b, dim, labels), dim, None)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        assert labels is not None
        named = b.narrow(dim, 0, labels.shape[dim]) > -torch.inf
        value, gradient, of_all = self.divergence.closed_form(a, self._spread(a, b, dim, labels), dim, None, teacher)
        of_teacher = None
        if of_all is not None:
            of_named = torch.where(named, of_all.gather(dim, labels), 0.0)
            of_rest = of_all.nansum(dim, keepdim=True) - of_named.sum(dim, keepdim=True)
            of_teacher = torch.cat([of_named, of_rest], dim)
        return ClosedForm(value, gradient, of_teacher)

    @staticmethod
    def _spread(a: Tensor, b: Tensor, dim: int, labels: Tensor) -> Tensor:
        k = labels.shape[dim]
        top, rest = b.narrow(dim, 0, k), b.narrow(dim, k, 1)
        top = torch.where(top > -torch.inf, top, top.amax(dim, keepdim=True).detach())  # as its index repeats the best
        return rest.expand_as(a).scatter(dim, labels, top)
