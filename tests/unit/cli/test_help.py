"""Help without torch: every option of a command is in it, and it fits on a screen."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from kd_lightning import __version__
from kd_lightning.callbacks import TemperatureFinder
from kd_lightning.cli import main
from kd_lightning.cli.commands import COMMANDS, cache_teacher, calibrate, check, export, plot_temperature
from kd_lightning.cli.help import HELP
from kd_lightning.sweep import sweep

FUNCTIONS = {
    "plot-temperature": plot_temperature,
    "find-temperature": TemperatureFinder,
    "cache-teacher": cache_teacher,
    "calibrate": calibrate,
    "check": check,
    "export": export,
    "sweep": sweep,
    **{name: getattr(Trainer, name) for name in ("fit", "validate", "test", "predict")},
}
SKIPPED = {"self", "trainer", "model", "datamodule", "config", "verbose", "return_predictions"}
SKIPPED |= set().union(*LightningCLI.subcommands().values())


def test_help_knows_all_commands() -> None:
    assert set(HELP) == {*LightningCLI.subcommands(), *COMMANDS, "init", "card"}


@pytest.mark.parametrize("command", FUNCTIONS)
def test_help_has_the_commands_options_first(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 60
    own = printed.partition("options of all commands")[0]
    listed = {name.rpartition(".")[2] for name in re.findall(r"^  --(\S+)", own, re.MULTILINE)}
    added = {"resume"} if command == "fit" else set()
    assert listed == (set(inspect.signature(FUNCTIONS[command]).parameters) | added) - SKIPPED


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from kd_lightning.cli import main; main(['fit', '--help']); main(['--version']); "
        "assert not {'torch', 'lightning', 'jsonargparse'}.intersection(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"kd-lightning {__version__}\n")


@pytest.mark.slow
def test_help_of_the_trainer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--trainer.help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--trainer.max_epochs" in printed
    assert "--model" not in printed
