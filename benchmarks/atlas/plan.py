"""Studies of the atlas: the trainings of each, in the order in which they are run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.atlas.arms import BALANCED, CONSTANTS, NONE, constants
from benchmarks.atlas.rows import PLAIN, Arm, Key, Setting
from benchmarks.atlas.tasks import RATES, STEPS, TASKS


class Study(NamedTuple):
    """Arms that are trained in each of some settings."""

    settings: Sequence[Setting]
    arms: Sequence[Arm]

    def keys(self) -> Iterator[Key]:
        for setting in self.settings:
            task = TASKS[setting.task]
            rates = task.rates[setting.optimizer]
            for arm, seed, rate in itertools.product(self.arms, range(task.seeds), rates):
                yield Key(*setting[:4], *arm, rate, seed, setting.teacher)


TEACHERS = (PLAIN, "smoothed", "longer", "calibrated")
_FEW, _MANY = Setting("digits", "few", "adamw", "x1"), Setting("digits", "many", "adamw", "x1")
_FREQUENCY: list[Arm] = [("ClassFrequencyTemperature rare_high", 0.0), ("ClassFrequencyTemperature rare_low", 0.0)]


def _fixed(*temperatures: float) -> list[Arm]:
    return [arm for arm in constants(*temperatures) if arm[0] == "fixed"]


_TEACHERS = [_FEW._replace(teacher=kind) for kind in TEACHERS[1:]]
_ALL = [NONE, *_fixed(1.0, 2.0, 4.0, 8.0, 16.0)]
STUDIES = {
    "constants": Study(
        [
            Setting(task, images, optimizer, length)
            for task, length, images, optimizer in itertools.product(
                ("digits", "mnist5k"), STEPS, ("few", "many"), RATES
            )
        ],
        [NONE, *CONSTANTS],
    ),
    "policies": Study([_FEW], BALANCED),
    "teachers": Study(_TEACHERS, _fixed(1.0, 4.0, 16.0)),
    "long tail": Study([Setting("digits", "longtail", "adamw", "x1")], [*_ALL, *_FREQUENCY]),
    "time series": Study([Setting("vowels", "few", "adamw", "x1")], _ALL),
    "bytes": Study([Setting("bytes", "many", "adamw", "x1")], [NONE, *_fixed(1.0, 2.0, 4.0)]),
    "cifar100": Study([Setting("cifar100", "many", "adamw", "x1")], [NONE, *_fixed(1.0, 4.0, 8.0)]),
    "policies, all labels": Study([_MANY], BALANCED),
    "time series, all labels": Study([Setting("vowels", "many", "adamw", "x1")], _ALL),
    "policies, mnist5k": Study([Setting("mnist5k", "few", "adamw", "x1")], BALANCED),
    "teachers, more": Study(_TEACHERS, _fixed(2.0, 8.0)),
    "teachers, all labels": Study([each._replace(images="many") for each in _TEACHERS], _fixed(1.0, 4.0, 16.0)),
    "bytes, token-wise": Study([Setting("bytes", "many", "adamw", "x1")], [("TokenDifficultyTemperature", 0.0)]),
    "policies, longer": Study([_FEW._replace(length="x4")], BALANCED),
    "teachers, all labels, more": Study([each._replace(images="many") for each in _TEACHERS], _fixed(2.0, 8.0)),
}
"""By name, in order of worth for a reader; which of them are run, time decides."""
