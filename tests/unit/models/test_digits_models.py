"""The small networks for digits."""

import pytest
import torch
import torch.nn.functional as F

from kd_lightning.models import DigitsCNN, DigitsMLP


@pytest.mark.parametrize(
    "model",
    [DigitsCNN(), DigitsCNN((4,), 3, 5), DigitsMLP(), DigitsMLP((8,), 3), DigitsMLP(()), DigitsMLP((16, 8))],
)
@pytest.mark.parametrize("batch", [1, 5])
def test_shapes_and_gradients(model: DigitsCNN | DigitsMLP, batch: int) -> None:
    logits = model(torch.randn(batch, 1, 8, 8))
    assert logits.shape == (batch, model.fc.out_features)
    F.cross_entropy(logits, torch.zeros(batch, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_teacher_weighs_less_than_300_kilobytes() -> None:
    tensors = DigitsCNN().state_dict().values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) < 300_000


def test_parameter_counts() -> None:
    def count(model: torch.nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    # convolutions 9·in·out, batch norms 2 a channel, then (32·4·4 + 1)·64 and (64 + 1)·10
    assert count(DigitsCNN()) == 9 * (16 + 16 * 32) + 2 * 48 + 513 * 64 + 65 * 10 == 38_330
    assert count(DigitsCNN((8, 16), hidden=32)) == 9 * (8 + 8 * 16) + 2 * 24 + 257 * 32 + 33 * 10 == 9_826
    assert count(DigitsMLP()) == 65 * 64 + 65 * 10 == 4_810
    assert count(DigitsMLP((8,))) == 65 * 8 + 9 * 10 == 610
    assert count(DigitsMLP(())) == 65 * 10 == 650


def test_mlp_without_hidden_layer_is_linear() -> None:
    model = DigitsMLP(())
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model(2 * x) - model(0 * x), 2 * (model(x) - model(0 * x)))


@pytest.mark.parametrize("build", [DigitsCNN, DigitsMLP])
def test_same_seed_same_weights(build) -> None:
    torch.manual_seed(3)
    first = build().fc.weight
    torch.manual_seed(3)
    assert torch.equal(first, build().fc.weight)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DigitsCNN(channels=()), "channels must hold at least one number"),
        (lambda: DigitsCNN(channels=(4, 0)), r"channels must be at least 1, got \(4, 0\)"),
        (lambda: DigitsCNN(hidden=0), "hidden must be at least 1, got 0"),
        (lambda: DigitsMLP(hidden=(0,)), "hidden must be at least 1"),
        (lambda: DigitsMLP(num_classes=0), "num_classes must be at least 1, got 0"),
    ],
)
def test_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
