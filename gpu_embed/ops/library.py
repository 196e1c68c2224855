"""The library of our operators."""

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("gpu_embed", "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator: its schema, its kernel for every device (CompositeExplicitAutograd), and its fake kernel."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gpu_embed::{name}", fake, lib=library)
    return getattr(torch.ops.gpu_embed, name).default
