"""torch.nn.functional's signatures on our kernels; every user error is raised here."""

from .lookup import embedding, embedding_bag

__all__ = ["embedding", "embedding_bag"]
