from __future__ import annotations

import copy
import itertools
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_lightning import DistillationModule
from kd_lightning.callbacks import AdaptiveTemperature
from kd_lightning.callbacks.adaptive_rule import AdaptiveRule, TemperatureRange, agree, return_ratio
from kd_lightning.temperature import (
    AsymmetricTemperature,
    CosineSchedule,
    ScheduledTemperature,
    Signals,
    Temperature,
    TemperaturePolicy,
)
from tests.helpers import make_loader
from tests.unit.callbacks.helpers import Save, Script, digits, multiplier_of

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Lightning's messages."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


# ---- the rule, by itself --------------------------------------------------------------------------------------------


def simulate(
    rule: AdaptiveRule, values: Sequence[float], start: float = 4.0, low: float = 0.05, high: float = 100.0
) -> list[float]:
    """The temperatures after each check, of a constant policy without any Lightning."""
    temperatures = []
    for value in values:
        move = rule.check(value, TemperatureRange(start, start, start), low, high)
        start = start if move is None else start * move.ratio
        temperatures.append(start)
    return temperatures


def make_rule(**options: Any) -> AdaptiveRule:
    options.setdefault("factor", 0.5)
    return AdaptiveTemperature(**options).rule


SCRIPTS = {
    # name: (options, values, temperature after each check; it starts at 4)
    "improving": ({}, [0.1, 0.2, 0.3, 0.4, 0.5], [4, 4, 4, 4, 4]),
    "plateau": ({}, [0.9, 0.9, 0.9, 0.9, 0.9], [4, 4, 2, 2, 1]),
    "an improvement starts the count anew": ({}, [0.9, 0.9, 0.91, 0.91, 0.91], [4, 4, 4, 4, 2]),
    "jitter is a plateau": ({}, [0.9, 0.885, 0.895], [4, 4, 2]),
    "an outlier interrupts a plateau": ({"degrade_patience": 9}, [0.9, 0.9, 0.8, 0.9, 0.9], [4, 4, 4, 4, 2]),
    "one drop, one move": ({}, [0.9, 0.8, 0.8, 0.8, 0.79, 0.8], [4, 8, 8, 8, 8, 8]),
    "a second drop, a second move": ({}, [0.9, 0.8, 0.8, 0.7, 0.7], [4, 8, 8, 16, 16]),
    "a drop and its echo, one move": ({}, [0.9, 0.8, 0.89, 0.8, 0.8], [4, 8, 8, 8, 8]),
    "a drop from a new best": ({}, [0.9, 0.8, 0.91, 0.8, 0.8], [4, 8, 8, 16, 16]),
    "a worse metric is never the new best": ({}, [0.9, 0.8, 0.82, 0.84, 0.86], [4, 8, 8, 8, 8]),
    "degrade_patience": ({"degrade_patience": 3}, [0.9, 0.8, 0.8, 0.8, 0.8], [4, 4, 4, 8, 8]),
    "degradation must be in a row": ({"degrade_patience": 2}, [0.9, 0.8, 0.9, 0.8, 0.9], [4, 4, 4, 4, 4]),
    "cooldown": ({"cooldown": 2}, [0.9] * 8, [4, 4, 2, 2, 2, 2, 1, 1]),
    "min_delta": ({"min_delta": 0.05}, [0.8, 0.82, 0.84, 0.86, 0.86], [4, 4, 2, 2, 2]),
    "absolute delta": ({"delta_mode": "abs", "degrade_delta": 10}, [90, 81, 81, 79], [4, 4, 2, 2]),
    "absolute delta is passed": ({"delta_mode": "abs", "degrade_delta": 10}, [90, 79, 79], [4, 8, 8]),
    "other directions": (
        {"on_plateau": "increase", "on_degrade": "decrease"},
        [0.9, 0.9, 0.9, 0.5, 0.5],
        [4, 4, 8, 4, 4],
    ),
    "keep": ({"on_degrade": "keep"}, [0.9, 0.5, 0.5, 0.5, 0.9, 0.9], [4, 4, 4, 4, 4, 2]),
    "keep leaves the reference": ({"on_plateau": "keep"}, [0.9, 0.89, 0.89, 0.89, 0.875], [4, 4, 4, 4, 8]),
    "min mode": ({"mode": "min"}, [0.5, 0.5, 0.5, 0.6, 0.6], [4, 4, 2, 4, 4]),
    "negative values": ({"mode": "max"}, [-1.0, -1.01, -1.01, -1.5, -1.5], [4, 4, 2, 4, 4]),
}


