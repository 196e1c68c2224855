"""Embedding tables for GPUs: drop-in torch.nn.Embedding and EmbeddingBag on hand-written kernels."""

from . import backends, functional, optim, reference
from .aten_override import override_aten
from .backends import available_backends, use_backend
from .backends.gather_method import use_gather_method
from .backends.gradient_method import use_gradient_method
from .bounds import check_bounds, set_bounds_check
from .nn import Embedding, EmbeddingBag
from .replacement import replace_embeddings, restore_embeddings
from .table_gradient import TableGradient
from .table_inputs import batch_bags, batch_padded
from .table_nn import TableBatchedEmbedding, TableBatchedEmbeddingBag

__all__ = [
    "Embedding",
    "EmbeddingBag",
    "TableBatchedEmbedding",
    "TableBatchedEmbeddingBag",
    "TableGradient",
    "available_backends",
    "backends",
    "batch_bags",
    "batch_padded",
    "check_bounds",
    "functional",
    "optim",
    "override_aten",
    "reference",
    "replace_embeddings",
    "restore_embeddings",
    "set_bounds_check",
    "use_backend",
    "use_gather_method",
    "use_gradient_method",
]
__version__ = "0.1.0"
