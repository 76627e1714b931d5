from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from kd_lightning import DistillationModule, Distiller, FrozenTeacher, TeacherEnsemble
from kd_lightning.functional import kd_loss
from kd_lightning.losses import (
    BernoulliKDLoss,
    DISTLoss,
    DKDLoss,
    KDLoss,
    LogitLoss,
    MSELogitsLoss,
    NKDLoss,
    ReverseKDLoss,
)
from kd_lightning.teachers import TeacherCache
from kd_lightning.teachers.ensemble import Combine
from kd_lightning.temperature import (
    ClassFrequencyTemperature,
    CosineSchedule,
    LearnableTemperature,
    LinearSchedule,
    LogitStandardization,
    LogitStdTemperature,
    MultiTemperature,
    Progress,
)
from tests.helpers import (
    NUM_CLASSES,
    NUM_FEATURES,
    LearnedTemperature,
    assert_same,
    make_data,
    make_loader,
    make_network,
    snapshot,
)

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]
COMBINE: list[Combine] = ["probs", "logits", "losses"]
INPUTS = torch.randn(5, NUM_FEATURES, generator=torch.Generator().manual_seed(3))
TARGETS = torch.tensor([0, 1, 2, 3, 4])


def trained(seed: int, hidden: int = 12, num_classes: int = NUM_CLASSES) -> nn.Module:
    """A network far from its initialisation."""
    torch.manual_seed(seed)
    network = make_network(hidden, num_classes=num_classes)
    for parameter in network.parameters():
        parameter.data.mul_(2.0)
    network[1].running_mean.add_(0.1)  # pyright: ignore
    return network


@pytest.fixture
def teachers() -> list[nn.Module]:
    return [trained(seed) for seed in (1, 2, 3)]


