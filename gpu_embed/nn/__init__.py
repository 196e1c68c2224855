"""The layers: what a model holds. Each has a table, or many, and hands every call to `gpu_embed.functional`."""

from . import opacus_rules
from .bag import EmbeddingBag
from .embedding import Embedding
from .quantized import QuantizedEmbedding, QuantizedEmbeddingBag
from .quantized_tables import QuantizedTableBatchedEmbedding, QuantizedTableBatchedEmbeddingBag
from .tables import TableBatchedEmbedding, TableBatchedEmbeddingBag

__all__ = [
    "Embedding",
    "EmbeddingBag",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedTableBatchedEmbedding",
    "QuantizedTableBatchedEmbeddingBag",
    "TableBatchedEmbedding",
    "TableBatchedEmbeddingBag",
]

opacus_rules.register_once_imported(Embedding, EmbeddingBag)
