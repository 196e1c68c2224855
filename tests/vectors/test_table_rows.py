"""Vectors into tables by a tokenizer's ids, and out of trained ones."""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import tokenizers
import torch

import gpu_embed
from gpu_embed import text
from gpu_embed.vectors import Vectors, load

WORDS = ["the", "cat", "dog", "unk"]
ROWS = np.arange(12, dtype=np.float32).reshape(4, 3) + 1
VECTORS = Vectors(WORDS, ROWS)
IDS = {"[PAD]": 0, "[UNK]": 1, "the": 2, "Cat": 3, "cat": 4, "bird": 5}
TEXTS = ["the cat the", "the bird whale Cat"]


def tokenizer() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["[PAD]", "[UNK]"])
    return made


def transformers_tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), unk_token="[UNK]", pad_token="[PAD]"
    )


@pytest.mark.parametrize("make", [tokenizer, transformers_tokenizer])
def test_a_table_and_its_report(make):
    table, report = VECTORS.embedding(make(), padding="[PAD]", texts=iter(TEXTS))
    assert isinstance(table, gpu_embed.Embedding)
    assert table.weight.shape == (6, 3)
    assert table.weight.requires_grad
    assert table.padding_idx == 0
    assert table.weight[0].tolist() == [0, 0, 0]
    assert torch.equal(table.weight[1].detach(), torch.from_numpy(ROWS.mean(axis=0)))
    assert table.weight[[2, 3, 4]].tolist() == ROWS[[0, 1, 1]].tolist()
    assert report == (4, 3, 1, ("bird",), "normal", pytest.approx(5 / 7))
    assert (
        str(report)
        == "3 of 4 words found (75.0 %; 71.4 % of the text); 1 by lower case; 1 drawn from N(mean, std)"
    )


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("normal", "1 drawn from N(mean, std)"),
        ("mean", "1 set to the mean"),
        ("zeros", "1 set to zeros"),
    ],
)
def test_rows_of_words_without_a_vector(missing: str, said: str):
    table, report = VECTORS.embedding(tokenizer(), missing=missing, unknown="zeros")
    assert str(report) == f"3 of 5 words found (60.0 %); 1 by lower case; {said.replace('1', '2')}"
    assert table.weight[1].tolist() == [0, 0, 0]
    row = table.weight[5].detach()
    mean = torch.from_numpy(ROWS.mean(axis=0))
    assert torch.equal(row, {"mean": mean, "zeros": torch.zeros(3)}.get(missing, row))
    if missing == "normal":
        assert not torch.equal(row, mean)


def test_what_is_drawn_has_the_mean_and_the_deviation_of_each_column():
    rows = np.random.default_rng(0).normal([-5, 0, 5], [0.1, 1, 10], (2000, 3)).astype(np.float32)
    found = Vectors([f"w{number}" for number in range(len(rows))], rows)
    words = [f"other {number}" for number in range(4000)]
    drawn = found.embedding(words)[0].weight.detach().numpy()
    assert np.allclose(
        drawn.mean(axis=0), rows.mean(axis=0), atol=5 * rows.std(axis=0) / 4000**0.5, rtol=0
    )
    assert np.allclose(drawn.std(axis=0), rows.std(axis=0), rtol=0.06)
    assert np.array_equal(drawn, found.embedding(words)[0].weight.detach().numpy())
    assert not np.array_equal(drawn, found.embedding(words, seed=1)[0].weight.detach().numpy())


def test_what_is_drawn_does_not_depend_on_the_order_of_a_vocabulary():
    ids = {f"other {number}": number for number in range(50)}
    one, report = VECTORS.embedding(ids)
    other, other_report = VECTORS.embedding(dict(reversed(ids.items())))
    assert torch.equal(one.weight, other.weight)
    assert report.missing == other_report.missing == tuple(ids)


def test_a_frozen_table_and_other_options():
    table, _ = VECTORS.embedding(WORDS, freeze=True, dtype=torch.float64, sparse=True, max_norm=2.0)
    assert not table.weight.requires_grad
    assert (table.weight.dtype, table.sparse, table.max_norm) == (torch.float64, True, 2.0)
    table, report = VECTORS.embedding(WORDS)
    table(torch.tensor([1])).sum().backward()
    assert table.weight.grad[1].tolist() == [1, 1, 1]
    assert str(report) == "4 of 4 words found (100.0 %)"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_vectors_of_other_dtypes(dtype: str):
    assert VECTORS.converted(dtype).embedding(WORDS)[0].weight.dtype == torch.float32
    wide = Vectors(["a"], np.array([[0.1]])).embedding(["a"], dtype=torch.float64)[0]
    assert wide.weight.item() == 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"padding": "nothing"}, ValueError, "padding='nothing' is no word of the tokenizer"),
        (
            {"unknown": "median"},
            ValueError,
            "unknown must be one of mean, normal, zeros, got 'median'",
        ),
        (
            {"missing": "error"},
            ValueError,
            "missing must be one of mean, normal, zeros, got 'error'",
        ),
        ({"texts": "one text"}, TypeError, "texts: expected several texts, got one string"),
    ],
)
def test_wrong_arguments(arguments: dict, error: type, said: str):
    with pytest.raises(error, match=said):
        VECTORS.embedding(tokenizer(), **arguments)


