"""Text for small language models: the language reference that comes with Python."""

import re
from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.datamodules.base import LoadersDataModule, check
from kd_lightning.datamodules.splits import share

_HEADING = re.compile(r"^(\S.*)\n([*=\-^~\"+])\2{2,}$", re.MULTILINE)  # an underlined line


class TextBlocks(Dataset[dict[str, Tensor]]):
    """Documents as bytes, cut into blocks; the last block of each document is padded.

    A sample has the arguments of Hugging Face's causal models, each ``(block_size,)`` int64: ``input_ids``,
    ``attention_mask`` (0 at the padding) and ``labels``, which are the inputs with −100 at the padding. The model's
    loss, or ``shift_labels=True``, compares the logits at i with the label at i + 1. Blocks overlap by one byte, so
    each byte but the first of a document is predicted once.

    Args:
        documents: Texts, each of at least two bytes in UTF-8.
        block_size: Tokens of a block; at least 2.

    Example:
        >>> blocks = TextBlocks(["abcde"], block_size=4)
        >>> len(blocks), blocks[1]["input_ids"], blocks[1]["labels"]
        (2, tensor([100, 101,   0,   0]), tensor([ 100,  101, -100, -100]))
    """

    def __init__(self, documents: Sequence[str], block_size: int) -> None:
        parts: list[Tensor] = []
        for document in documents:
            tokens = torch.tensor(list(document.encode()), dtype=torch.long)
            parts += [tokens[i : i + block_size] for i in range(0, len(tokens) - 1, block_size - 1)]
        self.input_ids = torch.zeros(len(parts), block_size, dtype=torch.long)
        self.attention_mask = torch.zeros_like(self.input_ids)
        for i, part in enumerate(parts):
            self.input_ids[i, : len(part)] = part
            self.attention_mask[i, : len(part)] = 1

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, mask = self.input_ids[index], self.attention_mask[index]
        return {"input_ids": inputs, "attention_mask": mask, "labels": inputs.masked_fill(mask == 0, -100)}


class PythonDocsDataModule(LoadersDataModule):
    """The Python language reference, which the interpreter has for ``help()``: some 370,000 characters of English.

    The topics of ``pydoc_data.topics`` are cut at their headings into 170 sections (Python 3.11), each taken once. A
    section is a document and belongs to one split. A token is a byte of UTF-8, so there are 256. Batches are those of
    :class:`TextBlocks`. For other texts, override :meth:`documents`.

    The text is that of the running Python (© Python Software Foundation, PSF licence). A hash of its title assigns a
    section to a split, so nearly all sections have the same split in another version.

    Args:
        batch_size: Blocks in a training batch of each process.
        eval_batch_size: Blocks in a validation, test or prediction batch; ``batch_size`` if None.
        block_size: Tokens of a block, at least 2.
        val_fraction: Part of the remaining documents to validate on, in [0, 1); 0: no validation.
        test_fraction: Part of the documents in the test set, in (0, 1). The test set does not depend on ``seed``.
        train_fraction: Part of the then remaining documents to train on, in (0, 1], at least one. A smaller part is a
            subset of a larger one.
        seed: Seed of the validation and training parts.
        num_workers: Number of loader processes; 0 is the fastest for text in memory.
        pin_memory: Whether to copy batches to page-locked memory; None: if there is a CUDA device.

    Raises:
        ValueError: If an argument lies outside its range, or if no document is left to train on.
        ImportError: If this Python lacks the topics.

    Example:
        >>> data = PythonDocsDataModule(batch_size=4, block_size=64)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> sorted(batch), batch["input_ids"].shape, data.num_classes
        (['attention_mask', 'input_ids', 'labels'], torch.Size([4, 64]), 256)
        >>> data.decode(data.encode("naïve")[:4])
        'naï'
    """

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        block_size: int = 128,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        train_fraction: float = 1.0,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, val_fraction, num_workers, pin_memory)
        check(block_size >= 2, "block_size must be at least 2", block_size, "A token is predicted from those before.")
        check(0 < test_fraction < 1, "test_fraction must be in (0, 1)", test_fraction, "0.1 is usual.")
        check(0 < train_fraction <= 1, "train_fraction must be in (0, 1]", train_fraction, "1.0 means all there is.")
        self.block_size = block_size
        self.test_fraction = test_fraction
        self.train_fraction = train_fraction
        self.seed = seed
        self.datasets: dict[str, TextBlocks] = {}

    @property
    def num_classes(self) -> int:
        """Size of the vocabulary: the number of bytes."""
        return 256

    @staticmethod
    def encode(text: str) -> Tensor:
        """Return the tokens ``(L,)`` of a text."""
        return torch.tensor(list(text.encode()), dtype=torch.long)

    @staticmethod
    def decode(tokens: Tensor) -> str:
        """Return the text of tokens ``(L,)``; bytes that are not UTF-8 become �."""
        return bytes(tokens.tolist()).decode(errors="replace")

    def documents(self) -> dict[str, str]:
        """Return the title and text of each document."""
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise ImportError(
                "this Python comes without pydoc_data.topics, the text behind help(), as some trimmed installations "
                "do. Take a complete Python, or override documents() with a text of your own."
            ) from error
        sections: dict[str, str] = {}
        for name in sorted(topics):
            text = topics[name]
            starts = [0, *(match.start() for match in _HEADING.finditer(text) if match.start() > 0), len(text)]
            for start, end in pairwise(starts):
                # the underline is dropped, because it depends on the heading's level in the topic
                section = _HEADING.sub(r"\1", text[start:end]).strip()
                if section:
                    title = section.splitlines()[0]
                    sections.setdefault(title, section)
        return sections

    def split(self) -> dict[str, list[str]]:
        """Return the titles of the documents of ``"train"``, ``"val"`` and ``"test"``."""
        titles = list(self.documents())
        count = share(len(titles), self.test_fraction)
        by_hash = _shuffled(titles, "test")
        test, rest = by_hash[:count], _shuffled(by_hash[count:], f"val {self.seed}")
        count = share(len(rest), self.val_fraction) if self.val_fraction > 0 else 0
        val, train = rest[:count], rest[count:]
        if not train:
            raise ValueError(
                f"the {len(titles)} documents must leave one to train on, but test_fraction={self.test_fraction} takes "
                f"{len(test)} and val_fraction={self.val_fraction} takes {len(val)}. Lower them."
            )
        train = _shuffled(train, f"train {self.seed}")[: share(len(train), self.train_fraction)]
        return {"train": train, "val": val, "test": test}

    def setup(self, stage: str) -> None:
        """Cut the documents into blocks, once."""
        if not self.datasets:
            documents = self.documents()
            self.datasets = {
                part: TextBlocks([documents[title] for title in titles], self.block_size)
                for part, titles in self.split().items()
            }

    def dataset_of(self, stage: str) -> TextBlocks | None:
        """Return the blocks of fit, validate, test or predict; None if there is no validation part."""
        if stage == "validate" and self.val_fraction == 0:
            return None
        if not self.datasets:
            raise RuntimeError("There are no data for this loader yet. Call setup first, as the Trainer does.")
        return self.datasets[{"fit": "train", "validate": "val"}.get(stage, "test")]


def _shuffled(titles: Sequence[str], salt: str) -> list[str]:
    """Return the titles in an order that depends on titles and salt alone."""
    return sorted(titles, key=lambda title: sha256(f"{salt}: {title}".encode()).digest())
