"""Launches of the kernels of a dense gradient, and of counts."""

import torch
from torch import Tensor

from ...shard import NO_SHARD, Shard
from .._plan.access import vector_width
from .._plan.carries import Carries, Runs
from .._plan.gradient import NO_BAGS, GradientPlan, OutputBags
from .device import FLOATS, CupyDevice, cpp_bool
from .launch import MAX_SEGMENT_VECTOR
from .nvrtc import Kernel

# One atomic instruction adds two or four neighbouring floats from here on.
VECTOR_ATOMICS_CAPABILITY = (9, 0)


class CupyGradient(CupyDevice, GradientPlan):
    """Gradients: atomics, or sums of sorted segments."""

    def _scatter_add(
        self,
        grad_output: Tensor,
        ids: Tensor,
        bags: OutputBags | None,
        grad_weight: Tensor,
        padding_idx: int,
        in_place: bool,
        shard: Shard | None = None,
    ) -> None:
        num_embeddings, embedding_dim = grad_weight.shape
        first_row, _ = shard or NO_SHARD
        launch = self._launches[ids.device].scatter_add
        vec = 1
        # Without vector atomics VEC > 1 puts adjacent threads VEC elements apart: uncoalesced.
        if (
            grad_weight.dtype == torch.float32
            and self._capability(ids.device) >= VECTOR_ATOMICS_CAPABILITY
        ):
            vec = vector_width(grad_output)
            if in_place:
                vec = min(vec, vector_width(grad_weight))
        arguments = (
            f"{FLOATS[grad_output.dtype]}, {FLOATS[grad_weight.dtype]}, {vec}, "
            f"{launch.UNROLL}, {cpp_bool(bags is not None)}, {cpp_bool(in_place)}"
        )
        self._launch(
            Kernel("scatter_add", f"scatter_add_kernel<{arguments}>"),
            *launch.grid(ids.numel() * (embedding_dim // vec)),
            ids.device,
            grad_output,
            ids,
            *(bags or NO_BAGS),
            grad_weight,
            ids.numel(),
            num_embeddings,
            first_row,
            padding_idx,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            grad_weight.stride(0) // vec,
            grad_weight.stride(1),
            embedding_dim,
            ids.element_size(),
            bag_bytes(bags),
        )

    def _segment_sum(
        self,
        runs: Runs,
        bags: OutputBags | None,
        grad_weight: Tensor,
        carries: Carries,
        scale_grad_by_freq: bool,
        join: bool,
        in_place: bool,
    ) -> None:
        values, order, keys = runs
        num_embeddings, embedding_dim = grad_weight.shape
        launch = self._launches[keys.device].segment_sum
        atomic_carry = carries.partial is None
        # scale_grad_by_freq is rare: not worth a kernel for each width.
        vec = 1 if scale_grad_by_freq else min(vector_width(values), MAX_SEGMENT_VECTOR)
        if in_place:
            # A row is read and written in one access too.
            vec = min(vec, vector_width(grad_weight))
        flags = (atomic_carry, bags is not None, in_place)
        arguments = (
            f"{FLOATS[values.dtype]}, {FLOATS[grad_weight.dtype]}, {vec}, "
            f"{cpp_bool(scale_grad_by_freq)}, {launch.UNROLL}, {', '.join(map(cpp_bool, flags))}"
        )
        self._launch(
            Kernel("segment_sum", f"segment_sum_kernel<{arguments}>"),
            *launch.grid(carries.num_chunks * (embedding_dim // vec)),
            keys.device,
            *runs,
            *(bags or NO_BAGS),
            grad_weight,
            carries.partial,
            keys.numel(),
            num_embeddings,
            carries.chunk_size,
            values.stride(0) // vec,
            values.stride(1),
            grad_weight.stride(0) // vec,
            grad_weight.stride(1),
            embedding_dim,
            int(join),
            order.element_size(),
            keys.element_size(),
            bag_bytes(bags),
        )

    def _counts(self, ids: Tensor, counts: Tensor, shard: Shard | None) -> None:
        first_row, _ = shard or NO_SHARD
        self._launch(
            Kernel("counts", "counts_kernel"),
            *self._launches[ids.device].counts.grid(ids.numel()),
            ids.device,
            ids,
            counts,
            ids.numel(),
            counts.numel(),
            first_row,
            ids.element_size(),
        )


def bag_bytes(bags: OutputBags | None) -> int:
    return bags.bag_of.element_size() if bags else 0