@pytest.mark.parametrize(("options", "values", "expected"), SCRIPTS.values(), ids=SCRIPTS)
def test_scripts(options: dict[str, Any], values: list[float], expected: list[float]) -> None:
    assert simulate(make_rule(**options), values) == pytest.approx(expected)


def test_a_move_ends_at_the_bound_and_none_is_made_there() -> None:
    rule = make_rule()
    assert simulate(rule, [0.9] * 5, start=3.0, low=2.0) == pytest.approx([3, 3, 2, 2, 2])
    assert rule.state.flat_checks == 2  # no move, so nothing is reset: as soon as there is room it is made
    assert simulate(make_rule(), [0.9, 0.8, 0.7], start=6.0, high=10.0) == pytest.approx([6, 10, 10])


def test_outside_of_the_bounds_a_move_goes_inward_only() -> None:
    cold, hot = TemperatureRange(0.5, 0.5, 0.5), TemperatureRange(50.0, 50.0, 50.0)
    for temperature, values, ratio in ((cold, [0.9] * 3, None), (cold, [0.9, 0.8], 2.0), (hot, [0.9] * 3, 0.5)):
        rule = make_rule()
        moves = [rule.check(value, temperature, low=1.0, high=20.0) for value in values]
        assert (moves[-1] and moves[-1].ratio) == ratio
    assert return_ratio(hot, multiplier=4.0, low=1.0, high=20.0) == 0.4
    assert return_ratio(hot, multiplier=1.25, low=1.0, high=20.0) == 0.8  # back to 1, not beyond
    assert return_ratio(hot, multiplier=0.5, low=1.0, high=20.0) == 1  # the policy is as hot by itself


def test_reasons() -> None:
    temperature = TemperatureRange(4.0, 4.0, 4.0)
    rule = make_rule(min_delta=0.01)
    moves = [rule.check(value, temperature, 0.05, 100.0) for value in (0.915, 0.92, 0.9123)]
    assert moves[-1] is not None
    assert moves[-1].reason == "val_acc 0.9123 not above 0.915 + 0.01 for 2 checks"
    rule = make_rule(monitor="val_task_loss", mode="min")
    moves = [rule.check(value, temperature, 0.05, 100.0) for value in (0.5, 0.6)]
    assert moves[-1] is not None
    assert moves[-1].reason == "val_task_loss 0.6 above 0.5 + 0.01 for 1 check"


RULES = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "factor": st.floats(0.1, 0.95),
        "patience": st.integers(1, 4),
        "min_delta": st.sampled_from([0.0, 0.01, 0.2]),
        "degrade_delta": st.sampled_from([0.0, 0.02, 0.3]),
        "delta_mode": st.sampled_from(["rel", "abs"]),
        "on_plateau": st.sampled_from(["decrease", "increase", "keep"]),
        "on_degrade": st.sampled_from(["decrease", "increase", "keep"]),
        "degrade_patience": st.integers(1, 3),
        "cooldown": st.integers(0, 3),
    }
)
METRICS = st.lists(st.one_of(st.floats(-2, 2), st.sampled_from([0.0, 0.5, 0.51, 0.9])), min_size=1, max_size=40)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(RULES, METRICS, st.integers(0, 40), st.floats(1.0, 10.0))
def test_invariants(options: dict[str, Any], values: list[float], split: int, start: float) -> None:
    low, high = 1.0, 10.0
    rule = make_rule(**options)
    straight = simulate(rule, values, start, low, high)
    steps = list(itertools.pairwise([start, *straight]))

    assert all(low * (1 - 1e-9) <= t <= high * (1 + 1e-9) for t in straight)
    directions = {options["on_plateau"], options["on_degrade"]} - {"keep"}
    assert "increase" in directions or all(after <= before for before, after in steps)
    assert "decrease" in directions or all(after >= before for before, after in steps)

    better = max if options["mode"] == "max" else min
    best = rule._sign * rule.state.best  # pyright: ignore[reportOperatorIssue]
    assert best in values
    assert abs(best - better(values)) <= options["min_delta"] + 1e-12

    moves = [index for index, (before, after) in enumerate(steps) if after != before]
    assert all(later - earlier > options["cooldown"] for earlier, later in itertools.pairwise(moves))
    assert 0 not in moves  # the first check sets the best

    first, second = make_rule(**options), make_rule(**options)
    head = simulate(first, values[:split], start, low, high)
    second.state = copy.deepcopy(first.state)
    assert head + simulate(second, values[split:], [start, *head][-1], low, high) == straight


