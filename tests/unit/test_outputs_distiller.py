"""Networks with several outputs, each with its own loss, temperature and weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, FrozenTeacher, TeacherEnsemble
from kd_lightning.callbacks import DistillationCallback, GradientShare
from kd_lightning.callbacks.gradient_share import gradient_norms
from kd_lightning.functional import dkd_loss, kd_loss
from kd_lightning.losses import DKDLoss, HardLabelLoss, KDLoss
from kd_lightning.outputs_distiller import OutputsDistiller, OutputsKDLoss, OutputTerm
from kd_lightning.teachers import BatchTeacher, FunctionTeacher
from tests.helpers import NUM_CLASSES, NUM_FEATURES, InOrder, LearnedTemperature, from_yaml, make_data, make_loader

OTHER = 3


class Heads(nn.Module):
    """Two heads, for the data's classes and for three coarser ones, in the form that is asked for."""

    def __init__(self, form: str = "mapping", hidden: int = 16) -> None:
        super().__init__()
        self.form = form
        self.body = nn.Sequential(nn.Linear(NUM_FEATURES, hidden), nn.ReLU())
        self.cls, self.aux = nn.Linear(hidden, NUM_CLASSES), nn.Linear(hidden, OTHER)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x)
        parts = {"cls": self.cls(features), "aux": self.aux(features)}
        return parts if self.form == "mapping" else tuple(parts.values())


@pytest.fixture
def network() -> Heads:
    torch.manual_seed(3)
    teacher = Heads(hidden=32)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.02)
    inputs, targets = make_data(256, seed=5).tensors
    for _ in range(40):
        out = teacher(inputs)
        optimizer.zero_grad()
        (F.cross_entropy(out["cls"], targets) + F.cross_entropy(out["aux"], targets % OTHER)).backward()
        optimizer.step()
    return teacher


class WithCoarse(TensorDataset):
    """A mapping with the coarser label under a key of its own."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return {"x": x, "labels": y, "coarse": y % OTHER}


def data(count: int = 64, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(WithCoarse(*make_data(count, seed).tensors), batch_size=16)


def loss(**aux: Any) -> OutputsKDLoss:
    options = {"temperature": 2.0, "weight": 0.5, "task_weight": 0.25, "targets": "coarse"} | aux
    return OutputsKDLoss({"cls": KDLoss(), "aux": OutputTerm(DKDLoss(), **options)})


def module(network: nn.Module, **options: Any) -> DistillationModule:
    torch.manual_seed(2)
    given: dict[str, Any] = {"kd_loss": loss(), "temperature": 4.0, "kd_weight": 0.7, "task_weight": 0.3}
    given |= {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
    return DistillationModule(Heads(), network, **(given | options))


def kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_the_sum_of_its_outputs_by_the_formula(form: str) -> None:
    s = {"cls": torch.randn(6, 5, dtype=torch.float64), "aux": torch.randn(6, 3, dtype=torch.float64)}
    t = {"cls": torch.randn(6, 5, dtype=torch.float64), "aux": torch.randn(6, 3, dtype=torch.float64)}
    s = {name: z.requires_grad_() for name, z in s.items()}
    fine, coarse = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([0, 1, 2, 0, 1, 2])
    terms = {"cls": KDLoss(), "aux": OutputTerm(KDLoss(), 2.0, weight=0.5, task_weight=0.25, targets="coarse")}
    if form == "tuple":
        terms = dict(zip("01", terms.values(), strict=True))
    given: Any = (s, t) if form == "mapping" else (tuple(s.values()), tuple(t.values()))
    teacher = FrozenTeacher(Says(given[1]))
    distiller = OutputsDistiller(teacher, 4.0, OutputsKDLoss(terms), kd_weight=0.7, task_weight=0.3)
    out = distiller(fine, given[0], fine, extra={"coarse": coarse})
    gradients = torch.autograd.grad(out.loss, [*s.values()])
    kd = kl(s["cls"], t["cls"], 4.0) + 0.5 * kl(s["aux"], t["aux"], 2.0)
    task = F.nll_loss(s["cls"].log_softmax(1), fine) + 0.25 * F.nll_loss(s["aux"].log_softmax(1), coarse)
    torch.testing.assert_close(out.kd_loss, kd)
    torch.testing.assert_close(out.task_loss, task)
    torch.testing.assert_close(out.loss, 0.7 * kd + 0.3 * task)
    torch.testing.assert_close(gradients, torch.autograd.grad(0.7 * kd + 0.3 * task, [*s.values()]))
    assert out.student_logits is s["cls"]


class Says(nn.Module):
    """A network that returns a constant output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


