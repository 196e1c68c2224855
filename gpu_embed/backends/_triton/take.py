"""Launches of the lookups with Keras's rules."""

from torch import Tensor

from ...bounds import BoundsRecord, record_arguments
from ...take import QuantizedTable
from .._plan.access import cdiv
from .._plan.take import TakePlan, quantized_vector, taken_vector
from .device import TritonDevice


class TritonTake(TritonDevice, TakePlan):
    """Lookups whose ids are cast and wrapped, and whose rows are converted."""

    def _take_rows(
        self, weight: Tensor, ids: Tensor, output: Tensor, record: BoundsRecord | None
    ) -> None:
        num_embeddings, embedding_dim = weight.shape
        vec = taken_vector(weight, output.element_size())
        launch = self._launches[weight.device].take_rows
        self._launch(
            self._kernels.take_rows,
            (cdiv(ids.numel() * (embedding_dim // vec), launch.BLOCK),),
            weight.device,
            weight,
            ids,
            output,
            *record_arguments(record),
            ids.numel(),
            num_embeddings,
            weight.stride(0) // vec,
            weight.stride(1),
            D=embedding_dim,
            VEC=vec,
            **launch.settings,
        )

    def _dequantize_rows(
        self, table: QuantizedTable, ids: Tensor, output: Tensor, record: BoundsRecord | None
    ) -> None:
        vec = quantized_vector(table, output.element_size())
        launch = self._launches[output.device].dequantize_rows
        self._launch(
            self._kernels.dequantize_rows,
            (cdiv(ids.numel() * (table.embedding_dim // vec), launch.BLOCK),),
            output.device,
            table.values,
            table.scale,
            table.zero,
            ids,
            output,
            *record_arguments(record),
            ids.numel(),
            table.values.shape[0],
            D=table.embedding_dim,
            GROUP=table.group_size,
            BITS=table.bits,
            FUSED=table.fused,
            VEC=vec,
            **launch.settings,
        )
