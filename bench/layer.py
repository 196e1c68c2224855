"""What a provider builds on the tables of a cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .optimizers import Update


@dataclass(frozen=True)
class Order:
    """Which rows a lookup hands out where. Checks and gradients know them table by table, [rows, D]."""

    gathered: Callable[[tuple[Tensor, ...], int], Tensor]  # outputs, number of tables -> [rows, D]
    handed_out: Callable[[Tensor, int], tuple[Tensor, ...]]  # the reverse


def _from_columns(outputs: tuple[Tensor, ...], tables: int) -> Tensor:
    (output,) = outputs  # [B, T * D]
    return output.unflatten(1, (tables, -1)).transpose(0, 1).flatten(0, 1)


def padded(rows: Tensor, width: int) -> Tensor:
    """With columns of zeros up to a width."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


def _to_columns(rows: Tensor, tables: int) -> tuple[Tensor, ...]:
    return (rows.unflatten(0, (tables, -1)).transpose(0, 1).flatten(1, 2),)


# One tensor of all rows; one for each table; one in which the tables lie side by side, [B, T * D].
ONE_UNDER_ANOTHER = Order(lambda outputs, tables: outputs[0], lambda rows, tables: (rows,))
APART = Order(lambda outputs, tables: torch.cat(outputs), lambda rows, tables: rows.chunk(tables))
SIDE_BY_SIDE = Order(_from_columns, _to_columns)


def side_by_side(widths: Sequence[int]) -> Order:
    """`SIDE_BY_SIDE` of tables of these widths; what is gathered is as wide as the widest."""
    if len(set(widths)) == 1:
        return SIDE_BY_SIDE

    def gathered(outputs: tuple[Tensor, ...], tables: int) -> Tensor:
        (output,) = outputs
        return torch.cat([padded(part, max(widths)) for part in output.split(list(widths), 1)])

    def handed_out(rows: Tensor, tables: int) -> tuple[Tensor, ...]:
        parts = zip(rows.chunk(tables), widths, strict=True)
        return (torch.cat([part[:, :width] for part, width in parts], 1),)

    return Order(gathered, handed_out)


def _one_under_another(gradients: Sequence[Tensor]) -> Tensor:
    return gradients[0] if len(gradients) == 1 else torch.cat(tuple(gradients))


@dataclass(frozen=True)
class Layer:
    """A lookup, its tables, and how a training step ends."""

    # Ids of one table [N], or bags [B, L]; of T tables [T, N], [T, B, L]. Differentiable; one tensor or several.
    lookup: Callable[[Tensor], Any]
    weight: Tensor  # as many elements as the tables one under another, [T * V, D]
    update: Update | None = None  # how a step ends; None: SGD on the gradient
    parts: tuple[Tensor, ...] = ()  # views of `weight`: the leaves, where each table is one
    order: Order = ONE_UNDER_ANOTHER
    # Those of the leaves -> as many elements as `weight`, a copy where there are several.
    gathered_gradients: Callable[[Sequence[Tensor]], Tensor] = _one_under_another

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Whom the gradient belongs to."""
        return self.parts or (self.weight,)

    def outputs(self, ids: Tensor) -> tuple[Tensor, ...]:
        output = self.lookup(ids)
        return output if isinstance(output, tuple) else (output,)
