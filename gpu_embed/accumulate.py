"""Gradient accumulation without a second gradient: see `accumulate_in_place`."""

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from .nn import Embedding, EmbeddingBag
from .nn.tables import BatchedTables
from .ops.in_place import Handle


class AccumulationHandle(Handle):
    """What `accumulate_in_place` returns: `remove()` ends it, and so does the end of a `with` block."""

    def __enter__(self) -> "AccumulationHandle":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def accumulate_in_place(
    module_or_parameters: torch.nn.Module | Tensor | Iterable[Tensor],
) -> AccumulationHandle:
    """Add gradients of lookups to the `.grad` that is there, instead of making one of the table's size for each.

    In gradient accumulation every micro-step but the first finds a `.grad`. Then autograd makes a gradient of the
    table's size, nearly all zeros, and adds all of it. From here on only the rows that the ids name are read and
    written. `.grad` is the same tensor with the same values: each row is summed in fp32 (fp64 for fp64), added, and
    rounded once.

    Served are `Embedding`, `EmbeddingBag` and the batched tables with `sparse=False`, on every backend, and the
    functions behind them. `.grad` has the table's dtype, or is fp32 beside a 16-bit table (`Parameter.grad_dtype`).
    Where somebody could tell the difference, the gradient is made as before: no `.grad` yet, a sparse one or one with a
    graph, `create_graph=True`, `torch.autograd.grad`, hooks on the tensor (`register_hook`), a weight that is not the
    parameter itself (`weight * 2`, `torch.func`), complex tables, `torch.compile`, `detect_anomaly`, DTensor.
    Post-accumulate hooks run as before, and so does `DistributedDataParallel`. Hooks on autograd's nodes, of the lookup
    and of the parameter (`AccumulateGrad`), get None as the gradient. Two threads may run backward through one table at
    once if neither uses it in another operator.

    A table that is also the head of a model gains from the second micro-step on: at the first one autograd waits for
    both gradients.

    A table of few rows gains little time, and with few ids none: its whole gradient is made in less than it takes to
    decide and to find the rows.

    The mark is on the parameter, as a hook is. It stays when the module moves or loads a state_dict, and is in no deep
    copy and no file. Where torch puts another parameter in its place, mark that one: `to_empty()` of a module on the
    meta device and `load_state_dict(assign=True)` do so. The handle keeps no parameter alive, and need not be kept.

    Args:
        module_or_parameters: a module, whose layers of this package are meant, frozen ones included and those with
            `sparse=True` left out; or one parameter, or several.

    Returns:
        A handle: `handle.remove()` ends it, also at the end of a `with` block. Marks of other handles stay.

    Raises:
        TypeError: not a module, a tensor, or an iterable of tensors.
        ValueError: a module without such a layer, no parameter, or a tensor that is no leaf.

    Example::

        gpu_embed.accumulate_in_place(model)
        for micro_batch in micro_batches:
            loss(model(micro_batch)).backward()  # from the second on, no gradient of the table's size
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # True: the next micro-step makes a new one
    """
    if isinstance(module_or_parameters, torch.nn.Module):
        return AccumulationHandle(_tables_of(module_or_parameters))
    return AccumulationHandle(_leaves(module_or_parameters))


def _tables_of(module: torch.nn.Module) -> list[Tensor]:
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, (Embedding, EmbeddingBag, BatchedTables)) and not layer.sparse
    ]
    # A layer may hold a weight that is computed from another, which has no `.grad`.
    weights = [layer._parameters.get("weight") for layer in layers]
    tables: list[Tensor] = [weight for weight in weights if weight is not None]
    if not tables:
        raise ValueError(
            f"accumulate_in_place: {type(module).__name__} holds no layer of gpu_embed with a dense gradient: an "
            "Embedding, an EmbeddingBag or batched tables. Layers with sparse=True need none, as their gradients have "
            "the rows of the batch alone. gpu_embed.replace_embeddings(model) puts layers in the place of torch's. Of "
            "another layer that looks up by gpu_embed give the parameters themselves"
        )
    return tables


def _leaves(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    if not isinstance(parameters, Iterable):
        raise TypeError(
            "accumulate_in_place: expected a module, a parameter or an iterable of parameters, got "
            f"{type(parameters).__name__}"
        )
    leaves = []
    for number, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"accumulate_in_place: expected parameters, got {type(parameter).__name__} at position {number}; give "
                "the model itself, or model.parameters()"
            )
        if parameter.grad_fn is not None:
            raise ValueError(
                f"accumulate_in_place: the tensor {list(parameter.shape)} at position {number} is no leaf but the "
                f"output of {parameter.grad_fn.name()}, and has no .grad; name the parameter that it is computed from"
            )
        leaves.append(parameter)
    if not leaves:
        raise ValueError("accumulate_in_place: got no parameters")
    return leaves
