"""Teacher logits that come with the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor
from typing_extensions import override

from kd_lightning.functional import Sparse
from kd_lightning.functional.rows import check_option
from kd_lightning.functional.sparse import TAILS, Tail
from kd_lightning.teachers.calls import extract_logits
from kd_lightning.teachers.made_at import MadeAt, Output
from kd_lightning.teachers.weights import hashed


class FromBatch(MadeAt):
    """Base class of the teachers that read a part of the batch, under ``key``, which the student never sees."""

    reads_batch = True

    def __init__(self, key: str | int, output: Output = "logits", temperature: float = 1.0) -> None:
        super().__init__(output, temperature)
        self.key = key
        self.keys: tuple[str | int, ...] = (key,)
        """All parts of the batch that the teacher reads."""

    @override
    def serves(self, batch: Any) -> bool:
        if isinstance(batch, Mapping):
            return all(key in batch for key in self.keys)
        sequence = isinstance(batch, (tuple, list))
        return sequence and all(isinstance(key, int) and key < len(batch) for key in self.keys)

    @override
    def student_inputs(self, inputs: Any) -> Any:
        """Return the inputs without what the teacher reads."""
        if isinstance(inputs, Mapping) and not inputs.keys().isdisjoint(self.keys):
            return {key: value for key, value in inputs.items() if key not in self.keys}
        return inputs

    @override
    def index(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise, since these logits need no cache."""
        raise ValueError(f"{type(self).__name__} has its logits already and takes no cache: leave the cache out.")

    def part(self, batch: Any, key: str | int | None = None) -> Any:
        """Return the teacher's part of the batch, by default that of its ``key``, or raise if the batch lacks one."""
        if not self.serves(batch):
            has = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            read = " and ".join(map(repr, self.keys))
            raise ValueError(
                f"{type(self).__name__} reads {read} of the batch, got {has}{size}. Have the dataset and its "
                "collate function put it there: a key of a mapping, or a position in a tuple."
            )
        return batch[self.key if key is None else key]


class BatchTeacher(FromBatch):
    r"""The teacher whose logits are in each batch, under a key; ``teacher="batch:teacher_logits"`` for short.

    The student is called without that key. A batch of a validation without the key is evaluated without a teacher. In a
    bare :class:`~kd_lightning.Distiller` and in an ensemble the inputs are a mapping that has the key.

    With ``indices`` the batch has the probabilities of a few classes only, as servers of language models return them,
    and the teacher gives :class:`~kd_lightning.functional.Sparse` targets. Like logits, the row at position i belongs
    to the token after i; ``prompt_logprobs`` of vLLM are one later.

    Args:
        key: Key of a mapping, or position in a tuple (then override ``unpack_batch``).
        output: What the batch has: ``"logits"``, ``"log_probs"`` (natural) or ``"probs"``.
        temperature: :math:`T_0`, at which they were made; see :class:`~kd_lightning.teachers.FunctionTeacher`.
        indices: Key of the class numbers that the probabilities are of. None: the batch has all classes.
        tail: What becomes of the rest of the probability; see :class:`~kd_lightning.functional.Sparse`. Needs
            ``indices``.

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

    def __init__(
        self,
        key: str | int,
        output: Output = "logits",
        temperature: float = 1.0,
        indices: str | int | None = None,
        tail: Tail = "bucket",
    ) -> None:
        super().__init__(key, output, temperature)
        check_option("tail", tail, TAILS)
        if indices is None and tail != "bucket":
            raise ValueError(f"tail={tail!r} is for the probabilities of a few classes: name the key of their indices.")
        if indices is not None and output == "logits":
            raise ValueError(
                f"indices={indices!r} says that the batch has the probabilities of a few classes, which the logits of "
                "those few do not tell. Have log-probabilities in the batch: output='log_probs'."
            )
        self.indices = indices
        self.tail: Tail = tail
        self.keys = (key,) if indices is None else (key, indices)

    @override
    def logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> Any:
        values = self.part(inputs)
        if not isinstance(values, Tensor):
            raise TypeError(
                f"BatchTeacher needs a tensor under {self.key!r}, got {type(values).__name__}. Have the collate "
                "function stack the samples' logits."
            )
        if self.indices is None:
            return self.to_logits(values.detach())
        log_probs = values.detach().log() if self.output == "probs" else values.detach()
        return Sparse(self.part(inputs, self.indices), log_probs, self.temperature, self.tail)

    @override
    def fingerprint(self) -> str:
        """Hash the key, and at which temperature what is given: the logits come with the data."""
        return hashed(f"batch:{self.key} {self._made_at}{self._few}")

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.key!r}, {self._made_at}{self._few})"

    @property
    def _few(self) -> str:
        return "" if self.indices is None else f", indices={self.indices!r}, tail={self.tail!r}"

    @classmethod
    def of_text(cls, text: str) -> BatchTeacher:
        """Return the teacher that ``"batch:<key>"`` names."""
        kind, _, key = text.partition(":")
        if kind != "batch" or not key:
            raise ValueError(
                f"a teacher written as text is 'batch:' and the key of its logits in the batch, got {text!r}. Write "
                "'batch:teacher_logits', or give a network or a Teacher."
            )
        return cls(key)
