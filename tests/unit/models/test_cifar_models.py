"""The CIFAR networks: sizes as published, shapes, gradients, initialisation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lightning import models
from kd_lightning.models.cifar_resnet import BasicBlock
from kd_lightning.models.wide_resnet import PreActivationBlock

NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
RESNETS = {
    "resnet20": (20, NARROW, 278_324),
    "resnet32": (32, NARROW, 472_756),
    "resnet56": (56, NARROW, 861_620),
    "resnet110": (110, NARROW, 1_736_564),
    "resnet8x4": (8, WIDE, 1_233_540),
    "resnet32x4": (32, WIDE, 7_433_860),
}
WIDE_RESNETS = {
    "wrn_16_2": (16, 2, 703_284),
    "wrn_40_1": (40, 1, 569_780),
    "wrn_40_2": (40, 2, 2_255_156),
}
VGGS = {"vgg8": (1, 3_965_028), "vgg13": (2, 9_462_180)}
ALL = [*RESNETS, *WIDE_RESNETS, *VGGS]
SMALL = {
    "resnet": lambda **kwargs: models.CifarResNet(8, (4, 4, 8, 8), **kwargs),
    "wide_resnet": lambda **kwargs: models.WideResNet(10, 1, **kwargs),
    "vgg": lambda **kwargs: models.VGG(1, (4, 4, 8, 8, 8), **kwargs),
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def resnet_parameters(depth: int, widths: tuple[int, ...], classes: int) -> int:
    """From the paper's description: conv weights k²·in·out, 2 numbers per batch-norm channel."""
    total, before = 27 * widths[0] + 2 * widths[0], widths[0]
    for stage, width in enumerate(widths[1:]):
        total += (depth - 2) // 6 * (18 * width**2 + 4 * width)  # as if every block kept its width
        total -= 9 * width**2 - 9 * before * width  # the first convolution reads the previous stage
        if stage > 0 or before != width:
            total += before * width + 2 * width  # projection
        before = width
    return total + (before + 1) * classes


def wide_resnet_parameters(depth: int, factor: int, classes: int) -> int:
    total, before = 27 * 16, 16
    for width in (16 * factor, 32 * factor, 64 * factor):
        total += (depth - 4) // 6 * (18 * width**2 + 4 * width)
        total -= 9 * width**2 - 9 * before * width + 2 * width - 2 * before
        if before != width:
            total += before * width
        before = width
    return total + 2 * before + (before + 1) * classes


def vgg_parameters(convolutions: int, classes: int) -> int:
    total, before = 0, 3
    for width in (64, 128, 256, 512, 512):
        total += 9 * before * width + (convolutions - 1) * 9 * width**2 + convolutions * 3 * width
        before = width
    return total + (before + 1) * classes


@pytest.mark.parametrize(("name", "depth", "widths", "published"), [(k, *v) for k, v in RESNETS.items()])
def test_resnet_has_the_published_number_of_parameters(name: str, depth: int, widths: tuple, published: int) -> None:
    assert count(getattr(models, name)()) == published
    assert resnet_parameters(depth, widths, 100) == published
    assert count(getattr(models, name)(num_classes=7)) == resnet_parameters(depth, widths, 7)


@pytest.mark.parametrize(("name", "depth", "factor", "published"), [(k, *v) for k, v in WIDE_RESNETS.items()])
def test_wide_resnet_has_the_published_number_of_parameters(name: str, depth: int, factor: int, published: int) -> None:
    assert count(getattr(models, name)()) == published
    assert wide_resnet_parameters(depth, factor, 100) == published
    assert count(getattr(models, name)(num_classes=7)) == wide_resnet_parameters(depth, factor, 7)


@pytest.mark.parametrize(("name", "convolutions", "published"), [(k, *v) for k, v in VGGS.items()])
def test_vgg_has_the_published_number_of_parameters(name: str, convolutions: int, published: int) -> None:
    assert count(getattr(models, name)()) == published
    assert vgg_parameters(convolutions, 100) == published
    assert count(getattr(models, name)(num_classes=7)) == vgg_parameters(convolutions, 7)


@pytest.mark.parametrize("name", ALL)
def test_depth_in_the_name_is_the_number_of_layers_on_the_longest_way(name: str) -> None:
    model = getattr(models, name)()
    three_by_three = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    layers = len(three_by_three) + 1  # and the classifier
    expected = {**{k: v[0] for k, v in RESNETS.items()}, "vgg8": 6, "vgg13": 11}  # VGG counts two more linear layers
    expected |= {k: v[0] - 2 for k, v in WIDE_RESNETS.items()}  # WRN counts three projections, not the classifier
    assert layers == expected[name]


