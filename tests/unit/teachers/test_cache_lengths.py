"""A cache of tokens whose batches are padded to their longest sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, Distiller, FrozenTeacher
from kd_lightning.functional import Sparse
from kd_lightning.models import CausalTransformer
from kd_lightning.teachers import FunctionTeacher, MappedClasses, TeacherCache, TeacherEnsemble
from tests.helpers import assert_same

VOCABULARY, LONGEST = 1200, 9
LENGTHS = (3, 5, 7, 4, 9, 2, 5, 1, 6, 8)
pytestmark = pytest.mark.filterwarnings("ignore:top_k=")

SAMPLES = [torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def padded(samples: list[Tensor], left: bool = False) -> dict[str, Tensor]:
    longest = max(map(len, samples))
    ids, mask = torch.zeros(2, len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        where = slice(longest - len(sample), None) if left else slice(len(sample))
        ids[row, where], mask[row, where] = sample, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def padded_left(samples: list[Tensor]) -> dict[str, Tensor]:
    return padded(samples, left=True)


def model(seed: int) -> CausalTransformer:
    torch.manual_seed(seed)
    network = CausalTransformer(VOCABULARY, dim=8, depth=1, heads=2, max_length=16)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # stands for training
    return network


class Table(nn.Module):
    """Logits that do not depend on where a token stands."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Embedding.from_pretrained(torch.randn(VOCABULARY, VOCABULARY) * 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.scores(input_ids)


def cache_of(path: Path, **options: Any) -> TeacherCache:
    return TeacherCache(path / "teacher.cache", **{"dtype": "float32", "max_length": LONGEST, **options})


