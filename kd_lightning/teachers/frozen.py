"""The teacher: frozen, and out of sight of optimisers, checkpoints and callbacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from kd_lightning.teachers.batch import BatchTeacher
from kd_lightning.teachers.cache import TeacherCache
from kd_lightning.teachers.calibration import Calibration
from kd_lightning.teachers.calls import (
    Call,
    HiddenStates,
    by_name,
    call_model,
    check_hidden_states,
    device_of,
    extract_logits,
    hidden_states,
    in_micro_batches,
    naming_inputs,
    positional_names,
)
from kd_lightning.teachers.freeze import freeze
from kd_lightning.teachers.placement import Absent, Placement, is_plain, placement_of
from kd_lightning.teachers.teacher import Teacher
from kd_lightning.teachers.transforms import Renormalize, apply_transform, check_transform, with_transform
from kd_lightning.teachers.weights import check_finite, is_without_values, looks_untrained

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenTeacher(Teacher):
    """A trained network that only ever predicts.

    Its parameters need no gradient, it stays in eval mode whatever is called on the module around it, and it runs under
    ``torch.no_grad()`` (under ``inference_mode`` its outputs could not serve a learnable temperature). Like every
    :class:`~kd_lightning.teachers.Teacher` it is registered in no module; the :class:`~kd_lightning.Distiller` moves
    and casts it along with itself.

    Args:
        module: The network. **It is frozen in place.**
        checkpoint: File with its weights, read when the teacher is first needed and not before (validating a student
            needs no teacher file): safetensors, a state dict in ``.pt``, or a Lightning ``.ckpt``. Tensors and
            primitives only: read with ``weights_only=True``.
        prefix: What stands before the module's parameter names in the file, such as ``"student."``. None: found by
            itself.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``: what weights and floating-point inputs are cast to, whatever
            the trainer's precision and autocast are; casts of the module around do not undo it. None: as the module
            around.
        channels_last: Weights and images in the memory format that convolutions are often faster in.
        compile: ``torch.compile`` the network at its first call; a mapping: with these options, such as
            ``{"mode": "max-autotune"}``.
        micro_batch_size: Run at most so many samples at once, and join the outputs, where the teacher is too large for
            the whole batch. Tensors of the batch's length are split, all others given to each part.
        cache: Where its logits are kept, by sample; see :meth:`logits` and :meth:`index`.
        fingerprint: Name and version of the weights, in the place of their hash, where they are too large to hash or
            offloaded by accelerate. Ranks, checkpoints and the cache compare it.
        transform: From the inputs to those that the teacher takes, where it was trained on others: a function of the
            batch, a transform of torchvision, or :class:`Renormalize`. Runs on the device, before casts. Part of the
            fingerprint, and so of the cache's, by its ``repr`` or a function's name.
        placement: Where the weights are. None: with the module around, whose moves they follow. A device, such as
            ``"cpu"`` or ``"cuda:1"``: there; inputs are copied to it and outputs to where the inputs were, and there
            are no layer terms. ``"offload"``: on the host, and those of a layer on the inputs' device while that layer
            runs. ``"offload_whole"``: on the host, and all on the inputs' device during a forward. Both copy all
            weights in each forward. Or a :class:`~kd_lightning.teachers.Placement`.
        calibration: The teacher's own temperature, by which its logits are divided before any policy sees them, so that
            it multiplies T_t: a number, a file of ``kd-lightning calibrate``, or a
            :class:`~kd_lightning.teachers.Calibration`. Part of the fingerprint, and so of the cache's.

    Raises:
        TypeError: If ``module`` is no ``nn.Module``, or ``calibration`` is of another type.
        ValueError: If the precision is unknown, ``micro_batch_size`` below 1, ``fingerprint`` empty, the module a
            program exported in training mode, weights are on the meta device with neither ``checkpoint`` nor
            ``fingerprint``, or ``placement`` names an absent device, or is excluded by another option or accelerate's
            device map.
        FileNotFoundError: On first use, if the file does not exist.
        ValueError: On first use, if the file holds no weights, its names or shapes do not fit, or the calibration was
            fitted for another teacher; on a call, if the network takes inputs of another shape.

    Warns:
        UserWarning: Without a checkpoint, if the weights are still those of the initialisation.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> _ = network[0].weight.data.mul_(3.0)  # stands for training
        >>> teacher = FrozenTeacher(network)
        >>> teacher(torch.ones(2, 4)).requires_grad
        False
    """

    def __init__(
        self,
        module: nn.Module,
        checkpoint: str | Path | None = None,
        prefix: str | None = None,
        cache: TeacherCache | None = None,
        *,
        precision: Precision | None = None,
        channels_last: bool = False,
        compile: bool | dict[str, Any] = False,
        micro_batch_size: int | None = None,
        fingerprint: str | None = None,
        transform: Renormalize | Callable | None = None,  # YAML: Renormalize, or a class by its path
        placement: str | torch.device | Placement | None = None,
        calibration: float | str | Path | Calibration | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"a teacher must be an nn.Module, got {type(module).__name__}."
                + (" Pass an instance, not the class." if isinstance(module, type) else "")
                + (" Give program.module()." if isinstance(module, torch.export.ExportedProgram) else "")
            )
        if precision is not None and precision not in _DTYPES:
            raise ValueError(f"precision must be one of {', '.join(map(repr, _DTYPES))} or None, got {precision!r}.")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be 1 or more, or None for all at once, got {micro_batch_size}.")
        if fingerprint is not None and (not isinstance(fingerprint, str) or not fingerprint):
            raise ValueError(f"fingerprint must be a text that names the weights, such as 'v3', got {fingerprint!r}.")
        without_values = is_without_values(module)
        if without_values and any(hasattr(parameter, "ds_tensor") for parameter in module.parameters()):
            if checkpoint is not None or fingerprint is None:
                raise ValueError(
                    f"the teacher {type(module).__name__} has weights that DeepSpeed has partitioned (ZeRO 3), which "
                    "can be neither read from a checkpoint here nor hashed. Load them before deepspeed.initialize, and "
                    "name them and their version: FrozenTeacher(engine.module, fingerprint='model v3')."
                )
        elif without_values and checkpoint is None and fingerprint is None:
            raise ValueError(
                f"the teacher {type(module).__name__} has weights on the meta device, which have no values. Give "
                "FrozenTeacher(module, checkpoint=...), or FrozenTeacher(module, fingerprint='model v3') if accelerate "
                "offloads them."
            )
        check_transform(transform)
        self._can_eval = freeze(module)
        self.transform = transform
        in_a_file = isinstance(calibration, (str, Path))
        self.calibration = calibration if calibration is None or in_a_file else Calibration.of(calibration)
        self._calibration: Calibration | None = None  # read and checked with the weights
        self.module = module
        self.checkpoint = None if checkpoint is None else str(checkpoint)
        self.prefix = prefix
        self.cache = cache
        self.precision: Precision | None = precision
        self.channels_last = channels_last
        self.compile = compile
        self.micro_batch_size = micro_batch_size
        self._parts = tuple(module.modules())
        self._compiled: dict[bool, Callable[..., Any]] = {}
        self._fingerprint: str | None = fingerprint
        self.placement = placement
        self._place = placement_of(placement, module, checkpoint is not None)
        self._place.check(self)
        self.loaded = checkpoint is None
        if self.loaded:
            check_finite(module, "weights in place")
        if checkpoint is None and not without_values and looks_untrained(module):
            warnings.warn(
                f"the teacher {type(module).__name__} still has the weights of its initialisation: the student would "
                "be taught noise. Give FrozenTeacher(module, checkpoint=...) or load its weights first.",
                stacklevel=2,
            )
        if precision is not None:
            self._place.move(module, partial(_cast, dtype=_DTYPES[precision]))
        if not without_values:
            self._place.place(module)
        if channels_last:
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    # ---- weights --------------------------------------------------------------------------------------------------

    @override
    def available(self) -> bool:
        """Return True if the weights are in place, or their file is there to be read."""
        needed = () if self.loaded or self._in_cache is not None else (str(self.checkpoint),)
        needed += (self.calibration,) if isinstance(self.calibration, (str, Path)) else ()
        return all(Path(path).is_file() for path in needed)

    @override
    def load(self) -> FrozenTeacher:
        """Read the checkpoint, the first time only. Called by itself on first use.

        A checkpoint that is absent is not read where the cache has every row.
        """
        if not self.loaded:
            fingerprint = self._in_cache
            if fingerprint is None:
                absent = not Path(str(self.checkpoint)).is_file()
                if absent and self.cache is not None and (shards := self.cache.unmerged()):
                    raise FileNotFoundError(
                        f"the teacher's weights {self.checkpoint} are absent, and the cache {self.cache.path} lacks "
                        f"rows.{shards}"
                    )
                self.bring_back(self._place)
            else:
                self._place = Absent(self, fingerprint)
            self.loaded = True
        if self._place.has_weights and self.calibration is not None and self._calibration is None:
            calibration = Calibration.of(self.calibration)
            if calibration.fingerprint is not None:
                calibration.check(self._own_fingerprint())
            self._calibration = calibration
        return self

    def bring_back(self, place: Placement) -> None:
        """Read the checkpoint's weights into the network, and put them in this place."""
        assert self.checkpoint is not None
        self._place = place
        place.load(self.module, self.checkpoint, self.prefix)
        check_finite(self.module, self.checkpoint)
        place.place(self.module)
        if self.channels_last:
            self.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @property
    def _in_cache(self) -> str | None:
        """The fingerprint that a whole cache has where the checkpoint is absent."""
        if self.cache is None or self.checkpoint is None or Path(self.checkpoint).is_file():
            return None
        return self.cache.teacher_of_whole_file()

    @property
    @override
    def runs(self) -> bool:
        return self._place.has_weights or Path(str(self.checkpoint)).is_file()

    @override
    def release(self) -> None:
        readable = self.checkpoint is not None and self._place.releases
        if readable and all(map(is_plain, self.parameters())):
            self._place = Absent(self, self.fingerprint())

    @override
    def fingerprint(self) -> str:
        """Return a hash of all weights and buffers (names, types, shapes, bytes), or the ``fingerprint`` given.

        Two teachers with the same fingerprint are bit-identical. Ranks compare it, and checkpoints store it.
        """
        self.load()
        if not self._place.has_weights:
            return self._place.fingerprint(self.module)
        own = self._own_fingerprint()
        return own if self._calibration is None else self._calibration.fingerprint_with(own)

    def _own_fingerprint(self) -> str:
        """Return the fingerprint without the calibration, which is of a teacher with this one."""
        if self._fingerprint is None:
            self._fingerprint = self._place.fingerprint(self.module)
        return with_transform(self._fingerprint, self.transform)

    # ---- calls ----------------------------------------------------------------------------------------------------

    @override
    def __call__(self, inputs: Any) -> Any:
        """Return the network's own output for these inputs, not calibrated; see :func:`call_model`."""
        return self._frozen(self._run, inputs)

    @override
    def hidden_states(self, inputs: Any, check: bool = False) -> HiddenStates:
        """Run the network up to its output layer; see :func:`hidden_states`. ``check`` compares the two."""
        if check:
            self._frozen(partial(check_hidden_states, self.module), inputs)
        states = self._frozen(partial(self._run, hidden=True), inputs)
        return states if self._calibration is None else self._calibration.apply_hidden(states)

    def _frozen(self, call: Callable[[Any], Any], inputs: Any) -> Any:
        self.load()
        if self._can_eval and any(part.training for part in self._parts):
            self.module.eval()  # because train() was called on the network, or on a module that shares a part of it
        if isinstance(inputs, Mapping):
            inputs = dict(inputs)  # of whatever kind, such as Hugging Face's BatchEncoding
        inputs = apply_transform(self.transform, inputs)
        if self.precision is not None or self.channels_last:
            inputs = tree_map_only(Tensor, self._prepared, inputs)

        def run(inputs: Any) -> Any:
            autocast = nullcontext()
            if self.precision is not None:
                autocast = torch.autocast(device_of(inputs).type, enabled=False)
            with torch.no_grad(), autocast:
                return naming_inputs(call, self.module, inputs)

        return self._place.call(run, self.module, inputs)

    @override
    def logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> Tensor:
        """Return the logits for these inputs, from the cache where it has them; see :meth:`Teacher.logits`."""

        def compute() -> Tensor:
            logits = self._frozen(lambda inputs: extract(self._run(inputs)), inputs)
            return logits if self._calibration is None else self._calibration.apply(logits)

        if self.cache is None or index is None:
            return compute()
        cached: Any = torch.compiler.disable(self._cached_logits)  # because a memory map cannot be traced
        return cached(self.cache, index, compute if self.runs else None, inputs)

    def _cached_logits(
        self, cache: TeacherCache, index: Tensor, compute: Callable[[], Tensor] | None, inputs: Any
    ) -> Any:
        weight = next(self.module.parameters(), None)
        names = () if cache.max_length is None or isinstance(inputs, Mapping) else positional_names(self.module)
        device = self._place.device_of_logits(inputs, weight)
        logits = cache.logits(index, compute, device, by_name(inputs, names))
        if weight is None or not isinstance(logits, Tensor):
            return logits
        return logits.to(torch.promote_types(logits.dtype, weight.dtype))

    @property
    @override
    def gives_hidden_states(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cache is None

    @override
    def modules(self) -> Iterable[nn.Module]:
        return (self.module,) if self._place.has_weights else ()

    @override
    def network(self) -> nn.Module:
        if self.cache is not None:
            raise ValueError(
                "layers need the features of a teacher that runs, and a cache keeps its logits only. Leave out the "
                "cache, or the layers."
            )
        if self.micro_batch_size is not None:
            raise ValueError(
                "layers need the features of the whole batch, but the teacher has micro_batch_size="
                f"{self.micro_batch_size}: leave it out."
            )
        self._place.check_features()
        return self.module

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self._place.has_weights and is_without_values(self.module):
            self.load()

        def follow(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keeps_dtype = self.precision is not None and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if keeps_dtype else moved

        self._place.move(self.module, follow)

    def _run(self, inputs: Any, hidden: bool = False) -> Any:
        """Call the network, or run it up to its output layer."""
        network: Callable[..., Any] = self._states if hidden else self.module
        if self.compile and not torch.compiler.is_compiling():  # else it is part of the graph around it
            if hidden not in self._compiled:
                options = self.compile if isinstance(self.compile, Mapping) else {}
                self._compiled[hidden] = torch.compile(network, **options)
            network = self._compiled[hidden]
        if self.micro_batch_size is None:
            return call_model(network, inputs)
        return in_micro_batches(network, inputs, self.micro_batch_size)

    def _states(self, *args: Any, **kwargs: Any) -> HiddenStates:
        return hidden_states(self.module, Call(args, kwargs))

    def _prepared(self, tensor: Tensor) -> Tensor:
        if self.precision is not None and tensor.is_floating_point():
            tensor = tensor.to(_DTYPES[self.precision])
        if self.channels_last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": {}}  # compiled code is not pickled, but made again

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.module.parameters())
        parts = [type(self.module).__name__, f"{count:,} frozen parameters"]
        parts.append("weights in place" if self.checkpoint is None else f"checkpoint={self.checkpoint!r}")
        options = ["transform", "precision", "channels_last", "compile", "micro_batch_size", "placement", "calibration"]
        parts += [f"{name}={getattr(self, name)!r}" for name in options if getattr(self, name)]
        parts += [f"cache={str(cache.path)!r}" for cache in self.caches]
        return f"{type(self).__name__}({', '.join(parts)})"


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() or tensor.is_complex() else tensor


def as_teacher(teacher: nn.Module | Teacher | str | None) -> Teacher | None:
    """Wrap a bare network in a :class:`FrozenTeacher`, read ``"batch:<key>"``; leave a teacher or None as it is."""
    if isinstance(teacher, str):
        return BatchTeacher.of_text(teacher)
    return teacher if teacher is None or isinstance(teacher, Teacher) else FrozenTeacher(teacher)
