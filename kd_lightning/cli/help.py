"""Help that is read from the source of the commands, without importing torch and Lightning."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import docstring_parser

from kd_lightning.cli.project import KINDS

_PACKAGE = Path(__file__).parents[1]
_COMMANDS = "cli/commands.py"

# Lightning's own commands
_LIGHTNING = {
    "fit": "Train: a student with its teacher, or a network by itself.",
    "validate": "Measure a checkpoint on the validation data.",
    "test": "Measure a checkpoint on the test data.",
    "predict": "Write a checkpoint's predictions to predictions.pt in the log folder.",
}
_CHECKPOINT = {
    "ckpt_path": "Checkpoint to start from: a file, last or best. It gives the weights, the options the settings.",
    "weights_only": "true: read nothing but tensors and plain values from the checkpoint.",
}
_RESUME = {"resume": "auto: continue from the last checkpoint of the logger's latest run; start afresh without one."}

# This library's commands: the prefix of their options, and the function or class whose arguments the options are
_OWN = {
    "check": ("", _COMMANDS, "check"),
    "calibrate": ("", _COMMANDS, "calibrate"),
    "plot-temperature": ("", _COMMANDS, "plot_temperature"),
    "find-temperature": ("finder.", "callbacks/temperature_finder.py", "TemperatureFinder"),
    "cache-teacher": ("", _COMMANDS, "cache_teacher"),
    "export": ("", _COMMANDS, "export"),
    "sweep": ("", "sweep/search.py", "sweep"),
}
HELP = (*_LIGHTNING, *_OWN, "init", "card")
_INIT = "Write a project that runs: configurations, a module of one's own and a README."
_CARD = "Write a Markdown card of a run or a sweep: teacher, temperature, metrics, command to reproduce it."
_GIVEN = ("trainer", "model", "datamodule", "config", "finder")

_COMMON = {
    "-c, --config FILE": "YAML with any of the settings; may be given several times, the later one wins.",
    "--model CLASS": "Such as DistillationModule; --model.help CLASS lists what it takes, as --model.temperature 4.",
    "--data CLASS": "Such as DigitsDataModule; --data.help CLASS lists what it takes.",
    "--trainer.NAME": "An argument of the Trainer, as --trainer.max_epochs 10; --trainer.help lists them.",
    "--seed_everything": "Seed of all random numbers (default 42).",
    "--num_threads": "CPU threads of one operation; small networks are faster with 1.",
    "--print_config": "Print all settings as YAML, and end.",
    "--traceback": "Show where an error was raised, in place of one paragraph.",
}


def describe_commands() -> str:
    """Return the help of ``kd-lightning``."""
    own = {name: _documented(_COMMANDS, name.replace("-", "_"))[0] for name in _OWN}
    return f"""usage: kd-lightning COMMAND [--config FILE] [--NAME VALUE ...]

Knowledge distillation with temperature as a first-class object.

{_table({**_LIGHTNING, **own, "init": _INIT, "card": _CARD})}

kd-lightning COMMAND --help lists a command's options; kd-lightning --version prints the version."""


def describe_command(command: str) -> str:
    """Return the help of a command: its own options, then those that all commands have."""
    if command == "init":
        return f"usage: kd-lightning init [{'|'.join(KINDS)}] DIR\n\n{_INIT}"
    if command == "card":
        return f"usage: kd-lightning card --run DIR\n\n{_CARD}"
    if command in _LIGHTNING:
        own = _CHECKPOINT | (_RESUME if command == "fit" else {})
        summary, options = _LIGHTNING[command], {f"--{name}": text for name, text in own.items()}
    else:
        prefix, file, name = _OWN[command]
        summary = _documented(_COMMANDS, command.replace("-", "_"))[0]
        options = {f"--{prefix}{argument}": text for argument, text in _documented(file, name)[1].items()}
    return f"""usage: kd-lightning {command} [--config FILE] [--NAME VALUE ...]

{summary}

options of {command}:
{_table(options)}

options of all commands:
{_table(_COMMON)}"""


def _documented(file: str, name: str) -> tuple[str, dict[str, str]]:
    """Return the first line of a docstring, and the first sentence about each argument, with its default."""
    tree = ast.parse((_PACKAGE / file).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name)
    functions = [node for node in ast.walk(found) if isinstance(node, ast.FunctionDef)]
    function = next(function for function in functions if function.name in (name, "__init__"))
    text = docstring_parser.parse(ast.get_docstring(found) or "")
    said = {parameter.arg_name: parameter.description or "" for parameter in text.params}
    parameters = function.args.args
    defaults = [None] * (len(parameters) - len(function.args.defaults)) + function.args.defaults
    options = {}
    for parameter, default in zip(parameters, defaults, strict=True):
        if parameter.arg in said and parameter.arg not in _GIVEN:
            description = " ".join(said[parameter.arg].replace("``", "").split())
            sentence = re.split(r"(?<=[.;])\s", description)[0].rstrip(".;")
            value = "required" if default is None else f"default {ast.unparse(default)}"
            value = value.replace("True", "true").replace("False", "false")
            options[parameter.arg] = f"{sentence}." if value == "default None" else f"{sentence} ({value})."
    return text.short_description or "", options


def _table(rows: dict[str, str]) -> str:
    texts = (textwrap.fill(text, 99, initial_indent=f"  {name:<22} ", subsequent_indent=" " * 25)
             for name, text in rows.items())  # fmt: skip
    return "\n".join(texts)
