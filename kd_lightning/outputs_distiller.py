"""The Distiller for networks with several outputs, each with its own loss, temperature and weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning.distiller import Distiller
from kd_lightning.functional import Temperature
from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.losses import KDLoss
from kd_lightning.losses.task import as_loss
from kd_lightning.output import DistillationOutput
from kd_lightning.schedules import Progress, Schedule, as_schedule, weight_at
from kd_lightning.teachers import extract_logits
from kd_lightning.teachers.calls import call_model
from kd_lightning.temperature import TemperaturePolicy, as_policy
from kd_lightning.temperature.base import mean_temperature


class OutputTerm:
    """The loss, temperature and weights of one of several outputs; see :class:`OutputsKDLoss`.

    Args:
        kd_loss: The distillation loss of this output, :class:`~kd_lightning.losses.KDLoss` by default.
        temperature: A number, a schedule or a policy. None: the Distiller's, which is called with this output's logits.
        weight: Number or schedule; of this output's distillation loss in the sum.
        task_weight: Number or schedule; of the task loss of this output. None: 1 for the first output, 0 for others.
        teacher: The teacher's output. None: the one of the same name, or its logits where it has none of that name.
        targets: The key or position in the batch of this output's targets. None: those of the batch, or none
            where this output has other classes than the first.

    Raises:
        TypeError: If an argument is none of these.
        ValueError: If a weight is negative.

    Example:
        >>> OutputTerm(temperature=2.0, weight=0.4)
        OutputTerm(KDLoss(), temperature=ConstantTemperature(value=2), weight=0.4, task_weight=None)
    """

    def __init__(
        self,
        kd_loss: nn.Module | None = None,
        temperature: float | Schedule | TemperaturePolicy | Callable[[Progress], float] | None = None,
        weight: float | Schedule | Callable[[Progress], float] = 1.0,
        task_weight: float | Schedule | Callable[[Progress], float] | None = None,
        teacher: str | int | None = None,
        targets: str | int | None = None,
    ) -> None:
        self.kd_loss: nn.Module = KDLoss() if kd_loss is None else as_loss(kd_loss, "kd_loss")
        self.temperature = None if temperature is None else as_policy(temperature)
        self.weight = as_schedule(weight, "weight")
        self.task_weight = None if task_weight is None else as_schedule(task_weight, "task_weight")
        self.teacher = None if teacher is None else str(teacher)
        self.targets = targets

    def __repr__(self) -> str:
        loss = f"{type(self.kd_loss).__name__}()" if repr(self.kd_loss) == repr(KDLoss()) else repr(self.kd_loss)
        parts = [loss, *([] if self.temperature is None else [f"temperature={self.temperature!r}"])]
        weights = {"weight": self.weight, "task_weight": self.task_weight}
        parts += [f"{name}={getattr(weight, 'value', weight)!r}" for name, weight in weights.items()]
        named = {"teacher": self.teacher, "targets": self.targets}
        parts += [f"{name}={value!r}" for name, value in named.items() if value is not None]
        return f"OutputTerm({', '.join(parts)})"


@dataclass(frozen=True)
class SeveralOutputs(DistillationOutput):
    """The result for several outputs.

    ``kd_loss`` and ``task_loss`` are the weighted sums, logits and temperature those of the first output.

    Attributes:
        outputs: What each output gave by itself, the first included.
    """

    outputs: dict[str, DistillationOutput] = field(default_factory=dict)

    @override
    def readings(self) -> dict[str, Tensor]:
        """Return what is logged of the temperature, and ``kd_loss_<output>`` and ``temperature_<output>`` of each."""
        values = super().readings()
        for name, out in self.outputs.items():
            values[f"kd_loss_{name}"] = out.kd_loss.detach().float()
            values[f"temperature_{name}"] = mean_temperature(out.temperature)
        return values


class OutputsDistiller(Distiller):
    """A :class:`~kd_lightning.Distiller` for :class:`OutputsKDLoss`: the sum over several outputs.

    Called with the student's output as it is, or with its parts by name, it gives each to a Distiller of its own. With
    a tensor, as in validation, it is the plain Distiller of the first output's loss. Arguments are those of
    :class:`~kd_lightning.Distiller`.

    Raises:
        ValueError: If the teacher has a cache, or an output without a temperature of its own would share a policy that
            keeps a state; on the call, if student or teacher lack an output, or targets.
    """

    kd_loss: OutputsKDLoss

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._build()

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("teacher", "temperature", "kd_loss", "task_loss") and "outputs" in self._modules:
            self._build()

    def _build(self) -> None:
        """Make the Distillers of the outputs after the first."""
        if not isinstance(self.kd_loss, OutputsKDLoss):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"an OutputsDistiller computes OutputsKDLoss, got {self.kd_loss!r}: take Distiller.")
        if self._teaching.caches:
            raise ValueError(
                "a teacher's cache keeps one tensor of logits for each sample, and OutputsKDLoss may ask for several. "
                "Leave out the cache, or distil one output with its own loss, such as KDLoss."
            )
        self.kd_loss.served = True
        state = [name for name, _ in self.temperature.named_buffers() if name.rpartition(".")[2] != "multiplier"]
        distillers: dict[str, Distiller] = {}
        for name, term in self.kd_loss.terms.items():
            if name == self.kd_loss.first:
                continue
            if term.temperature is None and state:
                raise ValueError(
                    f"{type(self.temperature).__name__} keeps a state, {state[0]}, which several outputs cannot share. "
                    f"Give the output {name!r} a temperature of its own: OutputTerm(..., temperature=...)."
                )
            temperature = self.temperature if term.temperature is None else term.temperature
            task_weight = 0.0 if term.task_weight is None else term.task_weight
            distillers[name] = Distiller(
                self.teacher, temperature, term.kd_loss, self.task_loss, term.weight, task_weight
            )
        self.outputs = nn.ModuleDict(distillers)

    @override
    def run_student(self, logits: Callable[[Any], Tensor], network: nn.Module, inputs: Any) -> Any:
        if not self.training:
            return super().run_student(logits, network, inputs)
        return self.kd_loss.select(call_model(network, self._teaching.student_inputs(inputs)))

    @override
    def teacher_logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> Any:
        select: Any = self.kd_loss.select_taught if self.training else extract
        return super().teacher_logits(inputs, index, select)

    @override
    def policies(self) -> dict[str, TemperaturePolicy]:
        named = super().policies()
        for name, distiller in self.outputs.items():
            assert isinstance(distiller, Distiller)
            named[f"outputs.{name}.temperature"] = distiller.temperature
        return named

    @property
    @override
    def batch_keys(self) -> tuple[str | int, ...]:
        targets = (term.targets for term in self.kd_loss.terms.values() if term.targets is not None)
        return tuple(dict.fromkeys([*super().batch_keys, *targets]))

    @override
    def _from_output(
        self,
        inputs: Any,
        student: Any,
        targets: Tensor | None,
        progress: Progress,
        extra: Mapping[Any, Any],
        given: Mapping[str, Any],
    ) -> DistillationOutput:
        kd_loss, taught, task_loss = self.kd_loss, given["teacher_logits"], given["task_loss"]
        weighted = [name for name, term in kd_loss.terms.items() if term.task_weight is not None]
        if task_loss is not None and weighted:
            raise ValueError(
                f"the task loss is there already, as a module's own, but the output {weighted[0]!r} has a task_weight. "
                "Leave task_weight out, and have the module weigh its outputs."
            )
        parts = kd_loss.select(student)
        if taught is None:
            taught = self._teaching.logits(inputs, given["index"], kd_loss.select_taught)  # pyright: ignore
        main = kd_loss.terms[kd_loss.first]
        first = super().forward(
            inputs,
            parts[kd_loss.first],
            targets,
            progress,
            teacher_logits=_taught(taught, kd_loss.first),
            task_loss=task_loss,
            extra=extra,
        )
        outputs = {kd_loss.first: first}
        kd = weight_at(main.weight, progress, "weight") * first.kd_loss
        task = first.task_loss
        if main.task_weight is not None:
            task = weight_at(main.task_weight, progress, "task_weight") * task
        for name, distiller in self.outputs.items():
            own = kd_loss.targets_of(name, parts, targets, extra)
            out = distiller(inputs, parts[name], own, progress, teacher_logits=_taught(taught, name), extra=extra)
            outputs[name] = out
            kd = kd + out.kd_weight * out.kd_loss
            task = task + out.task_weight * out.task_loss
        loss = first.kd_weight * kd + first.task_weight * task
        for layer in first.layers.values():
            loss = loss + layer.weight * layer.loss
        sums = {"loss": loss, "kd_loss": kd, "task_loss": task, "outputs": outputs}
        return self._keep(SeveralOutputs(**(vars(first) | sums)))


class OutputsKDLoss(nn.Module):
    r"""The distillation loss of networks with several outputs: heads, tokens, the parts of a detector.

    .. math::
        L = w_{kd} \sum_o v_o \, \mathrm{KD}_o(s_o, t_o; T_o) + w_{task} \sum_o u_o \, \mathrm{CE}(s_o, y_o)

    with each output's weight :math:`v_o`, task weight :math:`u_o` and temperature :math:`T_o`. An output has a name: a
    key of a mapping, an attribute, or a position in a tuple (``"0"``). :class:`~kd_lightning.DistillationModule` and
    :class:`~kd_lightning.callbacks.DistillationCallback` take :class:`OutputsDistiller` for this loss by themselves.

    The first output's logits are those that metrics of training see. With a teacher that gives one tensor, each output
    learns from that. Evaluation and prediction see the one tensor that the network returns in eval mode, or which is
    made of the outputs as ``predict`` says.

    Args:
        outputs: A loss or an :class:`OutputTerm` for each output, by its name.
        predict: ``"first"`` or ``"mean"``: the prediction of a network that returns its outputs in eval mode too.

    Raises:
        ValueError: If there are no outputs, a name has a dot or is a method of ``ModuleDict``, or the first output has
            a temperature, which is the Distiller's.
        TypeError: If an output has neither a loss nor an OutputTerm.

    Example:
        DeiT's distillation token, hard labels:

        >>> from kd_lightning.losses import HardLabelLoss
        >>> deit = OutputsKDLoss({
        ...     "distilled": OutputTerm(HardLabelLoss(), task_weight=0.0),
        ...     "class": OutputTerm(weight=0.0, task_weight=1.0),
        ... }, predict="mean")
        >>> student = {"class": torch.tensor([[2.0, 0.0]]), "distilled": torch.tensor([[0.0, 1.0]])}
        >>> distiller = OutputsDistiller(None, 1.0, deit, kd_weight=0.5, task_weight=0.5)
        >>> out = distiller(None, student, torch.tensor([0]), teacher_logits=torch.tensor([[0.0, 3.0]]))
        >>> out.loss  # (log(1 + e⁻²) + log(1 + e⁻¹)) / 2
        tensor(0.2201)
        >>> deit.prediction(student)
        tensor([[1.0000, 0.5000]])

    Source: for the distillation token H. Touvron et al., "Training data-efficient image transformers & distillation
    through attention" (DeiT), ICML 2021, arXiv 2012.12877.
    """

    distiller: ClassVar[type[Distiller]] = OutputsDistiller
    """The Distiller that computes this loss."""

    def __init__(
        self, outputs: Mapping[str, nn.Module | OutputTerm], predict: Literal["first", "mean"] = "first"
    ) -> None:
        super().__init__()
        if not isinstance(outputs, Mapping) or not outputs:
            raise ValueError(
                f"outputs must name at least one output and its loss, such as {{'cls': KDLoss()}}, got {outputs!r}."
            )
        if predict not in ("first", "mean"):
            raise ValueError(f"predict must be 'first' or 'mean', got {predict!r}.")
        self.terms = {str(name): _as_term(name, term) for name, term in outputs.items()}
        for name in self.terms:
            if not name or "." in name or hasattr(nn.ModuleDict(), name):
                raise ValueError(
                    "an output is named by a key, an attribute or a position of what the network returns, without a "
                    f"dot and not as a method of torch's ModuleDict, got {name!r}: have forward return it under "
                    "another name."
                )
        self.predict: Literal["first", "mean"] = predict
        self.first, main = next(iter(self.terms.items()))
        if main.temperature is not None:
            raise ValueError(
                f"the temperature of the first output, {self.first!r}, is that of the Distiller: give it there, as "
                f"temperature={main.temperature!r}."
            )
        if main.targets is not None:
            raise ValueError(
                f"the targets of the first output, {self.first!r}, are those of the batch, got {main.targets!r}: "
                "return them from unpack_batch(batch), or put another output first."
            )
        self.main = main.kd_loss
        self.served = False
        for name in ("scale", "class_dim", "ignore_index", "reduction"):
            if hasattr(self.main, name):
                setattr(self, name, getattr(self.main, name))
        self.compares_distributions = getattr(self.main, "compares_distributions", True)

    @override
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: TeacherTarget,
        temperature: float | Tensor | Temperature,
        targets: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return the first output's loss, unweighted; raise where the other outputs would be left out."""
        if not self.served:
            raise ValueError(
                "OutputsKDLoss is the loss of several outputs, which an OutputsDistiller gives it one by one. Take "
                "that, or a DistillationModule or DistillationCallback, which do."
            )
        return self.main(student_logits, teacher_logits, temperature, targets=targets, **options)

    def select(self, output: Any) -> dict[str, Tensor]:
        """Return the student's outputs by their names."""
        return {name: _needed(output, name, "student") for name in self.terms}

    def select_taught(self, output: Any) -> Tensor | dict[str, Tensor]:
        """Return the teacher's outputs by the student's names; its one tensor for all."""
        if isinstance(output, Tensor):
            return output
        taught: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if term.teacher is not None:
                taught[name] = _needed(output, term.teacher, "teacher")
            else:
                part = _part(output, name)
                taught[name] = extract_logits(output) if part is None else part
        return taught

    def prediction(self, output: Any) -> Tensor:
        """Return the logits that a network with this output predicts."""
        if isinstance(output, Tensor):
            return output
        parts = [part for name in self.terms if (part := _part(output, name)) is not None]
        if self.predict == "mean" and len(parts) == len(self.terms):
            return torch.stack(parts).mean(0)
        named = (_part(output, name) for name in ("logits", self.first, self.terms[self.first].teacher))
        first = next((part for part in named if part is not None), None)
        return extract_logits(output) if first is None else first

    def targets_of(
        self, name: str, parts: Mapping[str, Tensor], targets: Tensor | None, extra: Mapping[Any, Any]
    ) -> Tensor | None:
        """Return the targets of an output after the first."""
        key = self.terms[name].targets
        if key is None:
            classes = [parts[o].shape[getattr(self.terms[o].kd_loss, "class_dim", -1)] for o in (name, self.first)]
            return targets if classes[0] == classes[1] else None
        if key not in extra:
            raise ValueError(
                f"the output {name!r} reads its targets under {key!r} of the batch, which has no such part. Have the "
                f"dataset and its collate function put it there, or call the Distiller with extra={{{key!r}: …}}."
            )
        return extra[key]

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.terms}, predict={self.predict!r})"


