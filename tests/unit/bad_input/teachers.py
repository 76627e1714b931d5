"""Bad networks and bad files of weights."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_lightning import Distiller, FrozenTeacher
from tests.unit.bad_input.case import Case

FOLDER = Path(tempfile.mkdtemp())


def of_file(name: str, content: bytes) -> Callable[[], object]:
    def load() -> object:
        (FOLDER / name).write_bytes(content)
        return FrozenTeacher(nn.Linear(2, 2), FOLDER / name).load()

    return load


def of_script() -> object:
    with warnings.catch_warnings():  # of torch, about TorchScript
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), FOLDER / "script.pt")
        return FrozenTeacher(nn.Linear(2, 2), FOLDER / "script.pt").load()


def teacher(network: Any = None, **options: Any) -> Callable[[], object]:
    return lambda: FrozenTeacher(nn.Linear(2, 2) if network is None else network, **options)


def setting(name: str, value: Any) -> Callable[[], object]:
    return lambda: setattr(Distiller(None), name, value)


NUMBER = "temperature must be a positive, finite number within the policy's bounds [0.05, 100], got {}. "
USUAL = "Usual values lie between 1 and 20; the bounds are arguments."
PRECISION = "precision must be one of 'fp32', 'bf16', 'fp16' or None, got {!r}."
MICRO = "micro_batch_size must be 1 or more, or None for all at once, got {}."
NAME = "fingerprint must be a text that names the weights, such as 'v3', got {!r}."
CASES = [
    *(
        Case(f"{kind.__class__.__name__} as teacher", teacher(kind), TypeError,
             f"a teacher must be an nn.Module, got {type(kind).__name__}.")
        for kind in ("resnet", 3, 0.5, {"weight": torch.ones(1)}, [nn.Linear(2, 2)], torch.ones(2))
    ),
    Case("a class as teacher", teacher(nn.Identity), TypeError,
         "a teacher must be an nn.Module, got type. Pass an instance, not the class."),
    *(Case(f"precision {value!r}", teacher(precision=value), ValueError, PRECISION.format(value))
      for value in ("16", "bf16-mixed", "float32", "int8", 16)),
    *(Case(f"micro_batch_size {value}", teacher(micro_batch_size=value), ValueError, MICRO.format(value))
      for value in (0, -1, -8)),
    *(Case(f"fingerprint {value!r}", teacher(fingerprint=value), ValueError, NAME.format(value))
      for value in ("", 3, b"v3", 0.5)),
    Case(
        "meta without a checkpoint", teacher(nn.Linear(2, 2, device="meta")), ValueError,
        "the teacher Linear has weights on the meta device, which have no values. Give FrozenTeacher(module, "
        "checkpoint=...), or FrozenTeacher(module, fingerprint='model v3') if accelerate offloads them.",
    ),
    *(
        Case(f"a truncated file {len(content)}", of_file(f"short{len(content)}.pt", content), ValueError,
             f"{FOLDER}/short{len(content)}.pt could not be read as weights: its {len(content)} bytes are truncated or "
             "no file of torch.save. Copy or save it again.")
        for content in (b"", b"PK\x03\x04" + bytes(40))
    ),
    Case(
        "a truncated safetensors file", of_file("short.safetensors", b""), ValueError,
        f"{FOLDER}/short.safetensors is no readable safetensors file: Error while deserializing header: header too "
        "small.",
    ),
    Case(
        "a TorchScript file as weights", of_script, ValueError,
        f"{FOLDER}/script.pt holds a TorchScript program, which is a network and not weights. Give "
        "FrozenTeacher(torch.jit.load(path)).",
    ),
    *(Case(f"temperature set to {value}", setting("temperature", value), ValueError, NUMBER.format(value) + USUAL)
      for value in (-1.0, 0.0, float("inf"), float("nan"), 1000.0)),
    *(Case(f"{name} set to {value}", setting(name, value), ValueError,
           f"ConstantSchedule: value must be a finite number, not negative, got {value}.")
      for name in ("kd_weight", "task_weight") for value in (-1, -0.5, float("inf"), float("nan"))),
    *(Case(f"{name} set to {value!r}", setting(name, value), TypeError,
           f"{name} must be a number or a schedule (Progress → number), got {value!r}.")
      for name in ("kd_weight", "task_weight") for value in (None, "0.5", [0.5])),
    Case("teacher set to a text", setting("teacher", "resnet"), ValueError,
         "a teacher written as text is 'batch:' and the key of its logits in the batch, got 'resnet'. Write "
         "'batch:teacher_logits', or give a network or a Teacher."),
]  # fmt: skip
