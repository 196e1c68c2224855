"""The backend of the target ptx-cpu: what a test compiles of gather and scatter_add is tried on more ids than its own.

A test asks one question of a kernel, and what Triton compiles for it may be launched by no other test. So the first
launch of each compiled lookup and atomic gradient is followed by launches of the same code on the inputs below, whose
every bit NumPy foretells.
"""

from typing import Any

import numpy as np
from ptx_launches import (
    Input,
    Launch,
    Launches,
    Specialization,
    bad_id_at,
    good_ids,
    in_table,
    some_bad_ids,
)

from gpu_embed.bench.ptx import launch as ptx_launch
from gpu_embed.bench.ptx.launch import PtxBackend
from gpu_embed.bench.ptx.machine import Program

KERNELS = ("gather_rows_kernel", "gather_flat_kernel", "scatter_add_kernel")
# By what Triton compiled.
seen: dict[str, Specialization] = {}


class CheckedPtxBackend(PtxBackend):
    """`PtxBackend` that checks each compiled kernel of KERNELS at its first launch."""

    def _run(self, binary: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        super()._run(binary, grid, arguments)
        ptx = binary.asm["ptx"]
        if binary.metadata.name in KERNELS and ptx not in seen:
            program = ptx_launch._program(ptx)
            of = seen[ptx] = Specialization.of(binary, program)
            check(program, Launches(of, INPUTS))


def ids_of_no_row(draw: Any, count: int, rows: int, dtype: np.dtype) -> np.ndarray:
    """Two of three: -1, no padding where there is none, and what 32 bits make good. The last is like no other."""
    ids = good_ids(draw, count, rows, dtype)
    ids[::3] = -1 if dtype.kind == "i" else 255
    ids[1::3] = 2**32 + 1 if dtype.itemsize == 8 else ids[0] - 1
    ids[-1] = np.iinfo(dtype).min if dtype.kind == "i" else 253
    return ids


INPUTS = (
    Input("some bad ids", some_bad_ids, rows=129, padding=2),
    Input("ids in range", good_ids, rows=300),
    Input("a wide table", some_bad_ids, rows=33_000, padding=0),
    Input("one row", some_bad_ids, rows=1, more=-1, first_row=0),
    Input("no padding", ids_of_no_row, rows=11),
    Input("strides", some_bad_ids, gap=3, columns=3, padding=4, first_row=1),
    Input("far rows", some_bad_ids, rows=5, far_rows=True),
    Input("far columns", good_ids, far_columns=True),
    Input("far ids", some_bad_ids, far_ids=True),
    Input("a far table", some_bad_ids, far_table=True),
    Input("a record that is claimed", ids_of_no_row, rows=9, claimed=True),
    # The last id falls to another register of a lane each time.
    *(Input(f"a bad id at {k}/12", bad_id_at(k / 12), more=5 + 33 * k) for k in range(12)),
)


def check(program: Program, launches: Launches) -> None:
    """Raise AssertionError where the program leaves other bits than NumPy foretells, PtxError where it faults."""
    for launch in launches:
        launch.run(program)
        kernel, name = program.kernel.name, launch.given.name
        right = _rows_are_right if kernel.startswith("gather") else _sums_are_right
        assert right(launch), f"{kernel}: {name}"
        assert _record_is_right(launch), f"{kernel}: the record of {name}"


def _rows_are_right(launch: Launch) -> bool:
    of, tensors = launch.of, launch.tensors
    D, first = of.constants["D"], launch.first_item // of.constants["D"]
    ids = tensors["indices_ptr"][first:].astype(np.int64)
    copied = launch.takes_part(ids)
    rows = np.zeros((len(ids), D), of.dtype("output_ptr"))
    rows[copied] = tensors["weight_ptr"][launch.places("weight", launch.rows_of(ids[copied]))]
    output = tensors["output_ptr"][launch.first_item :]
    return np.array_equal(output, rows.ravel()[launch.first_item - first * D :])


def _record_is_right(launch: Launch) -> bool:
    """It has the place and the number of one bad id, whichever."""
    if not launch.of.has("record_ptr"):
        return True
    record, flag = launch.tensors["record_ptr"], launch.tensors["flag_ptr"]
    ids, numbers = launch.tensors["indices_ptr"], launch.numbers
    rows = numbers.get("table_rows", numbers["num_embeddings"])
    # A program may leave a row that begins before it to the one before it.
    first, part = divmod(launch.first_item, launch.of.constants["D"])
    bad = first + np.flatnonzero(~in_table(ids[first:], rows))
    if record[0] == launch.given.claimed:
        must = launch.given.claimed == 0 and (bad >= first + (part > 0)).any()
        return not must and not record[1:].any() and flag[0] == 0
    place = int(record[1])
    return (
        place in bad and record.tolist() == [1, place, ids[place], rows, 0, 0, 0] and flag[0] == 1
    )


def _sums_are_right(launch: Launch) -> bool:
    tensors, D = launch.tensors, launch.of.constants["D"]
    first = launch.first_item // D
    ids = tensors["indices_ptr"][first:].astype(np.int64)
    takes_part = launch.takes_part(ids)
    bags = tensors.get("bag_of_ptr")
    row = first + np.arange(len(ids)) if bags is None else bags[first:].astype(np.int64)
    takes_part &= row >= 0
    values = np.zeros((len(ids), D))
    grads = tensors["grad_output_ptr"][launch.places("grad", row[takes_part])]
    values[takes_part] = launch.decode("grad_output_ptr", grads)
    if "per_sample_weights_ptr" in tensors:
        weights = tensors["per_sample_weights_ptr"][first:, None]
        values *= launch.decode("per_sample_weights_ptr", weights)
    if "sizes_ptr" in tensors:
        values[takes_part] /= tensors["sizes_ptr"][row[takes_part], None]
    values.flat[: launch.first_item - first * D] = 0
    sums = launch.named_before.copy()
    place = np.searchsorted(launch.named, launch.rows_of(ids[takes_part]))
    np.add.at(sums, place, values[takes_part].astype(sums.dtype))
    grad_weight, places = tensors["grad_weight_ptr"], launch.places("grad_weight", launch.named)
    if launch.is_far:
        return np.array_equal(grad_weight[places], sums)
    expected = launch.before("grad_weight_ptr")
    expected[places] = sums
    return np.array_equal(grad_weight.view(np.uint8), expected.view(np.uint8))
