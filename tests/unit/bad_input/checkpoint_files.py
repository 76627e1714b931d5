"""Files that are no checkpoint, and checkpoints of another network, module or optimizer."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from kd_lightning import ClassificationModule, DistillationModule
from kd_lightning.modules.checkpoint_fit import check_optimizers
from kd_lightning.modules.checkpoint_settings import read_checkpoint
from kd_lightning.teachers.weights import load_weights
from tests.unit.bad_input.case import Case

FOLDER = Path(tempfile.mkdtemp())
(FOLDER / "runs" / "one").mkdir(parents=True)
(FOLDER / "runs" / "one" / "best.ckpt").write_bytes(b"")
(FOLDER / "text.ckpt").write_text("import torch\n")
(FOLDER / "pop.ckpt").write_text("this is text\n")
(FOLDER / "cut.ckpt").write_bytes(b"PK\x03\x04" + bytes(40))


def load(module: ClassificationModule | DistillationModule, **weights: torch.Tensor) -> object:
    return module.load_state_dict({name.replace("__", "."): value for name, value in weights.items()})


def resume(*groups: list[nn.Parameter]) -> None:
    saved = torch.optim.SGD([{"params": group} for group in groups]).state_dict()
    check_optimizers([saved], [torch.optim.AdamW([WEIGHT])])


WEIGHT = nn.Parameter(torch.ones(1))
GOES_ON = (
    " Give the optimizer of the run that wrote it, or start a new run without the checkpoint: a checkpoint goes on "
    "with its optimizer."
)
ADAMW = sorted({*torch.optim.AdamW([WEIGHT]).defaults} - {*torch.optim.SGD([WEIGHT]).defaults})
CASES = [
    Case("nothing at the path", lambda: read_checkpoint("none.ckpt"), FileNotFoundError,
         f"there is no checkpoint at 'none.ckpt' (from the folder '{Path.cwd()}')."),
    Case("a folder", lambda: read_checkpoint(FOLDER / "runs"), ValueError,
         f"'{FOLDER}/runs' is a folder, and a checkpoint is a file. Its files *.ckpt: best.ckpt."),
    Case("a folder without checkpoints", lambda: read_checkpoint("tests/docs"),
         ValueError, "'tests/docs' is a folder, and a checkpoint is a file. Its files *.ckpt: none."),
    Case("a text", lambda: read_checkpoint(FOLDER / "text.ckpt"), ValueError,
         f"{FOLDER}/text.ckpt is no checkpoint: it is no file of torch.save, and begins with 'import torch\\n'. Give a "
         "file that the Trainer wrote."),
    Case("a text on which torch trips", lambda: read_checkpoint(FOLDER / "pop.ckpt"), ValueError,
         f"{FOLDER}/pop.ckpt is no checkpoint: it is no file of torch.save, and begins with 'this is text\\n'. Give a "
         "file that the Trainer wrote."),
    Case("a file without content", lambda: read_checkpoint(FOLDER / "runs" / "one" / "best.ckpt"), ValueError,
         f"{FOLDER}/runs/one/best.ckpt cannot be read as a checkpoint: it is truncated or damaged."),
    Case("a truncated file", lambda: read_checkpoint(FOLDER / "cut.ckpt"), ValueError,
         f"{FOLDER}/cut.ckpt cannot be read as a checkpoint: it is truncated or damaged."),
    Case("a text as weights", lambda: load_weights(nn.Linear(2, 2), FOLDER / "pop.ckpt"), ValueError,
         f"{FOLDER}/pop.ckpt could not be read as weights: it is no file of torch.save, and begins with 'this is "
         "text\\n'. Give a file of torch.save, a Lightning checkpoint or safetensors."),
    Case("another student", lambda: load(DistillationModule(nn.Linear(2, 3)), student__weight=torch.ones(3, 4)),
         RuntimeError,
         "the checkpoint's weights do not fit this DistillationModule: missing in the file: student.bias, "
         "distiller.temperature.multiplier; other shapes: student.weight (3, 4) in the file, (3, 2) in the module. "
         "Build the DistillationModule with the networks, losses and layers of the run that wrote it, or start anew "
         "without the checkpoint."),
    Case("a teacher's checkpoint", lambda: load(DistillationModule(nn.Linear(2, 3)), model__weight=torch.ones(3, 2)),
         RuntimeError,
         "the checkpoint is of another module: its weights are under model, those of this DistillationModule under "
         "student. Give a checkpoint of a DistillationModule; another network's weights are for a teacher, "
         "FrozenTeacher(network, checkpoint=...)."),
    Case("a student's checkpoint", lambda: load(ClassificationModule(nn.Linear(2, 3)), student__bias=torch.ones(3)),
         RuntimeError,
         "the checkpoint is of another module: its weights are under student, those of this ClassificationModule under "
         "model. Give a checkpoint of a ClassificationModule; another network's weights are for a teacher, "
         "FrozenTeacher(network, checkpoint=...)."),
    Case("another optimizer", lambda: resume([WEIGHT]), ValueError,
         "the checkpoint's optimizer has the options dampening, momentum and nesterov, but this run's AdamW has "
         f"{', '.join(ADAMW[:-1])} and {ADAMW[-1]}." + GOES_ON),
    Case("other groups",
         lambda: check_optimizers(
             [torch.optim.SGD([WEIGHT]).state_dict()], [torch.optim.SGD(nn.Linear(2, 2).parameters())]
         ),
         ValueError,
         "the checkpoint's optimizer has [1] parameters in its groups, but this run's SGD has [2]." + GOES_ON),
]  # fmt: skip
