"""`build_model`: networks of any library, also out of a LightningCLI config."""

import functools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from torch import nn

from kd_lightning.models import DigitsMLP, build_model

CALLED: list[str] = []


def create_model(width, num_classes=3) -> nn.Module:
    return nn.Linear(width, num_classes)


def unannotated(width, num_classes=3):
    CALLED.append("unannotated")
    return nn.Linear(width, num_classes)


class Holder:
    network = nn.Linear

    @classmethod
    def build(cls, num_classes: int) -> "nn.Linear":
        return nn.Linear(1, num_classes)

    def __call__(self, num_classes: int) -> nn.Module:
        return nn.Linear(1, num_classes)


def wrapped(function: Any) -> Any:
    return functools.wraps(function)(lambda **kwargs: function(**kwargs))


def broken() -> nn.Module:
    return 3  # pyright: ignore[reportReturnType]


def touches(path: str) -> None:
    CALLED.append(path)


def annotated_with_what_is_not_there() -> "nowhere.Net":  # pyright: ignore  # noqa: F821
    CALLED.append("nowhere")


@pytest.fixture(autouse=True)
def zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with factories of all kinds."""
    module = types.ModuleType("zoo")
    module.__dict__.update(create_model=create_model, Holder=Holder, name="text", size=lambda: 3, broken=broken)
    module.__dict__.update(unannotated=unannotated, touches=touches, nowhere=annotated_with_what_is_not_there)
    module.__dict__.update(wrapped=wrapped(create_model), small=functools.partial(create_model, width=1), call=Holder())
    CALLED.clear()
    monkeypatch.setitem(sys.modules, "zoo", module)


def test_builds_a_function_and_hands_everything_on() -> None:
    model = build_model("zoo.create_model", num_classes=5, width=2)
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features) == (2, 5)


def test_num_classes_is_handed_on_only_if_given() -> None:
    model = build_model("zoo.create_model", width=2)
    assert isinstance(model, nn.Linear)
    assert model.out_features == 3
    with pytest.raises(TypeError, match="num_classes"):
        build_model("torch.nn.ReLU", num_classes=2)


@pytest.mark.parametrize(
    "path",
    ["zoo.Holder.build", "zoo.small", "zoo.call", "kd_lightning.models.DigitsMLP", "torchvision.models.resnet18"],
)
def test_builds_classes_and_what_is_annotated(path: str) -> None:
    assert isinstance(build_model(path, num_classes=2), nn.Module)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("resnet18", ValueError, "dotted path.*got 'resnet18'"),
        ("zoo.", ValueError, "dotted path"),
        ("no_such_library.models.net", ImportError, "no_such_library.models.net: there is no module 'no_such_library'"),
        ("torchvision.models.resnet81", ImportError, "torchvision.models has no 'resnet81'.*resnet18"),
        ("torchvision.modells.resnet18", ImportError, "torchvision has no 'modells'.*models"),
        ("zoo.Holder.netwerk", ImportError, "Holder has no 'netwerk'.*network"),
        ("zoo.name", TypeError, "zoo.name is a str"),
        ("torch.nn", TypeError, "torch.nn is a module"),
        ("zoo.broken", TypeError, "must return a torch.nn.Module, got a value of type int"),
        ("zoo.size", TypeError, "zoo.size is neither a torch.nn.Module class nor annotated.*was not called"),
        ("zoo.unannotated", TypeError, "neither.*name a function of your own that is annotated"),
        ("zoo.nowhere", TypeError, "neither"),
        ("torch.optim.SGD", TypeError, "neither"),
        ("torch.load", TypeError, "neither"),
        ("torch.hub.load", TypeError, "neither"),
        ("torch.os.system", TypeError, "neither"),
        ("lightning.pytorch.LightningModule.load_from_checkpoint", TypeError, "neither"),
        ("os.system", TypeError, "os.system is of Python's standard library, which builds no network"),
        ("builtins.eval", TypeError, "standard library"),
        ("subprocess.Popen", TypeError, "standard library"),
        ("antigravity.fly", TypeError, "standard library"),
    ],
)
def test_errors_name_what_was_looked_for_and_what_came(path: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_model(path)


def test_nothing_is_called_before_it_is_known_to_build_a_network(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    for path, arguments in [
        ("os.system", {"command": f"touch {target}"}),
        ("torch.os.system", {"command": f"touch {target}"}),
        ("builtins.open", {"file": str(target), "mode": "w"}),
        ("zoo.touches", {"path": str(target)}),
        ("zoo.unannotated", {"width": 1}),
    ]:
        with pytest.raises(TypeError, match=r"neither|standard library"):
            build_model(path, **arguments)
    assert not target.exists()
    assert not CALLED
    assert "antigravity" not in sys.modules


def test_builds_what_a_decorator_wraps() -> None:
    assert isinstance(build_model("zoo.wrapped", num_classes=2, width=1), nn.Linear)


def test_a_missing_dependency_is_not_taken_for_a_wrong_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        build_model("needs_more.net")


class Owner:
    def __init__(self, student: nn.Module) -> None:
        self.student = student


def test_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Owner, "model")
    config = parser.parse_string(
        """
        model:
          student:
            class_path: kd_lightning.models.build_model
            init_args: {factory: zoo.create_model, num_classes: 4}
            dict_kwargs: {width: 2}
        """
    )
    student = parser.instantiate(config).model.student
    assert isinstance(student, nn.Linear)
    assert (student.in_features, student.out_features) == (2, 4)


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg8"])
def test_our_functions_from_yaml(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Owner, "model")
    student = {"class_path": f"kd_lightning.models.{name}", "init_args": {"num_classes": 4}}
    model = parser.instantiate(parser.parse_object({"model": {"student": student}})).model
    assert model.student.fc.out_features == 4


def test_digits_model_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Owner, "model")
    student = {"class_path": "kd_lightning.models.DigitsMLP", "init_args": {"hidden": [8]}}
    model = parser.instantiate(parser.parse_object({"model": {"student": student}})).model
    assert isinstance(model.student, DigitsMLP)
