"""A teacher's own temperature: fitted to held-out labels, kept in a file, and divided out of its logits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_lightning.functional.calibration import scaled_logits
from kd_lightning.functional.temperature import checked_number, compute_dtype, is_number
from kd_lightning.teachers.calls import HiddenStates
from kd_lightning.teachers.weights import hashed


@dataclass(frozen=True)
class Calibration:
    """A network's own temperature, and what it changed; see :func:`kd_lightning.calibrate`.

    Attributes:
        temperature: One number, or one for each class.
        fingerprint: Of the teacher that it was fitted for; None fits any.
        nll: Negative log-likelihood of the labels before and after, in nats.
        calibration_error: Expected calibration error before and after, 15 bins.
        count: The number of labels.

    Example:
        >>> calibration = Calibration((2.0,))
        >>> calibration.apply(torch.tensor([[4.0, 0.0]]))
        tensor([[2., 0.]])
    """

    temperature: tuple[float, ...]
    fingerprint: str | None = None
    nll: tuple[float, float] | None = None
    calibration_error: tuple[float, float] | None = None
    count: int = 0

    @classmethod
    def of(cls, given: Calibration | float | str | Path) -> Calibration:
        """Return the calibration of a number or a file; one as it is."""
        if isinstance(given, Calibration):
            return given
        if is_number(given):
            return cls((checked_number(given),))
        if not isinstance(given, (str, Path)):
            raise TypeError(
                f"calibration must be a number, a file of kd-lightning calibrate, or a Calibration, got {given!r}."
            )
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"there is no calibration at {str(path)!r} (from the folder {str(Path.cwd())!r}).")
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
            numbers = tuple(checked_number(number) for number in content.pop("temperature"))
            lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
            return cls(numbers, **(content | lists))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is no calibration: kd-lightning calibrate, or Calibration.save, writes one."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the calibration to a JSON file, which ``FrozenTeacher(calibration=path)`` reads."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def check(self, fingerprint: str) -> None:
        """Raise if the calibration was fitted for a teacher with another fingerprint."""
        if self.fingerprint not in (None, fingerprint):
            raise ValueError(
                f"the calibration is of the teacher with fingerprint {str(self.fingerprint)[:8]}, but this teacher's "
                f"is {fingerprint[:8]}: fit it anew with kd-lightning calibrate."
            )

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits divided by the temperature, in float32; ``(…, C)`` where each class has one."""
        if not isinstance(logits, Tensor):
            raise ValueError(
                "a calibration is of one tensor of logits, but OutputsKDLoss takes several outputs of this teacher, "
                f"{', '.join(logits)}: leave calibration out, or name one output."
            )
        logits = logits.to(compute_dtype(logits))
        if len(self.temperature) == 1:
            return logits / self.temperature[0]
        if len(self.temperature) != logits.shape[-1]:
            raise ValueError(
                f"the calibration has {len(self.temperature)} temperatures, one for each class, but the logits have "
                f"{logits.shape[-1]} classes."
            )
        return scaled_logits(logits, _on_device(self.temperature, logits.device))

    def apply_hidden(self, states: HiddenStates) -> HiddenStates:
        """Return hidden states whose output layer gives calibrated logits; raise if each class has a temperature."""
        t, *others = self.temperature
        if others:
            raise ValueError(
                "a calibration of each class needs the logits, which FusedLinearKDLoss never has. Take KDLoss, or one "
                "temperature."
            )
        hidden, weight, bias = states
        return HiddenStates(hidden / t, weight, None if bias is None else bias / t)

    def fingerprint_with(self, teacher: str) -> str:
        """Return the fingerprint of a calibrated teacher."""
        return hashed(f"{teacher} calibration {self.temperature}")

    def __str__(self) -> str:
        t = self.temperature
        shown = f"T = {t[0]:.4g}" if len(t) == 1 else f"T from {min(t):.4g} to {max(t):.4g}, one for each class"
        if self.nll is None or self.calibration_error is None:
            return shown
        nll, ece = self.nll, self.calibration_error
        return (
            f"{shown}, of {self.count} labels: NLL {nll[0]:.4g} -> {nll[1]:.4g}, "
            f"expected calibration error {ece[0]:.4g} -> {ece[1]:.4g}"
        )


@lru_cache(maxsize=16)
def _on_device(temperature: tuple[float, ...], device: torch.device) -> Tensor:
    """Copy the temperatures to the device once, because each copy would sync."""
    return torch.tensor(temperature, dtype=torch.float32).to(device)
