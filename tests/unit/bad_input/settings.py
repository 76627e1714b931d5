"""Bad bounds and temperatures of policies, bad callbacks, losses, networks and routes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from kd_lightning import ClassificationModule, DistillationModule, Distiller, callbacks, temperature
from kd_lightning.losses import KDLoss
from kd_lightning.teachers import TeacherEnsemble
from tests.helpers import NUM_CLASSES, NUM_FEATURES, make_data, make_teacher
from tests.unit.bad_input.case import Case

WORDS: list[Any] = ["hot", None, [4.0], True]
COUNTS: list[Any] = [1.5, math.nan, "3", None, True]
BOUNDS = "temperature bounds must satisfy 0 < min_temperature <= max_temperature < inf, got "
OF_POLICY = (
    "{}: {} must be a temperature within the policy's bounds [0.05, 100], got {}. Usual values lie between 1 and 20; "
    "the bounds are the arguments min_temperature and max_temperature."
)
TEMPERATURES = [
    (temperature.CapacityTemperature, "min_value"),
    (temperature.ClassFrequencyTemperature, "max_value"),
    (temperature.ConfidenceTemperature, "unsure"),
    (temperature.CorrectWrongTemperature, "wrong"),
    (temperature.DepthTemperature, "shallow"),
    (temperature.DisagreementTemperature, "base"),
    (temperature.EntropyTemperature, "min_value"),
]
FOLLOWING: list[Any] = [callbacks.AdaptiveTemperature, callbacks.EarlyStopDistillation]
NETWORK = "{} must be an nn.Module, the network to train, got {!r}. Build the network first."
NO_VALIDATION = (
    "{} follows a metric of validation, but this run has none. Give fit validation data, the module a validation_step, "
    "and the Trainer limit_val_batches above 0; or leave the callback out."
)
LOSS = (
    "{} must be a loss, a module that returns a scalar, got {}. Build one, such as KDLoss() for kd_loss or "
    "CrossEntropyLoss() for task_loss."
)


def call(make: Callable[..., object], **options: Any) -> Callable[[], object]:
    return lambda: make(**options)


def weights_set_to_zero() -> None:
    module = DistillationModule(student=nn.Linear(NUM_FEATURES, NUM_CLASSES), teacher=make_teacher())
    module.kd_weight = module.task_weight = 0.0
    Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(
        module, torch.utils.data.DataLoader(make_data(8), batch_size=4)
    )


def fit(callback: Callback, **options: Any) -> Callable[[], object]:
    def run() -> None:
        module = DistillationModule(student=nn.Linear(NUM_FEATURES, NUM_CLASSES), teacher=make_teacher())
        trainer = Trainer(
            **options, max_epochs=1, callbacks=[callback], accelerator="cpu", logger=False, barebones=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(make_data(8), batch_size=4)
        trainer.fit(module, loader, loader if options else None)

    return run


def route() -> object:
    ensemble = TeacherEnsemble([make_teacher(), make_teacher()], routing=[[0, 1, 2], [3, 99]])
    inputs, targets = make_data(4).tensors
    return Distiller(ensemble)(inputs, torch.ones(4, NUM_CLASSES), targets)


CASES = [
    *(
        Case(f"{name} of {word!r}", call(temperature.ConstantTemperature, **{name: word}), TypeError,
             f"ConstantTemperature: {name} must be a number, got {word!r}.")
        for name in ("min_temperature", "max_temperature") for word in WORDS
    ),
    *(
        Case(f"constant of {word!r}", call(temperature.ConstantTemperature, value=word), TypeError,
             f"temperature must be a number, got {word!r}.")
        for word in WORDS
    ),
    *(
        Case(f"lower bound of {value}", call(temperature.EntropyTemperature, min_temperature=value), ValueError,
             f"{BOUNDS}min_temperature={value}, max_temperature=100.0.")
        for value in (0.0, -1.0, math.nan, math.inf, 101.0)
    ),
    *(
        Case(f"upper bound of {value}", call(temperature.EntropyTemperature, max_temperature=value), ValueError,
             f"{BOUNDS}min_temperature=0.05, max_temperature={value}.")
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        Case(f"{policy.__name__} with {name} of {word!r}", call(policy, **{name: word}), TypeError,
             f"{policy.__name__}: {name} must be a number, got {word!r}.")
        for policy, name in TEMPERATURES for word in WORDS
    ),
    *(
        Case(f"{policy.__name__} with {name} of {value}", call(policy, **{name: value}), ValueError,
             OF_POLICY.format(policy.__name__, name, value))
        for policy, name in TEMPERATURES for value in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        Case(f"{callback.__name__} with patience of {count!r}", call(callback, patience=count), TypeError,
             f"patience must be a whole number, 1 or more, got {count!r}.")
        for callback in FOLLOWING for count in COUNTS
    ),
    *(
        Case(f"{callback.__name__} with monitor of {word!r}", call(callback, monitor=word), TypeError,
             f"monitor must be the name of a logged metric, such as 'val_acc', got {word!r}.")
        for callback in FOLLOWING for word in ("", 3, None)
    ),
    *(
        Case(f"{callback.__name__} with mode of {word!r}", call(callback, mode=word), ValueError,
             f"mode must be one of 'min', 'max', got {word!r}.")
        for callback in FOLLOWING for word in ("up", None, 1)
    ),
    *(
        Case(f"{callback.__name__} with min_delta of {value}", call(callback, min_delta=value), ValueError,
             f"min_delta must be finite and not negative, got {value}.")
        for callback in FOLLOWING for value in (-1.0, math.nan, math.inf)
    ),
    *(
        Case(f"{callback.__name__} without validation", fit(callback()), MisconfigurationException,
             NO_VALIDATION.format(callback.__name__))
        for callback in FOLLOWING
    ),
    Case("validation after the end", fit(callbacks.AdaptiveTemperature(), check_val_every_n_epoch=2),
         MisconfigurationException,
         "AdaptiveTemperature follows a metric of validation, but this run ends before its first: "
         "check_val_every_n_epoch=2 is above max_epochs=1. Lower it, or leave the callback out."),
    Case("weights that are set to 0", weights_set_to_zero, ValueError,
         "kd_weight and task_weight are both 0, which trains nothing. Give one of them a weight."),
    *(
        Case(f"{name} of {count!r}", call(callbacks.AdaptiveTemperature, **{name: count}), TypeError,
             f"{name} must be a whole number, {least} or more, got {count!r}.")
        for name, least in (("degrade_patience", 1), ("cooldown", 0), ("warmup_epochs", 0)) for count in COUNTS
    ),
    *(
        Case(f"{name} of {word!r}", call(callbacks.AdaptiveTemperature, **{name: word}), TypeError,
             f"{name} must be a number, got {word!r}.")
        for name in ("factor", "degrade_delta", "min_temperature", "max_temperature") for word in ("hot", [1.0], True)
    ),
    *(
        Case(f"{low} as bound of the moves", call(callbacks.AdaptiveTemperature, min_temperature=low), ValueError,
             f"bounds must satisfy 0 < min_temperature < max_temperature, got min_temperature={low}, "
             "max_temperature=None.")
        for low in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        Case(f"{callback.__name__} of {count!r}", call(callback, **{name: count}), TypeError,
             f"{name} must be a whole number, 1 or more, got {count!r}.")
        for callback, name in (
            (callbacks.SkipNonFinite, "max_consecutive"),
            (callbacks.ReplicaConsistency, "every_n_steps"),
            (callbacks.TemperatureFinder, "steps"),
            (callbacks.TemperatureFinder, "seeds"),
        )
        for count in COUNTS
    ),
    *(
        Case(f"share every {count!r} steps", call(callbacks.TemperatureMonitor, gradient_share_every_n_steps=count),
             TypeError, f"gradient_share_every_n_steps must be a whole number, 1 or more, got {count!r}.")
        for count in COUNTS if count is not None
    ),
    Case("monitor of a plot that is not drawn", call(callbacks.TemperatureMonitor, monitor="val_acc"), ValueError,
         "monitor='val_acc' is the metric that the plot draws, but plot=False. Set plot=True."),
    Case("drawn metric without validation", fit(callbacks.TemperatureMonitor(plot=True, monitor="val_acc")),
         MisconfigurationException, NO_VALIDATION.format("TemperatureMonitor")),
    *(
        Case(f"{name} of {received}", call(Distiller, teacher=None, **{name: loss}), TypeError,
             LOSS.format(name, received))
        for name in ("kd_loss", "task_loss") for loss, received in (("kl", "'kl'"), (3, "3"), (KDLoss, "KDLoss"))
    ),
    *(
        Case(f"student of {word!r}", call(DistillationModule, student=word), TypeError, NETWORK.format("student", word))
        for word in (None, "resnet", nn.Linear)
    ),
    *(
        Case(f"model of {word!r}", call(ClassificationModule, model=word), TypeError, NETWORK.format("model", word))
        for word in (None, "resnet", nn.Linear)
    ),
    Case("both weights of zero", call(Distiller, teacher=None, kd_weight=0, task_weight=0), ValueError,
         "kd_weight and task_weight are both 0, which trains nothing. Give one of them a weight."),
    Case("routing to class 99 of 6", route, ValueError,
         f"routing names class 99, but classes go from 0 to {NUM_CLASSES - 1}."),
]  # fmt: skip
