"""Layer terms in a bare loop; under Lightning: test_distillation_layers.py."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_lightning import Distiller, FrozenTeacher, LayerTerm
from kd_lightning.functional import channel_wise_kd_loss, kd_loss
from kd_lightning.losses import (
    AttentionTransferLoss,
    ChannelWiseKDLoss,
    FeatureLoss,
    HintLoss,
    InfoNCELoss,
    KDLoss,
    RelationalLoss,
    SimilarityKDLoss,
    SimilarityPreservingLoss,
)
from kd_lightning.teachers import TeacherCache, TeacherEnsemble
from kd_lightning.temperature import (
    CosineSchedule,
    DepthTemperature,
    EntropyTemperature,
    JoinedSchedule,
    LearnableTemperature,
    LinearSchedule,
    MultiTemperature,
    Progress,
)
from tests.helpers import LearnedTemperature, Net, hooks


@pytest.fixture
def teacher() -> Net:
    teacher = Net(width=6, hidden=9)
    for parameter in teacher.parameters():
        parameter.data.mul_(2.0)  # stands for training
    for part in teacher.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean += 0.1  # pyright: ignore[reportOperatorIssue]
    return teacher.eval()


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, 8, 8), torch.arange(count) % 5


def test_bare_loop(teacher: Net) -> None:
    """The whole of it, against the same by hand."""
    torch.manual_seed(3)
    student = Net()
    student.dropout.p = 0.0
    distiller = Distiller(
        teacher,
        temperature=3.0,
        kd_weight=0.5,
        layers=[
            LayerTerm("stage1", "stage1", ChannelWiseKDLoss(), temperature=4.0, weight=2.0),
            LayerTerm("hidden", "hidden", HintLoss(), weight=LinearSchedule(0.0, 1.0)),
        ],
    )
    distiller.build_projectors(student, batch()[0])
    conv, linear = distiller.layers[0].projector, distiller.layers[1].projector
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(linear, nn.Linear)
    by_hand, conv2, linear2 = copy.deepcopy((student, conv, linear))
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05)
    optimizer2 = torch.optim.SGD([*by_hand.parameters(), *conv2.parameters(), *linear2.parameters()], lr=0.05)
    with distiller.attach(student):
        for step in range(4):
            inputs, targets = batch()
            out = distiller(inputs, student(inputs), targets, Progress(step=step, max_steps=4))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

            s1 = by_hand.stage1(inputs)
            s2 = by_hand.hidden(by_hand.stage2(s1).mean((2, 3)))
            logits = by_hand.fc(torch.relu(s2))
            with torch.no_grad():
                t1 = teacher.stage1(inputs)
                t2 = teacher.hidden(teacher.stage2(t1).mean((2, 3)))
                taught = teacher.fc(torch.relu(t2))
            loss = 0.5 * kd_loss(logits, taught, 3.0) + 0.1 * F.cross_entropy(logits, targets)
            loss = loss + 2.0 * channel_wise_kd_loss(conv2(s1), t1, 4.0) + step / 4 * F.mse_loss(linear2(s2), t2)
            optimizer2.zero_grad()
            loss.backward()
            optimizer2.step()
            torch.testing.assert_close(out.loss, loss)
            assert set(out.layer_losses) == {"stage1", "hidden"}
    for one, two in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close((conv.weight, linear.weight), (conv2.weight, linear2.weight))
    assert not hooks(student, teacher)


def test_gradients_reach_only_student_and_projector(teacher: Net) -> None:
    student = Net()
    distiller = Distiller(
        teacher,
        temperature=LearnedTemperature(),
        kd_weight=0.0,
        task_weight=0.0,
        layers=[
            LayerTerm("stage1", "stage1", ChannelWiseKDLoss(), temperature=LearnableTemperature()),
            LayerTerm("stage1", "stage2", SimilarityKDLoss(), temperature=0.2),
        ],
    )
    inputs, targets = batch()
    distiller.build_projectors(student, inputs)
    before = copy.deepcopy(teacher.state_dict())
    with distiller.attach(student):
        distiller(inputs, student(inputs), targets, Progress(0, 10, 0, 10)).loss.backward()
    touched = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {"stage1.0.weight", "stage1.1.weight", "stage1.1.bias"} | touched & {"stage1.0.bias"}
    assert distiller.layers[0].projector.weight.grad.abs().sum() > 0  # pyright: ignore
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


SIZES: list[tuple[FeatureLoss, Any, str, type | None]] = [
    (HintLoss(), None, "stage2", nn.Conv2d),
    (ChannelWiseKDLoss(), 2.0, "stage2", nn.Conv2d),
    (InfoNCELoss(), 0.07, "hidden", nn.Linear),
    (AttentionTransferLoss(), None, "stage2", type(None)),
    (SimilarityPreservingLoss(), None, "stage2", type(None)),
    (RelationalLoss(), None, "hidden", type(None)),
    (SimilarityKDLoss(), 0.1, "stage2", type(None)),
]


@pytest.mark.parametrize(("loss", "temperature", "layer", "kind"), SIZES, ids=lambda x: type(x).__name__)
def test_other_sizes_are_joined(teacher: Net, loss: FeatureLoss, temperature: Any, layer: str, kind: type) -> None:
    """Half the height and width, and other channels."""
    student, (inputs, targets) = Net(stride=2), batch()
    distiller = Distiller(teacher, layers=[LayerTerm(layer, layer, loss, temperature)])
    distiller.build_projectors(student, inputs)
    term = distiller.layers[0]
    assert type(term.projector) is kind
    with distiller.attach(student):
        out = distiller(inputs, student(inputs), targets)
    out.loss.backward()
    assert out.loss.isfinite()
    assert term.built


def test_interpolation_is_that_of_torch() -> None:
    term = LayerTerm("a", "b", HintLoss())
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 2)
    term.build_for(student, teacher)
    assert term.projector is None
    expected = F.mse_loss(F.interpolate(student, (4, 2), mode="bilinear", antialias=True), teacher)
    torch.testing.assert_close(term(student, teacher, Progress()).loss, expected)
    half = term(student.bfloat16(), teacher.bfloat16(), Progress()).loss
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0.02)
    volumes = term.__class__("a", "b", HintLoss())
    volumes.build_for(torch.randn(2, 3, 4, 4, 4), torch.randn(2, 5, 2, 2, 2))
    assert isinstance(volumes.projector, nn.Conv3d)
    assert volumes(torch.randn(2, 3, 4, 4, 4), torch.randn(2, 5, 2, 2, 2), Progress()).loss.isfinite()


def test_tokens() -> None:
    term = LayerTerm("a", "b", HintLoss())
    student, teacher = torch.randn(2, 7, 3), torch.randn(2, 7, 5)
    term.build_for(student, teacher)
    assert isinstance(term.projector, nn.Linear)
    torch.testing.assert_close(term(student, teacher, Progress()).loss, F.mse_loss(term.projector(student), teacher))
    with pytest.raises(ValueError, match="have 7 and 6 tokens, which no interpolation brings together"):
        term(student, teacher[:, :6], Progress())


def test_a_projector_follows_the_features_precision() -> None:
    term = LayerTerm("a", "b", HintLoss())
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    term.build_for(student, teacher)
    full = term(student, teacher, Progress()).loss
    torch.testing.assert_close(term(student.bfloat16(), teacher, Progress()).loss, full, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(student, teacher, Progress()).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0.05)


def test_building_leaves_no_trace(teacher: Net) -> None:
    student, inputs = Net(), batch()[0]
    student.stage1.eval()  # a part that is kept in eval mode stays so
    state, seed = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    modes = [part.training for part in student.modules()]
    distiller = Distiller(teacher, layers=[LayerTerm("stage2", "stage2", HintLoss())])
    distiller.build_projectors(student, inputs)
    assert torch.equal(torch.get_rng_state(), seed)
    assert [part.training for part in student.modules()] == modes
    for name, value in student.state_dict().items():
        assert torch.equal(value, state[name])
    assert not hooks(student, teacher)
    projector = distiller.layers[0].projector
    distiller.build_projectors(student, inputs)  # again: the same
    assert distiller.layers[0].projector is projector
    assert {"layers.0.projector.weight", "layers.0.projector.bias", "temperature.multiplier"} == set(
        distiller.state_dict()
    )


def test_what_was_forgotten_is_said(teacher: Net) -> None:
    student, (inputs, targets) = Net(), batch()
    distiller = Distiller(teacher, layers=[LayerTerm("stage2", "stage2", HintLoss())])
    with pytest.raises(RuntimeError, match=r"run the loop within `with distiller.attach\(student\):`"):
        distiller(inputs, student(inputs), targets)
    with distiller.attach(student):
        with pytest.raises(RuntimeError, match=r"Call distiller.build_projectors\(student, inputs\) before"):
            distiller(inputs, student(inputs), targets)
        with pytest.raises(RuntimeError, match="there was no forward of Net since its features were last taken"):
            distiller(inputs, torch.zeros(6, 5), targets, teacher_logits=torch.zeros(6, 5))
        distiller.detach()
    assert not hooks(student, teacher)
    alone = Distiller(None, layers=[LayerTerm("stage2", "stage2", HintLoss())])
    with pytest.raises(ValueError, match="this Distiller has no teacher: layers need one that runs"):
        alone.attach(student)


def test_layers_are_found_or_said(teacher: Net) -> None:
    def attach(student_layer: str, teacher_layer: str) -> None:
        term = LayerTerm(student_layer, teacher_layer, SimilarityPreservingLoss())
        Distiller(teacher, layers=[term]).attach(Net()).close()

    attach("*hidden", "stage[2]")  # a glob that matches one
    with pytest.raises(ValueError, match=r"Net has no layer 'stage3'. Close to it: stage"):
        attach("stage3", "stage2")
    with pytest.raises(ValueError, match=r"'stage1\.\?' matches stage1.0, stage1.1, stage1.2: give a term for each"):
        attach("stage2", "stage1.?")


def test_teachers_without_the_features_of_a_batch(teacher: Net, tmp_path: Path) -> None:
    layers = [LayerTerm("stage1", "stage1", SimilarityPreservingLoss())]
    with pytest.raises(ValueError, match=r"the whole batch, but the teacher has micro_batch_size=2: leave it out"):
        Distiller(FrozenTeacher(teacher, micro_batch_size=2), layers=layers).attach(Net())
    with pytest.raises(
        ValueError, match="layers need the features of a teacher that runs, and a cache keeps its logits only"
    ):
        Distiller(FrozenTeacher(teacher, cache=TeacherCache(tmp_path / "cache")), layers=layers).attach(Net())
    with pytest.raises(ValueError, match="layers are those of one network, and a TeacherEnsemble is several"):
        Distiller(TeacherEnsemble([teacher, copy.deepcopy(teacher)]), layers=layers).attach(Net())


@pytest.mark.slow
def test_a_compiled_student_and_teacher_can_be_attached_to_again(teacher: Net) -> None:
    student, (inputs, targets) = Net(), batch()
    student.compile(backend="eager")
    frozen = FrozenTeacher(teacher, compile={"backend": "eager"}, precision="bf16")
    distiller = Distiller(frozen, layers=[LayerTerm("stage1", "stage1", HintLoss())])
    student(inputs)
    frozen(inputs)  # both are compiled before there are hooks
    distiller.build_projectors(student, inputs)
    for _ in range(2):
        with distiller.attach(student):
            out = distiller(inputs, student(inputs), targets)
            assert out.layer_losses["stage1"] > 0


def test_an_exception_takes_the_hooks_off(teacher: Net) -> None:
    student = Net()
    distiller = Distiller(teacher, layers=[LayerTerm("stage2", "stage2", SimilarityPreservingLoss())])
    with pytest.raises(ZeroDivisionError), distiller.attach(student):
        _ = 1 / (hooks(student, teacher) - 6)
    assert not hooks(student, teacher)


def test_eval_mode_leaves_the_terms_out_and_lets_go(teacher: Net) -> None:
    student, (inputs, targets) = Net().eval(), batch()
    distiller = Distiller(teacher, layers=[LayerTerm("stage2", "stage2", SimilarityPreservingLoss())])
    with distiller.attach(student):
        distiller.eval()
        out = distiller(inputs, student(inputs), targets)
        assert not out.layers
        torch.testing.assert_close(out.loss, 0.9 * out.kd_loss + 0.1 * out.task_loss)
        assert not any(extractor._features for extractor in distiller.layers._extractors or ())
    distiller(inputs, student(inputs), targets)  # and needs no hooks
    distiller.train()
    distiller.kd_enabled = False
    with distiller.attach(student):
        out = distiller(inputs, student(inputs), targets)
        torch.testing.assert_close(out.loss, 0.1 * out.task_loss)
        assert out.layers["stage2"].weight == 0


def test_the_teacher_runs_once(teacher: Net) -> None:
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    student, (inputs, targets) = Net(), batch()
    layers = [LayerTerm(name, name, SimilarityPreservingLoss()) for name in ("stage1", "stage2", "hidden")]
    distiller = Distiller(teacher, layers=layers)
    distiller.build_projectors(student, inputs)  # not needed, not run
    with distiller.attach(student):
        out = distiller(inputs, student(inputs), targets)
    assert len(calls) == 1
    assert len(out.layer_losses) == 3


# ---- temperatures and weights ------------------------------------------------------------------------------------


def test_depth_temperature(teacher: Net) -> None:
    """By the order of the student's layers, not of the terms; several terms may share a layer, and a policy."""
    student, (inputs, targets) = Net(), batch()
    depth = DepthTemperature(shallow=8.0, deep=2.0)
    names = ["hidden", "stage1", "stage2", "stage1"]
    layers = [LayerTerm(name, name, SimilarityKDLoss(), temperature=depth) for name in names]
    distiller = Distiller(teacher, temperature=depth, layers=layers)
    with distiller.attach(student):
        out = distiller(inputs, student(inputs), targets)
    readings = {name: value.item() for name, value in out.readings().items() if name.startswith("temperature_")}
    assert readings == {
        "temperature_student": 2.0,  # the logits are deepest
        "temperature_teacher": 2.0,
        "temperature_hidden": 2.0,
        "temperature_stage1_1": 8.0,
        "temperature_stage2": 5.0,
        "temperature_stage1_3": 8.0,
    }
    assert sum(len(group["params"]) for group in depth.param_groups()) == 0


