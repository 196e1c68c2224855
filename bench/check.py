"""The correctness gate: what a provider must get right before it is timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .optimizers import Definition, Steps

# Comparisons go in pieces of about so many elements, so that they need little memory beside the results.
PIECE = 2**24
# Summing in 16 bits may lose this share of the summed magnitudes and still count as a sum.
LARGEST_LOSS = 1 / 16
# More operations than any optimizer needs for a number of the table.
ROUNDINGS = 64
SHORT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


@dataclass(frozen=True)
class Verdict:
    """Whether a result may be timed, and how well it matched."""

    ok: bool
    match: str


def check_forward(output: Tensor, weight: Tensor, ids: Tensor) -> Verdict:
    """Output [N, D] must be weight[ids], bit for bit."""
    if wrong := _wrong_form(output, weight, len(ids)):
        return wrong
    for part in _pieces(ids.numel(), weight.shape[1]):
        actual, expected = output[part].contiguous(), weight.index_select(0, ids[part])
        differs = (actual.view(torch.uint8) != expected.view(torch.uint8)).any(dim=1)
        if differs.any():
            position = part.start + int(differs.int().argmax())
            return Verdict(False, f"the row at position {position} is not weight[ids]")
    return Verdict(True, "exact")


def _wrong_form(output: Tensor, weight: Tensor, num_rows: int) -> Verdict | None:
    if output.shape == (num_rows, weight.shape[1]) and output.dtype == weight.dtype:
        return None
    return Verdict(False, f"the output is {output.dtype} {list(output.shape)}")


def check_bags(output: Tensor, weight: Tensor, ids: Tensor, fp32: bool) -> Verdict:
    """Output [B, D] must be the sums of weight[ids], ids [B, L]; bounds as of `check_gradient`."""
    num_bags, hotness = ids.shape
    if wrong := _wrong_form(output, weight, num_bags):
        return wrong
    judge = Judge(output.dtype, fp32)
    for part in _pieces(num_bags, hotness * weight.shape[1]):
        rows = weight.index_select(0, ids[part].flatten()).view(-1, hotness, weight.shape[1])
        rows = rows.double()
        judge(output[part], rows.sum(1), rows.abs_().sum(1), hotness)
    return judge.verdict("the sum of a bag")


def check_gradient(
    actual: Tensor, grad_output: Tensor, ids: Tensor, padding_idx: int | None, fp32: bool
) -> Verdict:
    """Gradient [V, D] against sums in fp64. Each row of grad_output belongs to one id, or to one bag.

    A sum of n numbers x in any order is off by at most n eps sum(|x|), plus its one rounding to the table's
    dtype. eps is fp32's (fp64's for a table of that), or without `fp32` the table's own.
    """
    if actual.dtype != grad_output.dtype or actual.dim() != 2:
        return Verdict(False, f"the gradient is {actual.dtype} {list(actual.shape)}")
    rows, sums = _sums(grad_output, ids, padding_idx)
    if (place := _first_changed_row(None, actual, rows)) is not None:
        return Verdict(False, f"row {place} has a gradient, though no id asks for it")
    judge = Judge(actual.dtype, fp32)
    for columns, total, magnitude, counts in sums:
        judge(actual[:, columns].index_select(0, rows), total, magnitude, counts)
    return judge.verdict("the gradient")


def check_accumulation(
    before: Tensor,
    after: Tensor,
    grad_output: Tensor,
    ids: Tensor,
    padding_idx: int | None,
    fp32: bool,
    in_place: bool,
) -> Verdict:
    """Gradient [V, D] after a backward that adds to `before`, against sums in fp64; bounds as of `check_gradient`.

    Args:
        in_place: a sum is added as it is; else it is rounded to the table's dtype first.
    """
    if after.dtype != before.dtype or after.shape != before.shape:
        return Verdict(False, f"the gradient is {after.dtype} {list(after.shape)}")
    rows, sums = _sums(grad_output, ids, padding_idx)
    if (place := _first_changed_row(before, after, rows)) is not None:
        return Verdict(False, f"row {place} of the gradient changed without an id")
    judge = Judge(grad_output.dtype, fp32)
    for columns, total, magnitude, counts in sums:
        old = before[:, columns].index_select(0, rows).double()
        rounding = _rounding(old + total, after.dtype)
        if not in_place:
            rounding += _rounding(total, grad_output.dtype)
        actual = after[:, columns].index_select(0, rows)
        judge(actual, old + total, old.abs() + magnitude, counts + 1, rounding)
    return judge.verdict("the gradient")


def _rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What one rounding of the values to the dtype may change."""
    info = torch.finfo(dtype)
    return info.eps * (values.abs() + info.smallest_normal)


