"""Bad patterns of metrics' names."""

from kd_lightning.callbacks import MetricNames
from tests.unit.bad_input.case import Case

CASES = [
    Case(
        f"pattern {pattern!r}",
        lambda pattern=pattern: MetricNames(pattern),
        ValueError,
        "the pattern of MetricNames must have the fields {stage} and {name}, once each, and no other, got "
        f"{pattern!r}. '{{stage}}/{{name}}' gives val/acc.",
    )
    for pattern in ("", "train/", "{stage}", "{name}", "{stage}/{metric}", "{}/{}", "{stage}/{name}/{name}")
]
