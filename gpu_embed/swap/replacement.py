"""Our lookup in a model that exists already: each table's module changes its class, and nothing else."""

import re
import warnings
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import backends
from ..functional.checks import PLAIN_TYPES, has_dtensor
from ..fused_rows import QuantizationError, dequantize
from ..nn import Embedding, EmbeddingBag, QuantizedEmbedding, QuantizedEmbeddingBag
from ..nn.quantized import QuantizedTableModule, reason_not_to_quantize
from .verification import Verification, is_fsdp_module, verify

REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Embedding: Embedding,
    torch.nn.EmbeddingBag: EmbeddingBag,
}
ORIGINALS = {ours: torchs for torchs, ours in REPLACEMENTS.items()}
QUANTIZED: dict[type[torch.nn.Module], Any] = {
    torch.nn.Embedding: QuantizedEmbedding,
    torch.nn.EmbeddingBag: QuantizedEmbeddingBag,
}
BITS = {"int8": 8, "int4": 4}
# Set on a module that was replaced, and copied and pickled with it: a layer made as ours has none. True, or the Origin
# of a table that was quantized.
MARK = "_replaced_by_gpu_embed"


@dataclass(frozen=True)
class Origin:
    """What a quantized table was."""

    kind: type[torch.nn.Module]
    requires_grad: bool
    mark: bool  # whether it had been replaced before


@dataclass(frozen=True)
class Quantized:
    """What became of a table that was quantized. A row's error is the largest difference of one of its numbers."""

    bits: int
    bytes_before: int
    bytes_after: int
    largest_error: float  # of a row
    worst_row: int  # which one; -1: there are no rows
    mean_error: float  # over the rows


@dataclass(frozen=True)
class Replaced:
    """A module that now looks up with our op."""

    name: str  # in the model; "" is the model itself
    aliases: tuple[str, ...]  # its other names, where it is used in several places
    num_embeddings: int
    embedding_dim: int
    dtype: torch.dtype
    device: torch.device  # where its weight is looked up
    served_by: str  # the backend that does it
    module: torch.nn.Module = field(repr=False, compare=False)
    quantized: Quantized | None = None


@dataclass(frozen=True)
class Skipped:
    """A module that was left alone, and why."""

    name: str
    aliases: tuple[str, ...]
    reason: str


