"""Optimizer steps inside the backward pass, so that no gradient outlives its own table's turn."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .row_optimizer import RowOptimizer


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
    params_or_module: torch.nn.Module | Iterable[Tensor],
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
        params_or_module: tables; or a module, of which every Embedding and EmbeddingBag with sparse=True
            (torch's or ours) is taken, and no other parameter.
        optimizer_class: one of this package's, `RowWiseAdagrad` for one.
        arguments: what the class takes beside the parameters.

    Raises:
        ValueError: the module has no such table, or the optimizer refuses an argument.
        RuntimeError: now or in a backward, if `.grad` already holds a gradient; in a backward, if the
            gradient is dense.

    Example::

        updates = gpu_embed.optim.apply_in_backward(model, gpu_embed.optim.RowWiseAdagrad, lr=0.05)
        model(ids).sum().backward()  # the tables have changed
        torch.save(updates.optimizer.state_dict(), "tables.pt")
    """
    if isinstance(params_or_module, torch.nn.Module):
        params = _sparse_tables(params_or_module)
        if not params:
            raise ValueError(
                "apply_in_backward: the module has no Embedding or EmbeddingBag with sparse=True "
                "whose weight requires a gradient"
            )
    else:
        params = list(params_or_module)
    optimizer = optimizer_class(params, **arguments)
    hooks: list[RemovableHandle] = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            _refuse_gradient(param)
            hooks += _hook(optimizer, group, param)
    return UpdatesInBackward(optimizer, hooks)


def _sparse_tables(module: torch.nn.Module) -> list[Tensor]:
    tables = [
        layer.weight
        for layer in module.modules()
        if isinstance(layer, torch.nn.Embedding | torch.nn.EmbeddingBag)
        and layer.sparse
        and layer.weight.requires_grad
    ]
    return list(dict.fromkeys(tables))


def _hook(
    optimizer: RowOptimizer, group: dict[str, Any], param: Tensor
) -> tuple[RemovableHandle, RemovableHandle]:
    @torch.no_grad()
    def update(param: Tensor) -> None:
        grad, param.grad = param.grad, None
        assert grad is not None
        optimizer._update(group, param, grad)

    return (
        param.register_hook(lambda _: _refuse_gradient(param)),
        param.register_post_accumulate_grad_hook(update),
    )


def _refuse_gradient(param: Tensor) -> None:
    if param.grad is not None:
        raise RuntimeError(
            "apply_in_backward: .grad already holds a gradient, but gradients are applied in the backward that "
            "computes them and cannot be accumulated; set .grad to None first"
        )
