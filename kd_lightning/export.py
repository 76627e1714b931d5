"""Export of the student: its weights, or the whole network, in a file that needs nothing of this library."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kd_lightning.functional.temperature import checked_number
from kd_lightning.teachers import extract_logits
from kd_lightning.teachers.calls import call_model

ExportFormat: TypeAlias = Literal["safetensors", "torch.export", "onnx"]

SUFFIXES: dict[str, str] = {"safetensors": ".safetensors", "torch.export": ".pt2", "onnx": ".onnx"}
_TOLERANCE = {"safetensors": 0.0, "torch.export": 1e-5, "onnx": 1e-4}


@dataclass(frozen=True)
class ExportReport:
    """The file that was written, and its difference from the network in memory.

    Attributes:
        path: The file.
        format: Its format.
        size: Bytes, with the weights that ONNX puts beside a file of more than 2 GB.
        max_difference: Between what was saved and what was read back: weights for safetensors, outputs for the others.
        tolerance: What it may be: 0 for safetensors; else 10⁻⁵ (torch.export) or 10⁻⁴ (ONNX) of the largest output, or
            ten units of the last place of the output's type where that is more.
    """

    path: Path
    format: ExportFormat
    size: int
    max_difference: float
    tolerance: float

    def __str__(self) -> str:
        compared = "weights" if self.format == "safetensors" else "outputs"
        return (
            f"{self.path}: {self.format}, {self.size:,} bytes; read back, {compared} differ by at most "
            f"{self.max_difference:.3g} (tolerance {self.tolerance:.3g})"
        )


def export_student(
    student: nn.Module,
    path: str | Path,
    format: ExportFormat | None = None,
    example_inputs: Any = None,
    *,
    built_from: Mapping[str, Any] | None = None,
    dynamic_dims: Sequence[int] = (0,),
    overwrite: bool = False,
    temperature: float | None = None,
) -> ExportReport:
    """Write a network to a file that loads without this library, read it back, and compare.

    A copy on the CPU in evaluation mode is exported. The file appears when what was read back agrees, and not before.

    Safetensors hold the ``state_dict`` under all of its names, tied weights once for each, and as metadata what to
    build: ``class_path``, and ``init_args`` as JSON where they are known. The other two hold the computation as well,
    for any batch size, without the example's values and without the names of source files and classes.

    Args:
        student: The network.
        path: Where to write, with the format's suffix.
        format: ``"safetensors"``, ``"torch.export"`` (suffix .pt2, read by ``torch.export.load(path).module()``) or
            ``"onnx"``. None: by the suffix.
        example_inputs: One batch, as the network is called with (a tensor; a tuple for positional arguments; a mapping
            for keywords). ``torch.export`` and ``onnx`` need it, its values do not matter, safetensors do without.
        built_from: ``class_path`` and ``init_args`` of the network, for the metadata of safetensors. None: the class
            alone.
        dynamic_dims: Dimensions of the inputs that may have any size: 0 is the batch; ``(0, 1)`` for token sequences of
            any length.
        overwrite: Whether to replace a file that is there.
        temperature: The network's own temperature, such as :func:`kd_lightning.calibrate` fits it: the computation that
            is written divides the logits by it, and gives nothing but logits.

    Raises:
        ValueError: If the format or suffix is unknown, example inputs are missing, the state holds what is no tensor,
            or the temperature is not positive and finite, or given for safetensors.
        FileExistsError: If the file exists and ``overwrite`` is False.
        ImportError: If the format needs a package that is not installed; names it.
        RuntimeError: If torch cannot trace the network, or the file's outputs differ by more than the tolerance.

    Example:
        >>> import safetensors.torch, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_student(nn.Linear(4, 3), f"{folder}/student.safetensors")
        ...     weights = safetensors.torch.load_file(report.path)
        >>> sorted(weights), report.max_difference
        (['bias', 'weight'], 0.0)
    """
    path = Path(path)
    format = _format_of(path, format)
    if format != "safetensors" and example_inputs is None:
        raise ValueError(
            f"{format} traces the network on a batch: give example_inputs, as the network is called with "
            "(on the command line --input_shape, or --data)."
        )
    if temperature is not None:
        checked_number(temperature)
        if format == "safetensors":
            raise ValueError(
                f"safetensors hold weights and no computation that could divide by the temperature {temperature:.4g}: "
                "take the format 'torch.export' or 'onnx'."
            )
    if format == "onnx":
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"onnx needs {' and '.join(missing)}: pip install 'kd-lightning[onnx]'")
    taken = [file for file in (path, path.with_name(path.name + ".data")) if file.exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{taken[0]} is there already: choose another path, or allow it with overwrite=True.")

    student = getattr(student, "_orig_mod", student)  # what torch.compile wraps
    copied = copy.deepcopy(student).cpu().eval().requires_grad_(False)
    if temperature is not None:
        # a hook, because a module around it would change the names of the inputs
        copied.register_forward_hook(lambda module, args, output: extract_logits(output) / temperature)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, torch.no_grad():
        draft = Path(folder) / path.name
        if format == "safetensors":
            difference, tolerance = _save_weights(copied, draft, built_from)
        else:
            difference, tolerance = _save_program(copied, draft, format, example_inputs, dynamic_dims)
        if not difference <= tolerance:  # NaN fails too
            raise RuntimeError(
                f"what was read back from {format} differs from {type(student).__name__} by {difference:.3g}, which is "
                f"more than {tolerance:.3g}: nothing is written. Does its output depend on random numbers or on "
                "earlier calls?"
            )
        written = [path.with_name(file.name) for file in Path(folder).iterdir()]
        for file in written:
            shutil.move(Path(folder) / file.name, file)
    return ExportReport(path, format, sum(file.stat().st_size for file in written), difference, tolerance)


def describe_inputs(inputs: Any) -> Any:
    """Shapes and types of a batch, as primitives that a checkpoint may hold; the way back is :func:`inputs_like`.

    Example:
        >>> describe_inputs((torch.zeros(2, 3), torch.ones(2, dtype=torch.long)))
        [{'shape': [2, 3], 'dtype': 'float32'}, {'shape': [2], 'dtype': 'int64'}]
        >>> describe_inputs({"input_ids": torch.ones(2, 5, dtype=torch.long)})
        {'keywords': {'input_ids': {'shape': [2, 5], 'dtype': 'int64'}}}
    """
    if isinstance(inputs, Tensor):
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if isinstance(inputs, Mapping):
        return {"keywords": {str(name): describe_inputs(value) for name, value in inputs.items()}}
    if isinstance(inputs, (tuple, list)):
        return [describe_inputs(value) for value in inputs]
    return None


def inputs_like(description: Any) -> Any:
    """Return a batch of that description: normal numbers, and ones for integers (every vocabulary and mask has them).

    Example:
        >>> inputs_like({"shape": [1, 2], "dtype": "int64"})
        tensor([[1, 1]])
    """
    if isinstance(description, list):
        return tuple(inputs_like(part) for part in description)
    if description is None:
        return None
    if "keywords" in description:
        return {name: inputs_like(part) for name, part in description["keywords"].items()}
    dtype, shape = getattr(torch, description["dtype"]), description["shape"]
    return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)


def _format_of(path: Path, format: ExportFormat | None) -> ExportFormat:
    found: Any = next((name for name, suffix in SUFFIXES.items() if suffix == path.suffix), None)
    listed = ", ".join(f"{name!r} ({suffix})" for name, suffix in SUFFIXES.items())
    if format is not None and format not in SUFFIXES:
        raise ValueError(f"format must be one of {listed}, got {format!r}.")
    if found is None or format not in (None, found):
        wanted = "one of its formats'" if format is None else f"{format}'s"
        raise ValueError(f"the path must end in {wanted} suffix, got {str(path)!r}. There are {listed}.")
    return found


def _save_weights(network: nn.Module, path: Path, built_from: Mapping[str, Any] | None) -> tuple[float, float]:
    import safetensors.torch

    state = network.state_dict()
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"safetensors hold tensors only, but the state has more: {', '.join(others)}.")
    kind = type(network)
    built_from = {"class_path": f"{kind.__module__}.{kind.__qualname__}", **(built_from or {})}
    metadata = {
        name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in built_from.items()
    }
    weights = {name: value.detach().clone().contiguous() for name, value in state.items()}  # tied ones come apart
    safetensors.torch.save_file(weights, path, {"format": "pt", **metadata})
    loaded = safetensors.torch.load_file(path)
    network.load_state_dict(loaded)  # whole and by its names, or an error
    return max((_difference(loaded[name], value) for name, value in weights.items()), default=0.0), 0.0


def _save_program(
    network: nn.Module, path: Path, format: ExportFormat, example_inputs: Any, dynamic_dims: Sequence[int]
) -> tuple[float, float]:
    inputs = pytree.tree_map_only(Tensor, _two_or_more, pytree.tree_map_only(Tensor, Tensor.cpu, example_inputs))
    args, kwargs = (), {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    longer = pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x[:1]]) if x.dim() else x, inputs)
    batches = [inputs, longer] if 0 in dynamic_dims else [inputs]
    wanted = [call_model(network, batch) for batch in batches]

    program = _trace(network, args, kwargs, dynamic_dims)
    if format == "torch.export":
        torch.export.save(program, path)
        network_again = torch.export.load(path).module()
        got = [call_model(network_again, batch) for batch in batches]
    else:
        names = ["logits"] if isinstance(wanted[0], Tensor) else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own about its parts
            exported = torch.onnx.export(program, dynamo=True, output_names=names, verbose=False)
        assert exported is not None
        _clear_names(exported.model, dynamic_dims)
        exported.save(path)
        got = [_run_onnx(path, batch) for batch in batches]

    pairs = list(zip(_tensors(wanted), _tensors(got), strict=True))
    floating = [ours for ours, _ in pairs if ours.is_floating_point()]
    eps = max((torch.finfo(x.dtype).eps for x in floating), default=0.0)
    largest = max((float(x.abs().max()) for x in floating if x.numel()), default=0.0)
    tolerance = max(_TOLERANCE[format], 10 * eps) * max(1.0, largest)
    return max(_difference(a, b) for a, b in pairs), tolerance


def _trace(
    network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_dims: Sequence[int]
) -> torch.export.ExportedProgram:
    """Return the computation, for any size of the dynamic dimensions, without a trace of where it came from."""
    dims = {dim: torch.export.Dim(_dim_name(dim)) for dim in dynamic_dims}

    def shape(value: Any) -> Any:
        return {d: name for d, name in dims.items() if d < value.dim()} if isinstance(value, Tensor) else None

    shapes = pytree.tree_map(shape, (args, kwargs))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own about its parts
            program = torch.export.export(network, args, kwargs, dynamic_shapes=shapes[1] or shapes[0])
    except Exception as error:  # torch raises some ten kinds here
        raise RuntimeError(
            f"torch.export cannot trace {type(network).__name__}: {' '.join(str(error).split())} "
            "A branch that depends on the values of tensors is written with torch.where or torch.cond; a size that the "
            f"code fixes is left out of dynamic_dims, now {tuple(dynamic_dims)}. Safetensors, which hold the weights "
            "alone, need no tracing: format='safetensors'."
        ) from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:  # paths of source files and names of classes
                for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
                    node.meta.pop(name, None)
    program.example_inputs = None  # they may be someone's data
    return program


def _clear_names(model: Any, dynamic_dims: Sequence[int]) -> None:
    """Take source files and class names out of an ONNX model, and call its sizes what they are: batch, dim1."""
    sizes: dict[str, str] = {}
    for dim in dynamic_dims:
        for value in model.graph.inputs:
            if value.shape is not None and dim < len(value.shape):
                sizes[str(value.shape[dim])] = _dim_name(dim)
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        nodes = list(graph.all_nodes())
        values = [*graph.inputs, *getattr(graph, "initializers", {}).values()]
        for node in nodes:
            node.metadata_props.clear()
            node.doc_string = None
            values += node.outputs
        for value in values:
            value.metadata_props.clear()
            for dim, size in enumerate(value.shape or ()):
                if str(size) in sizes and not isinstance(size, int):
                    value.shape[dim] = sizes[str(size)]


def _run_onnx(path: Path, batch: Any) -> list[Tensor]:
    """Run the file by onnxruntime where it is installed, else by ONNX's own (slow) reference."""
    values = [x.numpy() for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
    else:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(str(path))
        names = session.input_names
    outputs = session.run(None, dict(zip(map(str, names), values, strict=True)))
    return [torch.as_tensor(output) for output in outputs]


def _dim_name(dim: int) -> str:
    return "batch" if dim == 0 else f"dim{dim}"


def _two_or_more(value: Tensor) -> Tensor:
    """Return the inputs with two samples, because a batch of one would be traced as a batch of always one."""
    return torch.cat([value, value]) if value.dim() and len(value) == 1 else value


def _tensors(output: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.numel() or torch.equal(a, b):
        return 0.0
    return float((a.double() - b.double()).abs().max())
