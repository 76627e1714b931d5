"""Folders of image files, with made PNGs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kd_lightning.datamodules import ImageFolderDataModule


def write(folder: Path, n: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(sum(folder.name.encode()))
    for i in range(n):
        pixels = generator.integers(0, 256, (size[1] + i % 3, size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, n in (("ant", 12), ("bee", 8)):
        write(tmp_path / "train" / name, n)
        write(tmp_path / "test" / name, 4)
    return tmp_path


def ready(root: Path, **kwargs: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(str(root), **{"image_size": 8, "batch_size": 4, **kwargs})
    data.setup("fit")
    data.setup("test")
    return data


WAYS = [
    {"in_memory": in_memory, "crop_padding": crop_padding, "augment": augment}
    for in_memory in (False, True)
    for crop_padding in (None, 1)
    for augment in (False, True)
]


@pytest.mark.parametrize("kwargs", WAYS, ids=str)
def test_parts(root: Path, kwargs: dict[str, Any]) -> None:
    data = ready(root, **kwargs)
    assert data.classes == ["ant", "bee"]
    assert data.num_classes == 2
    assert data.input_shape == (3, 8, 8)
    assert data.class_counts == [11, 7]
    assert len(data.val_dataset) == 2  # type: ignore[arg-type]
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for images, targets in loader:
            assert images.shape[1:] == (3, 8, 8)
            assert images.dtype == torch.float32
            assert targets.dtype == torch.int64


@pytest.mark.parametrize("crop_padding", [None, 1])
def test_evaluation_does_not_depend_on_the_way_of_loading(root: Path, crop_padding: int | None) -> None:
    from_files, in_memory = (ready(root, in_memory=m, crop_padding=crop_padding) for m in (False, True))
    for name in ("val_dataloader", "test_dataloader"):
        for one, other in zip(getattr(from_files, name)(), getattr(in_memory, name)(), strict=True):
            torch.testing.assert_close(tuple(one), tuple(other))


def test_random_sizes_from_memory_are_those_from_files(root: Path) -> None:
    epochs = []
    for in_memory in (False, True):
        data = ready(root, in_memory=in_memory)
        torch.manual_seed(4)
        epochs.append(torch.cat([images for images, _ in data.train_dataloader()]))
    torch.testing.assert_close(*epochs)


def test_padded_crops_from_memory_have_the_distribution_of_those_from_files(root: Path) -> None:
    outcomes = []
    for in_memory in (False, True):
        dataset = ready(root, in_memory=in_memory, crop_padding=1).train_dataset
        assert dataset is not None
        images = torch.stack([dataset[3][0] for _ in range(400)])
        unique, counts = torch.unique(images.mul(1e3).round().flatten(1), dim=0, return_counts=True)
        outcomes.append(unique)
        assert len(unique) == 18  # 3 × 3 crops and their mirror images
        assert ((counts - 400 / 18) ** 2 / (400 / 18)).sum() < 17 + 4 * 34**0.5
    assert (outcomes[0] - outcomes[1]).abs().max() <= 2


def test_val_folder_is_used_where_it_is(root: Path) -> None:
    write(root / "val" / "bee", 5)
    data = ready(root, val_fraction=0.5)
    assert data.class_counts == [12, 8]
    assert data.val_dataset is not None
    assert data.val_dataset.targets.tolist() == [1] * 5


def test_a_class_may_lack_test_images_and_keeps_its_number(root: Path) -> None:
    for file in (root / "test" / "ant").iterdir():
        file.unlink()
    (root / "test" / "ant").rmdir()
    data = ready(root)
    assert data.test_dataset is not None
    assert data.test_dataset.targets.tolist() == [1] * 4


def test_grey_images_become_rgb(root: Path) -> None:
    write(root / "test" / "ant", 4, mode="L")
    images, _ = next(iter(ready(root).test_dataloader()))
    assert images.shape == (4, 3, 8, 8)


def test_normalisation(root: Path) -> None:
    data = ready(root, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images, _ = next(iter(data.test_dataloader()))
    assert 0 <= images.min() < images.max() <= 1
    shifted, _ = next(iter(ready(root, mean=(0.5, 0.0, 0.0), std=(0.5, 1.0, 1.0)).test_dataloader()))
    torch.testing.assert_close(shifted[:, 0], images[:, 0] * 2 - 1)
    torch.testing.assert_close(shifted[:, 1:], images[:, 1:])


def test_evaluation_size(root: Path) -> None:
    assert ImageFolderDataModule(str(root)).resize_size == 256
    assert ImageFolderDataModule(str(root), image_size=32, crop_padding=4).resize_size == 32
    assert ImageFolderDataModule(str(root), image_size=32, resize_size=40).resize_size == 40


def test_images_of_the_input_size_are_not_touched(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (i, 20, 30)).save(tmp_path / split / name / f"{i}.png")
    pixels = [[0.0, 20.0, 30.0], [1.0, 20.0, 30.0], [2.0, 20.0, 30.0]]
    data = ready(tmp_path, crop_padding=1, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    images = torch.cat([images for images, _ in data.test_dataloader()])
    torch.testing.assert_close(images, torch.tensor(pixels * 2).reshape(6, 3, 1, 1).expand(-1, -1, 8, 8))


def test_folder_of_classes_without_train_and_test(tmp_path: Path) -> None:
    write(tmp_path / "ant", 3)
    write(tmp_path / "bee", 3)
    with pytest.raises(ValueError, match=r"train/<class>/<image>.*ant, bee in it.*Move the class folders into train/"):
        ImageFolderDataModule(str(tmp_path)).setup("fit")


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_no_such_folder(tmp_path: Path, stage: str) -> None:
    with pytest.raises(ValueError, match=r"train/<class>/<image>.*with no folder in it"):
        ImageFolderDataModule(str(tmp_path / "nowhere")).setup(stage)


def test_no_test_folder(root: Path) -> None:
    (root / "test").rename(root / "holdout")
    data = ImageFolderDataModule(str(root))
    data.setup("fit")
    with pytest.raises(ValueError, match=r"must hold test/<class>/<image>.*holdout, train in it"):
        data.setup("test")


def test_class_without_training_images(root: Path) -> None:
    (root / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"Every class must have a training image, got \['cow'\]"):
        ready(root)


def test_class_that_is_not_trained(root: Path) -> None:
    write(root / "test" / "cow", 1)
    with pytest.raises(ValueError, match=r"classes of test/ must be among those of train/, got 'cow'"):
        ready(root)


@pytest.mark.parametrize("split", ["test", "val"])
def test_empty_split(root: Path, split: str) -> None:
    (root / split / "ant").mkdir(parents=True, exist_ok=True)
    for file in (root / split).rglob("*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=rf"{split} split must hold at least one image, got none"):
        ready(root)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"image_size": 32, "resize_size": 31}, "resize_size must be at least image_size, 32, or None, got 31"),
        ({"crop_padding": -1}, "crop_padding must be at least 0 or None, got -1"),
        ({"mean": (0.5,)}, r"mean must hold three numbers, one per RGB channel, got \(0.5,\)"),
        ({"std": (1.0, 0.0, 1.0)}, "std must hold three positive numbers"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_values_out_of_range(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(str(tmp_path), **kwargs)
