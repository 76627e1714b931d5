"""Bad temperatures, policies and schedules."""

from kd_lightning import temperature
from tests.unit.bad_input.case import Case


class NoSuper(temperature.TemperaturePolicy):
    def __init__(self) -> None:
        self.value = 4.0

    def compute(self, signals: temperature.Signals) -> temperature.Temperature:
        return temperature.Temperature(*[signals.full(self.value)] * 2)


CASES = [
    Case(
        "a policy without its base class",
        lambda: temperature.as_policy(NoSuper()),
        TypeError,
        "NoSuper.__init__ does not call super().__init__(). Call it first.",
    ),
    Case(
        "constant of zero",
        lambda: temperature.ConstantTemperature(0.0),
        ValueError,
        "temperature must be a positive, finite number within the policy's bounds [0.05, 100], got 0.0. "
        "Usual values lie between 1 and 20; the bounds are arguments.",
    ),
]
