"""The state of the temperature under weight averaging, which swaps all buffers."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from kd_lightning._lightning import callbacks_of
from kd_lightning.distiller import Distiller


class KeepsTemperatureState(LightningModule):
    """A LightningModule whose temperature keeps its state under ``WeightAveraging``, because the state is no weight."""

    distiller: Distiller
    _temperature_state: dict[str, Tensor] | None = None

    def live_temperature_state(self) -> dict[str, Tensor]:
        """Return the buffers of all policies by their names in the module's state dict, without copies."""
        return {
            f"distiller.{prefix}.{name}": buffer.detach()
            for prefix, policy in self.distiller.policies().items()
            for name, buffer in policy.named_buffers()
        }

    def _keep_temperature_state(self) -> None:
        self._temperature_state = {name: value.clone() for name, value in self.live_temperature_state().items()}

    def _put_temperature_state_back(self) -> None:
        live = self.live_temperature_state()
        for name, value in (self._temperature_state or {}).items():
            live[name].copy_(value)

    @property
    def _weights_are_averaged(self) -> bool:
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        return fitting and any(isinstance(callback, WeightAveraging) for callback in callbacks_of(self.trainer))

    @override
    def on_validation_start(self) -> None:
        if self._weights_are_averaged:
            self._keep_temperature_state()

    @override
    def on_validation_epoch_start(self) -> None:
        if self._weights_are_averaged:
            self._put_temperature_state_back()

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self._weights_are_averaged:
            self._keep_temperature_state()

    @override
    def on_train_end(self) -> None:
        if self._weights_are_averaged:
            self._put_temperature_state_back()
