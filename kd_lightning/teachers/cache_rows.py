"""The bytes of a row of a teacher cache: all logits or the k largest, of all positions or of those without padding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd_lightning.functional import Sparse
from kd_lightning.functional.sparse import Tail, TeacherTarget
from kd_lightning.functional.temperature import check_values
from kd_lightning.teachers.cache_file import Bytes
from kd_lightning.teachers.calls import padding_mask

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STORED = {"float16": "f2", "bfloat16": "i2", "float32": "f4"}  # NumPy has no bfloat16
_LEAST_CLASSES_FOR_TOP_K = 1000
_UNTOLD = 2**32  # stands for the number of classes of given targets, which name a few and do not tell it


class _Row(NamedTuple):
    """The tensors that rows are made of."""

    values: Tensor
    """Logits of all classes; or of k, then that of each other class; or k log-probabilities, then that of the rest."""
    classes: Tensor | None
    """The numbers of the k classes; None for logits of all."""


class RowCodec:
    """Encodes the logits of a batch as bytes, one row per sample, and decodes them.

    A row has the values of all positions, then the class numbers of all positions, then with ``max_length`` the number
    of positions. Class numbers have 4 bytes, those of tokens 2 up to 65,536 classes.

    Args:
        dtype: Name of the type that the values are rounded to.
        top_k: Number of the classes to keep; None keeps all.
        temperature: The temperature at which the log-probabilities of tokens are made.
        max_length: Number of the positions that a row has room for. Stored are those of the padding mask, one after the
            other; they are decoded to where a batch's mask has them, on whichever side it is padded. None: all.
    """

    tail: Tail = "bucket"
    """The tail of decoded targets: that of the targets that the teacher gave last."""

    def __init__(self, dtype: str, top_k: int | None, temperature: float, max_length: int | None = None) -> None:
        self.name = dtype
        self.dtype = DTYPES[dtype]
        self.top_k = top_k
        self.temperature = temperature
        self.max_length = max_length

    def shape(self, logits: TeacherTarget) -> list[int]:
        """Return the shape of the logits that a row has room for."""
        shape = [*logits.shape[1:]] if isinstance(logits, Tensor) else [*logits.indices.shape[1:-1], _UNTOLD]
        return shape if self.max_length is None else [self.max_length, *shape[1:]]

    def _row_type(self, shape: list[int]) -> np.dtype:
        value = _STORED[self.name]
        if self.top_k is None:
            fields: list[Any] = [("values", value, tuple(shape))]
        else:
            positions = shape[:-1]
            number = f"i{_number_type(shape).itemsize}"
            fields = [("values", value, (*positions, self.top_k + 1)), ("classes", number, (*positions, self.top_k))]
        if self.max_length is not None:
            fields.append(("length", "i4", ()))
        return np.dtype(fields)

    # ---- to bytes --------------------------------------------------------------------------------------------------

    def encode(self, logits: TeacherTarget, inputs: Mapping[str, Any] | None = None) -> Bytes:
        """Return one row of bytes for each sample of the logits ``(B, ...)``, or raise if they cannot be stored.

        The ``inputs``, by name, have the padding mask ``(B, L)`` that a codec with ``max_length`` reads.
        """
        shape, lengths = self.shape(logits), None
        if self.max_length is not None:
            mask = self._mask(inputs)
            lengths = self._checked_lengths(logits, mask, self.max_length)
            logits = _packed(logits, mask)
        found = self._given(logits) if isinstance(logits, Sparse) else self._stored(logits)
        row = np.zeros(len(found.values), self._row_type(shape))
        for name, part in found._asdict().items():
            if part is None:
                continue
            stored = _bits(part).numpy()
            if lengths is None:
                row[name] = stored
            else:
                longest = stored.shape[1]
                within = np.arange(longest) < lengths[:, None]  # so that the bytes do not depend on the batch
                row[name][:, :longest] = np.where(within[:, :, None], stored, 0)
        if lengths is not None:
            row["length"] = lengths
        return row.view(np.uint8).reshape(len(row), row.itemsize)

    def _checked_lengths(self, logits: TeacherTarget, mask: Tensor, max_length: int) -> np.ndarray:
        positions = logits.shape[:-1] if isinstance(logits, Tensor) else logits.indices.shape[:-1]
        if mask.shape != positions:
            raise ValueError(
                f"max_length is for tokens (B, L, V) with a padding mask (B, L), got logits for {tuple(positions)} and "
                f"a mask {tuple(mask.shape)}. Leave max_length out where all samples have one length."
            )
        lengths = mask.sum(1).cpu().numpy()
        longest = int(lengths.max(initial=0))
        if longest > max_length:
            raise ValueError(
                f"a sample has {longest} positions, and a row of the cache has room for {max_length}: "
                f"TeacherCache(..., max_length={longest}), or cut the samples."
            )
        return lengths

    def _stored(self, logits: Tensor) -> _Row:
        """Return logits as they are stored."""
        logits, k = logits.detach(), self.top_k
        if k is not None:
            self._check_classes(logits, k)
        if k is not None and logits.dim() > 2:
            targets = [Sparse.top_k(sample.float(), k, self.temperature) for sample in logits]  # one softmax at a time
            values = torch.stack([torch.cat([t.log_probs, t.log_rest], -1) for t in targets if t.log_rest is not None])
            if bool(values.isnan().any()):
                raise ValueError("the teacher's logits are not finite: they cannot be cached, nor learnt from.")
            numbers = torch.stack([target.indices for target in targets])
            return _Row(values.to(self.dtype).cpu(), numbers.cpu().to(_number_type(logits.shape)))
        values, classes = logits.float().cpu(), None
        if k is not None:
            values, classes = _largest(values, k)
        rounded = values.to(self.dtype)
        self._check_finite(values, rounded)
        return _Row(rounded, classes)

    def _given(self, target: Sparse) -> _Row:
        """Return a teacher's own targets as they are stored."""
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
        return _Row(values.to(self.dtype), target.indices.cpu().to(torch.uint32))

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

    # ---- from bytes ------------------------------------------------------------------------------------------------

    def decode(
        self, rows: Bytes, shape: list[int], device: torch.device | None = None, inputs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return the logits of these rows in float32, or the :class:`~kd_lightning.functional.Sparse` targets.

        With ``max_length`` they stand where the batch's mask has them, and padding has logits of 0 or equal
        probabilities. A sample with another number of positions than it had is an error.
        """
        row = rows.view(self._row_type(shape))[:, 0]
        if self.max_length is None:
            return self._decoded(self._parts(row, device), shape)
        mask = self._mask(inputs).to(device)
        _check_lengths(_on_device(row["length"], device), mask.sum(1))
        values, classes = self._parts(row, device, slice(min(mask.shape[1], self.max_length)))
        place = (mask.cumsum(1) - 1).clamp(0, values.shape[1] - 1)

        def spread(part: Tensor, padding: Tensor) -> Tensor:
            found = part.gather(1, place.unsqueeze(-1).expand(-1, -1, part.shape[2]))
            return torch.where(mask.unsqueeze(-1), found, padding)

        values = spread(values, values.new_zeros(1))
        if classes is not None:
            first_classes = torch.arange(classes.shape[2], dtype=classes.dtype, device=classes.device)
            classes = spread(classes, first_classes)
        return self._decoded(_Row(values, classes), [mask.shape[1], *shape[1:]])

    def _parts(self, row: np.ndarray, device: torch.device | None = None, positions: slice | None = None) -> _Row:
        """Return the tensors of rows, at the first positions or all."""
        index = () if positions is None else (slice(None), positions)
        values = _on_device(row["values"][index], device).view(self.dtype)
        return _Row(values, None if self.top_k is None else _on_device(row["classes"][index], device))

    def _decoded(self, parts: _Row, shape: list[int]) -> Any:
        values, classes = parts.values.float(), parts.classes
        if classes is None:
            return values
        if len(shape) == 1 and shape[0] != _UNTOLD:
            return values[:, -1:].repeat(1, shape[0]).scatter(1, classes.long(), values[:, :-1])
        values = values - values.logsumexp(-1, keepdim=True)  # because rounded probabilities do not sum to 1
        numbers = classes.view(_number_type(shape))
        return Sparse(numbers, values[..., :-1], self.temperature, self.tail, values[..., -1:])

    # ---- errors ----------------------------------------------------------------------------------------------------

    def error(self, stored: Bytes, computed: Bytes, shape: list[int]) -> Tensor:
        """Return the relative error of each stored row, or raise if a sample has another number of positions."""
        have, want = (rows.view(self._row_type(shape))[:, 0] for rows in (stored, computed))
        if self.max_length is None:
            return self._relative_error(self._parts(have), self._parts(want), shape)
        _check_lengths(torch.from_numpy(have["length"].copy()), torch.from_numpy(want["length"].copy()))
        errors = []
        for number, length in enumerate(have["length"].tolist()):
            one, two = (self._parts(rows[number : number + 1], None, slice(length)) for rows in (have, want))
            errors.append(self._relative_error(one, two, [length, *shape[1:]]) if length else torch.zeros(1))
        return torch.cat(errors)

    def _relative_error(self, stored: _Row, computed: _Row, shape: list[int]) -> Tensor:
        if shape[-1] == _UNTOLD:
            return _error_of_probabilities(self._decoded(stored, shape), self._decoded(computed, shape))
        have, want = (self._dense(parts, shape).flatten(1) for parts in (stored, computed))
        return (have - want).norm(dim=1) / (want - want.mean(1, keepdim=True)).norm(dim=1).clamp(min=1e-6)

    def _dense(self, parts: _Row, shape: list[int]) -> Tensor:
        """Return logits of all classes, of tokens over the temperature and up to a shift, to compare with others."""
        decoded = self._decoded(parts, shape)
        if isinstance(decoded, Tensor):
            return decoded
        assert decoded.log_rest is not None
        rest = decoded.log_rest - math.log(shape[-1] - decoded.indices.shape[-1])
        return rest.repeat(*[1] * len(shape), shape[-1]).scatter(-1, decoded.indices.long(), decoded.log_probs)

    def warn_of_top_k(self, logits: TeacherTarget, encoded: Bytes, inputs: Mapping[str, Any] | None = None) -> None:
        """Warn of the error of the student's gradient that a top-k of classes causes in the first rows."""
        if self.top_k is None or not isinstance(logits, Tensor):
            return
        row, classes = encoded.view(self._row_type(self.shape(logits)))[:, 0], logits.shape[-1]
        exact, positions = logits.detach(), None
        if logits.dim() > 2:  # of tokens one sample has enough
            row, exact = row[:1], exact[:1]
        if self.max_length is not None:
            exact = exact[self._mask(inputs)[:1].to(exact.device)].unsqueeze(0)
            positions = slice(exact.shape[1])
        kept = self._dense(self._parts(row, None, positions), [*exact.shape[1:]]).reshape(-1, classes)
        exact = exact.float().cpu().reshape(-1, classes)
        errors = []
        made_at = self.temperature
        for t in (1, 2, 4) if logits.dim() == 2 else (made_at,):
            p, q = (exact / t).softmax(1), (kept * (made_at / t)).softmax(1)
            errors.append(f"{float((q - p).norm() / (p - 1 / classes).norm()):.2g} at T = {t:g}")
        warnings.warn(
            f"top_k={self.top_k} of {classes} classes: on the first rows the gradient of an untrained student "
            f"is wrong by a factor of {', '.join(errors)}.",
            stacklevel=5,
        )

    def _mask(self, inputs: Mapping[str, Any] | None) -> Tensor:
        mask = padding_mask(inputs or {})
        if mask is None or mask.dim() != 2:
            got = "none" if mask is None else f"one of shape {tuple(mask.shape)}"
            raise ValueError(
                f"a TeacherCache with max_length={self.max_length} needs the padding mask (B, L) of each batch, got "
                f"{got}: give the inputs by name, with 'attention_mask', or 'decoder_attention_mask' where a decoder "
                "has inputs of its own."
            )
        return mask


def _bits(part: Tensor) -> Tensor:
    """Return class numbers and bfloat16 as signed integers of the same bits, which NumPy has and torch can gather."""
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32}[part.itemsize]
    return part if part.dtype in (torch.float16, torch.float32) else part.view(signed)


