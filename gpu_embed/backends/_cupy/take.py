"""Launches of the lookups with Keras's rules."""

from torch import Tensor

from ...bounds import BoundsRecord, record_arguments
from ...dtypes import KERAS_IDS
from ...take import QuantizedTable
from .._plan.take import TakePlan, quantized_vector, taken_vector
from .device import FLOATS, CupyDevice
from .launch import MAX_SEGMENT_VECTOR
from .nvrtc import Kernel


class CupyTake(CupyDevice, TakePlan):
    """Lookups whose ids are cast and wrapped, and whose rows are converted."""

    def _take_rows(
        self, weight: Tensor, ids: Tensor, output: Tensor, record: BoundsRecord | None
    ) -> None:
        num_embeddings, embedding_dim = weight.shape
        vec = min(taken_vector(weight, output.element_size()), MAX_SEGMENT_VECTOR)
        arguments = f"{FLOATS[weight.dtype]}, {FLOATS[output.dtype]}, {vec}"
        self._launch(
            Kernel("take", f"take_rows_kernel<{arguments}>"),
            *self._launches[weight.device].take_rows.grid(ids.numel() * (embedding_dim // vec)),
            weight.device,
            weight,
            ids,
            output,
            *record_arguments(record),
            ids.numel(),
            num_embeddings,
            weight.stride(0) // vec,
            weight.stride(1),
            embedding_dim,
            KERAS_IDS.index(ids.dtype),
        )

    def _dequantize_rows(
        self, table: QuantizedTable, ids: Tensor, output: Tensor, record: BoundsRecord | None
    ) -> None:
        # The widest that two kinds of tables, and three of rows, are worth a kernel for; else one column.
        widest = dequantized_vector(output.element_size())
        vec = widest if quantized_vector(table, output.element_size()) >= widest else 1
        arguments = f"{FLOATS[table.scale.dtype]}, {FLOATS[output.dtype]}, {vec}, {table.bits}"
        if table.fused:
            arguments += ", true"
        self._launch(
            Kernel("dequantize", f"dequantize_rows_kernel<{arguments}>"),
            *self._launches[output.device].dequantize_rows.grid(
                ids.numel() * (table.embedding_dim // vec)
            ),
            output.device,
            table.values,
            table.scale,
            table.zero,
            ids,
            output,
            *record_arguments(record),
            ids.numel(),
            table.values.shape[0],
            table.embedding_dim,
            table.group_size,
            KERAS_IDS.index(ids.dtype),
        )


def dequantized_vector(itemsize: int) -> int:
    """Columns a thread where the rows allow it: 16 bytes of the output, and four at the most."""
    return min(16 // itemsize, MAX_SEGMENT_VECTOR)
