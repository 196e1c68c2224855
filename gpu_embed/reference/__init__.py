"""What correct means: the operations in NumPy, for reading and for checking the kernels.

Arrays are float32 or float64 (16-bit tables are widened by the caller); sums are taken in float64 and
rounded once on return. Ids outside [0, num_embeddings) read as zeros and contribute nothing.
"""

from .bag import (
    embedding_bag,
    embedding_bag_dense_backward,
    embedding_bag_max,
    embedding_bag_sample_weights_backward,
)
from .lookup import embedding, embedding_counts, embedding_dense_backward
from .renorm import embedding_renorm
from .tables import (
    table_batched_embedding,
    table_batched_embedding_dense_backward,
    table_batched_embedding_max,
    table_batched_embedding_sample_weights_backward,
)
from .take import dequantize_fused_rows, dequantize_rows, take_rows
from .update import row_update

__all__ = [
    "dequantize_fused_rows",
    "dequantize_rows",
    "embedding",
    "embedding_bag",
    "embedding_bag_dense_backward",
    "embedding_bag_max",
    "embedding_bag_sample_weights_backward",
    "embedding_counts",
    "embedding_dense_backward",
    "embedding_renorm",
    "row_update",
    "table_batched_embedding",
    "table_batched_embedding_dense_backward",
    "table_batched_embedding_max",
    "table_batched_embedding_sample_weights_backward",
    "take_rows",
]
