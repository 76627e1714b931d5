"""A Distiller in a bare PyTorch loop, with a temperature that is learned along with the student."""

import torch

from kd_lightning import Distiller, FrozenTeacher
from kd_lightning.datamodules import DigitsDataModule
from kd_lightning.models import DigitsCNN
from kd_lightning.temperature import LearnableTemperature, Progress

torch.manual_seed(0)
data = DigitsDataModule(batch_size=16, train_fraction=0.2, in_memory=True)
data.setup("fit")
loader, epochs = data.train_dataloader(), 3

student = DigitsCNN(channels=(4, 8), hidden=16)
teacher = FrozenTeacher(DigitsCNN(), "configs/digits_teacher.safetensors")
distiller = Distiller(teacher, temperature=LearnableTemperature(init_value=8.0, warmup_epochs=1))
distiller.to("cpu")  # takes the teacher along

groups = [{"params": student.parameters()}, *distiller.temperature.param_groups()]  # the policy's: no weight decay
optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.05)
losses = []
for epoch in range(epochs):
    for images, targets in loader:
        progress = Progress(step=len(losses), max_steps=epochs * len(loader), epoch=epoch, max_epochs=epochs)
        out = distiller(images, student(images), targets, progress)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}, temperature {out.temperature.student.item():.2f}")
checkpoint = {"student": student.state_dict(), "distiller": distiller.state_dict()}  # the teacher is in neither