class Judge:
    """Compares sums of a dtype with fp64's, piece by piece, by the bounds of `check_gradient`."""

    def __init__(self, dtype: torch.dtype, fp32: bool) -> None:
        self._dtype = dtype
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._fp32 = fp32
        self._worst = self._loss = 0.0
        self._accepted = True

    def __call__(
        self,
        actual: Tensor,
        total: Tensor,
        magnitude: Tensor,
        counts: Tensor | float,
        rounding: Tensor | None = None,
    ) -> None:
        """Sums of `counts` numbers of the summed magnitudes; fp64 but for actual.

        Args:
            rounding: what the result's roundings may change; None: one to the dtype.
        """
        own = torch.finfo(self._dtype)
        error = (actual.double() - total).abs_()
        rounding = _rounding(total, self._dtype) if rounding is None else rounding
        bound = 2 * torch.finfo(self._wide).eps * counts * magnitude + rounding
        self._worst = max(self._worst, _largest(error / bound))
        share = torch.as_tensor(own.eps * counts, device=actual.device).clamp(max=LARGEST_LOSS)
        self._accepted &= bool((error <= share * magnitude + rounding).all())
        loss = _largest((error - rounding).clamp(min=0) / magnitude.clamp(min=1e-300))
        self._loss = max(self._loss, loss)

    def verdict(self, what: str) -> Verdict:
        if self._worst <= 1:
            return Verdict(True, f"error {self._worst:.2g} of the {SHORT[self._wide]} bound")
        lost = f"loses up to {100 * self._loss:.2g} % of the summed magnitudes"
        if self._accepted and not self._fp32:
            return Verdict(True, f"{SHORT[self._dtype]} sum, {lost}")
        return Verdict(False, f"{what} {lost}")


def check_step(
    before: Tensor,
    after: Tensor,
    grad_output: Tensor,
    ids: Tensor,
    padding_idx: int | None,
    learning_rate: float,
) -> Verdict:
    """Table [V, D] after SGD: before - learning_rate * gradient; all other rows as they were."""
    rows, sums = _sums(grad_output, ids, padding_idx)
    if (place := _first_changed_row(before, after, rows)) is not None:
        return Verdict(False, f"row {place} changed without an id")
    eps = torch.finfo(before.dtype).eps
    worst = 0.0
    for columns, total, magnitude, counts in sums:
        old = before[:, columns].index_select(0, rows).double()
        new = after[:, columns].index_select(0, rows).double()
        share = (eps * counts).clamp(max=LARGEST_LOSS)
        # Sparse gradients are added one by one to the table, so each addition may round to its dtype.
        change = learning_rate * magnitude
        bound = share * change + eps * counts * (old.abs() + change)
        worst = max(worst, _largest((new - (old - learning_rate * total)).abs_() / bound))
    if worst <= 1:
        return Verdict(True, f"error {worst:.2g} of the bound")
    return Verdict(False, f"the step is off by {worst:.2g} times the bound")


