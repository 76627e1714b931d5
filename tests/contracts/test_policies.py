"""The contract of policies and schedules: an exported class without a setting here fails."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from kd_lightning import temperature as package
from kd_lightning.functional import kd_loss
from kd_lightning.temperature import (
    AsymmetricTemperature,
    CapacityTemperature,
    ClassFrequencyTemperature,
    ConfidenceTemperature,
    ConstantSchedule,
    ConstantTemperature,
    CorrectWrongTemperature,
    CosineSchedule,
    CyclicSchedule,
    DepthTemperature,
    DisagreementTemperature,
    EnergyTemperature,
    EntropyTemperature,
    ExponentialSchedule,
    GroupTemperature,
    InstanceTemperature,
    JoinedSchedule,
    JoinedTemperature,
    LearnableTemperature,
    LinearSchedule,
    LogitStandardization,
    LogitStdTemperature,
    LossGapTemperature,
    MaxLogitTemperature,
    MultiTemperature,
    ProductTemperature,
    Progress,
    Schedule,
    ScheduledTemperature,
    SharpnessTemperature,
    Signals,
    StepSchedule,
    TargetConfidenceTemperature,
    Temperature,
    TemperaturePolicy,
    TokenDifficultyTemperature,
    TransformedTeacherTemperature,
)

CLASSES = 6


class Case(NamedTuple):
    build: Callable[[], TemperaturePolicy]
    no_compile: str | None = None  # the reason, where fullgraph compilation does not work


POLICIES: dict[type[TemperaturePolicy], list[Case]] = {
    AsymmetricTemperature: [Case(lambda: AsymmetricTemperature(LogitStdTemperature(), CosineSchedule(8.0, 2.0)))],
    CapacityTemperature: [Case(lambda: CapacityTemperature(interval=2, factor=0.5))],
    ClassFrequencyTemperature: [
        Case(lambda: ClassFrequencyTemperature([9, 50, 3, 1, 0, 8])),
        Case(lambda: ClassFrequencyTemperature(torch.arange(1, 7), direction="rare_low")),
    ],
    ConfidenceTemperature: [
        Case(lambda: ConfidenceTemperature(0.6)),
        Case(lambda: ConfidenceTemperature(0.6, softness=0.1)),
    ],
    ConstantTemperature: [Case(lambda: ConstantTemperature(4.0))],
    CorrectWrongTemperature: [Case(CorrectWrongTemperature)],
    DepthTemperature: [Case(DepthTemperature)],
    DisagreementTemperature: [
        Case(DisagreementTemperature),
        Case(lambda: DisagreementTemperature(beta=10.0, gamma=0.5, by="confidence")),
    ],
    EnergyTemperature: [
        Case(EnergyTemperature),
        Case(lambda: EnergyTemperature(share=0.3)),
        Case(lambda: EnergyTemperature(threshold=-2.0)),
    ],
    EntropyTemperature: [Case(EntropyTemperature)],
    GroupTemperature: [
        Case(lambda: GroupTemperature("source", {0: 2.0, 1: CosineSchedule(8.0, 2.0)}, default=4.0)),
        Case(lambda: GroupTemperature("language", {"en": 2.0, "fi": 6.0}), "the column is a list of strings"),
    ],
    InstanceTemperature: [Case(lambda: InstanceTemperature(CLASSES, hidden_size=4, warmup_epochs=1))],
    JoinedTemperature: [
        Case(lambda: JoinedTemperature([EntropyTemperature(), LearnableTemperature(warmup_epochs=2)], [1]))
    ],
    LearnableTemperature: [
        Case(LearnableTemperature),
        Case(lambda: LearnableTemperature(4.0, adversarial=False)),
    ],
    LogitStandardization: [Case(LogitStandardization)],
    LogitStdTemperature: [Case(LogitStdTemperature), Case(lambda: LogitStdTemperature(detach=True))],
    LossGapTemperature: [Case(LossGapTemperature)],
    MaxLogitTemperature: [Case(lambda: MaxLogitTemperature(2.0))],
    MultiTemperature: [Case(MultiTemperature), Case(lambda: MultiTemperature([SharpnessTemperature(4.0), 4.0]))],
    ProductTemperature: [Case(lambda: ProductTemperature([LogitStdTemperature(), CosineSchedule(1.0, 0.5)]))],
    ScheduledTemperature: [
        Case(lambda: ScheduledTemperature(CosineSchedule(8.0, 2.0))),
        Case(lambda: ScheduledTemperature(JoinedSchedule([LinearSchedule(1.0, 8.0), StepSchedule(8.0, [2])], [1]))),
    ],
    SharpnessTemperature: [Case(SharpnessTemperature), Case(lambda: SharpnessTemperature(detach=True))],
    TargetConfidenceTemperature: [Case(TargetConfidenceTemperature)],
    TokenDifficultyTemperature: [Case(lambda: TokenDifficultyTemperature(base=2.0))],
    TransformedTeacherTemperature: [
        Case(TransformedTeacherTemperature),
        Case(lambda: TransformedTeacherTemperature(0.2, weighted=True)),
    ],
}

#: Build, and the values at the start and after the end (of a run of 40 epochs of 10 steps).
SCHEDULES: dict[type[Schedule], list[tuple[Callable[[], Schedule], float, float]]] = {
    ConstantSchedule: [(lambda: ConstantSchedule(3.0), 3.0, 3.0)],
    CosineSchedule: [
        (lambda: CosineSchedule(8.0, 2.0), 8.0, 2.0),
        (lambda: CosineSchedule(1.0, 9.0, until=0.5), 1.0, 9.0),
    ],
    CyclicSchedule: [(lambda: CyclicSchedule(2.0, 6.0, 8), 2.0, 2.0)],
    ExponentialSchedule: [
        (lambda: ExponentialSchedule(8.0, 0.5, 1.0), 8.0, 1.0),
        (lambda: ExponentialSchedule(1.0, 1.1, 5.0, "step"), 1.0, 5.0),
    ],
    JoinedSchedule: [(lambda: JoinedSchedule([LinearSchedule(1.0, 8.0), CosineSchedule(8.0, 2.0)], [10]), 1.0, 2.0)],
    LinearSchedule: [(lambda: LinearSchedule(10.0, 2.0, until=0.7), 10.0, 2.0)],
    StepSchedule: [(lambda: StepSchedule(8.0, [10, 20], 0.5), 8.0, 2.0)],
}

REPEATING = {CyclicSchedule}  # has no end value; 40 epochs are five whole periods


def exported(base: type) -> list[type]:
    members = (getattr(package, name) for name in package.__all__)
    return [c for c in members if inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c)]


cases = pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{p.__name__}-{i}") for p, cs in POLICIES.items() for i, c in enumerate(cs)]
)


@pytest.mark.parametrize("policy", exported(TemperaturePolicy))
def test_every_policy_has_a_setting(policy):
    assert policy in POLICIES, f"{policy.__name__} is exported: add a Case of it to POLICIES."
    assert all(type(case.build()) is policy for case in POLICIES[policy])


@pytest.mark.parametrize("schedule", exported(Schedule))
def test_every_schedule_has_a_setting(schedule):
    assert schedule in SCHEDULES, f"{schedule.__name__} is exported: add a setting of it to SCHEDULES."


def test_every_policy_in_the_modules_is_exported():
    found = set()
    waiting = [TemperaturePolicy]
    while waiting:
        subclasses = waiting.pop().__subclasses__()
        waiting += subclasses
        found.update(c for c in subclasses if c.__module__.startswith(package.__name__) and c.__name__[0] != "_")
    assert found == set(exported(TemperaturePolicy))


def draw(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.randn(*shape, generator=generator) for _ in range(2))
    if kind == "huge":
        student, teacher = 1e4 * student.sign(), 1e4 * teacher.sign()
    elif kind == "tiny":
        student, teacher = 1e-6 * student, 1e-6 * teacher
    elif kind == "constant":
        student, teacher = torch.full(shape, 3.0), torch.full(shape, -2.0)
    elif kind == "padded":  # a vocabulary filled up to a round number
        student[..., -2:] = teacher[..., -2:] = -math.inf
    return 3 * student, 3 * teacher


def make(shape=(5, CLASSES), kind="random", seed=0, progress=None) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = draw(kind, shape, generator)
    targets = torch.randint(0, 4, shape[:-1], generator=generator)
    targets.view(-1)[1:2] = -100
    extra = {"source": torch.arange(shape[0]) % 3, "language": ["en", "fi"] * (shape[0] // 2) + ["en"] * (shape[0] % 2)}
    progress = progress or Progress(step=13, max_steps=40, epoch=1, max_epochs=4)
    return Signals(student, teacher, targets, progress, extra=extra)


def terms(policy: TemperaturePolicy, signals: Signals) -> list[Temperature]:
    computed = policy(signals)
    return [computed] if isinstance(computed, Temperature) else list(computed)


def loss_of(policy: TemperaturePolicy, signals: Signals) -> Tensor:
    student, teacher = policy.transform(signals.student_logits), policy.transform(signals.teacher_logits)
    options: Any = {"targets": signals.targets, "class_dim": student.dim() - 1}
    losses = [kd_loss(student, teacher, term, **options) for term in terms(policy, signals)]
    return torch.stack(losses).sum()


def assert_same(
    ours: list[Temperature], theirs: list[Temperature], rtol: float | None = None, atol: float | None = None
) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def train(policy: TemperaturePolicy, steps: int = 5, seed: int = 0) -> None:
    """Some steps, so that state and parameters are no longer those of the start."""
    policy.train()
    groups = policy.param_groups()
    optimizer = torch.optim.SGD(groups, lr=5.0) if groups else None
    for step in range(steps):
        progress = Progress(step=step, max_steps=40, epoch=step, max_epochs=4)
        loss = loss_of(policy, make(seed=100 * seed + step, progress=progress))
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["random", "huge", "tiny", "constant", "padded"])
def test_finite_and_within_bounds(case, kind, dtype):
    policy = case.build()
    signals = make(kind=kind)
    student = signals.student_logits.to(dtype).requires_grad_()
    signals = signals.replace(student_logits=student, teacher_logits=signals.teacher_logits.to(dtype))
    for term in terms(policy, signals):
        for t in (term.student, term.teacher):
            assert t.dtype == torch.float32
            assert torch.isfinite(t).all()
            assert t.min() >= policy.min_temperature
            assert t.max() <= policy.max_temperature
        if term.scale is not None:
            assert torch.isfinite(term.scale).all()
            assert term.scale.min() >= 0
    loss = loss_of(policy, signals)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in policy.parameters())


@cases
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_positions_left_out_may_hold_anything(case, garbage):
    signals = make()
    left_out = signals.targets == -100
    results = []
    for value in (0.0, garbage):
        policy = case.build()
        student, teacher = signals.student_logits.clone(), signals.teacher_logits.clone()
        student[left_out] = teacher[left_out] = value
        student.requires_grad_()
        given = signals.replace(student_logits=student, teacher_logits=teacher)
        loss_of(policy, given).backward()
        assert student.grad is not None
        results.append((terms(policy.eval(), given), student.grad))
    assert_same(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1])


@cases
def test_positions_left_out_have_the_mean_of_the_others(case):
    policy, signals = case.build(), make((4, 3, CLASSES))
    valid = signals.valid
    assert valid is not None
    for term in terms(policy, signals):
        for t in term[:2]:
            if t.shape == (4, 3, 1):
                torch.testing.assert_close(t[~valid], t[valid].mean().expand_as(t[~valid]))


@cases
@pytest.mark.parametrize("shape", [(5, CLASSES), (1, CLASSES), (2, 3, CLASSES), (2, 3, 4, CLASSES)])
def test_shapes(case, shape):
    policy, signals = case.build(), make(shape)
    for term in terms(policy, signals):
        for t in term if term.scale is not None else term[:2]:
            assert isinstance(t, Tensor)
            if t.numel() > 1:
                assert t.dim() == len(shape)
                assert all(have in (1, full) for have, full in zip(t.shape, shape, strict=True))
            assert t.device == signals.student_logits.device
    assert torch.isfinite(loss_of(policy, signals))


@cases
def test_a_constant_added_to_the_logits_changes_nothing(case):
    policy, signals = case.build().eval(), make()
    shifted = signals.replace(student_logits=signals.student_logits + 7.0, teacher_logits=signals.teacher_logits - 3.0)
    assert_same(terms(policy, shifted), terms(policy, signals), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss_of(policy, shifted), loss_of(policy, signals), rtol=1e-3, atol=1e-6)


@cases
def test_the_loss_of_a_model_with_itself_is_zero_where_t_is_shared(case):
    policy, signals = case.build(), make()
    signals = signals.replace(student_logits=signals.teacher_logits)
    logits = policy.transform(signals.teacher_logits)
    for term in terms(policy, signals):
        if term.student.shape == term.teacher.shape and torch.equal(term.student, term.teacher):
            assert abs(kd_loss(logits, logits, term).item()) < 1e-6


@cases
def test_copies_and_checkpoints(case, tmp_path):
    policy = case.build()
    train(policy)
    signals = make(seed=9)
    torch.save(policy.state_dict(), tmp_path / "policy.pt")
    loaded = case.build()
    loaded.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    copied = copy.deepcopy(policy)
    expected = terms(policy.eval(), signals)
    for other in (copied, pickle.loads(pickle.dumps(policy)), loaded):
        assert_same(terms(other.eval(), signals), expected, rtol=0, atol=0)
        assert repr(other) == repr(policy)
    train(copied, seed=1)
    assert_same(terms(policy, signals), expected, rtol=0, atol=0)  # a copy's training leaves the original alone


@cases
def test_resumed_is_as_if_never_stopped(case):
    through, first = case.build(), case.build()
    first.load_state_dict(through.state_dict())
    for seed in (1, 2):
        train(through, seed=seed)
    train(first, seed=1)
    second = case.build()
    second.load_state_dict(first.state_dict())
    train(second, seed=2)
    assert_same(terms(second.eval(), make()), terms(through.eval(), make()), rtol=0, atol=0)


@cases
def test_evaluation_changes_no_state(case):
    policy = case.build().eval()
    before = copy.deepcopy(policy.state_dict())
    for seed in range(3):
        terms(policy, make(seed=seed))
    torch.testing.assert_close(policy.state_dict(), before, rtol=0, atol=0)


@cases
def test_moves_and_casts(case):
    policy = case.build()
    expected = terms(policy.eval(), make())
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        policy.to(cast)
        tensors = list(policy.state_dict().values())
        assert {t.dtype for t in tensors} == {torch.float32}
        assert all(t.dim() > 0 for t in tensors)  # FSDP refuses 0-d state
        assert_same(terms(policy, make()), expected)
    policy.to("meta")
    assert all(t.device.type == "meta" for t in policy.state_dict().values())


@cases
def test_blind_to_the_default_dtype(case):
    """Lightning's bf16-true sets it around construction and the training step."""
    torch.manual_seed(1)
    expected_policy = case.build()
    expected = terms(expected_policy, make())
    signals = make()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(1)
        policy = case.build()
        computed = terms(policy, signals)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(computed, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(policy.state_dict(), expected_policy.state_dict())


@cases
def test_no_weight_decay(case):
    policy = case.build()
    groups = policy.param_groups()
    assert all(group["weight_decay"] == 0.0 for group in groups)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in policy.parameters()}


