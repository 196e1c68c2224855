"""The benchmark's pictures, from synthetic rows: what they show, and that it can be read."""

import io
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

image = pytest.importorskip("matplotlib.image", reason="the benchmark's extra is not installed")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.text import Text  # noqa: E402
from pictured import BASE, HEADER, texts_of  # noqa: E402

from gpu_embed.bench import plots  # noqa: E402
from gpu_embed.bench.results import (  # noqa: E402
    Row,
    RowWriter,
    read_header,
    read_rows,
    write_header,
    write_whole,
)
from gpu_embed.bench.shapes import ACCUMULATE, STEPS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SPEED = {"gpu_embed": 1.0, "gpu_embed-sorted": 1.5, "torch": 2.0, "liger-kernel": 4.0}
OTHERS = {"gpu_embed-in-backward": 1.0, "fbgemm-gpu-cpu": 2.0}


def rows_of(providers=tuple(SPEED), **axes) -> list[Row]:
    """Timed rows for every combination of the axes' values."""
    rows = []
    for values in itertools.product(*axes.values()):
        for name in providers:
            cell = replace(BASE, provider=name, **dict(zip(axes, values, strict=True)))
            ms = {**SPEED, **OTHERS}[name] * (1e-6 * cell.vocab + 2e-7 * cell.num_ids)
            rows.append(
                replace(cell, ms_p20=0.9 * ms, ms_p50=ms, ms_p80=1.1 * ms, percent_of_copy=50 / ms)
            )
    return rows


def failed(row: Row, status: str) -> Row:
    return replace(row, status=status, ms_p20=None, ms_p50=None, ms_p80=None, percent_of_copy=None)


def drawn(rows, draw=plots.pictures, header=HEADER):
    """The pictures and the skipped kinds."""
    if draw is not plots.pictures:
        styles = plots.choose_styles(row.provider for row in rows)
        items = list(draw(rows, styles, plots.describe_run(rows, header)))
    else:
        items = list(draw(rows, header))
    return (
        [item for item in items if isinstance(item, plots.Picture)],
        [item for item in items if isinstance(item, plots.Skipped)],
    )


def lines_of(axes):
    """The providers' curves by name."""
    return {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}


def tick_texts(axis):
    FigureCanvasAgg(axis.figure).draw()
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
    ]


VOCABS = [2**k for k in range(10, 18)]
GROWING = (10_000, 1_000_000, 50_000_000)
SHARES = ("uniform", "hot:0.01", "hot:0.5", "hot:0.9", "equal")
RICH_ROWS = [
    *rows_of(mode=["forward", "backward"], vocab=VOCABS, dim=[64, 4096]),
    *rows_of(set=["F"], distribution=SHARES, vocab=[100, 2000, 1_720_000], dtype=["bfloat16"]),
    *rows_of(
        set=["J"], mode=["forward", "backward", "full"], vocab=GROWING, distribution=["zipf:1"]
    ),
    *rows_of(
        set=["K"],
        mode=list(STEPS),
        vocab=GROWING,
        operation=["embedding_bag"],
        hotness=[16],
        step_peak_bytes=[2**30],
    ),
    *rows_of(set=["N"], mode=list(ACCUMULATE), vocab=GROWING, dtype=["bfloat16"]),
    # Long names and many words in a narrow picture.
    *rows_of(
        ("gpu_embed-in-backward", "fbgemm-gpu-cpu"),
        set=["L"],
        mode=["step_rowwise_adagrad"],
        vocab=GROWING,
        operation=["embedding_bag"],
        hotness=[16],
        tables=[32],
        id_dtype=["int32"],
    ),
]


@pytest.fixture(scope="module")
def rich_pictures():
    return drawn(RICH_ROWS)[0]


def test_every_kind_is_drawn(rich_pictures):
    kinds = {picture.name.split("-")[0] for picture in rich_pictures}
    assert kinds == {"vocabulary", "ratio", "contention", "growth", "step", "accumulation"}
    assert len({picture.name for picture in rich_pictures}) == len(rich_pictures)


@pytest.mark.full
def test_no_text_covers_another_or_leaves_the_picture(rich_pictures):
    for picture in rich_pictures:
        texts, frame = texts_of(picture.figure)
        assert len(texts) > 10
        for text, box in texts:
            corners = (box.x0, box.y0, frame.x1 - box.x1, frame.y1 - box.y1)
            assert min(corners) >= -1, f"{picture.name}: {text!r} is cut off"
        for (one, box), (other, other_box) in itertools.combinations(texts, 2):
            # A line's ascent and descent reach a little over its letters.
            overlap = box.padded(-2).overlaps(other_box.padded(-2))
            assert not overlap, f"{picture.name}: {one!r} covers {other!r}"


