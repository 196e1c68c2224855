"""transformers' Trainer, with row-wise Adagrad for the table of words and AdamW for the rest; checkpoints resume both.

    pip install ".[demo,integration]"
    python examples/trainer_row_wise.py
    python examples/trainer_row_wise.py --resume

A small BERT of random numbers learns which reviews of made-up words are good: those in which more words are good than
bad. Row-wise Adagrad keeps one number a row and updates the rows of the batch; AdamW would keep two tables more, and go
through all rows in every step. Ctrl-C leaves the checkpoints, and --resume goes on from the last one.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import gpu_embed
from gpu_embed.demo.options import example_parser
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c, read_checkpoint, write_whole


class SaveTables(transformers.TrainerCallback):
    """Adds the state of the tables' optimizer to each checkpoint: the Trainer saves only that of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        file = Path(args.output_dir, f"checkpoint-{state.global_step}", "tables.pt")
        # The last file of a checkpoint: where it is, the others are too.
        write_whole(file, partial(torch.save, self.optimizer.state_dict()))


def reviews(number: int, words: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(words, (number, 15), device="cpu")
    # Odd words are good.
    is_good = (ids % 2).sum(1).gt(7).long()
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, is_good, strict=True)]


def main() -> None:
    parser = example_parser(__doc__, "few words and steps, to see that it runs", device=False)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()
    words, steps, folder = (200, 200, "runs/quick") if args.quick else (5000, 2000, "runs/full")
    saved = sorted(Path(folder).glob("*/tables.pt"), key=os.path.getmtime)
    # A Trainer that resumes a training that has ended makes one step more.
    if args.resume and (not saved or saved[-1].parent.name == f"checkpoint-{steps}"):
        parser.error(f"--resume: there is no checkpoint in {folder}, or its training has ended")
    print(describe_backend())

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=words, hidden_size=48, num_hidden_layers=1)
    model = transformers.BertForSequenceClassification(config)
    print(gpu_embed.replace_embeddings(model, pattern="word_embeddings"), flush=True)
    model.get_input_embeddings().sparse = True
    updates = gpu_embed.optim.apply_in_backward(model, gpu_embed.optim.RowWiseAdagrad, lr=0.05)
    settings = transformers.TrainingArguments(
        folder, max_steps=steps, save_steps=steps // 4, per_device_train_batch_size=64, report_to="none",
        learning_rate=1e-3, disable_tqdm=not sys.stderr.isatty(), dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, settings, train_dataset=reviews(4000, words))
    trainer.add_callback(SaveTables(updates.optimizer))
    if args.resume:
        updates.optimizer.load_state_dict(read_checkpoint(saved[-1], "state"))
    trainer.train(resume_from_checkpoint=str(saved[-1].parent) if args.resume else None)
    scores, is_good, _ = trainer.predict(reviews(1000, words))
    print(f"right about {(scores.argmax(1) == is_good).mean():.1%} of the reviews it never saw")


if __name__ == "__main__":
    end_on_ctrl_c(main, left="--resume goes on from the last checkpoint, if there is one")
