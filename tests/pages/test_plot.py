"""Pictures of tables: the right points, readable labels, and errors that say what to do."""

import importlib
import io
import sys

import numpy as np
import pytest
import torch

plot = pytest.importorskip("gpu_embed.plot", exc_type=ImportError)

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402

WORDS = ["hope", "to", "see", "you", "soon", "nice", "again"]


def points(figure):
    (axes,) = figure.axes
    return [tuple(point) for line in axes.lines for point in line.get_xydata().tolist()]


def test_two_columns_are_drawn_as_they_are(tmp_path):
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.25]]))
    figure = plot.table(weight, ["a", "b", "c"], title="three rows")
    assert points(figure) == [(1.0, 2.0), (3.0, -4.0), (0.5, 0.25)]
    assert {text.get_text() for text in figure.axes[0].texts} == {"a", "b", "c"}
    assert figure.axes[0].get_title() == "three rows"
    assert figure.axes[0].get_xlabel() == "first value of the row"
    # One scale on both axes.
    assert figure.axes[0].get_aspect() == 1
    figure.savefig(tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 5000


def test_more_columns_are_their_principal_components():
    # All variance lies along (3, 4, 0) and (0, 0, 1): 2 * 25 * 4 against 2 * 1.
    along, across = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    weight = torch.stack([2 * along, -2 * along, across, -across]) + 7
    projection = plot.project(weight.to(torch.bfloat16))
    expected = torch.tensor([[10, 0], [-10, 0], [0, 1], [0, -1]], dtype=torch.float64)
    assert torch.allclose(projection.points, expected, atol=1e-12)
    assert projection.axes == (
        "first principal component (99 % of the variance)",
        "second principal component (1 % of the variance)",
    )


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (2, 5), (4, 1), (0, 2)], ids=str)
def test_small_tables(shape):
    assert len(points(plot.table(torch.randn(shape)))) == shape[0]


def test_equal_rows_have_no_variance():
    projection = plot.project(torch.ones(3, 4))
    assert projection.points.abs().max() == 0
    assert "(0 % of the variance)" in projection.axes[0]


def test_labels_stand_apart():
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    figure = plot.table(weight)
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 40
    overlapping = sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert overlapping == 0


# What matplotlib sets as a formula, refuses as one, or leaves out of a legend.
ODD_NAMES = ["$a$", "$\\frac$", "a$b$c_", "$", "_hidden", "_", "", " ", "_nolegend_", "$a$ "]


def texts_as_drawn(figure):
    """Every text of a figure that was drawn, and whether it may be a formula."""
    figure.savefig(io.BytesIO(), format="png")
    return {text.get_text(): text.get_parse_math() for text in figure.findobj(Text)}


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.full
@pytest.mark.parametrize("before", [None, torch.zeros(len(ODD_NAMES), 2)], ids=["now", "moves"])
@pytest.mark.parametrize("odd", ODD_NAMES, ids=repr)
def test_odd_names_are_written_as_they_are(odd, before):
    weight = torch.arange(2.0 * len(ODD_NAMES)).view(-1, 2)
    figure = plot.table(weight, ODD_NAMES, groups=ODD_NAMES, title=odd, before=before)
    (axes,) = figure.axes
    assert axes.get_title() == odd
    assert [t.get_text() for t in axes.texts if t.get_text()] == list(filter(None, ODD_NAMES))
    assert legend_of(axes) == ["before", "after"][: 0 if before is None else 2] + ODD_NAMES
    drawn = texts_as_drawn(figure)
    assert not any(drawn[name] for name in ODD_NAMES if name)


def test_the_legend_of_a_callers_axes_keeps_its_lines():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label="diagonal")
    plot.table(torch.randn(2, 2), groups=["_a", "b"], axes=axes)
    assert legend_of(axes) == ["diagonal", "_a", "b"]


def test_without_groups_there_is_no_legend():
    assert plot.table(torch.randn(3, 2)).axes[0].get_legend() is None
    assert plot.table(torch.randn(0, 2), groups=[]).axes[0].get_legend() is None


def test_labels_that_are_numbers():
    figure = plot.table(torch.randn(3, 2), [0, 1, 2])
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "1", "2"]


@pytest.mark.full
@pytest.mark.parametrize("odd", ["$\\frac$", "_ours", "$a$"])
def test_odd_names_in_the_picture_of_the_demo(odd):
    from gpu_embed.demo import picture as _demo_picture

    before, after = torch.randn(2, 2, 2)
    losses = {"torch": [2.0, 1.0], odd: [2.0, 1.5]}
    figure = _demo_picture.draw([odd, "to"], before, after, losses, guessing=3.0)
    legends = [axes.get_legend() for axes in figure.axes]
    names = [[text.get_text() for text in legend.get_texts()] for legend in legends if legend]
    assert ["torch", odd, "guessing by word frequency"] in names
    assert texts_as_drawn(figure)[odd] is False


def test_groups_and_ids_as_arrays():
    groups = np.array([1, 2, 1])
    for ids in (torch.tensor([2, 0, 6], dtype=torch.uint8), np.array([2, 0, 6]), (2, 0, 6)):
        figure = plot.table(torch.arange(14).view(7, 2), ids=ids, groups=groups)
        assert points(figure) == [(4.0, 5.0), (12.0, 13.0), (0.0, 1.0)]
        assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["1", "2"]
    assert points(plot.table(torch.randn(7, 2), ids=[])) == []


