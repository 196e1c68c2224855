"""Launches past Triton's own path: the binary is Triton's choice, and so is what it is called with."""

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

pytest.importorskip("triton", "3.6", reason="no Triton, or one that launches its own way")

from triton import AsyncCompileMode, knobs
from triton import language as tl
from triton.runtime import driver, jit
from triton.tools.tensor_descriptor import TensorDescriptor

from gpu_embed.backends._triton import TritonBackend, known_launch
from gpu_embed.backends._triton.device import WordsOf
from gpu_embed.bench.codegen.cases import CASES
from gpu_embed.bench.codegen.compile import record_launches
from gpu_embed.bench.host_time import stub_driver, stub_kernel
from gpu_embed.bounds import BoundsRecord
from gpu_embed.settings import KNOWN_LAUNCH
from gpu_embed.shard import Shard


def one_of_each(pointer, other_ptr, number, factor, D: tl.constexpr, BLOCK: tl.constexpr):
    pass


CPU = torch.device("cpu")
MEMORY = torch.zeros(64, dtype=torch.int64)
TENSORS = (
    MEMORY,
    MEMORY[1:],  # 8 bytes further: no longer a multiple of 16
    MEMORY[2:],
    MEMORY.view(torch.float32)[1:],
    WordsOf(MEMORY, tl.int32),
    WordsOf(MEMORY[1:], tl.int32),
)
NUMBERS = (0, 1, -1, 15, 16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 16, 2**40, 2**63, 2**64 - 16)


@pytest.fixture
def launched(monkeypatch):
    """What reached the driver, and known launches without a past."""
    monkeypatch.setattr(known_launch, "_launches", {})
    calls = []
    with stub_driver():
        yield calls


def test_the_binary_is_the_one_that_triton_chooses(launched):
    kernel = stub_kernel(one_of_each)
    variants = [
        ((pointer, other, number, factor), {"D": d, "BLOCK": 64, "num_warps": warps})
        for pointer, other, number, factor in (
            *itertools.product(TENSORS, (MEMORY, None), (3,), (0.5,)),
            *itertools.product((MEMORY,), (None,), NUMBERS, (0.5, 2.0, 1, True)),
        )
        for d, warps in ((4, 1), (8, 1), (4, 4))
    ]
    chosen = [kernel[(2,)](*args, **settings) for args, settings in variants]
    assert len(set(map(id, chosen))) > 50
    for _ in range(2):
        for (args, settings), binary in zip(variants, chosen, strict=True):
            binary._run = lambda *launch, binary=binary: launched.append((binary, launch))
            known_launch.launch(kernel, (2, 3), None, args, settings)
            ran, launch = launched.pop()
            assert ran is binary
            assert launch[:4] == (2, 3, 1, 0)
            assert launch[9:] == (*args, settings["D"], settings["BLOCK"])


def test_a_known_launch_does_not_ask_triton_again(launched, monkeypatch):
    kernel = stub_kernel(one_of_each, lambda *launch: launched.append(launch))
    call = (kernel, (1,), None, (MEMORY, None, 3, 0.5), {"D": 4, "BLOCK": 8})
    known_launch.launch(*call)
    monkeypatch.setattr(jit.JITFunction, "run", None)
    known_launch.launch(*call)
    assert (launched[0][:4], launched[0][9:]) == (launched[1][:4], launched[1][9:])
    # Numbers of one kind share a binary, others do not.
    known_launch.launch(*call[:3], (MEMORY, None, 5, 0.25), call[4])
    assert launched[2][9:13] == (MEMORY, None, 5, 0.25)
    with pytest.raises(TypeError):
        known_launch.launch(*call[:3], (MEMORY, None, 16, 0.5), call[4])
    with pytest.raises(TypeError):
        known_launch.launch(kernel, (1,), 1, *call[3:])


def test_arguments_of_other_types_go_triton_s_way(launched):
    kernel = stub_kernel(one_of_each, lambda *launch: launched.append(launch))
    for rows in (4, 8):
        block = TensorDescriptor(MEMORY.view(torch.int32), [rows, 4], [4, 1], [1, 4])
        for _ in range(2):
            known_launch.launch(kernel, (1,), None, (block, None, 3, 0.5), {"D": 4, "BLOCK": 8})
            assert launched[-1][9] is block
    assert known_launch._launches == {}