def _as_term(name: str | int, term: nn.Module | OutputTerm) -> OutputTerm:
    if isinstance(term, OutputTerm):
        return term
    if not isinstance(term, nn.Module):
        raise TypeError(
            f"the output {name!r} needs a loss, such as KDLoss(), or an OutputTerm, got {term!r}: an instance of one."
        )
    return OutputTerm(term)


def _part(output: Any, name: str | None) -> Tensor | None:
    """Return the part of a network's output that a key, an attribute or a position names; None without one."""
    if name is None:
        return None
    if isinstance(output, Mapping) and name in output:
        part = output[name]
    elif isinstance(output, (tuple, list)) and name.isdigit() and int(name) < len(output):
        part = output[int(name)]
    else:
        part = getattr(output, name, None)
    return part if isinstance(part, Tensor) else None


def _needed(output: Any, name: str, whose: str) -> Tensor:
    part = _part(output, name)
    if part is None:
        kind = type(output).__name__
        if isinstance(output, Mapping):
            kind += f" with the keys {', '.join(map(str, output))}"
        elif isinstance(output, (tuple, list)):
            kind += f" of length {len(output)}"
        raise ValueError(
            f"OutputsKDLoss needs the {whose}'s output {name!r}, a tensor, but got {kind}. Name the outputs by key, "
            "attribute, or position in a tuple ('0')."
        )
    return part


def _taught(logits: Any, name: str) -> Any:
    """Return what each member of the teacher gives for this output."""
    if isinstance(logits, (tuple, list)):
        return tuple(_taught(member, name) for member in logits)
    return _needed(logits, name, "teacher") if isinstance(logits, Mapping) else logits
