"""fastText's `.bin`: a model, whose words' vectors are means of the rows that it stores."""

import mmap
import struct

import numpy as np

from .reading import GrowingVectors, Settings

MAGIC = (793_712_314).to_bytes(4, "little")
CLASSIFIER = 3
# Where the settings stand, behind the magic number and the version; the counts; and the first word.
SETTINGS_AT, COUNTS_AT, WORDS_AT = 8, 64, 92
SETTINGS, COUNTS, SHAPE = struct.Struct("<12id"), struct.Struct("<3i2q"), struct.Struct("<?2q")
# The end of a sentence has no n-grams.
END_OF_SENTENCE = b"</s>"
# Words whose vectors are made at once.
BLOCK = 2**12


def read_fasttext(path: str, settings: Settings) -> GrowingVectors:
    """The words' vectors, each the mean of the word's own row and those of its n-grams.

    Raises ValueError for a classifier, for a quantized model, and for a file that was cut.
    """
    from gensim.models.fasttext import ft_ngram_hashes

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            *_, model, buckets, shortest, longest, _, _ = SETTINGS.unpack_from(data, SETTINGS_AT)
            if model == CLASSIFIER:
                raise ValueError(
                    "a model of fastText that classifies texts has no vectors of words alone"
                )
            _, count, labels, _, pruned = COUNTS.unpack_from(data, COUNTS_AT)
            if labels or pruned >= 0:
                raise ValueError(
                    "a model of fastText with labels or fewer n-grams is not read here"
                )
            words: list[bytes] = []
            at = WORDS_AT
            for _ in range(count):
                end = data.find(b"\0", at)
                if end < 0:
                    raise ValueError(f"it ends in word {len(words)} of {count}, from 0")
                words.append(data[at:end])
                # Behind it are a NUL, how often it was seen, in 8 bytes, and in one what it is.
                at = end + 1 + 8 + 1
            is_quantized, height, dim = SHAPE.unpack_from(data, at)
            if is_quantized:
                raise ValueError(
                    "a quantized model of fastText is not read here: take the one it was made of"
                )
            # A model without n-grams may say any number of either.
            buckets = buckets if longest > 0 else 0
            if not 0 <= count <= count + buckets <= height or dim < 1 or shortest < 0:
                raise ValueError(
                    f"it has {height} rows of {dim} numbers for {count} words and {buckets} n-grams"
                )
            stored = np.memmap(path, "<f4", "r", at + SHAPE.size, (height, dim))
        except (struct.error, ValueError, OverflowError) as error:
            raise ValueError(
                f"a model of fastText, which was cut or is of another kind: {error}"
            ) from error

    found = GrowingVectors(dim, settings, count)
    for start in range(0, count, BLOCK):
        some = words[start : start + BLOCK][: found.room]
        rows = np.array(stored[start : start + len(some)])
        for row, word in zip(rows, some, strict=True):
            if buckets and word != END_OF_SENTENCE:
                try:
                    hashes = ft_ngram_hashes(word.decode(), shortest, longest, buckets)
                except UnicodeDecodeError:
                    hashes = _hashes(word, shortest, longest, buckets)
                row += stored[[count + one for one in hashes]].sum(axis=0)
                row /= 1 + len(hashes)
        found.add(some, rows)
        if found.room == 0:
            break
    return found


def _hashes(word: bytes, shortest: int, longest: int, buckets: int) -> list[int]:
    """The same of a word that is not UTF-8: fastText takes bytes, and what goes on in UTF-8 begins no character."""
    whole = b"<%b>" % word
    starts = [place for place, byte in enumerate(whole) if byte & 0xC0 != 0x80]
    hashes = []
    for first, start in enumerate(starts):
        for size in range(max(shortest, 1), longest + 1):
            ends = [*starts[first + 1 :], len(whole)]
            if size > len(ends):
                break
            end = ends[size - 1]
            if size == 1 and (start == 0 or end == len(whole)):
                continue
            hashed = 2166136261
            for byte in whole[start:end]:
                # Of signed bytes, as in C.
                hashed = ((hashed ^ (byte | 0xFFFFFF00 if byte > 127 else byte)) * 16777619) % 2**32
            hashes.append(hashed % buckets)
    return hashes
