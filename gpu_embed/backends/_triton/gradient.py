"""Launches of the kernels of a dense gradient, and of counts."""

from torch import Tensor

from .._plan.access import cdiv, vector_width
from .._plan.gradient import NO_BAGS, GradientPlan, OutputBags
from .._plan.levels import NO_PARTIAL, Level, Partial
from .device import TritonDevice
from .launch import chunk_launch, segment_launch


class TritonGradient(TritonDevice, GradientPlan):
    """Gradients: atomics, or sums of sorted segments."""

    def _scatter_add(
        self,
        grad_output: Tensor,
        ids: Tensor,
        bags: OutputBags | None,
        grad_weight: Tensor,
        padding_idx: int,
    ) -> None:
        num_embeddings, embedding_dim = grad_weight.shape
        vec = vector_width(grad_output)
        launch = chunk_launch(self._launches[ids.device].scatter_add, embedding_dim // vec)
        num_vectors = ids.numel() * embedding_dim // vec
        adjacent = grad_output.stride(0) == embedding_dim
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
            padding_idx,
            None if adjacent else grad_output.stride(0) // vec,
            grad_output.stride(1),
            D=embedding_dim,
            VEC=vec,
            **launch.settings,
        )

    def _segment_sum(
        self,
        level: Level,
        bags: OutputBags | None,
        grad_weight: Tensor,
        partial: Partial | None,
        scale_grad_by_freq: bool,
        chunk: int,
    ) -> None:
        values, _, keys, _ = level
        num_embeddings, embedding_dim = grad_weight.shape
        vec = vector_width(values)
        launch = segment_launch(self._launches[keys.device].segment_sum, embedding_dim, vec)
        num_chunks = cdiv(keys.numel(), chunk)
        self._launch(
            self._kernels.segment_sum,
            (cdiv(num_chunks, launch.BLOCK_C), cdiv(embedding_dim, launch.BLOCK_D)),
            keys.device,
            *level,
            *(bags or NO_BAGS),
            grad_weight,
            *(partial or NO_PARTIAL),
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

    def _counts(self, ids: Tensor, counts: Tensor) -> None:
        launch = self._launches[ids.device].counts
        self._launch(
            self._kernels.counts,
            (cdiv(ids.numel(), launch.BLOCK),),
            ids.device,
            ids,
            counts,
            ids.numel(),
            counts.numel(),
            **launch.settings,
        )
