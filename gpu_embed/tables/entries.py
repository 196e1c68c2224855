"""Sums over equal rows, as many as there are entries at the most, whatever the table's height."""

import torch
from torch import Tensor


def number_rows(rows: Tensor) -> Tensor:
    """The rows in use numbered anew, from 0 on, in their order -> int64 [N]; nothing waits for the GPU."""
    keys, order = rows.sort(stable=True)
    number = torch.zeros_like(keys, dtype=torch.int64)
    torch.cumsum(keys[1:] != keys[:-1], 0, out=number[1:])
    return torch.empty_like(number).scatter_(0, order, number)


def sums_of_rows(rows: Tensor, values: Tensor) -> Tensor:
    """What the values [N, D] of each entry's row add up to -> [N, D]."""
    number = number_rows(rows)
    return torch.zeros_like(values).index_add_(0, number, values)[number]
