"""The first samples of a loader, from which shapes are known before training starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from kd_lightning._lightning import is_sequential


def first_samples(loader: Any, count: int = 2) -> Any:
    """Return a batch of a loader's first samples, in the structure of its batches.

    Of a DataLoader only data set, sampler and ``collate_fn`` are used, so that no worker starts.
    """
    if isinstance(loader, CombinedLoader):
        return first_samples(loader.flattened[0] if is_sequential(loader) else loader.iterables, count)
    if isinstance(loader, Mapping):
        return {name: first_samples(part, count) for name, part in loader.items()}
    if isinstance(loader, (list, tuple)):
        return [first_samples(part, count) for part in loader]
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return next(iter(loader))
    generators = {id(g): g for part in (loader, loader.sampler) if (g := getattr(part, "generator", None)) is not None}
    kept = [(generator, generator.get_state()) for generator in generators.values()]
    try:
        if loader.batch_sampler is None:  # the data set itself gives batches
            return loader.collate_fn(loader.dataset[next(iter(loader.sampler))])
        indices = next(iter(loader.batch_sampler))[:count]
        together = getattr(loader.dataset, "__getitems__", None)
        return loader.collate_fn(together(indices) if together else [loader.dataset[index] for index in indices])
    finally:
        for generator, state in kept:
            generator.set_state(state)
