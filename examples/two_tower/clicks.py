"""Who chose what: MovieLens-100k, or a log of clicks that is made up."""

import csv
import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_embed.demo.running import CannotRunError

HISTORY = 20  # items before the one to guess, the latest first
NOTHING = 0  # the id where there is no item, or no trait; bags leave it out
# The files of a folder, and the columns of each that are read.
COLUMNS = {
    "inter": ("user_id", "item_id", "timestamp"),
    "user": ("user_id", "age", "gender", "occupation"),
    "item": ("item_id", "release_year", "class"),
}


@dataclass(frozen=True)
class Clicks:
    """Who chose what, and what is known of both. Ids begin at 1.

    Each user's last click is in `test`, the one before it in `valid`, and those before in `train`.
    """

    name: str
    train: Tensor  # [clicks, 2 + HISTORY]: user, item, and the user's items before it
    valid: Tensor
    test: Tensor
    counts: Tensor  # [items + 1]: how often each item is chosen in train
    user_traits: Tensor  # [users + 1, traits of a user], NOTHING where there are fewer
    item_traits: Tensor  # [items + 1, traits of an item]

    def seen(self, before: tuple[Tensor, ...]) -> Tensor:
        """What need not be recommended, as it was clicked `before`: [users + 1, items + 1]."""
        seen = torch.zeros(len(self.user_traits), len(self.counts), dtype=torch.bool, device="cpu")
        for examples in before:
            seen[examples[:, 0], examples[:, 1]] = True
        seen[:, NOTHING] = True
        return seen

    def fingerprint(self) -> str:
        """Another one for other data."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.train, self.valid, self.test, self.user_traits, self.item_traits):
            digest.update(str(tuple(part.shape)).encode() + part.numpy().tobytes())
        return f"{self.name} ({digest.hexdigest()})"


def split(name: str, events: Tensor, user_traits: Tensor, item_traits: Tensor) -> Clicks:
    """Give each event (user, item), sorted by user and time, its history; put the users' last two apart."""
    users, items = events.t().contiguous()
    places = torch.arange(len(users), device="cpu")
    before = places[:, None] - torch.arange(1, HISTORY + 1, device="cpu")
    is_own = before >= torch.searchsorted(users, users)[:, None]  # [events, HISTORY]
    history = torch.where(is_own, items[before.clamp(min=0)], NOTHING)
    examples = torch.cat((events, history), 1)
    is_last = F.pad(users[1:] != users[:-1], (0, 1), value=True)
    # The one before a last one, unless it is another user's.
    is_second = F.pad(is_last[1:], (0, 1)) & ~is_last
    train = examples[~is_last & ~is_second]
    counts = torch.bincount(train[:, 1], minlength=len(item_traits))
    valid, test = examples[is_second], examples[is_last]
    return Clicks(name, train, valid, test, counts, user_traits, item_traits)


def rows(folder: Path, kind: str) -> Iterator[tuple[str, list[str]]]:
    """The lines of one of RecBole's files: where each stands, and what its COLUMNS hold."""
    file = folder / f"ml-100k.{kind}"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "this is no UTF-8"
        raise CannotRunError(
            f"--data {folder}: cannot read {file.name} ({reason}); expected are ml-100k.inter, .item and .user, as "
            "RecBole has them: separated by tabs, the columns named in the first line"
        ) from None
    lines = csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    names = [name.partition(":")[0] for name in next(lines, [])]
    for name in COLUMNS[kind]:
        if name not in names:
            raise CannotRunError(f"--data {folder}: the first line of {file.name} names no {name}")
    wanted = [names.index(name) for name in COLUMNS[kind]]
    for number, line in enumerate(lines, start=2):
        where = f"--data {folder}: {file.name}, line {number}"
        if len(line) != len(names):
            raise CannotRunError(f"{where}: {len(line)} columns, expected {len(names)}")
        yield where, [line[column] for column in wanted]


