"""Keras with pretrained vectors in its table: it is right about words that its training never showed.

    pip install ".[demo,keras,text,vectors]"
    python examples/keras_pretrained.py

Is an animal among these one to four words? A model learns it from half of the words and is asked about the other half:
from random rows it can only guess. Of pretrained rows, training moves those that it sees away from the others. So a
frozen table is better in the end where there are few words, as here; the picture shows all three.
"""

import os
import random

# Read when keras is first imported.
os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from word_vectors import KINDS, shipped_vectors

import gpu_embed.keras
from gpu_embed import text, vectors
from gpu_embed.demo.options import example_parser
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c, save_figure

TABLES = ("random", "pretrained", "pretrained and frozen")
WORDS = " ".join(KINDS.values()).split()


def draw(words: list[str]) -> tuple[list[str], np.ndarray]:
    """500 texts of these words, and whether each has an animal."""
    texts = [random.choices(words, k=random.randint(1, 4)) for _ in range(500)]
    has_animal = [not set(text).isdisjoint(KINDS["animal"].split()) for text in texts]
    return list(map(" ".join, texts)), np.array(has_animal)


def main() -> None:
    parser = example_parser(
        __doc__, "few epochs", picture="keras_pretrained.png", seed=True, device=False
    )
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    print(describe_backend())

    tokenizer = text.vocabulary(WORDS, padding="[PAD]", unknown="[UNK]")
    (seen, labels), (unseen, truth) = draw(WORDS[::2]), draw(WORDS[1::2])
    seen, unseen = (text.encode(tokenizer, texts).numpy() for texts in (seen, unseen))
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for name in track(TABLES, "training", console=Console(soft_wrap=True)):
        table = gpu_embed.keras.Embedding(text.table_size(tokenizer), 300, mask_zero=True)
        table.build()
        if name != "random":
            print(vectors.load(shipped_vectors()).fill(table, tokenizer))
            table.trainable = name == "pretrained"
        pooling, head = keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1, "sigmoid")
        model = keras.Sequential([keras.Input((None,), dtype="int32"), table, pooling, head])
        model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
        epochs, validation = (20 if args.quick else 60), (unseen, truth)
        fitted = model.fit(seen, labels, 32, epochs, verbose=0, validation_data=validation)
        right = fitted.history["val_accuracy"]
        print(f"{name}: right about {right[-1]:.1%} of the texts of unseen words")
        axes.plot(range(1, epochs + 1), right, label=name)
    axes.set(xlabel="epoch", ylabel="right about (share of texts of unseen words)", ylim=(0, 1))
    axes.legend()
    save_figure(figure, args.out)
    print(f"picture: {args.out.resolve()}")


if __name__ == "__main__":
    end_on_ctrl_c(main)
