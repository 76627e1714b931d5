"""The teacher: frozen, and out of sight of optimisers, checkpoints and callbacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.teachers.calls import HiddenStates, call_model, check_hidden_states, hidden_states
from kd_lightning.teachers.weights import fingerprint, load_weights, looks_untrained

__all__ = ["FrozenTeacher", "as_teacher"]


class FrozenTeacher:
    """A trained network that only ever predicts.

    Its parameters need no gradient, it stays in eval mode whatever is called on the module around it, and it runs under
    ``torch.no_grad()`` (under ``inference_mode`` its outputs could not serve a learnable temperature). It is no
    ``nn.Module``, so that a module that holds it does not register it: it is absent from state dicts, checkpoints,
    optimisers and DDP's broadcasts, and out of the reach of weight averaging and pruning, which damage a registered
    teacher. :class:`~kd_lightning.Distiller` moves and casts it along with itself.

    Args:
        module: The network. **It is frozen in place.**
        checkpoint: File with its weights, read when the teacher is first needed and not before (validating a student
            needs no teacher file): safetensors, a state dict in ``.pt``, or a Lightning ``.ckpt``, such as that of a
            distilled student that now teaches. Tensors and primitives only: read with ``weights_only=True``.
        prefix: What stands before the module's parameter names in the file, such as ``"student."``. None: found by
            itself.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        FileNotFoundError: On first use: there is no such file.
        ValueError: On first use: the file holds no weights, or its names or shapes do not fit; says which.

    Warns:
        UserWarning: Without a checkpoint, if the weights are still those of the initialisation.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> _ = network[0].weight.data.mul_(3.0)  # stands for training
        >>> teacher = FrozenTeacher(network)
        >>> teacher(torch.ones(2, 4)).requires_grad
        False
    """

    def __init__(self, module: nn.Module, checkpoint: str | Path | None = None, prefix: str | None = None) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"a teacher must be an nn.Module, got {type(module).__name__}."
                + (" Pass an instance, not the class." if isinstance(module, type) else "")
            )
        self.module = module.requires_grad_(False).eval()
        self.checkpoint = None if checkpoint is None else str(checkpoint)
        self.prefix = prefix
        self._parts = tuple(module.modules())
        self._fingerprint: str | None = None
        self._loaded = checkpoint is None
        if checkpoint is None and looks_untrained(module):
            warnings.warn(
                f"the teacher {type(module).__name__} still has the weights of its initialisation: the student would "
                "be taught noise. Give FrozenTeacher(module, checkpoint=...) or load its weights first.",
                stacklevel=2,
            )

    @property
    def loaded(self) -> bool:
        """Whether the weights are in place."""
        return self._loaded

    def available(self) -> bool:
        """Whether the weights are in place, or their file is there to be read."""
        return self._loaded or (self.checkpoint is not None and Path(self.checkpoint).is_file())

    def load(self) -> FrozenTeacher:
        """Read the checkpoint, the first time only. Called by itself on first use."""
        if not self._loaded:
            assert self.checkpoint is not None
            load_weights(self.module, self.checkpoint, self.prefix)
            self._loaded = True
        return self

    def fingerprint(self) -> str:
        """A hash of all weights and buffers (names, types, shapes, bytes), taken once, when first asked for.

        Two teachers with the same fingerprint are bit-identical. Ranks compare it, and checkpoints store it.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.load().module)
        return self._fingerprint

    def __call__(self, inputs: Any) -> Any:
        """The network's own output for these inputs; see :func:`call_model`."""
        return self._run(call_model, inputs)

    def hidden_states(self, inputs: Any, check: bool = False) -> HiddenStates:
        """The network up to its output layer; see :func:`hidden_states`. With ``check`` the two are held together."""
        if check:
            self._run(check_hidden_states, inputs)
        return self._run(hidden_states, inputs)

    def _run(self, call: Callable[[nn.Module, Any], Any], inputs: Any) -> Any:
        self.load()
        if any(part.training for part in self._parts):  # somebody called train() on it, or shares a part of it
            self.module.eval()
        with torch.no_grad():
            return call(self.module, inputs)

    def to(self, *args: Any, **kwargs: Any) -> FrozenTeacher:
        """Move or cast the network, as ``nn.Module.to``."""
        self.module.to(*args, **kwargs)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.module._apply(fn)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self  # frozen, and often large: copies of a distiller share it

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.module.parameters())
        source = "weights in place" if self.checkpoint is None else f"checkpoint={self.checkpoint!r}"
        return f"{type(self).__name__}({type(self.module).__name__}, {count:,} frozen parameters, {source})"


def as_teacher(teacher: nn.Module | FrozenTeacher | None) -> FrozenTeacher | None:
    """Wrap a bare network in a :class:`FrozenTeacher`; leave a teacher, or its absence, as it is."""
    return teacher if teacher is None or isinstance(teacher, FrozenTeacher) else FrozenTeacher(teacher)
