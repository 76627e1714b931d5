"""DeepSpeed (ZeRO 1, 2, 3) on two CPU processes: its own engine in a bare loop, and Lightning's DeepSpeedStrategy."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning import DistillationModule, Distiller, FrozenTeacher, LayerTerm
from kd_lightning.callbacks import DistillationCallback, GradientShare, SkipNonFinite
from kd_lightning.losses import HintLoss
from kd_lightning.schedules import Progress
from kd_lightning.teachers import EMATeacher
from kd_lightning.temperature import CosineSchedule, EntropyTemperature
from tests.helpers import LearnedTemperature, fit_in_order, make_data, make_network, on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # DeepSpeed calls what torch has deprecated

TEMPERATURES: dict[str, Any] = {
    "constant": 4.0,
    "scheduled": CosineSchedule(8, 2),
    "per sample": EntropyTemperature(),
    "learned": LearnedTemperature(),
}


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # DeepSpeed's Muon is compiled when a ZeRO engine starts
    deepspeed = pytest.importorskip("deepspeed")
    # a collective in shared memory, which would be compiled for minutes
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    return deepspeed


def network_of_teacher() -> nn.Module:
    torch.manual_seed(5)
    teacher = make_network(norm=False)
    for parameter in teacher.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return teacher


class Both(nn.Module):
    """What an engine of DeepSpeed trains: a student, and the Distiller with its policy."""

    def __init__(self, teacher: FrozenTeacher, temperature: Any) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.student = make_network(10, norm=False)
        self.distiller = Distiller(teacher, temperature=copy.deepcopy(temperature))

    @override
    def forward(self, inputs: Tensor, targets: Tensor, progress: Progress) -> Tensor:
        return self.distiller(inputs, self.student(inputs), targets, progress).loss


def batches(rank: int, world: int) -> Any:
    inputs, targets = make_data(64).tensors
    for step in range(8):
        rows = slice(16 * (step % 4) + rank, 16 * (step % 4) + 16, world)
        yield inputs[rows], targets[rows], Progress(step=step, max_steps=8, epoch=step // 4, max_epochs=2)


def state_of(deepspeed: Any, module: nn.Module, stage: int) -> dict[str, Tensor]:
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=stage == 3):
        return {name: value.clone() for name, value in module.state_dict().items()}


def check(have: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    assert have.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(have[name], value, rtol=1e-5, atol=1e-6, msg=f"{what}: {name}")


def config(stage: int) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.0,  # where it is left out, DeepSpeed clips to a norm of 1
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def check_engine(rank: int, deepspeed: Any, wanted: dict[str, dict[str, Tensor]]) -> None:
    deepspeed.init_distributed("gloo", dist_init_required=False)
    for stage in (1, 2, 3):
        for name, temperature in TEMPERATURES.items():
            for sharded in (False, True):
                network = network_of_teacher().requires_grad_(False)
                teacher = FrozenTeacher(network)
                if sharded:
                    engine = deepspeed.initialize(model=network, config=config(3))[0]
                    assert not any(parameter.numel() for parameter in network.parameters())
                    with pytest.raises(ValueError, match=r"^the teacher Sequential has weights that DeepSpeed has"):
                        FrozenTeacher(engine.module)
                    teacher = FrozenTeacher(engine.module, fingerprint="v1")
                both = Both(teacher, temperature)
                optimizer = torch.optim.SGD(both.parameters(), lr=0.05, momentum=0.9)
                engine = deepspeed.initialize(model=both, optimizer=optimizer, config=config(stage))[0]
                for batch in batches(rank, 2):
                    engine.backward(engine(*batch))
                    engine.step()
                check(state_of(deepspeed, both, stage), wanted[name], f"{name}, ZeRO {stage}, {sharded}")
                engine.destroy()


def test_an_engine_trains_as_one_process(deepspeed: Any) -> None:
    wanted = {}
    for name, temperature in TEMPERATURES.items():
        both = Both(FrozenTeacher(network_of_teacher()), temperature)
        optimizer = torch.optim.SGD(both.parameters(), lr=0.05, momentum=0.9)
        for batch in batches(0, 1):
            optimizer.zero_grad()
            both(*batch).backward()
            optimizer.step()
        wanted[name] = both.state_dict()
    on_ranks(2, partial(check_engine, deepspeed=deepspeed, wanted=wanted))


class OnCPU(DeepSpeedStrategy):
    """Lightning refuses DeepSpeed on a CPU, and counts GPUs."""

    @override
    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    @override
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    @override
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


def make(temperature: Any = 4.0, teacher: Any = None, **options: Any) -> DistillationModule:
    teacher = teacher or FrozenTeacher(network_of_teacher())
    torch.manual_seed(6)
    return DistillationModule(
        student=make_network(10, norm=False),
        teacher=teacher,
        temperature=copy.deepcopy(temperature),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        **options,
    )


class Own(LightningModule):
    """A module that knows of no teacher."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.net = make_network(10, norm=False)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def callback(temperature: Any = 4.0) -> DistillationCallback:
    return DistillationCallback(
        FrozenTeacher(network_of_teacher()), "net", copy.deepcopy(temperature), kd_weight=0.5, task_weight=0.5
    )


