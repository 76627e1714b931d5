"""The preflight: a healthy run has nothing wrong, each wrong line fires on its own mistake, and nothing is changed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kd_lightning
from kd_lightning import DistillationModule, FrozenTeacher
from kd_lightning.cli import main
from kd_lightning.preflight import Report, check
from kd_lightning.preflight.costs import Costs
from kd_lightning.preflight.facts import Batch, Facts, steps_of
from kd_lightning.preflight.verdicts import judge
from kd_lightning.teachers import FunctionTeacher, Placement
from kd_lightning.temperature import CosineSchedule, LossGapTemperature, Progress
from tests.helpers import NUM_CLASSES, NUM_FEATURES, assert_same, make_data, make_network, snapshot

ROOT = Path(__file__).parents[2]
CENTRES = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=torch.Generator().manual_seed(99)) * 1.5


def good_teacher() -> nn.Linear:
    """The Bayes classifier of ``make_data``."""
    teacher = nn.Linear(NUM_FEATURES, NUM_CLASSES)
    teacher.weight.data.copy_(CENTRES)
    teacher.bias.data.copy_(-CENTRES.square().sum(-1) / 2)
    return teacher


def module(**options: Any) -> DistillationModule:
    return DistillationModule(**({"student": make_network(), "teacher": good_teacher()} | options))


def loader(inputs: Tensor | None = None, targets: Tensor | None = None) -> DataLoader[Any]:
    x, y = make_data(64).tensors
    return DataLoader(TensorDataset(x if inputs is None else inputs, y if targets is None else targets), batch_size=16)


def wrong(report: Report) -> list[str]:
    return [line.name for line in report.lines if line.verdict == "wrong"]


def test_healthy_run_has_nothing_wrong_and_the_right_numbers() -> None:
    report = check(module(temperature=CosineSchedule(init_value=8.0, end_value=2.0)), loader(), max_epochs=10)
    assert wrong(report) == []
    assert report.ok
    x, y = make_data(64).tensors
    logits = good_teacher()(x)
    assert report["teacher's accuracy"].values["accuracy"] == pytest.approx(
        (logits.argmax(-1) == y).float().mean().item()
    )
    assert report.temperatures == pytest.approx((8.0, 5.0, 2.0))
    entropy = torch.special.entr((logits / 8).softmax(-1)).sum(-1).mean() / np.log(NUM_CLASSES)
    assert report["targets' entropy"].values["entropy at T = 8"] == pytest.approx(entropy.item(), rel=1e-5)
    assert report["weights"].values["effective_kd_weight at the start"] == pytest.approx(0.9 * 64)
    assert report["logit spread"].values["teacher"] == pytest.approx(logits.std(-1).mean().item(), rel=1e-5)
    text = str(report)
    assert all(line.name in text for line in report.lines)
    assert text.splitlines()[-1].startswith(f"{len(report.lines)} lines: ")
    assert len(report.plot().axes) == 2
    assert kd_lightning.check is check


def test_share_of_the_gradient_in_closed_form() -> None:
    """kd_weight · T (p_s − p_t) / N and task_weight (p − y) / N at the student's logits."""
    data, teacher, student = loader(), good_teacher(), make_network(norm=False)
    report = check(module(student=student, teacher=teacher, temperature=3.0, kd_weight=0.5, task_weight=0.4), data)
    x, y = next(iter(data))
    s, t = student(x), teacher(x)
    ours = (0.5 * 3 * ((s / 3).softmax(-1) - (t / 3).softmax(-1)) / 16).norm()
    theirs = (0.4 * (s.softmax(-1) - nn.functional.one_hot(y, NUM_CLASSES)) / 16).norm()
    assert report["weights"].values["share at the start"] == pytest.approx((ours / (ours + theirs)).item(), rel=1e-4)


def numpy_state() -> Any:
    state: Any = np.random.get_state()  # noqa: NPY002
    return state[1].copy()