def test_every_caption_names_the_machine_versions_and_commit(rich_pictures):
    for picture in rich_pictures:
        caption = picture.figure.get_supxlabel().replace("\n", " · ")
        for part in ("Synthetic Card 1", "driver 111.22", "torch 9.8.7", "triton 6.5.4"):
            assert part in caption, picture.name
        assert "commit 0123456789ab with uncommitted changes" in caption
        assert "2001-02-03" in caption


def test_a_provider_has_one_colour_in_every_picture(rich_pictures):
    colours = {}
    for picture in rich_pictures:
        for axes in picture.figure.axes:
            for name, line in lines_of(axes).items():
                colours.setdefault(name, set()).add(to_hex(line.get_color()))
    assert set(colours) == set(SPEED | OTHERS)
    assert all(len(found) == 1 for found in colours.values())
    assert len(set().union(*colours.values())) == len(SPEED | OTHERS)


def test_the_files_are_pictures_and_the_skipped_kinds_are_said(tmp_path: Path, capsys):
    rows = rows_of(distribution=SHARES)
    with RowWriter(tmp_path) as writer:
        for row in rows:
            writer.write(row)
    write_header(tmp_path, HEADER)
    paths = plots.plot_directory(tmp_path)
    assert [path.name for path in paths] == [
        "ratio-forward-torch.png",
        "ratio-forward-liger_kernel.png",
        "contention-S-forward.png",
    ]
    for path in paths:
        pixels = image.imread(path)
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 600
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
    printed = capsys.readouterr().out
    assert "not drawn: time against vocabulary: no shape was timed at 3 or more" in printed
    assert "not drawn: cost growth" in printed
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".csv", ".json"}


def test_a_lost_header_is_read_off_the_rows(tmp_path: Path):
    with RowWriter(tmp_path) as writer:
        for row in rows_of(("gpu_embed", "torch")):
            writer.write(row)
    assert len(plots.plot_directory(tmp_path)) == 1
    assert plots.describe_run(rows_of(), {}) == (
        "Synthetic Card 1 · torch 9.8.7 · triton 6.5.4 · commit 0123456789ab"
    )


def test_a_failed_save_leaves_the_old_picture(tmp_path: Path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_time_and_bandwidth_stand_over_the_vocabulary():
    (picture,), _ = drawn(rows_of(vocab=VOCABS, dim=[64, 4096]), plots.vocabulary_pictures)
    panels = np.reshape(picture.figure.axes, (2, 2))
    assert picture.name == "vocabulary-S-forward-float32"
    assert "time (ms)" in panels[0, 0].get_ylabel()
    assert "% of measured copy bandwidth" in panels[1, 0].get_ylabel()
    assert [panel.get_title().split(",")[0] for panel in panels[0]] == ["D = 64", "D = 4"]
    for panel in panels.flat:
        assert list(lines_of(panel)) == list(reversed(list(SPEED)))
    times = lines_of(panels[0, 0])["torch"]
    assert list(times.get_xdata()) == VOCABS
    assert list(times.get_ydata()) == [2 * (1e-6 * v + 2e-7 * 65_536) for v in VOCABS]
    assert panels[1, 0].get_xlabel() == "vocabulary V (rows of the table)"
    assert panels[0, 0].get_xscale() == panels[0, 0].get_yscale() == "log"
    assert tick_texts(panels[1, 0].xaxis) == ["1k", "10k", "100k"]
    assert tick_texts(panels[0, 0].yaxis) == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]


def test_without_a_bandwidth_there_is_no_empty_panel():
    rows = [replace(row, percent_of_copy=None) for row in rows_of(vocab=VOCABS)]
    (picture,), _ = drawn(rows, plots.vocabulary_pictures)
    assert len(picture.figure.axes) == 1


