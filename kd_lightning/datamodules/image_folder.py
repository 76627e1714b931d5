"""Image files in one subfolder for each class."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2

from kd_lightning.datamodules.base import ImageDataModule, Split, check
from kd_lightning.datamodules.dataset import ImageFiles
from kd_lightning.datamodules.transforms import Pipeline, crop_pipeline


class ImageFolderDataModule(ImageDataModule):
    """Image files ``<class>/*.png`` in the folders ``train``, ``test`` and optionally ``val``, else ``val_fraction``.

    The classes are the subfolders of ``train/`` in alphabetical order. Inputs are ``(B, 3, image_size, image_size)``:
    RGB pixels in [0, 1] minus ``mean``, over ``std``. Training images are random crops of random size and aspect ratio
    (as for ImageNet) or, with ``crop_padding``, random crops out of the zero-padded image (as for CIFAR); half of them
    are mirrored. Evaluation takes the centre.

    Args:
        root: Folder that holds ``train/`` and ``test/``.
        image_size: Height and width of the inputs.
        resize_size: Length of the shorter side before the centre crop; None: ``image_size`` · 256 / 224, or
            ``image_size`` with ``crop_padding``.
        crop_padding: Pixels of zeros added on every side of a training image before a random crop; it is resized as in
            evaluation first. None: crops of random size and aspect ratio. 4 is usual for images of 32 pixels.
        mean: Channel means, subtracted from pixels in [0, 1]; ImageNet's by default.
        std: Channel standard deviations, by which the difference is divided; ImageNet's by default.
        in_memory: Whether to keep all decoded images in RAM, at three bytes a pixel. Whole batches are then augmented
            at once, if ``crop_padding`` is set or ``augment`` is not.
        **kwargs: The other arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: If an argument lies outside its range; in ``setup`` and ``classes``, if the layout of the folders is
            another, or if a class has no image.

    Example:
        >>> ImageFolderDataModule("data/flowers", image_size=64, batch_size=32).input_shape
        (3, 64, 64)
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        resize_size: int | None = None,
        crop_padding: int | None = None,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        in_memory: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_memory=in_memory, **kwargs)
        check(image_size >= 1, "image_size must be at least 1", image_size, "It is a number of pixels.")
        check(
            resize_size is None or resize_size >= image_size,
            f"resize_size must be at least image_size, {image_size}, or None",
            resize_size,
            "The centre crop cannot be larger than the image.",
        )
        check(
            crop_padding is None or crop_padding >= 0,
            "crop_padding must be at least 0 or None",
            crop_padding,
            "None means crops of random size.",
        )
        check(len(mean) == 3, "mean must hold three numbers, one per RGB channel", mean, "Grey: repeat it.")
        check(
            len(std) == 3 and min(std) > 0,
            "std must hold three positive numbers, one per RGB channel",
            std,
            "Grey: repeat it.",
        )
        if resize_size is None:
            resize_size = image_size if crop_padding is not None else round(image_size * 256 / 224)
        self.root = root
        self.image_size = image_size
        self.resize_size = resize_size
        self.crop_padding = crop_padding
        self.mean = tuple(mean)
        self.std = tuple(std)

    @property
    def classes(self) -> list[str]:
        """Names of the subfolders of ``train/``, in alphabetical order."""
        return self._class_folders("train")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Three channels of ``image_size`` × ``image_size`` pixels."""
        return 3, self.image_size, self.image_size

    def _class_folders(self, split: Split) -> list[str]:
        root = Path(self.root)
        found = _subfolders(root / split)
        if not found:
            there = ", ".join(_subfolders(root)[:5]) or "no folder"
            raise ValueError(
                f"An image folder must hold {split}/<class>/<image>, with train/, test/ and perhaps val/ in root; "
                f"got root {self.root!r} with {there} in it and no class in {split}/. "
                f"Move the class folders into {split}/, or correct root."
            )
        return found

    def load_split(self, split: Split) -> tuple[ImageFiles, Tensor] | None:
        """Return the files of a split and their classes; None for ``"val"`` if there is no ``val/``."""
        if split == "val" and not (Path(self.root) / "val").is_dir():
            return None
        classes, folders = self.classes, self._class_folders(split)
        unknown = sorted(set(folders) - set(classes))
        if unknown:
            raise ValueError(
                f"The classes of {split}/ must be among those of train/, got {', '.join(map(repr, unknown))}. "
                "Rename or remove them, or add training images."
            )
        folder = str(Path(self.root) / split)
        samples = make_dataset(folder, {name: i for i, name in enumerate(classes)}, IMG_EXTENSIONS, allow_empty=True)
        targets = torch.tensor([label for _, label in samples], dtype=torch.long)
        return ImageFiles([path for path, _ in samples]), targets

    def pipeline(self, train: bool) -> Pipeline:
        """Return resize and centre crop; in training, a random crop of one of two kinds and a random mirror image."""
        fixed = nn.Sequential(v2.Resize(self.resize_size), v2.CenterCrop(self.image_size))
        if not (train and self.augment):
            return Pipeline(resize=fixed)
        if self.crop_padding is not None:
            return crop_pipeline(self.image_size, self.crop_padding, flip=True, resize=fixed)
        return Pipeline(augment=nn.Sequential(v2.RandomResizedCrop(self.image_size), v2.RandomHorizontalFlip()))


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
