"""The demo's second part: real text, and the same model with torch's layer and with ours."""

from __future__ import annotations

import collections
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpu_embed

from .running import CannotRunError, Checks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

UNKNOWN = "<unknown>"
PROBES = ("class", "function", "list", "string", "exception", "true", "can", "return")


@dataclass(frozen=True)
class Size:
    """How large the model of the real text is, and how long it trains."""

    steps: int
    vocabulary: int = 1000
    embedding_dim: int = 64
    context: int = 4
    batch: int = 512


FULL = Size(steps=1000)
QUICK = Size(steps=150, vocabulary=300, embedding_dim=16, context=2, batch=128)


@dataclass(frozen=True)
class Corpus:
    """A text as ids: the more frequent a word, the lower its id; id 0 is every rare word."""

    ids: Tensor  # [tokens]
    vocabulary: list[str]
    counts: list[int]
    different: int


def read_tokens() -> list[str]:
    """Split the text that ships with Python into lower-case words and punctuation marks."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise CannotRunError(
            "this Python lacks pydoc_data, the text that the demo reads: install the full standard "
            "library, or use another Python"
        ) from None
    text = "\n".join(topics[name] for name in sorted(topics)).lower()
    # Underlines of headings and frames of tables are no sentence.
    text = re.sub(r"([-=*~+^])\1{2,}", " ", text)
    return re.findall(r"\w+|[^\w\s]", text)


def encode_text(tokens: Sequence[str], size: int) -> Corpus:
    """Give ids by frequency to the ``size - 1`` most frequent tokens; the others share id 0."""
    frequent = collections.Counter(tokens).most_common(size - 1)
    vocabulary = [UNKNOWN, *(word for word, _ in frequent)]
    ids = {word: i for i, word in enumerate(vocabulary)}
    encoded = torch.tensor([ids.get(token, 0) for token in tokens], device="cpu")
    counts = torch.bincount(encoded, minlength=len(vocabulary)).tolist()
    return Corpus(encoded, vocabulary, counts, different=len(set(tokens)))


def frequency_loss(corpus: Corpus) -> float:
    """Compute the loss of always guessing by the words' frequencies, whatever comes before."""
    share = torch.tensor(
        [count for count in corpus.counts if count], dtype=torch.float64, device="cpu"
    )
    share /= share.sum()
    return -(share * share.log()).sum().item()


class NextWord(nn.Module):
    """Guess the next word from the rows of those before it, weighted by position and summed."""

    def __init__(self, embedding_class: type[nn.Embedding], size: Size) -> None:
        super().__init__()
        # On the CPU, so that the seed gives the same start wherever it is trained.
        self.table = embedding_class(size.vocabulary, size.embedding_dim, device="cpu")
        # Small rows to start from: what is left of a large random start hides who is near whom.
        nn.init.normal_(self.table.weight, std=0.02)
        self.position = nn.Parameter(torch.ones(size.context, size.embedding_dim, device="cpu"))
        self.guess = nn.Linear(size.embedding_dim, size.vocabulary, device="cpu")

    def forward(self, context: Tensor) -> Tensor:
        rows = self.table(context)  # [batch, context, embedding_dim]
        guesses: Tensor = self.guess((rows * self.position).sum(dim=1))  # [batch, vocabulary]
        return guesses


@dataclass
class Run:
    """One model in training, and what was measured on the way."""

    name: str
    model: NextWord
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, context: Tensor, target: Tensor) -> None:
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(context), target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # item() waits for a GPU, so the time is that of the whole step.
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    @property
    def last_loss(self) -> float:
        """The mean over the last twentieth of the steps: single batches scatter."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 20) :])

    def tokens_per_second(self, batch: int) -> float:
        """Words guessed per second of the median step: the first one also compiles kernels."""
        return batch / statistics.median(self.seconds)


def new_run(
    name: str, embedding_class: type[nn.Embedding], size: Size, device: torch.device, seed: int
) -> Run:
    """Build a model whose start depends on the seed alone."""
    torch.manual_seed(seed)
    model = NextWord(embedding_class, size).to(device)
    return Run(name, model, torch.optim.Adam(model.parameters(), lr=2e-3))


def random_batches(ids: Tensor, size: Size, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (words before, next word) from random places of the text."""
    windows = ids.unfold(0, size.context + 1, 1)  # [places, context + 1]
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(size.steps):
        places = torch.randint(len(windows), (size.batch,), generator=generator, device="cpu")
        batch = windows[places.to(ids.device)]
        yield batch[:, :-1], batch[:, -1]


