"""What a backward allocates: 40 bytes an id and 64 MiB beyond the gradient. No GPU: tensors without data.

Each backend runs with its launches left out; launches allocate nothing. What torch.sort allocates inside
is added by its formula.
"""

from importlib.util import find_spec

import pytest
import torch
from tiers import where
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpu_embed
from gpu_embed.backends._cupy import CupyBackend
from gpu_embed.backends._triton import TritonBackend
from gpu_embed.bags import Bags
from gpu_embed.tables.batch import TableBatch
from gpu_embed.tables.layout import make_layout

MIB = 2**20


class WithoutLaunches:
    def _launch(self, *args, **settings):
        pass


class Triton(WithoutLaunches, TritonBackend):
    pass


class Cupy(WithoutLaunches, CupyBackend):
    def _capability(self, device):
        return 9, 0


@pytest.fixture(params=[Triton, Cupy])
def backend(request):
    if request.param is Triton and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return request.param()


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that operators made and that are still referenced; `peak` is their maximum."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.peak = 0
        self._inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._inputs:
                size = allocated(storage.nbytes())
                self._live[storage._cdata] = StorageWeakRef(storage), size
        now = sum(size for _, size in self._live.values())
        if function is torch.ops.aten.sort.stable:
            now += inside_sort(args[0])
        self.peak = max(self.peak, now)
        return result


def allocated(size: int) -> int:
    """What torch's allocator counts for a block: it does not split off a rest of a MiB or less."""
    return size + MIB if size > MIB else size


def inside_sort(keys: Tensor) -> int:
    """torch.sort's own: positions before they are sorted, and CUB's second arrays of keys and of positions.

    CUB's counters, 256 of 4 bytes for each few thousand keys, are less than a byte a key.
    """
    positions = 8 * keys.numel()
    second = keys.numel() * (keys.element_size() + 8 + 1)
    return allocated(positions) + allocated(second)


def peak_beyond_gradient(backend, grad_output, indices, num_embeddings, method) -> int:
    with LiveBytes(grad_output, indices) as live, gpu_embed.use_gradient_method(method):
        grad_weight = backend.embedding_dense_backward(
            grad_output, indices, num_embeddings, 0, False
        )
    return live.peak - grad_weight.nbytes


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


SIZES = [
    (num_indices, num_embeddings)
    for num_indices in (1, 100_000, 3_000_000, 100_000_000)
    for num_embeddings in (100, 65_535, 1_000_000, 3_000_000_000)
]
# More than can be sorted.
FAR = (2**31 + 16, 1_000_000)


def limit(num_indices: int, num_rows: int) -> int:
    """torch.sort's, which follow from the width of the keys, and the partial sums'."""
    per_id = 32 if num_rows < 2**16 else 40 if num_rows < 2**31 else 52
    return per_id * num_indices + 64 * MIB


@pytest.mark.parametrize("embedding_dim", [1, 128, 4096])
@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.bfloat16, "sorted"), (torch.float32, "sorted"), (torch.float32, "atomic")],
    ids=str,
)
@pytest.mark.parametrize(("num_indices", "num_embeddings"), [*SIZES, FAR])
def test_memory_beyond_the_gradient(
    backend, num_indices, num_embeddings, dtype, method, embedding_dim
):
    grad_output = meta(num_indices, embedding_dim, dtype=dtype)
    indices = meta(num_indices, dtype=torch.int64)
    if method == "sorted" and (num_indices, num_embeddings) == FAR:
        with pytest.raises(NotImplementedError, match="Split the batch"):
            peak_beyond_gradient(backend, grad_output, indices, num_embeddings, method)
        return
    peak = peak_beyond_gradient(backend, grad_output, indices, num_embeddings, method)
    assert peak <= limit(num_indices, num_embeddings)


