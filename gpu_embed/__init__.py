"""Embedding tables for GPUs: drop-in torch.nn.Embedding and EmbeddingBag on hand-written kernels."""

from . import backends, functional, optim, reference
from .accumulate import accumulate_in_place
from .backends import available_backends, use_backend
from .backends._plan.gather import use_gather_method
from .backends._plan.gradient_method import use_gradient_method
from .bounds import check_bounds, set_bounds_check
from .nn import Embedding, EmbeddingBag, TableBatchedEmbedding, TableBatchedEmbeddingBag
from .swap.aten_override import override_aten
from .swap.replacement import replace_embeddings, restore_embeddings
from .tables.gradient import TableGradient
from .tables.inputs import batch_bags, batch_padded

__all__ = [
    "Embedding",
    "EmbeddingBag",
    "TableBatchedEmbedding",
    "TableBatchedEmbeddingBag",
    "TableGradient",
    "accumulate_in_place",
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
