"""Language models through the modules: shift, masks, exact means, fused losses, perplexity; ours and Hugging Face's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler

from kd_lightning import (
    ClassificationModule,
    DistillationModule,
    Distiller,
    FrozenTeacher,
    LayerTerm,
    TeacherCache,
    TeacherEnsemble,
)
from kd_lightning.functional import kd_loss, next_token_targets
from kd_lightning.functional.divergences import JensenShannon
from kd_lightning.fused_distiller import FusedDistiller
from kd_lightning.losses import CrossEntropyLoss, FusedLinearKDLoss, JSDLoss, KDLoss, SimilarityPreservingLoss
from kd_lightning.models import CausalTransformer
from kd_lightning.teachers.calls import check_hidden_states, hidden_states
from kd_lightning.temperature import CosineSchedule, LearnableTemperature, TokenDifficultyTemperature
from tests.helpers import LearnedTemperature

MakeTrainer = Callable[..., Trainer]
VOCABULARY, LENGTH = 13, 10


def make_model(seed: int = 0, dim: int = 8, vocabulary: int = VOCABULARY) -> CausalTransformer:
    torch.manual_seed(seed)
    model = CausalTransformer(vocabulary, dim=dim, depth=1, heads=2, max_length=LENGTH)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # stands for training
    return model


def make_samples(lengths: Sequence[int] = (10, 3, 2, 7, 5, 2, 10, 4)) -> list[dict[str, Tensor]]:
    """Sequences of these lengths, padded, with a prompt of one token that is not learnt in every other one."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for i, length in enumerate(lengths):
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < length).long()
        labels = tokens.masked_fill(mask == 0, -100)
        labels[: 2 * (i % 2)] = -100
        samples.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": labels})
    return samples


