"""Whether torch.export records what runs."""

import torch


def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which graphs of torch.compile are told is true by older versions of torch.

    Asked behind `is_compiling`, which is torch's own and costs an eager call less.
    """
    return torch.compiler._is_exporting_flag
