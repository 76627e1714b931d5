"""Requests to a language model's server for the log-probabilities of given tokens, and its answers."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

Api: TypeAlias = Literal["vllm", "openai", "sglang"]
Rows: TypeAlias = "list[dict[int, float]]"
"""The log-probability of each named token, for each token of a prompt but the first."""
_ANSWER_LATER = (408, 425, 429)
_LONGEST_PAUSE = 30.0


class _UnfitError(ValueError):
    """An answer with what was asked for, but of no use."""


class Protocol(NamedTuple):
    """The requests and answers of a kind of server.

    Attributes:
        path: Of the endpoint, after the server's URL.
        body: From model, prompts, number of classes and temperature to the request.
        choices: From the answer to its part for each prompt.
        rows: From such a part and the prompt to the prompt's rows, and whether its tokens are the prompt's.
    """

    path: str
    body: Callable[[str, list[list[int]], int, float], dict[str, Any]]
    choices: Callable[[Any], list[Any]]
    rows: Callable[[Any, list[int]], tuple[Rows, bool]]


def _vllm_body(model: str, prompts: list[list[int]], k: int, temperature: float) -> dict[str, Any]:
    return {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": temperature, "prompt_logprobs": k}


def _vllm_rows(choice: Any, prompt: list[int]) -> tuple[Rows, bool]:
    named = [{int(token): entry["logprob"] for token, entry in row.items()} for row in choice["prompt_logprobs"][1:]]
    return named, all(token in row for token, row in zip(prompt[1:], named, strict=True))  # vLLM adds the prompt's own


def _openai_body(model: str, prompts: list[list[int]], k: int, temperature: float) -> dict[str, Any]:
    options = {"logprobs": k, "echo": True, "return_tokens_as_token_ids": True}
    return {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": temperature, **options}


def _openai_rows(choice: Any, prompt: list[int]) -> tuple[Rows, bool]:
    tokens = choice["logprobs"]["tokens"][: len(prompt)]
    rows = choice["logprobs"]["top_logprobs"][1 : len(prompt)]
    named = [{_token_id(token): value for token, value in row.items()} for row in rows]
    return named, [_token_id(token) for token in tokens] == prompt


def _sglang_body(model: str, prompts: list[list[int]], k: int, temperature: float) -> dict[str, Any]:
    sampling = {"max_new_tokens": 1, "temperature": temperature}
    wanted = {"return_logprob": True, "top_logprobs_num": k, "logprob_start_len": 0}
    return {"input_ids": prompts, "sampling_params": sampling, **wanted}


def _sglang_rows(choice: Any, prompt: list[int]) -> tuple[Rows, bool]:
    meta = choice["meta_info"]
    named = [{token: value for value, token, *_ in row} for row in meta["input_top_logprobs"][1:]]
    return named, [token for _, token, *_ in meta["input_token_logprobs"]] == prompt


def _in_order(answer: Any) -> list[Any]:
    return sorted(answer["choices"], key=lambda choice: choice["index"])


def _as_list(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else [answer]


def _token_id(token: str) -> int:
    name, _, number = token.partition(":")
    if name != "token_id" or not number.isdecimal():
        raise _UnfitError(
            f"it names tokens by their text, such as {token!r}, which several tokens may share. Have it give their "
            "numbers: api='vllm' or api='sglang'."
        )
    return int(number)


APIS: dict[str, Protocol] = {
    "vllm": Protocol("/completions", _vllm_body, _in_order, _vllm_rows),
    "openai": Protocol("/completions", _openai_body, _in_order, _openai_rows),
    "sglang": Protocol("/generate", _sglang_body, _as_list, _sglang_rows),
}


def ask(
    api: Api, url: str, body: tuple[str, list[list[int]], int, float], key: str | None, timeout: float, retries: int
) -> list[Rows]:
    """Ask a server for the largest log-probabilities of each token of each prompt but the first.

    ``body`` holds model, prompts, number of classes and temperature; the last three arguments are those of
    :func:`post`.
    """
    protocol = APIS[api]
    answer = post(url + protocol.path, protocol.body(*body), key, timeout, retries)
    try:
        found = []
        for choice, prompt in zip(protocol.choices(answer), body[1], strict=True):
            rows, aligned = protocol.rows(choice, prompt)
            if not aligned:
                raise _UnfitError(
                    "its tokens are not those of the prompt. Switch truncation and added special tokens off."
                )
            found.append(rows)
        return found
    except _UnfitError as error:
        what = str(error)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        what = f"it has another form ({type(error).__name__}: {error}). Take the api that the server speaks."
    raise ValueError(f"the answer of {url} is not that of api={api!r}: {what}")


def post(url: str, body: dict[str, Any], key: str | None, timeout: float, retries: int) -> Any:
    """Send a request, and return the decoded JSON of the answer.

    A connection that fails, a server that gives no answer within ``timeout`` seconds and a status of 408, 425, 429 or
    5xx are tried again after 0.5, 1, 2, … seconds, 30 at most.

    Raises:
        TimeoutError: If the last attempt had no answer in time.
        ConnectionError: If the last attempt failed in another way.
        ValueError: If the server refuses the request, or its answer is no JSON.
    """
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    failure: Exception = ConnectionError()
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(0.5 * 2 ** (attempt - 1), _LONGEST_PAUSE))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            said = _said(error)
            if error.code < 500 and error.code not in _ANSWER_LATER:
                raise ValueError(f"{url} refused the request with status {error.code}: {said}.") from None
            failure = ConnectionError(f"status {error.code}: {said}")
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            failure = reason if isinstance(reason, Exception) else ConnectionError(str(reason))
        else:
            try:
                return json.loads(content)
            except ValueError:
                raise ValueError(f"{url} answered no JSON but {content[:80]!r}: give the API's address.") from None
    if isinstance(failure, TimeoutError):
        raise TimeoutError(
            f"{url} gave no answer within {timeout:g} seconds in {retries + 1} attempts. Raise timeout, or ask for "
            "less at once: a smaller concurrency, batch or top_k."
        ) from failure
    what = " ".join(str(failure).split()).rstrip(".") or type(failure).__name__
    raise ConnectionError(
        f"there is no answer from {url} after {retries + 1} attempts, at last {what}. Start the server, or correct the "
        "url."
    ) from failure


def _said(error: urllib.error.HTTPError) -> str:
    """Return the server's own message, on one line and without a full stop."""
    text = error.read(2000).decode(errors="replace")
    try:
        content = json.loads(text)
        text = content.get("error", content).get("message", text)
    except (ValueError, AttributeError):
        pass  # because any text may come from a proxy
    return " ".join(str(text or error.reason).split()).rstrip(".")