def number(where: str, column: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise CannotRunError(f"{where}: {column} is {text!r}, expected a number") from None


def movielens(folder: Path) -> Clicks:
    """MovieLens-100k in RecBole's files. That a user rated a film is all that counts."""
    users = {
        user: [gender, f"{int(number(where, 'age', age)) // 10}0s", occupation]
        for where, (user, age, gender, occupation) in rows(folder, "user")
    }
    items = {item: [year, *kinds.split()] for _, (item, year, kinds) in rows(folder, "item")}
    number_of = [{key: n for n, key in enumerate(keys, start=1)} for keys in (users, items)]
    ratings = []
    for where, (*pair, time) in rows(folder, "inter"):
        for kind, key, known in zip(("user", "item"), pair, number_of, strict=True):
            if key not in known:
                raise CannotRunError(f"{where}: {kind} {key!r} is not in ml-100k.{kind}")
        user, item = (known[key] for known, key in zip(number_of, pair, strict=True))
        ratings.append((user, number(where, "timestamp", time), item))
    # Those of one second stay as they come.
    ratings.sort(key=lambda rating: rating[:2])
    events = torch.tensor([(user, item) for user, _, item in ratings], device="cpu")
    clicks = split("MovieLens-100k", events, numbered(users), numbered(items)) if ratings else None
    if clicks is None or not len(clicks.train):
        raise CannotRunError(
            f"--data {folder}: no user in ml-100k.inter has three items, so there is nothing to learn from"
        )
    return clicks


def numbered(words: dict[str, list[str]]) -> Tensor:
    """The words of each key as numbers from 1 on: [keys + 1, most words of a key]."""
    numbers: dict[str, int] = {}
    width = max(map(len, words.values()), default=0)
    table = torch.full((len(words) + 1, width), NOTHING, device="cpu")
    for key, row in enumerate(words.values(), start=1):
        table[key, : len(row)] = torch.tensor(
            [numbers.setdefault(word, len(numbers) + 1) for word in row], device="cpu"
        )
    return table


def synthetic(num_users: int, num_items: int, clicks: int, seed: int) -> Clicks:
    """Clicks by Zipf's law on items of ten kinds; a user has two favourite kinds, and tells one."""
    generator = torch.Generator("cpu").manual_seed(seed)
    kinds = torch.randint(10, (num_users + 1, 2), generator=generator, device="cpu")
    users = torch.arange(1, num_users + 1, device="cpu").repeat_interleave(clicks)
    which = (torch.rand(len(users), generator=generator, device="cpu") < 0.3).long()
    # The item's rank within its kind: how often one is drawn falls with 1 / rank.
    height = torch.rand(len(users), generator=generator, device="cpu").double()
    rank = (num_items / 10 + 1) ** height
    items = 1 + (rank.long() - 1) * 10 + kinds[users, which]
    # Nobody chooses an item twice; a dict keeps the order.
    events = torch.tensor(
        list(dict.fromkeys(zip(users.tolist(), items.tolist(), strict=True))), device="cpu"
    )
    item_kinds = 1 + (torch.arange(num_items + 1, device="cpu")[:, None] - 1) % 10
    return split("a synthetic click log", events, 1 + kinds[:, :1], item_kinds)


def read_clicks(data: str | None, quick: bool, seed: int) -> Clicks:
    """Of the folder `data`; if None, of RecBole's copy of MovieLens-100k; else synthetic."""
    # Found and not imported: what RecBole itself needs is not installed.
    recbole = importlib.util.find_spec("recbole")
    if data is None and recbole is not None and recbole.submodule_search_locations:
        return movielens(Path(recbole.submodule_search_locations[0], "dataset_example", "ml-100k"))
    if data in (None, "synthetic"):
        return synthetic(*((500, 1_000, 40) if quick else (2_000, 6_000, 60)), seed)
    return movielens(Path(data))
