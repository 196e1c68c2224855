"""Rows for the ids of a tokenizer, of the vectors of its words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..nn.tables import BatchedTables
from ..text import words_by_id
from .reading import check_finite

if TYPE_CHECKING:
    from .vectors import Vectors

# As many of the most frequent words' vectors say how rows without one are drawn.
SAMPLE = 100_000
# Rows that are drawn at once.
BLOCK = 2**13
WAYS = ("mean", "normal", "zeros")


class TableReport(NamedTuple):
    """What `Vectors.embedding` found; print it.

    Attributes:
        words: how many words the tokenizer has, without its tokens for padding and unseen words.
        found: how many of them have a vector.
        by_lowercase: how many of these by their lower case alone.
        missing: the others.
        missing_way: what their rows are: "normal", "mean" or "zeros".
        share_of_text: the part of the texts' words that have a vector; None: no texts were given.
    """

    words: int
    found: int
    by_lowercase: int
    missing: tuple[str, ...]
    missing_way: str
    share_of_text: float | None

    def __str__(self) -> str:
        share = f"{100 * self.found / max(self.words, 1):.1f} %"
        if self.share_of_text is not None:
            share += f"; {100 * self.share_of_text:.1f} % of the text"
        parts = [f"{self.found:,} of {self.words:,} words found ({share})"]
        if self.by_lowercase:
            parts.append(f"{self.by_lowercase:,} by lower case")
        if self.missing:
            said = {
                "normal": "drawn from N(mean, std)",
                "mean": "set to the mean",
                "zeros": "set to zeros",
            }
            parts.append(f"{len(self.missing):,} {said[self.missing_way]}")
        return "; ".join(parts)


def rows_for(
    vectors: Vectors,
    tokenizer: Any,
    padding: str | None,
    unknown: str,
    missing: str,
    texts: Iterable[str] | None,
    seed: int,
) -> tuple[Tensor, int | None, TableReport]:
    """Rows [largest id + 1, dim] of fp32, or of fp64 where the vectors are; the id of padding; and the report.

    An id without a word has zeros.
    """
    for name, way in (("unknown", unknown), ("missing", missing)):
        if way not in WAYS:
            raise ValueError(f"{name} must be one of {', '.join(WAYS)}, got {way!r}")
    if isinstance(texts, str):
        raise TypeError("texts: expected several texts, got one string; put it in a list")
    words = words_by_id(tokenizer)
    ids = {word: number for number, word in words.items()}
    if padding is None:
        padding = _padding_token(tokenizer)
    if padding is not None and padding not in ids:
        raise ValueError(f"padding={padding!r} is no word of the tokenizer")
    unknown_token = _unknown_token(tokenizer)
    of_words = {
        number: word for number, word in words.items() if word not in (padding, unknown_token)
    }

    found: dict[int, int] = {}
    by_lowercase, without = 0, []
    for number, word in of_words.items():
        if word in vectors:
            found[number] = vectors.index(word)
        elif word.lower() in vectors:
            found[number] = vectors.index(word.lower())
            by_lowercase += 1
        else:
            without.append(number)

    dtype = np.promote_types(vectors.matrix.dtype, np.float32)
    taken = np.array(vectors.matrix[list(found.values())], dtype)
    check_finite(taken, taken, [words[number] for number in found])
    rows = torch.from_numpy(np.zeros((max(words, default=-1) + 1, vectors.dim), dtype))
    rows[list(found)] = torch.from_numpy(taken)
    _set(rows, without, missing, vectors, seed)
    if unknown_token in ids and unknown_token != padding:
        _set(rows, [ids[unknown_token]], unknown, vectors, seed + 1)
    share = None if texts is None else _share_of_text(tokenizer, ids, texts, found)
    report = TableReport(
        len(of_words),
        len(found),
        by_lowercase,
        tuple(words[one] for one in without),
        missing,
        share,
    )
    return rows, None if padding is None else ids[padding], report


def _set(rows: Tensor, ids: list[int], way: str, vectors: Vectors, seed: int) -> None:
    """Rows without a vector."""
    if way == "zeros" or not ids:
        return
    sample = np.array(vectors.matrix[:SAMPLE], np.float64)
    if not len(sample):
        raise ValueError("there are no vectors to take a mean of")
    check_finite(sample, sample, vectors.words)
    mean, deviation = sample.mean(axis=0), sample.std(axis=0)
    generator = np.random.default_rng(seed)
    for start in range(0, len(ids), BLOCK):
        some = ids[start : start + BLOCK]
        made = mean
        if way == "normal":
            made = mean + generator.standard_normal((len(some), vectors.dim)) * deviation
        rows[some] = torch.from_numpy(made).to(rows.dtype)


def _padding_token(tokenizer: Any) -> str | None:
    """The token that a tokenizer pads with: of transformers, or of tokenizers."""
    settings = getattr(tokenizer, "padding", None)
    token = settings.get("pad_token") if isinstance(settings, dict) else None
    token = token or getattr(tokenizer, "pad_token", None)
    return token if isinstance(token, str) else None


def _unknown_token(tokenizer: Any) -> str | None:
    """The token for unseen words: of transformers, of tokenizers' models, of Keras's Tokenizer and layers."""
    for holder, name in (
        (tokenizer, "unk_token"),
        (getattr(tokenizer, "model", None), "unk_token"),
        (tokenizer, "oov_token"),
        (getattr(tokenizer, "_lookup_layer", None), "oov_token"),
    ):
        token = getattr(holder, name, None)
        if token is not None:
            return str(token)
    return None


def _share_of_text(
    tokenizer: Any, ids: dict[str, int], texts: Iterable[str], found: dict[int, int]
) -> float:
    """The part of the words of some texts that have a vector."""
    if hasattr(tokenizer, "no_truncation") and (tokenizer.truncation or tokenizer.padding):
        # What it adds and cuts is no part of the text.
        tokenizer = deepcopy(tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(_encode(tokenizer, ids, text))
    total = sum(counts.values())
    return sum(counts[number] for number in found) / total if total else 0.0


def _encode(tokenizer: Any, ids: dict[str, int], text: str) -> list[int]:
    """The ids of a text; -1: an unseen word."""
    words = text.split()
    if hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "encode"):
        try:
            encoded = tokenizer.encode(text, add_special_tokens=False)
            return list(getattr(encoded, "ids", encoded))
        # tokenizers raises a bare one for a word that no token stands for.
        except Exception:
            splitter = getattr(tokenizer, "pre_tokenizer", None)
            if splitter is not None:
                words = [word for word, _ in splitter.pre_tokenize_str(text)]
    return [ids.get(word, ids.get(word.lower(), -1)) for word in words]


def rows_of(layer: Any, table: str | None) -> Tensor:
    """The rows of a layer, in its memory. Raises ValueError for codes of numbers."""
    rows = _rows_of(layer, table)
    if not rows.is_floating_point():
        raise ValueError(
            f"a table of {rows.dtype} holds codes and no vectors: its to_float() has those; fill a table before it is "
            "quantized"
        )
    return rows


def _rows_of(layer: Any, table: str | None) -> Tensor:
    if isinstance(layer, BatchedTables):
        if table is None:
            raise ValueError(
                f"name one of the layer's tables by table=: {', '.join(layer.layout.names)}"
            )
        return layer[table]
    if table is not None:
        raise ValueError(
            f"table= is for batched tables, and this is a layer of one: {type(layer).__name__}"
        )
    weight = getattr(layer, "weight", None)
    if isinstance(layer, torch.nn.Module) and isinstance(weight, Tensor):
        return weight
    value = getattr(getattr(layer, "_embeddings", None), "value", None)
    if isinstance(value, Tensor) and hasattr(layer, "input_dim"):
        return value
    raise TypeError(
        "expected an Embedding or EmbeddingBag, batched tables, or a layer of Keras on torch that is built (by its "
        f"build()), got {type(layer).__name__}"
    )


def padding_of(layer: Any, table: str | None) -> int | None:
    """The id of a layer's padding row."""
    if isinstance(layer, BatchedTables):
        assert table is not None
        number = layer.layout.padding_idx[layer.layout.names.index(table)]
        return number if number >= 0 else None
    return getattr(layer, "padding_idx", None)


def fill(layer: Any, rows: Tensor, table: str | None) -> None:
    """Write rows into the first ones of a layer. Raises ValueError where they do not fit."""
    own = rows_of(layer, table)
    if own.shape[0] < rows.shape[0] or own.shape[1:] != rows.shape[1:]:
        raise ValueError(f"rows {list(rows.shape)} do not fit into a table {list(own.shape)}")
    if own.is_meta:
        raise ValueError("a layer on the meta device has no memory yet: give it some by to_empty")
    if not own.is_leaf and own._base is None:
        raise ValueError("the layer makes its weight of other parameters (a parametrization)")
    with torch.no_grad():
        rows = rows.to(own.device, own.dtype)
        infinite = ~rows.isfinite().all(dim=1)
        if infinite.any():
            raise ValueError(
                f"row {int(infinite.int().argmax())} has a number that is not finite in {own.dtype}"
            )
        own[: len(rows)] = rows