@cases
def test_prints(case):
    assert "<" not in repr(case.build())  # no default repr of an object


@pytest.mark.slow
@cases
def test_compiles(case):
    if case.no_compile:
        pytest.skip(case.no_compile)
    torch.compiler.reset()
    eager = case.build()
    compiled_policy = copy.deepcopy(eager)

    def step(signals: Signals) -> tuple[Tensor, list[Temperature]]:
        student, teacher = (compiled_policy.transform(z) for z in (signals.student_logits, signals.teacher_logits))
        computed = compiled_policy(signals)
        several = [computed] if isinstance(computed, Temperature) else list(computed)
        return torch.stack([kd_loss(student, teacher, t, targets=signals.targets) for t in several]).sum(), several

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        progress = Progress(step=seed, max_steps=40, epoch=seed, max_epochs=4)
        signals = make(seed=seed, progress=progress)
        leaves = [signals.student_logits.clone().requires_grad_() for _ in range(2)]
        loss, computed = compiled(signals.replace(student_logits=leaves[0]))
        assert_same(computed, terms(eager, signals.replace(student_logits=leaves[1])))
        eager.load_state_dict(compiled_policy.state_dict())
        loss.backward()
        eager_loss = loss_of(eager.eval(), signals.replace(student_logits=leaves[1]))
        eager.train()
        eager_loss.backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "graphs"),
    [(CosineSchedule(8.0, 2.0), 2), (StepSchedule(8.0, (40,), unit="step"), 3), (lambda progress: 3.0, 1)],
)
def test_few_graphs_for_a_whole_schedule(schedule, graphs):
    """The step and epoch become dynamic: a smooth schedule costs two graphs, a staircase one more for each stair."""
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    policy, counter = ScheduledTemperature(schedule), CompileCounter()
    compiled = torch.compile(policy, fullgraph=True, backend=counter)
    for step in range(100):
        progress = Progress(step=step, max_steps=100, epoch=step // 10, max_epochs=10)
        assert compiled(make(progress=progress)).student.item() == pytest.approx(schedule(progress), rel=1e-6)
    assert counter.frame_count <= graphs


def _on_one_of_two_ranks(rank: int, policies: list[TemperaturePolicy], folder: str) -> None:
    dist.init_process_group(
        "gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store", timeout=timedelta(seconds=60)
    )
    try:
        for policy in policies:
            with torch.no_grad():  # no optimiser: the trainer's strategy averages gradients, not the policy
                for step in range(4):  # each rank has its own data, one of them a batch without a label
                    signals = make(seed=1000 * rank + step, progress=Progress(step, 40, step, 4))
                    if rank == 1 and step == 2:
                        signals = signals.replace(targets=torch.full((5,), -100))
                    terms(policy, signals)
            values = torch.cat([t.student.flatten() for t in terms(policy.eval(), make(seed=77))])
            state = torch.cat([*(t.flatten() for t in policy.state_dict().values()), values])
            states = [torch.empty_like(state) for _ in range(2)]
            dist.all_gather(states, state.contiguous())
            assert torch.equal(*states), f"{policy}: {states}"
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_the_same_temperature_on_two_ranks(tmp_path: Path):
    policies = [case.build() for cases_of_one in POLICIES.values() for case in cases_of_one]
    start_processes(_on_one_of_two_ranks, (policies, str(tmp_path)), nprocs=2, start_method="fork")


def _averaged_over_ranks(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store", timeout=timedelta(seconds=60)
    )
    try:
        whole = make((8, CLASSES))
        half = slice(4 * rank, 4 * rank + 4)
        assert whole.targets is not None
        mine = Signals(whole.student_logits[half], whole.teacher_logits[half], whole.targets[half], whole.progress)
        for build in (LossGapTemperature, CapacityTemperature):
            distributed = build()
            distributed(mine)
            torch.save(distributed.state_dict(), f"{folder}/{build.__name__}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_half_batches_are_one_whole_batch(tmp_path: Path):
    """Weighted by the valid positions of each rank, which differ here."""
    start_processes(_averaged_over_ranks, (str(tmp_path),), nprocs=2, start_method="fork")
    for build in (LossGapTemperature, CapacityTemperature):
        alone = build()
        alone(make((8, CLASSES)))
        for rank in range(2):
            state = torch.load(tmp_path / f"{build.__name__}-{rank}.pt", weights_only=True)
            torch.testing.assert_close(state, dict(alone.state_dict()))


schedules = pytest.mark.parametrize(
    ("build", "first", "last"),
    [pytest.param(*s, id=f"{c.__name__}-{i}") for c, settings in SCHEDULES.items() for i, s in enumerate(settings)],
)


@schedules
def test_schedule(build, first, last):
    schedule = build()

    def at(epoch: int) -> float:
        return schedule(Progress(step=10 * epoch, max_steps=400, epoch=epoch, max_epochs=40))

    values = [at(epoch) for epoch in range(41)]
    assert all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in values)
    assert values[0] == pytest.approx(first)
    assert values[-1] == pytest.approx(last)
    if type(schedule) not in REPEATING:
        assert at(41) == at(100) == pytest.approx(last)


@schedules
def test_schedule_is_a_value(build, first, last):
    schedule = build()
    assert pickle.loads(pickle.dumps(schedule)) == schedule == build()
    assert copy.deepcopy(schedule) == schedule
    assert hash(build()) == hash(schedule)
    assert repr(schedule).startswith(type(schedule).__name__ + "(")
    assert "object at" not in repr(schedule)
    assert eval(repr(schedule), dict(vars(package))) == schedule
