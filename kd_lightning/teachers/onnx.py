"""An ONNX file as a teacher."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, override

from kd_lightning.teachers.cache import TeacherCache
from kd_lightning.teachers.function import FunctionTeacher
from kd_lightning.teachers.made_at import Output
from kd_lightning.teachers.transforms import Renormalize, with_transform

_SESSIONS: dict[int, Any] = {}  # because a fork that collects a session waits for threads that it does not have
_FLOATING = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


class OnnxTeacher(FunctionTeacher):
    """An ONNX file as teacher, run by onnxruntime (``pip install "kd-lightning[onnxruntime]"``).

    The session is made at first use, with onnxruntime's own choice of threads. A tensor is the file's only input, a
    tuple gives its inputs by position, a mapping by name; floating-point inputs are cast to the type that the file
    declares. Of several outputs the one called ``logits`` counts. Tensors pass through the host.

    Args:
        path: The file. Weights in files beside it are part of the fingerprint.
        output: What the file computes: ``"logits"``, ``"log_probs"`` (natural) or ``"probs"``.
        temperature: :math:`T_0`, at which the outputs were made; see :class:`FunctionTeacher`.
        providers: onnxruntime's execution providers in the order of preference. None: the CPU.
        cache: Where its logits are kept, by sample.
        transform: From the inputs to those that the file takes; see :class:`~kd_lightning.FrozenTeacher`.

    Raises:
        ValueError: If an option is outside its range; on the call, if the inputs do not fit the file's.
        FileNotFoundError: On first use, if the file does not exist.
        ModuleNotFoundError: On first use, if onnxruntime is not installed.

    Example:
        >>> OnnxTeacher("teacher.onnx", output="probs")  # read when it is first needed
        OnnxTeacher(teacher.onnx, output='probs', temperature=1)
    """

    def __init__(
        self,
        path: str | Path,
        output: Output = "logits",
        temperature: float = 1.0,
        providers: list[str] | None = None,
        cache: TeacherCache | None = None,
        transform: Renormalize | Callable | None = None,  # YAML: Renormalize, or a class by its path
    ) -> None:
        super().__init__(self._run, output, temperature, str(path), cache, transform)
        self.checkpoint = str(path)
        self.providers = ["CPUExecutionProvider"] if providers is None else providers
        self.loaded = False
        self._session: Any = None
        self._fingerprint: str | None = None

    @override
    def available(self) -> bool:
        return self.loaded or Path(self.name).is_file()

    @override
    def load(self) -> Self:
        """Make the session, the first time only."""
        if self._session is None:
            try:
                import onnxruntime
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "OnnxTeacher needs onnxruntime, which is not installed: pip install 'kd-lightning[onnxruntime]'."
                ) from error
            if not Path(self.name).is_file():
                raise FileNotFoundError(
                    f"there is no ONNX file at {self.name!r} (from the folder {str(Path.cwd())!r}). Correct the path, "
                    "or write it: torch.onnx.export(network, inputs, path)."
                )
            self._session = session = onnxruntime.InferenceSession(self.name, providers=self.providers)
            _SESSIONS[id(session)] = session
            weakref.finalize(self, _release, id(session), os.getpid())
            self.loaded = True
        return self

    @override
    def fingerprint(self) -> str:
        """Hash the file, the files beside it that it names, and at which temperature what is given."""
        if self._fingerprint is None:
            path = Path(self.load().name)
            content = path.read_bytes()
            digest = hashlib.blake2b(content + self._made_at.encode(), digest_size=16)
            for beside in sorted(path.parent.iterdir()):
                if beside != path and beside.is_file() and beside.name.encode() in content:
                    digest.update(beside.read_bytes())
            self._fingerprint = digest.hexdigest()
        return with_transform(self._fingerprint, self.transform)

    @torch.compiler.disable
    def _run(self, *args: Tensor, **kwargs: Tensor) -> Any:
        wanted = {node.name: node for node in self.load()._session.get_inputs()}
        given = dict(zip(wanted, args, strict=False)) | kwargs
        if given.keys() != wanted.keys() or len(given) != len(args) + len(kwargs):
            got = f"the keys {', '.join(kwargs)}" if kwargs else f"{len(args)} by position"
            raise ValueError(
                f"{self.name} takes the inputs {', '.join(wanted)}, got {got}. Give exactly these: a tensor, a tuple "
                "in this order, or a mapping with these keys."
            )
        feed: dict[str, Any] = {}
        for name, tensor in given.items():
            dtype = _FLOATING.get(wanted[name].type, tensor.dtype) if tensor.is_floating_point() else tensor.dtype
            feed[name] = tensor.to(dtype).cpu().numpy()
        names = [node.name for node in self._session.get_outputs()]
        try:
            outputs = self._session.run(None, feed)
        except Exception as error:  # onnxruntime's own classes, which derive from nothing else
            shapes = ", ".join(f"{node.name} {node.type} {node.shape}" for node in wanted.values())
            received = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in feed.items())
            raise ValueError(
                f"{self.name} takes {shapes}, got {received}. Give it such inputs, or export it with a batch dimension "
                "of any size (dynamic_shapes). onnxruntime says: " + " ".join(str(error).split())
            ) from error
        tensors = [torch.from_numpy(output) for output in outputs]
        return tensors[0] if len(tensors) == 1 else dict(zip(names, tensors, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_session": None}  # because a session is not pickled, but made again


def _release(session: int, process: int) -> None:
    """Let a session be collected in the process that made it, and in no fork of that process."""
    if os.getpid() == process:
        del _SESSIONS[session]
