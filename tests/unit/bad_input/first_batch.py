"""Values of a first batch that no loss can mean: probabilities for logits, several labels for classes, one network."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kd_lightning import ClassificationModule, Distiller
from tests.unit.bad_input.case import Case

INPUTS = torch.linspace(-1, 1, 32).reshape(8, 4)
CLASSES = torch.arange(8) % 5
MULTI_HOT = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]]).repeat(8, 1)
SOFT_TARGETS = (
    "a cross-entropy takes targets in the logits' shape, (8, 5), for probabilities, not negative and of sum 1 in each "
    "row, but {}. For several labels at once give task_loss=BCEWithLogitsLoss() and kd_loss=BernoulliKDLoss()."
)
PROBABILITIES = (
    "the {}'s logits are probabilities, not negative and of sum 1 in every row, but the loss applies the softmax "
    "itself. Leave out the network's last Softmax{}"
)
SAME = (
    "the student's logits are the teacher's, bit for bit, and carry no gradient: the teacher seems to be the student "
    "itself, which is frozen as a teacher. Give the teacher its own weights: copy.deepcopy(student)."
)


def network(inputs: int = 4) -> nn.Linear:
    linear = nn.Linear(inputs, 5)
    linear.weight.data = torch.linspace(-3, 2, 5 * inputs).reshape(5, inputs).sin()  # stands for training
    return linear


def distilled(
    targets: Tensor = CLASSES, softmax_of_student: bool = False, teacher: nn.Module | None = None
) -> Callable[[], object]:
    student = nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1)) if softmax_of_student else nn.Linear(4, 5)
    return lambda: Distiller(teacher or network())(INPUTS, student(INPUTS), targets)


def classified(targets: Tensor = CLASSES, softmax: bool = False) -> Callable[[], object]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1)) if softmax else nn.Linear(4, 5)
    return lambda: ClassificationModule(model)._loss((INPUTS, targets))


def its_own_teacher() -> object:
    student = network()
    distiller = Distiller(teacher=student)
    return distiller(INPUTS, student(INPUTS), CLASSES)


CASES = [
    Case("several labels to distil", distilled(MULTI_HOT), ValueError, SOFT_TARGETS.format("a row sums to 3")),
    Case("several whole labels to distil", distilled(MULTI_HOT.long()), ValueError,
         SOFT_TARGETS.format("a row sums to 3")),
    Case("several labels to classify", classified(MULTI_HOT), ValueError, SOFT_TARGETS.format("a row sums to 3")),
    Case("a negative probability", distilled(torch.tensor([[1.5, -0.5, 0, 0, 0]]).repeat(8, 1)), ValueError,
         SOFT_TARGETS.format("one is -0.5")),
    Case("a student that ends in Softmax", distilled(softmax_of_student=True), ValueError,
         PROBABILITIES.format("student", ".")),
    Case("a model that ends in Softmax", classified(softmax=True), ValueError, PROBABILITIES.format("student", ".")),
    Case("a teacher that ends in Softmax", distilled(teacher=nn.Sequential(network(), nn.Softmax(-1))), ValueError,
         PROBABILITIES.format("teacher", ", or say what it gives: FunctionTeacher(function, output='probs').")),
    Case("a student that teaches itself", its_own_teacher, ValueError, SAME),
    Case("a teacher of other inputs", distilled(teacher=network(6)), ValueError,
         "the teacher Linear cannot take the student's inputs, of shape (8, 4): addmm: mat1 and mat2 shapes cannot be "
         "multiplied (8x4 and 6x5). Give a teacher of such inputs, or FrozenTeacher(network, transform=...), which "
         "makes its own of them."),
]  # fmt: skip
