"""Optimizer steps inside the backward pass, so that no gradient outlives its own table's turn."""

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from ..dtypes import accumulation
from ..nn.tables import BatchedTables
from ..tables.gradient import TableGradient
from ..tables.parameter import parent_of
from .row_optimizer import Params, RowOptimizer
from .saved_state import sharding_of


class UpdatesInBackward:
    """What `apply_in_backward` returns.

    Attributes:
        optimizer: whose state_dict, param_groups and lr are those of the updates, and which a learning-rate
            scheduler takes. Its `step()` finds no gradient and does nothing, so a training loop may keep the call.
            Add no param group to it: its tables would not be updated in backward.

    A copy, or what is unpickled, has a copy of the optimizer and updates nothing.
    """

    def __init__(
        self,
        optimizer: RowOptimizer,
        tables: "list[_TableUpdate]",
        passes: "_Passes",
        hooks: list[RemovableHandle],
    ) -> None:
        self.optimizer = optimizer
        self._tables = tables
        self._passes = passes
        self._hooks = hooks

    def finish(self) -> None:
        """Apply what `micro_steps` has summed so far, and count from one again: for an epoch that k does not divide."""
        self._passes.count = 0
        self._passes.apply_held()

    def discard(self) -> None:
        """Drop what `micro_steps` has summed so far, and count from one again: after a backward that raised."""
        self._passes.count = 0
        for table in self._passes.live():
            table.held.clear()

    def __getstate__(self) -> dict[str, Any]:
        # The hooks are those of the tables that were given, and not of their copies.
        return {"optimizer": self.optimizer, "micro_steps": self._passes.micro_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer = state["optimizer"]
        self._tables, self._passes, self._hooks = [], _Passes(state["micro_steps"]), []

    def remove(self) -> None:
        """From here on gradients are kept in `.grad` again, and nothing is updated in backward.

        What `micro_steps` has summed and not applied yet is added to `.grad`, divided by the scaler's scale.
        """
        for hook in self._hooks:
            hook.remove()
        for table in self._tables:
            table.settle()
            table.give_back()


def apply_in_backward(
    params_or_module: torch.nn.Module | Params,
    optimizer_class: Callable[..., RowOptimizer],
    *,
    scaler: GradScaler | None = None,
    micro_steps: int = 1,
    **arguments: Any,
) -> UpdatesInBackward:
    """Update tables in the backward pass, as soon as their gradient is there, and free it at once.

    `.grad` stays None, so the gradients of many tables never exist at the same time. Each call of
    `backward()` is one update of each table it reaches: several lookups of one table under it are summed first,
    as autograd sums them. So two calls on one graph (`retain_graph=True`) are two updates. `torch.autograd.grad`
    updates nothing. A gradient cannot be clipped first.

    **Automatic mixed precision.** Without `scaler=`, a scaled loss updates the tables by scaled gradients, which
    nothing can notice. With it a gradient is divided by the scale, in fp32 (fp64 for fp64 tables). One that is not
    finite, or whose sums might not be, is dropped: weight, state and step number of its table stay, each table's
    for itself, and the scaler's next `update()` lowers the scale. Other optimizers are stepped or skipped by
    their own gradients, as ever. Nothing waits for the GPU, which is asked how the previous update went when the
    next one comes: until then, or a `state_dict()`, `optimizer.state` may count a dropped step.

    **Gradient accumulation.** Without `micro_steps=`, each backward is an update, which nothing can notice
    either. With `micro_steps=k` the gradients of k backwards are summed, as `.grad` would sum them, and applied in
    the k-th, also to tables that only earlier ones reached. After a backward that raised, `discard()` drops
    what it left. A backward that reaches none of the tables does not count. The sums are held apart from
    `.grad`, so `zero_grad()` does not drop them, and no `state_dict()` has them; `finish()` applies what there
    is, at the end of an epoch. With `scaler=`, each is divided by the scale of its own backward, and one that
    is not finite drops all k.

    Backwards of several threads must not reach one table at the same time.

    **What is refused.** Reentrant checkpoints read tables again in the middle of a backward: use
    `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`. The lookup itself raises where a layer
    of the given module makes it; for tables given as parameters the nested backward does, when those that are looked
    up outside of the checkpoint as well may have been updated. DistributedDataParallel averages
    gradients after they have been applied: call `step()` after the backward instead, which takes the sparse
    gradients it averages, or leave the tables out of it by `_ddp_params_and_buffers_to_ignore`, if replicas are to
    differ or are kept equal otherwise.

    Args:
        params_or_module: tables, or param groups of them; or a module, of which every Embedding and EmbeddingBag
            with sparse=True (torch's or ours, batched and sharded ones too) is taken, and no other parameter.
        optimizer_class: one of this package's, `RowWiseAdagrad` for one.
        scaler: that scales the loss. One that is not enabled changes nothing.
        micro_steps: how many backwards are one update.
        arguments: what the class takes beside the parameters.

    Raises:
        ValueError: the module has no such table, a table does not require a gradient, micro_steps is below 1, or
            the optimizer refuses an argument.
        TypeError: the class is none of this package's, the scaler none of torch's, or micro_steps no int.
        RuntimeError: a table is updated in backward already; or, now or in a backward, `.grad` already holds a
            gradient; in a backward, if the gradient is dense, or the loss was not scaled by the scaler; in a
            CUDA graph with a scaler; under a reentrant checkpoint; under DistributedDataParallel, now or in the
            first backward.

    Example::

        updates = gpu_embed.optim.apply_in_backward(model, gpu_embed.optim.RowWiseAdagrad, lr=0.05)
        model(ids).sum().backward()  # the tables have changed
        torch.save(updates.optimizer.state_dict(), "tables.pt")

    With a scaler, and four backwards an update::

        scaler = torch.amp.GradScaler()
        apply_in_backward(model, RowWiseAdagrad, lr=0.05, scaler=scaler, micro_steps=4)
        for number, batch in enumerate(batches, 1):
            scaler.scale(loss_of(model, batch) / 4).backward()
            if number % 4 == 0:
                scaler.step(dense_optimizer)
                scaler.update()
                dense_optimizer.zero_grad()
    """
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(
            f"apply_in_backward: scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}"
        )
    if not isinstance(micro_steps, int) or isinstance(micro_steps, bool):
        raise TypeError(f"apply_in_backward: micro_steps must be an int, got {micro_steps!r}")
    if micro_steps < 1:
        raise ValueError(f"apply_in_backward: micro_steps must be 1 or more, got {micro_steps}")
    params: Any = params_or_module
    layers: list[torch.nn.Module] = []
    if isinstance(params_or_module, torch.nn.Module):
        layers = _sparse_layers(params_or_module)
        params = list(dict.fromkeys(layer.weight for layer in layers))
        if not params:
            raise ValueError(
                "apply_in_backward: the module has no Embedding or EmbeddingBag with sparse=True whose weight requires "
                "a gradient; a layer that is there takes layer.sparse = True"
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
            parts.setdefault(parent_of(param), []).append((group, param))
    # All are looked at before the first is changed.
    for parent in parts:
        _check_table(parent)
        if scaler is not None and sharding_of(parent) is not None:
            raise ValueError(
                "apply_in_backward: scaler= looks for infinities in this rank's rows of a ShardedEmbedding alone, and "
                "the ranks' scales would part; call the optimizer's step() by a "
                "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler"
            )
    _refuse_ddp(list(parts))
    passes = _Passes(micro_steps)
    tables = [
        _TableUpdate(optimizer, parent, updated, scaler, passes)
        for parent, updated in parts.items()
    ]
    passes.tables = [weakref.ref(table) for table in tables]
    hooks: list[RemovableHandle] = []
    for table in tables:
        hooks += table.hooks()
    hooks += [layer.register_forward_pre_hook(_refuse_checkpoint) for layer in layers]
    if scaler is not None:
        hooks += _settle_before(optimizer, passes)
    return UpdatesInBackward(optimizer, tables, passes, hooks)


def _sparse_layers(module: torch.nn.Module) -> list[Any]:
    return [
        layer
        for layer in module.modules()
        if (
            isinstance(layer, torch.nn.Embedding | torch.nn.EmbeddingBag | BatchedTables)
            or sharding_of(getattr(layer, "weight", None)) is not None
        )
        and layer.sparse
        and layer.weight.requires_grad
    ]


def _check_table(param: Tensor) -> None:
    if not param.requires_grad:
        raise ValueError("apply_in_backward: a table does not require a gradient")
    if _is_updated(param):
        raise RuntimeError(
            "apply_in_backward: a table is updated in backward already; call remove() on what that call returned "
            "first"
        )
    _refuse_gradient(param)


def _is_updated(param: Tensor) -> bool:
    return any(
        isinstance(getattr(hook, "__self__", None), _TableUpdate)
        for hook in (param._backward_hooks or {}).values()
    )


class _Passes:
    """Counts the backward passes that reach a table, up to those of one update."""

    def __init__(self, micro_steps: int) -> None:
        self.micro_steps = micro_steps
        self.count = 0
        self.current = -1
        self.lock = threading.Lock()
        self.tables: list[weakref.ref[_TableUpdate]] = []
        self.knows_ddp = False

    def live(self) -> "Iterator[_TableUpdate]":
        return (table for ref in self.tables if (table := ref()) is not None)

    def is_last(self) -> bool:
        """Whether the pass that is running is the one that updates, where there are several."""
        running = torch._C._current_graph_task_id()
        # Each device has a thread of its own in backward.
        with self.lock:
            if running != self.current:
                self.current = running
                self.count = self.count % self.micro_steps + 1
                if self.count == self.micro_steps:
                    torch.autograd.Variable._execution_engine.queue_callback(self.apply_held)
            return self.count == self.micro_steps

    def refuse_ddp(self) -> None:
        """Once, in the first backward, as a module may be wrapped after its tables were given."""
        _refuse_ddp([table.parent for table in self.live()])
        self.knows_ddp = True

    def apply_held(self) -> None:
        """Update the tables that earlier passes reached, and the last one did not, or not yet."""
        for table in self.live():
            if table.held:
                table.apply_held()


class _Held(NamedTuple):
    grad: Tensor  # unscaled
    finite: Tensor | None  # bool []; None: not asked


class _Outcome(NamedTuple):
    """How an update went."""

    finite: Tensor  # bool [], on the CPU
    copied: Any  # torch.cuda.Event after which it is there; None: it is


class _TableUpdate:
    """Applies a table's gradient to each part of it that is to be updated, in that part's group."""

    def __init__(
        self,
        optimizer: RowOptimizer,
        parent: Tensor,
        updated: list[tuple[dict[str, Any], Tensor]],
        scaler: GradScaler | None,
        passes: _Passes,
    ) -> None:
        self.optimizer = optimizer
        self.parent = parent
        self.updated = updated
        self.scaler = scaler
        self.passes = passes
        self.held: list[_Held] = []
        self.outcome: _Outcome | None = None
        # Then a sparse gradient may lie in the memory of the output's.
        self.applies_at_once = passes.micro_steps == 1

    def hooks(self) -> tuple[RemovableHandle, RemovableHandle]:
        # The garbage collector sees what the first hook holds, but not what the second one does: a table that
        # its own second hook holds would never be freed.
        apply = weakref.WeakMethod(self.apply)
        return (
            self.parent.register_hook(self.refuse),
            self.parent.register_post_accumulate_grad_hook(lambda _: apply()()),  # type: ignore[misc]
        )

    def refuse(self, _: Tensor) -> None:
        if self.parent.grad is not None:
            _refuse_gradient(self.parent)

    @torch.no_grad()
    def apply(self) -> None:
        grad, self.parent.grad = self.parent.grad, None
        assert grad is not None
        # Only a backward inside of a node's own backward runs hooks under it.
        if _runs_under(BackwardCFunction.apply.__code__):
            raise RuntimeError(
                "apply_in_backward: a backward inside of another backward, as torch.utils.checkpoint with "
                f"use_reentrant=True makes one, {_ADVICE}"
            )
        if not self.passes.knows_ddp:
            self.passes.refuse_ddp()
        if not grad.is_sparse and not isinstance(grad, TableGradient):
            # Refused, but for zeros that make the state; neither is summed.
            for group, param in self.updated:
                self.optimizer._update(group, param, grad)
            return
        held = _Held(grad, None)
        if self.scaler is not None and self.scaler.is_enabled():
            held = _unscaled(grad, self.parent, self.scaler)
            _report(held, self.scaler, self.optimizer)
        self.held.append(held)
        if self.passes.micro_steps == 1 or self.passes.is_last():
            self.apply_held()

    @torch.no_grad()
    def apply_held(self) -> None:
        if self.outcome is not None:
            self.settle()
        grad, finite = self.take_held()
        for group, param in self.updated:
            self.optimizer._update(group, param, grad, finite)
        # What torch's schedulers ask for, to see that the first update came before them.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        if finite is not None:
            self.outcome = _outcome(finite)
            if self.outcome.copied is None:
                self.settle()

    def take_held(self) -> _Held:
        """What is held, as one gradient."""
        held, self.held = self.held, []
        if len(held) == 1:
            return held[0]
        finite = [one.finite for one in held if one.finite is not None]
        return _Held(
            _total([one.grad for one in held]),
            reduce(torch.logical_and, finite) if finite else None,
        )

    def settle(self) -> None:
        """Take back the step number of an update that was dropped."""
        outcome, self.outcome = self.outcome, None
        if outcome is None:
            return
        if outcome.copied is not None:
            outcome.copied.synchronize()
        if not outcome.finite:
            for _, param in self.updated:
                self.optimizer.state[param]["step"] -= 1

    @torch.no_grad()
    def give_back(self) -> None:
        """Put what is held into `.grad`."""
        if self.held:
            grad = self.take_held().grad.to(self.parent.dtype)
            self.parent.grad = grad if self.parent.grad is None else self.parent.grad + grad


def _refuse_gradient(param: Tensor) -> None:
    if param.grad is not None:
        raise RuntimeError(
            "apply_in_backward: .grad already holds a gradient, but gradients are applied in the backward that "
            "computes them; set .grad to None first, and give micro_steps=k to sum those of k backwards"
        )


def _total(grads: list[Tensor]) -> Tensor:
    """The sum of gradients of one kind; none of their entries are added up."""
    if isinstance(grads[0], TableGradient):
        return reduce(add, grads)
    indices = torch.cat([grad._indices() for grad in grads], 1)
    return _sparse(indices, torch.cat([grad._values() for grad in grads]), grads[0].shape)


def _sparse(indices: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    # The default device may be another; checking the indices would wait for the GPU.
    return torch.sparse_coo_tensor(
        indices, values, shape, device=values.device, check_invariants=False
    )


# Automatic mixed precision.


def _unscaled(grad: Tensor, parent: Tensor, scaler: GradScaler) -> _Held:
    """The gradient divided by the scale, and whether it, and the sums of its rows, are finite."""
    if scaler._scale is None:
        raise RuntimeError(
            "apply_in_backward: scaler was given, but the loss was not scaled by it; call "
            "scaler.scale(loss).backward()"
        )
    if grad.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "apply_in_backward: a CUDA graph cannot tell the scaler that a gradient is not finite; capture without "
            "a scaler, or do not capture the backward"
        )
    dtype = accumulation(parent.dtype)
    scale = scaler._scale.to(grad.device, non_blocking=True)
    inverse = scale.double().reciprocal().to(dtype)
    if isinstance(grad, TableGradient):
        entries = grad.entries
        # Not all values: an empty bag's, or a padding's, are no row's gradient, whatever they are.
        largest, count = _largest(entries.row_values(), dtype), len(entries.rows)
        unscaled: Tensor = TableGradient(entries.multiplied(inverse), grad.shape)
    else:
        values = grad._values()
        largest, count = _largest(values, dtype), len(values)
        # Not rounded to 16 bit, where small ones would vanish.
        unscaled = _sparse(grad._indices(), values.to(dtype) * inverse, grad.shape)
    # No sum of so many is larger.
    return _Held(unscaled, torch.isfinite(largest * inverse * count))


def _largest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest magnitude, NaN if there is one -> []."""
    if values.numel() == 0:
        return values.new_zeros((), dtype=dtype)
    return torch.linalg.vector_norm(values, float("inf"), dtype=dtype)


def _report(held: _Held, scaler: GradScaler, optimizer: RowOptimizer) -> None:
    """Tell the scaler what it would have found by itself, had it been given the gradient."""
    assert held.finite is not None
    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is OptState.READY:
        # A scaler.step(optimizer) then looks for no gradients.
        state["stage"] = OptState.UNSCALED
    found = (~held.finite).float()
    by_device = state["found_inf_per_device"]
    earlier = by_device.get(found.device)
    by_device[found.device] = found if earlier is None else torch.maximum(earlier, found)


def _outcome(finite: Tensor) -> _Outcome:
    if not finite.is_cuda:
        return _Outcome(finite, None)
    # Into pinned memory, so that whoever asks later waits for this copy and not for what was queued behind it.
    copy = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
    copy.copy_(finite, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(finite.device))
    return _Outcome(copy, event)


def _settle_before(optimizer: RowOptimizer, passes: _Passes) -> list[RemovableHandle]:
    """Nobody saves a step number that is to be taken back, or loads one to be taken back."""

    def settle(*_: Any) -> None:
        for table in passes.live():
            table.settle()

    return [
        optimizer.register_state_dict_pre_hook(settle),
        optimizer.register_load_state_dict_pre_hook(settle),
    ]


# Reentrant checkpoints.

_ADVICE = (
    "updates a table that the backward may still read, so the gradients behind it would be wrong; call "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
)


def _runs_under(code: Any) -> bool:
    """Whether a function is being called, in this thread."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _refuse_checkpoint(layer: torch.nn.Module, _: Any) -> None:
    """Raise for a lookup under a reentrant checkpoint, which runs its function without gradients first."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    # A copy of a layer has this hook, and its table is not updated.
    if _is_updated(layer.weight) and _runs_under(CheckpointFunction.forward.__code__):  # type: ignore[arg-type]
        raise RuntimeError(
            "apply_in_backward: a lookup under torch.utils.checkpoint with use_reentrant=True "
            + _ADVICE
        )


# DistributedDataParallel.


def _refuse_ddp(parents: list[Tensor]) -> None:
    """Raise for a table whose gradients a DistributedDataParallel averages."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    ddp = torch.nn.parallel.DistributedDataParallel
    # torch keeps no list of them.
    for module in [one for one in gc.get_objects() if issubclass(type(one), ddp)]:
        averaged = {id(param) for param in getattr(module, "_module_parameters", ())}
        if any(id(parent) in averaged for parent in parents):
            raise RuntimeError(
                "apply_in_backward: DistributedDataParallel averages a gradient after the table has been updated, so "
                "its replicas would move apart; call remove() and, after each backward, step() of an optimizer of "
                "gpu_embed.optim, which takes the sparse gradients that DDP averages; or leave the table out of DDP "
                "on purpose: name it in module._ddp_params_and_buffers_to_ignore before the module is wrapped"
            )
