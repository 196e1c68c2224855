"""The demo's first part: a table of two columns learns the words of two phrases."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpu_embed
import gpu_embed.text

from .running import Checks

if TYPE_CHECKING:
    from rich.table import Table

PHRASES = ("Hope to see you soon", "Nice to see you again")
PHRASE_STEPS = 150
# What the second phrase's five words become in the introduction that these phrases are known from.
KNOWN_ROWS = [[0.7, 1.7], [0.1, 4.2], [1.0, 3.1], [0.3, 2.1], [4.1, 2.0]]


@dataclass(frozen=True)
class PhraseTable:
    """The words of the phrases, and their rows before and after the training."""

    words: list[str]
    before: Tensor  # [7, 2]
    after: Tensor  # [7, 2]


def encode_phrases(phrases: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Give each word the next free id when it first appears."""
    if has_tokenizers():
        tokenizer = gpu_embed.text.vocabulary(phrases, lowercase=True)
        vocabulary = tokenizer.get_vocab()
        words = sorted(vocabulary, key=lambda word: vocabulary[word])
        return words, gpu_embed.text.encode(tokenizer, phrases).tolist()
    ids: dict[str, int] = {}
    encoded = [[ids.setdefault(word, len(ids)) for word in p.lower().split()] for p in phrases]
    return list(ids), encoded


def has_tokenizers() -> bool:
    return importlib.util.find_spec("tokenizers") is not None


def neighbour_pairs(encoded: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """List (word, word beside it), in both directions."""
    steps = [pair for phrase in encoded for pair in itertools.pairwise(phrase)]
    return steps + [(right, left) for left, right in steps]


def lowest_loss(pairs: Sequence[tuple[int, int]]) -> float:
    """Compute the loss of a model that knows how often each word stands beside each other."""
    both = torch.tensor([pairs.count(pair) for pair in pairs], dtype=torch.float64, device="cpu")
    words = [word for word, _ in pairs]
    alone = torch.tensor([words.count(word) for word in words], dtype=torch.float64, device="cpu")
    return -(both / alone).log().mean().item()


def train_on_pairs(table: nn.Embedding, pairs: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Learn to tell from a word's row which words stand beside it; return first and last loss."""
    words, neighbours = torch.tensor(pairs, device=table.weight.device).unbind(dim=1)
    guess = nn.Linear(table.embedding_dim, table.num_embeddings, device=words.device)
    # The small decay makes the best table unique: words with the same neighbours end up together.
    weights = [*table.parameters(), *guess.parameters()]
    optimizer = torch.optim.Adam(weights, lr=0.05, weight_decay=0.002)
    losses = []
    for _ in range(PHRASE_STEPS):
        loss = F.cross_entropy(guess(table(words)), neighbours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def check_lookups(table: nn.Embedding, ids: list[int], checks: Checks) -> None:
    """Look the phrase up in the learnt table, then in one with rows set by hand."""
    phrase = torch.tensor(ids, device=table.weight.device)
    known = torch.tensor(KNOWN_ROWS, device=table.weight.device)
    with torch.no_grad():
        same = torch.equal(table(phrase), table.weight[ids])
        checks(f"the second phrase's rows are equal to weight[{ids}]", same)
        table.weight[phrase] = known
        same = torch.equal(table(phrase), known)
        checks(f"set by hand, the second phrase's rows come back:\n        {KNOWN_ROWS}", same)


def run_phrases(checks: Checks, device: torch.device, seed: int) -> PhraseTable:
    """Encode the phrases, train their table, print it and check the lookups."""
    console = checks.console
    words, encoded = encode_phrases(PHRASES)
    console.print(
        "Words to ids by gpu_embed.text, each word as it first appears:"
        if has_tokenizers()
        else 'Words to ids by hand (with the extra "text" installed, by gpu_embed.text):'
    )
    for phrase, ids in zip(PHRASES, encoded, strict=True):
        console.print(f"{phrase!r:25} -> {ids}")

    torch.manual_seed(seed)
    table = gpu_embed.Embedding(len(words), 2, device="cpu").to(device)
    before = table.weight.detach().cpu().clone()
    pairs = neighbour_pairs(encoded)
    first, last = train_on_pairs(table, pairs)
    after = table.weight.detach().cpu().clone()
    console.print(
        f"\nEmbedding({len(words)}, 2) learns to tell from a word's row which words stand beside "
        f"it.\nLoss after {PHRASE_STEPS} steps: {first:.3f} -> {last:.3f} (the lowest possible is "
        f"{lowest_loss(pairs):.3f})."
    )
    learnt = PhraseTable(words, before, after)
    console.print(phrase_table(learnt), soft_wrap=False)
    for left, right in (("hope", "nice"), ("soon", "again")):
        a, b = words.index(left), words.index(right)
        console.print(
            f"{left!r} and {right!r} have the same neighbours: their distance went from "
            f"{torch.dist(before[a], before[b]):.2f} to {torch.dist(after[a], after[b]):.2f}"
        )
    console.print()
    check_lookups(table, encoded[1], checks)
    return learnt


def phrase_table(learnt: PhraseTable) -> Table:
    """Set the (7, 2) table as a table."""
    from rich.table import Table

    table = Table("id", "word", "row before", "row learnt")
    for i, word in enumerate(learnt.words):
        rows = (f"[{row[0]:6.3f}, {row[1]:6.3f}]" for row in (learnt.before[i], learnt.after[i]))
        table.add_row(str(i), word, *rows)
    return table
