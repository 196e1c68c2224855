"""Proof that a model looks up with our op: it is run once and watched, and left as it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backends, bounds
from ..bags import make_bags
from ..bounds import in_table
from ..dtypes import accumulation
from ..functional.checks import PLAIN_TYPES, has_dtensor
from ..fused_rows import FusedRows, dequantize
from ..nn import Embedding, EmbeddingBag, QuantizedEmbedding, QuantizedEmbeddingBag
from ..ops import bag as bag_ops
from ..ops import lookup as ops
from ..ops import quantized as quantized_ops
from ..shard import Shard

OURS = (Embedding, EmbeddingBag, QuantizedEmbedding, QuantizedEmbeddingBag)


@dataclass
class Verified:
    """What one replaced module did in the run.

    Attributes:
        name: in the model.
        present: whether the model still holds it, in our class.
        calls: how often it was called.
        lookups: how often it looked up with our op.
        differing: in how many of these the output was not what torch's lookup gets.
        exact: whether all outputs were that bit for bit.
        served_by: the backend that looked up; "" where none did.
        shard: the part of a DTensor that this rank looked up in; "" for a whole table.
    """

    name: str
    present: bool = True
    calls: int = 0
    lookups: int = 0
    differing: int = 0
    exact: bool = True
    served_by: str = ""
    shard: str = ""

    @property
    def ok(self) -> bool:
        """Whether each call of it was a lookup with our op that got what torch's gets."""
        return self.calls > 0 and self.lookups >= self.calls and not self.differing

    def __str__(self) -> str:
        if not self.present:
            return "no longer in the model, or no longer ours"
        if self.calls == 0:
            return "not reached by this input"
        calls = f"{self.lookups} of {self.calls} calls looked up with gpu_embed"
        calls += f" ({self.served_by})" if self.lookups else ""
        calls += f" in {self.shard}" if self.shard else ""
        if self.lookups < self.calls:
            return f"{calls}; the others ran torch's lookup or another forward"
        if self.differing:
            return f"{calls}; {self.differing} DIFFER from torch's lookup"
        how = "bit-equal to" if self.exact else "within the rounding error of"
        return f"{calls}, {how} torch's"


@dataclass(frozen=True, repr=False)
class Verification:
    """What a run showed of each replaced module; print it. True if `ok`."""

    modules: tuple[Verified, ...]

    @property
    def ok(self) -> bool:
        """Whether at least one module was called, and every one that was is ok."""
        called = [one for one in self.modules if one.calls]
        return bool(called) and all(one.ok for one in called)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        if not self.modules:
            return "no module was replaced, so there is nothing to verify"
        names = [one.name or "(the model itself)" for one in self.modules]
        width = max(map(len, names))
        return "\n".join(
            f"{name:<{width}}  {one}" for name, one in zip(names, self.modules, strict=True)
        )


def verify(
    model: torch.nn.Module,
    replaced: Mapping[str, torch.nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Verification:
    """Run `model(*args, **kwargs)` once, and see which of these modules look up with our op."""
    if not replaced:
        return Verification(())
    held = set(model.modules())
    results, hooks = [], []
    try:
        for name, module in replaced.items():
            result = Verified(name, module in held and isinstance(module, OURS))
            results.append(result)
            if result.present:
                hooks += _watched(module, result)
        with _undisturbed(model):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    bounds.check_bounds()
    return Verification(tuple(results))


def _watched(module: Any, result: Verified) -> list[Any]:
    """Hooks that let a module's forward, and that alone, run under a mode that sees our ops."""
    watch = _Watch(result, module.embedding_dim)

    def before(*_: Any) -> None:
        result.calls += 1
        watch.__enter__()

    def after(*_: Any) -> None:
        watch.__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, prepend=True, always_call=True),
    ]


class _Watch(TorchDispatchMode):
    """Compares each lookup of one module with torch's: of a DTensor, what this rank looks up in its own part."""

    def __init__(self, result: Verified, embedding_dim: int) -> None:
        super().__init__()
        self._result, self._embedding_dim = result, embedding_dim

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in COMPARISONS:
            is_exact, is_right = COMPARISONS[func](output, *args)
            arguments = dict(zip((one.name for one in func._schema.arguments), args, strict=False))
            shard = arguments.get("shard")
            if func is not quantized_ops.quantized_embedding:
                self._result.shard = _part(args[0], shard, self._embedding_dim)
            self._result.lookups += 1
            self._result.served_by = backends.select(args[0].device).name
            self._result.exact &= is_exact
            self._result.differing += not is_right
        return output


