"""LightningCLI over this library's parts: parsing, the model of a checkpoint, and a table of further commands."""

from __future__ import annotations

import inspect
import signal
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

# YAML accepts the short name of a class only once its module is imported
import kd_lightning.callbacks
import kd_lightning.datamodules
import kd_lightning.layers
import kd_lightning.models
import kd_lightning.modules
import kd_lightning.temperature  # noqa: F401
from kd_lightning._lightning import CommandLine
from kd_lightning.configuration.diagnosis import diagnose, first_error, refuse_helps
from kd_lightning.configuration.resume import (
    check_one_start,
    checkpoint_to_measure,
    checkpoint_to_resume,
    warn_of_restarts,
)
from kd_lightning.configuration.written import CommandLineError, Written, dotted, guess, setting_at
from kd_lightning.modules.checkpoint_settings import check_settings, read_checkpoint


@dataclass(frozen=True)
class Command:
    """A command of the command line beside Lightning's fit, validate, test and predict.

    Attributes:
        function: Does the work. Called with ``trainer``, ``model``, ``datamodule`` and the command's own arguments, all
            by name. The first line of its docstring is the command's help.
        add_arguments: Adds the command's own arguments to its parser and returns their names. None: the arguments of
            ``function`` are added.
        spelling: Maps an option as typed, without its value, to the option of the parser.
        logs: Whether the command writes to the trainer's logger.
        owner: The function that has the command's arguments, if ``function`` passes them on.
        builds: Whether trainer, model and data are built beforehand. Otherwise ``function`` receives the parsed
            configuration, ``config``, in their place.
        adjust: Changes the parsed configuration before anything is built, given the settings as they were written.
    """

    function: Callable[..., None]
    add_arguments: Callable[[LightningArgumentParser], list[str]] | None = None
    spelling: Callable[[str], str] = str
    logs: bool = True
    builds: bool = True
    adjust: Callable[[Any, Mapping[str, Any]], None] | None = None
    owner: Callable[..., Any] | None = None

    @property
    def help(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def spell(self, args: list[str]) -> list[str]:
        """Return the arguments with every option in the parser's spelling."""
        options = [arg.partition("=") for arg in args]
        return [
            (self.spelling(name) if name.startswith("--") else name) + equals + value for name, equals, value in options
        ]

    def extend(self, parser: LightningArgumentParser) -> list[str]:
        """Add the command's own arguments to the parser and return their names."""
        if not self.logs:
            parser.set_defaults({"trainer.logger": False})
        if self.add_arguments is not None:
            return self.add_arguments(parser)
        return parser.add_function_arguments(self.function, skip={"trainer", "model", "datamodule"})


class SaveRunConfig(SaveConfigCallback):
    """A callback that saves the configuration as ``run_config.yaml`` in the log folder and overwrites no other file."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir
        if log_dir is not None and not self.already_saved:
            name = Path(self.config_filename)
            names = chain([name.name], (f"{name.stem}-{number}{name.suffix}" for number in count(1)))
            free = (other for other in names if not (Path(log_dir) / other).exists())
            self.config_filename = trainer.strategy.broadcast(next(free) if trainer.is_global_zero else name.name)
        super().setup(trainer, pl_module, stage)


class KDLightningCLI(CommandLine):
    """LightningCLI in subclass mode for model and data, in which typed options win over a checkpoint's settings.

    Args:
        commands: Further commands by name, beside those of :class:`~lightning.pytorch.cli.LightningCLI`.
        options: Options of :class:`~lightning.pytorch.cli.LightningCLI`.
    """

    def __init__(self, *, commands: Mapping[str, Command] | None = None, **options: Any) -> None:
        # LightningCLI does all of its work in __init__, so these come first
        self.commands = dict(commands or {})
        self.names = [*self.subcommands(), *self.commands]
        args = options.get("args")
        self.args: list[str] | None = None
        if isinstance(args, list):
            command = self.commands.get(str(Written(args).command))
            self.args = args if command is None else command.spell(args)
        self.written = None if self.args is None else Written(self.args)
        given = None if self.written is None else self.written.command
        self.parsed = [given] if given in self.names else self.names  # because a parser takes a fifth of a second
        super().__init__(**options)

    # ---- parsing ----------------------------------------------------------------------------------------------------

    @override
    def extend_trainer_command(self, command: str, parser: LightningArgumentParser) -> None:
        if command == "fit":
            parser.add_argument("--resume", choices=["auto"], default=None)

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**{"allow_abbrev": False, "exit_on_error": False, **kwargs})

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_default_arguments_to_parser(parser)
        parser.add_argument(
            "--num_threads",
            type=Optional[PositiveInt],  # noqa: UP045  # pyright: ignore[reportArgumentType]  (made at run time)
            default=None,
            help="CPU threads of one operation; default torch's, one per core. Small networks are faster with 1, much "
            "so where other work has the cores.",
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        written, given = self.written, self.args
        if written is None or given is None:
            super().parse_arguments(parser, args)
            return
        if written.command not in self.names and set(given).isdisjoint(("-h", "--help")):
            commands = [*self.names, "init", "card"]
            named = written.command and f"{written.command!r} is no command.{guess(written.command, commands)}"
            known = f"The commands are {', '.join(commands)}; kd-lightning COMMAND --help describes one."
            raise CommandLineError(f"{named or 'name a command.'} {known}")
        if "--trainer.help" in given:
            trainer = self.parser_class(usage=SUPPRESS, add_help=False)
            trainer.add_lightning_class_args(Trainer, "trainer")
            trainer.print_help()
            trainer.exit()
        refuse_helps(written, self._owners(str(written.command)))
        refused: ArgumentError | None = None
        try:
            self.config = parser.parse_args(_with_model_of_checkpoint(given))
        except ArgumentError as error:
            refused = error  # explained below, so that an error in the user's own module has a traceback of its own
        if refused is not None:
            raise CommandLineError(diagnose(written, self._owners(str(written.command)), refused)) from refused
        owners, config = self._owners(str(written.command)), self.config[str(written.command)]
        unknown = next((key for key in written.empty() if setting_at(config, key, _ABSENT) is _ABSENT), None)
        if unknown is not None:  # the parser passes over an empty mapping that it does not know
            raise CommandLineError(diagnose(written, owners, ArgumentError(None, f"unknown key {dotted(unknown)}.")))
        find_checkpoints(self.config, written.files)
        _check_trainer(config, written)
        path = config.get("ckpt_path")
        check_one_start(config.get("resume"), path)
        if path is not None and path not in _OF_A_RUN:
            _check_checkpoint(path, config.get("weights_only") is not False)

    def _owners(self, command: str) -> dict[str, Callable[..., Any]]:
        """Return the keys of a command, each with the function or class that has an argument of this name."""
        own = self.commands.get(command)
        function = getattr(Trainer, command) if own is None else own.owner or own.function
        arguments: dict[str, Any] = dict.fromkeys(self.own_arguments(command), function)
        arguments |= dict.fromkeys(inspect.signature(_settings).parameters, _settings)
        return {name: owner for name, owner in arguments.items() if command == "fit" or name != "resume"}

    # ---- running ----------------------------------------------------------------------------------------------------

    @override
    def before_instantiate_classes(self) -> None:
        num_threads = self.setting("num_threads")
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        command = self.commands.get(str(self.subcommand))
        if command is not None and command.adjust is not None and self.written is not None:
            command.adjust(self.config[str(self.subcommand)], self.written.tree)

    @override
    def instantiate_classes(self) -> None:
        command = self.commands.get(str(self.subcommand))
        if command is not None and not command.builds:
            return
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps a class's own error in one per type of a union, each with the whole configuration
            cause = first_error({part: self.setting(part) for part in ("model", "data", "trainer")})
            if cause is not None and " ".join(str(cause).split()) in " ".join(str(error).split()):
                raise cause from None
            raise

    @override
    def run_command(self, command: str) -> None:
        ours = self.commands.get(command)
        if ours is None:
            self._check_data(command)
            path = self.config[command].get("ckpt_path")
            if command != "fit" and not path:
                rank_zero_info(f"{command} without --ckpt_path: the network has the weights that it was built with.")
            elif command != "fit" and path in ("best", "last"):
                self.config_init[command]["ckpt_path"] = checkpoint_to_measure(self.trainer, path)
            try:
                super().run_command(command)
            except SIGTERMException:  # its status is 0, and a scheduler would take the job as done
                sys.exit(128 + signal.SIGTERM)
        elif ours.builds:
            ours.function(trainer=self.trainer, **self.values(command))
        else:
            config = self.config[command].as_dict()
            ours.function(config=config, **{name: config[name] for name in self.own_arguments(command)})

    def before_fit(self) -> None:
        """Find the checkpoint that ``--resume auto`` and ``--ckpt_path last`` mean."""
        warn_of_restarts()
        settings = self.config_init["fit"]
        settings["ckpt_path"] = checkpoint_to_resume(self.trainer, settings["resume"], settings["ckpt_path"])
        self.config["fit"]["resume"] = None  # so that the saved configuration repeats the run

    def _check_data(self, subcommand: str) -> None:
        """Raise if neither the data nor the model has the loader that a command reads."""
        loader = f"{ {'fit': 'train', 'validate': 'val'}.get(subcommand, subcommand) }_dataloader"
        if self.datamodule is None and not is_overridden(loader, self.model):
            raise CommandLineError(
                f"{subcommand} needs data: give --data CLASS with its options, such as --data DigitsDataModule, or a "
                "configuration with the same, --config FILE."
            )
        if self.datamodule is not None and not is_overridden(loader, self.datamodule):
            raise CommandLineError(
                f"{subcommand} needs a {loader}, which {type(self.datamodule).__name__} does not define. Give other "
                "data, or define it."
            )

    def predict(self, **arguments: Any) -> None:
        """Predict, and write the predictions to ``predictions.pt`` in the log folder, one file per process."""
        batches = self.trainer.predict(**arguments)
        if not batches:
            return
        joined = torch.cat(batches) if all(isinstance(batch, torch.Tensor) for batch in batches) else batches  # pyright: ignore
        rank = f"-rank{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = Path(self.trainer.log_dir or ".") / f"predictions{rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(joined, path)
        print(path)


def _settings(
    model: LightningModule,
    trainer: Trainer | None = None,
    data: LightningDataModule | None = None,
    seed_everything: bool | int = True,
    num_threads: Optional[PositiveInt] = None,  # noqa: UP045  # pyright: ignore[reportInvalidTypeForm]
    print_config: str = "",
    resume: Literal["auto"] | None = None,
) -> None:
    """Stand for the settings that all commands have, and fit's ``resume``, in messages about them."""


_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}
_NOTHING = {"limit_train_batches": "batch", "max_epochs": "epoch", "max_steps": "step"}


