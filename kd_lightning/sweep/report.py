"""A sweep as one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import kd_lightning
from kd_lightning.sweep.results import SweepResult

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { background: #f4f4f4; } tr.best td { background: #fdeee6; font-weight: 600; }
tr.baseline td { border-top: 2px solid #888; } img { max-width: 100%; }
pre { background: #f6f6f6; padding: .8rem; overflow: auto; font-size: .85rem; } div.wide { overflow-x: auto; }
"""


def write_report(result: SweepResult, config: dict[str, Any], fingerprint: str, path: Path) -> None:
    """Write the report: the choice, the heat-map, both tables, the configuration and the versions.

    Args:
        result: What was found.
        config: The configuration that all runs have.
        fingerprint: Of that configuration.
        path: The file.
    """
    picture = io.BytesIO()
    result.plot().savefig(picture, dpi=150, format="png")
    image = base64.b64encode(picture.getvalue()).decode()
    rows = result.rows()
    best = result.best
    marks = ["best" if cell is best else "" for cell in result.cells] + ["baseline"] * (result.baseline is not None)

    names = sorted({name for run in result.runs for name in run.test})
    runs = [["run", "temperature", "kd_weight", "task_weight", "seed", "state", result.monitor, "epoch", "seconds",
             *names, "reason"]]  # fmt: skip
    for run in result.runs:
        temperature = "no teacher" if run.temperature is None else f"{run.temperature:.4g}"
        numbers = [f"{run.kd_weight:.4g}", f"{run.task_weight:.4g}", f"{run.seed}", run.state]
        score = "" if run.score is None else f"{run.score:.4f}"
        epoch = "" if run.epoch is None else f"{run.epoch}"
        seconds = "" if run.seconds is None else f"{run.seconds:.0f}"
        tests = [f"{run.test[name]:.4f}" if name in run.test else "" for name in names]
        runs.append([f"{run.number}", temperature, *numbers, score, epoch, seconds, *tests, run.reason])

    packages = ("torch", "lightning", "optuna")
    versions = [["kd_lightning", kd_lightning.__version__], *([name, version(name)] for name in packages)]
    versions += [["Python", platform.python_version()], ["system", platform.platform()], ["configuration", fingerprint]]
    path.write_text(
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>Sweep: {escape(result.monitor)} over temperature and weight</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Sweep over temperature and weight</h1>
<ul>{"".join(f"<li>{escape(line)}</li>" for line in result.verdict())}</ul>
<p>A run's score is its best {escape(result.monitor)}; a cell's is the mean over its seeds. The choice is by validation;
the test set was measured for the chosen cell and the baseline alone, with the weights of the best validation.</p>
<p><img alt="Mean {escape(result.monitor)} for each temperature and weight" src="data:image/png;base64,{image}"/></p>
<h2>Cells</h2>
<p>Mean ± standard deviation over the seeds.</p>
{_table(rows, marks)}
<h2>Runs</h2>
{_table(runs)}
<h2>Configuration</h2>
<p>Of all runs; temperature, weights and seed are the table's.</p>
<pre>{escape(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))}</pre>
<h2>Versions</h2>
{_table([["", ""], *versions])}
</body>
</html>
""",
        encoding="utf-8",
    )


def _table(rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"] if any(head) else []
    for number, row in enumerate(body):
        mark = marks[number] if number < len(marks) else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="{mark}">{cells}</tr>' if mark else f"<tr>{cells}</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
