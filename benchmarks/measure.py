"""Fair ratios on a noisy machine: all variants in turn, round after round, and the median of each."""

from __future__ import annotations

import argparse
import itertools
import logging
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

Step = Callable[[], Any]


def interleaved_times(
    steps: Mapping[str, Step],
    seconds: float,
    device: str,
    least: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds per call, the median over rounds; the first two rounds warm up (and compile)."""
    for step in [*steps.values()] * 2:
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(next(iter(times.values()))) < least:
        for name, step in random.sample([*steps.items()], len(steps)):  # each leaves its caches to another one
            wait(device)
            start = clock()
            step()
            wait(device)
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(step: Step, device: str) -> int:
    """The most memory allocated at once during the call, over what there was before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    recorded: Any = profiler.profiler
    changes = [event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


def machine(device: str) -> str:
    """What the numbers were taken on."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def run_quietly(threads: int) -> None:
    """Take so many threads, and print neither warnings nor what Lightning says at the start of each fit."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End with an error if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here. Leave the option out to measure the CPU.")


def wait(device: str) -> None:
    """Wait until the device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()
