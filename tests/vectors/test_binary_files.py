"""word2vec's binary file, as word2vec itself and as gensim writes it, and what goes wrong in it."""

import numpy as np
import pytest

from gpu_embed.vectors import binary_file, load

ROWS = np.random.default_rng(0).normal(size=(5, 7)).astype("<f4")
WORDS = ["king", "queen", "日本", "a\u00a0b", "x"]


def binary(words: list[str], rows: np.ndarray, end: bytes = b"", count: int | None = None) -> bytes:
    body = b"".join(
        word.encode() + b" " + row.astype("<f4").tobytes() + end
        for word, row in zip(words, rows, strict=True)
    )
    return f"{len(words) if count is None else count} {rows.shape[1]}\n".encode() + body


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"], ids=["gensim", "word2vec", "crlf"])
@pytest.mark.parametrize("chunk", [1, 50, binary_file.CHUNK])
def test_words_and_numbers(file, end: bytes, chunk: int, monkeypatch):
    monkeypatch.setattr(binary_file, "CHUNK", chunk)
    found = load(file(binary(WORDS, ROWS, end)))
    assert found.words == WORDS
    assert np.array_equal(found.matrix, ROWS)


def test_a_line_that_ends_before_the_first_word(file):
    """And bytes of numbers that might be text."""
    rows = np.frombuffer(b"abcdefgh", "<f4").reshape(1, 2) * np.ones((3, 1), np.float32)
    content = binary(["x", "y", "z"], rows)
    for between in (b"", b"\n", b"\r\n"):
        found = load(file(content.replace(b"3 2\n", b"3 2\n" + between)))
        assert (found.words, found.matrix.tolist()) == (["x", "y", "z"], rows.tolist())


@pytest.mark.parametrize(
    ("word", "numbers"),
    [
        ("0", b"0 8Iaa!aG!aa"),
        ("a", b"0\n1\n2\n3\n4\n5\n"),
        ("é", b"\n0ab"),
    ],
)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"], ids=["gensim", "word2vec", "crlf"])
@pytest.mark.parametrize("count", [1, 3])
def test_numbers_whose_bytes_are_text(file, word: str, numbers: bytes, end: bytes, count: int):
    rows = np.frombuffer(numbers, "<f4")[None].repeat(count, axis=0)
    words = [word + "x" * place for place in range(count)]
    found = load(file(binary(words, rows, end)))
    assert found.words == words
    assert found.matrix.tobytes() == rows.tobytes()


@pytest.mark.parametrize("end", ["\n", " \n", "\r\n"])
def test_text_of_the_size_of_a_binary_file_is_text(file, end: str):
    assert load(file(f"2 2{end}a 1.5 2.5{end}b 3.5 4.5{end}")).words == ["a", "b"]
    for first in ("0,1 0,2", "0.1 0,22", "1.25 0xA"):
        with pytest.raises(ValueError, match=r"line 2, of the word 'a', has '0\S+' for a number"):
            load(file(f"2 2{end}a {first}{end}b {first.replace(',', '.')}{end}"))


@pytest.mark.parametrize("limit", [0, 2, 5, 9])
def test_limit(file, limit: int):
    found = load(file(binary(WORDS, ROWS)), limit=limit)
    assert found.words == WORDS[:limit]
    assert np.array_equal(found.matrix, ROWS[:limit])


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("count", [3, 9, 10**15])
def test_a_header_that_counts_wrongly(file, end: bytes, count: int):
    with pytest.raises(
        ValueError, match=rf"goes on behind the 3 words|ends, .* in word 5 of {count}"
    ):
        load(file(binary(WORDS, ROWS, end, count)))


def test_a_header_of_another_width(file):
    content = binary(WORDS, ROWS)
    for dim in (0, 6, 8, 10**9, 10**30):
        with pytest.raises(ValueError, match=r"vectors: .*"):
            load(file(content.replace(b"5 7\n", b"5 %d\n" % dim)))


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_file_that_was_cut(file, end: bytes):
    content = binary(WORDS, ROWS, end)
    for length in range(len(content) - len(end) - 1, 4, -11):
        with pytest.raises(ValueError, match=r"it was cut|the first line counts"):
            load(file(content[:length]))


@pytest.mark.parametrize(
    "key",
    ["New York", "New Yor", "New Yo", "New Y", "a b", " a", "a ", "a b c d", "é ä ü", "New AAAA"],
)
@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("scale", [0, 1, 2**-20], ids=["whole numbers", "normal", "small"])
def test_a_key_with_a_space_never_gets_a_wrong_vector(
    file, key: str, place: int, end: bytes, scale: float
):
    """gensim writes such a file, and reads rows of 1e26 from it."""
    words = [*WORDS]
    words[place] = key
    for seed in range(40):
        rows = np.random.default_rng(seed).normal(size=(5, 50))
        rows = np.round(3 * rows) if scale == 0 else rows * scale
        with pytest.raises(ValueError, match=r"a word holds a space|is not in utf-8"):
            load(file(binary(words, rows, end)))


def test_sizes_that_are_seldom_are_right_where_no_word_holds_a_space(file):
    rows = ROWS.copy()
    rows[:, 0] = [1e30, 1e-30, 1e-44, -3e38, 0]
    assert np.array_equal(load(file(binary(WORDS, rows))).matrix, rows)
    # A space's byte in a vector, behind bytes that are text.
    rows[1, 0] = np.frombuffer(b"abc ", "<f4")[0]
    rows[2, 0] = np.frombuffer(b"a bc", "<f4")[0]
    assert np.array_equal(load(file(binary(WORDS, rows))).matrix, rows)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite(file, value: float):
    rows = ROWS.copy()
    rows[2, 3] = value
    with pytest.raises(
        ValueError, match=r"vector of '日本' has the number .*not finite in float32"
    ):
        load(file(binary(WORDS, rows)))


def test_fp16_that_overflows_and_fp64(file):
    rows = ROWS.copy()
    path = file(binary(WORDS, rows))
    assert np.array_equal(load(path, dtype="float16").matrix, rows.astype(np.float16))
    assert load(path, dtype="float64").matrix.dtype == np.float64
    rows[1, 1] = 70000
    with pytest.raises(ValueError, match="vector of 'queen' has the number 70000"):
        load(file(binary(WORDS, rows)), dtype="float16")


def test_of_a_word_that_comes_twice_the_first_vector_is_kept(file):
    path = file(binary(["a", "b", "a", "c", "b"], ROWS))
    with pytest.warns(UserWarning, match=r"2 words came twice.*'a', 'b'"):
        found = load(path)
    assert found.words == ["a", "b", "c"]
    assert np.array_equal(found.matrix, ROWS[[0, 1, 3]])


def test_words_of_another_encoding_and_words_that_were_cut(file):
    content = binary(WORDS, ROWS).replace(b"queen", "caf\xe9".encode("cp1252"))
    with pytest.raises(ValueError, match=r"b'caf\\xe9' is not in utf-8"):
        load(file(content))
    content = content.replace("日本".encode() + b" ", "日本".encode()[:-1] + b" ")
    assert load(file(content), errors="replace").words == [
        "king",
        "caf\ufffd",
        "日\ufffd",
        "a\u00a0b",
        "x",
    ]
    assert load(file(content), errors="ignore").words[1] == "caf"
