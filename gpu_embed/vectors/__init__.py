"""Pretrained word vectors into a table, and a trained table back into a file (extra `vectors`).

vectors = gpu_embed.vectors.load("glove.6B.100d.txt")
table, report = vectors.embedding(tokenizer, padding="[PAD]", texts=texts)
print(report)
gpu_embed.vectors.Vectors.from_module(table, tokenizer).save("trained.vec")
"""

from importlib.util import find_spec as _find_spec

for _package in ("gensim", "pyarrow", "rich", "safetensors"):
    if _find_spec(_package) is None:
        raise ModuleNotFoundError(
            f"gpu_embed.vectors needs {_package}: "
            'install the extra "vectors" (from a clone: pip install ".[vectors]")',
            name=_package,
        )

from .loading import load  # noqa: E402
from .table_rows import TableReport  # noqa: E402
from .vectors import Vectors  # noqa: E402

__all__ = ["TableReport", "Vectors", "load"]
