from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from kd_lightning import ClassificationModule, DistillationModule, Distiller, TeacherEnsemble
from kd_lightning.callbacks import (
    AdaptiveTemperature,
    DistillationCallback,
    EarlyStopDistillation,
    ReplicaConsistency,
    TemperatureFinder,
    TemperatureMonitor,
)
from kd_lightning.functional import bernoulli_kd_loss, kd_loss
from kd_lightning.losses import BernoulliKDLoss, DKDLoss, KDLoss
from kd_lightning.temperature import CosineSchedule, LearnableTemperature, LinearSchedule
from tests.helpers import (
    NUM_CLASSES,
    LearnedTemperature,
    assert_same,
    make_data,
    make_loader,
    make_network,
    make_teacher,
    snapshot,
)
from tests.unit.callbacks.helpers import Script

MakeTrainer = Callable[..., Trainer]


class Plain(LightningModule):
    """A module as people write them, which has never heard of a teacher."""

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = make_network(norm=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class CallsForward(Plain):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.forward(batch[0]), batch[1])  # as lightning-hydra-template does


class CallsNet(Plain):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Quiet(CallsNet):
    """A module without self.log, which warns within a compiled graph."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class ReturnsDict(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "extra": batch_idx}


class ForwardTwice(Plain):
    """A module that calls the student on two views, and once without gradient."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        first, second = self(x), self(x + 1)
        with torch.no_grad():
            self(x - 1)
        return F.cross_entropy(first, y) + F.cross_entropy(second, y)


class TwoLoaders(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["labelled"] if isinstance(batch, dict) else batch[0], batch_idx)


@pytest.fixture(autouse=True)
def _same_start(teacher: nn.Module) -> None:
    torch.manual_seed(3)
    teacher.eval()


def traces(module: nn.Module) -> dict[str, Any]:
    """All that could be left behind on a module."""
    found = {}
    for name, part in module.named_modules():
        held = {key: id(value) for key, value in vars(part).items() if callable(value) or key == "_modules"}
        hooks = {key: len(value) for key, value in vars(part).items() if key.endswith("_hooks")}
        found[name] = held, hooks
    return found


