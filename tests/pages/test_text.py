"""Words to ids: the phrases of the introduction, the orders, and what goes wrong."""

import sys

import pytest
import torch

import gpu_embed
from gpu_embed import text

tokenizers = pytest.importorskip("tokenizers")

PHRASES = ["Hope to see you soon", "Nice to see you again"]


def test_phrases_by_appearance() -> None:
    tokenizer = text.vocabulary(PHRASES)
    assert isinstance(tokenizer, tokenizers.Tokenizer)
    ids = text.encode(tokenizer, PHRASES)
    assert ids.tolist() == [[0, 1, 2, 3, 4], [5, 1, 2, 3, 6]]
    assert ids.dtype == torch.int64
    assert text.table_size(tokenizer) == 7
    assert gpu_embed.Embedding(7, 2)(ids).shape == (2, 5, 2)
    assert tokenizer.decode([5, 1, 2]) == "Nice to see"


@pytest.mark.parametrize(
    ("order", "words"),
    [("appearance", ["b", "a", "c"]), ("frequency", ["a", "b", "c"])],
)
def test_order(order: str, words: list[str]) -> None:
    tokenizer = text.vocabulary(["b a", "a c"], order=order)
    assert [tokenizer.id_to_token(i) for i in range(3)] == words


def test_specials_come_first_and_stay_whole() -> None:
    tokenizer = text.vocabulary(["a [CLS] b"], specials=["[CLS]"], unknown="[UNK]", padding="[PAD]")
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "a", "b"]
    assert text.encode(tokenizer, ["b [CLS] x", "a"]).tolist() == [[4, 2, 1], [3, 0, 0]]
    assert text.table_size(tokenizer) == 5


def test_specials_of_any_place_pad_and_are_not_decoded() -> None:
    tokenizer = text.vocabulary(["a b"], specials=["[CLS]", "[PAD]"], padding="[PAD]")
    assert text.encode(tokenizer, ["[CLS] b", "a"]).tolist() == [[0, 3], [2, 1]]
    assert tokenizer.decode([0, 3, 1]) == "b"


def test_a_word_that_was_added_needs_a_row() -> None:
    tokenizer = text.vocabulary(PHRASES)
    tokenizer.add_tokens(["never"])
    assert text.table_size(tokenizer) == 8
    assert text.encode(tokenizer, ["never see"]).tolist() == [[7, 2]]


