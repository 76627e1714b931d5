"""The place of weights that are not in memory: those of a teacher whose cache has every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning.teachers.placement import Placement

if TYPE_CHECKING:
    from kd_lightning.teachers.frozen import FrozenTeacher


class Absent(Placement):
    """Parameters on the meta device, and the device to which they belong; buffers stay. A call reads the weights again.

    Args:
        teacher: The teacher, whose parameters are replaced by parameters without values.
        fingerprint: The fingerprint of the teacher with its weights.
    """

    def __init__(self, teacher: FrozenTeacher, fingerprint: str) -> None:
        self.teacher = teacher
        self.of_teacher = fingerprint
        parameters = [parameter for parameter in teacher.module.parameters() if is_plain(parameter)]
        self.device = parameters[0].device if parameters else torch.device("cpu")
        empty: dict[int, nn.Parameter] = {}  # by identity, because one parameter may have two names
        for parameter in parameters:
            on_meta = parameter.detach().to("meta")
            empty[id(parameter)] = nn.Parameter(on_meta, requires_grad=parameter.requires_grad)
        for part in teacher.module.modules():
            for name, parameter in part._parameters.items():
                part._parameters[name] = empty.get(id(parameter), parameter)

    @override
    def move(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        def follow(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                return fn(tensor)
            moved = fn(torch.empty(0, dtype=tensor.dtype, device=self.device))
            return tensor.to(moved.dtype)

        module._apply(follow)
        self.device = fn(torch.empty(0, device=self.device)).device

    @override
    def device_of_logits(self, inputs: Any, weight: Tensor | None) -> torch.device:
        return self.device

    @override
    def call(self, run: Callable[[Any], Any], module: nn.Module, inputs: Any) -> Any:
        """Return the outputs, once the weights are back in their place."""
        teacher = self.teacher
        if not teacher.runs:
            raise FileNotFoundError(
                f"the teacher's weights {teacher.checkpoint} are absent, and only samples of its cache are known. Give "
                "the file, or batches of teacher.index(dataset)."
            )
        place = teacher.bring_back()
        place.move(module, lambda tensor: tensor.to(self.device))
        if teacher.fingerprint() != self.of_teacher:
            raise ValueError(
                f"the teacher's weights {teacher.checkpoint} have the fingerprint {teacher.fingerprint()[:8]}, but its "
                f"cache is of {self.of_teacher[:8]}. Give the weights that the cache was made with."
            )
        return place.call(run, module, inputs)


def is_plain(parameter: nn.Parameter) -> bool:
    """Return True for a dense tensor with values, which has no type of its own as packed and sharded weights have."""
    return type(parameter.data) is Tensor and not parameter.is_meta
