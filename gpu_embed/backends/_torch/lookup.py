"""Lookups in torch's operators, their gradients, and what else goes by rows of one table."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...bounds import BoundsRecord, all_in_table, in_table
from ...dtypes import TORCH_IDS, accumulation
from ...shard import Shard
from ..protocol import PreparedEmbedding
from .sort import sort_ids

# Bytes of the rows that a gradient in place adds at a time: they stay in the cache, and it allocates little else.
CHUNK_BYTES = 1 << 19


class TorchLookup:
    """Lookups in one table. Casts int16 and uint8 ids, which torch does not take."""

    def embedding(
        self,
        weight: Tensor,
        indices: Tensor,
        zero_idx: int,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> Tensor:
        num_rows = weight.shape[0]
        if shard is None:
            return self._embedding(weight, indices, zero_idx, record, num_rows)
        write_out_of_range(record, indices, shard)
        return _rows_or_zeros(weight, shard.local(indices, num_rows, zero_idx), num_rows)

    def _embedding(
        self,
        weight: Tensor,
        indices: Tensor,
        zero_idx: int,
        record: BoundsRecord | None,
        recorded_rows: int,
    ) -> Tensor:
        ids = torch_ids(indices)
        if zero_idx < 0 and weight.shape[0] and not ids.is_cuda:
            # torch's CPU kernel checks the ids itself; only its failure needs a second look.
            try:
                return torch.embedding(weight, ids)
            except IndexError:
                pass
        if record is not None:
            record.write(ids, recorded_rows)
        return _rows_or_zeros(weight, ids, zero_idx)

    def prepare_embedding(self, weight: Tensor, shard: Shard | None = None) -> PreparedEmbedding:
        if shard is not None:
            return partial(self.embedding, shard=shard)
        if weight.is_cuda or weight.shape[0] == 0:
            return self.embedding

        def embedding(
            weight: Tensor, indices: Tensor, zero_idx: int, record: BoundsRecord | None
        ) -> Tensor:
            if zero_idx < 0 and indices.dtype in TORCH_IDS:
                # As above: torch's CPU kernel checks the ids itself.
                try:
                    return torch.embedding(weight, indices)
                except IndexError:
                    pass
            return self.embedding(weight, indices, zero_idx, record)

        return embedding

    def embedding_dense_backward(
        self,
        grad_output: Tensor,
        indices: Tensor,
        num_embeddings: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
        into: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        if shard is not None:
            indices = shard.local(indices, num_embeddings, padding_idx)
            padding_idx = num_embeddings
        ids = torch_ids(indices).reshape(-1)
        grad_output = grad_output.reshape(ids.numel(), grad_output.shape[-1])
        kept = in_table(ids, num_embeddings)
        if (
            into is None
            and not ids.is_cuda
            and grad_output.dtype in (torch.float16, torch.bfloat16)
        ):
            # torch's CPU kernel sums in 16 bit, which stops growing at 256 (bf16) or 2048 (fp16).
            into = grad_output.new_zeros(num_embeddings, grad_output.shape[1])
        if into is not None:
            if padding_idx >= 0:
                kept &= ids != padding_idx
            if into.dtype == accumulation(grad_output.dtype) == grad_output.dtype and not (
                ids.is_cuda or scale_grad_by_freq or not kept.all()
            ):
                return into.index_add_(0, ids, grad_output)
            read = partial(_rows_at, grad_output)
            return add_rows(into, ids, kept, read, scale_grad_by_freq)
        if ids.is_cuda:
            # torch's kernels trust the ids, so those out of range go to an extra row, without a sync.
            ids = torch.where(kept, ids, num_embeddings)
            return torch.ops.aten.embedding_dense_backward(
                grad_output, ids, num_embeddings + 1, padding_idx, scale_grad_by_freq
            )[:num_embeddings]
        if not kept.all():
            ids, grad_output = ids[kept], grad_output[kept]
        return torch.ops.aten.embedding_dense_backward(
            grad_output, ids, num_embeddings, padding_idx, scale_grad_by_freq
        )

    def embedding_renorm_(
        self,
        weight: Tensor,
        indices: Tensor,
        max_norm: float,
        norm_type: float,
        shard: Shard | None = None,
    ) -> None:
        num_rows = weight.shape[0]
        if shard is not None:
            indices = shard.local(indices, num_rows)
        ids = torch_ids(indices).reshape(-1)
        kept = in_table(ids, num_rows)
        unchanged = ~kept.all() if shard is None else (ids > num_rows).any() | ~kept.any()
        # Another shard's id stands for a row that is looked up here.
        ids = torch.where(kept, ids, torch.where(kept, ids, 0).amax())
        rows = weight[ids]
        wide = rows.to(accumulation(rows.dtype))
        norm = torch.linalg.vector_norm(wide, norm_type, dim=1)
        scaled = (norm > max_norm) & ~unchanged
        renormed = (wide * (max_norm / (norm + 1e-7))[:, None]).to(rows.dtype)
        # An id that occurs twice writes the same row twice: every copy was scaled from the old table.
        weight[ids] = torch.where(scaled[:, None], renormed, rows)

    def embedding_counts(
        self, indices: Tensor, num_embeddings: int, shard: Shard | None = None
    ) -> Tensor:
        if shard is not None:
            indices = shard.local(indices, num_embeddings)
        ids = torch_ids(indices).reshape(-1)
        ids = torch.where(in_table(ids, num_embeddings), ids, num_embeddings)
        counts = torch.zeros(num_embeddings + 1, dtype=torch.int32, device=ids.device)
        counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        return counts[:num_embeddings]


def _rows_or_zeros(weight: Tensor, ids: Tensor, zero_idx: int) -> Tensor:
    """The rows of ids in the table but zero_idx, and zeros of the others."""
    if weight.shape[0] == 0:
        return weight.new_zeros((*ids.shape, weight.shape[1]))
    ids = ids.contiguous()  # torch.where would hand its strides on to the output
    read = in_table(ids, weight.shape[0]) & (ids != zero_idx)
    rows = torch.embedding(weight, torch.where(read, ids, 0))
    return torch.where(read[..., None], rows, rows.new_zeros(()))


def write_out_of_range(record: BoundsRecord | None, indices: Tensor, shard: Shard) -> None:
    """Record an id that the whole table does not have."""
    if record is None or (
        not indices.is_cuda and all_in_table(torch_ids(indices), shard.num_embeddings)
    ):
        return
    record.write(indices, shard.num_embeddings)


def torch_ids(indices: Tensor) -> Tensor:
    return indices if indices.dtype in TORCH_IDS else indices.to(torch.int32)


def _rows_at(rows: Tensor, positions: Tensor | slice) -> Tensor:
    """rows[positions], of 16-bit rows in a tenth of the time."""
    if isinstance(positions, slice):
        return rows[positions]
    return rows.index_select(0, positions)


def add_rows(
    into: Tensor,
    ids: Tensor,
    kept: Tensor,
    read: Callable[[Tensor | slice], Tensor],
    scale_grad_by_freq: bool,
) -> Tensor:
    """Add a row to that of each id, and return `into`; see `Backend`. On CUDA it waits for nothing.

    Args:
        into: [V, D].
        ids: int64 or int32 [N], N > 0.
        kept: bool [N], which ids name a row of `into`; the others take no part.
        read: read(positions) -> the rows [n, D] that belong to those ids.
        scale_grad_by_freq: whether each is divided by how often its id is kept.
    """
    add = _add_without_sync if into.is_cuda else _add_in_chunks
    return add(into, ids, kept, read, scale_grad_by_freq)


def _add_in_chunks(
    into: Tensor,
    ids: Tensor,
    kept: Tensor,
    read: Callable[[Tensor | slice], Tensor],
    scale_grad_by_freq: bool,
) -> Tensor:
    wide = accumulation(into.dtype)
    step = max(1, CHUNK_BYTES // (into.shape[1] * wide.itemsize))
    positions = None if kept.all() else kept.nonzero()[:, 0]
    num_kept = len(ids) if positions is None else len(positions)
    if into.dtype == wide and not scale_grad_by_freq:
        for start in range(0, num_kept, step):
            part = slice(start, start + step)
            chunk = part if positions is None else positions[part]
            into.index_add_(0, ids[chunk], read(chunk).to(wide))
        return into
    # Whole runs of equal ids, so that each row is read and written once.
    if positions is not None:
        ids = ids.index_select(0, positions)
    keys, order = sort_ids(ids, len(into))
    _, run, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    rows = ids.index_select(0, order.index_select(0, last)).to(torch.int64)
    ends = (last + 1).tolist()
    if positions is not None:
        order = positions.index_select(0, order)
    for first in range(0, len(rows), step):
        chunk_rows = rows[first : first + step]
        total = torch.zeros(len(chunk_rows), into.shape[1], dtype=wide, device=into.device)
        begin, end = ends[first - 1] if first else 0, ends[first + len(chunk_rows) - 1]
        for start in range(begin, end, step):
            part = slice(start, min(start + step, end))
            total.index_add_(0, run[part] - first, read(order[part]).to(wide))
        if scale_grad_by_freq:
            total /= counts[first : first + step, None]
        total += into.index_select(0, chunk_rows)
        into.index_copy_(0, chunk_rows, total.to(into.dtype))
    return into


def _add_without_sync(
    into: Tensor,
    ids: Tensor,
    kept: Tensor,
    read: Callable[[Tensor | slice], Tensor],
    scale_grad_by_freq: bool,
) -> Tensor:
    wide = accumulation(into.dtype)
    # What is not kept adds zeros to a row that an id names; to row 0 if none does.
    ids = torch.where(kept, ids, torch.where(kept, ids, 0).amax())
    values = torch.where(kept[:, None], read(slice(None)).to(wide), 0)
    keys, order = torch.sort(ids, stable=True)
    run = torch.cat((keys.new_zeros(1), (keys[1:] != keys[:-1]).cumsum(0)))
    total = torch.zeros_like(values).index_add_(0, run, values[order])
    if scale_grad_by_freq:
        counts = torch.zeros(len(ids), dtype=wide, device=ids.device)
        counts.index_add_(0, run, kept[order].to(wide))
        total /= counts.clamp(min=1)[:, None]
    # Every position of a row writes the same sum.
    keys = keys.to(torch.int64)
    return into.index_copy_(0, keys, (total[run] + into[keys]).to(into.dtype))
