"""Lookups with Keras's rules: ids of any real dtype, cut to integers, negative ones counted from the end."""

import numpy as np

from .lookup import Array, embedding, in_table


def take_rows(weight: Array, indices: Array) -> Array:
    """Rows of weight [V, D] at indices [...] -> [..., D]; rows of bad ids are zero."""
    return embedding(weight, wrapped_rows(indices, len(weight)))


def dequantize_rows(
    values: Array,
    scale: Array,
    zero: Array | None,
    indices: Array,
    embedding_dim: int,
    group_size: int,
    bits: int,
) -> Array:
    """Rows of a quantized table at indices [...] -> float64 [..., embedding_dim]; rows of bad ids are zero.

    Args:
        values: int8 [V, D], or [V, ceil(D / 2)] of 4 bits, the even column in the lower half of its byte.
        scale, zero: [V], or [V, ceil(D / group_size)]; without zeros a number is value / scale, and with them
            (value - zero) * scale.
    """
    rows = wrapped_rows(indices, len(values))
    read = in_table(rows, len(values))
    output = np.zeros((*indices.shape, embedding_dim))
    columns = values[rows[read]]
    if bits == 4:
        halves = np.stack([columns & 15, columns >> 4 & 15], axis=-1).reshape(len(columns), -1)
        columns = (halves[:, :embedding_dim] ^ 8) - 8
    group = np.arange(embedding_dim) // group_size
    per_column = scale.reshape(len(scale), -1)[rows[read]][:, group].astype(np.float64)
    if zero is None:
        output[read] = columns / per_column
    else:
        zeros = zero.reshape(len(zero), -1)[rows[read]][:, group]
        output[read] = (columns - zeros.astype(np.float64)) * per_column
    return output


def wrapped_rows(indices: Array, num_embeddings: int) -> Array:
    """The rows that ids mean -> int64 [...]; NaN and infinities mean -num_embeddings - 1, which is none."""
    nowhere = -num_embeddings - 1
    ids = np.where(np.abs(indices) < 2.0**63, indices, nowhere).astype(np.int64)
    return np.where(ids < 0, ids + num_embeddings, ids)


def dequantize_fused_rows(
    fused: Array, indices: Array, embedding_dim: int, group_size: int, bits: int
) -> Array:
    """Fused rows, uint8 [V, row_bytes], at indices [...] -> float32 [..., embedding_dim]; rows of bad ids are zero.

    See `gpu_embed.fused_rows`. The products are exact, and the sums rounded once.
    """
    groups, code_bytes = -(-embedding_dim // group_size), group_size * bits // 8
    read = in_table(indices, len(fused))
    output = np.zeros((*indices.shape, embedding_dim), np.float32)
    rows = fused[indices[read]].reshape(-1, groups, fused.shape[1] // groups)
    codes = rows[..., :code_bytes]
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(rows), groups, group_size)
    numbers = np.ascontiguousarray(rows[..., code_bytes:]).view(
        np.float32 if bits == 8 else np.float16
    )
    scale, offset = (numbers[..., i : i + 1].astype(np.float64) for i in (0, 1))
    values = (codes * scale + offset).astype(np.float32)
    output[read] = values.reshape(len(rows), groups * group_size)[:, :embedding_dim]
    return output
