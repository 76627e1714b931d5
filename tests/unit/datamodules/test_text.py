from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from kd_lightning.datamodules import PythonDocsDataModule, TextBlocks


class Letters(PythonDocsDataModule):
    """Twenty documents of fifty bytes."""

    def documents(self) -> dict[str, str]:
        return {f"title {i}": chr(ord("a") + i) * 50 for i in range(20)}


def text_of(blocks: TextBlocks) -> str:
    rows = zip(blocks.input_ids, blocks.attention_mask, strict=True)
    return "".join(PythonDocsDataModule.decode(row[mask == 1]) for row, mask in rows)


@pytest.mark.parametrize("length", range(2, 14))
@pytest.mark.parametrize("block_size", [2, 3, 5, 20])
def test_every_byte_but_the_first_is_predicted_once(length: int, block_size: int) -> None:
    document = "".join(chr(ord("a") + i) for i in range(length))
    blocks = TextBlocks([document], block_size)
    predicted = []
    for block in blocks:  # pyright: ignore
        inputs, mask, labels = block["input_ids"], block["attention_mask"], block["labels"]
        assert inputs.shape == mask.shape == labels.shape == (block_size,)
        assert labels.equal(torch.where(mask == 1, inputs, -100))
        predicted += labels[1:][labels[1:] != -100].tolist()
    assert bytes(predicted).decode() == document[1:]


def test_documents_are_those_of_the_reference():
    documents = PythonDocsDataModule().documents()
    assert len(documents) > 100
    assert 'The "assert" statement' in documents
    assert "Lambdas" in documents
    assert documents["Lambdas"].startswith("Lambdas\n\n")
    assert not any(text.splitlines()[1].startswith(("***", "===")) for text in documents.values() if "\n" in text)
    assert sum(map(len, documents.values())) > 250_000


def test_no_text_is_in_two_splits():
    data = PythonDocsDataModule()
    documents, split = data.documents(), data.split()
    assert sorted(title for part in split.values() for title in part) == sorted(documents)
    paragraphs = {
        part: {p.strip() for title in titles for p in documents[title].split("\n\n") if len(p) > 150}
        for part, titles in split.items()
    }
    assert not paragraphs["train"] & paragraphs["test"]
    assert not paragraphs["train"] & paragraphs["val"]


def test_split_depends_on_titles_and_seed():
    split = Letters().split()
    assert [len(split[part]) for part in ("train", "val", "test")] == [16, 2, 2]
    # the hash is the same everywhere and always
    assert split["test"] == ["title 17", "title 0"]
    other = Letters(seed=1).split()
    assert other["test"] == split["test"]
    assert other["train"] != split["train"]
    assert not set(Letters(val_fraction=0.5).split()["test"]) ^ set(split["test"])


def test_a_smaller_part_lies_within_a_larger_one():
    parts = [set(Letters(train_fraction=fraction).split()["train"]) for fraction in (0.01, 0.25, 0.5, 1.0)]
    assert [len(part) for part in parts] == [1, 4, 8, 16]
    assert parts[0] < parts[1] < parts[2] < parts[3]


def test_loaders():
    data = Letters(batch_size=3, eval_batch_size=5, block_size=21)
    data.setup("fit")
    train, val = list(data.train_dataloader()), data.val_dataloader()
    assert sum(len(batch["labels"]) for batch in train) == 16 * 3
    assert all(set(batch) == {"input_ids", "attention_mask", "labels"} for batch in train)
    assert not isinstance(val, list)
    assert [len(batch["labels"]) for batch in val] == [5, 1]
    before = data.datasets
    data.setup("test")
    assert data.datasets is before
    assert len(list(data.test_dataloader())) == len(list(data.predict_dataloader())) == 2
    assert set(text_of(data.datasets["test"])) == {"a", "r"}
    without = Letters(val_fraction=0.0)
    without.setup("fit")
    assert without.val_dataloader() == []


def test_bytes_and_back():
    text = "naïve “quotes” …"
    tokens = PythonDocsDataModule.encode(text)
    assert PythonDocsDataModule.decode(tokens) == text
    assert int(tokens.max()) < PythonDocsDataModule().num_classes == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1 or None, got 0"),
        ({"block_size": 1}, "block_size must be at least 2, got 1"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
        ({"test_fraction": 0.0}, r"test_fraction must be in \(0, 1\), got 0.0"),
        ({"train_fraction": 0.0}, r"train_fraction must be in \(0, 1\], got 0.0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PythonDocsDataModule(**options)


def test_errors_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="Call setup first"):
        Letters().train_dataloader()
    with pytest.raises(ValueError, match=r"leave one to train on, but test_fraction=0.9 takes 18"):
        Letters(test_fraction=0.9, val_fraction=0.9).split()
    real = builtins.__import__

    def without_topics(name: str, *args: Any, **options: Any) -> Any:
        if name == "pydoc_data.topics":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_topics)
    with pytest.raises(ImportError, match=r"comes without pydoc_data\.topics"):
        PythonDocsDataModule().documents()
