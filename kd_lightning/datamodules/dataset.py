"""Datasets that return whole batches, from images in RAM or from files."""

import hashlib
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate
from torchvision.transforms.v2.functional import pil_to_tensor

from kd_lightning.datamodules.transforms import Transform, replaying


class ImageFiles:
    """Image files as a sequence of uint8 tensors ``(3, H, W)``, decoded on access."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return pil_to_tensor(image.convert("RGB"))


Images = Tensor | list[Tensor] | ImageFiles


def select(images: Images, indices: Tensor) -> Images:
    """Return the images at ``indices``; files are not opened."""
    if isinstance(images, Tensor):
        return images[indices]
    if isinstance(images, ImageFiles):
        return ImageFiles([images.paths[i] for i in indices.tolist()])
    return [images[i] for i in indices.tolist()]


def collate(samples: Any) -> Any:
    """Return the tensors of a batch of an :class:`ImageDataset` as they are; collate anything else as torch does."""
    return samples.tensors if isinstance(samples, TensorDataset) else default_collate(samples)


class ImageDataset(Dataset[tuple[Tensor, ...]]):
    """Images and their classes, transformed one by one.

    Args:
        images: The uint8 images ``(C, H, W)``: a tensor ``(N, C, H, W)``, a list of tensors, or files.
        targets: Their classes ``(N,)``, int64.
        transform: Function from a uint8 image to the network's input.
    """

    def __init__(self, images: Images, targets: Tensor, transform: Transform) -> None:
        self.images = images
        self.targets = targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> TensorDataset:
        """Return a batch, which any ``collate_fn`` reads as samples and :func:`collate` takes as it is."""
        return TensorDataset(self._inputs(indices), self.targets[indices])

    def fingerprint(self) -> str:
        """Return a hash of all classes and of up to 4,096 images before the transform, or of their file names."""
        digest = hashlib.blake2b(self.targets.numpy().tobytes(), digest_size=16)
        for index in range(0, len(self), -(-len(self) // 4096)):
            if isinstance(self.images, ImageFiles):
                digest.update("/".join(Path(self.images.paths[index]).parts[-2:]).encode())
            else:
                digest.update(self.images[index].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _inputs(self, indices: list[int]) -> Tensor:
        return torch.stack([self.transform(self.images[i]) for i in indices])


class BatchedImageDataset(ImageDataset):
    """Images in RAM, a tensor, which ``transform`` takes a batch at a time, with random numbers for each image."""

    images: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def replay(self, indices: list[int], seeds: list[int]) -> TensorDataset | None:
        """Return the samples with the random numbers of these seeds; None if the transform uses the global ones too."""
        before = torch.get_rng_state(), random.getstate()
        with replaying(seeds):
            samples = self.__getitems__(indices)
        untouched = torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        return samples if untouched else None

    def _inputs(self, indices: list[int]) -> Tensor:
        return self.transform(self.images[indices])
