"""Vectors in text: GloVe, word2vec, fastText's .vec, and what goes wrong in such files."""

import numpy as np
import pytest

from gpu_embed.vectors import load, text_file

# Spaces to str.split, and no spaces here.
ODD = [
    "a\u00a0b",
    "a\u2028b",
    "\u0085",
    "\u3000",
    "x\u3000y",
    "\x1c",
    "\x0b",
    "a\x0cb",
    "\ufeffa",
    '"',
    '"a"',
    "'s",
    "#",
    ",",
]


@pytest.mark.parametrize("header", [False, True], ids=["GloVe", "word2vec"])
@pytest.mark.parametrize("end", ["\n", "\r\n", " \n"], ids=["lf", "crlf", "space"])
@pytest.mark.parametrize("parted", [" ", "\t"], ids=["space", "tab"])
def test_words_and_numbers(file, header: bool, end: str, parted: str):
    lines = [["king", "1", "-2.5", "3e-2"], ["queen", ".5", "+7.", "1E2"], ["2010", "0", "-0", "1"]]
    text = "".join(parted.join(line) + end for line in lines)
    found = load(file(f"3 3{end}{text}" if header else text))
    assert found.words == ["king", "queen", "2010"]
    assert found.matrix.dtype == np.float32
    assert found.matrix.tolist() == [[1, -2.5, np.float32(0.03)], [0.5, 7, 100], [0, 0, 1]]
    assert np.signbit(found.matrix[2]).tolist() == [False, True, False]


@pytest.mark.parametrize("header", [False, True])
def test_the_last_line_needs_no_end_and_blank_ones_are_none(file, header: bool):
    first = "2 2\n" if header else ""
    for text in (
        "a 1 2\nb 3 4",
        "a 1 2\nb 3 4\n\n",
        "a 1 2\n\nb 3 4\r\n\r\n",
        "a 1 2\n \t \nb 3 4\n",
    ):
        found = load(file(first + text))
        assert (found.words, found.matrix.tolist()) == (["a", "b"], [[1, 2], [3, 4]])


@pytest.mark.parametrize("counted", [1, 3, 10**15])
def test_a_header_that_counts_wrongly(file, counted: int):
    path = file(f"{counted} 2\na 1 2\nb 3 4\n")
    with pytest.raises(
        ValueError, match=f"vectors: the first line counts {counted:,} words, but there are 2"
    ):
        load(path)


def test_a_header_that_counts_wrongly_does_not_matter_before_the_limit(file):
    assert load(file("3 2\na 1 2\nb 3 4\n"), limit=2).words == ["a", "b"]


@pytest.mark.parametrize("dim", [0, 3, 10**9, 10**30])
def test_a_header_of_another_width(file, dim: int):
    with pytest.raises(ValueError, match=r"numbers a word|needs a word and 3 numbers"):
        load(file(f"2 {dim}\na 1 2\nb 3 4\n"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("c 0.1", "line 3 has 2 fields, but needs a word and 2 numbers: 'c 0.1'"),
        ("c", "line 3 has 1 fields"),
        (" 0.1 0.2", "line 3 has 2 fields"),
        ("c 0.1 0.2 0.3", "line 3, of the word 'c 0.1', has more than 2 numbers"),
        ("c 1 2 3", "line 3, of the word 'c 1', has more than 2 numbers"),
        ("c 0.1 x", "line 3, of the word 'c', has 'x' for a number"),
        ("c 0.1 1_0", "'1_0' for a number"),
        ("c 0.1 NA", "'NA' for a number"),
        ("c 0.1 1.5\rd 0.1 1.5", "line 3 holds a carriage return"),
        ("c 0,1 0,2", "'0,1' for a number"),
        ("c 0x1 1", "'0x1' for a number"),
        ("c \u0663 1", "'\u0663' for a number"),
    ],
)
@pytest.mark.parametrize("header", [False, True])
def test_a_line_that_is_no_word_and_its_numbers(file, header: bool, line: str, said: str):
    text = f"a 1.5 2.5\nb 3.5 4.5\n{line}\nd 1.5 2.5\n"
    said = said.replace("line 3", "line 4") if header else said
    with pytest.raises(ValueError, match=said):
        load(file(f"4 2\n{text}" if header else text))


