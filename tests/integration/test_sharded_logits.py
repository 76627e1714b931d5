"""Logits whose classes are sharded over 2 and 4 processes (gloo) give the losses and gradients of whole logits."""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_lightning import Distiller, functional
from kd_lightning.functional import Temperature
from kd_lightning.functional.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SoftCrossEntropy,
    SquaredError,
    TotalVariation,
)
from kd_lightning.losses import CrossEntropyLoss
from kd_lightning.temperature import (
    EnergyTemperature,
    LearnableTemperature,
)
from tests.helpers import on_ranks

LOSSES = {
    "kd_loss": {},
    "reverse_kd_loss": {},
    "jsd_loss": {"beta": 0.3},
    "total_variation_loss": {},
    "soft_cross_entropy_loss": {},
    "symmetric_kd_loss": {},
    "skew_kd_loss": {},
}


def logits(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64)


def everywhere(z: Tensor) -> DTensor:
    return DTensor.from_local(z, init_device_mesh("cpu", (dist.get_world_size(),)), [Replicate()], run_check=False)


def sharded(z: Tensor, dim: int = -1) -> DTensor:
    whole = everywhere(z)
    return whole.redistribute(whole.device_mesh, [Shard(dim % z.dim())])


def as_it_is(z: Tensor) -> Tensor:
    return z


def values(loss: Any, given: list[Tensor], place: Any) -> list[Tensor]:
    """The loss and its gradients with respect to both logits and a temperature."""
    leaves = [x.clone().requires_grad_() for x in given]
    loss = loss(*map(place, leaves[:2]), *leaves[2:])
    assert type(loss) is Tensor
    return [loss, *torch.autograd.grad(loss.sum(), leaves)]


def check_losses(rank: int) -> None:
    layouts = [
        (7, (), -1, "mean"),
        (3, (5, 1), -1, "none"),
        (7, (1, -1), 0, "sum"),
    ]  # 3 classes: not all ranks have one
    for (name, own), (classes, t, dim, reduction) in itertools.product(LOSSES.items(), layouts):
        shape = (5, classes) if dim == -1 else (classes, 5)
        student, teacher = logits(*shape), logits(*shape)
        student.movedim(dim, -1)[0, 1] = teacher.movedim(dim, -1)[0, 1] = -math.inf
        temperature = 2 + torch.rand([classes if size == -1 else size for size in t], dtype=torch.float64)
        temperature = temperature.T if dim == 0 and t else temperature
        targets = torch.tensor([0, 1, -100, 2, 2])

        options: Any = {"targets": targets, "class_dim": dim, "reduction": reduction, **own}
        loss = functools.partial(getattr(functional, name), **options)
        whole = values(loss, [student, teacher, temperature], lambda z: z)
        for place in (functools.partial(sharded, dim=dim), everywhere):
            for have, want in zip(values(loss, [student, teacher, temperature], place), whole, strict=True):
                torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-13)
    equal = logits(2, 7)
    for have in values(functional.kd_loss, [equal, equal, torch.tensor(4.0)], sharded):
        torch.testing.assert_close(have, torch.zeros_like(have), rtol=0, atol=1e-14)


def check_traffic(rank: int) -> None:
    """Two numbers for each of five rows in each of three all-reduces, and nothing in backward."""
    student, teacher = sharded(logits(5, 700)), sharded(logits(5, 700))
    student.requires_grad_()
    with CommDebugMode() as traffic:
        functional.kd_loss(student, teacher, 4.0).backward()
    assert {str(kind): count for kind, count in traffic.get_comm_counts().items()} == {"c10d.allreduce_": 3}
    assert student.grad.placements == (Shard(1),)  # pyright: ignore
    functional.kd_loss(student, teacher.full_tensor(), 4.0).backward()  # a whole teacher beside it


