"""The duties of every image datamodule, shown on one with made images."""

from collections import Counter
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from kd_lightning.datamodules import ImageDataModule, Pipeline, crop_pipeline

FIELDS = {"classes": ["a", "b", "c"], "input_shape": (2, 4, 4), "mean": (0.0, 0.0), "std": (1 / 255, 1 / 255)}


class NumberedImages(ImageDataModule):
    """Image i has the value i in each pixel of its first channel; normalisation keeps 0 … 255."""

    classes, input_shape, mean, std = FIELDS.values()  # type: ignore[assignment]
    counts = (80, 60, 40)

    def load_split(self, split):
        if split == "val":
            return None
        targets = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        numbers = torch.arange(len(targets)).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        return torch.cat([numbers, torch.full_like(numbers, 255)], 1), targets

    def pipeline(self, train: bool) -> Pipeline:
        return crop_pipeline(4, padding=1, flip=True) if train and self.augment else Pipeline()


def ready(**kwargs: Any) -> NumberedImages:
    data = NumberedImages(**{"augment": False, **kwargs})
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
    return data


def batches(loader: Any) -> list[tuple[Tensor, Tensor]]:
    return [(images, targets) for images, targets in loader]


def numbers(loader: Any) -> list[int]:
    return [int(i) for images, _ in loader for i in images[:, 0, 0, 0].round()]


def test_train_and_val_split_the_training_images() -> None:
    data = ready(val_fraction=0.25)
    train, val = numbers(data.train_dataloader()), numbers(data.val_dataloader())
    assert sorted(train + val) == list(range(180))
    assert data.class_counts == [60, 45, 30]
    assert data.num_classes == 3
    assert numbers(data.test_dataloader()) == numbers(data.predict_dataloader()) == list(range(180))


def test_batches() -> None:
    data = ready(batch_size=32, eval_batch_size=50)
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (32, 2, 4, 4)
    assert images.dtype == torch.float32
    assert targets.shape == (32,)
    assert targets.dtype == torch.int64
    assert len(next(iter(data.test_dataloader()))[1]) == 50
    assert len(next(iter(ready(batch_size=32).test_dataloader()))[1]) == 32


def test_normalisation() -> None:
    class Grey(NumberedImages):
        mean, std = (0.5, 0.2), (0.25, 0.1)

    data = Grey(augment=False)
    data.setup("test")
    image, _ = data.test_dataset[51]  # type: ignore[index]
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([(0.2 - 0.5) / 0.25, (1.0 - 0.2) / 0.1]))


def test_fewer_labels_and_long_tail() -> None:
    data = ready(val_fraction=0.0, imbalance_factor=0.25)
    assert data.class_counts == [80, 40, 20]
    assert ready(val_fraction=0.0, train_fraction=0.1).class_counts == [8, 6, 4]
    assert ready(val_fraction=0.0, imbalance_factor=0.25, train_fraction=0.1).class_counts == [8, 4, 2]
    assert ready(train_fraction=1e-9).class_counts == [1, 1, 1]
    assert len(ready(train_fraction=1e-9, val_fraction=0.5).val_dataset) == 90  # type: ignore[arg-type]


def test_setup_is_lazy_and_idempotent() -> None:
    data = NumberedImages()
    data.setup("fit")
    assert data.test_dataset is None
    datasets = data.train_dataset, data.val_dataset
    data.setup("fit")
    data.setup("validate")
    assert (data.train_dataset, data.val_dataset) == datasets
    other = NumberedImages()
    other.setup("test")
    assert other.train_dataset is None
    with pytest.raises(ValueError, match=r"stage must be 'fit'.*got 'train'"):
        data.setup("train")


@pytest.mark.parametrize("name", ["train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"])
def test_loaders_before_setup(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"Call setup\('\w+'\) first"):
        getattr(NumberedImages(), name)()


