"""A trained table in a seventh of its bytes: what it answers, what it weighs, and how long a lookup takes.

    pip install ".[demo]"
    python examples/small_tables.py

Texts of made-up words have topics, and a bag of words learns to tell them. Then its table is quantized to 8 and to 4
bits, in a copy of the model, saved, loaded and asked again.
"""

import copy
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import gpu_embed
from gpu_embed.demo.options import example_parser
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c

TOPICS, TEXTS, LENGTH = 20, 256, 12


def draw_texts(words: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [TEXTS, LENGTH], a third of them of the text's own topic, and the topics [TEXTS]."""
    torch.manual_seed(seed)
    topics = torch.randint(TOPICS, (TEXTS,), device=device)
    any_word = torch.randint(words, (TEXTS, LENGTH), device=device)
    of_topic = any_word // TOPICS * TOPICS + topics[:, None]
    is_own = torch.rand(TEXTS, LENGTH, device=device) < 1 / 3
    ids = torch.where(is_own, of_topic.clamp(max=words - 1), any_word)
    return ids, topics


def milliseconds(model: nn.Module, ids: Tensor) -> float:
    """Of one call, the fastest of many: on a busy machine the others wait."""
    fastest = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        model(ids)
        if ids.is_cuda:
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 1000 * fastest


def main() -> None:
    args = example_parser(__doc__, "fewer words, to see that it runs").parse_args()
    words, steps = (2_000, 60) if args.quick else (20_000, 300)
    console = Console(highlight=False, soft_wrap=True)
    console.print(describe_backend(args.device))

    torch.manual_seed(0)
    table = gpu_embed.EmbeddingBag(words, 256, mode="mean", device=args.device)
    model = nn.Sequential(table, nn.Linear(256, TOPICS, device=args.device))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in track(range(steps), "training", console=console):
        ids, topics = draw_texts(words, step, args.device)
        loss = nn.functional.cross_entropy(model(ids), topics)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    asked = [draw_texts(words, steps + number, args.device) for number in range(20)]
    shown = Table("table", "right", "the same answer", "MB in a file", "ms a lookup")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        before = torch.cat([model(ids).argmax(1) for ids, _ in asked])
        right = torch.cat([topics for _, topics in asked])
        for name in ("float32", "int8", "int4"):
            small = copy.deepcopy(model)
            if name != "float32":
                print(gpu_embed.replace_embeddings(small, quantize=name), flush=True)
            path = Path(folder) / f"{name}.pt"
            torch.save(small.state_dict(), path)
            small.load_state_dict(torch.load(path, weights_only=True))
            answers = torch.cat([small(ids).argmax(1) for ids, _ in asked])
            shown.add_row(
                name,
                f"{(answers == right).float().mean():.1%}",
                f"{(answers == before).float().mean():.1%}",
                f"{path.stat().st_size / 1e6:.2f}",
                f"{milliseconds(small[0], asked[0][0]):.3f}",
            )
    console.print(shown)


if __name__ == "__main__":
    end_on_ctrl_c(main, left="nothing was written")