def test_two_words_of_one_id() -> None:
    """Tokens that are added to a vocabulary with gaps are numbered from its size on."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 2}))
    assert text.table_size(tokenizer) == 3
    tokenizer.add_tokens(["new"])
    assert tokenizer.token_to_id("new") == tokenizer.token_to_id("b") == 2
    said = "the words '(b|new)' and '(b|new)' have one id, 2, and so one row of a table: tokens were added"
    with pytest.warns(UserWarning, match=said) as warned:
        assert text.table_size(tokenizer) == 3
    assert warned[0].filename == __file__
    with pytest.raises(ValueError, match=said):
        text.words_by_id(tokenizer)


def test_words_by_id() -> None:
    assert text.words_by_id(text.vocabulary(["a b"], padding="[PAD]")) == {
        0: "[PAD]",
        1: "a",
        2: "b",
    }
    assert text.words_by_id(["a", "b"]) == text.words_by_id({"a": 0, "b": 1}) == {0: "a", 1: "b"}
    for wrong, error, match in (
        (["a", "b", "a"], ValueError, "the word 'a' is listed twice"),
        ({"a": 0, "b": 0}, ValueError, "the words 'a' and 'b' have one id, 0"),
        ({"a": -1}, ValueError, "the word 'a' has the id -1"),
        ({"a": 0.5}, TypeError, "float"),
        ("a b", TypeError, "or a list of words, got str"),
        (7, TypeError, "got int"),
    ):
        with pytest.raises(error, match=match):
            text.words_by_id(wrong)


def test_ids_lie_on_the_device() -> None:
    assert text.encode(text.vocabulary(PHRASES), PHRASES, "meta").device.type == "meta"


def test_a_special_that_begins_as_another() -> None:
    tokenizer = text.vocabulary(["<a> <ab>"], specials=["<a", "<ab>"])
    assert tokenizer.get_vocab() == {"<a": 0, "<ab>": 1, ">": 2}
    assert text.encode(tokenizer, ["<ab> <a>"]).tolist() == [[1, 0, 2]]


def test_lowercase_and_punctuation() -> None:
    tokenizer = text.vocabulary(["Hope, hope!"], lowercase=True)
    assert tokenizer.get_vocab() == {"hope": 0, ",": 1, "!": 2}
    assert text.encode(tokenizer, ["HOPE!"]).tolist() == [[0, 2]]


def test_saved_and_loaded(tmp_path) -> None:
    tokenizer = text.vocabulary(PHRASES, unknown="[UNK]", padding="[PAD]")
    tokenizer.enable_truncation(3)
    file = tmp_path / "words.json"
    tokenizer.save(str(file))
    loaded = tokenizers.Tokenizer.from_file(str(file))
    assert text.encode(loaded, PHRASES).tolist() == text.encode(tokenizer, PHRASES).tolist()
    assert text.encode(loaded, PHRASES).shape == (2, 3)


def test_unseen_word_is_named() -> None:
    tokenizer = text.vocabulary(PHRASES, specials=["[CLS]"])
    with pytest.raises(KeyError, match=r"'never' of text 1 .* unknown='\[UNK\]'"):
        text.encode(tokenizer, iter(["Hope to see", "[CLS] you never see"]))


def test_unseen_text_of_a_tokenizer_that_splits_nothing() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"to see": 0}))
    assert text.encode(tokenizer, ["to see"]).tolist() == [[0]]
    with pytest.raises(KeyError, match="'see you' of text 1"):
        text.encode(tokenizer, ["to see", "see you"])


def test_texts_of_different_lengths() -> None:
    tokenizer = text.vocabulary(PHRASES)
    with pytest.raises(ValueError, match=r"1 to 2 words; .*padding='\[PAD\]'"):
        text.encode(tokenizer, ["Hope", "to see"])


def test_no_texts() -> None:
    assert text.encode(text.vocabulary(PHRASES), []).shape == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((PHRASES, "alphabet"), ValueError, "'appearance', 'frequency', got 'alphabet'"),
        (("one text",), TypeError, "put it in a list"),
        (([b"bytes"],), TypeError, "expected strings, got bytes"),
        (([" "],), ValueError, "no word"),
        ((PHRASES, "appearance", ["a", "a"]), ValueError, "given twice"),
        ((PHRASES, "appearance", "[CLS]"), TypeError, "several specials, got one string"),
        ((PHRASES, "appearance", [3]), TypeError, "special tokens to be strings, got int"),
        ((PHRASES, "appearance", [""]), ValueError, "special token is empty"),
        ((PHRASES, "appearance", [], True), TypeError, "strings, got bool"),
    ],
    ids=["order", "string", "bytes", "empty", "twice", "one", "number", "nothing", "unknown"],
)
def test_wrong_arguments(arguments, error, match) -> None:
    with pytest.raises(error, match=match):
        text.vocabulary(*arguments)


def test_tokenizers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match='install the extra "text"'):
        text.vocabulary(PHRASES)


KERAS_IDS = [[4, 1, 2, 3, 5], [6, 1, 2, 3, 7]]


def test_ids_that_keras_counts_from_one() -> None:
    with pytest.raises(
        ValueError, match=r"counted from 1, as Keras's Tokenizer does.*Embedding\(8, \.\.\.\)"
    ):
        text.check_table_size(KERAS_IDS, 7)
    text.check_table_size(KERAS_IDS, 8)


def test_ids_of_texts_of_different_lengths() -> None:
    """As Keras's texts_to_sequences gives them."""
    ids = [[4, 1, 2], [], [6, 1, 2, 3, 7]]
    with pytest.raises(ValueError, match=r"as Keras's Tokenizer does.*Embedding\(8, "):
        text.check_table_size(ids, 7)
    text.check_table_size(ids, 8)
    with pytest.raises(ValueError, match="largest id is 7"):
        text.check_table_size([torch.tensor([0, 7]), torch.tensor([1])], 7)


@pytest.mark.parametrize(
    ("ids", "rows", "match"),
    [([0, 7], 7, "largest id is 7.*needs 8 rows, not 7"), ([-1], 7, "id -1 is negative")],
)
def test_other_ids_that_do_not_fit(ids, rows, match) -> None:
    with pytest.raises(ValueError, match=match):
        text.check_table_size(torch.tensor(ids), rows)


@pytest.mark.parametrize("ids", [[0.5, 6.9], torch.tensor([True]), [[1j]]], ids=str)
def test_ids_that_are_no_integers(ids) -> None:
    with pytest.raises(TypeError, match=r"expected integers, got torch\."):
        text.check_table_size(ids, 7)


def test_no_ids_fit_any_table() -> None:
    text.check_table_size([], 0)
    text.check_table_size([[], []], 0)
