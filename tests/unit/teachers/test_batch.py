"""Logits that are there already: in the batch, or in a file by the samples' ids."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kd_lightning import DistillationModule, Distiller, FrozenTeacher, TeacherEnsemble
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.teachers import BatchTeacher, LogitsFile, Teacher
from tests.helpers import make_data, make_network


class Student(nn.Module):
    """A network that is called by keyword and refuses what is not for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = make_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Rows(Dataset[dict[str, Any]]):
    """Samples as a table has them: features, label, and what a teacher needs."""

    def __init__(self, count: int, seed: int, **columns: Sequence[Any] | Tensor) -> None:
        self.x, self.labels = make_data(count, seed).tensors
        self.columns = columns

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        more = {name: values[index] for name, values in self.columns.items()}
        return {"x": self.x[index], "labels": self.labels[index], **more}


def logits_of(teacher: nn.Module, count: int, seed: int) -> Tensor:
    with torch.no_grad():
        return teacher.eval()(make_data(count, seed).tensors[0])


def fit(module: DistillationModule, trainer: Trainer, train: Rows, val: Rows | None = None) -> dict[str, float]:
    order = torch.Generator().manual_seed(1)
    loader = DataLoader(train, 16, shuffle=True, generator=order)
    trainer.fit(module, loader, None if val is None else DataLoader(val, batch_size=16))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.fixture
