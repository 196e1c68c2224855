"""Bags: the rows of each bag summed, averaged or their largest values, and the gradients."""

from itertools import pairwise

import numpy as np

from .lookup import Array, embedding, embedding_dense_backward, in_table


def embedding_bag(
    weight: Array,
    indices: Array,
    offsets: Array,
    padding_idx: int = -1,
    mode: str = "sum",
    per_sample_weights: Array | None = None,
) -> Array:
    """Sum or mean of the rows of each bag of indices [N] -> [B, D].

    Bag b holds positions offsets[b] to offsets[b + 1] (offsets [B + 1]). padding_idx is left out, of the mean's
    divisor too; per_sample_weights [N] multiply the rows.
    """
    scale = position_scales(indices, len(weight), padding_idx, per_sample_weights)
    rows = embedding(weight, indices, padding_idx).astype(np.float64) * scale[:, None]
    output = np.stack([rows[begin:end].sum(axis=0) for begin, end in pairwise(offsets)])
    if mode == "mean":
        output /= bag_sizes(indices, offsets, padding_idx)[:, None]
    return output.astype(weight.dtype)


def position_scales(
    indices: Array, num_embeddings: int, padding_idx: int, per_sample_weights: Array | None
) -> Array:
    """What multiplies the row of each position -> float64 [N]; 0 where it takes no part."""
    read = in_table(indices, num_embeddings) & (indices != padding_idx)
    return np.where(read, 1.0 if per_sample_weights is None else per_sample_weights, 0.0)


def bag_sizes(indices: Array, offsets: Array, padding_idx: int) -> Array:
    """How many ids of each bag are not padding, at least 1 -> [B]."""
    # An id of -1 is out of range, and no padding where -1 stands for there being none.
    counted = (indices != padding_idx) | (indices < 0)
    return np.array([max(counted[begin:end].sum(), 1) for begin, end in pairwise(offsets)])


def embedding_bag_max(
    weight: Array, indices: Array, offsets: Array, padding_idx: int = -1
) -> tuple[Array, Array]:
    """Largest value in each column of each bag -> [B, D], and where in weight.ravel() it lies; -1: nowhere.

    The first of equals wins. NaN wins where it comes first in its bag, and nowhere else, as in torch.
    """
    output, position = largest_of_bags(weight, indices, offsets, padding_idx)
    embedding_dim = weight.shape[1]
    ids = np.append(indices, -1).astype(np.int64)[position]
    return output, np.where(position < 0, -1, ids * embedding_dim + np.arange(embedding_dim))


def largest_of_bags(
    weight: Array,
    indices: Array,
    offsets: Array,
    padding_idx: int = -1,
    others_idx: int | None = None,
) -> tuple[Array, Array]:
    """embedding_bag_max's output, and the position in indices of each row that it is of -> [B, D]; -1: none.

    others_idx stands for rows that lie elsewhere: they take no part, but NaN behind one does not come first.
    """
    output = np.zeros((len(offsets) - 1, weight.shape[1]), weight.dtype)
    position = np.full(output.shape, -1)
    read = in_table(indices, len(weight)) & (indices != padding_idx)
    elsewhere = indices == others_idx
    for bag, (begin, end) in enumerate(pairwise(offsets)):
        for place, n in enumerate(begin + np.flatnonzero((read | elsewhere)[begin:end])):
            if elsewhere[n]:
                continue
            row = weight[indices[n]]
            better = (row > output[bag]) | ((position[bag] < 0) & ((place == 0) | ~np.isnan(row)))
            output[bag] = np.where(better, row, output[bag])
            position[bag] = np.where(better, n, position[bag])
    return output, position


def embedding_bag_dense_backward(
    grad_output: Array,
    indices: Array,
    offsets: Array,
    num_embeddings: int,
    padding_idx: int = -1,
    mode: str = "sum",
    per_sample_weights: Array | None = None,
    scale_grad_by_freq: bool = False,
) -> Array:
    """Gradient of embedding_bag's weight -> [num_embeddings, D]: each position hands its bag's on to its row."""
    wide = grad_output.astype(np.float64)
    if mode == "mean":
        wide /= bag_sizes(indices, offsets, padding_idx)[:, None]
    last = offsets[-1]
    scale = position_scales(indices, num_embeddings, padding_idx, per_sample_weights)
    grad_rows = wide[bag_of(offsets)] * scale[:last, None]
    grad_weight = embedding_dense_backward(
        grad_rows, indices[:last], num_embeddings, padding_idx, scale_grad_by_freq
    )
    return grad_weight.astype(grad_output.dtype)


def embedding_bag_sample_weights_backward(
    grad_output: Array, weight: Array, indices: Array, offsets: Array, padding_idx: int = -1
) -> Array:
    """Gradient of embedding_bag's per_sample_weights -> [N]: each position's row times its bag's gradient."""
    rows = embedding(weight, indices, padding_idx).astype(np.float64)
    grad = np.zeros(len(indices))
    last = offsets[-1]
    # A row that is not read gives 0 where the gradient is infinite, too.
    read = position_scales(indices, len(weight), padding_idx, None)[:last] != 0
    grad[:last][read] = (rows[:last][read] * grad_output[bag_of(offsets)][read]).sum(axis=1)
    return grad.astype(grad_output.dtype)


def bag_of(offsets: Array) -> Array:
    """The bag of each position that is in one -> [offsets[-1]]."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