def check_fused_case(classes: int, t: tuple[int, ...], divergence: Divergence, place: Any, place_teacher: Any) -> None:
    temperatures = [2 + torch.rand(t, dtype=torch.float64) for _ in range(2)]
    learned = [] if t == (1, 7) else temperatures  # by class the fused loss has no gradient
    given = [logits(5, 4), logits(classes, 4), logits(classes), *learned]
    teacher_hidden, teacher_weight = logits(5, 6), logits(classes, 6)

    def values(place: Any, place_weight: Any, place_logits: Any, **options: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        teacher: Any = teacher_hidden, place_weight(teacher_weight)
        if place_teacher is None:
            teacher, options["teacher_logits"] = (None, None), place_logits(teacher_hidden @ teacher_weight.T)
        terms = functional.fused_linear_kd_terms(
            leaves[0], place(leaves[1]), teacher[0], teacher[1], Temperature(*(leaves[3:] or temperatures)),
            student_bias=place(leaves[2]), targets=torch.tensor([0, 1, -100, 2, 2]), kd_weight=0.7,
            task_weight=0.4, divergence=divergence, **options,
        )  # fmt: skip
        once = torch.autograd.grad(terms.loss, leaves, retain_graph=True)
        return [*terms, *once, *torch.autograd.grad(terms.loss, leaves)]

    want = values(as_it_is, as_it_is, as_it_is)
    for have, value in zip(values(place, place_teacher or as_it_is, sharded, chunk_size=2), want, strict=True):
        torch.testing.assert_close(have, value, rtol=1e-11, atol=1e-13)


def check_fused(rank: int) -> None:
    """The fused loss and its gradients are those of whole output layers, whichever of them are sharded."""
    by_class = functools.partial(sharded, dim=0)
    cases: list[tuple[int, tuple[int, ...], Divergence, Any, Any]] = [
        (7, (), ForwardKL(), by_class, by_class),
        (7, (5, 1), ReverseKL(), by_class, as_it_is),
        (7, (1, 7), ForwardKL(), as_it_is, by_class),
        (3, (), JensenShannon(0.3), by_class, by_class),  # not all ranks have a class
        (7, (), SoftCrossEntropy(), by_class, None),  # the teacher's logits
        (7, (), TotalVariation(), as_it_is, None),
    ]
    for case in cases:
        check_fused_case(*case)
    padded = functional.fused_linear_kd_loss(logits(5, 4), by_class(logits(7, 4)), logits(5, 4), logits(9, 4), 4.0)
    assert padded.isfinite()


def check_fused_traffic(rank: int, world: int) -> None:
    """A chunk of rows has three all-reduces for each term, backward one of the hidden states' gradient."""
    student, teacher = [(logits(8, 2), sharded(logits(700, 2), 0)) for _ in range(2)]
    hidden, weight = (x.requires_grad_() for x in student)
    with CommDebugMode() as traffic, Largest() as largest:
        terms = functional.fused_linear_kd_terms(
            hidden, weight, *teacher, 4.0, targets=torch.arange(8), task_weight=1.0, chunk_size=2
        )
        terms.loss.backward()
    assert {str(kind): count for kind, count in traffic.get_comm_counts().items()} == {"c10d.allreduce_": 4 * 6 + 1}
    assert weight.grad.placements == (Shard(0),)  # pyright: ignore
    assert (
        largest.bytes == 8 * 2 * 700 // world
    )  # a chunk's logits, as large as the weight here, of this rank's classes


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that an operation has returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        plain = [x for x in tree_leaves(result) if type(x) is Tensor]
        self.bytes = max(self.bytes, *(x.untyped_storage().nbytes() for x in plain), 0)
        return result


def check_distiller(rank: int) -> None:
    policies = (4.0, LearnableTemperature())
    for policy, shape in itertools.product(policies, ((4, 6), (2, 3, 6))):
        student, teacher, targets = logits(*shape), logits(*shape), torch.randint(6, shape[:-1])
        targets.flatten()[0] = -100
        losses = []
        for place in (lambda z: z, everywhere, sharded):
            distiller = Distiller(None, policy).train()
            leaf = student.clone().requires_grad_()
            out = distiller(None, place(leaf), targets, teacher_logits=place(teacher))
            learned = list(distiller.temperature.parameters())
            losses.append([out.loss, out.task_loss, *torch.autograd.grad(out.loss, [leaf, *learned])])
            out.readings()
        for have in losses[1:]:
            for one, other in zip(have, losses[0], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)  # temperatures are float32


def check_errors(rank: int) -> None:
    whole, z = logits(4, 6), sharded(logits(4, 6))
    labels = torch.zeros(4, dtype=torch.long)
    sparse = functional.Sparse(torch.zeros(4, 2, dtype=torch.long), torch.full((4, 2), -1.0))
    kd, fused = functional.kd_loss, functional.fused_linear_kd_loss
    no_sum = (
        "is no sum over classes of a function of both probabilities, so that it cannot be computed on logits whose "
        "classes are sharded over ranks. Take KDLoss, ReverseKDLoss, JSDLoss, TotalVariationLoss or "
        "SoftCrossEntropyLoss, or gather the logits: logits.full_tensor()."
    )
    as_whole = (
        "takes plain tensors, got a DTensor, whose classes may be sharded over ranks. Give whole tensors, "
        "tensor.full_tensor(), or take kd_loss, which needs no more than sums over the ranks."
    )
    cases: list[tuple[Any, str]] = [
        (lambda: functional.mse_logits_loss(z, z, 4.0), f"SquaredError {no_sum}"),
        (lambda: functional.dkd_loss(z, z, 4.0, targets=labels), f"DecoupledKL {no_sum}"),
        (lambda: functional.dist_loss(z, z, 4.0), f"dist_loss {as_whole}"),
        (lambda: functional.hard_label_loss(z, z, 4.0), f"hard_label_loss {as_whole}"),
        (lambda: fused(z, whole, whole, whole, 4.0), f"hidden states of the fused loss {as_whole}"),
        (
            lambda: fused(whole, z, whole, sharded(whole, 0), 4.0),
            "the fused loss takes output layers whose classes are sharded alike in one dimension of one mesh, weights "
            "and biases with Shard(0), logits by their last, got (Shard(dim=1),), (Shard(dim=0),). Parallelise both "
            "output layers by ColwiseParallel, or give whole tensors: tensor.full_tensor().",
        ),
        (
            lambda: fused(whole, sharded(whole, 0), whole, sharded(logits(5, 6), 0), 4.0),
            "output layers that are sharded by class must have the same number of classes, got 4 and 5. Cut the "
            "teacher's padding of the vocabulary before it is sharded.",
        ),
        (
            lambda: fused(whole, sharded(whole, 0), whole, whole, 4.0, divergence=SquaredError()),
            f"SquaredError {no_sum}",
        ),
        (
            lambda: kd(sharded(whole, 0), whole, 4.0),
            "logits that are a DTensor must be sharded by class in one dimension of the mesh, Shard(1), and replicated "
            "in others, got (Shard(dim=0),). Give each rank the logits of its own samples, as a plain tensor: "
            "logits.to_local().",
        ),
        (
            lambda: kd(z, sharded(whole, 0), 4.0),
            "student and teacher logits must be sharded alike, on one mesh, got (Shard(dim=1),) and (Shard(dim=0),). "
            "Redistribute one: teacher_logits.redistribute(student_logits.device_mesh, student_logits.placements).",
        ),
        (
            lambda: kd(z, sparse, 4.0),
            "logits that are sharded by class need a teacher's logits of the same shape, (4, 6), got targets of a few "
            "classes. Give the teacher the student's classes, or gather the logits: logits.full_tensor().",
        ),
        (
            lambda: kd(z, logits(4, 7), 4.0),
            "logits that are sharded by class need a teacher's logits of the same shape, (4, 6), got logits of shape "
            "(4, 7). Give the teacher the student's classes, or gather the logits: logits.full_tensor().",
        ),
        (
            lambda: Distiller(None, EnergyTemperature())(None, z, labels, teacher_logits=z),
            "EnergyTemperature reads the logits, whose classes are sharded over ranks, so that no rank has a row. Take "
            "a number, a schedule or a policy with reads_logits=False, or gather both sides: logits.full_tensor().",
        ),
        (
            lambda: CrossEntropyLoss(label_smoothing=0.1)(z, labels),
            "the cross-entropy of logits whose classes are sharded over ranks takes class indices, without weight and "
            "label_smoothing. Leave them out, or gather the logits: logits.full_tensor().",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()
    assert distribute_tensor(whole, z.device_mesh, [Shard(1)]).shape == z.shape  # the ranks are still together


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_classes_are_as_whole_ones(world: int) -> None:
    def check(rank: int) -> None:
        torch.manual_seed(0)
        for part in (check_losses, check_traffic, check_fused, check_distiller, check_errors):
            part(rank)
        check_fused_traffic(rank, world)

    on_ranks(world, check)