def _part(weight: Tensor, shard: Sequence[int] | None, embedding_dim: int) -> str:
    """Which rows and columns of a table this is; "" for all of them."""
    num_rows, num_columns = weight.shape
    parts = []
    if shard is not None:
        first_row, num_embeddings = shard
        rows = f"rows {first_row:,} to {first_row + num_rows - 1:,}" if num_rows else "no rows"
        parts.append(f"{rows} of {num_embeddings:,}")
    if num_columns != embedding_dim:
        parts.append(f"{num_columns:,} of {embedding_dim:,} columns")
    return ", ".join(parts)


def _shard_of(weight: Tensor, shard: Sequence[int] | None) -> Shard:
    return Shard(0, weight.shape[0]) if shard is None else Shard(*shard)


def _compare_embedding(
    output: Tensor,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
    shard: Sequence[int] | None = None,
) -> tuple[bool, bool]:
    """Whether a lookup is bit-equal to torch's, and so right."""
    if output.numel() == 0:
        return True, True
    rows = _shard_of(weight, shard).local(indices.reshape(-1), weight.shape[0])
    # To an id out of range torch has no answer, and on CUDA its kernels end the process.
    places, others = (which.nonzero()[:, 0] for which in (in_table(rows, len(weight)), rows == -1))
    # What torch.embedding itself calls; within override_aten that may be ours.
    expected = weight.index_select(0, rows[places])
    found = output.reshape(len(rows), weight.shape[1])
    zeros = found.index_select(0, others)
    is_exact = same_bits(found.index_select(0, places), expected)
    is_exact &= same_bits(zeros, torch.zeros_like(zeros))
    return is_exact, is_exact


def _compare_embedding_bag(
    output: Tensor,
    weight: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    sparse: bool,
    shard: Sequence[int] | None = None,
) -> tuple[bool, bool]:
    """Whether bags are bit-equal to torch's, and whether they are within the rounding error of them."""
    num_rows = weight.shape[0]
    ids = _shard_of(weight, shard).local(indices, num_rows, padding_idx)
    if offsets is not None:
        offsets = offsets.to(torch.int64)
        if include_last_offset:
            # torch takes ids behind the last offset into the last bag in some cases, and not in others.
            ids = ids[: int(offsets[-1])]
            if per_sample_weights is not None:
                per_sample_weights = per_sample_weights[: len(ids)]
    # As in a lookup: what torch has no answer to is not compared, and kept from its kernels.
    if output.numel() == 0 or not _cut_bags(offsets, len(ids)):
        return True, True
    in_shard = in_table(ids, num_rows)
    used = torch.unique(ids[in_shard])
    # Behind them a row of zeros, which stands for other shards' rows, and one for padding.
    rows = torch.cat([weight.index_select(0, used), weight.new_zeros(2, weight.shape[1])])
    behind = len(used) + (ids == num_rows).to(torch.int64)
    places = torch.where(in_shard, torch.searchsorted(used, ids), behind)
    if mode != "max":
        # Its 16-bit means are rounded more than once.
        rows = rows.to(accumulation(rows.dtype))

    of_bags = partial(embedding_bag, offsets=offsets, include_last_offset=include_last_offset)
    of_rows = partial(of_bags, places, mode=mode, padding_idx=len(used) + 1)
    weights = None if per_sample_weights is None else per_sample_weights.to(rows.dtype)
    if weights is not None:
        weights = torch.where(in_shard, weights, 0)
    expected = of_rows(rows, per_sample_weights=weights).to(weight.dtype)
    known = (ids <= num_rows).to(torch.int64)
    outside = of_bags(known, rows.new_tensor([[1], [0]]), mode="sum")
    is_judged = outside[:, 0] == 0
    if same_bits(output[is_judged], expected[is_judged]):
        return True, True
    if mode == "max":
        return False, False
    magnitudes = of_rows(
        rows.double().abs(), per_sample_weights=None if weights is None else weights.double().abs()
    )
    sizes = of_bags(torch.zeros_like(places), magnitudes.new_ones(1, 1), mode="sum")
    own, wide = torch.finfo(weight.dtype), torch.finfo(rows.dtype)
    # Each of n terms takes part in up to n additions, a product and a division; twice, as there are two sums.
    bound = 2 * (sizes + 2) * wide.eps * magnitudes
    bound += own.eps * (expected.double().abs() + own.smallest_normal)
    error = (output.double() - expected.double()).abs()
    is_near = (error <= bound) & expected.isfinite()
    equal = (output == expected) | (output.isnan() & expected.isnan())
    return False, bool((equal | is_near)[is_judged].all())


