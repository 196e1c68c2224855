"""gensim's .kv and fastText's .bin, on files that the test writes."""

import datetime
import pickle
import struct
from itertools import pairwise
from pathlib import Path

import gensim.utils
import numpy as np
import pytest
from gensim.models import FastText, KeyedVectors, Word2Vec
from gensim.models.doc2vec import Doc2Vec, TaggedDocument
from gensim.models.fasttext import save_facebook_model

from gpu_embed.vectors import Vectors, load

WORDS = ["</s>", "king", "queen", "日本", "a\u00a0b", "x"]
DIM, BUCKET, SHORTEST, LONGEST = 4, 11, 1, 3


def keyed_vectors(words: list[str], rows: np.ndarray) -> KeyedVectors:
    made = KeyedVectors(rows.shape[1], dtype=rows.dtype)
    made.add_vectors(words, rows)
    return made


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("separately", [[], ["vectors"]], ids=["in one file", "in two"])
def test_keyed_vectors(tmp_path: Path, separately: list[str], dtype: str):
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(dtype)
    path = tmp_path / "words.kv"
    keyed_vectors(["New York", *WORDS[1:]], rows).save(str(path), separately=separately)
    found = load(path)
    assert found.words == ["New York", *WORDS[1:]]
    assert found.matrix.dtype == dtype
    assert np.array_equal(found.matrix, rows)
    assert isinstance(found.matrix, np.memmap) == bool(separately)
    assert load(path, limit=2).words == ["New York", "king"]
    assert isinstance(load(path, limit=2).matrix, np.memmap) == bool(separately)
    converted = load(path, dtype="float64")
    assert np.array_equal(converted.matrix, rows.astype(np.float64))
    assert converted.matrix.dtype == np.float64


def test_a_word_that_came_twice_when_gensim_read_them(file, tmp_path: Path):
    """gensim leaves the key None with a row of zeros, which it saves and cannot load again."""
    made = KeyedVectors.load_word2vec_format(file("4 2\na 1 2\nb 3 4\na 5 6\nc 7 8\n"))
    assert None in made.index_to_key or len(made.index_to_key) == 3
    made.index_to_key = ["a", "b", "c", None]
    made.vectors = np.array([[1, 2], [3, 4], [7, 8], [0, 0]], np.float32)
    made.save(str(tmp_path / "twice.kv"))
    found = load(tmp_path / "twice.kv")
    assert found.words == ["a", "b", "c"]
    assert found.matrix.tolist() == [[1, 2], [3, 4], [7, 8]]
    assert load(tmp_path / "twice.kv", limit=2).words == ["a", "b"]


def test_keys_that_are_not_in_the_order_of_their_rows(tmp_path: Path):
    """As in files of older gensim."""
    made = keyed_vectors(["a", "b", "c"], np.array([[1], [2], [3]], np.float32))
    made.key_to_index = {"c": 2, "a": 0, "b": 1}
    made.save(str(tmp_path / "words.kv"))
    found = load(tmp_path / "words.kv")
    assert found.words == ["a", "b", "c"]
    assert [found[word].item() for word in "abc"] == [1, 2, 3]


def test_keyed_vectors_with_other_attributes(tmp_path: Path):
    for change in (
        {"key_to_index": None},
        {"vectors": None},
        {"index_to_key": None, "key_to_index": {"a": 0}},
    ):
        made = keyed_vectors(["a", "b"], np.ones((2, 2), np.float32))
        vars(made).update(change)
        gensim.utils.pickle(made, str(tmp_path / "words.kv"))
        with pytest.raises(ValueError, match=r"words\.kv: "):
            load(tmp_path / "words.kv")


def test_keys_that_are_no_words(tmp_path: Path):
    keyed_vectors([7, 8], np.ones((2, 2), np.float32)).save(str(tmp_path / "words.kv"))
    with pytest.raises(ValueError, match="its keys are no words, but of the type int"):
        load(tmp_path / "words.kv")


