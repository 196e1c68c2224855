"""Words and vectors in memory: look up, nearest, analogy, pictures."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from gpu_embed.vectors import Vectors, vectors

WORDS = ["king", "queen", "man", "woman", "apple"]
# Royal, female, male, a fruit.
ROWS = np.array([[3, 0, 1, 0], [3, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 2]], np.float32)


def test_words_and_rows():
    found = Vectors(WORDS, ROWS)
    assert found.matrix is ROWS
    assert found["queen"].tolist() == [3, 1, 0, 0]
    assert (len(found), found.dim, found.index("man")) == (5, 4, 2)
    assert "man" in found
    assert "pear" not in found
    assert repr(found) == "Vectors(5 words, 4 numbers each, float32)"
    with pytest.raises(KeyError, match="no vector of the word 'pear'"):
        found["pear"]


def test_words_to_rows():
    found = Vectors({"b": 1, "a": 0, "c": 2}, ROWS[:3])
    assert found.words == ["a", "b", "c"]
    assert found["b"].tolist() == ROWS[1].tolist()
    for wrong in ({"a": 0, "b": 2}, {"a": 1, "b": 1}, {"a": 0, "b": -1}):
        with pytest.raises(ValueError, match=r"rows must be 0, 1, \.\.\., each once"):
            Vectors(wrong, ROWS[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_torch(dtype: torch.dtype):
    rows = torch.nn.Parameter(torch.from_numpy(ROWS).to(dtype))
    found = Vectors(WORDS, rows)
    assert np.array_equal(found.matrix, ROWS)
    assert found.matrix.dtype == (
        np.float32 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    )


@pytest.mark.parametrize(
    ("words", "rows", "said"),
    [
        (
            WORDS[:4],
            ROWS,
            r"expected a matrix \[4, dim\] of .* for 4 words, got \[5, 4\] of float32",
        ),
        (WORDS, ROWS[0], r"got \[4\]"),
        (WORDS, ROWS.astype(int), "of int64"),
        (WORDS, ROWS.astype("longdouble"), r"of \w+"),
        (["a", "b", "a", "b", "c"], ROWS, "the word 'a' comes twice"),
    ],
)
def test_what_is_no_vectors(words, rows, said: str):
    with pytest.raises(ValueError, match=said):
        Vectors(words, rows)


@pytest.mark.parametrize(
    ("words", "rows", "said"),
    [
        ({*WORDS}, ROWS, "a list of words in the order of their rows, got set"),
        (iter(WORDS), ROWS, "a list of words in the order of their rows, got list_iterator"),
        ("kings", ROWS, "a list of words in the order of their rows, got str"),
        (WORDS, ROWS.tolist(), "a matrix of NumPy or torch, got list"),
        (range(5), ROWS, "words that are strings, got int"),
        ([*WORDS[:4], None], ROWS, "words that are strings, got NoneType"),
        ({1: 0}, ROWS[:1], "words that are strings, got int"),
        ([b"a"], ROWS[:1], "words that are strings, got bytes"),
    ],
)
def test_arguments_of_other_types(words, rows, said: str):
    with pytest.raises(TypeError, match=f"Vectors: expected {said}"):
        Vectors(words, rows)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_rows_of_other_dtypes(dtype: torch.dtype):
    with pytest.raises(ValueError, match=rf"got \[5, 4\] of {dtype}"):
        Vectors(WORDS, torch.from_numpy(ROWS).to(dtype))


def test_words_of_other_types_of_strings():
    for words in (np.array(WORDS), [np.str_(word) for word in WORDS]):
        assert set(map(type, Vectors(words, ROWS).words)) == {str}
    made = Vectors({np.str_("b"): 1, "a": 0}, ROWS[:2])
    assert set(map(type, made._places)) == {str}
    assert (made.words, made.index("b")) == (["a", "b"], 1)


def test_converted():
    found = Vectors(WORDS, ROWS)
    assert found.converted(None) is found.converted("float32") is found
    assert found.converted(np.float64).matrix.dtype == np.float64
    for dtype in ("int32", torch.float32, "nothing"):
        with pytest.raises(ValueError, match=rf"dtype must be one of .* got {dtype}"):
            found.converted(dtype)
    with pytest.raises(
        ValueError, match=r"vector of 'man' has the number 70000\.0, which is not finite in float16"
    ):
        Vectors(WORDS, np.where(np.arange(5)[:, None] == 2, 70000, ROWS)).converted("float16")


@pytest.mark.parametrize("block", [2, vectors.BLOCK])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nearest(block: int, dtype: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vectors, "BLOCK", block)
    found = Vectors(WORDS, ROWS.astype(dtype))
    (first, second, *_) = found.nearest("king")
    assert first == ("queen", pytest.approx(0.9, abs=1e-6))
    assert second == ("man", pytest.approx(10**-0.5, abs=1e-6))
    assert len(found.nearest("king")) == 4
    assert [word for word, _ in found.nearest("king", k=1)] == ["queen"]
    assert [word for word, _ in found.nearest("king", k=2, without=["queen"])] == ["man", "woman"]
    assert found.nearest("king", k=0) == []
    for vector in (
        ROWS[0],
        ROWS[0].tolist(),
        torch.from_numpy(ROWS[0]).requires_grad_(),
        torch.tensor(ROWS[0]).bfloat16(),
    ):
        assert found.nearest(vector, k=1) == [("king", pytest.approx(1, abs=1e-6))]


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e-30, "float32"),
        (1e-44, "float32"),
        (1e30, "float32"),
        (1e38, "float32"),
        (1e-300, "float64"),
        (1e307, "float64"),
        (2**-23, "float16"),
        (2e4, "float16"),
    ],
)
def test_nearest_of_huge_and_tiny_rows(scale: float, dtype: str):
    found = Vectors(WORDS, (ROWS * np.float64(scale)).astype(dtype))
    assert found.nearest("king", k=1) == [("queen", pytest.approx(0.9, abs=1e-5))]
    assert found.analogy("man", "king", "woman", k=1)[0][0] == "queen"


def test_nearest_of_a_row_of_zeros():
    found = Vectors(["a", "b", "zeros"], np.array([[1, 0], [1, 1], [0, 0]], np.float32))
    assert found.nearest("a")[-1] == ("zeros", 0)
    assert found.nearest("zeros") == [("a", 0), ("b", 0)]


def test_nearest_says_what_is_wrong():
    found = Vectors(WORDS, ROWS)
    with pytest.raises(KeyError, match="no vector of the word 'pear'"):
        found.nearest("pear")
    for wrong in (np.ones(3), np.ones((1, 4)), np.array([1, np.nan, 0, 0])):
        with pytest.raises(ValueError, match=r"expected a vector \[4\] of finite numbers"):
            found.nearest(wrong)
    for value in (np.nan, np.inf):
        rows = ROWS.astype(np.float64)
        rows[3, 1] = value
        with pytest.raises(ValueError, match=f"vector of 'woman' has the number {value}"):
            Vectors(WORDS, rows).nearest("king")
    assert Vectors([], np.empty((0, 2))).nearest(np.ones(2)) == []


def test_analogy():
    found = Vectors(WORDS, ROWS)
    assert found.analogy("man", "king", "woman", k=1)[0][0] == "queen"
    assert {word for word, _ in found.analogy("man", "king", "woman")} == {"queen", "apple"}
    with pytest.raises(KeyError, match="no vector of the word 'pear'"):
        found.analogy("man", "king", "pear")


def test_a_matrix_that_is_mapped_is_read_and_not_changed(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS)
    found = Vectors(WORDS, np.load(tmp_path / "rows.npy", mmap_mode="r"))
    assert found.nearest("king", k=1)[0][0] == "queen"
    table, _ = found.embedding(WORDS)
    table.weight.data.zero_()
    assert np.array_equal(found.matrix, ROWS)
    assert isinstance(found.matrix, np.memmap)


def test_a_picture():
    figure = Vectors(WORDS, ROWS).plot(["king", "queen", "apple"], title="words")
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"king", "queen", "apple"}
    assert axes.get_title() == "words"
    with pytest.raises(KeyError, match="pear"):
        Vectors(WORDS, ROWS).plot(["king", "pear"])