def _cut_bags(offsets: Tensor | None, num_indices: int) -> bool:
    """Whether offsets cut ids into bags; on CUDA nobody has looked yet."""
    if offsets is None:
        return True
    ends = torch.cat([offsets, offsets.new_tensor([num_indices])])
    return int(ends[0]) == 0 and bool((ends[1:] >= ends[:-1]).all())


def _compare_embedding_bag_max(
    output: tuple[Tensor, Tensor],
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    *_: object,
) -> tuple[bool, bool]:
    """Whether maxima are bit-equal to torch's, and so right."""
    bags = indices, offsets, include_last_offset, padding_idx
    return _compare_embedding_bag(output[0], weight, None, *bags, "max", False, False)


def _compare_embedding_bag_shard_max(
    output: tuple[Tensor, Tensor],
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    shard: Sequence[int],
) -> tuple[bool, bool]:
    """Whether the maxima among a shard's rows are where they are said to be, and those that torch finds there."""
    values, positions = output
    bags = make_bags(indices, offsets, include_last_offset)
    ids = Shard(*shard).local(bags.indices, weight.shape[0], padding_idx)
    own = in_table(ids, weight.shape[0])
    if values.numel() == 0 or not own.any():
        return (right := not values.any()), right
    rows = ids[positions.clamp(min=0)].clamp(0, weight.shape[0] - 1)
    found = torch.where(positions < 0, 0, weight.gather(0, rows))
    # torch gets the shard's ids alone.
    before = torch.cat([own.new_zeros(1, dtype=torch.int64), own.cumsum(0)])
    begin, end = bags.ends()
    offsets = torch.cat([before[begin], before[end[-1:]]])
    expected = embedding_bag(
        ids[own], weight.detach(), offsets, mode="max", include_last_offset=True
    )
    # Where another shard's id is first, torch cannot know that NaN is not.
    is_judged = ~expected.isnan()
    right = same_bits(values, found) and same_bits(values[is_judged], expected[is_judged])
    return right, right


def _compare_quantized_embedding(
    output: Tensor, weight: Tensor, indices: Tensor, *arguments: Any
) -> tuple[bool, bool]:
    """Whether a lookup is bit-equal to torch's in the numbers that the codes stand for, and so right."""
    *layout, dtype = arguments
    ids = indices.reshape(-1)
    places = in_table(ids, len(weight)).nonzero()[:, 0]
    expected = dequantize(weight.index_select(0, ids[places]), FusedRows(*layout)).to(dtype)
    found = output.reshape(len(ids), output.shape[-1]).index_select(0, places)
    is_exact = same_bits(found, expected)
    return is_exact, is_exact


COMPARISONS: dict[Any, Callable[..., tuple[bool, bool]]] = {
    ops.embedding: _compare_embedding,
    quantized_ops.quantized_embedding: _compare_quantized_embedding,
    bag_ops.embedding_bag: _compare_embedding_bag,
    bag_ops.embedding_bag_max: _compare_embedding_bag_max,
    bag_ops.embedding_bag_shard_max: _compare_embedding_bag_shard_max,
}


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal as bytes: NaN patterns and signed zeros too."""
    return (
        x.shape == y.shape
        and x.dtype == y.dtype
        and torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))
    )


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """A block in which the model can be run; what a run changes is as before afterwards."""
    training: list[tuple[Any, bool]] = [(module, module.training) for module in model.modules()]
    kept = []
    tensor: Any
    for holder, name, tensor in _changed_by_running(model):
        if has_dtensor(tensor):
            tensor = tensor.to_local()
        # Of tensors with other wrappers or formats of their own no copy can be relied on.
        if (
            type(tensor) in PLAIN_TYPES
            and tensor.layout is torch.strided
            and not (tensor.is_meta or tensor.is_quantized)
        ):
            kept.append((holder, name, holder[name], tensor, tensor.detach().clone()))
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda})
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            model.eval()
            yield
        finally:
            for module, mode in training:
                module.training = mode
                if is_fsdp_module(module):
                    # Or an optimizer that is made next would get parameters that hold no shard.
                    module.reshard()
            for holder, name, held, tensor, copy in kept:
                holder[name] = held
                # Only where it differs: a write would trip autograd, which may have saved the tensor.
                if not same_bits(tensor.detach(), copy):
                    tensor.copy_(copy)


def is_fsdp_module(module: Any) -> bool:
    """Whether FSDP2's fully_shard was called on this module; by the name, as torch may be built without it."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _changed_by_running(
    model: torch.nn.Module,
) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """The tensors that a forward may write to, and the dicts that hold them: buffers, and tables under max_norm."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module._buffers, name, buffer
        if getattr(module, "max_norm", None) is not None:
            weight = module._parameters.get("weight")
            if weight is not None:
                yield module._parameters, "weight", weight
