"""The ids of many features in one tensor, with offsets, as the batched layers take them."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import bounds
from ..bags import Bags, check_offsets
from ..dtypes import IDS
from ..exporting import is_exporting
from .layout import quoted


class TableInput(NamedTuple):
    """The arguments of the batched layers: `layer(*batch)`."""

    input: Tensor  # [N]
    offsets: Tensor  # int64 [F * B + 1], or [sum of batch_sizes + 1]: feature by feature, where each bag begins
    per_sample_weights: Tensor | None = None  # [N]
    # The features' names in the order of their ids, or how many there are; a layer checks them. None: unknown.
    features: tuple[str, ...] | int | None = None
    # How many bags each feature has, by name or in the order of their ids. None: all have B.
    batch_sizes: "BatchSizes | None" = None


BatchSizes = Mapping[str, int] | Sequence[int]


def batch_bags(
    tables: Mapping[str, tuple[Tensor, ...]] | Sequence[tuple[Tensor, ...]],
    include_last_offset: bool = False,
) -> TableInput:
    """Put the ids and offsets of F features together; nothing waits for the GPU.

    Args:
        tables: for each feature what `torch.nn.EmbeddingBag` takes: (ids `[n]`, offsets `[B]`) or (ids, offsets,
            per_sample_weights `[n]`). By the features' names, in any order, or in a sequence in the order of the
            layer's. Each may have a B of its own.
        include_last_offset: offsets are `[B + 1]`, the last where the last bag ends; ids behind it are put
            behind all bags.

    Returns:
        ids, offsets, weights, names, and the features' B where they differ, which unpack into a batched layer's call.

    Raises:
        ValueError: shapes that do not fit, or weights for some features and not for others.
        RuntimeError: offsets or ids that are not integers; on the CPU, offsets that do not cut a feature's ids into
            bags, as for `torch.nn.EmbeddingBag`. On CUDA such offsets are kept within their feature's ids, and
            reported as an id out of range is (`gpu_embed.set_bounds_check`).
        TypeError: something is no tensor.

    Example::

        user = torch.tensor([4, 7, 7]), torch.tensor([0, 1])  # ids and offsets of two bags
        item = torch.tensor([199]), torch.tensor([0, 1])
        batch = gpu_embed.batch_bags({"user": user, "item": item})
        sums = layer(*batch)
    """
    names, features = _in_sequence("batch_bags", "tables", tables)
    labels = _labels(names)
    for label, tensors in zip(labels, features, strict=True):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(
                f"batch_bags: {label}: expected (ids, offsets) or (ids, offsets, per_sample_weights), got "
                f"{type(tensors).__name__}"
            )
        if len(tensors) not in (2, 3):
            raise ValueError(
                f"batch_bags: {label}: expected (ids, offsets) or (ids, offsets, per_sample_weights), got "
                f"{len(tensors)} tensors"
            )
        for what, value in zip(("ids", "offsets", "per_sample_weights"), tensors, strict=False):
            _check_tensor(f"batch_bags: {label}: {what}", value)
    weighted = [label for label, one in zip(labels, features, strict=True) if len(one) == 3]
    if weighted and len(weighted) < len(labels):
        raise ValueError(
            "batch_bags: give per_sample_weights for all features or for none; they are given for "
            f"{', '.join(weighted[:8])}"
        )
    ids, offsets, *rest = zip(*features, strict=True)
    for label, values, begins in zip(labels, ids, offsets, strict=True):
        if values.dim() != 1 or begins.dim() != 1:
            raise ValueError(
                f"batch_bags: {label}: expected ids [n] and offsets [B], got {list(values.shape)} and "
                f"{list(begins.shape)}"
            )
        _check_integers(f"batch_bags: {label}: ids", values)
        _check_integers(f"batch_bags: {label}: offsets", begins)
        _check_device(f"batch_bags: {label}: offsets", begins, values)
    if rest:
        for label, values, weights in zip(labels, ids, rest[0], strict=True):
            if weights.shape != values.shape:
                raise ValueError(
                    f"batch_bags: {label}: expected per_sample_weights {list(values.shape)}, got "
                    f"{list(weights.shape)}"
                )
    if include_last_offset and any(begins.shape[0] == 0 for begins in offsets):
        raise RuntimeError("batch_bags: include_last_offset: number of offset should be at least 1")
    sizes = [begins.shape[0] - include_last_offset for begins in offsets]
    flat = _joined("batch_bags", "ids", labels, ids)
    begins = _checked_offsets(labels, ids, offsets, include_last_offset)  # [F, the largest B + 1]
    weights = _joined("batch_bags", "per_sample_weights", labels, rest[0]) if rest else None
    if not include_last_offset:
        # Each feature's last bag ends where the next feature's first one begins.
        firsts = [0]
        for values in ids:
            firsts.append(firsts[-1] + values.shape[0])
        shifted = [
            row[:size] + first for row, size, first in zip(begins, sizes, firsts, strict=False)
        ]
        end = torch.full((1,), firsts[-1], dtype=torch.int64, device=flat.device)
        joined = torch.cat([*shifted, end])
        return TableInput(flat, joined, weights, names, _batch_sizes(names, sizes))
    places = [
        torch.arange(values.shape[0], device=flat.device) < row[-1]
        for values, row in zip(ids, begins, strict=True)
    ]
    lengths = [row[:size] for row, size in zip(begins.diff(dim=1), sizes, strict=True)]
    return _kept_first(flat, torch.cat(places), lengths, weights, names)


def batch_padded(
    tables: Tensor | Mapping[str, Tensor] | Sequence[Tensor],
    lengths: Tensor | Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    padding_value: int | None = None,
    per_sample_weights: Tensor | Mapping[str, Tensor] | Sequence[Tensor] | None = None,
) -> TableInput:
    """Put padded ids of F features together; nothing waits for the GPU.

    The result has the size of what is given: ids that are left out are put behind all bags.

    Args:
        tables: ids `[B, L]` of each feature, with an L, and if need be a B, of its own: by the features' names, in
            any order, or in a sequence in the order of the layer's; or a tensor `[F, B, L]`.
        lengths: how many ids of each row count, from its first on: `[B]` of each feature, by name or in the
            features' order; or a tensor `[F, B]`.
        padding_value: ids equal to it do not count, wherever they stand. Not beside lengths; without either,
            all ids count.
        per_sample_weights: of the ids' shapes, given as these are.

    Returns:
        ids, offsets, weights, names, and the features' B where they differ, which unpack into a batched layer's call.

    Raises:
        ValueError: shapes that do not fit; both lengths and padding_value; on the CPU, a length that is negative or
            larger than L. On CUDA it is cut to that range, and reported as an id out of range is.
        RuntimeError: ids or lengths that are not integers.
        TypeError: something is no tensor.

    Example::

        ids = {"user": torch.tensor([[4, 7, 0]]), "item": torch.tensor([[199]])}
        batch = gpu_embed.batch_padded(ids, padding_value=0)
        sums = layer(*batch)
    """
    if lengths is not None and padding_value is not None:
        raise ValueError("batch_padded: give lengths or padding_value, not both")
    if padding_value is not None and not isinstance(padding_value, torch.SymInt):
        padding_value = _as_padding(padding_value)
    names, features = _in_sequence("batch_padded", "tables", tables)
    labels = _labels(names)
    for label, ids in zip(labels, features, strict=True):
        _check_tensor(f"batch_padded: {label}: ids", ids)
        if ids.dim() != 2:
            raise ValueError(f"batch_padded: {label}: expected ids [B, L], got {list(ids.shape)}")
        _check_integers(f"batch_padded: {label}: ids", ids)
    counts = _like_features("lengths", lengths, names, features, 1)
    given_weights = _like_features("per_sample_weights", per_sample_weights, names, features, 2)
    if counts is not None:
        _check_lengths(labels, features, counts)
    kept = []
    for number, ids in enumerate(features):
        if counts is not None:
            places = torch.arange(ids.shape[1], device=ids.device)
            kept.append(places < counts[number][:, None])
        elif padding_value is not None and _holds(ids.dtype, padding_value):
            kept.append(ids != padding_value)
        else:
            kept.append(torch.ones_like(ids, dtype=torch.bool))
    weights = None
    if given_weights is not None:
        weights = _joined(
            "batch_padded", "per_sample_weights", labels, [w.reshape(-1) for w in given_weights]
        )
    return _kept_first(
        _joined("batch_padded", "ids", labels, [ids.reshape(-1) for ids in features]),
        torch.cat([mask.reshape(-1) for mask in kept]),
        [mask.sum(1) for mask in kept],
        weights,
        names,
    )


def pad_offsets(offsets: Tensor, sizes: Sequence[int]) -> Tensor:
    """Offsets `[sum of sizes + 1]` with empty bags behind each feature's, so that all have as many."""
    most, first, parts = max(sizes), 0, []
    for size in sizes:
        parts += _begins(offsets[first : first + size + 1], most)
        first += size
    return torch.cat([*parts, offsets[first:]])


