"""A model's loss and gradients, compared before and after a swap."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def run(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients; dropout draws the same numbers each time."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def gradient_bounds(
    model: nn.Module, batch: Mapping[str, Tensor], modules: Iterable[str]
) -> dict[str, Tensor]:
    """How far two gradients of these tables may lie apart that are summed in another order, each [V, D].

    A sum of n terms is off by up to (n - 1) / 2 epsilons of the sum of their sizes.
    """
    bounds: dict[str, Tensor] = {}

    def watch(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        ids = args[0]
        count = int(ids.unique(return_counts=True)[1].max())

        def add(grad: Tensor) -> None:
            sizes = torch.ops.aten.embedding_dense_backward(
                grad.abs(), ids, len(module.weight), -1, False
            )
            bounds[named[module]] = (count - 1) * torch.finfo(grad.dtype).eps * sizes

        output.register_hook(add)

    named = {model.get_submodule(name): f"{name}.weight" for name in modules}
    hooks = [module.register_forward_hook(watch) for module in named]
    run(model, batch)
    for hook in hooks:
        hook.remove()
    return bounds


def assert_same(
    actual: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    bounds: Mapping[str, Tensor],
) -> None:
    """The same loss and gradients, bit for bit but for those in `bounds`."""
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys() >= bounds.keys()
    for name, grad in expected[1].items():
        if name in bounds:
            assert ((actual[1][name] - grad).abs() <= bounds[name]).all(), name
        else:
            assert torch.equal(actual[1][name], grad), name
