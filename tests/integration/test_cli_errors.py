"""Each mistake on the command line and in a configuration: one paragraph on stderr, exit status 2, no traceback."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_lightning import DistillationModule
from kd_lightning.cli import main
from tests.helpers import digits_config

pytestmark = pytest.mark.slow

DIGITS = digits_config()
SHORT = ["--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false"]


def has(owner: Callable[..., object], *without: str) -> str:
    return f"It has {', '.join(sorted(set(inspect.signature(owner).parameters).difference(without)))}."


MODULE = has(DistillationModule)
COMMANDS = (
    "The commands are fit, validate, test, predict, plot-temperature, check, calibrate, find-temperature, "
    "cache-teacher, export, sweep, init, card; kd-lightning COMMAND --help describes one."
)
FIT = "It has ckpt_path, data, model, num_threads, print_config, resume, seed_everything, trainer, weights_only."
SCHEDULES = (
    "ConstantSchedule, CosineSchedule, CyclicSchedule, ExponentialSchedule, JoinedSchedule, LinearSchedule, "
    "StepSchedule"
)


@dataclass(frozen=True)
class Wrong:
    """A mistake in a copy of digits.yaml: the key that is written and its value, and the message. @ is its line."""

    name: str
    key: str
    value: Any
    message: str
    drop: str = ""


@dataclass(frozen=True)
class Typed:
    """A mistake on the command line, and the message."""

    name: str
    args: str
    message: str


WRONG = [
    # keys
    Wrong("a key of the whole", "modle", {"class_path": "X"}, "modle (@): fit has no setting 'modle'. Did you mean "
          "model? " + FIT),
    Wrong("a key of the trainer", "trainer.max_epoch", 3,
          "trainer.max_epoch (@): Trainer has no argument 'max_epoch'. Did you mean max_epochs?"),
    Wrong("a key of the model", "model.init_args.temprature", 4.0,
          "model.init_args.temprature (@): DistillationModule has no argument 'temprature'. Did you mean temperature? "
          + MODULE),
    Wrong("a key of a policy", "model.init_args.temperature.init_args.init_valu", 4.0,
          "model.init_args.temperature.init_args.init_valu (@): CosineSchedule has no argument 'init_valu'. Did you "
          "mean "
          "init_value? It has end_value, init_value, until."),
    Wrong("a key of a network", "model.init_args.student.init_args.chanels", [4, 8],
          "model.init_args.student.init_args.chanels (@): DigitsCNN has no argument 'chanels'. Did you mean channels? "
          "It "
          "has channels, hidden, num_classes."),
    Wrong("a key of the teacher's network", "model.init_args.teacher.init_args.module.init_args.widht", 3,
          "model.init_args.teacher.init_args.module.init_args.widht (@): DigitsCNN has no argument 'widht'. It has "
          "channels, hidden, num_classes."),
    Wrong("a key of the optimizer", "model.init_args.optimizer.init_args.weight_decy", 0.1,
          "model.init_args.optimizer.init_args.weight_decy (@): AdamW has no argument 'weight_decy'. Did you mean "
          "weight_decay? " + has(torch.optim.AdamW, "params")),
    Wrong("a key of a callback", "trainer.callbacks.0.init_args.monitr", "val_acc",
          "trainer.callbacks[0].init_args.monitr (@): ModelCheckpoint has no argument 'monitr'. Did you mean monitor? "
          + has(ModelCheckpoint)),
    Wrong("init_args misspelt", "model.init_args.temperature.init_arg", {},
          "model.init_args.temperature.init_arg (@): a class has class_path and init_args, not 'init_arg'. Did you "
          "mean "
          "init_args?"),
    # classes
    Wrong("a policy's name", "model.init_args.temperature.class_path", "CosinSchedule",
          "model.init_args.temperature.class_path (@): 'CosinSchedule' names no Schedule or TemperaturePolicy. Did you "
          "mean CosineSchedule? Allowed is a number, a Schedule, a TemperaturePolicy or a function that gives a "
          "number."),
    Wrong("a module's name", "model.class_path", "DistilationModule",
          "model.class_path (@): 'DistilationModule' names no LightningModule. Did you mean DistillationModule?"),
    Wrong("a data module's name", "data.class_path", "DigitDataModule",
          "data.class_path (@): 'DigitDataModule' names no LightningDataModule. Did you mean DigitsDataModule?"),
    Wrong("a callback's name", "trainer.callbacks.0.class_path", "AdaptivTemperature",
          "trainer.callbacks[0].class_path (@): 'AdaptivTemperature' names no Callback. Did you mean "
          "AdaptiveTemperature?"),
    Wrong("a logger's name", "trainer.logger", {"class_path": "CSVLoger"},
          "trainer.logger.class_path (@): 'CSVLoger' names no Logger. Did you mean CSVLogger? Allowed is a Logger, a "
          "list of Logger, true or false or null."),
    Wrong("a network's name", "model.init_args.student.class_path", "DigitCNN",
          "model.init_args.student.class_path (@): 'DigitCNN' names no Module. Did you mean DigitsCNN?"),
    Wrong("a loss's name", "model.init_args.kd_loss", "DKDLos",
          "model.init_args.kd_loss (@): 'DKDLos' names no Module. Did you mean DKDLoss?"),
    Wrong("a class of a module", "model.init_args.student.class_path", "kd_lightning.models.DigitsCMN",
          "model.init_args.student.class_path (@): the module kd_lightning.models has no 'DigitsCMN'. Did you mean "
          "DigitsCNN?"),
    Wrong("an optimizer's name", "model.init_args.optimizer.class_path", "torch.optim.AdamWW",
          "model.init_args.optimizer.class_path (@): the module torch.optim has no 'AdamWW'. Did you mean AdamW?"),
    Wrong("a module of one's own that is not there", "model.init_args.student.class_path", "mine.Net",
          "model.init_args.student.class_path (@): there is no module 'mine' for 'mine.Net'. Modules are looked for in "
          "the folder '{cwd}' and among the installed packages."),
    Wrong("class_path missing", "model.init_args.kd_weight", {"init_args": {"init_value": 1.0}},
          f"model.init_args.kd_weight (@): class_path is missing, which names the class. It may be {SCHEDULES}."),
    Wrong("a class of another kind", "model.init_args.student.class_path", "kd_lightning.schedules.StepSchedule",
          "model.init_args.student.class_path (@): must be a Module, got 'kd_lightning.schedules.StepSchedule'.",
          drop="model.init_args.student.init_args"),
    # values that the type refuses
    Wrong("a weight as text", "model.init_args.kd_weight", "much",
          f"model.init_args.kd_weight (@): 'much' names no Schedule. Known are {SCHEDULES}. Allowed is a number, a "
          "Schedule or a function that gives a number."),
    Wrong("temperatures as a list", "model.init_args.temperature", [1, 2],
          "model.init_args.temperature (@): must be a number, a Schedule, a TemperaturePolicy or a function that "
          "gives a "
          "number, got [1, 2]."),
    Wrong("a policy's value as text", "model.init_args.temperature.init_args.end_value", "two",
          "model.init_args.temperature.init_args.end_value (@): must be a number, got 'two'."),
    Wrong("a batch size as text", "data.init_args.batch_size", "many",
          "data.init_args.batch_size (@): must be an integer, got 'many'."),
    Wrong("epochs as text", "trainer.max_epochs", "many", "trainer.max_epochs (@): must be an integer or null, got "
          "'many'."),
    Wrong("a precision", "model.init_args.teacher.init_args.precision", "int8",
          "model.init_args.teacher.init_args.precision (@): must be one of 'fp32', 'bf16', 'fp16' or null, got "
          "'int8'."),
    Wrong("a policy without a value", "model.init_args.temperature.init_args", {"init_value": 8.0},
          "model.init_args.temperature (@): CosineSchedule needs end_value."),
    Wrong("a module without a student", "model.init_args", {"kd_weight": 0.5},
          "model (@): DistillationModule needs student."),
    # values that our own classes refuse
    Wrong("a temperature of 0", "model.init_args.temperature", 0.0,
          "model.init_args.temperature (@): temperature must be a positive, finite number within the policy's bounds "
          "[0.05, 100], got 0.0. Usual values lie between 1 and 20; the bounds are arguments."),
    Wrong("a schedule below 0", "model.init_args.temperature.init_args.end_value", -2.0,
          "model.init_args.temperature.init_args.end_value (@): CosineSchedule: end_value must be a finite number, not "
          "negative, got -2.0."),
    Wrong("a negative weight", "model.init_args.kd_weight", -1.0,
          "model.init_args.kd_weight (@): ConstantSchedule: value must be a finite number, not negative, got -1.0."),
    Wrong("a teacher as text", "model.init_args.teacher", "resnet",
          "model.init_args.teacher (@): a teacher written as text is 'batch:' and the key of its logits in the batch, "
          "got "
          "'resnet'. Write 'batch:teacher_logits', or give a network or a Teacher."),
    Wrong("a fraction of the data", "data.init_args.val_fraction", 2.0,
          "data.init_args.val_fraction (@): val_fraction must be in [0, 1), got 2.0. 0 means no validation."),
    Wrong("a callback's factor", "trainer.callbacks.0",
          {"class_path": "AdaptiveTemperature", "init_args": {"monitor": "val_acc", "factor": 2.0}},
          "trainer.callbacks[0].init_args.factor (@): factor must lie in (0, 1), got 2.0. To heat on a plateau set "
          "on_plateau='increase', which divides by it."),
    Wrong("a layer without a temperature", "model.init_args.layers",
          [{"class_path": "LayerTerm", "init_args": {"student_layer": "features.1", "teacher_layer": "features.1",
                                                     "loss": "ChannelWiseKDLoss"}}],
          "model.init_args.layers[0] (@): ChannelWiseKDLoss compares distributions: give LayerTerm a temperature."),
    # values that are refused in the run
    Wrong("a teacher that is not trained", "model.init_args.teacher.init_args.checkpoint", "nowhere.pt",
          "model.init_args.teacher (@): there is no teacher checkpoint at 'nowhere.pt' (from the folder '{cwd}'). "
          "Train "
          "the teacher first, or correct the path."),
    Wrong("a learning rate", "model.init_args.optimizer.init_args.lr", -0.1,
          "model.init_args.optimizer (@): Invalid learning rate: -0.1."),
    Wrong("a clipping that does not exist", "trainer.gradient_clip_algorithm", "middle",
          "trainer.gradient_clip_algorithm (@): `gradient_clip_algorithm` middle is invalid. Allowed algorithms: "
          "['value', 'norm']."),
]  # fmt: skip

TYPED = [
    Typed("no command", "", "name a command. " + COMMANDS),
    Typed("a command", "ftt --config {digits}", "'ftt' is no command. Did you mean fit? " + COMMANDS),
    Typed("a command with _", "find_temperature --config {digits}",
          "'find_temperature' is no command. Did you mean find-temperature? " + COMMANDS),
    Typed("no model", "fit --trainer.max_epochs=3",
          "fit needs --model, or a configuration with the same: --config FILE."),
    Typed("an option of the trainer", "fit --config {digits} --trainer.max-epoch=2",
          "--trainer.max-epoch: Trainer has no argument 'max-epoch'. Did you mean max_epochs?"),
    Typed("an option of the model", "fit --config {digits} --model.temprature 4",
          "--model.temprature: DistillationModule has no argument 'temprature'. Did you mean temperature? " + MODULE),
    Typed("an option of the command", "export --config {digits} --ckpt=x.ckpt --outptu=y",
          "--outptu: export has no setting 'outptu'. Did you mean output? It has calibrate, ckpt_path, data, "
          "dynamic_dims, format, "
          "input_shape, model, num_threads, output, overwrite, print_config, seed_everything, trainer."),
    Typed("an option of the finder", "find-temperature --config {digits} --finder.candidats=[1,2]",
          "--finder.candidats: TemperatureFinder has no argument 'candidats'. Did you mean candidates? It has "
          "candidates, "
          "find_only, kd_weights, mode, monitor, plot_path, seeds, steps."),
    Typed("an option without its value", "fit --config {digits} --trainer.max_epochs",
          "argument --trainer.max_epochs: expected one argument."),
    Typed("a format", "export --config {digits} --ckpt=x.ckpt --format=onx",
          "--format: must be one of 'safetensors', 'torch.export', 'onnx', got 'onx'."),
    Typed("a short name", "fit --config {digits} --model.temperature=CosinSchedule",
          "--model.temperature: 'CosinSchedule' names no Schedule or TemperaturePolicy. Did you mean CosineSchedule? "
          "Allowed is a number, a Schedule, a TemperaturePolicy or a function that gives a number."),
    Typed("a value for a typed class", "fit --config {digits} --model.temperature=LinearSchedule "
          "--model.temperature.init_value=-1 --model.temperature.end_value=2",
          "--model.temperature.init_value: LinearSchedule: init_value must be a finite number, not negative, got "
          "-1.0."),
    Typed("a class that an option replaces", "fit --config wrong.yaml --data=DigitsDataModule",
          "data.class_path (wrong.yaml:1): 'DigitDataModule' names no LightningDataModule. Did you mean "
          "DigitsDataModule?"),
    Typed("a configuration without --config", "fit {digits}",
          "'{digits}' belongs to no option. Write --config FILE or --key=value."),
    Typed("a configuration that is not there", "fit --config digitz.yaml",
          "there is no configuration at 'digitz.yaml' (from the folder '{cwd}'). Did you mean digits.yaml?"),
    Typed("a configuration that is no YAML", "fit --config open.yaml",
          "open.yaml:2 is not readable as YAML: expected ',' or ']', but got ':'."),
    Typed("a project without a folder", "init cifar",
          "init takes a folder: kd-lightning init [digits|cifar|text|drop-in] DIR, got 'cifar'."),
    Typed("a project of an unknown kind", "init cifr project",
          "there is no template 'cifr'. Did you mean cifar? There are digits, cifar, text, drop-in."),
    Typed("a project in a folder in use", "init {cwd}",
          "init writes to a new or an empty folder, and '{cwd}' is not empty."),
    Typed("a configuration that is a list", "fit --config list.yaml",
          "list.yaml must be a mapping with keys such as trainer, model and data, got a list."),
    Typed("a checkpoint that is not there", "validate --ckpt_path=none.ckpt",
          "there is no checkpoint at 'none.ckpt' (from the folder '{cwd}')."),
    Typed("a command for another module", "cache-teacher --config {digits} --model.teacher=null --trainer.logger=false",
          "cache-teacher needs a DistillationModule with a teacher, got DistillationModule."),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(DIGITS, sort_keys=False))
    (tmp_path / "open.yaml").write_text("model: {a: [1\ntrainer: 3")
    (tmp_path / "wrong.yaml").write_text("data: {class_path: DigitDataModule}")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")


def write(folder: Path, wrong: Wrong) -> str:
    """Write the configuration with the mistake, and return file and line of the mistake."""
    config = copy.deepcopy(DIGITS)
    if wrong.drop:
        *parents, last = wrong.drop.split(".")
        node: Any = config
        for part in parents:
            node = node[part]
        del node[last]
    *parents, last = [int(part) if part.isdigit() else part for part in wrong.key.split(".")]
    node = config
    for part in parents:
        node = node[part]
    node[last] = wrong.value
    text = yaml.safe_dump(config, sort_keys=False)
    (folder / "wrong.yaml").write_text(text)
    place = wrong.message.partition(" (@)")[0].replace("[", ".").replace("]", "").split(".")
    current = yaml.compose(text)
    line = 0
    for part in place:
        if isinstance(current, yaml.SequenceNode):
            start = current = current.value[int(part)]
        else:
            assert isinstance(current, yaml.MappingNode)
            start, current = next(pair for pair in current.value if pair[0].value == part)
        line = start.start_mark.line + 1
    return f"wrong.yaml:{line}"


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_in_a_configuration(wrong: Wrong, told: Callable[..., str], tmp_path: Path) -> None:
    place = write(tmp_path, wrong)
    message = wrong.message.replace("@", place).replace("{cwd}", str(tmp_path))
    text = told("fit", "--config", "wrong.yaml", *SHORT)
    assert text.replace("SawTooth, ", "") == message  # another test's: jsonargparse keeps each class that it parsed


@pytest.mark.parametrize("typed", TYPED, ids=lambda typed: typed.name)
def test_on_the_command_line(typed: Typed, told: Callable[..., str], tmp_path: Path) -> None:
    words = {"digits": "digits.yaml", "cwd": str(tmp_path)}
    args = [arg.format(**words) for arg in typed.args.split()]
    message = typed.message.replace("{digits}", "digits.yaml").replace("{cwd}", str(tmp_path))
    assert told(*args) == message


MINE = """
import torch
from kd_lightning.temperature import ConstantTemperature

