"""What a backend computes."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..bags import Bags
from ..bounds import BoundsRecord
from ..row_update import RowUpdate
from ..shard import Shard
from ..tables.batch import TableBatch
from ..tables.entries import TableEntries
from ..take import QuantizedTable

# embedding(weight, indices, zero_idx, record) for one table, as `Backend.prepare_embedding` returns it.
PreparedEmbedding = Callable[[Tensor, Tensor, int, BoundsRecord | None], Tensor]


class Backend(Protocol):
    """What a backend computes. Shapes: weight [V, D], indices [...], V = num_embeddings.

    Ids are int64, int32, int16 or uint8. Ids outside [0, V) read as zeros and contribute nothing; the
    caller has checked everything else. Tensors may have any strides; results are contiguous.

    The three `*_dense_backward` of a table take `into`, a gradient that exists: of the table's shape, with any
    strides that do not overlap (a tables' buffer: contiguous), of the table's dtype, or fp32 where that has 16
    bits. Each row that an id names is summed in `accumulation(dtype)`, added to its row of `into` there, and rounded
    once. No other row is read or written. `into` is returned, and its version counter is the caller's to raise.

    With a `shard` the table in hand, or its gradient, is those rows of a larger one: see `shard.Shard`. Ids, zero_idx
    and padding_idx are the larger table's; what is recorded and counted as out of range is what is not in that.
    """

    name: str

    def unusable_reason(self, device: torch.device) -> str | None:
        """None where the backend can serve tensors on this device, else the reason in one sentence."""

    def embedding(
        self,
        weight: Tensor,
        indices: Tensor,
        zero_idx: int,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> Tensor:
        """weight[indices], bit for bit -> [..., D]; ids equal to zero_idx (-1: none) give zero rows.

        Ids out of range are written to `record` unless it is None.
        """

    def prepare_embedding(self, weight: Tensor, shard: Shard | None = None) -> PreparedEmbedding:
        """`embedding` for this table or shard alone, with all that does not depend on the ids decided once.

        Good while the table keeps its address, shape, strides and dtype. Holds no tensor, and none's memory.
        """

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
        """Sum of grad_output [..., D] (real, floating) over each id's positions -> [V, D], same dtype.

        The sums are added to `into` where it is given: see the class.
        """

    def embedding_renorm_(
        self,
        weight: Tensor,
        indices: Tensor,
        max_norm: float,
        norm_type: float,
        shard: Shard | None = None,
    ) -> None:
        """Scale the looked-up rows to max_norm in place; none if any id is out of range."""

    def embedding_counts(
        self, indices: Tensor, num_embeddings: int, shard: Shard | None = None
    ) -> Tensor:
        """How often each id occurs -> int32 [V]."""

    def row_update_(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        indices: Tensor,
        values: Tensor,
        rows: Tensor | None,
    ) -> None:
        """Sum values [N, D] over the positions of each id in indices [N], int64, and update that row, in place.

        `state` is what the formula keeps, contiguous, fp32 (fp64 for fp64 tables). Only rows that an id names,
        and that `rows` (bool [V]; None: all) lets change, are read or written, once each.
        """

    def embedding_bag(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        padding_idx: int,
        mode: str,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> Tensor:
        """Sum (mode "sum") or mean ("mean") of the rows of each bag -> [B, D].

        per_sample_weights [N], of weight's dtype, multiply the rows. Ids equal to padding_idx (-1: none) take no
        part, and do not count for the mean; those of other rows than the shard's do count. Ids out of range are
        written to `record` unless it is None.
        """

    def embedding_bag_max(
        self,
        weight: Tensor,
        bags: Bags,
        padding_idx: int,
        with_argmax: bool,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Largest value of each column in each bag, 0 in an empty one -> [B, D], and where it was found.

        The second: int64 [B, D], id * D + column, -1 for none; an empty tensor unless with_argmax. The
        first of equals wins; NaN wins where it comes first, and nowhere else.

        With a shard, the largest among its own rows, and as the second the position in bags.indices that it is of: so
        the first of equals in several shards can be found. NaN wins where it comes first among the bag's ids of all
        shards, padding and ids out of range left out.
        """

    def embedding_bag_dense_backward(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        num_embeddings: int,
        padding_idx: int,
        mode: str,
        scale_grad_by_freq: bool,
        into: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        """Gradient of embedding_bag's weight from grad_output [B, D] -> [V, D], same dtype; or added to `into`."""

    def embedding_bag_sample_weights_backward(
        self,
        grad_output: Tensor,
        weight: Tensor,
        bags: Bags,
        padding_idx: int,
        shard: Shard | None = None,
    ) -> Tensor:
        """Gradient of embedding_bag's per_sample_weights, mode "sum" -> [N], same dtype; 0 for other shards' ids."""

    def table_batched_embedding(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        zero_padding: bool,
        record: BoundsRecord | None,
    ) -> Tensor:
        """Sums and means of the batch's bags -> [B, sum D]; where it is not pooled, each id's row -> [N, D].

        weight is the tables' buffer, contiguous. Each table's padding takes no part in its bags; a row of its
        own is zero if zero_padding says so. Positions in no bag give rows of zeros. Columns of a
        max table take the values at the batch's `max_positions`. Where the batch's shape names an `output_dtype`, the
        output has that, and gradients of it come in that; weight and its gradient have `table_dtype`.
        """

    def table_batched_embedding_max(
        self,
        weight: Tensor,
        batch: TableBatch,
        with_argmax: bool,
        record: BoundsRecord | None,
    ) -> tuple[Tensor, Tensor]:
        """The same for a batch of pooled tables, some of mode "max" -> (output, argmax): its `max_positions`.

        Columns of sum and mean tables are unspecified in the second, which is empty unless with_argmax. The first
        of equals wins; NaN wins where it comes first, and nowhere else.
        """

    def table_batched_embedding_dense_backward(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        weight_shape: tuple[int, ...],
        into: Tensor | None = None,
    ) -> Tensor:
        """Gradient of the tables' buffer from grad_output -> weight_shape; padding gets none. Or added to `into`."""

    def table_batched_embedding_sample_weights_backward(
        self, grad_output: Tensor, weight: Tensor, batch: TableBatch
    ) -> Tensor:
        """Gradient of table_batched_embedding's per_sample_weights, for sums -> [N], of weight's dtype."""

    def take_rows(
        self, weight: Tensor, indices: Tensor, dtype: torch.dtype, record: BoundsRecord | None
    ) -> Tensor:
        """weight[indices] with Keras's rules, rounded to dtype -> [..., D].

        Ids are of a dtype in `dtypes.KERAS_IDS`; they are cut to integers, and count from the end where
        they are negative. Which dtypes convert, `ops.take.converts` says.
        """

    def dequantize_rows(
        self,
        table: QuantizedTable,
        indices: Tensor,
        dtype: torch.dtype,
        record: BoundsRecord | None,
    ) -> Tensor:
        """`take_rows` of what a quantized table stands for; rows that no id names are not dequantized."""

    def table_row_update_(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        entries: TableEntries,
        rows: Tensor | None,
    ) -> None:
        """`row_update_` for tables of different widths in one buffer, all at once.

        weight [elements] is the buffer, or part of it that the entries' fields describe; state is of its shape,
        or [entries.num_rows] where the formula keeps a number a row. A row's D is its own table's.
        """
