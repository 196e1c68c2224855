"""Two tiers: `make test` runs the default one, and `make test-all`, which is `pytest --full`, runs everything.

The default tier leaves out tests and parameters marked full, and files in FULL_FILES. Where three parameters or more
make a product, it runs as many of the cases as show every pair of values that the product has.
"""

import heapq
import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from pathlib import Path

import pytest

# Not even imported in the default tier: code generation, candidates, models, processes, examples, random cases.
FULL_FILES = frozenset(
    f"tests/{name}.py"
    for name in (
        "api/test_properties",
        "api/test_quantized",
        "api/test_tables_frozen",
        "api/test_tables_growing",
        "api/test_tables_properties",
        "api/test_torch_samples",
        "bench/test_candidates",
        "bench/test_quantized",
        "distributed/test_bags",
        "distributed/test_checkpoint",
        "distributed/test_compile",
        "distributed/test_errors",
        "distributed/test_interpreter",
        "distributed/test_lookup",
        "distributed/test_parallel",
        "distributed/test_ranks",
        "distributed/test_sharded_embedding",
        "kernels/test_codegen",
        "kernels/test_cuda_nvrtc",
        "keras/test_examples",
        "optim/test_training_loops",
        "pages/test_accumulation_page",
        "pages/test_demo",
        "pages/test_examples",
        "pages/test_recommender",
        "pages/test_training_page",
        "serving/test_export",
        "serving/test_page",
        "serving/test_serve",
        "swap/test_families",
        "swap/test_minilm",
        "swap/test_opacus",
        "swap/test_peft",
        "swap/test_quantize",
        "swap/test_quantized_peft",
        "swap/test_transformers",
        "torchrec/test_checkpoint",
        "torchrec/test_collections",
        "torchrec/test_errors",
        "torchrec/test_training",
        "torchrec/test_types",
        "vectors/test_bench",
        "vectors/test_binary_files",
        "vectors/test_gensim_files",
        "vectors/test_loading",
        "vectors/test_matrix_files",
        "vectors/test_properties",
        "vectors/test_saving",
        "vectors/test_table_rows",
        "vectors/test_text_files",
        "vectors/test_vectors",
    )
)

# Operations whose tests run on the targets of compiled PTX too: in the full tier, and there as many as show every pair.
PTX_FILES = frozenset(
    f"tests/{name}.py"
    for name in (
        "api/test_bag",
        "api/test_bounds",
        "api/test_forward",
        "api/test_gradient",
        "api/test_renorm",
        "api/test_tables",
        "api/test_tables_gradient",
        "api/test_tables_outputs",
        "backends/test_in_place",
        "backends/test_row_update",
        "backends/test_shard",
        "backends/test_take",
        "kernels/test_shards",
    )
)


def is_full(path: Path, root: Path) -> bool:
    """Whether the file is in the full tier as a whole."""
    return path.relative_to(root).as_posix() in FULL_FILES


def runs_as_ptx(path: Path, root: Path) -> bool:
    return path.relative_to(root).as_posix() in PTX_FILES


def where(condition: Callable[..., bool]) -> pytest.MarkDecorator:
    """Only those cases exist for whose parameters, of the same names as its own, the condition holds."""
    return pytest.mark.where.with_args(condition)


def exists(params: Mapping[str, object], wheres: Iterable[Callable[..., bool]]) -> bool:
    """Whether each condition holds for the parameters that it names, or names one that is not there."""
    for where in wheres:
        names = inspect.signature(where).parameters
        if names.keys() <= params.keys() and not where(**{name: params[name] for name in names}):
            return False
    return True


def pairwise(cases: list[Mapping[str, int]]) -> list[int]:
    """Indices of cases that together hold every pair of values that occurs; always the same ones.

    Args:
        cases: what each case chooses, as the number of the value that each name has.
    """
    names = _independent(cases)
    if len(names) < 3:
        return list(range(len(cases)))
    pairs = [frozenset(combinations([(name, case[name]) for name in names], 2)) for case in cases]
    missing = frozenset().union(*pairs)
    chosen = []
    # What a case would add only shrinks: its old figure is an upper bound, brought up to date when it is on top.
    heap = [(-len(held), index) for index, held in enumerate(pairs)]
    while missing:
        bound, index = heapq.heappop(heap)
        gain = len(pairs[index] & missing)
        if gain < -bound:
            heapq.heappush(heap, (-gain, index))
        else:
            chosen.append(index)
            missing -= pairs[index]
    return sorted(chosen)


def _independent(cases: list[Mapping[str, int]]) -> list[str]:
    """Names that differ; of those that one parametrize sets together, the first."""
    columns: dict[tuple[int, ...], str] = {}
    for name in cases[0] if cases else ():
        column = tuple(case[name] for case in cases)
        if len(set(column)) > 1:
            columns.setdefault(column, name)
    return list(columns.values())
