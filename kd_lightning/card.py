"""A run or a sweep on one page of Markdown: what taught, at which temperature, how well, and how to do it again."""

from __future__ import annotations

import csv
import html
import platform
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import kd_lightning
from kd_lightning.configuration.written import CommandLineError
from kd_lightning.modules.checkpoint_settings import read_checkpoint
from kd_lightning.plotting import plot_temperature_history
from kd_lightning.ranking import show, smaller_is_better

_CARD, _PLOT, _CONFIG = "card.md", "card_temperature.png", "card_config.yaml"


def write_card(run: str | Path) -> Path:
    """Write ``card.md`` and the plot of the temperature into the folder of a run, or of a sweep.

    Args:
        run: The log folder with ``run_config.yaml``, ``metrics.csv`` and ``checkpoints``; or a sweep's, with
            ``results.csv``, whose card has the metrics' spread over the seeds and the temperature of the best run.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: If there is no such folder, or it is neither a run's nor a sweep's.
    """
    folder = Path(run)
    if (folder / "results.csv").is_file():
        text = _of_sweep(folder)
    elif configs := sorted(folder.glob("*config*.yaml"), key=lambda path: path.stat().st_mtime):
        text = _of_run(folder, configs[-1])
    else:
        raise FileNotFoundError(
            f"{str(folder)!r} (from the folder {str(Path.cwd())!r}) is the folder of no run and no sweep: a run's has "
            "run_config.yaml, which kd-lightning fit writes, a sweep's has results.csv."
        )
    path = folder / _CARD
    path.write_text(text, encoding="utf-8")
    return path


def card_of(args: list[str]) -> Path:
    """Write the card that the command line asks for, and return its path.

    Args:
        args: ``--run DIR`` or ``--run=DIR``.

    Raises:
        CommandLineError: If they are something else.
    """
    words = args[0].split("=", 1) if len(args) == 1 else args
    if len(words) != 2 or words[0] != "--run" or not words[1]:
        raise CommandLineError(
            f"card takes the folder of a run or a sweep: kd-lightning card --run DIR, got {' '.join(args)!r}."
        )
    return write_card(words[1])


def _of_run(folder: Path, config: Path) -> str:
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    rows, record = _read_csv(folder / "metrics.csv"), _record(folder)
    return "\n\n".join(
        [
            f"# {folder}",
            _made_of(settings, record),
            "## Temperature",
            _draw(folder, rows, folder),
            "## Metrics",
            _metrics(rows),
            "## Reproduce",
            f"```bash\nkd-lightning fit --config {config}\n```",
            _versions(record),
        ]
    )