METRIC = st.one_of(st.floats(-1e9, 1e9), st.sampled_from([0.5, math.nan, math.inf]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(METRIC, st.floats(0.1, 50), st.floats(0.1, 50)), min_size=1, max_size=4),
    st.randoms(),
)
def test_the_order_of_ranks_does_not_matter(ranks: list[tuple[float, float, float]], random: Any) -> None:
    here = [(value, TemperatureRange((a + b) / 2, min(a, b), max(a, b))) for value, a, b in ranks]
    value, temperature = agree(here)
    random.shuffle(here)
    again, same = agree(here)
    assert again == value or (math.isnan(again) and math.isnan(value))
    assert same == temperature
    assert math.isfinite(value) == all(math.isfinite(one) for one, *_ in ranks)
    if math.isfinite(value):
        assert min(one for one, *_ in ranks) <= value <= max(one for one, *_ in ranks)


# ---- in a fit: two validations per epoch of four steps, so a check every two steps ----------------------------------


FLAT = [0.9] * 40
EVENTFUL = [0.90, 0.91, 0.905, 0.91, 0.80, 0.81, 0.91, 0.92, 0.92, 0.70, 0.69, 0.69, 0.95, 0.94, 0.94, 0.94]


class Record(Callback):
    """The multiplier after each validation of a fit, by training step."""

    def __init__(self) -> None:
        self.multipliers: dict[int, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.multipliers[trainer.global_step] = multiplier_of(pl_module)


def fit(
    module: DistillationModule,
    make_trainer: MakeTrainer,
    values: Sequence[float],
    adaptive: Sequence[AdaptiveTemperature] = (),
    more: Sequence[Callback] = (),
    ckpt_path: Path | None = None,
    **options: Any,
) -> Record:
    record = Record()
    callbacks = [Script(values, steps_per_check=2), *adaptive, record, *more]
    options = {"max_epochs": 8, "val_check_interval": 2, "num_sanity_val_steps": 2} | options
    trainer = make_trainer(callbacks=callbacks, **options)
    trainer.fit(module, make_loader(), make_loader(16), ckpt_path=ckpt_path)
    return record


def adaptive(**options: Any) -> AdaptiveTemperature:
    return AdaptiveTemperature(**({"monitor": "scripted", "factor": 0.5} | options))


class PerSample(TemperaturePolicy):
    def compute(self, signals: Signals) -> Temperature:
        t = 2 + 4 * signals.teacher_logits.softmax(-1).amax(-1, keepdim=True)
        return Temperature(t, t)


class Several(TemperaturePolicy):
    def compute(self, signals: Signals) -> list[Temperature]:
        terms = [torch.full((1,), t) for t in (2.0, 4.0, 6.0)]
        return [Temperature(t, t) for t in terms]


@pytest.mark.parametrize(
    "temperature",
    [4.0, CosineSchedule(8, 2), PerSample(), Several(), AsymmetricTemperature(2.0, PerSample())],
    ids=["constant", "scheduled", "per sample", "several", "asymmetric"],
)
def test_every_policy_follows_and_checks_are_counted_not_epochs(
    temperature: Any, make_module: Make, make_trainer: MakeTrainer
) -> None:
    record = fit(make_module(temperature=temperature), make_trainer, EVENTFUL, [adaptive()])
    moves = simulate(make_rule(), EVENTFUL, start=1.0, low=0.0001)
    assert record.multipliers == pytest.approx({2 * n + 2: multiplier for n, multiplier in enumerate(moves)})


def test_the_message_says_why(make_module: Make, make_trainer: MakeTrainer, told: pytest.LogCaptureFixture) -> None:
    values = [0.9, 0.915, 0.91, 0.912, 0.85, *[0.95] * 20]
    fit(make_module(), make_trainer, values, [adaptive(factor=0.8, patience=2, verbose=True)], max_epochs=3)
    assert "scripted 0.912 not above 0.915 for 2 checks: temperature × 0.8 → 3.2" in told.text
    assert "scripted 0.85 below 0.912 − 0.0182 for 1 check: temperature ÷ 0.8 → 4" in told.text
    assert "scripted 0.91: temperature stays 4 (flat for 1 check, degraded for 0 checks)" in told.text


def test_sanity_check_and_validate_change_nothing(make_module: Make, make_trainer: MakeTrainer) -> None:
    callback = adaptive(monitor="val_acc", patience=1, degrade_delta=0.9)
    module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))  # val_acc provably stays
    trainer = make_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(module, make_loader(), make_loader(16))
    before, multiplier = callback.state_dict(), multiplier_of(module)
    assert multiplier == 0.5
    trainer.validate(module, make_loader(16), verbose=False)
    assert callback.state_dict() == before
    assert multiplier_of(module) == multiplier


