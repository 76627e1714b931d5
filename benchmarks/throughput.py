"""Compare the throughput of whole epochs with loops as mdistiller, torchdistill and timm publish them.

    uv run python benchmarks/throughput.py

Every variant trains the same student with the same teacher, batch size and augmentation (crops and mirror images) on
images of CIFAR-100's shape, then validates on a quarter as many images. The variants run in turn, round after round;
the figure is the median over rounds of the ratio of samples per second to mdistiller's in the same round. Times are
processor times with one thread and no loader process, so that other work on the machine does not matter much. The
loops are written from the published recipes; no code is copied:

- mdistiller: PIL images one by one; the loss and the accuracies among the top 1 and 5 are read from the device at
  every step; validation runs the student alone and reads them again.
- torchdistill: the same images; forward hooks collect both networks' outputs; the loss is read at every step and
  checked for NaN; validation runs the student alone.
- timm: PIL images one by one, collated as uint8 and normalised as a batch; both sides of the KL as log-softmax; the
  loss is read at every 50th step; validation runs the student alone.

Ours is DistillationModule under Trainer, whose validation asks the teacher, too, or its cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cache import BATCH, MadeImages, quiet_trainer, sgd
from measure import machine, run_quietly
from peers import kd_batchmean
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kd_lightning import DistillationModule, FrozenTeacher
from kd_lightning.models import resnet8x4, resnet20
from kd_lightning.teachers import TeacherCache

MEAN, STD = MadeImages.mean, MadeImages.std
T, KD, TASK = 4.0, 0.9, 0.1
Batches = DataLoader[Any]


class Data(MadeImages):
    """The made images, and a quarter as many for validation."""

    def load_split(self, split: Any) -> Any:
        images, labels = super().load_split("train")
        return (images[::4], labels[::4]) if split == "val" else (images, labels)


class PILImages(Dataset[Any]):
    """Images one by one, as torchvision's CIFAR-100 gives them."""

    def __init__(self, part: tuple[Tensor, Tensor], transform: Callable[[Any], Any]) -> None:
        images, labels = part
        self.images, self.labels, self.transform = images.permute(0, 2, 3, 1).numpy(), labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def loaders(data: Data, as_bytes: bool = False) -> tuple[Batches, Batches]:
    """Return loaders of training and validation images for the loops of others."""
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    finish = [transforms.PILToTensor()] if as_bytes else [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    train = PILImages(data.load_split("train"), transforms.Compose([*augment, *finish]))
    val = PILImages(data.load_split("val"), transforms.Compose(finish))
    return DataLoader(train, batch_size=BATCH, shuffle=True), DataLoader(val, batch_size=BATCH)


def top(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return the accuracies among the top 1 and the top 5, read from the device."""
    hits = logits.topk(5, 1).indices == targets[:, None]
    return hits[:, :1].float().sum().item() / len(targets), hits.float().sum().item() / len(targets)


def validate(student: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    student.eval()
    with torch.no_grad():
        for images, targets in batches:
            logits = student(images)
            F.cross_entropy(logits, targets).item()
            top(logits, targets)


def mdistiller(student: nn.Module, teacher: nn.Module, train: Batches, val: Batches) -> None:
    optimizer = sgd(student.parameters())
    student.train()
    for images, targets in train:
        optimizer.zero_grad()
        images = images.float()
        logits = student(images)
        with torch.no_grad():
            teacher_logits = teacher(images)
        loss = TASK * F.cross_entropy(logits, targets) + KD * kd_batchmean(logits, teacher_logits, T)
        loss.backward()
        optimizer.step()
        loss.item()
        top(logits, targets)
    validate(student, iter(val))


def torchdistill(student: nn.Module, teacher: nn.Module, train: Batches, val: Batches) -> None:
    optimizer, kept = sgd(student.parameters()), {}
    hooks = [
        network.register_forward_hook(lambda module, inputs, output, name=name: kept.update({name: output}))
        for name, network in (("student", student), ("teacher", teacher))
    ]
    student.train()
    for images, targets in train:
        with torch.no_grad():
            teacher(images)
        student(images)
        loss = TASK * F.cross_entropy(kept["student"], targets)
        loss = loss + KD * kd_batchmean(kept["student"], kept["teacher"], T)
        kept.clear()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        assert torch.isfinite(loss)
    for hook in hooks:
        hook.remove()
    validate(student, iter(val))


def timm(student: nn.Module, teacher: nn.Module, train: Batches, val: Batches) -> None:
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) * 255 for each in (MEAN, STD))
    normalised = ((images.float().sub_(mean).div_(std), targets) for images, targets in train)
    optimizer = sgd(student.parameters())
    student.train()
    for step, (images, targets) in enumerate(normalised):
        logits = student(images)
        with torch.no_grad():
            teacher_logits = teacher(images)
        ours, theirs = F.log_softmax(logits / T, -1), F.log_softmax(teacher_logits / T, -1)
        kd = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * T**2
        loss = TASK * F.cross_entropy(logits, targets) + KD * kd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            loss.item()
    validate(student, ((images.float().sub_(mean).div_(std), targets) for images, targets in val))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    run_quietly(1)
    network = resnet8x4(num_classes=100).eval()
    data, one_by_one = Data(arguments.steps), Data(arguments.steps, in_memory=False)
    pil, as_bytes = loaders(data), loaders(data, as_bytes=True)
    live = FrozenTeacher(network)
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder) / "teacher.cache", augmentation="fixed")
        cached = FrozenTeacher(network, cache=cache)

        def ours(teacher: FrozenTeacher, data: Data, val: bool = True) -> None:
            module = DistillationModule(resnet20(num_classes=100), teacher, optimizer=sgd)
            trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0, limit_val_batches=1.0 if val else 0)
            trainer.fit(module, datamodule=data)

        variants: dict[str, Callable[[], None]] = {
            "mdistiller": lambda: mdistiller(resnet20(num_classes=100), network, *pil),
            "torchdistill": lambda: torchdistill(resnet20(num_classes=100), network, *pil),
            "timm": lambda: timm(resnet20(num_classes=100), network, *as_bytes),
            "ours, `in_memory=False`": lambda: ours(live, one_by_one),
            "ours, defaults (`in_memory=True`)": lambda: ours(live, data),
            "ours, cache": lambda: ours(cached, data),
            "ours, cache, no validation": lambda: ours(cached, data, val=False),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for index in range(arguments.rounds + 1):
            for name, epoch in variants.items():
                begin = time.process_time()
                epoch()
                if index:  # the first round warms up and fills the cache
                    times[name].append(time.process_time() - begin)
    samples = arguments.steps * BATCH
    print(f"{machine('cpu')}; resnet8x4 → resnet20, batch {BATCH}, {arguments.steps} steps and a quarter as many of")
    print(f"validation, {arguments.rounds} rounds\n\n| loop | training samples/s | × mdistiller |\n|---|---|---|")
    for name, values in times.items():
        ratio = statistics.median(base / own for base, own in zip(times["mdistiller"], values, strict=True))
        print(f"| {name} | {samples / statistics.median(values):.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
