"""Launches of the kernels of bags."""

from torch import Tensor

from ...bags import Bags
from ...bounds import BoundsRecord, record_arguments
from ...shard import NO_SHARD, Shard
from .._plan.access import cdiv, vector_width
from .._plan.bag import NO_PARTS, BagParts, BagPlan
from .device import TritonDevice
from .launch import (
    BAG_JOIN,
    BAG_SAMPLE_WEIGHTS_VECTORS,
    bag_launch,
    join_chunks,
    next_power_of_2,
)


class TritonBag(TritonDevice, BagPlan):
    """Sums, means and maxima of bags."""

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
    ) -> None:
        embedding_dim = weight.shape[1]
        vec = vector_width(weight)
        launch = bag_launch(self._launches[weight.device].bag_sum, embedding_dim, vec)
        num_chunks = 0 if parts is None else len(parts.cut_bags)
        programs = cdiv(bags.num_bags, launch.BLOCK_B) + cdiv(num_chunks, launch.BLOCK_B)
        self._launch(
            self._kernels.bag_sum,
            (programs, cdiv(embedding_dim, launch.BLOCK_D)),
            weight.device,
            weight,
            bags.indices,
            bags.offsets,
            per_sample_weights,
            output,
            *(NO_PARTS if parts is None else parts[1:]),
            *record_arguments(record),
            *bags.counts(),
            0 if parts is None else parts.chunk_length,
            bags.num_bags.bit_length(),
            weight.shape[0],
            *(shard or NO_SHARD),
            padding_idx,
            weight.stride(0) // vec,
            weight.stride(1),
            D=embedding_dim,
            VEC=vec,
            MEAN=mean,
            **launch.settings,
        )

    def _bag_join(self, parts: BagParts, bags: Bags, output: Tensor) -> None:
        embedding_dim = output.shape[1]
        block_c = join_chunks(embedding_dim)
        self._launch(
            self._kernels.bag_join,
            (cdiv(len(parts.cut_bags), block_c), cdiv(embedding_dim, BAG_JOIN.BLOCK)),
            output.device,
            *parts[1:],
            bags.offsets,
            output,
            *bags.counts(),
            parts.chunk_length,
            len(parts.cut_bags),
            D=embedding_dim,
            BLOCK_C=block_c,
            **BAG_JOIN.settings,
        )

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
        embedding_dim = weight.shape[1]
        vec = vector_width(weight)
        launch = bag_launch(self._launches[weight.device].bag_max, embedding_dim, vec)
        self._launch(
            self._kernels.bag_max,
            (cdiv(bags.num_bags, launch.BLOCK_B), cdiv(embedding_dim, launch.BLOCK_D)),
            weight.device,
            weight,
            bags.indices,
            bags.offsets,
            output,
            argmax,
            *record_arguments(record),
            *bags.counts(),
            weight.shape[0],
            *(shard or NO_SHARD),
            padding_idx,
            weight.stride(0) // vec,
            weight.stride(1),
            D=embedding_dim,
            VEC=vec,
            **launch.settings,
        )

    def _bag_of(self, bags: Bags, bag_of: Tensor, sizes: Tensor | None, padding_idx: int) -> None:
        launch = self._launches[bag_of.device].bag_of
        self._launch(
            self._kernels.bag_of,
            (cdiv(bag_of.numel(), launch.BLOCK),),
            bag_of.device,
            bags.indices,
            bags.offsets,
            bag_of,
            sizes,
            *bags.counts(),
            padding_idx,
            bags.num_bags.bit_length(),
            **launch.settings,
        )

    def _bag_sample_weights(
        self,
        grad_output: Tensor,
        weight: Tensor,
        ids: Tensor,
        bag_of: Tensor,
        grad: Tensor,
        padding_idx: int,
        shard: Shard | None,
    ) -> None:
        num_embeddings, embedding_dim = weight.shape
        vec = min(vector_width(grad_output), vector_width(weight))
        block_d = min(next_power_of_2(embedding_dim), 32 * vec)
        block_n = BAG_SAMPLE_WEIGHTS_VECTORS * vec // block_d
        self._launch(
            self._kernels.bag_sample_weights,
            (cdiv(ids.numel(), block_n),),
            ids.device,
            grad_output,
            weight,
            ids,
            bag_of,
            grad,
            ids.numel(),
            num_embeddings,
            (shard or NO_SHARD)[0],
            padding_idx,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            weight.stride(0) // vec,
            weight.stride(1),
            D=embedding_dim,
            VEC=vec,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )
