"""Optimizers that read and write only the rows a step has used, from the gradients of `sparse=True`."""

from .adagrad import Adagrad, RowWiseAdagrad
from .adam import Adam, AdamW
from .clip_grad import clip_grad_norm_
from .in_backward import UpdatesInBackward, apply_in_backward
from .row_optimizer import RowOptimizer
from .sgd import SGD

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "RowOptimizer",
    "RowWiseAdagrad",
    "UpdatesInBackward",
    "apply_in_backward",
    "clip_grad_norm_",
]
