"""Distillation losses between forward and reverse Kullback-Leibler divergence.

All take ``(student_logits, teacher_logits, temperature)`` and the options of
:func:`~kd_lightning.functional.kd_loss`, which explains them. The language models of their publications were trained
at T = 1. There reverse KL beats forward KL, and above T = 1 forward KL wins, because the temperature adds the signal of
the rarer tokens to forward KL and little more than a factor to reverse KL (arXiv 2606.00306). A loss gains from T > 1
the more, the larger its share of forward KL.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from kd_lightning.functional.mixed_divergences import AlphaBeta, EntropyGatedKL, SkewKL, SymmetricKL, ToDi
from kd_lightning.functional.row_loss import LossOptions, row_loss
from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.functional.temperature import Temperature


def alpha_beta_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    *,
    alpha: float,
    beta: float,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""α-β-divergence: from forward KL at (1, 0) to reverse KL at (0, 1), and beyond the line between them.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} \frac{c_i}{\alpha \beta} \sum_k
            \frac{\beta \, p_{s,ik}^{\alpha + \beta} + \alpha \, p_{t,ik}^{\alpha + \beta}}{\alpha + \beta}
            - p_{t,ik}^\alpha \, p_{s,ik}^\beta

    with its limit where α or β is 0. A small α listens to the classes on which both differ most, a small β to those
    that the student already favours. The official code has a further factor α at β = 0 and β at α = 0, where its loss
    is discontinuous. Equal logits cost exactly 0. Other arguments and errors: :func:`~kd_lightning.functional.kd_loss`.

    Temperature: T = 1 for small α, where the loss is close to reverse KL, and above for α near 1.

    Its own arguments:

    - ``alpha``: Exponent of the teacher, at least 0. The official example for CIFAR-100 has 0.8 and β = 0.3.
    - ``beta``: Exponent of the student, at least 0.

    Raises:
        ValueError: If an exponent is negative or not finite, or if both are 0.

    Source: G. Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
    α-β-Divergence", ICML 2025, arXiv 2505.04560.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> alpha_beta_kd_loss(student, teacher, 1.0, alpha=0.8, beta=0.3)
        tensor(0.0937)
    """
    return row_loss(AlphaBeta(alpha, beta), student_logits, teacher_logits, temperature, **options)


def skew_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    *,
    skew: float = 0.1,
    reverse: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""KL to a mixture with the other side: finite where one side has no probability, with a bounded gradient.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \, \mathrm{KL}(p_t \| \alpha \, p_t + (1 - \alpha) \, p_s)

    and with ``reverse`` :math:`\mathrm{KL}(p_s \| \alpha \, p_s + (1 - \alpha) \, p_t)`. Neither exceeds
    :math:`c_i \log(1/\alpha)`. Equal logits cost exactly 0. Other arguments and errors:
    :func:`~kd_lightning.functional.kd_loss`.

    Temperature: above 1 as it is, since it is close to forward KL, and T = 1 with ``reverse``.

    Its own arguments:

    - ``skew``: α, the outer distribution's share of the mixture, between 0 and 1.
    - ``reverse``: True for the divergence from the student.

    Raises:
        ValueError: If ``skew`` is not between 0 and 1.

    Source: J. Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024, arXiv
    2402.03898, eqs. 3 and 4.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> skew_kd_loss(student, teacher, 1.0), skew_kd_loss(student, teacher, 1.0, reverse=True)
        (tensor(0.0941), tensor(0.1349))
    """
    return row_loss(SkewKL(skew, reverse), student_logits, teacher_logits, temperature, **options)


def symmetric_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    *,
    reverse_weight: float = 0.5,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Weighted sum of both KLs; with equal weights half of Jeffreys' divergence.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \, [(1 - \lambda) \, \mathrm{KL}(p_t \| p_s)
            + \lambda \, \mathrm{KL}(p_s \| p_t)]

    Equal logits cost exactly 0. Other arguments and errors: :func:`~kd_lightning.functional.kd_loss`.

    Temperature: T = 1 for λ near 1, and above for λ near 0.

    Its own arguments:

    - ``reverse_weight``: λ, the weight of reverse KL, between 0 and 1.

    Raises:
        ValueError: If ``reverse_weight`` is not between 0 and 1.

    Source: H. Jeffreys, "An Invariant Form for the Prior Probability in Estimation Problems", 1946; with a weight in
    the code of DistiLLM, arXiv 2402.03898.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> symmetric_kd_loss(student, teacher, 2.0)
        tensor(0.5205)
    """
    return row_loss(SymmetricKL(reverse_weight), student_logits, teacher_logits, temperature, **options)


def entropy_gated_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    *,
    threshold: float = 0.8,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Reverse KL everywhere, and forward KL added where the teacher is unsure.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \, [\mathrm{KL}(p_s \| p_t) + \mathbb{1}[H(p_t) > \tau] \,
            \mathrm{KL}(p_t \| p_s)]

    with the entropy :math:`H(p_t) = -\sum_k p_{t,k} \log p_{t,k}`. The publication estimates reverse KL from
    tokens that the student samples; here it is the sum over the classes. Equal logits cost exactly 0. Other
    arguments and errors: :func:`~kd_lightning.functional.kd_loss`.

    Temperature: T = 1, at which the threshold was chosen. The entropy is that of the tempered teacher, so a higher T
    opens the gate for more rows.

    Its own arguments:

    - ``threshold``: τ in nats, at least 0.

    Raises:
        ValueError: If ``threshold`` is negative or not finite.

    Source: W. Jin et al., "Entropy-Aware On-Policy Distillation of Language Models", ICML 2026, arXiv 2603.07079.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> entropy_gated_kd_loss(student, teacher, 1.0), entropy_gated_kd_loss(student, teacher, 4.0)
        (tensor(0.2395), tensor(1.4423))
    """
    return row_loss(EntropyGatedKL(threshold), student_logits, teacher_logits, temperature, **options)


def todi_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""ToDi: forward KL for the classes that the student underrates, reverse KL for those that it overrates.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \sum_k \Bigl(w_{ik} \, p_{t,ik} - (1 - w_{ik}) \, p_{s,ik}\Bigr)
            \log \frac{p_{t,ik}}{p_{s,ik}},
        \qquad w = \mathrm{detach}\Bigl(\frac{p_t}{p_t + p_s}\Bigr)

    The weight is :math:`\sigma(\log p_t / p_s)` and a constant. The value equals the sum of both KLs; the gradient
    does not. Equal logits cost exactly 0. Arguments and errors: :func:`~kd_lightning.functional.kd_loss`.

    Temperature: T = 1, at which it was published.

    Source: S. Jung et al., "ToDi: Token-wise Distillation via Fine-Grained Divergence Control", EMNLP 2025, arXiv
    2505.16297.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> todi_loss(student, teacher, 2.0)
        tensor(1.0409)
    """
    return row_loss(ToDi(), student_logits, teacher_logits, temperature, **options)
