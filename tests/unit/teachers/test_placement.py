"""Where a teacher's weights live: a device of their own, the host, or accelerate's device map."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_lightning import DistillationModule, Distiller, FrozenTeacher, LayerTerm, TeacherCache
from kd_lightning.losses import HintLoss
from kd_lightning.models import CausalTransformer
from kd_lightning.teachers import Placement
from tests.helpers import assert_same, make_loader, snapshot
from tests.unit.teachers.helpers import network

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]
INPUTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def trained(net: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(3)
    net = network() if net is None else net
    for parameter in net.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)  # stands for training
    return net.eval()


class Attends(nn.Module):
    """Attention, tied weights and parameters of the root: what moving single layers may miss."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(6, 8))
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.block(self.embedding(tokens) + self.position)
        return self.head(self.attention(x, x, x)[0]) * self.scale


# ---- a device of its own -----------------------------------------------------------------------------------------


class Moves:
    """Records which devices the distiller's moves ask the weights for."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.seen.append(tensor)
        return tensor.to("meta")  # stands for another device: a move would lose the values


@pytest.mark.parametrize("options", [{"placement": "cpu"}, {"placement": "offload"}, {"placement": "offload_whole"}])
def test_weights_stay_when_the_module_moves(options: dict[str, Any]) -> None:
    expected = trained()(INPUTS)
    teacher = FrozenTeacher(trained(), **options)
    moves = Moves()
    teacher._apply(moves)
    teacher.to("meta")
    assert all(tensor.numel() == 0 for tensor in moves.seen)  # asked for the type only
    assert {parameter.device.type for parameter in teacher.parameters()} == {"cpu"}
    assert torch.equal(teacher.logits(INPUTS), expected)


@pytest.mark.parametrize("options", [{"placement": "cpu"}, {"placement": "offload"}, {"placement": "offload_whole"}])
def test_weights_follow_casts(options: dict[str, Any]) -> None:
    teacher = FrozenTeacher(trained(), **options)
    Distiller(teacher, task_weight=0.0).double()
    torch.testing.assert_close(teacher.logits(INPUTS.double()), trained().double()(INPUTS.double()))
    fixed = FrozenTeacher(trained(), precision="bf16", **options)
    Distiller(fixed, task_weight=0.0).double()
    assert {parameter.dtype for parameter in fixed.parameters()} == {torch.bfloat16}
    assert fixed.logits(INPUTS).dtype == torch.bfloat16


class Elsewhere(nn.Module):
    """Records where its inputs are, and gives outputs of a kind that torch cannot look into."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained()
        self.seen: list[Any] = []

    def forward(self, inputs: Tensor, pair: tuple[Tensor, str]) -> Any:
        self.seen.append((inputs.device.type, pair[0].device.type, pair[1]))
        output: Any = type("Output", (), {})()
        output.logits = self.net(inputs)
        return output


def test_inputs_come_to_the_weights_and_logits_back() -> None:
    """The inputs are on the meta device, which stands for an accelerator: the logits come back to it."""
    teacher = FrozenTeacher(Elsewhere(), placement="cpu")
    moved: list[str] = []
    teacher.transform = lambda inputs: (moved.append(inputs["inputs"].device.type), inputs)[1]
    batch = {"inputs": INPUTS.to("meta"), "pair": (INPUTS.to("meta"), "text")}
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        teacher.logits(batch)  # it is copied, which a meta tensor refuses
    logits = teacher.logits({"inputs": INPUTS, "pair": (INPUTS, "text")})
    assert torch.equal(logits, trained()(INPUTS))
    assert moved == ["meta", "cpu"]  # the transform runs where the inputs are
    assert teacher.module.seen == [("cpu", "cpu", "text")]


@pytest.mark.parametrize("options", [{"placement": "cpu"}, {"placement": "offload"}, {"placement": "offload_whole"}])
def test_training_is_the_same(
    make_module: Make, make_trainer: MakeTrainer, teacher: nn.Module, options: dict[str, Any]
) -> None:
    plain, placed = (
        make_module(teacher=FrozenTeacher(copy.deepcopy(teacher), micro_batch_size=5, **each)) for each in ({}, options)
    )
    for module in (plain, placed):
        make_trainer(max_epochs=1).fit(module, make_loader(), make_loader())
    assert_same(snapshot(plain.student), snapshot(placed.student))