class NoisyData(LightningDataModule):
    """Data that draw random numbers from everywhere, and keep count of what they did."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def train_dataloader(self) -> DataLoader[Any]:
        self.asked += 1
        x, y = make_data(64).tensors
        return DataLoader(TensorDataset(x + torch.randn_like(x) * 0.01, y), batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        _ = random.random(), np.random.rand()  # noqa: NPY002
        return loader()


def test_steps_keep_no_graph() -> None:
    """A graph has logits, which would count as memory of the step that is measured after."""
    facts, (x, y) = Facts(module()), make_data(64).tensors
    steps_of(facts, Batch((x, y), x, y), [Progress(0, 10, 0, 1), Progress(5, 10, 0, 1)])
    assert [{type(value) for value in vars(step).values()} for step in facts.steps] == [{float}] * 2


def test_nothing_is_changed() -> None:
    inner = make_network()
    student = nn.Sequential(inner, nn.Dropout(0.5))
    inner.eval()
    it = module(student=student, temperature=LossGapTemperature())
    weight = next(inner.parameters())
    gradient = weight.grad = torch.ones_like(weight)
    data = NoisyData()
    weights, teacher = snapshot(it), snapshot(it.teacher.module)
    modes = [part.training for part in it.modules()]
    attributes, states = {*vars(it)}, (torch.get_rng_state(), random.getstate(), numpy_state())
    buffers = {name: buffer.clone() for name, buffer in it.named_buffers()}
    report = check(it, data)
    assert report["teacher's accuracy"].text.endswith("of validation data (chance 0.17)")
    assert_same(snapshot(it), weights)
    assert_same(snapshot(it.teacher.module), teacher)
    assert_same(dict(it.named_buffers()), buffers)
    assert [part.training for part in it.modules()] == modes
    assert {*vars(it)} == attributes
    assert weight.grad is gradient
    assert all(p.grad is None for p in inner[3].parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(numpy_state(), states[2])
    assert data.asked == 0
    assert all(not part._forward_hooks for part in it.modules())


# ---- each wrong line, by the mistake that it is about -------------------------------------------------------------


def nan_teacher(inputs: Tensor) -> Tensor:
    return torch.full((len(inputs), NUM_CLASSES), torch.nan)


def constant(inputs: Tensor) -> Tensor:
    return torch.zeros(len(inputs), NUM_CLASSES)


def one_hot(inputs: Tensor) -> Tensor:
    return 1e6 * good_teacher()(inputs).detach()


def sure_of_noise(inputs: Tensor) -> Tensor:
    return 9 * good_teacher()(inputs + inputs.roll(1, 0)).detach()


def mirrored(inputs: Tensor) -> Tensor:
    return good_teacher()(inputs).roll(1, dims=-1).detach()


X, Y = make_data(64).tensors
SEQUENCES = torch.randn(8, NUM_FEATURES, 5)


class Positions(nn.Module):
    """Features (N, F, L) to logits (N, C, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(NUM_FEATURES, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.layer(x)


MISTAKES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, str]] = {
    "teacher's file is missing": (
        "teacher", {"teacher": lambda: FrozenTeacher(good_teacher(), checkpoint="none.safetensors")}, {},
        "none.safetensors", ""),
    "teacher takes other inputs": (
        "teacher", {"teacher": lambda: nn.Sequential(nn.Linear(3, NUM_CLASSES), nn.Tanh())}, {}, "shapes", ""),
    "student takes other inputs": ("student", {"student": lambda: nn.Linear(3, NUM_CLASSES)}, {}, "shapes", ""),
    "classes differ": (
        "classes", {"student": lambda: nn.Linear(NUM_FEATURES, 4)}, {"targets": Y.clamp(max=3)},
        "the student gives logits (16, 4), the teacher (16, 6)", "MappedClasses"),
    "classes are not last": (
        "layout", {"student": Positions, "teacher": Positions},
        {"inputs": SEQUENCES, "targets": torch.zeros(8, 5, dtype=torch.long)},
        "logits (8, 6, 5) with class_dim=-1, targets (8, 5)", "--model.kd_loss.class_dim 1"),
    "targets of another shape": (
        "layout", {}, {"targets": Y.unsqueeze(1).repeat(1, 3)}, "targets (16, 3)", "unpack_batch"),
    "a label too many": ("labels", {}, {"targets": torch.where(Y == 2, 255, Y)}, "label 255 of 6 classes",
                         "--model.kd_loss.ignore_index 255"),
    "labels from 1": ("labels", {}, {"targets": Y + 1}, "label 6 of 6 classes", "number the classes from 0 to 5"),
    "all ignored": ("labels", {}, {"targets": torch.full_like(Y, -100)}, "all 64 are ignored", "task_weight 0"),
    "probabilities beyond 1": (
        "labels", {"task_loss": nn.CrossEntropyLoss},
        {"targets": 2.0 * nn.functional.one_hot(Y, NUM_CLASSES)}, "with the value 2", "from 0 to 1"),
    "inputs are NaN": ("finite", {}, {"inputs": torch.where(X > 2, torch.nan, X)},
                       "NaN or infinite: inputs", "missing values"),
    "teacher gives NaN": ("finite", {"teacher": lambda: FunctionTeacher(nan_teacher)}, {}, "the teacher's logits",
                          "precision"),
    "teacher gives probabilities": (
        "teacher's output", {"teacher": lambda: nn.Sequential(good_teacher(), nn.Softmax(-1))}, {},
        "sum to 1", "output='probs'"),
    "student gives probabilities": (
        "student's output", {"student": lambda: nn.Sequential(make_network(), nn.Softmax(-1))}, {},
        "sum to 1", "softmax off"),
    "teacher numbers its classes otherwise": (
        "teacher's accuracy", {"teacher": lambda: FunctionTeacher(mirrored)}, {}, "chance 0.17", "numbered"),
    "teacher prefers no class": (
        "logit spread", {"teacher": lambda: FunctionTeacher(constant)},
        {}, "the teacher prefers no class", "trained"),
    "no temperature softens it": (
        "suggested T", {"teacher": lambda: FunctionTeacher(one_hot)},
        {}, "no temperature between 0.05 and 100", "logits"),
    "teacher without influence": ("weights", {"kd_weight": lambda: 0.0}, {}, "no influence", "--model.kd_weight 0.9"),
    "a loss that refuses": (
        "step", {"task_loss": lambda: nn.CrossEntropyLoss(weight=torch.ones(3))}, {}, "weight", ""),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the teacher .* still has the weights")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_line(mistake: str) -> None:
    name, options, data, text, advice = MISTAKES[mistake]
    report = check(module(**{key: make() for key, make in options.items()}), loader(**data))
    assert name in wrong(report), report
    assert not report.ok
    assert text in report[name].text, report
    assert advice in report[name].advice, report
    assert report.as_dict()["ok"] is False


class NoLabels(LightningDataModule):
    """Inputs without labels."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(X, batch_size=16)  # pyright: ignore[reportArgumentType]


def test_batches_without_labels() -> None:
    assert wrong(check(module(), NoLabels())) == ["step", "labels"]
    assert check(module(task_weight=0.0), NoLabels()).ok


class Classifier(nn.Module):
    """A teacher of 8×8 images with pixels in 0…1: the classes are the brightness of quarters."""

    def forward(self, images: Tensor) -> Tensor:
        quarters = nn.functional.avg_pool2d(images, 4).flatten(1)
        return 40 * torch.where((images.amin() < -0.01) | (images.amax() > 1.01), quarters.flip(1), quarters)


def test_a_teacher_whose_images_were_normalised_otherwise() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    images = 0.2 * torch.rand(64, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.5
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    it = module(student=student, teacher=Classifier())
    assert check(it, loader(images, labels)).ok
    report = check(it, loader((images - 0.3) / 0.2, labels))
    line = report["teacher's accuracy"]
    assert line.verdict == "wrong"
    assert "with pixels in 0…1, 1 and a calibration error of" in line.text
    assert "Renormalize" in line.advice
    assert line.values["accuracy with pixels in 0…1"] == 1.0


def test_verdicts_that_ask_to_look() -> None:
    hot = check(module(temperature=100.0, task_weight=1e-4), loader())
    assert (hot["targets' entropy"].verdict, hot["weights"].verdict) == ("look", "look")
    assert "nearly uniform" in hot["targets' entropy"].advice
    assert "labels hardly count" in hot["weights"].advice
    assert check(module(temperature=0.1, kd_weight=0.01, task_weight=1.0), loader())["weights"].verdict == "look"
    sure = check(module(teacher=FunctionTeacher(sure_of_noise)), loader())
    assert "kd-lightning calibrate" in sure["teacher's calibration"].advice


class Counting(Placement):
    """Counts the networks that are put in their place."""

    placed = 0

    def place(self, module: nn.Module) -> None:
        self.placed += 1


def test_other_ways_to_run_a_teacher_are_timed_where_it_is() -> None:
    """A teacher that the device has no room for must not be copied to it."""
    place = Counting()
    it = module(teacher=FrozenTeacher(good_teacher(), placement=place))
    assert place.placed == 1
    report = check(it, loader())
    assert place.placed == 2  # in bfloat16; compiled only on demand
    assert "bf16" in str(report["teacher's cost"])


def test_costs_name_the_cheapest_way() -> None:
    facts = Facts(module())
    costs = Costs(0.010, {"live": 0.010, "bf16": 0.006, "cached": 0.001}, peak_bytes=95, device_bytes=100)
    lines = {line.name: line for line in judge_costs(facts, costs)}
    assert "take cached: --model.teacher.cache" in lines["teacher's cost"].advice
    assert lines["memory"].verdict == "look"
    costs.cacheable = "samples are random."
    assert "take bf16" in {line.name: line for line in judge_costs(facts, costs)}["teacher's cost"].advice
    costs.times["live"] = 0.001
    assert {line.name: line for line in judge_costs(facts, costs)}["teacher's cost"].verdict == "ok"


def judge_costs(facts: Facts, costs: Costs) -> list[Any]:
    facts.train = [Batch(X, X, Y, "classes", torch.zeros(64, 6), torch.zeros(64, 6))]
    return [*judge(facts, costs)]


@pytest.mark.parametrize("options", [{"teacher": "batch:teacher"}, {"temperature": LossGapTemperature()}])
def test_other_kinds_of_teachers_and_policies(options: dict[str, Any]) -> None:
    it = module(**options)
    batches = [{"input": X[:16], "labels": Y[:16], "teacher": good_teacher()(X[:16]).detach()}]
    if "teacher" not in options:
        batches[0].pop("teacher")
    assert wrong(check(it, batches)) == []


def test_labels_of_several_kinds_at_once() -> None:
    teacher = good_teacher()
    it = module(teacher=teacher, task_loss=nn.BCEWithLogitsLoss())
    targets = (teacher(X) > 0).float().detach()
    report = check(it, loader(targets=targets))
    assert report["labels"].text == "yes or no of each label"
    assert report["teacher's accuracy"].values["accuracy"] == 1.0


def test_compiling_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiled.append(network) or network)
    assert "compiled not measured" in check(module(), loader())["teacher's cost"].text
    assert compiled == []
    report = check(module(), loader(), compiled=True)
    assert len(compiled) == 1
    assert "compiled" in report["teacher's cost"].values


@pytest.mark.slow
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    digits = ["check", "--config", "configs/digits.yaml", "--batches", "2"]
    main([*digits, "--json", "check.json", "--plot", "check.png"])
    content = json.loads(Path("check.json").read_text())
    assert content["ok"] is True
    assert [line["verdict"] for line in content["lines"]].count("wrong") == 0
    assert content["temperatures"] == pytest.approx([8.0, 5.0, 2.0])
    assert Path("check.png").stat().st_size > 1000
    assert "teacher's accuracy" in capsys.readouterr().out
    assert not Path("logs").exists()
    with pytest.raises(SystemExit) as stop:
        main([*digits, "--model.kd_weight", "0"])
    assert stop.value.code == 1
    assert "no influence" in capsys.readouterr().out
