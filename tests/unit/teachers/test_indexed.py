from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset
from torchvision.transforms import v2

from kd_lightning.datamodules import crop_pipeline
from kd_lightning.datamodules.dataset import BatchedImageDataset, ImageDataset, collate
from kd_lightning.teachers import IndexedDataset, TeacherCache
from kd_lightning.teachers.indexed import Rows, input_fingerprints

IMAGES = torch.randint(1, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(20)


class ThreeGenerators(Dataset[Any]):
    """Draws from each of the global generators."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.tensor([float(torch.rand(())), random.random(), float(np.random.rand())])  # noqa: NPY002
        return {"image": index + noise, "labels": index, "name": f"image {index}"}


def one_by_one() -> ImageDataset:
    return ImageDataset(IMAGES, TARGETS, v2.Compose([v2.RandomResizedCrop(8), v2.ToDtype(torch.float32, scale=True)]))


def by_batch() -> BatchedImageDataset:
    transform = crop_pipeline(8, padding=2, flip=True).batch_augment
    assert transform is not None
    return BatchedImageDataset(IMAGES, TARGETS, v2.Compose([transform, v2.ToDtype(torch.float32, scale=True)]))


def by_batch_with_noise() -> BatchedImageDataset:
    def transform(images: Tensor) -> Tensor:
        moved = crop_pipeline(8, padding=2, flip=True).batch_augment
        assert moved is not None
        return moved(images) + torch.rand(len(images), 1, 1, 1) + random.random()

    return BatchedImageDataset(IMAGES, TARGETS, transform)


def images_of(batch: Any) -> Tensor:
    return batch["image"] if isinstance(batch, dict) else batch[0]


def by_row(loader: DataLoader[Any]) -> dict[int, Tensor]:
    return {int(row): image for batch, rows in loader for row, image in zip(rows, images_of(batch), strict=True)}


def same(one: dict[int, Tensor], two: dict[int, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[row], two[row]) for row in one)


DATASETS = [ThreeGenerators, one_by_one, by_batch, by_batch_with_noise]


@pytest.mark.slow
@pytest.mark.parametrize("make", DATASETS)
@pytest.mark.parametrize("workers", [0, 2])
def test_replay_is_the_same_bit_for_bit(make: Any, workers: int) -> None:
    """In any batch, order, process and state of the generators; and another in each of the slots."""
    epochs: list[list[dict[int, Tensor]]] = []
    for run in range(2):
        data = IndexedDataset(make(), slots=3, seed=5, collate_fn=collate)
        torch.manual_seed(run)
        options: dict[str, Any] = {"persistent_workers": True, "num_workers": workers} if workers else {}
        loader = DataLoader(data, batch_size=5 + 2 * run, shuffle=True, collate_fn=data.collate, **options)
        epochs.append([])
        for epoch in range(4):
            data.set_epoch(epoch)
            epochs[-1].append(by_row(loader))
        del loader
    for first, second in zip(*epochs, strict=True):
        assert same(first, second)
    one, two, three, again = epochs[0]
    assert same(one, again)
    assert [sorted(part) for part in (one, two, three)] == [list(range(begin, begin + 20)) for begin in (0, 20, 40)]
    changed = [i for i in range(20) if not torch.equal(one[i], two[20 + i]) and not torch.equal(one[i], three[40 + i])]
    assert len(changed) > 15
    data = IndexedDataset(make(), slots=3, seed=6, collate_fn=collate)
    assert not same(one, by_row(DataLoader(data, batch_size=5, collate_fn=data.collate)))


def test_our_own_batches_are_replayed_whole() -> None:
    assert by_batch().replay([1, 2], [3, 4]) is not None
    assert by_batch_with_noise().replay([1, 2], [3, 4]) is None


def test_replayed_crops_are_spread_as_drawn_ones_are() -> None:
    image = torch.arange(1, 65).reshape(1, 1, 8, 8).to(torch.uint8)
    transform = crop_pipeline(8, padding=2, flip=True).batch_augment
    assert transform is not None
    data = BatchedImageDataset(image.repeat(4000, 1, 1, 1), torch.zeros(4000).long(), transform)
    samples = IndexedDataset(data, slots=1).fetch(list(range(4000))).samples
    counts: dict[bytes, int] = {}
    for view in samples.tensors[0]:
        counts[view.numpy().tobytes()] = counts.get(view.numpy().tobytes(), 0) + 1
    assert len(counts) == 5 * 5 * 2
    # chi-square with 49 degrees of freedom: mean 49, standard deviation 10
    assert sum((count - 80) ** 2 / 80 for count in counts.values()) < 90


def test_the_generators_are_left_alone() -> None:
    for make in DATASETS:
        data = IndexedDataset(make(), slots=2)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002  # pyright: ignore
        data.__getitems__([1, 2, 3])
        input_fingerprints(data)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == random.getstate()
        assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002  # pyright: ignore


def test_without_slots_the_dataset_draws_as_ever() -> None:
    torch.manual_seed(3)
    expected = by_batch().__getitems__([4, 2]).tensors[0]
    torch.manual_seed(3)
    samples = IndexedDataset(by_batch()).__getitems__([4, 2])
    assert torch.equal(samples.samples.tensors[0], expected)
    assert samples.rows == [4, 2]


@pytest.mark.parametrize("make", [ThreeGenerators, one_by_one, by_batch])
def test_any_collate_function_reads_the_samples(make: Any) -> None:
    data = IndexedDataset(make(), slots=1)
    assert same(by_row(DataLoader(data, 6)), by_row(DataLoader(data, 7, collate_fn=data.collate)))


def test_batches_of_a_collate_function_of_its_own() -> None:
    def names(samples: list[dict[str, Any]]) -> list[str]:
        return [sample["name"] for sample in samples]

    data = IndexedDataset(ThreeGenerators(), collate_fn=names)
    batch, rows = next(iter(DataLoader(data, 2, sampler=[3, 1], collate_fn=data.collate)))
    assert batch == ["image 3", "image 1"]
    assert rows.tolist() == [3, 1]


def test_distributed_samplers_and_dropped_samples() -> None:
    data = IndexedDataset(TensorDataset(torch.arange(21.0)))
    seen: list[int] = []
    for rank in range(2):
        sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=True)
        for [x], rows in DataLoader(data, batch_size=4, sampler=sampler, drop_last=True):
            assert torch.equal(x, rows.float())
            seen += rows.tolist()
    assert len(seen) == 16


def test_rows_of_all_slots() -> None:
    data = IndexedDataset(by_batch(), slots=4)
    rest = by_row(DataLoader(Rows(data, [79, 3, 41]), batch_size=2))
    assert sorted(rest) == [3, 41, 79]
    for slot, index in ((3, 19), (0, 3), (2, 1)):
        data.set_epoch(slot + 4)
        assert torch.equal(rest[slot * 20 + index], data[index].batch[0])
    assert Rows(data, [5])[0].rows == 5


# ---- fingerprints and refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", DATASETS)
def test_random_samples_are_refused(make: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"another one each time it is fetched.*augmentation='fixed'.*'replay'"):
        TeacherCache(tmp_path / "a").index(make(), "teacher")
    TeacherCache(tmp_path / "a", augmentation="fixed").index(make(), "teacher")


def test_rare_augmentation_is_found() -> None:
    class Rarely(ThreeGenerators):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": torch.tensor(1.0 if torch.rand(()) < 0.1 else 0.0)}

    with pytest.raises(ValueError, match="another one each time"):
        input_fingerprints(IndexedDataset(Rarely()))


def test_generators_of_their_own_cannot_be_replayed(tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    class Own(ThreeGenerators):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": torch.rand(3, generator=generator)}

    with pytest.raises(ValueError, match=r"cannot be replayed.*a generator of its own"):
        TeacherCache(tmp_path / "a", augmentation="replay", slots=2).index(Own(), "teacher")


def test_fingerprints_tell_data_from_transforms() -> None:
    def fingerprints(images: Tensor = IMAGES, targets: Tensor = TARGETS, scale: float = 1.0) -> tuple[str, str]:
        return input_fingerprints(IndexedDataset(ImageDataset(images, targets, lambda image: image * scale)))

    data, inputs = fingerprints()
    assert fingerprints() == (data, inputs)
    assert fingerprints(scale=0.5)[0] == data
    assert fingerprints(scale=0.5)[1] != inputs
    assert fingerprints(targets=TARGETS.flip(0))[0] != data
    assert fingerprints(images=IMAGES.flip(0))[0] != data
    assert fingerprints(images=IMAGES[:19], targets=TARGETS[:19])[0] != data


def test_samples_of_many_kinds_have_fingerprints() -> None:
    class Kinds(Dataset[Any]):
        def __init__(self, **changed: Any) -> None:
            self.parts = {
                "tokens": torch.arange(3), "array": np.ones(2), "text": "a", "weight": 0.5, "none": None, **changed,
            }  # fmt: skip

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return self.parts, (index, [torch.ones(1, dtype=torch.bfloat16)])

    expected = input_fingerprints(IndexedDataset(Kinds()))
    for name, value in {"tokens": torch.ones(3).long(), "text": "b", "none": 1}.items():
        changed = input_fingerprints(IndexedDataset(Kinds(**{name: value})))
        assert changed[0] != expected[0], name
        assert changed[1] == expected[1], name
    for name, value in {"array": np.zeros(2), "weight": 0.25}.items():
        changed = input_fingerprints(IndexedDataset(Kinds(**{name: value})))
        assert changed[0] == expected[0], name
        assert changed[1] != expected[1], name


def test_datasets_without_numbers() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield 1

    with pytest.raises(TypeError, match=r"Stream has no len\(\)"):
        IndexedDataset(Stream())


def test_caches_of_one_dataset_must_agree(tmp_path: Any) -> None:
    data = TeacherCache(tmp_path / "a", augmentation="replay", slots=2).index(by_batch(), "one")
    assert TeacherCache(tmp_path / "b", augmentation="replay", slots=2).index(data, "two") is data
    with pytest.raises(ValueError, match="must agree on its augmentation"):
        TeacherCache(tmp_path / "c", augmentation="fixed").index(data, "three")