def test_a_teacher_of_one_tensor_teaches_every_output() -> None:
    s, t = {"a": torch.randn(4, 5), "b": torch.randn(4, 5)}, torch.randn(4, 5)
    distiller = OutputsDistiller("batch:t", 3.0, OutputsKDLoss({"a": KDLoss(), "b": KDLoss()}), task_weight=0.0)
    out = distiller({"t": t}, s)
    torch.testing.assert_close(out.kd_loss, kd_loss(s["a"], t, 3.0) + kd_loss(s["b"], t, 3.0))


def test_outputs_of_other_names_and_members_of_an_ensemble() -> None:
    s = {"a": torch.randn(4, 5), "b": torch.randn(4, 3)}
    one, two = ({"head": torch.randn(4, 5), "b": torch.randn(4, 3)} for _ in range(2))
    several = OutputsKDLoss({"a": OutputTerm(teacher="head"), "b": KDLoss()})
    distiller = OutputsDistiller(TeacherEnsemble([Says(one), Says(two)]), 2.0, several, task_weight=0.0)
    expected = sum(
        kd_loss(s[mine], (((one[theirs] / 2).softmax(1) + (two[theirs] / 2).softmax(1)) / 2).log() * 2, 2.0)
        for mine, theirs in (("a", "head"), ("b", "b"))
    )
    torch.testing.assert_close(distiller(torch.ones(4), s).kd_loss, expected)


def test_in_a_module_with_metrics_and_resume(
    network: Heads, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    whole = module(network)
    trainer = make_trainer(max_epochs=2, log_every_n_steps=1)
    trainer.fit(whole, data(), data(32, seed=1))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert all(map(math.isfinite, metrics.values())), metrics
    assert {"kd_loss_cls", "kd_loss_aux", "temperature_aux", "val_acc", "val_teacher_acc", "train_acc"} <= set(metrics)
    assert metrics["temperature_aux"] == 2.0
    assert metrics["val_teacher_acc"] > 0.5  # of the first output
    predicted = torch.cat(trainer.predict(whole, data(32)))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        expected = whole.student.eval()(make_data(32).tensors[0])["cls"]
    torch.testing.assert_close(predicted, expected)

    half = module(network)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(half, data(), data(32, seed=1))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module(network)
    make_trainer(max_epochs=2).fit(
        resumed, data(), data(32, seed=1), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    other = module(network, kd_loss=loss(weight=0.9))
    with pytest.warns(UserWarning, match=r"trained with kd_loss=.*weight=0\.5.*now kd_loss=.*weight=0\.9"):
        make_trainer().fit(other, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)


def test_each_output_learns(network: Heads, make_trainer: Callable[..., Trainer]) -> None:
    before = module(network)
    after = copy.deepcopy(before)
    make_trainer(max_epochs=30).fit(after, data())
    x, y = make_data(64).tensors
    with torch.no_grad():
        start, end, taught = before.student(x), after.student(x), network(x)
    assert kd_loss(end["cls"], taught["cls"], 4.0) < 0.5 * kd_loss(start["cls"], taught["cls"], 4.0)
    targets = y % OTHER
    assert dkd_loss(end["aux"], taught["aux"], 2.0, targets=targets) < 0.7 * dkd_loss(
        start["aux"], taught["aux"], 2.0, targets=targets
    )


def test_a_learned_temperature_of_an_output_is_trained_and_saved(
    network: Heads, make_trainer: Callable[..., Trainer]
) -> None:
    mine = module(network, kd_loss=loss(temperature=LearnedTemperature()), temperature=LearnedTemperature())
    names = [name for name in mine.state_dict() if name.endswith("raw")]
    assert names == ["distiller.temperature.raw", "distiller.outputs.aux.temperature.raw"]
    make_trainer().fit(mine, data())
    assert all(mine.state_dict()[name] != 0 for name in names)
    groups = mine.optimizers().optimizer.param_groups  # pyright: ignore
    parameters = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters))


