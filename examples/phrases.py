"""Two phrases as ids, and a table of two numbers a word, which learns which words stand beside each other.

    pip install ".[demo,text]"
    python examples/phrases.py

Words with the same neighbours ("hope" and "nice", "soon" and "again") end up together: the picture shows it.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpu_embed
import gpu_embed.plot
import gpu_embed.text
from gpu_embed.demo.options import example_parser
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c, save_figure

PHRASES = ["Hope to see you soon", "Nice to see you again"]


def train(table: gpu_embed.Embedding, ids: Tensor, steps: int) -> list[float]:
    """Guess each word's neighbours from its row; the loss of every step."""
    pairs = [pair for phrase in ids.tolist() for pair in pairwise(phrase)]
    pairs += [(right, left) for left, right in pairs]
    words, neighbours = torch.tensor(pairs, device=ids.device).t()
    guess = nn.Linear(table.embedding_dim, table.num_embeddings, device=ids.device)
    # The small decay makes the best table unique.
    weights = [*table.parameters(), *guess.parameters()]
    optimizer = torch.optim.Adam(weights, lr=0.05, weight_decay=0.002)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(guess(table(words)), neighbours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    quick = "few steps, to see that it runs"
    parser = example_parser(__doc__, quick, picture="phrases.png", seed=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    print(describe_backend(args.device))

    tokenizer = gpu_embed.text.vocabulary(PHRASES, lowercase=True)
    ids = gpu_embed.text.encode(tokenizer, PHRASES, args.device)
    words = [tokenizer.id_to_token(i) for i in range(gpu_embed.text.table_size(tokenizer))]
    table = gpu_embed.Embedding(len(words), 2).to(args.device)
    before = table.weight.detach().clone()
    for phrase, row in zip(PHRASES, ids.tolist(), strict=True):
        print(f"{phrase!r:25} -> {row}")

    losses = train(table, ids, steps=100 if args.quick else 150)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for word, row in zip(words, table(torch.arange(len(words), device=args.device)), strict=True):
        print(f"{word:6} {row[0]:6.2f} {row[1]:6.2f}")
    title = f"Embedding({len(words)}, 2): words with the same neighbours meet"
    save_figure(gpu_embed.plot.table(table.weight, words, title=title, before=before), args.out)
    print(f"picture: {args.out.resolve()}")


if __name__ == "__main__":
    end_on_ctrl_c(main)
