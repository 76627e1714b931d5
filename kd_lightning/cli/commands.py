"""The commands beside Lightning's own: one function each, and the table of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from json import dumps
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves

from kd_lightning.calibration import calibrate as fit_calibration
from kd_lightning.callbacks import TemperatureFinder
from kd_lightning.cli.cache import check_shard, fill_caches
from kd_lightning.configuration.diagnosis import import_class
from kd_lightning.configuration.parser import Command
from kd_lightning.export import SUFFIXES, ExportFormat, export_student, inputs_like
from kd_lightning.modules import ClassificationModule, DistillationModule
from kd_lightning.modules.checkpoint_settings import read_checkpoint
from kd_lightning.modules.supervised import SupervisedModule
from kd_lightning.plotting import plot_schedule, plot_softening
from kd_lightning.preflight import check as preflight
from kd_lightning.preflight.facts import batches_of, set_up
from kd_lightning.sweep import sweep as run_sweep
from kd_lightning.teachers import FrozenTeacher, TeacherCache
from kd_lightning.teachers.cache_arrow import write_arrow
from kd_lightning.teachers.indexed import HasRows, index_training
from kd_lightning.teachers.weights import load_weights

# options of a sweep that take several numbers, as in --temperatures 1 2 4 8
_SWEPT = {"temperatures": "Temperatures to try.", "kd_weights": "Weights of the distillation term to try."}


def plot_temperature(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None = None, output: str = "."
) -> None:
    """Draw the temperature over the run, and how it softens the teacher's logits, without training.

    Writes ``temperature_schedule.png`` and ``temperature_softening.png``.

    Args:
        trainer: Gives the length of the run.
        model: A DistillationModule.
        datamodule: Gives the steps of an epoch and the batch whose teacher logits are drawn.
        output: The folder to write to.
    """
    if not isinstance(model, DistillationModule):
        raise TypeError(f"plot-temperature draws a DistillationModule's temperature, got {type(model).__name__}.")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    policy, steps, logits = model.distiller.temperature, 1, None
    if datamodule is not None:
        policy.setup_data(set_up(datamodule))
        loader = datamodule.train_dataloader()
        steps = max(len(loader) // trainer.accumulate_grad_batches, 1)
        if model.teacher is not None:
            inputs, targets = model.inputs_and_targets(next(iter(loader)))
            members = model.teacher.logits(inputs, extract=model.extract_logits)
            logits = model.distiller.consensus(inputs, members, targets).movedim(model.class_dim, -1)
    num_classes = 10 if logits is None else logits.shape[-1]
    epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else max(trainer.max_steps // steps, 1)
    figures = {"schedule": plot_schedule(policy, epochs, steps, num_classes=num_classes)}
    if logits is not None:
        figures["softening"] = plot_softening(logits)
    for name, figure in figures.items():
        path = folder / f"temperature_{name}.png"
        figure.savefig(path, dpi=150)
        print(path)


def check(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    batches: int = 4,
    compiled: bool = False,
    json: str | None = None,
    plot: str | None = None,
) -> None:
    """Look at the run on a few batches before it starts, and end with status 1 if something is wrong.

    Args:
        trainer: Gives the device, and the length of the run for schedules.
        model: A DistillationModule.
        datamodule: Gives the batches.
        batches: How many batches of training and of validation data to look at.
        compiled: Whether to time a compiled teacher too, which is slow.
        json: File to write the report to as JSON.
        plot: File to draw the entropy of the teacher's targets over T to.
    """
    if datamodule is None:
        raise ValueError("check looks at training batches: give --data, or a configuration with them.")
    model.to(trainer.strategy.root_device)
    epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 1
    report = preflight(model, datamodule, batches=batches, max_epochs=epochs, compiled=compiled)  # pyright: ignore[reportArgumentType]
    print(report)
    if json is not None:
        Path(json).write_text(dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    if plot is not None and len(report.teacher_logits):
        report.plot().savefig(plot, dpi=150)
        print(plot)
    if not report.ok:
        sys.exit(1)


def calibrate(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    output: str = "calibration.json",
    per_class: bool = False,
    batches: int | None = None,
) -> None:
    """Fit the teacher's own temperature to the validation labels, and write it to a file for FrozenTeacher.

    Args:
        trainer: Gives the device.
        model: A DistillationModule whose teacher is a FrozenTeacher.
        datamodule: Gives the validation data.
        output: The file to write.
        per_class: Whether to fit a temperature for each class.
        batches: How many validation batches to take; all by default.
    """
    if not isinstance(model, DistillationModule) or not isinstance(model.teacher, FrozenTeacher):
        teacher = model.teacher if isinstance(model, DistillationModule) else model
        raise TypeError(
            f"calibrate fits the temperature of a DistillationModule's FrozenTeacher, got {type(teacher).__name__}."
        )
    pairs = _validation_pairs("calibrate", trainer, model, datamodule, batches)
    class_dim, ignore_index = model.class_dim, model.ignore_index
    options: dict[str, Any] = {"class_dim": class_dim, "ignore_index": ignore_index, "extract": model.extract_logits}
    calibration = fit_calibration(model.teacher, pairs, per_class=per_class, **options)
    calibration.save(output)
    print(f"{calibration}\n{output}: --model.teacher.calibration {output}")


def _validation_pairs(
    command: str, trainer: Trainer, model: SupervisedModule, datamodule: Any, count: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """Return inputs and targets of the validation batches, on the trainer's device."""
    loader = None if datamodule is None else set_up(datamodule).val_dataloader()
    if not loader:
        raise ValueError(f"{command} fits a temperature to validation labels: give --data with a validation part.")
    model.to(trainer.strategy.root_device)
    return ((batch.inputs, batch.targets) for batch in batches_of(model, datamodule, loader, count))


