"""Targets of losses that only select positions."""

import torch

from kd_lightning.functional import kd_loss


def test_targets_are_not_read_where_all_positions_count() -> None:
    student, teacher = torch.randn(2, 3, 5)
    targets = torch.tensor([-100, 255, 2])
    kept = kd_loss(student, teacher, 2.0, targets=targets, ignore_index=None)
    assert torch.equal(kept, kd_loss(student, teacher, 2.0))


def test_an_ignore_index_that_is_a_class_leaves_its_positions_out() -> None:
    student, teacher = torch.randn(2, 3, 5)
    kept = kd_loss(student, teacher, 2.0, targets=torch.tensor([0, 4, 2]), ignore_index=0)
    torch.testing.assert_close(kept, kd_loss(student[1:], teacher[1:], 2.0))
