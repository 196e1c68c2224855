"""Launches of the lookup kernels."""

from math import gcd

from torch import Tensor

from ...bounds import BoundsRecord
from ...settings import GATHER_METHOD
from ...shard import NO_SHARD, Shard
from .._plan.access import word_layout
from .._plan.gather import Gather, GatherPlan
from .device import CupyDevice, cpp_bool
from .launch import WIDEST_ROWS, RowsLaunch
from .nvrtc import Kernel


class CupyGather(CupyDevice, GatherPlan):
    """Lookups: rows, or a flat range."""

    def _prepare_gather(self, weight: Tensor, shard: Shard | None) -> Gather:
        layout = word_layout(weight)
        # Two words of 8 bytes that one access moves are a word of 16 here.
        word = f"word{layout.word_bytes * layout.vec}"
        row_words = layout.row_words // layout.vec
        device = weight.device
        launches = self._launches[device]
        flat, long_rows = launches.gather_flat, launches.gather_long_rows
        rows: RowsLaunch | None = launches.gather_rows.get(gcd(row_words, WIDEST_ROWS))
        if rows is None and row_words >= self._methods[device].gather.long_row_words:
            rows = long_rows
        method = GATHER_METHOD.value
        if method == "rows":
            rows = rows or long_rows
        elif method == "flat":
            rows = None
        is_shard = cpp_bool(shard is not None)
        if rows is not None:
            kernel = Kernel("gather", f"gather_rows_kernel<{word}, {rows.ROWS}, {is_shard}>")
        else:
            kernel = Kernel("gather", f"gather_flat_kernel<{word}, {flat.UNROLL}, {is_shard}>")
        # Not the table itself: what is prepared must not keep it alive.
        address = weight.data_ptr()
        num_embeddings = weight.shape[0]
        first_row, table_rows = shard or NO_SHARD

        def gather(
            ids: Tensor,
            num_indices: int,
            output: Tensor,
            zero_idx: int,
            record: BoundsRecord | None,
        ) -> None:
            self._launch(
                kernel,
                *(
                    flat.grid(num_indices * row_words)
                    if rows is None
                    else rows.grid(num_indices, row_words)
                ),
                device,
                address,
                ids,
                output,
                # Not record_arguments: the call that every lookup makes is worth two lines.
                None if record is None else record.words,
                None if record is None else record.flag,
                num_indices,
                num_embeddings,
                first_row,
                table_rows,
                zero_idx,
                layout.row_stride // layout.vec,
                layout.col_stride,
                row_words,
                ids.element_size(),
            )

        return gather
