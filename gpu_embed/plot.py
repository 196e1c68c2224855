"""Pictures of a table: people look at embeddings rather than read them (needs matplotlib, extra `demo`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

try:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "gpu_embed.plot needs matplotlib: "
        'install the extra "demo" (from a clone: pip install ".[demo]")'
    ) from error

GREY = "#777777"
# Words are no formulas, though they may hold dollar signs.
PLAIN_TEXT: dict[str, Any] = {"parse_math": False, "usetex": False}


class Projection(NamedTuple):
    """Rows in the plane."""

    points: Tensor  # fp64, [rows, 2], on the CPU
    axes: tuple[str, str]  # what the two columns are


def table(
    weight: Tensor,
    labels: Sequence[str] | None = None,
    ids: Sequence[int] | Tensor | None = None,
    groups: Sequence[str] | None = None,
    title: str | None = None,
    axes: Axes | None = None,
    before: Tensor | None = None,
) -> Figure:
    """Draw rows of a table as points, with their labels beside them where nothing else stands.

    Args:
        weight: the table, [V, D], any real dtype and device; a layer's `weight`.
        labels: one for each row drawn. None: the ids themselves, for up to 100 rows.
        ids: the rows to draw. None: all of them.
        groups: one name for each row drawn; rows of one group share a colour, and a legend names them.
        title: above the picture.
        axes: where to draw. None: a figure of its own.
        before: an earlier state of the table, [V, D]: an arrow shows each row's way from there.

    Returns:
        The figure; `figure.savefig("table.png")` writes it.

    Raises:
        TypeError: weight is no tensor or of complex numbers, or ids are no integers.
        ValueError: weight is not a matrix, `before` is not of its shape, an id is outside of it, labels or
            groups are too few or many, or a row to be drawn is not finite.

    Two columns are drawn as they are; of more, the two directions along which the rows differ most (principal
    components); the axes say how much of the variance they show. Both axes have one scale, so that distances
    in the picture can be compared.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"plot.table: expected a tensor, such as a layer's weight, got {type(weight).__name__}"
        )
    if weight.is_complex():
        raise TypeError("plot.table: expected real numbers, got complex ones; draw weight.abs()")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(
            f"plot.table: expected a table [V, D] with D >= 1, got shape {tuple(weight.shape)}"
        )
    if before is not None and before.shape != weight.shape:
        raise ValueError(
            f"plot.table: expected before of the table's shape {tuple(weight.shape)}, "
            f"got {tuple(before.shape)}"
        )
    rows = torch.arange(len(weight), device="cpu") if ids is None else _integers(ids)
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(weight):
        raise ValueError(
            f"plot.table: ids go from {int(rows.min())} to {int(rows.max())}, "
            f"the table's from 0 to {len(weight) - 1}"
        )
    for name, given in (("labels", labels), ("groups", groups)):
        if given is not None and len(given) != len(rows):
            raise ValueError(f"plot.table: {len(given)} {name} for {len(rows)} rows")
    if groups is not None:
        groups = list(map(str, groups))
    if labels is None:
        labels = rows.tolist() if len(rows) <= 100 else [""] * len(rows)
    labels = list(map(str, labels))

    states = [weight] if before is None else [weight, before]
    values = torch.cat([_rows(state, rows) for state in states])
    finite = values.isfinite().all(dim=1).view(len(states), -1).all(dim=0)
    if not finite.all():
        raise ValueError(f"plot.table: row {int(rows[~finite][0])} is not finite")
    projection = project(values)
    points = projection.points[: len(rows)].numpy()
    starts = projection.points[len(rows) :].numpy()
    if axes is None:
        figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
    found = axes.get_figure(root=True)
    assert found is not None
    # The caller's own lines have their place in the legend too.
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    if before is None:
        colours = group_colours(groups) if groups else ["C0"] * len(points)
        drawn = points
    else:
        colours = group_colours(groups or labels)
        drawn, moves = draw_moves(axes, starts, points, colours)
        entries += moves
    points_of_groups = draw_points(axes, points, colours, groups)
    if groups is not None:
        entries += points_of_groups
    axes.set_xlabel(projection.axes[0])
    axes.set_ylabel(projection.axes[1])
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    if entries:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 4}
        draw_legend(axes, entries, **below, frameon=False)
    if title is not None:
        axes.set_title(title, **PLAIN_TEXT)
    # Only once all else is drawn are all places final, in pixels.
    found.draw_without_rendering()
    place_labels(axes, labels, points, axes.transData.transform(drawn), colours)
    return found


def _integers(ids: Sequence[int] | Tensor) -> Tensor:
    """The ids, [N], int64, on the CPU."""
    rows = torch.as_tensor(ids, device="cpu").reshape(-1)
    if rows.numel() and (rows.is_floating_point() or rows.dtype == torch.bool):
        raise TypeError(f"plot.table: expected ids to be integers, got {rows.dtype}")
    return rows.long()


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """These rows, fp64, on the CPU."""
    return table.detach()[rows.to(table.device)].to("cpu", torch.float64)


