"""A teacher whose classes are not the student's."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from kd_lightning.teachers.calls import extract_logits
from kd_lightning.teachers.frozen import as_teacher
from kd_lightning.teachers.indexed import IndexedDataset
from kd_lightning.teachers.opinions import MergedLogits, Opinions
from kd_lightning.teachers.teacher import Teacher
from kd_lightning.teachers.weights import hashed
from kd_lightning.temperature import Signals


class MappedClasses(Teacher):
    r"""A teacher of other classes than the student's, which are picked from its own or merged.

    The columns are picked before the softmax, so that the probabilities of the student's classes sum to 1. Where
    several of the teacher's classes :math:`G_c` are one of the student's, their probabilities at the teacher's
    temperature add (among the classes that are named at all):

    .. math:: z_c = T \log \sum_{k \in G_c} e^{z_k / T}, \quad
        \mathrm{softmax}(z / T)_c = \frac{\sum_{k \in G_c} e^{z_k / T}}{\sum_{c'} \sum_{k \in G_{c'}} e^{z_k / T}}

    A class that the teacher does not know carries no distillation: both softmaxes are over the classes that it knows,
    and the student's logits of the others have no gradient from the distillation loss. The task loss sees all.

    Policies and metrics see the merged logits at T = 1. A cache keeps the logits of all of the teacher's classes.

    In a :class:`~kd_lightning.TeacherEnsemble` each member may have classes of its own, merged at its own temperature;
    where the members know different classes of the student's, ``combine="losses"`` lets each teach those that it knows.

    Args:
        teacher: A network, or any teacher but an ensemble, of logits in any layout: ``(N, C)``, tokens ``(B, L, V)``,
            or ``(N, C, H, W)`` with ``class_dim=1`` of the loss.
        classes: For each of the student's classes, in order, the number of the teacher's class, the numbers of
            several, or None where the teacher does not know it: ``[3, 17]``, ``[[3, 4], [17]]`` or ``[3, None, 17]``.
            Or the path of a JSON file of names, ``{"teacher": ["tabby", "beagle", "siamese"], "student": {"cat":
            ["tabby", "siamese"], "dog": "beagle", "fish": null}}``: the teacher's classes in order, and the student's
            in order with the teacher's that each is made of.

    Raises:
        TypeError: If ``classes`` are neither.
        ValueError: If fewer than two classes are known, or one of the teacher's is named twice; on the call, if the
            teacher has no such class, or gives targets of a few classes.
        FileNotFoundError: If there is no such file.

    Example:
        >>> from kd_lightning import Distiller
        >>> from kd_lightning.teachers import FunctionTeacher
        >>> def served(inputs):
        ...     return torch.tensor([[0.1, 0.2, 0.3, 0.4]])
        >>> teacher = MappedClasses(FunctionTeacher(served, output="probs"), [[0, 3], [1]])
        >>> out = Distiller(teacher, temperature=1.0, task_weight=0.0)(torch.ones(1, 2), torch.zeros(1, 2))
        >>> out.teacher_logits.softmax(-1)  # 0.5 / 0.7 and 0.2 / 0.7
        tensor([[0.7143, 0.2857]])
    """

    def __init__(
        self, teacher: nn.Module | Teacher | str, classes: Sequence[int | Sequence[int] | None] | str | Path
    ) -> None:
        inner = as_teacher(teacher)
        if inner is None or inner.teachers:
            raise TypeError(
                "MappedClasses takes one teacher, got "
                f"{'None' if inner is None else type(inner).__name__}. In an ensemble, map the classes of each member."
            )
        self.teachers = [inner]
        self.groups = _groups(_read(Path(classes)) if isinstance(classes, (str, Path)) else classes)
        self.reads_batch = inner.reads_batch
        self.checkpoint = inner.checkpoint
        self.temperatures = inner.temperatures
        self.settings = inner.settings
        self._merges = max(map(len, self.groups)) > 1
        rows = [torch.tensor(group, dtype=torch.long) for group in self.groups]
        columns = pad_sequence(rows, batch_first=True, padding_value=-1)
        self._columns, self._padding = columns.clamp(min=0), columns < 0
        if not all(self.groups):
            self.known = ~self._padding.all(1)

    @property
    def teacher(self) -> Teacher:
        """The teacher whose classes are mapped."""
        return self.teachers[0]

    @property
    @override
    def loaded(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.teacher.loaded

    @override
    def logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> Any:
        """Return the logits of all of the teacher's classes."""
        return self.teacher.logits(inputs, index, extract)

    @override
    def in_classes(self, logits: Any, class_dim: int, student: Any = None) -> Sequence[Any]:
        (wide,) = super().in_classes(logits, class_dim)
        highest = max(number for group in self.groups for number in group)
        if not isinstance(wide, Tensor):
            raise ValueError(
                f"MappedClasses needs the teacher's logits of all its classes, but the teacher gives "
                f"{type(wide).__name__} targets, which hold a few classes of each row. Map the classes where the "
                "targets are made, or take a teacher of all logits."
            )
        if wide.shape[-1] <= highest:
            raise ValueError(
                f"MappedClasses needs the teacher's logits of all its classes and names its class {highest}, but the "
                f"teacher gives logits {tuple(logits.shape)}. Number its classes from 0."
            )
        if self._columns.device != wide.device:
            self._columns, self._padding = self._columns.to(wide.device), self._padding.to(wide.device)
            self.known = None if self.known is None else self.known.to(wide.device)
        if self._merges:
            return [MergedLogits(wide, self._columns, self._padding)]
        picked = wide.index_select(-1, self._columns.squeeze(1))
        return [picked if self.known is None else picked.masked_fill(~self.known, -torch.inf)]

    @override
    def weigh(self, logits: Sequence[Any], signals: Signals, inputs: Any = None) -> Opinions:
        only = Opinions(logits, None, signals.student_logits, known=self.known)
        return only._replace(consensus=only.at(0))

    @override
    def fingerprint(self) -> str:
        """Hash the teacher's fingerprint and the classes."""
        return hashed(f"{self.teacher.fingerprint()} {self.groups}")

    # ---- as the teacher itself ------------------------------------------------------------------------------------

    @override
    def __call__(self, inputs: Any) -> Any:
        """Return the teacher's own output for these inputs."""
        return self.teacher(inputs)

    @override
    def network(self) -> nn.Module:
        return self.teacher.network()

    @override
    def index(self, *args: Any, **kwargs: Any) -> IndexedDataset:
        return self.teacher.index(*args, **kwargs)

    @override
    def rows(self, batch: Any) -> Tensor | None:
        return self.teacher.rows(batch)

    @override
    def serves(self, batch: Any) -> bool:
        return self.teacher.serves(batch)

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.teacher!r}, {len(self.groups)} classes)"