def test_the_distiller_s_temperature_moves_all_outputs_without_one_of_their_own(network: Heads) -> None:
    mine = module(network, kd_loss=OutputsKDLoss({"cls": KDLoss(), "aux": KDLoss()}))
    x = make_data(8).tensors[0]
    mine.distiller.temperature.multiplier.fill_(0.5)
    out = mine.distiller(x, mine.student(x), torch.arange(8) % OTHER)
    assert out.outputs["aux"].temperature.student == 2.0
    mine.temperature = 8.0
    out = mine.distiller(x, mine.student(x), torch.arange(8) % OTHER)
    assert out.temperature.student == out.outputs["aux"].temperature.student == 8.0
    mine.distiller.kd_enabled = False
    assert torch.equal(mine.distiller(x, mine.student(x), torch.arange(8) % OTHER).loss, 0.3 * out.task_loss)


def test_callbacks_see_the_sum(network: Heads, make_trainer: Callable[..., Trainer]) -> None:
    """Callbacks read the Distiller's last output; a share of the gradient is that of all outputs."""
    mine = module(network)
    share = GradientShare(target=0.5, decay=0.0)
    make_trainer(max_epochs=1, limit_train_batches=1, log_every_n_steps=1, callbacks=[share]).fit(mine, data())
    x, y = make_data(16).tensors
    fresh = module(network).train()
    out = fresh.distiller(x, fresh.student(x), y, extra={"coarse": y % OTHER})
    kd, task = gradient_norms(out, [*fresh.student.parameters()]).tolist()
    assert share.kd_weight == pytest.approx(0.7 * task / kd, rel=1e-4)
    fresh.distiller.keeps_output = True
    out = fresh.distiller(x, fresh.student(x), y, extra={"coarse": y % OTHER})
    assert fresh.distiller.last_output is out


