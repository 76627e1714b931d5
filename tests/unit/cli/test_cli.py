from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kd_lightning import DistillationModule, TeacherEnsemble
from kd_lightning.cli import main
from kd_lightning.datamodules import DigitsDataModule
from kd_lightning.temperature import (
    ClassFrequencyTemperature,
    CosineSchedule,
    ScheduledTemperature,
    Signals,
    Temperature,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
DIGITS = str(ROOT / "configs" / "digits.yaml")
TEACHER = str(ROOT / "configs" / "digits_teacher.safetensors")


def run(*arguments: str) -> None:
    """Run the command in this process, as the console script does."""
    main([*arguments])


def small(folder: Path, epochs: int = 1) -> list[str]:
    """Make a run of digits.yaml short and quiet, with everything it writes in folder."""
    return [
        f"--trainer.max_epochs={epochs}",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--model.teacher.checkpoint={TEACHER}",
    ]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short run of the main job, shared by the tests that look at what it left."""
    folder = tmp_path_factory.mktemp("run")
    argv, sys.argv = sys.argv, ["kd-lightning"]
    try:
        run("fit", "--config", DIGITS, *small(folder, epochs=3))
    finally:
        sys.argv = argv
    return folder / "digits" / "version_0"


def best_score(checkpoint: dict[str, Any]) -> float:
    """Return the score of the configuration's ModelCheckpoint that has a monitor."""
    states = checkpoint["callbacks"].items()
    (score,) = [state["best_model_score"] for name, state in states if "'monitor': 'val_acc'" in name]
    return float(score)


def checkpoint_of(folder: Path) -> Path:
    return folder / "checkpoints" / "best.ckpt"


def last_value(folder: Path, name: str) -> float:
    header, *rows = [row.split(",") for row in (folder / "metrics.csv").read_text().splitlines()]
    return [float(row[header.index(name)]) for row in rows if row[header.index(name)]][-1]


def test_fit_leaves_checkpoint_logs_and_config(run_folder: Path) -> None:
    assert checkpoint_of(run_folder).is_file()
    assert 0 < last_value(run_folder, "val_acc") <= 1
    assert last_value(run_folder, "val_teacher_acc") > 0.97
    assert 2 < last_value(run_folder, "temperature_student") < 8
    config = yaml.safe_load((run_folder / "run_config.yaml").read_text())
    assert config["model"]["init_args"]["temperature"]["class_path"].endswith("CosineSchedule")
    content = torch.load(checkpoint_of(run_folder), weights_only=True)
    assert not any("teacher" in name for name in content["state_dict"])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")  # runs twice there
def test_the_saved_config_runs_again_and_is_not_overwritten(run_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "run_config.yaml"
    mine.write_text((run_folder / "run_config.yaml").read_text())
    before = mine.read_text()
    for _ in range(2):  # without a logger the log folder is the current one, where the user's file lies
        run("fit", "--config", str(mine), "--trainer.logger=false", "--trainer.max_epochs=1",
            "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}")  # fmt: skip
    assert mine.read_text() == before
    assert len(list(tmp_path.glob("run_config*.yaml"))) == 3


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # another run goes on elsewhere
def test_validate_gives_the_same_accuracy(run_folder: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(checkpoint_of(run_folder), weights_only=True)
    best = best_score(checkpoint)
    run("validate", "--config", DIGITS, *small(tmp_path), "--ckpt_path", str(checkpoint_of(run_folder)))
    assert last_value(tmp_path / "digits" / "version_0", "val_acc") == pytest.approx(best, abs=1e-6)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # another run goes on elsewhere
def test_predict_writes_the_logits(run_folder: Path, tmp_path: Path) -> None:
    run("predict", "--config", DIGITS, *small(tmp_path), "--ckpt_path", str(checkpoint_of(run_folder)))
    logits = torch.load(tmp_path / "digits" / "version_0" / "predictions.pt", weights_only=True)
    data = DigitsDataModule()
    data.setup("test")
    assert data.test_dataset is not None
    assert logits.shape == (len(data.test_dataset), 10)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")  # none are given
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # the Trainer's own is like the newest's
def test_validate_takes_the_model_from_the_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    data = ["--data=DigitsDataModule", "--data.batch_size=22", "--data.train_fraction=0.05", "--data.in_memory=true"]
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.accelerator=cpu"]
    run(
        "validate", *data, *logger, "--trainer.enable_progress_bar=false", "--ckpt_path", str(checkpoint_of(run_folder))
    )
    assert last_value(tmp_path / "lightning_logs" / "version_0", "val_acc") > 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # another run goes on elsewhere
def test_what_the_user_types_wins_over_the_checkpoint(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["--model.kd_weight=0.25", "--model.temperature=3.0"]
    with pytest.warns(UserWarning, match="the checkpoint was trained with (temperature|kd_weight)="):
        run(
            "fit", "--config", DIGITS, *small(tmp_path, epochs=4), *typed, "--ckpt_path", str(checkpoint_of(run_folder))
        )
    assert last_value(tmp_path / "digits" / "version_0", "temperature_student") == 3.0
    assert last_value(tmp_path / "digits" / "version_0", "effective_kd_weight") == pytest.approx(0.25 * 9)


FRESH = """
import sys, torch
from lightning.pytorch import Trainer
from kd_lightning import DistillationModule
from kd_lightning.datamodules import DigitsDataModule
torch.set_num_threads(1)
path, target = sys.argv[1:]
for generation in range(3):
    module = DistillationModule.load_from_checkpoint(path, weights_only=True)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    data = DigitsDataModule(batch_size=22, train_fraction=0.05, in_memory=True)
    (metrics,) = trainer.validate(module, data, verbose=False)
    print("val_acc", metrics["val_acc"], "temperature", module.distiller.temperature)
    path = f"{target}/{generation}.ckpt"
    trainer.save_checkpoint(path)
"""


def test_loads_in_a_fresh_process_over_three_generations(run_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FRESH, str(checkpoint_of(run_folder)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("val_acc")]
    assert len(lines) == 3
    assert len(set(lines)) == 1
    assert "CosineSchedule(init_value=8.0" in lines[0]
    best = torch.load(checkpoint_of(run_folder), weights_only=True)
    score = best_score(best)
    assert float(lines[0].split()[1]) == pytest.approx(score, abs=1e-6)


def test_short_names_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DistillationModule] = []
    monkeypatch.setattr(DistillationModule, "on_fit_end", lambda self: seen.append(self))
    flags = ["=LinearSchedule", ".init_value=9", ".end_value=3"]
    temperature = [f"--model.temperature{flag}" for flag in flags]
    run("fit", "--config", DIGITS, *small(tmp_path), *temperature, "--trainer.fast_dev_run=true")
    policy = seen[0].distiller.temperature
    assert isinstance(policy, ScheduledTemperature)
    assert str(policy.schedule) == "LinearSchedule(init_value=9.0, end_value=3.0, until=1.0)"


def test_print_config_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", DIGITS, "--print_config")
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["kd_weight"] == 0.9
    assert printed["seed_everything"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.temprature=4"], "temprature"),
        (["--model.temperature=CosinSchedule"], "CosinSchedule"),
        (["--model.temperature=0"], "temperature must be a positive, finite number"),
        (["--model.teacher.checkpoint=nowhere.pt"], r"no teacher checkpoint at 'nowhere.pt'"),
        (["--data.val_fraction=2"], "val_fraction"),
        (["--trainer.max_epoch=2"], "max_epoch"),
    ],
)
def test_bad_input_gives_one_clear_error(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as error:
        run("fit", "--config", DIGITS, *small(tmp_path), *arguments)
    assert message in capsys.readouterr().err + str(error.value)


def test_a_checkpoint_of_plain_python_needs_a_config(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="does not say which model it is of"):
        run("validate", "--ckpt_path=plain.ckpt")


def test_a_checkpoint_is_looked_for_from_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the current folder first, then from the configuration's folder and the one above it."""
    seen: list[DistillationModule] = []
    monkeypatch.setattr(DistillationModule, "on_fit_end", lambda self: seen.append(self))
    (tmp_path / "configs").mkdir()
    config = yaml.safe_load(Path(DIGITS).read_text())
    config["trainer"] |= {"fast_dev_run": True, "enable_progress_bar": False}
    for name in ("configs/digits_teacher.safetensors", "digits_teacher.safetensors"):
        config["model"]["init_args"]["teacher"]["init_args"]["checkpoint"] = name
        (tmp_path / "configs" / f"{len(name)}.yaml").write_text(yaml.safe_dump(config))
    there = tmp_path / "configs" / "digits_teacher.safetensors"
    there.write_bytes(Path(TEACHER).read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("../configs/34.yaml", "../configs/26.yaml"):
        run("fit", "--config", name)
    Path("digits_teacher.safetensors").write_bytes(Path(TEACHER).read_bytes())
    run("fit", "--config", "../configs/26.yaml")
    found = [str(module.teacher).partition("checkpoint='")[2].partition("'")[0] for module in seen]
    found[0] = str(Path(found[0]).resolve())
    assert found == [str(there.resolve()), "../configs/digits_teacher.safetensors", "digits_teacher.safetensors"]


def test_a_class_in_the_current_folder(tmp_path: Path) -> None:
    """The console script is started as `python FILE`, whose sys.path lacks the current folder."""
    (tmp_path / "own_policy.py").write_text("from kd_lightning.schedules import CosineSchedule as SawTooth\n")
    script = Path(sys.executable).with_name("kd-lightning")
    options = ["--model.temperature=own_policy.SawTooth", "--model.temperature.init_value=8"]
    command = [str(script), "fit", "--config", DIGITS, *options, "--model.temperature.end_value=2", "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_python_and_yaml_train_alike(run_folder: Path, tmp_path: Path, make_trainer: Any) -> None:
    """The same recipe in Python gives the same numbers."""
    from lightning.pytorch import seed_everything

    from kd_lightning import FrozenTeacher
    from kd_lightning.models import DigitsCNN

    seed_everything(0, workers=True)
    data = DigitsDataModule(batch_size=22, train_fraction=0.05, in_memory=True)
    student = DigitsCNN(channels=(4, 8), hidden=16)
    module = DistillationModule(
        student=student,
        teacher=FrozenTeacher(DigitsCNN(), TEACHER),
        temperature=CosineSchedule(8.0, 2.0),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
    )
    trainer = make_trainer(max_epochs=3)
    trainer.fit(module, data)
    for name in ("val_acc", "val_loss", "val_task_loss"):
        assert float(trainer.callback_metrics[name]) == pytest.approx(last_value(run_folder, name), rel=1e-6)


def test_console_script_and_module_are_there() -> None:
    done = subprocess.run([sys.executable, "-m", "kd_lightning", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fit" in done.stdout


ENSEMBLE = """
model:
  init_args:
    teacher:
      class_path: kd_lightning.TeacherEnsemble
      init_args:
        teachers:
          - class_path: kd_lightning.FrozenTeacher
            init_args: {module: DigitsCNN, checkpoint: TEACHER}
          - class_path: kd_lightning.FrozenTeacher
            init_args: {module: DigitsCNN, checkpoint: TEACHER, precision: bf16, micro_batch_size: 16}
        temperatures:
          - 2.0
          - {class_path: CosineSchedule, init_args: {init_value: 8.0, end_value: 2.0}}
        weights: [3, {class_path: LinearSchedule, init_args: {init_value: 0.5, end_value: 1.0}}]
        combine: losses
        routing: [[0, 1, 2, 3, 4, 5, 6], [5, 6, 7, 8, 9]]
"""


def test_an_ensemble_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DistillationModule] = []
    monkeypatch.setattr(DistillationModule, "on_fit_end", lambda self: seen.append(self))
    mine = tmp_path / "ensemble.yaml"
    mine.write_text(ENSEMBLE.replace("TEACHER", TEACHER))
    options = [option for option in small(tmp_path) if "teacher" not in option]
    run("fit", "--config", DIGITS, "--config", str(mine), *options)
    teacher = seen[0].teacher
    assert isinstance(teacher, TeacherEnsemble)
    assert [getattr(member, "precision", None) for member in teacher.teachers] == [None, "bf16"]
    assert teacher.settings.startswith("combine='losses', temperatures=[ConstantTemperature(value=2), Scheduled")
    assert last_value(tmp_path / "digits" / "version_0", "val_teacher_acc") > 0.9
    plots = tmp_path / "plots"
    run("plot-temperature", "--config", DIGITS, "--config", str(mine), "--output", str(plots))
    assert (plots / "temperature_softening.png").is_file()


def test_plot_temperature_draws_without_training(tmp_path: Path) -> None:
    where = ["--output", str(tmp_path / "plots"), f"--model.teacher.checkpoint={TEACHER}"]
    run("plot-temperature", "--config", DIGITS, *where)
    drawn = {path.name: path for path in (tmp_path / "plots").iterdir()}
    assert set(drawn) == {"temperature_schedule.png", "temperature_softening.png"}
    first = drawn["temperature_schedule.png"].read_bytes()
    assert first.startswith(b"\x89PNG")
    run("plot-temperature", "--config", DIGITS, *where, "--model.temperature=2.0")
    assert drawn["temperature_schedule.png"].read_bytes() != first


def test_class_counts_come_from_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DistillationModule] = []
    monkeypatch.setattr(DistillationModule, "on_fit_end", lambda self: seen.append(self))
    long_tail = ["--data.imbalance_factor=0.1", "--data.train_fraction=1.0", "--data.batch_size=64"]
    policy = ["--model.temperature=ClassFrequencyTemperature", "--trainer.fast_dev_run=true"]
    run("fit", "--config", DIGITS, *small(tmp_path), *long_tail, *policy)
    temperatures = seen[0].distiller.temperature
    assert isinstance(temperatures, ClassFrequencyTemperature)
    logits = torch.zeros(2, 10)
    out = temperatures(Signals(logits, logits))
    assert isinstance(out, Temperature)
    assert out.teacher.shape == (1, 10)
    assert out.teacher[0, 0] == out.teacher.min()  # class 0 is the most frequent one
    assert out.teacher[0, 9] == out.teacher.max()
