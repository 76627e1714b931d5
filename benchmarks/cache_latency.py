"""Cold reads of a teacher cache from a file system whose every read waits, as one on a network does.

    apt install fuse3 && uv pip install mfusepy  # and /dev/fuse
    uv run --no-sync python benchmarks/cache.py --latency 2  # milliseconds

Rows a second by the wall: random batches of a cache of 1,000 classes, read by a loader with its workers and then by the
training process. Without "requested at once", page faults read the rows one by one. Each figure has a cache of its own
that nothing has read yet, and is the median over rounds in which all variants take their turn.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from cache_fill import opened
from measure import machine
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.teachers import TeacherCache
from kd_lightning.teachers.cache_file import CacheFile

COUNT, CLASSES, BATCH, BATCHES = 65_536, 1000, 256, 8
SERVER = """
import os, sys, time
import mfusepy

class Slow(mfusepy.Operations):
    use_ns = True
    def init_with_config(self, connection, config):
        connection.max_background = connection.congestion_threshold = 1024  # else the kernel drops requests after nine
    def getattr(self, path, fh=None):
        found = os.lstat(sys.argv[1] + path)
        return {name: getattr(found, name) for name in ("st_mode", "st_size", "st_nlink", "st_uid", "st_gid")}
    def readdir(self, path, fh):
        return [".", "..", *os.listdir(sys.argv[1] + path)]
    def open(self, path, flags):
        return os.open(sys.argv[1] + path, os.O_RDONLY)
    def read(self, path, size, offset, fh):
        time.sleep(float(sys.argv[3]))
        return os.pread(fh, size, offset)
    def release(self, path, fh):
        os.close(fh)

mfusepy.FUSE(Slow(), sys.argv[2], foreground=True, ro=True, max_threads=64)
"""


def rows_a_second(path: Path, workers: int, requested: bool) -> float:
    """Read the batches of a fresh cache, and return the rows of a second."""
    cache = TeacherCache(path)
    data = cache.index(TensorDataset(torch.arange(COUNT)), "teacher")
    batches = torch.randperm(COUNT)[: BATCH * BATCHES].split(BATCH)
    sampler = [batch.tolist() for batch in batches]
    request = CacheFile.request if requested else lambda self, rows: None
    with mock.patch.object(CacheFile, "request", request):
        loader = iter(DataLoader(data, batch_sampler=sampler, num_workers=workers))
        begin = time.perf_counter()
        for _, rows in loader:
            cache.logits(rows, None)
        return BATCH * BATCHES / (time.perf_counter() - begin)


def read_slowly(milliseconds: float, rounds: int) -> None:
    """Print the rows of a second by workers, with and without requests."""
    print(
        f"{machine('cpu')}; {milliseconds:g} ms a read, {BATCHES} batches of {BATCH} of {COUNT:,} rows, {rounds} rounds"
    )
    variants = [(workers, requested) for workers in (0, 2, 4) for requested in (False, True)]
    found: dict[tuple[int, bool], list[float]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as name:
        folder, mounted = Path(name, "fast"), Path(name, "slow")
        folder.mkdir()
        mounted.mkdir()
        cache = opened(folder / "teacher.cache", COUNT, {})
        for rows in torch.arange(COUNT).split(4096):
            cache.logits(rows, lambda rows=rows: torch.randn(len(rows), CLASSES))
        for _ in range(rounds):
            for variant in variants:
                seconds = str(milliseconds / 1000)
                server = subprocess.Popen([sys.executable, "-c", SERVER, str(folder), str(mounted), seconds])
                while not os.path.ismount(mounted) and server.poll() is None:
                    time.sleep(0.05)
                try:
                    found[variant].append(rows_a_second(mounted / "teacher.cache", *variant))
                finally:
                    subprocess.run(["fusermount3", "-u", "-z", str(mounted)], check=True)
                    server.kill()  # else it serves the map until that is collected
                    server.wait()
    print("| workers | read one by one | requested at once | times |")
    print("|---|---|---|---|")
    for workers in (0, 2, 4):
        one, all_at_once = (statistics.median(found[workers, requested]) for requested in (False, True))
        print(f"| {workers} | {one:,.0f} | {all_at_once:,.0f} | {all_at_once / one:.1f} |")
