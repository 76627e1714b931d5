"""Hugging Face models in a LightningModule, from tiny random configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kd_lightning import ClassificationModule, DistillationModule, LayerTerm
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.functional import kd_loss
from kd_lightning.losses import HintLoss
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
    """Texts of different lengths, whose first token determines the rest."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, VOCABULARY, (32, 1), generator=generator)
    tokens = (starts - 3 + torch.arange(12)) % (VOCABULARY - 3) + 3
    lengths = torch.randint(5, 13, (32, 1), generator=generator)
    mask = torch.arange(12) < lengths
    tokens = torch.where(mask, tokens, PAD)
    labels = torch.where(mask, tokens, -100) if causal else starts.squeeze(1) % 3
    whole = {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}
    return [{name: value[i : i + 8] for name, value in whole.items()} for i in range(0, 32, 8)]


def loader(batches: Sequence[Any]) -> Any:
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


# ---- encoder–decoders -----------------------------------------------------------------------------------------------


def encoder_decoder(kind: str, width: int) -> Any:
    if kind == "bart":
        config = transformers.BartConfig(
            vocab_size=VOCABULARY, d_model=width, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=width, decoder_ffn_dim=width, max_position_embeddings=16,
            pad_token_id=PAD, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, dropout=0.0,
        )  # fmt: skip
        return transformers.BartForConditionalGeneration(config)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2, pad_token_id=PAD,
        eos_token_id=1, decoder_start_token_id=PAD, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def translations() -> list[dict[str, Tensor]]:
    """Sources of 12 tokens and targets of 7, both with padding."""
    batches = sentences(causal=True)
    for batch in batches:
        labels = batch.pop("labels")[:, :7].flip(1)
        labels[:, 5:] = -100
        batch["labels"] = labels
    return batches


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_encoder_decoder(kind: str, as_tuple: bool, make_trainer: MakeTrainer) -> None:
    """The decoder sees the labels as the model shifts them; the source's mask says nothing of its positions."""
    torch.manual_seed(0)
    batches = translations()
    if as_tuple:
        for batch in batches:
            del batch["attention_mask"]
    data = loader([(b["input_ids"], b["labels"]) for b in batches] if as_tuple else batches)
    student, teacher = encoder_decoder(kind, 16), encoder_decoder(kind, 32)
    trained(teacher, lambda: teacher(**batches[0]).loss, steps=5, lr=5e-3)
    teacher.eval()
    with torch.no_grad():
        of_model, taught = student.eval()(**batches[0]), teacher(**batches[0]).logits
    counts = batches[0]["labels"] != -100
    module = DistillationModule(student, teacher, temperature=2.0, kd_weight=1.0, task_weight=1.0)
    out, targets = module.eval()._distil(next(iter(data)), module.progress)
    torch.testing.assert_close(out.task_loss, of_model.loss)
    torch.testing.assert_close(out.kd_loss, kd_loss(of_model.logits[counts], taught[counts], 2.0))
    torch.testing.assert_close(targets, batches[0]["labels"])

    alone = ClassificationModule(student)
    torch.testing.assert_close(alone.eval()._loss(next(iter(data)))[0], of_model.loss)
    trainer = make_trainer(max_epochs=1, log_every_n_steps=1)
    trainer.fit(module.train(), data, data)
    logits = torch.cat(trainer.predict(module, data))  # pyright: ignore[reportArgumentType]
    assert logits.shape == (32, 7, VOCABULARY)
    with pytest.raises(ValueError, match="is an encoder–decoder, whose labels stand at their places"):
        ClassificationModule(student, shift_labels=True)._loss(next(iter(data)))


@pytest.mark.parametrize("length", [7, 12])
def test_layers_of_encoder_and_decoder_have_masks_of_their_own(length: int) -> None:
    """The encoder's is the source's mask, the decoder's the labels, though both may be of one length."""
    torch.manual_seed(0)
    batch = translations()[0]
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, length - 7), value=-100)
    student, teacher = encoder_decoder("bart", 16), encoder_decoder("bart", 16)
    trained(teacher, lambda: teacher(**batch).loss, steps=2, lr=5e-3)
    names = ["model.encoder.layers.0", "model.decoder.layers.0"]
    module = DistillationModule(student, teacher, layers=[LayerTerm(name, name, HintLoss()) for name in names])
    inputs, targets = module.inputs_and_targets(batch)
    module.distiller.build_projectors(student, inputs)
    with module.distiller.attach(student):
        out = module.distiller(inputs, module(inputs), targets)
    both = [network(**batch, output_hidden_states=True) for network in (student, teacher.eval())]
    for name, states, counts in (
        (names[0], "encoder_hidden_states", batch["attention_mask"] == 1),
        (names[1], "decoder_hidden_states", batch["labels"] != -100),
    ):
        ours, theirs = (each[states][1][counts] for each in both)
        torch.testing.assert_close(out.layer_losses[name], (ours - theirs).square().mean())
