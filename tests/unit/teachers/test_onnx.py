"""An ONNX file, as torch.onnx.export writes it, as a teacher."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from kd_lightning import DistillationModule, Distiller
from kd_lightning.export import export_student
from kd_lightning.teachers import OnnxTeacher
from tests.helpers import in_a_fork, make_data, make_loader, make_network

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


pytestmark = pytest.mark.forked  # the runtime, once started, hangs in forks


@pytest.fixture(scope="module")
def path(_trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher in a file, exported once: an export takes seconds."""
    file = tmp_path_factory.mktemp("exported") / "teacher.onnx"
    in_a_fork(lambda: export_student(_trained.eval(), file, "onnx", torch.randn(4, 8)))
    return file


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_file_of_torch_onnx_export_with_weights_beside_it(tmp_path: Path) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(5, 3)

        def forward(self, image: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
            maps = self.conv(image).mean((2, 3))
            return self.fc(torch.cat([maps, age], 1)), maps

    def export(network: nn.Module, folder: Path) -> Path:
        folder.mkdir()
        dims = {0: torch.export.Dim.DYNAMIC}
        torch.onnx.export(
            network,
            (torch.randn(2, 1, 8, 8), torch.rand(2, 1)),
            folder / "teacher.onnx",
            input_names=["image", "age"],
            output_names=["logits", "maps"],
            dynamic_shapes=(dims, dims),
            dynamo=True,
            external_data=True,
            verbose=False,
        )
        return folder / "teacher.onnx"

    network = TwoInputs().eval()
    teacher = OnnxTeacher(export(network, tmp_path / "one"))
    image, age = torch.randn(5, 1, 8, 8), torch.rand(5, 1)
    with torch.no_grad():
        expected = network(image, age)[0]
    torch.testing.assert_close(teacher.logits((image, age)), expected)
    torch.testing.assert_close(teacher.logits({"age": age.double(), "image": image.double()}), expected)
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.fc.weight[0, 0] += 1
    again, changed = export(network, tmp_path / "two"), export(other, tmp_path / "three")
    assert OnnxTeacher(again).fingerprint() == teacher.fingerprint()
    assert OnnxTeacher(changed).fingerprint() != teacher.fingerprint()


def test_logits_and_gradients_are_the_network_s(path: Path, teacher: nn.Module) -> None:
    inputs, targets = make_data(16).tensors
    student = make_network()(inputs).detach().requires_grad_()
    losses = [Distiller(one, temperature=3.0)(inputs, student, targets).loss for one in (OnnxTeacher(path), teacher)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*[torch.autograd.grad(loss, student)[0] for loss in losses])


def test_in_a_module(
    path: Path, make_module: Callable[..., DistillationModule], make_trainer: Callable[..., Trainer]
) -> None:
    values = []
    for options in ({"teacher": OnnxTeacher(path)}, {}):
        trainer = make_trainer()
        trainer.fit(make_module(**options), make_loader(), make_loader(32, seed=1))
        values.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_it_is_read_when_first_needed_and_pickled_without_its_session(path: Path) -> None:
    teacher = OnnxTeacher(path)
    assert not teacher.loaded
    assert teacher.available()
    logits = teacher.logits(torch.ones(2, 8))
    assert teacher.loaded
    assert torch.equal(pickle.loads(pickle.dumps(teacher)).logits(torch.ones(2, 8)), logits)
    missing = OnnxTeacher(path.with_name("other.onnx"))
    assert not missing.available()
    with pytest.raises(FileNotFoundError, match=r"there is no ONNX file at .*other\.onnx"):
        missing.logits(torch.ones(2, 8))


def test_a_fork_may_collect_it(path: Path) -> None:
    """A session that is collected in a fork waits for its parent's threads."""
    teacher = OnnxTeacher(path)
    logits = teacher.logits(torch.ones(2, 8))
    time.sleep(0.3)  # until the runtime's threads sleep, because those that spin end by themselves
    if not (child := os.fork()):
        signal.alarm(20)  # which ends a child that waits for ever
        again = pickle.loads(pickle.dumps(teacher))
        del teacher
        gc.collect()
        os._exit(not torch.equal(again.logits(torch.ones(2, 8)), logits))
    assert os.waitpid(child, 0)[1] == 0


def test_inputs_that_do_not_fit(path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes .* tensor\(float\) .*8\], got .* float32 \[2, 7\]\. Give it such"):
        OnnxTeacher(path).logits(torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"takes the inputs .*, got 2 by position"):
        OnnxTeacher(path).logits((torch.ones(2, 8), torch.ones(2, 8)))
