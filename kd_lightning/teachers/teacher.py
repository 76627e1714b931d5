"""The protocol of what teaches: the opinions of a batch, their weights, and the loss terms that follow.

A network is in :mod:`~kd_lightning.teachers.frozen`, several are in :mod:`~kd_lightning.teachers.ensemble`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kd_lightning.functional import Temperature
from kd_lightning.functional.rows import without_padding
from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.teachers.cache import TeacherCache
from kd_lightning.teachers.calls import HiddenStates, extract_logits
from kd_lightning.teachers.indexed import IndexedDataset
from kd_lightning.teachers.opinions import LossTerm, Opinions
from kd_lightning.temperature import Signals, TemperaturePolicy


class Teacher(ABC):
    """Anything that teaches. A subclass implements :meth:`logits` and :meth:`fingerprint`; the rest has defaults.

    A teacher is no ``nn.Module``, so that the module that holds it does not register it: it is absent from state dicts,
    checkpoints, optimisers and DDP's broadcasts, and out of reach of weight averaging and pruning.

    Example:
        >>> import torch
        >>> class Uniform(Teacher):
        ...     '''Knows nothing: equal logits for ten classes.'''
        ...     def logits(self, inputs, index=None, extract=extract_logits):
        ...         return torch.zeros(len(inputs), 10)
        ...     def fingerprint(self):
        ...         return "uniform"
        >>> from kd_lightning import Distiller
        >>> Distiller(Uniform(), task_weight=0.0)(torch.ones(2, 4), torch.zeros(2, 10)).kd_loss
        tensor(0.)
    """

    checkpoint: str | None = None
    """The file whose weights are read at first use."""
    loaded: bool = True
    """False while the weights wait in the checkpoint."""
    cache: TeacherCache | None = None
    """The cache that keeps its logits, by sample."""
    teachers: Sequence[Teacher] = ()
    """The teachers that this one is made of, if any: what is not overridden here asks or tells each of them."""
    temperatures: Sequence[TemperaturePolicy] = ()
    """The teacher's own policies, which the Distiller registers, trains and checkpoints."""
    settings: str = ""
    """The teacher's settings beyond its weights in words; a checkpoint compares them."""
    gives_hidden_states: bool = False
    """True if the teacher has :meth:`hidden_states`."""
    known: Tensor | None = None
    """``(C,)``: the classes of the student that the teacher knows; None: all. The others carry no distillation."""
    reads_batch: bool = False
    """True if :meth:`logits` takes the whole batch, of which the teacher reads a part, instead of the inputs."""

    @abstractmethod
    def logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> TeacherTarget | tuple[Tensor, ...]:
        """Return the logits for these inputs, without gradient; a tuple where there are several members.

        :class:`~kd_lightning.functional.Sparse` targets may take their place: log-probabilities of a few classes.

        Args:
            inputs: See :func:`call_model`.
            index: The samples' rows in the teacher's cache, as batches of :meth:`index` carry them.
            extract: Finds the logits in a network's output.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of all that the logits depend on. Ranks compare it, and checkpoints store it."""

    def __call__(self, inputs: Any) -> Any:
        """Return what the teacher gives for these inputs."""
        return self.logits(inputs)

    # ---- opinions -------------------------------------------------------------------------------------------------

    def members(self, logits: Any) -> Sequence[Any]:
        """Return what each member gives of what :meth:`logits` returned: logits, or Sparse targets."""
        return logits if isinstance(logits, (tuple, list)) else (logits,)

    def opinions(self, logits: Any, signals: Signals, class_dim: int, inputs: Any) -> Opinions:
        """Return the opinions on a batch, in the student's classes.

        Args:
            logits: What :meth:`logits` returned.
            signals: Of the batch; its ``teacher_logits`` are not read.
            class_dim: The class dimension of ``logits``.
            inputs: Of the batch.

        Raises:
            ValueError: If student and teacher have different classes or positions.
        """
        student = signals.student_logits
        opinions = self.weigh(self.in_classes(logits, class_dim, student), signals, inputs)
        if student.shape != opinions.consensus.shape:  # here, because a policy's error would say less
            shapes = [tuple(x.movedim(-1, class_dim).shape) for x in (student, opinions.consensus)]
            raise ValueError(
                f"student and teacher logits must have the same shape, got {shapes[0]} and {shapes[1]}: give both "
                "models the same classes and inputs, or map the teacher's: teachers.MappedClasses(teacher, [...])."
            )
        return opinions

    def in_classes(self, logits: Any, class_dim: int, student: Any = None) -> Sequence[Any]:
        """Return what each member gives in the student's classes, class dimension last.

        Args:
            logits: What :meth:`logits` returned.
            class_dim: Its class dimension.
            student: The student's logits, class dimension last, for the padding of a vocabulary; None: it stays.
        """
        moved = [member.movedim(class_dim, -1) for member in self.members(logits)]
        return moved if student is None else [without_padding(student, member) for member in moved]

    def weigh(self, logits: Sequence[Any], signals: Signals, inputs: Any = None) -> Opinions:
        """Return the opinions and their consensus: by default those of a single member.

        Args:
            logits: One ``(…, C)`` for each member, class dimension last.
            signals: Of the batch, for its targets and progress; its ``teacher_logits`` are not read.
            inputs: Of the batch.
        """
        (only,) = logits
        if isinstance(only, Tensor):
            return Opinions(logits, None, only)
        student = signals.student_logits
        if not isinstance(student, Tensor):
            raise ValueError("Sparse targets name a few classes only, so that there are no logits to show.")
        no_values = student.new_zeros((), dtype=torch.float32).expand(student.shape)  # a shape without memory
        return Opinions(logits, None, no_values, has_logits=False)

    def loss_terms(
        self,
        opinions: Opinions,
        signals: Signals,
        terms: Sequence[Temperature],
        policy: TemperaturePolicy,
        temperatures: Sequence[TemperaturePolicy],
    ) -> tuple[list[LossTerm], list[Temperature]]:
        """Return the terms whose sum is the loss, and the temperature that stands for all members in each of ``terms``.

        Args:
            opinions: What :meth:`weigh` returned.
            signals: Of the batch, the consensus as the teacher's logits.
            terms: The temperatures of the Distiller's policy, one loss term each.
            policy: That policy.
            temperatures: The Distiller's copies of :attr:`temperatures`.
        """
        if temperatures:
            (own,) = temperatures
            teacher = own_temperature(own, policy, signals)
            terms = [term._replace(teacher=teacher) for term in terms]
        given = [opinions.at(0, term.teacher) for term in terms]
        for changes in (policy, *temperatures):
            given = [_transformed(logits, changes) for logits in given]
        return [LossTerm(logits, term) for logits, term in zip(given, terms, strict=True)], [*terms]

    def check_loss(self, kd_loss: nn.Module) -> None:
        """Raise if the distillation loss cannot take what this teacher gives."""
        for teacher in self.teachers:
            teacher.check_loss(kd_loss)

    # ---- weights and devices --------------------------------------------------------------------------------------

    def available(self) -> bool:
        """Return True if the weights are in place or can be read."""
        return all(teacher.available() for teacher in self.teachers)

    def load(self) -> Self:
        """Read the checkpoint, the first time only."""
        for teacher in self.teachers:
            teacher.load()
        return self

    @property
    def runs(self) -> bool:
        """Return False if only the samples of its cache are known, because the weights are absent."""
        return all(teacher.runs for teacher in self.teachers)

    def release(self) -> None:
        """Drop weights that can be read again, once caches have every row: called by the module that trains."""
        for teacher in self.teachers:
            teacher.release()

    def modules(self) -> Iterable[nn.Module]:
        """Return the teacher's networks, whose parameters the student may not share and which ranks have alike."""
        return (network for teacher in self.teachers for network in teacher.modules())

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the networks."""
        return (parameter for network in self.modules() for parameter in network.parameters())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the teacher, as ``nn.Module.to``; a precision of its own stays."""
        nn.Module.to(cast(Any, self), *args, **kwargs)  # makes a function of its arguments, and calls self._apply
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a move or cast of the Distiller."""
        for teacher in self.teachers:
            teacher._apply(fn)

    # ---- what only some teachers have -----------------------------------------------------------------------------

    @property
    def caches(self) -> tuple[TeacherCache, ...]:
        """The caches that hold its logits."""
        own = () if self.cache is None else (self.cache,)
        return own + tuple(cache for teacher in self.teachers for cache in teacher.caches)

    def network(self) -> nn.Module:
        """Return the network whose one forward gives the features of a batch, for layers, or raise if there is none."""
        raise ValueError(f"layers need the features of a network, and {type(self).__name__} has none: leave them out.")

    def hidden_states(self, inputs: Any, check: bool = False) -> HiddenStates:
        """Run the teacher up to its output layer, or raise if there is none; see :func:`hidden_states`."""
        raise TypeError(f"{type(self).__name__} has no hidden states. Take KDLoss.")

    def index(
        self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None, part: str = "train"
    ) -> IndexedDataset:
        """Wrap data so that their batches, ``(batch, index)``, name their rows in the cache.

        .. code-block:: python

            data = teacher.index(dataset)
            loader = DataLoader(data, batch_size=64, shuffle=True)
            validation = DataLoader(teacher.index(other, part="val"), batch_size=64)

        Args:
            dataset: A map-style dataset.
            collate_fn: Function that collates samples, by default torch's. With another function, pass
                ``collate_fn=data.collate`` to the loader.
            part: ``"train"``, or a name of other data, such as ``"val"``; see :class:`TeacherCache`.

        Raises:
            ValueError: If the teacher has no cache; if the cache's file is damaged or belongs to another teacher,
                dataset or transform; if the samples are random.
        """
        if self.cache is None:
            raise ValueError("this teacher has no cache: FrozenTeacher(..., cache=TeacherCache(path)).")
        return self.cache.index(dataset, self.fingerprint(), collate_fn, part)

    def rows(self, batch: Any) -> Tensor | None:
        """Return the ``index`` that :meth:`logits` takes for this batch, found on the host before the batch moves.

        None leaves it to the batches of :meth:`index`.
        """
        return None

    def serves(self, batch: Any) -> bool:
        """Return False for a batch that lacks what the teacher reads: it is evaluated without a teacher."""
        return True

    # ---- a teacher that changes -----------------------------------------------------------------------------------

    def follow(self, student: nn.Module) -> None:
        """Take this network as the student: called before training, and when training begins."""
        for teacher in self.teachers:
            teacher.follow(student)

    def update(self) -> None:
        """Follow an optimiser step of the student: called after each."""
        for teacher in self.teachers:
            teacher.update()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the teacher, tensors and primitives only: by default its members' state."""
        states = {str(number): teacher.state_dict() for number, teacher in enumerate(self.teachers)}
        return {number: state for number, state in states.items() if state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for number, state in state_dict.items():
            self.teachers[int(number)].load_state_dict(state)

    def student_inputs(self, inputs: Any) -> Any:
        """Return the part of the inputs that is meant for networks, the student's included."""
        for teacher in self.teachers:
            inputs = teacher.student_inputs(inputs)
        return inputs

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # frozen, and often large: copies of a distiller share it


class GivenLogits(Teacher):
    """The teacher of a Distiller without one: its logits come with every call."""

    def logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> Tensor:
        """Raise, since the logits must be given."""
        raise ValueError("this Distiller has no teacher: give one, or pass teacher_logits with each call.")

    def fingerprint(self) -> str:
        """Return the hash of nothing."""
        return ""

    def network(self) -> nn.Module:
        """Raise, since no network runs."""
        raise ValueError("this Distiller has no teacher: layers need one that runs.")


def _transformed(logits: TeacherTarget, policy: TemperaturePolicy) -> TeacherTarget:
    """Return the logits as the loss sees them under this policy, or raise if it needs logits and there are none."""
    if isinstance(logits, Tensor):
        return policy.transform(logits)
    if policy.needs_logits:
        raise ValueError(
            f"the teacher gives Sparse targets, the probabilities of a few classes, but the temperature {policy!r} is "
            "computed from the logits of all or changes them. Take a number, a schedule or LearnableTemperature."
        )
    return logits


def own_temperature(own: TemperaturePolicy, policy: TemperaturePolicy, signals: Signals) -> Tensor:
    """Return the temperature of a teacher's own policy, with the multiplier and bounds of the Distiller's."""
    temperature = own(signals)
    if not isinstance(temperature, Temperature):
        raise ValueError(
            f"a teacher has one temperature of its own, but {type(own).__name__} gives several. Give it to the "
            "Distiller: each of its temperatures is a term of the loss."
        )
    return policy._bound(temperature.teacher)
