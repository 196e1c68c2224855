"""max_norm: rows that are looked up are first scaled down to it."""

import numpy as np

from .lookup import Array, in_table


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
