"""The targets ptx-cpu and nvrtc-cpu: compiled kernels give the bits that are wanted, and wrong launches are noticed.

The full tier runs the operations' own tests on them (PTX_FILES in tests/support/tiers.py).
"""

import pytest
import targets
import torch
from cases import integer_gradient, same_bits, table
from ptx_backend import CheckedPtxBackend

import gpu_embed
from gpu_embed import backends
from gpu_embed.bags import Bags
from gpu_embed.bench.ptx.counts import counting
from gpu_embed.bench.ptx.launch import PtxBackend, compiled_kernel
from gpu_embed.bench.ptx.launch_cupy import PtxCupyBackend
from gpu_embed.bench.ptx.parse import PtxError
from gpu_embed.functional import embedding, embedding_bag
from gpu_embed.ops.take import take_rows
from gpu_embed.tables.batch import TableBatch
from gpu_embed.tables.layout import make_layout

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CLASSES = {"triton": CheckedPtxBackend, "cupy": PtxCupyBackend}


@pytest.fixture(params=targets.PTX, ids=str)
def ptx_target(request):
    targets.require(request.param)
    return request.param


@pytest.fixture
def run_on(monkeypatch, ptx_target):
    """Serves the operations that follow."""
    load = backends.load

    def serve(backend):
        monkeypatch.setattr(
            backends, "load", lambda name: backend if name == ptx_target.backend else load(name)
        )
        gpu_embed.use_backend(ptx_target.backend)
        return backend

    with gpu_embed.use_backend("auto"):
        yield serve
    # What the error of a wrong launch has left behind.
    backends._selected.clear()


@pytest.fixture
def compiled(run_on, ptx_target):
    backend = run_on(CLASSES[ptx_target.backend]())
    yield backend
    assert backend.launches


@pytest.mark.parametrize(
    ("shape", "dtype", "ids_dtype", "step"),
    [
        ((9, 50), FP32, torch.int64, 1),
        ((300, 64), BF16, torch.int32, 1),
        ((5, 33), FP16, torch.uint8, 1),
        ((7, 5), FP64, torch.int16, 2),
        ((4, 1), torch.int8, torch.int64, 3),
    ],
)
def test_rows_are_copied(compiled, shape, dtype, ids_dtype, step):
    rows, dim = shape
    weight = table(rows, dim * step, dtype, "cpu")[:, ::step]
    ids = torch.arange(70, dtype=ids_dtype) % rows
    assert same_bits(embedding(ids, weight), weight[ids.long()])


def test_an_id_out_of_range_is_recorded(compiled):
    weight, ids = table(9, 16, FP32, "cpu"), torch.arange(40) % 9
    ids[33] = 9
    with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError, match=r"9.*33"):
        embedding(ids, weight)


# 16-bit gradients are always sorted.
@pytest.mark.parametrize(
    ("method", "dtype"), [("atomic", FP32), ("atomic", FP64), ("sorted", FP32), ("sorted", BF16)]
)
def test_gradients_sum_exactly(compiled, method, dtype):
    weight = table(11, 20, dtype, "cpu").requires_grad_()
    ids = torch.arange(200) ** 2 % 11
    grad_output = integer_gradient((200, 20), dtype, "cpu")
    with gpu_embed.use_gradient_method(method):
        embedding(ids, weight, padding_idx=4).backward(grad_output)
    expected = torch.zeros(11, 20).index_add_(0, ids, grad_output.float())
    expected[4] = 0
    assert torch.equal(weight.grad, expected.to(dtype))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_have_the_bits_of_the_other_target(run_on, ptx_target, mode):
    """Of Triton's interpreter, or of the host build."""
    other = targets.Target(ptx_target.backend, "cpu")
    targets.require(other)
    ids, offsets = torch.arange(60) * 7 % 13, torch.tensor([0, 3, 3, 40])
    grad_output = integer_gradient((4, 24), FP32, "cpu")
    results = []
    for target in (ptx_target, other):
        run_on(targets.stand_in(target) or backends.load(target.backend))
        weight = table(13, 24, FP32, "cpu").round().requires_grad_()
        output = embedding_bag(ids, weight, offsets, mode=mode)
        output.backward(grad_output)
        results.append((output, weight.grad))
    (output, gradient), expected = results
    assert same_bits(output, expected[0])
    assert torch.allclose(gradient, expected[1], rtol=2**-20, atol=2**-20)


