"""Losses between the logits of student and teacher: options in the constructor, one call into functional.

All are called with ``(student_logits, teacher_logits, temperature, targets)``, so that each can replace another.
Equations, shapes and sources are those of the function of the same name in :mod:`kd_lightning.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Unpack, override

from kd_lightning import functional
from kd_lightning.functional import FusedTerms, Temperature
from kd_lightning.functional.conventions import CONVENTIONS, Convention, check_convention
from kd_lightning.functional.divergences import Divergence, ForwardKL, JensenShannon, check_fusible
from kd_lightning.functional.row_loss import CLASS_DIM, IGNORE_INDEX, LayoutOptions, row_loss
from kd_lightning.functional.rows import REDUCTIONS, SCALES, Reduction, Scale, check_option
from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.functional.temperature import check_weights


class LossModuleOptions(LayoutOptions, total=False):
    """Keywords of every loss module between logits; :class:`LogitLoss` explains them and has the defaults."""

    scale: Scale | None


class LogitLoss(nn.Module):
    """Base of the losses between logits. For a loss of your own set ``function``, and name its further ``options``.

    Attributes:
        function: The loss as a function.
        options: Names of the function's own options, which are attributes of the module.
        own_scale: The scale where ``scale`` is None.
        compares_distributions: True if the loss depends on the logits through a softmax only, and so not on a shift.

    Args:
        scale: The factor per sample: ``"student_teacher"`` (T_s·T_t, which is T² when shared), ``"student"`` (T_s²),
            ``"teacher"`` (T_t²) or ``"none"``. None: ``own_scale``.
        class_dim: The dimension of the classes; 1 for dense ``(N, C, H, W)``.
        ignore_index: Target value of the positions to leave out; None keeps all of them, so that samples without a
            label are distilled too.
        reduction: ``"mean"`` over the valid positions, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: If ``scale`` or ``reduction`` has an unknown value.

    Example:
        >>> import torch
        >>> class Doubled(LogitLoss):
        ...     function = staticmethod(lambda *logits, **options: 2 * functional.kd_loss(*logits, **options))
        >>> Doubled(reduction="sum")(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]]), 2.0)
        tensor(0.2108)
    """

    function: ClassVar[Callable[..., Tensor]]
    options: ClassVar[tuple[str, ...]] = ()
    own_scale: ClassVar[Scale] = "student_teacher"
    compares_distributions: ClassVar[bool] = True

    def __init__(
        self,
        scale: Scale | None = None,
        class_dim: int = CLASS_DIM,
        ignore_index: int | None = IGNORE_INDEX,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        scale = self.own_scale if scale is None else scale
        check_option("scale", scale, SCALES)
        check_option("reduction", reduction, REDUCTIONS)
        self.scale: Scale = scale
        self.class_dim = class_dim
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: TeacherTarget,
        temperature: float | Tensor | Temperature,
        targets: Tensor | None = None,
        num_items: float | Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """Return the loss; see :func:`~kd_lightning.functional.kd_loss` for the arguments.

        A ``reduction`` given here replaces the module's own.
        """
        return self._loss(
            student_logits,
            teacher_logits,
            temperature,
            targets=targets,
            num_items=num_items,
            scale=self.scale,
            class_dim=self.class_dim,
            ignore_index=self.ignore_index,
            reduction=self.reduction if reduction is None else reduction,
        )

    def _loss(self, *given: Any, **options: Any) -> Tensor:
        """Return the loss of both logits and the temperature, with the options of every loss."""
        return type(self).function(*given, **options, **{name: getattr(self, name) for name in self.options})

    def extra_repr(self) -> str:
        """Return the options, the loss's own first."""
        names = (*self.options, "scale", "class_dim", "ignore_index", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class KDLoss(LogitLoss):
    r"""Kullback-Leibler divergence from the teacher to the student: :func:`~kd_lightning.functional.kd_loss`.

    Args:
        convention: The library whose loss of this name to compute. It fixes ``scale``:

            - ``"hinton"``: this loss as it is; mdistiller, timm, DistillKit.
            - ``"trl"``: without T².
            - ``"modelopt"``: with T², averaged over the classes too: C times smaller.
            - ``"torchdistill"``: ``α · CE + β · T² · KL``; without ``alpha`` or targets the KL alone, *without* T².
            - ``"textbrewer"``: the soft cross-entropy :math:`-\sum_k p_t \log p_s`, without T².
        alpha: Weight of the cross-entropy in the convention ``"torchdistill"``.
        beta: Weight of the divergence in the convention ``"torchdistill"``; None: ``1 − alpha``.
        **options: Those of :class:`LogitLoss`.

    Raises:
        ValueError: If an option has an unknown value or contradicts the convention.

    Example:
        >>> import torch
        >>> loss = KDLoss(scale="student_teacher")
        >>> loss(torch.zeros(2, 3), torch.zeros(2, 3), 4.0)
        tensor(0.)
    """

    function = staticmethod(functional.kd_loss)

    def __init__(
        self,
        *,
        convention: Convention | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        **options: Unpack[LossModuleOptions],
    ) -> None:
        super().__init__(**options)
        check_convention(convention, self.scale, alpha, beta)
        self.convention: Convention | None = convention
        self.alpha = alpha
        self.beta = beta

    @override
    def _loss(self, *given: Any, **options: Any) -> Tensor:
        if self.convention is None:
            return super()._loss(*given, **options)
        del options["scale"]  # which the convention has
        weights = {"alpha": self.alpha, "beta": self.beta} if self.convention == "torchdistill" else {}
        return CONVENTIONS[self.convention](*given, **options, **weights)

    @override
    def extra_repr(self) -> str:
        """Return the options, the convention's first where one is set."""
        own = f"convention={self.convention!r}, alpha={self.alpha!r}, beta={self.beta!r}, " if self.convention else ""
        return own + super().extra_repr()


class FusedLinearKDLoss(LogitLoss):
    """:class:`KDLoss`, or another divergence, whose training never holds the ``(B, L, V)`` logits of either model.

    :class:`~kd_lightning.DistillationModule` takes the final hidden states and output layers of student and teacher
    in place of their logits, and both terms, divergence and cross-entropy, are computed a chunk of rows at a time:
    :func:`~kd_lightning.functional.fused_linear_kd_loss`. Loss and gradients are those of the divergence's own loss,
    by default :class:`KDLoss`, with :class:`CrossEntropyLoss`. Both models must have ``base_model`` (inputs → hidden
    states) and ``get_output_embeddings()`` (a Linear), as Hugging Face's causal models and
    :class:`~kd_lightning.models.CausalTransformer` have, and no module may transform the hidden states between the two
    or the logits after them.

    Without logits, training has no ``train_acc``, no ``train_agreement`` and no entropies, a gradient share is NaN, and
    a temperature that reads logits is an error. A term whose weight is 0 is logged as 0. Given logits, as in validation
    and test, which measure everything, this is the divergence's own loss, and one batch's logits must fit in memory.

    Args:
        chunk_size: Rows at a time.
        divergence: What is computed in place of forward KL: a class of
            :mod:`~kd_lightning.functional.divergences` or :mod:`~kd_lightning.functional.mixed_divergences` that needs
            no labels, such as ``ReverseKL()`` and ``JensenShannon(0.5)``.
        **options: Those of :class:`LogitLoss`. From hidden states ``class_dim`` is the last dimension and
            ``reduction`` is ``"mean"``.

    Raises:
        ValueError: If ``scale`` or ``reduction`` has an unknown value, if ``chunk_size`` is below 1, or if the
            divergence needs labels.

    Example:
        >>> import torch
        >>> FusedLinearKDLoss(chunk_size=1024)(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), 4.0)
        tensor(0.)
    """

    function = staticmethod(functional.kd_loss)

    def __init__(
        self, chunk_size: int = 256, divergence: Divergence | None = None, **options: Unpack[LossModuleOptions]
    ) -> None:
        super().__init__(**options)
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        self.chunk_size = chunk_size
        self.divergence = ForwardKL() if divergence is None else divergence
        check_fusible(self.divergence)

    @override
    def _loss(self, *given: Any, **options: Any) -> Tensor:
        return row_loss(self.divergence, *given, **options)

    def from_hidden(
        self,
        student: tuple[Tensor, Tensor, Tensor | None],
        teacher: tuple[Tensor, Tensor, Tensor | None],
        temperature: float | Tensor | Temperature,
        targets: Tensor | None,
        kd_weight: float,
        task_weight: float,
    ) -> FusedTerms:
        """Return both terms and their weighted sum, from hidden states, weight and bias of the output layer."""
        return functional.fused_linear_kd_terms(
            student[0],
            student[1],
            teacher[0],
            teacher[1],
            temperature,
            student_bias=student[2],
            teacher_bias=teacher[2],
            targets=targets,
            kd_weight=kd_weight,
            task_weight=task_weight,
            scale=self.scale,
            ignore_index=self.ignore_index,
            chunk_size=self.chunk_size,
            divergence=self.divergence,
        )

    def extra_repr(self) -> str:
        """Return the options, the loss's own first."""
        return f"chunk_size={self.chunk_size}, divergence={self.divergence!r}, {super().extra_repr()}"


class ReverseKDLoss(LogitLoss):
    """Divergence from the student to the teacher: :func:`~kd_lightning.functional.reverse_kd_loss`."""

    function = staticmethod(functional.reverse_kd_loss)


class JSDLoss(LogitLoss):
    """Generalised Jensen-Shannon divergence: :func:`~kd_lightning.functional.jsd_loss`.

    Args:
        beta: Weight of the teacher, between 0 and 1.
        **options: Those of :class:`LogitLoss`.
    """

    function = staticmethod(functional.jsd_loss)
    options = ("beta",)

    def __init__(self, beta: float = 0.5, **options: Unpack[LossModuleOptions]) -> None:
        super().__init__(**options)
        JensenShannon(beta)  # raises
        self.beta = beta


class TotalVariationLoss(LogitLoss):
    """Half the absolute difference of the probabilities: :func:`~kd_lightning.functional.total_variation_loss`.

    Without T² unless asked for.
    """

    function = staticmethod(functional.total_variation_loss)
    own_scale = "none"


class SoftCrossEntropyLoss(LogitLoss):
    """Cross-entropy with the teacher: :func:`~kd_lightning.functional.soft_cross_entropy_loss`."""

    function = staticmethod(functional.soft_cross_entropy_loss)


class MSELogitsLoss(LogitLoss):
    """Mean squared difference of the logits: :func:`~kd_lightning.functional.mse_logits_loss`."""

    function = staticmethod(functional.mse_logits_loss)
    compares_distributions = False


class BernoulliKDLoss(LogitLoss):
    """One yes-or-no per class, for multi-label tasks: :func:`~kd_lightning.functional.bernoulli_kd_loss`."""

    function = staticmethod(functional.bernoulli_kd_loss)
    compares_distributions = False


class HardLabelLoss(LogitLoss):
    """Cross-entropy with the teacher's decision: :func:`~kd_lightning.functional.hard_label_loss`.

    Neither temperature nor ``scale`` has an effect.
    """

    function = staticmethod(functional.hard_label_loss)
    own_scale = "none"


class DKDLoss(LogitLoss):
    """Decoupled distillation: :func:`~kd_lightning.functional.dkd_loss`. Needs targets.

    Args:
        alpha: Weight of the target against the rest.
        beta: Weight of the rest among themselves.
        **options: Those of :class:`LogitLoss`.
    """

    function = staticmethod(functional.dkd_loss)
    options = ("alpha", "beta")

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, **options: Unpack[LossModuleOptions]) -> None:
        super().__init__(**options)
        check_weights(alpha=alpha, beta=beta)
        self.alpha = alpha
        self.beta = beta


