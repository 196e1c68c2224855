"""Ids to look up, drawn from a seed: the same seed, the same ids, on every machine.

The row number is the rank: row 0 is the most frequent, as in vocabularies sorted by frequency.
"""

from __future__ import annotations

import collections
import importlib.util
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

FILE_SUFFIXES = (".npy", ".txt", ".pt")
# What reading a file that is none raises.
BROKEN = (OSError, ValueError, TypeError, EOFError, RuntimeError, UnpicklingError, BadZipFile)


class IdsError(ValueError):
    """A distribution that does not exist or does not fit, said in one sentence."""


def draw(
    distribution: str,
    num_ids: int,
    num_embeddings: int,
    seed: int = 0,
    padding: float = 0.0,
    padding_idx: int | None = None,
) -> Tensor:
    """Ids below `num_embeddings`, int64 [num_ids], on the CPU.

    Args:
        distribution: "uniform", "zipf:ALPHA", "equal", "sorted", "text", "hot:FRACTION", "spread:ROWS",
            "wordfreq", "wordsegment", or a file of ids.
        padding: the share of the ids that is overwritten by `padding_idx`, at random places.

    Raises IdsError if the distribution is unknown, or its ids do not fit the table.
    """
    kind, argument = parse(distribution)
    if num_embeddings < 1:
        raise IdsError("ids cannot be drawn for a table without rows")
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = kind(generator, argument, num_ids, num_embeddings)
    if padding and padding_idx is not None:
        ids[_some(generator, num_ids, padding)] = padding_idx
    return ids


def parse(distribution: str) -> tuple[Draw, str]:
    """The generator of that name, and its argument. Raises IdsError if there is none, or it cannot run."""
    if distribution.endswith(FILE_SUFFIXES):
        if not Path(distribution).is_file():
            raise IdsError(f"there is no file {distribution}")
        return _from_file, distribution
    name, _, argument = distribution.partition(":")
    if name not in KINDS:
        names = ", ".join(
            f"{name}:{ARGUMENTS[name]}" if name in ARGUMENTS else name for name in KINDS
        )
        files = ", ".join(FILE_SUFFIXES)
        raise IdsError(
            f"unknown distribution {distribution!r}: choose one of {names}, or a file ({files})"
        )
    if name in LIMITS:
        _number(name, argument)
    elif argument:
        raise IdsError(f"the distribution {name!r} takes no argument, got {argument!r}")
    if name in WORD_LISTS and importlib.util.find_spec(name) is None:
        raise IdsError(f"the distribution {name!r} needs the package {name}: pip install {name}")
    return KINDS[name], argument


def length_of_file(distribution: str) -> int | None:
    """How many ids a file holds; None where the distribution is no file."""
    return len(_read(distribution)) if parse(distribution)[0] is _from_file else None


Draw = Callable[[torch.Generator, str, int, int], Tensor]


def _uniform(generator: torch.Generator, _: str, num_ids: int, num_embeddings: int) -> Tensor:
    return torch.randint(num_embeddings, (num_ids,), generator=generator, device="cpu")


def _zipf(generator: torch.Generator, argument: str, num_ids: int, num_embeddings: int) -> Tensor:
    """Row k with the probability that x**-alpha has between k + 1 and k + 2, over the whole table.

    The integral can be inverted, so the cost does not grow with the table.
    """
    power = 1 - _number("zipf", argument)
    share = torch.rand(num_ids, generator=generator, dtype=torch.float64, device="cpu")
    end = float(num_embeddings + 1)
    x = (1 + share * (end**power - 1)) ** (1 / power) if power else end**share
    return x.to(torch.int64).sub_(1).clamp_(0, num_embeddings - 1)


def _hot(generator: torch.Generator, argument: str, num_ids: int, num_embeddings: int) -> Tensor:
    """A share of the ids on row 0, at random places; the others anywhere."""
    ids = _uniform(generator, "", num_ids, num_embeddings)
    ids[_some(generator, num_ids, _number("hot", argument))] = 0
    return ids


def _some(generator: torch.Generator, num_ids: int, share: float) -> Tensor:
    """Random places, as many as the share of the ids."""
    return torch.randperm(num_ids, generator=generator, device="cpu")[: round(share * num_ids)]


def _spread(generator: torch.Generator, argument: str, num_ids: int, num_embeddings: int) -> Tensor:
    """As many rows, evenly spaced over the table: what a call touches does not grow with the table."""
    rows = round(_number("spread", argument))
    return _uniform(generator, "", num_ids, rows) * num_embeddings // rows


