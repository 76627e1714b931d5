"""Bad optimisers, schedulers and learning rates."""

import functools
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.optim.lr_scheduler import StepLR

from kd_lightning import ClassificationModule, DistillationModule
from tests.helpers import make_network, make_teacher
from tests.unit.bad_input.case import Case


class OwnOptimizer(LightningModule):
    """A network that configures its optimiser itself."""

    def __init__(self) -> None:
        super().__init__()
        self.network = make_network()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


SGD = torch.optim.SGD(make_network().parameters(), lr=0.1)


def make(**options: Any) -> ClassificationModule:
    return ClassificationModule(make_network(), **options)


def configured(lr: Any = None, **options: Any) -> Any:
    module = make(**options)
    module.lr = lr
    return module.configure_optimizers()


def own(lr: float | None = None, **options: Any) -> Any:
    module = DistillationModule(OwnOptimizer(), make_teacher(), **options)
    module.lr = lr
    return module.configure_optimizers()


_OPTIMIZER = "optimizer must be a function or class that is called with the parameters, got "
_SGD = "functools.partial(torch.optim.SGD, lr=0.1), or in YAML {class_path: torch.optim.SGD, init_args: {lr: 0.1}}."
_SCHEDULER = "lr_scheduler must be a function or class that is called with the optimizer, got "
_STEP_LR = (
    "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10), which {'scheduler': …, 'interval': 'step'} may "
    "hold as well, or in YAML {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 10}}."
)
_FREQUENCY = " Between two steps of the scheduler lie so many epochs or steps, whichever interval names."

CASES = [
    Case(
        "an optimizer that is made already",
        lambda: make(optimizer=SGD),
        TypeError,
        f"{_OPTIMIZER}a SGD that is made already. An example is {_SGD}",
    ),
    Case("optimizer by name", lambda: make(optimizer="SGD"), TypeError, f"{_OPTIMIZER}'SGD'. An example is {_SGD}"),
    Case("optimizer is a number", lambda: make(optimizer=0.1), TypeError, f"{_OPTIMIZER}0.1. An example is {_SGD}"),
    Case(
        "optimizer of another class",
        lambda: make(optimizer=torch.nn.Linear),
        TypeError,
        f"{_OPTIMIZER}the class Linear. An example is {_SGD}",
    ),
    Case(
        "optimizer with the parameters already bound",
        lambda: configured(optimizer=functools.partial(torch.optim.SGD, make_network().parameters())),
        TypeError,
        "optimizer was called with the parameters alone and failed: '<' not supported between instances of 'list' and "
        f"'float'. Bind its other arguments, as in {_SGD}",
    ),
    Case(
        "optimizer returns a list",
        lambda: configured(optimizer=lambda parameters: [torch.optim.SGD(parameters, lr=0.1)]),
        TypeError,
        f"optimizer must return Optimizer, got list. An example is {_SGD}",
    ),
    Case(
        "a scheduler that is made already",
        lambda: make(lr_scheduler=StepLR(SGD, 1)),
        TypeError,
        f"{_SCHEDULER}a StepLR that is made already. An example is {_STEP_LR}",
    ),
    Case(
        "scheduler by name",
        lambda: make(lr_scheduler="StepLR"),
        TypeError,
        f"{_SCHEDULER}'StepLR'. An example is {_STEP_LR}",
    ),
    Case(
        "an optimizer as a scheduler",
        lambda: make(lr_scheduler=torch.optim.SGD),
        TypeError,
        f"{_SCHEDULER}the class SGD. An example is {_STEP_LR}",
    ),
    Case(
        "a scheduler that lacks an argument",
        lambda: configured(lr_scheduler=StepLR),
        TypeError,
        "lr_scheduler was called with the optimizer alone and failed: StepLR.__init__() missing 1 required positional "
        f"argument: 'step_size'. Bind its other arguments, as in {_STEP_LR}",
    ),
    Case(
        "scheduler returns Lightning's dictionary",
        lambda: configured(lr_scheduler=lambda optimizer: {"scheduler": StepLR(optimizer, 1)}),
        TypeError,
        f"lr_scheduler must return LRScheduler or ReduceLROnPlateau, got dict. An example is {_STEP_LR}",
    ),
    Case(
        "scheduler's dictionary without a function",
        lambda: make(lr_scheduler={"monitor": "val_acc"}),
        TypeError,
        f"{_SCHEDULER}None. An example is {_STEP_LR}",
    ),
    Case(
        "scheduler's dictionary with an unknown key",
        lambda: make(lr_scheduler={"scheduler": StepLR, "moniter": "val_acc"}),
        ValueError,
        "lr_scheduler must have keys out of scheduler, interval, frequency, monitor, strict, reduce_on_plateau, name, "
        "got moniter.",
    ),
    Case(
        "unknown interval",
        lambda: make(lr_scheduler={"scheduler": StepLR, "interval": "batch"}),
        ValueError,
        "the interval of lr_scheduler must be 'epoch' or 'step', got 'batch'. Leave it out for 'epoch'.",
    ),
    Case(
        "frequency of 0",
        lambda: make(lr_scheduler={"scheduler": StepLR, "frequency": 0}),
        ValueError,
        f"the frequency of lr_scheduler must be an integer of 1 or more, got 0.{_FREQUENCY}",
    ),
    Case(
        "frequency that is no integer",
        lambda: make(lr_scheduler={"scheduler": StepLR, "frequency": 1.5}),
        ValueError,
        f"the frequency of lr_scheduler must be an integer of 1 or more, got 1.5.{_FREQUENCY}",
    ),
    Case(
        "scheduler beside a network's own optimizer",
        lambda: own(lr_scheduler=functools.partial(StepLR, step_size=1)),
        ValueError,
        "lr_scheduler was given without an optimizer, but OwnOptimizer configures both itself. Give an optimizer too, "
        "or leave the scheduler to the network.",
    ),
    Case(
        "lr that nothing takes",
        lambda: own(lr=0.1),
        ValueError,
        "lr=0.1 was set, but OwnOptimizer configures the optimizer itself and has neither lr nor learning_rate to take "
        "it. Give the module an optimizer, or the network such an attribute.",
    ),
    *(
        Case(
            f"lr of {lr!r}",
            lambda lr=lr: configured(lr=lr),
            ValueError,
            f"lr must be a finite number above 0, got {lr!r}. None leaves the optimizer's own.",
        )
        for lr in (0.0, -0.1, float("nan"), float("inf"), "0.1", True)
    ),
]
