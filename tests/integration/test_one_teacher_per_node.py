"""The ranks of a node hold a teacher's weights on the host once, as the operating system counts them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, FrozenTeacher

WIDTH = 2048
SIZE = 4 * WIDTH * WIDTH
SMAPS = Path("/proc/self/smaps")


def private_bytes(address: int) -> int:
    """Return the bytes of the mapping around an address that no other process shares."""
    private, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith(("Private_Clean", "Private_Dirty")):
            private += int(line.split()[1]) * 1024
    return private


class Measure(Callback):
    """Writes what a rank holds of the teacher by itself, while all ranks hold it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        assert pl_module.teacher is not None
        (weight,) = pl_module.teacher.parameters()
        trainer.strategy.barrier()
        (self.folder / f"rank{trainer.global_rank}").write_text(str(private_bytes(weight.data_ptr())))
        trainer.strategy.barrier()


def run(strategy: str, weights: str, folder: Path) -> None:
    file = folder / "teacher.safetensors"
    with torch.device("meta" if weights == "mapped" else "cpu"):
        network = nn.Linear(WIDTH, WIDTH, bias=False)
    if weights == "in memory":
        network.weight.data.mul_(9.0)  # stands for training
    teacher = FrozenTeacher(network, None if weights == "in memory" else file)
    module = DistillationModule(nn.Sequential(nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)), teacher)
    data = DataLoader(TensorDataset(torch.randn(8, WIDTH), torch.randint(WIDTH, (8,))), batch_size=2)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Measure(folder)],
    )  # fmt: skip
    trainer.fit(module, data)


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux tells which pages are shared")
@pytest.mark.parametrize(
    ("strategy", "weights", "copies"),
    [
        ("ddp_fork", "in memory", 1),  # pages of the parent
        ("ddp_fork", "read", 2),  # each rank writes into pages that it has forked
        ("ddp_spawn", "read", 1),  # into the shared memory in which torch hands tensors to processes
        ("ddp", "mapped", 1),  # pages of the file
    ],
)
def test_copies_of_the_weights(strategy: str, weights: str, copies: int, tmp_path: Path) -> None:
    save_file({"weight": torch.randn(WIDTH, WIDTH)}, tmp_path / "teacher.safetensors")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if strategy == "ddp" else []
    command = [sys.executable, *torchrun, "-m", __name__, strategy, weights, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    held = [int((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    if copies == 1:
        assert max(held) < 0.5 * SIZE
    else:
        assert min(held) > 0.5 * SIZE


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