class Broken(ConstantTemperature):
    def __init__(self, value: float) -> None:
        super().__init__(value)
        raise ValueError("of my own")

class Late(ConstantTemperature):
    def forward(self, signals):
        return torch.ones(2) @ torch.ones(3)

class Wrong(ConstantTemperature):
    def __init__(self, value: float) -> None:
        super().__init__(-value)
"""


@pytest.mark.parametrize(("name", "error"), [("Broken", ValueError), ("Late", RuntimeError)])
def test_an_error_of_the_users_own_code_keeps_its_traceback(
    name: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"mine_{name}.py").write_text(MINE)
    policy = [f"--model.temperature=mine_{name}.{name}", "--model.temperature.value=3"]
    monkeypatch.setattr(sys, "argv", ["kd-lightning", "fit", "--config", "digits.yaml", *policy, *SHORT])
    with pytest.raises(error) as raised:
        main()
    assert any(str(entry.path).endswith(f"mine_{name}.py") for entry in raised.traceback)


def test_our_error_under_the_users_code_names_the_line(told: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine_wrong.py").write_text(MINE)
    policy = ["--model.temperature=mine_wrong.Wrong", "--model.temperature.value=3"]
    assert told("fit", "--config", "digits.yaml", *policy, *SHORT) == (
        "temperature must be a positive, finite number within the policy's bounds [0.05, 100], got -3.0. Usual values "
        "lie between 1 and 20; the bounds are arguments. It was called from mine_wrong.py, line 16."
    )


def test_a_broken_module_of_the_user_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_broken.py").write_text("import kd_lightning.nothing\n")
    args = ["fit", "--config", "digits.yaml", "--model.temperature=mine_broken.Policy"]
    monkeypatch.setattr(sys, "argv", ["kd-lightning", *args])
    with pytest.raises(ModuleNotFoundError, match=r"kd_lightning\.nothing"):
        main()


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["fit", "--config", "digits.yaml", "--model.kd_weight=-1", "--traceback"]
    monkeypatch.setattr(sys, "argv", ["kd-lightning", *args])
    with pytest.raises(ValueError, match="value must be a finite number") as raised:
        main()
    assert any("schedules.py" in str(entry.path) for entry in raised.traceback)