# ---- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "layer"), [(Plain, None), (CallsForward, None), (CallsNet, "net"), (Plain, "net"), (ReturnsDict, None)]
)
def test_fit_equals_a_bare_loop(
    kind: type[Plain], layer: str | None, teacher: nn.Module, make_trainer: MakeTrainer
) -> None:
    module = kind()
    student = copy.deepcopy(module.net)
    callback = DistillationCallback(teacher, layer, LinearSchedule(8.0, 2.0), kd_weight=0.7, task_weight=0.4)
    trainer = make_trainer(max_epochs=3, callbacks=[callback])
    trainer.fit(module, make_loader())

    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    step, soft, hard = 0, torch.zeros(()), torch.zeros(())
    for _ in range(3):
        for inputs, targets in make_loader():
            t = 8.0 - 6.0 * step / 12
            logits = student(inputs)
            soft = F.kl_div(F.log_softmax(logits / t, -1), F.softmax(teacher(inputs) / t, -1), reduction="batchmean")
            soft, hard = t * t * soft, F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            (0.7 * soft + 0.4 * hard).backward()
            optimizer.step()
            step += 1
    for one, two in zip(student.parameters(), module.net.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    logged = trainer.callback_metrics
    torch.testing.assert_close(logged["train_kd_loss"], soft.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logged["train_task_loss"], hard.detach(), rtol=1e-4, atol=1e-5)
    assert logged["temperature_student"] == logged["temperature_teacher"] == 8.0 - 6.0 * 11 / 12
    if "train_loss" in logged:
        assert logged["train_loss"] == logged["train_task_loss"]  # what the module logs stays its own


def test_without_weight_it_changes_nothing(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    plain = Plain()
    distilled = copy.deepcopy(plain)
    make_trainer().fit(plain, make_loader(), make_loader(16))
    callback = DistillationCallback(teacher, kd_weight=0.0, task_weight=1.0)
    make_trainer(callbacks=[callback]).fit(distilled, make_loader(), make_loader(16))
    assert_same(snapshot(plain), snapshot(distilled))


def test_other_keys_of_the_step_are_kept(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    seen: list[Any] = []

    class See(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
            seen.append((callback.last_output, outputs))

    callback = DistillationCallback(teacher)
    make_trainer(max_epochs=1, callbacks=[callback, See()]).fit(ReturnsDict(), make_loader())
    assert [outputs["extra"] for _, outputs in seen] == [0, 1, 2, 3]
    assert all(torch.equal(outputs["loss"], out.loss) for out, outputs in seen)


def test_skipped_steps_stay_skipped(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else self.loss(batch)

    one, two = Skips(), CallsNet()
    two.net.load_state_dict(one.net.state_dict())
    data = make_data()
    evens = [index for index in range(64) if index // 16 % 2 == 0]
    with pytest.warns(UserWarning, match="returned `None`"):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(one, make_loader())
    loader = DataLoader(torch.utils.data.Subset(data, evens), batch_size=16)
    make_trainer(callbacks=[DistillationCallback(teacher, "net")]).fit(two, loader)
    assert_same(snapshot(one), snapshot(two))


def test_accumulated_gradients(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    steps: list[int] = []

    def temperature(progress: Any) -> float:
        steps.append(progress.step)
        return 4.0

    one = Plain()
    two = copy.deepcopy(one)
    make_trainer(accumulate_grad_batches=2, callbacks=[DistillationCallback(teacher, temperature=temperature)]).fit(
        one, make_loader(batch_size=16)
    )
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]
    make_trainer(callbacks=[DistillationCallback(teacher)]).fit(two, make_loader(batch_size=32))
    for name, value in snapshot(one).items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loaders", [{"labelled": 0, "more": 1}, [0, 1]])
def test_several_loaders(loaders: Any, teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    combined: Any = (
        {name: make_loader(seed=seed) for name, seed in loaders.items()}
        if isinstance(loaders, dict)
        else [make_loader(seed=seed) for seed in loaders]
    )
    one, two = TwoLoaders(), Plain()
    two.load_state_dict(one.state_dict())
    make_trainer(callbacks=[DistillationCallback(teacher)]).fit(one, combined)
    make_trainer(callbacks=[DistillationCallback(teacher)]).fit(two, make_loader(seed=0))
    assert_same(snapshot(one), snapshot(two))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision: Any, teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    callback = DistillationCallback(teacher, temperature=LearnedTemperature(), validate=True)
    trainer = make_trainer(precision=precision, callbacks=[callback])
    trainer.fit(Plain(), make_loader(), make_loader(16))
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    assert callback.distiller.temperature.multiplier.dtype == torch.float32
    assert callback.distiller.temperature.raw != 0  # pyright: ignore[reportAttributeAccessIssue]


def test_compiled_modules(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    torch.compiler.reset()
    eager, whole, network = (Quiet() for _ in range(3))
    for module in (whole, network):
        module.load_state_dict(eager.state_dict())
    make_trainer(callbacks=[DistillationCallback(teacher, "net")]).fit(eager, make_loader())
    compiled = cast(LightningModule, torch.compile(whole, backend="eager"))
    make_trainer(callbacks=[DistillationCallback(teacher, "net")]).fit(compiled, make_loader())
    network.net.compile(backend="eager")
    make_trainer(callbacks=[DistillationCallback(teacher, "net")]).fit(network, make_loader())
    for name, value in snapshot(eager).items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value, network.state_dict()[name], rtol=1e-4, atol=1e-5)
    compiled = cast(LightningModule, torch.compile(Plain(), backend="eager"))
    with pytest.raises(ValueError, match=r"leaves no call of forward to see\. Name the submodule"):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(compiled, make_loader())


# ---- which call, which layer -------------------------------------------------------------------------------------


def test_several_calls(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    with pytest.raises(RuntimeError, match=r"training_step calls forward 2 times\. Say which .* forward_call=0"):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(ForwardTwice(), make_loader())
    with pytest.raises(RuntimeError, match=r"forward_call is 2, but training_step calls forward only 2 times"):
        make_trainer(callbacks=[DistillationCallback(teacher, forward_call=2)]).fit(ForwardTwice(), make_loader())
    inputs = make_data(16).tensors[0]
    for which, shift in ((0, 0), (-1, 1)):
        module = ForwardTwice()
        expected = kd_loss(module(inputs + shift), teacher(inputs + shift), 4.0)
        callback = DistillationCallback(teacher, forward_call=which)
        trainer = make_trainer(max_steps=1, callbacks=[callback], log_every_n_steps=1)
        trainer.fit(module, make_loader(16))
        torch.testing.assert_close(trainer.callback_metrics["train_kd_loss"], expected.detach())


def test_logits_that_were_not_seen(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    with pytest.raises(RuntimeError, match=r"did not call forward\. It called: net \(Sequential\), net\.0 \(Linear\)"):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(CallsNet(), make_loader())
    with pytest.raises(ValueError, match=r"Plain has no submodule 'net\.01'\. There are: net\.1, net\.0"):
        make_trainer(callbacks=[DistillationCallback(teacher, "net.01")]).fit(Plain(), make_loader())
    module = Plain()
    module.net.requires_grad_(False)
    head = module.head = nn.Linear(NUM_CLASSES, NUM_CLASSES)
    module.loss = lambda batch: F.cross_entropy(head(module.net(batch[0])), batch[1])
    with pytest.raises(RuntimeError, match=r"calls the layer 'net' without gradient"):
        make_trainer(callbacks=[DistillationCallback(teacher, "net")]).fit(module, make_loader())


def test_inputs_of_the_teacher(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    with pytest.raises(RuntimeError, match=r"'net\.2' is called with what the student computed.*inputs=0"):
        make_trainer(callbacks=[DistillationCallback(teacher, "net.2")]).fit(Plain(), make_loader())
    with pytest.raises(RuntimeError, match=r"inputs='image' is no part of the batch, a list"):
        make_trainer(callbacks=[DistillationCallback(teacher, inputs="image")]).fit(Plain(), make_loader())
    start = Plain().state_dict()
    results = []
    for layer, inputs in ((None, None), ("net.2", 0), ("net.2", lambda batch: batch[0])):
        module = Plain()
        module.load_state_dict(start)
        make_trainer(callbacks=[DistillationCallback(teacher, layer, inputs=inputs)]).fit(module, make_loader())
        results.append(snapshot(module))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_arguments_by_position_and_keyword(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    class Shifted(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
            return self.network(x + shift)

    module = Plain()
    module.net = Shifted(make_network(norm=False))  # pyright: ignore[reportAttributeAccessIssue]
    module.loss = lambda batch: F.cross_entropy(module.net(batch[0], shift=torch.ones(1)), batch[1])
    inputs = make_data(16).tensors[0] + 1
    expected = kd_loss(module.net.network(inputs), teacher(inputs), 4.0)  # pyright: ignore
    trainer = make_trainer(max_steps=1, callbacks=[DistillationCallback(Shifted(teacher), "net")], log_every_n_steps=1)
    trainer.fit(module, make_loader(16))
    torch.testing.assert_close(trainer.callback_metrics["train_kd_loss"], expected.detach())


def test_changes_in_place_are_noticed(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    module = Plain()
    module.forward = lambda x: module.net(x.mul_(2))
    with pytest.raises(RuntimeError, match="changed the inputs of forward in place"):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(module, make_loader())
    module = Plain()
    module.loss = lambda batch: F.cross_entropy(module(batch[0]).div_(2), batch[1])
    with pytest.raises(RuntimeError, match="changed the output of forward in place"):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(module, make_loader())


def test_outputs_of_another_kind(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    class Pair(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.network(x)

    class TakesSecond(DistillationCallback):
        def extract_logits(self, output: Any) -> Tensor:
            return output[1]

    module = Plain()
    module.net = Pair(make_network(norm=False))  # pyright: ignore[reportAttributeAccessIssue]
    module.loss = lambda batch: F.cross_entropy(module.net(batch[0])[1], batch[1])
    with pytest.raises(TypeError, match=r"found no logits in a model output of type tuple.*DistillationCallback"):
        make_trainer(callbacks=[DistillationCallback(Pair(teacher), "net")]).fit(module, make_loader())
    make_trainer(callbacks=[TakesSecond(Pair(teacher), "net")]).fit(module, make_loader())


@dataclass
class Output:
    logits: Tensor
    loss: Tensor


def test_other_parts_of_an_output_may_change(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    module = Plain()
    network = module.net

    def forward(batch: Any) -> Output:
        logits = network(batch[0])
        return Output(logits, F.cross_entropy(logits, batch[1]))

    def halved(batch: Any) -> Tensor:
        loss = module(batch).loss
        loss /= 2
        return loss

    module.forward, module.loss = forward, halved  # pyright: ignore[reportAttributeAccessIssue]
    make_trainer(callbacks=[DistillationCallback(teacher, inputs=0)]).fit(module, make_loader())


def test_with_a_module_of_this_package(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    module = ClassificationModule(make_network())
    trainer = make_trainer(callbacks=[DistillationCallback(teacher, "model"), AdaptiveTemperature("val_acc")])
    trainer.fit(module, make_loader(), make_loader(16))
    assert {"train_kd_loss", "train_acc", "val_acc", "val_calibration_error"} <= set(trainer.callback_metrics)


# ---- targets -----------------------------------------------------------------------------------------------------


def one_step(module: LightningModule, batch: Any, make_trainer: MakeTrainer, callback: Callback) -> Tensor:
    trainer = make_trainer(max_steps=1, callbacks=[callback], log_every_n_steps=1)
    trainer.fit(module, DataLoader([batch], batch_size=None))  # pyright: ignore[reportArgumentType]
    return trainer.callback_metrics["train_kd_loss"]


def test_targets_are_found_or_named(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    x, y = make_data(16).tensors
    y = torch.where(torch.arange(16) < 4, -100, y)
    start = Plain()
    expected = DKDLoss()(start(x), teacher(x), 4.0, targets=y).detach()
    for batch, targets in (((x, y), None), ((x, y, 0), 1), ((x, y, 0), lambda batch: batch[1])):
        module = copy.deepcopy(start)
        module.loss = lambda batch, module=module: F.cross_entropy(module(batch[0]), batch[1])
        callback = DistillationCallback(teacher, kd_loss=DKDLoss(), targets=targets)
        torch.testing.assert_close(one_step(module, batch, make_trainer, callback), expected)
    for key in ("labels", "targets"):
        module = copy.deepcopy(start)
        module.loss = lambda batch, module=module, key=key: F.cross_entropy(module(batch["x"]), batch[key])
        callback = DistillationCallback(teacher, kd_loss=DKDLoss())
        torch.testing.assert_close(one_step(module, {"x": x, key: y}, make_trainer, callback), expected)
    module = copy.deepcopy(start)
    module.loss = lambda batch: F.cross_entropy(module(batch["x"]), batch["labels"])
    with pytest.raises(RuntimeError, match=r"targets='y' is no part of the batch, a dict with the keys x, labels"):
        one_step(module, {"x": x, "labels": y}, make_trainer, DistillationCallback(teacher, targets="y"))


def test_token_labels_must_be_named(make_trainer: MakeTrainer) -> None:
    def language_model() -> nn.Module:
        return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))

    teacher = language_model()
    teacher[1].weight.data.mul_(5)  # pyright: ignore
    tokens = torch.randint(0, 11, (2, 7))
    labels = torch.where(torch.arange(7) < 3, -100, tokens)

    def module() -> Plain:
        made = Plain()
        torch.manual_seed(0)
        made.net = language_model()  # pyright: ignore[reportAttributeAccessIssue]
        made.loss = lambda batch: made(batch["tokens"])[:, :-1].square().mean()
        return made

    def shifted(batch: Any) -> Tensor:
        return F.pad(batch["labels"][:, 1:], (0, 1), value=-100)

    batch = {"tokens": tokens, "labels": labels}
    with pytest.raises(RuntimeError, match=r"Say how they go together: targets='labels' if"):
        one_step(module(), batch, make_trainer, DistillationCallback(teacher))
    logits, taught = module()(tokens), teacher(tokens)
    for targets, kept in (("labels", slice(3, 7)), (shifted, slice(2, 6)), (lambda batch: None, slice(0, 7))):
        loss = one_step(module(), batch, make_trainer, DistillationCallback(teacher, targets=targets))
        expected = kd_loss(logits[:, kept].flatten(0, 1), taught[:, kept].flatten(0, 1), 4.0)
        torch.testing.assert_close(loss, expected.detach())


def test_dense_logits_need_their_class_dimension(make_trainer: MakeTrainer) -> None:
    teacher = nn.Conv2d(1, 3, 1)
    teacher.weight.data.mul_(5)
    batch = torch.randn(2, 1, 4, 5), torch.randint(0, 3, (2, 4, 5))
    module = Plain()
    module.net = nn.Conv2d(1, 3, 1)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RuntimeError, match=r"classes in dimension 1.*give kd_loss=KDLoss\(class_dim=1\)"):
        one_step(module, batch, make_trainer, DistillationCallback(teacher))
    expected = kd_loss(module.net(batch[0]), teacher(batch[0]), 4.0, class_dim=1)
    loss = one_step(module, batch, make_trainer, DistillationCallback(teacher, kd_loss=KDLoss(class_dim=1)))
    torch.testing.assert_close(loss, expected.detach())


def test_multi_label_targets(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    x, y = make_data(16).tensors
    batch = x, F.one_hot(y, NUM_CLASSES).float()
    module = Plain()
    module.loss = lambda batch: F.binary_cross_entropy_with_logits(module(batch[0]), batch[1])
    expected = bernoulli_kd_loss(module(x), teacher(x), 4.0)
    callback = DistillationCallback(teacher, kd_loss=BernoulliKDLoss())
    torch.testing.assert_close(one_step(module, batch, make_trainer, callback), expected.detach())


# ---- nothing is left behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [None, "net"])
@pytest.mark.parametrize("ending", ["normal", "exception", "interrupt", "unknown layer"])
def test_the_module_is_what_it_was(
    ending: str, layer: str | None, teacher: nn.Module, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == 3 and ending != "normal":
                raise KeyboardInterrupt if ending == "interrupt" else ZeroDivisionError

    taught = snapshot(teacher)
    module = Plain()
    before, keys = traces(module), list(module.state_dict())
    name = "net.99" if ending == "unknown layer" else layer
    callback = DistillationCallback(teacher, name, LearnableTemperature(), validate=True)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = make_trainer(callbacks=[callback, Breaks(), saver], enable_checkpointing=True)
    if ending == "normal":
        trainer.fit(module, make_loader(), make_loader(16))
    else:
        error = {"exception": ZeroDivisionError, "interrupt": SystemExit, "unknown layer": ValueError}[ending]
        with pytest.raises(error):
            trainer.fit(module, make_loader(), make_loader(16))
    assert traces(module) == before
    assert list(module.state_dict()) == keys
    assert callback.last_output is None
    assert_same(snapshot(teacher), taught)
    for path in tmp_path.glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        assert list(saved["state_dict"]) == keys
        Plain().load_state_dict(saved["state_dict"], strict=True)
        Plain.load_from_checkpoint(path, weights_only=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == {"normal": 4, "unknown layer": 0}.get(ending, 1)
    batches = make_trainer().predict(module, DataLoader(make_data(8).tensors[0], batch_size=8))  # pyright: ignore
    assert batches is not None


def test_one_callback_serves_two_fits(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    callback = DistillationCallback(teacher, temperature=CosineSchedule(8, 2))
    for kind in (Plain, CallsForward):
        module = kind()
        before = traces(module)
        trainer = make_trainer(callbacks=[callback])
        trainer.fit(module, make_loader())
        assert trainer.callback_metrics["temperature_student"] < 3
        assert traces(module) == before


@pytest.mark.parametrize(
    "stock",
    [
        StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
        EMAWeightAveraging(decay=0.5),
        ModelPruning("l1_unstructured", amount=0.5),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_stock_callbacks_leave_teacher_and_temperature_alone(
    stock: Callback, teacher: nn.Module, make_trainer: MakeTrainer
) -> None:
    class Halve(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking:
                callback.distiller.temperature.multiplier.mul_(0.5)

    before = snapshot(teacher)
    callback = DistillationCallback(teacher, temperature=8.0)
    checks: list[float] = []
    halve = Halve()
    trainer = make_trainer(max_epochs=4, callbacks=[stock, callback, halve])
    module = Plain()
    left = traces(module)
    trainer.fit(module, make_loader(), make_loader(16))
    checks.append(callback.distiller.temperature.multiplier.item())
    assert checks[-1] in (0.5**4, 0.5**5)  # weight averaging adds an epoch of its own
    assert_same(snapshot(teacher), before)
    if not isinstance(stock, ModelPruning):  # leaves hooks and masks of its own
        assert traces(module) == left


# ---- what cannot be ----------------------------------------------------------------------------------------------


def test_manual_optimisation_is_shown_the_way(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    module = Plain()
    module.automatic_optimization = False
    before = traces(module)
    with pytest.raises(ValueError, match=r"(?s)optimises manually.*self\.distiller = Distiller\(teacher.*\)\.loss"):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(module, make_loader())
    assert traces(module) == before


def test_impossible_combinations(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    with pytest.raises(TypeError, match="needs a teacher, got None"):
        DistillationCallback(None)  # pyright: ignore[reportArgumentType]
    module = DistillationModule(make_network(), teacher)
    with pytest.raises(ValueError, match="DistillationModule distils by itself"):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(module, make_loader())
    module = Plain()
    module.net = teacher  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="student and teacher share parameters"):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(module, make_loader())

    class Silent(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

    with pytest.raises(RuntimeError, match="validation_step did not call forward"):
        make_trainer(callbacks=[DistillationCallback(teacher, validate=True)]).fit(
            Silent(), make_loader(), make_loader(16)
        )


# ---- a policy that learns, resuming ------------------------------------------------------------------------------


class Scheduled(Plain):
    """Schedulers that count the groups of their optimiser when they are made."""

    kind = "onecycle"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)
        scheduler = (
            torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=100)
            if self.kind == "onecycle"
            else torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("kind", ["onecycle", "lambda"])
def test_a_learned_temperature_is_a_group_of_the_modules_optimiser(
    kind: str, teacher: nn.Module, make_trainer: MakeTrainer
) -> None:
    module = Scheduled()
    module.kind = kind
    callback = DistillationCallback(teacher, temperature=LearnedTemperature())
    trainer = make_trainer(callbacks=[callback])
    trainer.fit(module, make_loader())
    first, second = trainer.optimizers[0].param_groups
    assert [id(p) for p in first["params"]] == [id(p) for p in module.parameters()]
    assert second["params"] == list(callback.distiller.parameters())
    assert (first["weight_decay"], second["weight_decay"]) == (0.5, 0.0)
    assert first["lr"] == second["lr"] != 0.01
    assert callback.distiller.temperature.raw != 0  # pyright: ignore[reportAttributeAccessIssue]
    if kind == "lambda":  # and so in a DistillationModule whose student brings its own optimiser
        made = DistillationModule(Scheduled(), teacher, LearnedTemperature())
        made.student.trainer = trainer  # pyright: ignore
        trainer = make_trainer()
        trainer.fit(made, make_loader())
        assert len(trainer.optimizers[0].param_groups) == 2


@pytest.mark.parametrize("temperature", [CosineSchedule(8, 2), LearnedTemperature()], ids=["cosine", "learned"])
def test_resume_is_exact(temperature: Any, teacher: nn.Module, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def make() -> tuple[Scheduled, DistillationCallback, list[Any]]:
        torch.manual_seed(3)
        callback = DistillationCallback(teacher, temperature=copy.deepcopy(temperature))
        script = Script([0.5, 0.4, 0.3, 0.2], steps_per_check=4)
        adaptive = AdaptiveTemperature(monitor="scripted", patience=1, factor=0.5, degrade_delta=0.5)
        return Scheduled(), callback, [script, callback, adaptive]

    class StopAfterTwo(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    options: dict[str, Any] = {"max_epochs": 4, "num_sanity_val_steps": 0}
    straight, whole, callbacks = make()
    make_trainer(callbacks=callbacks, **options).fit(straight, make_loader(), make_loader(16))
    module, _, callbacks = make()
    trainer = make_trainer(callbacks=[*callbacks, StopAfterTwo()], **options)
    trainer.fit(module, make_loader(), make_loader(16))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed, callback, callbacks = make()
    trainer = make_trainer(callbacks=callbacks, **options)
    trainer.fit(resumed, make_loader(), make_loader(16), ckpt_path=tmp_path / "half.ckpt")
    assert trainer.current_epoch == 4
    assert_same(snapshot(straight), snapshot(resumed))
    assert_same(snapshot(whole.distiller), snapshot(callback.distiller))
    assert callback.distiller.temperature.multiplier.item() < 1


def test_what_changed_on_resume(teacher: nn.Module, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(max_epochs=1, callbacks=[DistillationCallback(teacher, temperature=4.0)])
    trainer.fit(Plain(), make_loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = copy.deepcopy(teacher)
    other[0].weight += 1.0  # pyright: ignore
    with pytest.raises(RuntimeError, match=r"was trained with the teacher FrozenTeacher.*but the teacher now is"):
        make_trainer(callbacks=[DistillationCallback(other)]).fit(
            Plain(), make_loader(), ckpt_path=tmp_path / "one.ckpt"
        )
    with pytest.warns(UserWarning, match=r"temperature=ConstantTemperature\(value=4\).*give DistillationCallback"):
        make_trainer(callbacks=[DistillationCallback(teacher, temperature=2.0)]).fit(
            Plain(), make_loader(), ckpt_path=tmp_path / "one.ckpt"
        )
    callback = DistillationCallback(other)  # validating reads the callback's state too, and binds nobody to it
    trainer = make_trainer(callbacks=[callback])
    module = Plain()
    trainer.validate(module, make_loader(16), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    trainer.fit(module, make_loader())


# ---- with the other callbacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_adaptive_temperature(first: bool, teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    callback = DistillationCallback(teacher, temperature=8.0)
    adaptive = AdaptiveTemperature(monitor="scripted", patience=1, factor=0.5)
    order: list[Callback] = [callback, adaptive] if first else [adaptive, callback]
    trainer = make_trainer(max_epochs=3, callbacks=[Script([0.5, 0.5, 0.5], 4), *order])
    trainer.fit(Plain(), make_loader(), make_loader(16))
    assert callback.distiller.temperature.multiplier.item() == 0.25
    assert trainer.callback_metrics["temperature_student"] == 4.0  # of the last step, before the last move


def test_temperature_monitor(teacher: nn.Module, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    monitor = TemperatureMonitor(logging_interval="step", gradient_share_every_n_steps=2, plot=True)
    callbacks = [monitor, DistillationCallback(teacher, temperature=CosineSchedule(8, 2))]
    trainer = make_trainer(callbacks=callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.fit(Plain(), make_loader(), make_loader(16))
    folder = tmp_path / "lightning_logs" / "version_0"
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("temperature_student")
    values = [float(row[column]) for row in rows[1:] if row[column]]
    assert values == pytest.approx(
        [2 + 3 * (1 + torch.tensor(torch.pi * step / 8).cos().item()) for step in (1, 3, 5, 7)]
    )
    assert 0 < trainer.callback_metrics["kd_gradient_share"] < 1
    assert (folder / "temperature.png").is_file()
    assert "train_kd_loss" in rows[0]


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_temperature_finder(first: bool, teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    def fit(temperature: float, finder: list[Callback]) -> tuple[Plain, DistillationCallback]:
        torch.manual_seed(3)
        module, callback = Plain(temperature=0.07), DistillationCallback(teacher, temperature=temperature)
        order = [*finder, callback] if first else [callback, *finder]
        make_trainer(callbacks=order).fit(module, make_loader(), make_loader(32, seed=1))
        return module, callback

    finder = TemperatureFinder(candidates=(1, 8), steps=4, seeds=1, kd_weights=(0.5, 1.0))
    module, callback = fit(3.0, [finder])
    best = finder.best
    assert best is not None
    assert len(finder.results) == 4
    assert len({trial.mean for trial in finder.results}) > 1
    assert module.hparams["temperature"] == 0.07  # the module's own, which means something else
    assert callback.distiller.temperature.value == best.candidate  # pyright: ignore[reportAttributeAccessIssue]
    torch.manual_seed(3)
    direct = Plain()
    straight = DistillationCallback(teacher, temperature=best.candidate, kd_weight=best.kd_weight or 0.0)
    make_trainer(callbacks=[straight]).fit(direct, make_loader(), make_loader(32, seed=1))
    assert_same(snapshot(module), snapshot(direct))


def test_early_stop_distillation(teacher: nn.Module, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(**options: Any) -> tuple[Plain, DistillationCallback, Trainer]:
        callback = DistillationCallback(teacher)
        stop = EarlyStopDistillation(monitor="scripted", patience=1)
        trainer = make_trainer(callbacks=[callback, stop, Script([0.5, 0.4, 0.4, 0.4], 4)], **options)
        return Plain(), callback, trainer

    module, callback, trainer = fit(max_epochs=3)
    trainer.fit(module, make_loader(), make_loader(16))
    assert not callback.distiller.kd_enabled
    assert trainer.callback_metrics["effective_kd_weight"] == 0
    trainer.save_checkpoint(tmp_path / "off.ckpt")
    module, callback, trainer = fit(max_epochs=4)
    trainer.fit(module, make_loader(), make_loader(16), ckpt_path=tmp_path / "off.ckpt")
    assert not callback.distiller.kd_enabled
    # with nothing but the teacher to learn from it stays on
    callback = DistillationCallback(teacher, task_weight=0.0)
    stop = EarlyStopDistillation(monitor="scripted", patience=1)
    trainer = make_trainer(callbacks=[callback, stop, Script([0.5, 0.4], 4)])
    with pytest.warns(UserWarning, match="leaves distillation on"):
        trainer.fit(Plain(), make_loader(), make_loader(16))
    assert callback.distiller.kd_enabled


# ---- validation --------------------------------------------------------------------------------------------------


def test_validation_on_request(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    module = Plain()
    trainer = make_trainer(callbacks=[DistillationCallback(teacher, validate=True)])
    trainer.fit(module, make_loader(), make_loader(40, seed=1))
    inputs = make_data(40, seed=1).tensors[0]
    with torch.no_grad():
        logits, taught = module.eval()(inputs), teacher(inputs)
    logged = trainer.callback_metrics
    torch.testing.assert_close(logged["val_kd_loss"], kd_loss(logits, taught, 4.0))
    torch.testing.assert_close(logged["val_agreement"], (logits.argmax(1) == taught.argmax(1)).float().mean())
    trainer = make_trainer(callbacks=[DistillationCallback(teacher)])
    trainer.fit(module.train(), make_loader(), make_loader(40, seed=1))
    assert not {"val_kd_loss", "val_agreement"} & set(trainer.callback_metrics)


def test_validation_is_no_training_for_the_policy(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    modes: list[bool] = []

    class Notes(LearnedTemperature):
        def compute(self, signals: Any) -> Any:
            modes.append(self.training)
            return super().compute(signals)

    callback = DistillationCallback(teacher, temperature=Notes(), validate=True)
    make_trainer(max_epochs=1, num_sanity_val_steps=1, callbacks=[callback]).fit(
        Plain(), make_loader(32), make_loader(16)
    )
    assert modes == [False, True, True, False]


# ---- two processes -----------------------------------------------------------------------------------------------


class InOrder(LightningDataModule):
    """Rank r of n takes samples r, r + n, …: each global batch is the one that a single process has."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        data, world, rank = make_data(64), self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(data, num_replicas=world, rank=rank, shuffle=False)
        return DataLoader(data, batch_size=16 // world, sampler=sampler)


class Report(Callback):
    def __init__(self, folder: Path, callback: DistillationCallback) -> None:
        self.folder = folder
        self.callback = callback

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = {"module": pl_module.state_dict(), "distiller": dict(self.callback.distiller.state_dict())}
        torch.save(state, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert "training_step" not in vars(pl_module)


class OtherStart(Callback):
    """A policy that starts elsewhere on each rank, as one with random weights may."""

    def __init__(self, callback: DistillationCallback) -> None:
        self.callback = callback

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.callback.distiller.temperature.raw.data += trainer.global_rank  # pyright: ignore


@pytest.mark.parametrize(("layer", "accumulate"), [(None, 1), ("net", 2)])
def test_two_processes_train_as_one(
    layer: str | None, accumulate: int, teacher: nn.Module, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    for devices in (2, 1):
        torch.manual_seed(7)
        callback = DistillationCallback(teacher, layer, LearnedTemperature())
        callbacks = [OtherStart(callback), callback, ReplicaConsistency(1), Report(tmp_path, callback)]
        options = {"strategy": "ddp_fork"} if devices == 2 else {}
        trainer = make_trainer(
            devices=devices, callbacks=callbacks, use_distributed_sampler=False,
            accumulate_grad_batches=accumulate, **options,
        )  # fmt: skip
        trainer.fit(ReturnsDict() if layer is None else Plain(), datamodule=InOrder())
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert first["distiller"]["temperature.raw"] != 0
    for part in ("module", "distiller"):
        assert_same(first[part], second[part])
        for name, value in one[part].items():
            torch.testing.assert_close(first[part][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [LearnedTemperature(), 4.0], ids=["learned", "constant"])
def test_state_that_ends_with_the_processes_is_told(
    temperature: Any, teacher: nn.Module, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(devices=2, strategy="ddp_fork", callbacks=[DistillationCallback(teacher, None, temperature)])
    lost = "in the process that called fit, DistillationCallback has temperature.raw as before it. Take strategy='ddp'"
    told = nullcontext() if temperature == 4.0 else pytest.raises(ProcessRaisedException, match=lost)
    with warnings.catch_warnings(), told:
        warnings.filterwarnings("error", message="ddp_fork and ddp_spawn")
        trainer.fit(Plain(), make_loader())


def test_ranks_with_different_teachers_are_an_error(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    class Different(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            teacher[0].weight += trainer.global_rank  # pyright: ignore

    trainer = make_trainer(devices=2, strategy="ddp_fork", callbacks=[Different(), DistillationCallback(teacher)])
    with pytest.raises(ProcessRaisedException, match="the ranks have different teachers: fingerprints rank 0"):
        trainer.fit(Plain(), make_loader())


# ---- from YAML ---------------------------------------------------------------------------------------------------


class Batches(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return make_loader()


def first_part(batch: Any) -> Tensor:
    return batch[0]


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [None, 0, f"{__name__}.first_part"])
def test_a_command_line_of_ones_own(
    inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: nn.Module
) -> None:
    monkeypatch.setattr(sys, "argv", ["mine"])
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    callback = {
        "class_path": "kd_lightning.callbacks.DistillationCallback",
        "init_args": {
            "teacher": {
                "class_path": "kd_lightning.FrozenTeacher",
                "init_args": {
                    "module": {"class_path": f"{__name__}.Teacher"},
                    "checkpoint": str(tmp_path / "teacher.pt"),
                },
            },
            "student_layer": "net",
            "temperature": {"class_path": "kd_lightning.temperature.CosineSchedule",
                            "init_args": {"init_value": 8.0, "end_value": 2.0}},
            "kd_loss": {"class_path": "kd_lightning.losses.DKDLoss"},
            "inputs": inputs,
        },
    }  # fmt: skip
    trainer = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [callback],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    arguments = ["fit", "--config", str(tmp_path / "mine.yaml")]
    cli = LightningCLI(
        Plain,
        Batches,
        save_config_callback=None,
        seed_everything_default=1,
        args=arguments,
    )
    assert "train_kd_loss" in cli.trainer.callback_metrics


class Teacher(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*make_network(32))


def test_the_way_that_the_error_shows(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    """Manual optimisation with a Distiller of one's own, and the callbacks that find it there."""

    class Manual(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.distiller = Distiller(teacher, temperature=8.0)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            loss = self.distiller(x, self(x), y).loss
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    module = Manual()
    callbacks: list[Callback] = [AdaptiveTemperature("scripted", patience=1, factor=0.5), Script([0.5, 0.5], 4)]
    make_trainer(callbacks=callbacks).fit(module, make_loader(), make_loader(16))
    assert module.distiller.temperature.multiplier.item() == 0.5


def test_an_ensemble_teaches_as_it_does_in_a_loop(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    ensemble = TeacherEnsemble([teacher, copy.deepcopy(teacher)], temperatures=[2.0, 6.0], weights=[1.0, 3.0])
    callback, module, seen = DistillationCallback(ensemble, temperature=4.0), Plain(), []

    class Record(Callback):
        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
            assert callback.last_output is not None
            seen.append((callback.last_output.student_logits.detach(), callback.last_output))

    make_trainer(max_epochs=1, callbacks=[callback, Record()]).fit(module, make_loader(32))
    assert len(seen) == 2
    for (inputs, targets), (logits, out) in zip(make_loader(32), seen, strict=True):
        expected = Distiller(ensemble, temperature=4.0)(inputs, logits, targets)
        torch.testing.assert_close(out.kd_loss, expected.kd_loss)
        assert out.temperature.teacher.item() == pytest.approx(0.25 * 2 + 0.75 * 6)


def test_two_callbacks_are_refused_and_one_keeps_its_key() -> None:
    callbacks: list[Callback] = [DistillationCallback(make_teacher(), student_layer="net") for _ in range(2)]
    trainer = Trainer(max_epochs=1, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ValueError, match=r"with more than one DistillationCallback, .* TeacherEnsemble\(\["):
        trainer.fit(Plain(), make_loader())

    alone = DistillationCallback(make_teacher(), student_layer="net")
    trainer = Trainer(max_epochs=1, callbacks=[alone], logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(Plain(), make_loader())
    assert alone.state_key == "DistillationCallback"
