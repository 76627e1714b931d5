"""The verdict of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_lightning.ranking import Mode
from kd_lightning.sweep.results import SweepCell, SweepResult, SweepRun


def cell(temperature: float | None, scores: list[float]) -> SweepCell:
    weight = 0.0 if temperature is None else 0.5
    runs = [SweepRun(i, temperature, weight, 0.5, i, "complete", score) for i, score in enumerate(scores)]
    return SweepCell(temperature, weight, runs)


@pytest.mark.parametrize(
    ("mode", "scores", "baseline", "said"),
    [
        ("max", [0.90, 0.92, 0.94], [0.80, 0.81, 0.85], "leads no teacher (0.8200 ± 0.0265) by 0.1000 ± 0.0058 "
         "(standard error over 3 paired seeds): more than two standard errors"),
        ("max", [0.90, 0.70, 0.80], [0.80, 0.75, 0.82], "leads no teacher (0.7900 ± 0.0361) by 0.0100 ± 0.0458 "
         "(standard error over 3 paired seeds): within the noise"),
        ("max", [0.70, 0.70, 0.71], [0.80, 0.80, 0.80], "trails no teacher (0.8000 ± 0.0000) by 0.0967 ± 0.0033 "
         "(standard error over 3 paired seeds): more than two standard errors"),
        ("min", [7.0, 6.0, 8.0], [9.0, 9.0, 9.0], "leads no teacher (9.0000 ± 0.0000) by 2.0000 ± 0.5774 "
         "(standard error over 3 paired seeds): more than two standard errors"),
        ("max", [0.81, 0.91], [0.80, 0.90], "leads no teacher (0.8500 ± 0.0707) by 0.0100 ± 0.0000 "
         "(standard error over 2 paired seeds): too few to tell"),
        ("max", [0.70], [0.80], "trails no teacher (0.8000) by 0.1000 on one seed: --seeds 3 shows how noisy that is"),
    ],
)  # fmt: skip
def test_the_choice_is_held_against_the_baseline(
    mode: Mode, scores: list[float], baseline: list[float], said: str, tmp_path: Path
) -> None:
    result = SweepResult([cell(4.0, scores)], cell(None, baseline), "val_acc", mode, tmp_path, "")
    assert result.verdict()[1] == f"it {said}"