def test_a_teacher_elsewhere_with_a_cache(tmp_path: Path) -> None:
    teacher = FrozenTeacher(trained(), placement="cpu", cache=TeacherCache(tmp_path / "a.cache", "float32"))
    teacher.index([INPUTS[row] for row in range(5)])
    for _ in range(2):
        assert torch.equal(teacher.logits(INPUTS, torch.arange(5)), trained()(INPUTS))


# ---- the host ----------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """An LSTM, which keeps a list of its weights beside its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, 5, batch_first=True)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[..., None])[0][:, -1])


def exported() -> nn.Module:
    return torch.export.export(trained(), (INPUTS,)).module()


def hooks_of(net: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in net.modules())


TOKENS = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "attention": (lambda: trained(Attends()), TOKENS),
    "batch norm": (trained, INPUTS),
    "transformer": (lambda: trained(CausalTransformer(11, 8, 1, 2, max_length=6)), TOKENS),
    "recurrent": (lambda: trained(Recurrent()), INPUTS),
    "exported": (exported, INPUTS),
}


@pytest.mark.parametrize("placement", ["offload", "offload_whole"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_weights_are_fetched_for_a_forward(kind: str, placement: str) -> None:
    """The inputs are on the meta device: every weight must be there when used, and on the host before and after."""
    make, inputs = NETWORKS[kind]
    net = make()
    expected = net(inputs)
    teacher = FrozenTeacher(net, placement=placement)
    before, own_hooks = snapshot(net), hooks_of(net)
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        there = {id(tensor): tensor for part in net.modules() for tensor in part._parameters.values()}
        most = max(most, sum(tensor.numel() for tensor in there.values() if tensor is not None and tensor.is_meta))

    handles = [part.register_forward_hook(count) for part in net.modules()]
    logits = teacher.logits(inputs.to("meta"))
    for handle in handles:
        handle.remove()
    assert logits.device.type == "meta"
    assert logits.shape == expected.shape
    whole = sum(parameter.numel() for parameter in net.parameters())
    if placement == "offload_whole":
        assert most == whole  # tied weights are one copy
    elif kind != "exported":  # its operations bring their weights themselves
        assert 0 < most < whole
    assert_same(before, snapshot(net))
    assert hooks_of(net) == own_hooks
    torch.testing.assert_close(
        teacher.logits(inputs), expected
    )  # because hooks take torch's attention off its fast path
    assert len({id(parameter) for parameter in net.parameters()}) == len([*make().parameters()])


@pytest.mark.parametrize("placement", ["offload", "offload_whole"])
def test_hidden_states_come_with_their_output_layer(placement: str) -> None:
    """A fused loss reads the output layer's weight after the forward."""
    make, inputs = NETWORKS["transformer"]
    net = make()
    teacher = FrozenTeacher(copy.deepcopy(net), placement=placement)
    states = teacher.hidden_states(inputs.to("meta"))
    assert (states.hidden.device.type, states.weight.device.type) == ("meta", "meta")
    expected = FrozenTeacher(net).hidden_states(inputs)
    assert torch.equal(teacher.hidden_states(inputs).hidden, expected.hidden)
    assert torch.equal(teacher.hidden_states(inputs).weight, expected.weight)


def test_only_weights_are_brought() -> None:
    """Lengths stay on the host, where torch wants them, and a weight that is read alone is not copied."""

    class Packs(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            assert self.head.bias.device.type == "cpu"
            lengths = torch.full((len(x),), x.shape[1])
            packed = nn.utils.rnn.pack_padded_sequence(x[..., None], lengths, batch_first=True)
            assert packed.batch_sizes.device.type == "cpu"
            return super().forward(x)

    assert FrozenTeacher(trained(Packs()), placement="offload").logits(INPUTS.to("meta")).is_meta


class Doubled(Placement):
    """Answers with twice the outputs, and leaves weights as they are."""

    def move(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        pass

    def call(self, run: Callable[[Any], Any], module: nn.Module, inputs: Any) -> Any:
        return 2 * run(inputs)


def test_a_place_of_ones_own() -> None:
    teacher = FrozenTeacher(trained(), placement=Doubled())
    Distiller(teacher).double()
    assert torch.equal(teacher.logits(INPUTS), 2 * trained()(INPUTS))
    assert "placement=Doubled()" in repr(teacher)


def test_weights_are_back_after_an_error() -> None:
    net = trained()
    teacher = FrozenTeacher(net, placement="offload")
    with pytest.raises(RuntimeError, match=r"reduction dim|shape"):
        teacher.logits(torch.zeros(5, 7, device="meta"))
    assert not any(parameter.is_meta for parameter in net.parameters())
    assert torch.equal(teacher.logits(INPUTS), trained()(INPUTS))


def test_an_error_before_a_layer_is_fetched_is_the_network_s_own() -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no more")

    net = trained()
    net[2].register_forward_pre_hook(refuse)  # pyright: ignore[reportIndexIssue]
    net[3].register_forward_pre_hook(refuse)  # pyright: ignore[reportIndexIssue]
    with pytest.raises(RuntimeError, match="no more"):
        FrozenTeacher(net, placement="offload").logits(INPUTS.to("meta"))
    assert not any(parameter.is_meta for parameter in net.parameters())
    del net[2]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(RuntimeError, match="no more"):  # of the head, a layer with weights
        FrozenTeacher(net, placement="offload").logits(INPUTS.to("meta"))


def test_offload_reads_a_checkpoint_on_the_meta_device(tmp_path: Path) -> None:
    save_file(trained().state_dict(), tmp_path / "teacher.safetensors")
    with torch.device("meta"):
        empty = network()
    for options in ({"placement": "offload"}, {"placement": "offload_whole"}, {"placement": "cpu"}):
        teacher = FrozenTeacher(copy.deepcopy(empty), tmp_path / "teacher.safetensors", **options)  # pyright: ignore
        assert torch.equal(teacher.logits(INPUTS), trained()(INPUTS))
        assert teacher.fingerprint() == FrozenTeacher(trained()).fingerprint()
        twin = pickle.loads(pickle.dumps(teacher))
        assert torch.equal(twin.logits(INPUTS), trained()(INPUTS))
        assert f"{next(iter(options))}=" in repr(twin)


def test_layers_of_an_offloaded_teacher(make_module: Make, make_trainer: MakeTrainer, teacher: nn.Module) -> None:
    layers = [LayerTerm("0", "0", HintLoss(), weight=0.1)]
    weights = []
    for options in ({}, {"placement": "offload"}, {"placement": "offload_whole"}):
        module = make_module(teacher=FrozenTeacher(copy.deepcopy(teacher), **options), layers=copy.deepcopy(layers))  # pyright: ignore
        make_trainer(max_epochs=1).fit(module, make_loader())
        weights.append(snapshot(module.student))
    assert_same(weights[0], weights[1])
    assert_same(weights[0], weights[2])
    with pytest.raises(ValueError, match="features on the student's device, but the teacher has placement='cpu'"):
        make_module(teacher=FrozenTeacher(teacher, placement="cpu"), layers=layers)


# ---- other engines' placements -----------------------------------------------------------------------------------


def offloaded_by_accelerate(folder: Path, kind: str) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    net = trained()
    if kind == "host":
        return accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    if kind == "disk":
        return accelerate.disk_offload(net, str(folder), execution_device=torch.device("cpu"))
    places = {"0": "cpu", "1": "cpu", "2": "cpu", "3": "disk"}
    return accelerate.dispatch_model(net, places, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize("kind", ["host", "disk", "map"])
def test_accelerate_keeps_its_hooks(tmp_path: Path, kind: str) -> None:
    net = offloaded_by_accelerate(tmp_path, kind)
    teacher = FrozenTeacher(net, fingerprint="v1")
    where = {name: parameter.device.type for name, parameter in net.named_parameters()}
    distiller = Distiller(teacher, task_weight=0.0).to("cpu")
    distiller(INPUTS, torch.zeros(5, 3, requires_grad=True)).loss.backward()
    torch.testing.assert_close(teacher.logits(INPUTS), trained()(INPUTS))
    assert {name: parameter.device.type for name, parameter in net.named_parameters()} == where
    assert "meta" in where.values()
    assert teacher.fingerprint() == "v1"
    with pytest.raises(ValueError, match="got placement='offload' and accelerate's device map: leave one out"):
        FrozenTeacher(net, fingerprint="v1", placement="offload")


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("options", [{}, *({"placement": place} for place in ("offload", "offload_whole", "cpu"))])
@pytest.mark.filterwarnings("ignore")
def test_torchao(kind: str, options: dict[str, Any]) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def quantized(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))
        quantization.quantize_(net, getattr(quantization, kind)())
        return net.eval()

    inputs = torch.randn(5, 32)
    teacher = FrozenTeacher(quantized(), **options)
    Distiller(teacher, task_weight=0.0).to("cpu")
    assert torch.equal(teacher.logits(inputs), quantized()(inputs))
    assert teacher.fingerprint() == FrozenTeacher(quantized()).fingerprint()
    assert teacher.fingerprint() != FrozenTeacher(quantized(1)).fingerprint()
