"""What correct means: the four operations in NumPy, for reading and for checking the kernels.

Arrays are float32 or float64 (16-bit tables are widened by the caller); sums are taken in float64 and
rounded once on return. Ids outside [0, num_embeddings) read as zeros and contribute nothing.
"""

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


def embedding_renorm(weight: Array, indices: Array, max_norm: float, norm_type: float) -> Array:
    """weight [V, D] with every row of indices whose norm exceeds max_norm scaled down to it."""
    if not in_table(indices, len(weight)).all():
        return weight
    rows = np.unique(indices)
    norm = row_norm(weight[rows].astype(np.float64), norm_type)
    scale = np.where(norm > max_norm, max_norm / (norm + 1e-7), 1.0)
    renormed = weight.copy()
    renormed[rows] = (weight[rows] * scale[:, None]).astype(weight.dtype)
    return renormed


def row_norm(rows: Array, norm_type: float) -> Array:
    """The norm_type-norm of each row of [N, D] -> [N]; inf, -inf, 0 and negative powers as in torch."""
    magnitude = np.abs(rows)
    if norm_type == np.inf:
        return magnitude.max(axis=1, initial=0.0)
    if norm_type == -np.inf:
        return magnitude.min(axis=1, initial=np.inf)
    if norm_type == 0:
        return (magnitude != 0).sum(axis=1).astype(np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        return (magnitude**norm_type).sum(axis=1) ** (1.0 / norm_type)


def in_table(indices: Array, num_embeddings: int) -> Array:
    """Which ids name a row."""
    return (indices >= 0) & (indices < num_embeddings)
