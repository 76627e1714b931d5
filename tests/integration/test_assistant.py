"""The chain teacher → assistant → student, as two runs of the command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kd_lightning import DistillationModule, FrozenTeacher
from kd_lightning.cli import main
from kd_lightning.models import DigitsCNN

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_student_learns_from_the_assistant_that_the_first_run_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)  # paths in the files start at the project's folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    runs: list[DistillationModule] = []
    monkeypatch.setattr(DistillationModule, "on_fit_end", lambda self: runs.append(self))
    for name in ("digits_assistant", "digits_from_assistant"):
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        main(["fit", "--config", f"configs/{name}.yaml", "--trainer.max_epochs=30", *quiet])
    first, second = runs
    assert first.teacher is not None
    assert second.teacher is not None
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in
             (first.teacher.module, first.student, second.teacher.module, second.student)]  # fmt: skip
    assert sizes == [38330, 9826, 9826, 2582]
    checkpoint = "logs/digits_assistant/version_0/checkpoints/best.ckpt"
    assert second.teacher.fingerprint() == FrozenTeacher(DigitsCNN((8, 16), hidden=32), checkpoint).fingerprint()
    scores = [float(run.trainer.callback_metrics["val_acc"]) for run in runs]
    assert min(scores) > 0.7  # ten classes; untrained it is 0.1
    best = torch.load(checkpoint, weights_only=True)["callbacks"]
    (best_score,) = [state["best_model_score"] for name, state in best.items() if "val_acc" in name]
    assert float(second.trainer.callback_metrics["val_teacher_acc"]) == pytest.approx(float(best_score), abs=1e-6)
