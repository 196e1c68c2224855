"""Tuned files: which one is in force on which card, what of it is used, and what is ignored and said."""

import json
import threading
from dataclasses import fields

import pytest
import torch

import gpu_embed
from gpu_embed import env_report, user_cache
from gpu_embed.backends import load
from gpu_embed.backends._cupy.launch import CupyLaunches, CupyMethods
from gpu_embed.backends._plan import tuned
from gpu_embed.backends._plan.gradient_method import LIMITS, Limit, choose
from gpu_embed.backends._plan.tuned import Card
from gpu_embed.backends._triton.device import TritonDevice
from gpu_embed.backends._triton.launch import (
    ChunkLaunch,
    FlatLaunch,
    GatherRule,
    RowsLaunch,
    TritonLaunches,
    TritonMethods,
)
from gpu_embed.settings import TUNED

CPU = torch.device("cpu")
CARD = Card("NVIDIA H100 80GB HBM3", "9.0", 132)
ALL = (TritonLaunches(), TritonMethods(), CupyLaunches(), CupyMethods())


def content(card=CARD, kernels=None, launches=None, methods=None, **others):
    """A tuned file of the triton backend."""
    part = {
        "kernels": kernels or tuned.kernels_hash("triton"),
        "launches": launches or {},
        "methods": methods or {},
    }
    return {
        "format": 1,
        **dict(zip(("card", "capability", "multiprocessors"), card, strict=True)),
    } | {
        "triton": part,
        **others,
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder of tuned files; the CPU counts as a card."""
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned, "card_of", lambda device: CARD)
    (tmp_path / "tuned").mkdir()
    with TUNED.set("auto", "test"):
        yield tmp_path / "tuned"


def write(path, text):
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    tuned.forget()
    return path


def scatter_add(block, gain=1.1):
    return {"scatter_add": {"set": {"BLOCK": block, "num_warps": 1}, "gain": gain}}


def block():
    return load("triton")._launches[CPU].scatter_add.BLOCK


DEFAULT = TritonLaunches().scatter_add.BLOCK


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: type(settings).__name__)
def test_each_leaf_has_a_path(settings):
    leaves = tuned.leaves(settings)
    assert leaves
    assert tuned.with_leaves(settings, leaves) == settings
    names = {field.name for field in fields(settings)}
    assert {path.partition("[")[0] for path in leaves} == names


def test_one_leaf_is_replaced_and_no_other():
    launches = TritonLaunches()
    changes = {"gather_rows[256]": RowsLaunch(4, 256), "counts": FlatLaunch(64)}
    changed = tuned.with_leaves(launches, changes)
    assert tuned.leaves(changed) == tuned.leaves(launches) | changes


def test_a_file_of_the_card_is_in_force(folder):
    assert block() == DEFAULT
    path = write(folder / CARD.file_name, content(launches=scatter_add(2 * DEFAULT)))
    assert load("triton")._launches[CPU].scatter_add == ChunkLaunch(2 * DEFAULT)
    assert load("triton")._launches[CPU].counts == TritonLaunches().counts
    assert load("cupy")._launches[CPU] == CupyLaunches()
    with gpu_embed.use_backend("triton"):
        serves = env_report._serves(CPU)
    assert serves["tuned"] == f"{path}: measured on this card"
    assert serves["launches"]["scatter_add"] == f"BLOCK={2 * DEFAULT} num_warps=1"


def test_values_of_each_kind_are_read(folder):
    launches = {"gather_rows[128]": {"set": {"threads": [64, 4], "ROWS": 2}}}
    limit = {"max_indices": 4096, "max_indices_per_row": 1}
    methods = {
        "gradient[atomic][float32]": {"set": limit},
        "gather": {"set": {"max_idle_share": 0.25}},
    }
    cupy = {"kernels": tuned.kernels_hash("cupy"), "launches": launches}
    write(folder / CARD.file_name, content(methods=methods, cupy=cupy))
    rows = load("cupy")._launches[CPU].gather_rows
    assert (rows[128].threads, rows[128].ROWS) == ((64, 4), 2)
    assert rows[64] == CupyLaunches().gather_rows[64]
    found = load("triton")._methods[CPU]
    assert found.gather == GatherRule(0.25)
    assert found.gradient["atomic"][torch.float32] == Limit(4096, 1.0)
    assert found.gradient["atomic"][torch.float64] == LIMITS["atomic"][torch.float64]
    for num_indices, expected in ((4096, "atomic"), (4097, "sorted")):
        chosen = choose(num_indices, 1000, torch.float32, False, False, found.gradient)
        assert chosen == expected


@pytest.mark.parametrize(
    ("cards", "chosen"),
    [
        ((("Other", "9.0", 114), CARD, ("Same kind", "9.0", 132)), 1),
        ((("Other", "9.0", 114), ("Same kind", "9.0", 132)), 1),
        ((("Other", "9.0", 114), ("Older", "8.0", 132)), None),
    ],
    ids=["exact", "kind", "none"],
)
def test_which_card_matches(folder, cards, chosen):
    for i, card in enumerate(cards):
        write(folder / f"{i}.json", content(card, launches=scatter_add(1024 << i)))
    assert block() == (DEFAULT if chosen is None else 1024 << chosen)
    reason = tuned.choose_file(CPU).reason
    if chosen is None:
        assert reason == "no file for NVIDIA H100 80GB HBM3 (9.0, 132 multiprocessors)"


def test_own_measurements_come_before_those_of_the_package(folder, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    own, *_ = tuned.folders()
    assert own == folder
    monkeypatch.setattr(tuned, "folders", lambda: [own, shipped])
    write(shipped / "a.json", content(launches=scatter_add(1024)))
    assert block() == 1024
    # An exact card's file comes before one of the same kind, wherever it lies.
    write(own / "a.json", content(("Same kind", *CARD[1:]), launches=scatter_add(2048)))
    assert block() == 1024
    write(own / "b.json", content(launches=scatter_add(512)))
    assert block() == 512


def test_launches_of_other_kernels_are_ignored_and_methods_are_kept(folder):
    gather = {"gather": {"set": {"max_idle_share": 0.5}}}
    path = write(folder / "a.json", content(CARD, "0" * 16, scatter_add(1024), gather))
    assert block() == DEFAULT
    assert load("triton")._methods[CPU].gather == GatherRule(0.5)
    expected = f"{path}: measured on this card; its launches are of other kernels"
    assert env_report._tuned("triton", CPU) == expected


def test_unknown_fields_are_said_in_one_line(folder, caplog):
    launches = scatter_add(1024) | {
        "no_kernel": {"set": {"BLOCK": 64}},
        "counts": {"set": {"BLOCK": 64, "WIDTH": 3}},
        "sort_keys": {"set": {"BLOCK": 100}},
        "bag_of": {"set": {"BLOCK": True}},
        "take_rows": {"set": {"BLOCK": "64"}},
        "table_keys": {"set": {"BLOCK": 0}},
        "gather_flat": 64,
    }
    write(folder / "a.json", content(launches=launches))
    found = load("triton")._launches[CPU]
    assert found == tuned.with_leaves(TritonLaunches(), {"scatter_add": ChunkLaunch(1024)})
    (said,) = caplog.messages
    for name in ("no_kernel", "counts.WIDTH", "sort_keys.BLOCK", "bag_of.BLOCK", "gather_flat"):
        assert name in said
    assert load("triton")._launches[CPU] is found


def test_unknown_fields_of_the_file_are_said_in_one_line(folder, caplog):
    path = write(folder / "a.json", content(launches=scatter_add(1024), rocm={}, wishes=3))
    assert block() == 1024
    assert load("triton")._methods[CPU] == TritonMethods()
    assert caplog.messages == [f"gpu_embed: {path}: ignored: rocm, wishes"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"card": "x"}', '{"card": "x", "format": 2}', "\udcff", "[" * 10**5],
)
def test_a_corrupted_file_is_said_and_ignored(folder, caplog, text):
    (folder / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    tuned.forget()
    assert block() == DEFAULT
    (said,) = caplog.messages
    assert "a.json is no tuned file and is ignored" in said
    write(folder / "b.json", content(launches=scatter_add(1024)))
    assert block() == 1024


@pytest.mark.parametrize("number", [10**400, float("nan"), -1, True, "0.5"])
def test_a_limit_that_is_no_number_is_ignored(folder, caplog, number):
    methods = {"gather": {"set": {"max_idle_share": number}}}
    write(folder / CARD.file_name, content(methods=methods))
    assert load("triton")._methods[CPU].gather == GatherRule()
    assert "ignored in triton.methods: gather.max_idle_share" in caplog.text


@pytest.mark.parametrize("part", [7, [], {"launches": 3}, {"launches": {}, "methods": None}])
def test_a_part_of_another_shape_is_ignored(folder, part):
    write(folder / "a.json", content() | {"triton": part})
    assert load("triton")._launches[CPU] == TritonLaunches()
    assert load("triton")._methods[CPU] == TritonMethods()


def test_off_and_a_file_by_name(folder, tmp_path, monkeypatch):
    write(folder / "a.json", content(launches=scatter_add(1024)))
    other = write(tmp_path / "other.json", content(launches=scatter_add(2048)))
    assert block() == 1024
    with TUNED.set("off", "test"):
        assert block() == DEFAULT
        assert env_report._tuned("triton", CPU) == "defaults: GPU_EMBED_TUNED=off"
    with TUNED.set(str(other), "test"):
        assert block() == 2048
    assert block() == 1024


def test_a_named_file_of_another_card_is_said(folder, tmp_path, caplog):
    path = write(tmp_path / "a.json", content(("Other", "8.0", 108), launches=scatter_add(1024)))
    with TUNED.set(str(path), "test"):
        assert block() == DEFAULT
        said = f"{path} is for Other, this is {CARD.name}"
        assert caplog.messages == [f"gpu_embed: {said}"]
        assert env_report._tuned("triton", CPU) == f"defaults: {said}"


def test_a_named_file_that_is_none_is_an_error(folder, tmp_path):
    with pytest.raises(ValueError, match=r"GPU_EMBED_TUNED.*'auto', 'off'.*which is no file"):
        TUNED.set(str(tmp_path / "none.json"), "GPU_EMBED_TUNED")
    path = write(tmp_path / "a.json", "{")
    with TUNED.set(str(path), "test"):
        with pytest.raises(ValueError, match=r"GPU_EMBED_TUNED=.*a\.json: no tuned file"):
            block()
        assert "no tuned file" in env_report._tuned("triton", CPU)


def test_no_card_has_no_file():
    assert tuned.choose_file(CPU) == (None, "cpu has no tuned settings", {})


def test_the_file_is_read_once_a_device(folder, monkeypatch):
    write(folder / "a.json", content(launches=scatter_add(1024)))
    reads = []
    read = tuned.read
    monkeypatch.setattr(tuned, "read", lambda path: reads.append(path) or read(path))
    seen = {block()}
    threads = [threading.Thread(target=lambda: seen.add(block())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {1024}
    assert load("triton")._methods[CPU] == TritonMethods()
    assert len(reads) == 1


def test_what_is_read_during_a_change_is_not_kept(folder, tmp_path, monkeypatch):
    new = write(tmp_path / "new.json", content(launches=scatter_add(2048)))
    settings_for, has_read, is_changing = tuned.settings_for, threading.Event(), threading.Event()

    def slow(*args):
        found = settings_for(*args)
        has_read.set()
        is_changing.wait(10)
        return found

    monkeypatch.setattr(tuned, "settings_for", slow)
    reader = threading.Thread(target=block)

    def forget():
        # The reader has time to keep what it read, if nothing stops it.
        tuned.forget()
        is_changing.set()
        reader.join(0.2)

    monkeypatch.setattr(TUNED, "on_change", forget)
    reader.start()
    assert has_read.wait(10)
    TUNED.set(str(new), "test")
    reader.join()
    monkeypatch.undo()
    monkeypatch.setattr(tuned, "card_of", lambda device: CARD)
    assert block() == 2048


def test_a_compiled_model_sees_the_same_settings(folder, monkeypatch):
    """torch.compile calls the operators, so what they launch is decided as without it."""
    pytest.importorskip("triton")
    launches = {"gather_rows[256]": {"set": {"BLOCK_N": 4, "BLOCK_D": 256, "num_warps": 1}}}
    write(folder / "a.json", content(launches=launches))
    seen = []
    launch = TritonDevice._launch

    def see(self, kernel, grid, device, *args, **settings):
        seen.append((kernel.__name__, settings["BLOCK_N"], settings["num_warps"]))
        launch(self, kernel, grid, device, *args, **settings)

    monkeypatch.setattr(TritonDevice, "_launch", see)
    layer, ids = gpu_embed.Embedding(9, 512, device="cpu"), torch.arange(9)
    with gpu_embed.use_backend("triton"):
        output = torch.compile(layer, backend="eager", fullgraph=True)(ids)
    assert torch.equal(output, layer.weight)
    assert set(seen) == {("gather_rows_kernel", 4, 1)}
