"""A Distiller inside a LightningModule of one's own, with automatic and with manual optimisation."""

import torch
from lightning.pytorch import LightningModule, Trainer

from kd_lightning import Distiller, FrozenTeacher
from kd_lightning.callbacks import AdaptiveTemperature
from kd_lightning.datamodules import DigitsDataModule
from kd_lightning.models import DigitsCNN
from kd_lightning.temperature import CosineSchedule, Progress


class Classifier(LightningModule):
    """Adds two lines to a classifier: one here, one in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DigitsCNN(channels=(4, 8), hidden=16)
        teacher = FrozenTeacher(DigitsCNN(), "configs/digits_teacher.safetensors")
        self.distiller = Distiller(teacher, temperature=CosineSchedule(8.0, 2.0))  # Lightning moves it, and the teacher

    def training_step(self, batch, batch_idx):
        """The loss; the callbacks find the Distiller by themselves."""
        images, targets = batch
        steps = int(self.trainer.estimated_stepping_batches)
        progress = Progress(self.global_step, steps, self.current_epoch, self.trainer.max_epochs)
        out = self.distiller(images, self.net(images), targets, progress)
        self.log_dict({"train_loss": out.loss, **out.readings()})
        return out.loss

    def validation_step(self, batch, batch_idx):
        """Accuracy."""
        images, targets = batch
        self.log("val_acc", (self.net(images).argmax(1) == targets).float().mean())

    def configure_optimizers(self):
        """Return an optimiser of the net alone, because this temperature learns nothing."""
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)


class ManualClassifier(Classifier):
    """The same with manual optimisation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        """The whole step."""
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


if __name__ == "__main__":
    for module in (Classifier(), ManualClassifier()):
        data = DigitsDataModule(batch_size=16, train_fraction=0.2, in_memory=True)
        adaptive = AdaptiveTemperature(monitor="val_acc", patience=2)
        trainer = Trainer(max_epochs=3, accelerator="cpu", callbacks=[adaptive], enable_checkpointing=False)
        trainer.fit(module, data)
        print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
