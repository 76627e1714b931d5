"""Augmentation of whole batches, with random numbers of its own for each image."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

Transform = Callable[[Tensor], Tensor]

_replayed: ContextVar[Tensor | None] = ContextVar("replayed", default=None)


@contextmanager
def replaying(seeds: list[int]) -> Iterator[None]:
    """Give image i of a batch the random numbers of ``seeds[i]`` in this context, whatever else the batch holds.

    Example:
        >>> flip, images = BatchRandomHorizontalFlip(), torch.arange(12).reshape(2, 1, 1, 6)
        >>> with replaying([1, 2]):
        ...     both = flip(images)
        >>> with replaying([2]):
        ...     torch.equal(flip(images[1:]), both[1:])
        True
    """
    token = _replayed.set(torch.tensor(seeds))
    try:
        yield
    finally:
        _replayed.reset(token)


def _uniform() -> Tensor | None:
    """Return a number in [0, 1) per image by its seed (splitmix64; Steele et al. 2014); None without replay."""
    state = _replayed.get()
    if state is None:
        return None
    x = state + -0x61C8864680B583EB  # 0x9E3779B97F4A7C15; torch's int64 wraps around
    state.copy_(x)
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return ((x ^ (x >> 31 & 0x1FFFFFFFF)) >> 40 & 0xFFFFFF) / 2**24


def _randint(high: int, n: int) -> Tensor:
    """Return an integer in [0, high) for each image."""
    uniform = _uniform()
    return torch.randint(high, (n,)) if uniform is None else (uniform * high).long()


class BatchRandomCrop(nn.Module):
    """``torchvision.transforms.v2.RandomCrop`` with its own crop for every image of a batch.

    Shapes: ``(N, C, H, W)`` → ``(N, C, size, size)``, of any dtype. The random numbers are torch's global ones, unless
    :func:`replaying`.
    """

    def __init__(self, size: int, padding: int) -> None:
        super().__init__()
        self.size = size
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        """Return a random window of each padded image."""
        windows = F.pad(images, [self.padding] * 4).unfold(2, self.size, 1).unfold(3, self.size, 1)
        n, _, rows, columns = windows.shape[:4]
        return windows[torch.arange(n), :, _randint(rows, n), _randint(columns, n)]


class BatchRandomHorizontalFlip(nn.Module):
    """``torchvision.transforms.v2.RandomHorizontalFlip`` that decides for every image of a batch by itself.

    Shapes: ``(N, C, H, W)`` → the same. The random numbers are torch's global ones, unless :func:`replaying`.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, images: Tensor) -> Tensor:
        """Return the batch with some images mirrored left to right."""
        uniform = _uniform()
        flipped = (torch.rand(len(images)) if uniform is None else uniform) < self.p
        images = images.clone()
        images[flipped] = images[flipped].flip(-1)
        return images


class Pipeline(NamedTuple):
    """The steps from a uint8 image to the one that is normalised.

    Args:
        resize: Deterministic step to the input size, for one image; None if images have that size.
        augment: Random step, for one image.
        batch_augment: Random step of the same distribution, for a batch of images of one size; None if there is none.
    """

    resize: Transform | None = None
    augment: Transform | None = None
    batch_augment: Transform | None = None

    @property
    def batchable(self) -> bool:
        """True if whole batches can be augmented at once."""
        return self.augment is None or self.batch_augment is not None


def crop_pipeline(size: int, padding: int, *, flip: bool, resize: Transform | None = None) -> Pipeline:
    """Return random crops of a zero-padded image, with ``flip`` also random mirror images: CIFAR's augmentation."""
    augment = [v2.RandomCrop(size, padding=padding), *([v2.RandomHorizontalFlip()] if flip else [])]
    batch_augment = [BatchRandomCrop(size, padding), *([BatchRandomHorizontalFlip()] if flip else [])]
    return Pipeline(resize, nn.Sequential(*augment), nn.Sequential(*batch_augment))


def chain(*steps: Transform | None) -> Transform:
    """Return the composition of the steps that are not None."""
    return v2.Compose([step for step in steps if step is not None])