def batches(teacher: Any, epochs: int = 3, collate: Any = padded) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of other samples and another length in each epoch."""
    data = teacher.index(SAMPLES, collate)
    for epoch in range(epochs):
        order = torch.Generator().manual_seed(epoch)
        yield from DataLoader(data, batch_size=3, shuffle=True, generator=order, collate_fn=data.collate)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collate", [padded, padded_left])
@pytest.mark.parametrize("top_k", [None, 16])
def test_the_loss_and_its_gradient_are_those_of_the_live_teacher(tmp_path: Path, top_k: Any, collate: Any) -> None:
    network, runs = Table(), []
    live = FrozenTeacher(network)
    if top_k is not None:
        live = FunctionTeacher(lambda **inputs: Sparse.top_k(network(**inputs), top_k, 2.0))
    cached = FrozenTeacher(network, cache=cache_of(tmp_path, top_k=top_k, temperature=2.0 if top_k else 1.0))
    lengths = set()
    for batch, rows in batches(cached, collate=collate):
        lengths.add(batch["labels"].shape[1])
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        results = []
        for teacher, index in ((live, None), (cached, rows)):
            handle = network.register_forward_hook(lambda *_, seen=runs if teacher is cached else []: seen.append(1))
            student = torch.randn(*batch["labels"].shape, VOCABULARY, generator=torch.Generator().manual_seed(0))
            student.requires_grad_()
            loss = Distiller(teacher, 2.0)(inputs, student, batch["labels"], index=index).loss
            handle.remove()
            results.append((loss, *torch.autograd.grad(loss, student)))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-8)
        assert not results[1][1][batch["attention_mask"] == 0].any()
    assert len(lengths) > 2
    assert len(runs) == 5  # the four batches of the first epoch, and one to compare


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("top_k", [None, 16])
def test_a_row_is_the_same_in_every_batch(tmp_path: Path, dtype: Any, top_k: Any) -> None:
    """Whatever its length, its side of padding, and whether the row was there."""
    teacher = FrozenTeacher(Table(), cache=cache_of(tmp_path, dtype=dtype, top_k=top_k))
    seen: dict[int, list[Any]] = {}
    for collate in (padded, padded_left):
        for batch, rows in batches(teacher, collate=collate):
            found: Any = teacher.logits({name: batch[name] for name in ("input_ids", "attention_mask")}, rows)
            parts = [found] if top_k is None else [found.indices.long(), found.log_probs, found.log_rest]
            assert all(part.shape[:2] == batch["labels"].shape for part in parts)
            for number, row in enumerate(rows.tolist()):
                kept = batch["attention_mask"][number] == 1
                seen.setdefault(row, []).append([part[number][kept] for part in parts])
    assert {row: len(first[0][0]) for row, first in seen.items()} == dict(enumerate(LENGTHS))
    for first, *others in seen.values():
        for other in others:
            assert all(map(torch.equal, first, other))


def test_padding_has_no_opinion(tmp_path: Path) -> None:
    """Not even where the teacher has one that is no number."""
    table = torch.randn(VOCABULARY, VOCABULARY)

    def scores(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return table[input_ids].masked_fill(attention_mask[:, :, None] == 0, math.nan)

    batch = padded(SAMPLES[:3])
    given, empty = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["attention_mask"] == 0
    for top_k in (None, 16):
        cache = TeacherCache(tmp_path / f"{top_k}.cache", "float32", top_k, max_length=LONGEST)
        teacher = FunctionTeacher(scores, name="table", cache=cache)
        teacher.index(SAMPLES, padded)
        for _ in range(2):
            found: Any = teacher.logits(given, torch.arange(3))
            if top_k is None:
                assert torch.equal(found[~empty], table[batch["input_ids"][~empty]])
                assert not found[empty].any()
            else:
                assert torch.equal(found.indices[empty].long(), torch.arange(16).expand(int(empty.sum()), 16))
                torch.testing.assert_close(found.log_probs[empty].exp(), torch.full((int(empty.sum()), 16), 1 / 17))


def test_the_file_does_not_depend_on_the_batches(tmp_path: Path) -> None:
    """A row has a number of 4 bytes behind its positions."""
    table = torch.randn(VOCABULARY, VOCABULARY)
    contents = []
    for name, size, collate in (("one", 1, padded), ("all", 10, padded_left)):
        cache = TeacherCache(tmp_path / name, "float16", 8, max_length=LONGEST)
        teacher = FunctionTeacher(lambda input_ids, attention_mask: table[input_ids], name="table", cache=cache)
        data = teacher.index(SAMPLES, collate)
        for batch, rows in DataLoader(data, batch_size=size, collate_fn=data.collate):
            batch.pop("labels")
            teacher.logits(batch, rows)
        assert cache.row_bytes == LONGEST * (9 * 2 + 8 * 2) + 4 + 5
        contents.append(cache.path.read_bytes())
    assert contents[0] == contents[1]


def test_a_batch_may_be_longer_than_every_sample(tmp_path: Path) -> None:
    """As padding to a multiple of eight makes it."""
    table = torch.randn(VOCABULARY, VOCABULARY)
    teacher = FunctionTeacher(
        lambda input_ids, attention_mask: table[input_ids], name="table", cache=cache_of(tmp_path)
    )
    teacher.index(SAMPLES, padded)
    ids, mask = torch.zeros(2, 2, 16, dtype=torch.long)
    ids[0, :9], mask[0, :9] = SAMPLES[4], 1  # a second sample that is all padding
    mask[1] = 0
    for _ in range(2):
        found = teacher.logits({"input_ids": ids, "attention_mask": mask}, torch.tensor([4, 7]))
        assert torch.equal(found[0, :9], table[SAMPLES[4]])
        assert not found[0, 9:].any()
        assert not found[1].any()


def test_given_targets(tmp_path: Path) -> None:
    network = model(2).eval()
    for tail in ("bucket", "renormalize"):
        cache = TeacherCache(tmp_path / tail, "float32", 5, temperature=2.0, max_length=LONGEST)
        few = FunctionTeacher(lambda t=tail, **x: Sparse.top_k(network(**x), 5, 2.0, t), name="few", cache=cache)
        for batch, rows in batches(few):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            found: Any = few.logits(inputs, rows)
            exact = Sparse.top_k(network(**inputs), 5, 2.0)
            kept = batch["attention_mask"] == 1
            assert torch.equal(found.indices.long()[kept], exact.indices[kept])
            torch.testing.assert_close(found.log_probs[kept], exact.log_probs[kept], rtol=1e-4, atol=1e-5)
            assert found.tail == tail
            student = torch.zeros(*kept.shape, VOCABULARY)
            assert Distiller(few, 2.0)(inputs, student, batch["labels"], index=rows).loss.isfinite()


def test_teachers_around_one(tmp_path: Path) -> None:
    """Inputs by position, an ensemble, and classes that are mapped."""
    teacher = FrozenTeacher(model(2), cache=cache_of(tmp_path))
    order = torch.randperm(VOCABULARY)
    mapped, ensemble = MappedClasses(teacher, order.tolist()), TeacherEnsemble([teacher, model(3)])
    for batch, rows in batches(teacher):
        inputs = (batch["input_ids"], batch["attention_mask"])
        kept, expected = batch["attention_mask"] == 1, model(2).eval()(*inputs)
        torch.testing.assert_close(teacher.logits(inputs, rows)[kept], expected[kept], rtol=1e-4, atol=1e-5)
        [in_order] = mapped.in_classes(mapped.logits(inputs, rows), -1)
        torch.testing.assert_close(in_order[kept], expected[kept][:, order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ensemble.logits(inputs, rows)[0][kept], expected[kept], rtol=1e-4, atol=1e-5)


# ---- runs ------------------------------------------------------------------------------------------------------------


def fit(trainer: Trainer, teacher: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    module = DistillationModule(model(1), teacher, 2.0, shift_labels=True)
    train: Any = SAMPLES
    validation: Any = SAMPLES[::-1]
    collate: Any = padded
    if teacher.caches:
        train, validation = teacher.index(train, padded), teacher.index(validation, padded, part="val")
        collate = train.collate
    order = torch.Generator().manual_seed(0)
    training = DataLoader(train, batch_size=3, shuffle=True, generator=order, collate_fn=collate)
    trainer.fit(module, training, DataLoader(validation, batch_size=4, collate_fn=collate))
    return dict(module.student.state_dict()), {name: float(x) for name, x in trainer.callback_metrics.items()}


@pytest.mark.parametrize("top_k", [None, 64])
def test_training_from_the_cache(make_trainer: Callable[..., Trainer], tmp_path: Path, top_k: Any) -> None:
    """A cold and a warm cache give the same bits, in training and validation; a live teacher gives the same values."""

    def cached() -> FrozenTeacher:
        return FrozenTeacher(model(2), cache=cache_of(tmp_path, top_k=top_k, temperature=2.0 if top_k else 1.0))

    cold, values = fit(make_trainer(max_epochs=3), cached())
    warm, again = fit(make_trainer(max_epochs=3), cached())
    assert_same(cold, warm)
    assert values == again
    network = model(2).eval()
    live = FunctionTeacher(lambda **x: Sparse.top_k(network(**x), 64, 2.0)) if top_k else FrozenTeacher(model(2))
    plain, expected = fit(make_trainer(max_epochs=3), live)
    assert values["train_kd_loss"] == pytest.approx(expected["train_kd_loss"], rel=1e-4)
    assert values["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)
    for name, value in plain.items():
        torch.testing.assert_close(cold[name], value, rtol=1e-3, atol=1e-4)  # of Adam


def test_jobs_fill_shards(tmp_path: Path) -> None:
    table = torch.randn(VOCABULARY, VOCABULARY)
    for shard in (0, 1, None):
        cache = cache_of(tmp_path)
        teacher = FunctionTeacher(lambda input_ids, attention_mask: table[input_ids], name="table", cache=cache)
        data: Any = teacher.index(SAMPLES, padded)
        if shard is None:
            cache.merge()
        else:
            cache.take_shard(shard, 2)
        for row in cache.missing().tolist():
            batch, rows = data.collate([data[row]])
            batch.pop("labels")
            teacher.logits(batch, rows)
        assert shard is not None or not len(cache.missing())
        cache.verify()
        cache.leave_shard()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_cache_is_of_one_room(tmp_path: Path) -> None:
    teacher = FrozenTeacher(model(2), cache=cache_of(tmp_path))
    for batch, rows in batches(teacher, 1):
        teacher.logits({name: batch[name] for name in ("input_ids", "attention_mask")}, rows)
    for longest in (10, None):
        with pytest.raises(ValueError, match=f"max_length 9 in the file, {longest} now"):
            FrozenTeacher(model(2), cache=cache_of(tmp_path, max_length=longest)).index(SAMPLES, padded)


def test_other_logits_are_found(tmp_path: Path) -> None:
    for change in (0.0, 0.01, 3.0):
        noise = change * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
        table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)) + noise
        teacher = FunctionTeacher(
            lambda input_ids, attention_mask, t=table: t[input_ids], name="table", cache=cache_of(tmp_path)
        )
        teacher.index(SAMPLES, padded)
        batch = padded(SAMPLES[:4])
        batch.pop("labels")
        if change < 1:
            teacher.logits(batch, torch.arange(4))
        else:
            with pytest.raises(ValueError, match=r"does not have what the teacher says of this batch: row \d is"):
                teacher.logits(batch, torch.arange(4))
