"""torch's own operators: CPU tensors, and CUDA where no kernel of ours can run."""

import torch
from torch import Tensor

from ...bags import Bags
from ...bounds import BoundsRecord, in_table
from ...dtypes import TORCH_IDS, accumulation
from ...row_update import RowUpdate
from ...tables.batch import TableBatch, write_out_of_range
from ...tables.entries import TableEntries
from ...take import QuantizedTable, rows_or_ids
from ..protocol import PreparedEmbedding
from . import tables
from .row_update import row_update_, table_row_update_


class TorchBackend:
    """`Backend` on torch's operators. Runs everywhere; casts int16 and uint8 ids, which torch does not take."""

    name = "torch"

    def unusable_reason(self, device: torch.device) -> str | None:
        return None

    def embedding(
        self, weight: Tensor, indices: Tensor, zero_idx: int, record: BoundsRecord | None
    ) -> Tensor:
        return self._embedding(weight, indices, zero_idx, record, weight.shape[0])

    def _embedding(
        self,
        weight: Tensor,
        indices: Tensor,
        zero_idx: int,
        record: BoundsRecord | None,
        recorded_rows: int,
    ) -> Tensor:
        ids = _torch_ids(indices)
        if zero_idx < 0 and weight.shape[0] and not ids.is_cuda:
            # torch's CPU kernel checks the ids itself; only its failure needs a second look.
            try:
                return torch.embedding(weight, ids)
            except IndexError:
                pass
        if record is not None:
            record.write(ids, recorded_rows)
        if weight.shape[0] == 0:
            return weight.new_zeros((*indices.shape, weight.shape[1]))
        ids = ids.contiguous()  # torch.where would hand its strides on to the output
        read = in_table(ids, weight.shape[0]) & (ids != zero_idx)
        rows = torch.embedding(weight, torch.where(read, ids, 0))
        return torch.where(read[..., None], rows, rows.new_zeros(()))

    def prepare_embedding(self, weight: Tensor) -> PreparedEmbedding:
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
    ) -> Tensor:
        ids = _torch_ids(indices).reshape(-1)
        grad_output = grad_output.reshape(ids.numel(), grad_output.shape[-1])
        kept = in_table(ids, num_embeddings)
        if ids.is_cuda:
            # torch's kernels trust the ids, so those out of range go to an extra row, without a sync.
            ids = torch.where(kept, ids, num_embeddings)
            return torch.ops.aten.embedding_dense_backward(
                grad_output, ids, num_embeddings + 1, padding_idx, scale_grad_by_freq
            )[:num_embeddings]
        if not kept.all():
            ids, grad_output = ids[kept], grad_output[kept]
        if grad_output.dtype in (torch.float16, torch.bfloat16):
            return _dense_backward_in_fp32(
                grad_output, ids, num_embeddings, padding_idx, scale_grad_by_freq
            )
        return torch.ops.aten.embedding_dense_backward(
            grad_output, ids, num_embeddings, padding_idx, scale_grad_by_freq
        )

    def embedding_renorm_(
        self, weight: Tensor, indices: Tensor, max_norm: float, norm_type: float
    ) -> None:
        ids = _torch_ids(indices).reshape(-1)
        kept = in_table(ids, weight.shape[0])
        ids = torch.where(kept, ids, 0)
        rows = weight[ids]
        wide = rows.to(accumulation(rows.dtype))
        norm = torch.linalg.vector_norm(wide, norm_type, dim=1)
        scaled = (norm > max_norm) & kept.all()
        renormed = (wide * (max_norm / (norm + 1e-7))[:, None]).to(rows.dtype)
        # An id that occurs twice writes the same row twice: every copy was scaled from the old table.
        weight[ids] = torch.where(scaled[:, None], renormed, rows)

    def embedding_counts(self, indices: Tensor, num_embeddings: int) -> Tensor:
        ids = _torch_ids(indices).reshape(-1)
        ids = torch.where(in_table(ids, num_embeddings), ids, num_embeddings)
        counts = torch.zeros(num_embeddings + 1, dtype=torch.int32, device=ids.device)
        counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        return counts[:num_embeddings]

    def row_update_(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        indices: Tensor,
        values: Tensor,
        rows: Tensor | None,
    ) -> None:
        row_update_(update, weight, state, indices, values, rows)

    def embedding_bag(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        padding_idx: int,
        mode: str,
        record: BoundsRecord | None,
    ) -> Tensor:
        wide = accumulation(weight.dtype)
        # torch would round a 16-bit mean twice, and its CUDA kernels trust the ids.
        if not weight.is_cuda and (mode == "sum" or weight.dtype == wide):
            output = _cpu_bags(weight, per_sample_weights, bags, padding_idx, mode)
            if output is not None:
                return output[0]
        if record is not None:
            record.write_bags(bags, weight.shape[0])
        bag = bags.bag_of()
        rows = self.embedding(weight, bags.indices, padding_idx, None).to(wide)
        if per_sample_weights is not None:
            read = in_table(bags.indices, weight.shape[0]) & (bags.indices != padding_idx)
            rows = torch.where(read[:, None], rows * per_sample_weights[:, None], 0)
        # Positions in no bag go to an extra one.
        total = rows.new_zeros(bags.num_bags + 1, weight.shape[1])
        total.index_add_(0, torch.where(bag < 0, bags.num_bags, bag), rows)
        total = total[:-1]
        if mode == "mean":
            total /= bags.sizes(padding_idx).clamp(min=1)[:, None]
        return total.to(weight.dtype)

    def embedding_bag_max(
        self,
        weight: Tensor,
        bags: Bags,
        padding_idx: int,
        with_winner: bool,
        record: BoundsRecord | None,
    ) -> tuple[Tensor, Tensor]:
        if not weight.is_cuda:
            found = _cpu_bags(weight, None, bags, padding_idx, "max")
            if found is not None:
                return found[0], _elements(found[1]) if with_winner else found[1].new_empty(0)
        if record is not None:
            record.write_bags(bags, weight.shape[0])
        return _max_by_scatter(weight, bags, padding_idx, with_winner)

    def embedding_bag_dense_backward(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        num_embeddings: int,
        padding_idx: int,
        mode: str,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        bag = bags.bag_of()
        wide = accumulation(grad_output.dtype)
        grad_output_wide = grad_output.to(wide)
        if mode == "mean":
            grad_output_wide = grad_output_wide / bags.sizes(padding_idx).clamp(min=1)[:, None]
        rows = grad_output_wide[bag.clamp(min=0)]
        if per_sample_weights is not None:
            rows = rows * per_sample_weights[:, None]
        ids = torch.where(bag >= 0, bags.indices.to(torch.int64), -1)
        return self.embedding_dense_backward(
            rows, ids, num_embeddings, padding_idx, scale_grad_by_freq
        ).to(grad_output.dtype)

    def embedding_bag_sample_weights_backward(
        self, grad_output: Tensor, weight: Tensor, bags: Bags, padding_idx: int
    ) -> Tensor:
        wide = accumulation(weight.dtype)
        bag = bags.bag_of()
        read = (bag >= 0) & in_table(bags.indices, weight.shape[0]) & (bags.indices != padding_idx)
        rows = self.embedding(weight, bags.indices, -1, None).to(wide)
        products = rows * grad_output[bag.clamp(min=0)].to(wide)
        return torch.where(read, products.sum(1), 0).to(grad_output.dtype)

    def table_batched_embedding(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        zero_padding: bool,
        record: BoundsRecord | None,
    ) -> Tensor:
        places = batch.places()
        if record is not None:
            write_out_of_range(record, batch, places)
        return tables.embedding(weight, per_sample_weights, batch, zero_padding, places)

    def table_batched_embedding_max(
        self,
        weight: Tensor,
        batch: TableBatch,
        with_winner: bool,
        record: BoundsRecord | None,
    ) -> tuple[Tensor, Tensor]:
        places = batch.places()
        if record is not None:
            write_out_of_range(record, batch, places)
        return tables.embedding_max(weight, batch, with_winner, places)

    def table_batched_embedding_dense_backward(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        weight_shape: tuple[int, ...],
    ) -> Tensor:
        return tables.dense_backward(grad_output, per_sample_weights, batch, weight_shape)

    def table_batched_embedding_sample_weights_backward(
        self, grad_output: Tensor, weight: Tensor, batch: TableBatch
    ) -> Tensor:
        return tables.sample_weights_backward(grad_output, weight, batch)

    def take_rows(
        self, weight: Tensor, indices: Tensor, dtype: torch.dtype, record: BoundsRecord | None
    ) -> Tensor:
        if not weight.is_cuda and indices.dtype in TORCH_IDS:
            # Negative ids are rare, and torch's CPU kernel finds them.
            try:
                return torch.embedding(weight, indices).to(dtype)
            except IndexError:
                pass
        rows = rows_or_ids(indices, weight.shape[0])
        return self._embedding(weight, rows, -1, record, -weight.shape[0]).to(dtype)

    def dequantize_rows(
        self,
        table: QuantizedTable,
        indices: Tensor,
        dtype: torch.dtype,
        record: BoundsRecord | None,
    ) -> Tensor:
        num_embeddings = table.values.shape[0]
        rows = rows_or_ids(indices, num_embeddings)
        columns = self._embedding(table.values, rows, -1, record, -num_embeddings)
        if table.bits == 4:
            halves = torch.stack([columns & 15, columns >> 4 & 15], dim=-1).flatten(-2)
            columns = (halves[..., : table.embedding_dim] ^ 8) - 8

        def of_groups(numbers: Tensor) -> Tensor:
            """One number a group of each row -> one a column."""
            per_group = self.embedding(numbers.reshape(num_embeddings, -1), rows, -1, None)
            per_column = per_group.repeat_interleave(table.group_size, dim=-1)
            return per_column[..., : table.embedding_dim].to(wide)

        wide = accumulation(table.scale.dtype)
        numbers = columns.to(wide)
        if table.zero is None:
            # What an id out of range reads as divides zeros by zeros.
            scale = of_groups(table.scale)
            read = in_table(rows, num_embeddings)[..., None]
            return torch.where(read, numbers / scale, 0).to(dtype)
        return ((numbers - of_groups(table.zero)) * of_groups(table.scale)).to(dtype)

    def table_row_update_(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        entries: TableEntries,
        rows: Tensor | None,
    ) -> None:
        table_row_update_(update, weight, state, entries, rows)


def _torch_ids(indices: Tensor) -> Tensor:
    return indices if indices.dtype in TORCH_IDS else indices.to(torch.int32)


def _dense_backward_in_fp32(
    grad_output: Tensor,
    ids: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    """The gradient of a 16-bit table, summed in fp32 over the used rows only.

    torch's CPU kernel sums in 16 bit, which stops growing at 256 (bf16) or 2048 (fp16).
    """
    kept = ids != padding_idx
    rows, run = torch.unique(ids[kept], return_inverse=True)
    total = torch.zeros(
        len(rows), grad_output.shape[1], dtype=torch.float32, device=grad_output.device
    )
    total.index_add_(0, run, grad_output[kept].float())
    if scale_grad_by_freq:
        total /= torch.bincount(run, minlength=len(rows))[:, None]
    grad_weight = grad_output.new_zeros(num_embeddings, grad_output.shape[1])
    grad_weight[rows] = total.to(grad_output.dtype)
    return grad_weight


def _cpu_bags(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    bags: Bags,
    padding_idx: int,
    mode: str,
) -> tuple[Tensor, Tensor] | None:
    """torch's bags on the CPU -> [B, D], and for "max" the ids of the largest, -1 in an empty bag.

    None where torch meets an id out of range, which it looks for itself.
    """
    ids, offsets = _torch_ids(bags.indices), bags.offsets
    if offsets is None:
        offsets = torch.arange(0, ids.numel(), bags.bag_length, dtype=ids.dtype, device=ids.device)
    elif offsets.numel() > bags.num_bags:
        # torch takes ids behind the last offset into the last bag in some cases, and not in others.
        last = int(offsets[-1])
        ids, offsets = ids[:last], offsets[:-1]
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights[:last]
    try:
        output, _, sizes, max_ids = torch.embedding_bag(
            weight,
            ids,
            offsets,
            False,
            ("sum", "mean", "max").index(mode),
            False,
            per_sample_weights,
            False,
            padding_idx if padding_idx >= 0 else None,
        )
    except RuntimeError:
        return None
    if mode == "max":
        max_ids = torch.where(sizes[:, None] > 0, max_ids, -1)
    return output, max_ids


def _elements(max_ids: Tensor) -> Tensor:
    """Where in a table [V, D] the elements of rows `max_ids` [B, D] lie."""
    embedding_dim = max_ids.shape[1]
    columns = torch.arange(embedding_dim, device=max_ids.device)
    return torch.where(max_ids >= 0, max_ids.to(torch.int64) * embedding_dim + columns, -1)


def _max_by_scatter(
    weight: Tensor, bags: Bags, padding_idx: int, with_winner: bool
) -> tuple[Tensor, Tensor]:
    """The maxima with operators that take any ids, and wait for nothing."""
    num_indices, embedding_dim = bags.indices.numel(), weight.shape[1]
    bag = bags.bag_of()
    kept = (bag >= 0) & in_table(bags.indices, weight.shape[0]) & (bags.indices != padding_idx)
    if weight.shape[0] == 0:
        output = weight.new_zeros(bags.num_bags, embedding_dim)
        winner = torch.full_like(output, -1, dtype=torch.int64)
        return output, winner if with_winner else winner.new_empty(0)
    ids = torch.where(kept, bags.indices.to(torch.int64), 0)
    # What takes no part goes to an extra bag.
    bag = torch.where(kept, bag, bags.num_bags)[:, None].expand(-1, embedding_dim)
    rows = torch.embedding(weight, ids)
    places = torch.arange(num_indices, device=ids.device)[:, None].expand(-1, embedding_dim)

    def lowest_place(candidate: Tensor) -> Tensor:
        """The first place of each bag where it holds; num_indices: nowhere."""
        found = places.new_full((bags.num_bags + 1, embedding_dim), num_indices)
        return found.scatter_reduce_(0, bag, torch.where(candidate, places, num_indices), "amin")

    # NaN is the largest where it comes first; elsewhere nothing is larger than what was there.
    first = lowest_place(torch.ones_like(rows, dtype=torch.bool))
    is_nan = rows.isnan()
    floor = rows.new_full((bags.num_bags + 1, embedding_dim), -torch.inf)
    largest = floor.scatter_reduce(0, bag, torch.where(is_nan, -torch.inf, rows), "amax")
    place = lowest_place((rows == largest.gather(0, bag)) & ~is_nan)
    place = torch.where(lowest_place(is_nan) == first, first, place)[:-1]
    nowhere = place == num_indices
    place = place.clamp(max=num_indices - 1)
    output = torch.where(nowhere, 0, rows.gather(0, place))
    if not with_winner:
        return output, place.new_empty(0)
    return output, torch.where(nowhere, -1, _elements(ids[place]))