@dataclass(frozen=True, repr=False)
class ReplacementReport:
    """What `replace_embeddings` did; print it.

    Attributes:
        replaced: the modules that were replaced.
        skipped: those that hold a table and were left alone, each with its reason.
        model: the model.
    """

    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]
    model: torch.nn.Module = field(compare=False)

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Run `model(*args, **kwargs)` once and see which of the replaced modules look up with our op.

        Nothing is left changed: it runs in evaluation mode without gradients; afterwards each module's mode,
        torch's random numbers, buffers, and tables that `max_norm` rescales are as they were. A compiled model runs
        eagerly. Where processes share a model (DDP, FSDP), all of them must call this.

        Returns:
            What each module did, printable; true if every one that ran looked up with our op, and got what torch's
            lookup gets, bit for bit (sums and means of bags, which may be taken in another order: within the
            rounding error), and at least one ran.

        Raises:
            IndexError: an id is out of range, whatever `gpu_embed.set_bounds_check` says but "off".

        Whatever else the model raises comes through.
        """
        return verify(self.model, {one.name: one.module for one in self.replaced}, args, kwargs)

    def __repr__(self) -> str:
        found = len(self.replaced) + len(self.skipped)
        if found == 0:
            return f"{type(self.model).__name__} holds no torch.nn.Embedding or EmbeddingBag: nothing to replace"
        lines = [f"replaced {len(self.replaced)} of {found} embeddings"]
        quantized = [one.quantized for one in self.replaced if one.quantized is not None]
        if quantized:
            before, after = (
                sum(getattr(one, name) for one in quantized)
                for name in ("bytes_before", "bytes_after")
            )
            lines[0] += f", quantized to {quantized[0].bits} bits: {before:,} bytes -> {after:,}"
        if self.replaced:
            header: tuple[str, ...] = ("name", "rows x dim", "dtype", "device", "served by")
            if quantized:
                header += ("bytes", "of before", "largest error of a row", "mean")
            lines += aligned([header, *map(_row, self.replaced)])
            devices = dict.fromkeys(one.device for one in self.replaced)
            lines += [backends.explain(device) for device in devices]
        if self.skipped:
            lines.append("left alone")
            lines += aligned([(_names(one), one.reason) for one in self.skipped])
        return "\n".join(lines)


def replace_embeddings(
    model: torch.nn.Module,
    pattern: str | re.Pattern[str] | None = None,
    min_rows: int = 0,
    quantize: str | None = None,
) -> ReplacementReport:
    """Let each `torch.nn.Embedding` and `torch.nn.EmbeddingBag` in a model look up with our op.

    In place, and by the module's class alone: the Parameter objects, hooks, names, devices, ties and optimizers
    that hold them stay. Subclasses are left alone, as they may do more; `override_aten` reaches those that call
    torch's lookup. `restore_embeddings` undoes it.

    Args:
        model: any module; on any device, before or after an optimizer, DDP or `torch.compile` got it.
        pattern: only modules of such a name. A string is a shell pattern for the name or its end from a dot
            on ("word_embeddings", "encoder.*"); a compiled regular expression is searched for.
        min_rows: only tables of at least so many rows.
        quantize: "int8" or "int4": the modules become `QuantizedEmbedding`s and `QuantizedEmbeddingBag`s, for serving.
            Their Parameters leave the model, so do this before an optimizer or DDP gets it. A table that another
            module holds too, as a tied output layer does, is left alone.

    Returns:
        What was replaced, and what was left alone for which reason; printable; `verify(example_input)` proves
        that it took effect.

    Raises:
        TypeError: model is no module, or another argument is of a wrong type.
        ValueError: min_rows is negative; quantize is another word.

    Warns:
        UserWarning: pattern matches no embedding's name.

    Example::

        report = gpu_embed.replace_embeddings(model)
        print(report)
        print(report.verify(ids))
    """
    _check_model("replace_embeddings", model)
    if not (pattern is None or isinstance(pattern, str | re.Pattern)):
        raise TypeError(
            f"replace_embeddings(): pattern must be str, re.Pattern or None, not {type(pattern).__name__}"
        )
    if not isinstance(min_rows, int) or isinstance(min_rows, bool):
        raise TypeError(
            f"replace_embeddings(): min_rows must be int, not {type(min_rows).__name__}"
        )
    if min_rows < 0:
        raise ValueError(f"replace_embeddings(): min_rows must not be negative, got {min_rows}")
    if not (quantize is None or isinstance(quantize, str)):
        raise TypeError(
            f"replace_embeddings(): quantize must be str or None, not {type(quantize).__name__}"
        )
    if quantize is not None and quantize not in BITS:
        raise ValueError(
            f'replace_embeddings(): quantize must be "int8", "int4" or None, got {quantize!r}'
        )
    replaced, skipped = [], []
    small: dict[torch.nn.Module, Any] = {}
    found = _embeddings(model)
    for names, module in found:
        reason = _reason_to_skip(module, names, pattern, min_rows, quantize is not None)
        if reason is None and quantize is not None:
            reason = reason_not_to_quantize(module) or _tie_of(model, module)
        if reason is None and quantize is not None:
            kind = QUANTIZED[ORIGINALS.get(type(module), type(module))]
            try:
                small[module] = kind.from_float(module, BITS[quantize])
                reason = _reason_of_size(module, small[module])
            except QuantizationError as error:
                reason = str(error)
        if reason is None:
            one = _described(names, module)
            if module in small:
                one = replace(one, quantized=_compared(module.weight, small[module]))
            replaced.append(one)
        else:
            skipped.append(Skipped(names[0], names[1:], reason))
    # Only now: nothing above has changed anything, and nothing below can fail.
    for one in replaced:
        if one.module in small:
            _become_quantized(one.module, small[one.module])
        else:
            _change_class(one.module, REPLACEMENTS[type(one.module)])
            one.module.__dict__[MARK] = True
    if pattern is not None and found and not any(_matches(pattern, names) for names, _ in found):
        listed = ", ".join(repr(names[0]) for names, _ in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        warnings.warn(
            f"replace_embeddings: no embedding's name matches {_shown(pattern)}; they are {listed}{more}",
            stacklevel=2,
        )
    return ReplacementReport(tuple(replaced), tuple(skipped), model)


def restore_embeddings(model: torch.nn.Module) -> list[str]:
    """Give what `replace_embeddings` replaced in this model its own class back.

    Layers that were made as `gpu_embed.Embedding` stay. Works for a copy of the model, too; a second call finds
    nothing to do. A table that was quantized becomes one of floats again, in a new Parameter: the numbers that its
    codes stand for.

    Returns:
        The names of the modules that were restored.

    Raises:
        TypeError: model is no module.
        RuntimeError: something else has changed a replaced module's class since (a parametrization,
            `fully_shard`) and must be undone before, or the table of a bag is sharded; nothing is restored then.
    """
    _check_model("restore_embeddings", model)
    replaced = {name: m for name, m in model.named_modules() if MARK in m.__dict__}
    for name, module in replaced.items():
        if type(module) in QUANTIZED.values():
            continue
        if type(module) not in ORIGINALS:
            raise RuntimeError(
                f"restore_embeddings: {name!r} has become {type(module).__name__} since it was replaced; remove "
                "that first (its parametrization, or its own fully_shard). Nothing was restored."
            )
        if isinstance(module, EmbeddingBag) and has_dtensor(module.weight):
            raise RuntimeError(
                f"restore_embeddings: torch's EmbeddingBag has no lookup in a sharded table, which {name!r} holds. "
                "Nothing was restored."
            )
    for module in replaced.values():
        mark = module.__dict__.pop(MARK)
        if isinstance(mark, Origin):
            _become_floats(module, mark)
        else:
            _change_class(module, ORIGINALS[type(module)])
    return list(replaced)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as indented lines whose columns line up."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{function}(): argument 'model' must be torch.nn.Module, not {type(model).__name__}"
        )


def _embeddings(model: torch.nn.Module) -> list[tuple[tuple[str, ...], Any]]:
    """Each module that holds one table, with all its names, the first one first."""
    names: dict[torch.nn.Module, list[str]] = {model: [""]} if _is_embedding(model) else {}
    for prefix, parent in model.named_modules():
        # Not named_modules(remove_duplicate=False), which never ends where a model holds itself.
        for child, module in parent._modules.items():
            if module is not None and _is_embedding(module):
                names.setdefault(module, []).append(f"{prefix}.{child}" if prefix else child)
    return [(tuple(known), module) for module, known in names.items()]


def _is_embedding(module: torch.nn.Module) -> bool:
    kinds = (*REPLACEMENTS, QuantizedTableModule)
    return isinstance(module, kinds) or _is_scripted(module)


def _is_scripted(module: torch.nn.Module) -> bool:
    """Whether TorchScript made this of one of torch's layers."""
    return isinstance(module, torch.jit.ScriptModule) and getattr(
        module, "original_name", None
    ) in {layer.__name__ for layer in REPLACEMENTS}


