"""What a launch does around the kernel: a way back when it fails, the device, the options; with the driver faked."""

import json
import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

import gpu_embed
from gpu_embed import backends, bounds, user_cache
from gpu_embed.backends._cupy import CupyBackend, cubin_cache
from gpu_embed.backends._cupy import device as cupy_device
from gpu_embed.functional.tables import table_batched_embedding_bag
from gpu_embed.ops.take import dequantize_rows, take_rows
from gpu_embed.own_thread import on_own_thread
from gpu_embed.tables.layout import Tables, make_layout

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A card that torch finds, and no driver that anything could reach."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(bounds, "_cuda_records", {})


# A thread of its own.


def test_work_on_its_own_thread_sees_no_modes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.inference_mode():
        kind, inference, thread = on_own_thread(
            lambda: (type(torch.zeros(1)), torch.is_inference_mode_enabled(), threading.get_ident())
        )
    assert kind is torch.Tensor
    assert not inference
    assert thread != threading.get_ident()


def test_work_on_its_own_thread_raises_here():
    def fail():
        raise KeyError("what")

    with pytest.raises(KeyError, match="what"):
        on_own_thread(fail)


# The record of ids out of range.


class Record:
    def __init__(self, device):
        self.device = device
        self.thread = threading.get_ident()
        self.kind = type(torch.zeros(1))

    def ready(self):
        return self


def many_tables(weight, ids, mode):
    layout = make_layout([(5, 4)], mode, None)
    fields = torch.empty(1, 8, dtype=torch.int64, device="cuda")
    columns = torch.empty(4, dtype=torch.int32, device="cuda")
    flat, offsets = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (6, 2))
    return table_batched_embedding_bag(flat, weight, offsets, Tables(layout, fields, columns))


LOOKUPS = {
    "lookup": lambda w, ids: gpu_embed.functional.embedding(ids, w),
    "bags": lambda w, ids: gpu_embed.functional.embedding_bag(ids, w),
    "maxima": lambda w, ids: gpu_embed.functional.embedding_bag(ids, w, mode="max"),
    "tables": lambda w, ids: many_tables(w, ids, "sum"),
    "maxima of tables": lambda w, ids: many_tables(w, ids, "max"),
    "taken rows": lambda w, ids: take_rows(w, ids, torch.float32),
    "dequantized rows": lambda w, ids: dequantize_rows(
        torch.empty_like(w, dtype=torch.int8), w, None, ids, 4, 1, 8, torch.float32
    ),
}


@pytest.mark.parametrize("look_up", LOOKUPS.values(), ids=LOOKUPS)
@pytest.mark.parametrize("mode", ["raise", "sync", "off"])
def test_tracing_makes_the_record_on_another_thread(card, monkeypatch, look_up, mode):
    """A first call inside of a compiled function may run as a CUDA graph's warm-up, whose memory is the graph's."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(bounds, "BoundsRecord", Record)
    with FakeTensorMode(), gpu_embed.set_bounds_check(mode):
        weight = torch.empty(5, 4, device="cuda")
        ids = torch.empty(2, 3, dtype=torch.int64, device="cuda")
        look_up(weight, ids)
    if mode == "off":
        assert not bounds._cuda_records
        return
    (record,) = bounds._cuda_records.values()
    assert record.device == CUDA
    assert record.thread != threading.get_ident()
    assert record.kind is torch.Tensor


@pytest.mark.parametrize("why", ["cuda is not in use", "no such device"])
def test_fake_tensors_alone_make_no_record(card, monkeypatch, why):
    """They may be traced where there is no card, in a forked process, or for a larger machine."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(bounds, "BoundsRecord", Record)
    if why == "cuda is not in use":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    index = 2 if why == "no such device" else 0
    with FakeTensorMode():
        weight = torch.empty(5, 4, device=f"cuda:{index}")
        ids = torch.empty(2, dtype=torch.int64, device=f"cuda:{index}")
        assert gpu_embed.functional.embedding(ids, weight).shape == (2, 4)
    assert not bounds._cuda_records


def test_a_record_is_made_once_by_many_threads(card, monkeypatch):
    made = []

    class Counted(Record):
        def __init__(self, device):
            super().__init__(device)
            made.append(device)

    monkeypatch.setattr(bounds, "BoundsRecord", Counted)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: bounds.prepare(CUDA), range(32)))
    assert made == [CUDA]