def _groups(classes: Any) -> list[list[int]]:
    is_list = isinstance(classes, Sequence) and not isinstance(classes, str)
    groups: list[Any] = []
    for entry in classes if is_list else ():
        if entry is None:
            entry = []
        groups.append([entry] if isinstance(entry, int) else entry)
    of_numbers = [isinstance(group, Sequence) and all(isinstance(k, int) for k in group) for group in groups]
    if not groups or not all(of_numbers):
        raise TypeError(
            "classes must be the numbers of the teacher's classes, one or several for each of the student's, such as "
            "[3, 17] or [[3, 4], [17]], None for a class that the teacher does not know, or the path of a JSON file of "
            f"names, got {classes!r}."
        )
    named: list[int] = [number for group in groups for number in group]
    empty = any(entry is not None and not group for entry, group in zip(classes, groups, strict=True))
    if empty or min(named, default=0) < 0 or len({*named}) < len(named):
        raise ValueError(
            "each of the student's classes is made of at least one of the teacher's, numbered from 0 and named once, "
            f"got {classes!r}. For a class that the teacher does not know write None."
        )
    if not all(groups) and sum(map(bool, groups)) < 2:
        raise ValueError(
            f"distillation compares the classes that the teacher knows, at least two of the student's, got {classes!r}."
        )
    return [[*group] for group in groups]


def _read(path: Path) -> list[list[int] | None]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of classes at {str(path)!r} (from the folder {str(Path.cwd())!r}).")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("student"), dict) or "teacher" not in content:
        raise ValueError(
            f'{path} must hold {{"teacher": [names], "student": {{name: name or names of the teacher, or null}}}}, got '
            f"{str(content)[:80]}."
        )
    numbers = {name: number for number, name in enumerate(content["teacher"])}
    groups: list[list[int] | None] = []
    for student, names in content["student"].items():
        if names is None:
            groups.append(None)
            continue
        names = [names] if isinstance(names, str) else names
        unknown = [name for name in names if name not in numbers]
        if unknown:
            near = ", ".join(difflib.get_close_matches(unknown[0], [*numbers], n=3)) or "none"
            raise ValueError(
                f"{path} makes the class {student!r} of {unknown[0]!r}, which is none of the teacher's. Close to it: "
                f"{near}."
            )
        groups.append([numbers[name] for name in names])
    return groups
