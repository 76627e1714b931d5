"""Statistics over ranks where there are none."""

from kd_lightning.temperature import EnergyTemperature
from tests.unit.bad_input.case import Case

CASES = [
    Case(
        "a threshold over ranks",
        lambda: EnergyTemperature(threshold=-2.0, sync=True),
        ValueError,
        "sync=True takes a share of the batches of all ranks, and threshold=-2.0 needs no batch. Give one of them.",
    )
]
