"""Which dtypes ids and tables have, and the one that sums are taken in."""

from functools import cache

import torch

IDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
# Kernels see a bool as the byte that it is; the others are numbered as in kernels/wrapped_index.cuh.
KERAS_IDS = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.bool,
)
# What torch's own lookup takes; other ids are cast to int32 for it.
TORCH_IDS = (torch.int64, torch.int32)
# Tables that have gradients, and that an optimizer can update.
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@cache
def accumulation(dtype: torch.dtype) -> torch.dtype:
    """What sums over rows of a table, and an optimizer's state, are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def traced_accumulation(dtype: torch.dtype) -> torch.dtype:
    """`accumulation` of one of FLOATS, where graphs are traced.

    torch.compile warns of the cache, and torch.promote_types is an operator to an exporter.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
