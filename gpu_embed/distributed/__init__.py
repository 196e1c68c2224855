"""Tables on several ranks: styles for `torch.distributed.tensor.parallel.parallelize_module`, and a layer of its own.

A `gpu_embed.Embedding` takes torch's own RowwiseParallel and ColwiseParallel; the styles here are for bags, which those
refuse. `ShardedEmbedding` is for ranks that each have ids of their own.
"""

from .bag_parallel import ColwiseBagParallel, RowwiseBagParallel
from .sharded_embedding import ShardedEmbedding

__all__ = ["ColwiseBagParallel", "RowwiseBagParallel", "ShardedEmbedding"]
