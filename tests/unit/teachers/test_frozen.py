from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from kd_lightning import DistillationModule, Distiller, FrozenTeacher
from kd_lightning.callbacks import TemperatureMonitor
from kd_lightning.functional import kd_loss
from kd_lightning.models import CausalTransformer, DigitsCNN
from kd_lightning.teachers.frozen import Precision
from kd_lightning.teachers.weights import fingerprint
from kd_lightning.temperature import MultiTemperature
from tests.helpers import assert_same, make_loader, make_network, snapshot
from tests.unit.teachers.helpers import network


def test_no_gradient_reaches_teacher_or_its_inputs(teacher: nn.Module) -> None:
    frozen = FrozenTeacher(teacher)
    inputs = torch.randn(4, 8, requires_grad=True)
    logits = frozen(inputs)
    assert not logits.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    (logits * torch.ones(1, requires_grad=True)).sum().backward()  # inference tensors would fail here
    assert inputs.grad is None


@pytest.mark.parametrize("sabotage", [lambda m: m.train(), lambda m: m[1].train()])
def test_stays_in_eval_whoever_calls_train(teacher: nn.Module, sabotage: Callable[[nn.Module], object]) -> None:
    frozen, before = FrozenTeacher(teacher), snapshot(teacher)
    expected = frozen(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    sabotage(teacher)
    assert torch.equal(frozen(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))), expected)
    assert_same(teacher.state_dict(), before)


def test_untrained_teacher_warns() -> None:
    for untrained in (network(), nn.Linear(4, 3), DigitsCNN(), nn.TransformerEncoderLayer(8, 2)):
        with pytest.warns(UserWarning, match="weights of its initialisation"):
            FrozenTeacher(untrained)


def test_trained_teacher_does_not_warn(teacher: nn.Module) -> None:
    without_norm = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(without_norm.parameters(), lr=0.5)
    for _ in range(20):
        nn.functional.cross_entropy(without_norm(torch.eye(4)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FrozenTeacher(teacher)
        FrozenTeacher(without_norm)
        FrozenTeacher(network(), checkpoint="later.pt")  # its weights are yet to come


def test_deepcopy_shares_and_pickle_carries_the_weights(teacher: nn.Module) -> None:
    frozen = FrozenTeacher(teacher)
    assert copy.deepcopy(frozen) is frozen
    assert pickle.loads(pickle.dumps(frozen)).fingerprint() == frozen.fingerprint()


@pytest.mark.parametrize("wrong", [nn.Linear, "resnet18", None])
def test_not_a_module(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        FrozenTeacher(wrong)  # pyright: ignore[reportArgumentType]


def test_fingerprint_does_not_depend_on_later_casts(teacher: nn.Module) -> None:
    frozen = FrozenTeacher(teacher)
    before = frozen.fingerprint()
    assert frozen.to(torch.bfloat16).fingerprint() == before


def test_the_file_is_read_on_first_use_only(tmp_path: Path) -> None:
    frozen = FrozenTeacher(network(), checkpoint=tmp_path / "absent.pt")
    assert not frozen.available()
    with pytest.raises(FileNotFoundError, match="no teacher checkpoint at"):
        frozen(torch.ones(1, 4))


# ---- speed ---------------------------------------------------------------------------------------------------------

CASTS: list[Callable[[Distiller], object]] = [lambda d: d.half(), lambda d: d.to(torch.float64), lambda d: d.bfloat16()]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_precision_of_its_own_survives_casts(
    cast: Callable[[Distiller], object], precision: Precision, dtype: torch.dtype, teacher: nn.Module
) -> None:
    inputs, reference = torch.randn(4, 8), copy.deepcopy(teacher).eval().to(dtype)
    frozen = FrozenTeacher(teacher, precision=precision)
    before = frozen.fingerprint()
    distiller = Distiller(frozen)
    cast(distiller)
    frozen.to(torch.float64).to("cpu", torch.float16)
    assert {tensor.dtype for tensor in teacher.state_dict().values()} == {dtype, torch.int64}
    with torch.autocast("cpu", torch.bfloat16):
        logits = frozen(inputs.double())
    assert logits.dtype == dtype
    assert torch.equal(logits, reference(inputs.to(dtype)))
    assert fingerprint(teacher) == before


def test_without_a_precision_it_follows_the_module_around(teacher: nn.Module) -> None:
    Distiller(FrozenTeacher(teacher)).to(torch.float64)
    assert teacher(torch.randn(4, 8, dtype=torch.float64)).dtype == torch.float64


def test_a_half_precision_teacher_gives_the_losses_of_its_logits(teacher: nn.Module) -> None:
    student, inputs, targets = torch.randn(4, 6, requires_grad=True), torch.randn(4, 8), torch.arange(4)
    half = FrozenTeacher(teacher, precision="bf16")
    out = Distiller(half, 4.0)(inputs, student, targets)
    torch.testing.assert_close(out.kd_loss, kd_loss(student, half(inputs).float(), 4.0), rtol=1e-6, atol=0)
    assert out.teacher_logits.dtype == torch.bfloat16
    out = Distiller(half, 4.0)(inputs, student.double(), targets)
    torch.testing.assert_close(out.kd_loss, kd_loss(student.double(), half(inputs).double(), 4.0))


def test_a_checkpoint_is_read_into_the_precision(teacher: nn.Module, tmp_path: Path) -> None:
    torch.save(snapshot(teacher), tmp_path / "teacher.pt")
    other = make_network(32)
    FrozenTeacher(other, tmp_path / "teacher.pt", precision="bf16").load()
    assert_same(other.state_dict(), snapshot(copy.deepcopy(teacher).bfloat16()))


def test_token_numbers_are_not_cast() -> None:
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    network.get_parameter("1.weight").data.mul_(3.0)
    tokens = torch.tensor([[0, 4], [1, 2]])
    assert FrozenTeacher(network, precision="bf16")(tokens).dtype == torch.bfloat16


def test_channels_last() -> None:
    seen: list[bool] = []
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    images = torch.randn(2, 3, 6, 6)
    network(images)
    expected = network.eval()(images)
    network[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    frozen = FrozenTeacher(network, channels_last=True)
    torch.testing.assert_close(frozen(images), expected)
    assert seen == [True]
    frozen.to("cpu")
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)  # pyright: ignore


class CountingBackend:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, example: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.slow
def test_compiled_at_the_first_call_and_made_again_after_a_copy(teacher: nn.Module) -> None:
    torch.compiler.reset()
    backend, inputs = CountingBackend(), torch.randn(4, 8)
    expected = FrozenTeacher(copy.deepcopy(teacher))(inputs)
    frozen = FrozenTeacher(teacher, compile={"backend": backend})
    assert backend.graphs == 0
    for _ in range(3):
        torch.testing.assert_close(frozen(inputs), expected)
    assert backend.graphs == 1
    assert copy.deepcopy(frozen) is frozen
    frozen.compile = {"backend": "eager"}
    again = pickle.loads(pickle.dumps(frozen))
    assert again.fingerprint() == frozen.fingerprint()
    torch.testing.assert_close(again(inputs), expected)


def test_options_are_said(teacher: nn.Module) -> None:
    frozen = FrozenTeacher(teacher, precision="bf16", micro_batch_size=2)
    assert repr(frozen).endswith("weights in place, precision='bf16', micro_batch_size=2)")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "16-mixed"}, "precision must be one of 'fp32', 'bf16', 'fp16'"),
     ({"micro_batch_size": 0}, "micro_batch_size must be 1 or more")],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str, teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenTeacher(teacher, **options)


