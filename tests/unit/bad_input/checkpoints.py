"""Checkpoints whose settings name what is no part of a model, and those that do not hold what their module needs."""

import io

import torch
from torch import nn

from kd_lightning import ClassificationModule, DistillationModule
from kd_lightning.modules.checkpoint_settings import check_settings
from tests.unit.bad_input.case import Case

NETWORK = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 4, "out_features": 3}}
RULE = (
    "a.ckpt names {} as {}, and settings in a checkpoint may name parts of a model only: classes of modules, "
    "schedules, policies, losses, teachers, optimisers and schedulers, and functions annotated as returning a module. "
    "Nothing was built. If you want it, give {} yourself, in a file after --config or as an argument of "
    "load_from_checkpoint."
)


def names(path: str, where: str = "student", **settings: object) -> Case:
    settings = settings or {where: {"class_path": path, "init_args": {}}}
    return Case(
        f"{path} as {where}",
        lambda: check_settings(settings, "a.ckpt", DistillationModule),
        ValueError,
        RULE.format(path, where, where.partition(".")[0].partition("[")[0]),
    )


def load(module: type[ClassificationModule | DistillationModule], **content: object) -> object:
    file = io.BytesIO()
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "hyper_parameters": {}, **content}, file)
    file.seek(0)
    return module.load_from_checkpoint(file)


CASES = [
    *(names(path) for path in ("os.system", "subprocess.Popen", "builtins.eval", "shutil.rmtree", "eval", "")),
    *(names(path, "teacher") for path in ("torch.load", "torch.hub.load", "torch.os.system", "lightning.Trainer")),
    *(names(path, "temperature") for path in ("kd_lightning.schedules.Progress", "torch.utils.data.DataLoader")),
    names("torch.nn", "kd_loss"),
    names("subprocess.Popen", "layers[0]", student=NETWORK, layers=[{"class_path": "subprocess.Popen"}]),
    names("posix.system", "temperature", student=NETWORK, temperature="os.system"),
    names(
        "subprocess.Popen",
        "student.dict_kwargs.x",
        student={**NETWORK, "dict_kwargs": {"x": {"class_path": "subprocess.Popen"}}},
    ),
    *(
        Case(
            f"{kind.__name__} without its {name}",
            lambda kind=kind, name=name: load(kind, built_in_python={name: "Net(width=2)"}),
            TypeError,
            "the checkpoint was written by a module that was built in Python and does not hold its "
            f"{name}: networks, policies and losses are given again, as in {kind.__name__}.load_from_checkpoint(file, "
            f"{name}=Net(width=2)). What is left out beside {name} takes its default.",
        )
        for kind, name in ((DistillationModule, "student"), (ClassificationModule, "model"))
    ),
    Case(
        "a checkpoint that holds objects",
        lambda: load(DistillationModule, net=nn.Linear(1, 1)),
        ValueError,
        "the file cannot be read as data: it holds torch.nn.modules.linear.Linear. A checkpoint is read without "
        "running code. If you trust its origin, read it with load_from_checkpoint(..., weights_only=False).",
    ),
]
