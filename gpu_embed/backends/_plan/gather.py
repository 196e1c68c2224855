"""The lookup: rows of a table by id. Which kernel copies them, and what it is called with.

Left alone, each backend chooses by the width of the rows: whole rows, or a flat range of words.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from torch import Tensor

from ...bounds import BoundsRecord
from ...settings import GATHER_METHOD, Restore
from ...shard import Shard
from ..protocol import PreparedEmbedding

# gather(ids, num_indices, output, zero_idx, record) from one table; ids are contiguous, of any shape.
Gather = Callable[[Tensor, int, Tensor, int, BoundsRecord | None], None]


class GatherPlan(ABC):
    """`embedding` of a `Backend`."""

    def embedding(
        self,
        weight: Tensor,
        indices: Tensor,
        zero_idx: int,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> Tensor:
        return self.prepare_embedding(weight, shard)(weight, indices, zero_idx, record)

    def prepare_embedding(self, weight: Tensor, shard: Shard | None = None) -> PreparedEmbedding:
        if weight.element_size() == 16 and weight.stride(1) != 1:
            return partial(self._embedding_of_copy, shard)
        embedding_dim = weight.shape[1]
        gather = self._prepare_gather(weight, shard)

        def embedding(
            weight: Tensor, indices: Tensor, zero_idx: int, record: BoundsRecord | None
        ) -> Tensor:
            output = weight.new_empty(*indices.shape, embedding_dim)
            num_indices = indices.numel()
            if num_indices:
                gather(indices.contiguous(), num_indices, output, zero_idx, record)
            return output

        return embedding

    def _embedding_of_copy(
        self,
        shard: Shard | None,
        weight: Tensor,
        indices: Tensor,
        zero_idx: int,
        record: BoundsRecord | None,
    ) -> Tensor:
        """For complex128 with column stride != 1: words have at most 8 bytes, so an item's two must be adjacent."""
        return self.embedding(weight.contiguous(), indices, zero_idx, record, shard)

    @abstractmethod
    def _prepare_gather(self, weight: Tensor, shard: Shard | None) -> Gather: ...


def use_gather_method(name: str) -> Restore:
    """Force how rows are looked up, for tests and benchmarks; "auto" gives the choice back.

    "rows" gives each program whole rows, "flat" an equal piece of the output. The backends triton and cupy have
    both; the others have no choice and ignore it.

    A plain call or a context manager. Raises ValueError for another name.
    """
    return GATHER_METHOD.set(name, "use_gather_method")
