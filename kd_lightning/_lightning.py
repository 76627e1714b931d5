"""The parts of Lightning that are private or untyped: one function each, with the reason, for the whole package.

``tests/unit/test_lightning_private.py`` has a test for each, which fails where a release of Lightning moves one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.parsing import collect_init_args
from typing_extensions import override

# ---- public, but set by connectors, so that type checkers do not see them -----------------------------------------


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the trainer's callbacks."""
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  (set by a connector)


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """Return the data module of the run, or None where loaders were given."""
    return getattr(trainer, "datamodule", None)


def log_interval(trainer: Trainer) -> int:
    """Return ``log_every_n_steps``; 0 turns logging in steps off."""
    return trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]  (set by a connector)


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return the module's trainer, or None before it has one, where the property ``trainer`` raises."""
    try:
        return module.trainer
    except RuntimeError:
        return None


# ---- private ------------------------------------------------------------------------------------------------------


def accumulates(trainer: Trainer) -> bool:
    """Return True where the current batch's gradients are kept for a later batch's optimiser step.

    Lightning has no public name for it: ``batch_idx`` and ``accumulate_grad_batches`` leave out the last batch of an
    epoch, which always steps.
    """
    return trainer.fit_loop._should_accumulate()


def batches_done(trainer: Trainer) -> int:
    """Return the batches of this epoch that were trained on before, which is 0 but after a resume within the epoch.

    Read it once an epoch, before its first step ends: the count of the epoch before stands until the first batch.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return 0 if progress.is_last_batch else progress.current.processed  # pyright: ignore[reportAttributeAccessIssue]


def logged_step(trainer: Trainer) -> int:
    """Return the step that ``self.log`` writes for the batch that ended.

    ``global_step`` counts the steps of all optimisers, so that its values would stand beside those of the losses.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def updates_logs(trainer: Trainer) -> bool:
    """Return True in ``on_train_batch_end`` of a step whose values Lightning writes to its loggers."""
    return trainer._logger_connector.should_update_logs


def train_loader(trainer: Trainer) -> Any:
    """Return the training loaders as given, in ``setup``, before ``trainer.train_dataloader`` exists."""
    return trainer.fit_loop._data_source.dataloader()


def data_sources(trainer: Trainer) -> list[Any]:
    """Return the training and the validation loaders as given, or the module that makes them.

    Lightning asks a module for its loaders each time, and asking may draw random numbers.
    """
    loop = trainer.fit_loop
    return [loop._data_source.instance, loop.epoch_loop.val_loop._data_source.instance]


def forget_run(trainer: Trainer) -> None:
    """Drop the loaders, metrics and resume flags of a fit loop that has run, so that it runs as if for the first time.

    Lightning has no public name for it: its learning rate finder resets the loaders in the same way, and the metrics
    are reset as before ``on_fit_start``.
    """
    loop = trainer.fit_loop
    steps, validation = loop.epoch_loop, loop.epoch_loop.val_loop
    loop._combined_loader = validation._combined_loader = None
    loop._last_train_dl_reload_epoch = validation._last_val_dl_reload_epoch = float("-inf")
    for part in (loop, steps, validation, steps.automatic_optimization, steps.manual_optimization):
        part.on_iteration_done()
    for results in (steps._results, validation._results):
        results.clear()
    trainer._logger_connector.reset_results()
    trainer._logger_connector.reset_metrics()


def is_sequential(loader: CombinedLoader) -> bool:
    """Return True where the loader's batches come from one of its loaders after the other, not from all at once."""
    return loader._mode == "sequential"


def is_compiled(module: LightningModule) -> bool:
    """Return True where ``torch.compile`` replaced the methods of the LightningModule."""
    return getattr(module, "_compiler_ctx", None) is not None


def is_given_by_cli() -> bool:
    """Return True while LightningCLI makes a module, whose configuration ``save_hyperparameters`` then saves."""
    return _given_hyperparameters.get() is not None


