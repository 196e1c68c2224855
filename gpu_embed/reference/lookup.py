"""The lookup, its gradient and its counts; the other stems stand on it."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray  # any dtype; shapes stand in the docstrings


def embedding(weight: Array, indices: Array, zero_idx: int = -1) -> Array:
    """Rows of weight [V, D] at indices [...] -> [..., D]; rows of zero_idx and of bad ids are zero."""
    read = in_table(indices, len(weight)) & (indices != zero_idx)
    output = np.zeros((*indices.shape, weight.shape[1]), weight.dtype)
    output[read] = weight[indices[read]]
    return output


def embedding_dense_backward(
    grad_output: Array,
    indices: Array,
    num_embeddings: int,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> Array:
    """Sum of grad_output [..., D] over the positions of each id -> grad_weight [num_embeddings, D].

    padding_idx gets no gradient; scale_grad_by_freq divides each row by the id's count in indices.
    """
    kept = in_table(indices, num_embeddings) & (indices != padding_idx)
    total = np.zeros((num_embeddings, grad_output.shape[-1]), np.float64)
    np.add.at(total, indices[kept], grad_output[kept].astype(np.float64))
    if scale_grad_by_freq:
        total /= np.maximum(embedding_counts(indices, num_embeddings), 1)[:, None]
    return total.astype(grad_output.dtype)


def embedding_counts(indices: Array, num_embeddings: int) -> Array:
    """How often each id occurs -> int32 [num_embeddings]."""
    kept = indices[in_table(indices, num_embeddings)].astype(np.int64)
    return np.bincount(kept, minlength=num_embeddings).astype(np.int32)


def in_table(indices: Array, num_embeddings: int) -> Array:
    """Which ids name a row."""
    return (indices >= 0) & (indices < num_embeddings)
