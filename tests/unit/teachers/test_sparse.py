"""Teachers that give the probabilities of a few classes: in the batch, or from a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, Distiller, LayerTerm, TeacherEnsemble
from kd_lightning.callbacks import DistillationCallback, TemperatureMonitor
from kd_lightning.functional import Sparse, kd_loss
from kd_lightning.losses import DKDLoss, FusedLinearKDLoss, HintLoss, ReverseKDLoss
from kd_lightning.models import CausalTransformer
from kd_lightning.teachers import BatchTeacher, FunctionTeacher, MappedClasses, Teacher
from kd_lightning.temperature import ConstantSchedule, EntropyTemperature, LearnableTemperature
from tests.helpers import NUM_CLASSES, make_loader

MakeTrainer = Callable[..., Trainer]
VOCABULARY, LENGTH = 13, 6


def model(seed: int) -> CausalTransformer:
    torch.manual_seed(seed)
    network = CausalTransformer(VOCABULARY, dim=8, depth=1, heads=2, max_length=LENGTH)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # stands for training
    return network.eval().requires_grad_(False) if seed == 2 else network


def samples(k: int | None = None, temperature: float = 1.0) -> list[dict[str, Tensor]]:
    """Sequences with labels, and with the teacher's top-k as a server gives them: half precision and int32."""
    tokens = torch.randint(VOCABULARY, (16, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[::2, :3] = -100
    rows = {"input_ids": tokens, "labels": labels}
    if k is not None:
        target = Sparse.top_k(model(2)(tokens), k, temperature)
        rows |= {"target_token_ids": target.indices.int(), "target_logprobs": target.log_probs.double()}
    return [{name: value[row] for name, value in rows.items()} for row in range(16)]


def in_batch(temperature: float = 1.0, **options: Any) -> BatchTeacher:
    return BatchTeacher("target_logprobs", "log_probs", temperature, indices="target_token_ids", **options)


def distil(teacher: Any, **options: Any) -> DistillationModule:
    options = {"temperature": 1.0, "shift_labels": True, "kd_weight": 0.7, "task_weight": 0.3} | options
    return DistillationModule(model(1), teacher, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options)


def fit(
    module: DistillationModule, trainer: Trainer, data: list[dict[str, Tensor]], **options: Any
) -> dict[str, float]:
    trainer.fit(module, DataLoader(data, batch_size=4), DataLoader(data, batch_size=8), **options)  # pyright: ignore
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def function(**options: Any) -> FunctionTeacher:
    network = model(2)
    return FunctionTeacher(lambda input_ids: Sparse.top_k(network(input_ids), 4, **options), name="top 4")


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_but_one_class_train_as_the_network_does(make_trainer: MakeTrainer, temperature: float) -> None:
    teachers: dict[str, Any] = {"network": model(2), "batch": in_batch(temperature)}
    values, weights = {}, {}
    for name, teacher in teachers.items():
        module = distil(teacher, temperature=temperature)
        data = samples(None if name == "network" else VOCABULARY - 1, temperature)
        values[name] = fit(module, make_trainer(), data)
        weights[name] = module.student.state_dict()
    alike = {"train_loss", "train_kd_loss", "val_loss", "val_kd_loss", "val_acc", "val_perplexity", "entropy_student"}
    for name in alike & values["network"].keys():
        assert values["batch"][name] == pytest.approx(values["network"][name], rel=1e-3), name
    for name, value in weights["network"].items():
        torch.testing.assert_close(weights["batch"][name], value, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_measured_is_absent(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    values = fit(
        distil(in_batch()), make_trainer(callbacks=[TemperatureMonitor()], logger=CSVLogger(tmp_path)), samples(4)
    )
    dense = fit(distil(model(2)), make_trainer(callbacks=[TemperatureMonitor()], logger=CSVLogger(tmp_path)), samples())
    missing = dense.keys() - values.keys()
    assert missing == {
        "entropy_teacher",
        "train_agreement",
        "train_teacher_acc",
        "val_agreement",
        "val_teacher_acc",
        "val_teacher_perplexity",
    }
    assert values.keys() <= dense.keys()


def test_value_in_the_distiller() -> None:
    batch = {name: torch.stack([row[name] for row in samples(4)]) for name in samples(4)[0]}
    student = torch.randn(16, LENGTH, VOCABULARY, requires_grad=True)
    target = Sparse(batch["target_token_ids"], batch["target_logprobs"])
    expected = kd_loss(student, target, 1.0, targets=batch["labels"])
    for teacher, given in ((in_batch(), {}), (None, {"teacher_logits": target})):
        out = Distiller(teacher, temperature=1.0)(batch, student, batch["labels"], **given)
        torch.testing.assert_close(out.kd_loss, expected)
        assert out.teacher_logits.shape == (0, LENGTH, VOCABULARY)
    reverse = Distiller(None, 1.0, ReverseKDLoss(class_dim=1))
    out = reverse(None, student.movedim(-1, 1), batch["labels"], teacher_logits=target)
    assert out.kd_loss > 0
    assert "entropy_student" in out.readings()
    assert "entropy_teacher" not in out.readings()


def test_a_learnt_student_temperature_and_a_schedule() -> None:
    data = samples(4)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    student = torch.randn(16, LENGTH, VOCABULARY, requires_grad=True)
    policy = LearnableTemperature(2.0)
    Distiller(in_batch(tail="uniform"), policy)(batch, student, batch["labels"]).loss.backward()
    (parameter,) = policy.parameters()
    assert parameter.grad is not None
    assert parameter.grad.abs() > 0
    schedule = Distiller(in_batch(tail="renormalize"), ConstantSchedule(3.0))
    assert schedule(batch, student, batch["labels"]).loss.isfinite()


def test_probabilities_in_the_batch() -> None:
    target = Sparse.top_k(torch.randn(3, 9), 4)
    batch = {"x": torch.ones(3), "p": target.log_probs.exp(), "ids": target.indices}
    teacher = BatchTeacher("p", "probs", indices="ids")
    student = torch.randn(3, 9)
    loss = Distiller(teacher, 1.0, task_weight=0.0)(batch, student).kd_loss
    torch.testing.assert_close(loss, kd_loss(student, target, 1.0))
    assert teacher.student_inputs(batch).keys() == {"x"}


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_callback(make_trainer: MakeTrainer, teacher: nn.Module) -> None:
    teacher.eval()
    few = FunctionTeacher(lambda x: Sparse.top_k(teacher(x), 3))
    callback = DistillationCallback(few, temperature=1.0, validate=True)
    trainer = make_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(Plain(), make_loader(), make_loader())
    assert "val_kd_loss" in trainer.callback_metrics
    assert "val_agreement" not in trainer.callback_metrics


def test_resume_is_exact(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    whole = distil(in_batch())
    fit(whole, make_trainer(max_epochs=3), samples(4))
    trainer = make_trainer(max_epochs=2)
    fit(distil(in_batch()), trainer, samples(4))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = distil(in_batch())
    fit(resumed, make_trainer(max_epochs=3), samples(4), ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name])
    with pytest.raises(RuntimeError, match=r"tail='bucket'.*tail='uniform'"):
        fit(distil(in_batch(tail="uniform")), make_trainer(max_epochs=3), samples(4), ckpt_path=tmp_path / "half.ckpt")


def test_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Teacher, "teacher")
    options: Any = {"key": "lp", "output": "log_probs", "indices": "ids", "tail": "uniform"}
    config = parser.parse_object(
        {"teacher": {"class_path": "kd_lightning.teachers.BatchTeacher", "init_args": options}}
    )
    made: Any = parser.instantiate_classes(config)
    assert made.teacher.fingerprint() == BatchTeacher(**options).fingerprint()


# ---- what does not go with it ------------------------------------------------------------------------------------


def test_a_temperature_that_reads_logits() -> None:
    student = torch.randn(3, 9)
    with pytest.raises(ValueError, match="computed from the logits of all or changes them"):
        Distiller(None, EntropyTemperature(), task_weight=0.0)(None, student, teacher_logits=Sparse.top_k(student, 3))


def test_the_default_temperature_is_an_error_that_says_so() -> None:
    student = torch.randn(3, 9)
    with pytest.raises(ValueError, match="must be the same, got 4"):
        Distiller(None, task_weight=0.0)(None, student, teacher_logits=Sparse.top_k(student, 3))


def test_combinations_that_need_logits(make_trainer: MakeTrainer) -> None:
    ids = torch.randint(VOCABULARY, (2, LENGTH))
    inputs, student = {"input_ids": ids}, torch.randn(2, LENGTH, VOCABULARY)
    with pytest.raises(TypeError, match="an ensemble mixes the logits of all classes, got Sparse"):
        Distiller(TeacherEnsemble([function(), function()]), 1.0)(inputs, student, ids)
    with pytest.raises(ValueError, match="but the teacher gives Sparse"):
        Distiller(MappedClasses(function(), [0, 1]), 1.0)(inputs, student, ids)
    with pytest.raises(ValueError, match="DecoupledKL needs the logits of all classes"):
        Distiller(function(), 1.0, DKDLoss())(inputs, student, ids)
    with pytest.raises(ValueError, match="layers need the features of a network"):
        Distiller(function(), 1.0, layers=[LayerTerm("a", "b", HintLoss())])
    with pytest.raises(ValueError, match="hidden states of one teacher"):
        distil(function(), kd_loss=FusedLinearKDLoss())
    distiller = Distiller(function(), 1.0)
    with pytest.raises(ValueError, match="no logits to show"):
        distiller.consensus(inputs, distiller.teacher_logits(inputs))
    declared = FunctionTeacher(lambda x: Sparse.top_k(x, 3), output="log_probs", temperature=2.0)
    with pytest.raises(ValueError, match="made at temperature 1, but FunctionTeacher was told output='log_probs'"):
        declared.logits(torch.randn(2, 9))


def test_arguments_of_the_batch_teacher() -> None:
    with pytest.raises(ValueError, match="which the logits of those few do not tell"):
        BatchTeacher("z", indices="ids")
    with pytest.raises(ValueError, match="tail='uniform' is for the probabilities of a few classes"):
        BatchTeacher("z", tail="uniform")
    with pytest.raises(ValueError, match="tail must be one of"):
        BatchTeacher("z", "log_probs", indices="ids", tail="x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="reads 'z' and 'ids' of the batch, got the keys z"):
        BatchTeacher("z", "log_probs", indices="ids").logits({"z": torch.zeros(1, 2)})
