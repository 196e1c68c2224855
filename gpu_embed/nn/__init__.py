"""The layers: what a model holds. Each has a table, or many, and hands every call to `gpu_embed.functional`."""

from .embedding import Embedding, EmbeddingBag
from .tables import TableBatchedEmbedding, TableBatchedEmbeddingBag

__all__ = ["Embedding", "EmbeddingBag", "TableBatchedEmbedding", "TableBatchedEmbeddingBag"]
