"""A trained model with tables of 4 bits, written for torch without this package, and for onnxruntime without torch.

    pip install ".[demo]" onnx onnxscript onnxruntime
    python examples/serving.py

A model learns whom a user likes. Its tables are quantized, and it is written to model.pt2 and model.onnx, which then
answer. Where they do, gpu_embed need not be installed, and for the latter torch neither.
"""

import logging
import warnings

import onnxruntime
import onnxscript  # noqa: F401  (the exporter needs it; better missed now than after the training)
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.export import Dim

import gpu_embed
from gpu_embed.demo.options import example_parser, writable_folder
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c

SHOW = "{:+.2f}".format


class Likes(nn.Module):
    """How much users like items, as the product of their rows; ids [batch] each -> [batch]."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = (gpu_embed.Embedding(100, 64, device="cpu") for _ in range(2))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(1)


def main() -> None:
    parser = example_parser(__doc__, "fewer steps, to see that it runs", device=False)
    parser.add_argument("--out", type=writable_folder, default="served", help="the folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(describe_backend("cpu"))

    torch.manual_seed(0)
    model = Likes()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in track(range(150 if args.quick else 600), "training", console=Console(soft_wrap=True)):
        user, item = torch.randint(100, (2, 512), device="cpu")
        # A user likes one item of ten: those with the same last digit.
        is_liked = (user % 10 == item % 10).float()
        loss = nn.functional.binary_cross_entropy_with_logits(model(user, item), is_liked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # An item that user 4 likes, and one not.
    user, item = torch.tensor([[4, 4], [14, 15]], device="cpu")
    print("trained:   ", *map(SHOW, model(user, item)))
    print(gpu_embed.replace_embeddings(model, quantize="int4"))
    print("in 4 bits: ", *map(SHOW, model(user, item)))

    shapes = {"user": {0: Dim("batch")}, "item": {0: Dim("batch")}}
    program = torch.export.export(model.eval(), (user, item), dynamic_shapes=shapes)
    torch.export.save(program, args.out / "model.pt2")
    print("model.pt2: ", *map(SHOW, torch.export.load(args.out / "model.pt2").module()(user, item)))

    # The exporter names packages that are not needed, and warns of its own code.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    options = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False}
    torch.onnx.export(model, (user, item), args.out / "model.onnx", **options)
    session = onnxruntime.InferenceSession(args.out / "model.onnx")
    (scores,) = session.run(None, {"user": user.numpy(), "item": item.numpy()})
    print("model.onnx:", *map(SHOW, scores))


if __name__ == "__main__":
    end_on_ctrl_c(main, left="nothing was written but what --out names")
