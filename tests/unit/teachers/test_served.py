"""A language model behind an HTTP server, which runs in these tests."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, Distiller, TeacherCache, TeacherEnsemble
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.functional import Sparse
from kd_lightning.models import CausalTransformer
from kd_lightning.teachers import FunctionTeacher, ServedTeacher
from tests.helpers import assert_same
from tests.unit.teachers.language_server import LanguageServer, serving

MakeTrainer = Callable[..., Trainer]
APIS: tuple[Any, ...] = ("vllm", "openai", "sglang")
VOCABULARY, LENGTH = 13, 6


def model(seed: int) -> CausalTransformer:
    torch.manual_seed(seed)
    network = CausalTransformer(VOCABULARY, dim=8, depth=1, heads=2, max_length=LENGTH + 1)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # stands for training
    return network


def inputs(left: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : 2 if left else None] = 0
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def samples() -> list[dict[str, Tensor]]:
    batch = inputs()
    batch["attention_mask"][:] = 1
    return [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"]]


@pytest.fixture
def server() -> Iterator[LanguageServer]:
    with serving(model(2).eval()) as served:
        yield served


def teacher_of(server: LanguageServer, **options: Any) -> ServedTeacher:
    settings: dict[str, Any] = {"top_k": 4, "concurrency": 3} | options
    return ServedTeacher(server.url, "tiny", **settings)


def distil(teacher: Any, **options: Any) -> DistillationModule:
    options = {"temperature": 1.0, "shift_labels": True, "kd_weight": 0.7, "task_weight": 0.3} | options
    return DistillationModule(model(1), teacher, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options)


def fit(module: Any, trainer: Trainer, data: Any = None, **options: Any) -> dict[str, float]:
    data = samples() if data is None else data
    trainer.fit(module, DataLoader(data, batch_size=4), **options)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


# ---- values ------------------------------------------------------------------------------------------------------


def by_hand(student: Tensor, network: nn.Module, ids: Tensor, k: int, t: float) -> Tensor:
    """T² KL of the k + 1 categories, position by position, in float64."""
    total = student.new_zeros(())
    for row, logits in zip(ids, student, strict=True):
        for position in range(len(row)):
            q = (network(row[None, : position + 1])[0, -1].double() / t).softmax(-1)
            top = q.topk(k).indices
            p = (logits[position] / t).softmax(-1)
            for class_ in top:
                total = total + q[class_] * (q[class_] / p[class_]).log()
            rest = 1 - q[top].sum()
            total = total + rest * (rest / (1 - p[top].sum())).log()
    return total * t * t / ids.numel()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient(server: LanguageServer, api: Any, temperature: float) -> None:
    server.follows = temperature != 1
    ids = inputs()["input_ids"]
    student = torch.randn(8, LENGTH, VOCABULARY, dtype=torch.float64, requires_grad=True)
    expected = by_hand(student, server.network, ids, 4, temperature)
    (gradient,) = torch.autograd.grad(expected, student)
    distiller = Distiller(teacher_of(server, api=api, temperature=temperature), temperature, task_weight=0.0)
    loss = distiller(ids, student).kd_loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], gradient, rtol=1e-4, atol=1e-7)
    assert len(server.requests) == 2 + 3  # the check of the temperature, and the batch


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("left", [False, True])
def test_padding_is_not_sent(server: LanguageServer, api: Any, left: bool) -> None:
    batch = inputs(left)
    found = teacher_of(server, api=api).logits(batch)
    keep = batch["attention_mask"][1] != 0
    alone = Sparse.top_k(server.network(batch["input_ids"][1:2, keep]), 4)
    assert torch.equal(found.indices[1, keep], alone.indices[0])
    torch.testing.assert_close(found.log_probs[1, keep], alone.log_probs[0])
    assert (found.log_probs[1, ~keep] == -torch.inf).all()
    assert found.log_probs[0].isfinite().all()
    loss = Distiller(teacher_of(server, api=api), 1.0, task_weight=0.0)(batch, torch.randn(8, LENGTH, VOCABULARY))
    assert loss.kd_loss.isfinite()


@pytest.mark.parametrize("api", APIS)
def test_a_run_is_that_of_the_network(server: LanguageServer, make_trainer: MakeTrainer, api: Any) -> None:
    network = server.network
    runs = []
    for teacher in (
        teacher_of(server, api=api),
        FunctionTeacher(lambda input_ids: Sparse.top_k(network(input_ids), 4)),
    ):
        module = distil(teacher)
        values = fit(module, make_trainer())
        runs.append((values["train_kd_loss"], module.student.state_dict()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for name, value in runs[1][1].items():
        torch.testing.assert_close(runs[0][1][name], value, rtol=1e-4, atol=1e-6)


def test_requests(server: LanguageServer) -> None:
    """Requests to vLLM, OpenAI-compatible servers and SGLang; the last token is sent twice."""
    ids = torch.tensor([[3, 1, 4]])
    for api in APIS:
        teacher_of(server, api=api).logits(ids)
    sampling = {"temperature": 1.0, "max_tokens": 1}
    vllm, openai, sglang = server.requests[2::3]
    assert vllm == {"model": "tiny", "prompt": [[3, 1, 4, 4]], "prompt_logprobs": 4, **sampling}
    named = {"echo": True, "logprobs": 4, "return_tokens_as_token_ids": True}
    assert openai == {"model": "tiny", "prompt": [[3, 1, 4, 4]], **named, **sampling}
    wanted = {"return_logprob": True, "top_logprobs_num": 4, "logprob_start_len": 0}
    sampling = {"temperature": 1.0, "max_new_tokens": 1}
    assert sglang == {"input_ids": [[3, 1, 4, 4]], "sampling_params": sampling, **wanted}


def test_rows_are_spread_over_requests(server: LanguageServer) -> None:
    ids = inputs()["input_ids"]
    one, many = (teacher_of(server, concurrency=n).logits(ids) for n in (1, 20))
    assert torch.equal(one.log_probs, many.log_probs)
    assert [len(body["prompt"]) for body in server.requests] == [1, 1, 8, 1, 1, *[1] * 8]


def test_nothing_to_ask(server: LanguageServer) -> None:
    found = teacher_of(server).logits({"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.zeros(2, 3)})
    assert (found.log_probs == -torch.inf).all()
    assert server.requests == []


# ---- the network between -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_attempts_after_a_failure(server: LanguageServer) -> None:
    ids = inputs()["input_ids"]
    expected = teacher_of(server).logits(ids)
    server.failures = [503, 0, 429]
    found = teacher_of(server, concurrency=1, retries=3).logits(ids)
    assert torch.equal(found.log_probs, expected.log_probs)
    server.failures = [500, 0]
    with pytest.raises(ConnectionError, match=r"no answer from .*after 2 attempts, at last Remote end closed"):
        teacher_of(server, concurrency=1, retries=1).logits(ids)


def test_a_slow_server(server: LanguageServer) -> None:
    server.delay = 1.0
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 seconds in 2 attempts\. Raise timeout"):
        teacher_of(server, timeout=0.1, retries=1).logits(inputs()["input_ids"])


def test_no_server() -> None:
    with pytest.raises(ConnectionError, match=r"after 1 attempts, at last .*refused.* Start the server"):
        ServedTeacher("http://127.0.0.1:9", "tiny", retries=0).logits(torch.ones(1, 3).long())


def test_the_key_is_sent_and_kept_nowhere(
    server: LanguageServer, monkeypatch: pytest.MonkeyPatch, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    monkeypatch.setenv("TINY_KEY", "sesame")
    teacher = teacher_of(server, api_key_env="TINY_KEY")
    trainer, module = make_trainer(max_epochs=1), distil(teacher)
    fit(module, trainer)
    assert set(server.keys) == {"Bearer sesame"}
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    for kept in ((tmp_path / "run.ckpt").read_bytes(), pickle.dumps(teacher), repr(teacher).encode()):
        assert b"sesame" not in kept
    server.keys.clear()
    teacher_of(server).logits(torch.ones(1, 3).long())
    assert set(server.keys) == {None}


# ---- the temperature ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
def test_a_wrong_temperature(server: LanguageServer, api: Any) -> None:
    teacher = teacher_of(server, api=api, temperature=2.0)
    with pytest.raises(ValueError, match=r"temperature=2 is declared, but .* those of temperature 1\. Declare"):
        teacher.logits(inputs())
    server.follows = True
    assert teacher.logits(inputs()).temperature == 2  # and it is asked for at 2


def test_targets_of_temperature_one_serve_another_loss(server: LanguageServer) -> None:
    ids, student = inputs()["input_ids"], torch.randn(8, LENGTH, VOCABULARY)
    with pytest.raises(ValueError, match="must be the same"):
        Distiller(teacher_of(server), 4.0, task_weight=0.0)(ids, student)
    spread = Distiller(teacher_of(server, tail="uniform"), 4.0, task_weight=0.0)(ids, student)
    exact = Distiller(server.network, 4.0, task_weight=0.0)(ids, student)
    assert spread.kd_loss == pytest.approx(float(exact.kd_loss), rel=0.2)


def test_a_temperature_that_cannot_be_told(server: LanguageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.follows = True
    monkeypatch.setattr(server, "values", lambda prompt, t: LanguageServer.values(server, prompt, 1 + (t - 1) * 0.4))
    with pytest.raises(ValueError, match=r"lie 1\.40 times as far apart .* cannot be told"):
        teacher_of(server).logits(inputs())


# ---- a run -------------------------------------------------------------------------------------------------------


def test_the_server_is_asked_once_with_a_cache(
    server: LanguageServer, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def cached() -> tuple[DistillationModule, dict[str, float]]:
        teacher = teacher_of(server, cache=TeacherCache(tmp_path / "served.cache", "float32", top_k=4), concurrency=1)
        module = distil(teacher)
        return module, fit(module, make_trainer(max_epochs=3), teacher.index(samples()))

    cold, _ = cached()
    assert len(server.requests) == 2 + 2 + 1  # the check, the first epoch, and one batch to compare
    plain = distil(teacher_of(server))
    fit(plain, make_trainer(max_epochs=3))
    for name, value in plain.student.state_dict().items():
        torch.testing.assert_close(cold.student.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    server.requests.clear()
    warm, _ = cached()
    assert len(server.requests) == 2 + 1  # the check, and one batch to compare
    assert_same(dict(cold.student.state_dict()), dict(warm.student.state_dict()))
    server.network = model(3).eval()
    with pytest.raises(ValueError, match="does not have what the teacher says of this batch"):
        cached()


def test_resume_is_exact(server: LanguageServer, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    whole = distil(teacher_of(server))
    fit(whole, make_trainer(max_epochs=3))
    trainer = make_trainer(max_epochs=2)
    fit(distil(teacher_of(server)), trainer)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = distil(teacher_of(server))
    fit(resumed, make_trainer(max_epochs=3), ckpt_path=tmp_path / "half.ckpt")
    assert_same(dict(whole.student.state_dict()), dict(resumed.student.state_dict()))
    with pytest.raises(RuntimeError, match="teacher"):
        fit(distil(teacher_of(server, top_k=5)), make_trainer(max_epochs=3), ckpt_path=tmp_path / "half.ckpt")


def test_two_ranks_train_as_one(server: LanguageServer, make_trainer: MakeTrainer) -> None:
    weights = {}
    for devices in (1, 2):
        options: dict[str, Any] = {"strategy": "ddp_fork", "use_distributed_sampler": True} if devices == 2 else {}
        module = distil(teacher_of(server))
        batch = 8 // devices
        trainer = make_trainer(devices=devices, **options)
        trainer.fit(module, DataLoader(samples(), batch_size=batch))  # pyright: ignore[reportArgumentType]
        weights[devices] = {name: value.clone() for name, value in module.student.state_dict().items()}
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[2][name], value, rtol=1e-4, atol=1e-6)


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = model(1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.net(input_ids)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, labels = batch
        return nn.functional.cross_entropy(self(ids).flatten(0, 1), labels.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_callback(server: LanguageServer, make_trainer: MakeTrainer) -> None:
    ids = inputs()["input_ids"]
    data: Any = [(row, row.roll(-1)) for row in ids]
    callback = DistillationCallback(teacher_of(server), temperature=1.0, targets=1)
    values = fit(Plain(), make_trainer(callbacks=[callback]), data)
    assert values["train_kd_loss"] > 0


def test_copies_and_fingerprints(server: LanguageServer) -> None:
    teacher = teacher_of(server)
    expected = teacher.logits(inputs())
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert twin.fingerprint() == teacher.fingerprint()
        assert torch.equal(twin.logits(inputs()).log_probs, expected.log_probs)
    elsewhere = ServedTeacher("https://other/v1", "tiny", 4)
    assert elsewhere.fingerprint() == teacher.fingerprint()  # because a server may move
    others = [ServedTeacher(server.url, "large", 4), teacher_of(server, top_k=5), teacher_of(server, tail="drop")]
    assert len({teacher.fingerprint(), *(other.fingerprint() for other in others)}) == 4


# ---- answers of no use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reply": b"<html>"}, r"answered no JSON but b'<html>': give the API's"),
        ({"reply": {}}, "is not that of api=.*another form"),
        ({"reply": {"choices": []}}, "is not that of api=.*another form"),
        ({"drops": 1}, "is not that of api="),
        ({"raw_logits": True}, r"no log-probabilities: .* --logprobs-mode raw_logprobs\."),
        ({"most": 3}, r"gave [34] log-probabilities for a token, asked for top_k=5\. Ask for"),
        ({"failures": [400]}, "refused the request with status 400: .*not now"),
    ],
)
def test_answers_of_no_use(server: LanguageServer, api: Any, change: dict[str, Any], message: str) -> None:
    for name, value in change.items():
        setattr(server, name, copy.copy(value))
    with pytest.raises(ValueError, match=message) as raised:
        teacher_of(server, api=api, top_k=5).logits(inputs())
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


def test_tokens_named_by_their_text(server: LanguageServer) -> None:
    server.texts = True
    teacher_of(server).logits(inputs())
    with pytest.raises(ValueError, match="names tokens by their text, such as '<"):
        teacher_of(server, api="openai").logits(inputs())


def test_a_token_that_the_student_has_not(server: LanguageServer) -> None:
    distiller = Distiller(teacher_of(server), 1.0, task_weight=0.0)
    with pytest.raises(ValueError, match="must be class numbers from 0 to 6, those of the student"):
        distiller(inputs()["input_ids"], torch.randn(8, LENGTH, 7))


def test_an_ensemble_needs_all_classes(server: LanguageServer) -> None:
    ensemble = TeacherEnsemble([teacher_of(server), teacher_of(server)])
    with pytest.raises(TypeError, match="an ensemble mixes the logits of all classes, got Sparse"):
        Distiller(ensemble, 1.0)(inputs()["input_ids"], torch.randn(8, LENGTH, VOCABULARY))


def test_json_is_all_that_is_sent(server: LanguageServer) -> None:
    teacher_of(server).logits({"input_ids": torch.ones(1, 3, dtype=torch.int32), "token_type_ids": torch.ones(1, 3)})
    assert json.dumps(server.requests[-1]["prompt"]) == "[[1, 1, 1, 1]]"
