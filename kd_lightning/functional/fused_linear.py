"""The distillation loss from hidden states and output heads, without ever holding all the logits.

With a vocabulary of 150 000 the logits take more memory than the model. Here both heads, the loss and its gradients are
computed for a chunk of rows at a time, whose logits are then freed. Memory grows with the chunk, not with the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import TypedDict, Unpack, override

from kd_lightning.functional.divergences import ClosedForm, Divergence, ForwardKL, check_fusible
from kd_lightning.functional.rows import (
    Reduction,
    Rows,
    Scale,
    check_option,
    check_options,
    check_whole,
    definition,
    in_compute_dtype,
    is_sharded,
    labels_of,
    loss_factor,
    plain,
    valid_positions,
)
from kd_lightning.functional.rows_fast import buffer_dtype, gradients_of, times_upstream, unbroadcast
from kd_lightning.functional.sparse import Sparse
from kd_lightning.functional.temperature import Temperature, as_temperature, compute_dtype, in_transform

_FORWARD_KL = ForwardKL()


class FusedTerms(NamedTuple):
    """Result of :func:`fused_linear_kd_terms`.

    Attributes:
        loss: The weighted sum, the only field with a gradient.
        kd_loss: The divergence, unweighted; 0 where its weight is 0.
        task_loss: The cross-entropy, unweighted; 0 where its weight is 0.
    """

    loss: Tensor
    kd_loss: Tensor
    task_loss: Tensor


class FusedOptions(TypedDict, total=False):
    """Keywords of the fused losses; :func:`fused_linear_kd_terms` has the defaults."""

    teacher_logits: Tensor | None
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    targets: Tensor | None
    kd_weight: float
    task_weight: float
    scale: Scale
    ignore_index: int | None
    reduction: Reduction
    num_items: float | Tensor | None
    chunk_size: int
    divergence: Divergence


def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    temperature: float | Tensor | Temperature,
    **options: Unpack[FusedOptions],
) -> Tensor:
    r"""Return the :func:`kd_loss` of ``hidden @ weight.T`` plus the weighted cross-entropy, a chunk of rows at a time.

    .. math::
        L = w_{kd} \, \mathrm{kd\_loss}(h_s W_s^\top, h_t W_t^\top, T) + w_{task} \, \mathrm{CE}(h_s W_s^\top, y)

    Gradients flow to the student's hidden states, weight and bias and to the temperature; the teacher is a constant.
    They are computed in the forward, so that no logits are kept for the backward. A second derivative, or a second
    backward through one graph, is computed from the whole logits. Defaults: :func:`fused_linear_kd_terms`.

    Weights and biases may be DTensors sharded by class, ``Shard(0)``, and ``teacher_logits`` with ``Shard(-1)``, as
    tensor parallelism leaves them; plain tensors count as equal on these ranks. Each chunk of a term then takes three
    all-reduces of a few numbers per row, and backward one of the hidden states' gradient. No second derivative then.

    Args:
        student_hidden: ``(N, H)`` or ``(B, L, H)``: the input of the student's output layer.
        student_weight: ``(V, H)``: the weight of that output layer.
        teacher_hidden: ``(N, H_t)`` or ``(B, L, H_t)``; None with ``teacher_logits``.
        teacher_weight: ``(V, H_t)``, or more rows than the student's: padding of the vocabulary, which is cut.
        temperature: As in :func:`kd_loss`, in the layout of the logits ``(…, V)``; a class-wise one without gradient.
        teacher_logits: ``(…, V)`` in place of hidden states and weight, such as stored ones.
        student_bias: ``(V,)``.
        teacher_bias: ``(V,)``.
        targets: Class indices, ``(N,)`` or ``(B, L)``; the cross-entropy needs them.
        kd_weight: Factor of the divergence.
        task_weight: Factor of the cross-entropy.
        scale: As in :func:`kd_loss`.
        ignore_index: Target value of the positions to leave out, of both terms.
        reduction: ``"mean"`` over the valid positions or ``"sum"``.
        num_items: The divisor of the mean; see :func:`kd_loss`.
        chunk_size: Rows at a time. Four chunks of logits in float32 are held: with 256 rows and 150 000 classes 600 MB.
            Divergences other than forward KL hold up to nine.
        divergence: What is computed in place of forward KL, one that needs no labels.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes do not fit together, if the teacher is given twice or not at all, if the teacher requires
            gradients, if the cross-entropy lacks targets, if the divergence needs labels, if an option has an unknown
            value, or if DTensors are not sharded alike by class.

    Source: the chunked losses of P. Hsu et al., "Liger Kernel", 2024, arXiv 2410.10989, in closed form.

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> teacher = torch.tensor([[3.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> fused_linear_kd_loss(hidden, weight, None, None, 2.0, teacher_logits=teacher, chunk_size=1)
        tensor(0.2902, grad_fn=...)
    """
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return fused_linear_kd_terms(*heads, temperature, **options).loss


def fused_linear_kd_terms(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    temperature: float | Tensor | Temperature,
    *,
    teacher_logits: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    targets: Tensor | None = None,
    kd_weight: float = 1.0,
    task_weight: float = 0.0,
    scale: Scale = "student_teacher",
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    chunk_size: int = 256,
    divergence: Divergence = _FORWARD_KL,
) -> FusedTerms:
    """Return :func:`fused_linear_kd_loss` together with its two terms, for logs. Arguments and errors are the same.

    Example:
        >>> import torch
        >>> hidden, weight, targets = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        >>> fused_linear_kd_terms(hidden, weight, hidden, weight, 2.0, targets=targets, task_weight=0.5)
        FusedTerms(loss=tensor(0.1100), kd_loss=tensor(0.), task_loss=tensor(0.2201))
    """
    check_option("reduction", reduction, ("mean", "sum"))
    check_options(scale, reduction, num_items)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    check_fusible(divergence)
    student_hidden, teacher_hidden = plain(student_hidden), plain(teacher_hidden)
    check_whole("hidden states of the fused loss", student_hidden, teacher_hidden)
    if isinstance(teacher_logits, Sparse):
        raise TypeError("the fused loss takes the logits of all classes, got Sparse targets: take kd_loss for them.")
    heads = _Heads(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, teacher_logits
    )
    heads.check()
    cross_entropy, shards = _LabelCrossEntropy(), None
    if is_sharded(*heads):
        heads, shards, cross_entropy = _sharded_heads(divergence, heads)
    heads = heads.in_one_dtype().without_padding()

    shape = (*student_hidden.shape[:-1], student_weight.shape[0])
    logits_like = student_hidden.new_empty(()).expand(shape)  # a shape and a dtype, no memory
    temp = in_compute_dtype(as_temperature(temperature, logits_like), logits_like)
    valid = valid_positions(targets, logits_like, -1, ignore_index)
    if task_weight and (targets is None or targets.is_floating_point()):
        raise ValueError("task_weight adds a cross-entropy: it needs targets that are class indices, got none.")
    valid = None if valid is None else valid.unsqueeze(-1)
    factor = loss_factor(temp, logits_like, scale, -1, valid, reduction, num_items) * kd_weight
    one = Temperature(*(torch.ones_like(factor.detach()) for _ in range(2)))
    task_factor = loss_factor(one, logits_like, "none", -1, valid, reduction, num_items) * task_weight
    labels = labels_of(targets, valid, -1) if task_weight and targets is not None else None

    t_s, t_t = temp.student, temp.teacher.view_as(temp.teacher)  # a T twice would break the compiled graph
    if shards is not None:
        divergence, (t_s, t_t) = shards, (shards.part(t, -1, heads.weight.shape[0]) for t in (t_s, t_t))
    rows = _Flat(*(_flat(x, shape) for x in (t_s, t_t, factor, task_factor, valid, labels)))
    tensors = (*heads.flattened(), *rows)
    if in_transform():
        loss, kd, task = _definition(divergence, cross_entropy, *tensors)
    else:
        wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)
        loss, kd, task = _FusedLinear.apply(divergence, cross_entropy, chunk_size, wanted, *tensors)  # pyright: ignore
    return FusedTerms(loss, kd / (kd_weight or 1), task / (task_weight or 1))


class _Heads(NamedTuple):
    """Hidden states and output layers."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None

    def check(self) -> None:
        """Raise if shapes do not fit together, or if the teacher requires gradients."""
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, teacher_logits = self
        by_head = teacher_hidden is not None and teacher_weight is not None
        if by_head == (teacher_logits is not None) or (teacher_hidden is None) != (teacher_weight is None):
            raise ValueError("give the teacher as teacher_hidden with teacher_weight, or as teacher_logits.")
        pairs = [("student", hidden, weight, bias)]
        if teacher_hidden is not None and teacher_weight is not None:
            pairs.append(("teacher", teacher_hidden, teacher_weight, teacher_bias))
        for name, h, w, b in pairs:
            if w.dim() != 2 or h.dim() < 2 or h.shape[-1] != w.shape[1] or (b is not None and b.shape != w.shape[:1]):
                raise ValueError(
                    f"{name} hidden states (…, H), weight (V, H) and bias (V,) do not fit together, got "
                    f"{tuple(h.shape)}, {tuple(w.shape)} and {None if b is None else tuple(b.shape)}."
                )
        theirs = teacher_hidden if teacher_logits is None else teacher_logits
        classes = teacher_logits.shape[-1] if teacher_weight is None else teacher_weight.shape[0]  # pyright: ignore
        if theirs is None or theirs.shape[:-1] != hidden.shape[:-1] or classes < weight.shape[0]:
            raise ValueError(
                f"the teacher must cover the student's {tuple(hidden.shape[:-1])} positions and {weight.shape[0]} "
                f"classes, got {None if theirs is None else tuple(theirs.shape[:-1])} and {classes}."
            )
        constants = (teacher_hidden, teacher_weight, teacher_bias, teacher_logits)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in constants):
            raise ValueError("the teacher is a constant here, but requires gradients: detach it, or use kd_loss.")

    def without_padding(self) -> _Heads:
        """Return the heads without the teacher's surplus classes, which pad its vocabulary."""
        classes = self.weight.shape[0]
        return _Heads(
            self.hidden,
            self.weight,
            self.bias,
            self.teacher_hidden,
            None if self.teacher_weight is None else self.teacher_weight[:classes],
            None if self.teacher_bias is None else self.teacher_bias[:classes],
            None if self.teacher_logits is None else self.teacher_logits[..., :classes],
        )

    def in_one_dtype(self) -> _Heads:
        """Return the heads in autocast's dtype, as a linear layer would cast them."""
        device = self.hidden.device.type
        if not torch.is_autocast_enabled(device):
            return self
        dtype = torch.get_autocast_dtype(device)
        return _Heads(*(None if x is None else x.to(dtype) for x in self))  # pyright: ignore[reportArgumentType]

    def logits(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return both sides' logits of some rows, as fresh tensors in the dtype to compute in."""
        dtype = compute_dtype(self.hidden)
        student = F.linear(self.hidden[part], self.weight, self.bias).to(dtype)
        if self.teacher_logits is not None:
            return student, self.teacher_logits[part].to(dtype, copy=True)
        assert self.teacher_hidden is not None
        assert self.teacher_weight is not None
        return student, F.linear(self.teacher_hidden[part], self.teacher_weight, self.teacher_bias).to(dtype)

    def flattened(self) -> _Heads:
        """Return the heads with one row per position."""
        return _Heads(
            *(x if x is None or x.dim() < 2 else x.reshape(-1, x.shape[-1]) for x in self)  # pyright: ignore
        )


class _Flat(NamedTuple):
    """Temperatures, factors, mask and labels of the rows: ``(N, 1)``, ``(1, V)``, ``(N, V)`` or one element."""

    student_temperature: Any
    teacher_temperature: Any
    factor: Any
    task_factor: Any
    valid: Any
    labels: Any

    def of(self, part: slice) -> _Flat:
        """Return the fields of some of the rows."""
        return _Flat(*(x if x is None or x.dim() == 0 or x.shape[0] == 1 else x[part] for x in self))


def _flat(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return a tensor in the layout of the logits as ``(N, V)``, keeping a dimension that is 1 throughout."""
    if x is None or x.dim() == 0:
        return x
    if all(size == 1 for size in x.shape[:-1]):
        return x.reshape(1, x.shape[-1])
    return x.expand(*shape[:-1], x.shape[-1]).reshape(-1, x.shape[-1])


def _sharded_heads(divergence: Divergence, heads: _Heads) -> tuple[_Heads, Any, Any]:
    """Return the heads with this rank's classes, and both terms on them."""
    from kd_lightning.functional.sharded import shards_of_heads  # because DTensor is slow to import

    if not is_sharded(heads.teacher_weight, heads.teacher_logits):
        heads = heads.without_padding()
    hidden, weight, bias, teacher_hidden, *teacher = heads
    dims = (0, 0, 0, 0, hidden.dim() - 1)
    local, shards, cross_entropy = shards_of_heads(divergence, list(zip((weight, bias, *teacher), dims, strict=True)))
    return _Heads(shards.summed(hidden), *local[:2], teacher_hidden, *local[2:]), shards, cross_entropy  # pyright: ignore


def _definition(divergence: Divergence, cross_entropy: Divergence, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its two terms as constants, from the whole logits in differentiable torch."""
    heads, rows = _Heads(*tensors[:7]), _Flat(*tensors[7:])
    s, t = heads.logits(slice(None))
    kd_rows = Rows(s, t, rows.student_temperature, rows.teacher_temperature, rows.factor, rows.valid, None)
    kd = definition(divergence, -1, True, kd_rows)
    task = torch.zeros_like(kd)
    if rows.labels is not None:
        s = s if rows.valid is None else s.masked_fill(~rows.valid, 0.0)
        task = _counted(cross_entropy.definition(s, s, -1, rows.labels) * rows.task_factor, rows.valid).sum()
    return kd + task, kd.detach(), task.detach()


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, divergence: Divergence, cross_entropy: Divergence, chunk_size: int, wanted: Any, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, rows = _Heads(*tensors[:7]), _Flat(*tensors[7:])
        want: Any = _Heads(*wanted[:7])  # pyright: ignore[reportArgumentType]
        want_row = _Flat(*wanted[7:])
        hidden, weight = heads.hidden, heads.weight
        dtype = compute_dtype(hidden)
        kd_total, task_total = torch.zeros(2, dtype=dtype, device=hidden.device).unbind()
        d_hidden = torch.empty_like(hidden, dtype=buffer_dtype(hidden)) if want.hidden else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if want.weight else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=dtype) if want.bias else None
        values: list[Tensor] = []
        d_t_s: list[Tensor] = []
        d_t_t: list[Tensor] = []

        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_size):
                part = slice(start, start + chunk_size)
                t_s, t_t, c, task_c, ok, labels = rows.of(part)
                s, t = heads.logits(part)
                task = None if labels is None else cross_entropy.closed_form(s, s, -1, labels, False)
                s, t = s.div_(t_s), t.div_(t_t)
                kept_s = s.clone() if want_row.student_temperature else None
                kept_t = t.clone() if want_row.teacher_temperature else None
                form = divergence.closed_form(s, t, -1, None, want_row.teacher_temperature)
                del s, t
                value = _counted(form.value, ok)
                kd_total += (value * c).sum()
                if task is not None:
                    task_total += _counted(task.value * task_c, ok).sum()
                if want_row.factor:
                    values.append(value)
                if kept_s is not None:
                    d_t_s.append(_counted((form.student * kept_s).nansum(-1, keepdim=True) * (-c / t_s), ok))
                if kept_t is not None and form.teacher is not None:
                    d_t_t.append(_counted((form.teacher * kept_t).nansum(-1, keepdim=True) * (-c / t_t), ok))
                if want.hidden or want.weight or want.bias:
                    gradient = form.student.mul_(c / t_s)
                    if task is not None:
                        gradient += task.student.mul_(task_c)
                    if ok is not None:
                        gradient.masked_fill_(~ok, 0.0)
                    _through_linear(gradient, hidden[part], weight, part, d_hidden, d_weight, d_bias)

        ctx.terms, ctx.wanted, ctx.gradients = (divergence, cross_entropy), wanted, (d_hidden, d_weight, d_bias)
        ctx.save_for_backward(*tensors, *(torch.cat(parts) if parts else None for parts in (values, d_t_s, d_t_t)))
        ctx.mark_non_differentiable(kd_total, task_total)
        return kd_total + task_total, kd_total, task_total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        g, *_ = upstream
        *tensors, value, d_t_s, d_t_t = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if torch.is_grad_enabled() or gradients is None:
            loss = lambda *given: _definition(*ctx.terms, *given)[0]  # noqa: E731
            return None, None, None, None, *gradients_of(loss, tensors, ctx.wanted, g)
        student = [
            None if x is None else times_upstream(x, g).to(like.dtype)
            for x, like in zip(gradients, tensors[:3], strict=True)
        ]
        rows = _Flat(*tensors[7:])
        by_row = _Flat(
            unbroadcast(g, d_t_s, rows.student_temperature),
            unbroadcast(g, d_t_t, rows.teacher_temperature),
            unbroadcast(g, value, rows.factor),
            task_factor=None,
            valid=None,
            labels=None,
        )
        return None, None, None, None, *student, None, None, None, None, *by_row


def _counted(values: Tensor, valid: Tensor | None) -> Tensor:
    return values if valid is None else torch.where(valid, values, 0.0)


@dataclass(frozen=True)
class _LabelCrossEntropy(Divergence):
    """The cross-entropy with the labels, which looks at no teacher."""

    needs_labels: ClassVar[bool] = True

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return a.logsumexp(dim, keepdim=True) - a.gather(dim, labels)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        assert labels is not None
        p = a.softmax(dim)
        log_z = a.amax(dim, keepdim=True) - p.amax(dim, keepdim=True).log()
        value = log_z - a.gather(dim, labels)
        return ClosedForm(value, p.scatter_add_(dim, labels, -torch.ones_like(value)))


def _through_linear(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    part: slice,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Add the gradients of the output layer from one chunk to those of the chunks before."""
    if d_bias is not None:
        d_bias += gradient.sum(0)
    if weight.dtype == torch.float16:
        hidden, weight = hidden.float(), weight.float()
    gradient = gradient.to(weight.dtype)
    if d_hidden is not None:
        torch.mm(gradient, weight, out=d_hidden[part])
    if d_weight is not None:
        if d_weight.dtype == weight.dtype:
            d_weight.addmm_(gradient.t(), hidden)
        else:
            d_weight += gradient.t() @ hidden
