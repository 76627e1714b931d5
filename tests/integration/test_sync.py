"""Statistics of the batch over ranks: ``sync=True`` on two processes equals one, in values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from kd_lightning import DistillationModule
from kd_lightning.functional.across_ranks import gather_over_ranks, smallest_over_ranks
from kd_lightning.layers import LayerTerm
from kd_lightning.losses import (
    DISTLoss,
    InfoNCELoss,
    LogitLoss,
    RelationalLoss,
    SimilarityKDLoss,
    SimilarityPreservingLoss,
    SoftFeatureLoss,
)
from kd_lightning.temperature import (
    DisagreementTemperature,
    EnergyTemperature,
    Signals,
    TokenDifficultyTemperature,
)
from tests.helpers import InOrder, make_network

MakeTrainer = Callable[..., Trainer]


class MaskedInTheFirstHalf(DISTLoss):
    """DIST of logits whose first class is masked in the first four samples, and so on one of two ranks."""

    def forward(self, student_logits: Any, teacher_logits: Any, *args: Any, **options: Any) -> Tensor:
        masked = torch.isin(teacher_logits[:, :1], features()[1][:4, :1]) & torch.tensor([True, False, False])
        logits = (logits.masked_fill(masked, -torch.inf) for logits in (student_logits, teacher_logits))
        return super().forward(*logits, *args, **options)


POLICIES: dict[str, Callable[[bool], Any]] = {
    "cosine": lambda sync: DisagreementTemperature(sync=sync),
    "confidence": lambda sync: DisagreementTemperature(by="confidence", sync=sync),
    "difficulty": lambda sync: TokenDifficultyTemperature(base=2.0, sync=sync),
    "energy": lambda sync: EnergyTemperature(share=0.3, sync=sync),
}
LOSSES: dict[str, Callable[[bool], Any]] = {
    "preserving": lambda sync: SimilarityPreservingLoss(sync=sync),
    "relational": lambda sync: RelationalLoss(1.0, 2.0, sync=sync),
    "similarity": lambda sync: SimilarityKDLoss(sync=sync),
    "views": lambda sync: SimilarityKDLoss(views=2, sync=sync),
    "contrast": lambda sync: InfoNCELoss(sync=sync),
    "correlation": lambda sync: DISTLoss(beta=0.0, sync=sync),
    "masked": lambda sync: MaskedInTheFirstHalf(beta=0.0, sync=sync),
}


# ---- policies and losses by themselves: one group of processes for all -----------------------------------------------


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher (6, 5, 7) and targets, of which a third is ignored, unequally in the two halves."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(6, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher[2:] *= 3  # so that the halves differ in every statistic
    targets = torch.randint(7, (6, 5), generator=generator)
    targets[0] = -100
    targets[4, 3:] = -100
    return student, teacher, targets


def features() -> tuple[Tensor, Tensor]:
    """Eight samples of two networks; with two views the second half is that of the first."""
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(8, 3, generator=generator, dtype=torch.float64) for _ in range(2))  # pyright: ignore


def own(part: slice, name: str) -> Tensor:
    """The positions of a rank among the samples of one process."""
    rows = torch.arange(8)
    return rows.view(2, 4)[:, part].flatten() if name == "views" else rows.view(4, 2).flatten()[part]


def loss_of(loss: Any, student: Tensor, teacher: Tensor) -> Tensor:
    softens = isinstance(loss, (SoftFeatureLoss, LogitLoss))
    return loss(student, teacher, 0.5) if softens else loss(student, teacher)


def compute(part: dict[str, Any], ranks: int) -> dict[str, Tensor]:
    """Temperatures of each policy; value and gradient of each loss."""
    sync, found = ranks > 1, {}
    student, teacher, targets = tokens()
    rows = part["rows"]
    for name, make in POLICIES.items():
        signals = Signals(student[rows], teacher[rows], targets[rows], ignore_index=-100)
        found[name] = make(sync)(signals).student
        found[f"{name} of a rank"] = make(False)(signals).student
        none = Signals(student[:1], teacher[:1], targets[:1], ignore_index=-100)  # no valid position on any rank
        assert make(sync)(none).student.isfinite().all()
    for name, make in LOSSES.items():
        weight = torch.eye(3, dtype=torch.float64, requires_grad=True)
        chosen = own(part["samples"][name], name)
        one, two = (x[chosen] for x in features())
        value = loss_of(make(sync), one @ weight, two)
        (gradient,) = torch.autograd.grad(value, weight)
        if sync:
            dist.all_reduce(gradient)
        found[name], found[f"{name} gradient"] = value.detach(), gradient / ranks
    return found


def rank(number: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    half = slice(4 * number, 4 * number + 4)
    views = slice(2 * number, 2 * number + 2)
    samples = {name: views if name == "views" else half for name in LOSSES}
    rows = slice(0, 2) if number == 0 else slice(2, 6)
    torch.save(compute({"rows": rows, "samples": samples}, 2), folder / f"{number}")
    values = torch.arange(3 + number, dtype=torch.float32) - 2.5  # -2.5, -1.5, -0.5 and -2.5 to 0.5
    assert smallest_over_ranks(values, values > -2, torch.tensor(3)) == -0.5
    with pytest.raises(ValueError, match="sync=True compares the samples of all ranks, which must have equally many"):
        gather_over_ranks(torch.zeros(2 + number, 3))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    every = {name: slice(0, 4) if name == "views" else slice(0, 8) for name in LOSSES}
    one = compute({"rows": slice(0, 6), "samples": every}, 1)
    start_processes(rank, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in "01")
    for name in POLICIES:
        counts = tokens()[2] != -100  # a rank without valid positions has any temperature
        both = torch.cat([first[name], second[name]])
        torch.testing.assert_close(both[counts], one[name][counts], rtol=1e-12, atol=1e-12)
        alone = torch.cat([first[f"{name} of a rank"], second[f"{name} of a rank"]])
        assert not torch.allclose(both[counts], alone[counts])
    for name in LOSSES:
        for key in (name, f"{name} gradient"):
            for found in (first, second):
                torch.testing.assert_close(found[key], one[key], rtol=1e-12, atol=1e-12)


def test_alone_it_changes_nothing() -> None:
    student, teacher, targets = tokens()
    for make in POLICIES.values():
        with_sync, without = (make(sync)(Signals(student, teacher, targets)).student for sync in (True, False))
        torch.testing.assert_close(with_sync, without, rtol=1e-12, atol=0)
    one, two = features()
    for make in LOSSES.values():
        assert torch.equal(loss_of(make(True), one, two), loss_of(make(False), one, two))


def test_it_is_in_the_text_that_checkpoints_compare_where_it_is_on() -> None:
    for make in [*POLICIES.values(), *LOSSES.values()]:
        assert "sync=True" in repr(make(True))
        assert "sync" not in repr(make(False))


# ---- runs ----------------------------------------------------------------------------------------------------


class Weights(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["policy", "layers", "logits"])
def test_a_run_on_two_processes_trains_as_one(
    make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path, kind: str
) -> None:
    for devices in (2, 1):
        torch.manual_seed(7)
        options: dict[str, Any] = {"temperature": DisagreementTemperature(sync=True)}
        if kind == "logits":
            options = {"kd_loss": DISTLoss(sync=True)}
        if kind == "layers":
            options = {"layers": [LayerTerm("1", "2", SimilarityKDLoss(sync=True), temperature=0.3, weight=5.0)]}
        module = DistillationModule(
            make_network(norm=False),
            copy.deepcopy(teacher),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
            **options,
        )
        ranks = {"strategy": "ddp_fork"} if devices == 2 else {}
        trainer = make_trainer(
            devices=devices,
            callbacks=[Weights(tmp_path)],
            use_distributed_sampler=False,
            precision="64-true",
            limit_val_batches=0,
            **ranks,
        )
        trainer.fit(module, datamodule=InOrder())
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-12)