def test_many_tables_are_looked_up_at_once(compiled):
    sizes = {"user": (5, 8), "item": (7, 4)}
    layer = gpu_embed.TableBatchedEmbeddingBag(sizes)
    ids, offsets = torch.tensor([0, 4, 2, 6, 1, 1]), torch.tensor([0, 2, 3, 5, 6])
    output = layer(ids, offsets)
    expected = [
        torch.nn.functional.embedding_bag(
            ids[first:last], layer[name], torch.tensor(starts), mode="sum"
        )
        for name, first, last, starts in (("user", 0, 3, [0, 2]), ("item", 3, 6, [0, 2]))
    ]
    assert torch.allclose(output, torch.cat(expected, 1), rtol=2**-20, atol=2**-20)


def test_rows_are_taken_and_converted(compiled):
    weight, ids = table(7, 6, FP32, "cpu"), torch.tensor([-1, 0, 3])
    assert same_bits(take_rows(weight, ids, BF16), weight[[6, 0, 3]].to(BF16))


def test_what_a_lookup_moves_is_counted(compiled):
    weight, ids = table(64, 64, FP32, "cpu"), torch.arange(64)
    # Behind the first launch of what was compiled come those that check it.
    embedding(ids, weight)
    with counting() as launches:
        embedding(ids, weight)
    (counts,) = launches
    assert "gather" in counts.kernel
    assert counts.loads.distinct_sectors == (weight.nbytes + ids.nbytes) // 32
    assert counts.stores.distinct_sectors == counts.stores.sectors == weight.nbytes // 32
    assert 0 < counts.longest_warp <= counts.instructions // counts.num_warps


