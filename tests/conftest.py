"""Settings of the whole suite."""

import pytest
import torch

torch.set_num_threads(1)  # forked processes hang where the parent has used OpenMP threads; and CI has two cores


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
