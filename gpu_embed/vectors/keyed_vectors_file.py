"""gensim's `.kv`, a pickle."""

import pickle
import re
import warnings
from typing import Any

from .reading import Settings
from .vectors import Vectors

# A pickle can run what it names, and these only make arrays and objects.
NAMES = re.compile(
    r"gensim\.models\.(keyedvectors|fasttext)\.\w*(KeyedVectors|Vocab)"
    r"|numpy(\._?core)?(\.multiarray|\.numeric)?\.(_reconstruct|scalar|_frombuffer|ndarray|dtype)|numpy\.dtypes\.\w+"
    r"|(builtins|__builtin__)\.(object|list|dict|set|frozenset|tuple|int|str|bytes)"
    r"|collections\.(OrderedDict|defaultdict)|copy_?reg\._reconstructor|_codecs\.encode"
)


def read_keyed_vectors(path: str, settings: Settings) -> Vectors:
    """The words and vectors of a `KeyedVectors`, memory-mapped where they are a file of their own.

    Raises ValueError for another pickle. What names more than arrays and gensim's vectors is refused unrun.
    """
    from gensim.models import KeyedVectors

    with open(path, "rb") as file:
        try:
            found = _Checked(file, encoding="latin1").load()
        # A pickle that was cut ends anywhere.
        except Exception as error:
            raise ValueError(f"not a KeyedVectors of gensim: {error}") from error
    if not isinstance(found, KeyedVectors):
        raise ValueError(
            f"not a KeyedVectors of gensim, but a {type(found).__name__}: of a model, save its .wv"
        )
    # What `KeyedVectors.load` does with what it has unpickled, unchecked.
    for attribute in ("__recursive_saveloads", "__scipys"):
        if vars(found).get(attribute):
            raise ValueError("not a KeyedVectors of gensim: it names pickles beside it")
    compress, subname = KeyedVectors._adapt_by_suffix(path)
    try:
        # An array that is packed cannot be mapped.
        found._load_specials(path, None if compress else "r", compress, subname)
        return _words_and_rows(found, settings.limit).converted(settings.dtype)
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"not a KeyedVectors of gensim as it was saved: {error}") from error


def _words_and_rows(found: Any, limit: int | None) -> Vectors:
    words, matrix = found.key_to_index, found.vectors
    # Doc2Vec numbers texts that have no names.
    if len(words) == 0:
        words = found.index_to_key
    others = set(map(type, words)) - {str, type(None)}
    if others:
        raise ValueError(
            f"its keys are no words, but of the type {others.pop().__name__}, as Doc2Vec's of texts without names"
        )
    if limit is not None or len(words) < len(matrix) or None in words:
        words, matrix = found.index_to_key[:limit], matrix[:limit]
    if None in words:
        # Of a word that came twice, gensim leaves a row of zeros with the key None.
        kept = [number for number, word in enumerate(words) if word is not None]
        warnings.warn(
            f"{len(words) - len(kept):,} rows without a word are left out: gensim leaves them of words that came twice",
            stacklevel=4,
        )
        words, matrix = [words[number] for number in kept], matrix[kept]
    return Vectors(words, matrix)


class _Checked(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not NAMES.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(
                f"it names {module}.{name}; of a model of gensim, save its .wv"
            )
        return super().find_class(module, name)
