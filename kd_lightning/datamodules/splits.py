"""The stratified split of training and validation images, fixed by its own seed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def shuffle_by_class(targets: Tensor, num_classes: int, seed: int) -> list[Tensor]:
    """Return the indices of each class in a random order that depends on ``seed`` alone, not on the global one."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    return [order[targets[order] == label] for label in range(num_classes)]


def share(count: int, fraction: float) -> int:
    """Return ``count · fraction``, rounded half up, at least 1."""
    return max(1, int(count * fraction + 0.5))


def held_out_counts(counts: Sequence[int], fraction: float, names: Sequence[str], argument: str) -> list[int]:
    """Return how many images of each class to hold out: ``fraction`` of them, at least one, but not the only one.

    Example:
        >>> held_out_counts([50, 20, 3, 1], 0.1, "abcd", "val_fraction")
        [5, 2, 1, 0]
    """
    held_out = []
    for name, count in zip(names, counts, strict=True):
        held_out.append(share(count, fraction) if fraction > 0 and count > 1 else 0)
        if held_out[-1] >= count:
            raise ValueError(
                f"{argument} must leave at least one image of each class to train on, got {fraction}: "
                f"it takes all {count} of class {name!r}. Lower {argument}."
            )
    return held_out


def long_tailed_counts(counts: Sequence[int], imbalance_factor: float) -> list[int]:
    """Return the images per class on the exponential profile ``n_c = n_max · factor^(c / (C − 1))`` (Cui et al. 2019).

    ``n_max`` is the largest count, and fractions are cut off. Each class keeps at least one image.

    Example:
        >>> long_tailed_counts([5000] * 10, 0.01)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    if imbalance_factor == 1.0:
        return list(counts)
    largest, last = max(counts), max(1, len(counts) - 1)
    # 1e-9, because rounding must not lower a product that is a whole number
    wanted = (int(largest * imbalance_factor ** (label / last) + 1e-9) for label in range(len(counts)))
    return [min(count, max(1, n)) for count, n in zip(counts, wanted, strict=True)]


def train_val_indices(
    targets: Tensor,
    classes: Sequence[str],
    *,
    val_fraction: float,
    train_fraction: float,
    imbalance_factor: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return the indices of the training and of the validation part, each in ascending order.

    The validation part depends on ``val_fraction`` and ``seed`` only. A smaller training part is a subset of a larger
    one.
    """
    by_class = shuffle_by_class(targets, len(classes), seed)
    held_out = held_out_counts([len(c) for c in by_class], val_fraction, classes, "val_fraction")
    val = [c[:n] for c, n in zip(by_class, held_out, strict=True)]
    train = [c[n:] for c, n in zip(by_class, held_out, strict=True)]
    counts = long_tailed_counts([len(c) for c in train], imbalance_factor)
    train = [c[: share(n, train_fraction)] for c, n in zip(train, counts, strict=True)]
    return torch.cat(train).sort().values, torch.cat(val).sort().values
