"""Launches of the kernels of bags."""

from torch import Tensor

from ...bags import Bags
from ...bounds import BoundsRecord, record_arguments
from ...shard import NO_SHARD, Shard
from .._plan.access import vector_width
from .._plan.bag import NO_PARTS, BagParts, BagPlan
from .device import FLOATS, CupyDevice, cpp_bool
from .launch import BAG_JOIN, BAG_SAMPLE_WEIGHTS, MAX_SEGMENT_VECTOR
from .nvrtc import Kernel


class CupyBag(CupyDevice, BagPlan):
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
        vec = bag_vector(weight)
        launch = self._launches[weight.device].bag_sum
        is_shard = cpp_bool(shard is not None)
        arguments = f"{FLOATS[weight.dtype]}, {vec}, {cpp_bool(mean)}, {launch.UNROLL}, {is_shard}"
        num_chunks = 0 if parts is None else len(parts.cut_bags)
        self._launch(
            Kernel("bag", f"bag_sum_kernel<{arguments}>"),
            *launch.grid((bags.num_bags + num_chunks) * (embedding_dim // vec)),
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
            weight.shape[0],
            *(shard or NO_SHARD),
            padding_idx,
            weight.stride(0) // vec,
            weight.stride(1),
            embedding_dim,
            bags.indices.element_size(),
            offset_bytes(bags),
        )

    def _bag_join(self, parts: BagParts, bags: Bags, output: Tensor) -> None:
        embedding_dim = output.shape[1]
        self._launch(
            Kernel("bag", f"bag_join_kernel<{FLOATS[output.dtype]}>"),
            *BAG_JOIN.grid(len(parts.cut_bags) * embedding_dim),
            output.device,
            *parts[1:],
            bags.offsets,
            output,
            *bags.counts(),
            parts.chunk_length,
            len(parts.cut_bags),
            embedding_dim,
            offset_bytes(bags),
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
        vec = bag_vector(weight)
        launch = self._launches[weight.device].bag_max
        is_shard = cpp_bool(shard is not None)
        arguments = f"{FLOATS[weight.dtype]}, {vec}, {launch.UNROLL}, {is_shard}"
        self._launch(
            Kernel("bag", f"bag_max_kernel<{arguments}>"),
            *launch.grid(bags.num_bags * (embedding_dim // vec)),
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
            embedding_dim,
            bags.indices.element_size(),
            offset_bytes(bags),
        )

    def _bag_of(self, bags: Bags, bag_of: Tensor, sizes: Tensor | None, padding_idx: int) -> None:
        self._launch(
            Kernel("bag", "bag_of_kernel"),
            *self._launches[bag_of.device].bag_of.grid(bag_of.numel()),
            bag_of.device,
            bags.indices,
            bags.offsets,
            bag_of,
            sizes,
            *bags.counts(),
            padding_idx,
            bags.indices.element_size(),
            offset_bytes(bags),
            bag_of.element_size(),
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
        first_row, _ = shard or NO_SHARD
        vec = min(bag_vector(grad_output), bag_vector(weight))
        self._launch(
            Kernel("bag", f"bag_sample_weights_kernel<{FLOATS[weight.dtype]}, {vec}>"),
            *BAG_SAMPLE_WEIGHTS.grid(ids.numel()),
            ids.device,
            grad_output,
            weight,
            ids,
            bag_of,
            grad,
            ids.numel(),
            num_embeddings,
            first_row,
            padding_idx,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            weight.stride(0) // vec,
            weight.stride(1),
            embedding_dim,
            ids.element_size(),
            bag_of.element_size(),
        )


def offset_bytes(bags: Bags) -> int:
    return 0 if bags.offsets is None else bags.offsets.element_size()


def bag_vector(matrix: Tensor) -> int:
    return min(vector_width(matrix), MAX_SEGMENT_VECTOR)