def test_no_record_is_made_while_a_graph_is_captured(card, monkeypatch):
    monkeypatch.setattr(bounds, "BoundsRecord", Record)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    bounds.prepare(CUDA)
    assert not bounds._cuda_records
    with pytest.raises(RuntimeError, match="run the code once before capturing it"):
        bounds._cuda_record(0)


def test_the_claim_of_a_record_is_cleared_last():
    """A kernel on another stream may claim the record as soon as it is free, and then writes the other words."""
    record = bounds.BoundsRecord(torch.device("cpu"))
    record.write(torch.tensor([9]), 5)
    order = []

    class Words(torch.Tensor):
        def zero_(self):
            order.append(self.storage_offset() + self.numel())
            return super().zero_()

    record.words = record.words.as_subclass(Words)
    with pytest.raises(IndexError):
        record.raise_if_claimed()
    assert order == [7, 1]
    assert not record.words.any()


# A backend is trusted once a kernel has run.


def fresh(name):
    backend = type(backends.load(name))()
    if name == "triton":
        backend._interpreted = False
    return backend


@pytest.fixture
def both(card, monkeypatch):
    """A Triton and a CuPy backend that find all they need."""
    pytest.importorskip("triton")

    class Nvrtc:
        @staticmethod
        def getSupportedArchs():  # noqa: N802
            return (60, 90)

    class Cupy:
        class cuda:  # noqa: N801
            nvrtc = Nvrtc

            class runtime:  # noqa: N801
                getDeviceCount = staticmethod(lambda: 1)  # noqa: N815

    monkeypatch.setattr(cupy_device, "import_cupy", lambda: Cupy)
    monkeypatch.setattr(cupy_device, "find_spec", lambda _: object())
    found = {"triton": fresh("triton"), "cupy": CupyBackend()}
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: found.get(name) or load(name))
    monkeypatch.setattr(backends, "_selected", {})
    for backend in found.values():
        backend.tried = 0
        backend.error = None

        def try_launch(device, backend=backend):
            backend.tried += 1
            backend.thread = threading.get_ident()
            if backend.error is not None:
                raise backend.error

        backend._trial.run = try_launch
    return found


@pytest.mark.parametrize("failing", [(), ("triton",), ("triton", "cupy")], ids=str)
def test_auto_falls_back_when_a_kernel_cannot_be_launched(both, failing, caplog):
    for name in failing:
        both[name].error = OSError(f"lib{name}.so cannot found!\nand more")
    expected = ("triton", "cupy", "torch")[len(failing)]
    with caplog.at_level(logging.WARNING, "gpu_embed"), gpu_embed.use_backend("auto"):
        assert backends.select(CUDA).name == expected
        said = backends.explain(CUDA)
        assert backends.select(CUDA).name == expected
    for name in failing:
        reason = f"{name} cannot launch a kernel here: OSError: lib{name}.so cannot found!"
        assert f"{name}: {reason}" in said
        assert reason in caplog.text
        assert "and more" not in said
    for name in ("triton", "cupy")[: len(failing) + 1]:
        assert both[name].tried == 1
        assert both[name].thread != threading.get_ident()


@pytest.mark.parametrize("name", ["triton", "cupy"])
def test_a_forced_backend_that_cannot_launch_raises(both, name):
    both[name].error = RuntimeError("Failed to find C compiler")
    with (
        gpu_embed.use_backend(name),
        pytest.raises(RuntimeError, match=f"{name!r} is forced .* Failed to find C compiler"),
    ):
        backends.select(CUDA)


