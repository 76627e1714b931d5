"""Teacher logits that come with the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from kd_lightning.teachers.calls import extract_logits
from kd_lightning.teachers.indexed import IndexedDataset
from kd_lightning.teachers.made_at import MadeAt, Output

__all__ = ["BatchTeacher", "FromBatch"]


class FromBatch(MadeAt):
    """Base class of the teachers that read a part of the batch, which the student never sees.

    Args:
        key: Key of a mapping, or position in a tuple.
        output: See :class:`~kd_lightning.teachers.FunctionTeacher`.
        temperature: See :class:`~kd_lightning.teachers.FunctionTeacher`.
    """

    reads_batch = True

    def __init__(self, key: str | int, output: Output = "logits", temperature: float = 1.0) -> None:
        super().__init__(output, temperature)
        self.key = key

    @override
    def serves(self, batch: Any) -> bool:
        if isinstance(batch, Mapping):
            return self.key in batch
        return isinstance(self.key, int) and isinstance(batch, (tuple, list)) and self.key < len(batch)

    @override
    def student_inputs(self, inputs: Any) -> Any:
        """Return the inputs without the part that the teacher reads."""
        if isinstance(inputs, Mapping) and self.key in inputs:
            return {key: value for key, value in inputs.items() if key != self.key}
        return inputs

    @override
    def index(self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None) -> IndexedDataset:
        """Raise, since these logits need no cache.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{type(self).__name__} has its logits already and takes no cache: leave the cache out.")

    def part(self, batch: Any) -> Any:
        """Return the teacher's part of the batch.

        Raises:
            ValueError: If the batch has no such part.
        """
        if not self.serves(batch):
            has = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise ValueError(
                f"{type(self).__name__} reads {self.key!r} of the batch, got {has}{size}. Have the dataset and its "
                "collate function put it there: a key of a mapping, or a position in a tuple."
            )
        return batch[self.key]


class BatchTeacher(FromBatch):
    r"""The teacher whose logits are in each batch, under a key; ``teacher="batch:teacher_logits"`` for short.

    The student is called without that key. A batch of a validation without the key is evaluated without a teacher. In a
    bare :class:`~kd_lightning.Distiller` and in an ensemble the inputs are a mapping that has the key.

    Args:
        key: Key of a mapping, or position in a tuple (then override ``unpack_batch``).
        output: What the batch has: ``"logits"``, ``"log_probs"`` (natural) or ``"probs"``.
        temperature: :math:`T_0`, at which they were made; see :class:`~kd_lightning.teachers.FunctionTeacher`.

    Raises:
        ValueError: If an option is outside its range; on the call, if the batch has no such part.
        TypeError: On the call, if the part is no tensor.

    Example:
        >>> import torch
        >>> from kd_lightning import Distiller
        >>> distiller = Distiller(BatchTeacher("teacher_logits"), temperature=4.0)
        >>> batch = {"x": torch.ones(2, 4), "teacher_logits": torch.tensor([[3.0, 0.0], [0.0, 2.0]])}
        >>> distiller(batch, torch.zeros(2, 2), torch.tensor([0, 1])).teacher_logits
        tensor([[3., 0.],
                [0., 2.]])
    """

    @override
    def logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> Tensor:
        values = self.part(inputs)
        if not isinstance(values, Tensor):
            raise TypeError(
                f"BatchTeacher needs a tensor under {self.key!r}, got {type(values).__name__}. Have the collate "
                "function stack the samples' logits."
            )
        return self.to_logits(values.detach())

    @override
    def fingerprint(self) -> str:
        """Hash the key, and at which temperature what is given: the logits come with the data."""
        return hashlib.blake2b(f"batch:{self.key} {self._made_at}".encode(), digest_size=16).hexdigest()

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.key!r}, {self._made_at})"

    @classmethod
    def of_text(cls, text: str) -> BatchTeacher:
        """Return the teacher that ``"batch:<key>"`` names.

        Raises:
            ValueError: If the text has another form.
        """
        kind, _, key = text.partition(":")
        if kind != "batch" or not key:
            raise ValueError(
                f"a teacher written as text is 'batch:' and the key of its logits in the batch, got {text!r}. Write "
                "'batch:teacher_logits', or give a network or a Teacher."
            )
        return cls(key)
