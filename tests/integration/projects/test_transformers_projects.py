"""Hugging Face models in a LightningModule, from tiny random configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kd_lightning.callbacks import DistillationCallback
from kd_lightning.functional import kd_loss
from tests.integration.projects.helpers import distil, trained

transformers: Any = pytest.importorskip("transformers")
MakeTrainer = Callable[..., Trainer]

VOCABULARY, PAD = 31, 0


def bert(width: int) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=width,
        max_position_embeddings=16, num_labels=3, pad_token_id=PAD,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2(width: int, vocabulary: int = VOCABULARY) -> Any:
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2,
        pad_token_id=PAD,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Sequences(LightningModule):
    """Everything is the model's: it takes the batch, and returns its loss."""

    def __init__(self, kind: str = "bert", width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = bert(width) if kind == "bert" else gpt2(width)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self(**batch)
        self.log("train_loss", outputs.loss, batch_size=len(batch["input_ids"]))
        return outputs.loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def sentences(causal: bool) -> list[dict[str, Tensor]]:
    """Of different lengths; the first token tells what follows."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, VOCABULARY, (32, 1), generator=generator)
    tokens = (starts - 3 + torch.arange(12)) % (VOCABULARY - 3) + 3
    lengths = torch.randint(5, 13, (32, 1), generator=generator)
    mask = torch.arange(12) < lengths
    tokens = torch.where(mask, tokens, PAD)
    labels = torch.where(mask, tokens, -100) if causal else starts.squeeze(1) % 3
    whole = {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}
    return [{name: value[i : i + 8] for name, value in whole.items()} for i in range(0, 32, 8)]


def loader(batches: list[dict[str, Tensor]]) -> Any:
    return DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]


def next_tokens(batch: Any) -> Tensor:
    """The label of what each position predicts."""
    return F.pad(batch["labels"][:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("layer", [None, "model", "model.classifier"])
def test_sequence_classifier(layer: str | None, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = sentences(causal=False)
    teacher = bert(32)
    trained(teacher, lambda: teacher(**batches[0]).loss, steps=15, lr=5e-3)
    inputs = (lambda batch: batch) if layer == "model.classifier" else None
    callback = DistillationCallback(teacher, layer, temperature=2.0, inputs=inputs)
    distil(Sequences(), callback, loader(batches), make_trainer, tmp_path)


@pytest.mark.filterwarnings("ignore:the teacher has 36 classes, the student 31")  # meant here
def test_causal_language_model(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = sentences(causal=True)
    teacher = gpt2(32, vocabulary=VOCABULARY + 5)  # a vocabulary padded to another multiple
    trained(teacher, lambda: teacher(**batches[0]).loss, steps=15, lr=5e-3)
    module = Sequences("gpt2").eval()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    first = batches[0]
    with torch.no_grad():
        student, taught = module(**first).logits, teacher(**first).logits[..., :VOCABULARY]
    counts = first["attention_mask"][:, 1:].bool()  # positions whose next token is a token
    expected = kd_loss(student[:, :-1][counts], taught[:, :-1][counts], 2.0)
    callback = DistillationCallback(teacher, "model", temperature=2.0, targets=next_tokens)
    losses = distil(module.train(), callback, loader(batches), make_trainer, tmp_path)
    assert losses.kd[0] == pytest.approx(expected.item(), rel=1e-4)


def test_labels_of_a_causal_model_must_be_named(make_trainer: MakeTrainer) -> None:
    batches = sentences(causal=True)
    teacher = gpt2(16)
    trained(teacher, lambda: teacher(**batches[0]).loss, steps=2)
    with pytest.raises(RuntimeError, match=r"has labels \(8, 12\) for token logits \(8, 12, 31\)"):
        make_trainer(callbacks=[DistillationCallback(teacher)]).fit(Sequences("gpt2"), loader(batches))
