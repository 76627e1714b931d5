"""The verdict of a sweep, and the report."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest

from kd_lightning.ranking import Mode
from kd_lightning.sweep.report import write_report
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


def with_tests(cell: SweepCell, scores: list[float]) -> SweepCell:
    runs = [replace(run, test={"test_acc": score}) for run, score in zip(cell.runs, scores, strict=True)]
    return replace(cell, runs=runs)


@pytest.mark.parametrize(
    ("scores", "tests", "warning"),
    [
        ([0.90, 0.92], ([0.90, 0.92], [0.80, 0.82]), ""),
        ([0.80, 0.80], ([0.80, 0.80], [0.80, 0.80]), ""),
        (
            [0.90, 0.92],
            ([0.78, 0.80], [0.80, 0.82]),
            "the choice loses to the student without a teacher by test_acc: val_acc 0.9100 ± 0.0141 against "
            "0.8000 ± 0.0000; test_acc 0.7900 ± 0.0141 against 0.8100 ± 0.0141",
        ),
        (
            [0.70, 0.70],
            ([0.90, 0.90], [0.80, 0.82]),
            "the choice loses to the student without a teacher by val_acc: val_acc 0.7000 ± 0.0000 against "
            "0.8000 ± 0.0000; test_acc 0.9000 ± 0.0000 against 0.8100 ± 0.0141",
        ),
        (
            [0.70, 0.70],
            ([], []),
            "the choice loses to the student without a teacher by val_acc: val_acc 0.7000 ± 0.0000 against "
            "0.8000 ± 0.0000",
        ),
    ],
)
def test_a_choice_that_loses_is_told_with_the_scores_of_both(
    scores: list[float], tests: tuple[list[float], list[float]], warning: str, tmp_path: Path
) -> None:
    chosen, baseline = cell(4.0, scores), cell(None, [0.8, 0.8])
    if tests[0]:
        chosen, baseline = with_tests(chosen, tests[0]), with_tests(baseline, tests[1])
    result = SweepResult([chosen], baseline, "val_acc", "max", tmp_path)
    assert result.warning == warning
    assert (result.verdict()[-1] == warning) is bool(warning)


def test_nothing_is_chosen_beside_a_baseline(tmp_path: Path) -> None:
    pruned = SweepCell(4.0, 0.5, [SweepRun(0, 4.0, 0.5, 0.5, 0, "pruned", 0.3)])
    result = SweepResult([pruned], cell(None, [0.8, 0.9]), "val_acc", "max", tmp_path)
    assert result.verdict() == ["no cell has all its runs complete: nothing is chosen; no teacher 0.8500 ± 0.0707"]
    assert result.warning == ""


def test_the_report_is_readable_on_a_phone(tmp_path: Path) -> None:
    """Text of 14 pixels or more; what is wider than the page scrolls in a box of its own."""
    runs = [
        SweepRun(0, 4.0, 0.5, 0.5, 0, "complete", 0.7, folder="runs/0000"),
        SweepRun(1, 4.0, 0.5, 0.5, 1, "complete", 0.8, folder="runs/0 <1>"),
        SweepRun(2, 4.0, 0.5, 0.5, 2, "complete", 0.8, folder="runs/deleted"),
    ]
    for run in runs[:2]:
        (tmp_path / run.folder).mkdir(parents=True)
    result = SweepResult([SweepCell(4.0, 0.5, runs)], cell(None, [0.8, 0.9, 0.9]), "val_acc", "max", tmp_path)
    write_report(result, {"model": "x" * 200}, "f", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = ET.fromstring(text.partition("\n")[2])
    (viewport,) = [meta.get("content") for meta in page.iter("meta") if meta.get("name") == "viewport"]
    assert viewport == "width=device-width, initial-scale=1"
    style = "".join(page.find("head/style").itertext())  # pyright: ignore[reportOptionalMemberAccess]
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)rem", style)]
    assert min(sizes) * 16 >= 14
    assert "body { font: 16px" in style
    boxes = [div for div in page.iter("div") if div.get("class") == "wide"]
    assert len([*page.iter("table"), *page.iter("img")]) == len(boxes) == 4
    assert all(len(box) == 1 and box[0].tag in ("table", "img") for box in boxes)
    links = {link.text: link.get("href", "") for link in page.iter("a")}
    assert set(links) == {"0", "1"}
    assert all((tmp_path / unquote(link)).is_dir() for link in links.values())
    warnings = ["".join(line.itertext()) for line in page.iter("li") if line.get("class") == "warning"]
    assert warnings == [result.warning] != [""]
