"""Words to ids, by Hugging Face's `tokenizers` (extra `text`): a vocabulary, its table's size, a check; and by hashing.

Example::

    phrases = ["Hope to see you soon", "Nice to see you again"]
    tokenizer = gpu_embed.text.vocabulary(phrases)
    ids = gpu_embed.text.encode(tokenizer, phrases)  # [[0, 1, 2, 3, 4], [5, 1, 2, 3, 6]]
    table = gpu_embed.Embedding(gpu_embed.text.table_size(tokenizer), 2)  # 7 rows

The tokenizer is an ordinary `tokenizers.Tokenizer`: it saves, loads, pads and truncates as its own
documentation says.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .hashing import hash_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "check_table_size",
    "encode",
    "hash_ids",
    "table_size",
    "vocabulary",
    "words_by_id",
]

ORDERS = ("appearance", "frequency")


def vocabulary(
    texts: Iterable[str],
    order: str = "appearance",
    specials: Sequence[str] = (),
    unknown: str | None = None,
    padding: str | None = None,
    lowercase: bool = False,
) -> Tokenizer:
    """A tokenizer that knows every word of `texts`, each by one id counted from 0.

    Words are what lies between spaces; punctuation marks are words of their own.

    Args:
        texts: read once.
        order: of the ids: "appearance" in the texts, or "frequency", the most frequent first (equally frequent
            words by appearance).
        specials: tokens that get the first ids, in this order, and are never split.
        unknown: the token that stands for unseen words. None: an unseen word is an error.
        padding: the token that fills short texts up to the longest of a batch. None: no padding.
        lowercase: whether "Hope" and "hope" are one word.

    `padding` and `unknown` come before the specials if they are not among them.

    Returns:
        A `tokenizers.Tokenizer` (WordLevel).

    Raises:
        ValueError: an unknown order, a special that is empty or given twice, or no word at all.
        TypeError: `texts` or `specials` is one string, or one of them holds something else than strings.
        ModuleNotFoundError: tokenizers is not installed.
    """
    tokenizers = _tokenizers()
    if order not in ORDERS:
        raise ValueError(
            f"vocabulary: expected order to be one of {', '.join(map(repr, ORDERS))}, got {order!r}"
        )
    if isinstance(texts, str):
        raise TypeError("vocabulary: expected several texts, got one string; put it in a list")
    if isinstance(specials, str):
        raise TypeError("vocabulary: expected several specials, got one string; put it in a list")
    asked_for = [token for token in (padding, unknown) if token is not None]
    first = [*(token for token in dict.fromkeys(asked_for) if token not in specials), *specials]
    if len(set(first)) < len(first):
        raise ValueError(f"vocabulary: a special token is given twice: {first}")
    for token in first:
        if not isinstance(token, str):
            raise TypeError(
                f"vocabulary: expected special tokens to be strings, got {type(token).__name__}"
            )
        if not token:
            raise ValueError("vocabulary: a special token is empty")

    normalizer = tokenizers.normalizers.Lowercase() if lowercase else None
    splitter = tokenizers.pre_tokenizers.Whitespace()
    counts: Counter[str] = Counter()
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"vocabulary: expected strings, got {type(text).__name__}")
        counts.update(_words(text, normalizer, splitter, first))
    # A Counter keeps the order of appearance, and most_common keeps it among equals.
    words = list(counts) if order == "appearance" else [word for word, _ in counts.most_common()]
    if not words and not first:
        raise ValueError("vocabulary: the texts hold no word")
    ids = {token: i for i, token in enumerate([*first, *words])}
    model = tokenizers.models.WordLevel(ids, **({} if unknown is None else {"unk_token": unknown}))
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens(first)
    if padding is not None:
        tokenizer.enable_padding(pad_id=ids[padding], pad_token=padding)
    return tokenizer


def encode(
    tokenizer: Tokenizer, texts: Iterable[str], device: torch.device | str | None = None
) -> Tensor:
    """The ids of some texts, padded and truncated as the tokenizer is set to -> int64 [texts, length].

    Args:
        device: where the ids are made; None: torch's default device.

    Raises:
        TypeError: `texts` is one string, or holds something else than strings.
        KeyError: a word is not in the vocabulary, which has no unknown token; names the word and the text.
        ValueError: the texts are of different lengths and the tokenizer pads nothing.
    """
    if isinstance(texts, str):
        raise TypeError("encode: expected several texts, got one string; put it in a list")
    texts = list(texts)
    try:
        encodings = tokenizer.encode_batch(texts)
    # tokenizers raises a bare Exception, which does not name the word.
    except Exception:
        for number, text in enumerate(texts):
            for word in _unseen(tokenizer, text):
                raise KeyError(
                    f"the word {word!r} of text {number} is not in the vocabulary; build it with "
                    "these texts too, or with unknown='[UNK]'"
                ) from None
        raise
    rows = [encoding.ids for encoding in encodings]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"encode: the texts have {lengths[0]} to {lengths[-1]} words; build the vocabulary with "
            "padding='[PAD]', or call the tokenizer's enable_padding()"
        )
    length = lengths[0] if lengths else 0
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), length)


def table_size(tokenizer: Tokenizer) -> int:
    """Rows that a table needs for every id of the tokenizer: the largest id and one more.

    Warns if two words have one id, and so one row: tokens that were added to a vocabulary whose ids have gaps.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True)
    try:
        _by_id(ids)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
    return max(ids.values(), default=-1) + 1


