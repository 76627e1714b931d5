from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

from kd_lightning import FrozenTeacher
from kd_lightning.cli import main
from kd_lightning.teachers import LogitsFile

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
OUTPUT = "--output=made/ahead.cache"


@pytest.fixture(autouse=True)
def _project_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])


def build(*arguments: str, config: str = "digits_cached") -> None:
    main(["cache-teacher", "--config", f"configs/{config}.yaml", *QUIET, *arguments])


def test_a_cache_is_made_ahead_and_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    build("--data.num_workers=2")
    path = Path("logs/digits_cached/teacher.cache")
    printed = capsys.readouterr().out
    assert f"TeacherCache({path}, 264 of 264 rows, 25 bytes each)" in printed
    assert "teacher.val.cache, 145 of 145 rows, 25 bytes each)" in printed
    content = path.read_bytes()
    assert len(content) == 4096 + 264 * 25

    runs: list[bool] = []
    call = FrozenTeacher._run
    monkeypatch.setattr(FrozenTeacher, "_run", lambda self, inputs: runs.append(True) or call(self, inputs))
    fit = ["--trainer.max_epochs=5", "--trainer.limit_val_batches=0", "--trainer.callbacks=null"]
    main(["fit", "--config", "configs/digits_cached.yaml", *QUIET, *fit])
    assert len(runs) == 1
    assert path.read_bytes() == content


def test_a_progress_bar_counts_the_batches(capsys: pytest.CaptureFixture[str]) -> None:
    bar = "--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar"
    build("--trainer.enable_progress_bar=true", bar, OUTPUT)
    printed = capsys.readouterr()
    assert "12/12" in printed.out + printed.err


def test_an_interrupted_build_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = FrozenTeacher.logits
    calls: list[int] = []

    def stop(self: FrozenTeacher, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError
        return stopped(self, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(FrozenTeacher, "logits", stop)
    with pytest.raises(MemoryError):
        build(OUTPUT)
    before = Path("made/ahead.cache").read_bytes()
    build(OUTPUT)
    assert len(calls) == 6 + 12 - 5 + 7  # the last are those of validation
    after = Path("made/ahead.cache").read_bytes()
    written = 4096 + 4 * 264, 4096 + 4 * 264 + 20 * 22 * 5
    assert before[slice(*written)] == after[slice(*written)]
    build(OUTPUT)  # there is nothing left to do
    assert len(calls) == 6 + 12 - 5 + 7
    damaged = bytearray(after)
    damaged[5200] ^= 1
    Path("made/ahead.cache").write_bytes(damaged)
    with pytest.raises(ValueError, match="row 2 does not match its checksum"):
        build(OUTPUT)


def test_a_column_of_logits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    build(OUTPUT, "--format=arrow", config="digits")
    assert "made/ahead.arrow\nmade/ahead.val.arrow" in capsys.readouterr().out
    found = LogitsFile("made/ahead.val.arrow").logits({"x": torch.ones(1), "id": torch.tensor([0, 144])})
    assert found.shape == (2, 10)


def test_output_gives_a_cache_to_a_teacher_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    build(OUTPUT, config="digits")
    assert "TeacherCache(made/ahead.cache, 66 of 66 rows, 25 bytes each)" in capsys.readouterr().out


def test_what_cannot_be_cached() -> None:
    with pytest.raises(ValueError, match="this teacher has no cache"):
        build(config="digits")
    with pytest.raises(TypeError, match="needs a DistillationModule with a teacher, got ClassificationModule"):
        build(config="digits_baseline")
    with pytest.raises(ValueError, match="random augmentation"):
        build(OUTPUT, "--data.augment=true", config="digits")


def test_data_that_do_not_say_which_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from kd_lightning.datamodules import DigitsDataModule\n"
        "class Mine(DigitsDataModule):\n"
        "    def index_training(self, index): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = yaml.safe_load((ROOT / "configs" / "digits_cached.yaml").read_text())
    config["data"]["class_path"] = "mine.Mine"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="Mine does not say which samples its batches have"):
        main(["cache-teacher", "--config", "mine.yaml", *QUIET])