TRAINS: dict[str, Any] = {"limit_val_batches": 0}
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "constant": (make, {}),
    "learned": (partial(make, LearnedTemperature()), TRAINS),
    "layers": (lambda: make(layers=[LayerTerm("0", "0", HintLoss())]), {}),
    "clipped": (partial(make, LearnedTemperature()), {"gradient_clip_val": 0.05, **TRAINS}),
    "resumed": (partial(make, LearnedTemperature()), {"max_epochs": 2, **TRAINS}),
    "a callback": (Own, {"max_epochs": 2, **TRAINS}),
}


def callbacks(name: str) -> list[Any]:
    return [callback()] if name == "a callback" else []


def check_strategy(deepspeed: Any, wanted: dict[str, dict[str, Tensor]], folder: Path) -> None:
    for stage in (1, 2, 3):
        for name, (make_module, options) in RUNS.items():
            module, file = make_module(), folder / f"{stage}.ckpt"
            if "max_epochs" in options:
                trainer = fit_in_order(make_module(), folder, OnCPU(stage=stage), callbacks=callbacks(name), **TRAINS)
                trainer.save_checkpoint(file)
                options = {**options, "ckpt_path": file}
            fit_in_order(module, folder, OnCPU(stage=stage), callbacks=callbacks(name), **options)
            check(state_of(deepspeed, module, stage), wanted[name], f"{name}, ZeRO {stage}")
    for module, added, message in (
        (make(teacher=EMATeacher()), [], "EMATeacher follows the optimiser's steps, which OnCPU hides. Take ddp"),
        (make(), [SkipNonFinite()], "SkipNonFinite reads the gradients, but they are out of reach under OnCPU. Leave"),
        (make(), [GradientShare(0.5)], "GradientShare differentiates by whole parameters, which OnCPU shards. Take"),
        (make(mean_over="step"), [], "mean_over='step' divides the accumulated gradients itself, but they are out of"),
        (
            Own(),
            [callback(LearnedTemperature())],
            r"DeepSpeed's engine trains .* are beside it: temperature\.raw\. Take",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            fit_in_order(module, folder, OnCPU(stage=1), callbacks=added)


def test_the_strategy_trains_as_one_process(deepspeed: Any, tmp_path: Path) -> None:
    wanted = {}
    for name, (make_module, options) in RUNS.items():
        module = make_module()
        fit_in_order(module, tmp_path, callbacks=callbacks(name), **options)
        wanted[name] = module.state_dict()
    on_ranks(2, lambda _: check_strategy(deepspeed, wanted, tmp_path))
