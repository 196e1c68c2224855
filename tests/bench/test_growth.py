"""The exponents of growth, from synthetic times."""

from dataclasses import replace

import numpy as np
import pytest
from pictured import BASE

from gpu_embed.bench.growth import fit, growths
from gpu_embed.bench.shapes import SETS, STEPS

VOCABS = (10_000, 100_000, 1_000_000, 50_000_000)


def timed(ms, **changes):
    return replace(BASE, ms_p20=0.9 * ms, ms_p50=ms, ms_p80=1.1 * ms, **changes)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_power_law_is_found(exponent):
    found, error = fit({size: 3.0 * size**exponent for size in VOCABS})
    assert found == pytest.approx(exponent, abs=1e-12)
    assert error == pytest.approx(0, abs=1e-6)


def test_the_error_is_the_textbooks():
    times = {10: 1.0, 100: 3.0, 1000: 4.0, 10_000: 20.0}
    x, y = np.log(list(times)), np.log(list(times.values()))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    left = y - y.mean() - slope * (x - x.mean())
    error = np.sqrt((left**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    assert fit(times) == pytest.approx((slope, error))


def test_each_size_alone_is_fitted():
    rows = [timed(vocab**0.5, vocab=vocab, num_ids=64) for vocab in VOCABS]
    rows += [timed(float(ids), vocab=VOCABS[0], num_ids=ids) for ids in (128, 1024)]
    rows[0] = timed(64.0, vocab=VOCABS[0], num_ids=64)
    by_rows, by_ids = growths(rows)
    assert (by_rows.column, list(by_rows.sizes), by_rows.key.num_ids) == ("vocab", list(VOCABS), 64)
    assert (by_ids.column, by_ids.sizes, by_ids.key.vocab) == (
        "num_ids",
        [64, 128, 1024],
        VOCABS[0],
    )
    assert str(by_ids) == "N^1.00 ± 0.00"


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:2],
        lambda rows: [replace(row, vocab=row.vocab // VOCABS[0]) for row in rows[:1] * 3],
        lambda rows: [replace(row, vocab=5 + i) for i, row in enumerate(rows)],
        lambda rows: [replace(row, load=3.0) for row in rows],
        lambda rows: [replace(row, status="wrong") for row in rows],
        lambda rows: [replace(row, dim=8 * i) for i, row in enumerate(rows)],
    ],
    ids=["two", "one size", "too near", "noisy", "wrong", "other shapes"],
)
def test_what_says_nothing_of_growth_is_left_out(change):
    assert growths(change([timed(1.0, vocab=vocab) for vocab in VOCABS])) == []


def test_set_j_grows_by_rows_and_by_ids():
    cells = SETS["J"].cells
    for column in ("vocab", "num_ids"):
        rows = [timed(1.0, mode=mode, **vars(cell)) for cell in cells for mode in SETS["J"].modes]
        grown = {growth.key.mode for growth in growths(rows) if growth.column == column}
        assert grown >= set(STEPS)
