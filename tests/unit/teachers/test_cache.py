from __future__ import annotations

import copy
import json
import mmap
import multiprocessing
import pickle
import random
import signal
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distiller, FrozenTeacher
from kd_lightning.teachers import TeacherCache, cache_file
from kd_lightning.teachers.cache_file import CacheFile
from tests.helpers import NUM_CLASSES, NUM_FEATURES, make_data, make_network

COUNT = 24


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "teacher.cache"


class Counting(nn.Module):
    """A network that counts its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.network(inputs)


def cached(teacher: nn.Module, path: Path, **options: Any) -> FrozenTeacher:
    return FrozenTeacher(teacher, cache=TeacherCache(path, **options))


def fill(teacher: FrozenTeacher, data: Any = None, batch_size: int = 10, shuffle: bool = False) -> dict[int, Tensor]:
    """One epoch; the logits by row."""
    loader = DataLoader(teacher.index(make_data(COUNT) if data is None else data), batch_size, shuffle)
    return {
        int(row): logits
        for (inputs, _), rows in loader
        for row, logits in zip(rows, teacher.logits(inputs, rows), strict=True)
    }


def the_cache(teacher: FrozenTeacher) -> TeacherCache:
    assert teacher.cache is not None
    return teacher.cache


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("bfloat16", 2), ("float32", 4)])
def test_logits_are_the_teachers_rounded(teacher: nn.Module, path: Path, dtype: Any, size: int) -> None:
    inputs, _ = make_data(COUNT).tensors
    exact = FrozenTeacher(teacher)(inputs)
    first = fill(cached(teacher, path, dtype=dtype))
    second = fill(cached(copy.deepcopy(teacher), path, dtype=dtype), shuffle=True)  # as another run would
    for row in range(COUNT):
        assert torch.equal(first[row], exact[row].to(getattr(torch, dtype)).float())
        assert torch.equal(first[row], second[row])  # whether computed or read
    assert path.stat().st_size == 4096 + COUNT * (size * NUM_CLASSES + 5)


def test_the_teacher_runs_until_its_rows_are_there_and_once_to_compare(teacher: nn.Module, path: Path) -> None:
    network = Counting(teacher)
    frozen = cached(network, path)
    counts = []
    for _ in range(4):
        fill(frozen)
        counts.append(network.calls)
    assert counts == [3, 4, 5, 6]  # index() is a new look at the data each time: one comparison
    data = frozen.index(make_data(COUNT))
    for _ in range(5):
        for (inputs, _), rows in DataLoader(data, batch_size=8):
            frozen.logits(inputs, rows)
    assert network.calls == 7
    assert not len(the_cache(frozen).missing())


def test_partly_filled_batches_keep_what_there_is(teacher: nn.Module, path: Path) -> None:
    frozen = cached(teacher, path)
    data = frozen.index(make_data(COUNT))
    inputs, _ = make_data(COUNT).tensors
    frozen.logits(inputs[:10], torch.arange(10))
    assert the_cache(frozen).missing().tolist() == list(range(10, COUNT))
    before = path.read_bytes()
    logits = frozen.logits(inputs[[5, 20, 5, 20]], torch.tensor([5, 20, 5, 20]))  # repeated, as samplers may
    torch.testing.assert_close(logits, frozen(inputs[[5, 20, 5, 20]]), rtol=1e-3, atol=1e-3)
    after = path.read_bytes()
    assert len(data) == COUNT
    assert the_cache(frozen).missing().tolist() == [row for row in range(10, COUNT) if row != 20]
    rows = slice(4096 + 4 * COUNT, 4096 + 4 * COUNT + 10 * 2 * NUM_CLASSES)
    assert before[rows] == after[rows]


def test_distiller_in_a_bare_loop(teacher: nn.Module, path: Path) -> None:
    frozen, live = cached(teacher, path), Distiller(teacher)
    distiller, student = Distiller(frozen), make_network()
    for (inputs, targets), rows in DataLoader(frozen.index(make_data(COUNT)), batch_size=8):
        logits = student(inputs)
        out = distiller(inputs, logits, targets, index=rows)
        torch.testing.assert_close(out.loss, live(inputs, logits, targets).loss, rtol=1e-3, atol=1e-4)
        assert out.teacher_logits.dtype == torch.float32
        torch.testing.assert_close(
            live.teacher_logits(inputs), distiller.teacher_logits(inputs), rtol=0, atol=0
        )  # without rows: the network


def test_logits_of_more_dimensions(path: Path) -> None:
    network = nn.Conv2d(2, 5, 1)
    network.weight.data.mul_(3)
    images = TensorDataset(torch.randn(6, 2, 4, 4), torch.zeros(6))
    first, second = (fill(cached(copy.deepcopy(network), path), images, 3) for _ in range(2))
    assert first[4].shape == (5, 4, 4)
    assert all(torch.equal(first[row], second[row]) for row in range(6))
    torch.testing.assert_close(first[4], network(images.tensors[0])[4], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("size", "message"), [(70_000.0, "7e.04, too large for float16"), (float("nan"), "not finite")]
)
def test_logits_that_float16_cannot_hold(path: Path, size: float, message: str) -> None:
    frozen = FrozenTeacher(nn.Linear(2, 3, bias=False), cache=TeacherCache(path), checkpoint="none")
    frozen.loaded = True
    frozen.module.weight.data.fill_(size)  # pyright: ignore
    data = frozen.index(TensorDataset(torch.tensor([[1.0, 0.0]])))
    with pytest.raises(ValueError, match=message):
        frozen.logits(data[0].batch[0][None], torch.tensor([0]))
    assert not path.exists()
    if size == 70_000.0:
        wide = TeacherCache(path, dtype="float32")
        wide.index(data.dataset, "teacher")
        assert wide.logits(torch.tensor([0]), lambda: torch.full((1, 3), size)).tolist() == [[size] * 3]


# ---- top-k -------------------------------------------------------------------------------------------------------


def test_top_k_keeps_the_large_and_the_mass_of_the_rest(path: Path) -> None:
    logits = torch.randn(4, 2000) * 3
    cache = TeacherCache(path, dtype="float32", top_k=50)
    cache.index(TensorDataset(torch.randn(4, 1)), "teacher")
    with pytest.warns(UserWarning, match=r"top_k=50 of 2000 classes.* 0\.\d+ at T = 1, .* at T = 4"):
        kept = cache.logits(torch.arange(4), lambda: logits)
    top = logits.topk(50).indices
    exact, found = logits.softmax(1), kept.softmax(1)
    torch.testing.assert_close(found.gather(1, top), exact.gather(1, top))
    rest = found.scatter(1, top, 0.0)
    torch.testing.assert_close(rest.sum(1), exact.scatter(1, top, 0.0).sum(1), rtol=1e-4, atol=1e-6)
    tails = [row[row > 0] for row in rest]
    assert all(len(tail) == 1950 and tail.max() == tail.min() for tail in tails)
    assert path.stat().st_size == 4096 + 4 * (51 * 4 + 50 * 4 + 5)


@pytest.mark.filterwarnings("ignore:top_k=")
def test_top_k_of_one_sample(path: Path) -> None:
    """Its class numbers begin at a byte that is no multiple of four."""
    logits, cache = torch.randn(1, 2000), TeacherCache(path, top_k=50)
    cache.index(TensorDataset(torch.randn(1, 1)), "teacher")
    top = logits.topk(50).indices
    found = cache.logits(torch.tensor([0]), lambda: logits)
    torch.testing.assert_close(found.gather(1, top), logits.gather(1, top), rtol=1e-3, atol=1e-3)


def test_top_k_is_refused_for_few_classes(teacher: nn.Module, path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1000 classes"):
        fill(cached(teacher, path, top_k=3))


# ---- a file that is not this run's -------------------------------------------------------------------------------


def other_teacher(teacher: nn.Module) -> nn.Module:
    changed = copy.deepcopy(teacher)
    changed[0].weight.data[0, 0] += 1e-6  # pyright: ignore
    return changed


def moved(by: float, label: int = 0) -> TensorDataset:
    inputs, targets = make_data(COUNT).tensors
    return TensorDataset(inputs + by, (targets + label) % NUM_CLASSES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": other_teacher}, "of another teacher"),
        ({"data": moved(0.0, label=1)}, "of other data"),
        ({"data": moved(1e-3)}, "of other inputs: the transform changed"),
        ({"data": make_data(COUNT - 1)}, "samples 24 in the file, 23 now"),
        ({"options": {"dtype": "float32"}}, "dtype 'float16' in the file, 'float32' now"),
        ({"options": {"augmentation": "replay", "slots": 3}}, "augmentation None in the file, 'replay' now; slots 1"),
        ({"options": {"top_k": 5}}, "top_k None in the file, 5 now"),
        ({"options": {"augmentation": "fixed", "seed": 3}}, "seed 0 in the file, 3 now"),
    ],
)
def test_a_foreign_cache_is_refused(teacher: nn.Module, path: Path, change: dict[str, Any], message: str) -> None:
    fill(cached(teacher, path))
    before = path.read_bytes()
    other = cached(change.get("teacher", lambda same: same)(teacher), path, **change.get("options", {}))
    with pytest.raises(ValueError, match=r"is not of this run.*" + message + r".*another path, or delete the file"):
        other.index(change.get("data", make_data(COUNT)))
    assert path.read_bytes() == before


def test_one_cache_is_of_one_dataset(teacher: nn.Module, path: Path) -> None:
    frozen = cached(teacher, path)
    frozen.index(make_data(COUNT))
    with pytest.raises(ValueError, match="in use for another teacher or dataset"):
        frozen.index(make_data(COUNT, seed=1))  # such as the validation part


def test_what_is_changed_after_the_dataset_is_found(teacher: nn.Module, path: Path) -> None:
    fill(cached(teacher, path))
    frozen = cached(teacher, path)
    frozen.index(make_data(COUNT))
    inputs, _ = make_data(COUNT).tensors
    mixed = 0.5 * inputs[:8] + 0.5 * inputs[8:16]
    with pytest.raises(ValueError, match=r"row \d is \d+% off. Is the batch changed after the dataset \(MixUp"):
        frozen.logits(mixed, torch.arange(8))
    frozen.logits(inputs[:8].bfloat16().float(), torch.arange(8))  # another precision is no other input


def test_rows_of_another_dataset(teacher: nn.Module, path: Path) -> None:
    frozen = cached(teacher, path)
    inputs, _ = make_data(COUNT).tensors
    with pytest.raises(RuntimeError, match=r"does not know its dataset yet.*teacher\.index\(dataset\)"):
        frozen.logits(inputs, torch.arange(COUNT))
    frozen.index(make_data(COUNT))
    with pytest.raises(ValueError, match="rows 0 to 23, got 24"):
        frozen.logits(inputs[:1], torch.tensor([COUNT]))


def test_another_version_of_the_format(teacher: nn.Module, path: Path) -> None:
    fill(cached(teacher, path))
    content = bytearray(path.read_bytes())
    header = json.loads(content[8:4092].rstrip(b"\0"))
    block = (content[:8] + json.dumps(header | {"version": 2}).encode()).ljust(4092, b"\0")
    path.write_bytes(block + zlib.crc32(block).to_bytes(4, "little") + content[4096:])
    with pytest.raises(ValueError, match="format version 2, this library reads 1"):
        cached(teacher, path).index(make_data(COUNT))


# ---- damage ------------------------------------------------------------------------------------------------------


def read_all(teacher: nn.Module, path: Path) -> None:
    frozen = cached(teacher, path)
    frozen.index(make_data(COUNT))
    the_cache(frozen).verify()


def test_a_flipped_bit_is_found_wherever_it_is(teacher: nn.Module, path: Path) -> None:
    fill(cached(teacher, path))
    whole = path.read_bytes()
    read_all(teacher, path)
    chosen = random.Random(0)
    parts = {"header": (0, 4096), "checksums": (4096, 96), "rows": (4192, 24 * 12), "flags": (4480, 24)}
    assert len(whole) == 4504
    for part, (begin, length) in parts.items():
        for _ in range(12):
            position, bit = begin + chosen.randrange(length), chosen.randrange(8)
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"is damaged|is no teacher cache") as error:
                read_all(teacher, path)
            assert "delete the file" in str(error.value), part


def damage_row(path: Path, row: int) -> None:
    content = bytearray(path.read_bytes())
    content[4096 + 4 * COUNT + 12 * row] ^= 1
    path.write_bytes(content)


def test_training_finds_a_damaged_row_when_it_reads_it(teacher: nn.Module, path: Path) -> None:
    fill(cached(teacher, path))
    damage_row(path, 7)
    frozen = cached(teacher, path)
    frozen.index(make_data(COUNT))
    inputs, _ = make_data(COUNT).tensors
    frozen.logits(inputs[:7], torch.arange(7))
    with pytest.raises(ValueError, match="row 7 does not match its checksum"):
        frozen.logits(inputs[5:9], torch.arange(5, 9))


def test_rows_in_each_others_place(teacher: nn.Module, path: Path) -> None:
    fill(cached(teacher, path))
    content = bytearray(path.read_bytes())
    for begin, size in ((4096, 4), (4096 + 4 * COUNT, 12)):  # their checksums go with them
        one, two = slice(begin, begin + size), slice(begin + size, begin + 2 * size)
        content[one], content[two] = content[two], content[one]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="row 0 does not match its checksum"):
        read_all(teacher, path)


@pytest.mark.parametrize(("size", "message"), [(4503, "is truncated: 4503 bytes, 4504 expected"),
                                              (4096, "is truncated"), (100, "is truncated"), (0, "is truncated"),
                                              (4505, "is too long")])  # fmt: skip
def test_a_truncated_file(teacher: nn.Module, path: Path, size: int, message: str) -> None:
    fill(cached(teacher, path))
    path.write_bytes((path.read_bytes() + b"\0")[:size])
    with pytest.raises(ValueError, match=message):
        cached(teacher, path).index(make_data(COUNT))


def test_some_other_file(teacher: nn.Module, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(bytes(5000))
    with pytest.raises(ValueError, match="is no teacher cache"):
        cached(teacher, path).index(make_data(COUNT))
    assert path.read_bytes() == bytes(5000)


def test_a_cache_that_cannot_be_written(teacher: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cached(teacher, path))
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anything
    fill(cached(teacher, path))
    content = bytearray(path.read_bytes())
    content[-1] = 0  # the last row is not there
    path.write_bytes(content)
    with pytest.raises(PermissionError, match="lacks row 23"):
        fill(cached(teacher, path))


# ---- builds that stop, and builds at once ------------------------------------------------------------------------


def slow_build(path: Path) -> None:
    cache = TeacherCache(path, dtype="float32")
    data = cache.index(TensorDataset(torch.arange(4000.0).reshape(-1, 1)), "teacher")
    for (x,), rows in DataLoader(data, batch_size=4):
        time.sleep(0.002)
        cache.logits(rows, lambda x=x: x * torch.arange(5.0))


@pytest.mark.slow
def test_a_killed_build_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "killed.cache"
    process = multiprocessing.get_context("fork").Process(target=slow_build, args=(path,))
    process.start()
    while not path.exists() or path.read_bytes()[-4000:].count(0xA5) < 50:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL

    inputs = torch.arange(4000.0).reshape(-1, 1)
    cache = TeacherCache(path, dtype="float32")
    data = cache.index(TensorDataset(inputs), "teacher")
    cache.verify()
    missing = cache.missing()
    assert 0 < len(missing) <= 3950
    computed = []
    for (x,), rows in DataLoader(data, batch_size=100):
        logits = cache.logits(rows, lambda x=x, rows=rows: computed.append(rows) or x * torch.arange(5.0))
        assert torch.equal(logits, x * torch.arange(5.0))
    assert len(computed) <= 1 + -(-len(missing) // 100) + 1
    assert not len(cache.missing())
    cache.verify()
    assert [file.name for file in tmp_path.iterdir()] == ["killed.cache"]


def write_rows(path: Path, numbers: list[int], start: Any) -> None:
    """A rank that has a sample twice computes logits that differ in the last bits."""
    cache = TeacherCache(path, dtype="float32")
    cache.index(TensorDataset(torch.arange(400.0)[:, None]), "teacher")
    start.wait()
    noise = random.Random(len(numbers) + numbers[0])
    for begin in range(0, len(numbers), 4):
        rows = torch.tensor(numbers[begin : begin + 4])
        exact = rows[:, None] * torch.ones(1, 300)
        logits = cache.logits(rows, lambda exact=exact: exact * (1 + 1e-6 * noise.random()) + torch.arange(300.0))
        assert (logits - exact - torch.arange(300.0)).abs().max() < 0.01


@pytest.mark.slow
def test_processes_may_write_at_once(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, orders = context.Barrier(3), [random.Random(rank).sample(range(400), 300) for rank in range(3)]
    processes = [context.Process(target=write_rows, args=(path, order, start)) for order in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    cache = TeacherCache(path, dtype="float32")
    cache.index(TensorDataset(torch.arange(400.0)[:, None]), "teacher")
    cache.verify()
    assert set(cache.missing()) == set(range(400)) - set().union(*orders)
    assert len(list(path.parent.iterdir())) == 1


def test_a_reader_waits_for_a_row_that_is_being_written(teacher: nn.Module, path: Path) -> None:
    """Where another processor sees the flag before the row, it looks again under the lock."""
    fill(cached(teacher, path))
    frozen = cached(teacher, path)
    frozen.index(make_data(COUNT))
    file = the_cache(frozen)._file
    assert file is not None
    whole, locked = file.rows[3].copy(), file._locked
    file.rows[3] = 0

    def finish() -> Any:
        file.rows[3] = whole
        return locked()

    file._locked = finish
    assert np.array_equal(file.read(np.array([2, 3]))[1], whole)


# ---- the object --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype must be one of float16"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"augmentation": "random"}, "augmentation must be None"),
        ({"slots": 4}, "slots must be at least 2 with augmentation='replay' and 1 without, got 4"),
        ({"augmentation": "replay"}, "slots must be at least 2"),
        ({"augmentation": "fixed", "slots": 2}, "slots must be"),
    ],
)
def test_bad_arguments(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherCache(path, **options)


def test_pickled_teachers_open_the_file_anew(teacher: nn.Module, path: Path) -> None:
    frozen = cached(teacher, path)
    expected = fill(frozen)
    other = pickle.loads(pickle.dumps(frozen))
    inputs, _ = make_data(COUNT).tensors
    assert torch.equal(other.logits(inputs, torch.arange(COUNT)), torch.stack([expected[row] for row in range(COUNT)]))
    assert repr(the_cache(other)) == f"TeacherCache({path}, 24 of 24 rows, 17 bytes each)"


def test_a_teacher_without_cache(teacher: nn.Module) -> None:
    frozen = FrozenTeacher(teacher)
    assert frozen.caches == ()
    with pytest.raises(ValueError, match="this teacher has no cache"):
        frozen.index(make_data(COUNT))


# torch looks at it where a graph ends, and hides the warning only where it is none that is an error
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_no_graph_goes_through_the_map(teacher: nn.Module, path: Path) -> None:
    frozen = cached(teacher, path)
    data = frozen.index(make_data(COUNT))
    student = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def step(inputs: Tensor, rows: Tensor) -> Tensor:
        return (student(inputs) * 2 - frozen.logits(inputs, rows)).square().mean()

    compiled: Callable[..., Tensor] = torch.compile(step, backend="eager")
    for _ in range(2):
        for (inputs, _), rows in DataLoader(data, batch_size=8):
            torch.testing.assert_close(compiled(inputs, rows), step(inputs, rows))


# ---- opening, and reading ahead ----------------------------------------------------------------------------------


def test_opening_costs_nothing_for_each_row(tmp_path: Path) -> None:
    count, identity = 2_000_000, {"teacher": "t", "samples": 2_000_000, "slots": 1}
    CacheFile.create(tmp_path / "a", identity, [1], 1)
    tracemalloc.start()
    file = CacheFile(tmp_path / "a", identity)
    assert tracemalloc.get_traced_memory()[1] < count / 8
    tracemalloc.stop()
    assert len(file.flags) == count


@pytest.mark.slow
@pytest.mark.parametrize("filled", [COUNT, COUNT // 2])
def test_workers_verify_rows_ahead(
    teacher: nn.Module, path: Path, filled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached(teacher, path)
    first.index(make_data(COUNT))
    inputs, _ = make_data(COUNT).tensors
    expected = first.logits(inputs[:filled], torch.arange(filled))
    frozen = cached(copy.deepcopy(teacher), path)
    data = frozen.index(make_data(COUNT))
    loader = DataLoader(data, batch_size=filled, num_workers=2, sampler=range(filled))
    (batch, _), rows = next(iter(loader))
    file = the_cache(frozen)._file
    assert file is not None
    assert file._verified[:filled].all()
    monkeypatch.setattr(cache_file, "_checksums", lambda *_: pytest.fail("a worker has verified the rows"))
    assert torch.equal(the_cache(frozen).logits(rows, None), expected)
    assert torch.equal(batch, inputs[:filled])


@pytest.mark.slow
def test_a_damaged_row_is_told_by_the_training_process(teacher: nn.Module, path: Path) -> None:
    fill(cached(teacher, path))
    damage_row(path, 7)
    frozen = cached(teacher, path)
    data = frozen.index(make_data(COUNT))
    (inputs, _), rows = next(iter(DataLoader(data, batch_size=COUNT, num_workers=1)))
    with pytest.raises(ValueError, match=r"row 7 does not match its checksum\. To have it built anew, delete the file"):
        frozen.logits(inputs, rows)


def test_rows_of_a_batch_are_requested_at_once_without_workers_too(
    teacher: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cached(teacher, path))
    data = cached(teacher, path).index(make_data(COUNT))
    asked: list[list[int]] = []
    monkeypatch.setattr(CacheFile, "request", lambda self, rows: asked.append(rows.tolist()))
    list(DataLoader(data, batch_size=COUNT // 2))
    assert asked == [list(range(COUNT // 2)), list(range(COUNT // 2, COUNT))]


def test_rows_are_requested_in_blocks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = {"samples": 100, "slots": 1}
    path.parent.mkdir()
    CacheFile.create(path, identity, [2048], 4096)
    file = CacheFile(path, identity)
    asked: list[tuple[int, int]] = []

    class Map:
        def madvise(self, advice: int, start: int, length: int) -> None:
            assert start % mmap.PAGESIZE == 0
            asked.append((start, length))

    monkeypatch.setattr(file, "_map", Map())
    file.request(np.array([5, 50, 6, 51, 5, 99]))
    begin = 4096 + 4 * 100
    for row in (5, 6, 50, 51, 99):
        assert any(
            start <= begin + row * 4096 and begin + (row + 1) * 4096 <= start + length for start, length in asked
        )
    assert len(asked) == 3
    file.request(np.array([], dtype=np.int64))
    assert len(asked) == 3