def _reason_to_skip(
    module: Any,
    names: tuple[str, ...],
    pattern: str | re.Pattern[str] | None,
    min_rows: int,
    quantizes: bool,
) -> str | None:
    """Why this module is left alone; None: it can be replaced."""
    kind = type(module)
    if pattern is not None and not _matches(pattern, names):
        return f"its name does not match {_shown(pattern)}"
    if _is_scripted(module):
        return "compiled by TorchScript: replace before torch.jit"
    if (kind in ORIGINALS and not quantizes) or isinstance(module, QuantizedTableModule):
        return f"already gpu_embed.{kind.__name__}"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "parametrized: replace before the parametrization is registered"
    if is_fsdp_module(module):
        return "sharded by a fully_shard of its own: replace before that"
    if kind not in REPLACEMENTS and kind not in ORIGINALS:
        return _reason_of_subclass(kind, quantizes)
    if getattr(module, "weight", None) is None:
        return "it holds no weight"
    if module.num_embeddings < min_rows:
        return f"{module.num_embeddings} rows are fewer than min_rows={min_rows}"
    if "forward" in module.__dict__ and not (
        _holds_own_forward(module, "forward")
        # accelerate's hooks call what they keep there.
        or (hasattr(module, "_hf_hook") and _holds_own_forward(module, "_old_forward"))
    ):
        way_round = "" if kind in ORIGINALS else _way_round(kind, quantizes)
        return f"its forward was set on the module itself, and may call torch's{way_round}"
    return None


def _reason_of_subclass(kind: type[torch.nn.Module], quantizes: bool) -> str:
    """Why a class is left alone that may do more than the layer that it is made of."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    for ours in ORIGINALS:
        if issubclass(kind, ours):
            return f"a subclass of gpu_embed.{ours.__name__}, which may do more: {name}"
    return f"a subclass, which may do more: {name}{_way_round(kind, quantizes)}"


def _way_round(kind: type[torch.nn.Module], quantizes: bool) -> str:
    """What reaches torch's lookup in a module of this kind without a swap."""
    if issubclass(kind, torch.nn.EmbeddingBag):
        return "; gpu_embed.override_aten() does not reach bags"
    floats = ", and leaves its table in floats" if quantizes else ""
    return f"; gpu_embed.override_aten() reaches its lookup if it calls torch's{floats}"


def _matches(pattern: str | re.Pattern[str], names: tuple[str, ...]) -> bool:
    if isinstance(pattern, str):
        return any(fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}") for n in names)
    return any(map(pattern.search, names))


def _shown(pattern: str | re.Pattern[str]) -> str:
    return repr(pattern if isinstance(pattern, str) else pattern.pattern)


def _holds_own_forward(module: torch.nn.Module, attribute: str) -> bool:
    """Whether an attribute is the forward of the module's class, bound to it and kept."""
    kept = module.__dict__.get(attribute)
    return (
        isinstance(kept, MethodType)
        and kept.__self__ is module
        and kept.__func__ is type(module).forward
    )


