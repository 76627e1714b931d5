"""Losses between logits that single out one class: the teacher's decision, or the label's.

Arguments, options and errors are those of :func:`~kd_lightning.functional.kd_loss`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Unpack

from kd_lightning.functional.class_divergences import DecoupledKL, NonTargetCrossEntropy, TargetCrossEntropy
from kd_lightning.functional.divergences import SoftCrossEntropy
from kd_lightning.functional.row_loss import CLASS_DIM, LossOptions, row_loss
from kd_lightning.functional.rows import check_layout, check_whole, without_padding
from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.functional.temperature import Temperature, as_temperature, check_values, check_weights


def hard_label_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Return the cross-entropy with the teacher's decision, as if it were the label.

    .. math::
        L = -\frac{1}{|V|} \sum_{i \in V} \log \mathrm{softmax}(s_i)_{y_i}, \qquad
        y_i = \operatorname{argmax}_k t_{ik}

    Temperature and ``scale`` have no part in it; a learned temperature gets the gradient 0. Of equal logits the first
    is the decision. Arguments and errors: :func:`kd_loss`.

    Source: H. Touvron et al., "Training data-efficient image transformers & distillation through attention" (DeiT),
    ICML 2021, arXiv 2012.12877, hard-label distillation.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> hard_label_loss(student, teacher, 4.0)
        tensor(0.1698)
    """
    check_whole("hard_label_loss", student_logits, teacher_logits)
    class_dim = options.get("class_dim", CLASS_DIM)
    check_layout(student_logits, class_dim, options.get("targets"))
    teacher_logits = without_padding(student_logits, teacher_logits, class_dim)
    if not isinstance(teacher_logits, Tensor):
        raise TypeError(
            f"hard_label_loss takes the largest of all logits, got {type(teacher_logits).__name__} targets. Take a "
            "loss that compares distributions, such as kd_loss."
        )
    decision = teacher_logits.argmax(class_dim, keepdim=True)
    certain = torch.full_like(teacher_logits, -math.inf).scatter(class_dim, decision, 0.0)
    options["scale"] = "none"
    student, teacher, _ = as_temperature(temperature, student_logits)
    at_one = Temperature(*(0 * t + 1 for t in (student, teacher)))  # for DDP, which expects every gradient
    return row_loss(SoftCrossEntropy(), student_logits, certain, at_one, **options)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Decoupled distillation: the target against the rest, and the rest among themselves, each with its own weight.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i [\alpha \mathrm{KL}(b_t \| b_s) + \beta \mathrm{KL}(\hat p_t \| \hat p_s)]

    with the two-point distribution :math:`b = (p_y, 1 - p_y)` of the target :math:`y`, and the distribution
    :math:`\hat p` over the other classes. The target's column is dropped, not overwritten by a large negative number,
    whose underflow gives a NaN temperature gradient. Arguments and errors: :func:`kd_loss`; targets are needed.

    Its own arguments:

    - ``alpha``: Weight of the target's term.
    - ``beta``: Weight of the others' term. The publication uses 8, or 2 to 6 for close pairs, and 0.5 to 2 on ImageNet.

    Targets that are probabilities in the logits' shape, as mixup and CutMix make them, stand for their likeliest class.

    Raises:
        ValueError: If the targets are neither class indices nor probabilities, if two classes leave the second term
            empty, or if a weight is negative or not finite, or both are 0.

    Source: B. Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> dkd_loss(student, teacher, 4.0, targets=torch.tensor([2]))
        tensor(4.4695)
    """
    check_weights(alpha=alpha, beta=beta)
    options["targets"] = _class_targets("dkd_loss", student_logits, options)
    return row_loss(DecoupledKL(alpha, beta), student_logits, teacher_logits, temperature, **options)


def _class_targets(name: str, logits: Tensor, options: LossOptions) -> Tensor:
    """Return targets that are class indices as they are, and the likeliest class of those that are probabilities."""
    targets, class_dim = options.get("targets"), options.get("class_dim", CLASS_DIM)
    soft = targets is not None and targets.is_floating_point() and targets.shape == logits.shape
    if targets is None or targets.dtype == torch.bool or (targets.is_floating_point() and not soft):
        mask = "a mask of positions alone"  # such as the attention_mask in the place of labels
        received = "none" if targets is None else mask if targets.dtype == torch.bool else f"{targets.dtype} ones"
        raise ValueError(
            f"{name} splits off the target class: it needs targets that are class indices, got {received}."
        )
    if not soft:
        return targets
    check_values(
        ((targets.sum(class_dim) - 1).abs() < 0.01).all(),
        f"{name} splits off the likeliest class of soft targets, which must be probabilities: of sum 1 within 0.01 for "
        "each sample, but these are not. Give class indices; for several labels at once take BernoulliKDLoss.",
    )
    return targets.argmax(class_dim)


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    *,
    gamma: float = 1.5,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Normalised distillation: the target at T = 1, and the other classes, normalised among themselves, at T.

    .. math::
        L = -\frac{1}{|V|} \sum_{i \in V} \Bigl[ \mathrm{softmax}(t_i)_y \log \mathrm{softmax}(s_i)_y
            + \gamma \, c_i \sum_{k \ne y} \hat p_{t,ik} \log \hat p_{s,ik} \Bigr]

    Temperature and ``scale`` act on the second term alone. Arguments and errors: :func:`kd_loss`; targets are needed.

    Its own arguments:

    - ``gamma``: Weight of the second term. The publication uses 1.5 at T = 1 on ImageNet, 3.5 at T = 3 on CIFAR-100.

    Targets that are probabilities in the logits' shape, as mixup and CutMix make them, stand for their likeliest class.

    Raises:
        ValueError: If the targets are neither class indices nor probabilities, if two classes leave the second term
            empty, or if ``gamma`` is negative or not finite.

    Source: Z. Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023, arXiv 2303.13005.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> nkd_loss(student, teacher, 1.0, targets=torch.tensor([2]))
        tensor(1.7322)
    """
    check_weights(gamma=gamma)
    options["targets"] = _class_targets("nkd_loss", student_logits, options)
    others = row_loss(NonTargetCrossEntropy(), student_logits, teacher_logits, temperature, **options)
    options["scale"] = "none"
    target = row_loss(TargetCrossEntropy(), student_logits, teacher_logits, 1.0, **options)
    return target + gamma * others