def test_nothing_is_tried_while_a_graph_is_captured(both, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert both["triton"].unusable_reason(CUDA) is None
        assert both["triton"].tried == 0
    assert both["triton"].unusable_reason(CUDA) is None
    assert both["triton"].tried == 1


def test_a_choice_made_while_a_graph_is_captured_is_not_kept(both, monkeypatch):
    """Else the first lookup would decide for the process, untried."""
    both["triton"].error = RuntimeError("Failed to find C compiler")
    with gpu_embed.use_backend("auto"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            assert backends.select(CUDA).name == "triton"
        assert backends.select(CUDA).name == "cupy"


def test_a_full_card_is_no_reason(both):
    both["triton"].error = torch.OutOfMemoryError("CUDA out of memory")
    assert both["triton"].unusable_reason(CUDA) is None
    both["triton"].error = RuntimeError("Failed to find C compiler")
    assert "C compiler" in both["triton"].unusable_reason(CUDA)


def test_each_device_is_tried(both):
    for index in (0, 1, 1, 0):
        both["triton"].unusable_reason(torch.device("cuda", index))
    both["triton"].unusable_reason(torch.device("cuda"))
    assert both["triton"].tried == 2


@pytest.mark.parametrize("gives", ["right", "wrong"])
def test_what_is_tried_is_a_lookup(kernel_target, monkeypatch, gives):
    """The kernel that lookups use, its rows compared."""
    backend = backends.select(torch.device(kernel_target.device))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    if gives == "right":
        backend._trial.run(torch.device(kernel_target.device))
        return
    monkeypatch.setattr(
        type(backend), "embedding", lambda *_: torch.zeros(1, 4, device=kernel_target.device)
    )
    with pytest.raises(RuntimeError, match="returned wrong values"):
        backend._trial.run(torch.device(kernel_target.device))


@pytest.mark.parametrize("name", ["triton", "cupy"])
def test_no_driver_is_said(monkeypatch, name):
    backend = fresh(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cupy_device, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backend.unusable_reason(CUDA) == "this torch is built without CUDA"

    def init():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check\nthat you have one")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    reason = backend.unusable_reason(CUDA)
    assert reason.startswith("torch finds no CUDA device: RuntimeError: Found no NVIDIA driver")
    assert "\n" not in reason
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert backend.unusable_reason(CUDA) == "torch finds no CUDA device"


# The device, and the options.


class Devices:
    """torch.cuda.device, as a list of what was entered and left."""

    def __init__(self, monkeypatch):
        self.current = 0
        self.log = []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        outer = self

        class Device:
            def __init__(self, device):
                self.index = device if isinstance(device, int) else device.index

            def __enter__(self):
                self.former, outer.current = outer.current, self.index

            def __exit__(self, *_):
                outer.current = self.former

        monkeypatch.setattr(torch.cuda, "device", Device)


@pytest.mark.parametrize("index", [0, 1])
def test_a_triton_kernel_is_launched_on_the_tensors_device(card, monkeypatch, index):
    pytest.importorskip("triton")
    from gpu_embed.backends._triton import device as triton_device

    devices, seen = Devices(monkeypatch), []
    monkeypatch.setattr(
        triton_device,
        "launch",
        lambda kernel, grid, device, args, settings: seen.append(
            (devices.current, device, settings)
        ),
    )
    backend = fresh("triton")
    backend._launch("kernel", (1,), torch.device("cuda", index), D=4)
    backend._launch("kernel", (1,), torch.device("cuda", index), D=4, enable_fp_fusion=False)
    assert [one[:2] for one in seen] == [(index, index)] * 2
    assert devices.current == 0
    # Said each time: what is not said changes its meaning with Triton 3.10.
    assert [one[2] for one in seen] == [
        {"D": 4, "enable_fp_fusion": True},
        {"D": 4, "enable_fp_fusion": False},
    ]


@pytest.mark.parametrize("index", [None, 0, 1])
def test_a_cuda_kernel_is_launched_on_the_tensors_device(card, monkeypatch, index):
    devices, seen = Devices(monkeypatch), []

    class Cupy:
        class cuda:  # noqa: N801
            @staticmethod
            def Device(index):  # noqa: N802
                seen.append(("cupy", index))
                return nullcontext()

    monkeypatch.setattr(cupy_device, "import_cupy", lambda: Cupy)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda index: type("Stream", (), {"cuda_stream": 70 + index})
    )
    backend = CupyBackend()
    backend._load = lambda kernel, device: (
        lambda blocks, threads, args, stream: seen.append((devices.current, stream.ptr, args))
    )
    for _ in range(2):
        backend._launch("kernel", (1, 1), (32, 1), torch.device("cuda", index), 3, None, 0.5)
    at = index or 0
    assert seen == [("cupy", at), (at, 70 + at, [3, 0, 0.5])] * 2
    assert devices.current == 0


def test_the_flag_goes_by_the_address_that_the_device_has(monkeypatch):
    """Where torch registers pinned memory by itself, the device's address is another than the host's."""
    asked = []

    class Cupy:
        class cuda:  # noqa: N801
            class runtime:  # noqa: N801
                @staticmethod
                def pointerGetAttributes(address):  # noqa: N802
                    asked.append(address)
                    return type("Attributes", (), {"devicePointer": address + 4096})

    monkeypatch.setattr(cupy_device, "import_cupy", lambda: Cupy)
    cupy_device._device_address.cache_clear()
    flag = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, *_: self is flag)
    for _ in range(2):
        assert cupy_device.as_argument(flag) == flag.data_ptr() + 4096
    assert asked == [flag.data_ptr()]
    other = torch.zeros(1)
    assert cupy_device.as_argument(other) == other.data_ptr()
    cupy_device._device_address.cache_clear()


# The cache of what NVRTC compiled.


@pytest.fixture
def cached(monkeypatch, tmp_path):
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "made" / "kept"))
    return tmp_path / "made" / "kept"


