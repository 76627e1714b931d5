"""A temperature of this project's own; student.yaml names it as mine.SawTooth."""

from dataclasses import dataclass

from kd_lightning.schedules import Progress, Schedule


@dataclass(frozen=True)
class SawTooth(Schedule):
    """A temperature that falls from high to low several times in a run.

    Attributes:
        high: Temperature at the start of each tooth.
        low: Temperature that each tooth approaches.
        teeth: Number of teeth in the run.
    """

    high: float = 8.0
    low: float = 2.0
    teeth: int = 3

    def __call__(self, progress: Progress) -> float:
        """Return the temperature at this point of training."""
        return self.high + (self.low - self.high) * (progress.fraction * self.teeth % 1.0)
