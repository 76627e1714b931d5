"""The content of a module's checkpoint beside its weights, and loading it outside of a Trainer."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import Self, override

from kd_lightning._lightning import attached_trainer, init_arguments, is_given_by_cli, restricted_classmethod
from kd_lightning.modules.checkpoint_fit import check_optimizers, describe_misfit
from kd_lightning.modules.checkpoint_settings import check_settings, read_checkpoint
from kd_lightning.schedules import Schedule

_PLAIN = (int, float, str, bool, type(None))
_BUILT = "built_in_python"


class CheckpointedModule(LightningModule):
    """A LightningModule whose settings are plain data in its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self._built: dict[str, str] = {}
        self._saved_optimizers: list[Any] = []  # of the checkpoint that a fit goes on from

    @restricted_classmethod
    @override
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Rebuild a module from a checkpoint.

        A checkpoint of the command line holds the whole configuration, of which the module is built. It may name parts
        of a model only, see :func:`~kd_lightning.modules.checkpoint_settings.check_settings`. One that was written by a
        module built in Python holds the plain arguments; networks, policies and losses are given again as keywords, and
        the error for one that is missing shows the call. The file is read with ``weights_only=True``, URLs too.

        Args:
            checkpoint_path: The checkpoint.
            map_location: As in ``torch.load``.
            hparams_file: As in Lightning.
            strict: Whether the weights must be those of the module.
            weights_only: False runs the code that the file holds. Only for files whose origin you trust.
            kwargs: Arguments of the module, in place of the checkpoint's.

        Raises:
            TypeError: If a required argument was built in Python and is not given.
            ValueError: If the settings in the checkpoint name what is no part of a model.
        """
        weights_only = True if weights_only is None else weights_only
        checkpoint = read_checkpoint(checkpoint_path, weights_only)
        if isinstance(checkpoint, Mapping):
            keys = [*CHECKPOINT_PAST_HPARAMS_KEYS, *([] if hparams_file else [cls.CHECKPOINT_HYPER_PARAMS_KEY])]
            parts = [part for key in keys if isinstance(part := checkpoint.get(key), Mapping)]
            settings = {name: value for part in parts for name, value in part.items()}
            source = checkpoint_path if isinstance(checkpoint_path, (str, Path)) else None
            if "_instantiator" in settings or (hparams_file and settings):
                if _is_imported(settings.get("_class_path")):  # else Lightning refuses it, without an import
                    check_settings(settings | kwargs, source or "the checkpoint", cls, kwargs)
            elif not hparams_file:
                _check_given(cls, checkpoint, {*settings, *kwargs, checkpoint.get("hparams_name")}, kwargs, source)
        return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs)

    def _save_plain_hyperparameters(self) -> None:
        """Save the arguments of the ``__init__`` that calls this, so that checkpoints load with ``weights_only=True``.

        From the command line that is the whole configuration, as Lightning gives it. In Python it is the arguments that
        are primitives: networks and functions are given again to ``load_from_checkpoint``.
        """
        if is_given_by_cli():
            self.save_hyperparameters()
            return
        built = {
            name: values[-1]
            for name, values in init_arguments(self).items()
            if not all(isinstance(value, _PLAIN) for value in values)
        }
        self.save_hyperparameters(ignore=[*built])
        self._built = {name: as_code(value) for name, value in built.items()}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as ``torch.nn.Module`` does; the error for those that do not fit says in what they differ."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            networks = [name for name, child in self.named_children() if child is getattr(self, "network", None)]
            text = describe_misfit(type(self).__name__, state_dict, self.state_dict(), networks)
            raise RuntimeError(text) from error

    @override
    def on_fit_start(self) -> None:
        check_optimizers(self._saved_optimizers, self.trainer.optimizers)
        self._saved_optimizers = []

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._built:
            checkpoint[_BUILT] = self._built

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer = attached_trainer(self)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._saved_optimizers = checkpoint.get("optimizer_states", [])
        for state in states_of(checkpoint):
            self._keep_class_weights(state)
        hparams = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if hparams and "_instantiator" in hparams and trainer is None:
            # load_from_checkpoint of a file from the command line: keep its plain configuration rather than the objects
            # that were made of it, or that the caller gave, or the next checkpoint could not be loaded
            self.hparams.update({name: value for name, value in hparams.items() if _is_data(value)})

    def _keep_class_weights(self, state: dict[str, Any]) -> None:
        """Put the class weights of the losses in place of the checkpoint's: they are settings, not what was trained."""
        ours = {
            f"{prefix}.{name}": value
            for prefix, module in self.named_modules()
            if isinstance(module, (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss))
            for name, value in module.named_buffers(recurse=False)
        }
        losses = [prefix for prefix, _ in self.named_modules() if prefix.endswith(("task_loss", "kd_loss"))]
        names = ours.keys() | {f"{prefix}.{name}" for prefix in losses for name in ("weight", "pos_weight")}
        theirs = {name: state.pop(name) for name in names & state.keys() if name not in dict(self.named_parameters())}
        state.update(ours)
        changed = [
            name
            for name in sorted(theirs.keys() | ours.keys())
            if name not in ours or name not in theirs or not torch.equal(ours[name].cpu(), theirs[name].cpu())
        ]
        if changed:
            rank_zero_warn(
                f"the checkpoint was trained with other class weights ({', '.join(changed)}); those given now are used "
                "from here on. To go on as before, give the loss the same weights."
            )