def _of_sweep(folder: Path) -> str:
    rows = _read_csv(folder / "results.csv")
    monitor = [*rows[0]][[*rows[0]].index("state") + 1]
    cells: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        if row["state"] == "complete":
            cells[row["temperature"], row["kd_weight"]].append(row)
    choose = min if smaller_is_better(monitor) else max
    taught = {cell: own for cell, own in cells.items() if cell[0]}
    if not taught:
        raise FileNotFoundError(
            f"the sweep in {str(folder)!r} has no complete run yet: rerun its command to finish it."
        )
    scores = {cell: [float(row[monitor]) for row in own] for cell, own in taught.items()}
    best = choose(scores, key=lambda cell: sum(scores[cell]) / len(scores[cell]))
    first = folder / taught[best][0]["folder"]
    record = _record(first)
    names = [name for name in rows[0] if name == monitor or name.startswith("test")]
    table = [["temperature", "kd_weight", "seeds", *names]]
    for (temperature, weight), own in cells.items():
        values = [[float(row[name]) for row in own if row[name]] for name in names]
        head = [f"**{temperature}**" if (temperature, weight) == best else temperature or "no teacher", weight]
        table.append([*head, str(len(own)), *(show(each) if each else "" for each in values)])
    report = (folder / "report.html").read_text(encoding="utf-8") if (folder / "report.html").is_file() else ""
    found = re.search(r"<pre>(.*?)</pre>", report, flags=re.DOTALL)
    settings = yaml.safe_load(html.unescape(found[1])) if found else {}
    (folder / _CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    temperatures, weights = (" ".join(dict.fromkeys(cell[position] for cell in taught)) for position in (0, 1))
    seeds = len({row["seed"] for row in rows})
    command = f"kd-lightning sweep --config {folder / _CONFIG} --temperatures {temperatures} --kd_weights {weights}"
    return "\n\n".join(
        [
            f"# {folder}",
            f"A sweep over {len(taught)} pairs of temperature and weight. Chosen by {monitor}: temperature {best[0]}, "
            f"kd_weight {best[1]}. What follows is of its first run, {first}.",
            _made_of(settings, record),
            "## Temperature",
            _draw(folder, _read_csv(first / "metrics.csv"), first),
            "## Metrics",
            "Mean ± standard deviation over the seeds.",
            _table(table),
            "## Reproduce",
            f"```bash\n{command} --seeds {seeds}\n```",
            _versions(record),
        ]
    )


def _record(folder: Path) -> dict[str, Any]:
    """Return what the best checkpoint, else the newest, tells of the run; empty without one."""
    found = sorted(folder.glob("checkpoints/*.ckpt"), key=lambda path: (path.stem == "best", path.stat().st_mtime))
    if not found:
        return {}
    content = read_checkpoint(found[-1])
    own = {name: content.get(name) for name in ("epoch", "global_step", "pytorch-lightning_version")}
    return {**content.get("kd_lightning", {}), **own, "file": str(found[-1])}


def _made_of(settings: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    model = settings.get("model", {}).get("init_args", {})
    kept = record.get("configuration", {})
    teacher = record.get("teacher", {})
    rows = [
        ("student", _short(model.get("student"))),
        ("teacher", teacher.get("description") or _short(model.get("teacher"))),
        ("teacher's fingerprint", teacher.get("fingerprint", "unknown: there is no checkpoint")),
        *((name, kept.get(name) or _short(model.get(name))) for name in ("temperature", "kd_weight", "task_weight")),
        ("data", _short(settings.get("data"))),
        ("seed", settings.get("seed_everything")),
    ]
    if record:
        rows.append(("checkpoint", f"{record['file']}: epoch {record['epoch']}, step {record['global_step']}"))
    return _table([["", ""], *([name, f"`{value}`"] for name, value in rows)])


def _short(part: Any) -> str:
    """Return a part of a configuration as a call."""
    if not isinstance(part, Mapping) or "class_path" not in part:
        return str(part)
    arguments = {name: value for name, value in (part.get("init_args") or {}).items() if value is not None}
    inner = ", ".join(f"{name}={_short(value)}" for name, value in arguments.items())
    return f"{part['class_path'].rpartition('.')[2]}({inner})"


def _draw(folder: Path, rows: Sequence[Mapping[str, str]], run: Path) -> str:
    recorded = [row for row in rows if row.get("temperature_student")]
    if not recorded:
        return f"{run / 'metrics.csv'} has no temperature."
    steps = [int(row["step"]) for row in recorded]
    sides = [[(float(row[name]),) * 3 for row in recorded] for name in ("temperature_student", "temperature_teacher")]
    name = _leading(rows)
    metric = [(int(row["step"]), float(row[name])) for row in rows if name and row.get(name)]
    figure = plot_temperature_history(steps, *sides, metric=metric, metric_name=name)  # pyright: ignore[reportArgumentType]
    figure.savefig(folder / _PLOT, dpi=150)
    ends = [f"{value[0][0]:.4g} at the first logged step, {value[-1][0]:.4g} at the last" for value in sides]
    whose = ends[0] if ends[0] == ends[1] else f"student {ends[0]}; teacher {ends[1]}"
    return f"![Temperature over the run]({_PLOT})\n\nT is {whose}."


def _leading(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the validation metric that models are chosen by; empty where there is none."""
    names = [name for name in ("val_acc", "val_perplexity", "val_task_loss") if any(row.get(name) for row in rows)]
    return names[0] if names else ""


def _metrics(rows: Sequence[Mapping[str, str]]) -> str:
    name = _leading(rows)
    measured = [row for row in rows if name and row.get(name)]
    tested = [row for row in rows if any(row.get(key) for key in row if key.startswith("test"))]
    if not measured and not tested:
        return "metrics.csv has none of validation or test."
    columns: dict[str, Mapping[str, str]] = {}
    if measured:
        choose = max if name == "val_acc" else min
        best = choose(measured, key=lambda row: float(row[name]))
        columns = {f"best {name} (epoch {best['epoch']})": best, f"last (epoch {measured[-1]['epoch']})": measured[-1]}
    if tested:
        columns["test"] = tested[-1]
    keys = [key for key in rows[0] if key.startswith(("val", "test")) and any(row.get(key) for row in columns.values())]
    cells = [[key, *(f"{float(row[key]):.4f}" if row.get(key) else "" for row in columns.values())] for key in keys]
    return _table([["metric", *columns], *cells])


def _versions(record: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    trained = record.get("pytorch-lightning_version")
    before = f" The checkpoint was written by lightning {trained}." if trained else ""
    return (
        f"Card written by kd_lightning {kd_lightning.__version__} with {packages}, Python "
        f"{platform.python_version()}.{before}\n"
    )


def _read_csv(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