def find_temperature(
    trainer: Trainer,
    model: LightningModule,
    finder: TemperatureFinder,
    datamodule: LightningDataModule | None = None,
) -> None:
    """Search the temperature by short runs, print the table and draw it, and do not train further.

    ``--finder.candidates`` and the like set the search up; over a finder among the configuration's callbacks they
    stand for what they name, and the rest stays as it is there.

    Args:
        trainer: Runs the search.
        model: A DistillationModule.
        finder: The search, unless the trainer has a finder among its callbacks.
        datamodule: The data; candidates are scored on the validation part.
    """
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  (set by a connector)
    configured = next((callback for callback in callbacks if isinstance(callback, TemperatureFinder)), None)
    if configured is None:
        callbacks.append(finder)
    finder = configured or finder
    finder.find_only = True
    finder.plot_path = finder.plot_path or "temperature_finder.png"
    trainer.fit(model, datamodule=datamodule)


def cache_teacher(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    output: str | None = None,
    num_shards: int = 1,
    shard: int | None = None,
    format: Literal["arrow"] | None = None,
) -> None:
    """Compute the teacher's logits of the training and validation data, so that no epoch has to wait for them.

    Rows that the cache already holds are kept: after an interruption, run the command again. Several jobs share the
    work with ``--num_shards 8 --shard 0`` to ``7``, each into files of its own; the command without them then merges
    the files, computes what a job left, and compares every row with its checksum.

    Args:
        trainer: Runs the prediction.
        model: A DistillationModule whose teacher has a TeacherCache.
        datamodule: Its data; the training part is cached in all slots, the validation part if its loaders read from
            ``teacher.index(dataset, part="val")``.
        output: The cache's file, if not the one that the configuration names.
        num_shards: Number of jobs that share the work.
        shard: Number of this job, from 0.
        format: arrow writes each whole cache as an Arrow file beside it, too: a column of ids and one of logits.
    """
    check_shard(num_shards, shard)
    teacher = model.teacher if isinstance(model, DistillationModule) else None
    if not isinstance(model, DistillationModule) or teacher is None:
        raise TypeError(f"cache-teacher needs a DistillationModule with a teacher, got {type(model).__name__}.")
    if output is not None and not teacher.caches:
        teacher.cache = TeacherCache(output)
    elif output is not None:
        teacher.caches[0].path = Path(output)
    if datamodule is None:
        raise ValueError("cache-teacher needs the training data: give --data, or a configuration with them.")
    index_training(set_up(datamodule), teacher.index)
    loaders = tree_leaves(datamodule.train_dataloader())
    others = datamodule.val_dataloader() if is_overridden("val_dataloader", datamodule, LightningDataModule) else []
    if not all(isinstance(getattr(loader, "dataset", None), HasRows) for loader in loaders):
        raise ValueError(
            f"{type(datamodule).__name__} does not say which samples its batches have: make its training loader of "
            "teacher.index(dataset)."
        )
    fill_caches(trainer, model, [*loaders, *tree_leaves(others)], num_shards, shard)
    if format is not None and num_shards == 1 and trainer.is_global_zero:
        for cache in teacher.caches:
            print(*map(write_arrow, cache.parts), sep="\n")


