"""Words and their vectors: to look up, to compare, to put into a table, and to save."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from ..nn import Embedding
from ..text import words_by_id
from .reading import check_finite
from .saving import save
from .table_rows import TableReport, fill, padding_of, rows_for, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DTYPES = ("float16", "float32", "float64")
# Rows whose similarities are taken at once.
BLOCK = 2**16


def checked_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Raises ValueError for one that vectors cannot have."""
    try:
        kind = np.dtype(dtype)
    # A dtype of torch, or no name.
    except TypeError:
        kind = np.dtype(object)
    if kind.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return kind


class Vectors:
    """Words, each with a vector.

    Args:
        words: all different; or a dict of words to their rows.
        matrix: `[words, dim]`, of NumPy or torch, of floats; its memory is shared where that can be.

    Raises ValueError for a matrix of another shape or dtype, and for a word that comes twice; TypeError for what is no
    matrix, and for words that are no strings or in no order, as in a set.

    Attributes:
        words: a list.
        matrix: a NumPy array; memory-mapped if it was loaded so, and then not to be written to.
        dim: numbers a vector.

    Example::

        vectors = gpu_embed.vectors.load("glove.6B.100d.txt")
        vectors["king"]  # [100]
        vectors.nearest("king", k=3)  # [("prince", 0.77), ...]
        table, report = vectors.embedding(tokenizer, padding="[PAD]")
    """

    def __init__(
        self, words: Sequence[str] | dict[str, int], matrix: NDArray[Any] | Tensor
    ) -> None:
        if isinstance(words, str) or not hasattr(words, "__getitem__"):
            raise TypeError(
                f"Vectors: expected a list of words in the order of their rows, got {type(words).__name__}"
            )
        if not isinstance(matrix, np.ndarray | Tensor):
            raise TypeError(
                f"Vectors: expected a matrix of NumPy or torch, got {type(matrix).__name__}"
            )
        kind = str(matrix.dtype)[6:] if isinstance(matrix, Tensor) else matrix.dtype.name
        # NumPy has no bfloat16.
        is_known = kind in DTYPES or (isinstance(matrix, Tensor) and kind == "bfloat16")
        if matrix.ndim != 2 or len(matrix) != len(words) or not is_known:
            raise ValueError(
                f"Vectors: expected a matrix [{len(words)}, dim] of {', '.join(DTYPES)} for {len(words)} words, got "
                f"{list(matrix.shape)} of {matrix.dtype}"
            )
        if isinstance(matrix, Tensor):
            matrix = matrix.detach().cpu()
            matrix = (matrix.float() if kind == "bfloat16" else matrix).numpy()
        others = {*map(type, words)} - {str}
        for other in others:
            if not issubclass(other, str):
                raise TypeError(f"Vectors: expected words that are strings, got {other.__name__}")
        if others:
            # Of NumPy, say: in a pickle they would name it.
            words = (
                {str(word): place for word, place in words.items()}
                if isinstance(words, dict)
                else [str(word) for word in words]
            )
        if isinstance(words, dict):
            words = _by_row(dict(words))
        if not matrix.dtype.isnative:
            matrix = matrix.astype(matrix.dtype.newbyteorder("="))
        self.words, self.matrix = list(words), matrix
        if isinstance(words, dict):
            self._places = words
        elif len(self._places) < len(self.words):
            twice = next(
                word for place, word in enumerate(self.words) if self._places[word] != place
            )
            raise ValueError(f"Vectors: the word {twice!r} comes twice")

    @property
    def dim(self) -> int:
        return int(self.matrix.shape[1])

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __getitem__(self, word: str) -> NDArray[Any]:
        """The vector of a word [dim]. Raises KeyError."""
        vector: NDArray[Any] = self.matrix[self.index(word)]
        return vector

    def __repr__(self) -> str:
        return f"Vectors({len(self):,} words, {self.dim} numbers each, {self.matrix.dtype})"

    def index(self, word: str) -> int:
        """The row of a word. Raises KeyError."""
        try:
            return self._places[word]
        except KeyError:
            raise KeyError(f"no vector of the word {word!r}") from None

    def converted(self, dtype: DTypeLike | None) -> Vectors:
        """The same vectors in another dtype, which are a copy; None: in their own.

        Raises ValueError for another dtype than float16, float32 and float64; and, with the word, where a number is not
        finite in it.
        """
        kind = self.matrix.dtype if dtype is None else checked_dtype(dtype)
        if self.matrix.dtype == kind:
            return self
        with np.errstate(over="ignore"):
            matrix = self.matrix.astype(kind)
        check_finite(matrix, self.matrix, self.words)
        return Vectors(self.words, matrix)

    def nearest(
        self, word: str | NDArray[Any] | Tensor, k: int = 10, without: Iterable[str] = ()
    ) -> list[tuple[str, float]]:
        """The k words of the greatest cosine to a word, which is not among them, or to a vector [dim].

        Raises KeyError for a word without a vector, and ValueError for numbers that are not finite, or k < 0.
        Rows may have numbers of any size.
        """
        if isinstance(without, str):
            raise TypeError(
                "nearest: without= takes several words, got one string; put it in a list"
            )
        without = {*without, *((word,) if isinstance(word, str) else ())}
        if k < 0:
            raise ValueError(f"nearest: k must not be negative, got {k}")
        vector = self[word] if isinstance(word, str) else word
        vector = vector.detach() if isinstance(vector, Tensor) else np.array(vector)
        target = torch.as_tensor(vector, dtype=torch.float64, device="cpu")
        if target.shape != (self.dim,) or not target.isfinite().all():
            raise ValueError(
                f"nearest: expected a vector [{self.dim}] of finite numbers, got {list(target.shape)}"
            )
        unit = torch.from_numpy(_unit(target.numpy())).float()
        peaks, lengths = self._peaks_and_lengths
        cosines = torch.cat(
            [self._block(at, peaks) @ unit for at in range(0, len(self) or 1, BLOCK)]
        )
        cosines /= lengths
        best = cosines.topk(min(k + len(without), len(self)))
        found = [
            (self.words[place], value)
            for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return [pair for pair in found if pair[0] not in without][:k]

    def analogy(self, a: str, b: str, c: str, k: int = 10) -> list[tuple[str, float]]:
        """What is to c as b is to a: `analogy("man", "king", "woman")`; the k nearest to b - a + c, of unit vectors."""
        of_a, of_b, of_c = (_unit(np.asarray(self[word], np.float64)) for word in (a, b, c))
        return self.nearest(of_b - of_a + of_c, k, without=(a, b, c))

    def plot(self, words: Sequence[str], **options: Any) -> Figure:
        """A picture of some words' vectors; options as for `gpu_embed.plot.table`."""
        from .. import plot

        rows = torch.from_numpy(np.array(self.matrix[[self.index(word) for word in words]]))
        return plot.table(rows, labels=list(words), **options)

    def embedding(
        self,
        tokenizer: Any,
        *,
        padding: str | None = None,
        unknown: str = "mean",
        missing: str = "normal",
        texts: Iterable[str] | None = None,
        seed: int = 0,
        freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> tuple[Embedding, TableReport]:
        """A table with a row for each id of a tokenizer, and what was found.

        Args:
            tokenizer: of `tokenizers` or transformers; Keras's Tokenizer, StringLookup or TextVectorization; words to
                ids; or a list of words. A word is looked up as it is, and then in lower case.
            padding: the word whose row is zeros, and stays so. None: the token that the tokenizer pads with, if any.
            unknown: the row of the tokenizer's token for unseen words: "mean" of the vectors, "zeros", or "normal".
            missing: the rows of words that have no vector, likewise; "normal": drawn from the normal distribution that
                has the mean and the deviation of each column of the first 100,000 vectors.
            texts: for the report, in what part of a text's words there are vectors.
            seed: of what is drawn.
            freeze: whether the table is not trained.
            device, dtype: of the table; fp32 by itself.
            options: others of `gpu_embed.Embedding`, such as sparse=True.

        Raises:
            ValueError: two words have one id, `padding` is no word of the tokenizer, or an option is another word.
            TypeError: no such tokenizer.
        """
        if "padding_idx" in options:
            raise TypeError(
                "embedding: name the word of the padding row, padding=, for padding_idx="
            )
        rows, padding_idx, report = rows_for(
            self, tokenizer, padding, unknown, missing, texts, seed
        )
        table = Embedding(len(rows), self.dim, padding_idx, device=device, dtype=dtype, **options)
        fill(table, rows, None)
        table.weight.requires_grad_(not freeze)
        return table, report

    def fill(
        self,
        layer: Any,
        tokenizer: Any,
        *,
        table: str | None = None,
        padding: str | None = None,
        unknown: str = "mean",
        missing: str = "normal",
        texts: Iterable[str] | None = None,
        seed: int = 0,
    ) -> TableReport:
        """Write the rows that `embedding` would make into a layer; rows behind the tokenizer's ids stay as they are.

        Args:
            layer: torch's or our `Embedding` or `EmbeddingBag`, batched tables, or a Keras `Embedding` that is built.
            table: of batched tables, which.
            padding: None: the word of the layer's own padding row, if it has one.

        Raises ValueError where the layer has too few rows, another number of columns or another padding row, or is
        quantized; otherwise as `embedding`.
        """
        rows_of(layer, table)
        own_padding = padding_of(layer, table)
        if padding is None and own_padding is not None:
            padding = words_by_id(tokenizer).get(own_padding)
        rows, padding_idx, report = rows_for(
            self, tokenizer, padding, unknown, missing, texts, seed
        )
        if None not in (own_padding, padding_idx) and padding_idx != own_padding:
            raise ValueError(
                f"the layer's padding row is {own_padding}, and {padding!r} has the id {padding_idx}"
            )
        fill(layer, rows, table)
        return report

    @classmethod
    def from_module(cls, layer: Any, tokenizer: Any, *, table: str | None = None) -> Vectors:
        """The rows of a layer, as `fill` takes them, by the tokenizer's words.

        Ids without a word, or of the empty one, are left out.

        Raises ValueError where two words have one id, or the layer has no row for one.
        """
        words = words_by_id(tokenizer)
        rows = rows_of(layer, table)
        if words and max(words) >= len(rows):
            raise ValueError(
                f"Vectors.from_module: the word {words[max(words)]!r} has the id {max(words)}, and the table "
                f"{len(rows)} rows"
            )
        ids = sorted(number for number, word in words.items() if word)
        return cls([words[number] for number in ids], rows.detach()[ids])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that others read too; the name's end says which.

        ".txt", ".vec": word2vec's text, in as many digits as read back to the same numbers; ".bin": word2vec's binary
        file, in fp32; ".kv": gensim's. A file that is there is replaced when the new one is whole.

        Raises:
            ValueError: another name; a number that is not finite; a word that is no text; or, but for ".kv", vectors
                without numbers, and a word that is empty or holds a space, a line's end or a NUL; for ".bin", one of
                4,096 bytes or more.
            OSError: what the system says, such as FileNotFoundError where the folder is not there.
        """
        save(self, os.fspath(path))

    @cached_property
    def _places(self) -> dict[str, int]:
        return dict(zip(self.words, range(len(self.words)), strict=True))

    def _block(self, start: int, peaks: NDArray[Any]) -> Tensor:
        """Some rows over the size of their largest number, so that no product overflows or is lost."""
        here = slice(start, start + BLOCK)
        dtype = np.promote_types(self.matrix.dtype, np.float32)
        rows = np.divide(np.asarray(self.matrix)[here], peaks[here, None], dtype=dtype)
        return torch.from_numpy(rows).float()

    @cached_property
    def _peaks_and_lengths(self) -> tuple[NDArray[Any], Tensor]:
        """Of each row the size of its largest number, and the length of what `_block` makes of it; of zeros 1."""
        peaks = np.ones(len(self), np.promote_types(self.matrix.dtype, np.float32))
        lengths = torch.from_numpy(np.ones(len(self), np.float32))
        for start in range(0, len(self), BLOCK):
            here = slice(start, start + BLOCK)
            rows = self.matrix[here]
            check_finite(rows, rows, self.words[here])
            sizes = np.abs(rows).max(axis=1, initial=0)
            peaks[here] = np.where(sizes > 0, sizes, 1)
            norms = torch.linalg.vector_norm(self._block(start, peaks), dim=1)
            lengths[here] = torch.where(norms > 0, norms, 1)
        return peaks, lengths


def _unit(vector: NDArray[Any]) -> NDArray[Any]:
    """A vector of fp64 at length 1; of zeros none."""
    vector = vector / (np.abs(vector).max(initial=0) or 1)
    unit: NDArray[Any] = vector / (np.linalg.norm(vector) or 1)
    return unit


def _by_row(places: dict[str, int]) -> dict[str, int]:
    """The words in the order of their rows. Raises ValueError where these are not 0, 1, ..."""
    rows = np.fromiter(places.values(), np.int64, len(places))
    if np.array_equal(rows, np.arange(len(rows))):
        return places
    if not np.array_equal(np.sort(rows), np.arange(len(rows))):
        raise ValueError("Vectors: the words' rows must be 0, 1, ..., each once")
    return dict(sorted(places.items(), key=itemgetter(1)))
