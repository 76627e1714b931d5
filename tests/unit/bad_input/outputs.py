"""Several outputs that contradict each other, or that student, teacher or batch lack."""

import torch
from torch import Tensor, nn

from kd_lightning import Distiller, FrozenTeacher, OutputsKDLoss, OutputTerm, TeacherCache
from kd_lightning.losses import KDLoss
from kd_lightning.outputs_distiller import OutputsDistiller
from kd_lightning.temperature import ClassFrequencyTemperature
from tests.helpers import make_teacher
from tests.unit.bad_input.case import Case

Z = torch.tensor([[1.0, 0.0, 2.0]])


def distil(several: OutputsKDLoss, student: object, **options: object) -> object:
    given = {"teacher_logits": Z} | options
    return OutputsDistiller(None, 2.0, several, task_weight=0.0)(None, student, **given)  # pyright: ignore


def two(**aux: object) -> OutputsKDLoss:
    return OutputsKDLoss({"cls": KDLoss(), "aux": OutputTerm(**aux)})  # pyright: ignore[reportArgumentType]


class Heads(nn.Module):
    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"cls": inputs, "aux": inputs}


def calibrated() -> object:
    teacher = FrozenTeacher(Heads(), calibration=2.0)
    return OutputsDistiller(teacher, 2.0, two(), task_weight=0.0)(Z, {"cls": Z, "aux": Z})


NAME = (
    "an output is named by a key, an attribute or a position of what the network returns, without a dot and not as a "
    "method of torch's ModuleDict, got {!r}: have forward return it under another name."
)
CASES = [
    Case("no outputs", lambda: OutputsKDLoss({}), ValueError,
         "outputs must name at least one output and its loss, such as {'cls': KDLoss()}, got {}."),
    Case("a list of losses", lambda: OutputsKDLoss([KDLoss()]), ValueError,  # pyright: ignore[reportArgumentType]
         "outputs must name at least one output and its loss, such as {'cls': KDLoss()}, got [KDLoss("
         "scale='student_teacher', class_dim=-1, ignore_index=-100, reduction='mean')]."),
    Case("a number for a loss", lambda: OutputsKDLoss({"cls": 1.0}), TypeError,  # pyright: ignore[reportArgumentType]
         "the output 'cls' needs a loss, such as KDLoss(), or an OutputTerm, got 1.0: an instance of one."),
    Case("a part of a part", lambda: OutputsKDLoss({"cls": KDLoss(), "head.aux": KDLoss()}), ValueError,
         NAME.format("head.aux")),
    Case("an output named as a method", lambda: OutputsKDLoss({"cls": KDLoss(), "values": KDLoss()}), ValueError,
         NAME.format("values")),
    Case("a calibrated teacher", calibrated, ValueError,
         "a calibration is of one tensor of logits, but OutputsKDLoss takes several outputs of this teacher, cls, aux: "
         "leave calibration out, or name one output."),
    Case("another prediction", lambda: OutputsKDLoss({"cls": KDLoss()}, predict="max"),  # pyright: ignore
         ValueError, "predict must be 'first' or 'mean', got 'max'."),
    Case("a temperature of the first output", lambda: OutputsKDLoss({"cls": OutputTerm(temperature=2.0)}), ValueError,
         "the temperature of the first output, 'cls', is that of the Distiller: give it there, as "
         "temperature=ConstantTemperature(value=2)."),
    Case("targets of the first output", lambda: OutputsKDLoss({"cls": OutputTerm(targets="y")}), ValueError,
         "the targets of the first output, 'cls', are those of the batch, got 'y': return them from "
         "unpack_batch(batch), or put another output first."),
    Case("an output that counts for nothing", lambda: distil(two(weight=0.0), {"cls": Z, "aux": Z}), ValueError,
         "kd_weight and task_weight are both 0, which trains nothing. Give one of them a weight."),
    Case("the plain Distiller", lambda: Distiller(None, 2.0, two(), task_weight=0.0)(None, Z, teacher_logits=Z),
         ValueError, "OutputsKDLoss is the loss of several outputs, which an OutputsDistiller gives it one by one. "
         "Take that, or a DistillationModule or DistillationCallback, which do."),
    Case("another loss", lambda: OutputsDistiller(None, 2.0, KDLoss()), ValueError,
         "an OutputsDistiller computes OutputsKDLoss, got KDLoss(scale='student_teacher', class_dim=-1, "
         "ignore_index=-100, reduction='mean'): take Distiller."),
    Case("a cache", lambda: OutputsDistiller(FrozenTeacher(make_teacher(), cache=TeacherCache("t.cache")), 2.0, two()),
         ValueError, "a teacher's cache keeps one tensor of logits for each sample, and OutputsKDLoss may ask for "
         "several. Leave out the cache, or distil one output with its own loss, such as KDLoss."),
    Case("a policy with a state for two outputs",
         lambda: OutputsDistiller(None, ClassFrequencyTemperature([10, 5, 1]), two()), ValueError,
         "ClassFrequencyTemperature keeps a state, class_counts, which several outputs cannot share. Give the output "
         "'aux' a temperature of its own: OutputTerm(..., temperature=...)."),
    Case("an output that the student lacks", lambda: distil(two(), {"cls": Z, "axu": Z}), ValueError,
         "OutputsKDLoss needs the student's output 'aux', a tensor, but got dict with the keys cls, axu. Name the "
         "outputs by key, attribute, or position in a tuple ('0')."),
    Case("a position that the student lacks",
         lambda: distil(OutputsKDLoss({"0": KDLoss(), "2": KDLoss()}), (Z, Z)), ValueError,
         "OutputsKDLoss needs the student's output '2', a tensor, but got tuple of length 2. Name the outputs by key, "
         "attribute, or position in a tuple ('0')."),
    Case("an output that the teacher lacks", lambda: two(teacher="head").select_taught({"cls": Z}), ValueError,
         "OutputsKDLoss needs the teacher's output 'head', a tensor, but got dict with the keys cls. Name the outputs "
         "by key, attribute, or position in a tuple ('0')."),
    Case("targets that the batch lacks", lambda: distil(two(targets="fine"), {"cls": Z, "aux": Z}), ValueError,
         "the output 'aux' reads its targets under 'fine' of the batch, which has no such part. Have the dataset and "
         "its collate function put it there, or call the Distiller with extra={'fine': …}."),
    Case("a task loss beside the module's own",
         lambda: distil(two(task_weight=1.0), {"cls": Z, "aux": Z}, task_loss=torch.zeros(())), ValueError,
         "the task loss is there already, as a module's own, but the output 'aux' has a task_weight. Leave task_weight "
         "out, and have the module weigh its outputs."),
]  # fmt: skip
