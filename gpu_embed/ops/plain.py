"""What the dispatcher has nothing to do for: plain tensors in eager mode."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _dispatch_keys(*keys: torch._C.DispatchKey) -> int:
    """The raw representation of a set of keys."""
    key_set = torch._C.DispatchKeySet(keys[0])
    for key in keys[1:]:
        key_set = key_set.add(key)
    return key_set.raw_repr()


_Key = torch._C.DispatchKey
# What a tensor with data of its own carries: no wrapper, no lazy conjugate, no fake.
PLAIN_TENSORS = frozenset(
    (
        _dispatch_keys(_Key.CPU, _Key.ADInplaceOrView, _Key.AutogradCPU, _Key.AutocastCPU),
        _dispatch_keys(_Key.CUDA, _Key.ADInplaceOrView, _Key.AutogradCUDA, _Key.AutocastCUDA),
    )
)
# What eager mode turns on, without and with inference mode: no tracer, no functorch, no dispatch mode.
PLAIN_MODES = frozenset(
    (_dispatch_keys(_Key.BackendSelect, _Key.ADInplaceOrView), _dispatch_keys(_Key.BackendSelect))
)
included_keys = torch._C._dispatch_tls_local_include_set
profiler_enabled = torch.autograd._profiler_enabled


def is_plain_call(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the dispatcher would go straight to autograd and from there to the kernel."""
    if (
        torch.compiler.is_compiling()
        or included_keys().raw_repr() not in PLAIN_MODES
        or forward_ad._current_level >= 0
        or profiler_enabled()
    ):
        return False
    keys = torch._C._dispatch_keys(first)
    for tensor in others:
        if tensor is not None:
            keys = keys | torch._C._dispatch_keys(tensor)
    return keys.raw_repr() in PLAIN_TENSORS