def init_arguments(module: LightningModule) -> dict[str, list[Any]]:
    """Return the values of each argument of the ``__init__`` methods that are running, a subclass's and its bases'.

    They are the arguments that ``module.save_hyperparameters()`` would save, so that those that are no primitives can
    be named in its ``ignore``. Lightning finds them in the frames of the callers.
    """
    frame = inspect.currentframe()
    assert frame is not None
    values: dict[str, list[Any]] = {}
    for arguments in collect_init_args(frame, [], classes=(type(module),)):
        for name, value in arguments.items():
            values.setdefault(name, []).append(value)
    return values


def state_key(callback: Callback, **settings: Any) -> str:
    """Return the key of a callback's state in checkpoints: its class and the settings that tell two of them apart."""
    return callback._generate_state_key(**settings)


def load_file(path: Any, weights_only: bool) -> Any:
    """Return the content of a checkpoint that may be a URL or an open file, as ``load_from_checkpoint`` reads it."""
    return _load(path, map_location="cpu", weights_only=weights_only)


restricted_classmethod = _restricted_classmethod
"""A class method that raises where it is called on an instance, as ``load_from_checkpoint`` is one."""


FIRST_LOOK = "_on_before_batch_transfer"
"""The method of a LightningModule that is given each batch before any hook, and before the transfer to the device."""


class FirstLookModule(LightningModule):
    """A LightningModule that is given each batch before any hook, and before the transfer to the device.

    The public hook ``on_before_batch_transfer`` is the user's, and a user's override need not call ours.
    """

    def take_batch(self, batch: Any) -> Any:
        """Return the batch that hooks, callbacks and steps get."""
        return batch

    @override
    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        return super()._on_before_batch_transfer(self.take_batch(batch), dataloader_idx)

    def prepare_batch(self, batch: Any) -> Any:
        """Return a batch of a loader as a step would get it: after all batch hooks, on the module's device."""
        return self.trainer.strategy.batch_to_device(self._on_before_batch_transfer(batch), self.device)


class CommandLine(LightningCLI):
    """A LightningCLI with subcommands that are functions, where Lightning's are methods of the Trainer.

    Typed options keep their values, over which Lightning would write the hyper-parameters of ``--ckpt_path``.
    """

    commands: Mapping[str, Any]
    """Commands beside the Trainer's: ``help`` is a text, ``extend(parser)`` adds arguments and returns their names."""
    parsed: Sequence[str]
    """The names of the commands that get a parser."""

    def extend_trainer_command(self, command: str, parser: LightningArgumentParser) -> None:
        """Add arguments to a method of the Trainer, for ``before_<command>`` to read."""

    def setting(self, name: str) -> Any:
        """Return a setting of the command that was given."""
        return self._get(self.config, name)

    def own_arguments(self, command: str) -> list[str]:
        """Return the names of a command's own arguments, beside model, data and trainer."""
        return self._subcommand_method_arguments[command]

    def values(self, command: str) -> dict[str, Any]:
        """Return a command's own arguments by name, with model and data, after they were built."""
        return self._prepare_subcommand_kwargs(command)

    def run_command(self, command: str) -> None:
        """Run a command: here a method of the Trainer."""
        super()._run_subcommand(command)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        self.run_command(subcommand)

    @override
    def _parse_ckpt_path(self) -> None:
        pass

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        subcommands = parser.add_subcommands()
        for name in self.parsed:
            command = self.commands.get(name)
            if command is None:
                subparser = self._prepare_subcommand_parser(Trainer, name, **kwargs.get(name, {}))
                self.extend_trainer_command(name, subparser)
            else:
                subparser = self.init_parser(description=command.help)
                self._add_arguments(subparser)
                self._subcommand_method_arguments[name] = command.extend(subparser)
            self._subcommand_parsers[name] = subparser
            subcommands.add_subcommand(name, subparser)
