"""The bytes of a row of a teacher cache whose samples have lengths of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd_lightning.functional import Sparse
from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.functional.temperature import check_values
from kd_lightning.teachers.cache_file import Bytes
from kd_lightning.teachers.cache_rows import RowCodec, on_device
from kd_lightning.teachers.calls import padding_mask

__all__ = ["LengthCodec"]


class LengthCodec:
    """Encodes the positions of a sample that are no padding, one after the other, and then their number.

    Positions are decoded to where the batch's padding mask has them, whatever the batch's length and the side on which
    it is padded.

    Args:
        rows: The codec of the positions.
        max_length: Number of the positions that a row has room for.
    """

    def __init__(self, rows: RowCodec, max_length: int) -> None:
        self.rows = rows
        self.max_length = max_length

    def shape(self, logits: TeacherTarget) -> list[int]:
        """Return the shape of the logits that a row has room for."""
        return [self.max_length, *self.rows.shape(logits)[1:]]

    def encode(self, logits: TeacherTarget, inputs: Mapping[str, Any] | None = None) -> Bytes:
        """Return one row of bytes for each sample.

        Args:
            logits: ``(B, L, V)``, or Sparse targets of such positions.
            inputs: By name, with the padding mask ``(B, L)``.

        Raises:
            ValueError: If there is no such mask, if a sample has more than ``max_length`` positions, or for any reason
                of :meth:`RowCodec.encode`.
        """
        mask = self._mask(inputs)
        positions = logits.shape[:-1] if isinstance(logits, Tensor) else logits.indices.shape[:-1]
        if mask.shape != positions:
            raise ValueError(
                f"max_length is for tokens (B, L, V) with a padding mask (B, L), got logits for {tuple(positions)} and "
                f"a mask {tuple(mask.shape)}. Leave max_length out where all samples have one length."
            )
        lengths = mask.sum(1).cpu().numpy().astype(np.uint32)
        longest = int(lengths.max(initial=0))
        if longest > self.max_length:
            raise ValueError(
                f"a sample has {longest} positions, and a row of the cache has room for {self.max_length}: "
                f"TeacherCache(..., max_length={longest}), or cut the samples."
            )
        packed = _packed(logits, mask)
        encoded, blocks = self.rows.encode(packed), []
        for block in self._blocks(encoded, self.rows.shape(packed), longest):
            block[np.arange(longest) >= lengths[:, None]] = 0  # so that the bytes do not depend on the batch
            whole = np.zeros((len(block), self.max_length, block.shape[2]), np.uint8)
            whole[:, :longest] = block
            blocks.append(whole.reshape(len(block), -1))
        return np.concatenate([*blocks, lengths[:, None].view(np.uint8)], 1)

    def decode(
        self,
        rows: Bytes,
        shape: list[int],
        device: torch.device | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the logits of these rows at the positions of the batch, in float32, or Sparse targets.

        Args:
            rows: What :meth:`encode` returned.
            shape: Shape of the logits that a row has room for.
            device: Device of the result, by default the CPU.
            inputs: By name, with the padding mask ``(B, L)``.

        Raises:
            ValueError: If there is no such mask, or a sample has another number of positions than it had.
        """
        mask = self._mask(inputs).to(device)
        lengths = on_device(rows[:, -4:].copy(), device).view(torch.int32).flatten()
        _check_lengths(lengths, mask.sum(1))
        count, length = mask.shape
        size = min(length, self.max_length)
        place = (mask.cumsum(1) - 1).clamp(0, size - 1) + torch.arange(count, device=mask.device)[:, None] * size
        parts = []
        for block, empty in zip(
            self._blocks(rows[:, :-4], shape, self.max_length), self.rows.empty_position(shape), strict=True
        ):
            stored = on_device(np.ascontiguousarray(block[:, :size]), device).flatten(0, 1)
            found = stored.index_select(0, place.flatten()).view(count, length, -1)
            parts.append(torch.where(mask[:, :, None], found, empty.to(mask.device, non_blocking=True)).flatten(1))
        return self.rows.decode_bytes(torch.cat(parts, 1), [length, *shape[1:]])

    def error(self, stored: Bytes, computed: Bytes, shape: list[int]) -> Tensor:
        """Return the relative error of each stored row.

        Raises:
            ValueError: If a sample has another number of positions than it had.
        """
        before, now = (rows[:, -4:].copy().view(np.int32)[:, 0] for rows in (stored, computed))
        _check_lengths(torch.from_numpy(before), torch.from_numpy(now))
        errors = []
        for number, length in enumerate(before):
            have, want = (self._of_length(rows[number : number + 1, :-4], shape, length) for rows in (stored, computed))
            errors.append(self.rows.error(have, want, [int(length), *shape[1:]]) if length else torch.zeros(1))
        return torch.cat(errors)

    def warn_of_top_k(self, logits: TeacherTarget, encoded: Bytes, inputs: Mapping[str, Any] | None = None) -> None:
        """Warn of the error of the student's gradient that a top-k of classes causes in the first sample."""
        packed = _packed(logits, self._mask(inputs))
        self.rows.warn_of_top_k(packed, self.rows.encode(packed))

    def _of_length(self, rows: Bytes, shape: list[int], length: int) -> Bytes:
        """Return the bytes of the first positions."""
        blocks = self._blocks(rows, shape, self.max_length)
        return np.concatenate([block[:, :length].reshape(len(rows), -1) for block in blocks], 1)

    def _blocks(self, rows: Bytes, shape: list[int], length: int) -> list[Bytes]:
        """Return the parts of each position, ``(B, length, bytes)`` each."""
        widths = [len(part) for part in self.rows.empty_position(shape)]
        ends = np.cumsum(widths)[:-1] * length
        return [
            part.reshape(len(rows), length, width) for part, width in zip(np.split(rows, ends, 1), widths, strict=True)
        ]

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
