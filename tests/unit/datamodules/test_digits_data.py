"""scikit-learn's digits."""

import sys

import pytest
import torch

from kd_lightning.datamodules import DigitsDataModule


@pytest.fixture(scope="module")
def data() -> DigitsDataModule:
    data = DigitsDataModule()
    data.setup("fit")
    data.setup("test")
    return data


def everything(loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def test_parts(data: DigitsDataModule) -> None:
    train, _ = everything(data.train_dataloader())
    val, _ = everything(data.val_dataloader())
    test, targets = everything(data.test_dataloader())
    assert (len(train), len(val), len(test)) == (1293, 145, 359)
    assert train.shape[1:] == val.shape[1:] == test.shape[1:] == data.input_shape == (1, 8, 8)
    assert sum(data.class_counts) == 1293
    assert max(data.class_counts) - min(data.class_counts) <= 8
    assert torch.bincount(targets).min() >= 34
    assert data.num_classes == 10
    assert data.classes == list("0123456789")
    # mean and standard deviation are those of all 1,797 images
    pixels = torch.cat([train, val, test])
    assert pixels.mean().abs() < 1e-3
    assert abs(pixels.std() - 1) < 1e-3


def test_parts_share_no_image(data: DigitsDataModule) -> None:
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    images = torch.cat([everything(loader)[0] for loader in loaders]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 1797  # the data set has no two equal images


def test_test_set_does_not_depend_on_seeds(data: DigitsDataModule) -> None:
    torch.manual_seed(99)
    other = DigitsDataModule(seed=5, val_fraction=0.3, in_memory=False)
    other.setup("fit")
    other.setup("test")
    torch.testing.assert_close(everything(data.test_dataloader()), everything(other.test_dataloader()))
    assert not torch.equal(data.val_dataset.targets, other.val_dataset.targets)  # type: ignore[union-attr]


def test_shifts_by_up_to_one_pixel() -> None:
    data = DigitsDataModule(augment=True, batch_size=400, val_fraction=0.0)
    data.setup("fit")
    dataset = data.train_dataset
    assert dataset is not None
    assert isinstance(dataset.images, torch.Tensor)
    black = data.normalization()(torch.zeros(1, 8, 8, dtype=torch.uint8))[0, 0, 0]
    original = data.normalization()(dataset.images[7])
    padded = torch.nn.functional.pad(original, [1] * 4, value=float(black))
    shifts = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    inputs = [dataset[7][0] for _ in range(150)]
    found = [[i for i, shift in enumerate(shifts) if torch.allclose(image, shift)] for image in inputs]
    assert {i for (i,) in found} == set(range(9))  # each is one shift, and all nine occur


@pytest.mark.slow
def test_both_ways_of_loading_shift_alike() -> None:
    moments = []
    for in_memory in (True, False):
        data = DigitsDataModule(augment=True, batch_size=400, in_memory=in_memory)
        data.setup("fit")
        loader = data.train_dataloader()
        images = torch.cat([everything(loader)[0] for _ in range(4)])
        moments.append(torch.stack([images.mean(0), images.std(0)]))
    assert (moments[0] - moments[1]).abs().max() < 0.08


def test_augmentation_is_off_by_default_and_never_in_evaluation(data: DigitsDataModule) -> None:
    assert torch.equal(data.train_dataset[0][0], data.train_dataset[0][0])  # type: ignore[index]
    augmented = DigitsDataModule(augment=True)
    augmented.setup("fit")
    assert torch.equal(everything(augmented.val_dataloader())[0], everything(data.val_dataloader())[0])


@pytest.mark.parametrize("test_fraction", [0.0, 1.0, -1.0])
def test_test_fraction_out_of_range(test_fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"test_fraction must be in \(0, 1\), got {test_fraction}"):
        DigitsDataModule(test_fraction=test_fraction)


def test_test_fraction_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match=r"test_fraction must leave.*Lower test_fraction"):
        DigitsDataModule(test_fraction=0.999).setup("test")


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="batchsize"):
        DigitsDataModule(batchsize=3)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install kd-lightning\[examples\]"):
        DigitsDataModule().setup("fit")
