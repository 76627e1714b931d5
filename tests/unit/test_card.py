"""The card of a run and of a sweep."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from kd_lightning import FrozenTeacher
from kd_lightning.card import write_card
from kd_lightning.cli import main
from kd_lightning.models import DigitsCNN

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_card_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = ["--trainer.max_epochs=3", "--trainer.enable_progress_bar=false"]
    main(["fit", "--config", "configs/digits.yaml", *quiet])
    run = Path("logs/digits/version_0")
    capsys.readouterr()
    main(["card", "--run", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "card.md")
    text = (run / "card.md").read_text()
    network = DigitsCNN(channels=(16, 32), hidden=64)
    teacher = FrozenTeacher(network, checkpoint="configs/digits_teacher.safetensors")
    assert f"| teacher's fingerprint | `{teacher.fingerprint()}` |" in text
    assert "CosineSchedule(init_value=8.0, end_value=2.0" in text
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = max(float(row["val_acc"]) for row in rows if row["val_acc"])
    assert f"| val_acc | {best:.4f} |" in text
    assert (run / "card_temperature.png").stat().st_size > 1000
    assert "![Temperature over the run](card_temperature.png)" in text
    command = re.search(r"```bash\nkd-lightning (.*)\n```", text)
    assert command is not None
    main([*command[1].split(), *quiet])
    first, again = ((Path("logs/digits") / f"version_{n}" / "metrics.csv").read_text() for n in (0, 1))
    assert first == again


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_card_of_a_sweep() -> None:
    pytest.importorskip("optuna")
    quiet = ["--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
    sweep = ["--temperatures", "2", "4", "--kd-weights", "0.9", "--seeds", "2"]
    main(["sweep", "--config", "configs/digits.yaml", *sweep, *quiet])
    text = write_card("sweep").read_text()
    with Path("sweep/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    mean = {t: sum(float(r["val_acc"]) for r in rows if r["temperature"] == t) / 2 for t in ("2.0", "4.0", "")}
    best = max(("2.0", "4.0"), key=lambda t: mean[t])
    assert re.search(rf"\| \*\*{best}\*\* \| 0.9 \| 2 \| {mean[best]:.4f} ± ", text)
    assert re.search(rf"\| no teacher \| 0.0 \| 2 \| {mean['']:.4f} ± ", text)
    assert f"ConstantTemperature(value={float(best):g})" in text
    command = re.search(r"```bash\nkd-lightning (.*)\n```", text)
    assert command is not None
    main([*command[1].split(), "--output", "again"])
    with Path("again/results.csv").open() as file:
        assert [row["val_acc"] for row in csv.DictReader(file)] == [row["val_acc"] for row in rows]


@pytest.mark.parametrize("args", [[], ["logs"], ["--run"], ["--run="], ["--config", "x"]])
def test_command_line_without_a_folder(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["card", *args])
    assert stop.value.code == 2
    got = " ".join(args)
    wanted = f"error: card takes the folder of a run or a sweep: kd-lightning card --run DIR, got {got!r}."
    assert capsys.readouterr().err.strip() == wanted


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["card", "--help"])
    assert capsys.readouterr().out.startswith("usage: kd-lightning card --run DIR")


def test_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        write_card(tmp_path)
    assert str(raised.value) == (
        f"{str(tmp_path)!r} (from the folder {str(Path.cwd())!r}) is the folder of no run and no sweep: a run's has "
        "run_config.yaml, which kd-lightning fit writes, a sweep's has results.csv."
    )
