"""The bases of the data modules: loaders for all, splits and subsets for images."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from kd_lightning.datamodules.dataset import BatchedImageDataset, ImageDataset, Images, collate, select
from kd_lightning.datamodules.splits import train_val_indices
from kd_lightning.datamodules.transforms import Pipeline, Transform, chain

Split = Literal["train", "val", "test"]


def check(holds: bool, rule: str, value: object, way_out: str) -> None:
    """Raise a ValueError with the rule, the value received and the way out, unless the rule holds."""
    if not holds:
        raise ValueError(f"{rule}, got {value!r}. {way_out}")


class LoadersDataModule(LightningDataModule, ABC):
    """Base class of the data modules: loaders whose batches name their samples for a teacher's cache on request."""

    collate_fn: Callable[[Any], Any] | None = None
    """The function that collates samples; None: torch's."""

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int | None,
        val_fraction: float,
        num_workers: int,
        pin_memory: bool | None,
        persistent_workers: bool = True,
    ) -> None:
        super().__init__()
        check(batch_size >= 1, "batch_size must be at least 1", batch_size, "Give a positive integer.")
        check(
            eval_batch_size is None or eval_batch_size >= 1,
            "eval_batch_size must be at least 1 or None",
            eval_batch_size,
            "None means batch_size.",
        )
        check(0 <= val_fraction < 1, "val_fraction must be in [0, 1)", val_fraction, "0 means no validation.")
        check(num_workers >= 0, "num_workers must be at least 0", num_workers, "0 loads in the main process.")
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self._index: Callable[..., Any] | None = None

    @abstractmethod
    def dataset_of(self, stage: str) -> Any:
        """Return the dataset of a stage (fit, validate, test or predict); None if there is no validation.

        Raises:
            RuntimeError: If ``setup`` was not called.
        """

    def index_training(self, index: Callable[..., Any] | None) -> None:
        """Have training and validation batches name their samples, as a teacher's cache needs; called by the module.

        Args:
            index: ``teacher.index``: a function of a dataset, its collate function and its part. None: plain batches.
        """
        self._index = index

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of shuffled batches of the training part."""
        return self._loader("fit", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the loader of the validation part; an empty list if ``val_fraction`` is 0."""
        return [] if self.dataset_of("validate") is None else self._loader("validate", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test set."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test set."""
        return self._loader("predict", self.eval_batch_size)

    def _loader(self, stage: str, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        source, collate_fn = self.dataset_of(stage), self.collate_fn
        part = {"fit": "train", "validate": "val"}.get(stage)
        if part is not None and self._index is not None:
            source = self._index(source, collate_fn, part)
            collate_fn = source.collate
        return DataLoader(
            source,
            batch_size=batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.persistent_workers and self.num_workers > 0,
            collate_fn=collate_fn,
        )


class ImageDataModule(LoadersDataModule):
    """Base class of the image data modules: a subclass loads the images and names the classes.

    Batches are ``(images, targets)``: normalised float32 images ``(B, C, H, W)`` and int64 classes ``(B,)``.

    The validation part is split from the training set, class by class, in a random order that depends on ``seed``
    alone: it is the same for every ``seed_everything``, ``train_fraction`` and ``imbalance_factor``. Shuffling and
    augmentation use torch's global random numbers, which ``seed_everything`` reproduces.

    Args:
        batch_size: Images in a training batch of each process.
        eval_batch_size: Images in a validation, test or prediction batch; ``batch_size`` if None.
        val_fraction: Part of each class's training images to validate on, in [0, 1). 0: no validation.
        train_fraction: Part of each class's remaining images to train on, in (0, 1]. A smaller part is a subset of a
            larger one.
        imbalance_factor: Ratio of the last class's images to the first's, in (0, 1]: class c = 0 … C − 1 keeps
            ``n_max · imbalance_factor^(c / (C − 1))`` images (Cui et al. 2019), before ``train_fraction``.
        seed: Seed of the split and the subsets.
        augment: Whether to augment training images.
        in_memory: Whether to keep decoded uint8 images in RAM and augment whole batches, with the same distribution.
        num_workers: Number of loader processes; 0 is usually the fastest with ``in_memory``.
        pin_memory: Whether to copy batches to page-locked memory; None: if there is a CUDA device.
        persistent_workers: Whether to keep loader processes between epochs.
        train_transform: A callable from one uint8 image ``(C, H, W)`` to the network's input, in place of augmentation
            and normalisation of training images.
        eval_transform: The same for validation, test and prediction.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> class Noise(ImageDataModule):
        ...     classes, input_shape, mean, std = ["a", "b"], (1, 4, 4), (0.5,), (0.25,)
        ...
        ...     def load_split(self, split):
        ...         if split == "val":
        ...             return None
        ...         return torch.randint(256, (40, 1, 4, 4), dtype=torch.uint8), torch.arange(40) % 2
        >>> data = Noise(batch_size=8, imbalance_factor=0.5)
        >>> data.setup("fit")
        >>> data.class_counts, len(data.val_dataset)
        ([18, 9], 4)
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, images.dtype, targets.shape
        (torch.Size([8, 1, 4, 4]), torch.float32, torch.Size([8]))
    """

    mean: tuple[float, ...]
    """Channel means that are subtracted from pixels scaled to [0, 1]."""
    std: tuple[float, ...]
    """Channel standard deviations that the difference is divided by."""

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        train_fraction: float = 1.0,
        imbalance_factor: float = 1.0,
        seed: int = 0,
        augment: bool = True,
        in_memory: bool = True,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
        train_transform: Callable | None = None,  # bare: with its arguments, YAML cannot name a transform class
        eval_transform: Callable | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, val_fraction, num_workers, pin_memory, persistent_workers)
        check(
            0 < train_fraction <= 1,
            "train_fraction must be in (0, 1]",
            train_fraction,
            "1.0 means all that validation leaves.",
        )
        check(
            0 < imbalance_factor <= 1,
            "imbalance_factor must be in (0, 1]: the smallest class over the largest",
            imbalance_factor,
            "Write 0.01 for '100 to 1', 1.0 for data as they are.",
        )
        self.train_fraction = train_fraction
        self.imbalance_factor = imbalance_factor
        self.seed = seed
        self.augment = augment
        self.in_memory = in_memory
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.train_dataset: ImageDataset | None = None
        self.val_dataset: ImageDataset | None = None
        self.test_dataset: ImageDataset | None = None

    # ---- defined by a subclass --------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""

    @abstractmethod
    def load_split(self, split: Split) -> tuple[Images, Tensor] | None:
        """Return uint8 images and int64 classes of a split; None for ``"val"`` to split it from the training set."""

    def pipeline(self, train: bool) -> Pipeline:
        """Return the resizing, and the augmentation if ``train`` and ``self.augment``; by default neither."""
        return Pipeline()

    def normalization(self) -> Transform:
        """Return the function from uint8 pixels to normalised float32, for one image or a batch."""
        return chain(v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std))

    # ---- the same for all -------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def class_counts(self) -> list[int]:
        """Number of images of each class in the training part; known after ``setup("fit")``."""
        if self.train_dataset is None:
            raise RuntimeError(
                "class_counts are known once the training part is chosen. Call setup('fit') first, as the Trainer does."
            )
        return torch.bincount(self.train_dataset.targets, minlength=self.num_classes).tolist()

    def setup(self, stage: str) -> None:
        """Create the datasets of ``stage`` (fit, validate, test or predict), once."""
        check(
            stage in ("fit", "validate", "test", "predict"),
            "stage must be 'fit', 'validate', 'test' or 'predict'",
            stage,
            "Call setup once for each stage that you need.",
        )
        if stage in ("fit", "validate") and self.train_dataset is None:
            self._setup_train_and_val()
        if stage in ("test", "predict") and self.test_dataset is None:
            self.test_dataset = self._dataset(*_filled(self.load_split("test"), "test"), train=False)

    def _setup_train_and_val(self) -> None:
        images, targets = _filled(self.load_split("train"), "train")
        counts = torch.bincount(targets, minlength=self.num_classes)
        missing = [name for name, count in zip(self.classes, counts, strict=True) if count == 0]
        check(not missing, "Every class must have a training image", missing, "Add images of these, or drop them.")
        given = self.load_split("val")
        train, val = train_val_indices(
            targets,
            self.classes,
            val_fraction=self.val_fraction if given is None else 0.0,
            train_fraction=self.train_fraction,
            imbalance_factor=self.imbalance_factor,
            seed=self.seed,
        )
        if given is None and len(val):
            given = select(images, val), targets[val]
        if given is not None:
            self.val_dataset = self._dataset(*_filled(given, "val"), train=False)
        self.train_dataset = self._dataset(select(images, train), targets[train], train=True)

    def _dataset(self, images: Images, targets: Tensor, train: bool) -> ImageDataset:
        transform = self.train_transform if train else self.eval_transform
        pipeline = self.pipeline(train)
        if transform is None and self.in_memory and pipeline.batchable:
            if pipeline.resize is not None or not isinstance(images, Tensor):
                images = torch.stack(_decoded(images, pipeline.resize))
            return BatchedImageDataset(images, targets, chain(pipeline.batch_augment, self.normalization()))
        if self.in_memory and not isinstance(images, Tensor):
            images = _decoded(images, None)
        if transform is None:
            transform = chain(pipeline.resize, pipeline.augment, self.normalization())
        return ImageDataset(images, targets, transform)

    collate_fn = staticmethod(collate)

    def dataset_of(self, stage: str) -> ImageDataset | None:
        """Return the dataset of fit, validate, test or predict; None if there is no validation part."""
        if stage == "validate" and self.train_dataset is not None:
            return self.val_dataset
        dataset = {"fit": self.train_dataset, "validate": self.val_dataset}.get(stage, self.test_dataset)
        if dataset is None:
            raise RuntimeError(
                f"There are no data for this loader yet. Call setup({stage!r}) first, as the Trainer does."
            )
        return dataset


def _filled(loaded: tuple[Images, Tensor] | None, split: Split) -> tuple[Images, Tensor]:
    """Return the images and classes that a subclass loaded; raise a ValueError if there are none."""
    if loaded is None or len(loaded[1]) == 0:
        raise ValueError(f"The {split} split must hold at least one image, got none. Check where the data come from.")
    return loaded


def _decoded(images: Images, resize: Transform | None) -> list[Tensor]:
    """Return all images decoded, and resized if ``resize`` is given."""
    return [images[i] if resize is None else resize(images[i]) for i in range(len(images))]
