"""A Distiller in Lightning Fabric: any precision, any number of processes."""

import torch
from lightning.fabric import Fabric

from kd_lightning import Distiller, FrozenTeacher
from kd_lightning.datamodules import DigitsDataModule
from kd_lightning.models import DigitsCNN
from kd_lightning.temperature import CosineSchedule, Progress


def train(fabric: Fabric, epochs: int = 3) -> tuple[DigitsCNN, list[float]]:
    """Train a student; the same on every rank."""
    fabric.seed_everything(0)
    data = DigitsDataModule(batch_size=16, train_fraction=0.2, in_memory=True)
    data.setup("fit")
    loader = fabric.setup_dataloaders(data.train_dataloader())
    student = DigitsCNN(channels=(4, 8), hidden=16)
    model, optimizer = fabric.setup(student, torch.optim.AdamW(student.parameters(), lr=0.01))

    teacher = FrozenTeacher(DigitsCNN(), "configs/digits_teacher.safetensors")
    distiller = Distiller(teacher, temperature=CosineSchedule(8.0, 2.0)).to(fabric.device)
    losses = []
    for epoch in range(epochs):
        for images, targets in loader:
            progress = Progress(step=len(losses), max_steps=epochs * len(loader), epoch=epoch, max_epochs=epochs)
            logits = model(images)
            with fabric.autocast():  # the teacher's precision
                loss = distiller(images, logits, targets, progress).loss
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    return student, losses


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    student, losses = train(fabric)
    fabric.print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}")
