"""Which rows of a table a rank holds."""

from typing import NamedTuple

import torch
from torch import Tensor

from .bags import Bags


class Shard(NamedTuple):
    """The rows from `first_row` on of a table of `num_embeddings` rows; how many, the tensor that holds them says.

    Ids, and a padding_idx, are of the whole table. Those of other rows are no error: they read as zeros and
    contribute nothing. Those outside of the whole table are out of range.
    """

    first_row: int
    num_embeddings: int

    def local(self, ids: Tensor, num_rows: int, padding_idx: int = -1) -> Tensor:
        """The row of each id in this shard of `num_rows` rows, int64, with torch's operators.

        -1: a row of another shard; num_rows: padding; num_rows + 1: out of range.
        """
        ids = ids.to(torch.int64)
        rows = ids - self.first_row
        rows = torch.where((rows >= 0) & (rows < num_rows), rows, -1)
        rows = torch.where((ids >= 0) & (ids < self.num_embeddings), rows, num_rows + 1)
        return torch.where(ids == padding_idx, num_rows, rows) if padding_idx >= 0 else rows

    def local_bags(self, bags: Bags, num_rows: int, padding_idx: int) -> Bags:
        """The bags of `local` ids."""
        return bags._replace(indices=self.local(bags.indices, num_rows, padding_idx))


# What kernels are passed of a shard, where there is none.
NO_SHARD = (None, None)


def table_rows(num_rows: int, shard: Shard | None) -> int:
    """Rows of the whole table, of which the tensor in hand has `num_rows`."""
    return num_rows if shard is None else shard.num_embeddings
