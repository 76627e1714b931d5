"""The bytes of a row of a teacher cache: all logits, or the k largest of many."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_lightning.functional import Sparse
from kd_lightning.functional.sparse import Tail, TeacherTarget
from kd_lightning.teachers.cache_file import Bytes

__all__ = ["DTYPES", "RowCodec", "on_device"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_LEAST_CLASSES_FOR_TOP_K = 1000
_UNTOLD = 2**32  # stands for the number of classes of given targets, which name a few and do not tell it


class RowCodec:
    """Encodes the logits of a batch as bytes, one row per sample, and decodes them.

    Args:
        dtype: Name of the type that the values are rounded to.
        top_k: Number of the classes to keep; None keeps all. Of logits ``(N, C)`` a row has k logits, the logit shared
            by all other classes and k numbers of 4 bytes; of tokens ``(B, L, V)`` k + 1 log-probabilities for each
            position, the last of all other classes together, and k numbers of 2 bytes (4 above 65,536 classes). Targets
            that a teacher gives have that form, too, with numbers of 4 bytes.
        temperature: The temperature at which the log-probabilities of tokens are made.
    """

    tail: Tail = "bucket"
    """The tail of decoded targets: that of the targets that the teacher gave last."""

    def __init__(self, dtype: str, top_k: int | None, temperature: float) -> None:
        self.name = dtype
        self.dtype = DTYPES[dtype]
        self.top_k = top_k
        self.temperature = temperature

    def shape(self, logits: TeacherTarget) -> list[int]:
        """Return the shape of a sample's logits."""
        return list(logits.shape[1:]) if isinstance(logits, Tensor) else [*logits.indices.shape[1:-1], _UNTOLD]

    def encode(self, logits: TeacherTarget, inputs: Mapping[str, Any] | None = None) -> Bytes:
        """Return one row of bytes for each sample.

        Args:
            logits: ``(B, ...)``, or Sparse targets.
            inputs: Not used, because all rows have one length.

        Raises:
            TypeError: If a teacher gives Sparse targets and there is no ``top_k``.
            ValueError: If the logits are not finite, too large for the type, or too few for a top-k; if targets do not
                have ``top_k`` classes, or were made at another temperature.
        """
        if isinstance(logits, Sparse):
            parts = self._given(logits)
        elif self.top_k is not None and logits.dim() > 2:
            self._check_classes(logits, self.top_k)
            parts = self._tokens(logits.detach(), self.top_k)
        else:
            if self.top_k is not None:
                self._check_classes(logits, self.top_k)
            logits = logits.detach().float().cpu()
            values, *classes = (logits.flatten(1),) if self.top_k is None else _largest(logits, self.top_k)
            parts = [values.to(self.dtype), *classes]
            self._check_finite(values, parts[0])
        return torch.cat([part.flatten(1).contiguous().view(torch.uint8) for part in parts], 1).numpy()

    def decode(
        self, rows: Bytes, shape: list[int], device: torch.device | None = None, inputs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return the logits of these rows in float32, or the :class:`~kd_lightning.functional.Sparse` targets.

        Args:
            rows: What :meth:`encode` returned.
            shape: Shape of a sample's logits.
            device: Device of the result, by default the CPU.
            inputs: Not used.
        """
        return self.decode_bytes(on_device(rows, device), shape)

    def decode_bytes(self, encoded: Tensor, shape: list[int]) -> Any:
        """Return :meth:`decode` of bytes that are on the device of the result."""
        if self.top_k is None:
            return encoded.view(self.dtype).float().reshape(-1, *shape)
        *positions, classes = shape
        split = math.prod(positions) * (self.top_k + 1) * self.dtype.itemsize
        values = _copy(encoded[:, :split]).view(self.dtype).float().view(-1, *positions, self.top_k + 1)
        numbers = _copy(encoded[:, split:]).view(_number_type(shape)).view(-1, *positions, self.top_k)
        if not positions and classes != _UNTOLD:
            return values[:, -1:].repeat(1, classes).scatter(1, numbers.long(), values[:, :-1])
        values = values - values.logsumexp(-1, keepdim=True)  # because rounded probabilities do not sum to 1
        return Sparse(numbers, values[..., :-1], self.temperature, self.tail, values[..., -1:])

    def empty_position(self, shape: list[int]) -> list[Tensor]:
        """Return the bytes of each part of a position that has no logits: logits of 0, or equal probabilities."""
        if self.top_k is None:
            return [torch.zeros(shape[-1] * self.dtype.itemsize, dtype=torch.uint8)]
        numbers = torch.arange(self.top_k).to(_number_type(shape)).view(torch.uint8)
        return [torch.zeros((self.top_k + 1) * self.dtype.itemsize, dtype=torch.uint8), numbers]

    def dense(self, rows: Bytes, shape: list[int]) -> Tensor:
        """Return logits of all classes, of tokens over the temperature and up to a shift, to compare with others."""
        decoded = self.decode(rows, shape)
        if isinstance(decoded, Tensor):
            return decoded
        assert decoded.log_rest is not None
        rest = decoded.log_rest - math.log(shape[-1] - decoded.indices.shape[-1])
        return rest.repeat(*[1] * len(shape), shape[-1]).scatter(-1, decoded.indices.long(), decoded.log_probs)

    def error(self, stored: Bytes, computed: Bytes, shape: list[int]) -> Tensor:
        """Return the relative error of each stored row."""
        if shape[-1] == _UNTOLD:
            return self._error_of_given(stored, computed, shape)
        have, want = (self.dense(part, shape).flatten(1) for part in (stored, computed))
        return (have - want).norm(dim=1) / (want - want.mean(1, keepdim=True)).norm(dim=1).clamp(min=1e-6)

    def warn_of_top_k(self, logits: TeacherTarget, encoded: Bytes, inputs: Mapping[str, Any] | None = None) -> None:
        """Warn of the error of the student's gradient that a top-k of classes causes in the first rows."""
        if self.top_k is None or not isinstance(logits, Tensor):
            return
        first = slice(None) if logits.dim() == 2 else slice(1)  # of tokens one sample has enough
        shape, classes = list(logits.shape[1:]), logits.shape[-1]
        exact = logits[first].detach().float().cpu().reshape(-1, classes)
        kept = self.dense(encoded[first], shape).reshape(-1, classes)
        errors = []
        made_at = self.temperature
        for t in (1, 2, 4) if len(shape) == 1 else (made_at,):
            p, q = (exact / t).softmax(1), (kept * (made_at / t)).softmax(1)
            errors.append(f"{float((q - p).norm() / (p - 1 / classes).norm()):.2g} at T = {t:g}")
        warnings.warn(
            f"top_k={self.top_k} of {classes} classes: on the first rows the gradient of an untrained student "
            f"is wrong by a factor of {', '.join(errors)}.",
            stacklevel=4,
        )

    def _error_of_given(self, stored: Bytes, computed: Bytes, shape: list[int]) -> Tensor:
        """Return the error of the probabilities, since classes that are not named have no logits."""
        one, two = (self.decode(part, shape) for part in (stored, computed))
        numbers = torch.cat([one.indices.long(), two.indices.long()], -1)
        place = numbers.unique(return_inverse=True)[1]  # because the class numbers may be large and are few
        k, size = one.indices.shape[-1], int(place.max()) + 1
        empty = torch.zeros(*place.shape[:-1], size)
        have = empty.scatter_add(-1, place[..., :k], one.log_probs.exp()).flatten(1)
        want = empty.scatter_add(-1, place[..., k:], two.log_probs.exp()).flatten(1)
        return (have - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-6)

    def _given(self, target: Sparse) -> list[Tensor]:
        k = target.indices.shape[-1]
        if self.top_k is None:
            raise TypeError(
                f"a TeacherCache without top_k keeps logits, got Sparse targets of {k} classes: TeacherCache(..., "
                f"top_k={k})."
            )
        if k != self.top_k:
            raise ValueError(
                f"the teacher gives Sparse targets of {k} classes, but the cache has top_k={self.top_k}: "
                f"TeacherCache(..., top_k={k})."
            )
        if target.temperature != self.temperature:
            raise ValueError(
                f"the teacher gives Sparse targets made at temperature {target.temperature:g}, but the cache is of "
                f"temperature {self.temperature:g}: TeacherCache(..., temperature={target.temperature:g})."
            )
        log_probs, rest = target.log_probs.detach().float().cpu(), target.log_rest
        if bool((log_probs.isnan() | (log_probs == torch.inf)).any()):
            raise ValueError("the teacher's log-probabilities are not finite: they cannot be cached, nor learnt from.")
        if rest is None:
            rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True).clamp(max=1.0))
        self.tail = target.tail
        values = torch.cat([log_probs, rest.detach().float().cpu()], -1)
        return [values.to(self.dtype), target.indices.cpu().to(torch.uint32)]

    def _tokens(self, logits: Tensor, k: int) -> list[Tensor]:
        targets = [Sparse.top_k(sample.float(), k, self.temperature) for sample in logits]  # one softmax at a time
        values = torch.stack([torch.cat([t.log_probs, t.log_rest], -1) for t in targets if t.log_rest is not None])
        if bool(values.isnan().any()):
            raise ValueError("the teacher's logits are not finite: they cannot be cached, nor learnt from.")
        numbers = torch.stack([target.indices for target in targets])
        return [values.to(self.dtype).cpu(), numbers.cpu().to(_number_type(logits.shape))]

    def _check_classes(self, logits: Tensor, k: int) -> None:
        if logits.dim() == 2 and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature:g} is for the top_k of tokens (B, L, V), got logits of shape "
                f"{tuple(logits.shape)}, which are stored at temperature 1: leave temperature out."
            )
        if logits.dim() not in (2, 3) or not _LEAST_CLASSES_FOR_TOP_K <= logits.shape[-1] > k:
            raise ValueError(
                f"top_k={k} is for logits (N, C) or (B, L, V) of at least {_LEAST_CLASSES_FOR_TOP_K} classes, and of "
                f"more than k, got {tuple(logits.shape)}: a temperature brings the tail back, and the gradient would "
                "be wrong. Store all logits, top_k=None."
            )

    def _check_finite(self, values: Tensor, rounded: Tensor) -> None:
        if bool(rounded.isfinite().all()):
            return
        if not bool(values.isfinite().all()):
            raise ValueError("the teacher's logits are not finite: they cannot be cached, nor learnt from.")
        raise ValueError(
            f"the teacher has a logit of {float(values.abs().max()):.4g}, too large for {self.name} "
            f"(at most {torch.finfo(self.dtype).max:g}): TeacherCache(..., dtype='float32')."
        )


def on_device(rows: Bytes, device: torch.device | None) -> Tensor:
    """Return the bytes on a device, without a host sync."""
    encoded = torch.from_numpy(rows)
    if device is not None and device.type == "cuda":
        encoded = encoded.pin_memory()
    return encoded.to(device, non_blocking=True)


def _copy(part: Tensor) -> Tensor:
    """Return the part at an address of its own, because numbers begin at multiples of their size."""
    return part.clone(memory_format=torch.contiguous_format)


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits followed by the logit shared by all other classes, and the k classes."""
    values, classes = logits.topk(k)
    tail = logits.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([values, tail - math.log(logits.shape[1] - k)], 1), classes.to(torch.int32)


def _number_type(shape: list[int] | torch.Size) -> torch.dtype:
    """Return the type of class numbers: of a sample's shape (C,) int32, of positions with classes the smallest."""
    if len(shape) == 1 and shape[0] != _UNTOLD:
        return torch.int32
    return torch.uint16 if shape[-1] <= 2**16 else torch.uint32
