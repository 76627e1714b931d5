"""``kd-lightning fit|validate|test|predict --config …``: LightningCLI over this library's modules and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

# imported so that their short names work in YAML
import kd_lightning.datamodules
import kd_lightning.models
import kd_lightning.temperature  # noqa: F401
from kd_lightning import ClassificationModule, DistillationModule  # noqa: F401

__all__ = ["KDLightningCLI", "SaveRunConfig", "main"]


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
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Trainer, "trainer")
        # not required by the parser: `--ckpt_path` alone brings the model's configuration
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)

    @override
    def _parse_ckpt_path(self) -> None:
        subcommand = self.config.get("subcommand")
        if not subcommand:
            return
        if self.config[subcommand].get("model") is None:
            super()._parse_ckpt_path()
        if self.config[subcommand].get("model") is None:
            self.parser.error(
                "no model was given. Name a configuration (--config configs/digits.yaml), a class (--model "
                "DistillationModule …), or a checkpoint made by this command (--ckpt_path …)."
            )
        if self.config[subcommand].get("ckpt_path"):
            rank_zero_info("Weights come from --ckpt_path; the configuration is the one given here.")


def main(args: ArgsType = None) -> None:
    """Entry point of the command ``kd-lightning``.

    Args:
        args: Command line arguments; None: those of the process.
    """
    options: dict[str, Any] = {"overwrite": False, "config_filename": "run_config.yaml"}
    KDLightningCLI(
        save_config_callback=SaveRunConfig,
        save_config_kwargs=options,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        args=args,
    )
