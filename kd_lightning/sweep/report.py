"""A sweep as one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

import kd_lightning
from kd_lightning.sweep.results import SweepResult

_PIXELS_PER_INCH = 112  # at which the figure's smallest text, 9 points, is 14 pixels high
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
li.warning { font-weight: 600; color: #a03a0a; }
.wide { overflow-x: auto; } .wide img { display: block; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { background: #f4f4f4; } tr.best td { background: #fdeee6; font-weight: 600; }
td.text { text-align: left; white-space: normal; min-width: 24rem; }
tr.baseline td { border-top: 2px solid #888; } td a { display: inline-block; padding: 0 .5rem; }
pre { background: #f6f6f6; padding: .8rem; overflow: auto; font-size: .875rem; } summary { cursor: pointer; }
@media (max-width: 40rem) { th, td { padding: .4rem; } }
"""


def write_report(result: SweepResult, config: dict[str, Any], fingerprint: str, path: Path) -> None:
    """Write the report: the choice, the figure, both tables, the configuration and the versions.

    Runs are linked where their folder lies beside the file.
    """
    marks = {result.warning: ' class="warning"'}
    verdict = "".join(f"<li{marks.get(line, '')}>{escape(line)}</li>" for line in result.verdict())
    best = result.best
    classes = ["best" if cell is best else "" for cell in result.cells] + ["baseline"] * (result.baseline is not None)
    there = [bool(run.folder) and (path.parent / run.folder).is_dir() for run in result.runs]
    links = [f"{quote(run.folder)}/" if is_there else "" for run, is_there in zip(result.runs, there, strict=True)]
    versions = [["kd_lightning", kd_lightning.__version__]]
    versions += [[name, version(name)] for name in ("torch", "lightning", "optuna")]
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
<ul>{verdict}</ul>
<p>A run's score is its best {escape(result.monitor)}; a cell's is the mean over its seeds. The choice is by validation;
the test set was measured for the chosen cell and the baseline alone, with the weights of the best validation.</p>
{_figure(result)}
<h2>Cells</h2>
<p>Mean ± standard deviation over the seeds.</p>
{_table(result.rows(), classes)}
<h2>Runs</h2>
<p>A run's number opens its folder of logs and weights.</p>
{_table(_run_rows(result), links=links)}
<h2>Configuration</h2>
<details><summary>Of all runs; temperature, weights and seed are the table's.</summary>
<pre>{escape(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))}</pre></details>
<h2>Versions</h2>
{_table([["", ""], *versions])}
</body>
</html>
""",
        encoding="utf-8",
    )


def _figure(result: SweepResult) -> str:
    if not result.is_drawable:
        return "<p>No run is complete, so there is no figure.</p>"
    picture, figure = io.BytesIO(), result.plot()
    figure.savefig(picture, dpi=150, format="png")
    image = base64.b64encode(picture.getvalue()).decode()
    width = f"width: {round(_PIXELS_PER_INCH * figure.get_figwidth())}px"
    text = f"Mean {escape(result.monitor)} for each temperature and weight"
    return f'<div class="wide"><img alt="{text}" style="{width}" src="data:image/png;base64,{image}"/></div>'


def _run_rows(result: SweepResult) -> list[list[str]]:
    names = sorted({name for run in result.runs for name in run.test})
    head = ["run", "temperature", "kd_weight", "task_weight", "seed", "state", result.monitor, "epoch", "seconds"]
    rows = [[*head, *names, "reason"]]
    for run in result.runs:
        temperature = "no teacher" if run.temperature is None else f"{run.temperature:.4g}"
        weights = f"{run.kd_weight:.4g}", f"{run.task_weight:.4g}"
        ended = _text(run.score, ".4f"), _text(run.epoch, ""), _text(run.seconds, ".0f")
        tests = [_text(run.test.get(name), ".4f") for name in names]
        rows.append([f"{run.number}", temperature, *weights, f"{run.seed}", run.state, *ended, *tests, run.reason])
    return rows


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(rows: Sequence[Sequence[str]], marks: Sequence[str] = (), links: Sequence[str] = ()) -> str:
    """Return a table whose rows have a class each, and a link each around their first cell, where not empty."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"] if any(head) else []
    for row, mark, link in zip_longest(body, marks, links, fillvalue=""):
        cells = [escape(cell) for cell in row]
        if link:
            cells[0] = f'<a href="{escape(link)}">{cells[0]}</a>'
        tags = ['<td class="text">' if len(cell) > 60 else "<td>" for cell in row]
        start = f'<tr class="{mark}">' if mark else "<tr>"
        lines.append(start + "".join(f"{tag}{cell}</td>" for tag, cell in zip(tags, cells, strict=True)) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