CALL = ((1,), None, (MEMORY, None, 3, 0.5), {"D": 4, "BLOCK": 8})


@pytest.mark.parametrize(
    ("told", "name", "value"),
    [
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "default"),
        (knobs.runtime, "add_stages_inspection_hook", lambda: ("key", "hash")),
    ],
    ids=["debug", "instrumentation", "stages"],
)
def test_what_triton_is_told_later_is_heeded(launched, monkeypatch, told, name, value):
    """As on Triton's own way, and forgotten with it: an instrumented binary needs the memory of its profiler."""

    def compiled_by(launch):
        kernel = stub_kernel(one_of_each, lambda *launch: launched.append(launch))
        launch(kernel, *CALL)
        count = 0

        def counted(*source, compile=kernel.compile, **options):
            nonlocal count
            count += 1
            return compile(*source, **options)

        kernel.compile = counted
        counts = []
        for value_then in (getattr(told, name), value, value, getattr(told, name)):
            with monkeypatch.context() as patch:
                patch.setattr(told, name, value_then)
                launch(kernel, *CALL)
            counts.append(count)
        return counts

    def triton_s_way(kernel, grid, device, args, settings):
        kernel[grid](*args, **settings)

    counts = compiled_by(known_launch.launch)
    assert counts == compiled_by(triton_s_way)
    # Before Triton 3.7 the stages' hook is asked by the compiler alone.
    assert counts == [0, 1, 1, 1] or (counts == [0] * 4 and "stages_inspection" in name)
    assert len(launched) == 10


def test_hooks_before_a_run_are_called(launched):
    kernel = stub_kernel(one_of_each, lambda *launch: launched.append(launch))
    known_launch.launch(kernel, *CALL)
    seen = []
    kernel.add_pre_run_hook(lambda *args, **settings: seen.append(args))
    known_launch.launch(kernel, *CALL)
    assert seen == [CALL[2]]
    assert len(launched) == 2


def hook(metadata):
    """What a profiler adds."""