def test_texts_of_doc2vec_that_have_numbers_for_names(tmp_path: Path):
    texts = [TaggedDocument(["a", "b"], [number]) for number in range(3)]
    Doc2Vec(texts, vector_size=4, min_count=1, epochs=1).dv.save(str(tmp_path / "texts.kv"))
    for limit in (None, 2):
        with pytest.raises(
            ValueError, match="its keys are no words, but of the type int, as Doc2Vec"
        ):
            load(tmp_path / "texts.kv", limit=limit)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol(tmp_path: Path, protocol: int):
    made = keyed_vectors(["a", "b"], np.ones((2, 2), np.float32))
    made.seen = frozenset(["a"]), {1}, b"x"
    made.save(str(tmp_path / "words.kv"), pickle_protocol=protocol)
    assert load(tmp_path / "words.kv").words == ["a", "b"]


def test_vectors_of_a_model_of_fasttext(tmp_path: Path):
    model = FastText(
        [["a", "cat", "sat"], ["a", "dog", "sat"]], vector_size=4, min_count=1, bucket=20, epochs=1
    )
    model.wv.save(str(tmp_path / "words.kv"))
    found = load(tmp_path / "words.kv")
    assert found.words == model.wv.index_to_key
    assert np.array_equal(found.matrix, model.wv.vectors)


def test_a_whole_model_is_refused(tmp_path: Path):
    model = Word2Vec([["a", "b"]], min_count=1, vector_size=2)
    model.save(str(tmp_path / "model"))
    with pytest.raises(
        ValueError, match=r"not a KeyedVectors of gensim: it names gensim\.models\.word2vec"
    ):
        load(tmp_path / "model")


class Touch:
    """What a pickle may run when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_that_names_other_things_is_refused_before_anything_runs(file, tmp_path: Path):
    for named in (
        datetime.date(2020, 1, 1),
        Touch(tmp_path / "ran"),
        print,
        # It begins as a name that is allowed.
        setattr,
        [np.array([Touch(tmp_path / "ran")])],
    ):
        with pytest.raises(ValueError, match=r"not a KeyedVectors of gensim: it names \w+"):
            load(file(pickle.dumps(named)))
    made = keyed_vectors(["a"], np.ones((1, 2), np.float32))
    made.expandos["more"] = Touch(tmp_path / "ran")
    made.save(str(tmp_path / "words.kv"))
    with pytest.raises(ValueError, match="not a KeyedVectors of gensim: it names pathlib"):
        load(tmp_path / "words.kv")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="not a KeyedVectors of gensim, but a dict"):
        load(file(pickle.dumps({})))


@pytest.mark.parametrize("attribute", ["__scipys", "__recursive_saveloads"])
def test_pickles_beside_the_file_are_not_opened(tmp_path: Path, attribute: str):
    """gensim opens them unchecked."""
    made = keyed_vectors(["a"], np.ones((1, 2), np.float32))
    setattr(made, attribute, ["other"])
    (tmp_path / "words.kv.other.npy").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    gensim.utils.pickle(made, str(tmp_path / "words.kv"))
    with pytest.raises(ValueError, match="it names pickles beside it"):
        load(tmp_path / "words.kv")
    assert not (tmp_path / "ran").exists()


def test_keyed_vectors_that_were_cut(tmp_path: Path):
    path = tmp_path / "words.kv"
    keyed_vectors(WORDS, np.ones((6, 4), np.float32)).save(str(path))
    content = path.read_bytes()
    for length in (2, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"words\.kv: not a KeyedVectors of gensim"):
            load(path)
    keyed_vectors(WORDS, np.ones((6, 4), np.float32)).save(str(path), separately=["vectors"])
    (tmp_path / "words.kv.vectors.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"words\.kv\.vectors\.npy"):
        load(path)


def test_fp16_that_overflows(tmp_path: Path):
    keyed_vectors(["a", "b"], np.array([[1, 2], [3, 70000]], np.float32)).save(
        str(tmp_path / "words.kv")
    )
    with pytest.raises(
        ValueError, match=r"vector of 'b' has the number 70000.0, which is not finite in float16"
    ):
        load(tmp_path / "words.kv", dtype="float16")


def subword_rows(word: bytes, number: int) -> list[int]:
    """The rows whose mean is a word's vector: its own, and those of its n-grams; as `Dictionary::computeSubwords`."""
    rows = [number]
    whole = b"<" + word + b">"
    for i in range(len(whole) if word != b"</s>" else 0):
        if whole[i] & 0xC0 == 0x80:
            continue
        j, n = i, 1
        while j < len(whole) and n <= LONGEST:
            j += 1
            while j < len(whole) and whole[j] & 0xC0 == 0x80:
                j += 1
            if n >= SHORTEST and not (n == 1 and (i == 0 or j == len(whole))):
                hashed = np.uint32(2166136261)
                for byte in np.frombuffer(whole[i:j], np.int8):
                    with np.errstate(over="ignore"):
                        hashed = (hashed ^ byte.astype(np.uint32)) * np.uint32(16777619)
                rows.append(len(WORDS) + int(hashed) % BUCKET)
            n += 1
    return rows