def test_class_counts_before_setup() -> None:
    with pytest.raises(RuntimeError, match=r"Call setup\('fit'\) first"):
        NumberedImages().class_counts  # noqa: B018


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0. "),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1 or None, got 0. "),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0. "),
        ({"val_fraction": -0.1}, r"val_fraction must be in \[0, 1\), got -0.1. "),
        ({"val_fraction": float("nan")}, r"val_fraction must be in \[0, 1\), got nan. "),
        ({"train_fraction": 0.0}, r"train_fraction must be in \(0, 1\], got 0.0. "),
        ({"train_fraction": 1.5}, r"train_fraction must be in \(0, 1\], got 1.5. "),
        ({"imbalance_factor": 0.0}, r"imbalance_factor must be in \(0, 1\].*got 0.0. "),
        ({"imbalance_factor": 100}, r"imbalance_factor must be in \(0, 1\].*got 100. Write 0.01 for '100 to 1'"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1. "),
    ],
)
def test_values_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NumberedImages(**kwargs)


def test_a_class_without_training_images_is_named() -> None:
    class Lacking(NumberedImages):
        counts = (80, 0, 40)

    with pytest.raises(ValueError, match=r"Every class must have a training image, got \['b'\]"):
        Lacking().setup("fit")


def test_empty_data() -> None:
    class Empty(NumberedImages):
        counts = (0, 0, 0)

    for stage in ("fit", "test"):
        with pytest.raises(ValueError, match="split must hold at least one image, got none"):
            Empty().setup(stage)


def test_nothing_left_to_train_on() -> None:
    with pytest.raises(ValueError, match=r"val_fraction must leave.*got 0.999.*all 80 of class 'a'"):
        ready(val_fraction=0.999)


def test_no_validation() -> None:
    data = ready(val_fraction=0.0)
    assert data.val_dataset is None
    assert data.val_dataloader() == []


@pytest.mark.slow
def test_shuffling_and_augmentation_follow_the_global_seed() -> None:
    def epochs(seed: int, **kwargs: Any) -> Tensor:
        seed_everything(seed, verbose=False)
        loader = ready(augment=True, **kwargs).train_dataloader()
        return torch.stack([torch.cat([images for images, _ in loader]) for _ in range(2)])

    for kwargs in ({}, {"in_memory": False}, {"num_workers": 2}):
        first = epochs(1, **kwargs)
        assert torch.equal(first, epochs(1, **kwargs))
        assert not torch.equal(first, epochs(2, **kwargs))
        assert not torch.equal(first[0], first[1])


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [True, False])
def test_workers_see_each_image_once_and_augment_differently(in_memory: bool) -> None:
    data = ready(in_memory=in_memory, num_workers=2, batch_size=20)
    loader = data.train_dataloader()
    assert loader.persistent_workers
    for _ in range(2):
        seen = numbers(loader)
        assert len(seen) == len(set(seen)) == sum(data.class_counts)
    # ones of channel 2 show the crop and nothing of the image: the first batches of two workers must differ
    loader = ready(in_memory=in_memory, num_workers=2, batch_size=40, augment=True).train_dataloader()
    (first, _), (second, _), *_ = batches(loader)
    assert not torch.equal(first[:, 1], second[:, 1])


def test_in_memory_and_one_by_one_have_the_same_distribution() -> None:
    """Over many epochs, each of the 18 crop-and-flip outcomes of the second channel is as frequent."""
    frequencies = []
    for in_memory in (True, False):
        data = ready(in_memory=in_memory, augment=True, batch_size=60)
        loader = data.train_dataloader()
        images = torch.cat([images[:, 1] for _ in range(12) for images, _ in loader]).round().long()
        frequencies.append(Counter(tuple(image.flatten().tolist()) for image in images))
    batch, single = frequencies
    assert batch.keys() == single.keys()
    assert len(batch) == 9  # mirror images of the all-ones channel are crops, too
    n = batch.total()
    assert n == single.total()
    assert sum((batch[k] - single[k]) ** 2 / (batch[k] + single[k]) for k in batch) < 8 + 4 * 16**0.5


