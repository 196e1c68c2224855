"""Strings and ids to rows by hashing: the same everywhere, spread evenly, and of any kind."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from gpu_embed.text import hash_ids

STRINGS = ["hope", "to", "", "h\0", "h", "é" * 20, "x" * 33, "x" * 1000, "\ud800", "日本"]


def test_the_same_on_every_machine() -> None:
    """What these were when the function was written: tables were trained by them."""
    assert hash_ids(STRINGS, 10**6).tolist() == [
        387081,
        379139,
        742385,
        456537,
        240504,
        870319,
        24163,
        463694,
        89921,
        724501,
    ]
    assert hash_ids([0, 1, -1, 2**62], 10**6).tolist() == [807871, 785483, 938999, 822111]
    assert hash_ids(STRINGS[:2], 10**6, seed=7, hashes=2).tolist() == [
        [301165, 414864],
        [200678, 454312],
    ]


def test_the_same_in_every_process() -> None:
    """Python's own hash of a string is another in each."""
    code = f"from gpu_embed.text import hash_ids; print(hash_ids({STRINGS!r}, 1000).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(hash_ids(STRINGS, 1000).tolist())


def test_alone_or_among_others() -> None:
    together = hash_ids(STRINGS, 10**9).tolist()
    assert together == [hash_ids([one], 10**9).item() for one in STRINGS]
    assert len(set(together)) == len(STRINGS)
    lengths = ["x" * length for length in range(300)]
    assert hash_ids(lengths, 10**12).unique().numel() == 300


@pytest.mark.parametrize(
    "values",
    [
        STRINGS[:2],
        tuple(STRINGS[:2]),
        np.array(STRINGS[:2]),
        np.array(STRINGS[:2], dtype=object),
        np.array([STRINGS[:2]]),
        np.array(STRINGS[:2], np.dtypes.StringDType()),
    ],
    ids=["list", "tuple", "array", "objects", "matrix", "of any length"],
)
def test_strings_of_every_kind(values) -> None:
    rows = hash_ids(values, 1000)
    assert rows.shape == np.asarray(values).shape
    assert rows.dtype == torch.int64
    assert rows.flatten().tolist() == hash_ids(STRINGS[:2], 1000).tolist()


@pytest.mark.parametrize(
    "values",
    [
        [3, 4],
        np.array([3, 4], np.uint8),
        np.array([3, 4], np.uint64),
        np.array([3, 4], object),
        torch.tensor([3, 4]),
        torch.tensor([3, 4], dtype=torch.int16),
    ],
    ids=["list", "uint8", "uint64", "objects", "int64", "int16"],
)
def test_integers_of_every_kind(values) -> None:
    assert hash_ids(values, 1000).tolist() == hash_ids([3, 4], 1000).tolist()
    assert hash_ids(np.array([2**64 - 1], np.uint64), 1000).item() == hash_ids([-1], 1000).item()
    assert hash_ids(["3"], 1000).item() != hash_ids([3], 1000).item()


@pytest.mark.parametrize(
    "make", [lambda n: list(range(n)), lambda n: [f"user {i}" for i in range(n)]]
)
@pytest.mark.parametrize("seed", [0, 5])
def test_as_many_collide_as_the_formula_says(make, seed) -> None:
    """Within six standard deviations of a binomial's; and each of 64 rows gets its share."""
    n, rows = 20_000, 50_000
    counts = hash_ids(make(n), rows, seed=seed).bincount(minlength=rows)
    expected = 1 - (1 - 1 / rows) ** (n - 1)
    found = 1 - (counts == 1).sum().item() / n
    assert abs(found - expected) < 6 * (expected * (1 - expected) / n) ** 0.5
    few = hash_ids(make(n), 64, seed=seed).bincount(minlength=64)
    assert (few - n / 64).abs().max() < 6 * (n / 64) ** 0.5


def test_several_hashes_are_independent() -> None:
    rows = hash_ids(list(range(10_000)), 100, hashes=2)
    assert rows.shape == (10_000, 2)
    assert (rows[:, 0] == rows[:, 1]).sum() < 200
    # 10,000 values in 10,000 pairs of rows: 63 % share theirs.
    pairs = (rows[:, 0] * 100 + rows[:, 1]).bincount(minlength=10_000)
    assert abs(1 - (pairs == 1).sum().item() / 10_000 - 0.632) < 0.03
    others = hash_ids(list(range(10_000)), 100, seed=1)
    assert (others == rows[:, 0]).sum() < 200


@pytest.mark.parametrize(
    "values", [[], np.array([], np.int64), torch.zeros(0, 3, dtype=torch.int64)]
)
def test_nothing(values) -> None:
    assert hash_ids(values, 10).numel() == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("one", "a str; put what is to be hashed in a list"),
        ({"one"}, "a set; put what is to be hashed in a list"),
        ([1, "a"], "strings and 1, a int"),
        ([1.5], "an array of float64"),
        (torch.ones(2), "a tensor of torch.float32"),
        (["a", 3], "strings and 3, a int"),
        ([None], "strings and None, a NoneType"),
        ([2**80], "strings and 1208925819614629174706176, a int"),
        (np.array([1, "a"], object), "strings and 1, a int"),
    ],
)
def test_what_is_neither(values, said) -> None:
    with pytest.raises(TypeError, match=f"expected strings or integers, got {said}"):
        hash_ids(values, 10)


@pytest.mark.parametrize("name", ["rows", "seed", "hashes"])
def test_rows_seed_and_hashes_are_integers(name) -> None:
    with pytest.raises(TypeError, match="float"):
        hash_ids(["a"], **{"rows": 10, name: 3.0})
    for number in (np.int64(3), np.uint64(3), torch.tensor(3)):
        found = hash_ids(["a"], **{"rows": 10, name: number})
        assert torch.equal(found, hash_ids(["a"], **{"rows": 10, name: 3}))


def test_seed_may_be_any_integer() -> None:
    seeds = [0, -1, 2**64, 2**64 - 1, np.int64(-1)]
    rows = [hash_ids(["a"], 10**9, seed=seed).item() for seed in seeds]
    assert rows[0] == rows[2] != rows[1] == rows[3] == rows[4]


@pytest.mark.parametrize("arguments", [{"rows": 0}, {"rows": 3, "hashes": 0}])
def test_too_few(arguments) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got rows="):
        hash_ids(["a"], **arguments)


def test_strings_that_differ_in_the_last_bytes_of_words_of_eight() -> None:
    """They once shared all 64 bits, two of three."""
    ends = [chr(code) for code in range(48, 78)]
    strings = [f"aaaaaaa{a}bbb{b}ccc{c}" for a in ends for b in ends for c in ends]
    assert hash_ids(strings, 2**62).unique().numel() == len(strings)


def test_nested_lists_are_as_their_strings() -> None:
    assert hash_ids([["h\0", "h"]], 10**9).tolist() == [hash_ids(["h\0", "h"], 10**9).tolist()]
    with pytest.raises(TypeError, match="strings and 1, a int"):
        hash_ids([1, "h"], 10)
