"""A run that goes on, validates or loads with another temperature policy than the checkpoint's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, LayerTerm
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.losses import ChannelWiseKDLoss, HintLoss
from kd_lightning.temperature import (
    CosineSchedule,
    InstanceTemperature,
    LearnableTemperature,
    ScheduledTemperature,
)
from tests.helpers import NUM_CLASSES, Net, assert_same, make_loader, make_network, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint was trained with:UserWarning")  # said of each setting

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]

POLICIES: dict[str, Callable[[], Any]] = {
    "constant": lambda: 4.0,
    "schedule": lambda: CosineSchedule(8.0, 2.0),
    "learnt": lambda: LearnableTemperature(init_value=5.0, adversarial=False, lr=0.01),
    "learnt by sample": lambda: InstanceTemperature(NUM_CLASSES, hidden_size=4, init_value=5.0),
}
PARAMETERS = {"constant": set[str](), "schedule": set[str](), "learnt": {"raw"}}
PARAMETERS["learnt by sample"] = {f"network.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
PAIRS = [(a, b) for a in POLICIES for b in POLICIES if PARAMETERS[a] != PARAMETERS[b]]


class AtStart(Callback):
    """Keeps what the optimiser and the student hold when training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        self.weights = snapshot(pl_module)
        self.momenta = [
            optimizer.state.get(p, {}).get("momentum_buffer")
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        self.momenta = [None if momentum is None else momentum.clone() for momentum in self.momenta]


def saved_run(module: LightningModule, trainer: Trainer, path: Path) -> dict[str, Any]:
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def misfits(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "temperature policies" in str(w.message)]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_run_goes_on_with_another_policy(
    before: str, after: str, make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    saved = saved_run(make_module(temperature=POLICIES[before]()), make_trainer(max_epochs=1), path)
    start = AtStart()
    module = make_module(temperature=POLICIES[after]())
    fresh = snapshot(module.distiller.temperature)
    trainer = make_trainer(max_epochs=2, callbacks=[start])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, make_loader(), make_loader(16), ckpt_path=path)
    (message,) = misfits(caught)
    for name in PARAMETERS[before] - PARAMETERS[after]:
        assert f"temperature.{name}" in message.partition(" left out")[0]
    for name in PARAMETERS[after] - PARAMETERS[before]:
        assert f"temperature.{name}" in message.partition(" as given now")[0]
    # the student, its batch statistics and its momenta are the checkpoint's, the policy is the run's
    old = {name: value for name, value in saved["state_dict"].items() if name.startswith("student.")}
    assert_same({name: start.weights[name] for name in old}, old)
    assert_same({name: start.weights[f"distiller.temperature.{name}"] for name in fresh}, fresh)
    count = len(list(module.student.parameters()))
    state = saved["optimizer_states"][0]["state"]
    for index, momentum in enumerate(start.momenta):
        if index < count:
            assert momentum is not None
            assert torch.equal(momentum, state[index]["momentum_buffer"])
        else:
            assert momentum is None
    assert trainer.current_epoch == 2
    assert trainer.global_step == 2 * saved["global_step"]


@pytest.mark.parametrize(("before", "after"), PAIRS[:4])
@pytest.mark.parametrize("stage", ["validate", "test", "load_from_checkpoint"])
def test_evaluation_takes_the_students_weights(
    stage: str, before: str, after: str, make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    saved = saved_run(make_module(temperature=POLICIES[before]()), make_trainer(max_epochs=1), path)

    def evaluate() -> DistillationModule:
        policy = POLICIES[after]()
        if stage == "load_from_checkpoint":
            return DistillationModule.load_from_checkpoint(path, student=make_network(), temperature=policy)
        module = make_module(temperature=policy)
        getattr(make_trainer(), stage)(module, make_loader(16), ckpt_path=path, verbose=False)
        return module

    with pytest.warns(UserWarning, match=r"policies hold other state than those of this run: temperature\."):
        module = evaluate()
    assert_same(snapshot(module.student), {n: saved["state_dict"][f"student.{n}"] for n in snapshot(module.student)})


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.5**epoch),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=4),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=5),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5, 1), schedulers.ExponentialLR(o, 0.5)], milestones=[1]
    ),
    "plateau": lambda o: ReduceLROnPlateau(o, "train_acc", patience=0, min_lr=[0.0] * len(o.param_groups)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using:RuntimeWarning")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("before", "after"), [("constant", "learnt"), ("learnt", "constant")])
def test_the_learning_rate_goes_on(
    scheduler: str, before: str, after: str, make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def rates(trainer: Trainer) -> list[float]:
        return [group["lr"] for group in trainer.optimizers[0].param_groups]

    def module(policy: str) -> DistillationModule:
        return make_module(temperature=POLICIES[policy](), lr_scheduler=SCHEDULERS[scheduler])

    saved_run(module(before), make_trainer(max_epochs=2), tmp_path / "last.ckpt")
    whole, resumed = make_trainer(max_epochs=4), make_trainer(max_epochs=4)
    whole.fit(module(before), make_loader(), make_loader(16))
    with pytest.warns(UserWarning, match="temperature policies"):
        resumed.fit(module(after), make_loader(), make_loader(16), ckpt_path=tmp_path / "last.ckpt")
    assert len(rates(resumed)) == len(rates(whole)) + (1 if after == "learnt" else -1)
    if scheduler != "plateau":  # which follows a metric
        assert rates(resumed)[0] == rates(whole)[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_policy_resumes_bit_for_bit_and_says_nothing(
    policy: str, make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def module() -> DistillationModule:
        torch.manual_seed(1)
        return make_module(temperature=POLICIES[policy](), lr_scheduler=SCHEDULERS["cosine"])

    whole, resumed = module(), module()
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    make_trainer(max_epochs=2, callbacks=[saver], enable_checkpointing=True).fit(whole, make_loader())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(max_epochs=2).fit(resumed, make_loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert not misfits(caught)
    assert_same(resumed.state_dict(), whole.state_dict())


def test_weight_averaging(make_module: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def averaging() -> Any:
        return make_trainer(max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5)])

    saved_run(make_module(temperature=POLICIES["learnt"]()), averaging(), tmp_path / "last.ckpt")
    trainer = averaging()
    trainer.fit_loop.max_epochs = 3
    with pytest.warns(UserWarning, match=r"temperature policies.*temperature\.raw left out"):
        trainer.fit(make_module(), make_loader(), make_loader(16), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.current_epoch == 3


@pytest.mark.filterwarnings("ignore:the teacher Net still has:UserWarning")
def test_policies_of_layers_and_projectors(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def module(policy: Any) -> DistillationModule:
        torch.manual_seed(0)
        terms = [
            LayerTerm("hidden", "hidden", HintLoss()),
            LayerTerm("stage2", "stage2", ChannelWiseKDLoss(), policy),
        ]
        optimizer = cast(Any, lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9))
        return DistillationModule(Net(), Net(hidden=9), layers=terms, optimizer=optimizer)

    def fit(policy: Any, trainer: Trainer, path: Path | None = None) -> None:
        data = TensorDataset(torch.randn(16, 1, 8, 8), torch.randint(0, 5, (16,)))
        trainer.fit(module(policy), DataLoader(data, batch_size=8), ckpt_path=path)

    start, path = AtStart(), tmp_path / "last.ckpt"
    trainer = make_trainer(max_epochs=1)
    fit(LearnableTemperature(), trainer)
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    with pytest.warns(UserWarning, match=r"this run: layers\.1\.temperature\.raw left out\. To go on"):
        fit(4.0, make_trainer(max_epochs=2, callbacks=[start]), path)
    projector = "distiller.layers.0.projector.weight"
    assert torch.equal(start.weights[projector], saved["state_dict"][projector])
    assert all(momentum is not None for momentum in start.momenta)


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_network(norm=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [schedulers.CosineAnnealingLR(optimizer, T_max=4)]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_callback(before: str, after: str, teacher: nn.Module, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def trainer(policy: str, epochs: int) -> tuple[Trainer, AtStart]:
        callback, start = DistillationCallback(teacher, temperature=POLICIES[policy]()), AtStart()
        return make_trainer(max_epochs=epochs, callbacks=[callback, start]), start

    first, _ = trainer(before, 1)
    saved = saved_run(Plain(), first, tmp_path / "last.ckpt")
    second, start = trainer(after, 2)
    with pytest.warns(UserWarning, match=r"temperature policies.*give DistillationCallback the same temperature"):
        second.fit(Plain(), make_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert_same(start.weights, saved["state_dict"])
    for index, momentum in enumerate(start.momenta[:4]):
        assert momentum is not None
        assert torch.equal(momentum, saved["optimizer_states"][0]["state"][index]["momentum_buffer"])


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["fit", "test", "load_from_checkpoint", "callback"])
def test_a_multiplier_that_is_not_positive_is_refused(
    where: str, value: float, make_module: Make, teacher: nn.Module, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    if where == "callback":
        trainer = make_trainer(max_epochs=1, callbacks=[DistillationCallback(teacher)])
        saved = saved_run(Plain(), trainer, path)
        (state,) = [state for name, state in saved["callbacks"].items() if name.startswith("DistillationCallback")]
        state["distiller"]["temperature.multiplier"].fill_(value)
    else:
        saved = saved_run(make_module(), make_trainer(max_epochs=1), path)
        saved["state_dict"]["distiller.temperature.multiplier"].fill_(value)
    torch.save(saved, path)
    rule = "the multiplier of ConstantTemperature must be positive and finite, but the checkpoint has"

    def load() -> None:
        if where == "load_from_checkpoint":
            DistillationModule.load_from_checkpoint(path, student=make_network())
        elif where == "callback":
            trainer = make_trainer(max_epochs=2, callbacks=[DistillationCallback(teacher)])
            trainer.fit(Plain(), make_loader(), ckpt_path=path)
        else:
            getattr(make_trainer(max_epochs=2), where)(make_module(), make_loader(), ckpt_path=path)

    with pytest.raises(ValueError, match=rf"{rule} {value:g}: "):
        load()


def test_a_policy_of_the_same_names_and_shapes_keeps_its_weights(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    saved = saved_run(make_module(temperature=POLICIES["learnt"]()), make_trainer(max_epochs=1), tmp_path / "a.ckpt")
    loaded = DistillationModule.load_from_checkpoint(
        tmp_path / "a.ckpt", student=make_network(), temperature=LearnableTemperature(max_value=30.0)
    )
    name = "distiller.temperature.raw"
    assert torch.equal(loaded.state_dict()[name], saved["state_dict"][name])
    assert isinstance(make_module(temperature=CosineSchedule(4, 1)).distiller.temperature, ScheduledTemperature)
