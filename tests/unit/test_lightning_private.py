"""One test for each private name of Lightning that ``kd_lightning/_lightning.py`` holds: it fails where one moves."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.compile import from_compiled
from torch.utils.data import DataLoader

from kd_lightning import _lightning


def make_trainer(**options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    return Trainer(**(quiet | options))


def make_loader(batches: int = 5) -> DataLoader[Any]:
    return DataLoader(RandomDataset(32, 2 * batches), batch_size=2)


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return make_loader(1)


class Watch(Callback):
    """Keeps what a function gives at the end of each batch."""

    def __init__(self, read: Any) -> None:
        self.read = read
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.seen.append(self.read(trainer))


def test_callbacks_and_log_interval() -> None:
    watch = Watch(None)
    trainer = make_trainer(callbacks=[watch], log_every_n_steps=7)
    assert watch in _lightning.callbacks_of(trainer)
    assert _lightning.log_interval(trainer) == 7


def test_datamodule() -> None:
    trainer = make_trainer(callbacks=[watch := Watch(_lightning.datamodule_of)])
    trainer.fit(BoringModel(), make_loader(1))
    data = Data()
    trainer = make_trainer(callbacks=[watch])
    trainer.fit(BoringModel(), datamodule=data)
    assert watch.seen[0] is None
    assert watch.seen[1] is data


def test_attached_trainer() -> None:
    module = BoringModel()
    assert _lightning.attached_trainer(module) is None
    trainer = make_trainer()
    trainer.fit(module, make_loader(1))
    assert _lightning.attached_trainer(module) is trainer


def test_batches_done() -> None:
    trainer = make_trainer(callbacks=[watch := Watch(_lightning.batches_done)], max_epochs=2)
    trainer.fit(BoringModel(), make_loader(3))
    assert watch.seen == [1, 2, 0, 1, 2, 0]  # 0 at the last batch, whose count stands at the start of the next epoch


def test_accumulates_but_for_the_steps_and_the_last_batch() -> None:
    class Module(BoringModel):
        seen: list[bool]

        def on_after_backward(self) -> None:
            self.seen.append(_lightning.accumulates(self.trainer))

    module = Module()
    module.seen = []
    make_trainer(accumulate_grad_batches=2).fit(module, make_loader(5))
    assert module.seen == [True, False, True, False, False]


def test_logged_step_is_that_of_the_losses() -> None:
    written: list[int | None] = []

    class Logger(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "loss" in metrics:
                written.append(step)

    class Module(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.step(batch)
            self.log("loss", loss)
            return loss

    watch = Watch(lambda trainer: (_lightning.logged_step(trainer), _lightning.updates_logs(trainer)))
    make_trainer(callbacks=[watch], logger=Logger(), log_every_n_steps=2).fit(Module(), make_loader(5))
    assert written == [step for step, due in watch.seen if due] == [1, 3]


def test_train_loader_in_setup() -> None:
    loader, seen = make_loader(), []

    class Module(BoringModel):
        def setup(self, stage: str) -> None:
            seen.append(_lightning.train_loader(self.trainer))

    make_trainer().fit(Module(), loader)
    assert seen == [loader]


def test_data_sources_are_what_was_given() -> None:
    train, val = make_loader(), make_loader()
    trainer = make_trainer(callbacks=[watch := Watch(_lightning.data_sources)])
    trainer.fit(BoringModel(), train, val)
    assert watch.seen[0][0] is train
    assert watch.seen[0][1] is val
    make_trainer(callbacks=[watch]).fit(BoringModel(), datamodule=(data := Data()))
    assert watch.seen[-1][0] is data


def test_a_run_that_is_forgotten_leaves_nothing_behind() -> None:
    class Module(BoringModel):
        logged: list[float]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.logged.append(float(batch.sum()))
            self.log("loss", self.logged[-1])
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", batch.sum())

    class RunsBefore(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            loop = trainer.fit_loop
            progress = copy.deepcopy(loop.state_dict())
            loop.run()
            assert set(trainer.callback_metrics) == {"loss", "val_loss"}
            loop.teardown()
            loop.load_state_dict(progress)
            before = private(trainer)
            _lightning.forget_run(trainer)
            assert all(new is not old for new, old in zip(private(trainer), before, strict=True))

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert not trainer.callback_metrics
            assert not trainer.logged_metrics
            assert trainer.current_epoch == trainer.global_step == trainer.fit_loop.total_batch_idx + 1 == 0
            assert not any(part.restarting or part.is_resuming for part in parts(trainer))

    def parts(trainer: Trainer) -> list[Any]:
        return [trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop]

    def private(trainer: Trainer) -> list[Any]:
        train, val = parts(trainer)
        epochs = train._last_train_dl_reload_epoch, val._last_val_dl_reload_epoch
        return [train._combined_loader, val._combined_loader, *epochs]

    module = Module()
    module.logged = []
    trainer = make_trainer(callbacks=[RunsBefore()], limit_val_batches=2, max_epochs=3)
    trainer.fit(module, make_loader(4), make_loader(4))
    assert len(module.logged) == 24
    assert module.logged[:12] == module.logged[12:]
    assert (trainer.current_epoch, trainer.global_step) == (3, 12)


@pytest.mark.parametrize("mode", ["sequential", "min_size"])
def test_is_sequential(mode: Any) -> None:
    assert _lightning.is_sequential(CombinedLoader([make_loader()], mode)) == (mode == "sequential")


def test_is_compiled() -> None:
    module = BoringModel()
    assert not _lightning.is_compiled(module)
    assert _lightning.is_compiled(from_compiled(cast(Any, torch.compile(module, backend="eager"))))


class Configured(BoringModel):
    """Remembers who makes it."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.by_cli = _lightning.is_given_by_cli()