def _check_trainer(config: Any, written: Written) -> None:
    """Raise if a setting of the Trainer is one that Lightning fails on later, or takes in silence and does not do."""
    for name, least in _LEAST.items():
        value = config.trainer.get(name)
        if isinstance(value, (int, float)) and not value >= least:
            raise CommandLineError(f"{written.place(('trainer', name))}: must be {least} or more, got {value:g}.")
    interval = config.trainer.get("val_check_interval")
    if isinstance(interval, (int, float)) and interval <= 0:
        raise CommandLineError(
            f"{written.place(('trainer', 'val_check_interval'))}: must be a number of batches, or a fraction of an "
            f"epoch, above 0, got {interval}. For no validation set limit_val_batches to 0."
        )
    for name, what in _NOTHING.items() if written.command == "fit" else ():
        if config.trainer.get(name) == 0:
            raise CommandLineError(
                f"{written.place(('trainer', name))}: fit trains for no {what} with 0. Give 1 or more."
            )


_ABSENT = object()
_OF_A_RUN = ("best", "last", "hpc", "registry")
"""Values of ``ckpt_path`` that name no file: Lightning looks for one among those of the configured run."""


def _check_checkpoint(path: str | Path, weights_only: bool) -> dict[str, Any]:
    """Return the content of the file of ``--ckpt_path``; empty for folders of sharded checkpoints and for URLs."""
    if "://" in str(path) or any((Path(path) / name).exists() for name in ("meta.pt", "checkpoint")):
        return {}
    try:
        content = read_checkpoint(path, weights_only)
    except (OSError, ValueError) as error:
        in_python = "read it with load_from_checkpoint(..., weights_only=False)"
        raise CommandLineError(str(error).replace(in_python, "allow it with --weights_only=false")) from error
    keys = ("state_dict", "pytorch-lightning_version")
    absent = next((key for key in keys if not isinstance(content, dict) or key not in content), None)
    if absent is not None:
        raise CommandLineError(
            f"{path} is no checkpoint of the Trainer: it has no {absent}. Weights alone are for a "
            "network or a teacher, FrozenTeacher(network, checkpoint=...)."
        )
    return content


