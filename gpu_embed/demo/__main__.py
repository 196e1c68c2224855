"""The layer at work: two phrases by hand, then real text, beside torch's own layer.

Run it with ``python -m gpu_embed.demo``; ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import importlib.util
import itertools
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpu_embed
import gpu_embed.text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

PHRASES = ("Hope to see you soon", "Nice to see you again")
PHRASE_STEPS = 150
# What the second phrase's five words become in the introduction that these phrases are known from.
KNOWN_ROWS = [[0.7, 1.7], [0.1, 4.2], [1.0, 3.1], [0.3, 2.1], [4.1, 2.0]]

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


class CannotRunError(Exception):
    """Something that the user must change before the demo can start."""


# Part 1: two phrases


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


# Part 2: real text


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


# The command


class Checks:
    """Print each claim with its outcome, and remember whether all held."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.all_held = True

    def __call__(self, claim: str, holds: bool) -> None:
        self.all_held &= holds
        self.console.print(
            f"{'ok' if holds else 'FAILED':6}  {claim}", style="green" if holds else "red"
        )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_embed.demo",
        description="Train gpu_embed.Embedding on two phrases, then on real text beside "
        "torch.nn.Embedding, and draw both. Takes under two minutes on two CPU cores; uses a CUDA "
        "GPU when there is one.",
        epilog="Exit code: 0 all checks hold, 1 one failed, 2 it cannot start, 130 interrupted.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu_embed_demo.png"),
        help="the picture (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, help=f"training steps on the real text (default: {FULL.steps})"
    )
    parser.add_argument("--seed", type=int, default=0, help="for all that is random (default: 0)")
    parser.add_argument(
        "--quick", action="store_true", help="a small model and few steps, to see that it runs"
    )
    parser.add_argument(
        "--device", help="such as cpu or cuda:1 (default: cuda if there is one, else cpu)"
    )
    return parser.parse_args(argv)


def check_numbers(steps: int | None, seed: int) -> None:
    if steps is not None and steps < 1:
        raise CannotRunError(f"--steps {steps}: a training needs 1 step or more")
    if not 0 <= seed < 2**63:
        raise CannotRunError(f"--seed {seed}: choose a number from 0 to 2**63 - 1")


def check_extra() -> None:
    for name in ("rich", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise CannotRunError(
                f'the demo needs {name}: install the extra "demo" (from a clone: pip install ".[demo]")'
            )
    try:
        importlib.import_module("gpu_embed.demo.picture")
    except Exception as problem:  # a broken install, or MPLBACKEND set to nonsense
        raise CannotRunError(f"matplotlib does not work here: {problem}") from problem


def check_out(out: Path) -> None:
    """Find out before the training whether the picture can be saved after it."""
    if out.suffix.lower() != ".png":
        raise CannotRunError(f"--out {out}: the picture is a PNG, choose a name that ends in .png")
    if not out.parent.is_dir():
        raise CannotRunError(
            f"--out {out}: there is no folder {out.parent}, make it or choose another"
        )
    if out.is_dir():
        raise CannotRunError(f"--out {out}: this is a folder, name a file in it")
    probe = part_file(out)
    try:
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise CannotRunError(
            f"--out {out}: cannot write there ({problem.strerror}), choose another folder"
        ) from None


def part_file(out: Path) -> Path:
    """Name a file beside ``out`` that no other process writes."""
    return out.with_name(f".{out.stem}.{os.getpid()}.part")


def choose_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    # A torch built without CUDA raises AssertionError.
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise CannotRunError(f"--device {name}: {reason}; --device cpu always works") from None
    return device


def check_backend(device: torch.device) -> None:
    """Look one row up: a forced backend that cannot run, or a misspelt setting, raises."""
    try:
        gpu_embed.Embedding(1, 1, device=device)(torch.zeros(1, dtype=torch.int64, device=device))
    except (RuntimeError, ValueError) as problem:
        raise CannotRunError(str(problem).removeprefix("gpu_embed: ")) from problem


def describe_backend(device: torch.device | str | None = None) -> str:
    """Which backend serves a device (None: cuda if there is one); on a CPU also what cannot be seen there."""
    said = f"backend: {gpu_embed.backends.explain(device)}"
    if not said.startswith("backend: torch serves cpu"):
        return said
    return f"{said}\nOn a CPU torch's own operators run: only a CUDA device shows gpu_embed's kernels and their speed."


def end_on_ctrl_c(main: Callable[[], None], left: str = "no picture was written") -> None:
    """Run a program's `main`; Ctrl-C ends it with one line, which says what is `left`, and with code 130."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"\ninterrupted, {left}", file=sys.stderr)
        sys.exit(130)


def save_figure(figure: Figure, out: Path) -> None:
    """Draw into a file beside ``out`` and move it there, so that no half picture is ever seen."""
    part = part_file(out)
    try:
        figure.savefig(part, format=out.suffix[1:] or "png")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def save_picture(phrases: PhraseTable, runs: Sequence[Run], guessing: float, out: Path) -> None:
    """Draw both parts into one picture."""
    from . import picture

    figure = picture.draw(
        phrases.words,
        phrases.before,
        phrases.after,
        {run.name: run.losses for run in runs},
        guessing,
    )
    save_figure(figure, out)


def run_demo(args: argparse.Namespace) -> bool:
    """Run both parts and save the picture; tell whether all checks held."""
    check_numbers(args.steps, args.seed)
    check_extra()
    check_out(args.out)
    device = choose_device(args.device)
    check_backend(device)
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    checks = Checks(console)
    size = QUICK if args.quick else FULL
    if args.steps is not None:
        size = dataclasses.replace(size, steps=args.steps)

    start = time.perf_counter()
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    console.print(f"gpu_embed demo on {device}{threads}, torch {torch.__version__}")
    console.print(describe_backend(device))
    console.rule("1. Two phrases")
    phrases = run_phrases(checks, device, args.seed)
    console.rule("2. Real text")
    runs, guessing = run_text(checks, device, args.seed, size)
    save_picture(phrases, runs, guessing, args.out)
    console.print(f"picture: {args.out} ({time.perf_counter() - start:.0f} s in all)")
    return checks.all_held


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return 0 if run_demo(args) else 1
    except CannotRunError as problem:
        print(f"gpu_embed demo: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngpu_embed demo: interrupted, no picture was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # At this size more threads save little, and on a busy machine they wait for each other.
    torch.set_num_threads(1)
    sys.exit(main())
