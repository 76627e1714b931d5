"""The atlas of temperatures: pairing, correction, resuming, and a page that says what its CSV says."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.atlas import page, paired, plots, rows, tasks
from benchmarks.atlas.__main__ import CSV
from benchmarks.atlas.arms import POLICIES
from benchmarks.atlas.plan import STUDIES
from benchmarks.atlas.rows import Key, Scores
from benchmarks.atlas.train import train
from kd_lightning import temperature
from kd_lightning.temperature import TemperaturePolicy

SEEDS = tasks.TASKS["digits"].seeds


def _key(rate: float = 0.02, seed: int = 0, arm: tuple[str, float] = ("fixed", 4.0)) -> Key:
    return Key("digits", "few", "adamw", "x1", *arm, rate, seed)


def test_pairs_are_of_the_same_seed() -> None:
    ours, theirs = {2: 5.0, 0: 1.0, 1: 3.0}, {0: 0.0, 1: 1.0, 2: 2.0}
    difference = paired.paired(ours, theirs)  # gains 1, 2, 3
    assert difference.mean == 2.0
    assert difference.error == pytest.approx(3**-0.5)
    assert difference.p == pytest.approx(0.0741799, rel=1e-5)  # Student's t = 3.4641 at two degrees of freedom
    with pytest.raises(ValueError, match=r"need the same seeds, two or more, got \[0, 1, 2\] and \[0, 1\]"):
        paired.paired(ours, {0: 0.0, 1: 1.0})


def test_holm_adjusts_for_the_number_of_comparisons() -> None:
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.9, 0.6]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_the_learning_rate_is_chosen_on_validation_and_unfinished_arms_are_left_out() -> None:
    rates = tasks.RATES["adamw"]
    found = {
        _key(rate, seed): Scores(val_last, test_last, 50.0, 50.0)
        for rate, val_last, test_last in zip(rates, (80.0, 90.0, 85.0, 84.0), (99.0, 70.0, 99.0, 99.0), strict=True)
        for seed in range(SEEDS)
    }
    setting = _key().setting
    arm = paired.chosen(found, "last")[setting]["fixed", 4.0]
    assert (arm.rate, arm.tests, arm.val) == (rates[1], dict.fromkeys(range(SEEDS), 70.0), 90.0)
    del found[_key(rates[0], 3)]
    assert not paired.chosen(found, "last")


def test_the_best_constant_is_chosen_on_validation() -> None:
    arms = {
        ("fixed", 4.0): paired.Chosen(0.1, {0: 99.0, 1: 99.0}, 90.0),
        ("equal", 8.0): paired.Chosen(0.1, {0: 70.0, 1: 72.0}, 91.0),
        ("none", 0.0): paired.Chosen(0.1, {0: 99.0, 1: 99.0}, 95.0),
        ("EntropyTemperature", 0.0): paired.Chosen(0.1, {0: 72.0, 1: 74.5}, 92.0),
    }
    assert paired.best_constant(arms) == ("equal", 8.0)
    results = {_key().setting: arms}
    ((_, difference),) = paired.against_constant(results, [("EntropyTemperature", 0.0)]).items()
    assert (difference.mean, difference.error) == (2.25, 0.25)


def test_a_rerun_trains_only_what_is_missing(tmp_path: Path) -> None:
    trained: list[Key] = []

    def train(key: Key) -> Scores:
        trained.append(key)
        return Scores(1.0, 2.0, 3.0, float(key.seed))

    path, keys = tmp_path / "atlas.csv", [_key(seed=0), _key(seed=1)._replace(teacher="smoothed"), _key(seed=2)]
    assert rows.run(path, keys[:2], train) == 2
    path.write_text(path.read_text()[:-3])  # the process was killed while it wrote the second row
    assert rows.run(path, keys, train) == 2
    assert trained == [keys[0], keys[1], keys[1], keys[2]]
    assert rows.run(path, keys, train) == 0
    assert rows.read(path) == {key: Scores(1.0, 2.0, 3.0, float(key.seed)) for key in keys}


@pytest.mark.slow
@pytest.mark.parametrize("arm", [("none", 0.0), ("LearnableTemperature", 0.0), ("AdaptiveTemperature", 0.0)])
def test_a_training_gives_the_same_row_again(arm: tuple[str, float]) -> None:
    key = Key("digits", "few", "sgd", "x1/4", *arm, 0.06, 0)
    assert train(key) == train(key)


@pytest.mark.slow
def test_a_row_of_the_file_is_what_its_training_gives() -> None:
    key = Key("digits", "few", "adamw", "x1/4", "equal", 8.0, 0.02, 1)
    assert train(key) == pytest.approx(rows.read(CSV)[key], abs=0.3)  # one image of 360, where rounding differs


@pytest.mark.slow
def test_a_calibrated_teacher_fits_the_validation_part_and_a_long_tail_is_one() -> None:
    t = tasks.calibration("digits", "many", 0)
    (_, y), (x_val, y_val), _ = tasks.data("digits", 0)
    logits = tasks.outputs(tasks.teacher("digits", "many", 0, 0.0, 600), x_val)
    losses = [float(tasks.cross_entropy(logits / (t * factor), y_val)) for factor in (0.9, 1.0, 1.1)]
    assert losses[1] < min(losses[0], losses[2])
    calibrated = tasks.teacher_logits("digits", "many", 0, "calibrated")
    torch.testing.assert_close(calibrated * t, tasks.teacher_logits("digits", "many", 0))
    counts = y[tasks.rows_of("longtail", y)].bincount().tolist()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == int((y == 0).sum())
    assert counts[-1] == round(int((y == 9).sum()) / tasks.IMBALANCE)


def test_every_exported_policy_is_in_a_study_or_said_not_to_be() -> None:
    exported = {getattr(temperature, name) for name in temperature.__all__}
    policies = {c.__name__ for c in exported if isinstance(c, type) and issubclass(c, TemperaturePolicy)}
    planned = {arm[0].split()[0] for study in STUDIES.values() for arm in study.arms}
    assert {name.split()[0] for name in POLICIES} <= planned
    apart = {name for name in policies - planned if any(f"`{name}`" in line for line in page.NOT_IN_PLAN)}
    assert policies - planned - apart == {"TemperaturePolicy", "ConstantTemperature"}


def test_the_pages_are_what_the_rows_say() -> None:
    found = rows.read(CSV)
    assert page.PAGE.read_text() == page.page(found)
    for path in page.PARTLY:
        assert path.read_text() == page.redraw(path.read_text(), found)


def test_what_the_guide_says_in_words_holds_in_the_rows() -> None:
    results = paired.chosen(rows.read(CSV), "last")
    differences = paired.against_constant(results, [(name, 0.0) for name in POLICIES])
    assert (len(differences), paired.reliable(differences)) == (95, set())
    losers = {arm[0] for (_, arm), difference in differences.items() if difference.mean <= -5 and difference.error < 4}
    assert {f"{name}Temperature" for name in ("Sharpness", "MaxLogit", "CorrectWrong", "Confidence")} <= losers
    longest = [each.mean for (setting, _), each in differences.items() if str(setting) == "digits few adamw x4"]
    assert len(longest) == 23
    assert max(longest) < 0
    pairs = {
        (setting, t): paired.paired(results[setting]["equal", t].tests, results[setting]["fixed", t].tests)
        for setting in STUDIES["constants"].settings
        for t in (1.0, 2.0, 8.0, 16.0)
    }
    assert (len(pairs), paired.reliable(pairs)) == (96, set())
    parts = page.parts_of(rows.read(CSV))
    few, many = (
        next(line for line in parts["length"].splitlines() if f"| {kind}, 200" in line) for kind in ("few", "many")
    )
    assert [float(cell) for cell in few.split("|")[5:8]] == pytest.approx([4.5] * 3, abs=0.5)
    assert max(float(cell) for cell in many.split("|")[3:8]) <= 0


def test_the_plots_show_what_the_rows_say() -> None:
    for name, drawn in plots.panels(rows.read(CSV)).items():
        if drawn:
            with Image.open(page.DOCS / name) as image:
                assert image.info["Description"] == plots.digest(drawn), name
