"""A run of a model, seen from below: which tables it looks up with torch's operator, and which it reads."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpu_embed
from gpu_embed import backends
from gpu_embed.swap.verification import same_bits


def place_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins: the same for a table and its views."""
    return tensor.untyped_storage().data_ptr()


class Watch(TorchDispatchMode):
    """
    Attributes:
        lookups: how often each table was looked up but by a swapped module.
        read: the tables that some operator got.
    """

    def __init__(self, left_alone: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.lookups: Counter[int] = Counter()
        self.read: set[int] = set()
        self._left_alone = left_alone
        self._within = 0
        # What lies somewhere keeps others from lying there.
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self.read.add(place_of(one))
        if func is torch.ops.aten.embedding.default and not self._within:
            self._kept.append(args[0])
            self.lookups[place_of(args[0])] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Count the calls of modules that were left alone, whatever they do."""

        def before(module: Any, *_: Any) -> None:
            self.lookups[place_of(module.weight)] += 1
            self._within += 1

        def after(*_: Any) -> None:
            self._within -= 1

        hooks = []
        for module in self._left_alone:
            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.register_forward_hook(after, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def overridden(places: Mapping[int, int]) -> Iterator[tuple[Counter[int], set[int]]]:
    """A block under override_aten that counts how often our kernel looks up in these tables, and where it errs."""
    triton = backends.load("triton")
    counted: Counter[int] = Counter()
    wrong: set[int] = set()
    gather = triton.embedding

    def embedding(weight: Tensor, indices: Tensor, *rest: Any) -> Tensor:
        rows = weight.index_select(0, indices.reshape(-1)).view(*indices.shape, weight.shape[1])
        place = place_of(weight)
        # Interpreted, a kernel takes its time: only those that are asked about.
        if place not in places:
            return rows
        counted[place] += 1
        output = gather(weight, indices, *rest)
        if not same_bits(output, rows):
            wrong.add(place)
        return output

    triton.embedding = embedding
    try:
        with gpu_embed.use_backend("triton"), gpu_embed.override_aten(), torch.no_grad():
            yield counted, wrong
    finally:
        del triton.embedding