def test_without_augmentation_both_ways_give_equal_inputs() -> None:
    fast, slow = ready(in_memory=True), ready(in_memory=False)
    for name in ("val_dataloader", "test_dataloader"):
        for (images, targets), (images_, targets_) in zip(getattr(fast, name)(), getattr(slow, name)(), strict=True):
            torch.testing.assert_close(images, images_, rtol=1e-6, atol=1e-4)
            assert torch.equal(targets, targets_)


@pytest.mark.parametrize("in_memory", [True, False])
def test_own_transforms_get_one_uint8_image_each(in_memory: bool) -> None:
    def train(image: Tensor) -> Tensor:
        assert image.shape == (2, 4, 4)
        assert image.dtype == torch.uint8
        return image.float() + 1000

    data = ready(train_transform=train, eval_transform=lambda image: image.float() - 1, in_memory=in_memory)
    assert min(numbers(data.train_dataloader())) >= 1000
    assert numbers(data.test_dataloader()) == list(range(-1, 179))


def test_own_transform_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(NumberedImages, "data")
    config = parser.parse_string(
        """
        data:
          batch_size: 8
          train_transform:
            class_path: torchvision.transforms.v2.Compose
            init_args:
              transforms:
                - {class_path: torchvision.transforms.v2.RandomHorizontalFlip, init_args: {p: 1.0}}
                - {class_path: torchvision.transforms.v2.ToDtype, init_args: {dtype: torch.float32}}
        """
    )
    data = parser.instantiate(config).data
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (8, 2, 4, 4)
    assert images.dtype == torch.float32


@pytest.mark.parametrize("in_memory", [True, False])
def test_datasets_serve_ordinary_loaders(in_memory: bool) -> None:
    dataset = ready(in_memory=in_memory).train_dataset
    assert dataset is not None
    for source in (dataset, Subset(dataset, range(0, 20, 2))):
        images, targets = next(iter(DataLoader(source, batch_size=5)))
        assert images.shape == (5, 2, 4, 4)
        assert targets.shape == (5,)
    image, target = dataset[3]
    assert image.shape == (2, 4, 4)
    assert target.shape == ()


def test_resize_step_of_a_subclass_is_taken_in_both_ways() -> None:
    class Cut(NumberedImages):
        def pipeline(self, train: bool) -> Pipeline:
            return Pipeline(resize=lambda image: image[:, :2, :3])

    for in_memory in (True, False):
        data = Cut(in_memory=in_memory)
        data.setup("test")
        assert next(iter(data.test_dataloader()))[0].shape == (64, 2, 2, 3)


def test_pinning_and_worker_settings() -> None:
    loader = ready().train_dataloader()
    assert loader.pin_memory == torch.cuda.is_available()
    assert not loader.persistent_workers
    assert ready(pin_memory=True).train_dataloader().pin_memory
    assert not ready(num_workers=1, persistent_workers=False).train_dataloader().persistent_workers


class Recorder(LightningModule):
    """Writes which images each process got."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.layer = nn.Linear(2 * 4 * 4, 3)
        self.seen: dict[str, list[int]] = {"train": [], "val": []}

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = batch
        self.seen["train"] += images[:, 0].amax((1, 2)).round().int().tolist()
        return nn.functional.cross_entropy(self.layer(images.flatten(1) / 255), targets)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.seen["val"] += batch[0][:, 0].amax((1, 2)).round().int().tolist()

    def on_fit_end(self) -> None:
        torch.save(self.seen, f"{self.folder}/{self.global_rank}.pt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("processes", [1, 2])
def test_fit_shows_each_image_once(processes: int, tmp_path) -> None:
    seed_everything(3, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = NumberedImages(batch_size=16, val_fraction=0.1, augment=True)
    trainer.fit(Recorder(str(tmp_path)), data)
    seen = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    data.setup("fit")
    assert data.class_counts == [72, 54, 36]
    for part, dataset in (("train", data.train_dataset), ("val", data.val_dataset)):
        expected = dataset.images[:, 0, 0, 0].tolist()  # type: ignore[union-attr, call-overload]
        assert sorted(i for rank in seen for i in rank[part]) == expected
        assert len({len(rank[part]) for rank in seen}) == 1
