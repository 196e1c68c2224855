"""What the Triton and the CUDA C++ backend share: everything between the protocol and a single launch."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ..bounds import BoundsRecord
from . import PreparedEmbedding
from .gradient_method import choose
from .layout import flat_ids, sort_key_dtype

# Keys a chunk of the sorted gradient: few, for parallelism.
CHUNK = 32
# Partial sums may take this much memory; longer chunks, and fewer splits, make them fewer.
MAX_PARTIAL_BYTES = 48 * 2**20

# grad_output [N, D], ids [N], grad_weight [V, D] (zero on entry), padding_idx.
Gradient = Callable[[Tensor, Tensor, Tensor, int], None]


# gather(ids, num_indices, output, zero_idx, record) from one table; ids are contiguous, of any shape.
Gather = Callable[[Tensor, int, Tensor, int, BoundsRecord | None], None]


class KernelBackend(ABC):
    """A `Backend` but for its name, `unusable_reason`, and one launch a kernel.

    The launches take ids flat and contiguous, and allocate nothing.
    """

    name: str

    def embedding(
        self, weight: Tensor, indices: Tensor, zero_idx: int, record: BoundsRecord | None
    ) -> Tensor:
        return self.prepare_embedding(weight)(weight, indices, zero_idx, record)

    def prepare_embedding(self, weight: Tensor) -> PreparedEmbedding:
        if weight.element_size() == 16 and weight.stride(1) != 1:
            return self._embedding_of_copy
        embedding_dim = weight.shape[1]
        gather = self._prepare_gather(weight)

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
        self, weight: Tensor, indices: Tensor, zero_idx: int, record: BoundsRecord | None
    ) -> Tensor:
        """For items of 16 bytes whose columns are apart: no word holds one, so its two must be adjacent."""
        return self.embedding(weight.contiguous(), indices, zero_idx, record)

    def embedding_dense_backward(
        self,
        grad_output: Tensor,
        indices: Tensor,
        num_embeddings: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        ids = flat_ids(indices)
        embedding_dim = grad_output.shape[-1]
        grad_output = grad_output.reshape(ids.numel(), embedding_dim)
        grad_weight = grad_output.new_zeros((num_embeddings, embedding_dim))
        method = choose(
            ids.numel(),
            num_embeddings,
            embedding_dim,
            grad_output.dtype,
            torch.are_deterministic_algorithms_enabled(),
            scale_grad_by_freq,
            lambda method: self._gradient_refusal(method, ids, grad_weight),
        )
        if method == "sorted":
            keys, order = self._sorted_keys(ids, num_embeddings, padding_idx)
            self._sum_runs(grad_output, order, keys, grad_weight, scale_grad_by_freq)
        else:
            self._gradients[method](grad_output, ids, grad_weight, padding_idx)
        return grad_weight

    def embedding_renorm_(
        self, weight: Tensor, indices: Tensor, max_norm: float, norm_type: float
    ) -> None:
        keys, _ = self._sorted_keys(flat_ids(indices), weight.shape[0], padding_idx=-1)
        self._renorm(weight, keys, float(max_norm), float(norm_type))

    def embedding_counts(self, indices: Tensor, num_embeddings: int) -> Tensor:
        counts = torch.zeros(num_embeddings, dtype=torch.int32, device=indices.device)
        self._counts(flat_ids(indices), counts)
        return counts

    @cached_property
    def _gradients(self) -> dict[str, Gradient]:
        """The backend's gradient methods by name, but for "sorted", which alone divides by counts."""
        return {"atomic": self._scatter_add, "sorted_atomic": self._sum_runs_once}

    def _gradient_refusal(self, method: str, ids: Tensor, grad_weight: Tensor) -> str | None:
        """What of a call this backend cannot serve with a gradient method; None: nothing."""
        if method == "sorted" or method in self._gradients:
            return None
        return no_kernel(self.name)

    def _sorted_keys(
        self, ids: Tensor, num_embeddings: int, padding_idx: int
    ) -> tuple[Tensor, Tensor]:
        """The ids [N] in ascending order, and the position that each came from.

        Ids out of range and padding become num_embeddings, so they come last.
        """
        keys = ids.new_empty(ids.numel(), dtype=sort_key_dtype(num_embeddings))
        self._sort_keys(ids, keys, num_embeddings, padding_idx)
        # Stable, or the order of the additions would change from run to run.
        keys, order = torch.sort(keys, stable=True)
        return keys, order

    def _sum_runs(
        self,
        grad_output: Tensor,
        order: Tensor,
        keys: Tensor,
        grad_weight: Tensor,
        scale_grad_by_freq: bool,
    ) -> None:
        """Sum the runs of each chunk, then, level by level, the partial sums that runs left at its ends."""
        embedding_dim = grad_weight.shape[1]
        acc_dtype = torch.promote_types(grad_weight.dtype, torch.float32)
        chunk = chunk_size(keys.numel(), embedding_dim, acc_dtype.itemsize)
        values = grad_output
        level_order: Tensor | None = order
        counts: Tensor | None = None
        while True:
            num_chunks = cdiv(keys.numel(), chunk)
            partial_values = values.new_empty((2 * num_chunks, embedding_dim), dtype=acc_dtype)
            partial_keys = order.new_empty(2 * num_chunks)
            partial_counts = order.new_empty(2 * num_chunks, dtype=torch.int32)
            self._segment_sum(
                values,
                level_order,
                keys,
                counts,
                grad_weight,
                partial_values,
                partial_keys,
                partial_counts,
                scale_grad_by_freq,
                chunk,
            )
            if num_chunks <= 1:
                return
            values, keys, level_order = partial_values, partial_keys, None
            counts = partial_counts if scale_grad_by_freq else None

    def _sum_runs_once(
        self, grad_output: Tensor, ids: Tensor, grad_weight: Tensor, padding_idx: int
    ) -> None:
        """Sum the runs of each chunk; atomics add what runs leave at its ends."""
        keys, order = self._sorted_keys(ids, len(grad_weight), padding_idx)
        self._segment_sum(
            grad_output, order, keys, None, grad_weight, None, None, None, False, CHUNK
        )

    @abstractmethod
    def _prepare_gather(self, weight: Tensor) -> Gather: ...

    @abstractmethod
    def _scatter_add(
        self, grad_output: Tensor, ids: Tensor, grad_weight: Tensor, padding_idx: int
    ) -> None: ...

    @abstractmethod
    def _sort_keys(
        self, ids: Tensor, keys: Tensor, num_embeddings: int, padding_idx: int
    ) -> None: ...

    @abstractmethod
    def _segment_sum(
        self,
        values: Tensor,
        order: Tensor | None,
        keys: Tensor,
        counts: Tensor | None,
        grad_weight: Tensor,
        partial_values: Tensor | None,
        partial_keys: Tensor | None,
        partial_counts: Tensor | None,
        scale_grad_by_freq: bool,
        chunk: int,
    ) -> None: ...

    @abstractmethod
    def _renorm(self, weight: Tensor, keys: Tensor, max_norm: float, norm_type: float) -> None: ...

    @abstractmethod
    def _counts(self, ids: Tensor, counts: Tensor) -> None: ...


def chunk_size(num_keys: int, embedding_dim: int, acc_bytes: int) -> int:
    """Keys a chunk: short for parallelism, longer where the partial sums would take too much memory."""
    chunk = CHUNK
    while 2 * cdiv(num_keys, chunk) * embedding_dim * acc_bytes > MAX_PARTIAL_BYTES:
        chunk *= 2
    return chunk


def no_kernel(backend: str) -> str:
    """Why a backend refuses a forced method that it does not have."""
    return f"the backend {backend!r}, which has no such kernel"


def norm_name(norm_type: float) -> str:
    """Which of renorm_kernel's formulas computes this norm."""
    special = {float("inf"): "inf", float("-inf"): "-inf", 0.0: "0", 1.0: "1", 2.0: "2"}
    return special.get(norm_type, "p")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
