"""Students whose copy, an EMATeacher, cannot follow them."""

from torch import nn

from kd_lightning.teachers import EMATeacher
from tests.unit.bad_input.case import Case


def replaced() -> None:
    student, teacher = nn.Linear(2, 3), EMATeacher()
    teacher.follow(student)
    student.weight = nn.Parameter(student.weight.detach()[:2])
    teacher.follow(student)


CASES = [
    Case(
        "ema: a weight of another shape than when the copy was made",
        replaced,
        ValueError,
        "a copy of Linear follows weights that are whole or sharded by fully_shard, but weight has been replaced or "
        "sharded in another way. Train the student under ddp or FSDP2 (ShardedDistillationModule), or take a teacher "
        "that keeps no copy of it.",
    ),
]
