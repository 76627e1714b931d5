"""Layer terms under Lightning."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from kd_lightning import DistillationModule, LayerTerm, TeacherEnsemble
from kd_lightning.callbacks import TemperatureFinder, TemperatureMonitor
from kd_lightning.losses import ChannelWiseKDLoss, HintLoss, SimilarityKDLoss, SimilarityPreservingLoss
from kd_lightning.modules.first_samples import first_samples
from kd_lightning.temperature import ConstantTemperature, DepthTemperature, LearnableTemperature, LinearSchedule
from tests.helpers import InOrder, Net, assert_same, hooks, make_data, make_loader, make_network

MakeTrainer = Callable[..., Trainer]


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Augmented with all three random number generators that people use."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index)) + index % 5
        noise = torch.rand(1) + random.random() + float(np.random.rand())  # noqa: NPY002
        return image + 0.1 * noise, torch.tensor(index % 5)

    def __len__(self) -> int:
        return 24


def loader(shuffle: bool = True, generator: bool = False) -> DataLoader[Any]:
    own = torch.Generator().manual_seed(5) if generator else None
    return DataLoader(Images(), batch_size=8, shuffle=shuffle, generator=own)


def make_teacher(width: int = 6) -> Net:
    torch.manual_seed(8)
    teacher = Net(width=width, hidden=9)
    for part in teacher.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean += 0.1  # pyright: ignore[reportOperatorIssue]  (stands for training)
    return teacher


def without_dropout() -> Net:
    student = Net()
    student.dropout.p = 0.0
    return student


def terms() -> list[LayerTerm]:
    return [
        LayerTerm("stage1", "stage1", ChannelWiseKDLoss(), DepthTemperature(), weight=LinearSchedule(0.0, 1.0)),
        LayerTerm("hidden", "hidden", HintLoss()),
        LayerTerm("stage2", "stage2", SimilarityKDLoss(), LearnableTemperature(warmup_epochs=2)),
    ]


def make_module(layers: list[LayerTerm] | None = None, **options: Any) -> DistillationModule:
    options.setdefault("optimizer", lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9))
    options.setdefault("teacher", make_teacher())
    torch.manual_seed(2)
    student = options.pop("student", Net)()
    return DistillationModule(student=student, layers=terms() if layers is None else layers, **options)


def no_hooks(module: DistillationModule) -> bool:
    assert module.teacher is not None
    return hooks(module.student, module.teacher.module) == 0


def test_a_fit(make_trainer: MakeTrainer) -> None:
    module = make_module()
    assert not module.distiller.layers.built
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, loader(), loader(shuffle=False))
    logged = trainer.callback_metrics
    assert {f"train_layer_loss/{name}" for name in ("stage1", "stage2", "hidden")} <= set(logged)
    assert logged["temperature_stage1"] == 8.0
    assert 1 < logged["temperature_stage2"] < 20
    assert not any("layer" in name for name in logged if name.startswith("val_"))
    wanted = 0.9 * logged["val_kd_loss"] + 0.1 * logged["val_task_loss"]
    torch.testing.assert_close(logged["val_loss"], wanted)  # that of the logits
    projectors = [term.projector for term in module.distiller.layers]
    assert [type(projector) for projector in projectors] == [nn.Conv2d, nn.Linear, type(None)]
    student, joined, policy = trainer.optimizers[0].param_groups
    assert {id(p) for p in student["params"]} == {id(p) for p in module.student.parameters()}
    assert {id(p) for p in joined["params"]} == {id(p) for x in projectors if x is not None for p in x.parameters()}
    assert policy["weight_decay"] == 0
    assert set(module.student.state_dict()) == set(Net().state_dict())
    assert no_hooks(module)
    copy.deepcopy(module.student)
    pickle.loads(pickle.dumps(module.student))
    assert not any(extractor for extractor in module.distiller.layers._extractors or ())


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_terms_count_after_eval(make_trainer: MakeTrainer) -> None:
    """Lightning keeps the mode of the module; the terms between layers are part of the loss all the same."""
    module = make_module()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module.eval(), loader())
    assert "train_layer_loss/stage1" in trainer.callback_metrics


def test_projectors_are_trained(make_trainer: MakeTrainer) -> None:
    seen: dict[str, Tensor] = {}

    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.update(
                {name: p.detach().clone() for name, p in pl_module.named_parameters() if "projector.weight" in name}
            )

    module = make_module()
    make_trainer(max_epochs=1, callbacks=[Keep()]).fit(module, loader())
    assert len(seen) == 2  # a bias before the softmax of CWD has no gradient
    for name, before in seen.items():
        assert not torch.equal(module.get_parameter(name), before), name


def test_the_teacher_runs_once_per_batch(make_trainer: MakeTrainer) -> None:
    module, calls = make_module(), []
    assert module.teacher is not None
    handle = module.teacher.module.register_forward_hook(lambda *_: calls.append(1))
    make_trainer(max_epochs=1, limit_train_batches=3).fit(module, loader())
    assert len(calls) == 3 + 1  # the first samples', for the projectors
    handle.remove()


@pytest.mark.parametrize("generator", [False, True])
def test_the_first_look_changes_nothing(make_trainer: MakeTrainer, generator: bool) -> None:
    """With equal sizes a run that looks at two samples equals one that need not look, bit for bit."""
    states = []
    for told in (False, True):
        layers = [LayerTerm("stage1", "stage1", HintLoss()), LayerTerm("stage2", "stage2", ChannelWiseKDLoss(), 4.0)]
        if told:
            layers[0].build(4, 4, 4)
            layers[1].build(4, 8, 8)
        module = make_module(layers, teacher=make_teacher(width=4))
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        make_trainer(max_epochs=2).fit(module, loader(generator=generator))
        states.append(module.state_dict())
    assert_same(*states)


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_is_exact(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def run(**fit: Any) -> DistillationModule:
        module = make_module(student=without_dropout)
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(max_epochs=4, callbacks=[saver], enable_checkpointing=True)
        data = TensorDataset(torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 5)
        trainer.fit(module, DataLoader(data, batch_size=8), **fit)
        return module

    through = run()
    for epoch in (0, 2):
        resumed = run(ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"))
        assert_same(resumed.state_dict(), through.state_dict())
    saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    assert saved["kd_lightning"]["projectors"] == [(4, 4, 6), (2, 6, 9), None]
    assert {"distiller.layers.0.projector.weight", "distiller.layers.2.temperature.raw"} <= set(saved["state_dict"])
    assert not any(name.startswith("student.") and "projector" in name for name in saved["state_dict"])


@pytest.fixture
def checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> tuple[DistillationModule, Path]:
    module = make_module()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return module, tmp_path / "last.ckpt"


def test_loading_builds_the_projectors(checkpoint: tuple[DistillationModule, Path], make_trainer: MakeTrainer) -> None:
    trained, path = checkpoint
    loaded = DistillationModule.load_from_checkpoint(path, student=Net(), teacher=make_teacher(), layers=terms())
    assert_same(loaded.state_dict(), trained.state_dict())
    fresh = make_module()
    make_trainer().validate(fresh, loader(shuffle=False), ckpt_path=str(path), verbose=False)
    make_trainer().test(fresh, loader(shuffle=False), ckpt_path=str(path), verbose=False)
    assert_same(fresh.state_dict(), trained.state_dict())
    assert no_hooks(fresh)
    make_trainer(max_epochs=1).fit(loaded, loader())  # and trains on with them


def test_other_layers_than_the_checkpoints_are_an_error(checkpoint: tuple[DistillationModule, Path]) -> None:
    _, path = checkpoint
    with pytest.raises(ValueError, match="was trained with 3 layer terms, but here are 0"):
        DistillationModule.load_from_checkpoint(path, student=Net(), teacher=make_teacher())
    other = terms()
    other[2].teacher_layer = "stage1"
    with pytest.warns(UserWarning, match=r"trained with layers=\[LayerTerm\('stage1' → 'stage1', ChannelWiseKDLoss"):
        DistillationModule.load_from_checkpoint(path, student=Net(), teacher=make_teacher(), layers=other)


# ---- hooks go ----------------------------------------------------------------------------------------------------


class Raise(Callback):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        assert isinstance(pl_module, DistillationModule)
        assert not no_hooks(pl_module)
        raise self.error


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception(make_trainer: MakeTrainer, error: type[BaseException]) -> None:
    module = make_module()
    trainer = make_trainer(callbacks=[Raise(error)])
    with pytest.raises((error, SystemExit)):  # Lightning exits after an interrupt
        trainer.fit(module, loader())
    assert no_hooks(module)
    copy.deepcopy(module.student)
    pickle.dumps(module.student)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader())  # and it can be trained again
    trainer.fit(module, loader())
    assert no_hooks(module)


def test_unknown_layers_end_the_fit_at_its_start(make_trainer: MakeTrainer) -> None:
    module = make_module([LayerTerm("stage1", "stag2", SimilarityPreservingLoss())])
    with pytest.raises(ValueError, match=r"Net has no layer 'stag2'. Close to it: stage2"):
        make_trainer().fit(module, loader())
    assert no_hooks(module)


# ---- together with the rest --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "callback",
    [WeightAveraging(), EMAWeightAveraging(decay=0.5), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
    ids=lambda callback: type(callback).__name__,
)
def test_weight_averaging_has_the_projectors(make_trainer: MakeTrainer, callback: Callback) -> None:
    module = make_module()
    trainer = make_trainer(max_epochs=3, callbacks=[callback])
    trainer.fit(module, loader(), loader(shuffle=False))
    average = callback._average_model  # pyright: ignore[reportAttributeAccessIssue]
    assert sum("projector" in name for name, _ in average.named_parameters()) == 4
    assert trainer.callback_metrics["temperature_stage1"] == 8.0
    assert no_hooks(module)


class OwnOptimizer(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_student_with_its_own_optimiser(make_trainer: MakeTrainer) -> None:
    layers = [LayerTerm("net.stage1", "stage1", HintLoss())]
    module = make_module(layers, student=OwnOptimizer, optimizer=None)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    projector = layers[0].projector
    assert projector is not None
    assert [id(p) for p in trainer.optimizers[0].param_groups[1]["params"]] == [id(p) for p in projector.parameters()]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(make_trainer: MakeTrainer, precision: str) -> None:
    module = make_module(temperature=4.0)
    make_trainer(max_epochs=1, precision=precision).fit(module, loader(), loader(shuffle=False))
    projector = module.distiller.layers[0].projector
    assert isinstance(projector, nn.Conv2d)
    assert projector.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("way", ["module", "student"])
def test_compiled(make_trainer: MakeTrainer, way: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    states = []
    for compiled in (False, True):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        layers = [LayerTerm("stage1", "stage1", ChannelWiseKDLoss(), 4.0), LayerTerm("hidden", "hidden", HintLoss())]
        module = make_module(layers, student=without_dropout)
        model: Any = module
        if compiled and way == "module":
            model = torch.compile(module, backend=counter)
        elif compiled:
            module.student.compile(backend=counter)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        make_trainer(max_epochs=1).fit(model, loader())
        states.append(module.state_dict())
    assert counter.frame_count == (1 if way == "module" else 2)  # the student's second: the first look, in eval mode
    torch.testing.assert_close(states[1], states[0])


def test_monitor_and_finder(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    finder = TemperatureFinder(candidates=(1.0, 4.0), steps=2, monitor="val_acc")
    module = make_module()
    trainer = make_trainer(max_epochs=1, callbacks=[finder, TemperatureMonitor()], logger=CSVLogger(tmp_path))
    trainer.fit(module, loader(), loader(shuffle=False))
    assert len(finder.results) == 2
    assert {"temperature_stage1", "temperature_stage2"} <= set(trainer.callback_metrics)
    assert no_hooks(module)


def test_two_processes_train_as_one(make_trainer: MakeTrainer, tmp_path: Path, teacher: nn.Module) -> None:
    class Report(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.save(pl_module.state_dict(), tmp_path / f"{trainer.world_size}-{trainer.global_rank}.pt")

    for devices in (2, 1):
        torch.manual_seed(7)
        layers = [
            LayerTerm("0", "0", HintLoss(), weight=LinearSchedule(0.0, 1.0)),  # weight 0 is no unused parameter
            LayerTerm("2", "3", HintLoss()),
        ]
        module = DistillationModule(
            student=make_network(norm=False),
            teacher=teacher,
            layers=layers,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
        )
        options = {"strategy": "ddp_fork"} if devices == 2 else {}
        trainer = make_trainer(devices=devices, callbacks=[Report()], use_distributed_sampler=False, **options)
        trainer.fit(module, datamodule=InOrder())
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert "distiller.layers.0.projector.weight" in one
    assert_same(first, second)
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-6)


# ---- the first samples -------------------------------------------------------------------------------------------


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(torch.zeros(1, 8, 8), torch.tensor(0))] * 8)


@pytest.mark.slow
def test_first_samples_of_any_loader() -> None:
    data = make_data(8)
    plain = DataLoader(data, batch_size=4)
    whole = DataLoader(data, batch_size=None, sampler=[[0, 1, 2], [3, 4]])  # pyright: ignore[reportArgumentType]
    assert [len(first_samples(x)[0]) for x in (plain, whole, DataLoader(Stream(), batch_size=4))] == [2, 3, 4]
    assert [len(x[0]) for x in first_samples([plain, plain])] == [2, 2]
    assert first_samples({"a": plain})["a"][0].shape == (2, 8)
    assert first_samples(CombinedLoader({"a": plain}))["a"][0].shape == (2, 8)
    assert first_samples(CombinedLoader([plain, whole], "sequential"))[0].shape == (2, 8)
    workers = DataLoader(data, batch_size=4, num_workers=2, persistent_workers=True)
    assert len(first_samples(workers)[0]) == 2
    assert workers._iterator is None  # none was started


def test_every_policy_is_told_of_the_data(make_trainer: MakeTrainer, teacher: nn.Module) -> None:
    told: list[str] = []

    class Told(ConstantTemperature):
        def __init__(self, name: str) -> None:
            super().__init__(4.0)
            self.name = name

        def setup_data(self, datamodule: object) -> None:
            told.append(self.name)

    term = LayerTerm("0", "0", SimilarityKDLoss(), temperature=Told("layer"))
    module = DistillationModule(make_network(norm=False), teacher, Told("logits"), layers=[term])
    make_trainer(max_epochs=1).fit(module, make_loader())
    assert told == ["logits", "layer"]

    told.clear()
    members = [copy.deepcopy(teacher), teacher]
    ensemble = TeacherEnsemble(members, temperatures=[Told("first"), Told("second")])
    make_trainer(max_epochs=1).fit(DistillationModule(make_network(), ensemble, Told("logits")), make_loader())
    assert told == ["logits", "first", "second"]