def _on_device(part: np.ndarray, device: torch.device | None) -> Tensor:
    """Return an array as a tensor on a device, without a host sync."""
    part = np.ascontiguousarray(part)
    if part.strides[0] % part.itemsize:  # because a single row is contiguous whatever its stride is
        part = part.copy()
    tensor = torch.from_numpy(part)
    if device is not None and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _number_type(shape: list[int] | torch.Size) -> torch.dtype:
    """Return the type of class numbers: of a sample's shape (C,) int32, of positions with classes the smallest."""
    if len(shape) == 1 and shape[0] != _UNTOLD:
        return torch.int32
    return torch.uint16 if shape[-1] <= 2**16 else torch.uint32


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits followed by the logit shared by all other classes, and the k classes."""
    values, classes = logits.topk(k)
    tail = logits.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([values, tail - math.log(logits.shape[1] - k)], 1), classes.to(torch.int32)


def _packed(logits: TeacherTarget, mask: Tensor) -> TeacherTarget:
    """Return the positions of the mask, one after the other, with arbitrary ones behind the end of a sample."""

    def pack(values: Tensor) -> Tensor:
        rows = [row[kept] for row, kept in zip(values, mask.to(values.device), strict=True)]
        return pad_sequence(rows, batch_first=True)

    if isinstance(logits, Tensor):
        return pack(logits.detach())
    rest = None if logits.log_rest is None else pack(logits.log_rest)
    return Sparse(pack(logits.indices), pack(logits.log_probs), logits.temperature, logits.tail, rest)


def _check_lengths(stored: Tensor, now: Tensor) -> None:
    message = "a sample of the cache has another number of positions than its padding mask"
    if stored.device.type == "cpu" and len(wrong := (stored != now).nonzero()):
        before, after = (int(lengths[wrong[0, 0]]) for lengths in (stored, now))
        message += f", {before} in the cache and {after} now"
    check_values(
        (stored == now).all(), f"{message}. Was the tokenizer or the collate function changed? Delete the file."
    )


def _error_of_probabilities(one: Sparse, two: Sparse) -> Tensor:
    """Return the error of the probabilities of given targets, since classes that are not named have no logits."""
    numbers = torch.cat([one.indices.long(), two.indices.long()], -1)
    place = numbers.unique(return_inverse=True)[1]  # because the class numbers may be large and are few
    k, size = one.indices.shape[-1], int(place.max()) + 1
    empty = torch.zeros(*place.shape[:-1], size)
    have = empty.scatter_add(-1, place[..., :k], one.log_probs.exp()).flatten(1)
    want = empty.scatter_add(-1, place[..., k:], two.log_probs.exp()).flatten(1)
    return (have - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-6)