def ids_of_tables(indices):
    layout = make_layout([(4096, 8), (5, 8)], "sum", None)
    offsets = torch.arange(0, len(indices) + 1, len(indices) // 2)[[0, 1, -1]]
    fields, columns = layout.fields("cpu"), layout.table_of_column("cpu")
    return TableBatch(indices, offsets, fields, columns, layout.shape(True))


# Each makes something of every id.
OF_EACH_ID = {
    "sort_keys": lambda backend, ids: backend._sorted_keys(ids, 4096, -1),
    "bag_of": lambda backend, ids: backend._bag_of_positions(Bags(ids, ids[:9], 9), None, -1),
    "bag_of, equal lengths": lambda backend, ids: backend._bag_of_positions(
        Bags(ids, None, 7), None, -1
    ),
    "select_rows": lambda backend, ids: backend._select_rows(
        ids, torch.ones(4096, dtype=torch.uint8), torch.empty_like(ids)
    ),
    "keys of tables": lambda backend, ids: backend._sorted_row_keys(ids_of_tables(ids)),
    "bags of tables": lambda backend, ids: backend._output_bags(ids_of_tables(ids), None),
}


@pytest.mark.parametrize("call", OF_EACH_ID.values(), ids=OF_EACH_ID)
@pytest.mark.parametrize("num_ids", [3072, 3073, 3080])
def test_what_is_made_of_each_id_is_stored_together(call, num_ids):
    """Also where no vectors fit: adjacent lanes store adjacent numbers, and read adjacent ids."""
    ids = torch.zeros(num_ids, dtype=torch.int64)
    with counting() as launches:
        call(PtxBackend(), ids)
    (counts,) = launches
    assert counts.stores.sectors == counts.stores.distinct_sectors > 0


def test_ids_are_counted_without_shared_memory():
    with counting() as launches:
        PtxBackend().embedding_counts(torch.arange(3073), 4096)
    (counts,) = launches
    assert counts.loads.sectors == counts.loads.distinct_sectors
    assert counts.shared_requests == counts.barriers == 0


@pytest.mark.parametrize("embedding_dim", [1, 64, 128, 300])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_to_find_nothing_to_join_takes_little(embedding_dim, mode):
    """Bags short enough, though their offsets do not tell before the launch."""
    bags = Bags(torch.zeros(2048, dtype=torch.int64), torch.arange(0, 2048, 64), 32)
    with counting() as launches:
        PtxBackend().embedding_bag(torch.ones(3, embedding_dim), None, bags, -1, mode, None)
    sums, join = launches
    assert join.kernel == "bag_join_kernel"
    assert join.instructions <= 0.1 * sums.instructions


def test_bags_that_are_short_on_average_take_one_launch():
    bags = Bags(torch.zeros(2048, dtype=torch.int64), torch.arange(0, 2048, 32), 64)
    with counting() as launches:
        output = PtxBackend().embedding_bag(torch.ones(3, 8), None, bags, -1, "sum", None)
    assert [launch.kernel for launch in launches] == ["bag_sum_kernel"]
    assert output.eq(32).all()


# A wrong launch.


def changed(ptx_target, change, kernel=""):
    """A backend that compiles for what is asked, and launches something else: each kernel, or the first of a name."""

    class Changed(CLASSES[ptx_target.backend]):
        def _run(self, binary, grid, arguments, *threads):
            if self.launches[kernel] == 1 or not kernel:
                grid, arguments = change(grid, arguments)
            super()._run(binary, grid, arguments, *threads)

    return Changed()


def with_argument(name, change):
    return lambda grid, arguments: (grid, {**arguments, name: change(arguments[name])})


def swapped(first, second):
    return lambda grid, arguments: (
        grid,
        {**arguments, first: arguments[second], second: arguments[first]},
    )


CHANGES = {
    "one program too few": lambda grid, arguments: ((grid[0] - 1, *grid[1:]), arguments),
    "one id too many": with_argument("num_indices", lambda n: n + 1),
    "a row too few": with_argument("num_embeddings", lambda n: n - 1),
    "a doubled stride": with_argument("weight_row_stride", lambda stride: 2 * stride),
    "swapped numbers": swapped("num_indices", "num_embeddings"),
    "swapped pointers": swapped("indices_ptr", "output_ptr"),
    # Compiled for addresses that are multiples of 16 bytes.
    "a wrong claim of alignment": with_argument(
        "weight_ptr", lambda table: getattr(table, "tensor", table).reshape(-1)[1:]
    ),
}


def gather(run_on, backend):
    # A step from row to row that is not their width is an argument of the launch.
    weight, ids = table(300, 80, FP32, "cpu")[:, :64], torch.arange(65) * 37 % 300
    ids[0] = 299
    run_on(backend)
    with gpu_embed.set_bounds_check("off"):
        return same_bits(embedding(ids, weight), weight[ids])


def test_a_launch_that_is_not_changed_is_right(run_on, ptx_target):
    assert gather(run_on, changed(ptx_target, lambda grid, arguments: (grid, arguments)))


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_launch_is_noticed(run_on, ptx_target, change):
    try:
        right = gather(run_on, changed(ptx_target, CHANGES[change]))
    except PtxError:
        right = False
    assert not right


# What nobody has written.


def test_an_output_that_is_not_written_to_its_end_is_noticed(run_on, ptx_target):
    backend = changed(ptx_target, CHANGES["one program too few"])
    with pytest.raises(PtxError, match=r"caller of \w+ gets a tensor \[65, 64\] of which .* at \["):
        gather(run_on, backend)


def test_partial_sums_that_are_read_before_they_are_written_are_noticed(run_on, ptx_target):
    """The second launch reads what the first one has left out."""
    weight, ids = table(50, 64, FP32, "cpu").requires_grad_(), torch.arange(4000) % 50
    run_on(changed(ptx_target, CHANGES["one program too few"], "segment_sum_kernel"))
    with gpu_embed.use_gradient_method("sorted"):
        output = embedding(ids, weight).sum()
        with pytest.raises(
            PtxError,
            match=r"segment_\w+\.(py|cuh):.*\bpartial_ptr of .* was read before it was written",
        ):
            output.backward()


def test_a_kernel_is_compiled_with_its_decorators_arguments():
    """Also where it was imported for Triton's interpreter, which the tests run in."""
    row_update = pytest.importorskip("gpu_embed.kernels.row_update")
    parameters = compiled_kernel(row_update.row_update_kernel).params
    fixed = {one.name for one in parameters if one.do_not_specialize}
    assert fixed == {"weight_row_stride", "seed", "step"}
