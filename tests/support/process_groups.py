"""Process groups of torch.distributed that a test makes for itself."""

import contextlib

import torch
import torch.distributed


@contextlib.contextmanager
def one_process():
    """A process group of one, on gloo."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
