"""Bad input of the rule that suggests a temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from kd_lightning.functional import suggest_temperature
from tests.unit.bad_input.case import Case

LOGITS = torch.tensor([[4.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
INF = math.inf


def suggested(logits: Any = LOGITS, **options: Any) -> Callable[[], object]:
    return lambda: suggest_temperature(logits, **options)


CASES = [
    Case("suggestion for a list", suggested([[1.0, 2.0]]), TypeError,
         "teacher_logits must be a tensor of logits, got list."),
    Case("both rules", suggested(entropy=0.5, top_probability=0.5), ValueError,
         "give entropy or top_probability, not both, got 0.5 and 0.5: one temperature sets one of them."),
    *(
        Case(f"{name} {value!r}", suggested(**{name: value}), ValueError,
             f"{name} must lie between 0 and 1, both excluded, got {value}.")
        for name in ("entropy", "top_probability")
        for value in (0, 1.0, -0.5, math.nan)
    ),
    Case("entropy as a text", suggested(entropy="0.5"), TypeError, "entropy must be a number, got '0.5'."),
    *(
        Case(f"suggestion for logits with {value}", suggested(torch.tensor([[1.0, value]])), ValueError,
             "the teacher's logits must be finite, or -inf for a masked class, got NaN or +inf.")
        for value in (math.nan, INF)
    ),
    Case("suggestion for one class", suggested(torch.zeros(3, 1)), ValueError,
         "no row of the teacher's logits, of shape (3, 1), has two classes that are not masked, so that no temperature "
         "changes a target."),
    Case("suggestion for one-hot rows", suggested(torch.tensor([[-INF, 2.0], [1.0, -INF]])), ValueError,
         "no row of the teacher's logits, of shape (2, 2), has two classes that are not masked, so that no temperature "
         "changes a target."),
    Case("suggestion for uniform rows", suggested(torch.ones(3, 4), entropy=0.5), ValueError,
         "no temperature between 0.05 and 100 gives entropy=0.5: the teacher's logits, whose standard deviation over "
         "the classes is 0, give 1 to 1. Give logits of a trained network."),
    Case("suggestion for rows that stay one-hot", suggested(torch.tensor([[1e6, 0.0, -1e6]]), entropy=0.5), ValueError,
         "no temperature between 0.05 and 100 gives entropy=0.5: the teacher's logits, whose standard deviation over "
         "the classes is 1e+06, give 0 to 0. Give logits of a trained network."),
    Case("uniform rows by top probability", suggested(torch.ones(3, 4), top_probability=0.5), ValueError,
         "no temperature between 0.05 and 100 gives top_probability=0.5: the teacher's logits, whose standard "
         "deviation over the classes is 0, give 0.25 to 0.25. Give logits of a trained network."),
]  # fmt: skip
