"""A small HTTP server of a language model, which answers as vLLM, SGLang and OpenAI-compatible servers do."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn

LOCK = threading.Lock()


@dataclass
class LanguageServer:
    """The answers of the server; tests change them while it runs.

    Attributes:
        network: From tokens to logits.
        follows: Whether prompts' log-probabilities follow the request's temperature, as those of patched servers.
        divides: A temperature that the server applies by itself.
        texts: Whether tokens are named by their text.
        raw_logits: Whether logits are given for log-probabilities.
        most: Log-probabilities a token at most.
        failures: Statuses (0: a dropped connection) of the next answers.
        delay: Seconds before each answer.
        drops: Tokens that are cut off each prompt.
        reply: An answer in the place of the right one.
        requests: The bodies received.
        keys: The headers ``Authorization`` received.
    """

    network: nn.Module
    url: str = ""
    follows: bool = False
    divides: float = 1.0
    texts: bool = False
    raw_logits: bool = False
    most: int = 1000
    failures: list[int] = field(default_factory=list)
    delay: float = 0.0
    drops: int = 0
    reply: Any = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def values(self, prompt: list[int], temperature: float) -> torch.Tensor:
        with LOCK, torch.no_grad():
            logits = self.network(torch.tensor([prompt]))[0].double()
        scaled = logits / (temperature if self.follows else 1.0) / self.divides
        return scaled if self.raw_logits else scaled.log_softmax(-1)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if self.reply is not None:
            return self.reply
        native = path == "/generate"
        prompts = body["input_ids" if native else "prompt"]
        prompts = [prompt[: len(prompt) - self.drops] for prompt in prompts]
        temperature = (body["sampling_params"] if native else body)["temperature"]
        values = [self.values(prompt, temperature) for prompt in prompts]
        if native:
            return [self.sglang(*each, body["top_logprobs_num"]) for each in zip(prompts, values, strict=True)]
        choices = [self.choice(*each, body) | {"index": i} for i, each in enumerate(zip(prompts, values, strict=True))]
        return {"object": "text_completion", "model": body["model"], "choices": choices[::-1]}

    def top(self, row: torch.Tensor, k: int) -> list[tuple[int, float]]:
        found = row.topk(min(k, self.most))
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def choice(self, prompt: list[int], values: torch.Tensor, body: dict[str, Any]) -> dict[str, Any]:
        def name(token: int) -> str:
            return f"<{token}>" if self.texts else f"token_id:{token}"

        if "prompt_logprobs" in body:
            rows: list[Any] = [None]
            for token, row in zip(prompt[1:], values, strict=False):
                entries = [(token, float(row[token])), *self.top(row, body["prompt_logprobs"])]
                rank = {entry: 1 + int((row > value).sum()) for entry, value in entries}
                rows.append({str(i): {"logprob": v, "rank": rank[i], "decoded_token": name(i)} for i, v in entries})
            return {"text": "…", "logprobs": None, "finish_reason": "length", "prompt_logprobs": rows}
        assert body["echo"]
        tops = [None, *({name(i): v for i, v in self.top(row, body["logprobs"])} for row in values)]
        tokens = [*prompt, int(values[-1].argmax())]  # and the token that is generated
        chosen = [None, *(float(row[token]) for token, row in zip(tokens[1:], values, strict=True))]
        logprobs = {"tokens": [name(i) for i in tokens], "token_logprobs": chosen, "top_logprobs": tops}
        return {"text": "…", "finish_reason": "length", "logprobs": logprobs}

    def sglang(self, prompt: list[int], values: torch.Tensor, k: int) -> dict[str, Any]:
        tops = [None, *([[v, i, None] for i, v in self.top(row, k)] for row in values[:-1])]
        chosen = [[None, prompt[0], None]]
        chosen += [[float(row[token]), token, None] for token, row in zip(prompt[1:], values, strict=False)]
        return {"text": "…", "meta_info": {"input_token_logprobs": chosen, "input_top_logprobs": tops}}


@contextlib.contextmanager
def serving(network: nn.Module, **options: Any) -> Iterator[LanguageServer]:
    """Serve a network on a port of this machine."""
    served = LanguageServer(network, **options)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with LOCK:
                served.requests.append(body)
                served.keys.append(self.headers["Authorization"])
                status = served.failures.pop(0) if served.failures else 200
            time.sleep(served.delay)
            if status == 0:
                self.close_connection = True
                return
            answer = served.answer(self.path, body) if status == 200 else {"error": {"message": "not\nnow."}}
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
