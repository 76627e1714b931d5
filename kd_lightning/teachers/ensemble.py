"""Several teachers that stand where one can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning.functional import Temperature
from kd_lightning.functional.ensemble import mixed_log_softmax, mixed_logits
from kd_lightning.functional.rows import check_option
from kd_lightning.schedules import Progress, Schedule
from kd_lightning.teachers.calls import extract_logits
from kd_lightning.teachers.frozen import FrozenTeacher, as_teacher
from kd_lightning.teachers.indexed import IndexedDataset
from kd_lightning.teachers.member_weights import Confidence, MemberWeights, check_one_for_each
from kd_lightning.teachers.opinions import LossTerm, MergedLogits, Opinions
from kd_lightning.teachers.routing import Route, Routing, check_served
from kd_lightning.teachers.teacher import Teacher, own_temperature
from kd_lightning.teachers.weights import hashed
from kd_lightning.temperature.base import TemperaturePolicy
from kd_lightning.temperature.scheduled import as_policy
from kd_lightning.temperature.signals import Signals

Combine: TypeAlias = Literal["probs", "logits", "losses"]


class TeacherEnsemble(Teacher):
    r"""Several frozen teachers in the place of one; each runs once per batch.

    With the members' logits :math:`t_k`, temperatures :math:`T_k` and weights :math:`w_k`, :math:`\sum_k w_k = 1`, the
    student (with the policy's :math:`T_s`) learns from

    - ``combine="probs"``: the mixture :math:`\bar p = \sum_k w_k \, \mathrm{softmax}(t_k / T_k)`, in log-space;
    - ``combine="logits"``: :math:`\mathrm{softmax}\bigl(\sum_k w_k \, t_k / T_k\bigr)`, the geometric mean of the same
      distributions, in which the larger logits decide;
    - ``combine="losses"``: each, :math:`\sum_k w_k \, \mathrm{kd\_loss}(s, t_k)`. Under KL that has the gradient of the
      mixture if all :math:`T_k` are equal; otherwise each term has its own factor :math:`T_s T_k`.

    In the first two the loss sees one teacher of temperature :math:`T_t = \sum_k w_k T_k`, which the factor of the loss
    goes by; one that looks at other temperatures (:class:`~kd_lightning.losses.NKDLoss`) sees the mixture sharpened or
    softened as a whole. Losses without a softmax need ``"logits"`` or ``"losses"``.

    Policies and metrics see the consensus at temperature 1: :math:`\log \sum_k w_k \mathrm{softmax}(t_k)`, shifted by
    the mean of the members' log-sum-exp, so that teachers who agree give their own logits (``"logits"``: the mean of
    the logits). An ensemble of one is its teacher, bit for bit.

    Args:
        teachers: Trained networks or :class:`FrozenTeacher`, one or more, with the same classes.
        temperatures: :math:`T_k`: a number, schedule or policy for each; a policy is called with its member's logits,
            and the callbacks' ``multiplier`` and the bounds of the distiller's policy hold for the result. None: the
            teacher temperature of the distiller's policy for all.
        weights: A number or schedule for each, of which only the ratios count; not negative, not all 0. Or per sample:
            ``"confidence"`` by the cross-entropy with the label (:func:`~kd_lightning.functional.confidence_weights`,
            CA-MKD), ``"entropy"`` without labels (:func:`~kd_lightning.functional.entropy_weights`). None: equal.
        combine: ``"probs"``, ``"logits"`` or ``"losses"``.
        routing: Which teachers know a row, for data that only some do; the weights are shared among those. Either the
            classes that each teacher knows, by which a row's label chooses; or the key of ``inputs``, a mapping, under
            which it stands (it is not passed to the networks); or a function of ``(inputs, targets)``. The latter two
            give a tensor: the teacher's number, ``(N,)``, or a mask ``(N, K)``; ``(B, L)`` and ``(B, L, K)`` for
            tokens. All teachers see the whole batch; what one says of rows that it does not know is left out.

    Raises:
        TypeError: If a teacher, temperature, weight or routing is of another kind, or an ensemble is within another.
        ValueError: If there are no teachers, not one temperature or weight for each, or weights that are negative or
            all 0; on the call, if the teachers' classes differ, no teacher knows a row, or confidence lacks labels.

    Source: ensembles: G. Hinton et al., 2015, arXiv 1503.02531; S. You et al., "Learning from Multiple Teacher
    Networks", KDD 2017 (mean of the softened probabilities).

    Example:
        >>> from kd_lightning import Distiller
        >>> networks = [nn.Linear(4, 3) for _ in range(2)]
        >>> for network in networks:
        ...     _ = network.weight.data.mul_(3.0)  # stands for training
        >>> teacher = TeacherEnsemble(networks, temperatures=[2.0, 6.0], weights=[0.75, 0.25])
        >>> out = Distiller(teacher, temperature=4.0, task_weight=0.0)(torch.ones(2, 4), torch.zeros(2, 3))
        >>> out.temperature.student, out.temperature.teacher  # 0.75 · 2 + 0.25 · 6
        (tensor([4.]), tensor([3.]))
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module | Teacher | str],
        temperatures: Sequence[float | Schedule | TemperaturePolicy | Callable[[Progress], float]] | None = None,
        weights: Sequence[float | Schedule | Callable[[Progress], float]] | Confidence | None = None,
        combine: Combine = "probs",
        routing: Sequence[Sequence[int]] | str | Route | None = None,
    ) -> None:
        if not isinstance(teachers, (list, tuple, nn.ModuleList)) or not len(teachers):
            raise ValueError(f"a TeacherEnsemble needs a list of teachers, one or more, got {teachers!r}.")
        if any(isinstance(teacher, TeacherEnsemble) for teacher in teachers):
            raise TypeError("a TeacherEnsemble within another is not supported: list all teachers in one.")
        check_option("combine", combine, get_args(Combine))
        self.teachers = [as_teacher(t) or FrozenTeacher(cast(Any, t)) for t in teachers]
        for member in self.teachers:
            if member.temperatures:
                raise ValueError(
                    "the teachers of an ensemble have their temperatures from it, TeacherEnsemble(..., "
                    f"temperatures=[...]), but {member!r} has its own."
                )
        waiting = [member.checkpoint for member in self.teachers if member.checkpoint is not None]
        self.checkpoint = ", ".join(waiting) or None
        self.temperatures = [as_policy(temperature) for temperature in temperatures or ()]
        check_one_for_each("temperatures", self.temperatures, len(self.teachers))
        self.weights = MemberWeights(weights, len(self.teachers))
        self.combine: Combine = combine
        self.routing = routing
        self._routing = None if routing is None else Routing(routing, len(self.teachers))
        self._check_known_classes()

    # ---- one teacher ----------------------------------------------------------------------------------------------

    @property
    @override
    def loaded(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(teacher.loaded for teacher in self.teachers)

    @override
    def fingerprint(self) -> str:
        """Return a hash of all members' fingerprints, in their order."""
        return hashed(" ".join(teacher.fingerprint() for teacher in self.teachers))

    @override
    def logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> tuple[Tensor, ...]:
        networks = self.student_inputs(inputs)
        members: Any = (
            teacher.logits(inputs, None, extract) if teacher.reads_batch else teacher.logits(networks, index, extract)
            for teacher in self.teachers
        )
        return tuple(members)

    @override
    def __call__(self, inputs: Any) -> tuple[Any, ...]:
        """Return each member's own output for these inputs."""
        networks = self.student_inputs(inputs)
        return tuple(teacher(inputs if teacher.reads_batch else networks) for teacher in self.teachers)

    @override
    def index(
        self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None, part: str = "train"
    ) -> IndexedDataset:
        """As :meth:`FrozenTeacher.index`, for the caches of all members that have one."""
        caches = self.caches
        if not caches:
            raise ValueError("no teacher of the ensemble has a cache: FrozenTeacher(..., cache=TeacherCache(path)).")
        draws = {(cache.augmentation, cache.slots, cache.seed) for cache in caches}
        if len(draws) > 1:
            raise ValueError(
                "the caches of an ensemble must draw the same augmentation, got (augmentation, slots, seed) of "
                f"{', '.join(map(str, sorted(draws, key=str)))}: give them the same."
            )
        first, *_ = [teacher.index(dataset, collate_fn, part) for teacher in self.teachers if teacher.caches]
        return first

    @override
    def network(self) -> nn.Module:
        several = "layers are those of one network, and a TeacherEnsemble is several"
        raise ValueError(f"{several}: leave them out, or take one FrozenTeacher.")

    @override
    def check_loss(self, kd_loss: nn.Module) -> None:
        """Raise if the loss has no softmax for ``"probs"``, or no loss by row for weights by row."""
        if self.combine == "probs" and not getattr(kd_loss, "compares_distributions", True):
            raise ValueError(
                f"{type(kd_loss).__name__} sees logits without a softmax, and combine='probs' mixes what softmax "
                "gives. Take TeacherEnsemble(..., combine='logits') or combine='losses'."
            )
        by_row = self.weights.rule is not None or self.routing is not None
        if self.combine == "losses" and by_row and "reduction" not in signature(kd_loss.forward).parameters:
            raise TypeError(
                "combine='losses' with weights by row needs the loss of each row: derive "
                f"{type(kd_loss).__name__} from kd_lightning.losses.LogitLoss, or take combine='probs'."
            )

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}([{', '.join(map(repr, self.teachers))}], {self.settings})"

    @property
    @override
    def settings(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The settings by which the members are combined, in words."""
        routing = getattr(self.routing, "__qualname__", None) or repr(self.routing)
        temperatures = self.temperatures or None
        return f"combine={self.combine!r}, temperatures={temperatures}, weights={self.weights}, routing={routing}"

    @property
    @override
    def known(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The classes that a member knows, ``(C,)``; None: all."""
        masks = [teacher.known for teacher in self.teachers if teacher.known is not None]
        if len(masks) < len(self.teachers) or len({len(mask) for mask in masks}) > 1:
            return None
        return torch.stack(masks).any(0)

    def _check_known_classes(self) -> None:
        masks = [teacher.known for teacher in self.teachers if teacher.known is not None]
        if not masks:
            return
        alike = len(masks) == len(self.teachers) and all(torch.equal(mask, masks[0]) for mask in masks)
        if self.combine != "losses" and not alike:
            raise ValueError(
                f"combine={self.combine!r} mixes distributions over the same classes, but the teachers know different "
                "ones of the student's. Take TeacherEnsemble(..., combine='losses'), where each teaches its own."
            )
        if self.weights.rule == "confidence":
            raise ValueError(
                "weights='confidence' compares each teacher with the label, and these teachers do not know all of the "
                "student's classes. Take weights='entropy', numbers, or routing by class."
            )

    # ---- what they say together -----------------------------------------------------------------------------------

    @override
    def student_inputs(self, inputs: Any) -> Any:
        """Return the networks' inputs, without what ``routing`` and the members read of a batch."""
        inputs = super().student_inputs(inputs)
        keyed = isinstance(self.routing, str) and isinstance(inputs, Mapping)
        return {key: value for key, value in inputs.items() if key != self.routing} if keyed else inputs

    @override
    def members(self, logits: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        return tuple(logits)

    @override
    def in_classes(self, logits: Any, class_dim: int, student: Any = None) -> Sequence[Any]:
        members = self.members(logits)
        if len(members) != len(self.teachers):
            raise ValueError(f"an ensemble of {len(self.teachers)} teachers needs as many logits, got {len(members)}.")
        each = zip(self.teachers, members, strict=True)
        return [mapped for teacher, given in each for mapped in teacher.in_classes(given, class_dim, student)]

    @override
    def weigh(self, logits: Sequence[Tensor | MergedLogits], signals: Signals, inputs: Any = None) -> Opinions:
        """Return each member's logits and weight, and the consensus at temperature 1; see :meth:`Teacher.weigh`."""
        given = Opinions(logits, None, signals.student_logits)
        logits = [given.at(member) for member in range(len(logits))]
        self._check_logits(logits)
        known = None if self._routing is None else self._routing.known(logits[0].shape, signals, inputs)
        weights = self.weights.at(signals.progress)
        if known is not None:
            counted = [
                mask if weight > 0 else torch.zeros_like(mask) for mask, weight in zip(known, weights, strict=True)
            ]
            known = check_served(torch.stack(counted), signals)
            logits = [z.masked_fill(~mask, 0.0) for z, mask in zip(logits, known, strict=True)]
        if len(logits) == 1:
            return Opinions(given.logits, None, logits[0], known=self.known)
        shares = self.weights.shares(logits, weights, known, signals)
        if self.combine == "logits":
            consensus = mixed_logits(logits, [1.0] * len(logits), [*shares])
        else:
            sizes = [z.to(shares.dtype).logsumexp(-1, keepdim=True) for z in logits]
            consensus = mixed_log_softmax(logits, [1.0] * len(logits), [*shares]) + _weighted_sum(shares, sizes)
        instead = [] if known is None else [_finite_where(teacher.known, consensus) for teacher in self.teachers]
        return Opinions(given.logits, shares, consensus, known=self.known, rows=known, instead=instead)

    @override
    def loss_terms(
        self,
        opinions: Opinions,
        signals: Signals,
        terms: Sequence[Temperature],
        policy: TemperaturePolicy,
        temperatures: Sequence[TemperaturePolicy],
    ) -> tuple[list[LossTerm], list[Temperature]]:
        weights = opinions.consensus.new_ones(1, 1) if opinions.weights is None else opinions.weights
        own: list[Tensor] = []
        for k, temperature in enumerate(temperatures):
            alone = Opinions((), None, opinions.at(k), known=self.teachers[k].known)
            own.append(own_temperature(temperature, policy, alone.seen(signals)))
        if own:
            terms = [term._replace(teacher=_weighted_sum(weights, own)) for term in terms]
        losses: list[LossTerm] = []
        for term in terms:
            each = own or [term.teacher] * len(self.teachers)
            logits = [policy.transform(opinions.at(member, t)) for member, t in enumerate(each)]
            if temperatures:
                logits = [member.transform(z) for member, z in zip(temperatures, logits, strict=True)]
            losses += self._terms_at(term, logits, each, weights)
        return losses, [*terms]

    def _terms_at(
        self, term: Temperature, logits: Sequence[Tensor], own: Sequence[Tensor], weights: Tensor
    ) -> list[LossTerm]:
        if len(logits) == 1:
            return [LossTerm(logits[0], term)]
        if self.combine == "losses":
            each = zip(logits, own, weights, (teacher.known for teacher in self.teachers), strict=True)
            return [LossTerm(z, term._replace(teacher=t), weight, known) for z, t, weight, known in each]
        mix = mixed_log_softmax if self.combine == "probs" else mixed_logits
        mixed = mix(logits, own, [*weights])
        masked = mixed == -torch.inf  # −inf · 0 in the temperature's gradient would be NaN
        return [LossTerm((mixed.masked_fill(masked, 0.0) * term.teacher).masked_fill(masked, -torch.inf), term)]

    def _check_logits(self, logits: Sequence[Tensor]) -> None:
        if kinds := [type(z).__name__ for z in logits if not isinstance(z, Tensor)]:
            raise TypeError(f"an ensemble mixes the logits of all classes, got {kinds[0]}: take one teacher alone.")
        if len({z.shape for z in logits}) > 1:
            each = [f"teacher {k} ({_name(self.teachers[k])}) {z.shape[-1]}" for k, z in enumerate(logits)]
            what = "number of classes" if (differ := len({z.shape[-1] for z in logits}) > 1) else "shape of logits"
            shapes = ", ".join(each if differ else (str(tuple(z.shape)) for z in logits))
            raise ValueError(f"the teachers of an ensemble must have the same {what}, got {shapes}.")


def _finite_where(known: Tensor | None, consensus: Tensor) -> Tensor:
    """Return the consensus for a teacher of these classes, which may have none in rows that others teach."""
    if known is None:
        return consensus
    return consensus.masked_fill(consensus == -torch.inf, 0.0).masked_fill(~known, -torch.inf)


def _name(teacher: Teacher) -> str:
    return type(getattr(teacher, "module", teacher)).__name__


def _weighted_sum(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*map(torch.mul, weights, values))).sum(0)
