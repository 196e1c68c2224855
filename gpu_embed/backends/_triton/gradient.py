"""Launches of the kernels of a dense gradient, and of renorm and counts."""

from functools import cached_property

import torch
from torch import Tensor

from .._plan.access import vector_width
from .._plan.gradient import (
    NO_SOURCES,
    BagSources,
    Gradient,
    SortDigit,
    SortSource,
    cdiv,
    norm_name,
)
from .descriptor import MAX_COORDINATE, DescriptorRules, too_many
from .launch import (
    COUNTS,
    DIGIT_COUNTS,
    DIGIT_SCATTER,
    MAX_SPLITS,
    RENORM_ITEMS,
    SCATTER_ADD,
    SORT_KEYS,
    SORT_TILES,
    SUM_SPLITS,
    next_power_of_2,
    one_hot_launch,
    one_hot_split,
    scatter_descriptor_launch,
    segment_launch,
)


class TritonGradient(DescriptorRules):
    """Gradients: atomics, sorted segments, one-hot products, bulk reductions."""

    sort_tiles = SORT_TILES

    def _scatter_add(
        self,
        grad_output: Tensor,
        ids: Tensor,
        sources: BagSources | None,
        grad_weight: Tensor,
        padding_idx: int,
    ) -> None:
        num_embeddings, embedding_dim = grad_weight.shape
        vec = vector_width(grad_output)
        num_vectors = ids.numel() * embedding_dim // vec
        self._launch(
            self._kernels.scatter_add,
            (cdiv(num_vectors, SCATTER_ADD.BLOCK),),
            ids.device,
            grad_output,
            ids,
            *(sources or NO_SOURCES),
            grad_weight,
            ids.numel(),
            num_embeddings,
            padding_idx,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            D=embedding_dim,
            VEC=vec,
            **SCATTER_ADD.settings,
        )

    def _scatter_add_descriptor(
        self, grad_output: Tensor, ids: Tensor, grad_weight: Tensor, padding_idx: int
    ) -> None:
        num_embeddings, embedding_dim = grad_weight.shape
        vec = vector_width(grad_output)
        launch = scatter_descriptor_launch(embedding_dim)
        self._launch(
            self._kernels.scatter_add_descriptor,
            (cdiv(ids.numel(), launch.ROWS), cdiv(embedding_dim, launch.BLOCK_D)),
            ids.device,
            grad_output,
            ids,
            self._tensor_descriptor(
                grad_weight,
                [num_embeddings, embedding_dim],
                [embedding_dim, 1],
                [1, launch.BLOCK_D],
            ),
            ids.numel(),
            num_embeddings,
            padding_idx,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            D=embedding_dim,
            VEC=vec,
            **launch.settings,
        )

    def _one_hot(
        self, grad_output: Tensor, ids: Tensor, grad_weight: Tensor, padding_idx: int
    ) -> None:
        num_embeddings, embedding_dim = grad_weight.shape
        vec = vector_width(grad_output)
        launch = one_hot_launch(num_embeddings, embedding_dim)
        split_size = one_hot_split(ids.numel(), num_embeddings, embedding_dim, launch.BLOCK_N)
        num_splits = cdiv(ids.numel(), split_size)
        partial = grad_output.new_empty(
            (num_splits, num_embeddings, embedding_dim), dtype=torch.float32
        )
        self._launch(
            self._kernels.one_hot,
            (num_splits, cdiv(embedding_dim, launch.BLOCK_D)),
            ids.device,
            grad_output,
            ids,
            partial,
            ids.numel(),
            num_embeddings,
            padding_idx,
            split_size,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            D=embedding_dim,
            VEC=vec,
            **launch.settings,
        )
        self._launch(
            self._kernels.sum_splits,
            (cdiv(grad_weight.numel(), SUM_SPLITS.BLOCK),),
            ids.device,
            partial,
            grad_weight,
            num_splits,
            grad_weight.numel(),
            SPLITS=MAX_SPLITS,
            **SUM_SPLITS.settings,
        )

    def _sort_keys(
        self,
        ids: Tensor,
        order: Tensor | None,
        keys: Tensor,
        num_embeddings: int,
        padding_idx: int,
    ) -> None:
        self._launch(
            self._kernels.sort_keys,
            (cdiv(ids.numel(), SORT_KEYS.BLOCK),),
            ids.device,
            ids,
            order,
            keys,
            ids.numel(),
            num_embeddings,
            padding_idx,
            **SORT_KEYS.settings,
        )

    def _digit_counts(self, source: SortSource, counters: Tensor, digit: SortDigit) -> None:
        self._launch(
            self._kernels.digit_counts,
            (digit.num_tiles,),
            counters.device,
            *source,
            counters,
            *digit,
            **DIGIT_COUNTS.settings,
        )

    def _digit_scatter(
        self,
        source: SortSource,
        counters: Tensor,
        sorted_order: Tensor,
        sorted_keys: Tensor | None,
        digit: SortDigit,
    ) -> None:
        self._launch(
            self._kernels.digit_scatter,
            (digit.num_tiles,),
            counters.device,
            *source,
            counters,
            sorted_order,
            sorted_keys,
            *digit,
            **DIGIT_SCATTER.settings,
        )

    def _segment_sum(
        self,
        values: Tensor,
        order: Tensor | None,
        keys: Tensor,
        counts: Tensor | None,
        sources: BagSources | None,
        grad_weight: Tensor,
        partial_values: Tensor | None,
        partial_keys: Tensor | None,
        partial_counts: Tensor | None,
        scale_grad_by_freq: bool,
        chunk: int,
    ) -> None:
        num_embeddings, embedding_dim = grad_weight.shape
        vec = vector_width(values)
        launch = segment_launch(embedding_dim, vec)
        num_chunks = cdiv(keys.numel(), chunk)
        self._launch(
            self._kernels.segment_sum,
            (cdiv(num_chunks, launch.BLOCK_C), cdiv(embedding_dim, launch.BLOCK_D)),
            keys.device,
            values,
            order,
            keys,
            counts,
            *(sources or NO_SOURCES),
            grad_weight,
            partial_values,
            partial_keys,
            partial_counts,
            keys.numel(),
            num_embeddings,
            values.stride(0) // vec,
            values.stride(1),
            D=embedding_dim,
            VEC=vec,
            SCALE_GRAD_BY_FREQ=scale_grad_by_freq,
            CHUNK=chunk,
            **launch.settings,
        )

    def _renorm(self, weight: Tensor, keys: Tensor, max_norm: float, norm_type: float) -> None:
        num_embeddings, embedding_dim = weight.shape
        block_d = min(next_power_of_2(embedding_dim), RENORM_ITEMS)
        block_n = RENORM_ITEMS // block_d
        self._launch(
            self._kernels.renorm,
            (cdiv(keys.numel(), block_n),),
            weight.device,
            weight,
            keys,
            keys.numel(),
            num_embeddings,
            *weight.stride(),
            max_norm,
            # Only the general formula reads it.
            norm_type=norm_type if norm_name(norm_type) == "p" else 0.0,
            D=embedding_dim,
            NORM=norm_name(norm_type),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )

    def _counts(self, ids: Tensor, counts: Tensor) -> None:
        self._launch(
            self._kernels.counts,
            (cdiv(ids.numel(), COUNTS.BLOCK),),
            ids.device,
            ids,
            counts,
            ids.numel(),
            counts.numel(),
            **COUNTS.settings,
        )

    @cached_property
    def _gradients(self) -> dict[str, Gradient]:
        return {
            "descriptor": self._scatter_add_descriptor,
            "one_hot": self._one_hot,
        }

    def _gradient_refusal(self, method: str, num_indices: int, grad_weight: Tensor) -> str | None:
        if method != "descriptor":
            return None
        if num_indices > MAX_COORDINATE:
            return too_many(num_indices, "ids")
        return self._descriptor_refusal(grad_weight)
