"""How rows lie in a shard: an Arrow IPC stream of one record batch, one row a sequence.

``datasets.Dataset.from_file`` opens it. Columns, for a sequence of L tokens:

    sequence_id    string
    length         int32
    ids            [L][k] int32                     }
    logits         [L][k] of the manifest's dtype   } with k > 0
    lse            [L], or [L][M] for M temperatures; float32, float64 for dtype float64
    log_tail_mass  as lse
    samples        [L][n] of {id: int32, count: int32 (uint8 up to 255 samples)}, with samples > 0

float16 logits are relative to the token's largest logit, as is lse: near 30 float16 has steps of 1/64, and
what is wanted of a logit is its distance from the others.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from kd_kernels.cache.errors import CacheError, arrow
from kd_kernels.cache.manifest import Manifest

_TORCH = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def logits_dtype(manifest: Manifest) -> torch.dtype:
    return _TORCH[manifest.dtype]


def statistic_dtype(manifest: Manifest) -> torch.dtype:
    return torch.float64 if manifest.dtype == "float64" else torch.float32


def count_dtype(manifest: Manifest) -> torch.dtype:
    return torch.uint8 if manifest.samples <= 255 else torch.int32


def statistic_width(manifest: Manifest) -> Optional[int]:
    """M where several temperatures were asked for; None for a bare number."""
    return len(manifest.temperatures) if isinstance(manifest.temperature, tuple) else None


def columns(manifest: Manifest) -> dict[str, tuple[torch.dtype, Optional[int]]]:
    """The per-token columns but the draws: name -> (dtype, values per token or None for one)."""
    top = {"ids": (torch.int32, manifest.k), "logits": (logits_dtype(manifest), manifest.k)}
    statistic = (statistic_dtype(manifest), statistic_width(manifest))
    return {**(top if manifest.k else {}), "lse": statistic, "log_tail_mass": statistic}


def arrow_type(dtype: torch.dtype) -> Any:
    pa = arrow()
    return {
        torch.uint8: pa.uint8(),
        torch.int32: pa.int32(),
        torch.float16: pa.float16(),
        torch.float32: pa.float32(),
        torch.float64: pa.float64(),
    }[dtype]


def _pair(manifest: Manifest) -> Any:
    pa = arrow()
    return pa.struct([("id", pa.int32()), ("count", arrow_type(count_dtype(manifest)))])


def schema(manifest: Manifest) -> Any:
    pa = arrow()
    found = [("sequence_id", pa.string()), ("length", pa.int32())]
    for name, (dtype, width) in columns(manifest).items():
        item = arrow_type(dtype)
        found.append((name, pa.list_(item if width is None else pa.list_(item, width))))
    if manifest.samples:
        found.append(("samples", pa.list_(pa.list_(_pair(manifest)))))
    return pa.schema(found, metadata={"kd_teacher_cache": manifest.digest})


def batch(manifest: Manifest, ids: list[str], lengths: list[int], rows: dict[str, Tensor]) -> Any:
    """The record batch of a shard. ``rows`` has the columns ``[tokens, ...]``, and for draws
    ``samples_per_token``, ``sample_ids`` and ``sample_counts`` without the unused ones."""
    pa = arrow()
    ends = _array(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))
    arrays = [pa.array(ids, pa.string()), pa.array(lengths, pa.int32())]
    for name, (_, width) in columns(manifest).items():
        values = _array(rows[name])
        if width is not None:
            values = pa.FixedSizeListArray.from_arrays(values, width)
        arrays.append(pa.ListArray.from_arrays(ends, values))
    if manifest.samples:
        pairs = pa.StructArray.from_arrays(
            [_array(rows["sample_ids"]), _array(rows["sample_counts"])], fields=list(_pair(manifest))
        )
        token_ends = torch.nn.functional.pad(rows["samples_per_token"].cumsum(0), (1, 0)).to(torch.int32)
        arrays.append(pa.ListArray.from_arrays(ends, pa.ListArray.from_arrays(_array(token_ends), pairs)))
    return pa.record_batch(arrays, schema=schema(manifest))


def _array(values: Tensor) -> Any:
    """A tensor's memory as an Arrow array, flat."""
    pa = arrow()
    values = values.contiguous()
    size = values.numel() * values.element_size()
    buffer = pa.foreign_buffer(values.data_ptr(), size, values) if size else pa.py_buffer(b"")
    return pa.Array.from_buffers(arrow_type(values.dtype), values.numel(), [None, buffer])


def refuse_nulls(where: str, name: str, array: Any) -> None:
    """Nothing here is ever missing, and a slice's values are not at its beginning."""
    pa = arrow()
    if array.null_count or array.offset:
        raise CacheError(f"{where}: {name} has missing values")
    if pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        refuse_nulls(where, name, array.values)
    elif pa.types.is_struct(array.type):
        for index in range(array.type.num_fields):
            refuse_nulls(where, name, array.field(index))
