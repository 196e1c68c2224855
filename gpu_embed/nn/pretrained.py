"""Tables of numbers that others made."""

import numpy as np
import torch
from torch import Tensor


def as_tensor(embeddings: Tensor | np.ndarray) -> Tensor:
    """A tensor as it is; a NumPy array copied, as it may be memory-mapped, or be written to later."""
    if isinstance(embeddings, np.ndarray):
        return torch.from_numpy(np.array(embeddings, embeddings.dtype.newbyteorder("=")))
    return embeddings
