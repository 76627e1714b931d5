"""Which images train and which validate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_lightning.datamodules.splits import held_out_counts, long_tailed_counts, train_val_indices

COUNTS = st.lists(st.integers(2, 60), min_size=2, max_size=8)
FRACTIONS = st.floats(0.001, 1.0)


def split(counts: list[int], val_fraction=0.1, train_fraction=1.0, imbalance_factor=1.0, seed=0):
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    train, val = train_val_indices(
        targets,
        [str(c) for c in range(len(counts))],
        val_fraction=val_fraction,
        train_fraction=train_fraction,
        imbalance_factor=imbalance_factor,
        seed=seed,
    )
    return targets, train, val


@settings(deadline=None)
@given(counts=COUNTS, val_fraction=st.floats(0.0, 0.45), seed=st.integers(0, 2**40))
def test_each_image_is_in_one_part_and_classes_keep_their_share(counts, val_fraction, seed) -> None:
    targets, train, val = split(counts, val_fraction, seed=seed)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(len(targets)))
    for label, n in enumerate(counts):
        held_out = int((targets[val] == label).sum())
        assert abs(held_out - n * val_fraction) <= 0.5 or held_out == 1
        assert (held_out > 0) == (val_fraction > 0)


@settings(deadline=None)
@given(counts=COUNTS, small=FRACTIONS, large=FRACTIONS, factor=FRACTIONS)
def test_smaller_training_parts_lie_within_larger_ones_and_val_stays(counts, small, large, factor) -> None:
    small, large = sorted((small, large))
    targets, whole, val = split(counts)
    parts = [split(counts, train_fraction=f, imbalance_factor=factor) for f in (small, large)]
    assert all(torch.equal(part[2], val) for part in parts)
    assert set(parts[0][1].tolist()) <= set(parts[1][1].tolist()) <= set(whole.tolist())
    assert torch.bincount(targets[parts[0][1]], minlength=len(counts)).min() >= 1


def test_the_split_depends_on_its_seed_and_not_on_the_global_one() -> None:
    torch.manual_seed(1)
    first = split([50, 50], seed=7)[2]
    torch.manual_seed(2)
    assert torch.equal(first, split([50, 50], seed=7)[2])
    assert not torch.equal(first, split([50, 50], seed=8)[2])


def test_splitting_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    split([50, 50])
    assert torch.equal(before, torch.get_rng_state())


def test_lone_images_train() -> None:
    assert held_out_counts([1, 2, 3, 10, 100], 0.1, "abcde", "val_fraction") == [0, 1, 1, 1, 10]


def test_no_class_may_be_emptied() -> None:
    with pytest.raises(ValueError, match=r"val_fraction must leave.*got 0.9: it takes all 4 of class '1'"):
        split([100, 4], val_fraction=0.9)


@pytest.mark.parametrize(
    ("counts", "factor", "expected"),
    [
        ([5000] * 10, 0.01, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),  # the literature's CIFAR-10-LT
        ([100] * 3, 0.25, [100, 50, 25]),
        ([10, 100], 0.5, [10, 50]),  # no class gets more than it has
        ([10] * 3, 0.001, [10, 1, 1]),  # nor less than one
        ([7, 3, 5], 1.0, [7, 3, 5]),
        ([9], 0.5, [9]),
    ],
)
def test_long_tail(counts: list[int], factor: float, expected: list[int]) -> None:
    assert long_tailed_counts(counts, factor) == expected


def test_cifar100_long_tail_has_the_published_number_of_images() -> None:
    assert sum(long_tailed_counts([500] * 100, 0.01)) == 10_847
    assert sum(long_tailed_counts([500] * 100, 0.02)) == 12_608
    assert sum(long_tailed_counts([500] * 100, 0.1)) == 19_573
    assert sum(long_tailed_counts([5000] * 10, 0.01)) == 12_406


@settings(deadline=None)
@given(counts=COUNTS, factor=FRACTIONS)
def test_long_tail_is_bounded_and_falls(counts, factor) -> None:
    balanced = long_tailed_counts([max(counts)] * len(counts), factor)
    assert balanced == sorted(balanced, reverse=True)
    assert balanced[0] == max(counts)
    assert balanced[-1] == max(1, int(max(counts) * factor + 1e-9))
    assert all(1 <= n <= m for n, m in zip(long_tailed_counts(counts, factor), counts, strict=True))
