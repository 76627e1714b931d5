"""What must hold on an accelerator as on the CPU; here on the GPU where there is one, else on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kd_lightning import Distiller, FrozenTeacher
from kd_lightning.functional import kd_loss
from kd_lightning.temperature import EntropyTemperature, LearnableTemperature, LinearSchedule, Progress
from tests.helpers import make_teacher

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [0.5, 4.0, 20.0])
def test_loss_and_gradient_are_those_of_double_precision(dtype: torch.dtype, t: float) -> None:
    generator = torch.Generator().manual_seed(0)
    s, teacher = ((torch.randn(64, 1000, generator=generator) * 8).to(dtype) for _ in range(2))
    on_device = s.clone().to(DEVICE).requires_grad_()
    value = kd_loss(on_device, teacher.to(DEVICE), t)
    value.backward()
    exact = s.double().requires_grad_()
    p_t = (teacher.double() / t).softmax(-1)
    expected = t**2 * (p_t * ((teacher.double() / t).log_softmax(-1) - (exact / t).log_softmax(-1))).sum(-1).mean()
    expected.backward()
    assert on_device.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(value.cpu().double(), expected.detach(), rtol=1e-4, atol=1e-6)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    size = exact.grad.abs().max()
    torch.testing.assert_close(on_device.grad.cpu().double() / size, exact.grad / size, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the CPU has nothing to wait for")
@pytest.mark.parametrize("policy", [4.0, LinearSchedule(8.0, 2.0), EntropyTemperature(), LearnableTemperature()])
def test_a_step_does_not_wait_for_the_device(policy: object) -> None:
    student, inputs = nn.Linear(8, 6).to(DEVICE), torch.randn(16, 8, device=DEVICE)
    targets = torch.arange(16, device=DEVICE) % 6
    distiller = Distiller(make_teacher(), copy.deepcopy(policy)).to(DEVICE)  # pyright: ignore[reportArgumentType]
    steps = [Progress(step=step, max_steps=4) for step in range(4)]
    for progress in steps[:2]:  # allocations and first looks
        distiller(inputs, student(inputs), targets, progress).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for progress in steps[2:]:
            distiller(inputs, student(inputs), targets, progress).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("placement", ["cpu", "offload", "offload_whole"])
def test_a_teacher_on_the_host_teaches_the_same(placement: str) -> None:
    network, inputs = make_teacher(), torch.randn(16, 8)
    expected = FrozenTeacher(copy.deepcopy(network)).logits(inputs)
    teacher = FrozenTeacher(network, placement=placement)
    logits = teacher.logits(inputs.to(DEVICE))
    assert logits.device == inputs.to(DEVICE).device
    torch.testing.assert_close(logits.cpu(), expected)
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