MADE = cubin_cache.Compiled(b"\x7fELF\0image", {"kernel<float>": "_Zk"}, "log")


def the_file(**changed):
    arguments = {"source": "code", "expressions": ["k"], "options": ["-a"], "nvrtc": "12.9"}
    return cubin_cache.file_for(**{**arguments, **changed})


def test_what_was_compiled_is_found_again(cached):
    assert cubin_cache.read(the_file()) is None
    cubin_cache.write(the_file(), MADE)
    assert cubin_cache.read(the_file()) == MADE
    assert [file.suffix for file in cached.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "changed",
    [{"source": "other"}, {"expressions": ["k", "l"]}, {"options": ["-b"]}, {"nvrtc": "13.0"}],
    ids=str,
)
def test_anything_that_matters_is_part_of_the_name(cached, changed):
    assert the_file(**changed) != the_file()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\xff\xfe"),
        lambda file: file.write_bytes(file.read_bytes()[:-20]),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), "image": "AAAA"})),
        lambda file: (file.unlink(), file.mkdir()),
    ],
    ids=["empty", "no text", "cut", "a list", "another image", "a folder"],
)
def test_a_file_that_is_not_whole_is_none(cached, spoil):
    cubin_cache.write(the_file(), MADE)
    spoil(the_file())
    assert cubin_cache.read(the_file()) is None
    cubin_cache.write(the_file(), MADE)


def test_a_folder_that_cannot_be_written_is_no_error(cached, tmp_path, monkeypatch):
    (tmp_path / "made").write_text("a file, where the folder should be")
    cubin_cache.write(the_file(), MADE)
    assert cubin_cache.read(the_file()) is None
    monkeypatch.setenv(user_cache.VARIABLE, "")
    assert the_file() is None
    cubin_cache.write(None, MADE)
    assert cubin_cache.read(None) is None


def test_a_disk_that_is_full_leaves_nothing(cached, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(cubin_cache.os, "replace", full)
    cubin_cache.write(the_file(), MADE)
    assert list(cached.iterdir()) == []


def test_an_interrupt_leaves_nothing(cached, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cubin_cache.json, "dump", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cubin_cache.write(the_file(), MADE)
    assert list(cached.iterdir()) == []


def test_many_write_at_once(cached):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cubin_cache.write(the_file(), MADE), range(64)))
    assert cubin_cache.read(the_file()) == MADE
    assert len(list(cached.iterdir())) == 1


@pytest.mark.full
def test_another_process_does_not_compile_again(cached):
    """The gather for one architecture, compiled by NVRTC in a first process and read by a second."""
    pytest.importorskip("cupy")
    code = """
from gpu_embed.backends._cupy import nvrtc
real = nvrtc.import_cupy().cuda.nvrtc
count = []
compile = real.compileProgram
real.compileProgram = lambda *a: (count.append(1), compile(*a))[1]
made = nvrtc.compile_kernels("counts", ("counts_kernel",), "sm_80")
print(len(count), len(made.image), made.image[:4] == b"\\x7fELF", sorted(made.symbols))
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split(maxsplit=1)
        for _ in range(2)
    ]
    assert [one[0] for one in said] == ["1", "0"]
    assert said[0][1] == said[1][1]
