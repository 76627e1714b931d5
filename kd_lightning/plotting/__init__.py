"""Pictures: arrays and policies in, matplotlib figures out."""

from kd_lightning.plotting.figures import (
    plot_schedule,
    plot_softening,
    plot_sweep,
    plot_temperature_finder,
    plot_temperature_grid,
    plot_temperature_history,
)

__all__ = [
    "plot_schedule",
    "plot_softening",
    "plot_sweep",
    "plot_temperature_finder",
    "plot_temperature_grid",
    "plot_temperature_history",
]
