"""Every exported teacher with all that a teacher may be combined with: it works, or one error says what does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, Distiller, FrozenTeacher, LayerTerm, TeacherCache, TeacherEnsemble
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.functional import kd_loss
from kd_lightning.fused_distiller import FusedDistiller
from kd_lightning.losses import FusedLinearKDLoss, HintLoss, KDLoss
from kd_lightning.models import CausalTransformer
from kd_lightning.outputs_distiller import OutputsDistiller, OutputsKDLoss, OutputTerm
from kd_lightning.teachers import EMATeacher, FunctionTeacher, MappedClasses, OnnxTeacher, Teacher
from kd_lightning.teachers.calls import hidden_states
from tests.contracts.kinds import BUILD, Plain, Scores, data_of, each, inputs_of, loader_of, network
from tests.helpers import NUM_CLASSES, InOrder, LearnedTemperature, assert_same, make_data, make_network, snapshot

MakeTrainer = Callable[..., Trainer]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NO_NETWORK = "layers need the features of a network, and {} has none: leave them out."
NOT_FUSED = "FusedLinearKDLoss takes the hidden states of one teacher that runs"
HAS_LOGITS = "has its logits already and takes no cache: leave the cache out."
ONE = "takes one teacher, got {}"
CANNOT: dict[str, dict[str, str]] = {
    "an ensemble": {"TeacherEnsemble": "a TeacherEnsemble within another is not supported"},
    "other classes": {name: ONE.format(name) for name in ("MappedClasses", "TeacherEnsemble")},
    "several outputs": {},
    "a cache": {
        "BatchTeacher": HAS_LOGITS,
        "EMATeacher": "change with each step, so that no cache can keep them: leave the cache out.",
        "LogitsFile": HAS_LOGITS,
    },
    "layers": {
        **{name: NO_NETWORK.format(name) for name in ("BatchTeacher", "FunctionTeacher", "LogitsFile", "OnnxTeacher")},
        "EMATeacher": "a copy that training makes",
        "TeacherEnsemble": "and a TeacherEnsemble is several",
    },
    "the fused loss": dict.fromkeys(set(BUILD) - {"FrozenTeacher", "EMATeacher"}, NOT_FUSED),
}  # fmt: skip


def student(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def single(teacher: Teacher) -> Tensor:
    """The teacher's logits; of the ensemble, those of the mixture at T = 1."""
    first, *others = teacher.in_classes(teacher.logits(inputs_of(teacher)), -1)
    return torch.stack([logits.log_softmax(-1) for logits in (first, *others)]).logsumexp(0) if others else first


def an_ensemble(name: str, folder: Path) -> None:
    one, two = BUILD[name](0, folder), FrozenTeacher(network(5))
    z, y = student(5, NUM_CLASSES), torch.arange(5)
    out = Distiller(TeacherEnsemble([one, two], combine="losses"), 2.0, task_weight=0.0)(inputs_of(one), z, y)
    networks_inputs = one.student_inputs(inputs_of(one))
    given = networks_inputs["input"] if isinstance(networks_inputs, dict) else networks_inputs
    expected = (kd_loss(z, single(one), 2.0) + kd_loss(z, two.logits(given), 2.0)) / 2
    torch.testing.assert_close(out.kd_loss, expected)


def other_classes(name: str, folder: Path) -> None:
    teacher = BUILD[name](0, folder)
    z = student(5, 4)
    out = Distiller(MappedClasses(teacher, [[3, 4], 0, 2, 1]), 2.0, task_weight=0.0)(inputs_of(teacher), z)
    p = (single(teacher)[:, :5] / 2).softmax(-1)
    p = torch.stack([p[:, 3] + p[:, 4], p[:, 0], p[:, 2], p[:, 1]], 1)
    torch.testing.assert_close(out.kd_loss, kd_loss(z, 2 * p.log(), 2.0))


def several_outputs(name: str, folder: Path) -> None:
    teacher = BUILD[name](0, folder)
    z = {"a": student(5, NUM_CLASSES), "b": student(5, NUM_CLASSES) * 2}
    terms = OutputsKDLoss({"a": KDLoss(), "b": OutputTerm(temperature=1.0, weight=0.5)})
    out = OutputsDistiller(teacher, 1.0, terms, task_weight=0.0)(inputs_of(teacher), z)
    expected = kd_loss(z["a"], single(teacher), 1.0) + 0.5 * kd_loss(z["b"], single(teacher), 1.0)
    torch.testing.assert_close(out.kd_loss, expected)


CACHED: dict[str, Callable[[TeacherCache | None, Path], Teacher]] = {
    "FrozenTeacher": lambda cache, folder: FrozenTeacher(network(0), cache=cache),
    "FunctionTeacher": lambda cache, folder: FunctionTeacher(Scores(0), name="v1", cache=cache),
    "MappedClasses": lambda cache, folder: MappedClasses(FrozenTeacher(network(0), cache=cache), [5, 4, 3, 2, 1, 0]),
    "OnnxTeacher": lambda cache, folder: OnnxTeacher(folder / "teacher-0.onnx", cache=cache),
    "TeacherEnsemble": lambda cache, folder: TeacherEnsemble([FrozenTeacher(network(0), cache=cache), network(10)]),
}


def a_cache(name: str, folder: Path) -> None:
    data = make_data()
    if name in CANNOT["a cache"]:
        BUILD[name](0, folder).index(data)
    cache = folder / f"{name}.cache"
    cache.unlink(missing_ok=True)
    teacher, rows = CACHED[name](TeacherCache(cache, "float32"), folder), torch.tensor([3, 9, 2])
    teacher.index(data)
    inputs = data.tensors[0][rows]
    expected = teacher.members(teacher.logits(inputs))
    for _ in range(2):
        for kept, computed in zip(teacher.members(teacher.logits(inputs, rows)), expected, strict=True):
            torch.testing.assert_close(kept, computed)