@pytest.mark.parametrize("chain", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_launches_are_asked_for_and_told(launched, monkeypatch, chain):
    """A chain of them, as profilers add to; and what is no chain."""
    kernel = stub_kernel(one_of_each, lambda *launch: launched.append(launch))
    prepared = known_launch.prepare_launch(
        partial(launch_by, kernel), kernel, lambda n: (n,), CPU, {"D": 4, "BLOCK": 8}
    )

    def all_ways():
        launched.clear()
        known_launch.launch(kernel, *CALL)
        prepared((), 1, CALL[2])
        kernel[CALL[0]](*CALL[2], **CALL[3])
        return launched

    all_ways()
    assert [one[6:9] for one in all_ways()[:2]] == [(None, None, None)] * 2
    hooks = getattr(knobs.runtime, chain)
    hooks.add(hook)
    try:
        for one in all_ways():
            assert one[7:9] == (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
            assert one[6].get()["name"] == "stub"
    finally:
        hooks.remove(hook)
    assert all_ways()[0][6] is None
    monkeypatch.setattr(knobs.runtime, chain, hook)
    assert all(hook in one[7:9] for one in all_ways())


def launch_by(kernel, _, grid, device, *args, **settings):
    return known_launch.launch(kernel, grid, device.index, args, settings)


def test_prepared_launches_are_known_by_what_differs(launched):
    kernel = stub_kernel(one_of_each, lambda *launch: launched.append(launch))
    asked = []

    def first(_, grid, device, *args, **settings):
        asked.append(args)
        return known_launch.launch(kernel, grid, device.index, args, settings)

    settings = {"D": 4, "BLOCK": 8}
    prepared = known_launch.prepare_launch(first, kernel, lambda n: (n, 7), CPU, settings)
    for number, key in ((3, "a"), (3, "a"), (3, "b"), (5, "a"), (5, "a"), (3, "a")):
        args = (MEMORY, None, number, 0.5)
        prepared((key,), number, args)
        kernel[(number, 7)](*args, **settings)
        known, by_triton = launched[-2:]
        assert known[:6] == by_triton[:6]
        assert known[9:] == by_triton[9:]
    assert [args[2] for args in asked] == [3, 3, 5]


def test_prepared_launches_that_are_not_known_are_made_anew(launched):
    """Those on another device than the current one, and those of a backend that only records."""
    asked = []
    prepared = known_launch.prepare_launch(
        lambda *args, **settings: asked.append((args, settings)),
        None,
        lambda n: (n,),
        CPU,
        {"D": 4},
    )
    for _ in range(2):
        prepared((), 2, (MEMORY, 3))
    assert asked == [((None, (2,), CPU, MEMORY, 3), {"D": 4})] * 2


def test_a_prepared_launch_keeps_a_bounded_number(launched, monkeypatch):
    monkeypatch.setattr(known_launch, "MAX_PREPARED", 2)
    kernel = stub_kernel(one_of_each, lambda *launch: launched.append(launch))
    asked = []

    def first(*given, **settings):
        asked.append(given)
        return launch_by(kernel, *given, **settings)

    prepared = known_launch.prepare_launch(first, kernel, lambda n: (n,), CPU, {"D": 4, "BLOCK": 8})
    for number in (2, 3, 2, 3, 4, 4, 2):
        prepared((), number, CALL[2])
    assert len(asked) == 4
    assert [launch[0] for launch in launched] == [2, 3, 2, 3, 4, 4, 2]


@pytest.fixture
def keyed(launched):
    """A backend whose launches find that their grid and whole key are what they would be anew, and are counted."""

    class Keyed(TritonBackend):
        _interpreted = False
        known = 0

        def _launch(self, kernel, grid, device, *args, **settings):
            def again(x, y, z, stream, *others):
                self.known += 1
                assert (x, y, z) == (*grid, 1, 1)[:3]
                assert known_launch._key(kernel, None, others, settings) == key

            key = known_launch._key(kernel, None, args, settings)
            return again, (), (), kernel

    return Keyed()


def many_ids():
    """Of every dtype and address, one and many, for each of two calls, in no order."""
    ids = [
        torch.zeros(40, dtype=dtype)[start:][:number]
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        for start in (0, 1, 2, 16)
        for number in (1, 2, 15, 16, 17)
    ] * 2
    random.Random(0).shuffle(ids)
    return ids


@pytest.mark.parametrize(
    ("columns", "shard"), [(16, None), (3, None), (16, Shard(1, 600)), (3, Shard(2**40, 2**41))]
)
def test_what_differs_between_lookups_is_in_their_key(keyed, columns, shard):
    weight = torch.zeros(300, columns)
    lookup = keyed.prepare_embedding(weight, shard)
    ids = many_ids()
    for indices in ids:
        for zero_idx in (-1, 0, 1):
            for record in (BoundsRecord(CPU), None):
                lookup(weight, indices, zero_idx, record)
    assert len(ids) // 2 * 6 <= keyed.known < len(ids) * 6


@pytest.mark.parametrize("columns", [16, 3])
def test_what_differs_between_gradients_is_in_their_key(keyed, columns):
    gradient = keyed.prepare_embedding_dense_backward(torch.zeros(300, columns), 1)
    ids = many_ids()
    for indices in ids:
        assert gradient(torch.zeros(len(indices), columns), indices).shape == (300, columns)
    assert len(ids) // 2 <= keyed.known < len(ids)
    # Others that are not launched this way.
    keyed.known = 0
    assert gradient(torch.zeros(columns, 2).T, torch.zeros(2, dtype=torch.int64)) is None
    assert gradient(torch.zeros(2, columns), torch.zeros(4, dtype=torch.int64)[::2]) is None
    assert gradient(torch.zeros(2 * columns + 1)[1:].view(2, columns), ids[0][:1].expand(2)) is None
    assert keyed.known == 0


def test_what_compiles_in_the_background_is_launched_triton_s_way(launched):
    """What Triton 3.7 returns then is no binary; the next launch finds the one that it became."""
    kernel = stub_kernel(one_of_each, lambda *launch: launched.append(launch))
    with ThreadPoolExecutor(1) as executor, AsyncCompileMode(executor):
        for _ in range(3):
            known_launch.launch(kernel, *CALL)
    assert len(launched) == 3
    assert len(known_launch._launches) == 1


def test_threads_compile_and_load_a_kernel_once(launched):
    """Triton holds no lock, and a thread that finds another's half-loaded binary launches no function."""
    kernel = stub_kernel(one_of_each, lambda *launch: launched.append(launch))
    compiled = []
    # Looking a device up sets how to compile.
    assert kernel.device_caches[driver.active.get_current_device()]

    def slowly(*source, compile=kernel.compile, **options):
        compiled.append(source)
        time.sleep(0.05)
        return compile(*source, **options)

    kernel.compile = slowly
    threads = [threading.Thread(target=known_launch.launch, args=(kernel, *CALL)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(launched) == 3
    assert len(compiled) == 1


def test_every_argument_of_our_kernels_is_known(launched, monkeypatch):
    """So that no launch takes the long way unnoticed."""
    seen = set()

    class Keyed(TritonBackend):
        _interpreted = False

        def _launch(self, kernel, grid, device, *args, **settings):
            key = known_launch._key(kernel, None, args, settings)
            seen.add((kernel.__name__, key is not None))

    backend = Keyed()
    weight, ids = torch.zeros(9, 8), torch.tensor([3, 1])
    backend.embedding(weight, ids, -1, None)
    backend.embedding_dense_backward(weight[:2], ids, 9, -1, False)
    backend.embedding_dense_backward(weight[:2], ids, 9, 3, True)
    backend.embedding_renorm_(weight, ids, 1.0, 2.0)
    assert len(seen) > 4
    assert all(known for _, known in seen), seen


def test_each_launch_of_ours_reaches_the_driver_as_by_triton_s_way(launched):
    """Every kernel, with all its launch settings."""
    launches, failures = record_launches(CASES)
    assert not failures
    stubs = {}
    for one in launches:
        function = one.kernel.fn
        if function not in stubs:
            stubs[function] = stub_kernel(function, lambda *launch: launched.append(launch))
        kernel = stubs[function]
        for _ in range(2):
            known_launch.launch(kernel, one.grid, None, one.args, one.settings)
        kernel[one.grid](*one.args, **one.settings)
        known, by_triton = launched[-2:]
        assert known[:6] == by_triton[:6]
        assert by_triton[7:9] == (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
        assert not by_triton[7].calls + by_triton[8].calls
        # So there is nobody to tell; a candidate's tensor descriptors go Triton's way.
        is_known = not any(type(arg) is TensorDescriptor for arg in one.args)
        assert known[6:9] == (None, None, None) or not is_known
        # By identity, but for constants: tensors without data cannot be compared.
        for mine, theirs in zip(known[9:], by_triton[9:], strict=True):
            assert mine is theirs or (type(mine) in (int, float) and mine == theirs), one.case
    assert len(stubs) > 20


def test_it_is_faster_than_triton_s_way(launched):
    kernel = stub_kernel(one_of_each)
    args, settings = (MEMORY, MEMORY, 3, 0.5), {"D": 4, "BLOCK": 8, "num_warps": 4}
    best = {}
    for _ in range(30):
        for name, call in (
            ("known", lambda: known_launch.launch(kernel, (1,), None, args, settings)),
            ("triton", lambda: kernel[(1,)](*args, **settings)),
        ):
            start = time.perf_counter()
            for _ in range(50):
                call()
            took = time.perf_counter() - start
            best[name] = min(took, best.get(name, took))
    assert best["known"] < 0.7 * best["triton"], best


def test_the_version_at_hand_was_checked():
    """What this file compares holds for the version that it runs with, so that version is named."""
    import triton

    assert triton.__version__ in known_launch.CHECKED_VERSIONS
    assert known_launch.unused_reason() is None


@pytest.fixture
def asked_anew(monkeypatch):
    monkeypatch.delitem(vars(KNOWN_LAUNCH), "value", raising=False)
    known_launch.is_used.cache_clear()
    yield
    known_launch.is_used.cache_clear()


@pytest.mark.parametrize("how", ["another version", "the environment"])
def test_launches_go_tritons_way_where_they_must(launched, monkeypatch, asked_anew, how):
    """A version that nobody has compared, or a user who rules it out; the reason is in the report."""
    import triton

    from gpu_embed import env_report

    if how == "another version":
        monkeypatch.setattr(triton, "__version__", "4.0.0")
        reason = "triton 4.0.0 is not a checked version (3.6.0"
    else:
        monkeypatch.setenv("GPU_EMBED_KNOWN_LAUNCH", "0")
        reason = "GPU_EMBED_KNOWN_LAUNCH=0"
    kernel = stub_kernel(one_of_each, lambda *launch: launched.append(launch))
    for _ in range(2):
        known_launch.launch(kernel, (1,), None, (MEMORY, MEMORY, 3, 0.5), {"D": 4, "BLOCK": 8})
    assert len(launched) == 2
    assert not known_launch._launches
    assert env_report._known_launch().startswith(reason)


def test_a_choice_that_is_none_is_refused(launched, monkeypatch, asked_anew):
    """Who writes "off" must not get the fast launches."""
    from gpu_embed import env_report

    monkeypatch.setenv("GPU_EMBED_KNOWN_LAUNCH", "off")
    message = "GPU_EMBED_KNOWN_LAUNCH: expected one of '1', '0', got 'off'"
    with pytest.raises(ValueError, match=message):
        known_launch.launch(stub_kernel(one_of_each), *CALL)
    assert env_report._known_launch() == message


@pytest.mark.parametrize("gone", ["pre_run_hooks", "runtime.debug"])
def test_a_private_name_that_is_gone_costs_the_speed_alone(launched, monkeypatch, gone):
    kernel = stub_kernel(one_of_each, lambda *launch: launched.append(launch))

    class Without:
        """Something with one name less."""

        def __init__(self, whole, name):
            self._whole, self._name = whole, name

        def __getattr__(self, name):
            if name == self._name:
                raise AttributeError(name)
            return getattr(self._whole, name)

        def __getitem__(self, grid):
            return self._whole[grid]

    if gone == "pre_run_hooks":
        kernel = Without(kernel, gone)
    else:
        runtime = Without(knobs.runtime, "debug")
        monkeypatch.setattr(known_launch, "_knobs", lambda: (runtime, knobs.compilation))
    for _ in range(2):
        known_launch.launch(kernel, (1,), None, (MEMORY, MEMORY, 3, 0.5), {"D": 4, "BLOCK": 8})
    assert len(launched) == 2
    assert not known_launch._launches


def test_another_max_norm_is_the_same_kernel(launched, monkeypatch):
    """It is an argument; the power of the norm is a constant of the general formula alone."""
    keys = {}

    class Keyed(TritonBackend):
        _interpreted = False

        def _launch(self, kernel, grid, device, *args, **settings):
            if kernel.__name__ == "renorm_kernel":
                keys[number] = known_launch._key(kernel, None, args, settings)

    backend = Keyed()
    weight, ids = torch.zeros(9, 8), torch.tensor([3, 1])
    for number in ((1.0, 2.0), (0.3, 2.0), (1.0, 1.0), (2.5, 3.0), (0.5, 3.0), (0.5, 4.0)):
        backend.embedding_renorm_(weight, ids, *number)
    assert None not in keys.values()
    assert keys[1.0, 2.0] == keys[0.3, 2.0] != keys[1.0, 1.0]
    assert keys[2.5, 3.0] == keys[0.5, 3.0] != keys[0.5, 4.0]


@pytest.mark.parametrize("knob", ["instrumentation_mode", "fpsan_homomorphic_casts"])
def test_every_knob_that_changes_a_binary_is_in_the_key(launched, monkeypatch, knob):
    class Compilation:
        pass

    kernel = stub_kernel(one_of_each)
    found = []
    for value in ("", "on"):
        compilation = Compilation()
        setattr(compilation, knob, value)
        monkeypatch.setattr(known_launch, "_knobs", lambda one=compilation: (knobs.runtime, one))
        found.append(known_launch._key(kernel, None, (MEMORY,), {"D": 4}))
    assert found[0] != found[1]
