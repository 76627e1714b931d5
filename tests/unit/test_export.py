from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_lightning import ClassificationModule, DistillationModule
from kd_lightning.cli import main
from kd_lightning.export import SUFFIXES, describe_inputs, export_student, inputs_like
from kd_lightning.models import DigitsCNN
from tests.helpers import make_loader, make_network

pytestmark = [pytest.mark.slow, pytest.mark.forked]

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.yaml")
FORMATS = list(SUFFIXES)

# runs one exported file in a process in which nothing of this library can be imported
FRESH = """
import importlib, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kd_lightning":
            raise ImportError("not here: " + name)

sys.meta_path.insert(0, Refuse())
import torch
file, inputs, outputs = sys.argv[1:]
x = torch.load(inputs, weights_only=True)
if file.endswith(".pt2"):
    y = torch.export.load(file).module()(x)
elif file.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(file)
    y = torch.as_tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
else:
    from safetensors import safe_open
    from safetensors.torch import load_file
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    module, _, name = metadata["class_path"].rpartition(".")
    network = getattr(importlib.import_module(module), name)(**json.loads(metadata["init_args"]))
    network.load_state_dict(load_file(file))
    y = network.eval()(x)
assert "kd_lightning" not in sys.modules
torch.save(y.detach(), outputs)
"""


def run_elsewhere(file: Path, inputs: Tensor) -> Tensor:
    """The outputs of an exported file in a process that cannot import kd_lightning."""
    x, y = file.with_suffix(".in.pt"), file.with_suffix(".out.pt")
    torch.save(inputs, x)
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(file), str(x), str(y)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(y, weights_only=True)


@pytest.fixture
def student() -> nn.Module:
    """Has batch norm with statistics of its own, and is in training mode."""
    network = DigitsCNN(channels=(4, 8), hidden=16)
    network(2 * torch.randn(64, 1, 8, 8) + 1)
    return network


@pytest.mark.parametrize("format", ["torch.export", "onnx"])
def test_nothing_of_us_or_of_the_data_is_in_the_file(student: nn.Module, format: Any, tmp_path: Path) -> None:
    path = tmp_path / f"student{SUFFIXES[format]}"
    secret = torch.full((1, 1, 8, 8), 0.123456789)
    report = export_student(student, path, example_inputs=secret)
    assert student.training
    assert report.max_difference <= report.tolerance <= 1e-3
    assert report.size == path.stat().st_size
    assert str(path) in str(report)
    parts = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts += [archive.read(name) for name in archive.namelist()]
    for trace in (b"kd_lightning", str(ROOT).encode(), secret[0, 0, 0, :1].numpy().tobytes() * 4):
        assert not any(trace in part for part in parts)


def test_safetensors_say_what_to_build(tmp_path: Path) -> None:
    student = nn.Linear(4, 3)
    path = tmp_path / "student.safetensors"
    init_args = {"in_features": 4, "out_features": 3}
    export_student(student, path, built_from={"class_path": "torch.nn.Linear", "init_args": init_args})
    inputs = torch.randn(5, 4)
    assert torch.equal(run_elsewhere(path, inputs), student(inputs).detach())
    with safetensors.safe_open(path, "pt") as content:
        assert content.metadata() == {
            "format": "pt",
            "class_path": "torch.nn.Linear",
            "init_args": json.dumps(init_args),
        }