def test_a_fault_far_in_the_file_is_found_by_its_line(file, monkeypatch):
    monkeypatch.setattr(text_file, "CHUNK", 1000)
    lines = [f"w{number} {number} 0.5" for number in range(1000)]
    found = load(file("\n".join(lines)))
    assert found.words == [f"w{number}" for number in range(1000)]
    assert found.matrix[:, 0].tolist() == list(range(1000))
    lines[700] += "x"
    with pytest.raises(ValueError, match=r"line 701, of the word 'w700', has '0.5x'"):
        load(file("\n".join(lines)))
    # Of what lies behind the limit nothing is said.
    assert len(load(file("\n".join(lines)), limit=700)) == 700


@pytest.mark.parametrize("said", ["nan", "inf", "-Infinity", "1e39", "-1e400"])
def test_a_number_that_is_not_finite(file, said: str):
    with pytest.raises(ValueError, match=r"vector of 'b' has the number .*not finite in float32"):
        load(file(f"a 1 2\nb 3 {said}\n"))


def test_a_huge_number_is_right_where_the_dtype_has_it(file):
    path = file("a 1e38 1e-38\nb 65504 65520\n")
    assert load(path).matrix[0].tolist() == [np.float32(1e38), np.float32(1e-38)]
    with pytest.raises(
        ValueError, match=r"vector of 'a' has the number 9.99.*e\+37, .*not finite in float16"
    ):
        load(path, dtype="float16")
    assert load(file("a 1e300 1e-300\n"), dtype=np.float64).matrix.tolist() == [[1e300, 1e-300]]
    with pytest.raises(ValueError, match=r"word 'b' has|vector of 'b' has the number 65520"):
        load(file("a 1 2\nb 65504 65520\n"), dtype=np.float16)
    assert load(file("b 65504 1\n"), dtype=np.float16).matrix.dtype == np.float16


@pytest.mark.parametrize("line", ["b 0.1 0.2", "b  0.1 0.2"], ids=["by Arrow", "by Python"])
def test_numbers_are_rounded_once(file, line: str):
    # Halfway between two fp32 numbers, and a little more: by way of fp64 it would go down.
    halfway = f"{1 + 2**-24:.60f}".rstrip("0") + "000000000000000000001"
    found = load(file(line.replace("0.1", halfway)))
    assert found.matrix[0, 0] == np.nextafter(np.float32(1), np.float32(2))
    assert load(file(line), dtype="float64").matrix.tolist() == [[0.1, 0.2]]


@pytest.mark.parametrize("word", ODD, ids=ascii)
@pytest.mark.parametrize("header", [False, True])
def test_a_word_is_not_cut_at_other_spaces(file, word: str, header: bool):
    text = f"a 1 2\n{word} 3 4\nb 5 6\n"
    found = load(file(f"3 2\n{text}" if header else text))
    assert found.words == ["a", word, "b"]
    assert found[word].tolist() == [3, 4]
    # As the first word of the file, but for a mark that there says UTF-8.
    text = f"{word} 3 4\nb 5 6\n"
    first = word if header else word.removeprefix("\ufeff")
    assert load(file(f"2 2\n{text}" if header else text)).words == [first, "b"]


@pytest.mark.parametrize("header", [False, True])
def test_a_word_with_spaces(file, header: bool):
    text = "a 1.5 2.5\nNew York 3.5 4.5\n. . . 5.5 6.5\nroute 66 7.5 8.5\nat name@domain.com 0.5 0.5\nb 1 2\nc 1 2\n"
    found = load(file(f"7 2\n{text}" if header else text))
    assert found.words == ["a", "New York", ". . .", "route 66", "at name@domain.com", "b", "c"]
    assert found["New York"].tolist() == [3.5, 4.5]
    assert found["route 66"].tolist() == [7.5, 8.5]


