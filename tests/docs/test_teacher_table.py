"""Each line of the table in docs/teachers.md, from what a user has to what to write, makes a teacher that teaches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

import kd_lightning
from kd_lightning import Distiller, losses, teachers
from kd_lightning.export import export_student
from kd_lightning.functional import Sparse
from tests.helpers import in_a_fork

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"
CLASSES = 20
OTHERWISE = {'placement="cuda:1"': 'placement="cpu"'}  # where there is no GPU


def lines() -> list[str]:
    rows = re.findall(r"^\| .* \| (`.*?)\|$", PAGE.read_text().split("\n## ")[0], flags=re.MULTILINE)
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row) if "(" in code or "=" in code]


class Net(nn.Module):
    """Images of any size to classes, of one output or two."""

    def __init__(self, classes: int = CLASSES, heads: bool = False) -> None:
        super().__init__()
        self.fc, self.heads = nn.Linear(1, classes), heads
        self.fc.weight.data.mul_(9.0)  # stands for training

    def forward(self, images: Tensor) -> Any:
        logits = self.fc(images.mean((2, 3)))
        return {"cls": logits, "aux": logits[:, :3]} if self.heads else logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    torch.save(Net().state_dict(), folder / "teacher.pt")
    weights = {f"student.{name}": value for name, value in Net().state_dict().items()}
    torch.save({"state_dict": weights}, folder / "best.ckpt")
    logits = torch.randn(4, CLASSES)
    pq.write_table(pa.table({"id": [*range(4)], "logits": logits.tolist()}), folder / "logits.parquet")
    in_a_fork(lambda: export_student(Net(), folder / "teacher.onnx", "onnx", torch.randn(2, 1, 8, 8)))
    return folder


def names() -> dict[str, Any]:
    given: dict[str, Any] = {name: getattr(teachers, name) for name in teachers.__all__}
    given |= {name: getattr(kd_lightning, name) for name in kd_lightning.__all__}
    given |= {"KDLoss": losses.KDLoss, "net": Net(), "one": Net(), "two": Net()}
    return given | {"fn": lambda images: (Net()(images) / 2).log_softmax(-1)}


def batch() -> dict[str, Any]:
    sparse = Sparse.top_k(torch.randn(4, CLASSES), 5)
    return {
        "input": torch.randn(4, 1, 8, 8), "id": torch.arange(4), "teacher_logits": torch.randn(4, CLASSES),
        "ids": sparse.indices, "logprobs": sparse.log_probs,
    }  # fmt: skip


def made(code: str) -> dict[str, Any]:
    for written, instead in OTHERWISE.items():
        code = code.replace(written, instead)
    whole = code if re.match(r"\w+=", code) else f"teacher={code}"
    return eval(f"dict({whole})", names())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("code", lines())
def test_the_line_teaches(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    options = made(code)
    if "ServedTeacher" in code:
        assert isinstance(options["teacher"], teachers.ServedTeacher)  # a server is in tests/unit/teachers
        return
    several = "kd_loss" in options
    options.setdefault("teacher", Net(heads=True))
    distiller = getattr(options.get("kd_loss"), "distiller", Distiller)(**options, temperature=1.0, task_weight=0.0)
    teacher, given = distiller.teacher, batch()
    assert teacher is not None
    teacher.follow(Net())
    inputs = given if teacher.reads_batch else given["input"]
    classes = getattr(teacher, "groups", None) or getattr(next(iter(teacher.teachers), None), "groups", [0] * CLASSES)
    student = torch.randn(4, len(classes), requires_grad=True)
    out = distiller(inputs, {"cls": student, "aux": student[:, :3]} if several else student, torch.zeros(4).long())
    (gradient,) = torch.autograd.grad(out.kd_loss, student)
    assert out.kd_loss > 0
    assert gradient.abs().sum() > 0


def test_the_table_has_every_teacher() -> None:
    text = " ".join(lines()) + PAGE.read_text().split("\n## ")[0]
    kinds = {name for name in teachers.__all__ if isinstance(getattr(teachers, name), type)}
    kinds = {name for name in kinds if issubclass(getattr(teachers, name), teachers.Teacher)} - {"Teacher"}
    assert [name for name in sorted(kinds) if name not in text] == []