def fasttext_model(
    rows: np.ndarray,
    *,
    words: list[bytes],
    model: int = 2,
    labels: int = 0,
    pruned: int = -1,
    quantized: bool = False,
) -> bytes:
    """A file as fastText writes it; the words are not by how often they were seen."""
    parts = [struct.pack("<2i", 793712314, 12)]
    parts += [
        struct.pack("<12id", DIM, 5, 1, 1, 5, 1, 2, model, BUCKET, SHORTEST, LONGEST, 100, 1e-4)
    ]
    parts += [struct.pack("<3i2q", len(words), len(words) - labels, labels, 100, pruned)]
    for number, word in enumerate(words):
        parts += [word, b"\0", struct.pack("<qb", 10 + number % 3, 0)]
    parts += [struct.pack("<?2q", quantized, *rows.shape), rows.astype("<f4").tobytes()]
    parts += [
        struct.pack("<?2q", False, len(words), DIM),
        np.zeros((len(words), DIM), "<f4").tobytes(),
    ]
    return b"".join(parts)


ROWS = np.random.default_rng(1).normal(size=(len(WORDS) + BUCKET, DIM)).astype(np.float32)


def test_words_of_fasttext_are_means_with_their_n_grams(file):
    found = load(file(fasttext_model(ROWS, words=[word.encode() for word in WORDS]), "model.bin"))
    assert found.words == WORDS
    expected = [
        ROWS[subword_rows(word.encode(), number)].astype(np.float64).mean(axis=0)
        for number, word in enumerate(WORDS)
    ]
    assert np.allclose(found.matrix, expected, rtol=0, atol=1e-6)
    # The end of a sentence has no n-grams.
    assert np.array_equal(found["</s>"], ROWS[0])
    # The stored rows are other ones.
    assert not np.isclose(found.matrix[1:], ROWS[1 : len(WORDS)]).any(axis=1).all()
    some = load(
        file(fasttext_model(ROWS, words=[word.encode() for word in WORDS])),
        limit=2,
        dtype="float16",
    )
    assert (some.words, some.matrix.dtype) == (WORDS[:2], np.float16)


def test_a_model_that_gensim_wrote(tmp_path: Path):
    model = FastText(
        [["a", "cat", "sat"], ["a", "dog", "sat"]], vector_size=4, min_count=1, bucket=20, epochs=1
    )
    save_facebook_model(model, str(tmp_path / "model.bin"))
    found = load(tmp_path / "model.bin")
    assert found.words == model.wv.index_to_key
    assert np.allclose(found.matrix, model.wv.vectors, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": 3}, "classifies texts has no vectors"),
        ({"labels": 1}, "with labels or fewer n-grams"),
        ({"pruned": 0}, "with labels or fewer n-grams"),
        ({"quantized": True}, "a quantized model"),
    ],
    ids=["classifier", "labels", "pruned", "quantized"],
)
def test_other_models_of_fasttext_are_refused(file, changed: dict, said: str):
    path = file(fasttext_model(ROWS, words=[word.encode() for word in WORDS], **changed))
    with pytest.raises(ValueError, match=said):
        load(path)


