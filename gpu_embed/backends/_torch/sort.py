"""The order of rows that ids name."""

import torch
from torch import Tensor

from .._plan.access import sort_key_dtype

# From so many on torch's CPU sort of integers is a radix sort; below it compares, which takes nine times as long.
RADIX_SORT_FROM = 2**15
POSITION_BITS = 15


def sort_ids(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Bring equal ids together, in the order of the input.

    Args:
        ids: integers [N], each the number of a row.
        num_rows: of the table.

    Returns:
        A key for each id [N], which tells apart the rows, and its position [N], int64.
    """
    if ids.is_cpu and len(ids) < RADIX_SORT_FROM:
        # NumPy sorts numbers of 64 bits by vector instructions.
        packed = (ids.to(torch.int64) << POSITION_BITS) | torch.arange(len(ids), device="cpu")
        packed.numpy().sort()
        return packed >> POSITION_BITS, packed & (RADIX_SORT_FROM - 1)
    # Which row comes first is all the same, so int16 may wrap around.
    keys, order = torch.sort(ids.to(sort_key_dtype(num_rows)), stable=True)
    return keys, order
