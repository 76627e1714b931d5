"""Bad teachers that are no network."""

import torch
from torch import nn

from kd_lightning import TeacherCache
from kd_lightning.teachers import FunctionTeacher, OnnxTeacher
from tests.unit.bad_input.case import Case


def scores(x: torch.Tensor) -> torch.Tensor:
    return x


NO_PROBABILITIES = (
    "output={!r} says that the teacher gives {}, which must be of one distribution for each sample (not negative, of "
    "sum 1 within 0.01), but these are not. Declare what they are: output='logits', 'log_probs' or 'probs'."
)
MADE_AT = (
    "temperature is the one at which the teacher's outputs were made: it must be positive and finite, got {}. A plain "
    "softmax has 1; the temperature of the distillation is the Distiller's."
)
CASES = [
    Case(
        "function: an unknown output",
        lambda: FunctionTeacher(scores, output="logprobs"),  # pyright: ignore[reportArgumentType]
        ValueError,
        "output must be one of 'logits', 'log_probs', 'probs', got 'logprobs'.",
    ),
    Case(
        "function: outputs made at temperature 0",
        lambda: FunctionTeacher(scores, temperature=0.0),
        ValueError,
        MADE_AT.format("0.0"),
    ),
    Case(
        "function: outputs made at an infinite temperature",
        lambda: OnnxTeacher("teacher.onnx", temperature=float("inf")),
        ValueError,
        MADE_AT.format("inf"),
    ),
    Case(
        "function: a network",
        lambda: FunctionTeacher(nn.Linear(2, 2)),
        TypeError,
        "a FunctionTeacher needs a function, got torch.nn.modules.linear.Linear. Give FrozenTeacher(network).",
    ),
    Case(
        "function: a string",
        lambda: FunctionTeacher("scores"),  # pyright: ignore[reportArgumentType]
        TypeError,
        "a FunctionTeacher needs a function, got builtins.str. Give a function, or an object with a call.",
    ),
    Case(
        "function: a cache without a name",
        lambda: FunctionTeacher(scores, cache=TeacherCache("teacher.cache")),
        ValueError,
        "a cache belongs to one teacher, and the code of tests.unit.bad_input.teacher_kinds.scores says nothing of "
        "what it computes. Name the teacher and its version: FunctionTeacher(..., name='model v3', cache=...).",
    ),
    Case(
        "function: logits declared as log-probabilities",
        lambda: FunctionTeacher(scores, output="log_probs").logits(torch.tensor([[2.0, -1.0]])),
        ValueError,
        NO_PROBABILITIES.format("log_probs", "log-probabilities"),
    ),
    Case(
        "function: logits declared as probabilities",
        lambda: FunctionTeacher(scores, output="probs").logits(torch.tensor([[[2.0, -1.0]]])),
        ValueError,
        NO_PROBABILITIES.format("probs", "probabilities"),
    ),
    Case(
        "function: probabilities of each class by itself",
        lambda: FunctionTeacher(scores, output="probs").logits(torch.tensor([[0.9, 0.8]])),
        ValueError,
        NO_PROBABILITIES.format("probs", "probabilities"),
    ),
    Case(
        "function: an output without logits",
        lambda: FunctionTeacher(lambda x: [x]).logits(torch.ones(1, 2)),
        TypeError,
        "found no logits in a model output of type list: expected a tensor, `.logits`, ['logits'] or ['out']. Override "
        "extract_logits(output) of your DistillationModule or DistillationCallback.",
    ),
    Case(
        "function: a cache is asked for that is not there",
        lambda: FunctionTeacher(scores).index([1, 2]),
        ValueError,
        "this teacher has no cache: FrozenTeacher(..., cache=TeacherCache(path)).",
    ),
    Case(
        "function: layers",
        lambda: FunctionTeacher(scores).network(),
        ValueError,
        "layers need the features of a network, and FunctionTeacher has none: leave them out.",
    ),
    Case(
        "function: the fused loss",
        lambda: FunctionTeacher(scores).hidden_states(torch.ones(1, 2)),
        TypeError,
        "FunctionTeacher has no hidden states. Take KDLoss.",
    ),
]
