"""Sparse gradients: the COO tensor that holds one, and what a graph needs so that Inductor's code for it is right.

Inductor knows nothing of sparse tensors, and two things go wrong with torch's own operators.

The memory of ids and values counts as free once the tensor of them is made, and later results are written there. So an
operator of ours makes the tensor, in memory of its own.

Autograd adds the gradients of all that reads a table, and the code of an addition of two sparse tensors fails. So where
a tracer records lookups, each hands the table on to the next, and their gradients come back along that chain: each link
puts the entries of its own lookup in front of those of the later ones, and adds nothing.
"""

import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .library import define

# The attributes of a traced table, a weak reference to what its next lookup takes, and of a traced gradient, its parts.
_REST = "_gpu_embed_rest"
_PARTS = "_gpu_embed_parts"


def is_traced(tensor: Tensor) -> bool:
    """Whether it stands for the data of a later call: what tracers hand to operators are classes of their own."""
    return type(tensor) not in (Tensor, torch.nn.Parameter)


def _sparse_gradient(
    indices: Sequence[Tensor], values: Sequence[Tensor], num_embeddings: int
) -> Tensor:
    """Copies, one part after the other."""
    ids, entries = torch.cat(tuple(indices)), torch.cat(tuple(values))
    size = (num_embeddings, entries.shape[1])
    return torch.sparse_coo_tensor(
        ids[None], entries, size, device=entries.device, check_invariants=False
    )


sparse_gradient = define(
    "sparse_gradient(Tensor[] indices, Tensor[] values, SymInt num_embeddings) -> Tensor",
    _sparse_gradient,
    _sparse_gradient,
)


def joined_gradient(parts: Sequence[tuple[Tensor, Tensor]], num_embeddings: int) -> Tensor:
    """The gradient [num_embeddings, D] with the entries of all parts: ids [N], int64, and values [N, D] each."""
    ids, values = zip(*parts, strict=True)
    gradient: Tensor = sparse_gradient(list(ids), list(values), num_embeddings)
    if is_traced(gradient):
        setattr(gradient, _PARTS, parts)
    return gradient


class _Link(torch.autograd.Function):
    """The same table twice: for one lookup, and for the rest of them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.detach(), weight.detach()

    @staticmethod
    def backward(ctx: Any, own: Tensor | None, rest: Tensor | None) -> Tensor | None:
        if own is None or rest is None:
            return rest if own is None else own
        own_parts, rest_parts = getattr(own, _PARTS, None), getattr(rest, _PARTS, None)
        if own_parts is None or rest_parts is None:
            return own + rest
        return joined_gradient([*own_parts, *rest_parts], own.shape[0])


def linked(function: type[Any]) -> Callable[..., Any]:
    """What applies an autograd function of (run, weight, ...) as a link of the chain of this table's lookups."""

    class Linked(function):
        @staticmethod
        def forward(
            ctx: Any, table: tuple[Callable[..., Any], Tensor], _: Tensor, *inputs: Any
        ) -> Any:
            # The graph reads the table itself: what it gets from a link is there for the way of the gradient.
            run, weight = table
            return function.forward(ctx, run, weight, *inputs)

    named: Any = types.new_class(function.__name__, (Linked,))

    def apply(run: Callable[..., Any], weight: Tensor, *inputs: Any) -> Any:
        rest = getattr(weight, _REST, lambda: None)()
        own, rest = _Link.apply(weight if rest is None else rest)
        outputs = named.apply((run, weight), own, *inputs)
        # The lookup's node holds the next link. From the table it would be a circle that nobody collects.
        node = (outputs[0] if isinstance(outputs, tuple) else outputs).grad_fn
        setattr(node, _REST, rest)
        setattr(weight, _REST, weakref.ref(rest))
        return outputs

    return apply
