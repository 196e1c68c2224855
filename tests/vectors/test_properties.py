"""Any words and numbers go into a file and come back."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gpu_embed.vectors import Vectors, load
from gpu_embed.vectors.binary_file import USUAL

# A file of words in a format where a space ends a word.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters=" \t\r\n\v\f\0")
WORDS = st.lists(st.text(CHARACTERS, min_size=1, max_size=6), unique=True, max_size=12)
FINITE = {"allow_nan": False, "allow_infinity": False}


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(), words=WORDS, dim=st.integers(1, 5), end=st.sampled_from([".vec", ".bin", ".kv"])
)
def test_words_and_numbers_come_back(tmp_path_factory, data, words, dim, end):
    dtype = np.dtype(
        data.draw(st.sampled_from(["float16", "float32"] + ["float64"] * (end != ".bin")))
    )
    elements = st.floats(width=8 * dtype.itemsize, **FINITE)
    if end == ".bin":
        # Others may be refused, as those that begin with the rest of a word that holds a space.
        elements = elements.filter(lambda x: x == 0 or USUAL[0] < abs(x) < USUAL[1])
    rows = data.draw(arrays.arrays(dtype, (len(words), dim), elements=elements))
    path = tmp_path_factory.mktemp("words") / f"words{end}"
    Vectors(words, rows).save(path)
    found = load(path, dtype=dtype)
    assert found.words == words
    assert found.matrix.tobytes() == rows.tobytes()


TEXT_WORDS = st.lists(
    st.lists(st.text(CHARACTERS, min_size=1, max_size=4), min_size=1, max_size=3).map(" ".join),
    unique=True,
    min_size=1,
    max_size=12,
).filter(lambda words: sum(" " not in word for word in words) > len(words) / 2)


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


@settings(deadline=None, max_examples=150)
@given(
    words=TEXT_WORDS,
    dim=st.integers(2, 5),
    header=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", " \n"]),
)
def test_text_with_spaces_in_words(tmp_path_factory, words, dim, header, end):
    words = [word for word in words if not is_number(word.split(" ")[-1]) or " " not in word]
    words = [word for word in words if not (word[0] == "\ufeff" or is_number(word))] or ["a"]
    rows = np.arange(len(words) * dim, dtype=np.float32).reshape(-1, dim) + 0.5
    lines = [
        f"{word} {' '.join(map(str, row))}{end}"
        for word, row in zip(words, rows.tolist(), strict=True)
    ]
    if not header:
        # How wide the rows are is seen by most of the first lines.
        lines = [f"plain{number} {' '.join(['0.5'] * dim)}{end}" for number in range(13)] + lines
        words = [*(f"plain{number}" for number in range(13)), *words]
        rows = np.concatenate([np.full((13, dim), 0.5, np.float32), rows])
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_bytes((f"{len(words)} {dim}{end}" * header + "".join(lines)).encode())
    found = load(path)
    assert found.words == words
    assert np.array_equal(found.matrix, rows)


@settings(deadline=None, max_examples=300)
@given(content=st.binary(max_size=200), header=st.booleans())
def test_any_bytes_are_vectors_or_a_clear_error(tmp_path_factory, content: bytes, header: bool):
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(b"2 2\n" * header + content)
    try:
        found = load(path)
    except ValueError as raised:
        said = str(raised)
    else:
        assert np.isfinite(found.matrix).all()
        said = str(path)
    assert said.startswith(str(path))
