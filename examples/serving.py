"""A trained model, served where this package is not: by torch alone, and by onnxruntime without torch.

    pip install ".[demo]" onnx onnxscript onnxruntime
    python examples/serving.py

A model learns whom a user likes. Its tables are quantized to 4 bits, it is written to model.pt2 and model.onnx, and
programs of their own, which cannot import gpu_embed, answer from these files.
"""

import logging
import subprocess
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.export import Dim

import gpu_embed
from gpu_embed.demo.options import example_parser, writable_folder
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c

# Whoever serves has neither this package nor this file.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
BY_TORCH = """
import torch
scores = torch.export.load("model.pt2").module()(torch.tensor([4, 4]), torch.tensor([14, 15]))
print("torch alone:", *(f"{score:+.2f}" for score in scores.tolist()))
"""
BY_ONNX = """
import numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
(scores,) = session.run(None, {"user": numpy.array([4, 4]), "item": numpy.array([14, 15])})
print("onnxruntime:", *(f"{score:+.2f}" for score in scores.tolist()))
"""


class Likes(nn.Module):
    """How much users like items: the product of their rows."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.user = gpu_embed.Embedding(users, 64, device="cpu")
        self.item = gpu_embed.Embedding(items, 64, device="cpu")

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Ids [batch] each -> [batch]."""
        return (self.user(user) * self.item(item)).sum(1)


def train(model: Likes, users: int, items: int, steps: int, console: Console) -> None:
    """Users like items whose number, divided by ten, leaves the same remainder as theirs."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in track(range(steps), "training", console=console):
        user = torch.randint(users, (512,), device="cpu")
        item = torch.randint(items, (512,), device="cpu")
        likes = (user % 10 == item % 10).float()
        # Of ten items a user likes one.
        loss = nn.functional.binary_cross_entropy_with_logits(
            model(user, item), likes, pos_weight=torch.tensor(9.0, device="cpu")
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def serve(program: str, missing: list[str], folder: Path) -> str:
    """What a program of its own prints, in which some packages cannot be imported."""
    code = WITHOUT.format(missing=missing) + program
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = example_parser(__doc__, "fewer steps, to see that it runs", device=False)
    out = "a folder for both files (default: none is kept)"
    parser.add_argument("--out", type=writable_folder, help=out)
    args = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    console.print(describe_backend("cpu"))

    users, items = 100, 200
    model = Likes(users, items)
    train(model, users, items, 150 if args.quick else 600, console)
    # An item that user 4 likes, and one not.
    asked = torch.tensor([4, 4], device="cpu"), torch.tensor([14, 15], device="cpu")
    with torch.no_grad():
        console.print("trained:    ", *(f"{score:+.2f}" for score in model(*asked).tolist()))
        console.print(gpu_embed.replace_embeddings(model, quantize="int4"))
        console.print("in 4 bits:  ", *(f"{score:+.2f}" for score in model(*asked).tolist()))

    with tempfile.TemporaryDirectory() as made:
        folder = args.out or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {name: {0: Dim("batch")} for name in ("user", "item")}
        program = torch.export.export(model, asked, dynamic_shapes=shapes)
        torch.export.save(program, folder / "model.pt2")
        console.print(serve(BY_TORCH, ["gpu_embed"], folder).strip())
        if all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
            options = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False}
            # It would name packages that are not needed, and warn of its own code.
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(model.eval(), asked, folder / "model.onnx", **options)
            console.print(serve(BY_ONNX, ["gpu_embed", "torch"], folder).strip())
        else:
            console.print("no ONNX: pip install onnx onnxscript onnxruntime")
        for path in sorted(folder.glob("model.*")):
            console.print(
                f"{path if args.out else path.name}: {path.stat().st_size / 1000:,.0f} kB"
            )


if __name__ == "__main__":
    end_on_ctrl_c(main, left="nothing was written but what --out names")
