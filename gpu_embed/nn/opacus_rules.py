"""Opacus finds its per-sample gradients by a layer's exact type: ours get the rules of torch's.

Opacus need not be there, and may be imported before or after this package.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import functional

NAME = "opacus.grad_sample"


def register_once_imported(
    embedding: type[torch.nn.Embedding], embedding_bag: type[torch.nn.EmbeddingBag]
) -> None:
    """Give Opacus rules for these types, now or as soon as it is imported."""
    finder = _Finder(embedding, embedding_bag)
    if NAME in sys.modules:
        finder.register(sys.modules[NAME])
    else:
        sys.meta_path.insert(0, finder)


class _Finder:
    """Finds nothing itself: lets the other finders import Opacus, and then registers the rules."""

    def __init__(
        self, embedding: type[torch.nn.Embedding], embedding_bag: type[torch.nn.EmbeddingBag]
    ) -> None:
        self._embedding = embedding
        self._embedding_bag = embedding_bag

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != NAME:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self.register(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            loader.exec_module = exec_module
        return spec

    def register(self, opacus: Any) -> None:
        if not hasattr(opacus, "register_norm_sampler"):
            return  # Before Opacus 1.5.
        grad_samplers = opacus.GradSampleModule.GRAD_SAMPLERS
        norm_samplers = opacus.GradSampleModuleFastGradientClipping.NORM_SAMPLERS
        of_offsets = grad_samplers[torch.nn.EmbeddingBag]

        def of_bags(layer: Any, inputs: list[Tensor], backprops: Tensor) -> Any:
            # Of bags [B, L] Opacus's rule knows nothing.
            return (of_rows if len(inputs) == 1 else of_offsets)(layer, inputs, backprops)

        opacus.register_grad_sampler(self._embedding)(grad_samplers[torch.nn.Embedding])
        opacus.register_norm_sampler(self._embedding)(norm_samplers[torch.nn.Embedding])
        opacus.register_grad_sampler(self._embedding_bag)(of_bags)


def of_rows(
    layer: torch.nn.EmbeddingBag, inputs: list[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    """Per-sample gradients of a layer's weight, as Opacus's rules return them -> [B, V, D].

    Args:
        inputs: the ids, [B, L].
        backprops: the gradient of the output, [B, D].
    """

    def loss(weight: Tensor, indices: Tensor, backprop: Tensor) -> Tensor:
        # Past the layer, whose hooks are Opacus's.
        output = functional.embedding_bag(
            indices[None],
            weight,
            scale_grad_by_freq=layer.scale_grad_by_freq,
            mode=layer.mode,
            padding_idx=layer.padding_idx,
        )
        return (output[0] * backprop).sum()

    per_sample: Any = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    return {layer.weight: per_sample(layer.weight, *inputs, backprops)}
