"""Two phrases as ids, and a Keras layer of two numbers a word, which learns which words stand beside each other.

    pip install ".[demo,keras,text]"
    python examples/keras_phrases.py

The phrases hold seven words, and ids counted from 0 need `Embedding(7, 2)`. Where they are counted from 1, as Keras's
old Tokenizer did to leave 0 to padding, the last id is 7 and `Embedding(8, 2)` is the least: both are shown here.
"""

import os
from itertools import pairwise

# Read when keras is first imported.
os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np

import gpu_embed.keras
import gpu_embed.plot
import gpu_embed.text
from gpu_embed.demo.options import example_parser
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c, save_figure

PHRASES = ["Hope to see you soon", "Nice to see you again"]


def neighbours(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Each word, and one that stands beside it, in both directions."""
    pairs = [pair for phrase in ids for pair in pairwise(phrase)]
    words, beside = np.array(pairs + [(right, left) for left, right in pairs]).T
    return words, beside


def train(table: keras.layers.Layer, ids: list[list[int]], epochs: int) -> list[float]:
    """Guess each word's neighbours from its row; the loss of every epoch."""
    guess = keras.layers.Dense(table.input_dim)
    model = keras.Sequential([keras.Input((), dtype="int64"), table, guess])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # The small decay makes the best table unique: words with the same neighbours end up together.
    optimizer = keras.optimizers.AdamW(0.05, weight_decay=0.02)
    model.compile(optimizer, loss)
    words, beside = neighbours(ids)
    history = model.fit(words, beside, batch_size=len(words), epochs=epochs, verbose=0)
    losses: list[float] = history.history["loss"]
    return losses


def main() -> None:
    quick = "few epochs, to see that it runs"
    parser = example_parser(__doc__, quick, picture="keras_phrases.png", seed=True, device=False)
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    print(describe_backend())

    # Counted from 0: no word is padding, and every row is a word's.
    tokenizer = gpu_embed.text.vocabulary(PHRASES, lowercase=True)
    ids = gpu_embed.text.encode(tokenizer, PHRASES).tolist()
    words = [tokenizer.id_to_token(i) for i in range(gpu_embed.text.table_size(tokenizer))]
    table = gpu_embed.keras.Embedding(len(words), 2)
    table.build()
    for phrase, row in zip(PHRASES, ids, strict=True):
        print(f"{phrase!r:25} -> {row}")

    losses = train(table, ids, epochs=120 if args.quick else 200)
    print(f"Embedding({len(words)}, 2): loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    rows = keras.ops.convert_to_numpy(table(np.arange(len(words))))
    for word, row in zip(words, rows, strict=True):
        print(f"{word:6} {row[0]:6.2f} {row[1]:6.2f}")
    for left, right in (("hope", "nice"), ("soon", "again")):
        distance = np.linalg.norm(rows[words.index(left)] - rows[words.index(right)])
        print(f"{left!r} and {right!r} have the same neighbours: {distance:.2f} apart")

    # Counted from 1: row 0 is the padding's, which mask_zero leaves out.
    padded = gpu_embed.text.vocabulary(PHRASES, lowercase=True, padding="[PAD]")
    ids = gpu_embed.text.encode(padded, [*PHRASES, "see you"])
    print(f"\nwith padding, counted from 1: {ids.tolist()}")
    try:
        gpu_embed.text.check_table_size(ids[:2], len(words))
    except ValueError as error:
        print(error)
    masked = gpu_embed.keras.Embedding(len(words) + 1, 2, mask_zero=True)
    print("the third phrase's mask:", masked(ids)._keras_mask[2].tolist())

    title = f"Embedding({len(words)}, 2): words with the same neighbours meet"
    save_figure(gpu_embed.plot.table(table.embeddings.value, words, title=title), args.out)
    print(f"picture: {args.out.resolve()}")


if __name__ == "__main__":
    end_on_ctrl_c(main)
