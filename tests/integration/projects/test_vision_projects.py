"""torchvision's and timm's networks, as projects use them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, lraspp_mobilenet_v3_large

from kd_lightning.callbacks import DistillationCallback
from kd_lightning.cli import main
from kd_lightning.functional import kd_loss
from kd_lightning.losses import BernoulliKDLoss, KDLoss, MSELogitsLoss
from kd_lightning.outputs_distiller import OutputsKDLoss, OutputTerm
from kd_lightning.teachers.weights import load_weights
from tests.integration.projects.helpers import distil, trained

pytestmark = pytest.mark.slow

MakeTrainer = Callable[..., Trainer]


def stripes(count: int, size: int, classes: int = 2) -> tuple[Tensor, Tensor]:
    """Colour images with a bright bar whose place tells the class."""
    targets = torch.arange(count) % classes
    pixels = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 0.3
    for index, target in enumerate(targets):
        width = size // classes
        pixels[index, :, int(target) * width : (int(target) + 1) * width] += 1.0
    return pixels, targets


# ---- a torchvision ResNet from YAML ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning")
def test_torchvision_resnet_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, targets = stripes(16, 32)
    for part in ("train", "test"):
        for index, (image, target) in enumerate(zip(pixels, targets, strict=True)):
            folder = tmp_path / "images" / part / f"class{int(target)}"
            folder.mkdir(parents=True, exist_ok=True)
            array = (image.permute(1, 2, 0).clamp(0, 1).numpy() * 255).astype(np.uint8)
            Image.fromarray(array).save(folder / f"{index}.png")
    torch.manual_seed(0)
    teacher = resnet18(weights=None, num_classes=2)
    trained(teacher, lambda: F.cross_entropy(teacher(pixels[:8]), targets[:8]), 3, lr=1e-3, head="fc")
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    network = {"class_path": "torchvision.models.resnet18", "init_args": {"weights": None, "num_classes": 2}}
    config = {
        "trainer": {
            "max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
            "log_every_n_steps": 1,
        },
        "model": {
            "class_path": "DistillationModule",
            "init_args": {
                "student": network,
                "teacher": {
                    "class_path": "kd_lightning.FrozenTeacher",
                    "init_args": {"module": network, "checkpoint": str(tmp_path / "teacher.pt")},
                },
                "temperature": 4.0,
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}},
            },
        },
        "data": {
            "class_path": "ImageFolderDataModule",
            "init_args": {"root": str(tmp_path / "images"), "image_size": 32, "batch_size": 8, "augment": False,
                          "in_memory": True},
        },
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "mine.yaml"])

    rows = [line.split(",") for line in next(tmp_path.rglob("metrics.csv")).read_text().splitlines()]
    column = rows[0].index("train_loss")
    losses = [float(row[column]) for row in rows[1:] if row[column]]
    assert losses[-1] < 0.9 * losses[0]
    student = resnet18(weights=None, num_classes=2)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    load_weights(student, checkpoint)  # finds the prefix; a missing name is an error
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert set(saved) == {f"student.{name}" for name in student.state_dict()} | {"distiller.temperature.multiplier"}


# ---- segmentation ------------------------------------------------------------------------------------------------


class Segmenter(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, masks = batch
        return F.cross_entropy(self.model(images)["out"], masks, ignore_index=255)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


def test_segmentation(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, _ = stripes(4, 32)
    masks = (images.mean(1) > 0.7).long()
    masks[:, :4] = 255  # a border that nobody labelled
    teacher = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    trained(teacher, lambda: F.cross_entropy(teacher(images)["out"], masks, ignore_index=255), 3, 1e-3, "classifier.4")
    module = Segmenter()
    with torch.no_grad():  # what the border holds does not count
        student, taught = copy.deepcopy(module).model(images)["out"], teacher(images)["out"]
        expected = kd_loss(student[:, :, 4:], taught[:, :, 4:], 2.0, class_dim=1)
    callback = DistillationCallback(teacher, "model", temperature=2.0, kd_loss=KDLoss(class_dim=1, ignore_index=255))
    data = DataLoader(TensorDataset(images, masks), batch_size=4)
    losses = distil(module, callback, data, make_trainer, tmp_path, max_epochs=8)
    assert losses.kd[0] == pytest.approx(expected.item(), rel=1e-4)


# ---- detection ---------------------------------------------------------------------------------------------------


def detector(kind: type[RetinaNet]) -> RetinaNet:
    torch.manual_seed(0)
    backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
    backbone.out_channels = 8
    anchors = AnchorGenerator(sizes=((32,),), aspect_ratios=((1.0,),))
    return kind(backbone, num_classes=3, anchor_generator=anchors, min_size=32, max_size=32)


class HeadOutputs(RetinaNet):
    def forward(self, *images: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, _ = self.transform(list(images))
        return self.head([self.backbone(batch.tensors)])


class Detects(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = detector(RetinaNet)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack([*self.model(*batch).values()]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-2)


def test_detection(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """The outputs of a detector's head, for each anchor, by name."""
    teacher = detector(HeadOutputs)
    for parameter in teacher.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # stands for training
    images, _ = stripes(4, 32)
    module = Detects()
    heads = detector(HeadOutputs)
    heads.load_state_dict(module.model.state_dict())
    with torch.no_grad():
        student, taught = heads(*images), teacher.eval()(*images)
    s, t = ((z["cls_logits"] / 2).sigmoid() for z in (student, taught))
    of_classes = (t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()).sum(2).mean() * 4
    of_boxes = (student["bbox_regression"] - taught["bbox_regression"]).square().mean()
    several = OutputsKDLoss(
        {
            "cls_logits": BernoulliKDLoss(class_dim=2),
            "bbox_regression": OutputTerm(MSELogitsLoss(class_dim=2), weight=0.1),
        }
    )
    callback = DistillationCallback(teacher, "model.head", 2.0, several, inputs=0)
    box = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 20.0]]), "labels": torch.tensor([1])}
    samples: Any = [(image, box) for image in images]
    data = DataLoader(samples, batch_size=4, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    losses = distil(module, callback, data, make_trainer, tmp_path, max_epochs=20)
    assert losses.kd[0] == pytest.approx((of_classes + 0.1 * of_boxes).item(), rel=1e-4)


# ---- timm --------------------------------------------------------------------------------------------------------


class TimmModule(LightningModule):
    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        timm: Any = pytest.importorskip("timm")
        self.model: nn.Module = timm.create_model(name, pretrained=False, num_classes=2, **options)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        images, targets = batch
        logits = self.model(images)
        return {"loss": F.cross_entropy(logits, targets), "preds": logits.argmax(1)}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


@pytest.mark.parametrize(("name", "options"), [("test_resnet", {}), ("test_vit", {"img_size": 32})])
def test_timm(name: str, options: dict[str, Any], make_trainer: MakeTrainer, tmp_path: Path) -> None:
    timm: Any = pytest.importorskip("timm")
    torch.manual_seed(0)
    images, targets = stripes(16, 32)
    teacher = timm.create_model("test_resnet", pretrained=False, num_classes=2)
    trained(teacher, lambda: F.cross_entropy(teacher(images), targets), steps=5, lr=3e-3)
    callback = DistillationCallback(teacher, "model", temperature=2.0)
    data = DataLoader(TensorDataset(images, targets), batch_size=8)
    distil(TimmModule(name, **options), callback, data, make_trainer, tmp_path)