def test_bounds(make_module: Make, make_trainer: MakeTrainer) -> None:
    module = make_module(temperature=4.0)
    fit(module, make_trainer, FLAT, [adaptive(min_temperature=1.5)])
    assert multiplier_of(module) == pytest.approx(1.5 / 4)
    module = make_module(temperature=ScheduledTemperature(lambda _: 4.0, min_temperature=3.0, max_temperature=5.0))
    fit(module, make_trainer, FLAT, [adaptive()])  # the policy's own: the multiplier does not run away behind a clamp
    assert multiplier_of(module) == pytest.approx(3 / 4)
    module = make_module(temperature=PerSample())
    callback = adaptive(min_temperature=2.5)
    fit(module, make_trainer, FLAT, [callback])
    assert callback.state_dict()["temperature"][1] * multiplier_of(module) == pytest.approx(2.5, rel=0.05)
    with pytest.raises(ValueError, match=r"leave no room within the policy's own bounds, \[0.05, 100\]"):
        fit(make_module(), make_trainer, FLAT, [adaptive(min_temperature=200)])


def test_a_schedule_that_leaves_the_bounds_is_brought_back(
    make_module: Make, make_trainer: MakeTrainer, told: pytest.LogCaptureFixture
) -> None:
    module = make_module(temperature=CosineSchedule(8.0, 2.0))
    record = fit(module, make_trainer, FLAT, [adaptive(min_temperature=1.8, factor=0.3)], max_epochs=8)
    assert "moved earlier, has left [1.8, 100]" in told.text
    assert list(record.multipliers.values())[4] < 0.4
    assert multiplier_of(module) == pytest.approx(1.8 / 2.0, rel=0.05)


def test_warmup(make_module: Make, make_trainer: MakeTrainer) -> None:
    record = fit(make_module(), make_trainer, FLAT, [adaptive(warmup_epochs=2)])
    assert [record.multipliers[step] for step in (8, 10, 12)] == [1, 1, 0.5]


def test_nan_moves_nothing_and_warns_once(make_module: Make, make_trainer: MakeTrainer) -> None:
    values = [0.9, math.nan, 0.9, math.inf, 0.9, *[0.95] * 20]
    with pytest.warns(UserWarning, match="scripted is not finite") as caught:
        record = fit(make_module(), make_trainer, values, [adaptive()], max_epochs=3)
    assert sum("not finite" in str(warning.message) for warning in caught) == 1
    assert list(record.multipliers.values()) == [1, 1, 1, 1, 0.5, 0.5]


def test_a_missing_metric_names_those_there_are(make_module: Make, make_trainer: MakeTrainer) -> None:
    with pytest.raises(RuntimeError, match=r"follows the metric 'val_f1', which was not logged.*val_acc, .*val_loss"):
        fit(make_module(), make_trainer, FLAT, [adaptive(monitor="val_f1")])


def test_without_a_distiller(make_trainer: MakeTrainer) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(TypeError, match="found no Distiller in this run: neither BoringModel nor a callback"):
        make_trainer(callbacks=[adaptive()]).fit(BoringModel())


