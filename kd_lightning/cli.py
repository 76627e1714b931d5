"""``kd-lightning fit|validate|test|predict|find-temperature --config …``: LightningCLI over this library's parts."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

# imported so that their short names work in YAML
import kd_lightning.datamodules
import kd_lightning.models
import kd_lightning.temperature  # noqa: F401
from kd_lightning import ClassificationModule, DistillationModule  # noqa: F401
from kd_lightning.callbacks import TemperatureFinder

__all__ = ["FindTemperatureCLI", "KDLightningCLI", "SaveRunConfig", "main"]


class SaveRunConfig(SaveConfigCallback):
    """Saves the configuration with the run, as ``run_config.yaml`` in its log folder, and never over another file."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir
        if log_dir is not None and not self.already_saved:
            name = Path(self.config_filename)
            taken = sum(1 for _ in Path(log_dir).glob(f"{name.stem}*{name.suffix}")) if trainer.is_global_zero else 0
            while trainer.is_global_zero and (Path(log_dir) / self.config_filename).exists():
                self.config_filename = f"{name.stem}-{taken}{name.suffix}"
                taken += 1
            self.config_filename = trainer.strategy.broadcast(self.config_filename)
        super().setup(trainer, pl_module, stage)


class KDLightningCLI(LightningCLI):
    """LightningCLI in subclass mode for model and data; what the user typed wins over what a checkpoint stored."""

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**{"allow_abbrev": False, **kwargs})

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = sys.argv[1:] if args is None else args
        if isinstance(given, list):
            with tempfile.TemporaryDirectory() as folder:
                super().parse_arguments(parser, _with_model_of_checkpoint(given, Path(folder)))
        else:
            super().parse_arguments(parser, args)

    @override
    def _parse_ckpt_path(self) -> None:
        """What the user typed stands: Lightning would put the checkpoint's hyper-parameters over it."""


class FindTemperatureCLI(KDLightningCLI):
    """``find-temperature``: a ``fit`` that ends after the search.

    ``--finder.candidates`` and the like set it up, unless the configuration has a finder among its callbacks.
    """

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(TemperatureFinder, "finder")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        configured = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        finder = next((callback for callback in configured if isinstance(callback, TemperatureFinder)), None)
        if finder is not None:
            self._parser(self.subcommand).callback_keys.remove("finder")
        else:
            finder = self._get(self.config_init, "finder")
        finder.find_only = True
        finder.plot_path = finder.plot_path or "temperature_finder.png"
        return super().instantiate_trainer(**kwargs)


def _with_model_of_checkpoint(args: list[str], folder: Path) -> list[str]:
    """Where a checkpoint is named but no model and no configuration, take the model's from the checkpoint."""
    options = [arg.partition("=")[0] for arg in args]
    if any(option in ("-c", "--config", "--model") for option in options) or "--ckpt_path" not in options:
        return args
    position = options.index("--ckpt_path")
    path = Path(args[position].partition("=")[2] or "".join(args[position + 1 : position + 2]))
    if not path.is_file():
        return args
    hparams = dict(torch.load(path, weights_only=True, map_location="cpu").get("hyper_parameters", {}))
    if "_class_path" not in hparams:
        raise ValueError(
            f"{path} was not made by this command, so it does not say which model it is of. Name a configuration as "
            "well: --config …"
        )
    config = folder / "model.yaml"
    arguments = {name: value for name, value in hparams.items() if not name.startswith("_")}
    config.write_text(yaml.safe_dump({"model": {"class_path": hparams["_class_path"], "init_args": arguments}}))
    return [args[0], "--config", str(config), *args[1:]]


def main(args: ArgsType = None) -> None:
    """Entry point of the command ``kd-lightning``.

    Args:
        args: Command line arguments; None: those of the process.
    """
    options: dict[str, Any] = {"overwrite": False, "config_filename": "run_config.yaml"}
    cli: type[KDLightningCLI] = KDLightningCLI
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["find-temperature"]:
        cli, args = FindTemperatureCLI, ["fit", *given[1:]]
    cli(
        parser_kwargs={"description": "Also: find-temperature --config …, which searches, and does not train further."},
        save_config_callback=SaveRunConfig,
        save_config_kwargs=options,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        args=args,
    )
