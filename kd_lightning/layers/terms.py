"""Distillation between layers: terms of the loss, each with its own layers, loss, temperature, weight and projector."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning.functional.feature_losses import without_padded
from kd_lightning.layers.extractor import FeatureExtractor, find_layers, layer_depths
from kd_lightning.losses import FeatureLoss, SoftFeatureLoss
from kd_lightning.schedules import as_schedule, weight_at
from kd_lightning.teachers import Teacher
from kd_lightning.teachers.calls import call_model, has_decoder, padding_mask
from kd_lightning.temperature import Progress, Schedule, Signals, TemperaturePolicy, as_policy
from kd_lightning.temperature.base import Temperatures, as_terms

_INTERPOLATION = {4: "bilinear", 5: "trilinear"}


@dataclass(frozen=True)
class LayerResult:
    """The result of a :class:`LayerTerm`.

    Attributes:
        loss: The term, unweighted.
        weight: Its weight in this step.
        temperature: Its temperatures, in the layout of the rows that its loss compares; None for a plain loss.
    """

    loss: Tensor
    weight: float
    temperature: Temperatures | None


class LayerTerm(nn.Module):
    r"""A term :math:`w \cdot L(P(f_s), f_t)` between one layer of the student and one of the teacher.

    Where the features differ in size, the *student's* are made to fit, as far as the loss compares them:

    - channels (``(N, D)``, tokens ``(N, L, D)``: the last dimension; maps ``(N, C, H, W)``: the second) by a projector
      P, ``nn.Linear`` or a 1×1 ``nn.Conv2d``, that is trained along with the student and is no part of it;
    - the height and width of maps by bilinear interpolation (antialiased), which learns nothing.

    Losses between similarities need neither, those between attention maps no projector. The projector is built from the
    shapes of a first batch, before the optimiser is: by ``DistillationModule`` itself, by
    ``distiller.build_projectors(student, inputs)`` elsewhere.

    Tokens that the ``attention_mask`` of the inputs leaves out do not count, where the features have its length.

    Args:
        student_layer: Dotted name of a layer, as in ``named_modules()``, or a glob that matches one.
        teacher_layer: The teacher's.
        loss: A :class:`~kd_lightning.losses.FeatureLoss`.
        temperature: A number, a schedule or a policy for a :class:`~kd_lightning.losses.SoftFeatureLoss`; None for a
            loss without one. The policy sees the rows that the loss compares as the logits, no targets, and the depth
            of the layer. Its ``multiplier`` is its own: callbacks that move the temperature move that of the logits.
        weight: Number or schedule; not negative. ``LinearSchedule(0.0, w, until=0.1)`` warms it up.

    Raises:
        ValueError: If a weight is negative, a soft loss lacks a temperature, or another loss has one.
        TypeError: If an argument is of another type.

    Example:
        >>> from kd_lightning.losses import ChannelWiseKDLoss
        >>> LayerTerm("layer1", "layer1", ChannelWiseKDLoss(), temperature=4.0, weight=2.0)
        LayerTerm('layer1' → 'layer1', ChannelWiseKDLoss(), temperature=ConstantTemperature(value=4), weight=2.0)
    """

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str,
        loss: FeatureLoss,
        temperature: float | Schedule | TemperaturePolicy | Callable[[Progress], float] | None = None,
        weight: float | Schedule | Callable[[Progress], float] = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(loss, FeatureLoss):
            received = loss.__name__ if isinstance(loss, type) else type(loss).__name__
            raise TypeError(
                f"the loss of a LayerTerm must be a FeatureLoss, got {received}. Take one of kd_lightning.losses "
                "(an instance), or subclass FeatureLoss."
            )
        soft = isinstance(loss, SoftFeatureLoss)
        if soft and temperature is None:
            raise ValueError(f"{type(loss).__name__} compares distributions: give LayerTerm a temperature.")
        if not soft and temperature is not None:
            raise ValueError(
                f"{type(loss).__name__} has no temperature, got temperature={temperature!r}. Leave it out, or take a "
                "soft loss such as ChannelWiseKDLoss."
            )
        self.student_layer = student_layer
        self.teacher_layer = teacher_layer
        self.loss = loss
        self._takes_mask = "mask" in inspect.signature(loss.logits if soft else loss.forward).parameters
        self.temperature = None if temperature is None else as_policy(temperature)
        self.weight = as_schedule(weight)
        self.projector: nn.Module | None = None
        self.depth = 0.5
        self.in_encoder = False  # as the depth, known once the layers are attached
        self.shapes: tuple[int, int, int] | None = None
        """The projector's number of dimensions, student's channels and teacher's channels; None before it is built."""

    @property
    def built(self) -> bool:
        """True once the projector, if any, is built."""
        return self.shapes is not None or self.loss.compares != "all"

    def build(self, dims: int, student_channels: int, teacher_channels: int) -> None:
        """Make the projector, if these channels of features with so many dimensions (2 to 5) need one."""
        channels = (dims, student_channels, teacher_channels)
        if self.shapes not in (None, channels):
            raise ValueError(
                f"the projector of {self.student_layer!r} was built for (dimensions, student's channels, teacher's "
                f"channels) {self.shapes}, but is asked for {channels}. Make a new LayerTerm for other networks."
            )
        if self.shapes is None and student_channels != teacher_channels:
            kinds: dict[int, Callable[..., nn.Module]] = {4: nn.Conv2d, 5: nn.Conv3d}
            options = {} if dims < 4 else {"kernel_size": 1}
            self.projector = kinds.get(dims, nn.Linear)(student_channels, teacher_channels, **options)
        self.shapes = channels

    def build_for(self, student_features: Tensor, teacher_features: Tensor) -> None:
        """Make the projector that joins these features, if they need one, on the student's device."""
        if self.built:
            return
        self._check_alike(student_features, teacher_features)
        channel_dim = 1 if student_features.dim() > 3 else -1
        channels = (features.shape[channel_dim] for features in (student_features, teacher_features))
        self.build(student_features.dim(), *channels)
        if self.projector is not None:
            dtype = torch.promote_types(student_features.dtype, torch.float32)
            self.projector.to(student_features.device, dtype)

    @override
    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        progress: Progress,
        enabled: bool = True,
        mask: Tensor | None = None,
    ) -> LayerResult:
        """Return the term for one batch, with weight 0 unless enabled; ``mask (N, L)`` is True at tokens that count."""
        name = f"the weight of {type(self).__name__}({self.student_layer!r} → {self.teacher_layer!r})"
        weight = weight_at(self.weight, progress, name) if enabled else 0.0
        features = self._fitted(student_features, teacher_features), teacher_features
        given: dict[str, Tensor] = {}
        if mask is not None and all(x.dim() == 3 and x.shape[:2] == mask.shape for x in features):
            features = without_padded(features[0], mask), without_padded(features[1], mask)
            given = {} if self.loss.compares == "samples" else {"mask": mask}
        if given and not self._takes_mask:
            raise ValueError(
                f"the inputs have padding, but {type(self.loss).__name__} compares positions and takes no mask. Add an "
                "argument mask=None, True at the positions that count, or set compares='samples' if padding is 0."
            )
        policy = self.temperature
        if policy is None:
            return LayerResult(self.loss(*features, **given), weight, None)
        assert isinstance(self.loss, SoftFeatureLoss)
        rows = self.loss.logits(*features, **given)
        temperature = policy(Signals(*rows, None, progress, None, self.depth))
        softened = [policy.transform(logits) for logits in rows]
        losses = [self.loss.compare(softened[0], softened[1], term) for term in as_terms(temperature)]
        return LayerResult(losses[0] if len(losses) == 1 else torch.stack(losses).sum(), weight, temperature)

    def _fitted(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the student's features in the size of the teacher's, as far as the loss compares it."""
        if self.loss.compares == "samples":
            return student
        self._check_alike(student, teacher)
        if not self.built:
            raise RuntimeError(
                f"the term of {self.student_layer!r} is not built: it may need a projector. Call "
                "distiller.build_projectors(student, inputs) before the optimiser is made."
            )
        if self.projector is not None:
            student = self.projector(student.to(next(self.projector.parameters()).dtype))
        if student.shape[2:] != teacher.shape[2:] and student.dim() in _INTERPOLATION:
            # half precision has no antialiased kernel, and the losses widen anyway
            student = student.to(torch.promote_types(student.dtype, torch.float32))
            mode, antialias = _INTERPOLATION[student.dim()], student.dim() == 4
            student = F.interpolate(student, teacher.shape[2:], mode=mode, align_corners=False, antialias=antialias)
        return student

    def _check_alike(self, student: Tensor, teacher: Tensor) -> None:
        where = f"the features of {self.student_layer!r} and {self.teacher_layer!r}"
        way_out = "or take a loss between similarities, such as SimilarityKDLoss."
        if student.dim() != teacher.dim() or len(student) != len(teacher) or not 2 <= student.dim() <= 5:
            raise ValueError(
                f"{where} have shapes {tuple(student.shape)} and {tuple(teacher.shape)}: both must be vectors (N, D), "
                f"tokens (N, L, D) or maps (N, C, H, W) of the same batch. Name layers of the same kind, {way_out}"
            )
        if student.dim() == 3 and student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"{where} have {student.shape[1]} and {teacher.shape[1]} tokens, which no interpolation brings "
                f"together. Name layers of the same sequence, {way_out}"
            )

    @override
    def __repr__(self) -> str:
        temperature = "" if self.temperature is None else f", temperature={self.temperature!r}"
        weight = getattr(self.weight, "value", self.weight)
        return (
            f"LayerTerm({self.student_layer!r} → {self.teacher_layer!r}, {self.loss!r}{temperature}, weight={weight})"
        )


class LayerTerms(nn.ModuleList):
    """The terms of a :class:`~kd_lightning.Distiller`, and the hooks that feed them."""

    def __init__(self, terms: Sequence[LayerTerm] = ()) -> None:
        for term in terms:
            if not isinstance(term, LayerTerm):
                raise TypeError(f"layers must hold LayerTerms, got {type(term).__name__}: LayerTerm(student_layer, …).")
        super().__init__(terms)
        self._extractors: tuple[FeatureExtractor, FeatureExtractor] | None = None
        self._layers: list[tuple[str, str]] = []

    @override
    def __iter__(self) -> Iterator[LayerTerm]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__iter__()  # pyright: ignore[reportReturnType]

    @property
    def built(self) -> bool:
        """True once the projectors of all terms are built."""
        return all(term.built for term in self)

    @property
    def names(self) -> list[str]:
        """The terms' names in logs: the student's layers, with the term's number where a layer has several."""
        layers = [term.student_layer for term in self]
        return [name if layers.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(layers)]

    def attach(self, student: nn.Module, teacher: Teacher) -> None:
        """Put hooks on both networks, if there are terms, and tell the terms how deep their layers lie."""
        self.detach()
        if not len(self):
            return
        network = teacher.network()
        self._layers = [
            (_one_layer(student, term.student_layer), _one_layer(network, term.teacher_layer)) for term in self
        ]
        students, teachers = zip(*self._layers, strict=True)
        depths = layer_depths(student, list(dict.fromkeys(students)))
        for term, name in zip(self, students, strict=True):
            term.depth, term.in_encoder = depths[name], _is_in_encoder(student, name)
        extractors = FeatureExtractor(student, students), FeatureExtractor(network, teachers)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what is compiled already does not look for hooks again
        self._extractors = extractors[0].attach(), extractors[1].attach()

    def detach(self) -> None:
        """Take the hooks off."""
        for extractor in self._extractors or ():
            extractor.detach()
        self._extractors = None

    def clear(self) -> None:
        """Let go of the features at hand."""
        for extractor in self._extractors or ():
            extractor.clear()

    def build(self, student: nn.Module, teacher: Teacher, inputs: Any) -> None:
        """Make the projectors that are needed, from one forward of each network in eval mode that leaves no trace."""
        if self.built:
            return
        attached = self._extractors is not None
        if not attached:
            self.attach(student, teacher)
        try:
            with torch.no_grad(), _in_eval(student), _random_state_kept(student):
                call_model(student, inputs)
                teacher.logits(inputs, extract=lambda output: output)
                for term, features in zip(self, self._features(), strict=True):
                    term.build_for(*features)
        finally:
            if not attached:
                self.detach()

    def rebuild(self, shapes: Sequence[tuple[int, int, int] | None]) -> None:
        """Make the projectors that a checkpoint has, given :attr:`LayerTerm.shapes` of each term."""
        if len(shapes) != len(self):
            raise ValueError(
                f"the checkpoint was trained with {len(shapes)} layer terms, but here are {len(self)}. Give the same "
                "layers, or load the student's weights alone."
            )
        for term, built_for in zip(self, shapes, strict=True):
            if built_for is not None:
                term.build(*built_for)

    @override
    def forward(self, signals: Signals, enabled: bool, inputs: Mapping[str, Any]) -> dict[str, LayerResult]:
        """Return all terms, from the last forward of each network; none in eval mode.

        The positions that count are those of the padding mask in the ``inputs`` by name, or of a decoder without one
        those of the ``signals``.
        """
        if not (self.training and len(self)):
            self.clear()
            return {}
        mask = padding_mask(inputs)
        if mask is None and has_decoder(inputs):
            mask = signals.valid
        of_encoder = padding_mask(inputs, of_encoder=True) if any(term.in_encoder for term in self) else None
        return {
            name: term(*features, signals.progress, enabled, of_encoder if term.in_encoder else mask)
            for name, term, features in zip(self.names, self, self._features(), strict=True)
        }

    def _features(self) -> list[tuple[Tensor, Tensor]]:
        if self._extractors is None:
            raise RuntimeError(
                "the layers are not watched: run the loop within `with distiller.attach(student):`, which puts the "
                "hooks on student and teacher and takes them off again."
            )
        student, teacher = (extractor.pop() for extractor in self._extractors)
        return [(student[s], teacher[t]) for s, t in self._layers]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_extractors": None}  # a copy has no hooks


def _one_layer(module: nn.Module, pattern: str) -> str:
    found = list(find_layers(module, pattern))
    if len(found) != 1:
        matches = ", ".join(found)
        raise ValueError(
            f"a LayerTerm joins one layer with one, but {pattern!r} matches {matches}: give a term for each."
        )
    return found[0]


def _is_in_encoder(network: nn.Module, layer: str) -> bool:
    """Return True for a layer of the encoder of one of Hugging Face's encoder–decoder networks."""
    for module in network.modules():
        get_encoder: Any = getattr(module, "get_encoder", None)
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and get_encoder is not None:
            return any(part is network.get_submodule(layer) for part in get_encoder().modules())
    return False


@contextmanager
def _in_eval(module: nn.Module) -> Iterator[None]:
    """Eval mode, so that no buffer moves; then each part in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _random_state_kept(module: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in module.parameters()} - {torch.device("cpu")}
    kinds = {device.type for device in devices}
    with torch.random.fork_rng([device.index or 0 for device in devices], device_type=next(iter(kinds), "cuda")):
        yield