@pytest.mark.parametrize("name", ALL)
def test_one_32x32_image_gives_one_row_of_logits(name: str) -> None:
    model = getattr(models, name)(num_classes=11).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 32, 32))
    assert logits.shape == (1, 11)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_every_parameter(name: str) -> None:
    model = getattr(models, name)(num_classes=5)
    F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 3])).backward()
    for parameter_name, parameter in model.named_parameters():
        if name.startswith("vgg") and parameter_name.endswith("0.bias"):
            continue  # a bias before batch norm: subtracted again
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("num_classes", [1, 2, 100])
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 1, 28, 28), (2, 3, 64, 64)])
def test_shapes(build, num_classes: int, shape: tuple[int, ...]) -> None:
    model = build(num_classes=num_classes, in_channels=shape[1]).eval()
    assert model(torch.zeros(shape)).shape == (shape[0], num_classes)


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
def test_same_seed_same_weights(build) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build().parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", ["resnet32x4", "wrn_40_2", "vgg13"])
def test_convolutions_start_kaiming_normal(name: str) -> None:
    model = getattr(models, name)()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
            assert module.bias is None or not module.bias.any()


def test_classifiers_start_as_in_the_literature() -> None:
    assert models.vgg8().fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not models.vgg8().fc.bias.any()
    assert not models.wrn_16_2().fc.bias.any()
    assert models.resnet20().fc.weight.abs().max().item() <= 64**-0.5  # PyTorch's uniform


def test_stage_resolutions() -> None:
    images = torch.zeros(1, 3, 32, 32)
    seen: dict[str, int] = {}

    def resolutions(model: nn.Module, prefix: str) -> list[int]:
        for name, child in model.named_children():
            if name.startswith(prefix):

                def note(_module: nn.Module, _inputs: tuple, output: torch.Tensor, name: str = name) -> None:
                    seen[name] = output.shape[-1]

                child.register_forward_hook(note)
        seen.clear()
        model.eval()(images)
        return list(seen.values())

    assert resolutions(SMALL["resnet"](), "layer") == [32, 16, 8]
    assert resolutions(SMALL["wide_resnet"](), "block") == [32, 16, 8]
    assert resolutions(SMALL["vgg"](), "block") == [32, 16, 8, 4, 4]
    images = torch.zeros(1, 3, 64, 64)
    assert resolutions(SMALL["vgg"](), "block") == [64, 32, 16, 8, 4]


def test_basic_block_is_the_papers_equation() -> None:
    block = BasicBlock(4, 8, stride=2).eval()
    x = torch.randn(2, 4, 6, 6)
    inner = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)))
    residual = block.bn2(F.conv2d(inner, block.conv2.weight, padding=1))
    convolution, norm = block.shortcut
    assert isinstance(convolution, nn.Conv2d)
    projected = norm(F.conv2d(x, convolution.weight, stride=2))
    torch.testing.assert_close(block(x), F.relu(residual + projected))


@pytest.mark.parametrize("out_channels", [4, 8])
def test_pre_activation_block_is_the_papers_equation(out_channels: int) -> None:
    stride = 1 if out_channels == 4 else 2
    block = PreActivationBlock(4, out_channels, stride).eval()
    nn.init.uniform_(block.bn1.weight)
    x = torch.randn(2, 4, 6, 6)
    activated = F.relu(block.bn1(x))
    inner = F.relu(block.bn2(F.conv2d(activated, block.conv1.weight, stride=stride, padding=1)))
    residual = F.conv2d(inner, block.conv2.weight, padding=1)
    shortcut = x if block.projection is None else F.conv2d(activated, block.projection.weight, stride=stride)
    torch.testing.assert_close(block(x), residual + shortcut)


def test_dropout_acts_in_training_only() -> None:
    model = models.WideResNet(10, 1, num_classes=3, dropout=0.5)
    images = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.CifarResNet(21), r"6n \+ 2.*got 21.*20 and 26"),
        (lambda: models.CifarResNet(2), r"6n \+ 2.*got 2\b.*8 and 14"),
        (lambda: models.CifarResNet(20, (16, 32, 64)), "four numbers.*16, 32, 64"),  # type: ignore[arg-type]
        (lambda: models.CifarResNet(20, (16, 0, 32, 64)), "widths.*at least 1"),
        (lambda: models.resnet20(num_classes=0), "num_classes must be at least 1, got 0"),
        (lambda: models.resnet20(in_channels=0), "in_channels must be at least 1, got 0"),
        (lambda: models.WideResNet(17), r"6n \+ 4.*got 17.*16 and 22"),
        (lambda: models.WideResNet(16, 0), "widen_factor must be at least 1, got 0"),
        (lambda: models.wrn_16_2(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: models.VGG(0), "convolutions must be at least 1, got 0"),
        (lambda: models.VGG(1, (4, 4)), "five numbers"),  # type: ignore[arg-type]
        (lambda: models.vgg8(num_classes=-1), "num_classes must be at least 1, got -1"),
    ],
)
def test_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
