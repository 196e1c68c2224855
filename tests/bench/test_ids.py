"""The benchmark's ids: seeded, in the table, distributed as their names say."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_embed.bench import ids

DRAWN = (
    "uniform",
    "zipf:0",
    "zipf:1",
    "zipf:1.05",
    "zipf:3",
    "equal",
    "sorted",
    "hot:0.3",
    "spread:5",
    "text",
)


@pytest.mark.parametrize("distribution", DRAWN)
@pytest.mark.parametrize("num_embeddings", [1, 7, 50_000])
def test_ids_lie_in_the_table_and_come_from_the_seed(distribution, num_embeddings):
    drawn = ids.draw(distribution, 3000, num_embeddings, seed=5)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (3000,)
    assert drawn.min() >= 0
    assert drawn.max() < num_embeddings
    assert torch.equal(drawn, ids.draw(distribution, 3000, num_embeddings, seed=5))


@pytest.mark.parametrize(
    "distribution", ["uniform", "zipf:1.05", "sorted", "hot:0.3", "spread:99", "text"]
)
def test_another_seed_gives_other_ids(distribution):
    first, second = (ids.draw(distribution, 500, 10_000, seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_zipf_follows_its_law():
    counts = torch.bincount(ids.draw("zipf:1", 400_000, 1000), minlength=1000).double()
    # Row k has log((k + 2) / (k + 1)) / log(1001) of the ids.
    rank = torch.arange(1, 1001, dtype=torch.float64)
    expected = 400_000 * torch.log((rank + 1) / rank) / torch.log(torch.tensor(1001.0))
    near = (counts - expected).abs() < 5 * expected.sqrt() + 1
    assert near.all()


def test_zipf_of_0_is_uniform_and_a_larger_alpha_is_steeper():
    shares = [
        (ids.draw(f"zipf:{alpha}", 100_000, 1000) == 0).double().mean() for alpha in (0, 1, 1.5)
    ]
    assert shares[0] == pytest.approx(0.001, abs=5e-4)
    assert shares[0] < shares[1] < shares[2]


def test_equal_sorted_and_hot():
    assert ids.draw("equal", 100, 1000).unique().numel() == 1
    drawn = ids.draw("sorted", 100, 1000)
    assert torch.equal(drawn, drawn.sort().values)
    # Exactly the share, and whatever the others hit by chance.
    assert 250 <= (ids.draw("hot:0.25", 1000, 10**9) == 0).sum() <= 251
    assert (ids.draw("hot:1", 1000, 10**9) == 0).all()


@pytest.mark.parametrize("num_embeddings", [100, 12_345, 5_000_000_000])
def test_spread_touches_the_same_number_of_rows_all_over_any_table(num_embeddings):
    rows = ids.draw("spread:100", 5000, num_embeddings).unique()
    assert rows.tolist() == [k * num_embeddings // 100 for k in range(100)]


def test_padding_is_an_exact_share_at_random_places():
    drawn = ids.draw("uniform", 1000, 10**9, padding=0.3, padding_idx=77)
    places = (drawn == 77).nonzero().squeeze(1)
    assert len(places) == 300
    assert places.max() > 800


def test_text_is_ranked_by_frequency_and_rare_words_share_the_last_row():
    drawn = ids.draw("text", 200_000, 500)
    counts = torch.bincount(drawn, minlength=500)
    assert counts[0] == counts[:-1].max()
    assert counts[-1] > counts[-2]


@pytest.mark.parametrize("suffix", [".npy", ".txt", ".pt"])
def test_ids_from_a_file(tmp_path: Path, suffix):
    stored = torch.arange(10, dtype=torch.int32)
    path = tmp_path / f"ids{suffix}"
    if suffix == ".npy":
        np.save(path, stored.numpy())
    elif suffix == ".txt":
        path.write_text("\n".join(map(str, stored.tolist())))
    else:
        torch.save(stored, path)
    assert ids.length_of_file(str(path)) == 10
    drawn = ids.draw(str(path), 25, 10)
    # The file's order, from some place on, and from the start again.
    assert torch.equal(drawn, (torch.arange(25) + drawn[0]) % 10)
    with pytest.raises(ids.IdsError, match=r"the ids go from 0 to 9, the table has 9 rows"):
        ids.draw(str(path), 25, 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [("1 2 x", "cannot be read as ids"), ("", "at least one id"), ("3 -1", "from -1 to 3")],
)
def test_a_bad_file_is_refused(tmp_path: Path, content, message):
    path = tmp_path / "ids.txt"
    path.write_text(content)
    with pytest.raises(ids.IdsError, match=message):
        ids.draw(str(path), 5, 10)


def test_floats_are_no_ids(tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.ones(3))
    with pytest.raises(ids.IdsError, match=r"ids are integers, these are torch\.float64"):
        ids.draw(str(tmp_path / "ids.npy"), 5, 10)


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ("zip", "unknown distribution 'zip': choose one of uniform, zipf:ALPHA"),
        ("zipf", "zipf needs a number from 0 to 10"),
        ("zipf:nan", "zipf needs a number"),
        ("hot:1.5", "hot needs a number from 0 to 1"),
        ("equal:3", "takes no argument"),
        ("nowhere.npy", "there is no file nowhere.npy"),
    ],
)
def test_an_unknown_distribution_is_said_in_one_sentence(distribution, message):
    with pytest.raises(ids.IdsError, match=message) as raised:
        ids.parse(distribution)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ids.WORD_LISTS)
def test_word_lists_are_optional(name):
    if importlib.util.find_spec(name) is None:
        with pytest.raises(ids.IdsError, match=f"pip install {name}"):
            ids.draw(name, 10, 10)
    else:
        drawn = ids.draw(name, 10_000, 1000)
        assert (drawn == 0).sum() > (drawn == 999).sum()


def test_a_word_list_is_drawn_by_frequency(monkeypatch):
    name = "wordfreq"
    monkeypatch.setitem(ids.WORD_LISTS, name, lambda: [1.0, 6.0, 3.0])
    monkeypatch.setattr(ids.importlib.util, "find_spec", lambda _: True)
    ids._frequencies.cache_clear()
    try:
        shares = torch.bincount(ids.draw(name, 10_000, 100)) / 10_000
    finally:
        ids._frequencies.cache_clear()
    assert torch.allclose(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.02)