def _text(generator: torch.Generator, _: str, num_ids: int, num_embeddings: int) -> Tensor:
    """Python's documentation in reading order; words too rare for the table share its last row."""
    return _excerpt(_text_ranks(), generator, num_ids).clamp_(max=num_embeddings - 1)


def _from_file(generator: torch.Generator, path: str, num_ids: int, num_embeddings: int) -> Tensor:
    ids = _read(path)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_embeddings:
        raise IdsError(
            f"{path}: the ids go from {low} to {high}, the table has {num_embeddings} rows"
        )
    return _excerpt(ids, generator, num_ids)


def _word_list(name: str) -> Draw:
    def draw_words(generator: torch.Generator, _: str, num_ids: int, num_embeddings: int) -> Tensor:
        total = _frequencies(name)[:num_embeddings].cumsum(0)
        share = torch.rand(num_ids, generator=generator, dtype=torch.float64, device="cpu")
        share *= total[-1]
        return torch.searchsorted(total, share, right=True).clamp_(max=len(total) - 1)

    return draw_words


def _wordfreq() -> Iterable[float]:
    values: Iterable[float] = importlib.import_module("wordfreq").get_frequency_dict("en").values()
    return values


def _wordsegment() -> Iterable[float]:
    wordsegment = importlib.import_module("wordsegment")
    wordsegment.load()
    values: Iterable[float] = wordsegment.UNIGRAMS.values()
    return values


# The packages of English word frequencies, and how to get the frequencies out of them.
WORD_LISTS = {"wordfreq": _wordfreq, "wordsegment": _wordsegment}
KINDS: dict[str, Draw] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "equal": lambda generator, _, num, rows: _uniform(generator, "", 1, rows).expand(num).clone(),
    "sorted": lambda generator, _, num, rows: _uniform(generator, "", num, rows).sort().values,
    "hot": _hot,
    "spread": _spread,
    "text": _text,
    **{name: _word_list(name) for name in WORD_LISTS},
}
ARGUMENTS = {"zipf": "ALPHA", "hot": "FRACTION", "spread": "ROWS"}
LIMITS = {"zipf": (0.0, 10.0), "hot": (0.0, 1.0), "spread": (1.0, 1e9)}


def _number(name: str, text: str) -> float:
    low, high = LIMITS[name]
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise IdsError(f"{name}:{text}: {name} needs a number from {low:g} to {high:g}")
    return value


def _excerpt(ids: Tensor, generator: torch.Generator, num_ids: int) -> Tensor:
    """num_ids in their order from a random place on, from the start again after the end."""
    start = torch.randint(len(ids), (1,), generator=generator, device="cpu")
    return ids[(torch.arange(num_ids, device="cpu") + start) % len(ids)]


@cache
def _text_ranks() -> Tensor:
    """Each word and mark of the text as its rank by frequency."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise IdsError(
            "the distribution 'text' needs pydoc_data, which this Python lacks: install the full "
            "standard library"
        ) from None
    text = "\n".join(topics[name] for name in sorted(topics)).lower()
    # Underlines of headings and frames of tables are no sentence.
    tokens = re.findall(r"\w+|[^\w\s]", re.sub(r"([-=*~+^])\1{2,}", " ", text))
    ranked = collections.Counter(tokens).most_common()
    ranks = {token: rank for rank, (token, _) in enumerate(ranked)}
    return torch.tensor([ranks[token] for token in tokens], device="cpu")


@cache
def _frequencies(name: str) -> Tensor:
    values = torch.tensor(list(WORD_LISTS[name]()), dtype=torch.float64, device="cpu")
    return values.sort(descending=True).values


@cache
def _read(path: str) -> Tensor:
    """The ids of a file, int64 [N]."""
    try:
        if path.endswith(".npy"):
            ids = torch.from_numpy(np.load(path))
        elif path.endswith(".txt"):
            ids = torch.tensor([int(word) for word in Path(path).read_text().split()], device="cpu")
        else:
            ids = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN as error:
        # What NumPy and torch say of a broken file is about pickles and how to trust them.
        reason = str(error).splitlines()[0] if path.endswith(".txt") else "the file is damaged"
        raise IdsError(f"{path}: cannot be read as ids ({reason})") from None
    if not isinstance(ids, Tensor) or ids.numel() == 0:
        raise IdsError(f"{path}: expected one tensor with at least one id")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise IdsError(f"{path}: ids are integers, these are {ids.dtype}")
    return ids.reshape(-1).to(torch.int64)
