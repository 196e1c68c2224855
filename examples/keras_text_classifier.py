"""A text classifier in Keras: from which part of Python's standard library does a docstring come?

    pip install ".[demo,keras,text]"
    python examples/keras_text_classifier.py

The texts are the docstrings of this Python's own library, read from its source files, so nothing is downloaded. The
model averages the rows of a text's words and looks at the average; it is measured on docstrings that it has not
seen, beside guessing the largest part. The picture shows the rows of the words that say the most.
"""

import ast
import inspect
import os
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Read when keras is first imported.
os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

import gpu_embed.keras
import gpu_embed.plot
import gpu_embed.text
from gpu_embed.demo.options import example_parser, positive
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c, save_figure

PADDING, UNKNOWN = "[PAD]", "[UNK]"
WORDS = 50  # of a text; what is longer is cut
# Not the library: tests, installers, an editor, and what its authors generate.
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "ensurepip", "idlelib", "pydoc_data"}


@dataclass(frozen=True)
class Texts:
    """Texts as ids, and the part of the library that each is from."""

    ids: np.ndarray  # [texts, WORDS], 0 where there is no word
    part: np.ndarray  # [texts]


def docstrings(num_parts: int) -> list[tuple[str, list[str]]]:
    """The packages of the library with the most docstrings, and those, each once, in the order of their files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, dict[str, None]] = {}
    for file in sorted(library.rglob("*.py")):
        names = file.relative_to(library).with_suffix("").parts
        # A part is a package, not a single file.
        if len(names) == 1 or LEFT_OUT.intersection(names):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        # Some files are there to be wrong.
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
                # The part's own name would give it away.
                text = re.sub(names[0], " ", text, flags=re.IGNORECASE)
                if len(text.split()) >= 4:
                    found.setdefault(names[0], {})[text] = None
    largest = sorted(found.items(), key=lambda item: -len(item[1]))[:num_parts]
    return [(name, list(texts)) for name, texts in largest]


def classifier(num_words: int, num_parts: int, dim: int) -> keras.Model:
    """The average of a text's rows, and a small network that looks at it."""
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int64"),
            gpu_embed.keras.Embedding(num_words, dim, mask_zero=True, name="table"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(num_parts),
        ]
    )


class Bar(keras.callbacks.Callback):
    """Keras's progress on a bar."""

    def __init__(self, progress: Progress, epochs: int) -> None:
        super().__init__()
        self.progress = progress
        self.task = progress.add_task("training", total=epochs, said="")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        said = f"loss {logs['loss']:.3f}, accuracy on unseen texts {logs['val_accuracy']:.3f}"
        self.progress.update(self.task, advance=1, said=said)


def telling_words(model: keras.Model, known: np.ndarray, each: int) -> tuple[np.ndarray, list[int]]:
    """The ids of the words that alone speak most for a part, `each` a part -> (ids, their parts)."""
    scores = model.predict(known[:, None], verbose=0, batch_size=1024)
    ids: list[int] = []
    parts: list[int] = []
    for part in range(scores.shape[1]):
        own = [i for i in np.argsort(-scores[:, part]) if scores[i].argmax() == part][:each]
        ids += known[own].tolist()
        parts += [part] * len(own)
    return np.array(ids), parts


def draw(
    history: dict[str, list[float]],
    majority: float,
    table: np.ndarray,
    labels: list[str],
    groups: list[str],
) -> Figure:
    """Accuracy by epoch beside the majority's; the rows of the telling words."""
    figure = Figure(figsize=(14, 7), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.5])
    epochs = range(1, len(history["accuracy"]) + 1)
    left.plot(epochs, history["val_accuracy"], "o-", label="docstrings not seen")
    left.plot(epochs, history["accuracy"], "o-", color="C7", label="docstrings trained on")
    left.axhline(majority, color="C3", linestyle="--", label="guessing the largest part")
    left.set(title="Which part of the library is it from?", xlabel="epoch", ylabel="accuracy")
    left.set_ylim(0, 1)
    left.locator_params(axis="x", integer=True)
    left.grid(alpha=0.3)
    left.legend(loc="lower right")
    title = "Rows of the words that say the most, by the part they speak for"
    gpu_embed.plot.table(
        keras.ops.convert_to_tensor(table), labels, groups=groups, title=title, axes=right
    )
    return figure


def main() -> None:
    quick, picture = "four parts, to see that it runs", "keras_text_classifier.png"
    parser = example_parser(__doc__, quick, picture=picture, seed=True, device=False)
    parser.add_argument("--epochs", type=positive, help="(default: 15; 8 with --quick)")
    args = parser.parse_args()
    epochs, num_parts, dim = args.epochs or (8 if args.quick else 15), 4 if args.quick else 6, 64
    console = Console(highlight=False, soft_wrap=True)
    keras.utils.set_random_seed(args.seed)
    console.print(describe_backend())

    parts = docstrings(num_parts)
    texts = [(text, number) for number, (_, found) in enumerate(parts) for text in found]
    order = np.random.default_rng(args.seed).permutation(len(texts))
    split = len(texts) // 5
    held_out, seen = ([texts[i] for i in chosen] for chosen in (order[:split], order[split:]))
    tokenizer = gpu_embed.text.vocabulary(
        (text for text, _ in seen), "frequency", padding=PADDING, unknown=UNKNOWN, lowercase=True
    )
    tokenizer.enable_truncation(WORDS)

    def encoded(some: list[tuple[str, int]]) -> Texts:
        ids = gpu_embed.text.encode(tokenizer, [text for text, _ in some])
        return Texts(ids.numpy(), np.array([number for _, number in some]))

    train, test = encoded(seen), encoded(held_out)
    num_words = gpu_embed.text.table_size(tokenizer)
    sizes = ", ".join(f"{name} {len(found)}" for name, found in parts)
    console.print(f"{len(texts):,} docstrings ({sizes}), of {num_words:,} words")

    model = classifier(num_words, len(parts), dim)
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    said = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress("{task.description}", *said, console=console) as progress:
        history = model.fit(
            train.ids,
            train.part,
            batch_size=64,
            epochs=epochs,
            verbose=0,
            validation_data=(test.ids, test.part),
            callbacks=[Bar(progress, epochs)],
        ).history
    majority = float(np.mean(test.part == np.bincount(train.part).argmax()))
    console.print("accuracy of each epoch:", *(f"{a:.3f}" for a in history["val_accuracy"]))
    console.print(f"guessing the largest part: {majority:.3f}")

    # Words of three letters and more, in at least five texts.
    counts = Counter(id_ for row in train.ids for id_ in set(row.tolist()))
    known = [i for i, n in counts.items() if n >= 5]
    known = [i for i in known if re.fullmatch(r"[a-z]{3,}", tokenizer.id_to_token(i))]
    ids, of_part = telling_words(model, np.array(sorted(known)), each=5)
    labels = [tokenizer.id_to_token(i) for i in ids.tolist()]
    groups = [parts[number][0] for number in of_part]
    for name in dict.fromkeys(groups):
        own = [word for word, group in zip(labels, groups, strict=True) if group == name]
        console.print(f"{name:16} {' '.join(own)}")
    table = model.get_layer("table").embeddings.numpy()[ids]
    save_figure(draw(history, majority, table, labels, groups), args.out)
    console.print(f"picture: {args.out.resolve()}")


if __name__ == "__main__":
    end_on_ctrl_c(main)
