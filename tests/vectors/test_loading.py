"""What `load` does for all formats: archives, arguments, the progress bar."""

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rich.console
import torch

from gpu_embed.vectors import load, loading

TEXT = b"a 1 2\nb 3 4\n"
BINARY = b"2 2\na " + np.float32([1, 2]).tobytes() + b"b " + np.float32([3, 4]).tobytes()
WORD2VEC = b"2 2\n" + TEXT


def archive(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(f"{name}.txt", content)
    return path


def check(found) -> None:
    assert found.words == ["a", "b"]
    assert found.matrix.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("content", [TEXT, WORD2VEC, BINARY], ids=["GloVe", "word2vec", "binary"])
def test_packed(file, tmp_path: Path, content: bytes):
    """The name's end says nothing."""
    check(load(file(gzip.compress(content), "vectors.txt")))
    check(load(archive(tmp_path / "vectors.dat", one=content)))
    check(load(file(content, "vectors.zip")))


@pytest.mark.parametrize("content", [TEXT, WORD2VEC, BINARY], ids=["GloVe", "word2vec", "binary"])
def test_packed_better_than_is_usual(file, tmp_path: Path, content: bytes):
    """Room is made for what a packed file is likely to hold, and grows."""
    rows = np.zeros((20_000, 20), np.float32)
    words = [f"w{number}" for number in range(len(rows))]
    body = b"".join(b"%b %b\n" % (word.encode(), b" ".join([b"0"] * 20)) for word in words)
    if content is WORD2VEC:
        body = b"20000 20\n" + body
    if content is BINARY:
        body = b"20000 20\n" + b"".join(word.encode() + b" " + bytes(80) for word in words)
    packed = gzip.compress(body)
    assert len(packed) < len(body) / 10
    found = load(file(packed))
    assert found.words == words
    assert np.array_equal(found.matrix, rows)


def test_one_of_several_files_in_an_archive(tmp_path: Path):
    path = archive(tmp_path / "glove.zip", one=b"x 1\ny 2\n", two=TEXT)
    check(load(path / "two.txt"))
    with pytest.raises(
        ValueError, match=r"the archive has 2 files, one\.txt, two\.txt: .*glove\.zip/one\.txt'"
    ):
        load(path)
    with pytest.raises(FileNotFoundError, match=r"has no 'three\.txt'; it has one\.txt, two\.txt"):
        load(path / "three.txt")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as packed:
        packed.writestr("folder/", b"")
    with pytest.raises(ValueError, match="the archive has no files"):
        load(tmp_path / "none.zip")


def test_a_file_of_torch(tmp_path: Path):
    import torch

    torch.save({"rows": torch.ones(2, 2)}, tmp_path / "rows.pt")
    with pytest.raises(ValueError, match=r"a file of torch: take torch\.load"):
        load(tmp_path / "rows.pt")


def test_archives_that_were_cut(file, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 10, (2000, 10)).astype(str)
    body = "\n".join(f"w{number} {' '.join(row)}" for number, row in enumerate(noise)).encode()
    packed = gzip.compress(body)
    for content in (packed[:1000], packed[:12], packed[:1000] + b"xx" + packed[1002:]):
        with pytest.raises(ValueError, match=r"cut|for a number|fields|more than"):
            load(file(content))
    zipped = archive(tmp_path / "whole.zip", one=body).read_bytes()
    with pytest.raises(ValueError, match="cannot be unpacked, and may have been cut"):
        load(file(zipped[: len(zipped) // 2]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_archives_of_every_kind(tmp_path: Path, way: int):
    noise = np.random.default_rng(0).integers(10, 99, (500, 10)).astype(str)
    path = tmp_path / "one.zip"
    with zipfile.ZipFile(path, "w", way) as packed:
        packed.writestr("one.txt", "".join(f"word {' '.join(row)}\n" for row in noise))
    whole = path.read_bytes()
    for place in range(50, len(whole) - 200, len(whole) // 15):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"one\.zip: "):
            load(path)


def test_what_stands_behind_a_packed_file_is_as_in_gzip(file):
    check(load(file(gzip.compress(TEXT) + bytes(10))))
    with pytest.raises(ValueError, match=r"cannot be unpacked, .*Not a gzipped file"):
        load(file(gzip.compress(TEXT) + b"junk"))


def test_a_word_that_begins_as_a_pickle_does(file):
    for head in ("", "2 2\n"):
        found = load(file(f"{head}€ 1 2\nb 3 4\n".encode("cp1252")), encoding="cp1252")
        assert found.words == ["€", "b"]


def test_formats_that_are_not_read_packed(file, tmp_path: Path):
    matrix = io.BytesIO()
    np.save(matrix, np.ones((2, 2)))
    for content in (
        matrix.getvalue(),
        b"\x80\x04}.",
        (793_712_314).to_bytes(4, "little") + bytes(100),
    ):
        for path in (file(gzip.compress(content)), archive(tmp_path / "one.zip", one=content)):
            with pytest.raises(
                ValueError, match="only text and word2vec's binary file are read packed: unpack it"
            ):
                load(path)


def test_a_path_that_is_not_there(file):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        load("nothing.txt")
    with pytest.raises(NotADirectoryError):
        load(file(TEXT) / "inner.txt")
    with pytest.raises(IsADirectoryError):
        load(file(TEXT).parent)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"words": ["a", "b"]},
            "words= names the rows of a .npy or safetensors file, and this file has words",
        ),
        ({"tensor": "rows"}, "tensor= is for a safetensors file"),
        ({"dtype": "int32"}, "dtype must be one of float16, float32, float64, got int32"),
        ({"dtype": "longdouble"}, "dtype must be one of"),
        (
            {"dtype": torch.float16},
            "dtype must be one of float16, float32, float64, got torch.float16",
        ),
        ({"dtype": "half a number"}, "dtype must be one of .* got half a number"),
        ({"limit": -1}, "limit must not be negative, got -1"),
    ],
)
@pytest.mark.parametrize("content", [TEXT, WORD2VEC, BINARY], ids=["GloVe", "word2vec", "binary"])
def test_arguments_that_are_not_for_this(file, content: bytes, arguments: dict, said: str):
    with pytest.raises(ValueError, match=said):
        load(file(content), **arguments)


def test_an_encoding_that_is_not_known(file):
    with pytest.raises(LookupError, match="klingon"):
        load(file(TEXT), encoding="klingon")


@pytest.mark.parametrize("packed", [False, True])
def test_the_progress_bar(file, monkeypatch: pytest.MonkeyPatch, capsys, packed: bool):
    shown = io.StringIO()
    made = rich.console.Console

    def terminal(**arguments):
        assert arguments == {"stderr": True}
        return made(file=shown, force_terminal=True, width=80)

    path = file(gzip.compress(TEXT) if packed else TEXT, "glove.txt")
    check(load(path))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(rich.console, "Console", terminal)
    check(load(path, progress=False))
    assert shown.getvalue() == ""
    check(load(path))
    assert "glove.txt" in shown.getvalue()
    assert f"{path.stat().st_size}/{path.stat().st_size} bytes" in shown.getvalue()
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_the_progress_bar(file, monkeypatch: pytest.MonkeyPatch):
    shown = io.StringIO()
    made = rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda stderr: made(file=shown, force_terminal=True, width=80)
    )
    with pytest.raises(ValueError, match="for a number"):
        load(file(b"a 1 x\nb 1 2\n"))
    # The cursor is shown again.
    assert shown.getvalue().count("\x1b[?25h") == shown.getvalue().count("\x1b[?25l") == 1


def test_what_is_looked_at_first_is_not_the_whole_file(file, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "HEAD", 8)
    check(load(file(TEXT)))
    check(load(file(WORD2VEC)))
    check(load(file(BINARY)))
