"""Configurations that are no mapping of settings: what `--config` names, and what is wrong in the YAML."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from kd_lightning.configuration.written import CommandLineError, Written
from tests.unit.bad_input.case import Case

FOLDER = Path(tempfile.mkdtemp())
(FOLDER / "configs").mkdir()
(FOLDER / "configs" / "digits.yaml").write_text("trainer: {}\n")


def of(text: str) -> Callable[[], object]:
    def read() -> object:
        (FOLDER / "wrong.yaml").write_text(text)
        return Written(["fit", "--config", str(FOLDER / "wrong.yaml")])

    return read


WRONG = f"{FOLDER}/wrong.yaml"
INDENT = "Indent the keys of a mapping alike, and put a space after each colon, also in the line before."
CASES = [
    Case("a folder", lambda: Written(["fit", "--config", f"{FOLDER}/configs"]), CommandLineError,
         f"'{FOLDER}/configs' is a folder, and --config takes a file. It holds {FOLDER}/configs/digits.yaml."),
    Case("a key twice", of("trainer:\n  max_epochs: 1\n  logger: false\n  max_epochs: 2\n"), CommandLineError,
         f"{WRONG} has trainer.max_epochs twice, in lines 2 and 4. Keep one of them."),
    Case("a key of a list's entry twice", of("a:\n- {b: 1,\n   b: 1}\n"), CommandLineError,
         f"{WRONG} has a[0].b twice, in lines 2 and 3. Keep one of them."),
    Case("a part twice", of("trainer: {}\nmodel: {}\ntrainer:\n  max_epochs: 1\n"), CommandLineError,
         f"{WRONG} has trainer twice, in lines 1 and 3. Keep one of them."),
    Case("a tab", of("trainer:\n\tmax_epochs: 1\n"), CommandLineError,
         f"{WRONG}:2 is not readable as YAML: found character '\\t' that cannot start any token. Indent with spaces: "
         "YAML takes no tabs."),
    Case("an indentation", of("trainer:\n  max_epochs: 1\n   logger: false\n"), CommandLineError,
         f"{WRONG}:3 is not readable as YAML: mapping values are not allowed here. {INDENT}"),
    Case("a colon without a space", of("seed_everything:0\ntrainer:\n"), CommandLineError,
         f"{WRONG}:2 is not readable as YAML: mapping values are not allowed here. {INDENT}"),
    Case("a list", of("- 1\n"), CommandLineError,
         f"{WRONG} must be a mapping with keys such as trainer, model and data, got a list."),
]  # fmt: skip