def test_is_given_by_cli(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["test"])
    assert not Configured().by_cli
    cli = LightningCLI(
        Configured, run=False, trainer_defaults={"logger": False}, seed_everything_default=0, save_config_callback=None
    )
    assert cli.model.by_cli


def test_init_arguments_of_a_class_and_its_base() -> None:
    class Base(LightningModule):
        def __init__(self, rate: float, network: Any = None) -> None:
            super().__init__()
            self.arguments = _lightning.init_arguments(self)

    class Derived(Base):
        def __init__(self, name: str, **kwargs: Any) -> None:
            super().__init__(0.5, **kwargs)

    class Outside(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.other = Derived("a", network=[1])

    assert Outside().other.arguments == {"rate": [0.5], "network": [[1], [1]], "name": ["a"]}


def test_the_first_look_comes_before_the_hooks() -> None:
    seen: list[str] = []

    class Module(_lightning.FirstLookModule, BoringModel):
        def take_batch(self, batch: Any) -> Any:
            seen.append("first")
            return batch + 1

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append("before")
            return batch * 2

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            seen.append("transfer")
            return batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append("after")
            return batch

        def setup(self, stage: str) -> None:
            assert torch.equal(self.prepare_batch(torch.ones(2)), torch.full((2,), 4.0))

    make_trainer().fit(Module(), make_loader(1))
    assert seen == ["first", "before", "transfer", "after"] * 2


def test_state_keys_of_a_class_differ_by_their_settings() -> None:
    assert _lightning.state_key(Watch(None), monitor="a") == "Watch{'monitor': 'a'}"


class Count:
    """A command that is a function."""

    help = "Count."

    def extend(self, parser: Any) -> list[str]:
        parser.add_argument("--to", type=int, default=2)
        return ["to"]


class Remembers(BoringModel):
    """Has a hyper-parameter, which a checkpoint holds."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width = width


def test_commands_that_are_functions_and_options_that_a_checkpoint_leaves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    class CLI(_lightning.CommandLine):
        commands: Any = {"count": Count()}  # noqa: RUF012
        parsed = ("count", "validate")

        def run_command(self, command: str) -> None:
            ran.append((command, self.setting("seed_everything"), self.own_arguments(command), self.values(command)))
            if command == "validate":
                super().run_command(command)

    def run(*args: str) -> Any:
        monkeypatch.setattr("sys.argv", ["test"])
        quiet = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        quiet += ["--trainer.limit_val_batches=1", "--trainer.enable_model_summary=false", "--seed_everything=5"]
        return CLI(Remembers, save_config_callback=None, args=[*args, *quiet], auto_configure_optimizers=False)

    monkeypatch.chdir(tmp_path)
    cli = run("count", "--to=3")
    assert ran == [("count", 5, ["to"], {"to": 3, "model": cli.model})]
    trainer = make_trainer()
    trainer.fit(cli.model, make_loader(1))
    trainer.save_checkpoint("a.ckpt")
    content = torch.load("a.ckpt")
    assert content["hyper_parameters"]["width"] == 3
    cli = run("validate", "--ckpt_path=a.ckpt", "--model.width=7")
    assert cli.model.width == 7
    assert "ckpt_path" in ran[-1][2]
    assert cli.trainer.state.finished


def private_names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Return the private names that a module defines, and those that it takes from elsewhere or overrides."""
    defined, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            overrides = "override" in [ast.unparse(each) for each in node.decorator_list]
            (used if overrides else defined).add(node.name)
        elif isinstance(node, ast.Attribute):
            sets = isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
            (defined if sets else used).add(node.attr)
    return tuple({name for name in names if name[0] == "_" != name[-1]} for names in (defined, used))  # pyright: ignore


def test_no_private_name_of_lightning_stands_elsewhere() -> None:
    files = Path(_lightning.__file__).parent.rglob("*.py")
    modules = [private_names(ast.parse(path.read_text())) for path in files if path.name != "_lightning.py"]
    trainer = make_trainer()
    things = [trainer, trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.strategy, LightningCLI, CombinedLoader]
    theirs = {name for thing in [*things, BoringModel(), Callback(), LightningDataModule()] for name in dir(thing)}
    ours = set().union(*(defined for defined, _ in modules)) | set(dir(torch.nn.Module()))
    assert "_generate_state_key" in theirs
    assert set().union(*(used for _, used in modules)) & (theirs - ours) == set()


def test_load_file_reads_paths_and_open_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.ckpt")
    assert torch.equal(_lightning.load_file(tmp_path / "a.ckpt", True)["a"], torch.ones(2))
    with open(tmp_path / "a.ckpt", "rb") as file:
        assert torch.equal(_lightning.load_file(file, True)["a"], torch.ones(2))


def test_a_restricted_classmethod_is_one_of_the_class() -> None:
    class Base:
        @_lightning.restricted_classmethod
        def name(cls) -> str:
            return cls.__name__

    class Derived(Base):
        @_lightning.restricted_classmethod
        def name(cls) -> str:
            return super().name()

    assert Derived.name() == "Derived"
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        Derived().name()


def test_an_instance_may_wrap_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = BoringModel(), []
    look = getattr(module, _lightning.FIRST_LOOK)

    def seeing(batch: Any, *rest: Any, **named: Any) -> Any:
        seen.append(batch)
        return look(batch, *rest, **named)

    monkeypatch.setitem(vars(module), _lightning.FIRST_LOOK, seeing)
    make_trainer().fit(module, make_loader(1))
    assert len(seen) == 1