def test_depth_temperature_checks_its_range() -> None:
    with pytest.raises(ValueError, match="deep must be a temperature within the policy's bounds"):
        DepthTemperature(deep=0.0)


@pytest.mark.parametrize(
    "temperature", [4.0, CosineSchedule(8.0, 2.0), EntropyTemperature(), MultiTemperature([2.0, 4.0])], ids=str
)
def test_any_policy_sets_the_temperature_of_a_term(teacher: Net, temperature: Any) -> None:
    student, (inputs, targets) = Net(width=6), batch()
    student.dropout.p = 0.0
    distiller = Distiller(teacher, layers=[LayerTerm("stage1", "stage1", ChannelWiseKDLoss(), temperature)])
    distiller.build_projectors(student, inputs)
    with distiller.attach(student):
        out = distiller(inputs, student(inputs), targets, Progress(step=5, max_steps=10))
    s, t = student.stage1(inputs), teacher.stage1(inputs)
    expected: dict[str, Any] = {
        "float": lambda: channel_wise_kd_loss(s, t, 4.0),
        "CosineSchedule": lambda: channel_wise_kd_loss(s, t, 5.0),
        "MultiTemperature": lambda: channel_wise_kd_loss(s, t, 2.0) + channel_wise_kd_loss(s, t, 4.0),
        "EntropyTemperature": lambda: out.layer_losses["stage1"],
    }
    torch.testing.assert_close(out.layer_losses["stage1"], expected[type(temperature).__name__]())
    if isinstance(temperature, EntropyTemperature):
        per_row = out.layers["stage1"].temperature
        assert per_row.student.shape == (6 * 6, 1)  # pyright: ignore  (each channel of each sample has its own)


