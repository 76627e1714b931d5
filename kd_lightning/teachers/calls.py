"""Calling a network with any kind of inputs, and extracting the logits from its output."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from kd_lightning.functional.rows import gathered, is_sharded, plain


class Call(NamedTuple):
    """Positional and keyword arguments of a call, kept as inputs for an identical call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def positional_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments that a network takes by position."""
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)


def by_name(inputs: Any, names: Sequence[str] = ()) -> Mapping[str, Any]:
    """Return inputs by name: those given by keyword, and those by position as far as their names are known.

    Example:
        >>> by_name(Call((1, 2), {"c": 3}), ("a",))
        {'a': 1, 'c': 3}
    """
    if isinstance(inputs, Mapping):
        return inputs
    args, keywords = inputs if isinstance(inputs, Call) else (inputs, {})
    return {**dict(zip(names, args if isinstance(args, (tuple, list)) else [args], strict=False)), **keywords}


def device_of(inputs: Any) -> torch.device:
    """Return the device of the first tensor in the inputs, or the CPU."""
    leaves = tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))


def has_decoder(inputs: Mapping[str, Any]) -> bool:
    """Return True if a decoder has inputs of its own."""
    return any(str(name).startswith("decoder_") for name in inputs)


def padding_mask(inputs: Mapping[str, Any], of_encoder: bool = False) -> Tensor | None:
    """Return where the positions of the logits, or of an encoder's features, are no padding; None without a mask.

    The mask is the input ``attention_mask``, or ``decoder_attention_mask`` where a decoder has inputs of its own and
    the mask is not ``of_encoder``.
    """
    mask = inputs.get("decoder_attention_mask" if has_decoder(inputs) and not of_encoder else "attention_mask")
    return mask != 0 if isinstance(mask, Tensor) else None


def counting_positions(targets: Tensor | None, inputs: Mapping[str, Any], positions: Sequence[int]) -> Tensor | None:
    """Return the targets, or without them the padding mask of the inputs where it has the logits' positions."""
    if targets is not None:
        return targets
    mask = padding_mask(inputs)
    return mask if mask is not None and mask.shape == torch.Size(positions) else None


def check_sequence(logits: Tensor, class_dim: int, inputs: Any) -> None:
    """Raise if nothing tells ``(B, C, L)`` from ``(B, L, C)``, where there are neither labels nor a padding mask.

    The inputs, where they are given, tell if one of them has the logits' first two dimensions, as tokens do, and other
    features than classes.

    Raises:
        ValueError: If the logits have three dimensions, and ``class_dim`` is the default that nobody may have meant.
    """
    if inputs is None or class_dim != -1 or logits.dim() != 3:
        return
    for leaf in tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs):
        alike = isinstance(leaf, Tensor) and leaf.shape[:2] == logits.shape[:2]
        if alike and (leaf.dim() == 2 or leaf.shape[-1] != logits.shape[-1]):
            return
    raise ValueError(
        f"logits of shape {tuple(logits.shape)} without labels fit (B, C, L) and (B, L, C) alike, and no input has "
        "their first two dimensions. Give the loss class_dim=1 or class_dim=2, or the batch labels or an "
        "attention_mask."
    )


def call_model(module: Callable[..., Any], inputs: Any) -> Any:
    """Call a network: with a mapping by keyword, a tuple or list by position, a :class:`Call` by both, or one argument.

    Raises:
        TypeError: If the network does not take these arguments.
    """
    if isinstance(inputs, Call):
        args, kwargs = inputs
    elif isinstance(inputs, Mapping):
        args, kwargs = (), inputs
    else:
        args, kwargs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
    if torch.compiler.is_compiling():
        return module(*args, **kwargs)
    try:
        return module(*args, **kwargs)
    except TypeError:
        _check_arguments(module, args, kwargs)
        raise


