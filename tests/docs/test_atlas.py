"""The atlas of temperatures: pairing, correction, resuming, and a page that says what its CSV says."""

from pathlib import Path

import pytest

from benchmarks import atlas
from benchmarks.atlas import Key, Scores


def _key(rate: float = 0.02, seed: int = 0, arm: tuple[str, float] = ("fixed", 4.0)) -> Key:
    return Key("digits", "few", "adamw", "x1", *arm, rate, seed)


def test_pairs_are_of_the_same_seed() -> None:
    ours, theirs = {2: 5.0, 0: 1.0, 1: 3.0}, {0: 0.0, 1: 1.0, 2: 2.0}
    difference = atlas.paired(ours, theirs)  # gains 1, 2, 3
    assert difference.mean == 2.0
    assert difference.error == pytest.approx(3**-0.5)
    assert difference.p == pytest.approx(0.0741799, rel=1e-5)  # Student's t = 3.4641 at two degrees of freedom
    with pytest.raises(ValueError, match=r"need the same seeds, two or more, got \[0, 1, 2\] and \[0, 1\]"):
        atlas.paired(ours, {0: 0.0, 1: 1.0})


def test_holm_adjusts_for_the_number_of_comparisons() -> None:
    assert atlas.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert atlas.holm([0.9, 0.6]) == [1.0, 1.0]
    assert atlas.holm([]) == []


def test_the_learning_rate_is_chosen_on_validation_and_unfinished_arms_are_left_out() -> None:
    rates = atlas.RATES["adamw"]
    rows = {
        _key(rate, seed): Scores(val_last, test_last, 50.0, 50.0)
        for rate, val_last, test_last in zip(rates, (80.0, 90.0, 85.0, 84.0), (99.0, 70.0, 99.0, 99.0), strict=True)
        for seed in range(atlas.SEEDS)
    }
    setting = _key().setting
    assert atlas.chosen(rows, "last")[setting]["fixed", 4.0] == (rates[1], dict.fromkeys(range(atlas.SEEDS), 70.0))
    del rows[_key(rates[0], 3)]
    assert not atlas.chosen(rows, "last")


def test_a_rerun_trains_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Key] = []

    def train(key: Key) -> Scores:
        trained.append(key)
        return Scores(1.0, 2.0, 3.0, float(key.seed))

    monkeypatch.setattr(atlas, "train", train)
    path, keys = tmp_path / "atlas.csv", [_key(seed=seed) for seed in range(3)]
    assert atlas.run(path, keys[:2]) == 2
    path.write_text(path.read_text()[:-3])  # the process was killed while it wrote the second row
    assert atlas.run(path, keys) == 2
    assert trained == [keys[0], keys[1], keys[1], keys[2]]
    assert atlas.run(path, keys) == 0
    assert atlas.read(path) == {key: Scores(1.0, 2.0, 3.0, float(key.seed)) for key in keys}


@pytest.mark.slow
def test_a_training_gives_the_same_row_again() -> None:
    key = Key("digits", "few", "sgd", "x1/4", "none", 0.0, 0.06, 0)
    assert atlas.train(key) == atlas.train(key)


def test_the_page_is_what_the_rows_say() -> None:
    assert atlas.PAGE.read_text() == atlas.page(atlas.read(atlas.CSV))
