"""What a user's first hour gets wrong in Python: losses of torch, data without a batch, paths that are no files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from kd_lightning import ClassificationModule, DistillationModule, Distiller, FrozenTeacher
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.losses import KDLoss
from kd_lightning.ranking import check_monitor
from kd_lightning.temperature import LearnableTemperature
from tests.helpers import make_data, make_network, make_teacher
from tests.unit.bad_input.case import Case

CALLED = (
    "{} is called with ({}), but {} takes ({}). Take a loss of kd_lightning.losses, or write a module whose forward "
    "takes these arguments."
)
DISTILS = "student_logits, teacher_logits, temperature, targets=..."
NOTHING = (
    "fit trained on nothing: the training data has no batch. Give a dataset with samples; where it has fewer than "
    "batch_size, take a smaller batch_size or drop_last=False."
)
DATASET = (
    "the training data is a TensorDataset, a dataset, which gives single samples. Return batches: DataLoader(dataset, "
    "batch_size=64, shuffle=True)."
)
NO_GRADIENT = (
    "the student's logits carry no gradient, so the student would not learn: the network detaches them, runs under "
    "torch.no_grad(), or has no trained parameter before them. Return logits with a gradient."
)


class Detaching(nn.Sequential):
    """A network whose logits carry no gradient."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).detach()


class Own(LightningModule):
    """A module of the user."""

    def __init__(self) -> None:
        super().__init__()
        self.network = make_network()

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(build: Callable[[], LightningModule], data: Any, *callbacks: Callable[[], Callback]) -> Callable[[], object]:
    def run() -> None:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback() for callback in callbacks],
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Total length of")
            trainer.fit(build(), data)

    return run


def distilling(**arguments: Any) -> LightningModule:
    return DistillationModule(student=make_network(), teacher=make_teacher(), **arguments)


def detaching() -> LightningModule:
    return DistillationModule(Detaching(*make_network()), make_teacher(), temperature=LearnableTemperature())


def resume(loss: nn.Module) -> object:
    """Load a checkpoint of a loss without parameters into a module whose loss has them."""
    return distilling(kd_loss=loss).load_state_dict(distilling().state_dict())


class Gain(KDLoss):
    """A loss with a learned weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))


SMALL = DataLoader(make_data(count=4), batch_size=8, drop_last=True)
MODULES: dict[str, Any] = {
    "DistillationModule": (distilling,),
    "ClassificationModule": (lambda: ClassificationModule(make_network()),),
    "DistillationCallback": (Own, lambda: DistillationCallback(make_teacher())),
}
LOSSES: list[Any] = [nn.KLDivLoss(), nn.CrossEntropyLoss(), nn.MSELoss()]

CASES = [
    *(
        Case(
            f"kd_loss of {type(loss).__name__}",
            lambda loss=loss: Distiller(make_teacher(), kd_loss=loss),
            TypeError,
            CALLED.format("kd_loss", DISTILS, type(loss).__name__, "input, target"),
        )
        for loss in LOSSES
    ),
    Case(
        "task_loss of three arguments",
        lambda: Distiller(make_teacher(), task_loss=nn.TripletMarginLoss()),
        TypeError,
        CALLED.format("task_loss", "student_logits, targets", "TripletMarginLoss", "anchor, positive, negative"),
    ),
    *(
        Case(f"{name} without a batch", fit(build, SMALL, *callbacks), ValueError, NOTHING)
        for name, (build, *callbacks) in MODULES.items()
    ),
    *(
        Case(f"{name} with a dataset", fit(build, make_data(count=8), *callbacks), TypeError, DATASET)
        for name, (build, *callbacks) in MODULES.items()
        if name != "ClassificationModule"
    ),
    Case("detached logits", fit(detaching, DataLoader(make_data(), batch_size=8)), ValueError, NO_GRADIENT),
    Case(
        "a folder of weights",
        lambda: FrozenTeacher(make_network(), checkpoint=Path(__file__).parent).load(),
        FileNotFoundError,
        f"a teacher's checkpoint is a file, and {str(Path(__file__).parent)!r} is a folder. Name the file in it.",
    ),
    Case(
        "a URL of weights",
        lambda: FrozenTeacher(make_network(), checkpoint="https://localhost/teacher.pt").load(),
        FileNotFoundError,
        "a teacher's checkpoint is a file, and 'https:/localhost/teacher.pt' is a URL. Download the file first, and "
        "name it.",
    ),
]


CASES += [
    Case(
        "a checkpoint of a loss without parameters",
        lambda: resume(Gain()),
        RuntimeError,
        "the checkpoint's weights do not fit this DistillationModule: missing in the file: distiller.kd_loss.gain. "
        "Build the DistillationModule with the networks, losses and layers of the run that wrote it, or start anew "
        "without the checkpoint.",
    ),
    *(
        Case(
            f"a choice by {monitor}",
            lambda monitor=monitor: check_monitor(monitor, "min", "a sweep"),
            ValueError,
            f"{monitor} changes with the temperature itself, so it cannot choose one. Take {steady}.",
        )
        for monitor, steady in (
            ("val/kd_loss", "val/acc or val/task_loss"),
            ("loss.val", "acc.val or task_loss.val"),
        )
    ),
    Case(
        "a choice on the test set under another name",
        lambda: check_monitor("acc_test", "max", "a sweep"),
        ValueError,
        "a sweep does not choose on the test set, got monitor='acc_test': what was chosen on it can no longer be "
        "measured on it. Take the metric's validation twin.",
    ),
]
