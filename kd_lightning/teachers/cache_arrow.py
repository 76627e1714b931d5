"""The logits of a teacher cache as a column, for streams that carry them beside their samples."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from kd_lightning.teachers.cache import TeacherCache

_ROWS = 4096  # of a record batch


def write_arrow(cache: TeacherCache) -> Path:
    """Write a whole cache as an Arrow stream, as the Hugging Face datasets library does, beside the cache's file.

    Columns: ``id``, the sample's number in the dataset, and ``logits``, a list of float16 (float32 unless the cache is
    in float16). :class:`~kd_lightning.teachers.LogitsFile` reads the file.
    """
    try:
        import pyarrow as pa
        from pyarrow import ipc
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"an Arrow file of {cache.path} needs pyarrow, which is not installed: pip install 'kd-lightning[arrow]'."
        ) from error
    lacks = len(cache.missing())
    if lacks:
        raise ValueError(f"the cache {cache.path} lacks {lacks} rows. Complete it first: kd-lightning cache-teacher.")
    if cache.top_k is not None or cache.slots > 1 or len(cache.row_shape) != 1:
        raise ValueError(
            f"an Arrow file has a row of logits (C,) for each sample, but the cache {cache.path} has rows of shape "
            f"{tuple(cache.row_shape)} with top_k={cache.top_k}, in {cache.slots} slots. Train from the cache itself."
        )
    dtype = np.float16 if cache.dtype == "float16" else np.float32
    path = cache.path.with_suffix(".arrow")
    own = path.with_name(f".{path.name}.{os.getpid()}")
    schema = pa.schema({"id": pa.int64(), "logits": pa.list_(pa.from_numpy_dtype(dtype))})
    try:
        with ipc.new_stream(str(own), schema) as stream:
            for rows in torch.arange(cache.rows.start, cache.rows.stop).split(_ROWS):
                logits = cache.logits(rows, None).numpy().astype(dtype)
                ends = np.arange(0, logits.size + 1, logits.shape[1], dtype=np.int32)
                lists = pa.ListArray.from_arrays(ends, pa.array(logits.ravel()))
                stream.write_batch(pa.record_batch([pa.array((rows - cache.first).numpy()), lists], schema=schema))
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
    return path
