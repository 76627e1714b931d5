"""Callbacks that move, watch, search and check the temperature of a run."""

from kd_lightning.callbacks.adaptive_temperature import AdaptiveTemperature

__all__ = ["AdaptiveTemperature"]
