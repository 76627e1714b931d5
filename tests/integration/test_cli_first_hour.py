"""Mistakes of a first hour with the command line that other packages would tell of, in one paragraph with its place."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from kd_lightning.cli import main
from kd_lightning.datamodules import CIFAR100DataModule
from tests.helpers import digits_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Total length of"),
    pytest.mark.filterwarnings("ignore:the teacher DigitsCNN still has"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0"),  # the default logger
]

DIGITS = digits_config(max_epochs=1, limit_train_batches=1, limit_val_batches=1, enable_model_summary=False)
DIGITS["trainer"]["callbacks"].pop()  # the newest checkpoint, about which no message is
FIT = "It has ckpt_path, data, model, num_threads, print_config, resume, seed_everything, trainer, weights_only."
SGD = "--model.optimizer=torch.optim.SGD --model.optimizer.lr=0.1 --trainer.max_epochs=2"
OTHER = "--model.student.channels=[8,16] --model.student.hidden=32"
MINE = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset
from kd_lightning.temperature import Temperature, TemperaturePolicy

class Flat(TemperaturePolicy):
    def compute(self, signals):
        return Temperature(*[torch.ones(len(signals.student_logits))] * 2)

class NoSuper(TemperaturePolicy):
    def __init__(self):
        self.value = 4.0
    compute = Flat.compute

class Empty(LightningDataModule):
    samples = TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0).long())
    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=4)

class Bare(Empty):
    def train_dataloader(self):
        return TensorDataset(torch.zeros(8, 1, 8, 8), torch.arange(8))

class Ragged(Empty):
    samples = [(torch.zeros(1, 8, 8 + i), i) for i in range(8)]

class Unbuilt(Bare):
    def __init__(self):
        self.size = 8

class NoStage(Empty):
    def setup(self):
        pass

class Detached(torch.nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
    def forward(self, images):
        return super().forward(images.flatten(1)).detach()
"""


@dataclass(frozen=True)
class Typed:
    """A mistake on the command line, and the message: whole, or its beginning and its end around an ellipsis."""

    name: str
    args: str
    message: str


