"""Words that a model never saw: with pretrained vectors it knows what they are, with random ones it cannot.

    pip install ".[demo,text,vectors]"
    python examples/word_vectors.py

The vectors are 20 words of English that come with gensim: numbers, animals and fruit. A table is made of them, and a
layer learns from half of the words which of the three a word is. --vectors takes a file of your own (GloVe, word2vec,
fastText) in their place; it should have these words.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpu_embed
import gpu_embed.plot
import gpu_embed.text
import gpu_embed.vectors
from gpu_embed.demo.options import example_parser, readable_file, writable_file
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c, save_figure

KINDS = {
    "number": "one two three four five six seven eight nine ten",
    "animal": "dog pig cat fish birds",
    "fruit": "apple orange grape banana mango",
}
SHIPPED = "test/test_data/EN.1-10.cbow1_wind5_hs0_neg10_size300_smpl1e-05.txt"


def shipped_vectors() -> Path:
    """Where they lie, without an import of gensim, which takes a second."""
    spec = importlib.util.find_spec("gensim")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / SHIPPED


def train(table: gpu_embed.Embedding, ids: Tensor, kinds: Tensor, steps: int) -> tuple[float, int]:
    """Learn the kinds of every other word; the last loss, and how many of the remaining words are right."""
    guess = nn.Linear(table.embedding_dim, len(KINDS), device=ids.device)
    optimizer = torch.optim.Adam([*table.parameters(), *guess.parameters()], lr=0.01)
    for _ in range(steps):
        loss = F.cross_entropy(guess(table(ids[::2])), kinds[::2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = guess(table(ids[1::2])).argmax(dim=1) == kinds[1::2]
    return loss.item(), int(right.sum())


def main() -> None:
    quick = "few steps, to see that it runs"
    parser = example_parser(__doc__, quick, picture="word_vectors.png", seed=True)
    parser.add_argument(
        "--vectors", type=readable_file, help="a file of vectors (default: gensim's)"
    )
    parser.add_argument("--nearest", nargs="+", default=["two", "cat", "apple"], metavar="WORD")
    parser.add_argument("--save", type=writable_file, help="the trained table: .vec, .bin or .kv")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    print(describe_backend(args.device))

    vectors = gpu_embed.vectors.load(args.vectors or shipped_vectors())
    print(vectors)
    for word in args.nearest:
        near = ", ".join(f"{other} {cosine:.2f}" for other, cosine in vectors.nearest(word, k=4))
        print(f"nearest to {word}: {near}")

    tokenizer = gpu_embed.text.vocabulary(KINDS.values(), padding="[PAD]", unknown="[UNK]")
    groups = [kind for kind, words in KINDS.items() for _ in words.split()]
    words = " ".join(KINDS.values()).split()
    ids = torch.tensor([tokenizer.token_to_id(word) for word in words], device=args.device)
    kinds = torch.tensor([list(KINDS).index(kind) for kind in groups], device=args.device)

    table, report = vectors.embedding(
        tokenizer, padding="[PAD]", texts=KINDS.values(), device=args.device
    )
    print(report)
    before = table.weight.detach().clone()
    random = gpu_embed.Embedding(*table.weight.shape, padding_idx=0, device=args.device)
    for name, one in (("pretrained", table), ("random", random)):
        loss, right = train(one, ids, kinds, steps=20 if args.quick else 100)
        print(
            f"{name:10}  loss {loss:.4f}, {right} of {len(words) // 2} words right that it never saw"
        )

    if args.save is not None:
        gpu_embed.vectors.Vectors.from_module(table, tokenizer).save(args.save)
        print(f"trained vectors: {args.save.resolve()}")
    title = "Words of a kind lie together; arrows: what the model learnt from"
    save_figure(
        gpu_embed.plot.table(
            table.weight, words, ids=ids, groups=groups, title=title, before=before
        ),
        args.out,
    )
    print(f"picture: {args.out.resolve()}")


if __name__ == "__main__":
    end_on_ctrl_c(main)