class Tied(nn.Module):
    """A language model's head: the embedding again; inputs by keyword, a mapping comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embedding(input_ids) * attention_mask.unsqueeze(-1))}


@pytest.mark.parametrize("format", FORMATS)
def test_tied_weights_keywords_and_lengths(format: Any, tmp_path: Path) -> None:
    student = Tied()
    tokens = {name: torch.ones(2, 5, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    path = tmp_path / f"student{SUFFIXES[format]}"
    export_student(student, path, format, tokens, dynamic_dims=(0, 1))
    longer = {"input_ids": torch.arange(7)[None] + 2, "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    wanted = student(**longer)["logits"].detach()
    if format == "safetensors":
        again = Tied()
        again.load_state_dict(load_file(path))
        assert again.head.weight is again.embedding.weight
        assert torch.equal(again(**longer)["logits"], wanted)
    elif format == "torch.export":
        torch.testing.assert_close(torch.export.load(path).module()(**longer)["logits"], wanted)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        assert [value.shape for value in session.get_inputs()] == [["batch", "dim1"]] * 2
        (got,) = session.run(None, {name: value.numpy() for name, value in longer.items()})
        torch.testing.assert_close(torch.as_tensor(got), wanted, rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else self.linear(-x)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Stateful(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"count": 1}

    def set_extra_state(self, state: Any) -> None: ...


def test_errors_say_the_way_out(student: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match=r"(?s)cannot trace Branching.*torch\.where.*format='safetensors'"):
        export_student(Branching(), tmp_path / "a.pt2", example_inputs=x)
    with pytest.raises(RuntimeError, match=r"differs from Noisy by .* random numbers"):
        export_student(Noisy(), tmp_path / "a.pt2", example_inputs=x)
    with pytest.raises(ValueError, match=r"must be one of 'safetensors' .* got 'pickle'"):
        export_student(student, tmp_path / "a.pt2", "pickle")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"must end in onnx's suffix"):
        export_student(student, tmp_path / "a.pt2", "onnx", x)
    with pytest.raises(ValueError, match="must end in one of its formats' suffix"):
        export_student(student, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="give example_inputs"):
        export_student(student, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="tensors only, but the state has more: _extra_state"):
        export_student(Stateful(4, 3), tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnx needs onnxscript: pip install 'kd-lightning\[onnx\]'"):
        export_student(student, tmp_path / "a.onnx", example_inputs=x)
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_nothing_is_overwritten_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export_student(nn.Linear(2, 2), path)
    assert path.read_text() == "mine"
    export_student(nn.Linear(2, 2), path, overwrite=True)
    assert set(load_file(path)) == {"weight", "bias"}


def test_onnx_without_a_runtime_is_verified_by_the_reference(
    student: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = export_student(student, tmp_path / "a.onnx", example_inputs=torch.randn(2, 1, 8, 8))
    assert report.max_difference <= report.tolerance


def test_inputs_are_described_and_made_again() -> None:
    batch = {"ids": torch.zeros(2, 3, dtype=torch.long), "pair": (torch.zeros(2, 1), None)}
    again = inputs_like(describe_inputs(batch))
    assert again["ids"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert again["pair"][0].shape == (2, 1)
    assert again["pair"][1] is None


def test_the_module_knows_its_inputs(
    make_module: Callable[..., DistillationModule], make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    module = make_module()
    with pytest.raises(ValueError, match="give example_inputs"):
        module.export_student(tmp_path / "early.pt2")
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = DistillationModule.load_from_checkpoint(tmp_path / "run.ckpt", student=make_network())  # no teacher
    report = again.export_student(tmp_path / "student.pt2")
    inputs = torch.randn(3, 8)
    got = torch.export.load(report.path).module()(inputs)
    torch.testing.assert_close(got, module.student.eval()(inputs))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return fit(folder, "digits.yaml", f"--model.teacher.checkpoint={ROOT / 'configs' / 'digits_teacher.safetensors'}")


def fit(folder: Path, config: str, *more: str) -> Path:
    argv, sys.argv = sys.argv, ["kd-lightning"]
    try:
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        where = ["--trainer.max_epochs=2", "--trainer.logger.init_args.version=0", *quiet, *more]
        save = f"--trainer.logger.init_args.save_dir={folder}"
        main(["fit", "--config", str(ROOT / "configs" / config), save, *where])
    finally:
        sys.argv = argv
    return next(folder.glob("*/version_0/checkpoints/best.ckpt"))


@pytest.fixture
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])


def student_of(checkpoint: Path, name: str = "student") -> nn.Module:
    network = DigitsCNN(channels=(4, 8), hidden=16)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict(
        {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    )
    return network.eval()


@pytest.mark.usefixtures("_own_folder")
@pytest.mark.parametrize("format", FORMATS)
def test_export_needs_the_checkpoint_alone(
    checkpoint: Path, format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"student{SUFFIXES[format]}"
    main(["export", "--ckpt", str(checkpoint), "--format", format, "--output", str(output)])
    assert f"{output}: {format}" in capsys.readouterr().out
    student = student_of(checkpoint)
    if format == "safetensors":
        saved = load_file(output)
        assert all(torch.equal(saved[name], value) for name, value in student.state_dict().items())
        assert len(saved) == len(student.state_dict())
        with safetensors.safe_open(output, "pt") as content:
            metadata = content.metadata()
        assert metadata["class_path"] == "kd_lightning.models.DigitsCNN"
        assert json.loads(metadata["init_args"]) == {"channels": [4, 8], "num_classes": 10, "hidden": 16}
    else:
        inputs = torch.randn(5, 1, 8, 8)  # a batch size that it has not seen
        torch.testing.assert_close(run_elsewhere(output, inputs), student(inputs).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_own_folder")
def test_export_of_a_classifier_beside_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = fit(tmp_path / "logs", "digits_baseline.yaml")
    main(["export", f"--ckpt={checkpoint}", "--input_shape=[1,8,8]", "--format=torch.export"])
    inputs = torch.randn(3, 1, 8, 8)
    got = torch.export.load(checkpoint.with_suffix(".pt2")).module()(inputs)
    torch.testing.assert_close(got, student_of(checkpoint, "model")(inputs))


@pytest.mark.usefixtures("_own_folder")
def test_export_says_what_is_missing(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--ckpt", "nowhere.ckpt"])
    assert "no checkpoint at 'nowhere.ckpt'" in capsys.readouterr().err
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "state_dict": {"net.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="holds no student: its weights are under net"):
        main(["export", "--ckpt", "other.ckpt"])
    torch.save({**content, "example_inputs": None}, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="--input_shape"):
        main(["export", "--ckpt", "old.ckpt", "--format", "onnx"])
    data = ["--data=DigitsDataModule", "--data.batch_size=4"]
    main(["export", "--ckpt", "old.ckpt", "--format", "torch.export", *data])
    assert (tmp_path / "old.pt2").is_file()


def test_averaged_weights_are_exported(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "ema")
    trainer = make_trainer(enable_checkpointing=True, callbacks=[EMAWeightAveraging(decay=0.5), checkpoint])
    trainer.fit(ClassificationModule(make_network()), make_loader())
    content: dict[str, Any] = torch.load(tmp_path / "ema.ckpt", weights_only=True)
    assert any(
        not torch.equal(content["state_dict"][name], value) for name, value in content["current_model_state"].items()
    )
    again = ClassificationModule.load_from_checkpoint(tmp_path / "ema.ckpt", model=make_network())
    export_student(again.model, tmp_path / "ema.safetensors")
    saved = load_file(tmp_path / "ema.safetensors")
    assert all(torch.equal(saved[name], content["state_dict"][f"model.{name}"]) for name in saved)
