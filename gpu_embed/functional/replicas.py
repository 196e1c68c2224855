"""max_norm under data parallelism: a forward that writes to its table may have a copy of it in hand."""

import sys
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def check_renorm_lasts(weight: Tensor) -> None:
    """Raise NotImplementedError where a scaled row is lost; warn once where the other ranks do not have it.

    In a compiled graph nothing is checked.
    """
    if is_gathered(weight):
        raise NotImplementedError(
            "max_norm under FSDP scales rows of a gathered copy of the table, which is thrown away: the table itself "
            "would never change. Keep the table out of FSDP (fully_shard's ignored_params, or a module of its own), "
            "shard it by rows with torch.distributed.tensor.parallel.RowwiseParallel, or leave max_norm out"
        )
    if DistributedDataParallel._active_ddp_module is not None:
        _warn_of_replicas()


@cache
def _warn_of_replicas() -> None:
    warnings.warn(
        "max_norm under DistributedDataParallel: each rank scales the rows that its own ids name, so the ranks' tables "
        "drift apart. Shard the table by rows (torch.distributed.tensor.parallel.RowwiseParallel), or scale the rows "
        "of all ranks yourself after each step",
        stacklevel=2,
    )


def is_gathered(weight: Tensor) -> bool:
    """Whether FSDP made this tensor for one forward, from what its ranks hold."""
    # FSDP's first version: a view of a flat parameter.
    if getattr(weight._base, "_is_flat_param", False):
        return True
    return any(weight is getattr(param, "_unsharded_param", None) for param in _fsdp_params())


def _fsdp_params() -> Iterator[Any]:
    """What fully_shard knows of each parameter, by torch's private names; nothing where they have changed."""
    states = sys.modules.get("torch.distributed._composable_state")
    for state in list(getattr(states, "_module_state_mapping", {}).values()):
        for group in getattr(state(), "_fsdp_param_groups", ()):
            yield from getattr(group, "fsdp_params", ())
