"""The correctness gate: what a provider must get right before it is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Comparisons go in pieces of about so many elements, so that they need little memory beside the results.
PIECE = 2**24
# Summing in 16 bits may lose this share of the summed magnitudes and still count as a sum.
LARGEST_LOSS = 1 / 16
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
    if output.shape != (*ids.shape, weight.shape[1]) or output.dtype != weight.dtype:
        return Verdict(False, f"the output is {output.dtype} {list(output.shape)}")
    length = max(1, PIECE // weight.shape[1])
    for start in range(0, ids.numel(), length):
        part = slice(start, start + length)
        actual, expected = output[part].contiguous(), weight.index_select(0, ids[part])
        differs = (actual.view(torch.uint8) != expected.view(torch.uint8)).any(dim=1)
        if differs.any():
            position = start + int(differs.int().argmax())
            return Verdict(False, f"the row at position {position} is not weight[ids]")
    return Verdict(True, "exact")


def check_gradient(
    actual: Tensor, grad_output: Tensor, ids: Tensor, padding_idx: int | None, fp32: bool
) -> Verdict:
    """Gradient [V, D] against sums in fp64.

    A sum of n numbers x in any order is off by at most n eps sum(|x|), plus its one rounding to the table's
    dtype. eps is fp32's (fp64's for a table of that), or without `fp32` the table's own.
    """
    if actual.dtype != grad_output.dtype or actual.dim() != 2:
        return Verdict(False, f"the gradient is {actual.dtype} {list(actual.shape)}")
    rows, sums = _sums(grad_output, ids, padding_idx)
    if (place := _first_nonzero_row(actual, rows)) is not None:
        return Verdict(False, f"row {place} has a gradient, though no id asks for it")
    own = torch.finfo(actual.dtype)
    wide = torch.float64 if actual.dtype == torch.float64 else torch.float32
    worst = loss = 0.0
    accepted = True
    for columns, total, magnitude, counts in sums:
        error = (actual[:, columns].index_select(0, rows).double() - total).abs_()
        rounding = own.eps * (total.abs() + own.smallest_normal)
        bound = 2 * torch.finfo(wide).eps * counts * magnitude + rounding
        worst = max(worst, _largest(error / bound))
        share = (own.eps * counts).clamp(max=LARGEST_LOSS)
        accepted &= bool((error <= share * magnitude + rounding).all())
        loss = max(loss, _largest((error - rounding).clamp(min=0) / magnitude.clamp(min=1e-300)))
    if worst <= 1:
        return Verdict(True, f"error {worst:.2g} of the {SHORT[wide]} bound")
    lost = f"loses up to {100 * loss:.2g} % of the summed magnitudes"
    if accepted and not fp32:
        return Verdict(True, f"{SHORT[actual.dtype]} sum, {lost}")
    return Verdict(False, f"the gradient {lost}")


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
    untouched = torch.ones(len(before), dtype=torch.bool, device=before.device)
    untouched[rows] = False
    length = max(1, PIECE // before.shape[1])
    for start in range(0, len(before), length):
        part = slice(start, start + length)
        changed = (before[part] != after[part]).any(dim=1) & untouched[part]
        if changed.any():
            return Verdict(
                False, f"row {start + int(changed.int().argmax())} changed without an id"
            )
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


Sums = Iterator[tuple[slice, Tensor, Tensor, Tensor]]


def _sums(grad_output: Tensor, ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Sums]:
    """The rows that get a gradient, and by columns: total, sum of magnitudes, counts [rows, 1]."""
    kept = None if padding_idx is None else (ids != padding_idx).nonzero().squeeze(1)
    if kept is not None:
        ids = ids.index_select(0, kept)
    rows, places, counts = torch.unique(ids.long(), return_inverse=True, return_counts=True)

    def by_columns() -> Sums:
        width = max(1, PIECE // max(1, ids.numel()))
        for start in range(0, grad_output.shape[1], width):
            columns = slice(start, start + width)
            values = grad_output[:, columns]
            if kept is not None:
                values = values.index_select(0, kept)
            values = values.double()
            total = values.new_zeros(len(rows), values.shape[1])
            magnitude = total.clone()
            total.index_add_(0, places, values)
            magnitude.index_add_(0, places, values.abs_())
            yield columns, total, magnitude, counts[:, None].double()

    return rows, by_columns()


def _first_nonzero_row(gradient: Tensor, rows: Tensor) -> int | None:
    """The first row that is not in `rows` and not zero."""
    unused = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
    unused[rows] = False
    length = max(1, PIECE // gradient.shape[1])
    for start in range(0, len(gradient), length):
        part = slice(start, start + length)
        bad = (gradient[part] != 0).any(dim=1) & unused[part]
        if bad.any():
            return start + int(bad.int().argmax())
    return None


def _largest(values: Tensor) -> float:
    """The maximum; a NaN counts as infinite."""
    return float(values.nan_to_num(nan=float("inf")).max()) if values.numel() else 0.0