def test_numbers_that_are_not_finite():
    rows = ROWS.copy()
    rows[1, 1] = np.nan
    found = Vectors(WORDS, rows)
    with pytest.raises(ValueError, match=r"vector of '[Cc]at' has the number nan"):
        found.embedding(tokenizer())
    with pytest.raises(ValueError, match="vector of 'cat' has the number nan"):
        found.embedding(["the", "bird"])
    assert found.embedding(["the", "bird"], missing="zeros")[0].weight[1].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="there are no vectors to take a mean of"):
        Vectors([], np.empty((0, 3))).embedding(["a"])


@pytest.mark.parametrize(
    "words",
    [
        ["the", "bird", "dog"],
        {"dog": 2, "the": 0, "bird": 1},
        {"dog": np.int64(2), "the": 0, "bird": 1},
    ],
    ids=["list", "dict", "numpy"],
)
def test_words_in_a_list_or_a_dict(words):
    table, report = VECTORS.embedding(words, missing="zeros", texts=["the the whale dog"])
    assert table.weight.tolist() == [[1, 2, 3], [0, 0, 0], [7, 8, 9]]
    assert report.share_of_text == 0.75


def test_ids_with_gaps_have_rows_of_zeros():
    table, _ = VECTORS.embedding({"the": 1, "dog": 3})
    assert table.weight.tolist() == [[0, 0, 0], [1, 2, 3], [0, 0, 0], [7, 8, 9]]


def test_what_a_tokenizer_adds_and_cuts_is_no_part_of_the_text():
    made = tokenizer()
    made.enable_padding(length=10, pad_id=0, pad_token="[PAD]")
    made.enable_truncation(2)
    padding, truncation = made.padding, made.truncation
    _, report = VECTORS.embedding(made, texts=TEXTS)
    assert report.share_of_text == pytest.approx(5 / 7)
    # The tokenizer stays as it is.
    assert (made.padding, made.truncation) == (padding, truncation)
    assert made.encode("the").ids == [2] + [0] * 9


class PadToken(dict):
    """As a tokenizer of transformers, which has the name of its padding."""

    pad_token = "[PAD]"
    unk_token = "[UNK]"


def test_the_padding_of_a_tokenizer_is_taken():
    padded = tokenizer()
    padded.enable_padding(pad_id=0, pad_token="[PAD]")
    for made in (padded, PadToken(IDS)):
        table, report = VECTORS.embedding(made)
        assert table.padding_idx == 0
        assert table.weight[0].tolist() == [0, 0, 0]
        assert (report.words, report.missing) == (4, ("bird",))
        # Another one is asked for.
        assert VECTORS.embedding(made, padding="bird")[0].padding_idx == 5
    assert VECTORS.embedding(tokenizer())[0].padding_idx is None


def test_names_of_other_layers():
    with pytest.raises(
        TypeError, match="name the word of the padding row, padding=, for padding_idx="
    ):
        VECTORS.embedding(tokenizer(), padding_idx=0)
    with pytest.raises(
        TypeError, match=r"words to ids, not ids to words: \{'the': 0\}, not \{0: 'the'\}"
    ):
        VECTORS.embedding({0: "the"})


def test_two_words_of_one_id():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cat": 2}))
    made.add_tokens(["dog"])
    with pytest.raises(ValueError, match=r"the words '(cat|dog)' and '(cat|dog)' have one id, 2"):
        VECTORS.embedding(made)
    with pytest.raises(ValueError, match="one id, 2"):
        Vectors.from_module(torch.nn.Embedding(3, 3), made)


def test_texts_with_words_that_no_token_stands_for():
    made = text.vocabulary(["the cat"])
    _, report = VECTORS.embedding(made, texts=["the cat, the whale"])
    # A comma is a word too.
    assert report.share_of_text == pytest.approx(3 / 5)
    assert VECTORS.embedding(made, texts=[])[1].share_of_text == 0


class LegacyTokenizer:
    """As Keras 2's: ids from 1."""

    def __init__(self) -> None:
        self.oov_token = "<OOV>"
        self.word_index = {"<OOV>": 1, "the": 2, "bird": 3}