def _change_class(module: torch.nn.Module, new: type[torch.nn.Module]) -> None:
    for attribute in ("forward", "_old_forward"):
        if _holds_own_forward(module, attribute):
            module.__dict__[attribute] = MethodType(new.forward, module)
    module.__class__ = new


def _reason_of_size(module: Any, small: Any) -> str | None:
    """Why the codes of a table are no use; None: they are smaller."""
    before, after = module.weight.nbytes, small.weight.nbytes
    return f"codes would take {after:,} bytes, and it takes {before:,}" if after > before else None


def _tie_of(model: torch.nn.Module, module: Any) -> str | None:
    """Why a table is not quantized alone: other modules hold its numbers too; None: no other does."""
    first, end = _memory(module.weight)
    for prefix, holder in model.named_modules():
        for name, tensor in (*holder._parameters.items(), *holder._buffers.items()):
            if holder is module and name == "weight":
                continue
            other_first, other_end = _memory(tensor)
            if max(first, other_first) < min(end, other_end):
                place = f"{prefix}.{name}" if prefix else name
                return f"tied: {place} is the same table, and would keep it in floats; untie them first"
    return None


def _memory(tensor: torch.Tensor | None) -> tuple[int, int]:
    """The address of a tensor's first number, and where the last one ends; the same twice for one that has none."""
    if (
        tensor is None
        or is_lazy(tensor)
        or is_traceable_wrapper_subclass(tensor)
        or tensor.layout is not torch.strided
        or tensor.is_meta
        or tensor.numel() == 0
    ):
        return 0, 0
    first = tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return first, first + (last + 1) * tensor.element_size()


def _compared(weight: torch.Tensor, small: Any) -> Quantized:
    """A table beside the one that it was quantized to."""
    largest, worst, total, first = 0.0, -1, 0.0, 0
    step = max(1, (1 << 20) // small.embedding_dim)
    for rows, fused in zip(weight.detach().split(step), small.weight.split(step), strict=True):
        if not len(rows):
            continue
        meant = dequantize(fused, small.format).to(small.dtype)
        errors = (meant.double() - rows.double()).abs().amax(dim=1)
        total += float(errors.sum())
        most, row = errors.max(dim=0)
        if worst < 0 or float(most) > largest:
            largest, worst = float(most), first + int(row)
        first += len(rows)
    mean = total / max(len(weight), 1)
    return Quantized(small.bits, weight.nbytes, small.weight.nbytes, largest, worst, mean)


def _become_quantized(module: Any, small: Any) -> None:
    """Give a module the class and the codes of its quantized copy."""
    mark = Origin(type(module), module.weight.requires_grad, MARK in module.__dict__)
    del module._parameters["weight"]
    _change_class(module, type(small))
    module._buffers.update(small._buffers)
    module.__dict__.update(format=small.format, dtype=small.dtype)
    module.__dict__[MARK] = mark


def _become_floats(module: Any, mark: Origin) -> None:
    """Give a module its class back, and the numbers that its codes stand for."""
    weight = torch.nn.Parameter(module.to_float().weight.detach(), mark.requires_grad)
    for name in ("weight", "weight_format"):
        del module._buffers[name]
    del module.format, module.dtype
    _change_class(module, ORIGINALS.get(mark.kind, mark.kind) if mark.mark else mark.kind)
    module.register_parameter("weight", weight)


def _described(names: tuple[str, ...], module: Any) -> Replaced:
    weight = module.weight
    device = weight.device
    if weight.is_meta:
        # accelerate's offloading brings the weight there for each call.
        execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if execution is not None:
            device = torch.device(execution)
    if type(weight) not in PLAIN_TYPES and not has_dtensor(weight):
        served_by = f"torch where its weight is a {type(weight).__name__}"
    else:
        try:
            served_by = backends.select(device).name
        except RuntimeError:  # forced, and cannot run there; the report explains
            served_by = "none"
    return Replaced(
        name=names[0],
        aliases=names[1:],
        num_embeddings=module.num_embeddings,
        embedding_dim=module.embedding_dim,
        dtype=weight.dtype,
        device=device,
        served_by=served_by,
        module=module,
    )


def _names(one: Replaced | Skipped) -> str:
    return " = ".join(name or "(the model itself)" for name in (one.name, *one.aliases))


def _row(one: Replaced) -> tuple[str, ...]:
    cells = (
        _names(one),
        f"{one.num_embeddings} x {one.embedding_dim}",
        str(one.dtype).removeprefix("torch."),
        str(one.device),
        one.served_by,
    )
    small = one.quantized
    if small is None:
        return cells
    return (
        *cells,
        f"{small.bytes_after:,}",
        f"{small.bytes_after / max(small.bytes_before, 1):.3f}",
        f"{small.largest_error:.3g} (row {small.worst_row})" if small.worst_row >= 0 else "-",
        f"{small.mean_error:.3g}",
    )