def export(
    trainer: Trainer,
    model: LightningModule,
    ckpt_path: str,
    datamodule: LightningDataModule | None = None,
    format: ExportFormat = "safetensors",
    output: str | None = None,
    input_shape: list[int] | None = None,
    dynamic_dims: list[int] = [0],  # noqa: B006  (jsonargparse shows the default; no code changes it)
    overwrite: bool = False,
    calibrate: bool = False,
) -> None:
    """Write the bare student of a checkpoint to a file that needs nothing of this library, and verify it.

    The weights are those that were validated: the averaged ones of a run with WeightAveraging. Neither teacher nor
    data are needed: a batch to trace comes from --input_shape, else from the data if they are configured, else of
    the shapes that the checkpoint recorded.

    Args:
        trainer: Gives the device on which a temperature is fitted.
        model: A DistillationModule or ClassificationModule; the checkpoint's own if it is not configured.
        ckpt_path: The checkpoint; --ckpt for short.
        datamodule: Gives the batch to trace.
        format: safetensors holds the weights, torch.export and onnx the computation too.
        output: The file to write; by default the checkpoint's name with the format's suffix.
        input_shape: Shape of one input without the batch, such as [3, 32, 32].
        dynamic_dims: Dimensions of the inputs that may have any size.
        overwrite: Whether to replace a file that is there.
        calibrate: Whether the file divides the logits by a temperature that is fitted to the validation labels.
    """
    if not isinstance(model, (DistillationModule, ClassificationModule)):
        raise TypeError(
            "export takes a DistillationModule's student or a ClassificationModule's model, got "
            f"{type(model).__name__}. kd_lightning.export.export_student(network, path) takes any network."
        )
    name = next(name for name, child in model.named_children() if child is model.network)
    content = read_checkpoint(ckpt_path)
    held = {key.partition(".")[0] for key in content.get("state_dict", ())}
    if name not in held:
        raise ValueError(
            f"{ckpt_path} holds no {name}: its weights are under {', '.join(sorted(held)) or 'no name at all'}. "
            f"A {type(model).__name__}'s checkpoint is wanted."
        )
    load_weights(model.network, ckpt_path, f"{name}.")
    inputs = _example_inputs(model, datamodule, input_shape, content.get("example_inputs"))
    temperature = None
    if calibrate:
        pairs = _validation_pairs("export --calibrate", trainer, model, datamodule)
        options: dict[str, Any] = {"class_dim": model.class_dim, "ignore_index": model.ignore_index}
        calibration = fit_calibration(copy.deepcopy(model.network).eval(), pairs, **options)
        print(calibration)
        temperature = calibration.temperature[0]
    path = Path(ckpt_path).with_suffix(SUFFIXES[format]) if output is None else output
    built_from = model.hparams.get(name)
    print(export_student(model.network, path, format, inputs, built_from=built_from, dynamic_dims=dynamic_dims,
                         overwrite=overwrite, temperature=temperature))  # fmt: skip


def _example_inputs(model: SupervisedModule, datamodule: Any, shape: list[int] | None, recorded: Any) -> Any:
    """Return a batch of inputs: of a shape, else of the data, else of the shapes that were recorded; None without."""
    if shape is not None:
        return torch.randn(2, *shape)
    if datamodule is not None:
        return model.unpack(next(iter(set_up(datamodule).train_dataloader())))[0]
    return None if recorded is None else inputs_like(recorded)


def sweep(config: dict[str, Any], **arguments: Any) -> None:
    """Train the configuration once for each temperature, weight and seed; compare with no teacher, and report.

    ``--temperatures 1 2 4 8 --kd_weights 0.5 0.9 --seeds 3``; see :func:`kd_lightning.sweep.sweep`.

    Args:
        config: The parsed configuration, of which each run builds model, data and trainer.
        arguments: Arguments of :func:`kd_lightning.sweep.sweep`.
    """
    try:
        run_sweep(config, **arguments)
    except KeyboardInterrupt:
        sys.exit(130)  # without a traceback, because the sweep has printed how to resume it


def _add_finder(parser: LightningArgumentParser) -> list[str]:
    parser.add_class_arguments(TemperatureFinder, "finder")
    return ["finder"]


def _override_finder(config: Any, written: Mapping[str, Any]) -> None:
    callbacks = config.trainer.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if issubclass(import_class(callback.class_path), TemperatureFinder):
            for name in written.get("finder") or {}:
                callback.init_args[name] = config.finder[name]


def _add_sweep(parser: LightningArgumentParser) -> list[str]:
    for name, text in _SWEPT.items():
        parser.add_argument(f"--{name}", nargs="+", type=float, required=True, help=text)
    return [*_SWEPT, *parser.add_function_arguments(run_sweep, skip={"config", *_SWEPT}, as_group=False)]


COMMANDS = {
    "plot-temperature": Command(plot_temperature),
    "check": Command(check, logs=False),
    "calibrate": Command(calibrate, logs=False),
    "find-temperature": Command(find_temperature, _add_finder, adjust=_override_finder),
    "cache-teacher": Command(cache_teacher),
    "export": Command(export, spelling=lambda option: "--ckpt_path" if option == "--ckpt" else option, logs=False),
    "sweep": Command(
        sweep, _add_sweep, lambda option: "--" + option[2:].replace("-", "_"), builds=False, owner=run_sweep
    ),
}