def states_of(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the state dicts of the module in a checkpoint: a second one where ``WeightAveraging`` wrote it."""
    return [checkpoint[name] for name in ("state_dict", "current_model_state") if name in checkpoint]


def _is_data(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_data, value.values()))
    return all(map(_is_data, value)) if isinstance(value, (list, tuple)) else isinstance(value, _PLAIN)


def _is_imported(class_path: object) -> bool:
    return class_path is None or (isinstance(class_path, str) and class_path.rpartition(".")[0] in sys.modules)


def _check_given(
    kind: type[LightningModule],
    checkpoint: Mapping[str, Any],
    known: set[Any],
    given: Mapping[str, Any],
    source: object,
) -> None:
    """Raise if an argument without a default is neither in the checkpoint nor given, with the call to write instead."""
    parameters = dict(list(inspect.signature(kind.__init__).parameters.items())[1:])
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    missing = [name for name, p in named.items() if p.default is p.empty and name not in known]
    if not missing:
        return
    built = {n: code for n, code in checkpoint.get(_BUILT, {}).items() if n in named or any_keyword}
    codes = dict.fromkeys(missing, "...") | built | {name: as_code(value) for name, value in given.items()}
    path = "file" if source is None else repr(str(source))
    line = f"{kind.__name__}.load_from_checkpoint({', '.join([path, *(f'{n}={code}' for n, code in codes.items())])})"
    raise TypeError(
        f"the checkpoint was written by a module that was built in Python and does not hold its {', '.join(missing)}: "
        f"networks, policies and losses are given again, as in {line}. What is left out beside "
        f"{', '.join(missing)} takes its default."
    )


def as_code(value: object) -> str:
    """Return a value as an expression: whole for plain values, schedules and modules without parts, else ``Name(...)``.

    Example:
        >>> as_code(nn.Linear(4, 3)), as_code([nn.Sequential(nn.ReLU())]), as_code(lambda parameters: None)
        ('Linear(in_features=4, out_features=3, bias=True)', '[Sequential(...)]', '...')
    """
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_code, value))}]"
    if isinstance(value, type) or inspect.isroutine(value):
        name = value.__qualname__
        return name if all(part.isidentifier() for part in name.split(".")) else "..."
    if isinstance(value, nn.Module) and "_modules" not in vars(value):
        return "..."  # its class calls no super().__init__(), which is an error where it is used
    if isinstance(value, nn.Module) and not value.extra_repr() and not [*value.children()]:
        return f"{type(value).__name__}({', '.join(_arguments(value))})"  # because torch's losses do not print theirs
    whole = isinstance(value, (*_PLAIN, Schedule)) or (isinstance(value, nn.Module) and not [*value.children()])
    text = repr(value) if whole else ""
    return text if _is_expression(text) else f"{type(value).__name__}(...)"


def _arguments(module: nn.Module) -> Iterator[str]:
    """Yield the arguments of a module that are not its constructor's defaults, by its attributes of their names."""
    for name, parameter in list(inspect.signature(type(module).__init__).parameters.items())[1:]:
        value = getattr(module, name, parameter.default)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or value is parameter.default:
            continue
        if isinstance(value, _PLAIN) and value != parameter.default:
            yield f"{name}={value!r}"
        elif not isinstance(value, _PLAIN) or parameter.default is parameter.empty:
            yield f"{name}=..."


def _is_expression(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    return True
