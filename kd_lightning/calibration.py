"""Temperature scaling of a teacher, or of a student that gets out: the temperature that held-out labels ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.functional.calibration import fit_temperature
from kd_lightning.metrics import CalibrationError
from kd_lightning.teachers import Teacher, extract_logits
from kd_lightning.teachers.calibration import Calibration
from kd_lightning.teachers.frozen import as_teacher


def calibrate(
    teacher: nn.Module | Teacher,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    per_class: bool = False,
    class_dim: int = -1,
    ignore_index: int = -100,
    extract: Callable[[Any], Tensor] = extract_logits,
) -> Calibration:
    """Fit a teacher's own temperature to held-out labels; see :func:`~kd_lightning.functional.fit_temperature`.

    Args:
        teacher: The network, which is frozen in place, or a teacher of one network.
        batches: Pairs of inputs and class indices, of data that the teacher was not trained on. All logits are kept
            in memory.
        per_class: Whether to fit a temperature for each class.
        class_dim: The dimension of the classes.
        ignore_index: Label of the positions that do not count.
        extract: Finds the logits in the network's output.

    Returns:
        The calibration: ``calibration.save(path)``, ``FrozenTeacher(network, calibration=path)``.

    Raises:
        TypeError: If the teacher gives no logits of one network.
        ValueError: If the teacher is calibrated already, no batch has a label, targets are no class indices, or
            fit_temperature raises.

    Example:
        >>> teacher = nn.Linear(2, 2, bias=False)
        >>> _ = teacher.weight.data.copy_(4 * torch.eye(2))
        >>> inputs, targets = torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
        >>> calibration = calibrate(teacher, [(inputs, targets)])
        >>> round(calibration.temperature[0], 3), calibration.count  # right in 3 of 4: T = 4 / log 3
        (3.641, 4)
    """
    frozen = as_teacher(teacher)
    assert frozen is not None
    if getattr(frozen, "calibration", None) is not None:
        raise ValueError("this teacher is calibrated already: leave its calibration out to fit it anew.")
    rows, labels = [], []
    for inputs, targets in batches:
        logits = frozen.logits(inputs, None, extract)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"calibrate takes a teacher of one network, got {type(frozen).__name__}. Calibrate each member by "
                "itself."
            )
        logits = logits.movedim(class_dim, -1)
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != logits.shape[:-1]:
            got = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(
                f"calibrate takes class indices of shape {tuple(logits.shape[:-1])}, one for each row of the logits, "
                f"got {got}."
            )
        targets = targets.to(logits.device)
        counts = targets != ignore_index
        rows.append(logits[counts].float())
        labels.append(targets[counts])
    if not sum(map(len, labels)):
        raise ValueError("calibrate needs labels of data that the teacher was not trained on, got none.")
    logits, targets = torch.cat(rows), torch.cat(labels)
    temperature = fit_temperature(logits, targets, per_class=per_class)
    fitted = Calibration(tuple(temperature.tolist()), frozen.fingerprint())
    scores = [_scores(each, targets) for each in (logits, fitted.apply(logits))]
    nll, error = zip(*scores, strict=True)
    return Calibration(fitted.temperature, fitted.fingerprint, nll, error, len(targets))


def _scores(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    error = CalibrationError(ignore_index=None).to(logits.device)
    error.update(logits, targets)
    return float(nn.functional.cross_entropy(logits, targets)), float(error.compute())
