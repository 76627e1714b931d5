"""The ONNX files that tests of teachers share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX files of both seeds, exported once: an export takes seconds."""
    from tests.contracts.kinds import onnx
    from tests.helpers import in_a_fork

    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("exported")
    in_a_fork(lambda: [onnx(seed, folder) for seed in (0, 1)])
    return folder


@pytest.fixture
def folder(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    from tests.contracts.kinds import FORKED

    return request.getfixturevalue("exported") if name in FORKED else tmp_path
