"""The logits of a teacher for a batch, their weights and consensus, and the loss terms that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.functional import Temperature
from kd_lightning.functional.rows import valid_positions
from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.functional.temperature import compute_dtype
from kd_lightning.temperature import Signals


class MergedLogits(NamedTuple):
    r"""Logits of other classes than the student's, several of which are one of the student's at a temperature.

    Attributes:
        wide: ``(…, V)``: of the teacher's own classes.
        columns: ``(C, G)``: for each of the student's classes, the columns that are merged.
        padding: ``(C, G)``: True where a column does not count.
    """

    wide: Tensor
    columns: Tensor
    padding: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits in the student's classes."""
        return torch.Size([*self.wide.shape[:-1], len(self.columns)])

    def at(self, temperature: Tensor | float) -> Tensor:
        r"""Return ``(…, C)``, :math:`T \log \sum_{k \in G_c} e^{z_k / T}`, and −inf for a class without columns."""
        wide = self.wide.to(compute_dtype(self.wide))
        temperature = temperature if isinstance(temperature, Tensor) else wide.new_tensor([temperature])
        scaled = (wide[..., self.columns] / temperature.unsqueeze(-1)).masked_fill(self.padding, -torch.inf)
        unknown = self.padding.all(-1)
        logits = scaled.masked_fill(unknown.unsqueeze(-1), 0.0).logsumexp(-1) * temperature  # −inf · 0 would be NaN
        return logits.masked_fill(unknown, -torch.inf)


class Opinions(NamedTuple):
    """The logits that a teacher gives for one batch, class dimension last.

    Attributes:
        logits: One ``(…, C)`` for each member.
        weights: ``(K, 1)``, or ``(K, …, 1)`` where they differ by row; they sum to 1 over the members. None: one
            member.
        consensus: The members' common logits at temperature 1, which policies and metrics see.
        has_logits: False where the member gave :class:`~kd_lightning.functional.Sparse` targets; the consensus then
            has the student's shape and no values.
        known: ``(C,)``: the classes that a member knows; None: all.
        rows: ``(K, …, 1)``: False in rows that a member does not know, where ``instead`` stands; None: all are known.
        instead: One ``(…, C)`` for each member.
    """

    logits: Sequence[Any]
    weights: Tensor | None
    consensus: Tensor
    has_logits: bool = True
    known: Tensor | None = None
    rows: Tensor | None = None
    instead: Sequence[Tensor] = ()

    def at(self, member: int, temperature: Tensor | float = 1.0) -> Any:
        """Return the logits of a member as its temperature has them: some teachers merge classes at it."""
        logits, rows = self.logits[member], None if self.rows is None else self.rows[member]
        if isinstance(logits, MergedLogits):
            if rows is not None:  # because NaN in rows that are replaced would reach the temperature's gradient
                logits = logits._replace(wide=logits.wide.masked_fill(~rows, 0.0))
            logits = logits.at(temperature)
        return logits if rows is None else torch.where(rows, logits, self.instead[member])

    def seen(self, signals: Signals) -> Signals:
        """Return the signals with the consensus, and −inf in both where no member knows the class."""
        student = signals.student_logits
        student = student if self.known is None else student.masked_fill(~self.known, -torch.inf)
        return signals.replace(student_logits=student, teacher_logits=self.consensus)

    @property
    def shown(self) -> Tensor:
        """The consensus, without its rows where there are no logits."""
        return self.consensus if self.has_logits else self.consensus[:0]


class LossTerm(NamedTuple):
    """A term of the loss: the teacher's logits, class dimension last, their temperature, and a weight (None: 1).

    ``known``, ``(C,)``, are the classes that the term compares; None: all.
    """

    logits: TeacherTarget
    temperature: Temperature
    weight: Tensor | None = None
    known: Tensor | None = None

    def loss(
        self, kd_loss: nn.Module, student: Tensor, targets: Tensor | None, class_dim: int, ignore_index: int | None
    ) -> Tensor:
        """Return this term, weighted; ``kd_loss`` sees the logits, here class dimension last, in its own layout."""
        if self.known is not None:
            student = student.masked_fill(~self.known, -torch.inf)
        student, teacher = student.movedim(-1, class_dim), self.logits.movedim(-1, class_dim)
        temperature = _to_layout(self.temperature, class_dim, student.dim())
        if self.weight is None or self.weight.numel() == 1:
            loss = kd_loss(student, teacher, temperature, targets=targets)
            return loss if self.weight is None else loss * self.weight.squeeze()
        rows = kd_loss(student, teacher, temperature, targets=targets, reduction="none") * self.weight.squeeze(-1)
        reduction = getattr(kd_loss, "reduction", "mean")
        if reduction == "none":
            return rows
        if reduction == "sum":
            return rows.sum()
        valid = valid_positions(targets, student, class_dim, ignore_index)
        return rows.sum() / (rows.numel() if valid is None else valid.sum().clamp(min=1))


def _to_layout(temperature: Temperature, class_dim: int, rank: int) -> Temperature:
    """Move a temperature from class-last, as policies give it, to the layout of the logits."""

    def move(value: Tensor) -> Tensor:
        return value.movedim(-1, class_dim) if value.dim() == rank else value

    scale = None if temperature.scale is None else move(temperature.scale)
    return Temperature(move(temperature.student), move(temperature.teacher), scale)
