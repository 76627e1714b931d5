"""CIFAR-10 and CIFAR-100 in torchvision's on-disk format."""

from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from kd_lightning.datamodules.base import ImageDataModule, Split
from kd_lightning.datamodules.transforms import Pipeline, crop_pipeline


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32×32 pixels in ten classes (Krizhevsky 2009).

    Inputs are ``(B, 3, 32, 32)``: pixels in [0, 1] minus the channel means of the training images (0.4914, 0.4822,
    0.4465), over their standard deviations (0.2470, 0.2435, 0.2616). Training images are random 32×32 crops out of the
    image with 4 pixels of zeros around it, half of them mirrored (He et al. 2016).

    Args:
        root: Folder that holds ``cifar-10-batches-py``, or to which it is downloaded.
        download: Whether to download missing data.
        **kwargs: The arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> data = CIFAR10DataModule(root="data", batch_size=128, imbalance_factor=0.01)
        >>> data.num_classes, data.input_shape
        (10, (3, 32, 32))
    """

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    _source: type[datasets.CIFAR10] = datasets.CIFAR10
    _classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.download = download

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return list(self._classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Three channels of 32×32 pixels."""
        return 3, 32, 32

    def prepare_data(self) -> None:
        """Download missing data if ``download`` is set.

        Raises:
            FileNotFoundError: If the download fails.
        """
        if not self.download:
            return
        try:
            self._source(self.root, download=True)
        except (OSError, RuntimeError) as error:  # no network; a file that is damaged
            raise FileNotFoundError(
                f"{self._source.__name__} could not be downloaded ({str(error).strip('<>')}). Without a network, put "
                f"the folder {self._source.base_folder} of {self._source.url} into {self.root!r} and set "
                "download=False."
            ) from error

    def load_split(self, split: Split) -> tuple[Tensor, Tensor] | None:
        """Return images and classes of train or test; None for ``"val"``."""
        if split == "val":
            return None
        try:
            source = self._source(self.root, train=split == "train")
        except RuntimeError as error:
            way_out = "Call prepare_data() first, as the Trainer does" if self.download else "Pass download=True"
            raise FileNotFoundError(
                f"{self._source.__name__} must lie, whole, in {self.root}/{self._source.base_folder}, and does not. "
                f"{way_out}, or set root to the folder that has {self._source.base_folder}."
            ) from error
        return torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(source.targets)

    def pipeline(self, train: bool) -> Pipeline:
        """Return random crops with padding 4 and mirror images, in training."""
        return crop_pipeline(32, padding=4, flip=True) if train and self.augment else Pipeline()


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50,000 training and 10,000 test images of 32×32 pixels in 100 classes (Krizhevsky 2009).

    All but the classes and the statistics of the channels, and the folder ``cifar-100-python`` that ``root`` holds, is
    as in :class:`CIFAR10DataModule`.

    Example:
        >>> data = CIFAR100DataModule(root="data", batch_size=64)
        >>> data.num_classes, data.classes[:3]
        (100, ['apple', 'aquarium_fish', 'baby'])
    """

    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    _source = datasets.CIFAR100
    # fmt: off
    _classes = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
        "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
        "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup",
        "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house",
        "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man",
        "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
        "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
        "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew",
        "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower",
        "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train", "trout",
        "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    )
    # fmt: on
