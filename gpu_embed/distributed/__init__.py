"""Tables on several ranks: styles for `torch.distributed.tensor.parallel.parallelize_module`.

A `gpu_embed.Embedding` takes torch's own RowwiseParallel and ColwiseParallel; these are for bags, which those refuse.
"""

from .bag_parallel import ColwiseBagParallel, RowwiseBagParallel

__all__ = ["ColwiseBagParallel", "RowwiseBagParallel"]