class Plain(LightningModule):
    """A project's own module: its task loss is its own, of both heads."""

    def __init__(self, form: str = "mapping") -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = Heads(form)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        cls, aux = out.values() if isinstance(out, dict) else out
        return F.cross_entropy(cls, batch[1]) + F.cross_entropy(aux, batch[1] % OTHER)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_in_a_callback(form: str, network: Heads, make_trainer: Callable[..., Trainer]) -> None:
    terms: dict[str, Any] = {"cls": KDLoss(), "aux": OutputTerm(KDLoss(), 2.0, weight=0.5)}
    network.form = form
    if form == "tuple":
        terms = dict(zip("01", terms.values(), strict=True))
    plain = Plain(form)
    x = make_data(64).tensors[0]
    with torch.no_grad():
        student, taught = (net(x[:16]) for net in (plain.net, network))
    s, t = (list(z.values()) if isinstance(z, dict) else list(z) for z in (student, taught))
    callback = DistillationCallback(network, "net", 4.0, OutputsKDLoss(terms), validate=True)
    trainer = make_trainer(callbacks=[callback], max_epochs=1, log_every_n_steps=1, limit_train_batches=1)
    trainer.fit(plain, make_loader(), make_loader(32, seed=1))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = kd_loss(s[0], t[0], 4.0) + 0.5 * kd_loss(s[1], t[1], 2.0)
    assert logged["train_kd_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert logged["kd_loss_" + list(terms)[1]] == pytest.approx(kd_loss(s[1], t[1], 2.0).item(), rel=1e-5)
    assert 0 < logged["val_kd_loss"] < 100


# ---- DeiT's distillation token --------------------------------------------------------------------------------------


def deit(distilled: nn.Module) -> OutputsKDLoss:
    """The recipe of the guide: the distillation token learns from the teacher, the class token from the labels."""
    return OutputsKDLoss(
        {"1": OutputTerm(distilled, task_weight=0.0), "0": OutputTerm(weight=0.0, task_weight=1.0)}, predict="mean"
    )


@pytest.mark.parametrize("hard", [True, False])
def test_deit_by_its_equations(hard: bool) -> None:
    """½ CE(cls, y) + ½ CE(dist, y_t), and (1 − λ) CE(cls, y) + λ τ² KL(ψ(dist/τ), ψ(t/τ))."""
    cls, dist = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    teacher, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    share, tau = (0.5, 1.0) if hard else (0.1, 3.0)
    distiller = OutputsDistiller(
        None, tau, deit(HardLabelLoss() if hard else KDLoss()), kd_weight=share, task_weight=1 - share
    )
    got = distiller(None, (cls, dist), y, teacher_logits=teacher).loss
    rows = torch.arange(6)
    of_labels = -cls.log_softmax(1)[rows, y].mean()
    of_teacher = -dist.log_softmax(1)[rows, teacher.argmax(1)].mean() if hard else kl(dist, teacher, tau)
    expected = (1 - share) * of_labels + share * of_teacher
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, (cls, dist), retain_graph=True) for x in (got, expected)))
    mean = distiller.kd_loss.prediction((cls, dist))
    torch.testing.assert_close(mean, (cls + dist) / 2)


def test_timm_s_distilled_deit(make_trainer: Callable[..., Trainer]) -> None:
    """In training it returns both tokens' logits, in eval mode their mean."""
    timm: Any = pytest.importorskip("timm")
    torch.manual_seed(0)
    images, targets = torch.rand(16, 3, 32, 32), torch.arange(16) % 2
    student = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=2
    )
    student.set_distilled_training(True)
    teacher = timm.create_model("test_resnet", num_classes=2)
    teacher.train()(images)
    teacher.get_classifier().weight.data.mul_(20)
    mine = DistillationModule(student, teacher, 1.0, deit(HardLabelLoss()), kd_weight=0.5, task_weight=0.5)
    trainer = make_trainer(max_epochs=1, log_every_n_steps=1)
    loader = DataLoader(TensorDataset(images, targets), batch_size=8)
    trainer.fit(mine, loader, loader)
    assert set(trainer.callback_metrics) >= {"kd_loss_1", "kd_loss_0", "val_acc", "val_loss"}
    (predicted,) = trainer.predict(mine, DataLoader(TensorDataset(images, targets), batch_size=16))  # pyright: ignore
    with torch.no_grad():
        both = student.train(False).forward_head(student.forward_features(images))
    torch.testing.assert_close(predicted, both)


