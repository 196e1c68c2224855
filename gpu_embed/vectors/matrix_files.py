"""Matrices in `.npy` and safetensors files, memory-mapped, with words from elsewhere."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .reading import Settings, warn_of_repeated
from .text_file import BOM
from .vectors import Vectors

NPY = b"\x93NUMPY"


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes begins with a length and a JSON object of that length."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def read_matrix(
    path: str,
    words: Sequence[str] | str | os.PathLike[str] | None,
    tensor: str | None,
    settings: Settings,
) -> Vectors:
    """Raises ValueError for what is no matrix of floats with a word for each row."""
    if words is None:
        raise ValueError(
            "the file has a matrix and no words: name its rows by words=, a list or a file with a word a line"
        )
    if isinstance(words, str | os.PathLike):
        words = _lines(os.fspath(words), settings)
    if isinstance(words, np.ndarray):
        words = words.tolist()
    if not isinstance(words, Sequence):
        raise TypeError(
            f"words= must be a list in the order of the rows, or a file, got {type(words).__name__}"
        )
    with open(path, "rb") as file:
        is_npy = file.read(len(NPY)) == NPY
    matrix = _array(path) if is_npy else _tensor(path, tensor, settings)
    if matrix.ndim == 0:
        raise ValueError("expected a matrix, got one number")
    if len(words) != len(matrix):
        raise ValueError(f"the matrix has {len(matrix):,} rows, and there are {len(words):,} words")
    words, matrix = words[: settings.limit], matrix[: settings.limit]
    places: dict[str, int] = {}
    repeated = [word for place, word in enumerate(words) if places.setdefault(word, place) != place]
    if repeated:
        warn_of_repeated(repeated)
        words, matrix = list(places), matrix[list(places.values())]
    return Vectors(words, matrix).converted(settings.dtype)


def _lines(path: str, settings: Settings) -> list[str]:
    """The words of a file; only "\\n" and "\\r\\n" end a line."""
    lines = Path(path).read_bytes().removeprefix(BOM).split(b"\n")
    if not lines[-1]:
        lines.pop()
    return settings.decode([line.removesuffix(b"\r") for line in lines])


def _array(path: str) -> NDArray:
    try:
        matrix: NDArray = np.load(path, mmap_mode="r")
    # Of a header that is no Python, whatever Python says of that.
    except Exception as error:
        raise ValueError(f"NumPy cannot read it: {error}") from error
    return matrix


def _tensor(path: str, name: str | None, settings: Settings) -> NDArray | Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        # By torch, which maps the file; as NumPy's arrays they are copied.
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if name is None and len(names) == 1:
                (name,) = names
            if name not in names:
                raise ValueError(
                    f"tensor= must name one of its tensors, {', '.join(names)}; got {name!r}"
                )
            tensor: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"safetensors cannot read it: {error}") from error
    if tensor.dtype == torch.bfloat16:
        if settings.dtype is None:
            raise ValueError(
                "the tensor is bfloat16, which NumPy does not have: give dtype='float32'"
            )
        return tensor.float()
    return tensor