def _begins(offsets: Tensor, num_bags: int) -> list[Tensor]:
    """Where so many bags begin, in parts: those between the offsets, and empty ones behind them."""
    if torch.compiler.is_compiling():
        # By index: a graph with an end that is repeated would not serve other numbers of times.
        places = torch.arange(num_bags, device=offsets.device)
        return [offsets[places.clamp(max=offsets.shape[0] - 1)]]
    return [offsets[:-1], offsets[-1:].expand(num_bags - offsets.shape[0] + 1)]


def reorder(batch: TableInput, order: Sequence[int]) -> TableInput:
    """The same ids, feature `order[f]` of the batch as feature f; nothing waits for the GPU.

    Ids behind the last offset stay there.
    """
    num_features = len(order)
    bags = Bags(batch.input, batch.offsets, batch.offsets.shape[0] - 1)
    begin, end = (places.view(num_features, -1) for places in bags.ends())
    device = batch.input.device
    lengths = torch.cat([(end - begin).clamp(min=0)[feature] for feature in order])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    moved = bags._replace(offsets=offsets)
    bag = moved.bag_of()
    # One more than there are bags, which may be none.
    first = torch.cat([*(begin[feature] for feature in order), begin.new_zeros(1)])
    first = first[bag.clamp(min=0)]
    positions = torch.arange(bag.shape[0], device=device)
    source = torch.where(bag >= 0, first + positions - offsets[bag.clamp(min=0)], positions)
    weights = batch.per_sample_weights
    return TableInput(
        batch.input[source], offsets, None if weights is None else weights[source], batch.features
    )


