"""Bad teachers that are no network."""

import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_lightning import Distiller, TeacherCache, TeacherEnsemble
from kd_lightning.fused_distiller import FusedDistiller
from kd_lightning.losses import FusedLinearKDLoss
from kd_lightning.teachers import (
    BatchTeacher,
    EMATeacher,
    FunctionTeacher,
    LogitsFile,
    MappedClasses,
    OnnxTeacher,
    Renormalize,
)
from tests.unit.bad_input.case import Case

FOLDER = Path(tempfile.mkdtemp())
FILE = FOLDER / "logits.safetensors"


def scores(x: Tensor) -> Tensor:
    return x


def file_of(ids: Tensor, column: str = "logits") -> LogitsFile:
    save_file({"id": ids, "logits": torch.ones(3, 2)}, FOLDER / "logits.safetensors")
    return LogitsFile(FOLDER / "logits.safetensors", column=column)


def following(student: nn.Module) -> EMATeacher:
    teacher = EMATeacher()
    teacher.follow(student)
    return teacher


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
        "extract_logits(output) of your DistillationModule or DistillationCallback; for several outputs to distil take "
        "OutputsKDLoss.",
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
    Case(
        "batch: no such key",
        lambda: BatchTeacher("logits").logits({"x": torch.ones(1), "y": torch.ones(1)}),
        ValueError,
        "BatchTeacher reads 'logits' of the batch, got the keys x, y. Have the dataset and its collate function put it "
        "there: a key of a mapping, or a position in a tuple.",
    ),
    Case(
        "batch: a key of a tuple",
        lambda: Distiller("batch:logits")((torch.ones(1), torch.ones(1)), torch.ones(1, 2), torch.zeros(1).long()),
        ValueError,
        "BatchTeacher reads 'logits' of the batch, got tuple of length 2. Have the dataset and its collate function "
        "put it there: a key of a mapping, or a position in a tuple.",
    ),
    Case(
        "batch: a list of logits",
        lambda: BatchTeacher("logits").logits({"logits": [torch.ones(2), torch.ones(2)]}),
        TypeError,
        "BatchTeacher needs a tensor under 'logits', got list. Have the collate function stack the samples' logits.",
    ),
    Case(
        "batch: a text without a key",
        lambda: Distiller("batch:"),
        ValueError,
        "a teacher written as text is 'batch:' and the key of its logits in the batch, got 'batch:'. Write "
        "'batch:teacher_logits', or give a network or a Teacher.",
    ),
    Case(
        "file: an id twice",
        lambda: file_of(torch.tensor([4, 4, 5])).load(),
        ValueError,
        "each sample has one row of logits, but "
        f"{FILE} has the id 4 more than once. Give each sample an id of its own, "
        "such as 'train-17' where splits are numbered alike.",
    ),
    Case(
        "file: an id that it does not have",
        lambda: file_of(torch.tensor([4, 9, 5])).logits({"id": torch.tensor([4, 7])}),
        ValueError,
        f"{FILE} has no logits for the id 7: it has 3 ids, from 4 to 9. Give the files of all data, as a list; or "
        "leave 'id' out of the batches of a validation without a teacher.",
    ),
    Case(
        "file: text for integers",
        lambda: file_of(torch.tensor([4, 9, 5])).logits({"id": ["4", "9"]}),
        ValueError,
        f"{FILE} has ids that are integers, one for each sample, but the batch has <U1 (2,) under 'id'. Give the batch "
        "the ids that the file was written with.",
    ),
    Case(
        "file: other columns",
        lambda: file_of(torch.tensor([4, 9, 5]), column="scores").load(),
        ValueError,
        f"{FILE} needs 'scores', the logits, and 'id', their ids; it has id, logits. Name them: "
        "LogitsFile(path, key=..., column=...).",
    ),
    Case(
        "file: an id too many",
        lambda: file_of(torch.tensor([4, 9, 5, 6])).load(),
        ValueError,
        f"{FILE} must have floating-point logits (N, …, C) and integers or text (N,) as ids, got torch.float32 (3, 2) "
        "and int64 (4,).",
    ),
    Case(
        "file: no ids in the batch",
        lambda: file_of(torch.tensor([4, 9, 5])).logits({"x": torch.ones(3)}),
        ValueError,
        "LogitsFile reads 'id' of the batch, got the keys x. Have the dataset and its collate function put it there: a "
        "key of a mapping, or a position in a tuple.",
    ),
    Case(
        "file: another format",
        lambda: LogitsFile(Path(__file__)).load(),
        ValueError,
        f"logits are in .npy, .safetensors, .parquet or .arrow files, got {str(Path(__file__))!r}.",
    ),
    Case(
        "ema: a decay of 1",
        lambda: EMATeacher(decay=1.0),
        ValueError,
        "decay must be in [0, 1), the weight of the average so far, got 1.0. Usual are 0.99 to 0.9999.",
    ),
    Case(
        "ema: no student",
        lambda: Distiller(EMATeacher())(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1).long()),
        RuntimeError,
        "an EMATeacher must know the student that it averages before it teaches: call teacher.follow(student), and "
        "teacher.update() after each optimiser step.",
    ),
    Case(
        "ema: the average of another student",
        lambda: following(nn.Linear(2, 3)).load_state_dict(following(nn.Linear(2, 4, bias=False)).state_dict()),
        ValueError,
        "the checkpoint's EMATeacher averaged another student than the one that this one follows: they differ in bias, "
        "weight. Resume with that student, and with a new EMATeacher.",
    ),
    Case(
        "ema: layers",
        lambda: EMATeacher().network(),
        ValueError,
        "layers are hooked before training, and the network of an EMATeacher is a copy that training makes: leave them "
        "out.",
    ),
    Case(
        "ema: its own temperature in an ensemble",
        lambda: TeacherEnsemble([EMATeacher(temperature=2.0)]),
        ValueError,
        "the teachers of an ensemble have their temperatures from it, TeacherEnsemble(..., temperatures=[...]), but "
        "EMATeacher(decay=0.999, warmup=True, temperature=ConstantTemperature(value=2)) has its own.",
    ),
    Case(
        "transform: statistics of different lengths",
        lambda: Renormalize([0.5], [0.5], [0.5, 0.5, 0.5], [0.2, 0.2, 0.2]),
        ValueError,
        "Renormalize needs a mean and a standard deviation for each channel, of the student and of the teacher, got 1, "
        "1, 3, 3 numbers.",
    ),
    Case(
        "transform: a standard deviation of 0",
        lambda: Renormalize([0.5], [0.5], [0.5], [0.0]),
        ValueError,
        "standard deviations must be positive, got student_std=[0.5] and teacher_std=[0.0].",
    ),
    Case(
        "transform: a size of 0",
        lambda: Renormalize([0.5], [0.5], [0.5], [0.5], size=0),
        ValueError,
        "size must be positive, or None for images as they are, got 0.",
    ),
    Case(
        "transform: raw images",
        lambda: Renormalize([0.5], [0.5], [0.5], [0.5])(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)),
        ValueError,
        "Renormalize takes normalised images (…, 1, H, W) in floating point, got torch.uint8 (2, 1, 4, 4). For inputs "
        "that are more than images, write a function of them that calls it.",
    ),
    Case(
        "transform: a class",
        lambda: FunctionTeacher(scores, transform=Renormalize),
        TypeError,
        "transform must be a function from inputs to inputs, or an object with a call, got Renormalize.",
    ),
    Case(
        "transform: without a text of its own",
        lambda: FunctionTeacher(scores, transform=partial(scores)),
        ValueError,
        "a transform is told from another by its text, and that of partial is an address. Give its class a __repr__ "
        "with its settings, or write a function at the top of a module.",
    ),
    Case(
        "classes: a class of nothing",
        lambda: MappedClasses("batch:t", [[3, 4], []]),
        ValueError,
        "each of the student's classes is made of at least one of the teacher's, numbered from 0 and named once, got "
        "[[3, 4], []]. For a class that the teacher does not know write None.",
    ),
    Case(
        "classes: one in two",
        lambda: MappedClasses("batch:t", [[3, 4], [4]]),
        ValueError,
        "each of the student's classes is made of at least one of the teacher's, numbered from 0 and named once, got "
        "[[3, 4], [4]]. For a class that the teacher does not know write None.",
    ),
    Case(
        "classes: no numbers",
        lambda: MappedClasses("batch:t", [0.5]),  # pyright: ignore[reportArgumentType]
        TypeError,
        "classes must be the numbers of the teacher's classes, one or several for each of the student's, such as "
        "[3, 17] or [[3, 4], [17]], None for a class that the teacher does not know, or the path of a JSON file of "
        "names, got [0.5].",
    ),
    Case(
        "classes: of an ensemble",
        lambda: MappedClasses(TeacherEnsemble(["batch:t", "batch:u"]), [3, 4]),
        TypeError,
        "MappedClasses takes one teacher, got TeacherEnsemble. In an ensemble, map the classes of each member.",
    ),
    Case(
        "ema: a cache",
        lambda: EMATeacher().index([1, 2]),
        ValueError,
        "the logits of an EMATeacher change with each step, so that no cache can keep them: leave the cache out.",
    ),
    Case(
        "batch: a cache",
        lambda: BatchTeacher("t").index([1, 2]),
        ValueError,
        "BatchTeacher has its logits already and takes no cache: leave the cache out.",
    ),
    Case(
        "ema: the fused loss with a temperature of the average's own",
        lambda: FusedDistiller(EMATeacher(temperature=2.0), 4.0, FusedLinearKDLoss()),
        ValueError,
        "FusedLinearKDLoss takes the hidden states of one teacher that runs: no ensemble, no cache and no layers go "
        "with it, and no targets of a few classes, as functions and servers give. Take KDLoss.",
    ),
]