TYPED = [
    # checkpoints
    Typed("another student", f"fit --config digits.yaml {OTHER} --ckpt_path student.ckpt",
          "model (digits.yaml:17): the checkpoint's weights do not fit this DistillationModule: other shapes: "
          "student.features.0.weight (4, 1, 3, 3) in the file, (8, 1, 3, 3) in the module; … "
          "Build the DistillationModule with the networks, losses and layers of the run that wrote it, or start anew "
          "without the checkpoint."),
    Typed("a teacher's checkpoint", "fit --config digits.yaml --ckpt_path teacher.ckpt",
          "model (digits.yaml:17): the checkpoint is of another module: its weights are under model, those of this "
          "DistillationModule under student. Give a checkpoint of a DistillationModule; another network's weights are "
          "for a teacher, FrozenTeacher(network, checkpoint=...)."),
    Typed("another optimizer", f"fit --config digits.yaml {SGD} --ckpt_path student.ckpt",
          "model (digits.yaml:17): the checkpoint's optimizer has the options … a checkpoint goes on with its "
          "optimizer."),
    Typed("a folder", "fit --config digits.yaml --ckpt_path .",
          "'.' is a folder, and a checkpoint is a file. Its files *.ckpt: student.ckpt, teacher.ckpt."),
    Typed("a text", "fit --config digits.yaml --ckpt_path digits.yaml",
          "digits.yaml is no checkpoint: it is no file of torch.save, and begins with … Give a file that the Trainer "
          "wrote."),
    Typed("weights alone", "fit --config digits.yaml --ckpt_path weights.pt",
          "weights.pt is no checkpoint of the Trainer: it has no state_dict. Weights alone are for a network or a "
          "teacher, FrozenTeacher(network, checkpoint=...)."),
    *(Typed(f"objects{name}", f"{command} --ckpt_path objects.pt",
            "objects.pt cannot be read as data: it holds torch.nn.modules.linear.Linear. A checkpoint is read "
            "without running code. If you trust its origin, allow it with --weights_only=false.")
      for name, command in (("", "fit --config digits.yaml"), (" alone", "test"))),
    Typed("objects that are allowed, but not of the Trainer",
          "fit --config digits.yaml --weights_only false --ckpt_path objects.pt",
          "objects.pt is no checkpoint of the Trainer: it has no pytorch-lightning_version. Weights alone are for a "
          "network or a teacher, FrozenTeacher(network, checkpoint=...)."),
    Typed("a checkpoint without data", "test --ckpt_path student.ckpt",
          "test needs data: give --data CLASS with its options, such as --data DigitsDataModule, or a configuration "
          "with the same, --config FILE."),
    Typed("best without a configuration", "test --ckpt_path best",
          "--ckpt_path best is of the run that a configuration describes. Give it as well, --config FILE, or the path "
          "of a checkpoint."),
    Typed("an export that is there", "export --ckpt_path student.ckpt --output there.safetensors",
          "there.safetensors is there already: choose another path, or allow it with --overwrite=true."),
    # options
    Typed("a quoted number", "fit --config digits.yaml --model.kd_weight='0.9'",
          "--model.kd_weight: must be a number, a Schedule or a function that gives a number, got the text '0.9'. "
          "Write 0.9, without quotes."),
    Typed("a decimal comma", "fit --config digits.yaml --model.kd_weight=0,9",
          "--model.kd_weight: must be a number, a Schedule or a function that gives a number, got the text '0,9'. "
          "Write 0.9, with a point."),
    Typed("an option of the trainer without its prefix", "fit --config digits.yaml --max_epochs 2",
          "--max_epochs: fit has no setting 'max_epochs'. Did you mean --trainer.max_epochs? " + FIT),
    Typed("an option of the optimizer without its prefix", "fit --config digits.yaml --lr 0.1",
          "--lr: fit has no setting 'lr'. Did you mean --model.optimizer.lr? " + FIT),
    Typed("an option of the data without its prefix", "fit --config digits.yaml --batch_size 8",
          "--batch_size: fit has no setting 'batch_size'. Did you mean --data.batch_size? " + FIT),
    Typed("help for a class", "fit --model.help DistillationModul",
          "--model.help: 'DistillationModul' names no LightningModule. Did you mean DistillationModule?"),
    Typed("a list with commas", "sweep --config digits.yaml --temperatures 2,4 --kd_weights 0.5",
          "--temperatures: must be a list of numbers, got '2,4'. Write the numbers with spaces, as in --temperatures 1 "
          "2."),
    Typed("a sweep without weights", "sweep --config digits.yaml --temperatures 2 4",
          "sweep needs --kd_weights, or a configuration with the same: --config FILE."),
    Typed("a name of two classes", "fit --config digits.yaml --model.lr_scheduler ReduceLROnPlateau",
          "--model.lr_scheduler: 'ReduceLROnPlateau' is the name of several classes. Write "
          "torch.optim.lr_scheduler.ReduceLROnPlateau or lightning.pytorch.cli.ReduceLROnPlateau."),
    Typed("a function of the library", "fit --config digits.yaml --model.student resnet8x4",
          "--model.student: 'resnet8x4' names no Module. Did you mean kd_lightning.models.resnet8x4?"),
    Typed("an argument of a number", "fit --config digits.yaml --model.temperature 4 --model.temperature.init_value 2",
          "--model.temperature.init_value: --model.temperature is 4, which has no init_value. Name a class first, as "
          "in --model.temperature=CLASS."),
    Typed("a learning rate as text", "fit --config digits.yaml --model.optimizer.lr abc",
          "--model.optimizer.lr: must be a number or a Tensor, got 'abc'."),
    Typed("a configuration before the command", "--config digits.yaml fit",
          "--config digits.yaml stands before the command, where nothing is read. Write kd-lightning fit --config "
          "digits.yaml."),
    Typed("one dash", "fit -config digits.yaml",
          "'-config' belongs to no option. Did you mean --config? Write --config FILE or --key=value."),
    Typed("no file", "fit --config", "argument -c/--config: expected one argument."),
    Typed("an unknown key without content", "fit --config empty_key.yaml",
          "modle (empty_key.yaml:1): fit has no setting 'modle'. Did you mean model? " + FIT),
    Typed("a key twice", "fit --config twice.yaml",
          "twice.yaml has trainer.max_epochs twice, in lines 2 and 3. Keep one of them."),
    Typed("a package that is absent", "fit --config digits.yaml --model.student=mine_absent.Net",
          "--model.student: mine_absent.py, line 2, imports 'no_such_package', which is not installed. Install it, as "
          "in pip install no_such_package, or correct the import."),
    Typed("a logger whose package is absent", "fit --config digits.yaml --trainer.logger CometLogger",
          "--trainer.logger: Requirement 'comet-ml… not met. …"),
    # the run
    Typed("a monitor", "fit --config digits.yaml --trainer.callbacks.monitor val_accuracy",
          "--trainer.callbacks.monitor: no metric has the name 'val_accuracy'. Did you mean val_acc? This run logs "
          "effective_kd_weight, … val_teacher_acc."),
    Typed("a monitor of early stopping", "fit --config digits.yaml --trainer.callbacks+=EarlyStopping "
          "--trainer.callbacks.monitor valacc",
          "--trainer.callbacks.monitor: no metric has the name 'valacc'. Did you mean val_acc? This run logs "
          "effective_kd_weight, … val_teacher_acc."),
    Typed("a policy's shape", "fit --config digits.yaml --model.temperature mine_data.Flat",
          "--model.temperature: Flat: student temperature has shape (22,), which does not fit … value per row."),
    Typed("a policy without its base class", "fit --config digits.yaml --model.temperature mine_data.NoSuper",
          "model (digits.yaml:17): NoSuper.__init__ does not call super().__init__(). Call it first."),
    Typed("an optimizer's option alone", "fit --config classify.yaml --model.optimizer.lr 0.1",
          "model.init_args.optimizer (classify.yaml:19): the class is missing. Write --model.optimizer AdamW as well."),
    Typed("a monitor without validation", "fit --config digits.yaml --trainer.limit_val_batches 0",
          "trainer.callbacks[0] (digits.yaml:9): ModelCheckpoint follows val_acc, a metric of validation, but this run "
          "has none. Give fit validation data and the Trainer limit_val_batches above 0; or let the callback follow "
          "train_loss."),
    Typed("no accumulated batch", "fit --config digits.yaml --trainer.accumulate_grad_batches 0",
          "--trainer.accumulate_grad_batches: must be 1 or more, got 0."),
    Typed("a negative norm", "fit --config digits.yaml --trainer.gradient_clip_val -1",
          "--trainer.gradient_clip_val: must be 0 or more, got -1."),
    Typed("no batch", "fit --config digits.yaml --trainer.limit_train_batches 0",
          "--trainer.limit_train_batches: fit trains for no batch with 0. Give 1 or more."),
    Typed("no epoch", "fit --config digits.yaml --trainer.max_epochs 0",
          "--trainer.max_epochs: fit trains for no epoch with 0. Give 1 or more."),
    Typed("an interval of 0", "fit --config digits.yaml --trainer.val_check_interval 0",
          "--trainer.val_check_interval: must be a number of batches, or a fraction of an epoch, above 0, got 0. For "
          "no validation set limit_val_batches to 0."),
    Typed("a negative seed", "fit --config digits.yaml --seed_everything -1",
          "--seed_everything: must be between 0 and 4294967295, got -1."),
    Typed("a scheduler's argument", "fit --config digits.yaml --model.lr_scheduler.T_max 0",
          "model.init_args.lr_scheduler (digits.yaml:49): CosineAnnealingLR fails with these arguments: … "
          "by zero. Correct init_args."),
    Typed("a network for other images", "fit --config digits.yaml --model.student torch.nn.Conv2d "
          "--model.student.in_channels 3 --model.student.out_channels 1 --model.student.kernel_size 1",
          "--model.student: Conv2d cannot take inputs of shape (22, 1, 8, 8): … Give a network for such data, or data "
          "of the shape that the network takes."),
    Typed("a folder that cannot be made", "fit --config digits.yaml --trainer.logger CSVLogger "
          "--trainer.logger.save_dir digits.yaml/logs",
          "the operating system refuses: … Correct the path, or its permissions and space."),
    Typed("help without a class", "fit --model.help",
          "--model.help: name the class, as in --model.help DistillationModule.…"),
    Typed("help without a class, of the finder", "find-temperature --finder.help",
          "--finder.help: name the class, as in --finder.help TemperatureFinder. It may be TemperatureFinder."),
    Typed("an empty value", "fit --config digits.yaml --model.temperature=",
          "--model.temperature: its value is missing. Write --model.temperature=VALUE, or =null for none."),
    Typed("an empty configuration", "fit --config=",
          "--config takes a file, as in --config digits.yaml, and got an empty name."),
    Typed("a file of settings that is not there", "fit --config digits.yaml --model none.yaml",
          "--model: there is no file 'none.yaml' (from the folder '{cwd}')."),
    Typed("a class of a module that has another", "fit --config digits.yaml --model.student kd_lightning.DigitsCNN",
          "--model.student: the module kd_lightning has no 'DigitsCNN'. Did you mean DigitsCNN?"),
    Typed("a class without a module", "fit --config digits.yaml --model.student .DigitsCNN",
          "--model.student: '.DigitsCNN' names no Module. Did you mean DigitsCNN?"),
    Typed("no step", "fit --config digits.yaml --trainer.max_steps 0",
          "--trainer.max_steps: fit trains for no step with 0. Give 1 or more."),
    Typed("a duration in words", "fit --config digits.yaml --trainer.max_time minute",
          "--trainer.max_time: must be DD:HH:MM:SS, such as 00:00:05:00 for five minutes, or a mapping such as "
          "minutes: 5, got 'minute'."),
    Typed("a callback twice", "fit --config digits.yaml --trainer.callbacks+=DistillationCallback "
          "--trainer.callbacks.teacher=DigitsCNN --trainer.callbacks+=DistillationCallback "
          "--trainer.callbacks.teacher=DigitsCNN",
          "DistillationModule is to be trained with more than one DistillationCallback, and each would add a loss to "
          "the sum of the others. Keep one of them, and give it several teachers as a TeacherEnsemble([...])."),
    Typed("a key of accumulation", "fit --config digits.yaml --trainer.callbacks+=GradientAccumulationScheduler "
          "--trainer.callbacks.scheduling={a:2}",
          "--trainer.callbacks.scheduling: must be a mapping from an integer to an integer, got …"),
    Typed("no validation images", "fit --config digits.yaml --data.val_fraction 0",
          "trainer.callbacks[0] (digits.yaml:9): ModelCheckpoint follows val_acc, a metric of validation, but this run "
          "has none. Give fit validation data and the Trainer limit_val_batches above 0; or let the callback follow "
          "train_loss."),
    Typed("a teacher in a folder", "fit --config digits.yaml --model.teacher.checkpoint .",
          "model.init_args.teacher (digits.yaml:27): a teacher's checkpoint is a file, and '.' is a folder. Name the "
          "file in it."),
    Typed("a distillation loss of torch", "fit --config digits.yaml --model.kd_loss torch.nn.KLDivLoss",
          "--model.kd_loss: kd_loss is called with (student_logits, teacher_logits, temperature, targets=...), but "
          "KLDivLoss takes (input, target). Take a loss of kd_lightning.losses, or write a module whose forward takes "
          "these arguments."),
    # data modules and networks of the user
    *(Typed(f"a data module, {name}", f"fit --config digits.yaml --trainer.callbacks=[] --data mine_data.{name}", text)
      for name, text in (
          ("Empty", "model (digits.yaml:17): fit trained on nothing: the training data has no batch. Give a dataset "
           "with samples; where it has fewer than batch_size, take a smaller batch_size or drop_last: false."),
          ("Bare", "model (digits.yaml:17): the training data is a TensorDataset, a dataset, which gives single "
           "samples. Return batches: DataLoader(dataset, batch_size=64, shuffle=True)."),
          ("Ragged", "--data: the samples of a batch cannot be joined: stack expects each tensor to be equal size, but "
           "got [1, 8, 8] at entry 0 and [1, 8, 9] at entry 1. Make them tensors of one shape, by a transform of the "
           "dataset, or give the DataLoader a collate_fn."),
          ("Unbuilt", "--data: Unbuilt.__init__ does not call super().__init__(). Call it first."),
          ("NoStage", "--data: the trainer calls NoStage.setup with stage=\"fit\", \"validate\", \"test\" or "
           "\"predict\". Write def setup(self, stage)."),
      )),
    Typed("a network that detaches", "fit --config digits.yaml --model.student mine_data.Detached",
          "--model.student: the student's logits carry no gradient, so the student would not learn: the network "
          "detaches them, runs under torch.no_grad(), or has no trained parameter before them. Return logits with a "
          "gradient."),
    # a project of init
    Typed("a student before its teacher", "fit --config student.yaml --data.num_workers 0",
          "model.init_args.teacher (student.yaml:22): there is no teacher checkpoint at 'teacher/best.ckpt' (from the "
          "folder '{cwd}'). Train the teacher first, or correct the path. kd-lightning fit --config teacher.yaml "
          "writes it, without fast_dev_run, which keeps no checkpoint."),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with configurations, two checkpoints and a project."""
    folder = tmp_path_factory.mktemp("first_hour")
    teacher = copy.deepcopy(DIGITS)
    teacher["model"] = {
        "class_path": "ClassificationModule",
        "init_args": {"model": DIGITS["model"]["init_args"]["teacher"]["init_args"]["module"]},
    }
    files = {
        "digits.yaml": yaml.safe_dump(DIGITS, sort_keys=False),
        "empty_key.yaml": "modle: {}\n" + yaml.safe_dump(DIGITS, sort_keys=False),
        "twice.yaml": "trainer:\n  max_epochs: 1\n  max_epochs: 2\n",
        "classify.yaml": yaml.safe_dump(teacher, sort_keys=False),
        "mine_absent.py": "import torch\nimport no_such_package.models\n",
        "mine_data.py": MINE,
        "there.safetensors": "",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "weights.pt")
    torch.save({"state_dict": {"w": torch.ones(1)}, "of": torch.nn.Linear(2, 2)}, folder / "objects.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(folder)
        main(["init", "digits", "project"])
        for file in (folder / "project").iterdir():
            file.rename(folder / file.name)
        (folder / "project").rmdir()
        for config, name in (("digits.yaml", "student"), ("classify.yaml", "teacher")):
            main(["fit", "--config", config, f"--trainer.callbacks.dirpath={folder / 'new'}"])
            (folder / "new" / "best.ckpt").rename(folder / f"{name}.ckpt")
            (folder / "new").rmdir()
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("mine", None)  # whose policy other tests would find among the known ones
    gc.collect()


@pytest.mark.parametrize("typed", TYPED, ids=lambda typed: typed.name)
def test_message(typed: Typed, told: Callable[..., str], folder: Path) -> None:
    text, wanted = told(*typed.args.split()), typed.message.replace("{cwd}", str(folder)).split("…")
    if len(wanted) == 1:
        assert text == wanted[0]
    assert text.startswith(wanted[0])
    assert text.endswith(wanted[-1])


def test_cifar_without_a_network(monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]) -> None:
    monkeypatch.setattr(CIFAR100DataModule._source, "url", "http://localhost:9/cifar-100-python.tar.gz")
    text = told("fit", "--config", "digits.yaml", "--data=CIFAR100DataModule", "--data.download=true")
    assert text.startswith("--data: CIFAR100 could not be downloaded (")
    assert text.endswith(
        "). Without a network, put the folder cifar-100-python of http://localhost:9/cifar-100-python.tar.gz into "
        "'data' and set download: false."
    )


def test_the_class_of_a_scheduler_is_switched(capsys: pytest.CaptureFixture[str]) -> None:
    switch = ["--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=3", "--print_config"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "digits.yaml", *switch])
    scheduler = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["lr_scheduler"]
    assert scheduler == {
        "class_path": "torch.optim.lr_scheduler.StepLR",
        "init_args": {"step_size": 3, "gamma": 0.1, "last_epoch": -1},
    }