def _are_equal(sizes: Sequence[int]) -> bool:
    return all(size == sizes[0] for size in sizes)


def _batch_sizes(features: tuple[str, ...] | int, sizes: Sequence[int]) -> BatchSizes | None:
    """How many bags each feature has; None: all have as many."""
    if _are_equal(sizes):
        return None
    return tuple(sizes) if isinstance(features, int) else dict(zip(features, sizes, strict=True))


def _in_sequence(
    function: str, argument: str, values: Any
) -> tuple[tuple[str, ...] | int, Sequence[Any]]:
    """The features' names, or how many there are, and what is given for each."""
    if isinstance(values, Mapping):
        names, values = tuple(values), tuple(values.values())
        for name in names:
            if not isinstance(name, str):
                raise TypeError(
                    f"{function}: {argument}: a feature's name is a string, got {name!r}"
                )
        features: tuple[str, ...] | int = names
    elif isinstance(values, Tensor):
        values = tuple(values) if values.dim() else ()
        features = len(values)
    elif isinstance(values, Sequence) and not isinstance(values, str):
        features = len(values)
    else:
        raise TypeError(
            f"{function}: {argument} must be a mapping by the features' names, or a sequence in their order, got "
            f"{type(values).__name__}"
        )
    if not values:
        raise ValueError(f"{function}: at least one table is needed")
    return features, values


