"""Temperature scaling: the fit, its file, a teacher that carries it, and a student that gets out with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error

import kd_lightning
from kd_lightning import Distiller, FrozenTeacher, TeacherCache
from kd_lightning.calibration import calibrate
from kd_lightning.cli import main
from kd_lightning.export import export_student
from kd_lightning.functional import fit_temperature
from kd_lightning.losses import FusedLinearKDLoss
from kd_lightning.models import CausalTransformer
from kd_lightning.teachers import Calibration
from tests.helpers import assert_same, in_a_fork, make_data, make_network, make_teacher, snapshot

ROOT = Path(__file__).parents[2]
X, Y = make_data(600, seed=3).tensors


def noisy_logits(t: float = 1.0, count: int = 4000) -> tuple[Tensor, Tensor]:
    """Logits that are t times those which the labels were drawn from."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return t * logits, labels


def nll(logits: Tensor, labels: Tensor, t: float) -> float:
    return nn.functional.cross_entropy(logits / t, labels).item()


def test_the_fit_is_the_minimum_and_finds_the_scale() -> None:
    logits, labels = noisy_logits()
    t = fit_temperature(logits, labels).item()
    assert t == pytest.approx(1.0, abs=0.05)
    assert all(nll(logits, labels, t) < nll(logits, labels, t * factor) for factor in (0.99, 1.01))
    for scale in (0.2, 7.0):
        assert fit_temperature(scale * logits, labels).item() == pytest.approx(scale * t, rel=1e-6)
    inverse = torch.tensor(1 / t, dtype=torch.float64, requires_grad=True)
    nn.functional.cross_entropy(logits * inverse, labels).backward()
    assert inverse.grad is not None
    assert abs(inverse.grad.item()) < 1e-6


def test_a_temperature_of_each_class_is_at_least_as_likely_and_sees_no_shift() -> None:
    logits, labels = noisy_logits(3.0)
    logits[:, 2] *= 0.5
    one, each = fit_temperature(logits, labels), fit_temperature(logits, labels, per_class=True)
    assert each.shape == (5,)
    after = nn.functional.cross_entropy(logits.log_softmax(-1) / each, labels).item()
    assert after < nll(logits, labels, one.item())
    shifted = fit_temperature(logits + torch.randn(len(logits), 1, dtype=torch.float64), labels, per_class=True)
    torch.testing.assert_close(shifted, each, rtol=1e-4, atol=0)


def overconfident() -> nn.Sequential:
    """A trained network whose logits are four times too large."""
    torch.manual_seed(0)
    network = make_network(norm=False)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    x, y = make_data(64).tensors
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    for parameter in list(network.parameters())[-2:]:
        parameter.data *= 4
    return network


def test_before_and_after_are_those_of_torchmetrics(tmp_path: Path) -> None:
    network = overconfident()
    calibration = calibrate(network, DataLoader(TensorDataset(X, Y), batch_size=128))
    logits, t = network(X), calibration.temperature[0]
    assert calibration.nll is not None
    assert calibration.calibration_error is not None
    for position, divisor in enumerate((1.0, t)):
        assert calibration.nll[position] == pytest.approx(nll(logits, Y, divisor), rel=1e-5)
        error = multiclass_calibration_error((logits / divisor).softmax(-1), Y, num_classes=6, n_bins=15)
        assert calibration.calibration_error[position] == pytest.approx(error.item(), abs=1e-5)
    assert calibration.nll[1] < calibration.nll[0]
    assert calibration.calibration_error[1] < calibration.calibration_error[0]
    assert calibration.fingerprint == FrozenTeacher(network).fingerprint()
    assert calibration.count == 600
    calibration.save(tmp_path / "teacher.json")
    assert Calibration.of(tmp_path / "teacher.json") == calibration
    assert str(calibration).startswith(f"T = {t:.4g}, of 600 labels: NLL ")
    assert kd_lightning.calibrate is calibrate


def test_positions_without_a_label_do_not_count() -> None:
    network = overconfident()
    whole = calibrate(network, [(X[:300], Y[:300])])
    masked = torch.where(torch.arange(600) < 300, Y, -100)
    assert calibrate(network, [(X, masked)]).temperature == pytest.approx(whole.temperature)


