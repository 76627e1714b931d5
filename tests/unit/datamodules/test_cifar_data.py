"""CIFAR in its on-disk format, with made images."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from kd_lightning.datamodules import CIFAR10DataModule, CIFAR100DataModule


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with both data sets: 60 and 200 training images, 20 and 100 test images."""
    # the made files cannot have the real ones' checksums: being there is enough
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    generator = np.random.default_rng(0)

    def write(path: Path, n: int, key: str, classes: int) -> None:
        pixels = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps({"data": pixels, key: [i % classes for i in range(n)]}, protocol=2))

    small, large = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    for number in range(1, 6):
        write(small / f"data_batch_{number}", 60, "labels", 10)
    write(small / "test_batch", 20, "labels", 10)
    (small / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    write(large / "train", 300, "fine_labels", 100)
    write(large / "test", 100, "fine_labels", 100)
    (large / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}, protocol=2))
    return str(tmp_path)


@pytest.mark.parametrize(("kind", "classes"), [(CIFAR10DataModule, 10), (CIFAR100DataModule, 100)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_parts(kind: type[CIFAR10DataModule], classes: int, in_memory: bool, root: str) -> None:
    data = kind(root=root, batch_size=16, in_memory=in_memory)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert data.num_classes == len(set(data.classes)) == classes
    held_out = {10: 3, 100: 1}[classes]
    assert data.class_counts == [300 // classes - held_out] * classes
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, targets = next(iter(loader))  # type: ignore[arg-type]
        assert images.shape == (16, *data.input_shape)
        assert images.dtype == torch.float32
        assert targets.dtype == torch.int64


def test_pixels_and_targets_are_torchvisions(root: str) -> None:
    data = CIFAR100DataModule(root=root)
    data.setup("test")
    source = datasets.CIFAR100(root, train=False)
    images, targets = next(iter(data.test_dataloader()))
    mean, std = torch.tensor(data.mean).reshape(3, 1, 1), torch.tensor(data.std).reshape(3, 1, 1)
    assert targets.tolist() == source.targets[:64]
    for index in (0, 63):
        pixels = torch.from_numpy(np.array(source[index][0])).permute(2, 0, 1) / 255
        torch.testing.assert_close(images[index], (pixels - mean) / std, rtol=1e-5, atol=1e-5)


def test_training_images_are_padded_crops_in_both_ways(root: str) -> None:
    """Each input is one of the 162 crops and mirror images of its original."""
    for in_memory in (True, False):
        data = CIFAR10DataModule(root=root, in_memory=in_memory)
        data.setup("fit")
        dataset = data.train_dataset
        assert dataset is not None
        original = torch.nn.functional.pad(dataset.images[5], [4] * 4)  # type: ignore[arg-type]
        windows = original.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).reshape(81, 3, 32, 32)
        outcomes = data.normalization()(torch.cat([windows, windows.flip(-1)]))
        found = set()
        for _ in range(60):
            distance = (outcomes - dataset[5][0]).abs().amax((1, 2, 3))
            assert distance.min() < 1e-4
            found.add(int(distance.argmin()))
        assert len(found) > 30
        assert min(found) < 81 <= max(found)


def test_evaluation_is_not_augmented(root: str) -> None:
    data = CIFAR10DataModule(root=root)
    data.setup("fit")
    (first, _), (second, _) = next(iter(data.val_dataloader())), next(iter(data.val_dataloader()))
    assert torch.equal(first, second)


def test_long_tail(root: str) -> None:
    data = CIFAR10DataModule(root=root, val_fraction=0.0, imbalance_factor=0.1)
    data.setup("fit")
    assert data.class_counts == [30, 23, 17, 13, 10, 8, 6, 5, 3, 3]


@pytest.mark.parametrize("kind", [CIFAR10DataModule, CIFAR100DataModule])
def test_missing_data(kind: type[CIFAR10DataModule], tmp_path: Path) -> None:
    data = kind(root=str(tmp_path))
    data.prepare_data()  # must not reach for the network
    with pytest.raises(FileNotFoundError, match=r"CIFAR100?\b.*Pass download=True, or set root"):
        data.setup("fit")
    with pytest.raises(FileNotFoundError, match=r"Call prepare_data\(\) first"):
        kind(root=str(tmp_path), download=True).setup("test")


def test_download_happens_in_prepare_data_only(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: calls.append(self.root))
    data = CIFAR100DataModule(root=root, download=True)
    data.setup("fit")
    assert calls == []
    data.prepare_data()
    assert calls == [root]
    CIFAR100DataModule(root=root).prepare_data()
    assert calls == [root]


@pytest.mark.parametrize(
    ("kind", "first", "last"), [(CIFAR10DataModule, "airplane", "truck"), (CIFAR100DataModule, "apple", "worm")]
)
def test_classes_are_known_without_data(kind: type[CIFAR10DataModule], first: str, last: str) -> None:
    data = kind()
    assert data.classes[0] == first
    assert data.classes[-1] == last
    assert data.classes == sorted(data.classes)
