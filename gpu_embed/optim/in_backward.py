"""Optimizer steps inside the backward pass, so that no gradient outlives its own table's turn."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..row_parameter import whole_of
from ..table_nn import BatchedTables
from .row_optimizer import Params, RowOptimizer


class UpdatesInBackward:
    """What `apply_in_backward` returns.

    Attributes:
        optimizer: whose state_dict, param_groups and lr are those of the updates. Its `step()` finds no
            gradient and does nothing, so a training loop may keep the call.
    """

    def __init__(self, optimizer: RowOptimizer, hooks: list[RemovableHandle]) -> None:
        self.optimizer = optimizer
        self._hooks = hooks

    def remove(self) -> None:
        """From here on gradients are kept in `.grad` again, and nothing is updated in backward."""
        for hook in self._hooks:
            hook.remove()


def apply_in_backward(
    params_or_module: torch.nn.Module | Params,
    optimizer_class: Callable[..., RowOptimizer],
    **arguments: Any,
) -> UpdatesInBackward:
    """Update tables in the backward pass, as soon as their gradient is there, and free it at once.

    `.grad` stays None, so the gradients of many tables never exist at the same time. Each call of
    `backward()` is one update of each table it reaches: several lookups of one table under it are summed first,
    as autograd sums them.

    Gradients cannot be accumulated over several backwards, as each is applied when it comes: a backward that
    finds something in `.grad` raises. For the same reason a gradient cannot be clipped or unscaled first.

    Args:
        params_or_module: tables, or param groups of them; or a module, of which every Embedding and EmbeddingBag
            with sparse=True (torch's or ours, batched ones too) is taken, and no other parameter.
        optimizer_class: one of this package's, `RowWiseAdagrad` for one.
        arguments: what the class takes beside the parameters.

    Raises:
        ValueError: the module has no such table, a table does not require a gradient, or the optimizer refuses
            an argument.
        TypeError: the class is none of this package's.
        RuntimeError: a table is updated in backward already; or, now or in a backward, `.grad` already holds a
            gradient; in a backward, if the gradient is dense.

    Example::

        updates = gpu_embed.optim.apply_in_backward(model, gpu_embed.optim.RowWiseAdagrad, lr=0.05)
        model(ids).sum().backward()  # the tables have changed
        torch.save(updates.optimizer.state_dict(), "tables.pt")
    """
    params: Any = params_or_module
    if isinstance(params_or_module, torch.nn.Module):
        params = _sparse_tables(params_or_module)
        if not params:
            raise ValueError(
                "apply_in_backward: the module has no Embedding or EmbeddingBag with sparse=True "
                "whose weight requires a gradient"
            )
    optimizer = optimizer_class(params, **arguments)
    if not isinstance(optimizer, RowOptimizer):
        raise TypeError(
            "apply_in_backward takes an optimizer of gpu_embed.optim, which reads a table's sparse gradient as it "
            f"is, not {type(optimizer).__module__}.{type(optimizer).__qualname__}"
        )
    parts: dict[Tensor, list[tuple[dict[str, Any], Tensor]]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            parts.setdefault(whole_of(param), []).append((group, param))
    # All are looked at before the first is changed.
    for whole in parts:
        _check_table(whole)
    hooks: list[RemovableHandle] = []
    for whole, updated in parts.items():
        hooks += _TableUpdate(optimizer, whole, updated).hooks()
    return UpdatesInBackward(optimizer, hooks)


def _sparse_tables(module: torch.nn.Module) -> list[Tensor]:
    tables = [
        layer.weight
        for layer in module.modules()
        if isinstance(layer, torch.nn.Embedding | torch.nn.EmbeddingBag | BatchedTables)
        and layer.sparse
        and layer.weight.requires_grad
    ]
    return list(dict.fromkeys(tables))


def _check_table(param: Tensor) -> None:
    if not param.requires_grad:
        raise ValueError("apply_in_backward: a table does not require a gradient")
    if any(
        isinstance(getattr(hook, "__self__", None), _TableUpdate)
        for hook in (param._backward_hooks or {}).values()
    ):
        raise RuntimeError(
            "apply_in_backward: a table is updated in backward already; call remove() on what that call returned "
            "first"
        )
    _refuse_gradient(param)


class _TableUpdate:
    """Applies a table's gradient to each part of it that is to be updated, in that part's group."""

    def __init__(
        self,
        optimizer: RowOptimizer,
        whole: Tensor,
        updated: list[tuple[dict[str, Any], Tensor]],
    ) -> None:
        self.optimizer = optimizer
        self.whole = whole
        self.updated = updated

    def hooks(self) -> tuple[RemovableHandle, RemovableHandle]:
        # The garbage collector sees what the first hook holds, but not what the second one does: a table that
        # its own second hook holds would never be freed.
        apply = weakref.WeakMethod(self.apply)
        return (
            self.whole.register_hook(self.refuse),
            self.whole.register_post_accumulate_grad_hook(lambda _: apply()()),  # type: ignore[misc]
        )

    def refuse(self, _: Tensor) -> None:
        _refuse_gradient(self.whole)

    @torch.no_grad()
    def apply(self) -> None:
        grad, self.whole.grad = self.whole.grad, None
        assert grad is not None
        for group, param in self.updated:
            self.optimizer._update(group, param, grad)


def _refuse_gradient(param: Tensor) -> None:
    if param.grad is not None:
        raise RuntimeError(
            "apply_in_backward: .grad already holds a gradient, but gradients are applied in the backward that "
            "computes them and cannot be accumulated; set .grad to None first"
        )
