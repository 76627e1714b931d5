"""Bad input of the preflight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kd_lightning import ClassificationModule, DistillationModule
from kd_lightning.preflight import check
from tests.helpers import make_loader, make_network, make_teacher
from tests.unit.bad_input.case import Case


def checked(module: Any = None, data: Any = None, **options: Any) -> Callable[[], object]:
    def call() -> object:
        it = DistillationModule(student=make_network(), teacher=make_teacher()) if module is None else module()
        return check(it, make_loader() if data is None else data, **options)

    return call


CASES = [
    Case("check of another module", checked(lambda: ClassificationModule(make_network())), TypeError,
         "check takes a DistillationModule, got ClassificationModule. Wrap the networks: "
         "DistillationModule(student=..., teacher=...)."),
    Case("check without a teacher", checked(lambda: DistillationModule(student=make_network())), ValueError,
         "check needs a teacher, but the module was made without one: DistillationModule(teacher=...)."),
    Case("check of no batch", checked(data=[]), ValueError,
         "check looks at training batches, but list gives none."),
    *(
        Case(f"check with {name}=0", checked(**{name: 0}), ValueError, f"{name} must be 1 or more, got 0.")
        for name in ("batches", "max_epochs")
    ),
    Case("check of half a batch", checked(batches=0.5), TypeError,
         "batches must be a whole number, 1 or more, got 0.5."),
]  # fmt: skip
