"""Distillation losses between the logits of student and teacher.

All take ``(student_logits, teacher_logits, temperature)`` and the options of :func:`kd_loss`, which explains them.
Unless a docstring names another, the defaults are those of :func:`~kd_lightning.functional.row_loss.row_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from kd_lightning.functional import divergences
from kd_lightning.functional.row_loss import CLASS_DIM, IGNORE_INDEX, LossOptions, row_loss
from kd_lightning.functional.rows import without_padding
from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.functional.temperature import Temperature, as_temperature

_FORWARD_KL = divergences.ForwardKL()


def kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Temperature-scaled Kullback-Leibler divergence from the teacher to the student.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \sum_{k=1}^{C} p_{t,ik} \, (\log p_{t,ik} - \log p_{s,ik})

    with :math:`p_s = \mathrm{softmax}(s / T_s)`, :math:`p_t = \mathrm{softmax}(t / T_t)`, the valid positions
    :math:`V` (those whose target is not ``ignore_index``) and the factor :math:`c_i` that ``scale`` names. With one
    shared temperature and the default scale this is Hinton's :math:`T^2 \, \mathrm{KL}(p_t \| p_s)`. Its gradient is
    :math:`\partial L / \partial s = c_i / T_s \, (p_s - p_t) / |V|`: the factor :math:`T^2` keeps its size while
    :math:`T` changes.

    The logits are widened to float32 before the division by T (float64 stays), half-precision logits a chunk at a time.
    Value and gradient are computed in one pass that keeps a single buffer of the logits' size. Gradients of the teacher
    or of a class-wise temperature, second derivatives, ``torch.func`` and ``torch.compile`` run the same equation in
    plain differentiable torch. Equal logits have loss 0 and gradient 0 exactly.

    Below T = 0.5 and above T = 10 the logits are widened to float64, because the divergence is a small rest of large
    terms there: value and gradient are right to 10⁻⁴ from T = 0.01 to 10⁶. That is done where T is known without a host
    sync: a number anywhere, a tensor on the CPU. For a temperature tensor on an accelerator, and under
    ``torch.compile``, give float64 logits above T = 100.

    Args:
        student_logits: ``(N, C)``, ``(B, L, C)``, … or ``(N, C, H, W)`` with ``class_dim=1``.
        teacher_logits: The same shape. A class that both sides mask with −inf contributes nothing; a class that only
            the student masks makes the divergence infinite. A NaN makes the loss NaN: a function does not look for it,
            because that is a host sync; the module and the callback stop there. In ``(B, L, V)`` surplus classes of the
            teacher are padding of its vocabulary: they are cut and the rest is renormalised, with a warning.
            :class:`Sparse`: log-probabilities of k classes in their place, as servers give them.
        temperature: A number, a tensor or a :class:`Temperature`, in the layout of the logits; see there for shapes.
            Positive and finite. Gradients flow to it, through the factor ``c`` too; where the student's logits are
            detached, to it alone.
        targets: Class indices in the shape of the logits without the class dimension. They only select the valid
            positions; a boolean mask does so too. Floating-point targets in the logits' shape (class probabilities)
            leave nothing out.
        scale: The factor ``c``, per sample, applied after the sum over classes: ``"student_teacher"`` is
            ``T_s · T_t``, ``"student"`` ``T_s²``, ``"teacher"`` ``T_t²``, ``"none"`` 1. For a class-wise temperature it
            is the mean over classes. ``Temperature.scale``, where set, replaces it.
        class_dim: The dimension of the classes.
        ignore_index: Target value of the positions to leave out; ``None`` keeps all of them.
        reduction: ``"mean"`` over the valid positions, ``"sum"`` over them, or ``"none"``: the loss per position,
            0 where ignored. Without a valid position the mean is 0, with a zero gradient.
        num_items: The divisor of the mean in place of the number of valid positions. Under gradient accumulation pass
            their number over all micro-batches of a step, so that the sum of the losses is the loss of the step; the
            trainer must not divide by the number of micro-batches again.

    Returns:
        A scalar, or with ``reduction="none"`` a tensor in the shape of the logits without the class dimension.

    Raises:
        ValueError: If the logits differ in shape, lack ``class_dim`` or have fewer than two classes, if the
            temperature is not positive and finite or does not fit their shape, if the targets have another shape or
            (looked at on the CPU) are no class indices, or if an option has an unknown value.
        TypeError: If an option has an unknown name.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0, 5.0], [0.0, 4.0, 0.0]])
        >>> kd_loss(student, teacher, 4.0)
        tensor(1.2101, grad_fn=...)
        >>> per_sample = torch.tensor([[3.0], [2.0]])  # (N, 1): one temperature per row
        >>> kd_loss(student, teacher, per_sample, reduction="none")
        tensor([1.2091, 0.9412], grad_fn=...)
    """
    return row_loss(_FORWARD_KL, student_logits, teacher_logits, temperature, **options)


