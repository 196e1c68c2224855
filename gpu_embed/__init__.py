"""Embedding tables for GPUs: drop-in torch.nn.Embedding and EmbeddingBag on hand-written kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import backends, functional
from .backends import available_backends, use_backend
from .backends._plan.gather import use_gather_method
from .backends._plan.gradient_method import use_gradient_method
from .bounds import check_bounds, set_bounds_check
from .nn import (
    Embedding,
    EmbeddingBag,
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    QuantizedTableBatchedEmbedding,
    QuantizedTableBatchedEmbeddingBag,
    TableBatchedEmbedding,
    TableBatchedEmbeddingBag,
)
from .tables.gradient import TableGradient
from .tables.inputs import batch_bags, batch_padded

if TYPE_CHECKING:
    from . import distributed, optim, reference
    from .accumulate import accumulate_in_place
    from .swap.aten_override import override_aten
    from .swap.replacement import replace_embeddings, restore_embeddings

__all__ = [
    "Embedding",
    "EmbeddingBag",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedTableBatchedEmbedding",
    "QuantizedTableBatchedEmbeddingBag",
    "TableBatchedEmbedding",
    "TableBatchedEmbeddingBag",
    "TableGradient",
    "accumulate_in_place",
    "available_backends",
    "backends",
    "batch_bags",
    "batch_padded",
    "check_bounds",
    "distributed",
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

# Loaded when they are first asked for: a lookup needs none of them. By the module that has them, or is them.
_LATE = {
    "accumulate_in_place": "accumulate",
    "distributed": "distributed",
    "optim": "optim",
    "override_aten": "swap.aten_override",
    "reference": "reference",
    "replace_embeddings": "swap.replacement",
    "restore_embeddings": "swap.replacement",
    "swap": "swap",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_LATE[name]}", __name__)
    found = globals()[name] = module if _LATE[name] == name else getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
