"""200 features of strings, each hashed to the rows of its own table: no vocabulary, and no string is unknown.

    pip install ".[demo]"
    python examples/hashed_features.py
    python examples/hashed_features.py --resume

Will a user click? The log is made up: each string makes it likelier or less likely. One layer holds 200 tables and
looks all of them up at once; row-wise Adagrad updates them in the backward pass. A checkpoint is written every 50
steps. Ctrl-C leaves the last one, and --resume goes on from there, bit for bit as without a break.
"""

from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from gpu_embed import TableBatchedEmbeddingBag, batch_padded, optim
from gpu_embed.demo.options import example_parser, writable_file
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c, read_checkpoint, write_whole
from gpu_embed.text import hash_ids

FEATURES, ROWS, WIDTH, USERS = 200, 2000, 8, 256


def users(step: int) -> tuple[list[list[str]], Tensor]:
    """A string for each feature of each user, and which users click."""
    values = np.random.default_rng(step).geometric(0.1, (USERS, FEATURES)).tolist()
    strings = [[f"{name}={value}" for name, value in enumerate(user)] for user in values]
    return strings, hash_ids(strings, 2, seed=1, device="cpu").sum(1) > FEATURES / 2


def main() -> None:
    parser = example_parser(__doc__, "few steps, to see that it runs")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--checkpoint", type=writable_file, default="hashed_features.pt")
    args = parser.parse_args()
    print(describe_backend(args.device))

    torch.manual_seed(0)
    tables = TableBatchedEmbeddingBag([(ROWS, WIDTH)] * FEATURES, sparse=True, device=args.device)
    updates = optim.apply_in_backward(tables, optim.RowWiseAdagrad, lr=0.05)
    head = nn.Linear(FEATURES * WIDTH, 1, device=args.device)
    adam = torch.optim.Adam(head.parameters())
    parts = {"tables": tables, "updates": updates.optimizer, "head": head, "adam": adam}
    saved = read_checkpoint(args.checkpoint, "step", *parts) if args.resume else {"step": 0}
    for name in parts.keys() & saved.keys():
        parts[name].load_state_dict(saved[name])

    right, steps = 0, range(saved["step"], 100 if args.quick else 1000)
    if not steps:
        parser.error(f"--resume: {args.checkpoint} has all {steps.stop} steps, leave out --resume")
    for step in track(steps, "training", console=Console(soft_wrap=True)):
        strings, clicked = users(step)
        # Feature after feature, a bag of one row for each user.
        rows = hash_ids(strings, ROWS, device=args.device).t().unsqueeze(2)
        scores = head(tables(*batch_padded(list(rows)))).squeeze(1).cpu()
        loss = nn.functional.binary_cross_entropy_with_logits(scores, clicked.float())
        adam.zero_grad()
        loss.backward()
        adam.step()
        right += ((scores > 0) == clicked).sum().item()
        if (step + 1) % 50 == 0:
            saved = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}
            write_whole(args.checkpoint, partial(torch.save, saved))
            # Nobody comes twice, so each was foretold before anything was learnt from them.
            print(f"step {step + 1}: right about {right / (50 * USERS):.1%} of the users")
            right = 0


if __name__ == "__main__":
    end_on_ctrl_c(main, left="--resume goes on from the last checkpoint, if there is one")