class Says(nn.Module):
    """Says what it was told, whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.answer = logits  # no weight: it may hold anything, and weights must be finite
        self.calls = 0

    def forward(self, inputs: Any) -> Tensor:
        self.calls += 1
        return self.answer


def loss_and_gradient(distiller: Distiller, logits: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    call = {"targets": TARGETS} | call
    loss = distiller(call.pop("inputs", INPUTS), logits, **call).kd_loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


# ---- values ------------------------------------------------------------------------------------------------------

S = np.array([[0.5, -1.0, 2.0], [1.0, 0.0, 0.0]])
T = np.array([[[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]], [[0.0, 4.0, -1.0], [1.0, 1.0, 6.0]]])
WEIGHTS, OWN, STUDENT_T = (0.75, 0.25), (2.0, 5.0), 3.0


def softened(z: Any, t: float) -> Any:
    power = np.exp(z / t)
    return power / power.sum(-1, keepdims=True)


def by_hand(combine: str, weights: Any, own: Sequence[float]) -> tuple[float, Any]:
    """Loss and its gradient, row by row; weights (K,) or (K, N)."""
    weights = np.broadcast_to(np.reshape(weights, (2, -1)), (2, 2))
    loss, gradient = 0.0, np.zeros_like(S)
    for row in range(2):
        w = weights[:, row]
        p_s = softened(S[row], STUDENT_T)
        t_t = float(w @ np.array(own))
        if combine == "losses":
            parts = [(w[k], softened(T[k, row], own[k]), own[k]) for k in range(2)]
        elif combine == "probs":
            parts = [(1.0, sum(w[k] * softened(T[k, row], own[k]) for k in range(2)), t_t)]
        else:
            parts = [(1.0, softened(sum(w[k] * T[k, row] / own[k] for k in range(2)), 1.0), t_t)]
        for weight, p, t in parts:
            factor = weight * STUDENT_T * t / 2
            loss += factor * (p * np.log(p / p_s)).sum()
            gradient[row] += factor / STUDENT_T * (p_s - p)
    return loss, gradient


def two(**options: Any) -> TeacherEnsemble:
    return TeacherEnsemble([Says(torch.tensor(t)) for t in T], **options)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("own", [OWN, None])
def test_values_and_gradients_by_hand(combine: Combine, own: Sequence[float] | None) -> None:
    teacher = two(temperatures=own, weights=[3, 1], combine=combine)  # only the ratio counts
    distiller = Distiller(teacher, STUDENT_T, task_weight=0.0)
    expected, gradient = by_hand(combine, WEIGHTS, own or (STUDENT_T, STUDENT_T))
    loss, ours = loss_and_gradient(distiller, torch.tensor(S), targets=None)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.numpy(), gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("weights", ["confidence", "entropy"])
def test_weights_per_sample_by_hand(combine: Combine, weights: Any) -> None:
    labels = np.array([0, 2])
    p = softened(T, 1.0)
    if weights == "confidence":
        badness = 1 / np.stack([p[k, [0, 1], labels] for k in range(2)])
    else:
        badness = -(p * np.log(p)).sum(-1)
    expected, gradient = by_hand(combine, 1 - badness / badness.sum(0), OWN)
    distiller = Distiller(two(temperatures=OWN, weights=weights, combine=combine), STUDENT_T)
    loss, ours = loss_and_gradient(distiller, torch.tensor(S), targets=torch.tensor(labels))
    torch.testing.assert_close(loss.item(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.numpy(), gradient, rtol=1e-10, atol=1e-14)


def test_the_consensus_is_what_policies_and_metrics_see() -> None:
    out = Distiller(two(weights=[3, 1], temperatures=OWN), STUDENT_T, task_weight=0.0)(None, torch.tensor(S))
    mixture = 0.75 * softened(T[0], 1.0) + 0.25 * softened(T[1], 1.0)
    torch.testing.assert_close(out.teacher_logits.softmax(-1).numpy(), mixture)
    assert out.temperatures[0].teacher.item() == 0.75 * 2 + 0.25 * 5
    mean = Distiller(two(weights=[3, 1], combine="logits"), STUDENT_T, task_weight=0.0)(None, torch.tensor(S))
    torch.testing.assert_close(mean.teacher_logits.numpy(), 0.75 * T[0] + 0.25 * T[1])


def test_kl_to_the_mixture_and_the_mean_of_kls_have_one_gradient() -> None:
    probs, losses = (
        loss_and_gradient(Distiller(two(combine=c), 2.0, task_weight=0.0), torch.tensor(S), targets=None)
        for c in COMBINE[::2]
    )
    torch.testing.assert_close(probs[1], losses[1])
    assert losses[0] > probs[0] + 0.1  # by the teachers' own disagreement


def test_weights_follow_schedules(teachers: list[nn.Module]) -> None:
    teacher = TeacherEnsemble(teachers[:2], weights=[LinearSchedule(1.0, 0.0), LinearSchedule(0.0, 3.0)])
    distiller, logits = Distiller(teacher, 4.0), torch.randn(5, 6)
    for step, weights in ((0, [1.0, 0.0]), (5, [0.25, 0.75]), (10, [0.0, 1.0])):
        ours = loss_and_gradient(distiller, logits, progress=Progress(step=step, max_steps=10))
        fixed = loss_and_gradient(Distiller(TeacherEnsemble(teachers[:2], weights=weights), 4.0), logits)
        torch.testing.assert_close(ours, fixed)


def test_temperatures_follow_schedules_policies_and_the_multiplier(teachers: list[nn.Module]) -> None:
    own = [CosineSchedule(8.0, 2.0), LogitStdTemperature(2.0)]
    distiller = Distiller(TeacherEnsemble(teachers[:2], temperatures=own, weights=[1, 3]), 4.0)
    out = distiller(INPUTS, torch.randn(5, 6), TARGETS, Progress(step=10, max_steps=10))
    spread = 2 * teachers[1](INPUTS).std(-1, keepdim=True)
    torch.testing.assert_close(out.temperatures[0].teacher, 0.25 * 2 + 0.75 * spread)
    distiller.temperature.multiplier.mul_(0.5)
    halved = distiller(INPUTS, torch.randn(5, 6), TARGETS, Progress(step=10, max_steps=10))
    torch.testing.assert_close(halved.temperatures[0].teacher, 0.5 * out.temperatures[0].teacher)


# ---- identities --------------------------------------------------------------------------------------------------

POLICIES: list[Any] = [4.0, LogitStandardization(2.0), LogitStdTemperature(), MultiTemperature([2.0, 5.0])]
LOSSES = [KDLoss(), ReverseKDLoss(), DKDLoss(), NKDLoss(), DISTLoss()]


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"weights": "confidence"}, {"routing": lambda x, y: torch.zeros_like(y)}],
    ids=["plain", "confidence", "routing"],
)
def test_one_teacher_is_itself_bit_for_bit(
    combine: Combine, policy: Any, options: dict[str, Any], teachers: list[nn.Module]
) -> None:
    logits = torch.randn(5, 6)
    single = Distiller(teachers[0], copy.deepcopy(policy))
    ensemble = Distiller(TeacherEnsemble(teachers[:1], combine=combine, **options), copy.deepcopy(policy))
    for one, two in zip(loss_and_gradient(single, logits), loss_and_gradient(ensemble, logits), strict=True):
        assert torch.equal(one, two)
    out = ensemble(INPUTS, logits, TARGETS)
    assert torch.equal(out.teacher_logits, single(INPUTS, logits, TARGETS).teacher_logits)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("weights", [None, [1, 2, 5], "confidence", "entropy"], ids=str)
def test_teachers_who_agree_are_one(combine: Combine, policy: Any, weights: Any, teachers: list[nn.Module]) -> None:
    logits = torch.randn(5, 6)
    same = [copy.deepcopy(teachers[0]) for _ in range(3)]
    single = Distiller(teachers[0], copy.deepcopy(policy))
    ensemble = Distiller(TeacherEnsemble(same, combine=combine, weights=weights), copy.deepcopy(policy))
    torch.testing.assert_close(
        loss_and_gradient(ensemble, logits), loss_and_gradient(single, logits), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(ensemble(INPUTS, logits, TARGETS).teacher_logits, teachers[0](INPUTS))


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_all_weight_on_one_is_that_one(combine: Combine, loss: nn.Module, teachers: list[nn.Module]) -> None:
    if combine != "losses" and isinstance(loss, NKDLoss):
        pytest.skip("it looks at the teacher at T = 1 too, which a mixture at T does not have")
    logits = torch.randn(5, 6)
    routing = lambda x, y: torch.ones_like(y)  # noqa: E731
    only: list[dict[str, Any]] = [{"weights": [0, 1, 0]}, {"routing": routing}]
    for options in (*only, {"routing": routing, "weights": "entropy"}):
        ensemble = Distiller(TeacherEnsemble(teachers, combine=combine, **options), 3.0, kd_loss=loss)
        single = Distiller(teachers[1], 3.0, kd_loss=loss)
        torch.testing.assert_close(
            loss_and_gradient(ensemble, logits), loss_and_gradient(single, logits), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("combine", COMBINE)
def test_a_policy_that_centres_sees_each_member(combine: Combine, teachers: list[nn.Module]) -> None:
    policy = ClassFrequencyTemperature(class_counts=[60, 50, 40, 30, 20, 10])
    ensemble = Distiller(TeacherEnsemble(teachers[:2], combine=combine), policy)
    logits = torch.randn(5, 6)
    shifted = [nn.Sequential(copy.deepcopy(teacher), Shift(7.0)) for teacher in teachers[:2]]
    other = Distiller(TeacherEnsemble(shifted, combine=combine), policy)
    torch.testing.assert_close(loss_and_gradient(ensemble, logits), loss_and_gradient(other, logits + 3.0))


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.by


@pytest.mark.parametrize("loss", [MSELogitsLoss(), BernoulliKDLoss()])
def test_losses_without_a_softmax(loss: LogitLoss, teachers: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match="Take TeacherEnsemble"):
        Distiller(TeacherEnsemble(teachers), kd_loss=loss)
    targets = None if isinstance(loss, BernoulliKDLoss) else TARGETS
    logits = torch.randn(5, 6)
    mean = sum(teacher.eval()(INPUTS) for teacher in teachers) / 3
    combined = Distiller(TeacherEnsemble(teachers, combine="logits"), 2.0, kd_loss=loss, task_weight=0.0)
    torch.testing.assert_close(combined(INPUTS, logits, targets).kd_loss, loss(logits, mean, 2.0))
    summed = Distiller(TeacherEnsemble(teachers, combine="losses"), 2.0, kd_loss=loss, task_weight=0.0)
    expected = sum(loss(logits, teacher(INPUTS), 2.0) for teacher in teachers) / 3
    torch.testing.assert_close(summed(INPUTS, logits, targets).kd_loss, expected)


# ---- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("weights", [[1, 2], "confidence", "entropy"], ids=str)
def test_dense_and_token_layouts_are_rows(combine: Combine, weights: Any) -> None:
    rows, taught = torch.randn(24, 4), [torch.randn(24, 4), torch.randn(24, 4)]
    targets = torch.arange(24) % 4
    targets[5:9] = -100
    options: dict[str, Any] = {"weights": weights, "combine": combine, "temperatures": [2.0, LogitStdTemperature()]}
    flat = Distiller(TeacherEnsemble([Says(z) for z in taught], **options), 3.0)
    expected = flat(None, rows, targets).kd_loss

    def dense(z: Tensor) -> Tensor:
        return z.view(2, 3, 4, 4).movedim(-1, 1)

    teacher = TeacherEnsemble([Says(dense(z)) for z in taught], **options)
    out = Distiller(teacher, 3.0, kd_loss=KDLoss(class_dim=1))(None, dense(rows), targets.view(2, 3, 4))
    torch.testing.assert_close(out.kd_loss, expected)
    tokens = TeacherEnsemble([Says(z.view(4, 6, 4)) for z in taught], **options)
    torch.testing.assert_close(Distiller(tokens, 3.0)(None, rows.view(4, 6, 4), targets.view(4, 6)).kd_loss, expected)


def test_padded_vocabularies_are_cut_to_the_students() -> None:
    wide, narrow = torch.randn(2, 3, 7), torch.randn(2, 3, 5)
    student = torch.randn(2, 3, 5)
    distiller = Distiller(TeacherEnsemble([Says(wide), Says(narrow)]), 2.0, task_weight=0.0)
    with pytest.warns(UserWarning, match="the last 2 of the teacher are cut"):
        loss = distiller(None, student).kd_loss
    cut = Distiller(TeacherEnsemble([Says(wide[..., :5]), Says(narrow)]), 2.0, task_weight=0.0)
    torch.testing.assert_close(loss, cut(None, student).kd_loss)


@pytest.mark.parametrize("combine", COMBINE)
def test_positions_that_do_not_count_may_hold_anything(combine: Combine, teachers: list[nn.Module]) -> None:
    one, two, student = torch.randn(3, 6, 4).unbind()
    targets = torch.tensor([0, 1, -100, 2, -100, 3])
    kept = targets >= 0
    for weights in (None, "confidence", "entropy"):
        options: dict[str, Any] = {"weights": weights, "combine": combine}
        clean = Distiller(TeacherEnsemble([Says(one[kept]), Says(two[kept])], **options), LogitStdTemperature())
        spoiled = [z.masked_fill(~kept.unsqueeze(-1), torch.nan) for z in (one, two)]
        dirty = Distiller(TeacherEnsemble([Says(z) for z in spoiled], **options), LogitStdTemperature())
        expected = loss_and_gradient(clean, student[kept], targets=targets[kept])
        loss, gradient = loss_and_gradient(dirty, student, targets=targets)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(gradient[kept], expected[1])
        assert not gradient[~kept].any()


@pytest.mark.parametrize("combine", COMBINE)
def test_a_class_that_all_teachers_mask(combine: Combine) -> None:
    masked = [torch.randn(5, 6).index_fill(1, torch.tensor([4]), -torch.inf) for _ in range(2)]
    own = [LearnedTemperature(), 3.0]
    distiller = Distiller(TeacherEnsemble([Says(z) for z in masked], own, combine=combine), 3.0, task_weight=0.0)
    student = torch.randn(5, 6, requires_grad=True)
    loss = distiller(None, student).kd_loss
    loss.backward()
    gradients = [student.grad, *(parameter.grad for parameter in distiller.parameters())]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in (loss, *gradients))


# ---- routing -----------------------------------------------------------------------------------------------------

OWNERS = torch.tensor([0, 1, 0, 1, 1])
MASK = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)


def masked_mean(logits: Sequence[Tensor], student: Tensor, mask: Tensor, combine: str, t: float) -> Tensor:
    """Row by row, with the teachers that know it."""
    rows = []
    for row in range(len(student)):
        members = torch.stack([z[row] for k, z in enumerate(logits) if mask[row, k]])
        if combine == "losses":
            rows.append(kd_loss(student[row].expand_as(members), members, t))
            continue
        taught = members.mean(0) if combine == "logits" else F.softmax(members / t, -1).mean(0).log() * t
        rows.append(kd_loss(student[row][None], taught[None], t))
    return torch.stack(rows).mean()


@pytest.mark.parametrize("combine", COMBINE)
def test_each_row_learns_from_those_that_know_it(combine: Combine) -> None:
    logits = torch.randn(3, 5, 6)
    student = torch.randn(5, 6)
    nonsense = logits.masked_fill(
        ~MASK.T.unsqueeze(-1), torch.nan
    )  # what a teacher says of other rows is not looked at
    teacher = TeacherEnsemble([Says(z) for z in nonsense], combine=combine, routing=lambda inputs, targets: MASK)
    for policy in (3.0, LogitStdTemperature()):
        out = Distiller(teacher, policy)(INPUTS, student, TARGETS)
        assert torch.isfinite(out.kd_loss)
        assert torch.isfinite(out.teacher_logits).all()
    loss = Distiller(teacher, 3.0)(INPUTS, student, TARGETS).kd_loss
    torch.testing.assert_close(loss, masked_mean(list(logits), student, MASK, combine, 3.0))


def test_routing_by_number_by_class_by_key_and_by_function_agree(teachers: list[nn.Module]) -> None:
    student, targets = torch.randn(5, 6), torch.tensor([0, 3, 1, 4, 5])
    inputs = {"input": INPUTS, "source": OWNERS}
    ways: list[tuple[Any, Any]] = [
        ([[0, 1, 2], [3, 4, 5]], INPUTS),
        (lambda inputs, targets: OWNERS, INPUTS),
        (lambda inputs, targets: targets // 3, INPUTS),
        (lambda inputs, targets: F.one_hot(OWNERS, 2).bool(), INPUTS),
        ("source", inputs),
    ]
    losses = [
        Distiller(TeacherEnsemble(teachers[:2], routing=routing), 3.0)(given, student, targets).kd_loss
        for routing, given in ways
    ]
    assert len({loss.item() for loss in losses}) == 1
    own = torch.where(OWNERS.unsqueeze(-1) == 0, teachers[0](INPUTS), teachers[1](INPUTS))
    torch.testing.assert_close(losses[0], kd_loss(student, own, 3.0))


def test_routing_of_tokens_by_sample_and_by_position() -> None:
    logits, student = torch.randn(2, 3, 4, 5), torch.randn(3, 4, 5)
    by_sample = torch.tensor([1, 0, 1])
    by_position = by_sample.unsqueeze(1).expand(3, 4)
    losses = [
        Distiller(TeacherEnsemble([Says(z) for z in logits], routing=lambda x, y, r=route: r), 2.0, task_weight=0.0)(
            None, student
        ).kd_loss
        for route in (by_sample, by_position)
    ]
    assert losses[0] == losses[1]
    own = torch.where(by_sample.view(3, 1, 1) == 0, logits[0], logits[1])
    torch.testing.assert_close(losses[0], kd_loss(student, own, 2.0))


def test_a_row_that_no_teacher_knows() -> None:
    teachers = [Says(z) for z in torch.randn(2, 5, 6)]
    student = torch.randn(5, 6)
    lost = torch.tensor([0, 1, -1, 1, 7])
    with pytest.raises(ValueError, match="routing leaves a row to no teacher"):
        Distiller(TeacherEnsemble(teachers, routing=lambda x, y: lost), 2.0)(INPUTS, student, TARGETS)
    with pytest.raises(ValueError, match="no teacher of positive weight"):
        Distiller(TeacherEnsemble(teachers, routing=lambda x, y: OWNERS, weights=[0, 1]), 2.0)(INPUTS, student, TARGETS)
    left_out = torch.tensor([0, 1, -100, 3, -100])
    out = Distiller(TeacherEnsemble(teachers, routing=lambda x, y: lost), 2.0)(INPUTS, student, left_out)
    kept = [0, 1, 3]
    torch.testing.assert_close(
        out.kd_loss, kd_loss(student[kept], torch.stack([teachers[lost[k]].answer[k] for k in kept]), 2.0)
    )
    with pytest.raises(ValueError, match="routing leaves a row to no teacher"):
        Distiller(TeacherEnsemble(teachers, routing=[[0, 1], [2, 3]]), 2.0)(INPUTS, student, TARGETS)


@pytest.mark.parametrize(
    ("route", "error", "message"),
    [
        (torch.zeros(5), TypeError, r"integers or booleans, got torch\.float32"),
        ([0, 1, 0, 1, 1], TypeError, "got list"),
        (torch.zeros(4, dtype=torch.long), ValueError, r"routing gave \(4,\) for 3 teachers"),
        (torch.ones(5, 2, dtype=torch.bool), ValueError, r"or a mask \(5, 3\)"),
    ],
)
def test_bad_routes(route: Any, error: type[Exception], message: str, teachers: list[nn.Module]) -> None:
    distiller = Distiller(TeacherEnsemble(teachers, routing=lambda inputs, targets: route), 2.0)
    with pytest.raises(error, match=message):
        distiller(INPUTS, torch.randn(5, 6), TARGETS)


def test_routing_that_finds_nothing_to_go_by(teachers: list[nn.Module]) -> None:
    by_class = Distiller(TeacherEnsemble(teachers[:2], routing=[[0, 1, 2], [3, 4, 5]]), task_weight=0.0)
    with pytest.raises(ValueError, match="routing by class needs class indices as targets"):
        by_class(INPUTS, torch.randn(5, 6))
    by_key = Distiller(TeacherEnsemble(teachers, routing="source"))
    with pytest.raises(ValueError, match="names a key of the inputs, which are Tensor"):
        by_key(INPUTS, torch.randn(5, 6), TARGETS)


# ---- one teacher among others ------------------------------------------------------------------------------------


def test_it_is_one_teacher(teachers: list[nn.Module], tmp_path: Path) -> None:
    files = [tmp_path / f"{k}.pt" for k in range(2)]
    torch.save(teachers[0].state_dict(), files[0])
    ensemble = TeacherEnsemble([FrozenTeacher(make_network(12), file) for file in files])
    assert not ensemble.loaded
    assert not ensemble.available()
    assert ensemble.checkpoint == f"{files[0]}, {files[1]}"
    torch.save(teachers[1].state_dict(), files[1])
    assert ensemble.available()
    outputs = ensemble(INPUTS)
    assert ensemble.loaded
    for output, teacher in zip(outputs, teachers, strict=False):
        assert torch.equal(output, teacher.eval()(INPUTS))
        assert not output.requires_grad
    assert copy.deepcopy(ensemble) is ensemble
    assert pickle.loads(pickle.dumps(ensemble)).fingerprint() == ensemble.fingerprint()
    assert repr(ensemble).startswith("TeacherEnsemble([FrozenTeacher(Sequential, ")
    assert "combine='probs', temperatures=None, weights=None, routing=None)" in repr(ensemble)


def test_the_fingerprint_sees_every_member_and_their_order(teachers: list[nn.Module]) -> None:
    prints = {
        TeacherEnsemble(members).fingerprint()
        for members in (teachers, teachers[::-1], teachers[:2], teachers[:1], [*teachers, teachers[0]])
    }
    assert len(prints) == 5


def test_moves_and_casts_reach_the_members_but_their_own_precision_stays(teachers: list[nn.Module]) -> None:
    ensemble = TeacherEnsemble([FrozenTeacher(teachers[0], precision="bf16"), teachers[1]])
    distiller = Distiller(ensemble, 4.0)
    assert list(distiller.state_dict()) == ["temperature.multiplier"]
    distiller.to(torch.float64)
    assert {p.dtype for p in teachers[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in teachers[1].parameters()} == {torch.float64}
    out = distiller(INPUTS.double(), torch.randn(5, 6, dtype=torch.float64), TARGETS)
    assert torch.isfinite(out.loss)


def test_its_own_policies_are_part_of_the_distiller(teachers: list[nn.Module]) -> None:
    teacher = TeacherEnsemble(teachers[:2], temperatures=[LearnedTemperature(), 3.0])
    distiller = Distiller(teacher, 4.0)
    assert "teacher_temperatures.0.raw" in distiller.state_dict()
    logits = torch.randn(5, 6)
    for clone in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        assert torch.equal(clone(INPUTS, logits, TARGETS).loss, distiller(INPUTS, logits, TARGETS).loss)
    twin = copy.deepcopy(distiller)
    twin.teacher_temperatures[0].raw.data.add_(1.0)  # pyright: ignore
    assert twin(INPUTS, logits, TARGETS).loss != distiller(INPUTS, logits, TARGETS).loss


def test_logits_that_are_there_already(teachers: list[nn.Module]) -> None:
    distiller, logits = Distiller(TeacherEnsemble(teachers), 4.0), torch.randn(5, 6)
    given = distiller.teacher_logits(INPUTS)
    expected = distiller(INPUTS, logits, TARGETS).loss
    for ready in (given, torch.stack(list(given))):
        assert torch.equal(distiller(INPUTS, logits, TARGETS, teacher_logits=ready).loss, expected)
    with pytest.raises(ValueError, match="an ensemble of 3 teachers needs as many logits, got 2"):
        distiller(INPUTS, logits, TARGETS, teacher_logits=given[:2])


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_class_counts_that_differ_are_named(teachers: list[nn.Module]) -> None:
    distiller = Distiller(TeacherEnsemble([teachers[0], trained(4, num_classes=4)]))
    with pytest.raises(
        ValueError, match=r"number of classes, got teacher 0 \(Sequential\) 6, teacher 1 \(Sequential\) 4"
    ):
        distiller(INPUTS, torch.randn(5, 6), TARGETS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teachers": []}, ValueError, "needs a list of teachers"),
        ({"temperatures": [1.0]}, ValueError, "3 teachers but 1 temperatures"),
        ({"temperatures": [1.0, "4", 2.0]}, TypeError, "a TemperaturePolicy, got str"),
        ({"weights": [1, 2]}, ValueError, "3 teachers but 2 weights"),
        ({"weights": [0, 0, 0]}, ValueError, "not negative and not all 0"),
        ({"weights": [1, -1, 1]}, ValueError, "not negative"),
        ({"weights": "trust"}, ValueError, "weights must be a list, 'confidence', 'entropy' or None, got 'trust'"),
        ({"combine": "mean"}, ValueError, "combine must be one of 'probs', 'logits', 'losses', got 'mean'"),
        ({"routing": 3}, TypeError, "routing must be the classes of each teacher"),
        ({"routing": [[0], [1]]}, ValueError, "for each of the 3 teachers"),
        ({"routing": [[0], [], [1]]}, ValueError, "for each of the 3 teachers"),
    ],
)
def test_bad_arguments(
    options: dict[str, Any], error: type[Exception], message: str, teachers: list[nn.Module]
) -> None:
    given: dict[str, Any] = {"teachers": teachers} | options
    with pytest.raises(error, match=message):
        TeacherEnsemble(**given)


def test_bad_members_and_calls(teachers: list[nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got NoneType"):
        TeacherEnsemble([teachers[0], None])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="within another"):
        TeacherEnsemble([TeacherEnsemble(teachers)])
    logits = torch.randn(5, 6)
    with pytest.raises(ValueError, match=r"needs class indices as targets .* got none"):
        Distiller(TeacherEnsemble(teachers, weights="confidence"), task_weight=0.0)(INPUTS, logits)
    with pytest.raises(ValueError, match="MultiTemperature gives several"):
        Distiller(TeacherEnsemble(teachers, [1.0, 2.0, MultiTemperature([1.0, 2.0])]))(INPUTS, logits, TARGETS)
    falling = TeacherEnsemble(teachers[:1], weights=[LinearSchedule(1.0, 0.0)])
    with pytest.raises(ValueError, match="not all 0"):
        Distiller(falling)(INPUTS, logits, TARGETS, Progress(step=2, max_steps=2))


class OneNumber(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, temperature: Any, targets: Tensor | None = None) -> Tensor:
        return kd_loss(student, teacher, temperature)


def test_a_loss_of_ones_own_and_weights_by_row(teachers: list[nn.Module]) -> None:
    logits = torch.randn(5, 6)
    shared = Distiller(TeacherEnsemble(teachers, combine="losses"), 2.0, kd_loss=OneNumber())
    ours = Distiller(TeacherEnsemble(teachers, combine="losses"), 2.0)
    torch.testing.assert_close(shared(INPUTS, logits, TARGETS).loss, ours(INPUTS, logits, TARGETS).loss)
    with pytest.raises(TypeError, match="weights by row needs the loss of each row: derive OneNumber"):
        Distiller(TeacherEnsemble(teachers, combine="losses", weights="entropy"), 2.0, kd_loss=OneNumber())


# ---- in a fit ----------------------------------------------------------------------------------------------------


def test_each_member_runs_once_a_batch_and_nothing_of_it_changes(
    make_module: Make, make_trainer: MakeTrainer, teachers: list[nn.Module], tmp_path: Path
) -> None:
    before, calls = [snapshot(teacher) for teacher in teachers], []
    for teacher in teachers:
        teacher.register_forward_hook(lambda *_: calls.append(1))
    module = make_module(teacher=TeacherEnsemble(teachers, [2.0, 4.0, LearnedTemperature()], combine="losses"))
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, make_loader(64, batch_size=16))
    assert len(calls) == 2 * 4 * 3
    for teacher, weights in zip(teachers, before, strict=True):
        assert_same(teacher.state_dict(), weights)
    trainer.validate(module, make_loader(40, seed=1), verbose=False)
    inputs, targets = make_data(40, seed=1).tensors
    mixture = sum(teacher(inputs).softmax(-1) for teacher in teachers)
    accuracy = (mixture.argmax(-1) == targets).float().mean()  # pyright: ignore
    torch.testing.assert_close(trainer.callback_metrics["val_teacher_acc"], accuracy)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    own = {f"distiller.teacher_temperatures.{k}.multiplier" for k in range(3)} | {
        "distiller.teacher_temperatures.2.raw"
    }
    expected = {f"student.{name}" for name in module.student.state_dict()} | own | {"distiller.temperature.multiplier"}
    assert set(saved["state_dict"]) == expected
    assert module.distiller.teacher_temperatures[2].raw != 0  # pyright: ignore  (it learns)
    assert trainer.optimizers[0].param_groups[1]["weight_decay"] == 0


def test_resuming_refuses_another_ensemble_and_says_other_settings(
    make_module: Make, make_trainer: MakeTrainer, teachers: list[nn.Module], tmp_path: Path
) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make_module(teacher=TeacherEnsemble(teachers)), make_loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for others in (teachers[::-1], teachers[:2]):
        with pytest.raises(RuntimeError, match=r"was trained with the teacher TeacherEnsemble.*but the teacher now is"):
            make_trainer().fit(
                make_module(teacher=TeacherEnsemble(others)), make_loader(), ckpt_path=tmp_path / "one.ckpt"
            )
    changed = make_module(teacher=TeacherEnsemble(teachers, combine="losses"))
    with pytest.warns(UserWarning, match=r"trained with teacher=combine='probs'.* but now teacher=combine='losses'"):
        make_trainer().fit(changed, make_loader(), ckpt_path=tmp_path / "one.ckpt")


class StopAfterTwo(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


def test_resume_is_exact(
    make_module: Make, make_trainer: MakeTrainer, teachers: list[nn.Module], tmp_path: Path
) -> None:
    def make() -> DistillationModule:
        own = [CosineSchedule(8.0, 2.0), LearnedTemperature(), 4.0]
        return make_module(teacher=TeacherEnsemble(teachers, own, weights=[1, LinearSchedule(0.0, 2.0), 1]))

    straight, first, resumed = make(), make(), make()
    make_trainer(max_epochs=4).fit(straight, make_loader())
    trainer = make_trainer(max_epochs=4, callbacks=[StopAfterTwo()])
    trainer.fit(first, make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(max_epochs=4).fit(resumed, make_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert_same(resumed.state_dict(), snapshot(straight))


def test_sharing_with_the_student_is_found(teachers: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match="share parameters"):
        DistillationModule(student=nn.Sequential(teachers[1]), teacher=TeacherEnsemble(teachers))


class Sources(Dataset[dict[str, Tensor]]):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, target = make_data()[index]
        return {"input": inputs, "labels": target, "source": target // 3}

    def __len__(self) -> int:
        return 32


def test_the_key_that_routes_reaches_no_network(
    make_module: Make, make_trainer: MakeTrainer, teachers: list[nn.Module]
) -> None:
    by_key = make_module(teacher=TeacherEnsemble(teachers[:2], routing="source"))
    by_class = make_module(teacher=TeacherEnsemble(teachers[:2], routing=[[0, 1, 2], [3, 4, 5]]))
    for module in (by_key, by_class):
        loader = DataLoader(Sources(), batch_size=8, collate_fn=None if module is by_key else without_source)
        trainer = make_trainer(max_epochs=1)
        trainer.fit(module, loader, loader)
        trainer.predict(module, loader)
    assert_same(by_key.state_dict(), snapshot(by_class))


def without_source(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = torch.utils.data.default_collate(samples)
    del batch["source"]
    return batch


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("combine", COMBINE)
def test_trainer_precision(
    precision: Any, combine: Combine, make_module: Make, make_trainer: MakeTrainer, teachers: list[nn.Module]
) -> None:
    members = [FrozenTeacher(teachers[0], precision="fp32"), teachers[1]]
    ensemble = TeacherEnsemble(members, [LearnableTemperature(), 3.0], "confidence", combine)
    trainer = make_trainer(precision=precision, max_epochs=1)
    trainer.fit(make_module(teacher=ensemble), make_loader(), make_loader())
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    assert next(teachers[0].parameters()).dtype == torch.float32


@pytest.mark.parametrize("options", [
    {}, {"weights": [1, CosineSchedule(3.0, 1.0)]}, {"weights": "confidence"}, {"routing": [[0, 1, 2, 3], [3, 4, 5]]}
], ids=["plain", "schedule", "confidence", "routing"])  # fmt: skip
def test_the_whole_module_compiles_to_at_most_two_graphs(
    options: dict[str, Any], make_module: Make, make_trainer: MakeTrainer, teachers: list[nn.Module]
) -> None:
    graphs: list[Any] = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    student = make_network()
    eager, compiled = (
        make_module(student=copy.deepcopy(student), teacher=TeacherEnsemble(teachers[:2], **options)) for _ in range(2)
    )
    make_trainer(max_epochs=5).fit(eager, make_loader())
    make_trainer(max_epochs=5).fit(torch.compile(compiled, backend=count), make_loader())  # pyright: ignore
    assert 1 <= len(graphs) <= 2
    for one, two in zip(eager.student.parameters(), compiled.student.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_members_read_their_caches(teachers: list[nn.Module], tmp_path: Path) -> None:
    def cached(**options: Any) -> TeacherEnsemble:
        caches = [TeacherCache(tmp_path / f"{number}.kdl", **options) for number in range(2)]
        first, second, third = teachers
        return TeacherEnsemble([FrozenTeacher(first, cache=caches[0]), FrozenTeacher(second, cache=caches[1]), third])

    ensemble, data = cached(), make_data(32)
    with pytest.raises(ValueError, match="no teacher of the ensemble has a cache"):
        TeacherEnsemble(teachers).index(data)
    for _ in range(2):  # written, then read
        for (inputs, _), rows in DataLoader(ensemble.index(data), batch_size=8, shuffle=True):
            for ours, theirs in zip(ensemble.logits(inputs, rows), teachers, strict=True):
                torch.testing.assert_close(ours, theirs(inputs), rtol=1e-3, atol=1e-3)
    assert [len(cache.missing()) for cache in ensemble.caches] == [0, 0]
    second: Any = ensemble.teachers[1]
    second.cache = TeacherCache(tmp_path / "other.kdl", augmentation="replay", slots=2)
    with pytest.raises(ValueError, match="must draw the same augmentation"):
        ensemble.index(data)