def train(runs: Sequence[Run], corpus: Corpus, size: Size, seed: int, progress: Progress) -> None:
    """Give every model the same batches, in turns, so that a busy machine slows all alike."""
    ids = corpus.ids.to(next(runs[0].model.parameters()).device)
    task = progress.add_task("training", total=size.steps, losses="")
    for number, (context, target) in enumerate(random_batches(ids, size, seed)):
        for run in runs if number % 2 else reversed(runs):
            run.step(context, target)
        losses = " and ".join(f"{run.losses[-1]:.3f}" for run in runs)
        progress.update(task, advance=1, losses=losses)


def progress_bar(console: Console) -> Progress:
    """Make the bar with losses and time left; it stays out of pipes and files."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[losses]}"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
    )


def largest_difference(ours: Run, theirs: Run) -> float:
    return max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))


def common_words(corpus: Corpus) -> list[int]:
    """List the ids of words, not marks, that come often enough for their rows to mean something."""
    return [
        i
        for i, word in enumerate(corpus.vocabulary)
        if word.isalpha() and len(word) > 2 and corpus.counts[i] >= 30
    ]


def nearest(corpus: Corpus, weight: Tensor, probe: int, count: int = 4) -> list[str]:
    """List the common words whose rows have the highest cosine with the probe's."""
    common = common_words(corpus)
    # What all rows share says nothing about who is near whom.
    rows = F.normalize(weight[common] - weight[common].mean(dim=0), dim=1)
    cosine = rows @ rows[common.index(probe)]
    order = [i for i in cosine.argsort(descending=True).tolist() if common[i] != probe]
    return [f"{corpus.vocabulary[common[i]]} {cosine[i]:.2f}" for i in order[:count]]


def neighbour_table(corpus: Corpus, weight: Tensor) -> Table:
    """Set a few frequent words and their nearest neighbours as a table."""
    from rich.table import Table

    table = Table("word", "times", "nearest rows of the learnt table (cosine)")
    for i in common_words(corpus):
        if corpus.vocabulary[i] in PROBES:
            near = ", ".join(nearest(corpus, weight, i))
            table.add_row(corpus.vocabulary[i], f"{corpus.counts[i]:,}", near)
    return table


def run_table(runs: Sequence[Run], batch: int) -> Table:
    """Set losses and speeds as a table."""
    from rich.table import Table

    table = Table("layer", "first loss", "last loss", "tokens per second")
    for run in runs:
        speed = f"{run.tokens_per_second(batch):,.0f}"
        table.add_row(run.name, f"{run.losses[0]:.4f}", f"{run.last_loss:.4f}", speed)
    return table


def run_text(
    checks: Checks, device: torch.device, seed: int, size: Size
) -> tuple[list[Run], float]:
    """Train the same model with both layers on the same batches and compare them."""
    console = checks.console
    corpus = encode_text(read_tokens(), size.vocabulary)
    console.print(
        f"pydoc_data.topics, which ships with Python: {len(corpus.ids):,} tokens, "
        f"{corpus.different:,} different.\n"
        f"The {size.vocabulary - 1:,} most frequent get an id each, the others share one "
        f"({corpus.counts[0] / len(corpus.ids):.1%} of the text).\n"
        f"Two models guess the next word from the {size.context} before it: same start, same "
        f"{size.steps:,} batches of {size.batch:,}."
    )
    layers = {"torch.nn.Embedding": nn.Embedding, "gpu_embed.Embedding": gpu_embed.Embedding}
    runs = [new_run(name, layer, size, device, seed) for name, layer in layers.items()]
    with progress_bar(console) as progress:
        train(runs, corpus, size, seed, progress)
    theirs, ours = runs

    guessing = frequency_loss(corpus)
    console.print(run_table(runs, size.batch), soft_wrap=False)
    console.print(f"guessing by word frequency alone has a loss of {guessing:.4f}")
    difference = largest_difference(ours, theirs)
    verdict = "the curves are bit-identical" if difference == 0 else "rounding differs"
    console.print(f"largest difference between the two loss curves: {difference:.3g} ({verdict})\n")

    table = ours.model.table
    everything = corpus.ids.to(device)
    with torch.no_grad():
        same = torch.equal(table(everything), F.embedding(everything, table.weight))
    checks(f"the rows of all {len(corpus.ids):,} tokens are equal to torch's lookup", same)
    checks(
        "both layers end at the same loss, within 2%",
        abs(ours.last_loss - theirs.last_loss) <= 0.02 * theirs.last_loss,
    )
    console.print(neighbour_table(corpus, table.weight.detach().cpu()), soft_wrap=False)
    return runs, guessing