@pytest.mark.parametrize("chunk", [8, text_file.CHUNK], ids=["in two chunks", "in one"])
def test_of_a_word_that_comes_twice_the_first_vector_is_kept(file, chunk: int, monkeypatch):
    monkeypatch.setattr(text_file, "CHUNK", chunk)
    path = file("5 2\na 1 2\nb 3 4\na 5 6\nc 7 8\na 9 9\n")
    with pytest.warns(
        UserWarning, match="2 words came twice, and the first vector of each is kept: 'a', 'a'"
    ) as said:
        found = load(path)
    assert said[0].filename == __file__
    assert found.words == ["a", "b", "c"]
    assert found.matrix.tolist() == [[1, 2], [3, 4], [7, 8]]


def test_words_of_another_encoding(file):
    path = file("café 1 2\nœuvre 3 4\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"b'caf\\xe9' is not in utf-8: .*encoding='cp1252'"):
        load(path)
    assert load(path, encoding="cp1252").words == ["café", "œuvre"]


def test_words_that_were_cut_inside_of_a_character(file):
    path = file("é".encode()[:1] + b" 1 2\n" + "日本".encode()[:-1] + b" 3 4\n")
    with pytest.raises(ValueError, match="errors='replace' where words were cut"):
        load(path)
    assert load(path, errors="replace").words == ["\ufffd", "日\ufffd"]


def test_a_mark_of_utf8_is_no_part_of_the_first_word(file):
    assert load(file("\ufeffa 1 2\nb 3 4\n")).words == ["a", "b"]
    assert load(file("\ufeff1 2\na 1 2\n")).words == ["a"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file(file, content: bytes):
    with pytest.raises(ValueError, match="vectors: the file is empty"):
        load(file(content))


def test_a_file_of_no_words(file):
    found = load(file("0 5\n"))
    assert (found.words, found.matrix.shape) == ([], (0, 5))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"one\ntwo\n", "no word and numbers"),
        (b"some plain text\nof several words\n", "'plain' for a number|fields"),
        (
            b"\x7fELF\x02\x01\x01\0\0",
            r"not a file of vectors that is known here; it begins with b'\\x7fELF",
        ),
        ("a 1 2\n".encode("utf-16"), "not a file of vectors that is known here"),
        (b"a 1 2\rb 3 4\r", "line 1 holds a carriage return"),
    ],
)
def test_a_file_of_another_kind(file, content: bytes, said: str):
    with pytest.raises(ValueError, match=said):
        load(file(content))


def test_a_line_without_an_end_is_not_read_whole(file, monkeypatch):
    monkeypatch.setattr(text_file, "CHUNK", 100)
    with pytest.raises(ValueError, match="a line is longer than"):
        load(file("a 1 2\nb " + "1" * 1000))


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
@pytest.mark.parametrize("header", [False, True])
def test_limit(file, limit: int, header: bool):
    text = "a 1 2\nb 3 4\nc 5 6\n"
    found = load(file(f"3 2\n{text}" if header else text), limit=limit)
    assert found.words == ["a", "b", "c"][:limit]
    assert found.matrix.shape == (min(limit, 3), 2)


def test_wide_rows_without_a_header(file):
    rows = np.arange(20_000).reshape(2, -1) / 7
    text = "".join(f"w{place} {' '.join(map(str, row))}\n" for place, row in enumerate(rows))
    assert np.array_equal(load(file(text)).matrix, rows.astype(np.float32))
    assert np.array_equal(load(file(f"2 10000\n{text}")).matrix, rows.astype(np.float32))


