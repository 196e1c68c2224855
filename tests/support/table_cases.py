"""Batched tables, their ids, and what torch.nn.EmbeddingBag makes of them table by table."""

from typing import NamedTuple

import torch
from torch import Tensor

import gpu_embed

# (num_embeddings, embedding_dim) of each table.
TABLES = {
    "uniform": [(7, 4), (3, 4), (5, 4)],
    "mixed": [(7, 4), (3, 12), (5, 8)],
    "odd": [(4, 3), (1, 5)],
    "one": [(6, 3)],
    "wide": [(3, 132), (2, 260)],
    "one column": [(2, 1), (3, 1)],
}
# Means of so many integers are exact in every dtype.
LENGTHS = (0, 1, 2, 4)


class Result(NamedTuple):
    """What a layer computes: its output, and the gradients of each table and of the weights."""

    output: Tensor
    tables: list[Tensor]
    per_sample_weights: Tensor | None


def integers(*shape: int, seed: int = 0, low: int = -2, high: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(low, high, shape, generator=generator)


def integer_layer(
    sizes: object, device: str = "cpu", dtype: torch.dtype = torch.float32, **arguments: object
) -> gpu_embed.TableBatchedEmbeddingBag:
    """A layer of small integers."""
    layer = gpu_embed.TableBatchedEmbeddingBag(sizes, **arguments, device=device, dtype=dtype)
    with torch.no_grad():
        for number, name in enumerate(layer):
            layer[name].copy_(integers(*layer[name].shape, seed=number, low=-4, high=5))
    return layer


def random_input(
    layer: gpu_embed.TableBatchedEmbeddingBag, num_bags: int, dtype: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor]:
    """Ids and offsets of so many bags a table, every length of LENGTHS among them."""
    num_tables = len(layer)
    lengths = torch.tensor(LENGTHS)[integers(num_tables * num_bags, low=0, high=4)]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ids = [torch.zeros(0, dtype=torch.int64)]
    for number, rows in enumerate(layer.layout.num_embeddings):
        begin, end = offsets[number * num_bags], offsets[(number + 1) * num_bags]
        ids.append(integers(int(end - begin), seed=number, low=0, high=rows))
    device = layer.weight.device
    return torch.cat(ids).to(device, dtype), offsets.to(device, dtype)


def by_layer(
    layer: gpu_embed.TableBatchedEmbeddingBag,
    ids: Tensor,
    offsets: Tensor,
    grad_output: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Result:
    """The layer's own answer."""
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.detach().clone().requires_grad_()
    output = layer(ids, offsets, per_sample_weights)
    layer.weight.grad = None
    output.backward(gradient_like(output) if grad_output is None else grad_output)
    grad = layer.weight.grad
    if grad.is_sparse:
        grad = grad.to_dense()
    tables = [layer.layout.view(grad, number) for number in range(len(layer))]
    return Result(
        output.detach(), tables, None if per_sample_weights is None else per_sample_weights.grad
    )


def by_torch(
    layer: gpu_embed.TableBatchedEmbeddingBag,
    ids: Tensor,
    offsets: Tensor,
    grad_output: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Result:
    """torch.nn.EmbeddingBag's answer, one table after the other, on the CPU in fp64, then rounded."""
    kind = layer.weight.detach()
    ids, offsets = ids.cpu().long(), offsets.cpu().long()
    num_bags = (len(offsets) - 1) // len(layer)
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.detach().cpu().double().requires_grad_()
    outputs, weights = [], []
    for number, module in enumerate(layer.to_modules().cpu().double().values()):
        begins = offsets[number * num_bags : (number + 1) * num_bags + 1]
        place = slice(int(begins[0]), int(begins[-1]))
        weights.append(module.weight)
        outputs.append(
            torch.nn.functional.embedding_bag(
                ids[place],
                module.weight,
                begins - begins[0],
                mode=module.mode,
                per_sample_weights=None
                if per_sample_weights is None
                else per_sample_weights[place],
                include_last_offset=True,
                padding_idx=module.padding_idx,
            )
        )
    output = torch.cat(outputs, 1)
    if grad_output is None:
        grad_output = gradient_like(output)
    output.backward(grad_output.cpu().double())
    return Result(
        output.detach().to(kind),
        [torch.zeros_like(w).to(kind) if w.grad is None else w.grad.to(kind) for w in weights],
        None if per_sample_weights is None else per_sample_weights.grad.to(kind),
    )


def gradient_like(output: Tensor) -> Tensor:
    """Integers in [-2, 2], multiplied by 4 so that quarters of them are whole."""
    return 4 * integers(*output.shape).to(output)


def assert_same(actual: Result, expected: Result) -> None:
    assert torch.equal(actual.output, expected.output)
    for table, (one, other) in enumerate(zip(actual.tables, expected.tables, strict=True)):
        assert torch.equal(one, other), f"table {table}"
    if expected.per_sample_weights is not None:
        assert torch.equal(actual.per_sample_weights, expected.per_sample_weights)
