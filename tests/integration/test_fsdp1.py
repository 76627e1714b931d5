"""FSDP1 (Lightning's FSDPStrategy) on two CPU processes, which the strategy itself refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from typing_extensions import override

from kd_lightning import DistillationModule, FrozenTeacher, LayerTerm
from kd_lightning.losses import HintLoss
from kd_lightning.teachers import EMATeacher, Sharded
from kd_lightning.temperature import CosineSchedule, EntropyTemperature
from tests.helpers import LearnedTemperature, fit_in_order, make_network, on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # what Lightning calls of FSDP1 is deprecated


class OnCPU(FSDPStrategy):
    """Lightning refuses ``FSDPStrategy`` itself on a CPU, and gives FSDP the index of a GPU."""

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )


def make(temperature: Any = 4.0, **options: Any) -> DistillationModule:
    torch.manual_seed(5)
    student, teacher = make_network(10, norm=False), make_network(norm=False)
    for parameter in teacher.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return DistillationModule(
        student=student,
        temperature=copy.deepcopy(temperature),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        **{"teacher": FrozenTeacher(teacher, placement=Sharded(["0", "2"])), **options},
    )


MODULES: dict[str, Callable[[], DistillationModule]] = {
    "constant": make,
    "scheduled": partial(make, CosineSchedule(8, 2)),
    "per sample": partial(make, EntropyTemperature()),
    "learned": partial(make, LearnedTemperature()),
    "layers": lambda: make(layers=[LayerTerm("0", "0", HintLoss())]),
    "clipped": partial(make, LearnedTemperature()),
    "resumed": partial(make, LearnedTemperature()),
}
TRAINS: dict[str, Any] = {"limit_val_batches": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "constant": {},
    "layers": {},
    "clipped": {"gradient_clip_val": 0.05, **TRAINS},
    "resumed": {"max_epochs": 2, **TRAINS},
}


def check(trainer: Trainer, file: Path) -> None:
    assert isinstance(trainer.model, FullyShardedDataParallel)
    with FullyShardedDataParallel.state_dict_type(trainer.model, StateDictType.FULL_STATE_DICT):
        have, want = trainer.model.state_dict(), torch.load(file, weights_only=True)
    assert have.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(have[name], value, rtol=1e-5, atol=1e-6, msg=f"{file.stem}: {name}")


def check_ranks(folder: Path) -> None:
    for name, make_module in MODULES.items():
        wrap: set[type[nn.Module]] | None = {nn.Linear} if name in ("constant", "layers") else None
        check(
            fit_in_order(make_module(), folder, OnCPU(auto_wrap_policy=wrap), **OPTIONS.get(name, TRAINS)),
            folder / f"{name}.pt",
        )
    for kind in ("full", "sharded"):
        trainer = fit_in_order(MODULES["resumed"](), folder, OnCPU(state_dict_type=kind), **TRAINS)
        trainer.save_checkpoint(folder / f"{kind}.ckpt")
        trainer = fit_in_order(
            MODULES["resumed"](), folder, OnCPU(state_dict_type=kind), folder / f"{kind}.ckpt", **OPTIONS["resumed"]
        )
        check(trainer, folder / "resumed.pt")
    module = make(teacher=EMATeacher())
    with pytest.raises(ValueError, match=r"^a copy of Sequential follows .* replaced or sharded in another way\."):
        fit_in_order(module, folder, OnCPU())


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for name, make_module in MODULES.items():
        module = make_module()
        fit_in_order(module, tmp_path, **OPTIONS.get(name, TRAINS))
        torch.save(module.state_dict(), tmp_path / f"{name}.pt")
    on_ranks(2, lambda _: check_ranks(tmp_path))