def check_steps(
    definition: Definition,
    before: Tensor,
    after: Tensor,
    grad_output: Tensor,
    id_sets: Sequence[Tensor],
    padding_idx: int | None,
) -> Verdict:
    """Table [V, D] after a step with each of the id sets, from fresh state, against the definition in fp64.

    grad_output holds integers whose sums are exact in the table's dtype, so only the optimizer's own operations
    round: fewer than ROUNDINGS for a number, and for a mean over a row one more for each column.
    """
    kept = [_kept(ids, padding_idx) for ids in id_sets]
    rows = torch.unique(torch.cat([ids for ids, _ in kept]))
    if (place := _first_changed_row(before, after, rows)) is not None:
        return Verdict(False, f"row {place} changed without an id")
    places = [torch.searchsorted(rows, ids) for ids, _ in kept]
    used = [torch.zeros(len(rows), 1, dtype=torch.bool, device=rows.device) for _ in kept]
    for is_used, place_of in zip(used, places, strict=True):
        is_used[place_of] = True
    embedding_dim = before.shape[1]

    def grads(columns: slice) -> list[Tensor]:
        return [
            _row_sums(grad_output[:, columns], ids.numel(), positions, place_of, len(rows))
            for ids, (_, positions), place_of in zip(id_sets, kept, places, strict=True)
        ]

    pieces = list(_pieces(embedding_dim, max(len(rows), *(ids.numel() for ids in id_sets))))
    mean_squares = [grad_output.new_zeros(len(rows), 1, dtype=torch.float64) for _ in id_sets]
    for columns in pieces:
        for mean_square, grad in zip(mean_squares, grads(columns), strict=True):
            mean_square += grad.square_().sum(1, keepdim=True) / embedding_dim
    worst = 0.0
    for columns in pieces:
        old = before[:, columns].index_select(0, rows).double()
        expected, change = definition.apply(Steps(old, grads(columns), used, mean_squares))
        new = after[:, columns].index_select(0, rows).double()
        eps = (ROUNDINGS + embedding_dim) * torch.finfo(before.dtype).eps
        worst = max(worst, _largest((new - expected).abs_() / (eps * (old.abs() + change))))
    if worst <= 1:
        return Verdict(True, f"{definition.name}, error {worst:.2g} of the bound")
    return Verdict(False, f"not {definition.name}: off by {worst:.2g} times the bound")


Sums = Iterator[tuple[slice, Tensor, Tensor, Tensor]]


def _sums(grad_output: Tensor, ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Sums]:
    """The rows that get a gradient, and by columns: total, sum of magnitudes, counts [rows, 1]."""
    num_ids = ids.numel()
    ids, positions = _kept(ids, padding_idx)
    rows, places, counts = torch.unique(ids, return_inverse=True, return_counts=True)

    def by_columns() -> Sums:
        for columns in _pieces(grad_output.shape[1], num_ids):
            values = grad_output[:, columns]
            total = _row_sums(values, num_ids, positions, places, len(rows))
            magnitude = _row_sums(values.abs(), num_ids, positions, places, len(rows))
            yield columns, total, magnitude, counts[:, None].double()

    return rows, by_columns()


def _kept(ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor | None]:
    """The ids that get a gradient, int64, flat, and their positions; None: all."""
    flat = ids.flatten().long()
    if padding_idx is None:
        return flat, None
    positions = (flat != padding_idx).nonzero().squeeze(1)
    return flat.index_select(0, positions), positions


def _row_sums(
    values: Tensor, num_ids: int, positions: Tensor | None, places: Tensor, num_rows: int
) -> Tensor:
    """Sums in fp64 of values [N or bags, d], those of a bag for each of its ids, by row -> [num_rows, d]."""
    values = values.double()
    if num_ids > len(values) > 0:
        values = values.repeat_interleave(num_ids // len(values), 0)
    if positions is not None:
        values = values.index_select(0, positions)
    return values.new_zeros(num_rows, values.shape[1]).index_add_(0, places, values)


def _first_changed_row(before: Tensor | None, after: Tensor, rows: Tensor) -> int | None:
    """The first row that is not in `rows` and not as it was; before=None: not zero."""
    unused = torch.ones(len(after), dtype=torch.bool, device=rows.device)
    unused[rows] = False
    for part in _pieces(len(after), after.shape[1]):
        changed = after[part] != (0 if before is None else before[part])
        bad = changed.any(dim=1) & unused[part]
        if bad.any():
            return part.start + int(bad.int().argmax())
    return None


def _pieces(length: int, size: int) -> Iterator[slice]:
    """All of `length` items of so many elements, in pieces of about PIECE elements."""
    step = max(1, PIECE // max(1, size))
    return (slice(start, start + step) for start in range(0, length, step))


def _largest(values: Tensor) -> float:
    """The maximum; a NaN counts as infinite."""
    return float(values.nan_to_num(nan=float("inf")).max()) if values.numel() else 0.0