@pytest.mark.parametrize("given", [2.5, "file", Calibration((2.5,))])
def test_a_calibrated_teacher_multiplies_its_temperature(given: Any, tmp_path: Path) -> None:
    network = make_teacher(norm=False)
    if given == "file":
        given = tmp_path / "teacher.json"
        Calibration((2.5,), FrozenTeacher(network).fingerprint()).save(given)
    teacher = FrozenTeacher(network, calibration=given)
    torch.testing.assert_close(teacher.logits(X), network(X) / 2.5)
    student = torch.randn(600, 6, requires_grad=True)
    out = Distiller(teacher, temperature=4.0, task_weight=0.0)(X, student)
    wanted = 16 * nn.functional.kl_div(
        (student / 4).log_softmax(-1), (network(X) / 10).log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(out.kd_loss, wanted)
    assert teacher.fingerprint() != FrozenTeacher(network).fingerprint()
    assert "calibration=" in repr(teacher)


def test_bfloat16_logits_are_widened_first() -> None:
    network = make_teacher(norm=False)
    teacher = FrozenTeacher(network, precision="bf16", calibration=3.0)
    plain = FrozenTeacher(network, precision="bf16").logits(X)
    assert torch.equal(teacher.logits(X), plain.float() / 3.0)


def test_one_of_each_class() -> None:
    network, temperatures = make_teacher(norm=False), (1.0, 2.0, 3.0, 1.0, 2.0, 3.0)
    teacher = FrozenTeacher(network, calibration=Calibration(temperatures))
    torch.testing.assert_close(teacher.logits(X), network(X).log_softmax(-1) / torch.tensor(temperatures))


def test_a_file_of_another_teacher_is_an_error_at_first_use(tmp_path: Path) -> None:
    Calibration((2.0,), make_fingerprint(0.1)).save(tmp_path / "teacher.json")
    teacher = FrozenTeacher(make_teacher(), calibration=tmp_path / "teacher.json")
    assert teacher.available()
    with pytest.raises(ValueError, match=r"is of the teacher with fingerprint \w{8}, but this teacher's is \w{8}: fit"):
        teacher.logits(X)
    assert not FrozenTeacher(make_teacher(), calibration=tmp_path / "none.json").available()


def make_fingerprint(shift: float) -> str:
    network = make_teacher()
    next(network.parameters()).data += shift
    return FrozenTeacher(network).fingerprint()


def test_a_cache_keeps_calibrated_logits_and_knows_the_calibration(tmp_path: Path) -> None:
    network, data = make_teacher(norm=False), TensorDataset(X[:32], Y[:32])
    teacher = FrozenTeacher(network, cache=TeacherCache(tmp_path / "t.cache", dtype="float32"), calibration=2.0)
    loader = DataLoader(teacher.index(data), batch_size=32)
    for _ in range(2):
        (inputs, _), rows = next(iter(loader))
        torch.testing.assert_close(teacher.logits(inputs, rows), network(inputs) / 2.0)
    other = FrozenTeacher(network, cache=TeacherCache(tmp_path / "t.cache", dtype="float32"), calibration=3.0)
    with pytest.raises(ValueError, match="another teacher"):
        other.index(data)


def test_hidden_states_are_calibrated() -> None:
    tokens, network = torch.randint(0, 256, (2, 5)), CausalTransformer(dim=32, depth=1)
    for parameter in network.parameters():
        parameter.data *= 3
    student = CausalTransformer(dim=32, depth=1)
    teacher = FrozenTeacher(network, calibration=2.0)
    hidden, weight, bias = teacher.hidden_states(tokens)
    torch.testing.assert_close(nn.functional.linear(hidden, weight, bias), teacher.logits(tokens))
    losses = []
    for kd_loss in (FusedLinearKDLoss(), None):
        it = kd_lightning.DistillationModule(student, teacher, 2.0, kd_loss, task_weight=0.0)
        losses.append(it._distil((tokens, tokens), it.progress)[0].kd_loss)
    torch.testing.assert_close(*losses)
    each = FrozenTeacher(network, calibration=Calibration((1.0,) * 256))
    with pytest.raises(ValueError, match="a calibration of each class needs the logits"):
        each.hidden_states(tokens)


@pytest.mark.forked
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_an_exported_student_has_its_temperature(suffix: str, tmp_path: Path) -> None:
    def export() -> None:
        network, path = make_network().eval(), tmp_path / f"student{suffix}"
        before = snapshot(network)
        export_student(network, path, example_inputs=X[:4], temperature=1.7)
        if suffix == ".onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(path)
            logits = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])
        else:
            logits = torch.export.load(path).module()(X)
        torch.testing.assert_close(logits.softmax(-1), (network(X) / 1.7).softmax(-1), rtol=1e-5, atol=1e-6)
        assert_same(snapshot(network), before)
        assert not network._forward_hooks

    in_a_fork(export)


@pytest.mark.slow
@pytest.mark.forked
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    lm = ["--config", "configs/lm.yaml", "--trainer.enable_progress_bar=false"]
    main(["calibrate", *lm, "--output", "teacher.json", "--batches", "2"])
    assert "teacher.json: --model.teacher.calibration teacher.json" in capsys.readouterr().out
    calibration = Calibration.of("teacher.json")
    assert calibration.nll is not None
    assert calibration.nll[1] <= calibration.nll[0]
    main(["fit", *lm, "--trainer.fast_dev_run=true", "--model.teacher.calibration", "teacher.json"])
    digits = ["--config", "configs/digits.yaml", "--trainer.enable_progress_bar=false"]
    main(["fit", *digits, "--trainer.max_epochs=2"])
    checkpoint = "logs/digits/version_0/checkpoints/best.ckpt"
    capsys.readouterr()
    main(["export", *digits, "--ckpt", checkpoint, "--format", "torch.export", "--output", "plain.pt2"])
    main(["export", *digits, "--ckpt", checkpoint, "--format", "torch.export", "--output", "s.pt2", "--calibrate=true"])
    text = capsys.readouterr().out
    assert "expected calibration error" in text
    t = float(text.split("T = ")[1].split(",")[0])
    images = torch.randn(3, 1, 8, 8)
    plain, divided = (torch.export.load(name).module()(images) for name in ("plain.pt2", "s.pt2"))
    torch.testing.assert_close(divided.softmax(-1), (plain / t).softmax(-1), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="safetensors hold weights and no computation"):
        main(["export", *digits, "--ckpt", checkpoint, "--calibrate=true"])
    assert math.isfinite(t)