def layers(name: str, folder: Path) -> None:
    teacher, net = BUILD[name](0, folder), make_network()
    distiller = Distiller(teacher, 2.0, layers=[LayerTerm("0", "0", HintLoss())])
    x, y = make_data(5).tensors
    distiller.build_projectors(net, x)
    with distiller.attach(net):
        out = distiller(x, net(x), y)
        out.loss.backward()
    assert out.layers["0"].loss > 0
    assert net[0].weight.grad is not None


def the_fused_loss(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    nets = [CausalTransformer(11, 8, 1, 2, max_length=6) for _ in range(2)]
    for parameter in nets[1].parameters():
        parameter.data *= 2.0  # stands for training
    teacher = {"FrozenTeacher": FrozenTeacher, "EMATeacher": lambda net: EMATeacher()}.get(name)
    made = BUILD[name](0, folder) if teacher is None else teacher(nets[1])
    made.follow(nets[1])
    distiller = FusedDistiller(made, 2.0, FusedLinearKDLoss(), task_weight=0.0)
    tokens = torch.randint(11, (3, 6))
    out = distiller(tokens, hidden_states(nets[0], tokens), tokens)
    expected = kd_loss(nets[0](tokens).flatten(0, 1), nets[1].eval()(tokens).flatten(0, 1), 2.0)
    torch.testing.assert_close(out.kd_loss, expected)


COMBINE = {
    "an ensemble": an_ensemble,
    "other classes": other_classes,
    "several outputs": several_outputs,
    "a cache": a_cache,
    "layers": layers,
    "the fused loss": the_fused_loss,
}


@each
@pytest.mark.parametrize("what", COMBINE)
def test_with(what: str, name: str, folder: Path) -> None:
    if name not in CANNOT[what]:
        COMBINE[what](name, folder)
        return
    with pytest.raises((ValueError, TypeError)) as raised:
        COMBINE[what](name, folder)
    assert CANNOT[what][name] in str(raised.value)
    assert "\n" not in str(raised.value)


# ---- whole runs ------------------------------------------------------------------------------------------------------


def made(name: str, folder: Path) -> Teacher:
    """A teacher for a run, which the average of a student has not followed before."""
    return EMATeacher(decay=0.9) if name == "EMATeacher" else BUILD[name](0, folder)


def run_of(owner: str, teacher: Teacher) -> tuple[LightningModule, list[Any]]:
    """The module to fit, and callbacks."""
    torch.manual_seed(2)
    if owner == "module":
        net = make_network(norm=False)
        optimizer = partial(torch.optim.SGD, lr=0.1)
        options: dict[str, Any] = {"kd_weight": 0.7, "task_weight": 0.3, "optimizer": optimizer}
        return DistillationModule(net, teacher, LearnedTemperature(), **options), []
    return Plain(norm=False), [
        DistillationCallback(teacher, temperature=LearnedTemperature(), kd_weight=0.7, task_weight=0.3)
    ]


@each
@pytest.mark.parametrize("owner", ["module", "callback"])
def test_resume_is_exact(owner: str, name: str, folder: Path, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> tuple[LightningModule, Trainer]:
        teacher = made(name, folder)
        module, callbacks = run_of(owner, teacher)
        trainer = make_trainer(max_epochs=epochs, callbacks=callbacks)
        trainer.fit(module, loader_of(teacher), **options)
        return module, trainer

    whole, _ = fit(2)
    half, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(2, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same(snapshot(resumed), snapshot(whole))
    assert not torch.equal(*(next(iter(snapshot(module).values())) for module in (whole, half)))


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("owner", ["module", "callback"])
def test_a_cache_trains_as_the_teacher_does(
    owner: str, name: str, folder: Path, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    states = []
    for cached in (True, False):
        cache = TeacherCache(tmp_path / "a.cache", "float32") if cached else None
        teacher = CACHED[name](cache, folder)
        module, callbacks = run_of(owner, teacher)
        data = teacher.index(make_data()) if cached else make_data()
        make_trainer(max_epochs=2, callbacks=callbacks).fit(module, DataLoader(data, batch_size=16))
        states.append(snapshot(module))
    assert_same(*states)


class InOrderOf(LightningDataModule):
    """The data of a teacher, without validation, which the user's own module has not."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def dataset(self, count: int, seed: int) -> Any:
        return data_of(self.teacher, count, seed)

    loader: Any = InOrder.loader
    train_dataloader: Any = InOrder.train_dataloader


@pytest.mark.parametrize("name", BUILD)  # none in a fork, in which torch makes no ranks
@pytest.mark.parametrize("owner", ["module", "callback"])
def test_two_ranks_train_as_one(owner: str, name: str, folder: Path, make_trainer: MakeTrainer) -> None:
    states = []
    for devices in (2, 1):
        teacher = made(name, folder)
        module, callbacks = run_of(owner, copy.deepcopy(teacher))
        options: dict[str, Any] = {"strategy": "ddp_fork"} if devices == 2 else {}
        trainer = make_trainer(
            devices=devices, use_distributed_sampler=False, max_epochs=2, callbacks=callbacks,
            **options,
        )  # fmt: skip
        trainer.fit(module, datamodule=InOrderOf(teacher))
        states.append(snapshot(module))
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, rtol=1e-4, atol=1e-5, msg=key)
