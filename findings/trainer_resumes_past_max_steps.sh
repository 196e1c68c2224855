#!/usr/bin/env bash
# transformers 5.24.0 (accelerate 1.15.0): a Trainer that resumes a finished training makes a step beyond max_steps.
#
# Expected: nothing is left to do, so train(resume_from_checkpoint=...) with the last checkpoint ends at step max_steps and writes
# nothing, as it does where max_steps is the end of an epoch.
# Seen: where max_steps lies within an epoch it makes one step more, 13 of 12, and saves checkpoint-13. What updates weights
# by its own means in that step changes the model. No error, no warning.
#
# Exits 0 while that is so, 1 once it has changed. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat > resume.py <<'PYTHON'
import warnings

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import logging

warnings.simplefilter("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()


def last_step(max_steps, resume=None):
    """An epoch has 8 steps."""
    config = BertConfig(
        vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    examples = [{"input_ids": torch.arange(4) + i, "labels": i % 2} for i in range(32)]
    arguments = TrainingArguments(
        f"run{max_steps}",
        max_steps=max_steps,
        save_steps=4,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=examples)
    return trainer.train(resume_from_checkpoint=resume).global_step


seen = {}
for max_steps in (8, 12):
    first = last_step(max_steps)
    seen[max_steps] = first, last_step(max_steps, f"run{max_steps}/checkpoint-{max_steps}")
print(f"max_steps: (trained to, resumed to): {seen}")
raise SystemExit(0 if seen == {8: (8, 8), 12: (12, 13)} else "changed")
PYTHON
"$folder/env/bin/python" resume.py | grep "^max_steps"
