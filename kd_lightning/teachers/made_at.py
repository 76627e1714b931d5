"""Outputs of a teacher that were made at a temperature of its own, brought back to logits at temperature 1."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import Tensor

from kd_lightning.functional import Sparse
from kd_lightning.functional.rows import check_option
from kd_lightning.functional.sparse import TOLERANCE
from kd_lightning.functional.temperature import check_values, compute_dtype
from kd_lightning.teachers.teacher import Teacher

Output: TypeAlias = Literal["logits", "log_probs", "probs"]


class MadeAt(Teacher):
    r"""Base class of the teachers whose outputs may be probabilities, and made at a temperature :math:`T_0`.

    Log-probabilities :math:`\log p` made at :math:`T_0` are the logits over :math:`T_0`, up to a shift, so that
    :math:`T_0 \log p` are logits and :math:`\mathrm{softmax}(T_0 \log p / T) \propto p^{T_0 / T}` is exact at every T.

    Args:
        output: ``"logits"``, ``"log_probs"`` (natural) or ``"probs"``. A probability that underflowed to 0 stays 0 at
            every temperature, so log-probabilities are the better choice.
        temperature: :math:`T_0`, positive and finite; 1 for logits and a plain softmax. With ``"logits"`` they are
            taken as divided by it.
    """

    def __init__(self, output: Output = "logits", temperature: float = 1.0) -> None:
        check_option("output", output, get_args(Output))
        if not 0 < temperature < float("inf"):
            raise ValueError(
                "temperature is the one at which the teacher's outputs were made: it must be positive and finite, got "
                f"{temperature!r}. A plain softmax has 1; the temperature of the distillation is the Distiller's."
            )
        self.output: Output = output
        self.temperature = temperature

    def to_logits(self, values: Tensor) -> Tensor:
        """Return the logits at temperature 1, up to a shift, of outputs as the teacher gives them."""
        if self.output == "logits" and self.temperature == 1:
            return values
        values = values.to(compute_dtype(values))
        if self.output != "logits":
            self._check_probabilities(values)
        logits = values.log() if self.output == "probs" else values
        return logits if self.temperature == 1 else logits * self.temperature

    def as_given(self, target: Sparse) -> Sparse:
        """Return targets that were made at a temperature of their own, or raise if the teacher declares another."""
        if self.output == "logits" and self.temperature == 1:
            return target
        raise ValueError(
            f"the teacher gives Sparse targets made at temperature {target.temperature:g}, but {type(self).__name__} "
            f"was told {self._made_at}. Leave out output and temperature: Sparse(..., temperature=...) has them."
        )

    def _check_probabilities(self, values: Tensor) -> None:
        name = "probabilities" if self.output == "probs" else "log-probabilities"
        message = (
            f"output={self.output!r} says that the teacher gives {name}, which must be of one distribution for each "
            "sample (not negative, of sum 1 within 0.01), but these are not. Declare what they are: output='logits', "
            "'log_probs' or 'probs'."
        )
        if self.output == "probs":
            check_values(~(values < 0).any(), message)
        if values.dim() == 2 and len(values):  # because the padding of tokens (B, L, V) may hold anything
            total = values.sum(1) if self.output == "probs" else values.exp().sum(1)
            check_values(((total - 1).abs() < TOLERANCE).all(), message)

    @property
    def _made_at(self) -> str:
        return f"output={self.output!r}, temperature={self.temperature:g}"