def reverse_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Reverse Kullback-Leibler divergence, from the student to the teacher: it seeks a mode where KL covers them all.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \sum_k p_{s,ik} \, (\log p_{s,ik} - \log p_{t,ik})

    A class that the teacher alone masks with −inf makes it infinite. Arguments and errors: :func:`kd_loss`.

    Temperature: T = 1, where it beats :func:`kd_loss` on language models; above 1 forward KL wins, because T adds the
    signal of the rarer classes to it and little more than a factor to reverse KL (arXiv 2606.00306).

    Source: Y. Gu et al., "MiniLLM", ICLR 2024, arXiv 2306.08543.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> reverse_kd_loss(student, teacher, 2.0)
        tensor(0.5973)
    """
    return row_loss(divergences.ReverseKL(), student_logits, teacher_logits, temperature, **options)


def jsd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    *,
    beta: float = 0.5,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence: bounded, and symmetric at ``beta=0.5``.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \, [\beta \, \mathrm{KL}(p_t \| m) + (1 - \beta) \, \mathrm{KL}(p_s \| m)],
        \qquad m = \beta \, p_t + (1 - \beta) \, p_s

    Equal logits cost exactly 0. Other arguments and errors: :func:`kd_loss`.

    Its own arguments:

    - ``beta``: Weight of the teacher, between 0 and 1. At the ends the divergence vanishes; divided by β or 1 − β it
      tends to :func:`kd_loss` at 0 and :func:`reverse_kd_loss` at 1.

    Raises:
        ValueError: If ``beta`` is not between 0 and 1.

    Source: R. Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, arXiv 2306.13649 (GKD).

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> jsd_loss(student, teacher, 2.0)
        tensor(0.1241)
    """
    return row_loss(divergences.JensenShannon(beta), student_logits, teacher_logits, temperature, **options)


def total_variation_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Total variation distance: half the sum of absolute differences of the probabilities, between 0 and 1.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \, \tfrac{1}{2} \sum_k |p_{t,ik} - p_{s,ik}|

    It is of first order in the difference, so no T² belongs to it: ``scale="none"`` is the default. Arguments and
    errors: :func:`kd_loss`.

    Source: Y. Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023, arXiv
    2307.15190.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> total_variation_loss(student, teacher, 2.0)
        tensor(0.1929)
    """
    options.setdefault("scale", "none")
    return row_loss(divergences.TotalVariation(), student_logits, teacher_logits, temperature, **options)


def soft_cross_entropy_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Cross-entropy with the teacher's distribution: KL plus the teacher's entropy.

    .. math::
        L = -\frac{1}{|V|} \sum_{i \in V} c_i \sum_k p_{t,ik} \log p_{s,ik}

    The student's gradient is that of :func:`kd_loss`. The temperature's is not: do not learn a temperature with it,
    since the teacher's entropy grows with T and would push it the wrong way. Arguments and errors: :func:`kd_loss`.

    Source: G. Hinton, O. Vinyals, J. Dean, 2015, arXiv 1503.02531, eq. 2.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> soft_cross_entropy_loss(student, teacher, 2.0, scale="none")
        tensor(0.6985)
    """
    return row_loss(divergences.SoftCrossEntropy(), student_logits, teacher_logits, temperature, **options)