def test_micro_batches_give_the_logits_of_the_whole(teacher: nn.Module) -> None:
    inputs = torch.randn(7, 8)
    sizes: list[int] = []
    teacher.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    expected = FrozenTeacher(teacher)(inputs)
    torch.testing.assert_close(FrozenTeacher(teacher, micro_batch_size=3)(inputs), expected)
    assert sizes == [7, 3, 3, 1]


@pytest.mark.parametrize("temperature", [4.0, MultiTemperature([2.0, 4.0])])
def test_one_forward_per_batch_with_accumulation_and_several_terms(
    temperature: Any,
    make_module: Callable[..., DistillationModule],
    make_trainer: Callable[..., Trainer],
    teacher: nn.Module,
    tmp_path: Path,
) -> None:
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer = make_trainer(
        max_epochs=1, accumulate_grad_batches=2, callbacks=[TemperatureMonitor()], logger=CSVLogger(tmp_path)
    )
    trainer.fit(make_module(temperature=temperature), make_loader(64, batch_size=16))
    assert len(calls) == 4


@pytest.mark.parametrize("options", [{"micro_batch_size": 3}, {"compile": True}, {"precision": "bf16"}], ids=str)
def test_hidden_states_are_made_as_logits_are(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In micro-batches, compiled, in the teacher's precision; the output layer is one."""
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    network = CausalTransformer(11, 8, 1, 2, max_length=6)
    for parameter in network.parameters():
        parameter.data += 0.3  # stands for training
    teacher, calls = FrozenTeacher(network, **options), []
    network.base_model.register_forward_hook(lambda _, args, output: calls.append(len(output)))
    tokens = torch.randint(11, (8, 6))
    states = teacher.hidden_states(tokens)
    assert calls == ([3, 3, 2] if "micro_batch_size" in options else [8])
    assert states.weight is network.get_output_embeddings().weight
    torch.testing.assert_close(states.hidden @ states.weight.T, teacher.logits(tokens))
    assert len(compiled) == 2 * ("compile" in options)
