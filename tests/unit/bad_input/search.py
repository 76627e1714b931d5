"""Bad input of the searches for a temperature, the finder's and a sweep's, and of the figures."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from kd_lightning import DistillationModule
from kd_lightning.callbacks import TemperatureFinder
from kd_lightning.plotting import (
    plot_schedule,
    plot_softening,
    plot_sweep,
    plot_temperature_finder,
    plot_temperature_grid,
    plot_temperature_history,
)
from kd_lightning.sweep import sweep
from kd_lightning.sweep.queue import open_queue
from tests.helpers import make_loader, make_network, make_teacher
from tests.unit.bad_input.case import Case

POSITIVE = "must be one or more positive, finite numbers, got"
FROM_ZERO = "must be one or more finite numbers from 0 up, got"
COUNTS = (1.5, "3", True, None, math.nan)


def call(function: Callable[..., object], *arguments: Any, **options: Any) -> Callable[[], object]:
    return lambda: function(*arguments, **options)


def swept(**options: Any) -> Callable[[], object]:
    """A sweep, of a configuration that is not there unless given."""
    return call(sweep, **({"config": "missing.yaml", "temperatures": [2.0], "kd_weights": [0.5]} | options))


def without_ray() -> None:
    with patch.dict(sys.modules, {"ray": None}):
        swept(executor="ray")()


def found_without_validation() -> None:
    module = DistillationModule(student=make_network(), teacher=make_teacher())
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[TemperatureFinder()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, make_loader())


def opened(storage: str) -> Callable[[], object]:
    def open_it() -> None:
        with ExitStack() as stack:
            stack.enter_context(open_queue(storage, "sweep", "maximize"))

    return open_it


def shared(name: str, function: Callable[..., Callable[[], object]]) -> list[Case]:
    """Settings that the finder and a sweep have in common."""
    chooser = "a sweep" if name == "sweep" else "TemperatureFinder"
    return [
        *(
            Case(f"{name} of {seeds!r} seeds", function(seeds=seeds), TypeError,
                 f"seeds must be a whole number, 1 or more, got {seeds!r}.")
            for seeds in COUNTS
        ),
        *(
            Case(f"{name} of {seeds} seeds", function(seeds=seeds), ValueError,
                 f"seeds must be 1 or more, got {seeds}.")
            for seeds in (0, -1)
        ),
        *(
            Case(f"{name} by mode {mode!r}", function(mode=mode), ValueError,
                 f"mode must be one of 'min', 'max', got {mode!r}.")
            for mode in ("up", None, "MAX")
        ),
        *(
            Case(f"{name} by {monitor!r}", function(monitor=monitor), TypeError,
                 f"monitor must be the name of a logged metric, such as 'val_acc', got {monitor!r}.")
            for monitor in (None, "", 3)
        ),
        *(
            Case(f"{name} by {monitor}", function(monitor=monitor), ValueError,
                 f"{chooser} does not choose on the test set, got monitor={monitor!r}: what was chosen on it can no "
                 "longer be measured on it. Take the metric's validation twin.")
            for monitor in ("test_acc", "test/acc")
        ),
        *(
            Case(f"{name} by {monitor}", function(monitor=monitor), ValueError,
                 f"{monitor} changes with the temperature itself, so it cannot choose one. Take val_acc or "
                 "val_task_loss.")
            for monitor in ("val_loss", "val_kd_loss")
        ),
        *(
            Case(f"{name} with weights {weights!r}", function(kd_weights=weights), TypeError,
                 f"kd_weights {FROM_ZERO} {weights!r}.")
            for weights in (0.5, "0.5", [None], [True])
        ),
        *(
            Case(f"{name} with weights {weights!r}", function(kd_weights=weights), ValueError,
                 f"kd_weights {FROM_ZERO} {weights!r}.")
            for weights in ([], [-0.5], [math.nan], [0.5, math.inf])
        ),
        Case(f"{name} with a weight twice", function(kd_weights=[0.5, 0.5]), ValueError,
             "kd_weights must differ from each other, got [0.5, 0.5]: name each once."),
    ]  # fmt: skip


def temperatures(name: str, argument: str, function: Callable[..., Callable[[], object]]) -> list[Case]:
    return [
        *(
            Case(f"{name} over {values!r}", function(**{argument: values}), TypeError,
                 f"{argument} {POSITIVE} {values!r}.")
            for values in (4.0, "4", ["4"], [None], [True], [[1.0, 2.0]])
        ),
        *(
            Case(f"{name} over {values!r}", function(**{argument: values}), ValueError,
                 f"{argument} {POSITIVE} {values!r}.")
            for values in ([], (), [0.0], [4.0, -1.0], [math.nan], [math.inf])
        ),
        Case(f"{name} over a temperature twice", function(**{argument: [2, 4, 2.0]}), ValueError,
             f"{argument} must differ from each other, got [2, 4, 2.0]: name each once."),
    ]  # fmt: skip


CONSTANT = ((4.0, 4.0, 4.0),) * 2

CASES = [
    *shared("finder", lambda **options: call(TemperatureFinder, **options)),
    *shared("sweep", swept),
    *temperatures("finder", "candidates", lambda **options: call(TemperatureFinder, **options)),
    *temperatures("sweep", "temperatures", swept),
    *temperatures("softening", "temperatures", lambda **options: call(plot_softening, [1.0, 2.0], **options)),
    Case("finder with a number as plot", call(TemperatureFinder, plot_path=3), TypeError,
         "plot_path must be the path of a file, or None, got 3."),
    Case("finder that is drawn before its search", lambda: TemperatureFinder().plot(), RuntimeError,
         "there is nothing to plot before the search: run trainer.fit first."),
    Case("finder without validation", found_without_validation, MisconfigurationException,
         "TemperatureFinder follows a metric of validation, but this run has none. Give fit validation data, the "
         "module a validation_step, and the Trainer limit_val_batches above 0; or leave the callback out."),
    *(
        Case(f"sweep of {trials!r} trials", swept(trials=trials), TypeError,
             f"trials must be a whole number, 1 or more, got {trials!r}.")
        for trials in COUNTS
    ),
    *(
        Case(f"sweep with a task weight of {weight!r}", swept(task_weight=weight), TypeError,
             f"task_weight must be a number, got {weight!r}.")
        for weight in ("0.1", [0.1], True)
    ),
    *(
        Case(f"sweep with a task weight of {weight}", swept(task_weight=weight), ValueError,
             f"task_weight must be finite and not negative, got {weight}.")
        for weight in (-1.0, math.nan, math.inf)
    ),
    Case("sweep whose task weight would be negative", swept(kd_weights=[0.5, 4.0]), ValueError,
         "task_weight is 1 − kd_weight by default, which is negative for kd_weight=4: give task_weight a number, the "
         "same in every cell."),
    *(
        Case(f"sweep with sampler {sampler!r}", swept(sampler=sampler), ValueError,
             f"sampler must be one of 'grid', 'tpe', or an Optuna BaseSampler, got {sampler!r}.")
        for sampler in ("random", 3, None, {"class_path": "optuna.samplers.Nope"}, {"class_path": "nope.Sampler"},
                        {"class_path": "builtins.dict"}, {})
    ),
    *(
        Case(f"sweep with pruner {pruner!r}", swept(pruner=pruner), ValueError,
             f"pruner must be one of 'none', 'median', 'asha', or an Optuna BasePruner, got {pruner!r}.")
        for pruner in ("hard", True, {"class_path": "optuna.pruners.Nope"})
    ),
    *(
        Case(f"sweep with executor {executor!r}", swept(executor=executor), ValueError,
             f"executor must be one of 'local', 'ray', got {executor!r}.")
        for executor in ("dask", None, 3)
    ),
    Case("sweep under Ray without it", without_ray, ImportError,
         "executor='ray' needs Ray Tune: pip install 'kd-lightning[sweep,ray]'."),
    Case("sweep into a file", swept(output=__file__), ValueError,
         f"output must be a folder, which is made if it is not there, but {__file__} is a file."),
    Case("sweep of a file that is not there", swept(), FileNotFoundError,
         f"there is no configuration at 'missing.yaml' (from the folder {Path.cwd()})."),
    *(
        Case(f"sweep of configuration {config!r}", swept(config=config), TypeError,
             f"config must be the path of a YAML file, several of them, or a mapping, got {config!r}.")
        for config in (3, None, [], [3])
    ),
    Case("sweep of an empty configuration", swept(config={}), ValueError,
         "a sweep's configuration has a model, got the sections none."),
    Case("sweep of a configuration without a model", swept(config={"data": {}, "trainer": {}}), ValueError,
         "a sweep's configuration has a model, got the sections data, trainer."),
    Case("storage of an unknown kind", opened("paper://a"), ValueError,
         "storage must be a database URL, such as postgresql://user:password@host/name, or the path of a journal file, "
         "got 'paper://a': Can't load plugin: sqlalchemy.dialects:paper."),
    *(
        Case(f"schedule over {name} {count!r}", call(plot_schedule, 4.0, **({"epochs": 2} | {name: count})), TypeError,
             f"{name} must be a whole number, 1 or more, got {count!r}.")
        for name in ("epochs", "steps_per_epoch") for count in (1.5, "3", None)
    ),
    *(
        Case(f"schedule over {name} {count}", call(plot_schedule, 4.0, **({"epochs": 2} | {name: count})), ValueError,
             f"{name} must be 1 or more, got {count}.")
        for name, count in (("epochs", 0), ("steps_per_epoch", 0), ("epochs", -1))
    ),
    Case("schedule of one class", call(plot_schedule, 4.0, 2, num_classes=1), ValueError,
         "num_classes must be 2 or more, got 1."),
    Case("schedule of part of a class", call(plot_schedule, 4.0, 2, num_classes=2.5), TypeError,
         "num_classes must be a whole number, 2 or more, got 2.5."),
    Case("schedule of no policy", call(plot_schedule, None, 2), TypeError,
         "temperature must be a number, a schedule (Progress → number) or a TemperaturePolicy, got NoneType."),
    *(
        Case(f"softening of {logits!r}", call(plot_softening, logits), TypeError,
             f"teacher_logits must be a tensor, or a sequence of numbers, got {logits!r}.")
        for logits in (None, "ab", ["a", "b"])
    ),
    *(
        Case(f"softening of {logits!r}", call(plot_softening, logits), ValueError,
             "teacher_logits must be one or more rows of two or more numbers (−inf for a masked class), got shape "
             f"{shape}.")
        for logits, shape in (([1.0], "(1,)"), (torch.empty(0, 3), "(0, 3)"), ([1.0, math.nan], "(2,)"), (3.0, "()"))
    ),
    Case("softening with too few names", call(plot_softening, [1.0, 2.0], class_names=["a"]), ValueError,
         "class_names must name all 2 classes, got 1 names."),
    Case("softening of no class", call(plot_softening, [1.0, 2.0], max_classes=0), ValueError,
         "max_classes must be 1 or more, got 0."),
    Case("history of nothing", call(plot_temperature_history, [], [], []), ValueError,
         "each step has a student's and a teacher's temperature, got 0 steps, 0 and 0."),
    Case("history of unequal length", call(plot_temperature_history, [1], CONSTANT, CONSTANT), ValueError,
         "each step has a student's and a teacher's temperature, got 1 steps, 2 and 2."),
    Case("grid of nothing", call(plot_temperature_grid, {}), ValueError,
         "each name needs temperatures for the same number of epochs, got {}."),
    Case("grid without columns", call(plot_temperature_grid, {"a": [(CONSTANT, CONSTANT)]}, columns=0), ValueError,
         "columns must be 1 or more, got 0."),
    Case("finder's figure of nothing", call(plot_temperature_finder, [], "val_acc"), ValueError,
         "there are no trials to draw."),
    Case("sweep's figure of nothing", call(plot_sweep, [(1.0, 0.5, [])], "val_acc"), ValueError,
         "there are no scores to draw."),
    Case("sweep's figure with another cell as best", call(plot_sweep, [(1.0, 0.5, [1.0])], "val_acc", best=(3, 0.5)),
         ValueError, "best must be the temperature and weight of one of the cells, got (3, 0.5)."),
    Case("sweep's figure by mode 'up'", call(plot_sweep, [(1.0, 0.5, [1.0])], "val_acc", mode="up"), ValueError,
         "mode must be one of 'min', 'max', got 'up'."),
]  # fmt: skip
