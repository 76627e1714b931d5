"""Bad input of temperature scaling: the fit, its file, and what takes it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kd_lightning import FrozenTeacher, TeacherEnsemble
from kd_lightning.calibration import calibrate
from kd_lightning.export import export_student
from kd_lightning.functional import fit_temperature
from kd_lightning.teachers import Calibration
from tests.helpers import make_network, make_teacher
from tests.unit.bad_input.case import Case

LOGITS, LABELS = torch.tensor([[4.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 1])
X = torch.randn(4, 8)
FILE = Path(tempfile.gettempdir()) / "kd-lightning-no-calibration.json"


def fitted(logits: Any = LOGITS, targets: Any = LABELS) -> Callable[[], object]:
    return lambda: fit_temperature(logits, targets)


def calibrated(teacher: Callable[[], Any], *batches: Any) -> Callable[[], object]:
    return lambda: calibrate(teacher(), batches)


def teaching(calibration: Any) -> Callable[[], object]:
    return lambda: FrozenTeacher(make_teacher(), calibration=calibration).logits(X)


def of_no_calibration() -> None:
    FILE.write_text("[1, 2]")
    try:
        Calibration.of(FILE)
    finally:
        FILE.unlink()


def exported(temperature: Any, path: str) -> Callable[[], object]:
    return lambda: export_student(make_network(), path, example_inputs=X, temperature=temperature)


USUAL = "Usual values lie between 1 and 20; T = 1 is the plain softmax."
TAKES = "fit_temperature takes logits (N, C) and N class indices, one or more, got logits of shape"

CASES = [
    Case("fit of one row", fitted(LOGITS[0], LABELS[0]), ValueError, f"{TAKES} (3,) and int64 targets of shape ()."),
    Case("fit to probabilities", fitted(LOGITS, LABELS.float()), ValueError,
         f"{TAKES} (2, 3) and float32 targets of shape (2,)."),
    Case("fit to nothing", fitted(LOGITS[:0], LABELS[:0]), ValueError,
         f"{TAKES} (0, 3) and int64 targets of shape (0,)."),
    *(
        Case(f"fit to label {label}", fitted(LOGITS, torch.tensor([0, label])), ValueError,
             f"targets must be class indices from 0 to 2, got {label}. Leave out the positions without a label.")
        for label in (3, -100)
    ),
    Case("fit where all are right", fitted(), ValueError,
         "no temperature between 0.05 and 100 is the best for these 2 labels, of which 100.0% are predicted: where all "
         "are, colder is always better. Give more labels, of data that the network was not trained on."),
    Case("calibration of an ensemble",
         calibrated(lambda: TeacherEnsemble([make_teacher(), make_teacher()]), (X, torch.zeros(4, dtype=torch.long))),
         TypeError,
         "calibrate takes a teacher of one network, got TeacherEnsemble. Calibrate each member by itself."),
    Case("calibration twice", calibrated(lambda: FrozenTeacher(make_teacher(), calibration=2.0)), ValueError,
         "this teacher is calibrated already: leave its calibration out to fit it anew."),
    Case("calibration without data", calibrated(make_teacher), ValueError,
         "calibrate needs labels of data that the teacher was not trained on, got none."),
    Case("calibration with all ignored", calibrated(make_teacher, (X, torch.full((4,), -100))), ValueError,
         "calibrate needs labels of data that the teacher was not trained on, got none."),
    Case("calibration without labels", calibrated(make_teacher, (X, None)), ValueError,
         "calibrate takes class indices of shape (4,), one for each row of the logits, got NoneType."),
    Case("calibration to probabilities", calibrated(make_teacher, (X, torch.zeros(4, 6))), ValueError,
         "calibrate takes class indices of shape (4,), one for each row of the logits, got torch.float32 (4, 6)."),
    *(
        Case(f"teacher calibrated by {value}", teaching(value), ValueError,
             f"temperature must be a positive, finite number, got {value}. {USUAL}")
        for value in (0.0, -1.0, math.inf)
    ),
    *(
        Case(f"teacher calibrated by {value!r}", teaching(value), TypeError,
             f"calibration must be a number, a file of kd-lightning calibrate, or a Calibration, got {value!r}.")
        for value in (True, [2.0])
    ),
    Case("no file of a calibration", teaching("none/teacher.json"), FileNotFoundError,
         f"there is no calibration at 'none/teacher.json' (from the folder {str(Path.cwd())!r})."),
    Case("a file of something else", of_no_calibration, ValueError,
         f"{FILE} is no calibration: kd-lightning calibrate, or Calibration.save, writes one."),
    Case("temperatures of other classes", teaching(Calibration((1.0, 2.0))), ValueError,
         "the calibration has 2 temperatures, one for each class, but the logits have 6 classes."),
    Case("calibration of another teacher", lambda: Calibration((2.0,), "0" * 32).check("1" * 32), ValueError,
         "the calibration is of the teacher with fingerprint 00000000, but this teacher's is 11111111: fit it anew "
         "with kd-lightning calibrate."),
    Case("export of weights with a temperature", exported(2.0, "student.safetensors"), ValueError,
         "safetensors hold weights and no computation that could divide by the temperature 2: take the format "
         "'torch.export' or 'onnx'."),
    Case("export with temperature 0", exported(0.0, "student.pt2"), ValueError,
         f"temperature must be a positive, finite number, got 0.0. {USUAL}"),
]  # fmt: skip
