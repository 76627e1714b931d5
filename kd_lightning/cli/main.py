"""``kd-lightning fit|validate|test|predict|export|sweep|…``: LightningCLI over this library's parts."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch.utils.data import DataLoader
from typing_extensions import override

# imported so that their short names work in YAML
import kd_lightning.datamodules
import kd_lightning.models
import kd_lightning.temperature  # noqa: F401
from kd_lightning import ClassificationModule, DistillationModule, LayerTerm  # noqa: F401
from kd_lightning.callbacks import TemperatureFinder
from kd_lightning.export import SUFFIXES, ExportFormat, export_student, inputs_like
from kd_lightning.plotting import plot_schedule, plot_softening
from kd_lightning.teachers import FrozenTeacher, IndexedDataset, TeacherCache, split_index
from kd_lightning.teachers.indexed import Rows
from kd_lightning.teachers.weights import load_weights

__all__ = ["CommandTrainer", "KDLightningCLI", "SaveRunConfig", "main"]


class CommandTrainer(Trainer):
    """The Trainer of the command line: Lightning's, and a method for each command of our own."""

    def plot_temperature(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, output: str = "."
    ) -> None:
        """Draw the temperature over the run, and how it softens the teacher's logits, without training.

        Writes ``temperature_schedule.png`` and ``temperature_softening.png``.

        Args:
            model: A DistillationModule.
            datamodule: Tells the steps of an epoch and gives the batch whose teacher logits are drawn.
            output: The folder to write to.
        """
        if not isinstance(model, DistillationModule):
            raise TypeError(f"plot-temperature draws a DistillationModule's temperature, got {type(model).__name__}.")
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        policy, steps, logits = model.distiller.temperature, 1, None
        if datamodule is not None:
            datamodule.prepare_data()
            datamodule.setup("fit")
            policy.setup_data(datamodule)
            loader = datamodule.train_dataloader()
            steps = max(len(loader) // self.accumulate_grad_batches, 1)
            if model.teacher is not None:
                inputs, targets = model.inputs_and_targets(next(iter(loader)))
                members = model.teacher.logits(inputs, extract=model.extract_logits)
                logits = model.distiller.consensus(inputs, members, targets).movedim(model.class_dim, -1)
        num_classes = 10 if logits is None else logits.shape[-1]
        epochs = self.max_epochs if self.max_epochs and self.max_epochs > 0 else max(self.max_steps // steps, 1)
        figures = {"schedule": plot_schedule(policy, epochs, steps, num_classes=num_classes)}
        if logits is not None:
            figures["softening"] = plot_softening(logits)
        for name, figure in figures.items():
            path = folder / f"temperature_{name}.png"
            figure.savefig(path, dpi=150)
            print(path)

    def cache_teacher(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, output: str | None = None
    ) -> None:
        """Compute the teacher's logits of the training data, so that no epoch has to wait for them.

        What the cache has already is left as it is: after an interruption, run the command again.

        Args:
            model: A DistillationModule whose teacher has a TeacherCache.
            datamodule: Its data; the training part is cached, in all slots.
            output: The cache's file, if not the one that the configuration names.
        """
        teacher = model.teacher if isinstance(model, DistillationModule) else None
        if not isinstance(model, DistillationModule) or teacher is None:
            raise TypeError(f"cache-teacher needs a DistillationModule with a teacher, got {type(model).__name__}.")
        if output is not None and isinstance(teacher, FrozenTeacher) and not teacher.caches:
            teacher.cache = TeacherCache(output)
        elif output is not None:
            teacher.caches[0].path = Path(output)
        if datamodule is None:
            raise ValueError("cache-teacher needs the training data: give --data, or a configuration with them.")
        datamodule.prepare_data()
        datamodule.setup("fit")
        if hasattr(datamodule, "wrap_train"):
            datamodule.wrap_train = teacher.index  # pyright: ignore[reportAttributeAccessIssue]
        loader = datamodule.train_dataloader()
        if not isinstance(loader.dataset, IndexedDataset):
            raise ValueError(
                f"{type(datamodule).__name__} does not say which samples its batches have: make its training loader of "
                "teacher.index(dataset)."
            )
        missing = sorted({int(row) for cache in teacher.caches for row in cache.missing()})
        if missing:
            rest = DataLoader(
                Rows(loader.dataset, missing),
                batch_size=loader.batch_size,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
            )
            self.predict(_CacheBuilder(model), rest, return_predictions=False)
        for cache in teacher.caches:
            cache.verify()
            print(cache)

    def find_temperature(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Search the temperature by short runs, print the table and draw it, and do not train further.

        ``--finder.candidates`` and the like set the search up, unless the configuration has a finder of its own.

        Args:
            model: A DistillationModule.
            datamodule: Its data; candidates are scored on the validation part.
        """
        self.fit(model, datamodule=datamodule)

    def export(
        self,
        model: LightningModule,
        ckpt_path: str,
        datamodule: LightningDataModule | None = None,
        format: ExportFormat = "safetensors",
        output: str | None = None,
        input_shape: list[int] | None = None,
        dynamic_dims: list[int] = [0],  # noqa: B006  (jsonargparse shows it; nothing changes it)
        overwrite: bool = False,
    ) -> None:
        """Write the bare student of a checkpoint to a file that needs nothing of this library, and verify it.

        The weights are those that were validated: the averaged ones of a run with WeightAveraging. Neither teacher nor
        data are needed: a batch to trace comes from --input_shape, else from the data if they are configured, else of
        the shapes that the checkpoint recorded.

        Args:
            model: A DistillationModule or ClassificationModule; the checkpoint's own if it is not configured.
            ckpt_path: The checkpoint; --ckpt for short.
            datamodule: Gives the batch to trace.
            format: safetensors holds the weights, torch.export and onnx the computation too.
            output: The file to write; by default the checkpoint's name with the format's suffix.
            input_shape: Shape of one input without the batch, such as [3, 32, 32].
            dynamic_dims: Dimensions of the inputs that may have any size.
            overwrite: Whether to replace a file that is there.
        """
        if not isinstance(model, (DistillationModule, ClassificationModule)):
            raise TypeError(
                "export takes a DistillationModule's student or a ClassificationModule's model, got "
                f"{type(model).__name__}. kd_lightning.export.export_student(network, path) takes any network."
            )
        name = next(name for name, child in model.named_children() if child is model.network)
        content = torch.load(ckpt_path, weights_only=True, map_location="cpu")
        held = {key.partition(".")[0] for key in content.get("state_dict", ())}
        if name not in held:
            raise ValueError(
                f"{ckpt_path} holds no {name}: its weights are under {', '.join(sorted(held)) or 'no name at all'}. "
                f"A {type(model).__name__}'s checkpoint is wanted."
            )
        load_weights(model.network, ckpt_path, f"{name}.")
        if input_shape is not None:
            inputs = torch.randn(2, *input_shape)
        elif datamodule is not None:
            datamodule.prepare_data()
            datamodule.setup("fit")
            inputs, _ = model.unpack_batch(next(iter(datamodule.train_dataloader())))
        else:
            recorded = content.get("example_inputs")
            inputs = None if recorded is None else inputs_like(recorded)
        path = Path(ckpt_path).with_suffix(SUFFIXES[format]) if output is None else output
        built_from = model.hparams.get(name)
        print(export_student(model.network, path, format, inputs, built_from=built_from, dynamic_dims=dynamic_dims,
                             overwrite=overwrite))  # fmt: skip

    def sweep(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Train the configuration once for each temperature, weight and seed; compare with no teacher, and report.

        ``--temperatures 1 2 4 8 --kd_weights 0.5 0.9 --seeds 3``; see :func:`kd_lightning.sweep.sweep`.

        Args:
            model: A DistillationModule.
            datamodule: Its data.
        """
        raise NotImplementedError("a sweep builds its own trainers: call kd_lightning.sweep.sweep.")


# a command's name is the name of a method of the Trainer
setattr(CommandTrainer, "plot-temperature", CommandTrainer.plot_temperature)
setattr(CommandTrainer, "cache-teacher", CommandTrainer.cache_teacher)
setattr(CommandTrainer, "find-temperature", CommandTrainer.find_temperature)


class _CacheBuilder(LightningModule):
    """Predicts with a module's teacher, which fills its cache."""

    def __init__(self, module: DistillationModule) -> None:
        super().__init__()
        self.module = module

    @override
    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Any:
        batch, rows = split_index(batch)
        teacher = self.module.teacher
        assert teacher is not None
        return teacher.logits(self.module.unpack_batch(batch)[0], rows, self.module.extract_logits)


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

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        own = {"model", "datamodule"}
        return {
            **LightningCLI.subcommands(),
            "plot-temperature": own,
            "find-temperature": own,
            "cache-teacher": own,
            "export": own,
            "sweep": own,
        }

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "find-temperature":
            parser.add_lightning_class_args(TemperatureFinder, "finder")
        if subcommand == "export":
            parser.set_defaults({"trainer.logger": False})
        if subcommand == "sweep":
            from kd_lightning.sweep import sweep

            several = {"temperatures": "Temperatures to try.", "kd_weights": "Weights of the distillation term to try."}
            for name, text in several.items():  # as 1 2 4 8, which a list's argument does not take
                parser.add_argument(f"--{name}", nargs="+", type=float, required=True, help=text)
            self._sweep_arguments = [
                *several,
                *parser.add_function_arguments(sweep, skip={"config", *several}, as_group=False),
            ]
        return parser

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.subcommand == "find-temperature":
            configured = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
            finder = next((callback for callback in configured if isinstance(callback, TemperatureFinder)), None)
            if finder is not None:
                self._parser(self.subcommand).callback_keys.remove("finder")
            else:
                finder = self._get(self.config_init, "finder")
            finder.find_only = True
            finder.plot_path = finder.plot_path or "temperature_finder.png"
        return super().instantiate_trainer(**kwargs)

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**{"allow_abbrev": False, **kwargs})

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
    def before_instantiate_classes(self) -> None:
        num_threads = self._get(self.config, "num_threads")
        if num_threads is not None:
            torch.set_num_threads(num_threads)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = sys.argv[1:] if args is None else args
        if isinstance(given, list):
            if given[:1] == ["export"]:
                given = [re.sub(r"^--ckpt(?==|$)", "--ckpt_path", arg) for arg in given]
            elif given[:1] == ["sweep"]:  # --kd-weights and --kd_weights are the same
                given = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in given]
            with tempfile.TemporaryDirectory() as folder:
                self.config = parser.parse_args(_with_model_of_checkpoint(given, Path(folder)))
        else:
            super().parse_arguments(parser, args)

    def sweep(self, **_: Any) -> None:
        """Run the configuration again and again."""
        from kd_lightning.sweep import sweep

        config = self.config["sweep"].as_dict()
        try:
            sweep(config, **{name: config[name] for name in self._sweep_arguments})
        except KeyboardInterrupt:
            sys.exit(130)  # it has said that it goes on

    def predict(self, **arguments: Any) -> None:
        """Predict, and write what came out to ``predictions.pt`` in the log folder, one file for each process."""
        batches = self.trainer.predict(**arguments)
        if not batches:
            return
        joined = torch.cat(batches) if all(isinstance(batch, torch.Tensor) for batch in batches) else batches  # pyright: ignore
        rank = f"-rank{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = Path(self.trainer.log_dir or ".") / f"predictions{rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(joined, path)
        print(path)

    @override
    def instantiate_classes(self) -> None:
        if self.subcommand == "sweep":  # it builds its own, run by run
            nothing: Any = None
            trainer: Any = CommandTrainer
            self.config_init, self.model, self.datamodule, self.trainer = self.config, nothing, nothing, trainer
            return
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse reports what a class objected to as one branch of a union, with the whole configuration
            cause: BaseException = error
            while str(cause).startswith("Does not validate against any of the Union subtypes") and cause.__cause__:
                cause = cause.__cause__
            raise cause from None

    @override
    def _parse_ckpt_path(self) -> None:
        """What the user typed stands: Lightning would put the checkpoint's hyper-parameters over it."""


def _with_model_of_checkpoint(args: list[str], folder: Path) -> list[str]:
    """Where a checkpoint is named but no model and no configuration, take the model's from the checkpoint."""
    options = [arg.partition("=")[0] for arg in args]
    if any(option in ("-c", "--config", "--model") for option in options) or "--ckpt_path" not in options:
        return args
    position = options.index("--ckpt_path")
    path = Path(args[position].partition("=")[2] or "".join(args[position + 1 : position + 2]))
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {str(path)!r} (from the folder {str(Path.cwd())!r}).")
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
    KDLightningCLI(
        trainer_class=CommandTrainer,
        save_config_callback=SaveRunConfig,
        save_config_kwargs=options,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        args=args,
    )