def test_a_tokenizer_of_keras_2():
    table, report = VECTORS.embedding(LegacyTokenizer(), missing="zeros", texts=["The bird"])
    assert table.weight.tolist() == [[0, 0, 0], ROWS.mean(axis=0).tolist(), [1, 2, 3], [0, 0, 0]]
    assert (report.words, report.found, report.share_of_text) == (2, 1, 0.5)


class StringLookup:
    """As Keras 3's, which itself needs TensorFlow."""

    oov_token = "[UNK]"

    def get_vocabulary(self) -> list[str]:
        return ["[UNK]", "the", "bird", "cat"]


class TextVectorization:
    """As Keras 3's: the empty word is the padding, and it lowers the text."""

    def __init__(self) -> None:
        self._lookup_layer = StringLookup()

    def get_vocabulary(self) -> list[str]:
        return ["", *self._lookup_layer.get_vocabulary()]


@pytest.mark.parametrize(("layer", "padding"), [(StringLookup(), None), (TextVectorization(), "")])
def test_layers_of_keras_3_that_number_words(layer, padding: str | None):
    table, report = VECTORS.embedding(
        layer, padding=padding, missing="zeros", texts=["The bird cat"]
    )
    rows = [ROWS.mean(axis=0).tolist(), [1, 2, 3], [0, 0, 0], [4, 5, 6]]
    assert table.weight[-4:].tolist() == rows
    assert table.weight[:-4].tolist() == [[0, 0, 0]] * (padding is not None)
    assert (report.words, report.found, report.missing) == (3, 2, ("bird",))
    assert report.share_of_text == pytest.approx(2 / 3)
    # The empty word is none.
    assert Vectors.from_module(table, layer).words == ["[UNK]", "the", "bird", "cat"]


KERAS = """
import keras, numpy as np, torch
import gpu_embed.keras
from gpu_embed.vectors import Vectors

vectors = Vectors(["the", "cat"], np.array([[1, 2], [3, 4]], np.float32))
words = ["", "the", "bird", "cat"]
table, _ = vectors.embedding(words, padding="", missing="zeros")
for kind in (gpu_embed.keras.Embedding, keras.layers.Embedding):
    layer = kind(4, 2)
    try:
        vectors.fill(layer, words)
    except TypeError as error:
        assert "that is built" in str(error)
    else:
        raise AssertionError
    layer.build()
    vectors.fill(layer, words, padding="", missing="zeros")
    assert layer(np.array([[1, 3]])).tolist() == [[[1, 2], [3, 4]]]
    assert torch.equal(layer.embeddings.value.cpu().detach(), table.weight.detach())
    found = Vectors.from_module(layer, words)
    assert found.words == words[1:]
    assert found["cat"].tolist() == [3, 4]
    layer.quantize("int8")
    try:
        vectors.fill(layer, words)
    except ValueError as error:
        assert "int8 holds codes and no vectors" in str(error)
    else:
        raise AssertionError
print("ok")
"""