def test_a_row_without_a_time_breaks_its_line_and_is_named():
    rows = rows_of(("gpu_embed", "torch", "liger-kernel"), vocab=VOCABS)
    rows = [failed(row, "wrong") if row.provider == "liger-kernel" else row for row in rows]
    rows = [failed(r, "oom") if (r.provider, r.vocab) == ("torch", 4096) else r for r in rows]
    (picture,), _ = drawn(rows, plots.vocabulary_pictures)
    curves = lines_of(picture.figure.axes[0])
    assert set(curves) == {"gpu_embed", "torch"}
    assert np.isnan(curves["torch"].get_ydata()).tolist() == [v == 4096 for v in VOCABS]
    caption = picture.figure.get_supxlabel()
    assert caption.startswith("No point: torch oom at 1 size · liger-kernel wrong at 8 sizes")


def test_many_shapes_go_to_several_pictures():
    found, _ = drawn(rows_of(vocab=VOCABS, dim=[1, 2, 3, 4]), plots.vocabulary_pictures)
    assert [picture.name[-2:] for picture in found] == ["-1", "-2"]
    assert [len(picture.figure.axes) for picture in found] == [6, 2]


def squares_of(figure):
    return {text.get_text() for text in figure.axes[0].texts}


def test_the_heat_map_shows_mean_worst_and_failures():
    rows = rows_of(("gpu_embed", "torch"), vocab=[1024, 3072, 3073], num_ids=[16384])
    rows += rows_of(("gpu_embed", "torch"), vocab=[1024], num_ids=[16384], dim=[64])
    # The second cell of the first square: torch is at half our time.
    rows[-1] = replace(rows[-1], ms_p50=rows[-2].ms_p50 / 2)
    rows[3] = failed(rows[3], "oom")
    rows[4] = failed(rows[4], "wrong")
    (picture,), _ = drawn(rows, plots.ratio_pictures)
    assert squares_of(picture.figure) == {"1.00x\n0.50 of 2", "oom", "ours:\nwrong"}
    (bold,) = (t for t in picture.figure.axes[0].texts if t.get_fontweight() == "bold")
    assert bold.get_text().startswith("1.00x")
    axes, bar = picture.figure.axes
    # 3.07k would name two of them.
    assert tick_texts(axes.xaxis) == ["1.02k", "3,072", "3,073"]
    assert axes.get_ylabel() == "ids N in a call"
    assert "rival's time / gpu_embed's time" in bar.get_ylabel()
    assert picture.title == "How many times faster gpu_embed is than torch: forward"


def test_a_heat_map_for_each_mode_operation_and_rival():
    rows = rows_of(mode=["forward", "backward"])
    rows += rows_of(mode=["full"], operation=["embedding_graph"])
    found, _ = drawn(rows, plots.ratio_pictures)
    assert {picture.name for picture in found} == {
        f"ratio-{what}-{rival}"
        for what in ("forward", "backward", "embedding_graph_full")
        for rival in ("torch", "liger_kernel")
    }


def test_contention_is_over_the_share_of_hot_ids():
    rows = rows_of(distribution=[*SHARES, "zipf:1.05", "sorted"])
    (picture,), _ = drawn(rows, plots.contention_pictures)
    (panel,) = picture.figure.axes
    assert list(lines_of(panel)["gpu_embed"].get_xdata()) == [0, 0.01, 0.5, 0.9, 1]
    assert tick_texts(panel.xaxis) == ["0%", "1%", "10%", "25%", "50%", "100%"]
    assert "one and the same row" in panel.get_xlabel()
    assert "ms" in panel.get_ylabel()


@pytest.mark.parametrize(
    ("distribution", "share"),
    [
        ("uniform", 0.0),
        ("equal", 1.0),
        ("hot:0.25", 0.25),
        ("hot:1", 1.0),
        ("hot:1.5", None),
        ("hot:", None),
        ("hot:nan", None),
        ("zipf:0.5", None),
        ("sorted", None),
    ],
)
def test_the_hot_share_of_a_distribution(distribution, share):
    assert plots.hot_fraction(distribution) == share


def test_growth_is_a_multiple_of_the_smallest_vocabulary():
    rows = rows_of(mode=["forward", "backward", "full"], vocab=GROWING)
    (picture,), _ = drawn(rows, plots.growth_pictures)
    panels = [panel for panel in picture.figure.axes if panel.get_visible()]
    assert [panel.get_title() for panel in panels] == ["forward", "backward", "full"]
    curve = lines_of(panels[0])["torch"].get_ydata()
    assert curve[0] == 1
    assert curve[2] == pytest.approx((50 + 2e-7 * 65_536) / (0.01 + 2e-7 * 65_536))
    assert "multiple" in panels[0].get_ylabel()
    assert tick_texts(panels[0].xaxis) == ["10k", "100k", "1M", "10M"]


