"""What other libraries compute, as plain functions written from their published equations: the other side of a ratio.

They are written the way the libraries run them (which softmax, how many temporaries, which mask), since that is what
costs time and memory; no code is copied.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_batchmean(s: Tensor, t: Tensor, temperature: Any) -> Tensor:
    """KL of probabilities, T² outside: mdistiller, torchdistill, RepDistiller, the torch tutorial."""
    log_p, q = F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1)
    return F.kl_div(log_p, q, reduction="batchmean") * temperature**2


def kd_log_space(s: Tensor, t: Tensor, temperature: Any) -> Tensor:
    """Both sides in float32 log space, Σ q (log q − log p): DistillKit."""
    log_p = F.log_softmax(s.float() / temperature, -1)
    log_q = F.log_softmax(t.float() / temperature, -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean() * temperature**2


def kd_chunked(s: Tensor, t: Tensor, temperature: Any, chunks: int = 8) -> Tensor:
    """Soft cross-entropy by chunks of tokens in float32, with a mask for infinite logits: torchtune."""
    total: Any = 0.0
    for s_part, t_part in zip(s.chunk(chunks), t.chunk(chunks), strict=True):
        q = F.softmax(t_part / temperature, -1, dtype=torch.float32)
        log_p = F.log_softmax(s_part / temperature, -1, dtype=torch.float32)
        total = total - torch.masked_fill(q * log_p, torch.isinf(s_part), 0).sum()
    return total / len(s)


def learnable_temperature(s: Tensor, t: Tensor, raw: Tensor) -> Tensor:
    """T = 1 + 20 σ(raw), T² in the graph: CTKD."""
    return kd_batchmean(s, t, 1 + 20 * torch.sigmoid(raw))


def z_score(s: Tensor, t: Tensor, temperature: Any) -> Tensor:
    """Both sides standardised per sample, then KL: logit standardisation."""

    def standardise(z: Tensor) -> Tensor:
        return (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True))

    return kd_batchmean(standardise(s), standardise(t), temperature)


def dkd(s: Tensor, t: Tensor, temperature: Any, targets: Tensor, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """The target against the rest, and the rest with −1000 in the target's place: DKD."""
    target = F.one_hot(targets, s.shape[-1]).to(s.dtype)
    p, q = F.softmax(s / temperature, -1), F.softmax(t / temperature, -1)

    def two_points(x: Tensor) -> Tensor:
        return torch.cat([(x * target).sum(-1, keepdim=True), (x * (1 - target)).sum(-1, keepdim=True)], -1)

    first = F.kl_div(two_points(p).log(), two_points(q), reduction="batchmean")
    others = F.log_softmax(s / temperature - 1000 * target, -1), F.softmax(t / temperature - 1000 * target, -1)
    return (alpha * first + beta * F.kl_div(*others, reduction="batchmean")) * temperature**2


def generalised_jsd(s: Tensor, t: Tensor, temperature: Any, beta: float = 0.5) -> Tensor:
    """The mixture by a log-sum-exp over both log-softmaxes: TRL."""
    log_p, log_q = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    mixture = torch.logsumexp(torch.stack([log_p + math.log(1 - beta), log_q + math.log(beta)]), 0)
    of_q = F.kl_div(mixture, log_q, reduction="none", log_target=True)
    of_p = F.kl_div(mixture, log_p, reduction="none", log_target=True)
    return (beta * of_q + (1 - beta) * of_p).sum() / len(s)


def linear_full(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor, temperature: Any) -> Tensor:
    """All the logits at once."""
    return kd_batchmean(F.linear(h, w), F.linear(ht, wt), temperature)


def linear_chunked_outputs(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor, temperature: Any, chunks: int = 8) -> Tensor:
    """Logits chunk by chunk, all kept for the backward: torchtune."""
    total: Any = 0.0
    for part, teacher_part in zip(h.chunk(chunks), ht.chunk(chunks), strict=True):
        total = total + kd_batchmean(F.linear(part, w), F.linear(teacher_part, wt), temperature) * len(part)
    return total / len(h)


class LinearChunked(torch.autograd.Function):
    """Loss and gradients of one chunk by ``torch.func``, added up in the forward: Liger's fused linear distillation."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, ht: Tensor, wt: Tensor, temperature: float, rows: int) -> Any:  # pyright: ignore
        def of_chunk(h: Tensor, w: Tensor, ht: Tensor) -> Tensor:
            return kd_batchmean(F.linear(h, w), F.linear(ht, wt), temperature) * len(h)

        with_gradient = torch.func.grad_and_value(of_chunk, argnums=(0, 1))
        d_h, d_w, total = torch.empty_like(h), torch.zeros_like(w), torch.zeros(())
        for i in range(0, len(h), rows):
            (d_part, d_weight), value = with_gradient(h[i : i + rows], w, ht[i : i + rows])
            d_h[i : i + rows] = d_part / len(h)
            d_w.add_(d_weight, alpha=1 / len(h))
            total = total + value
        ctx.save_for_backward(d_h, d_w)
        return total / len(h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_h, d_w = ctx.saved_tensors
        return g * d_h, g * d_w, None, None, None, None