def test_the_multiplier_of_the_logits_is_not_that_of_the_layers(teacher: Net) -> None:
    student, (inputs, targets) = Net(), batch()
    distiller = Distiller(teacher, layers=[LayerTerm("stage1", "stage1", SimilarityKDLoss(), temperature=4.0)])
    distiller.temperature.multiplier.mul_(0.5)
    with distiller.attach(student):
        readings = distiller(inputs, student(inputs), targets).readings()
    assert (readings["temperature_student"], readings["temperature_stage1"]) == (2.0, 4.0)


def test_warm_ups_are_schedules() -> None:
    """DKD's min(epoch / 20, 1): linear over 20 epochs, then constant."""
    warm_up = JoinedSchedule([LinearSchedule(0.0, 1.0), lambda progress: 1.0], boundaries=[20])
    weights = [warm_up(Progress(epoch=epoch, max_epochs=240)) for epoch in range(240)]
    assert weights == pytest.approx([min(epoch / 20, 1.0) for epoch in range(240)])
    in_share = LinearSchedule(0.0, 1.0, until=20 / 240)  # the same, of a run whose length is known
    assert [in_share(Progress(epoch=e, max_epochs=240)) for e in range(240)] == pytest.approx(weights)


def test_weights_are_schedules(teacher: Net) -> None:
    student, (inputs, targets) = Net(), batch()
    warm_up = JoinedSchedule([LinearSchedule(0.0, 1.0), lambda progress: 1.0], boundaries=[20])
    distiller = Distiller(
        teacher, kd_weight=warm_up, layers=[LayerTerm("stage1", "stage1", SimilarityPreservingLoss(), weight=warm_up)]
    )
    with distiller.attach(student):
        for epoch, weight in ((0, 0.0), (5, 0.25), (20, 1.0), (100, 1.0)):
            out = distiller(inputs, student(inputs), targets, Progress(epoch=epoch, max_epochs=240))
            assert out.kd_weight == out.layers["stage1"].weight == pytest.approx(weight)
            wanted = weight * (out.kd_loss + out.layer_losses["stage1"]) + 0.1 * out.task_loss
            torch.testing.assert_close(out.loss, wanted)
    negative = LayerTerm("stage1", "stage1", HintLoss(), weight=lambda progress: -1.0)
    negative.build(4, 4, 4)
    with pytest.raises(ValueError, match=r"the weight of LayerTerm\('stage1' → 'stage1'"):
        negative(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3), Progress())


