"""Parts of several networks: the convolution, its initialisation and checks of arguments."""

from collections.abc import Callable, Sequence

from torch import nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a 3×3 convolution that keeps height and width (at stride 1)."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=bias)


def residual_stage(
    block: Callable[[int, int, int], nn.Module], in_channels: int, out_channels: int, blocks: int, stride: int
) -> nn.Sequential:
    """Return a stage of residual blocks, of which the first changes channels and resolution."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def init_convolutions(model: nn.Module) -> None:
    """Initialise convolutions Kaiming-normal (fan-out) with zero biases, and batch norms as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def check_positive(**values: int | Sequence[int]) -> None:
    """Raise a ValueError if an argument, or an entry of a sequence, is below 1."""
    for name, value in values.items():
        entries = [value] if isinstance(value, int) else value
        if any(entry < 1 for entry in entries):
            raise ValueError(f"{name} must be at least 1, got {value}. Give a positive integer.")


def blocks_per_stage(depth: int, *, plain_layers: int, name: str) -> int:
    """Return the number of blocks in each of three stages, where ``depth = 6 n + plain_layers``."""
    blocks, remainder = divmod(depth - plain_layers, 6)
    if remainder or blocks < 1:
        nearest = [6 * max(blocks, 1) + plain_layers, 6 * (max(blocks, 1) + 1) + plain_layers]
        raise ValueError(
            f"The depth of a {name} must be 6n + {plain_layers} with n ≥ 1, got {depth}. "
            f"The nearest are {nearest[0]} and {nearest[1]}."
        )
    return blocks