def _check_arguments(module: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    function = module.forward if type(module).__call__ is nn.Module.__call__ else module  # pyright: ignore
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin has none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [*(type(arg).__name__ for arg in args), *(f"{name}=…" for name in kwargs)]
        raise TypeError(
            f"{type(module).__name__} takes {signature}, but the batch gives ({', '.join(given)}): {error}. Override "
            "unpack_batch(batch) to return the inputs that both networks take."
        ) from None


def naming_inputs(call: Callable[[Any], Any], module: nn.Module, inputs: Any) -> Any:
    """Return ``call(inputs)``, which calls the teacher's network, or raise an error that names the inputs' shapes."""
    if torch.compiler.is_compiling():
        return call(inputs)
    try:
        return call(inputs)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        text = " ".join(str(error).split()).rstrip(".")
        if not re.search(r"shapes? |size|channels|out of range|dimension", text):
            raise
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
        raise ValueError(
            f"the teacher {type(module).__name__} cannot take the student's inputs, of shape {shapes}: {text}. Give a "
            "teacher of such inputs, or FrozenTeacher(network, transform=...), which makes its own of them."
        ) from error


def extract_logits(output: Any) -> Tensor:
    """Return the logits of a network's output.

    The logits are the output itself if it is a tensor, or ``.logits`` (Hugging Face), ``["logits"]`` or ``["out"]``.

    Raises:
        TypeError: If the output has none of these forms.

    Example:
        >>> extract_logits({"out": torch.zeros(1, 21, 8, 8)}).shape  # torchvision's segmentation models
        torch.Size([1, 21, 8, 8])
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if isinstance(output.get(key), Tensor):
                return output[key]
    keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise TypeError(
        f"found no logits in a model output of type {type(output).__name__}{keys}: expected a tensor, `.logits`, "
        "['logits'] or ['out']. Override extract_logits(output) of your DistillationModule or DistillationCallback; "
        "for several outputs to distil take OutputsKDLoss."
    )


def in_micro_batches(module: Callable[..., Any], inputs: Any, size: int) -> Any:
    """Call a network on micro-batches of at most ``size`` samples, and join the outputs.

    The first tensor's first dimension is the batch size. Tensors of that size are split; every micro-batch gets all
    other inputs whole. Output tensors, nested in any way, are joined along their first dimension; a tensor that
    every micro-batch returned, such as an output layer's weight, stays as it is.

    Raises:
        TypeError: If the inputs hold no tensor, or if an output cannot be joined.

    Example:
        >>> in_micro_batches(lambda x: {"logits": 2 * x}, torch.arange(5.0), 2)
        {'logits': tensor([0., 2., 4., 6., 8.])}
    """
    leaves, layout = tree_flatten(inputs)
    count = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0), None)
    if count is None:
        raise TypeError(f"micro_batch_size splits tensors, and found none in inputs of type {type(inputs).__name__}.")
    if count <= size:
        return call_model(module, inputs)

    def split(leaf: Any, start: int) -> Any:
        whole = not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != count
        return leaf if whole else leaf[start : start + size]

    parts = [
        tree_flatten(call_model(module, tree_unflatten([split(leaf, start) for leaf in leaves], layout)))
        for start in range(0, count, size)
    ]
    return tree_unflatten([_joined(pieces) for pieces in zip(*(part for part, _ in parts), strict=True)], parts[0][1])


def _joined(pieces: tuple[Any, ...]) -> Any:
    first = pieces[0]
    if isinstance(first, Tensor) and first.dim() > 0:
        return first if all(piece is first for piece in pieces) else torch.cat(pieces)
    if first is None or (isinstance(first, (bool, int, float, str)) and all(piece == first for piece in pieces)):
        return first
    what = "a tensor without a batch dimension" if isinstance(first, Tensor) else f"a {type(first).__name__}"
    raise TypeError(
        f"micro_batch_size joins tensors along the batch, but the teacher's output holds {what}. Have the teacher "
        "return its logits alone (Hugging Face: config.use_cache=False), or leave micro_batch_size out."
    )


class HiddenStates(NamedTuple):
    """Hidden states and output layer of a language model, whose logits are ``hidden @ weight.T + bias``.

    Attributes:
        hidden: ``(B, L, H)``: input of the output layer.
        weight: ``(V, H)``: weight of the output layer.
        bias: ``(V,)``: bias of the output layer, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def hidden_states(module: nn.Module, inputs: Any) -> HiddenStates:
    """Run a language model up to its output layer.

    The module must have ``base_model``, which maps inputs to hidden states (a tensor, or ``.last_hidden_state``), and
    ``get_output_embeddings()``, which returns a Linear. Hugging Face's causal models and
    :class:`~kd_lightning.models.CausalTransformer` have both.

    Raises:
        TypeError: If the module lacks either, or if its base model returns no hidden states.
        ValueError: If FSDP2 shards the output layer of a student apart from the module.
    """
    body, head = _body_and_head(module)
    if _is_sharded(module) and is_sharded(head.weight):
        module.reshard()  # pyright: ignore  (so that a weight that the forward gathers is another tensor after it)
    before = head.weight
    if _is_sharded(module):
        head.forward = lambda input: input  # the whole module runs, because its hooks gather the output layer's weight
        try:
            hidden = extract_logits(call_model(module, inputs))
        finally:
            del head.forward
    else:
        hidden = _last_hidden(call_model(body, inputs), module)
    weight, bias = head.weight, head.bias
    in_fsdp = is_sharded(weight) and any(_is_sharded(part) and head in part.modules() for part in module.modules())
    if in_fsdp and weight is before:
        if torch.is_grad_enabled():
            raise ValueError(
                f"the fused loss reads the output layer's weight after the forward, but the output layer of "
                f"{type(module).__name__} is sharded by itself. Leave it to the root: shard the blocks, then the model."
            )
        weight, bias = gathered(weight), gathered(bias)
    return HiddenStates(plain(hidden), weight, bias)


def check_hidden_states(module: nn.Module, inputs: Any) -> None:
    """Raise if a network's logits differ from its output layer applied to its hidden states, on the first sample."""
    body, head = _body_and_head(module)
    seen: dict[str, Any] = {}
    hooks = [
        body.register_forward_hook(lambda _, args, output: seen.update(body=output)),
        head.register_forward_hook(lambda _, args, output: seen.update(head=output, into_head=args[0])),
    ]
    try:
        with torch.no_grad():
            logits = extract_logits(call_model(module, _first_sample(inputs)))
    finally:
        for hook in hooks:
            hook.remove()

    def alike(a: Tensor, b: Tensor) -> bool:
        a, b = gathered(a), gathered(b)
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4, equal_nan=True)

    both_ran = "body" in seen and "head" in seen
    if not (both_ran and alike(_last_hidden(seen["body"], module), seen["into_head"]) and alike(seen["head"], logits)):
        raise ValueError(
            f"the logits of {type(module).__name__} are not its output layer applied to its base model's hidden "
            "states (a soft cap, a scale or an adapter comes in between), so the fused loss would train on others. "
            "Take KDLoss."
        )


def _is_sharded(module: nn.Module) -> bool:
    """Return True for a module that ``fully_shard`` was called on."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # here, because the import takes two seconds

    return isinstance(module, FSDPModule)


def _body_and_head(module: nn.Module) -> tuple[nn.Module, nn.Linear]:
    body, get_head = getattr(module, "base_model", None), getattr(module, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if not isinstance(body, nn.Module) or body is module or not isinstance(head, nn.Linear):
        raise TypeError(
            f"the fused loss needs a network with `base_model` (inputs → hidden states) and `get_output_embeddings()` "
            f"(a Linear), as Hugging Face's causal models have them; {type(module).__name__} has not. Take KDLoss."
        )
    return body, head


def _last_hidden(output: Any, module: nn.Module) -> Tensor:
    hidden = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"the base model of {type(module).__name__} gave no hidden states but {type(output).__name__}: expected a "
            "tensor or `.last_hidden_state`. Take KDLoss."
        )
    return hidden


def _first_sample(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[:1]
    if isinstance(inputs, Mapping):
        return {name: _first_sample(value) for name, value in inputs.items()}
    return [_first_sample(value) for value in inputs] if isinstance(inputs, (tuple, list)) else inputs