def loader(batch_size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(make_samples(), batch_size=batch_size, **options)  # pyright: ignore


def whole_batch() -> dict[str, Tensor]:
    return next(iter(loader(8)))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def distil(**options: Any) -> DistillationModule:
    options = {
        "student": make_model(1),
        "teacher": make_model(2, dim=16),
        "shift_labels": True,
        "optimizer": sgd,
    } | options
    return DistillationModule(**options)


def baseline(**options: Any) -> ClassificationModule:
    return ClassificationModule(make_model(1), **{"shift_labels": True, "optimizer": sgd} | options)


# ---- shift and masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_mapping", [True, False])
def test_loss_is_that_of_shifted_logits(as_mapping: bool) -> None:
    batch, module = whole_batch(), distil(temperature=3.0, kd_weight=0.7, task_weight=0.3)
    assert module.teacher is not None
    mask = batch["attention_mask"] if as_mapping else None
    s, t = (model(batch["input_ids"], mask)[:, :-1] for model in (module.student, module.teacher.module))
    labels = batch["labels"][:, 1:]
    p, q = (s / 3).log_softmax(-1), (t / 3).log_softmax(-1)
    kd = (9 * F.kl_div(p, q, reduction="none", log_target=True).sum(-1))[labels != -100].mean()
    task = F.cross_entropy(s[labels != -100], labels[labels != -100])
    given = batch if as_mapping else (batch["input_ids"], batch["labels"])
    out, _ = module._distil(given, module.progress)
    assert_close((out.kd_loss, out.task_loss, out.loss), (kd, task, 0.7 * kd + 0.3 * task))
    loss, *_ = baseline()._loss(given)
    assert_close(loss, task)


def test_positions_that_are_masked_out_have_no_gradient() -> None:
    batch, seen = whole_batch(), {}
    batch["labels"] = batch["input_ids"].clone()  # the attention mask alone says what is padding
    module = distil(temperature=TokenDifficultyTemperature(base=2.0))
    module.student.register_forward_hook(lambda _, args, output: (output.retain_grad(), seen.update(logits=output))[1])
    out, targets = module._distil(batch, module.progress)
    out.loss.backward()
    assert targets is not None
    left_out = (batch["attention_mask"] == 0) | F.pad(batch["attention_mask"][:, 1:] == 0, (0, 1), value=True)
    assert left_out.equal(targets == -100)
    gradient = seen["logits"].grad.abs().sum(-1)
    assert gradient[left_out].eq(0).all()
    assert gradient[~left_out].gt(0).all()


@pytest.mark.parametrize("make", [distil, baseline])
def test_shifted_by_the_module_or_by_the_data(make: Any, make_trainer: MakeTrainer) -> None:
    results = []
    for shift in (True, False):
        samples = make_samples()
        if not shift:
            samples = [sample | {"labels": next_token_targets(sample["labels"][None])[0]} for sample in samples]
        module = make(shift_labels=shift)
        make_trainer().fit(module, DataLoader(samples, batch_size=3))  # pyright: ignore
        results.append([parameter.detach() for parameter in module.parameters()])
    assert_close(*results)


def test_errors_of_shifting() -> None:
    with pytest.raises(ValueError, match="kd_loss has ignore_index=None"):
        distil(kd_loss=KDLoss(ignore_index=None))
    batch = whole_batch()
    del batch["labels"]
    for module in (distil(), baseline()):
        with pytest.raises(ValueError, match="shift_labels=True shifts the batch's labels, but it has none"):
            module.inputs_and_targets(batch)


# ---- the mean over an optimiser step ---------------------------------------------------------------------------------


class Gradients(Callback):
    """A record of the gradients that the optimiser was given in each step, and of the logs."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.seen: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.seen.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is not None:
            state = [parameter.detach() for parameter in pl_module.parameters()]
            torch.save((self.seen, state), self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def fit(module: Any, trainer: Trainer, batches: Any, gradients: Gradients) -> tuple[Any, Any]:
    trainer.fit(module, batches)
    return gradients.seen, [parameter.detach() for parameter in module.parameters()]


def run(make_trainer: MakeTrainer, module: Any, batch_size: int, accumulate: int, **options: Any) -> tuple[Any, Any]:
    gradients = Gradients()
    trainer = make_trainer(
        callbacks=[gradients], accumulate_grad_batches=accumulate, max_epochs=3, log_every_n_steps=1, **options
    )
    return fit(module, trainer, loader(batch_size), gradients)


@pytest.mark.parametrize("make", [distil, baseline])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulated_batches_give_the_gradient_of_one(make: Any, clip: float | None, make_trainer: MakeTrainer) -> None:
    one = run(make_trainer, make(), 8, 1, gradient_clip_val=clip)
    four = run(make_trainer, make(mean_over="step"), 2, 4, gradient_clip_val=clip)
    assert len(one[0]) == len(four[0]) == 3
    assert_close(four, one, rtol=1e-5, atol=1e-6)
    means_of_means, _ = run(make_trainer, make(), 2, 4)
    with pytest.raises(AssertionError):  # counts differ enough to tell
        assert_close(means_of_means[0], one[0][0], rtol=1e-2, atol=1e-4)


def test_an_incomplete_last_window(make_trainer: MakeTrainer) -> None:
    """Three batches of 3, 3 and 2, two of which are accumulated: steps of six and of two samples."""
    seen, _ = run(make_trainer, baseline(mean_over="step"), 3, 2, limit_train_batches=3)
    assert len(seen) == 6
    model, samples = make_model(1), make_samples()
    for part, got in zip((slice(0, 6), slice(6, 8)), seen, strict=False):
        batch = next(iter(DataLoader(samples[part], batch_size=8)))  # pyright: ignore
        logits = model(batch["input_ids"], batch["attention_mask"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert_close(got, list(gradients), rtol=1e-5, atol=1e-6)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.data -= 0.1 * gradient


def test_learned_temperature_too(make_trainer: MakeTrainer) -> None:
    one = run(make_trainer, distil(temperature=LearnedTemperature()), 8, 1)
    four = run(make_trainer, distil(temperature=LearnedTemperature(), mean_over="step"), 2, 4)
    assert_close(four, one, rtol=1e-5, atol=1e-6)


def test_in_bfloat16(make_trainer: MakeTrainer) -> None:
    for precision in ("bf16-mixed", "bf16-true"):
        (one, *_), _ = run(make_trainer, baseline(), 8, 1, precision=precision)
        (four, *_), _ = run(make_trainer, baseline(mean_over="step"), 2, 4, precision=precision)
        for mine, theirs in zip(four, one, strict=True):
            assert mine.dtype == theirs.dtype
            assert (mine - theirs).norm() <= 0.03 * theirs.norm() + 1e-3


def test_batches_without_a_label_weigh_nothing(make_trainer: MakeTrainer) -> None:
    blank = make_samples()
    for sample in blank[2:]:
        sample["labels"] = torch.full((LENGTH,), -100)
    gradients = Gradients()
    module = distil(mean_over="step")
    trainer = make_trainer(callbacks=[gradients], accumulate_grad_batches=4, max_epochs=1)
    fit(module, trainer, DataLoader(blank, batch_size=2), gradients)  # pyright: ignore
    alone = Gradients()
    fit(distil(), make_trainer(callbacks=[alone], max_epochs=1), DataLoader(blank[:2], batch_size=2), alone)  # pyright: ignore
    assert_close(gradients.seen, alone.seen, rtol=1e-5, atol=1e-6)


def test_logged_losses_are_means_per_token(make_trainer: MakeTrainer) -> None:
    module = baseline(mean_over="step", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=4, log_every_n_steps=1)
    trainer.fit(module, loader(2), loader(3))
    values = trainer.callback_metrics
    last = next(iter(DataLoader(make_samples()[6:], batch_size=2)))  # pyright: ignore
    assert_close(values["train_loss"], baseline()._loss(last)[0])
    everything = baseline()._loss(whole_batch())[0]  # batches of 3, 3 and 2 samples weigh what they have of tokens
    assert_close(values["val_loss"], everything)
    assert_close(values["val_perplexity"], everything.exp())


class InOrder(LightningDataModule):
    """Rank r of n takes batches of samples r, r + n, …."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(make_samples(), world, rank, shuffle=False)  # pyright: ignore
        return loader(2, sampler=sampler)


@pytest.mark.parametrize("make", [distil, baseline])
def test_two_processes_give_the_gradient_of_one(make: Any, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for devices in (2, 1):
        trainer = make_trainer(
            devices=devices,
            strategy="ddp_fork" if devices == 2 else "auto",
            callbacks=[Gradients(tmp_path)],
            use_distributed_sampler=False,
            accumulate_grad_batches=4 // devices,
            max_epochs=3,
        )
        trainer.fit(make(mean_over="step"), datamodule=InOrder())
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert len(one[0]) == 3
    assert_close(first, one, rtol=1e-5, atol=1e-6)
    assert_close(second, first, rtol=0, atol=0)


def test_errors_of_the_mean(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="mean_over must be 'batch' or 'step', got 'epoch'"):
        baseline(mean_over="epoch")
    module = distil(mean_over="step", shift_labels=False, task_weight=0.0)
    samples = [{k: v for k, v in sample.items() if k != "labels"} for sample in make_samples()]
    with pytest.raises(ValueError, match="needs targets that are class indices"):
        make_trainer().fit(module, DataLoader(samples, batch_size=2))  # pyright: ignore


class KeepsGradients(SingleDeviceStrategy):
    @property
    def handles_gradient_accumulation(self) -> bool:
        return True


def test_a_strategy_that_keeps_its_gradients(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(strategy=KeepsGradients(torch.device("cpu")), accelerator="auto")
    with pytest.raises(ValueError, match="out of reach under KeepsGradients"):
        trainer.fit(baseline(mean_over="step"), loader(2))


# ---- temperatures per token ------------------------------------------------------------------------------------------


def test_temperature_per_token(make_trainer: MakeTrainer) -> None:
    module = distil(temperature=TokenDifficultyTemperature(base=2.0))
    seen = []
    watch = Callback()
    watch.on_before_backward = lambda trainer, pl_module, loss: seen.append(pl_module.last_output)  # pyright: ignore
    make_trainer(callbacks=[watch], max_epochs=1, log_every_n_steps=1).fit(module, loader(4))
    assert len(seen) == 2
    for out in seen:
        temperature = out.temperatures[0].student
        assert temperature.shape == (4, LENGTH, 1)
        assert temperature.unique().numel() > 3
    batch, targets = whole_batch(), next_token_targets(whole_batch()["labels"])
    out, _ = module._distil(batch, module.progress)
    rows = targets != -100
    s, t, temperature = (x[rows] for x in (out.student_logits, out.teacher_logits, out.temperatures[0].student))
    divergence = F.kl_div((s / temperature).log_softmax(-1), (t / temperature).softmax(-1), reduction="none")
    assert_close(out.kd_loss, (temperature.square() * divergence.sum(-1, keepdim=True)).mean())


# ---- perplexity ------------------------------------------------------------------------------------------------------


def test_perplexity_of_student_and_teacher(make_trainer: MakeTrainer) -> None:
    module, batch = distil(), whole_batch()
    trainer = make_trainer()
    (values,) = trainer.test(module, loader(3), verbose=False)
    assert module.teacher is not None
    labels = batch["labels"][:, 1:].flatten()
    for name, model in (("test_perplexity", module.student), ("test_teacher_perplexity", module.teacher.module)):
        logits = model(batch["input_ids"], batch["attention_mask"])[:, :-1]
        assert values[name] == pytest.approx(math.exp(F.cross_entropy(logits.flatten(0, 1), labels).item()), rel=1e-5)
    assert values["test_task_loss"] == pytest.approx(math.log(values["test_perplexity"]), rel=1e-5)
    assert {"test_acc", "test_acc_top5", "test_agreement", "test_teacher_acc"} <= set(values)
    assert "test_calibration_error" not in values


class Rank(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save(values, self.folder / f"metrics-{trainer.world_size}-{trainer.global_rank}.pt")


def test_perplexity_over_ranks(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for devices in (2, 1):
        module = distil(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
        trainer = make_trainer(
            devices=devices, strategy="ddp_fork" if devices == 2 else "auto", callbacks=[Rank(tmp_path)], max_epochs=1
        )
        trainer.fit(module, loader(2), loader(2))
    one, first, second = (torch.load(tmp_path / f"metrics-{n}.pt") for n in ("1-0", "2-0", "2-1"))
    for name in ("val_perplexity", "val_teacher_perplexity", "val_loss", "val_kd_loss", "val_task_loss"):
        assert first[name] == second[name] == pytest.approx(one[name], rel=1e-6), name


# ---- fused -----------------------------------------------------------------------------------------------------------

FUSED: dict[str, Any] = {
    "constant": lambda: 2.0,
    "scheduled": lambda: CosineSchedule(4.0, 1.0),
    "learned": lambda: LearnableTemperature(init_value=2.0, warmup_epochs=0),
}


@pytest.mark.parametrize("temperature", FUSED)
def test_fused_trains_as_unfused(temperature: str, make_trainer: MakeTrainer) -> None:
    results, logged = [], []
    for loss in (KDLoss(), FusedLinearKDLoss(chunk_size=7)):
        module = distil(kd_loss=loss, temperature=FUSED[temperature](), mean_over="step")
        results.append(run(make_trainer, module, 2, 2, limit_val_batches=0))
        values = module.trainer.callback_metrics
        logged.append({name: float(values[name]) for name in ("train_loss", "train_kd_loss", "train_task_loss")})
        assert ("train_acc" in values) == (loss.__class__ is KDLoss)
        assert ("entropy_student" in values) == (loss.__class__ is KDLoss)
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)


def test_fused_trains_as_unfused_by_another_divergence(make_trainer: MakeTrainer) -> None:
    losses = JSDLoss(beta=0.3), FusedLinearKDLoss(chunk_size=7, divergence=JensenShannon(0.3))
    unfused, fused = (run(make_trainer, distil(kd_loss=loss), 2, 2, limit_val_batches=0) for loss in losses)
    assert_close(fused, unfused, rtol=1e-5, atol=1e-6)
    unfused, fused = (make_trainer().validate(distil(kd_loss=loss), loader(3), verbose=False) for loss in losses)
    assert fused == unfused


def test_fused_never_has_the_logits(make_trainer: MakeTrainer) -> None:
    module, calls = distil(kd_loss=FusedLinearKDLoss(chunk_size=4)), []
    assert module.teacher is not None
    for model in (module.student, module.teacher.module):
        model.head.register_forward_hook(lambda _, args, output: calls.append(len(output)))  # pyright: ignore
    make_trainer(max_epochs=1).fit(module, loader(4))
    assert calls == [1, 1]  # the check of one sample, at the start


def test_fused_is_measured_as_unfused(make_trainer: MakeTrainer) -> None:
    values = [make_trainer().validate(distil(kd_loss=loss), loader(3), verbose=False)[0]
              for loss in (KDLoss(), FusedLinearKDLoss())]  # fmt: skip
    assert values[0] == values[1]


def test_fused_in_a_bare_loop_with_a_wider_teacher() -> None:
    batch = whole_batch()
    inputs, targets = {k: batch[k] for k in ("input_ids", "attention_mask")}, next_token_targets(batch["labels"])
    student, teacher = make_model(1), make_model(2, dim=16, vocabulary=VOCABULARY + 3)
    out = FusedDistiller(teacher, 2.0, FusedLinearKDLoss(chunk_size=7))(inputs, hidden_states(student, inputs), targets)
    s, t = student(**inputs), teacher(**inputs)[..., :VOCABULARY]
    expected = 0.9 * kd_loss(s, t, 2.0, targets=targets) + 0.1 * F.cross_entropy(s.flatten(0, 1), targets.flatten())
    assert_close(out.loss, expected)
    parameters = list(student.parameters())
    assert_close(torch.autograd.grad(out.loss, parameters), torch.autograd.grad(expected, parameters))
    assert out.student_logits.shape == (0, VOCABULARY)
    with pytest.raises(ValueError, match="hidden states are for FusedLinearKDLoss"):
        Distiller(teacher, 2.0)(inputs, hidden_states(student, inputs), targets)
    fused, hidden = FusedDistiller(teacher, 2.0, FusedLinearKDLoss()), hidden_states(student, inputs)
    with pytest.raises(ValueError, match="a teacher that is run"):
        fused(inputs, hidden, targets, teacher_logits=t)
    with pytest.raises(ValueError, match=r"task_weight is 0\.1 but the batch has no targets"):
        fused(inputs, hidden)


def test_fused_errors(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="FusedLinearKDLoss never has the logits, but the temperature TokenDiff"):
        distil(kd_loss=FusedLinearKDLoss(), temperature=TokenDifficultyTemperature())
    with pytest.raises(ValueError, match="so task_loss must be the default"):
        distil(kd_loss=FusedLinearKDLoss(), task_loss=CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        FusedLinearKDLoss(chunk_size=0)
    with pytest.raises(ValueError, match="the classes are last and the loss is a mean"):
        distil(kd_loss=FusedLinearKDLoss(class_dim=1))
    plain = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY))
    module = distil(student=plain, kd_loss=FusedLinearKDLoss())
    with pytest.raises(TypeError, match="the fused loss needs a network with `base_model`"):
        make_trainer(limit_train_batches=1).fit(module, DataLoader([(torch.zeros(5, dtype=torch.long),) * 2] * 2))  # pyright: ignore


def test_fused_takes_one_teacher_that_runs(tmp_path: Path) -> None:
    one, other = make_model(1), make_model(2)
    cached = FrozenTeacher(one, cache=TeacherCache(tmp_path / "cache"))
    term = LayerTerm("blocks.0", "blocks.0", SimilarityPreservingLoss())
    for teacher, layers in ((TeacherEnsemble([one, other]), None), (cached, None), (one, [term])):
        with pytest.raises(ValueError, match="no ensemble, no cache and no layers go with it"):
            FusedDistiller(teacher, kd_loss=FusedLinearKDLoss(), layers=layers)


def test_what_comes_between_hidden_states_and_logits_is_noticed() -> None:
    class Capped(CausalTransformer):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return 5 * (super().forward(input_ids, attention_mask) / 5).tanh()

    class Scaled(CausalTransformer):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.head(2 * self.base_model(input_ids, attention_mask))

    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    check_hidden_states(make_model(), tokens)
    for kind in (Capped, Scaled):
        model = kind(VOCABULARY, dim=8, depth=1, heads=2)
        model.head.weight.data *= 100
        with pytest.raises(ValueError, match=f"the logits of {kind.__name__} are not its output layer"):
            check_hidden_states(model, tokens)
        assert not model.head._forward_hooks


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_of_tokens_is_torchs(reduction: str) -> None:
    logits, targets = torch.randn(3, 5, 7, requires_grad=True), torch.randint(7, (3, 5))
    targets[0, :2] = -100
    expected = F.cross_entropy(logits.movedim(-1, 1), targets, reduction=reduction)
    got = CrossEntropyLoss(reduction=reduction)(logits.movedim(-1, 1), targets)
    assert_close(got, expected)
    assert_close(*(torch.autograd.grad(loss.sum(), logits) for loss in (got, expected)))


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face(seed: int, width: int, vocabulary: int = VOCABULARY, kind: str = "GPT2") -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=LENGTH, n_embd=width, n_layer=1, n_head=2, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.5,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=LENGTH, initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_hugging_face_task_loss_is_theirs(kind: str) -> None:
    model, batch = hugging_face(0, 8, kind=kind).eval(), whole_batch()
    expected = model(**batch).loss
    module = ClassificationModule(model, shift_labels=True)
    assert_close(module._loss(batch)[0], expected)


@pytest.mark.filterwarnings("ignore:the teacher has 16 classes, the student 13:UserWarning")
@pytest.mark.parametrize("loss", [KDLoss, FusedLinearKDLoss])
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_hugging_face_student_and_teacher(
    kind: str, loss: type[KDLoss], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    teacher = hugging_face(1, 16, VOCABULARY + 3, kind)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    before = copy.deepcopy(teacher.state_dict())
    module = DistillationModule(
        hugging_face(2, 8, kind=kind), teacher, temperature=2.0, kd_loss=loss(), shift_labels=True, mean_over="step",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )  # fmt: skip
    trainer = make_trainer(max_epochs=12, accumulate_grad_batches=2)
    (first,) = trainer.validate(module, loader(4), verbose=False)
    trainer.fit(module, loader(2), loader(4))
    (last,) = trainer.validate(module, loader(4), verbose=False)
    assert last["val_kd_loss"] < 0.7 * first["val_kd_loss"]
    assert last["val_teacher_perplexity"] == first["val_teacher_perplexity"]
    for name, value in teacher.state_dict().items():
        assert value.equal(before[name]), name
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    weights = torch.load(tmp_path / "student.ckpt", weights_only=True)["state_dict"]
    fresh = hugging_face(3, 8, kind=kind)
    fresh.load_state_dict({k.removeprefix("student."): v for k, v in weights.items() if k.startswith("student.")})
    batch = whole_batch()
    del batch["labels"]
    assert_close(fresh.eval()(**batch).logits, module.student.eval()(**batch).logits)


def test_fused_is_refused_where_hugging_face_caps_logits() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=LENGTH, final_logit_softcapping=0.5,
        initializer_range=0.5, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="a soft cap, a scale or an adapter"):
        check_hidden_states(transformers.Gemma2ForCausalLM(config), torch.randint(VOCABULARY, (2, LENGTH)))