def _labels(features: tuple[str, ...] | int) -> list[str]:
    """What errors call the features."""
    if isinstance(features, int):
        return [f"table {number}" for number in range(features)]
    return [f"feature {name!r}" for name in features]


def _like_features(
    argument: str,
    values: Any,
    features: tuple[str, ...] | int,
    ids: Sequence[Tensor],
    dims: int,
) -> Sequence[Tensor] | None:
    """Lengths or weights in the order of the ids, of the first so many of their dimensions."""
    if values is None:
        return None
    if isinstance(values, Mapping):
        if isinstance(features, int) or values.keys() != set(features):
            have = "a sequence" if isinstance(features, int) else quoted(features)
            raise ValueError(
                f"batch_padded: {argument} are given for {quoted(map(str, values))}, the ids for {have}"
            )
        values = [values[name] for name in features]
    if not isinstance(values, Tensor | Sequence):
        raise TypeError(
            f"batch_padded: {argument} must be a tensor, or one for each feature, got {type(values).__name__}"
        )
    for label, value in zip(_labels(features), values, strict=False):
        _check_tensor(f"batch_padded: {label}: {argument}", value)
    if len(values) != len(ids):
        raise ValueError(
            f"batch_padded: {argument} are given for {len(values)} features, the ids for {len(ids)}"
        )
    for label, value, one in zip(_labels(features), values, ids, strict=True):
        if value.shape != one.shape[:dims]:
            raise ValueError(
                f"batch_padded: {label}: expected {argument} of shape {list(one.shape[:dims])}, got "
                f"{list(value.shape)}"
            )
        _check_device(f"batch_padded: {label}: {argument}", value, one)
    return list(values)


def _as_padding(padding_value: Any) -> int:
    try:
        if isinstance(padding_value, bool):
            raise TypeError
        return operator.index(padding_value)
    except TypeError:
        raise TypeError(
            "batch_padded: padding_value is one int for all features, got "
            f"{padding_value!r}; give lengths where features differ"
        ) from None


def _holds(dtype: torch.dtype, number: int | torch.SymInt) -> bool:
    """Whether ids of this dtype can be that number; a comparison would wrap it around."""
    info = torch.iinfo(dtype)
    return isinstance(number, torch.SymInt) or info.min <= number <= info.max


def _check_tensor(what: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{what} must be a tensor, got {type(value).__name__}; make one with torch.tensor or torch.as_tensor"
        )


def _check_integers(what: str, value: Tensor) -> None:
    if value.dtype not in IDS:
        raise RuntimeError(
            f"{what} must be int64, int32, int16 or uint8, got {value.dtype}: convert with .long()"
        )


def _check_device(what: str, value: Tensor, ids: Tensor) -> None:
    if value.device != ids.device:
        raise RuntimeError(f"{what} is on {value.device}, but the ids are on {ids.device}")


def _joined(function: str, what: str, labels: Sequence[str], values: Sequence[Tensor]) -> Tensor:
    """One tensor of those of all features."""
    for label, value in zip(labels, values, strict=True):
        if value.device != values[0].device:
            raise RuntimeError(
                f"{function}: {label}: {what} on {value.device}, but those of {labels[0]} on {values[0].device}"
            )
    return torch.cat(tuple(values))


