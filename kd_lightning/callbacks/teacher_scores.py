"""Scores of student and teacher in validation, summed over batches, loaders and ranks."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from kd_lightning.distiller import DistillationOutput
from kd_lightning.metrics import agreement, task_loss_among
from kd_lightning.modules.readings import metric_name
from kd_lightning.temperature import Signals


class TeacherScores:
    """``val_kd_loss``, the mean over the valid positions, and for predicted classes ``val_agreement``."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def update(
        self, module: nn.Module, kd_loss: nn.Module, out: DistillationOutput, counting: Tensor | None, loader: int
    ) -> None:
        """Add a batch; the losses of the module or ``kd_loss`` tell its task, ``counting`` its valid positions."""
        student, teacher = (x.movedim(out.class_dim, -1) for x in (out.student_logits, out.teacher_logits))
        ignore_index = getattr(kd_loss, "ignore_index", -100)
        valid = Signals(student, teacher, counting, ignore_index=ignore_index).valid
        positions = student.new_tensor(student[..., 0].numel()) if valid is None else valid.sum()
        task_loss = task_loss_among([*module.modules(), kd_loss])
        same, predicted = agreement(student, teacher, counting, task_loss, ignore_index) or (positions * 0,) * 2
        dtype = _sum_dtype(student.device)
        row = torch.stack([x.detach().to(dtype) for x in (out.kd_loss * positions, positions, same, predicted)])
        self._sums[loader] = self._sums.get(loader, 0) + row

    def log(self, trainer: Trainer, module: LightningModule) -> None:
        """Log and reset the scores. Every rank must call this, because it is a collective."""
        loaders, device = len(trainer.num_val_batches), trainer.strategy.root_device
        for loader in range(loaders):
            sums = self._sums.pop(loader, torch.zeros(4, device=device, dtype=_sum_dtype(device)))
            kd_loss, positions, same, predicted = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
            suffix = f"/dataloader_idx_{loader}" if loaders > 1 else ""
            for name, total, count in (("kd_loss", kd_loss, positions), ("agreement", same, predicted)):
                if count:
                    module.log(metric_name(trainer, "val", name) + suffix, total / count, add_dataloader_idx=False)


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which lacks float64."""
    return torch.float32 if device.type == "mps" else torch.float64
