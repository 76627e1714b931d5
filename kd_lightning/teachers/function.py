"""Any callable as a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from kd_lightning.functional import Sparse
from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.teachers.cache import TeacherCache
from kd_lightning.teachers.calls import by_name, call_model, device_of, extract_logits
from kd_lightning.teachers.made_at import MadeAt, Output
from kd_lightning.teachers.transforms import Renormalize, apply_transform, check_transform, with_transform
from kd_lightning.teachers.weights import hashed


class FunctionTeacher(MadeAt):
    r"""A function as teacher: another framework, a remote call, an API's log-probabilities.

    The function is called with the inputs, as a network is, under ``torch.no_grad()``. It returns a tensor or a NumPy
    array, in any layout that the distillation loss takes, or an output in which
    :func:`~kd_lightning.teachers.extract_logits` finds one. The result is brought to the device of the inputs.

    Of many classes, the function may name a few: it returns :class:`~kd_lightning.functional.Sparse` targets, which
    say themselves at which temperature they were made.

    What was made at a temperature :math:`T_0` is brought to the Distiller's temperature T exactly:
    :math:`\mathrm{softmax}(T_0 \log p / T) \propto p^{T_0 / T}`.

    Args:
        fn: The function. A network is no such function, since it must be frozen: give it to
            :class:`~kd_lightning.FrozenTeacher`.
        output: What the function returns: ``"logits"``, ``"log_probs"`` (natural) or ``"probs"``.
        temperature: :math:`T_0`, at which the outputs were made. Logits count as divided by it.
        name: Name and version of the teacher, which is its fingerprint: ranks, checkpoints and the cache compare it.
            None: the function's own qualified name.
        cache: Where its logits are kept, by sample. Needs a ``name``.
        transform: From the inputs to those that the teacher takes; see :class:`~kd_lightning.FrozenTeacher`.

    Raises:
        TypeError: If ``fn`` is no function, or a network.
        ValueError: If an option is outside its range, or a cache has no ``name``; on the call, if the outputs are no
            probabilities as declared.

    Example:
        >>> from kd_lightning import Distiller
        >>> def served(inputs):
        ...     '''Log-probabilities at temperature 2.'''
        ...     return (inputs / 2).log_softmax(-1)
        >>> teacher = FunctionTeacher(served, output="log_probs", temperature=2.0)
        >>> logits = torch.tensor([[3.0, 1.0, -2.0]])
        >>> bool(Distiller(teacher, temperature=5.0, task_weight=0.0)(logits, logits).kd_loss.abs() < 1e-6)
        True
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        output: Output = "logits",
        temperature: float = 1.0,
        name: str | None = None,
        cache: TeacherCache | None = None,
        transform: Renormalize | Callable | None = None,  # YAML: Renormalize, or a class by its path
    ) -> None:
        super().__init__(output, temperature)
        check_transform(transform)
        if not callable(fn) or isinstance(fn, (nn.Module, type)):
            way_out = "FrozenTeacher(network)" if isinstance(fn, nn.Module) else "a function, or an object with a call"
            raise TypeError(f"a FunctionTeacher needs a function, got {_name_of(fn)}. Give {way_out}.")
        if cache is not None and name is None:
            raise ValueError(
                f"a cache belongs to one teacher, and the code of {_name_of(fn)} says nothing of what it computes. "
                "Name the teacher and its version: FunctionTeacher(..., name='model v3', cache=...)."
            )
        self.fn = fn
        self.name = _name_of(fn) if name is None else name
        self.cache = cache
        self.transform = transform

    @override
    def logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> Any:
        device = device_of(inputs)

        def compute() -> TeacherTarget:
            output = self(inputs)
            if isinstance(output, Sparse):
                return self.as_given(output.to(device))
            values = torch.from_numpy(output) if isinstance(output, np.ndarray) else extract(output)
            return tree_map_only(Tensor, lambda part: self.to_logits(part.detach().to(device)), values)

        if self.cache is None or index is None:
            return compute()
        cached: Any = torch.compiler.disable(self.cache.logits)  # because a memory map cannot be traced
        return cached(index, compute, device, by_name(inputs))

    @override
    def __call__(self, inputs: Any) -> Any:
        """Return the function's own output for these inputs."""
        with torch.no_grad():
            inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
            return call_model(self.fn, apply_transform(self.transform, inputs))

    @override
    def fingerprint(self) -> str:
        """Hash the name, and at which temperature what is given."""
        return with_transform(hashed(f"{self.name} {self._made_at}"), self.transform)

    @override
    def __repr__(self) -> str:
        cache = "" if self.cache is None else f", cache={str(self.cache.path)!r}"
        return f"{type(self).__name__}({self.name}, {self._made_at}{cache})"


def _name_of(fn: Any) -> str:
    named = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{named.__module__}.{named.__qualname__}"
