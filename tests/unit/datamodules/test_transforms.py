"""Batched augmentation must have the distribution of torchvision's per-image transforms."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from kd_lightning.datamodules.transforms import BatchRandomCrop, BatchRandomHorizontalFlip, crop_pipeline

SIZE, PADDING = 4, 1
IMAGE = torch.arange(1, 2 * SIZE * SIZE + 1, dtype=torch.uint8).reshape(2, SIZE, SIZE)


def all_outcomes(flip: bool) -> list[Tensor]:
    """Every image that padding, cropping and mirroring can give, by enumeration."""
    padded = F.pad(IMAGE, [PADDING] * 4)
    starts = range(2 * PADDING + 1)
    crops = [padded[:, top : top + SIZE, left : left + SIZE] for top in starts for left in starts]
    return crops + [crop.flip(-1) for crop in crops] if flip else crops


def histogram(images: Tensor, outcomes: list[Tensor]) -> Tensor:
    equal = (images[:, None] == torch.stack(outcomes)[None]).flatten(2).all(2)
    assert (equal.sum(1) == 1).all()  # each image is one of the outcomes
    return equal.sum(0).double()


@pytest.mark.parametrize("flip", [False, True])
def test_crops_and_flips_are_uniform_over_all_outcomes_as_torchvisions_are(flip: bool) -> None:
    pipeline = crop_pipeline(SIZE, PADDING, flip=flip)
    assert pipeline.augment is not None
    assert pipeline.batch_augment is not None
    n, outcomes = 3_600, all_outcomes(flip)
    single = torch.stack([pipeline.augment(IMAGE) for _ in range(n)])
    batch = pipeline.batch_augment(IMAGE.expand(n, -1, -1, -1))
    assert batch.dtype == torch.uint8
    expected = n / len(outcomes)
    for counts in (histogram(single, outcomes), histogram(batch, outcomes)):
        chi_square = ((counts - expected) ** 2 / expected).sum()
        degrees = len(outcomes) - 1
        assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    # pixel moments of both, against the exact ones
    exact = torch.stack(outcomes).double()
    error = exact.std(0) / n**0.5
    for images in (single, batch):
        assert ((images.double().mean(0) - exact.mean(0)).abs() <= 4.5 * error + 1e-9).all()


def test_neighbours_in_a_batch_are_independent() -> None:
    pipeline = crop_pipeline(SIZE, PADDING, flip=True)
    assert pipeline.batch_augment is not None
    outcomes = all_outcomes(flip=True)
    images = pipeline.batch_augment(IMAGE.expand(20_000, -1, -1, -1))
    labels = (images[:, None] == torch.stack(outcomes)[None]).flatten(2).all(2).long().argmax(1)
    pairs = torch.bincount(labels[0::2] * len(outcomes) + labels[1::2], minlength=len(outcomes) ** 2).double()
    expected, degrees = 10_000 / len(outcomes) ** 2, len(outcomes) ** 2 - 1
    assert ((pairs - expected) ** 2 / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5


def test_crop_takes_rows_from_its_own_image() -> None:
    images = torch.arange(6, dtype=torch.uint8).add(1).reshape(6, 1, 1, 1).expand(6, 3, 8, 8)
    cropped = BatchRandomCrop(8, padding=2)(images)
    for number, image in enumerate(cropped, start=1):
        assert set(image.unique().tolist()) <= {0, number}


def test_crop_smaller_than_the_image_and_not_square() -> None:
    assert BatchRandomCrop(3, padding=0)(torch.zeros(2, 1, 5, 7)).shape == (2, 1, 3, 3)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_certain_flips_equal_torchvisions(p: float) -> None:
    images = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    before = images.clone()
    assert torch.equal(BatchRandomHorizontalFlip(p)(images), v2.RandomHorizontalFlip(p)(images))
    assert torch.equal(images, before)


@pytest.mark.parametrize("transform", [BatchRandomCrop(4, 1), BatchRandomHorizontalFlip()])
def test_random_numbers_are_torchs_global_ones(transform: nn.Module) -> None:
    images = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8)
    torch.manual_seed(5)
    first = transform(images)
    torch.manual_seed(5)
    assert torch.equal(first, transform(images))
    assert not torch.equal(first, transform(images))
