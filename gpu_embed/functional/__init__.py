"""torch.nn.functional's signatures on our kernels; every user error is raised here."""

from .bag import embedding_bag
from .lookup import embedding

__all__ = ["embedding", "embedding_bag"]
