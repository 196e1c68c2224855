"""The torch backend: torch's own operators behind the `Backend` protocol."""

from .backend import TorchBackend

__all__ = ["TorchBackend"]
