"""Commands of the atlas; see the package."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

import benchmarks.atlas
from benchmarks.atlas import page, plots, tasks
from benchmarks.atlas.plan import STUDIES
from benchmarks.atlas.rows import read, run
from benchmarks.atlas.train import train

CSV = Path(__file__).parents[1] / "atlas.csv"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=benchmarks.atlas.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "page"])
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no training after this time")
    parser.add_argument("--cifar100", type=Path, help="folder with train/<class>/*.png and test/<class>/*.png")
    arguments = parser.parse_args()
    if arguments.command == "page":
        rows = read(arguments.csv)
        page.PAGE.write_text(page.page(rows))
        for path in page.PARTLY:
            path.write_text(page.redraw(path.read_text(), rows))
        plots.draw(rows, page.DOCS)
        return
    torch.set_num_threads(1)
    if arguments.cifar100 is not None:
        tasks.PLACES["cifar100"] = arguments.cifar100
    deadline = time.time() + 60 * arguments.minutes
    for name in arguments.studies:
        begin, used = time.time(), time.process_time()
        try:
            count = run(arguments.csv, STUDIES[name].keys(), train, deadline)
        except (ImportError, KeyError) as error:
            print(f"{name}: no data ({error!r})", flush=True)
            continue
        print(
            f"{name}: {count} trainings, {time.time() - begin:.0f} s, {time.process_time() - used:.0f} s of CPU",
            flush=True,
        )


if __name__ == "__main__":
    main()
