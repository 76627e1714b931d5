"""Figures: arrays, or a temperature to draw, in; a matplotlib Figure out. Needs ``pip install kd-lightning[plots]``."""

from kd_lightning.plotting.search import plot_sweep, plot_temperature_finder
from kd_lightning.plotting.softening import plot_softening
from kd_lightning.plotting.temperature import plot_schedule, plot_temperature_grid, plot_temperature_history

__all__ = [
    "plot_schedule",
    "plot_softening",
    "plot_sweep",
    "plot_temperature_finder",
    "plot_temperature_grid",
    "plot_temperature_history",
]
