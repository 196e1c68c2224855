"""Vectors that are saved are read back to the same bits, by us and by gensim."""

import os
from pathlib import Path

import numpy as np
import pytest
from gensim.models import KeyedVectors

from gpu_embed.vectors import Vectors, load, saving

WORDS = ["king", "a\u00a0b", "\u2028", "x\u3000", "\u0085", "日本", '"', "'s", "1", "#"]
ENDS = [".txt", ".vec", ".bin", ".kv"]


def vectors(dtype: str = "float32", dim: int = 7) -> Vectors:
    bits = {"float16": np.uint16, "float32": np.uint32, "float64": np.uint64}[dtype]
    # Any bits but those of what is not finite.
    rows = (
        np.random.default_rng(0)
        .integers(0, np.iinfo(bits).max, (len(WORDS), dim), bits)
        .view(dtype)
    )
    rows = np.where(np.isfinite(rows), rows, 1).astype(dtype)
    info = np.finfo(dtype)
    rows[0, :6] = [0, -0.0, info.max, info.min, info.smallest_subnormal, -info.smallest_subnormal]
    return Vectors(WORDS, rows)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_same_bits_are_read(
    tmp_path: Path, end: str, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(saving, "BLOCK", 3)
    saved = vectors(dtype)
    if (end, dtype) == (".bin", "float64"):
        saved = Vectors(WORDS, vectors("float32").matrix.astype(np.float64))
    path = tmp_path / f"words{end}"
    saved.save(path)
    found = load(path, dtype=dtype)
    assert found.words == WORDS
    assert found.matrix.dtype == dtype
    assert found.matrix.tobytes() == saved.matrix.tobytes()
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("end", ENDS)
def test_gensim_reads_it(tmp_path: Path, end: str):
    saved = Vectors(
        ["king", "queen", "日本"], np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    )
    path = str(tmp_path / f"words{end}")
    saved.save(path)
    if end == ".kv":
        found = KeyedVectors.load(path)
    else:
        found = KeyedVectors.load_word2vec_format(path, binary=end == ".bin")
    assert found.index_to_key == saved.words
    assert np.array_equal(found.vectors, saved.matrix)


def test_keyed_vectors_hold_any_word(tmp_path: Path):
    words = ["", " ", "New York", "a\nb", "a\0b", "x"]
    Vectors(words, np.eye(6)).save(tmp_path / "words.kv")
    assert load(tmp_path / "words.kv").words == words


def test_a_large_matrix_of_keyed_vectors_lies_in_a_file_of_its_own(tmp_path: Path):
    saved = Vectors([str(number) for number in range(110_000)], np.ones((110_000, 100), np.float32))
    saved.save(tmp_path / "words.kv")
    assert {one.name for one in tmp_path.iterdir()} == {"words.kv", "words.kv.vectors.npy"}
    found = load(tmp_path / "words.kv")
    assert isinstance(found.matrix, np.memmap)
    # Onto itself, while it is mapped.
    found.save(tmp_path / "words.kv")
    assert np.array_equal(found.matrix, saved.matrix)
    assert np.array_equal(load(tmp_path / "words.kv").matrix, saved.matrix)


@pytest.mark.parametrize("end", ENDS)
def test_no_words(tmp_path: Path, end: str):
    Vectors([], np.empty((0, 3), np.float32)).save(tmp_path / f"words{end}")
    found = load(tmp_path / f"words{end}")
    assert (found.words, found.matrix.shape) == ([], (0, 3))


@pytest.mark.parametrize("end", ENDS[:3])
@pytest.mark.parametrize(
    "word", ["", " ", "New York", "a\tb", "a\nb", "a\r", "\x0b", "a\x0c", "a\0b"]
)
def test_words_that_a_format_cannot_say(tmp_path: Path, end: str, word: str):
    with pytest.raises(ValueError, match=r"is empty or holds a space, .*: save as \.kv"):
        Vectors(["a", word], np.ones((2, 2))).save(tmp_path / f"words{end}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["a" * 4096, "é" * 2048], ids=["letters", "bytes"])
def test_a_word_that_is_too_long_for_a_binary_file(tmp_path: Path, word: str):
    for path in (tmp_path / "words.txt", tmp_path / "words.kv"):
        Vectors(["a", word], np.ones((2, 2), np.float32)).save(path)
        assert load(path).words == ["a", word]
    path = tmp_path / "words.bin"
    with pytest.raises(ValueError, match=r"has 4,096 bytes, and in this format .* save as \.txt"):
        Vectors(["a", word], np.ones((2, 2), np.float32)).save(path)
    assert not path.exists()
    Vectors(["a", word[1:]], np.ones((2, 2), np.float32)).save(path)
    assert load(path).words == ["a", word[1:]]


@pytest.mark.parametrize("end", ENDS)
def test_words_without_numbers(tmp_path: Path, end: str):
    made, path = Vectors(["a"], np.empty((1, 0), np.float32)), tmp_path / f"words{end}"
    if end == ".kv":
        made.save(path)
        assert load(path).matrix.shape == (1, 0)
    else:
        with pytest.raises(ValueError, match=rf"words\{end}: words without numbers"):
            made.save(path)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ENDS)
def test_words_of_numpy(tmp_path: Path, end: str):
    Vectors(np.array(["a", "b"]), np.ones((2, 2), np.float32)).save(tmp_path / f"words{end}")
    assert load(tmp_path / f"words{end}").words == ["a", "b"]


@pytest.mark.parametrize("end", ENDS)
def test_half_of_a_character(tmp_path: Path, end: str):
    with pytest.raises(ValueError, match=r"'\\ud83d' holds half of a character"):
        Vectors(["a", "\ud83d"], np.ones((2, 2))).save(tmp_path / f"words{end}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(tmp_path: Path, end: str, value: float):
    with pytest.raises(ValueError, match="vector of 'b' has the number"):
        Vectors(["a", "b"], np.array([[1], [value]])).save(tmp_path / f"words{end}")
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_fp32_does_not_have(tmp_path: Path):
    made = Vectors(["a", "b"], np.array([[1], [1e39]]))
    with pytest.raises(
        ValueError, match=r"vector of 'b' has the number 1e\+39, which is not finite in float32"
    ):
        made.save(tmp_path / "words.bin")
    made.save(tmp_path / "words.txt")
    assert load(tmp_path / "words.txt", dtype="float64").matrix.tolist() == [[1], [1e39]]


@pytest.mark.parametrize("name", ["words", "words.npy", "words.zip", ".vec"])
def test_a_name_that_says_no_format(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=r"the name must end in \.txt, \.vec, \.bin or \.kv"):
        vectors().save(tmp_path / name)


@pytest.mark.parametrize("end", ENDS)
def test_a_place_that_takes_no_file(tmp_path: Path, end: str):
    (tmp_path / f"folder{end}").mkdir()
    for name, error in (
        (f"nothing/words{end}", FileNotFoundError),
        (f"{'n' * 255}{end}", OSError),
        (f"folder{end}", IsADirectoryError),
    ):
        with pytest.raises(error) as raised:
            vectors().save(tmp_path / name)
        assert (raised.value.filename, raised.value.filename2) == (str(tmp_path / name), None)
    assert [one.name for one in tmp_path.iterdir()] == [f"folder{end}"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_file_keeps_its_mode(tmp_path: Path, end: str, mode: int):
    path = tmp_path / f"words{end}"
    Vectors(["old"], np.ones((1, 1))).save(path)
    path.chmod(mode)
    vectors().save(path)
    assert path.stat().st_mode & 0o777 == mode
    assert load(path).words == WORDS


@pytest.mark.parametrize("end", ENDS)
def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / f"words{end}"
    vectors().save(path)
    old = path.read_bytes()

    class Interrupted:
        """Rows that are given out once, when they are checked."""

        def __init__(self, matrix: np.ndarray) -> None:
            self.matrix, self.dtype, self.given = matrix, matrix.dtype, 0

        def __getitem__(self, where: slice) -> np.ndarray:
            self.given += 1
            if self.given > 2:
                raise KeyboardInterrupt
            return self.matrix[where]

        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise KeyboardInterrupt

    other = Vectors(WORDS, np.ones((len(WORDS), 7)))
    monkeypatch.setattr(saving, "BLOCK", 5)
    monkeypatch.setattr(other, "matrix", Interrupted(other.matrix))
    monkeypatch.setattr(Vectors, "dim", 7)
    with pytest.raises(KeyboardInterrupt):
        other.save(path)
    assert path.read_bytes() == old
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_link_stays_one(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "words.vec").symlink_to(tmp_path / "real/words.vec")
    vectors().save(tmp_path / "words.vec")
    assert (tmp_path / "words.vec").is_symlink()
    assert load(tmp_path / "real/words.vec").words == WORDS
    assert os.stat(tmp_path / "words.vec").st_mode & 0o400