def test_keras(tmp_path):
    if find_spec("keras") is None:
        pytest.skip("keras is not installed")
    done = subprocess.run(
        [sys.executable, "-c", KERAS],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.stdout.endswith("ok\n"), done.stdout + done.stderr


LAYERS = {
    "torch Embedding": lambda: torch.nn.Embedding(8, 3),
    "Embedding": lambda: gpu_embed.Embedding(8, 3),
    "16 bit": lambda: gpu_embed.Embedding(8, 3, dtype=torch.bfloat16),
    "torch EmbeddingBag": lambda: torch.nn.EmbeddingBag(8, 3),
    "EmbeddingBag": lambda: gpu_embed.EmbeddingBag(8, 3, mode="max"),
    "frozen": lambda: gpu_embed.Embedding(8, 3).requires_grad_(False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_filled_and_read(name: str):
    layer = LAYERS[name]()
    rest = layer.weight[6:].tolist()
    report = VECTORS.fill(layer, tokenizer(), padding="[PAD]", missing="zeros")
    assert report.found == 3
    assert layer.weight[:3].tolist() == [[0, 0, 0], ROWS.mean(axis=0).tolist(), [1, 2, 3]]
    assert layer.weight[6:].tolist() == rest
    found = Vectors.from_module(layer, tokenizer())
    assert found.words == list(IDS)
    assert found["cat"].tolist() == [4, 5, 6]
    found.matrix[:] = 9
    assert layer.weight[2].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "kind", [gpu_embed.TableBatchedEmbedding, gpu_embed.TableBatchedEmbeddingBag]
)
def test_batched_tables(kind):
    layer = kind({"words": (8, 3), "others": (5, 3)}, padding_idx={"words": 0})
    others = layer["others"].tolist()
    VECTORS.fill(layer, tokenizer(), table="words", missing="zeros")
    # The padding row is the layer's own.
    assert layer["words"][:3].tolist() == [[0, 0, 0], ROWS.mean(axis=0).tolist(), [1, 2, 3]]
    assert layer["others"].tolist() == others
    assert Vectors.from_module(layer, tokenizer(), table="words")["cat"].tolist() == [4, 5, 6]
    for call in (
        lambda: VECTORS.fill(layer, tokenizer()),
        lambda: Vectors.from_module(layer, tokenizer()),
    ):
        with pytest.raises(
            ValueError, match="name one of the layer's tables by table=: words, others"
        ):
            call()
    with pytest.raises(KeyError, match="nothing"):
        VECTORS.fill(layer, tokenizer(), table="nothing")


def test_the_padding_row_of_a_layer_stays_zero():
    for layer in (
        gpu_embed.Embedding(8, 3, padding_idx=2),
        gpu_embed.EmbeddingBag(8, 3, padding_idx=2),
    ):
        VECTORS.fill(layer, tokenizer())
        assert layer.weight[2].tolist() == [0, 0, 0]
        with pytest.raises(ValueError, match=r"padding row is 2, and '\[PAD\]' has the id 0"):
            VECTORS.fill(layer, tokenizer(), padding="[PAD]")


def test_layers_that_do_not_fit():
    for layer, error, said in (
        (torch.nn.Embedding(5, 3), ValueError, r"rows \[6, 3\] do not fit into a table \[5, 3\]"),
        (torch.nn.Embedding(6, 4), ValueError, r"do not fit into a table \[6, 4\]"),
        (torch.nn.Embedding(0, 3), ValueError, "do not fit"),
        (
            torch.nn.ReLU(),
            TypeError,
            "expected an Embedding or EmbeddingBag, batched tables, .* got ReLU",
        ),
        (torch.ones(6, 3), TypeError, "got Tensor"),
    ):
        with pytest.raises(error, match=said):
            VECTORS.fill(layer, tokenizer())
    with pytest.raises(
        ValueError, match="table= is for batched tables, and this is a layer of one: Embedding"
    ):
        VECTORS.fill(torch.nn.Embedding(6, 3), tokenizer(), table="words")
    with pytest.raises(ValueError, match="'bird' has the id 5, and the table 5 rows"):
        Vectors.from_module(torch.nn.Embedding(5, 3), tokenizer())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_trained_table_goes_into_a_file_and_back(tmp_path, dtype: torch.dtype):
    table = gpu_embed.Embedding(6, 3, dtype=dtype)
    saved = Vectors.from_module(table, tokenizer())
    for end in (".vec", ".kv"):
        saved.save(tmp_path / f"trained{end}")
        found = load(tmp_path / f"trained{end}", dtype="float64")
        again, _ = found.embedding(tokenizer(), unknown="normal", dtype=dtype)
        known = [number for word, number in IDS.items() if word != "[UNK]"]
        assert torch.equal(again.weight[known], table.weight[known])


def test_a_table_that_is_a_view_of_a_larger_parameter():
    whole = torch.nn.Parameter(torch.zeros(10, 8))
    layer = torch.nn.Embedding(10, 3, _weight=whole.detach()[:, 2:5])
    VECTORS.fill(layer, tokenizer(), missing="zeros")
    assert whole[2].tolist() == [0, 0, 1, 2, 3, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_number_that_a_table_does_not_have(dtype: torch.dtype):
    vectors = Vectors(["a", "b"], np.array([[1], [3.4e38]]))
    with pytest.raises(ValueError, match="row 1 has a number that is not finite in torch"):
        vectors.embedding(["a", "b"], dtype=dtype)
    layer = torch.nn.Embedding(2, 1, dtype=dtype)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="row 1 has a number that is not finite in torch"):
        vectors.fill(layer, ["a", "b"])
    assert torch.equal(layer.weight, before)


def test_the_row_of_a_token_for_padding_and_unseen_words_is_zeros():
    class Tokenizer(dict):
        unk_token = "</s>"

    table, _ = Vectors(["a"], np.ones((1, 2))).embedding(
        Tokenizer({"</s>": 0, "a": 1}), padding="</s>"
    )
    assert table.weight.tolist() == [[0, 0], [1, 1]]


def test_a_layer_without_rows_of_its_own():
    vectors = Vectors(["a"], np.ones((1, 2)))
    with pytest.raises(ValueError, match="no memory yet"):
        vectors.fill(torch.nn.Embedding(1, 2, device="meta"), ["a"])
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Embedding(1, 2))
    with pytest.raises(ValueError, match="of other parameters"):
        vectors.fill(layer, ["a"])
