"""A sorted gradient or row update in two launches: how it is cut, and what it launches and allocates."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpu_embed
from gpu_embed.backends._cupy import CupyBackend
from gpu_embed.backends._plan.carries import MAX_PARTIAL_BYTES, MIN_CHUNK, chunk_size, cut
from gpu_embed.backends._triton import TritonBackend
from gpu_embed.row_update import RowUpdate


class Allocations(TorchDispatchMode):
    """Counts storages that an operator makes: a view is none, and each of torch.sort's two outputs is one.

    What torch.sort takes for itself is not seen here.
    """

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        made = {t.untyped_storage().data_ptr() for t in tensors(result) if t.numel()}
        self.number += len(made - given)
        return result


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def launches_nothing(backend):
    """The backend on CPU tensors; its launches are written down by name."""

    class Recorder(backend):
        def __init__(self):
            super().__init__()
            self.launched = []

        def _launch(self, kernel, *arguments, **settings):
            self.launched.append(
                getattr(kernel, "__name__", None) or kernel.expression.split("<")[0]
            )

    return Recorder()


@pytest.fixture(params=[TritonBackend, CupyBackend], ids=["triton", "cupy"])
def backend(request):
    if request.param is TritonBackend:
        pytest.importorskip("triton")
    return launches_nothing(request.param)


SIZES = [512, 4096, 32_768]


@pytest.mark.parametrize("num_indices", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [False, True], ids=["", "scale_grad_by_freq"])
def test_a_sorted_backward_has_three_launches_and_five_tensors(backend, num_indices, dtype, scale):
    """The gradient, the keys, what torch.sort returns, and one buffer for the carries and their counts."""
    grad_output = torch.zeros(num_indices, 16, dtype=dtype)
    indices = torch.zeros(num_indices, dtype=torch.int64)
    with gpu_embed.use_gradient_method("sorted"), Allocations() as allocations:
        backend.embedding_dense_backward(grad_output, indices, 100, -1, scale)
    assert backend.launched == ["sort_keys_kernel", "segment_sum_kernel", "segment_sum_kernel"]
    assert allocations.number == 5


@pytest.mark.parametrize("num_indices", SIZES)
def test_a_row_update_has_three_launches_and_four_tensors(backend, num_indices):
    weight = torch.zeros(100, 16)
    values = torch.zeros(num_indices, 16)
    indices = torch.zeros(num_indices, dtype=torch.int64)
    with Allocations() as allocations:
        backend.row_update_(RowUpdate("sgd", step_size=0.1), weight, (), indices, values, None)
    assert backend.launched == ["sort_keys_kernel", "row_update_kernel", "row_update_kernel"]
    assert allocations.number == 4


def test_one_chunk_has_nothing_to_join(backend):
    grad_output = torch.zeros(MIN_CHUNK, 16)
    indices = torch.zeros(MIN_CHUNK, dtype=torch.int64)
    with gpu_embed.use_gradient_method("sorted"):
        backend.embedding_dense_backward(grad_output, indices, 100, -1, False)
    assert backend.launched == ["sort_keys_kernel", "segment_sum_kernel"]


def test_a_chunk_grows_with_the_root_of_the_number_of_keys():
    sizes = {number: chunk_size(number, 64, 4) for number in (1, 512, 4096, 4097, 32_768, 2**20)}
    assert sizes == {1: 16, 512: 16, 4096: 16, 4097: 32, 32_768: 64, 2**20: 256}


def test_partial_sums_of_wide_rows_stay_within_their_limit():
    keys = torch.empty(2**20, dtype=torch.int32, device="meta")
    carries = cut(keys, 2**14, torch.float32)
    assert carries.chunk_size == 4096
    assert carries.partial.nbytes <= MAX_PARTIAL_BYTES
    # A chunk of all keys has no partial sums to speak of, however wide the rows are.
    assert cut(keys, 2**24, torch.float32).num_chunks == 1


def test_counts_lie_behind_the_partial_sums():
    keys = torch.empty(100, dtype=torch.int32)
    num_chunks = -(-100 // MIN_CHUNK)
    assert cut(keys, 8, torch.float32).partial.shape == (2 * num_chunks * 8,)
    assert cut(keys, 8, torch.float32, counted=True).partial.shape == (2 * num_chunks * 9,)
    assert cut(keys, 8, torch.float32, atomic=True).partial is None
