"""Targets that losses which single out one class cannot take."""

import torch

from kd_lightning import Distiller
from kd_lightning.functional import Sparse, dkd_loss, hard_label_loss, nkd_loss
from kd_lightning.losses import DKDLoss
from kd_lightning.temperature import CorrectWrongTemperature
from tests.unit.bad_input.case import Case

LOGITS = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
NO_PROBABILITIES = (
    "{} splits off the likeliest class of soft targets, which must be probabilities: of sum 1 within 0.01 for each "
    "sample, but these are not. Give class indices; for several labels at once take BernoulliKDLoss."
)
CASES = [
    Case(
        "dkd: several labels at once",
        lambda: dkd_loss(LOGITS, LOGITS, 1.0, targets=torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])),
        ValueError,
        NO_PROBABILITIES.format("dkd_loss"),
    ),
    Case(
        "nkd: logits as targets",
        lambda: nkd_loss(LOGITS, LOGITS, 1.0, targets=LOGITS),
        ValueError,
        NO_PROBABILITIES.format("nkd_loss"),
    ),
    Case(
        "dkd: class indices in floating point",
        lambda: dkd_loss(LOGITS, LOGITS, 1.0, targets=torch.tensor([0.0, 2.0])),
        ValueError,
        "dkd_loss splits off the target class: it needs targets that are class indices, got torch.float32 ones.",
    ),
    Case(
        "dkd: no labels, but an attention mask",
        lambda: Distiller(None, 2.0, DKDLoss(), task_weight=0.0)(
            {"attention_mask": torch.tensor([1, 0])}, LOGITS, teacher_logits=LOGITS
        ),
        ValueError,
        "dkd_loss splits off the target class: it needs targets that are class indices, got a mask of positions alone.",
    ),
    Case(
        "a policy that reads labels: none, but an attention mask",
        lambda: Distiller(None, CorrectWrongTemperature(), task_weight=0.0)(
            {"attention_mask": torch.tensor([1, 0])}, LOGITS, teacher_logits=LOGITS
        ),
        ValueError,
        "CorrectWrongTemperature reads the label of each position: it needs class indices as targets in the shape "
        "(2,), got a mask of positions alone. Pass them, or choose a policy that needs no labels, such as "
        "EntropyTemperature.",
    ),
    Case(
        "hard labels of a few classes",
        lambda: hard_label_loss(
            LOGITS, Sparse(torch.tensor([[2], [1]]), torch.tensor([[-0.5], [-0.2]]), tail="bucket"), 1.0
        ),
        TypeError,
        "hard_label_loss takes the largest of all logits, got Sparse targets. Take a loss that compares "
        "distributions, such as kd_loss.",
    ),
]
