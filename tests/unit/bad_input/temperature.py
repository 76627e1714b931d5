"""Bad temperatures, policies and schedules."""

from kd_lightning import temperature
from tests.unit.bad_input.case import Case

CASES = [
    Case(
        "constant of zero",
        lambda: temperature.ConstantTemperature(0.0),
        ValueError,
        "temperature must be a positive, finite number within the policy's bounds [0.05, 100], got 0.0. "
        "Usual values lie between 1 and 20; the bounds are arguments.",
    ),
]