def test_memory_is_that_of_the_matrix(file):
    """Not twice: neither a list of Python's numbers, nor a copy of the rows."""
    import tracemalloc

    line = " ".join(["0.123456"] * 300)
    path = file("".join(f"w{number} {line}\n" for number in range(20_000)))
    tracemalloc.start()
    found = load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A chunk of the file is held a few times.
    assert peak < 2 * found.matrix.nbytes + 5 * text_file.CHUNK


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("limit", range(6))
def test_limit_counts_words_and_not_blank_lines(file, header: bool, limit: int):
    text = "\na 1 2\n\nb 3 4\nc 5 6\nd 7 8\ne 9 9\n"
    assert load(file(f"5 2\n{text}" if header else text), limit=limit).words == [*"abcde"][:limit]


# Behind the first line, one that Arrow does not take.
@pytest.mark.parametrize(
    "before", ["", "New York{0}0.5{0}0.5\nx{0}+1{0}1\n"], ids=["Arrow", "Python"]
)
@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("route 66\t1.5\t2.5", "route 66"),
        ("route 66\t1\t-2", "route 66"),
        ("a 0.5 \t1\t2", "a 0.5"),
        ("c\t5 1 2", None),
        ("c\t5\t1\t2", None),
        ("c 5\t1 2", None),
        ("c 1 2 3", None),
        ("c 1 -2 -3", None),
        ("c 1 +2 0.5", None),
        ("c 0.5 0.5 0.5", None),
        ("c 1 0.5 1e-5", "c 1"),
        ("c  1 0.5 -.5", "c  1"),
        ("New  York 1 2", "New  York"),
        ("New  York\t1\t2", "New  York"),
    ],
)
@pytest.mark.parametrize("header", [False, True])
def test_words_that_end_in_a_number(file, before: str, line: str, word: str | None, header: bool):
    parted = "\t" if "\t" in line else " "
    lines = f"a{parted}1.5{parted}2.5\nb{parted}1.5{parted}2.5\nd{parted}1.5{parted}2.5\n"
    lines += f"{before.format(parted)}{line}\ne{parted}1{parted}2\n"
    path = file(f"{lines.count(chr(10))} 2\n{lines}" if header else lines)
    if word is None:
        number = lines[: lines.index(line)].count("\n") + 1 + header
        with pytest.raises(ValueError, match=rf"line {number}, .* has more than 2 numbers"):
            load(path)
    else:
        assert load(path).words[-2:] == [word, "e"]


@pytest.mark.parametrize(
    ("behind_word", "between", "end"),
    [
        (" ", " ", "\t\n"),
        (" ", " ", " \t \r\n"),
        (" ", " ", "   \n"),
        ("  ", "  ", "\n"),
        ("\t", " ", "\n"),
        ("\t", " ", " \n"),
        (" \t ", "   ", "\r\n"),
        ("\t\t", "\t", "\n"),
    ],
)
def test_arrow_reads_fields_that_are_parted_in_other_ways(
    file, monkeypatch: pytest.MonkeyPatch, behind_word: str, between: str, end: str
):
    monkeypatch.delattr(text_file, "_line_by_line")
    rows = np.arange(300, dtype=np.float32).reshape(100, 3)
    words = [f"w\u00a0{number}" for number in range(100)]
    lines = [
        word + behind_word + between.join(map(str, row)) + end
        for word, row in zip(words, rows.tolist(), strict=True)
    ]
    for head in ("", "100 3\n"):
        found = load(file(head + "".join(lines)))
        assert found.words == words
        assert np.array_equal(found.matrix, rows)


def test_a_word_where_tabs_part_the_fields_keeps_no_spaces_at_its_ends(file):
    assert load(file("a \t1\t2\nb\t3\t4\n")).words == ["a", "b"]
    with pytest.raises(ValueError, match="line 1"):
        load(file(" a\t1\t2\nb\t3\t4\n"))
