"""In a graph, the sparse gradients of one table are joined, not added.

Autograd adds the gradients of all that reads a table. In a graph that becomes an addition of sparse tensors, for which
Inductor generates code that fails: it takes the sum of two sparse tensors for a dense one. So where a tracer records
lookups, each hands the table on to the next, and their gradients come back along that chain. Each link puts the
entries of its own lookup in front of those of the later ones, as the addition of sparse tensors does.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# The attributes of a traced table, a weak reference to what its next lookup takes, and of a traced gradient, its parts.
_REST = "_gpu_embed_rest"
_PARTS = "_gpu_embed_parts"


def is_traced(tensor: Tensor) -> bool:
    """Whether it stands for the data of a later call: tracers have classes of their own."""
    return type(tensor) not in (Tensor, torch.nn.Parameter)


def sparse_tensor(parts: Sequence[tuple[Tensor, Tensor]], size: Sequence[int]) -> Tensor:
    """A COO tensor of the entries in `parts`, ids [N] and values [N, D], one after the other; not coalesced."""
    ids, values = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    gradient = torch.sparse_coo_tensor(
        ids[None], values, size, device=values.device, check_invariants=False
    )
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
    def backward(ctx: Any, own: Tensor | None, later: Tensor | None) -> Tensor | None:
        if own is None or later is None:
            return later if own is None else own
        own_parts, later_parts = getattr(own, _PARTS, None), getattr(later, _PARTS, None)
        if own_parts is None or later_parts is None:
            return own + later
        return sparse_tensor([*own_parts, *later_parts], own.shape)


def linked(function: type[Any]) -> Callable[..., Any]:
    """What applies an autograd function of (run, weight, ...) as a link of the chain of this table's lookups."""

    class Linked(function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, table: tuple[Callable[..., Any], Tensor], _: Tensor, *inputs: Any) -> Any:
            # The graph reads the table itself: what it gets from a link is there for the way of the gradient.
            run, weight = table
            return function.forward(ctx, run, weight, *inputs)

    def apply(run: Callable[..., Any], weight: Tensor, *inputs: Any) -> Any:
        rest = getattr(weight, _REST, lambda: None)()
        own, rest = _Link.apply(weight if rest is None else rest)
        outputs = Linked.apply((run, weight), own, *inputs)
        # The lookup's node holds the next link. From the table it would be a circle that nobody collects.
        node = (outputs[0] if isinstance(outputs, tuple) else outputs).grad_fn
        setattr(node, _REST, rest)
        setattr(weight, _REST, weakref.ref(rest))
        return outputs

    return apply
