"""Launches of the kernels of a dense gradient, and of renorm and counts."""

import torch
from torch import Tensor

from .._plan.access import vector_width
from .._plan.gradient import NO_SOURCES, BagSources, SortDigit, SortSource, cdiv, norm_name
from .device import FLOATS, INTEGERS, CupyDevice, cpp_bool, itemsize
from .launch import (
    COUNTS,
    DIGIT,
    MAX_SEGMENT_VECTOR,
    RENORM,
    SCATTER_ADD,
    SEGMENT_SUM,
    SORT_KEYS,
    SORT_TILES,
)
from .nvrtc import Kernel

# One atomic instruction adds two or four neighbouring floats from here on.
VECTOR_ATOMICS_CAPABILITY = (9, 0)
# In the order of the enum in renorm.cu.
NORMS = ("inf", "-inf", "0", "1", "2", "p")


class CupyGradient(CupyDevice):
    """Gradients: atomics, or sorted segments."""

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
        vec = 1
        # Without vector atomics, lanes that lie VEC apart would make more memory transactions of one add.
        if (
            grad_output.dtype == torch.float32
            and self._capability(ids.device) >= VECTOR_ATOMICS_CAPABILITY
        ):
            vec = vector_width(grad_output)
        arguments = f"{FLOATS[grad_output.dtype]}, {vec}, {SCATTER_ADD.UNROLL}{with_bags(sources)}"
        self._launch(
            Kernel("scatter_add", f"scatter_add_kernel<{arguments}>"),
            *SCATTER_ADD.grid(ids.numel() * (embedding_dim // vec)),
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
            embedding_dim,
            ids.element_size(),
            bag_bytes(sources),
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
            Kernel("radix_sort", "sort_keys_kernel"),
            *SORT_KEYS.grid(ids.numel()),
            ids.device,
            ids,
            order,
            keys,
            ids.numel(),
            num_embeddings,
            padding_idx,
            ids.element_size(),
            itemsize(order),
            keys.element_size(),
        )

    def _digit_counts(self, source: SortSource, counters: Tensor, digit: SortDigit) -> None:
        self._launch(
            self._digit_kernel("digit_counts_kernel", source, counters, source.keys),
            *DIGIT.grid(digit.num_tiles),
            counters.device,
            *source,
            counters,
            *digit,
            itemsize(source.ids),
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
            self._digit_kernel("digit_scatter_kernel", source, counters, sorted_keys),
            *DIGIT.grid(digit.num_tiles),
            counters.device,
            *source,
            counters,
            sorted_order,
            sorted_keys,
            *digit,
            itemsize(source.ids),
        )

    def _digit_kernel(
        self, name: str, source: SortSource, counters: Tensor, keys: Tensor | None
    ) -> Kernel:
        """A kernel of the radix sort for keys of that dtype; None: for keys that are only looked at."""
        key = INTEGERS[torch.int64 if keys is None else keys.dtype]
        from_ids = str(source.keys is None).lower()
        arguments = (
            f"{key}, {INTEGERS[counters.dtype]}, {from_ids}, {SORT_TILES.STEP}, {DIGIT.UNROLL}"
        )
        return Kernel("radix_sort", f"{name}<{arguments}>")

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
        atomic_ends = partial_values is None
        # scale_grad_by_freq is rare: not worth a kernel for each width.
        vec = 1 if scale_grad_by_freq else min(vector_width(values), MAX_SEGMENT_VECTOR)
        arguments = (
            f"{FLOATS[values.dtype]}, {FLOATS[grad_weight.dtype]}, {vec}, "
            f"{cpp_bool(scale_grad_by_freq)}, {SEGMENT_SUM.UNROLL}, {cpp_bool(atomic_ends)}{with_bags(sources)}"
        )
        num_chunks = cdiv(keys.numel(), chunk)
        self._launch(
            Kernel("segment_sum", f"segment_sum_kernel<{arguments}>"),
            *SEGMENT_SUM.grid(num_chunks * (embedding_dim // vec)),
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
            embedding_dim,
            chunk,
            itemsize(order),
            keys.element_size(),
            bag_bytes(sources),
        )

    def _renorm(self, weight: Tensor, keys: Tensor, max_norm: float, norm_type: float) -> None:
        num_embeddings, embedding_dim = weight.shape
        self._launch(
            Kernel("renorm", f"renorm_kernel<{FLOATS[weight.dtype]}>"),
            *RENORM.grid(keys.numel()),
            weight.device,
            weight,
            keys,
            keys.numel(),
            num_embeddings,
            weight.stride(0),
            weight.stride(1),
            max_norm,
            norm_type,
            embedding_dim,
            NORMS.index(norm_name(norm_type)),
            keys.element_size(),
        )

    def _counts(self, ids: Tensor, counts: Tensor) -> None:
        self._launch(
            Kernel("counts", "counts_kernel"),
            *COUNTS.grid(ids.numel()),
            ids.device,
            ids,
            counts,
            ids.numel(),
            counts.numel(),
            ids.element_size(),
        )


def with_bags(sources: BagSources | None) -> str:
    """The template argument that makes a gradient kernel look up bags."""
    return ", true" if sources else ""


def bag_bytes(sources: BagSources | None) -> int:
    return sources.bag_of.element_size() if sources else 0