def project(rows: Tensor) -> Projection:
    """Rows [N, D] in the plane: themselves where D <= 2, else their two principal components.

    Each component points where its largest entry is positive, so that two runs give one picture.
    """
    values = rows.to("cpu", torch.float64)
    num_columns = values.shape[1]
    if num_columns <= 2:
        points = torch.nn.functional.pad(values, (0, 2 - num_columns))
        return Projection(points, ("first value of the row", "second value of the row"))
    centred = values - values.mean(dim=0) if len(values) else values
    _, strength, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = torch.nn.functional.pad(directions, (0, 0, 0, max(0, 2 - len(directions))))[:2]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)
    variance = torch.nn.functional.pad(strength.square(), (0, 2))
    shares = (100 * variance / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)).tolist()
    first, second = (
        f"{name} principal component ({share:.0f} % of the variance)"
        for name, share in zip(("first", "second"), shares[:2], strict=True)
    )
    return Projection(centred @ directions.T, (first, second))


def group_colours(groups: Sequence[str]) -> list[str]:
    """One of ten colours for each row, the same for rows of one group."""
    names = list(dict.fromkeys(groups))
    return [f"C{names.index(group) % 10}" for group in groups]


def draw_moves(
    axes: Axes, starts: np.ndarray, ends: np.ndarray, colours: Sequence[str]
) -> tuple[np.ndarray, list[tuple[Artist, str]]]:
    """Draw an arrow a row; returns points along all of them, [*, 2], and entries of a legend."""
    for start, end, colour in zip(starts, ends, colours, strict=True):
        axes.plot(*start, "o", color=colour, markerfacecolor="white", markersize=7)
        axes.annotate(
            "",
            xy=(end[0], end[1]),
            xytext=(start[0], start[1]),
            arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 4, "shrinkB": 5},
        )
    entries: list[tuple[Artist, str]] = []
    for name, fill in (("before", "white"), ("after", GREY)):
        (circle,) = axes.plot([], [], "o", color=GREY, markerfacecolor=fill, markersize=7)
        circle.set_label(name)
        entries.append((circle, name))
    along = np.linspace(0, 1, 40)[:, None, None]
    return (starts + along * (ends - starts)).reshape(-1, 2), entries


def draw_points(
    axes: Axes, points: np.ndarray, colours: Sequence[str], groups: Sequence[str] | None
) -> list[tuple[Artist, str]]:
    """Draw a point a row, those of a colour and a group together; returns entries of a legend."""
    members: dict[tuple[str, str], list[int]] = {}
    for i, colour in enumerate(colours):
        members.setdefault((groups[i] if groups else "", colour), []).append(i)
    entries: list[tuple[Artist, str]] = []
    for (name, colour), own in members.items():
        (circles,) = axes.plot(points[own, 0], points[own, 1], "o", markersize=7, color=colour)
        circles.set_label(name)
        entries.append((circles, name))
    return entries


def draw_legend(
    place: Axes | Figure, entries: Sequence[tuple[Artist, str]], **arguments: Any
) -> None:
    """Draw a legend of these artists, with their names as they are; the arguments are `legend`'s own."""
    # matplotlib leaves out who has no name, or one that begins with "_": the names are set afterwards.
    stand_ins = ["name"] * len(entries)
    legend = place.legend([artist for artist, _ in entries], stand_ins, **arguments)
    for text, (_, name) in zip(legend.get_texts(), entries, strict=True):
        text.set(text=name, **PLAIN_TEXT)


def place_labels(
    axes: Axes,
    labels: Sequence[str],
    points: np.ndarray,
    drawn: np.ndarray,
    colours: Sequence[str],
    fontsize: float = 11,
) -> None:
    """Write each label beside its point, where it covers no label, no drawing and no frame.

    Args:
        points: [N, 2] in the axes' data, one a label.
        drawn: [*, 2] in pixels: what the labels should not cover.
    """
    boxes: list[Bbox] = []
    for text, (x, y), colour in zip(labels, points, colours, strict=True):
        if not text:
            continue
        label = axes.annotate(
            text,
            xy=(x, y),
            xytext=(0, 0),
            textcoords="offset pixels",
            ha="center",
            va="center",
            color=colour,
            fontsize=fontsize,
            fontweight="bold",
            **PLAIN_TEXT,
        )
        box = label.get_window_extent()
        shift = free_shift(box, drawn, boxes, axes.bbox)
        label.set_position(shift)
        boxes.append(box.translated(*shift))


def free_shift(
    box: Bbox, drawn: np.ndarray, labels: Sequence[Bbox], frame: Bbox
) -> tuple[float, float]:
    """Move a box off its point, as little as lets it cover no label, no drawing and no frame."""
    angles = np.arange(16) * np.pi / 8
    round_the_box = np.stack([np.cos(angles) * box.width, np.sin(angles) * box.height], 1) / 2
    unit = np.stack([np.cos(angles), np.sin(angles)], 1)
    shifts = np.concatenate([round_the_box + gap * unit for gap in (12, 18, 26, 36, 50, 66)])
    low, high = box.min + shifts, box.max + shifts  # [shifts, 2]
    outside = ((low < frame.min) | (high > frame.max)).any(axis=1)
    low, high = low[:, None] - 8, high[:, None] + 8
    corners = np.array([label.extents for label in labels]).reshape(-1, 2, 2)
    overlaps = ((low <= corners[:, 1]) & (corners[:, 0] <= high)).all(axis=2).sum(axis=1)
    contains = ((low < drawn) & (drawn < high)).all(axis=2).sum(axis=1)
    # argmin() takes the first, so the nearest, of equally good ones.
    x, y = shifts[(contains + 100 * (overlaps + outside)).argmin()]
    return float(x), float(y)
