"""The recipe of docs/hugging-face-trainer.md, whose class is read from the page."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning import Distiller

PAGE = Path(__file__).parents[3] / "docs" / "hugging-face-trainer.md"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_is_that_of_one_batch_however_it_is_accumulated(size: int, accumulate: int, tmp_path: Path) -> None:
    """Rows of unequal length: a mean of means would differ."""
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    names: dict[str, Any] = {}
    code = re.findall(r"^```python\n(.*?)^config = ", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)[0]
    exec(compile(code, PAGE.name, "exec"), names)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    student, teacher = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    teacher.transformer.ln_f.weight.data.mul_(3)  # stands for training
    tokens = torch.randint(0, 32, (4, 8))
    labels = tokens.clone()
    for row, length in enumerate((8, 3, 5, 4)):
        labels[row, length:] = -100
    labels[:, 0] = -100  # as in the recipe
    data = [{"input_ids": ids, "labels": row} for ids, row in zip(tokens, labels, strict=True)]
    reference = copy.deepcopy(student).double()
    loss = expected_loss(reference, copy.deepcopy(teacher).double(), tokens, labels)
    loss.backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter -= 0.1 * parameter.grad
    trainer = names["DistillationTrainer"](
        model=student,
        args=transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
            learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, use_cpu=True,
            dataloader_pin_memory=False, report_to=[], disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=data,
        distiller=Distiller(teacher, temperature=2.0, kd_weight=0.9, task_weight=0.1),
    )  # fmt: skip
    trainer.train()
    for ours, theirs in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=1e-6, rtol=1e-4)


def expected_loss(student: Any, teacher: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    counted = targets != -100
    with torch.no_grad():
        taught = teacher(input_ids=tokens).logits[counted]
    learnt = student(input_ids=tokens).logits[counted]
    p_t = (taught / 2).softmax(-1)
    soft = (p_t * (p_t.log() - (learnt / 2).log_softmax(-1))).sum(-1).mean() * 4
    hard = torch.nn.functional.cross_entropy(learnt, targets[counted])
    return 0.9 * soft + 0.1 * hard
