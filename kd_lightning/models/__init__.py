"""Networks of the distillation literature, small ones for 8×8 digits and text, and any other by its dotted path.

Networks take images ``(N, C, H, W)`` and return logits ``(N, num_classes)``; :class:`CausalTransformer` takes tokens
``(B, L)`` and returns ``(B, L, vocab_size)``. Their stages are named submodules (``layer1``, ``block2``, …), from which
a FeatureExtractor reads features.
"""

from kd_lightning.models.build import build_model
from kd_lightning.models.cifar_resnet import (
    CifarResNet,
    resnet8x4,
    resnet20,
    resnet32,
    resnet32x4,
    resnet56,
    resnet110,
)
from kd_lightning.models.digits import DigitsCNN, DigitsMLP
from kd_lightning.models.transformer import CausalTransformer
from kd_lightning.models.vgg import VGG, vgg8, vgg13
from kd_lightning.models.wide_resnet import WideResNet, wrn_16_2, wrn_40_1, wrn_40_2

__all__ = [
    "VGG",
    "CausalTransformer",
    "CifarResNet",
    "DigitsCNN",
    "DigitsMLP",
    "WideResNet",
    "build_model",
    "resnet8x4",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet56",
    "resnet110",
    "vgg8",
    "vgg13",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
