from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kd_lightning import FeatureExtractor
from kd_lightning.layers.extractor import layer_depths
from tests.helpers import hooks

# dynamo looks at the inputs' .grad, and hides the warning only where warnings are no errors
dynamo_looks_at_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Network(nn.Module):
    """Its control flow depends on data, which fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.block1 = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.block2 = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.reentrant: bool | None = None

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.block1, torch.tanh(self.stem(x)))
        return self.head(self.run(self.block2, x) if x.sum() < 1e9 else x)


class Steady(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(torch.tanh(self.stem(x)))))


def expected(network: Network, x: Tensor) -> dict[str, Tensor]:
    first = network.block1(torch.tanh(network.stem(x)))
    return {"block1": first, "block2": network.block2(first)}


def test_features_by_name_and_glob() -> None:
    network, x = Network(), torch.randn(5, 4)
    with FeatureExtractor(network, ["block*", "head"]) as extractor:
        assert extractor.names[0] == "block1"  # in the network's order, the parts of blocks too: a glob minds no dots
        assert "block1.0" in extractor.names
    with FeatureExtractor(network, ["block2", "block[1]"]) as extractor:
        logits = network(x)
        features = extractor.pop()
    assert list(features) == ["block1", "block2"]
    for name, value in expected(network, x).items():
        assert torch.equal(features[name], value)
    assert torch.equal(network.head(features["block2"]), logits)
    assert features["block1"].grad_fn is not None


def test_unknown_names_say_what_is_near() -> None:
    with pytest.raises(ValueError, match=r"Network has no layer 'blok1'. Close to it: block1, "):
        FeatureExtractor(Network(), ["stem", "blok1"])
    with pytest.raises(ValueError, match=r"no layer of Network matches 'layer\*'"):
        FeatureExtractor(Network(), "layer*")


def test_hooks_come_and_go() -> None:
    network = Network()
    extractor = FeatureExtractor(network, ["block1"])
    assert hooks(network) == 0
    extractor.attach().attach()  # twice is once
    assert hooks(network) == 3
    assert extractor.attached
    extractor.detach()
    assert hooks(network) == 0
    with pytest.raises(KeyboardInterrupt), FeatureExtractor(network, ["block1"]):
        raise KeyboardInterrupt
    assert hooks(network) == 0
    with pytest.raises(RuntimeError, match="no hooks are attached"):
        extractor.pop()


def test_nothing_in_the_state_dict_and_copies_have_no_extractor() -> None:
    network, x = Network(), torch.randn(5, 4)
    names = set(network.state_dict())
    with FeatureExtractor(network, ["block1"]) as extractor:
        network(x)
        assert set(network.state_dict()) == names
        for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            twin(x)
            assert torch.equal(twin(x), network(x))
        assert set(extractor.pop()) == {"block1"}
    assert hooks(network) == 0
    assert torch.equal(copy.deepcopy(network)(x), pickle.loads(pickle.dumps(network))(x))


def test_features_are_kept_no_longer_than_needed() -> None:
    network = Network()
    with FeatureExtractor(network, ["block1"]) as extractor:
        network(torch.randn(5, 4))
        feature = weakref.ref(extractor.pop()["block1"])
        gc.collect()
        assert feature() is None
        network(torch.randn(5, 4))
        extractor.clear()
        with pytest.raises(RuntimeError, match="there was no forward of Network since"):
            extractor.pop()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_recorded(reentrant: bool) -> None:
    network, x = Network(), torch.randn(5, 4, requires_grad=True)
    plain = copy.deepcopy(network)
    network.reentrant = reentrant
    with FeatureExtractor(network, ["block1", "block2"]) as extractor:
        logits = network(x)
        features = extractor.pop()
        (logits.sum() + features["block1"].square().sum() if not reentrant else logits.sum()).backward()
        assert not extractor._features
        for name, value in expected(plain, x).items():
            assert torch.equal(features[name], value)
    if not reentrant:
        loss = plain(x).sum() + expected(plain, x)["block1"].square().sum()
        loss.backward()
        torch.testing.assert_close(network.stem.weight.grad, plain.stem.weight.grad)


@pytest.mark.slow
@dynamo_looks_at_grad
@pytest.mark.parametrize("way", ["outside", "in place", "block"])
def test_compiled(way: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    network, counter = Steady(), CompileCounterWithBackend("aot_eager")
    plain = copy.deepcopy(network)
    called: Any = network
    if way == "outside":
        called = torch.compile(network, backend=counter)
    elif way == "in place":
        network.compile(backend=counter)
    else:
        network.block2.compile(backend=counter)
    with FeatureExtractor(called, ["block1", "block2"]) as extractor:
        for _ in range(3):
            x = torch.randn(5, 4)
            called(x)
            features = extractor.pop()
            for name, value in expected(plain, x).items():
                torch.testing.assert_close(features[name], value)
            (gradient,) = torch.autograd.grad(features["block2"].sum(), network.stem.weight)
            (wanted,) = torch.autograd.grad(expected(plain, x)["block2"].sum(), plain.stem.weight)
            torch.testing.assert_close(gradient, wanted)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiled_before_it_was_attached_to_says_so() -> None:
    torch.compiler.reset()
    network, x = Steady(), torch.randn(5, 4)
    compiled: Any = torch.compile(network, backend="aot_eager")
    compiled(x)
    with FeatureExtractor(compiled, ["block1"]) as extractor:
        compiled(x)
        with pytest.raises(RuntimeError, match="attach the hooks before its first call"):
            extractor.pop()


@dynamo_looks_at_grad
def test_names_are_those_without_wrappers() -> None:
    network = Network()
    network.block2 = torch.compile(network.block2, backend="eager")  # pyright: ignore[reportAttributeAccessIssue]
    parallel = nn.DataParallel(network)
    with FeatureExtractor(parallel, ["block2", "block2.0"]) as extractor:
        parallel.module(torch.randn(5, 4))
        assert set(extractor.pop()) == {"block2", "block2.0"}


class Pair(NamedTuple):
    note: str
    state: Tensor


class Returns(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(
    "make", [lambda x: (x, 2 * x), lambda x: [None, x], lambda x: {"n": 1, "x": x}, lambda x: Pair("note", x)]
)
def test_the_first_tensor_of_an_output_counts(make: Any) -> None:
    network, x = nn.Sequential(Returns(make)), torch.randn(5, 4)
    with FeatureExtractor(network, ["0"]) as extractor:
        network(x)
        assert extractor.pop()["0"] is x


def test_a_layer_without_a_tensor() -> None:
    network = nn.Sequential(nn.Identity(), Returns(lambda x: "text"))
    with FeatureExtractor(network, ["0", "1"]) as extractor:
        network(torch.randn(5, 4))
        with pytest.raises(RuntimeError, match="the layer '1' gave no tensor"):
            extractor.pop()


def test_called_twice_is_ambiguous() -> None:
    relu = nn.ReLU()
    network = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)
    with FeatureExtractor(network, ["1"]) as extractor:
        network(torch.randn(5, 4))
        with pytest.raises(RuntimeError, match="the layer '1' was called 2 times in one forward"):
            extractor.pop()


def test_changed_in_place_is_an_error() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    for grad in (True, False):
        with FeatureExtractor(network, ["0"]) as extractor, torch.set_grad_enabled(grad):
            network(torch.randn(5, 4))
            with pytest.raises(RuntimeError, match="the output of the layer '0' was changed in place"):
                extractor.pop()
    with FeatureExtractor(network, ["0", "1"]) as extractor, torch.inference_mode():
        network(torch.randn(5, 4))
        assert extractor.pop().keys() == {"0", "1"}  # inference tensors count no versions


def test_only_the_last_forward_counts() -> None:
    network = Network()
    with FeatureExtractor(network, ["block1"]) as extractor:
        network(torch.randn(5, 4))
        network(x := torch.randn(2, 4))
        network.block1(torch.randn(7, 8))  # outside of a forward of the network
        assert torch.equal(extractor.pop()["block1"], expected(network, x)["block1"])


def test_depths() -> None:
    network = Network()
    assert layer_depths(network, ["head", "stem", "block1"]) == {"stem": 0.0, "block1": 0.5, "head": 1.0}
    assert layer_depths(network, ["block1", "block1.0"]) == {"block1.0": 0.0, "block1": 1.0}
    assert layer_depths(network, ["block1", "block1.1"]) == {"block1.1": 0.0, "block1": 1.0}
    assert layer_depths(network, ["block1"]) == {"block1": 0.5}


def test_prints() -> None:
    assert repr(FeatureExtractor(Network(), "head")) == "FeatureExtractor(Network, layers=['head'], detached)"
