"""Layer terms under the precisions of Lightning, with batches of any precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, Distiller, LayerTerm
from kd_lightning.losses import ChannelWiseKDLoss, HintLoss
from tests.helpers import Net, assert_same

MakeTrainer = Callable[..., Trainer]
IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3)).bfloat16()  # exact in every precision
LABELS = torch.arange(8) % 5


def loader(dtype: torch.dtype) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES.to(dtype), LABELS), batch_size=8)


def make_teacher() -> Net:
    teacher = Net(8, hidden=9)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(teacher.parameters()) + 0.05, teacher.parameters())
    return teacher


def make_module() -> DistillationModule:
    torch.manual_seed(0)
    student, teacher = Net(4), make_teacher()
    student.dropout.p = 0.0
    layers = [
        LayerTerm("hidden", "hidden", HintLoss(), weight=0.5),
        LayerTerm("stage2", "stage2", ChannelWiseKDLoss(), temperature=2.0, weight=3.0),
    ]
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    return DistillationModule(student, teacher, 4.0, layers=layers, optimizer=sgd)


class AtStart(Callback):
    """Keeps copies of the networks as training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        self.student = copy.deepcopy(pl_module.student)
        self.teacher = copy.deepcopy(pl_module.teacher.network())
        self.projectors = [copy.deepcopy(term.projector) for term in pl_module.distiller.layers]
        for network in (self.student, self.teacher):
            for part in network.modules():
                part._forward_hooks.clear()


def layers_of(network: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of stage2 and hidden, and the logits."""
    maps = network.stage2(network.stage1(images))
    hidden = network.hidden(maps.mean((2, 3)))
    return maps, hidden, network.fc(torch.relu(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_in_double_precision(make_trainer: MakeTrainer, dtype: torch.dtype) -> None:
    """Losses and gradients are those of the formulas in float64, to float64's accuracy."""
    module, start = make_module(), AtStart()
    make_trainer(max_epochs=1, precision="64-true", callbacks=[start]).fit(module, loader(dtype))
    images = IMAGES.double()
    with torch.no_grad():
        maps_t, hidden_t, logits_t = layers_of(start.teacher.eval(), images)
    maps, hidden, logits = layers_of(start.student.train(), images)
    to_hidden, to_maps = start.projectors
    assert isinstance(to_hidden, nn.Linear)
    assert isinstance(to_maps, nn.Conv2d)

    def divergence(one: Tensor, other: Tensor, t: float) -> Tensor:
        return F.kl_div(F.log_softmax(one / t, -1), F.softmax(other / t, -1), reduction="batchmean") * t**2

    hint = F.mse_loss(to_hidden(hidden), hidden_t)
    channels = divergence(to_maps(maps).flatten(0, 1).flatten(1), maps_t.flatten(0, 1).flatten(1), 2.0)
    task = F.cross_entropy(logits, LABELS)
    loss = 0.9 * divergence(logits, logits_t, 4.0) + 0.1 * task + 0.5 * hint + 3.0 * channels
    loss.backward()
    for made, expected in (
        (module.student, start.student),
        (module.distiller.layers[0].projector, to_hidden),
        (module.distiller.layers[1].projector, to_maps),
    ):
        assert isinstance(made, nn.Module)
        for one, two in zip(made.parameters(), expected.parameters(), strict=True):
            assert one.dtype == torch.float64
            assert two.grad is not None
            torch.testing.assert_close(one.detach(), (two - 0.1 * two.grad).detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_the_batches_precision_does_not_matter(make_trainer: MakeTrainer, precision: str) -> None:
    weights = []
    dtypes = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "bf16-mixed": torch.bfloat16}
    for dtype in (torch.float32, dtypes[precision]):
        module = make_module()
        make_trainer(precision=precision).fit(module, loader(dtype), loader(dtype))
        weights.append(module.state_dict())
        expected = torch.float32 if precision == "bf16-mixed" else dtypes[precision]
        assert {parameter.dtype for parameter in module.parameters()} == {expected}
    assert_same(*weights)


def test_bf16_is_near_float32(make_trainer: MakeTrainer) -> None:
    losses = []
    for precision in ("32-true", "bf16-true"):
        module, trainer = make_module(), make_trainer(max_epochs=1, precision=precision)
        trainer.fit(module, loader(torch.float32 if precision == "32-true" else torch.bfloat16))
        losses.append({name: value for name, value in trainer.callback_metrics.items() if "loss" in name})
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=0.03, atol=0.01)


def test_projectors_of_a_network_in_double_precision() -> None:
    """Without Lightning too the projector has the features' precision, or it would round them."""
    student, teacher = Net(4).double(), make_teacher().double()
    distiller = Distiller(teacher, 4.0, layers=[LayerTerm("stage2", "stage2", HintLoss())])
    distiller.build_projectors(student, IMAGES.double())
    projector = distiller.layers[0].projector
    assert isinstance(projector, nn.Module)
    assert {parameter.dtype for parameter in projector.parameters()} == {torch.float64}
