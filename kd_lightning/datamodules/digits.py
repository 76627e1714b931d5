"""The handwritten digits of scikit-learn, which need no download."""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from kd_lightning.datamodules.base import ImageDataModule, Split, check
from kd_lightning.datamodules.splits import held_out_counts, shuffle_by_class
from kd_lightning.datamodules.transforms import Pipeline, Transform, chain, crop_pipeline

_WHITE = 16  # the largest pixel value


class DigitsDataModule(ImageDataModule):
    """The 1,797 digits of 8×8 pixels that come with scikit-learn (Alpaydin & Kaynak 1998), in ten classes.

    Inputs are ``(B, 1, 8, 8)``: pixels (0 to 16) divided by 16, minus ``mean`` 0.3053, over ``std`` 0.3760. Needs
    ``pip install kd-lightning[examples]``.

    Args:
        test_fraction: Part of each class's images in the test set, in (0, 1). The test set does not depend on ``seed``.
        augment: Whether to shift training images by up to one pixel in each direction.
        **kwargs: The arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> data.setup("fit")
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, targets.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
        >>> sum(data.class_counts), len(data.val_dataset)
        (1293, 145)
    """

    mean = (0.3053,)
    std = (0.3760,)

    def __init__(self, test_fraction: float = 0.2, augment: bool = False, **kwargs: Any) -> None:
        super().__init__(augment=augment, **kwargs)
        check(0 < test_fraction < 1, "test_fraction must be in (0, 1)", test_fraction, "0.2 is usual.")
        self.test_fraction = test_fraction

    @property
    def classes(self) -> list[str]:
        """The digits, as text."""
        return [str(digit) for digit in range(10)]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """One channel of 8×8 pixels."""
        return 1, 8, 8

    def load_split(self, split: Split) -> tuple[Tensor, Tensor] | None:
        """Return images and classes of train or test; None for ``"val"``."""
        if split == "val":
            return None
        images, targets = _load_digits()
        by_class = shuffle_by_class(targets, self.num_classes, seed=0)
        held_out = held_out_counts([len(c) for c in by_class], self.test_fraction, self.classes, "test_fraction")
        parts = [c[:n] if split == "test" else c[n:] for c, n in zip(by_class, held_out, strict=True)]
        chosen = torch.cat(parts).sort().values
        return images[chosen], targets[chosen]

    def pipeline(self, train: bool) -> Pipeline:
        """Return shifts by up to one pixel, in training."""
        return crop_pipeline(8, padding=1, flip=False) if train and self.augment else Pipeline()

    def normalization(self) -> Transform:
        """Return the function from pixels 0 … 16 to normalised float32."""
        mean, std = [_WHITE * m for m in self.mean], [_WHITE * s for s in self.std]
        return chain(v2.ToDtype(torch.float32), v2.Normalize(mean, std))


def _load_digits() -> tuple[Tensor, Tensor]:
    """Return all uint8 images ``(1797, 1, 8, 8)`` and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "DigitsDataModule reads the images that come with scikit-learn, which is not installed. "
            "Run: pip install kd-lightning[examples]"
        ) from error
    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 8, 8)
    return images, torch.from_numpy(targets).long()