class NKDLoss(LogitLoss):
    """Normalised distillation: :func:`~kd_lightning.functional.nkd_loss`. Needs targets.

    Args:
        gamma: Weight of the classes beside the target.
        **options: Those of :class:`LogitLoss`.
    """

    function = staticmethod(functional.nkd_loss)
    options = ("gamma",)

    def __init__(self, gamma: float = 1.5, **options: Unpack[LossModuleOptions]) -> None:
        super().__init__(**options)
        check_weights(gamma=gamma)
        self.gamma = gamma


class DISTLoss(LogitLoss):
    """Correlations along rows and columns: :func:`~kd_lightning.functional.dist_loss`. Without T² unless asked for.

    Args:
        beta: Weight of the correlation within a row.
        gamma: Weight of the correlation within a class, over the batch.
        sync: Whether that batch is the one of all ranks in training; :func:`~kd_lightning.functional.dist_loss` has the
            costs.
        **options: Those of :class:`LogitLoss`.
    """

    function = staticmethod(functional.dist_loss)
    options = ("beta", "gamma")
    own_scale = "none"

    def __init__(
        self, beta: float = 1.0, gamma: float = 1.0, sync: bool = False, **options: Unpack[LossModuleOptions]
    ) -> None:
        super().__init__(**options)
        check_weights(beta=beta, gamma=gamma)
        self.beta = beta
        self.gamma = gamma
        self.sync = bool(sync)

    @override
    def _loss(self, *given: Any, **options: Any) -> Tensor:
        return super()._loss(*given, **options, sync=self.sync and self.training)

    @override
    def extra_repr(self) -> str:
        """Return the options, and ``sync`` where it is on, as older checkpoints do not have it."""
        return super().extra_repr() + (", sync=True" if self.sync else "")


class MultiTemperatureKDLoss(LogitLoss):
    """Mean over several temperatures: :func:`~kd_lightning.functional.multi_temperature_kd_loss`.

    Args:
        factors: Multiples of the temperature.
        **options: Those of :class:`LogitLoss`.
    """

    function = staticmethod(functional.multi_temperature_kd_loss)
    options = ("factors",)

    def __init__(
        self, factors: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5), **options: Unpack[LossModuleOptions]
    ) -> None:
        super().__init__(**options)
        self.factors = tuple(factors)