def test_hugging_face_s_deit(make_trainer: Callable[..., Trainer]) -> None:
    """By the names of its output's attributes."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, num_labels=2
    )
    student = transformers.DeiTForImageClassificationWithTeacher(config)
    images, targets = torch.rand(16, 3, 32, 32), torch.arange(16) % 2
    teacher = transformers.DeiTForImageClassification(config)
    for parameter in teacher.parameters():
        parameter.data.mul_(2.0)  # stands for training
    several = OutputsKDLoss(
        {
            "distillation_logits": OutputTerm(task_weight=0.0),
            "cls_logits": OutputTerm(weight=0.0, task_weight=1.0),
        }
    )
    mine = DistillationModule(student, teacher, 3.0, several, kd_weight=0.5, task_weight=0.5)
    with torch.no_grad():
        first, taught = student.eval()(images[:8]), teacher.eval()(images[:8]).logits
    student.train()
    loader = DataLoader(TensorDataset(images, targets), batch_size=8)
    trainer = make_trainer(max_epochs=1, log_every_n_steps=1, limit_train_batches=1)
    trainer.fit(mine, loader)
    expected = 0.5 * kd_loss(first.distillation_logits, taught, 3.0) + 0.5 * F.cross_entropy(
        first.cls_logits, targets[:8]
    )
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(expected.item(), rel=1e-4)


# ---- outputs of a detector, by name ---------------------------------------------------------------------------------


def test_one_output_of_a_detector_by_its_name() -> None:
    s = {"boxes": torch.randn(2, 9, 4), "cls_logits": torch.randn(2, 9, 5)}
    t = {"boxes": torch.randn(2, 9, 4), "cls_logits": torch.randn(2, 9, 5)}
    several = OutputsKDLoss({"cls_logits": KDLoss(class_dim=2)})
    out = OutputsDistiller(Says(t), 2.0, several, task_weight=0.0)(torch.ones(2), s)
    torch.testing.assert_close(out.kd_loss, kd_loss(s["cls_logits"].flatten(0, 1), t["cls_logits"].flatten(0, 1), 2.0))


def test_a_function_with_several_outputs() -> None:
    s = {"a": torch.randn(4, 5), "b": torch.randn(4, 3)}
    t = {"a": torch.randn(4, 5), "b": torch.randn(4, 3)}
    teacher = FunctionTeacher(lambda x: {name: (z / 2).log_softmax(1) for name, z in t.items()}, "log_probs", 2.0, "v1")
    several = OutputsKDLoss({"a": KDLoss(), "b": KDLoss()})
    out = OutputsDistiller(teacher, 3.0, several, task_weight=0.0)(torch.ones(4), s)
    torch.testing.assert_close(out.kd_loss, kd_loss(s["a"], t["a"], 3.0) + kd_loss(s["b"], t["b"], 3.0))


# ---- YAML and ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [DistillationModule, DistillationCallback])
def test_from_yaml(owner: type) -> None:
    settings: dict[str, Any] = {
        "teacher": "batch:t",
        "kd_loss": {
            "class_path": "kd_lightning.OutputsKDLoss",
            "init_args": {
                "outputs": {
                    "cls": {"class_path": "KDLoss", "init_args": {"class_dim": 1}},
                    "aux": {
                        "class_path": "kd_lightning.OutputTerm",
                        "init_args": {
                            "kd_loss": {"class_path": "DKDLoss", "init_args": {"beta": 2.0}},
                            "temperature": {
                                "class_path": "LinearSchedule",
                                "init_args": {"init_value": 4, "end_value": 1},
                            },
                            "weight": 0.5,
                        },
                    },
                }
            },
        },
    }
    distiller = from_yaml(owner, settings).distiller
    assert type(distiller) is OutputsDistiller
    assert isinstance(distiller.teacher, BatchTeacher)
    aux = distiller.kd_loss.terms["aux"]
    assert (distiller.class_dim, aux.kd_loss.beta, repr(aux.weight)) == (1, 2.0, "ConstantSchedule(value=0.5)")


class CoarseInOrder(InOrder):
    def dataset(self, count: int, seed: int) -> Any:
        return WithCoarse(*make_data(count, seed).tensors)


def test_two_processes_train_as_one(network: Heads, make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    states = []
    for devices in (2, 1):
        mine = module(copy.deepcopy(network), kd_loss=loss(temperature=LearnedTemperature()))
        options: dict[str, Any] = {"strategy": "ddp_fork"} if devices == 2 else {}
        trainer = make_trainer(devices=devices, use_distributed_sampler=False, max_epochs=2, **options)
        trainer.fit(mine, datamodule=CoarseInOrder())
        trainer.save_checkpoint(tmp_path / f"{devices}.ckpt")
        states.append(torch.load(tmp_path / f"{devices}.ckpt", weights_only=True)["state_dict"])
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-6, msg=name)