def find_checkpoints(config: Any, files: list[Path]) -> None:
    """Resolve a ``checkpoint`` from the configuration that names it, where the current folder does not have it.

    A path is looked for from the current folder, from the configuration's folder, and from the folder above that,
    because the configurations of a project stand in ``configs/``. Of several files the last counts.
    """
    items: Any = vars(config) if isinstance(config, Namespace) else config
    for name, value in list(enumerate(items) if isinstance(items, list) else items.items()):
        if name == "checkpoint" and isinstance(value, (str, Path)):
            folders = [folder for file in reversed(files) for folder in (file.parent, file.absolute().parent.parent)]
            found = [folder / value for folder in folders if (folder / value).is_file()]
            if found and not Path(value).exists():
                items[name] = str(found[0])
        elif isinstance(value, (Namespace, dict, list)):
            find_checkpoints(value, files)


def _with_model_of_checkpoint(args: list[str]) -> list[str]:
    """Return the arguments with the checkpoint's model, if a checkpoint but no model or configuration is named."""
    options = [arg.partition("=")[0] for arg in args]
    if any(option in ("-c", "--config", "--model") for option in options) or "--ckpt_path" not in options:
        return args
    position = options.index("--ckpt_path")
    path = args[position].partition("=")[2] or "".join(args[position + 1 : position + 2])
    if not path or path.startswith("-"):
        return args  # for the parser, which says that the value is absent
    if path in _OF_A_RUN:
        raise CommandLineError(
            f"--ckpt_path {path} is of the run that a configuration describes. Give it as well, --config FILE, or the "
            "path of a checkpoint."
        )
    data_only = Written(args).at(("weights_only",)) is not False
    hparams = _check_checkpoint(path, data_only).get("hyper_parameters", {})
    if "_class_path" not in hparams:
        raise ValueError(
            f"{path} was not made by this command, so it does not say which model it is of. Name a configuration as "
            "well: --config …"
        )
    check_settings(hparams, path)
    arguments = {name: value for name, value in hparams.items() if not name.startswith("_")}
    model = yaml.safe_dump({"class_path": hparams["_class_path"], "init_args": arguments})
    return [args[0], f"--model={model}", *args[1:]]
