"""Bad targets of a few classes."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from kd_lightning import Distiller, TeacherEnsemble, functional, losses
from kd_lightning.functional import Sparse, Temperature
from kd_lightning.teachers import BatchTeacher, FunctionTeacher, MappedClasses, TeacherCache
from kd_lightning.temperature import EntropyTemperature
from tests.unit.bad_input.case import Case

INDICES, LOG_PROBS = torch.tensor([[0, 3]]), torch.tensor([[0.5, 0.3]]).log()


def made(indices: Any = INDICES, log_probs: Any = LOG_PROBS, **options: Any) -> Callable[[], object]:
    return lambda: Sparse(indices, log_probs, **options)


def lost(
    indices: Tensor = INDICES,
    probs: list[float] | None = None,
    temperature: Any = 1.0,
    loss: Any = None,
    **options: Any,
) -> Callable[[], object]:
    """Compute a loss against targets."""

    def write() -> object:
        log_probs = LOG_PROBS.expand(indices.shape) if probs is None else torch.tensor([probs]).log()
        return (loss or functional.kd_loss)(torch.zeros(1, 5), Sparse(indices, log_probs, **options), temperature)

    return write


SHAPES = "Sparse takes integers (…, k) as class numbers and floating-point log-probabilities of the same shape, got {}."
POSITIVE = (
    "temperature is the one at which the log-probabilities were made: it must be positive and finite, got {}. A plain "
    "softmax has 1."
)
SUM = (
    "the probabilities of each row of Sparse targets must sum to more than 0 and to at most 1 (within 0.01). log_probs "
    "are natural logarithms of probabilities; positions without any are to be masked by the targets."
)
RANGE = (
    "the indices of Sparse targets must be class numbers from 0 to 4, those of the student. Entries that stand for no "
    "class have a log-probability of −inf."
)
TWICE = (
    "each row of Sparse targets must name a class once: add up the probabilities of a class that is named again, or "
    "set the others to −inf."
)
SHAPE = (
    "Sparse targets for student logits of shape (1, 5) with class_dim=1 must be of shape (1, 'k') with 1 ≤ k < 5, got "
    "{}."
)
TAIL = "{} takes Sparse targets with tail {}, got {!r}. KDLoss takes every tail."
NEEDS_ALL = (
    "{} needs the logits of all classes, got Sparse targets. Take a loss that compares distributions, such as KDLoss."
)
ELSEWHERE = (
    "Sparse targets with tail={!r} were made at the teacher's temperature {}, and how the rest of the probability "
    "changes with the temperature cannot be told: the loss's teacher temperature must be the same{}. Set it so, have "
    "the targets made at that of the loss, or take tail='uniform' or 'renormalize'."
)
FEW = (
    "indices='ids' says that the batch has the probabilities of a few classes, which the logits of those few do not "
    "tell. Have log-probabilities in the batch: output='log_probs'."
)
STUDENT, TARGET = torch.zeros(1, 5), Sparse(INDICES, LOG_PROBS)


def distilled(teacher: Any = None, temperature: Any = 1.0, kd_loss: Any = None) -> Callable[[], object]:
    """Distil from a teacher that gives targets."""
    given: dict[str, Any] = {"teacher_logits": TARGET} if teacher is None else {}
    return lambda: Distiller(teacher, temperature, kd_loss, task_weight=0.0)(STUDENT, STUDENT, **given)


def served(inputs: Tensor) -> Sparse:
    return TARGET


LABEL = torch.tensor([2])
CASES = [
    Case("lists", made([[0, 3]]), TypeError,
         "Sparse takes tensors of class numbers and of log-probabilities, got list and Tensor."),
    Case("numbers", made(INDICES, 0.5), TypeError,
         "Sparse takes tensors of class numbers and of log-probabilities, got Tensor and float."),
    Case("indices that are no integers", made(INDICES.float()), ValueError,
         SHAPES.format("torch.float32 (1, 2) and torch.float32 (1, 2)")),
    Case("indices that are booleans", made(INDICES > 0), ValueError,
         SHAPES.format("torch.bool (1, 2) and torch.float32 (1, 2)")),
    Case("log-probabilities that are integers", made(INDICES, INDICES), ValueError,
         SHAPES.format("torch.int64 (1, 2) and torch.int64 (1, 2)")),
    Case("shapes that differ", made(INDICES[0]), ValueError,
         SHAPES.format("torch.int64 (2,) and torch.float32 (1, 2)")),
    Case("scalars", made(INDICES[0, 0], LOG_PROBS[0, 0]), ValueError,
         SHAPES.format("torch.int64 () and torch.float32 ()")),
    *(Case(f"a tail of {tail!r}", made(tail=tail), ValueError,
           f"tail must be one of 'bucket', 'uniform', 'renormalize', 'drop', got {tail!r}.")
      for tail in ("rest", "ghost", None)),
    *(Case(f"made at {t}", made(temperature=t), ValueError, POSITIVE.format(t))
      for t in (0.0, -1.0, float("inf"), float("nan"))),
    Case("log_rest without a dimension", made(log_rest=torch.zeros(1)), ValueError,
         "log_rest must be floating point of shape (1, 1), got torch.float32 (1,)."),
    Case("log_rest of integers", made(log_rest=torch.zeros(1, 1, dtype=torch.long)), ValueError,
         "log_rest must be floating point of shape (1, 1), got torch.int64 (1, 1)."),
    *(Case(f"top-{k}", lambda k=k: Sparse.top_k(torch.zeros(2, 5), k), ValueError,
           f"k must be from 1 to 4, one less than the classes, got {k}.") for k in (0, 5, 9, -1)),
    *(Case(f"{k} samples", lambda k=k: Sparse.sampled(torch.zeros(2, 5), k), ValueError,
           f"count must be from 1 to 4, one less than the classes, got {k}.") for k in (0, 5, -1)),
    Case("samples at another temperature",
         lambda: functional.kd_loss(torch.zeros(1, 5), Sparse.sampled(torch.zeros(1, 5), 2), 2.0), ValueError,
         ELSEWHERE.format("drop", 1, ", got 2")),
    Case("JSD of samples",
         lambda: functional.jsd_loss(torch.zeros(1, 5), Sparse.sampled(torch.zeros(1, 5), 2), 1.0), ValueError,
         TAIL.format("JensenShannon", "'bucket' or 'uniform' or 'renormalize'", "drop")),
    Case("more positions", lost(INDICES.expand(3, 2)), ValueError, SHAPE.format("(3, 2)")),
    Case("other positions", lost(INDICES[None]), ValueError, SHAPE.format("(1, 1, 2)")),
    Case("all classes", lost(torch.arange(5)[None], [0.2] * 5), ValueError, SHAPE.format("(1, 5)")),
    Case("no class", lost(INDICES[:, :0], []), ValueError, SHAPE.format("(1, 0)")),
    Case("probabilities above 1", lost(probs=[0.7, 0.4]), ValueError, SUM),
    Case("probabilities in place of their logarithms",
         lambda: functional.kd_loss(torch.zeros(1, 5), Sparse(INDICES, torch.tensor([[0.5, 0.3]])), 1.0),
         ValueError, SUM),
    Case("no probability", lost(probs=[0.0, 0.0]), ValueError, SUM),
    Case("a negative probability", lost(probs=[-0.1, 0.4]), ValueError, SUM),
    Case("a class that the student lacks", lost(torch.tensor([[0, 5]])), ValueError, RANGE),
    Case("a negative class", lost(torch.tensor([[0, -1]])), ValueError, RANGE),
    Case("a class twice", lost(torch.tensor([[3, 3]])), ValueError, TWICE),
    Case("reverse KL without a rest", lost(loss=functional.reverse_kd_loss, tail="renormalize"), ValueError,
         TAIL.format("ReverseKL", "'bucket' or 'uniform'", "renormalize")),
    Case("reverse KL with a mass below 1", lost(loss=functional.reverse_kd_loss, tail="drop"), ValueError,
         TAIL.format("ReverseKL", "'bucket' or 'uniform'", "drop")),
    Case("JSD with a mass below 1", lost(loss=losses.JSDLoss(), tail="drop"), ValueError,
         TAIL.format("JensenShannon", "'bucket' or 'uniform' or 'renormalize'", "drop")),
    Case("MSE of logits", lost(loss=losses.MSELogitsLoss()), ValueError, NEEDS_ALL.format("SquaredError")),
    Case("multi-label", lost(loss=losses.BernoulliKDLoss()), ValueError, NEEDS_ALL.format("BernoulliKL")),
    Case("DKD", lost(loss=lambda *args: functional.dkd_loss(*args, targets=LABEL)), ValueError,
         NEEDS_ALL.format("DecoupledKL")),
    Case("NKD", lost(loss=lambda *args: functional.nkd_loss(*args, targets=LABEL)), ValueError,
         NEEDS_ALL.format("NonTargetCrossEntropy")),
    Case("DIST", lost(loss=losses.DISTLoss()), TypeError,
         "this loss needs the logits of all classes, got Sparse. Take a loss that compares distributions, such as "
         "KDLoss."),
    *(Case(f"{tail} at another temperature", lost(temperature=4.0, tail=tail), ValueError,
           ELSEWHERE.format(tail, 1, ", got 4")) for tail in ("bucket", "drop")),
    Case("made at 2, used at 1",
         lambda: functional.kd_loss(torch.zeros(1, 5), Sparse(INDICES, LOG_PROBS, 2.0), 1.0), ValueError,
         ELSEWHERE.format("bucket", 2, ", got 1")),
    Case("a temperature of each row", lost(temperature=torch.full((1, 1), 4.0).expand(1, 1)), ValueError,
         ELSEWHERE.format("bucket", 1, ", got 4")),
    Case("a temperature that is learnt", lost(temperature=torch.ones(1, requires_grad=True)), ValueError,
         ELSEWHERE.format("bucket", 1, ", got one that is learnt")),
    Case("a temperature of each class", lost(temperature=Temperature(torch.ones(()), torch.ones(1, 5))), ValueError,
         "Sparse targets do not name all classes, so the teacher's temperature must be one for each row, got shape "
         "(1, 5). Take another policy, or the teacher's logits."),
    Case("the Distiller's default temperature", distilled(temperature=4.0), ValueError,
         ELSEWHERE.format("bucket", 1, ", got 4")),
    Case("a policy that reads logits", distilled(temperature=EntropyTemperature()), ValueError,
         "the teacher gives Sparse targets, the probabilities of a few classes, but the temperature "
         f"{EntropyTemperature()!r} is computed from the logits of all or changes them. Take a number, a schedule or "
         "LearnableTemperature."),
    Case("an ensemble", distilled(TeacherEnsemble([FunctionTeacher(served), FunctionTeacher(served)])), TypeError,
         "an ensemble mixes the logits of all classes, got Sparse: take one teacher alone."),
    Case("mapped classes", distilled(MappedClasses(FunctionTeacher(served), [0, 1, 2, 3, 4])), ValueError,
         "MappedClasses needs the teacher's logits of all its classes, but the teacher gives Sparse targets, which "
         "hold a few classes of each row. Map the classes where the targets are made, or take a teacher of all "
         "logits."),
    Case("MSE in the Distiller", distilled(FunctionTeacher(served), kd_loss=losses.MSELogitsLoss()), ValueError,
         NEEDS_ALL.format("SquaredError")),
    Case("a temperature declared twice", distilled(FunctionTeacher(served, temperature=2.0)), ValueError,
         "the teacher gives Sparse targets made at temperature 1, but FunctionTeacher was told output='logits', "
         "temperature=2. Leave out output and temperature: Sparse(..., temperature=...) has them."),
    Case("logits of a few classes", lambda: BatchTeacher("z", indices="ids"), ValueError, FEW),
    Case("a tail without indices", lambda: BatchTeacher("z", tail="drop"), ValueError,
         "tail='drop' is for the probabilities of a few classes: name the key of their indices."),
    Case("a batch without indices", lambda: BatchTeacher("z", "probs", indices="ids").logits({"z": 1, "x": 2}),
         ValueError,
         "BatchTeacher reads 'z' and 'ids' of the batch, got the keys z, x. Have the dataset and its collate function "
         "put it there: a key of a mapping, or a position in a tuple."),
    *(Case(f"a cache at {t!r}", lambda t=t, k=k: TeacherCache("x", top_k=k, temperature=t), ValueError,
           f"temperature is that of the top_k of tokens, positive and finite, got {t!r} with top_k={k}. All logits "
           "are stored before any temperature.")
      for t, k in ((2.0, None), (0.0, 8), (-1.0, 8), (float("inf"), 8), (float("nan"), 8))),
    Case("the fused loss",
         lambda: functional.fused_linear_kd_loss(torch.ones(1, 2), torch.ones(5, 2), None, None, 1.0,
                                                 teacher_logits=cast(Any, TARGET)), TypeError,
         "the fused loss takes the logits of all classes, got Sparse targets: take kd_loss for them."),
    Case("a consensus", lambda: Distiller(None).consensus(None, TARGET), ValueError,
         "Sparse targets name a few classes only, so that there are no logits to show."),
]  # fmt: skip