def test_only_rows_that_are_drawn_must_be_finite():
    weight = torch.zeros(4, 3)
    weight[2, 1] = torch.inf
    assert len(points(plot.table(weight, ids=[0, 1, 3]))) == 3
    for arguments in ({}, {"ids": [3, 2]}, {"ids": [2], "before": torch.zeros(4, 3)}):
        with pytest.raises(ValueError, match="row 2 is not finite"):
            plot.table(weight, **arguments)
    with pytest.raises(ValueError, match="row 2 is not finite"):
        plot.table(torch.zeros(4, 3), before=weight)


def test_a_label_goes_to_the_nearest_free_place():
    """Right of its point; where that is taken, outside or drawn upon, the next place round it."""
    box = plot.Bbox([[95, 95], [105, 105]])
    frame = plot.Bbox([[0, 0], [200, 200]])
    nothing, far = np.zeros((0, 2)), np.array([[1.0, 1.0]])
    right = (5 + 12, 0)
    assert plot.free_shift(box, far, [], frame) == right
    assert plot.free_shift(box, nothing, [], frame) == right
    for taken in (
        {"labels": [box.translated(*right)]},
        {"frame": plot.Bbox([[0, 0], [121, 200]])},
        {"drawn": np.array([[117.0, 100.0]])},
    ):
        x, y = plot.free_shift(**{"box": box, "drawn": far, "labels": [], "frame": frame, **taken})
        assert (x, y) != right
        assert np.hypot(x, y) < 25


def test_matplotlib_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "gpu_embed.plot")
    with pytest.raises(ModuleNotFoundError, match='install the extra "demo"'):
        importlib.import_module("gpu_embed.plot")


def test_ids_are_labels_of_up_to_a_hundred_rows():
    weight = torch.arange(202.0).view(101, 2)
    assert [text.get_text() for text in plot.table(weight[:100]).axes[0].texts][-1] == "99"
    assert not plot.table(weight).axes[0].texts


def test_chosen_rows_and_groups():
    weight = torch.arange(14.0).view(7, 2)
    figure = plot.table(weight, ["see", "again"], ids=[2, 6], groups=["verb", "adverb"])
    assert points(figure) == [(4.0, 5.0), (12.0, 13.0)]
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["verb", "adverb"]


def test_way_from_an_earlier_state():
    before = torch.tensor([[0.0, 0.0], [5.0, 5.0], [1.0, 0.0]])
    weight = torch.tensor([[2.0, 1.0], [5.0, 6.0], [0.0, 3.0]])
    figure = plot.table(weight, ["a", "b"], ids=[0, 2], before=before)
    (axes,) = figure.axes
    arrows = [(t.xyann, t.xy) for t in axes.texts if t.arrow_patch is not None]
    assert arrows == [((0, 0), (2, 1)), ((1, 0), (0, 3))]
    assert [t.get_text() for t in axes.texts if t.arrow_patch is None] == ["a", "b"]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["before", "after"]
    # Each way has a colour of its own, and its word has it too.
    assert len({t.get_color() for t in axes.texts if t.get_text()}) == 2


def test_both_states_are_projected_alike():
    before, weight = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    figure = plot.table(weight, before=before)
    expected = plot.project(torch.cat([weight, before])).points
    arrows = [(*t.xyann, *t.xy) for t in figure.axes[0].texts if t.arrow_patch is not None]
    drawn = torch.tensor(arrows, dtype=torch.float64)
    assert torch.equal(drawn, torch.cat([expected[5:], expected[:5]], dim=1))


def test_drawn_into_a_figure_of_the_callers():
    figure = Figure()
    axes = figure.subplots(1, 2)
    assert plot.table(torch.randn(3, 2), axes=axes[1]) is figure
    assert not axes[0].lines
    assert axes[1].lines


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.randn(3),), r"expected a table \[V, D\]"),
        ((torch.randn(3, 0),), "D >= 1"),
        ((torch.randn(7, 2), WORDS[:3]), "3 labels for 7 rows"),
        ((torch.randn(7, 2), None, [7]), "ids go from 7 to 7, the table's from 0 to 6"),
        ((torch.randn(7, 2), WORDS, None, ["a"]), "1 groups for 7 rows"),
        (
            (torch.randn(7, 2), None, None, None, None, None, torch.randn(6, 2)),
            r"before of the table's shape \(7, 2\), got \(6, 2\)",
        ),
    ],
    ids=["vector", "empty", "labels", "ids", "groups", "before"],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        plot.table(*arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.nn.Embedding(7, 2),), "such as a layer's weight, got Embedding"),
        ((np.zeros((7, 2)),), "got ndarray"),
        ((torch.zeros(7, 2, dtype=torch.complex64),), "expected real numbers"),
        ((torch.randn(7, 2), None, [0.5]), "ids to be integers, got torch.float32"),
        ((torch.randn(7, 2), None, torch.ones(7).bool()), "ids to be integers, got torch.bool"),
    ],
    ids=["layer", "array", "complex", "ids", "mask"],
)
def test_wrong_types(arguments, match):
    with pytest.raises(TypeError, match=match):
        plot.table(*arguments)
