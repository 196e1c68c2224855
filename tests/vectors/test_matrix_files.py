"""Matrices in .npy and safetensors files, whose words are elsewhere."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from gpu_embed.vectors import load

WORDS = ["king", "New York", "a\u2028b", "日本"]
ROWS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


@pytest.fixture(params=["npy", "safetensors"])
def write(request: pytest.FixtureRequest, tmp_path):
    """Writes a matrix into a file of either kind."""

    def write(rows: np.ndarray):
        path = tmp_path / f"matrix.{request.param}"
        if request.param == "npy":
            np.save(path, rows)
        else:
            save_file({"rows": rows}, path)
        return path

    return write


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_words_in_a_list(write, dtype: str):
    found = load(write(ROWS.astype(dtype)), words=WORDS)
    assert found.words == WORDS
    assert found.matrix.dtype == dtype
    assert np.array_equal(found.matrix, ROWS.astype(dtype))
    other = load(write(ROWS.astype(dtype)), words=tuple(WORDS), dtype="float64", limit=2)
    assert other.words == WORDS[:2]
    assert other.matrix.dtype == np.float64


@pytest.mark.parametrize(
    "text", ["\n".join(WORDS), "\r\n".join(WORDS) + "\r\n", "\ufeff" + "\n".join(WORDS) + "\n"]
)
def test_words_in_a_file(write, file, text: str):
    path = file(text, "words.txt")
    assert load(write(ROWS), words=path).words == WORDS
    assert load(write(ROWS), words=str(path)).words == WORDS


def test_words_of_another_encoding(write, file):
    path = file("a\nb\nc\ncafé\n".encode("cp1252"), "words.txt")
    with pytest.raises(ValueError, match=r"b'caf\\xe9' is not in utf-8"):
        load(write(ROWS), words=path)
    assert load(write(ROWS), words=path, encoding="cp1252").words[3] == "café"


def test_a_matrix_stays_memory_mapped(write):
    path = write(ROWS)
    found = load(path, words=WORDS)
    # What is written to the file shows in the matrix.
    with open(path, "r+b") as opened:
        opened.seek(-4, 2)
        opened.write(np.float32(7).tobytes())
    assert found.matrix[-1, -1] == 7
    assert load(path, words=WORDS, limit=3).matrix.base is not None


def test_a_matrix_needs_words(write):
    with pytest.raises(
        ValueError,
        match=r"matrix\.\w+: the file has a matrix and no words: name its rows by words=",
    ):
        load(write(ROWS))
    with pytest.raises(ValueError, match="the matrix has 4 rows, and there are 3 words"):
        load(write(ROWS), words=WORDS[:3])
    with pytest.raises(ValueError, match="the matrix has 4 rows, and there are 5 words"):
        load(write(ROWS), words=[*WORDS, "x"], limit=2)
    with pytest.raises(
        TypeError, match=r"words= must be a list in the order of the rows, .* got set"
    ):
        load(write(ROWS), words={*WORDS})
    with pytest.raises(TypeError, match="got dict"):
        load(write(ROWS), words=dict.fromkeys(WORDS, 0))
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        load(write(ROWS), words="nothing.txt")


@pytest.mark.parametrize(
    "rows", [ROWS[0], ROWS[None], np.ones((4, 3), np.int64)], ids=["a row", "several", "integers"]
)
def test_what_is_no_matrix_of_floats(write, rows: np.ndarray):
    with pytest.raises(ValueError, match=r"expected a matrix|rows, and there are 4 words"):
        load(write(rows), words=WORDS)


def test_of_a_word_that_comes_twice_the_first_row_is_kept(write, file):
    words = ["a", "b", "a", "c"]
    for given in (words, np.array(words), file("\n".join(words))):
        with pytest.warns(UserWarning, match="1 words came twice, .*: 'a'") as said:
            found = load(write(ROWS), words=given)
        assert said[0].filename == __file__
        assert found.words == ["a", "b", "c"]
        assert set(map(type, found.words)) == {str}
        assert np.array_equal(found.matrix, ROWS[[0, 1, 3]])
    # Behind the limit nothing comes twice.
    assert load(write(ROWS), words=words, limit=2).words == ["a", "b"]


def test_a_number_alone(tmp_path):
    np.save(tmp_path / "one.npy", np.float32(1))
    save_file({"one": np.array(1, np.float32)}, tmp_path / "one.safetensors")
    for name in ("one.npy", "one.safetensors"):
        for words in ([], ["a"]):
            with pytest.raises(ValueError, match=r"expected a matrix|rows, and there are 1 words"):
                load(tmp_path / name, words=words)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_tensors_that_numpy_does_not_have(tmp_path, dtype: torch.dtype):
    save_tensors({"rows": torch.ones(4, 3).to(dtype)}, tmp_path / "rows.safetensors")
    with pytest.raises(ValueError, match=rf"rows\.safetensors: .* of {dtype}"):
        load(tmp_path / "rows.safetensors", words=WORDS)


def test_fp16_that_overflows(write):
    with pytest.raises(
        ValueError,
        match=r"vector of '日本' has the number 100000.0, which is not finite in float16",
    ):
        load(write(np.array([[1], [2], [3], [1e5]])), words=WORDS, dtype="float16")


def test_a_file_that_was_cut(write):
    path = write(ROWS)
    content = path.read_bytes()
    for length in (12, len(content) - 5):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"matrix\.\w+: "):
            load(path, words=WORDS)


def test_a_header_that_is_no_python(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, ROWS)
    path.write_bytes(path.read_bytes().replace(b"(4, 3)", b"(4, 3 "))
    with pytest.raises(ValueError, match=r"rows\.npy: NumPy cannot read it"):
        load(path, words=WORDS)


def test_objects_are_not_unpickled(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([["a"]], object))
    with pytest.raises(ValueError, match=r"objects\.npy: .*Python objects"):
        load(tmp_path / "objects.npy", words=["a"])


def test_other_orders(tmp_path):
    np.save(tmp_path / "big.npy", ROWS.astype(">f4"))
    found = load(tmp_path / "big.npy", words=WORDS)
    assert found.matrix.dtype.isnative
    assert np.array_equal(found.matrix, ROWS)
    np.save(tmp_path / "columns.npy", np.asfortranarray(ROWS))
    assert np.array_equal(load(tmp_path / "columns.npy", words=WORDS).matrix, ROWS)


def test_one_of_several_tensors(tmp_path):
    path = tmp_path / "several.safetensors"
    save_file({"rows": ROWS, "others": ROWS + 1}, path)
    with pytest.raises(
        ValueError, match="tensor= must name one of its tensors, others, rows; got None"
    ):
        load(path, words=WORDS)
    with pytest.raises(ValueError, match="got 'nothing'"):
        load(path, words=WORDS, tensor="nothing")
    assert np.array_equal(load(path, words=WORDS, tensor="others").matrix, ROWS + 1)


def test_bfloat16(tmp_path):
    path = tmp_path / "bf16.safetensors"
    save_tensors({"rows": torch.from_numpy(ROWS).bfloat16()}, path)
    with pytest.raises(
        ValueError, match="bfloat16, which NumPy does not have: give dtype='float32'"
    ):
        load(path, words=WORDS)
    found = load(path, words=WORDS, dtype="float32")
    assert np.array_equal(found.matrix, torch.from_numpy(ROWS).bfloat16().float().numpy())


@pytest.mark.parametrize("length", [128, 0x8B1F, 0x88B1F], ids=["pickle", "gzip", "gzip deflate"])
def test_a_header_whose_length_looks_like_another_format(tmp_path, length: int):
    header = b'{"rows":{"dtype":"F32","shape":[4,3],"data_offsets":[0,48]}}'.ljust(length)
    path = tmp_path / "rows.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + ROWS.tobytes())
    assert np.array_equal(load(path, words=WORDS).matrix, ROWS)
