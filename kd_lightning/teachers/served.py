"""A language model behind an HTTP server as a teacher."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from typing_extensions import override

from kd_lightning.functional import Sparse
from kd_lightning.functional.rows import check_option
from kd_lightning.functional.sparse import TAILS, TOLERANCE, Tail
from kd_lightning.teachers.cache import TeacherCache
from kd_lightning.teachers.completions import APIS, Api, Rows, ask
from kd_lightning.teachers.function import FunctionTeacher
from kd_lightning.teachers.weights import hashed

_PROBE = 16  # tokens of the prompt that finds out whether the server follows the request's temperature


class ServedTeacher(FunctionTeacher):
    r"""A language model behind an HTTP server as teacher: vLLM, SGLang, or what answers as they do.

    The server gets each batch's token ids and returns the k largest log-probabilities of each next token, so that the
    teacher gives :class:`~kd_lightning.functional.Sparse` targets ``(B, L, k)``. As of logits, the row at position i is
    the distribution of token i + 1. Each prompt is sent with its last token repeated, since servers describe the
    tokens that they are given: a model of ``max_model_len`` n takes sequences of n − 2 tokens.

    Inputs are token ids (B, L), or a mapping with the key ``input_ids``, whose other keys are not sent. Where it has an
    ``attention_mask``, masked tokens are not sent, and their rows hold no probability: the targets must mask them.

    vLLM and SGLang compute the log-probabilities of prompts at temperature 1, whatever temperature a request has; some
    patched servers follow the request. Before its first batch the teacher asks for one prompt at two temperatures, and
    raises if ``temperature`` declares something else. A server that divides by a fixed temperature of its own cannot be
    recognised, and must not be used.

    Each batch is spread over ``concurrency`` requests. With a ``cache`` the server is asked once for each sample, and
    in each process for one stored batch to compare.

    Args:
        url: Of the server, with the ``/v1`` of an OpenAI-compatible one: ``"http://host:8000/v1"``; for
            ``api="sglang"`` without: ``"http://host:30000"``.
        model: The model's name on the server; with the options it is the fingerprint. SGLang serves one model and is
            not sent the name.
        top_k: k, at least 1. vLLM allows 20, unless started with ``--max-logprobs``.
        api: ``"vllm"``: completions with ``prompt_logprobs``. ``"openai"``: completions with ``echo`` and ``logprobs``,
            of servers that name tokens as ``token_id:5`` on request. ``"sglang"``: SGLang's own ``/generate``, since
            its completions name tokens by their text.
        temperature: :math:`T_0`, at which the log-probabilities are made; see above.
        tail: What becomes of the rest of the probability; see :class:`~kd_lightning.functional.Sparse`. With
            ``"bucket"`` and ``"drop"`` the teacher's temperature in the loss must be :math:`T_0`.
        cache: Where the targets are kept, by sample: a :class:`TeacherCache` of the same ``top_k``.
        timeout: Seconds without an answer that fail an attempt.
        retries: Attempts after the first, 0.5, 1, 2, … seconds later, where the connection fails, the server is too
            slow or its status is 408, 425, 429 or 5xx.
        concurrency: Requests at once.
        api_key_env: Name of the environment variable that holds the API key. The key is read for each batch and is in
            no hyper-parameter, checkpoint or message. None: no key is sent.

    Raises:
        ValueError: If an argument is outside its range; on the call, if the server refuses the request, its answer does
            not fit, or the declared temperature is not the served one; in the loss, if a token is outside the student's
            classes.
        ConnectionError: On the call, if the server cannot be reached or fails.
        TimeoutError: On the call, if the server is too slow.

    Example:
        >>> ServedTeacher("http://localhost:8000/v1", "Qwen/Qwen3-8B", top_k=20)  # asked when first needed
        ServedTeacher(Qwen/Qwen3-8B at http://localhost:8000/v1, api='vllm', top_k=20, temperature=1, tail='bucket')
    """

    def __init__(
        self,
        url: str,
        model: str,
        top_k: int = 20,
        api: Api = "vllm",
        temperature: float = 1.0,
        tail: Tail = "bucket",
        cache: TeacherCache | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        concurrency: int = 8,
        api_key_env: str | None = None,
    ) -> None:
        super().__init__(self._ask, "log_probs", temperature, model, cache)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be that of a server, such as 'http://localhost:8000/v1', got {url!r}.")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "url holds a user name or password, and would be in hyper-parameters and checkpoints. Put the key into "
                "an environment variable and name it: ServedTeacher(..., api_key_env='NAME')."
            )
        check_option("api", api, tuple(APIS))
        check_option("tail", tail, TAILS)
        for name, value, least in (("top_k", top_k, 1), ("retries", retries, 0), ("concurrency", concurrency, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout must be a positive, finite number of seconds, got {timeout!r}.")
        if cache is not None and cache.top_k != top_k:
            raise ValueError(
                f"the cache keeps top_k={cache.top_k} log-probabilities, the server gives top_k={top_k}: "
                f"TeacherCache(..., top_k={top_k})."
            )
        self.url = url.rstrip("/")
        self.model = model
        self.top_k = top_k
        self.api: Api = api
        self.tail: Tail = tail
        self.timeout = timeout
        self.retries = retries
        self.concurrency = concurrency
        self.api_key_env = api_key_env
        self._temperature_is_checked = False

    @override
    def as_given(self, target: Sparse) -> Sparse:
        return target

    @override
    def fingerprint(self) -> str:
        """Hash the model's name, and which of its probabilities at which temperature are asked for."""
        return hashed(f"served:{self.model} {self._asked}")

    @torch.compiler.disable
    def _ask(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Sparse:
        ids, mask = self._checked_inputs(input_ids, attention_mask)
        prompts: list[list[int]] = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        asked = [[*prompt, prompt[-1]] for prompt in prompts if prompt]
        if asked and not self._temperature_is_checked:
            self._check_temperature(asked[0][:_PROBE])
            self._temperature_is_checked = True
        indices = torch.zeros(*ids.shape, self.top_k, dtype=torch.long)
        log_probs = torch.full(indices.shape, -torch.inf)
        if asked:
            found = [self._largest(row) for rows in self._spread(asked) for row in rows]
            indices[mask] = torch.tensor([[token for token, _ in row] for row in found])
            log_probs[mask] = self._checked_values(torch.tensor([[value for _, value in row] for row in found]))
        return Sparse(indices, log_probs, self.temperature, self.tail)

    def _spread(self, prompts: list[list[int]]) -> list[Rows]:
        size = -(-len(prompts) // self.concurrency)
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        with ThreadPoolExecutor(len(parts)) as pool:
            return [rows for part in pool.map(self._request, parts) for rows in part]

    def _request(self, prompts: list[list[int]], temperature: float | None = None) -> list[Rows]:
        key = None
        if self.api_key_env is not None and not (key := os.environ.get(self.api_key_env)):
            raise ValueError(
                f"api_key_env={self.api_key_env!r} names no environment variable with a key: export it in the shell "
                "that starts the run, or leave api_key_env out."
            )
        wanted = self.model, prompts, self.top_k, self.temperature if temperature is None else temperature
        return ask(self.api, self.url, wanted, key, self.timeout, self.retries)

    def _largest(self, row: dict[int, float]) -> list[tuple[int, float]]:
        if len(row) < self.top_k:
            raise ValueError(
                f"{self.url} gave {len(row)} log-probabilities for a token, asked for top_k={self.top_k}. Ask for at "
                "most as many as the server gives, and fewer than the model has tokens."
            )
        return sorted(row.items(), key=lambda entry: entry[1], reverse=True)[: self.top_k]

    def _checked_values(self, log_probs: Tensor) -> Tensor:
        total = log_probs.exp().sum(-1)
        if not bool((total <= 1 + TOLERANCE).all()):  # NaN fails
            raise ValueError(
                f"the numbers of {self.url} are no log-probabilities: those of one token are {float(total.max()):.4g} "
                "in the sum of their exponentials, which is at most 1. Start vLLM with --logprobs-mode raw_logprobs."
            )
        return log_probs

    def _check_temperature(self, prompt: list[int]) -> None:
        """Ask for a prompt at the temperatures 1 and 2; log-probabilities that follow lie half as far apart at 2."""
        spreads = []
        for temperature in (1.0, 2.0):
            (rows,) = self._request([prompt], temperature)
            values = torch.tensor([[value for _, value in self._largest(row)] for row in rows])
            spreads.append(float((values[:, 0] - values[:, -1]).sum()))
        ratio = spreads[0] / spreads[1] if spreads[1] > 0 else 1.0
        if 1.25 < ratio < 1.6 or not 0.8 < ratio < 2.5:
            raise ValueError(
                f"the log-probabilities of {self.url} lie {ratio:.2f} times as far apart at the request's temperature "
                "1 as at 2, where a server that follows the request gives 2 and another 1: at which temperature they "
                "were made cannot be told. Serve raw log-probabilities, without top_p and penalties."
            )
        if ratio < 1.25 and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature:g} is declared, but {self.url} gives the same log-probabilities at "
                "every temperature of the request, and so those of temperature 1. Declare temperature=1.0; tail="
                "'uniform' or 'renormalize' brings them to the temperature of the loss."
            )

    @staticmethod
    def _checked_inputs(ids: Any, mask: Any) -> tuple[Tensor, Tensor]:
        integers = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.dtype == torch.bool)
        if not integers or ids.dim() != 2:
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"a ServedTeacher takes token ids (B, L) of an integer type, got {got}.")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape {tuple(ids.shape)} of the token ids, got {tuple(mask.shape)}."
            )
        ids = ids.cpu()
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu() != 0
        if bool((ids[keep] < 0).any()):
            raise ValueError(
                f"token ids must not be negative, got {int(ids[keep].min())}. Give the inputs, not the labels; an "
                "attention_mask marks padding."
            )
        return ids, keep

    @property
    def _asked(self) -> str:
        return f"api={self.api!r}, top_k={self.top_k}, temperature={self.temperature:g}, tail={self.tail!r}"

    @override
    def __repr__(self) -> str:
        cache = "" if self.cache is None else f", cache={str(self.cache.path)!r}"
        return f"{type(self).__name__}({self.model} at {self.url}, {self._asked}{cache})"
