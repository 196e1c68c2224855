"""The columns of tables_ptr, int64 [num_tables, NUM_TABLE_COLUMNS]: one row a table, half a cache line."""

import triton
import triton.language as tl

# Columns of tables_ptr; the copies in gpu_embed/tables/layout.py and tables_walk.cuh must agree.
FIRST_ROW = tl.constexpr(0)  # number of the first row
NUM_ROWS = tl.constexpr(1)
FIRST_ELEMENT = tl.constexpr(2)  # offset in the buffer
DIM = tl.constexpr(3)
FIRST_COLUMN = tl.constexpr(4)  # offset in the output's rows
MODE = tl.constexpr(5)
PADDING_IDX = tl.constexpr(6)  # -1: none
NAME = tl.constexpr(7)  # number of the name, for the bounds record
NUM_TABLE_COLUMNS = tl.constexpr(8)
# Values of MODE; 0: sum.
MEAN_MODE = tl.constexpr(1)
MAX_MODE = tl.constexpr(2)


@triton.jit
def table_column(tables_ptr, table, COLUMN: tl.constexpr):
    """One column of tables_ptr, for each of `table`."""
    return tl.load(tables_ptr + table * NUM_TABLE_COLUMNS + COLUMN)


@triton.jit
def load_multiple(tables_ptr, table, COLUMN: tl.constexpr, VEC: tl.constexpr):
    """The same for a multiple of VEC, so that the compiler sees the alignment."""
    return table_column(tables_ptr, table, COLUMN) // VEC * VEC


@triton.jit
def row_begin(tables_ptr, table, row, VEC: tl.constexpr = 1):
    """Offset in the buffer of each row, given its number and its table."""
    first = load_multiple(tables_ptr, table, FIRST_ELEMENT, VEC)
    row_in_table = row - table_column(tables_ptr, table, FIRST_ROW)
    return first + row_in_table * load_multiple(tables_ptr, table, DIM, VEC)
