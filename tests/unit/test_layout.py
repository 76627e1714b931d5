"""Batches and layouts as people have them: right, or an error with the way out; never a guess."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from kd_lightning import ClassificationModule, DistillationModule, Distiller
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.functional import kd_loss
from kd_lightning.losses import CrossEntropyLoss, DKDLoss, KDLoss
from kd_lightning.temperature import EntropyTemperature, TargetConfidenceTemperature
from tests.helpers import make_loader, make_network, make_teacher, snapshot

AMBIGUOUS = r"do not tell their class dimension, and class_dim=-1 is the width of an image. Give class_dim=1 for"


def segmenter() -> nn.Conv2d:
    network = nn.Conv2d(3, 4, 1)
    network.weight.data.mul_(5.0)
    assert network.bias is not None
    network.bias.data += 1.0  # stands for training
    return network


@pytest.mark.parametrize("targets", [None, torch.zeros(2, 4, 4, dtype=torch.long)])
def test_dense_logits_do_not_tell_their_classes(targets: Tensor | None) -> None:
    student, teacher = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    with pytest.raises(ValueError, match=AMBIGUOUS):
        kd_loss(student, teacher, 2.0, targets=targets)
    with pytest.raises(ValueError, match=AMBIGUOUS):
        Distiller(None, task_weight=0.0)(None, student, targets, teacher_logits=teacher)
    one = Distiller(None, kd_loss=KDLoss(class_dim=1), task_weight=0.0)(None, student, targets, teacher_logits=teacher)
    rows = [x.movedim(1, -1).reshape(-1, 4) for x in (student, teacher)]
    torch.testing.assert_close(one.kd_loss, kd_loss(rows[0], rows[1], 4.0))
    torch.testing.assert_close(
        kd_loss(student, teacher, 4.0, class_dim=3), kd_loss(student.reshape(-1, 4), teacher.reshape(-1, 4), 4.0)
    )


def test_sequences_as_long_as_there_are_classes() -> None:
    student, teacher, targets = torch.randn(2, 5, 5), torch.randn(2, 5, 5), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"fit \(B, C, L\) and \(B, L, C\) alike. Give class_dim=1 or class_dim=2"):
        kd_loss(student, teacher, 2.0, targets=targets)
    for class_dim in (1, 2):
        rows = [x.movedim(class_dim, -1).reshape(-1, 5) for x in (student, teacher)]
        expected = kd_loss(rows[0], rows[1], 2.0)
        torch.testing.assert_close(kd_loss(student, teacher, 2.0, targets=targets, class_dim=class_dim), expected)


def test_a_callback_with_the_labels_of_a_segmentation_under_mask(make_trainer: Callable[..., Trainer]) -> None:
    """Void pixels are not distilled: the labels are found."""

    class Module(ClassificationModule):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            return nn.functional.cross_entropy(self(batch["image"]), batch["mask"], ignore_index=255)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 4, 4, generator=generator)
    masks = torch.randint(4, (4, 4, 4), generator=generator)
    masks[:, :2] = 255
    data = [{"image": image, "mask": mask} for image, mask in zip(images, masks, strict=True)]
    loader = torch.utils.data.DataLoader(data, batch_size=4)  # pyright: ignore
    teacher = segmenter()
    callback = DistillationCallback(teacher, kd_loss=KDLoss(class_dim=1, ignore_index=255), kd_weight=1.0)
    module = Module(student := segmenter(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    student.weight.data.mul_(-1.0)
    seen: list[Tensor] = []

    trainer = make_trainer(max_epochs=1, callbacks=[callback], log_every_n_steps=1)
    trainer.fit(module, loader)
    seen.append(trainer.callback_metrics["train_kd_loss"])
    valid = masks != 255
    with torch.no_grad():
        rows = [network(images).movedim(1, -1)[valid] for network in (student, teacher)]
    torch.testing.assert_close(seen[0], kd_loss(rows[0], rows[1], 4.0))


@pytest.mark.parametrize("key", ["label", "labels", "target", "targets", "y", "mask"])
def test_keys_of_labels(key: str) -> None:
    module = DistillationModule(student=make_network())
    inputs, targets = module.unpack_batch({"image": torch.ones(2, 8), key: torch.tensor([0, 1])})
    assert torch.equal(inputs, torch.ones(2, 8))
    assert targets is not None
    assert targets.tolist() == [0, 1]


def test_a_mask_that_the_network_takes_is_an_input() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask

    inputs, targets = DistillationModule(student=Masked()).unpack_batch({"x": 1, "mask": 2, "y": 3})
    assert (inputs, targets) == ({"x": 1, "mask": 2}, 3)


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([0, 1, 5]),
        torch.tensor([0, 1, 5], dtype=torch.int32),
        torch.tensor([0, 1, 5], dtype=torch.uint8),
        [0, 1, 5],
        np.array([0, 1, 5]),
        np.array([0, 1, 5], dtype=np.int16),
    ],
)
def test_targets_of_every_kind(targets: Any) -> None:
    torch.manual_seed(0)
    module = DistillationModule(student=make_network(), teacher=make_teacher())
    inputs = torch.randn(3, 8)
    out = module.eval()._distil((inputs, targets), module.progress)[0]
    expected = nn.functional.cross_entropy(out.student_logits, torch.tensor([0, 1, 5]))
    torch.testing.assert_close(out.task_loss, expected)


def test_two_classes_as_booleans() -> None:
    distiller = Distiller(None, kd_weight=0.0, task_weight=1.0)
    logits = torch.randn(3, 2)
    out = distiller(None, logits, torch.tensor([True, False, True]), teacher_logits=logits)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(logits, torch.tensor([1, 0, 1])))


def refused(batch: Any, match: str, error: type[Exception] = ValueError, **options: Any) -> None:
    module = DistillationModule(student=make_network(), teacher=make_teacher(), **options)
    with pytest.raises(error, match=match):
        module.training_step(batch)


def test_what_cannot_be_right() -> None:
    inputs = torch.randn(3, 8)
    refused((inputs, torch.tensor([0, 1, 6])), r"targets must be class indices from 0 to 5, .* got 6\. .*unpack_batch")
    refused((inputs, torch.tensor([0, 1])), "unpack_batch|targets must have the logits' shape")
    refused((inputs, ["cat", "dog", "cow"]), "targets must be a tensor, an array or a list of numbers", TypeError)
    loaders = {"a": (inputs, torch.tensor([0, 1, 2])), "b": (inputs, torch.tensor([0, 1, 2]))}
    refused(loaders, r"Sequential takes .*, but the batch gives \(a=…, b=…\).*unpack_batch", TypeError)
    refused({"image": inputs, "index": 3, "label": torch.tensor([0, 1, 2])}, "unpack_batch", TypeError)
    good = (inputs, torch.tensor([0, 1, 2]))
    refused(good, r"a training loss must be a scalar, got shape \(3,\)", task_loss=CrossEntropyLoss(reduction="none"))
    refused(good, r"a training loss must be a scalar, got shape \(3,\)", kd_loss=KDLoss(reduction="none"))


def test_numpy_and_lists_through_a_fit(make_trainer: Callable[..., Trainer]) -> None:
    """A collate function that leaves the labels as a list trains as one that makes a tensor."""
    states = []
    for as_list in (False, True):
        torch.manual_seed(0)
        module = DistillationModule(student=make_network(), teacher=make_teacher())
        loader = make_loader()
        if as_list:
            loader.collate_fn = lambda rows: (torch.stack([x for x, _ in rows]), [int(y) for _, y in rows])
        make_trainer(max_epochs=1).fit(module, loader)
        states.append(snapshot(module.student))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_prediction_does_not_look_at_targets(make_trainer: Callable[..., Trainer]) -> None:
    data = torch.utils.data.DataLoader([(torch.ones(8), f"{i}.png") for i in range(4)], batch_size=2)  # pyright: ignore
    for module in (DistillationModule(student=make_network()), ClassificationModule(make_network())):
        assert len(make_trainer().predict(module, data) or ()) == 2


# ---- a network on its own --------------------------------------------------------------------------------------------


def test_dense_logits_of_a_classification_module() -> None:
    """(N, C, H, W) with C = H = W, and (B, C, L)."""

    def module(class_dim: int) -> ClassificationModule:
        return ClassificationModule(nn.Identity().requires_grad_(False), class_dim=class_dim).eval()

    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 4, 4, 4), (2, 4, 6)):
        logits = torch.randn(*shape, generator=generator)
        targets = torch.randint(4, (shape[0], *shape[2:]), generator=generator)
        loss = module(1)._loss((logits, targets))[0]
        torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, targets))
    with pytest.raises(ValueError, match=AMBIGUOUS):
        module(-1)._loss((torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"fit \(B, C, L\) and \(B, L, C\) alike"):
        module(-1)._loss((torch.zeros(2, 4, 4), torch.zeros(2, 4, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"targets must have the logits' shape .* \(2, 4\), got \(2, 6\)"):
        module(-1)._loss((torch.zeros(2, 4, 6), torch.zeros(2, 6, dtype=torch.long)))


def test_metrics_of_a_segmentation_module(make_trainer: Callable[..., Trainer]) -> None:
    images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    network = segmenter()
    with torch.no_grad():
        masks = network(images).argmax(1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, masks), batch_size=2)
    (values,) = make_trainer().validate(ClassificationModule(network, class_dim=1), data)
    assert values["val_acc"] == 1.0


# ---- labels out of range ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [KDLoss(), DKDLoss(), KDLoss(ignore_index=None)])
@pytest.mark.parametrize("label", [9, -1])
def test_a_label_that_is_no_class(loss: nn.Module, label: int, make_trainer: Callable[..., Trainer]) -> None:
    targets = torch.tensor([0, label])
    message = rf"targets must be class indices from 0 to 3, .*got {label}\. Return such targets from unpack_batch"
    with pytest.raises(ValueError, match=message):
        Distiller(None, kd_loss=loss)(None, torch.zeros(2, 4), targets, teacher_logits=torch.zeros(2, 4))

    class Module(ClassificationModule):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            return self(batch[0]).square().mean()

    data = torch.utils.data.DataLoader([(torch.randn(8), torch.tensor(label))], batch_size=1)  # pyright: ignore
    callback = DistillationCallback(make_teacher(), kd_loss=loss)
    with pytest.raises(ValueError, match=message.replace("3", "5")):
        make_trainer(max_epochs=1, callbacks=[callback]).fit(Module(make_network(norm=False)), data)


def test_a_loss_alone_refuses_a_label_that_is_no_class() -> None:
    for targets in (torch.tensor([0, 9]), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match=r"targets must be class indices from 0 to 3, or ignore_index=-100"):
            DKDLoss()(torch.zeros(2, 4), torch.zeros(2, 4), 2.0, targets=targets)


# ---- what does not count ---------------------------------------------------------------------------------------------


def test_losses_that_leave_out_different_targets() -> None:
    match = r"kd_loss has ignore_index=-100, task_loss has ignore_index=255.*Give both losses the same ignore_index"
    with pytest.raises(ValueError, match=match):
        Distiller(None, kd_loss=KDLoss(class_dim=1), task_loss=CrossEntropyLoss(ignore_index=255))
    distiller = Distiller(None, kd_loss=KDLoss(ignore_index=None), task_loss=CrossEntropyLoss(ignore_index=255))
    with pytest.raises(ValueError, match="Give both losses the same ignore_index"):
        distiller.kd_loss = KDLoss()
    assert Distiller(None, task_loss=CrossEntropyLoss(ignore_index=255)).ignore_index == 255
    module = ClassificationModule(make_network(), task_loss=CrossEntropyLoss(ignore_index=255))
    assert module.ignore_index == 255


def test_void_pixels_count_nowhere(make_trainer: Callable[..., Trainer]) -> None:
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(2, 4, 4, 4, generator=generator), torch.randint(4, (2, 4, 4), generator=generator)
    targets[:, :, :2] = 255
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, targets), batch_size=2)
    student = nn.Conv2d(4, 4, 1, bias=False)
    student.weight.data = torch.eye(4).reshape(4, 4, 1, 1)
    loss = CrossEntropyLoss(ignore_index=255)
    module = DistillationModule(
        student=student, teacher=student_like(student), kd_loss=KDLoss(class_dim=1, ignore_index=255), task_loss=loss
    )
    (values,) = make_trainer().validate(module, data, verbose=False)
    predicted, valid = images.argmax(1), targets != 255
    assert values["val_acc"] == pytest.approx((predicted == targets)[valid].float().mean().item())


def student_like(network: nn.Conv2d) -> nn.Conv2d:
    teacher = nn.Conv2d(4, 4, 1)
    teacher.weight.data = 2 * network.weight.data.clone()
    return teacher


def test_padding_without_labels_counts_nowhere() -> None:
    """Two sequences of 5 tokens, of which 3 and 1 are there."""
    student, teacher = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    for policy in (4.0, EntropyTemperature()):
        distiller = Distiller(None, temperature=policy, task_weight=0.0, kd_weight=1.0)
        out = distiller({"input_ids": None, "attention_mask": mask}, student, teacher_logits=teacher)
        (gradient,) = torch.autograd.grad(out.loss, student)
        rows = [x[mask.bool()].unsqueeze(1) for x in (student, teacher)]
        expected = distiller(None, rows[0], teacher_logits=rows[1])
        torch.testing.assert_close(out.kd_loss, expected.kd_loss)
        assert gradient[mask == 0].eq(0).all()
        assert gradient[mask == 1].ne(0).any()


def test_a_mask_is_no_label() -> None:
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    distiller = Distiller(None, kd_loss=DKDLoss(), task_weight=0.0)
    with pytest.raises(ValueError, match=r"it needs targets that are class indices, got a mask of positions alone"):
        distiller({"attention_mask": torch.ones(2, 5)}, student, teacher_logits=teacher)
    distiller = Distiller(None, temperature=TargetConfidenceTemperature(), task_weight=0.0)
    with pytest.raises(ValueError, match="it needs class indices as targets"):
        distiller({"attention_mask": torch.ones(2, 5)}, student, teacher_logits=teacher)
    torch.testing.assert_close(
        kd_loss(student, teacher, 2.0, targets=torch.tensor([[True] * 2 + [False] * 3] * 2)),
        kd_loss(student[:, :2], teacher[:, :2], 2.0),
    )