def mse_logits_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Mean squared difference of the tempered logits, over the classes.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \, \frac{1}{C} \sum_k (s_{ik} / T_s - t_{ik} / T_t)^2

    With one shared temperature and the default scale, T cancels: the mean squared error of the logits. Up to the rows'
    means it is twice the limit of :func:`kd_loss` for T → ∞. C leaves out the classes that both sides mask, with
    −inf or with large finite numbers from −1e4 on. Arguments and errors: :func:`kd_loss`.

    Source: J. Ba, R. Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, arXiv 1312.6184.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> mse_logits_loss(student, teacher, 2.0)
        tensor(1.6667)
    """
    return row_loss(divergences.SquaredError(), student_logits, teacher_logits, temperature, **options)


def bernoulli_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Kullback-Leibler divergence for multi-label tasks: one yes-or-no distribution per class, by the sigmoid.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \sum_k \mathrm{KL}(\sigma(t_{ik} / T_t) \| \sigma(s_{ik} / T_s))

    Here a class-wise temperature is natural, and one class is enough. The sum goes over the classes, as everywhere;
    the binary cross-entropy that averages over them is C times smaller. Arguments and errors: :func:`kd_loss`, but
    targets may have the logits' shape, and then leave out single labels where they are ``ignore_index``.

    Source: P. Yang et al., "Multi-Label Knowledge Distillation", ICCV 2023, arXiv 2308.06453, with the temperature of
    Hinton et al.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> bernoulli_kd_loss(student, teacher, 2.0)
        tensor(0.5209)
    """
    targets, ignore_index = options.get("targets"), options.get("ignore_index", IGNORE_INDEX)
    if targets is not None and targets.shape == student_logits.shape and isinstance(teacher_logits, Tensor):
        options["targets"] = None
        if ignore_index is not None:  # masked by equal logits, because they cost nothing at any temperature
            left_out = targets == ignore_index
            student_logits = student_logits.masked_fill(left_out, 0.0)
            teacher_logits = without_padding(student_logits, teacher_logits, options.get("class_dim", CLASS_DIM))
            teacher_logits = teacher_logits.masked_fill(left_out, 0.0)
    return row_loss(divergences.BernoulliKL(), student_logits, teacher_logits, temperature, **options)


def multi_temperature_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    *,
    factors: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5),
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Return the mean of :func:`kd_loss` at several multiples of the temperature.

    .. math::
        L = \frac{1}{F} \sum_{f} \mathrm{kd\_loss}(s, t, f \cdot T)

    At T = 4 the default factors give the temperatures 2, 3, 4, 5, 6 of the publication, which takes the sum. A
    ``Temperature.scale`` that is set is in units of T² and so goes with the square of the factor.

    Its own arguments:

    - ``factors``: Multiples of the temperature, positive.

    Raises:
        ValueError: If ``factors`` is empty, or holds a number that is not positive and finite.

    Source: Y. Jin, J. Wang, D. Lin, "Multi-Level Logit Distillation", CVPR 2023.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> multi_temperature_kd_loss(student, teacher, 4.0)
        tensor(0.6416)
    """
    if not factors or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"factors must be positive and finite, and at least one, got {tuple(factors)}.")
    teacher_logits = without_padding(student_logits, teacher_logits, options.get("class_dim", CLASS_DIM))
    student, teacher, own_scale = as_temperature(temperature, student_logits)
    terms = [
        row_loss(
            _FORWARD_KL,
            student_logits,
            teacher_logits,
            Temperature(student * f, teacher * f, None if own_scale is None else own_scale * f * f),
            **options,
        )
        for f in factors
    ]
    return torch.stack(terms).mean(0)