@pytest.mark.parametrize(
    ("dtype", "into", "method"),
    [
        (torch.float32, torch.float32, "atomic"),
        (torch.float32, torch.float32, "sorted"),
        (torch.bfloat16, torch.float32, "atomic"),
        (torch.bfloat16, torch.bfloat16, "sorted"),
    ],
    ids=str,
)
def test_a_gradient_in_place_takes_no_other_table(backend, dtype, into, method):
    """What sorts 4096 ids and holds the partial sums, and nothing where atomics add."""
    grad_output = meta(4096, 512, dtype=dtype)
    indices = meta(4096, dtype=torch.int64)
    grad_weight = meta(1_000_000, 512, dtype=into)
    with (
        LiveBytes(grad_output, indices, grad_weight) as live,
        gpu_embed.use_gradient_method(method),
    ):
        result = backend.embedding_dense_backward(
            grad_output, indices, 1_000_000, 0, False, grad_weight
        )
    assert result is grad_weight
    partial = 2 * (4096 // 16) * 512 * 4
    assert live.peak <= (0 if method == "atomic" else 40 * 4096 + partial + MIB)


# Rows of different lengths are not looked up.
@where(lambda dims, pooled: pooled or len(set(dims)) == 1)
@pytest.mark.parametrize("dims", [(128, 128), (128, 64), (1,)], ids=str)
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "rows"])
@pytest.mark.parametrize(
    ("dtype", "method"), [(torch.bfloat16, "sorted"), (torch.float32, "atomic")]
)
@pytest.mark.parametrize(("num_indices", "num_rows"), SIZES)
def test_memory_of_batched_tables(backend, num_indices, num_rows, dtype, method, pooled, dims):
    """The rows that ids name are gone before the rest comes; bags take 4 bytes more, each."""
    num_bags = max(num_indices // 8, 1)
    layout = make_layout([(num_rows, dim) for dim in dims], "mean" if pooled else "sum", None)
    fields, table_of_column = (
        meta(len(dims), 8, dtype=torch.int64),
        meta(sum(dims), dtype=torch.int32),
    )
    offsets = meta(len(dims) * num_bags + 1, dtype=torch.int64)
    indices = meta(num_indices, dtype=torch.int64)
    batch = TableBatch(indices, offsets, fields, table_of_column, layout.shape(pooled))
    shape = (num_bags, sum(dims)) if pooled else (num_indices, dims[0])
    grad_output = meta(*shape, dtype=dtype)
    with (
        LiveBytes(grad_output, indices, offsets, fields, table_of_column) as live,
        gpu_embed.use_gradient_method(method),
    ):
        grad_weight = backend.table_batched_embedding_dense_backward(
            grad_output, None, batch, layout.buffer_shape
        )
    bags = 4 * len(dims) * num_bags
    num_rows = layout.shape(pooled).num_rows
    assert live.peak - grad_weight.nbytes <= limit(num_indices, num_rows) + bags


VIEWS = {
    "plain": lambda g: g,
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "one row a text": lambda g: g[:, :1].expand(g.shape),
    "columns outside": lambda g: g.permute(2, 1, 0).contiguous().permute(2, 1, 0),
}


@pytest.mark.parametrize("method", ["sorted", "atomic"])
@pytest.mark.parametrize("words", [119, 3000])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("ids_apart", [False, True], ids=["", "ids apart"])
def test_gradients_and_ids_of_any_strides(backend, method, words, view, ids_apart):
    """No copy of the gradient; the copy of ids that are not adjacent is gone before the rest comes."""
    texts = 20_000
    grad_output = view(meta(texts, words, 64, dtype=torch.float32))
    indices = meta(words, texts, dtype=torch.int64).t()
    if not ids_apart:
        indices = meta(texts, words, dtype=torch.int64)
    peak = peak_beyond_gradient(backend, grad_output, indices, 1_000_000, method)
    assert peak <= limit(texts * words, 1_000_000)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("bag_length", [1, 20])
@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.bfloat16, "sorted"), (torch.float32, "sorted"), (torch.float32, "atomic")],
    ids=str,
)
@pytest.mark.parametrize(("num_indices", "num_embeddings"), SIZES)
def test_memory_beyond_the_gradient_of_bags(
    backend, num_indices, num_embeddings, dtype, method, bag_length, mode
):
    """No gradient of each position is made, and its bag's number not before the ids are sorted.

    A mean's sizes come on top, 4 bytes a bag.
    """
    num_bags = max(num_indices // bag_length, 1)
    grad_output = meta(num_bags, 64, dtype=dtype)
    indices, offsets = meta(num_indices, dtype=torch.int64), meta(num_bags, dtype=torch.int64)
    bags = Bags(indices, offsets, num_bags)
    with (
        LiveBytes(grad_output, indices, offsets) as live,
        gpu_embed.use_gradient_method(method),
    ):
        grad_weight = backend.embedding_bag_dense_backward(
            grad_output, None, bags, num_embeddings, 0, mode, False
        )
    sizes = 4 * num_bags * (mode == "mean")
    assert live.peak - grad_weight.nbytes <= limit(num_indices, num_embeddings) + sizes


def test_what_the_measure_sees():
    """A temporary counts while it lives; a view counts once."""
    first = meta(10, MIB, dtype=torch.uint8)
    with LiveBytes(first) as live:
        second = first + 1
        second = second.view(-1)[5:] + 1
        third = torch.sort(second, stable=True)
        del second
        first.sum()
    own = 2 * 11 * MIB
    assert own < live.peak
    size = 10 * MIB - 5
    assert live.peak == 3 * MIB + 2 * size + 8 * size + 2 * MIB + 8 * size + 10 * size
    assert third.values.numel() == size