def words_by_id(tokenizer: Any) -> dict[int, str]:
    """The words of a vocabulary by their ids, in the ids' order.

    Args:
        tokenizer: of `tokenizers` or transformers; Keras's Tokenizer, StringLookup or TextVectorization; a mapping of
            words to ids; or a list of words, whose ids are counted from 0.

    Raises:
        ValueError: a word is listed twice, an id is negative, or two words have one id, and so one row: tokens that
            were added to a vocabulary whose ids have gaps.
        TypeError: none of these, or an id is no integer.
    """
    if isinstance(tokenizer, Mapping):
        return _by_id(tokenizer)
    if hasattr(tokenizer, "get_vocab"):
        return _by_id(tokenizer.get_vocab())
    if hasattr(tokenizer, "word_index"):
        return _by_id(tokenizer.word_index)
    words = tokenizer.get_vocabulary() if hasattr(tokenizer, "get_vocabulary") else tokenizer
    if not isinstance(words, Sequence) or isinstance(words, str):
        raise TypeError(
            f"words_by_id: expected a tokenizer, words to ids, or a list of words, got {type(tokenizer).__name__}"
        )
    seen: set[str] = set()
    for word in words:
        if word in seen:
            raise ValueError(f"words_by_id: the word {word!r} is listed twice")
        seen.add(word)
    return dict(enumerate(words))


def _by_id(ids: Mapping[str, int]) -> dict[int, str]:
    words: dict[int, str] = {}
    for word, number in ids.items():
        if isinstance(number, str):
            raise TypeError(
                f"expected words to ids, not ids to words: {{{number!r}: {word!r}}}, not {{{word!r}: {number!r}}}"
            )
        other = words.setdefault(index(number), word)
        if number < 0:
            raise ValueError(
                f"the word {word!r} has the id {number}, and a table's rows are counted from 0"
            )
        if other != word:
            raise ValueError(
                f"the words {other!r} and {word!r} have one id, {number}, and so one row of a table: tokens were "
                "added to a vocabulary whose ids have gaps; number its words without gaps, from 0"
            )
    # tokenizers gives a vocabulary in another order in every process.
    return dict(sorted(words.items()))


def check_table_size(ids: Any, num_embeddings: int) -> None:
    """Raise ValueError if a table of `num_embeddings` rows is too small for these ids, and say why.

    Args:
        ids: a tensor, array, or nested list of integers; as Keras's or any other tokenizer made them, so the
            lists may differ in length.

    Keras's Tokenizer counts from 1: seven words have the ids 1 to 7, and need a table of 8 rows.

    Raises:
        ValueError: an id is negative, or not less than `num_embeddings`.
        TypeError: the ids are no integers.
    """
    flat = _flat(ids)
    if flat.numel() == 0:
        return
    if flat.is_floating_point() or flat.is_complex() or flat.dtype == torch.bool:
        raise TypeError(f"check_table_size: expected integers, got {flat.dtype}")
    low, high = int(flat.min()), int(flat.max())
    if low < 0:
        raise ValueError(f"id {low} is negative: a table's rows are counted from 0")
    if high < num_embeddings:
        return
    why = (
        f"ids counted from 1, as Keras's Tokenizer does, go up to the number of words, {high}"
        if low >= 1 and high == num_embeddings
        else f"the largest id is {high}"
    )
    raise ValueError(
        f"{why}, and rows are counted from 0, so the table needs {high + 1} rows, not {num_embeddings}: "
        f"Embedding({high + 1}, ...)"
    )


def _flat(ids: Any) -> Tensor:
    """All ids as one row."""
    if isinstance(ids, list | tuple) and any(hasattr(part, "__len__") for part in ids):
        # An empty list has no dtype of its own.
        parts = [part for part in map(_flat, ids) if part.numel()]
        return torch.cat(parts) if parts else torch.empty(0, device="cpu")
    return torch.as_tensor(ids, device="cpu").reshape(-1)


def _words(text: str, normalizer: Any, splitter: Any, specials: Sequence[str]) -> list[str]:
    """The words of a text; the special tokens in it are no words."""
    if specials:
        # The longest first, as tokenizers finds them.
        longest = sorted(specials, key=len, reverse=True)
        text = re.sub("|".join(map(re.escape, longest)), " ", text)
    if normalizer is not None:
        text = normalizer.normalize_str(text)
    if splitter is None:
        return [text]
    return [word for word, _ in splitter.pre_tokenize_str(text)]


def _unseen(tokenizer: Tokenizer, text: str) -> list[str]:
    known = tokenizer.get_vocab(with_added_tokens=True)
    specials = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    words = _words(text, tokenizer.normalizer, tokenizer.pre_tokenizer, specials)
    return [word for word in words if word not in known]


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "gpu_embed.text needs Hugging Face's tokenizers: "
            'install the extra "text" (from a clone: pip install ".[text]")'
        ) from error
    return tokenizers
