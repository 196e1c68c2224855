"""Bags: sums, means and maxima of rows, and their gradients."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ...bags import Bags
from ...bounds import BoundsRecord
from ...dtypes import accumulation
from ...shard import Shard
from .access import cdiv
from .gradient import GradientPlan, OutputBags

# Bags up to this length are never cut: to join the parts takes a second launch. Nor is any where there are no more ids
# for each bag: the launch would take longer than most batches of short bags have a long one to cut.
MAX_WHOLE_BAG = 512
MAX_WHOLE_MEAN = 32
# Chunk length in ids: about BAG_CHUNKS chunks, clamped to [MIN_BAG_CHUNK, MAX_BAG_CHUNK].
MIN_BAG_CHUNK = 64
MAX_BAG_CHUNK = 1024
BAG_CHUNKS = 4096


class BagParts(NamedTuple):
    """Partial sums of bags that were cut into chunks, two a chunk, in the order of kernels/bag.py."""

    chunk_length: int
    values: Tensor  # [2 * num_chunks, D]
    sizes: Tensor | None  # int64 [2 * num_chunks]: for a mean, how many ids count
    cut_bags: (
        Tensor  # int64 [num_chunks]: the cut bag whose head lies in the chunk before, -1: none
    )


# No bag is cut.
NO_PARTS = (None, None, None)


class BagPlan(GradientPlan):
    """`Backend`'s `embedding_bag*` methods."""

    def embedding_bag(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        padding_idx: int,
        mode: str,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> Tensor:
        embedding_dim = weight.shape[1]
        output = weight.new_empty((bags.num_bags, embedding_dim))
        mean = mode == "mean"
        parts = None
        chunk_length = bag_chunk_length(bags)
        if chunk_length:
            num_chunks = cdiv(bags.indices.numel(), chunk_length)
            acc_dtype = accumulation(weight.dtype)
            parts = BagParts(
                chunk_length,
                output.new_empty((2 * num_chunks, embedding_dim), dtype=acc_dtype),
                output.new_empty(2 * num_chunks, dtype=torch.int64) if mean else None,
                output.new_empty(num_chunks, dtype=torch.int64),
            )
        self._bag_sum(
            weight, per_sample_weights, bags, output, parts, padding_idx, mean, record, shard
        )
        if parts is not None:
            self._bag_join(parts, bags, output)
        return output

    def embedding_bag_max(
        self,
        weight: Tensor,
        bags: Bags,
        padding_idx: int,
        with_argmax: bool,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> tuple[Tensor, Tensor]:
        output = weight.new_empty((bags.num_bags, weight.shape[1]))
        argmax = output.new_empty(output.shape if with_argmax else (0,), dtype=torch.int64)
        self._bag_max(
            weight, bags, output, argmax if with_argmax else None, padding_idx, record, shard
        )
        return output, argmax

    def embedding_bag_dense_backward(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        num_embeddings: int,
        padding_idx: int,
        mode: str,
        scale_grad_by_freq: bool,
        into: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        def make_output_bags() -> OutputBags:
            sizes = None
            if mode == "mean":
                sizes = bags.indices.new_zeros(bags.num_bags, dtype=torch.int32)
            bag_of = self._bag_of_positions(bags, sizes, padding_idx)
            return OutputBags(bag_of, per_sample_weights, sizes)

        return self._dense_backward(
            grad_output,
            [],
            bags.indices,
            make_output_bags,
            num_embeddings,
            padding_idx,
            scale_grad_by_freq,
            into,
            shard,
        )

    def embedding_bag_sample_weights_backward(
        self,
        grad_output: Tensor,
        weight: Tensor,
        bags: Bags,
        padding_idx: int,
        shard: Shard | None = None,
    ) -> Tensor:
        bag_of = self._bag_of_positions(bags, None, padding_idx)
        grad = grad_output.new_empty(bags.indices.numel())
        self._bag_sample_weights(
            grad_output, weight, bags.indices, bag_of, grad, padding_idx, shard
        )
        return grad

    def _bag_of_positions(self, bags: Bags, sizes: Tensor | None, padding_idx: int) -> Tensor:
        """The bag of each position -> [N], -1: none; counts ids other than padding into sizes, zero on entry."""
        dtype = torch.int32 if bags.num_bags < 2**31 else torch.int64
        bag_of = bags.indices.new_empty(bags.indices.numel(), dtype=dtype)
        self._bag_of(bags, bag_of, sizes, padding_idx)
        return bag_of

    @abstractmethod
    def _bag_sum(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        output: Tensor,
        parts: BagParts | None,
        padding_idx: int,
        mean: bool,
        record: BoundsRecord | None,
        shard: Shard | None,
    ) -> None: ...

    @abstractmethod
    def _bag_join(self, parts: BagParts, bags: Bags, output: Tensor) -> None: ...

    @abstractmethod
    def _bag_max(
        self,
        weight: Tensor,
        bags: Bags,
        output: Tensor,
        argmax: Tensor | None,
        padding_idx: int,
        record: BoundsRecord | None,
        shard: Shard | None,
    ) -> None:
        """`argmax` gets elements, or with a shard positions: see `Backend`."""

    @abstractmethod
    def _bag_of(
        self, bags: Bags, bag_of: Tensor, sizes: Tensor | None, padding_idx: int
    ) -> None: ...

    @abstractmethod
    def _bag_sample_weights(
        self,
        grad_output: Tensor,
        weight: Tensor,
        ids: Tensor,
        bag_of: Tensor,
        grad: Tensor,
        padding_idx: int,
        shard: Shard | None,
    ) -> None: ...


def bag_chunk_length(bags: Bags) -> int:
    """Chunk length, a power of two; 0: none is cut.

    Shapes alone decide, so that nothing waits for the offsets. With offsets any bag may hold all ids.
    """
    num_indices = bags.indices.numel()
    longest = num_indices if bags.offsets is not None else bags.bag_length
    if longest <= MAX_WHOLE_BAG or num_indices <= MAX_WHOLE_MEAN * bags.num_bags:
        return 0
    # As many chunks as keep a card busy. One bag of all ids has as many parts, which one program joins.
    length = 1 << (num_indices // BAG_CHUNKS).bit_length()
    return min(max(length, MIN_BAG_CHUNK), MAX_BAG_CHUNK)
