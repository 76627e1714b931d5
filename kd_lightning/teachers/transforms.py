"""Transforms of a batch's inputs, which were prepared for the student, to those of the teacher."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.teachers.calls import device_of
from kd_lightning.teachers.weights import fingerprint, hashed


class Renormalize:
    r"""From images normalised for the student to images normalised, and sized, for the teacher.

    With the statistics :math:`(\mu_s, \sigma_s)` that the student's images were normalised with and the teacher's
    :math:`(\mu_t, \sigma_t)`, channel by channel,

    .. math:: x \mapsto \frac{(\sigma_s x + \mu_s) - \mu_t}{\sigma_t}

    then bilinear interpolation with antialiasing to ``size``. It runs on the device, for images ``(…, C, H, W)``; the
    type stays.

    Args:
        student_mean: :math:`\mu_s`, one number for each channel, of pixels in [0, 1].
        student_std: :math:`\sigma_s`, positive.
        teacher_mean: :math:`\mu_t`.
        teacher_std: :math:`\sigma_t`, positive.
        size: Height and width, or one number for both. None: as they are.

    Raises:
        ValueError: If the lengths differ, or a standard deviation or size is not positive; on the call, if the inputs
            are no floating-point images of so many channels.

    Example:
        >>> imagenet = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        >>> transform = Renormalize([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], *imagenet, size=224)
        >>> transform(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3, 224, 224])
    """

    def __init__(
        self,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        teacher_mean: Sequence[float],
        teacher_std: Sequence[float],
        size: int | tuple[int, int] | None = None,
    ) -> None:
        statistics = [tuple(map(float, each)) for each in (student_mean, student_std, teacher_mean, teacher_std)]
        sizes = (size, size) if isinstance(size, int) else size
        if len({len(each) for each in statistics}) > 1 or not statistics[0]:
            raise ValueError(
                "Renormalize needs a mean and a standard deviation for each channel, of the student and of the teacher,"
                f" got {', '.join(str(len(each)) for each in statistics)} numbers."
            )
        if not all(deviation > 0 for deviation in (*statistics[1], *statistics[3])):
            raise ValueError(
                f"standard deviations must be positive, got student_std={student_std} and teacher_std={teacher_std}."
            )
        if sizes is not None and not all(side >= 1 for side in sizes):
            raise ValueError(f"size must be positive, or None for images as they are, got {size}.")
        self.student_mean, self.student_std, self.teacher_mean, self.teacher_std = statistics
        self.size = None if sizes is None else tuple(sizes)
        self._affine: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the images as the teacher takes them."""
        channels = len(self.student_mean)
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.shape[-3:-2] != (channels,):
            got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"Renormalize takes normalised images (…, {channels}, H, W) in floating point, got {got}. For inputs "
                "that are more than images, write a function of them that calls it."
            )
        scale, shift = self._on(images.device)
        result = images * scale + shift  # in float32 at least, because interpolation knows no bfloat16 on the CPU
        if self.size is not None and result.shape[-2:] != self.size:
            batch = result.reshape(-1, *result.shape[-3:])
            resized = F.interpolate(batch, self.size, mode="bilinear", align_corners=False, antialias=True)
            result = resized.reshape(*images.shape[:-2], *self.size)
        return result.to(images.dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return scale and shift, copied to the device once because each copy would sync."""
        if device not in self._affine:
            means = torch.tensor([self.student_mean, self.teacher_mean], dtype=torch.float64)
            stds = torch.tensor([self.student_std, self.teacher_std], dtype=torch.float64)
            scale, shift = stds[0] / stds[1], (means[0] - means[1]) / stds[1]
            self._affine[device] = tuple(each.float().view(-1, 1, 1).to(device) for each in (scale, shift))  # pyright: ignore
        return self._affine[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_affine": {}}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(student_mean={self.student_mean}, student_std={self.student_std}, "
            f"teacher_mean={self.teacher_mean}, teacher_std={self.teacher_std}, size={self.size})"
        )


def apply_transform(transform: Callable[[Any], Any] | None, inputs: Any) -> Any:
    """Return the inputs as the teacher takes them, computed without gradient on the inputs' device."""
    if transform is None:
        return inputs
    if isinstance(transform, nn.Module):
        transform.to(device_of(inputs))
    with torch.no_grad():
        return transform(inputs)


def check_transform(transform: Callable[[Any], Any] | None) -> None:
    """Raise if the transform cannot be called, or its text is an address, which changes from run to run."""
    if transform is not None and (not callable(transform) or isinstance(transform, type)):
        got = transform.__name__ if isinstance(transform, type) else type(transform).__name__
        raise TypeError(f"transform must be a function from inputs to inputs, or an object with a call, got {got}.")
    text = "" if transform is None else _text(transform)
    if re.search(r" at 0x[0-9a-f]+", text):
        raise ValueError(
            f"a transform is told from another by its text, and that of {type(transform).__qualname__} is an address. "
            "Give its class a __repr__ with its settings, or write a function at the top of a module."
        )


def with_transform(teacher: str, transform: Callable[[Any], Any] | None) -> str:
    """Return the fingerprint of a teacher whose inputs pass through a transform."""
    if transform is None:
        return teacher
    weights = fingerprint(transform) if isinstance(transform, nn.Module) else ""
    return hashed(f"{teacher} {_text(transform)} {weights}")


def _text(transform: Callable[[Any], Any]) -> str:
    name = getattr(transform, "__qualname__", None)
    return repr(transform) if name is None else f"{transform.__module__}.{name}"
