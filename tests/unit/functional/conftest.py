"""Two independent yardsticks: recorded reference values, and the equations in 50-digit decimal arithmetic.

Nothing here imports the library or torch: a mistake cannot be on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import pytest

Row = Sequence[Decimal]
RowLoss = Callable[[Row, Row], Decimal]


@contextmanager
def fifty_digits() -> Iterator[None]:
    with localcontext() as context:
        context.prec = 50
        yield


class Exact:
    """Distillation equations on one row of logits, as their publications write them: probabilities, then logarithms."""

    @staticmethod
    def softmax(logits: Row, temperature: Decimal) -> list[Decimal]:
        powers = [(z / temperature).exp() for z in logits]
        return [power / sum(powers) for power in powers]

    @staticmethod
    def kl(p: Row, q: Row) -> Decimal:
        """KL(p ‖ q)."""
        return sum((a * (a / b).ln() for a, b in zip(p, q, strict=True)), Decimal(0))

    @staticmethod
    def value(row_loss: RowLoss, student: Sequence[float], teacher: Sequence[float]) -> float:
        with fifty_digits():
            return float(row_loss([Decimal(z) for z in student], [Decimal(z) for z in teacher]))

    @staticmethod
    def gradient(row_loss: RowLoss, student: Sequence[float], teacher: Sequence[float]) -> list[float]:
        """With respect to the student's logits, by central differences: exact to 20 digits at this precision."""
        with fifty_digits():
            s, t = [Decimal(z) for z in student], [Decimal(z) for z in teacher]
            step = Decimal("1e-12")

            def shifted(k: int, by: Decimal) -> Decimal:
                return row_loss([*s[:k], s[k] + by, *s[k + 1 :]], t)

            return [float((shifted(k, step) - shifted(k, -step)) / (2 * step)) for k in range(len(s))]

    @staticmethod
    def derivative(function: Callable[[Decimal], Decimal], at: float) -> float:
        """Return the derivative of a function of one number, such as a loss of its temperature."""
        with fifty_digits():
            x, step = Decimal(at), Decimal("1e-12")
            return float((function(x + step) - function(x - step)) / (2 * step))


@pytest.fixture(scope="session")
def exact() -> type[Exact]:
    return Exact


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """Recorded values in float64 for one batch; the file says how they are defined."""
    return json.loads((Path(__file__).parent / "reference_values.json").read_text())
