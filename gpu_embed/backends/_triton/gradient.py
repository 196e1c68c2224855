"""Launches of the kernels of a dense gradient, and of counts."""

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from ...dtypes import accumulation
from ...shard import NO_SHARD, Shard
from .._plan.access import VECTOR_BYTES, cdiv, vector_width
from .._plan.carries import Carries, Runs
from .._plan.gradient import NO_BAGS, GradientPlan, OutputBags
from .._plan.gradient_method import choose
from .device import TritonDevice
from .known_launch import ALIGNMENT_MASK, prepare_launch
from .launch import carry_vector, chunk_launch, segment_launch


class TritonGradient(TritonDevice, GradientPlan):
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
        vec = vector_width(grad_output)
        if in_place:
            vec = min(vec, vector_width(grad_weight))
        launch = chunk_launch(self._launches[ids.device].scatter_add, embedding_dim // vec)
        num_vectors = ids.numel() * embedding_dim // vec
        # None: D / VEC, which the compiler knows.
        row_strides = [
            None if matrix.stride(0) == embedding_dim else matrix.stride(0) // vec
            for matrix in (grad_output, grad_weight)
        ]
        self._launch(
            self._kernels.scatter_add,
            (cdiv(num_vectors, launch.BLOCK),),
            ids.device,
            grad_output,
            ids,
            *(bags or NO_BAGS),
            grad_weight,
            ids.numel(),
            num_embeddings,
            (shard or NO_SHARD)[0],
            padding_idx,
            row_strides[0],
            grad_output.stride(1),
            row_strides[1],
            grad_weight.stride(1),
            D=embedding_dim,
            VEC=vec,
            **launch.settings,
        )

    def prepare_embedding_dense_backward(
        self, weight: Tensor, padding_idx: int
    ) -> Callable[[Tensor, Tensor], Tensor | None]:
        """`embedding_dense_backward` in one table of contiguous rows and ids, where atomics add them up; else None."""
        (num_embeddings, embedding_dim), dtype, device = weight.shape, weight.dtype, weight.device
        vec = gcd(VECTOR_BYTES, embedding_dim * weight.element_size()) // weight.element_size()
        row_vectors = embedding_dim // vec
        chunks = chunk_launch(self._launches[device].scatter_add, row_vectors)
        launch = prepare_launch(
            self._launch,
            self._kernels.scatter_add,
            lambda num_indices: (cdiv(num_indices * row_vectors, chunks.BLOCK),),
            device,
            {"D": embedding_dim, "VEC": vec, **chunks.settings},
        )
        limits = self._methods[device].gradient

        def backward(grad_output: Tensor, ids: Tensor) -> Tensor | None:
            num_indices = ids.numel()
            deterministic = torch.are_deterministic_algorithms_enabled()
            if (
                not (num_indices and grad_output.is_contiguous() and ids.is_contiguous())
                or grad_output.dtype is not dtype
                or grad_output.data_ptr() & ALIGNMENT_MASK
                or choose(num_indices, num_embeddings, dtype, deterministic, False, limits)
                != "atomic"
            ):
                return None
            grad_weight = grad_output.new_zeros((num_embeddings, embedding_dim))
            launch(
                (
                    ids.dtype,
                    ids.data_ptr() & ALIGNMENT_MASK,
                    grad_weight.data_ptr() & ALIGNMENT_MASK,
                ),
                num_indices,
                (
                    *(grad_output, ids, *NO_BAGS, grad_weight),
                    *(num_indices, num_embeddings, None, padding_idx),
                    # Of adjacent rows, and of adjacent columns.
                    *(None, 1, None, 1),
                ),
            )
            return grad_weight

        return backward

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
        values, _, keys = runs
        num_embeddings, embedding_dim = grad_weight.shape
        vec = vector_width(values)
        strides: tuple[int | None, ...] = (None, None)
        if in_place:
            # A row is to be read in one access too.
            vec = min(vec, vector_width(grad_weight))
            strides = (grad_weight.stride(0) // vec, grad_weight.stride(1))
        acc_bytes = accumulation(grad_weight.dtype).itemsize
        walk = self._launches[keys.device].segment_sum
        launch = segment_launch(walk, embedding_dim, carry_vector(vec, acc_bytes) if join else vec)
        self._launch(
            self._kernels.segment_sum,
            (cdiv(carries.num_chunks, launch.BLOCK_C), cdiv(embedding_dim, launch.BLOCK_D)),
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
            *strides,
            D=embedding_dim,
            VEC=vec,
            SCALE_GRAD_BY_FREQ=scale_grad_by_freq,
            JOIN=join,
            IN_PLACE=in_place,
            **launch.settings,
        )

    def _counts(self, ids: Tensor, counts: Tensor, shard: Shard | None) -> None:
        launch = self._launches[ids.device].counts
        self._launch(
            self._kernels.counts,
            (cdiv(ids.numel(), launch.BLOCK),),
            ids.device,
            ids,
            counts,
            ids.numel(),
            counts.numel(),
            (shard or NO_SHARD)[0],
            **launch.settings,
        )
