"""Words and vectors as a reader finds them, with the checks that all formats share."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# How many words an error or a warning names.
NAMED = 5


class Settings(NamedTuple):
    """What a reader is asked for.

    Attributes:
        limit: how many words are read at most; None: all.
        dtype: of the matrix; None: the file's own, and fp32 for text.
        encoding, errors: of the words' bytes, as for `bytes.decode`.
    """

    limit: int | None
    dtype: np.dtype[Any] | None
    encoding: str
    errors: str

    def decode(self, words: list[bytes]) -> list[str]:
        """Raises ValueError, with the word, for one that is not in the encoding."""
        try:
            return [word.decode(self.encoding, self.errors) for word in words]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the word {error.object!r} is not in {self.encoding}: give the file's encoding, such as "
                "encoding='cp1252', or errors='replace' where words were cut inside of a character"
            ) from None


class GrowingVectors:
    """The words and rows that were read so far; of a word that comes twice the first row is kept.

    Args:
        dim: numbers a word.
        expected: about how many words there are, for which room is made at once.

    Attributes:
        dtype: of the matrix.
        read: how many words were read, with those that came twice.
        repeated: the words that came again.
    """

    def __init__(self, dim: int, settings: Settings, expected: int) -> None:
        self.dim, self.settings = dim, settings
        self.dtype = settings.dtype or np.dtype(np.float32)
        height = expected if settings.limit is None else min(expected, settings.limit)
        self.words: dict[str, int] = {}
        self.repeated: list[str] = []
        self.read = 0
        self._rows: NDArray = np.empty((height, dim), self.dtype)

    @property
    def room(self) -> int | None:
        """How many words may still be read; None: any number."""
        limit = self.settings.limit
        return None if limit is None else limit - self.read

    def add(self, words: list[bytes], rows: NDArray) -> None:
        """Take words and their rows [words, dim], up to the limit.

        Raises ValueError for a word that is not in the encoding, and for a number that is not finite in the dtype.
        """
        words, rows = words[: self.room], rows[: self.room]
        self.read += len(words)
        decoded = self.settings.decode(words)
        at = len(self.words)
        numbers = range(at, at + len(decoded))
        # All of them at once, as a rule.
        if len(set(decoded)) == len(decoded) and self.words.keys().isdisjoint(decoded):
            self.words.update(zip(decoded, numbers, strict=True))
        else:
            kept: list[int] = []
            for place, word in enumerate(decoded):
                if word in self.words:
                    self.repeated.append(word)
                else:
                    self.words[word] = at + len(kept)
                    kept.append(place)
            rows = rows[kept]
            decoded = [decoded[place] for place in kept]
        end = at + len(decoded)
        if end > len(self._rows):
            # The system gives memory where it is written: room that is not needed costs nothing.
            self._rows.resize((max(end, at * 5 // 4), self.dim), refcheck=False)
        with np.errstate(over="ignore"):
            self._rows[at:end] = rows
        check_finite(self._rows[at:end], rows, decoded)

    def finish(self) -> NDArray:
        """The matrix [words, dim]."""
        self._rows.resize((len(self.words), self.dim), refcheck=False)
        return self._rows


def check_finite(rows: NDArray, given: NDArray, words: Sequence[str]) -> None:
    """Raise ValueError for the first word whose row has a number that is not finite.

    Args:
        rows: [words, dim].
        given: what they were before they got their dtype, for the message.
    """
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        place = int(finite.argmin())
        value = given[place][~np.isfinite(rows[place])][0]
        raise ValueError(
            f"the vector of {words[place]!r} has the number {value}, which is not finite in {rows.dtype}"
        )


def warn_of_repeated(words: list[str]) -> None:
    """Warn whoever called `load` of words that came again, from a function that `load` calls."""
    named = ", ".join(map(repr, words[:NAMED])) + (", ..." if len(words) > NAMED else "")
    warnings.warn(
        f"{len(words):,} words came twice, and the first vector of each is kept: {named}",
        stacklevel=4,
    )
