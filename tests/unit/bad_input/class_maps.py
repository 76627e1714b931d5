"""Class maps that the teacher, the data or the other teachers contradict."""

import torch

from kd_lightning import Distiller, TeacherEnsemble
from kd_lightning.functional import Sparse
from kd_lightning.teachers import FunctionTeacher, MappedClasses
from tests.unit.bad_input.case import Case


def distil(teacher: MappedClasses, logits: object, classes: int, *more: int) -> object:
    return Distiller(teacher, task_weight=0.0)(None, torch.zeros(2, *more, classes), teacher_logits=logits)  # pyright: ignore


def give(x: torch.Tensor) -> torch.Tensor:
    return x


def of(*classes: int | list[int] | None) -> MappedClasses:
    return MappedClasses(FunctionTeacher(give), classes)


NEEDS = (
    "MappedClasses needs the teacher's logits of all its classes and names its class {}, but the teacher gives {}. "
    "Number its classes from 0."
)
DIFFERENT = (
    "combine={!r} mixes distributions over the same classes, but the teachers know different ones of the student's. "
    "Take TeacherEnsemble(..., combine='losses'), where each teaches its own."
)
CASES = [
    Case("more classes than the teacher has", lambda: distil(of([3, 4], 17), torch.ones(2, 10), 2), ValueError,
         NEEDS.format(17, "logits (2, 10)")),
    Case("more tokens than the teacher has", lambda: distil(of(3, None, 40), torch.ones(2, 10, 32), 3, 10), ValueError,
         NEEDS.format(40, "logits (2, 10, 32)")),
    Case("targets of a few classes",
         lambda: distil(of(0, 1), Sparse(torch.zeros(2, 1).long(), torch.full((2, 1), -0.5), tail="bucket"), 2),
         ValueError,
         "MappedClasses needs the teacher's logits of all its classes, but the teacher gives Sparse targets, which "
         "hold a few classes of each row. Map the classes where the targets are made, or take a teacher of all "
         "logits."),
    Case("other classes than the student's", lambda: distil(of(0, 1, 2), torch.ones(2, 4), 5), ValueError,
         "student and teacher logits must have the same shape, got (2, 5) and (2, 3): give both models the same "
         "classes and inputs, or map the teacher's: teachers.MappedClasses(teacher, [...])."),
    Case("a teacher that knows one class", lambda: of(3, None, None), ValueError,
         "distillation compares the classes that the teacher knows, at least two of the student's, got "
         "(3, None, None)."),
    Case("a teacher that knows none", lambda: of(None, None), ValueError,
         "distillation compares the classes that the teacher knows, at least two of the student's, got (None, None)."),
    Case("a mixture over different classes", lambda: TeacherEnsemble([of(0, 1, None), of(None, 0, 1)]), ValueError,
         DIFFERENT.format("probs")),
    Case("a mean of logits of different classes",
         lambda: TeacherEnsemble([of(0, 1, None), FunctionTeacher(give)], combine="logits"), ValueError,
         DIFFERENT.format("logits")),
    Case("confidence in a label that a teacher does not know",
         lambda: TeacherEnsemble([of(0, 1, None), of(None, 0, 1)], combine="losses", weights="confidence"), ValueError,
         "weights='confidence' compares each teacher with the label, and these teachers do not know all of the "
         "student's classes. Take weights='entropy', numbers, or routing by class."),
]  # fmt: skip
