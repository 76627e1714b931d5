"""Bad arguments of a served teacher, bad inputs to it, and targets that a cache does not keep."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from kd_lightning.functional import Sparse
from kd_lightning.fused_distiller import FusedDistiller
from kd_lightning.losses import FusedLinearKDLoss
from kd_lightning.teachers import ServedTeacher, TeacherCache
from tests.unit.bad_input.case import Case

URL = "http://127.0.0.1:9/v1"  # where no server is
FOLDER = Path(tempfile.mkdtemp())


def served(url: str = URL, **options: Any) -> Callable[[], object]:
    return lambda: ServedTeacher(url, "tiny", **options)


def asked(ids: Any, mask: Tensor | None = None, **options: Any) -> Callable[[], object]:
    inputs = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    return lambda: ServedTeacher(URL, "tiny", retries=0, **options).logits(inputs)


def kept(log_probs: list[float], temperature: float = 1.0, **options: Any) -> Callable[[], object]:
    def write() -> object:
        cache = TeacherCache(FOLDER / "served.cache", **options)
        cache.index(TensorDataset(torch.arange(1)), "teacher")
        target = Sparse(torch.tensor([[0, 3]]), torch.tensor([log_probs]), temperature)
        return cache.logits(torch.tensor([0]), lambda: target)

    return write


SERVER = "url must be that of a server, such as 'http://localhost:8000/v1', got {!r}."
TOKENS = "a ServedTeacher takes token ids (B, L) of an integer type, got {}."
WHOLE = "{} must be a whole number of at least {}, got {!r}."
SECONDS = "timeout must be a positive, finite number of seconds, got {!r}."
IDS = torch.ones(2, 3, dtype=torch.long)
CASES = [
    *(Case(f"url {url!r}", served(url), ValueError, SERVER.format(url))
      for url in ("", "localhost:8000", "ftp://host/v1", "http://", "/v1")),
    Case(
        "a key in the url", served("http://me:secret@host/v1"), ValueError,
        "url holds a user name or password, and would be in hyper-parameters and checkpoints. Put the key into an "
        "environment variable and name it: ServedTeacher(..., api_key_env='NAME').",
    ),
    *(Case(f"served top_k {k!r}", served(top_k=k), ValueError, WHOLE.format("top_k", 1, k))
      for k in (0, -1, 2.0, True)),
    Case("served retries -1", served(retries=-1), ValueError, WHOLE.format("retries", 0, -1)),
    Case("served concurrency 0", served(concurrency=0), ValueError, WHOLE.format("concurrency", 1, 0)),
    *(Case(f"timeout {t!r}", served(timeout=t), ValueError, SECONDS.format(t)) for t in (0.0, -1.0, float("inf"))),
    Case("an unknown api", served(api="ollama"), ValueError,
         "api must be one of 'vllm', 'openai', 'sglang', got 'ollama'."),
    Case("a served tail", served(tail="mean"), ValueError,
         "tail must be one of 'bucket', 'uniform', 'renormalize', 'drop', got 'mean'."),
    Case(
        "served at temperature 0", served(temperature=0.0), ValueError,
        "temperature is the one at which the teacher's outputs were made: it must be positive and finite, got 0.0. A "
        "plain softmax has 1; the temperature of the distillation is the Distiller's.",
    ),
    Case("served cache without top_k", served(cache=TeacherCache(FOLDER / "a")), ValueError,
         "the cache keeps top_k=None log-probabilities, the server gives top_k=20: TeacherCache(..., top_k=20)."),
    Case("floats as tokens", asked(torch.ones(2, 3)), ValueError, TOKENS.format("torch.float32 (2, 3)")),
    Case("one row of tokens", asked(IDS[0]), ValueError, TOKENS.format("torch.int64 (3,)")),
    Case("a list of tokens", asked([[1, 2]]), ValueError, TOKENS.format("list")),
    Case("a mask of other tokens", asked(IDS, IDS[:, :2]), ValueError,
         "attention_mask must have the shape (2, 3) of the token ids, got (2, 2)."),
    Case(
        "labels as tokens", asked(IDS.clone().fill_(-100)), ValueError,
        "token ids must not be negative, got -100. Give the inputs, not the labels; an attention_mask marks padding.",
    ),
    Case(
        "a variable without a key", asked(IDS, api_key_env="KD_LIGHTNING_NO_SUCH_KEY"), ValueError,
        "api_key_env='KD_LIGHTNING_NO_SUCH_KEY' names no environment variable with a key: export it in the shell that "
        "starts the run, or leave api_key_env out.",
    ),
    Case(
        "no server", asked(IDS), ConnectionError,
        "there is no answer from http://127.0.0.1:9/v1/completions after 1 attempts, at last [Errno 111] Connection "
        "refused. Start the server, or correct the url.",
    ),
    Case(
        "served targets for the fused loss",
        lambda: FusedDistiller(ServedTeacher(URL, "tiny"), 1.0, FusedLinearKDLoss()),
        ValueError,
        "FusedLinearKDLoss takes the hidden states of one teacher that runs: no ensemble, no cache and no layers go "
        "with it, and no targets of a few classes, as functions and servers give. Take KDLoss.",
    ),
    Case("a cache of logits for targets", kept([-1.0, -2.0]), TypeError,
         "a TeacherCache without top_k keeps logits, got Sparse targets of 2 classes: TeacherCache(..., top_k=2)."),
    Case("a cache of more targets", kept([-1.0, -2.0], top_k=3), ValueError,
         "the teacher gives Sparse targets of 2 classes, but the cache has top_k=3: TeacherCache(..., top_k=2)."),
    Case(
        "a cache of another temperature", kept([-1.0, -2.0], 2.0, top_k=2), ValueError,
        "the teacher gives Sparse targets made at temperature 2, but the cache is of temperature 1: TeacherCache(..., "
        "temperature=2).",
    ),
    *(Case(f"targets of {value} in a cache", kept([-1.0, value], top_k=2), ValueError,
           "the teacher's log-probabilities are not finite: they cannot be cached, nor learnt from.")
      for value in (float("nan"), float("inf"))),
]  # fmt: skip