@pytest.mark.parametrize(
    ("vocabs", "enough"),
    [
        ((10_000, 100_000, 1_000_000), True),
        ((10_000, 1_000_000), False),
        ((10_000, 20_000, 90_000), False),
        ((100, 10_000, 20_000, 900_000), False),
    ],
)
def test_growth_needs_points_and_a_span_within_its_range(vocabs, enough):
    found, skipped = drawn(rows_of(vocab=vocabs), plots.growth_pictures)
    assert bool(found) is enough
    assert bool(skipped) is not enough


def test_steps_are_drawn_with_their_memory():
    rows = rows_of(mode=["step_adam", "step"], vocab=GROWING, dim=[32, 64])
    rows = [replace(row, step_peak_bytes=3 * 2**20 * row.vocab // 1000) for row in rows]
    found, _ = drawn(rows, plots.step_pictures)
    assert [picture.name for picture in found] == [
        f"step-S-D_{dim}-N_65_536-float32-uniform" for dim in (32, 64)
    ]
    panels = np.reshape(found[0].figure.axes, (2, 2))
    # In the order in which the modes are listed, on common scales.
    assert [panel.get_title() for panel in panels[0]] == ["SGD", "Adam"]
    assert panels[0, 0].get_ylim() == panels[0, 1].get_ylim()
    assert list(lines_of(panels[1, 1])["torch"].get_ydata()) == [30, 3000, 150_000]
    assert "time of a step (ms)" in panels[0, 0].get_ylabel()
    assert "MiB" in panels[1, 0].get_ylabel()
    assert "in-backward" in found[0].figure.get_supxlabel()


def test_pictures_of_steps_say_how_times_grow():
    by_table = rows_of(("gpu_embed", "torch"), mode=["step"], vocab=GROWING, num_ids=[64])
    by_batch = rows_of(("gpu_embed", "torch"), mode=["step"], vocab=[10], num_ids=[64, 1024, 4096])
    (table, batch), _ = drawn(by_table + by_batch, plots.step_pictures)
    for picture, letter, word in ((table, "V", "table"), (batch, "N", "batch")):
        assert f"as the {word} grows" in picture.title
        (panel,) = picture.figure.axes
        ours, theirs = panel.texts
        assert ours.get_text() == theirs.get_text()
        assert ours.get_text().startswith(f"{letter}^0.")
        assert "±" in ours.get_text()
        assert ours.get_color() != theirs.get_color()
        assert "least squares" in picture.figure.get_supxlabel()


@pytest.mark.full
def test_the_docs_picture_of_steps_is_drawn_from_committed_rows():
    picture = (ROOT / "docs" / "pictures" / "step_as_the_table_grows.png").resolve()
    items = plots.pictures(read_rows(picture.parent), read_header(picture.parent))
    (again,) = (item for item in items if getattr(item, "name", "") == picture.stem)
    drawn_now = image.imread(io.BytesIO(plots.png(again.figure)))
    shown = image.imread(picture)
    assert drawn_now.shape == shown.shape
    # Another matplotlib may set a letter elsewhere.
    assert np.abs(drawn_now - shown).mean() < 0.01


def test_steps_without_memory_have_no_empty_panel_and_no_other_picture_of_time():
    rows = rows_of(mode=["step"], vocab=GROWING)
    (picture,), _ = drawn(rows, plots.step_pictures)
    assert len(picture.figure.axes) == 1
    assert drawn(rows, plots.vocabulary_pictures)[0] == []


def test_accumulation_is_drawn_with_its_memory():
    rows = rows_of(mode=list(ACCUMULATE), vocab=GROWING, dtype=["bfloat16"])
    rows = [replace(row, peak_extra_bytes=2**20 * row.vocab // 1000) for row in rows]
    (picture,), _ = drawn(rows, plots.accumulation_pictures)
    assert picture.name == "accumulation-S-D_128-N_65_536-bfloat16-uniform"
    panels = np.reshape(picture.figure.axes, (2, 2))
    titles = ["gradient in bfloat16", "gradient in float32"]
    assert [panel.get_title() for panel in panels[0]] == titles
    assert "time of a backward (ms)" in panels[0, 0].get_ylabel()
    assert "(MiB)" in panels[1, 0].get_ylabel()
    assert list(lines_of(panels[1, 1])["torch"].get_ydata()) == [10, 1000, 50_000]
    assert "accumulate_in_place" in picture.figure.get_supxlabel()
    assert drawn(rows, plots.vocabulary_pictures)[0] == []


@pytest.mark.parametrize(
    "change",
    [
        lambda row: replace(row, ms_p20=0.0, percent_of_copy=0.0),
        lambda row: replace(row, ms_p50=0.0),
        lambda row: replace(row, ms_p20=None, ms_p50=1e-250 * row.vocab, ms_p80=None),
        lambda row: replace(row, ms_p20=None, ms_p50=1e250 * row.vocab, ms_p80=None),
        lambda row: replace(row, percent_of_copy=1e30),
        lambda row: replace(row, mode="step", step_peak_bytes=0),
        lambda row: replace(row, set="<b>/..", distribution="../x y.npy"),
    ],
    ids=["zero p20", "zero time", "tiny", "huge", "vast share", "zero peak", "odd names"],
)
def test_odd_values_are_drawn_or_skipped(change):
    rows = [change(row) for row in rows_of(("gpu_embed",), vocab=[10, 100, 1000])]
    pictures, skipped = drawn(rows)
    assert len(pictures) + len(skipped) >= 6
    for picture in pictures:
        assert plots.png(picture.figure).startswith(b"\x89PNG")
        assert "/" not in picture.name


def test_bags_are_named_in_titles():
    rows = rows_of(vocab=VOCABS, operation=["embedding_bag"], hotness=[1, 16])
    (picture,), _ = drawn(rows, plots.vocabulary_pictures)
    titles = [panel.get_title() for panel in picture.figure.axes[:2]]
    assert ["bags of" in title for title in titles] == [False, True]
    assert "N = 65,536, bags of 16" in titles[1]


def test_nothing_at_all_is_six_kinds_skipped():
    found, skipped = drawn([failed(row, "error") for row in rows_of(vocab=VOCABS)])
    assert not found
    assert len(skipped) == 6
    assert all(item.reason for item in skipped)


def test_known_providers_keep_their_style_whoever_else_is_there():
    few = plots.choose_styles(["torch", "gpu_embed"])
    many = plots.choose_styles(["new-rival", "torch", "gpu_embed-new", *plots.STYLES])
    assert many["torch"] == few["torch"]
    assert list(few) == ["gpu_embed", "torch"]
    assert len({style.colour for style in many.values()}) == len(many)
    assert all(plots.is_ours(name) for name in list(many)[:5])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2, "2"),
        (1000, "1k"),
        (10_000, "10k"),
        (1_677_721, "1.68M"),
        (999_999, "1M"),
        (50_000_000, "50M"),
        (2**31, "2.15G"),
    ],
)
def test_plain_numbers(value, text):
    assert plots.short_number(value) == text


@pytest.mark.full
@pytest.mark.parametrize("odd", ["$a$", "$\\frac$", "a$b$"])
@pytest.mark.parametrize("before", ["", "_"])
def test_odd_names_are_written_as_they_are(odd, before):
    """A set, a file of ids, a provider and a card may be called anything."""
    name = before + odd
    rows = [
        replace(row, set=name, provider=name if row.provider == "torch" else row.provider)
        for row in rows_of(vocab=GROWING, distribution=[f"{odd}.npy"], device=[odd])
    ]
    steps = [replace(row, mode="step") for row in rows]
    pictures, _ = drawn([*rows, *steps], header={})
    kinds = [picture.name.split("-")[0] for picture in pictures]
    assert sorted(kinds) == ["growth", *["ratio"] * 4, "step", "vocabulary"]
    for picture in pictures:
        figure = picture.figure
        assert plots.png(figure).startswith(b"\x89PNG")
        for text in figure.findobj(Text):
            assert odd not in text.get_text() or not text.get_parse_math(), text
        assert odd in figure.get_supxlabel()
        # A heat map's title names one rival, and not the set.
        assert odd in figure.get_suptitle() or not figure.legends
        for legend in figure.legends:
            assert {text.get_text() for text in legend.get_texts()} == {*SPEED, name} - {"torch"}
    assert sum(len(picture.figure.legends) for picture in pictures) == 3


def test_file_names_are_safe():
    rows = rows_of(set=["../odd set"], vocab=VOCABS)
    (picture,), _ = drawn(rows, plots.vocabulary_pictures)
    assert picture.name == "vocabulary-.._odd_set-forward-float32"
    assert image.imread(io.BytesIO(plots.png(picture.figure))).size
