"""The padding row of a table that is initialised."""

from typing import Any

import torch

from ..functional.checks import has_dtensor


def zero_padding_row(layer: Any) -> None:
    """Fill the row at `padding_idx` with zeros, as torch's layers do; where rows are sharded, torch's fill a copy."""
    weight, padding_idx = layer.weight, layer.padding_idx
    if padding_idx is None:
        return
    with torch.no_grad():
        if has_dtensor(weight):
            from ..functional.dtensor import zero_row_

            zero_row_(weight, padding_idx)
        else:
            weight[padding_idx].fill_(0)