# ---- arguments ---------------------------------------------------------------------------------------------------


def test_arguments_are_checked(teacher: Net) -> None:
    with pytest.raises(ValueError, match="ChannelWiseKDLoss compares distributions: give LayerTerm a temperature"):
        LayerTerm("a", "b", ChannelWiseKDLoss())
    with pytest.raises(ValueError, match=r"HintLoss has no temperature, got temperature=4.0"):
        LayerTerm("a", "b", HintLoss(), temperature=4.0)
    with pytest.raises(TypeError, match="must be a FeatureLoss, got KDLoss"):
        LayerTerm("a", "b", KDLoss(), temperature=4.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="got HintLoss"):
        LayerTerm("a", "b", HintLoss)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="not negative"):
        LayerTerm("a", "b", HintLoss(), weight=-1.0)
    with pytest.raises(TypeError, match="layers must hold LayerTerms, got HintLoss"):
        Distiller(teacher, layers=[HintLoss()])  # pyright: ignore[reportArgumentType]
    term = LayerTerm("a", "b", HintLoss())
    with pytest.raises(ValueError, match=r"have shapes \(2, 3, 4, 4\) and \(2, 3\)"):
        term.build_for(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3))
    term.build(2, 3, 5)
    with pytest.raises(ValueError, match=r"was built for .* \(2, 3, 5\), but is asked for \(2, 4, 5\)"):
        term.build(2, 4, 5)


def test_travels(teacher: Net) -> None:
    student, inputs = Net(), batch()[0]
    layers = [LayerTerm("stage1", "stage1", ChannelWiseKDLoss(), temperature=DepthTemperature(), weight=2.0)]
    distiller = Distiller(teacher, layers=layers)
    distiller.build_projectors(student, inputs)
    with distiller.attach(student):
        student(inputs)
        for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
            assert repr(twin.layers) == repr(distiller.layers)
            with pytest.raises(RuntimeError, match="the layers are not watched"):
                twin(inputs, student(inputs), torch.zeros(6, dtype=torch.long))
    assert "DepthTemperature(shallow=8, deep=2), weight=2.0)" in repr(distiller)