def expected(
    teacher: nn.Module, make_module: Callable[..., DistillationModule], make_trainer: Callable[..., Trainer]
) -> dict[str, float]:
    """Return the metrics of a run that the network itself teaches."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = teacher

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    return fit(make_module(Student(), teacher=Wrapped()), make_trainer(), Rows(64, 0), Rows(32, 1))


Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]


def test_a_key_of_the_batch(
    teacher: nn.Module, expected: dict[str, float], make_module: Make, make_trainer: MakeTrainer
) -> None:
    train = Rows(64, 0, teacher_logits=logits_of(teacher, 64, 0))
    val = Rows(32, 1, teacher_logits=logits_of(teacher, 32, 1))
    module = make_module(Student(), teacher="batch:teacher_logits")
    assert fit(module, make_trainer(), train, val) == pytest.approx(expected, rel=1e-4)
    assert set(module.example_inputs) == {"x"}  # what an export calls the student with


def test_a_validation_without_logits_measures_the_student_alone(
    teacher: nn.Module, make_module: Make, make_trainer: MakeTrainer
) -> None:
    train = Rows(64, 0, teacher_logits=logits_of(teacher, 64, 0))
    values = fit(make_module(Student(), teacher="batch:teacher_logits"), make_trainer(), train, Rows(32, 1))
    assert "val_acc" in values
    assert "val_kd_loss" not in values


def test_values_and_gradients_of_log_probabilities_in_the_batch() -> None:
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(5, 4, dtype=torch.float64)
    batch = {"x": torch.ones(5), "teacher": (logits / 2.0).log_softmax(1)}
    teacher = BatchTeacher("teacher", output="log_probs", temperature=2.0)
    loss = Distiller(teacher, temperature=3.0, task_weight=0.0, kd_weight=1.0)(batch, student).loss
    (gradient,) = torch.autograd.grad(loss, student)
    p, q = (logits / 3).softmax(1), (student.detach() / 3).softmax(1)
    torch.testing.assert_close(loss, 9 * (p * (p.log() - q.log())).sum(1).mean())
    torch.testing.assert_close(gradient, 3 * (q - p) / 5)


def write_npy(folder: Path, ids: Any, logits: Tensor) -> Path:
    file = folder / "logits.npy"
    np.save(file, logits[np.argsort(ids)].numpy())
    return file


def write_safetensors(folder: Path, ids: Any, logits: Tensor) -> Path:
    file = folder / "logits.safetensors"
    save_file({"id": torch.as_tensor(ids), "logits": logits}, file)
    return file


def table(ids: Any, logits: Tensor) -> Any:
    """A table with the metadata and types of the Hugging Face datasets library."""
    pa = pytest.importorskip("pyarrow")
    features = '{"info": {"features": {"id": {"dtype": "string", "_type": "Value"}}}}'
    lists = pa.array([row.tolist() for row in logits], pa.list_(pa.float32()))
    return pa.table({"id": pa.array(ids), "logits": lists}).replace_schema_metadata({"huggingface": features})


def write_parquet(folder: Path, ids: Any, logits: Tensor) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(table(ids, logits), folder / "train-00000-of-00001.parquet", row_group_size=10)
    return folder / "train-00000-of-00001.parquet"


def write_arrow_folder(folder: Path, ids: Any, logits: Tensor) -> Path:
    """Write streams in shards, as ``Dataset.save_to_disk`` does."""
    pa = pytest.importorskip("pyarrow")
    for shard, part in enumerate((slice(0, 40), slice(40, None))):
        rows = table(ids[part], logits[part])
        file = str(folder / f"data-{shard:05d}-of-00002.arrow")
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=7)
    (folder / "dataset_info.json").write_text("{}")
    return folder


Write = Callable[[Path, Any, Tensor], Path]
WRITERS = [write_npy, write_safetensors, write_parquet, write_arrow_folder]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_by_row_in_any_order(
    write: Write,
    teacher: nn.Module,
    expected: dict[str, float],
    make_module: Make,
    make_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    logits = torch.cat([logits_of(teacher, 64, 0), logits_of(teacher, 32, 1)])
    order = np.random.default_rng(0).permutation(96)
    of_file = LogitsFile(write(tmp_path, order, logits[order]))
    ids = torch.arange(96)
    module = make_module(Student(), teacher=of_file)
    values = fit(module, make_trainer(), Rows(64, 0, id=ids[:64]), Rows(32, 1, id=ids[64:]))
    assert values == pytest.approx(expected, rel=1e-4)
    assert torch.equal(pickle.loads(pickle.dumps(of_file)).logits({"id": ids}), logits)


@pytest.mark.parametrize("write", [write_parquet, write_arrow_folder])
def test_ids_that_are_text(write: Write, tmp_path: Path) -> None:
    names = [f"img/{number}.png" for number in range(64)]
    logits = torch.randn(64, 6)
    teacher = LogitsFile(write(tmp_path, names, logits))
    assert torch.equal(teacher.logits({"id": ["img/63.png", "img/0.png"]}), logits[[63, 0]])


def test_several_files(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    logits = torch.randn(20, 6)
    files = [
        write_safetensors(tmp_path / "one", torch.arange(10), logits[:10]),
        write_safetensors(tmp_path / "two", torch.arange(10, 20), logits[10:].clone()),
    ]
    assert torch.equal(LogitsFile(files).logits({"id": torch.tensor([15, 3])}), logits[[15, 3]])
    assert LogitsFile(files).fingerprint() != LogitsFile(files[:1]).fingerprint()


def test_half_precision_and_probabilities_made_at_two(tmp_path: Path) -> None:
    logits = torch.randn(8, 6)
    file = write_safetensors(tmp_path, torch.arange(8), (logits / 2).softmax(1).bfloat16())
    found = LogitsFile(file, output="probs", temperature=2.0).logits({"id": torch.arange(8)})
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.softmax(1), logits.softmax(1), rtol=0.05, atol=0.01)


def test_an_id_that_the_file_does_not_have(
    teacher: nn.Module, make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    file = write_npy(tmp_path, np.arange(64), logits_of(teacher, 64, 0))
    module = make_module(Student(), teacher=LogitsFile(file))
    with pytest.raises(ValueError, match=r"logits\.npy has no logits for the id 64: it has 64 ids, from 0 to 63\."):
        fit(module, make_trainer(), Rows(64, 0, id=torch.arange(1, 65)))


def test_prediction_needs_no_logits(make_module: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    file = write_npy(tmp_path, np.arange(3), torch.randn(3, 6))
    module = make_module(Student(), teacher=LogitsFile(file))
    predicted = make_trainer().predict(module, DataLoader(Rows(32, 1, id=torch.arange(500, 532)), batch_size=16))
    assert predicted is not None
    assert len(predicted) == 2


@pytest.mark.parametrize("form", [BatchTeacher("teacher_logits"), "batch:teacher_logits"])
def test_in_an_ensemble(form: Teacher | str, teacher: nn.Module) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = teacher

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    x, targets = make_data(16).tensors
    batch = {"x": x, "teacher_logits": logits_of(teacher, 16, 0)}
    student = make_network()(x)
    ensemble = TeacherEnsemble([FrozenTeacher(Named()), form])
    assert set(ensemble.student_inputs(batch)) == {"x"}
    one = Distiller(ensemble, temperature=3.0)(batch, student, targets).loss
    two = Distiller(teacher, temperature=3.0)(x, student, targets).loss
    torch.testing.assert_close(one, two)


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_network()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["x"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("kind", ["key", "file"])
def test_in_a_callback(kind: str, teacher: nn.Module, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    logits = logits_of(teacher, 64, 0)
    of_batch = "batch:t" if kind == "key" else LogitsFile(write_npy(tmp_path, np.arange(64), logits))

    def loss(of: Any) -> float:
        torch.manual_seed(3)
        trainer = make_trainer(callbacks=[DistillationCallback(of, student_layer="net")])
        trainer.fit(Plain(), DataLoader(Rows(64, 0, t=logits, id=torch.arange(64)), batch_size=16))
        return float(trainer.callback_metrics["train_kd_loss"])

    assert loss(of_batch) == pytest.approx(loss(teacher), rel=1e-4)


def test_lists_of_different_lengths(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"id": [0, 1], "logits": [[1.0, 2.0], [1.0]]}), tmp_path / "logits.parquet")
    with pytest.raises(ValueError, match=r"must have lists of .* in 'logits', of one length .* of lengths 1, 2\.$"):
        LogitsFile(tmp_path / "logits.parquet").load()