@pytest.mark.parametrize("what", ["n-grams", "rows"])
@pytest.mark.parametrize("number", [-1, 0, 1000, 2**31 - 1])
def test_a_model_whose_sizes_are_wrong(file, what: str, number: int):
    content = fasttext_model(ROWS, words=[word.encode() for word in WORDS])
    sizes = struct.pack("<2q", *ROWS.shape) if what == "rows" else struct.pack("<i", BUCKET)
    wrong = struct.pack("<2q", number, DIM) if what == "rows" else struct.pack("<i", number)
    changed = content.replace(sizes, wrong, 1)
    assert changed != content
    if what == "n-grams" and number == 0:
        # No n-grams.
        assert np.array_equal(load(file(changed)).matrix, ROWS[: len(WORDS)])
        return
    with pytest.raises(
        ValueError, match="a model of fastText, which was cut or is of another kind"
    ):
        load(file(changed))


def test_a_model_that_was_cut(file):
    content = fasttext_model(ROWS, words=[word.encode() for word in WORDS])
    for length in range(4, len(content) - 4 * DIM * len(WORDS) - 20, 37):
        with pytest.raises(ValueError, match="a model of fastText, which was cut"):
            load(file(content[:length]))


def test_a_number_of_a_model_that_is_not_finite(file):
    rows = ROWS.copy()
    rows[2, 1] = np.nan
    path = file(fasttext_model(rows, words=[word.encode() for word in WORDS]))
    with pytest.raises(ValueError, match="vector of 'queen' has the number nan"):
        load(path)
    path = file(fasttext_model(ROWS * 1e6, words=[word.encode() for word in WORDS]))
    with pytest.raises(
        ValueError, match=r"vector of '</s>' has the number .*not finite in float16"
    ):
        load(path, dtype="float16")


def test_words_of_a_model_in_another_encoding(file):
    words = [*(word.encode() for word in WORDS[:-1]), "café".encode("cp1252")]
    path = file(fasttext_model(ROWS, words=words))
    with pytest.raises(
        ValueError, match=r"the word b'caf\\xe9' is not in utf-8: give the file's encoding"
    ):
        load(path)
    assert load(path, errors="backslashreplace").words[-1] == r"caf\xe9"
    words = [b"king", b"queen", b"a", b"b", b"c", "café".encode("cp1252")]
    assert load(file(fasttext_model(ROWS, words=words)), encoding="cp1252").words[-1] == "café"


def test_words_that_are_cut_inside_of_a_character_have_the_n_grams_of_their_bytes(file):
    words = [
        "日本".encode(),
        "日本".encode()[:-1],
        "日".encode()[1:] + b"a",
        b"\xe9",
        b"a\xe9b",
        b"\xff\x80",
    ]
    found = load(file(fasttext_model(ROWS, words=words)), errors="backslashreplace")
    for number, word in enumerate(words):
        rows = ROWS[subword_rows(word, number)]
        assert np.allclose(
            found.matrix[number], rows.astype(np.float64).mean(axis=0), rtol=0, atol=1e-6
        ), word


def test_the_end_of_a_sentence_is_the_same_in_both_files_of_a_model(file):
    """fastText writes its own row into the .vec, so what is read from the .bin must be that too."""
    of_bin = load(file(fasttext_model(ROWS, words=[word.encode() for word in WORDS]), "model.bin"))
    Vectors(of_bin.words, of_bin.matrix).save(file("", "model.vec"))
    of_vec = load(file("", "x").with_name("model.vec"))
    assert of_vec.words == of_bin.words
    assert np.array_equal(of_vec.matrix, of_bin.matrix)
    assert all(one != other for one, other in pairwise(of_vec.words))