def _checked_offsets(
    labels: Sequence[str],
    ids: Sequence[Tensor],
    offsets: Sequence[Tensor],
    include_last_offset: bool,
) -> Tensor:
    """Each feature's offsets, and where its last bag ends -> int64 [F, B + 1], within its own ids.

    B is the largest: behind a feature's own bags come empty ones.
    """
    for label, values, begins in zip(labels, ids, offsets, strict=True):
        if begins.device.type == "cpu" and not (_is_traced() or _is_transformed()):
            try:
                check_offsets(begins, values)
            except RuntimeError as error:
                raise RuntimeError(f"batch_bags: {label}: {error}") from None
    rows = [begins.to(torch.int64) for begins in offsets]
    if not include_last_offset:
        rows = [
            torch.cat([row, row.new_full((1,), values.shape[0])])
            for row, values in zip(rows, ids, strict=True)
        ]
    sizes = [row.shape[0] - 1 for row in rows]
    if not _are_equal(sizes):
        rows = [torch.cat([*_begins(row, max(sizes)), row[-1:]]) for row in rows]
    given = torch.stack(rows)
    if is_exporting() or (given.device.type == "cpu" and not _is_traced()):
        return given
    within = torch.stack(
        [row.clamp(0, values.shape[0]) for row, values in zip(given, ids, strict=True)]
    )
    within = torch.cat([torch.zeros_like(within[:, :1]), within[:, 1:]], 1).cummax(1).values
    if include_last_offset or given.shape[1] > 1:
        num_ids = torch.stack(
            [torch.full_like(row, values.shape[0]) for row, values in zip(given, ids, strict=True)]
        )
        # The end of the ids was put behind the offsets here, and is none of them.
        last = None if include_last_offset else -1
        _record(bounds.BATCH_OFFSET, labels, given[:, :last], within[:, :last], num_ids[:, :last])
    return within


def _check_lengths(
    labels: Sequence[str], features: Sequence[Tensor], lengths: Sequence[Tensor]
) -> None:
    """Raise ValueError for lengths that no row has; on CUDA record the first."""
    for label, count in zip(labels, lengths, strict=True):
        _check_integers(f"batch_padded: {label}: lengths", count)
    for label, ids, count in zip(labels, features, lengths, strict=True):
        if count.device.type != "cpu" or _is_traced():
            continue
        wrong = (count < 0) | (count.to(torch.int64) > ids.shape[1])
        if wrong.any():
            place = int(wrong.to(torch.int8).argmax())
            raise ValueError(
                f"batch_padded: {label}: lengths[{place}] is {int(count[place])}, but a row has {ids.shape[1]} ids, "
                f"so lengths go from 0 to {ids.shape[1]}"
            )
    if any(count.device.type == "cpu" for count in lengths):
        return
    given = pad_sequence([count.to(torch.int64) for count in lengths], batch_first=True)
    if not given.numel():
        return
    limits = torch.stack(
        [torch.full_like(row, ids.shape[1]) for row, ids in zip(given, features, strict=True)]
    )
    _record(bounds.BATCH_LENGTH, labels, given, given.clamp(min=0).minimum(limits), limits)


def _record(
    kind: int, labels: Sequence[str], given: Tensor, within: Tensor, limits: Tensor
) -> None:
    """Record the first number that had to be changed; [F, *] each."""
    if given.device.type != "cuda" or _is_traced():
        return
    record = bounds.record_for(given.device)
    if record is None:
        return
    record.write_numbers(
        kind, [bounds.table_name_id(label) for label in labels], given, within, limits
    )
    record.finish_lookup(given)


def _is_traced() -> bool:
    """Whether the data of tensors are not to be looked at."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


def _kept_first(
    ids: Tensor,
    kept: Tensor,
    lengths: Sequence[Tensor],
    weights: Tensor | None,
    features: tuple[str, ...] | int,
) -> TableInput:
    """The ids that are kept in their order, then the others, so that no shape depends on the data."""
    sizes = [of_feature.shape[0] for of_feature in lengths]
    ends = torch.cat(tuple(lengths)).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    place = torch.where(kept, kept.cumsum(0), offsets[-1] + (~kept).cumsum(0)) - 1
    moved = torch.empty_like(ids).scatter_(0, place, ids)
    if weights is not None:
        weights = torch.zeros_like(weights).scatter(0, place, weights)
    return TableInput(moved, offsets, weights, features, _batch_sizes(features, sizes))
