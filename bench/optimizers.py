"""How a training step ends: the optimizers, and what each does by its own definition.

The settings are powers of two, and so are the corrections of Adam's first two steps: what differs from a
definition is then the optimizer and not the rounding of its settings.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import gpu_embed

LEARNING_RATE = 2.0**-10
BETAS = (1 - 2.0**-3, 1 - 2.0**-4)
# So large that it matters where a definition adds it.
EPS = 2.0**-10


@dataclass(frozen=True)
class Steps:
    """What the definitions see: the gradients of the rows [U] that some step uses, in fp64."""

    weight: Tensor  # [U, d] before the first step; d of the table's D columns
    grads: Sequence[Tensor]  # each step's gradient, [U, d]
    used: Sequence[Tensor]  # whether a step uses a row, bool [U, 1]
    mean_squares: Sequence[Tensor]  # of each step's gradient over all D columns, [U, 1]


@dataclass(frozen=True)
class Definition:
    """An optimizer: from steps to the weight after them, and the sum of the magnitudes subtracted from it."""

    name: str
    apply: Callable[[Steps], tuple[Tensor, Tensor]]


def _adam(steps: Steps, lazy: bool, corrected: bool) -> tuple[Tensor, Tensor]:
    """Adam.

    Args:
        lazy: rows without a gradient keep their weight and moments; else their moments decay and move them.
        corrected: eps stands beside the corrected root, else beside the uncorrected one.
    """
    weight, change = steps.weight, torch.zeros_like(steps.weight)
    # reach is what avg would be if nothing cancelled: rounding errors are in proportion to it.
    avg, reach, sq = (torch.zeros_like(weight) for _ in range(3))
    for number, (grad, used) in enumerate(zip(steps.grads, steps.used, strict=True), start=1):
        here = used if lazy else torch.ones_like(used)
        avg = torch.where(here, avg + (1 - BETAS[0]) * (grad - avg), avg)
        reach = torch.where(here, reach + (1 - BETAS[0]) * (grad.abs() - reach), reach)
        sq = torch.where(here, sq + (1 - BETAS[1]) * (grad * grad - sq), sq)
        correction = (1 - BETAS[1] ** number) ** 0.5
        root = sq.sqrt() / correction + EPS if corrected else (sq.sqrt() + EPS) / correction
        step_size = torch.where(here, LEARNING_RATE / (1 - BETAS[0] ** number) / root, 0.0)
        weight = weight - step_size * avg
        change = change + step_size * reach
    return weight, change


def _rowwise_adagrad(steps: Steps) -> tuple[Tensor, Tensor]:
    weight, change = steps.weight, torch.zeros_like(steps.weight)
    total = torch.zeros_like(steps.mean_squares[0])
    for grad, mean_square in zip(steps.grads, steps.mean_squares, strict=True):
        total = total + mean_square
        move = LEARNING_RATE * grad / (total.sqrt() + EPS)
        weight, change = weight - move, change + move.abs()
    return weight, change


ADAM = Definition("Adam of all rows", partial(_adam, lazy=False, corrected=True))
LAZY_ADAM = Definition("Adam of used rows", partial(_adam, lazy=True, corrected=True))
SPARSE_ADAM = Definition("SparseAdam", partial(_adam, lazy=True, corrected=False))
ROWWISE_ADAGRAD = Definition("row-wise Adagrad", _rowwise_adagrad)


@dataclass(frozen=True)
class Update:
    """How a provider ends a step."""

    run: Callable[[], object] | None  # None: the backward pass has done it
    definition: Definition | None = None  # None: SGD


def by_hand(leaves: Sequence[Tensor]) -> Update:
    """SGD on whatever gradient the backward pass leaves."""
    if len(leaves) > 1:
        # On a GPU in fewer launches than there are tables.
        return Update(torch.optim.SGD(leaves, LEARNING_RATE).step)
    (weight,) = leaves

    @torch.no_grad()
    def run() -> None:
        assert weight.grad is not None
        weight.add_(weight.grad, alpha=-LEARNING_RATE)

    return Update(run)


def by_torch(leaves: Sequence[Tensor], mode: str, sparse: bool) -> Update:
    """torch's optimizers on such a gradient; row-wise Adagrad, which torch lacks, in its operators."""
    if mode == "step_adam" and sparse:
        adam = torch.optim.SparseAdam(list(leaves), LEARNING_RATE, BETAS, EPS)
        return Update(adam.step, SPARSE_ADAM)
    if mode == "step_adam":
        fused = torch.optim.Adam(leaves, LEARNING_RATE, BETAS, EPS, fused=True)
        return Update(fused.step, ADAM)
    if mode == "step_rowwise_adagrad":
        return _rowwise_adagrad_of(leaves, _add_sparse_rows if sparse else _add_dense_rows)
    return by_hand(leaves)


def _rowwise_adagrad_of(
    leaves: Sequence[Tensor], add_rows: Callable[[Tensor, Tensor, Tensor], None]
) -> Update:
    totals = [weight.new_zeros(len(weight), 1) for weight in leaves]

    @torch.no_grad()
    def run() -> None:
        for weight, total in zip(leaves, totals, strict=True):
            assert weight.grad is not None
            add_rows(weight, weight.grad, total)

    return Update(run, ROWWISE_ADAGRAD)


def _add_dense_rows(weight: Tensor, grad: Tensor, total: Tensor) -> None:
    # The norm needs no second table for the squares.
    norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
    total.add_(norm.square_().div_(weight.shape[1]))
    weight.addcdiv_(grad, total.sqrt().add_(EPS), value=-LEARNING_RATE)


def _add_sparse_rows(weight: Tensor, grad: Tensor, total: Tensor) -> None:
    grad = grad.coalesce()
    rows, values = grad.indices()[0], grad.values()
    total.index_add_(0, rows, values.square().mean(1, keepdim=True))
    weight.index_add_(0, rows, values / (total[rows].sqrt_().add_(EPS)), alpha=-LEARNING_RATE)


OURS: dict[str, tuple[Callable[..., gpu_embed.optim.RowOptimizer], Definition | None]] = {
    "step": (gpu_embed.optim.SGD, None),
    "step_adam": (partial(gpu_embed.optim.Adam, betas=BETAS, eps=EPS), SPARSE_ADAM),
    "step_rowwise_adagrad": (partial(gpu_embed.optim.RowWiseAdagrad, eps=EPS), ROWWISE_ADAGRAD),
}


def ours(leaves: Sequence[Tensor], mode: str, in_backward: bool) -> Update:
    """`gpu_embed.optim` on a sparse gradient: as a step, or inside the backward pass."""
    optimizer, definition = OURS[mode]
    if in_backward:
        updates = gpu_embed.optim.apply_in_backward(leaves, optimizer, lr=LEARNING_RATE)
        update = Update(None, definition)
        # A hook that knows its tensor holds it, and the optimizer's state, for ever: torch sees no such cycle.
        weakref.finalize(update, updates.remove)
        return update
    return Update(optimizer(leaves, lr=LEARNING_RATE).step, definition)