def test_a_loss_that_moves_with_the_temperature_is_warned_of(make_module: Make, make_trainer: MakeTrainer) -> None:
    with pytest.warns(UserWarning, match="val_loss, which moves with the temperature"):
        fit(make_module(), make_trainer, FLAT, [adaptive(monitor="val_loss", mode="min")], max_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "mode must be one of 'min', 'max', got 'best'"),
        ({"factor": 1.25}, r"factor must lie in \(0, 1\), got 1.25. To heat on a plateau"),
        ({"patience": 0}, "patience must be 1 or more, got 0"),
        ({"cooldown": -1}, "cooldown must be 0 or more"),
        ({"on_plateau": "lower"}, "on_plateau must be one of 'decrease', 'increase', 'keep'"),
        ({"degrade_delta": 2.0}, r"degrade_delta must lie in \[0, 1\) as a part"),
        ({"min_delta": -1.0}, "min_delta must be finite and not negative"),
        ({"min_temperature": 5.0, "max_temperature": 2.0}, "0 < min_temperature < max_temperature"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveTemperature(**options)


# ---- state ----------------------------------------------------------------------------------------------------------


def test_two_instances_coexist_and_bound_each_other(make_module: Make, make_trainer: MakeTrainer) -> None:
    module = make_module()
    one = adaptive(on_degrade="keep", min_temperature=1.0)
    two = adaptive(on_degrade="keep", on_plateau="increase", factor=0.25, max_temperature=9.0)
    three = adaptive(monitor="val_acc", mode="max", on_plateau="keep", on_degrade="keep")
    assert len({callback.state_key for callback in (one, two, three)}) == 3
    fit(module, make_trainer, FLAT, [one, two, three], max_epochs=2)
    assert multiplier_of(module) == pytest.approx(0.5 * 4)  # 4 → 2 → 8, in one check


@pytest.mark.parametrize("when", ["mid-epoch", "validation"])
def test_a_resumed_run_makes_the_same_moves(
    when: str, make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """From a checkpoint at every odd step, between the validations, or at the end of every validation."""
    options: dict[str, Any] = {"patience": 2, "cooldown": 1, "max_temperature": 7.0}
    every: dict[str, Any] = {"every_n_train_steps": 1} if when == "mid-epoch" else {"monitor": "val_task_loss"}
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **every)
    run: dict[str, Any] = {"max_epochs": 6, "num_sanity_val_steps": 0}
    straight = fit(
        make_module(), make_trainer, EVENTFUL, [adaptive(**options)], [saver], enable_checkpointing=True, **run
    )
    assert set(straight.multipliers.values()) == {0.5, 1.0, 1.75}
    steps = (5, 9, 15, 19) if when == "mid-epoch" else (4, 8, 10, 18)
    for step in steps:
        callback = adaptive(**options)
        path = tmp_path / f"step={step}.ckpt"
        assert torch.load(path, weights_only=True)["callbacks"][callback.state_key]["best"] > 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
            warnings.filterwarnings("ignore", message=".*Please add the following callbacks.*ModelCheckpoint")
            resumed = fit(make_module(), make_trainer, EVENTFUL, [callback], ckpt_path=path, **run)
        expected = {at: multiplier for at, multiplier in straight.multipliers.items() if at > step}
        assert resumed.multipliers == expected, step


def test_state_of_another_version_loads() -> None:
    callback = adaptive()
    callback.load_state_dict({"best": 0.5, "reference": 0.5, "of_the_future": 1})
    assert callback.rule.state.best == 0.5
    assert callback.state_dict()["temperature"] is None


# ---- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")  # for sync_dist, forgotten on purpose
def test_two_ranks_with_different_metrics_and_temperatures_decide_alike(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The metric is not synchronised: rank 0 by itself would cool, rank 1 would do nothing, until it alone falls."""
    record = Record()
    zero, one = [0.9] * 6, [0.5, 0.6, 0.6, 0.6, 0.7, 0.2]
    trainer = make_trainer(
        devices=2,
        strategy="ddp_fork",
        max_epochs=6,
        num_sanity_val_steps=0,
        callbacks=[
            Script(zero, steps_per_check=2, others=one),
            adaptive(max_temperature=4.0, patience=2),
            record,
            Save(tmp_path, lambda _: record.multipliers),
        ],
    )
    trainer.fit(make_module(temperature=PerSample()), make_loader(), make_loader(16))
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert seen[0] == seen[1]
    multipliers = list(seen[0].values())
    assert multipliers[:5] == [1, 1, 1, 0.5, 0.5]  # the means are 0.7, 0.75, 0.75, 0.75, 0.8, 0.55
    assert 0.66 < multipliers[5] < 0.9  # up to 4 on the rank whose samples are hotter: 2 + 4 · confidence at most 6


# ---- real fits ------------------------------------------------------------------------------------------------------


def test_digits_whose_metric_stays(make_trainer: MakeTrainer, told: pytest.LogCaptureFixture) -> None:
    module, data = digits(lr=0.0)
    make_trainer(max_epochs=5, callbacks=[AdaptiveTemperature(patience=2)]).fit(module, datamodule=data)
    assert multiplier_of(module) == pytest.approx(0.8 * 0.8)
    accuracy = re.search(r"val_acc (\S+) not above (\S+) for 2 checks: temperature × 0.8 → 3.2", told.text)
    assert accuracy is not None
    assert accuracy[1] == accuracy[2]


def test_digits_whose_metric_falls(make_trainer: MakeTrainer, told: pytest.LogCaptureFixture) -> None:
    module, data = digits(lr=3e-3, maximize=True)
    make_trainer(max_epochs=3, callbacks=[AdaptiveTemperature()]).fit(module, datamodule=data)
    assert multiplier_of(module) == 1.25  # one drop, one move
    assert re.search(r"val_acc 0\.\d+ below 0\.9\d+ − 0\.0\d+ for 1 check: temperature ÷ 0.8 → 5", told.text)
