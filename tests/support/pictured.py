"""For tests of the benchmark's pictures: a row and a header to draw, and the texts of a figure."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from gpu_embed.bench.results import Row

BASE = Row(
    set="S",
    operation="embedding",
    mode="forward",
    dtype="float32",
    id_dtype="int64",
    tables=1,
    vocab=10_000,
    dim=128,
    num_ids=65_536,
    hotness=1,
    distribution="uniform",
    unique_ids=None,
    padding=0.0,
    provider="gpu_embed",
    status="ok",
    device="Synthetic Card 1",
    torch="9.8.7",
    triton="6.5.4",
    commit="0123456789abcdef",
)
HEADER = {
    "device": "Synthetic Card 1",
    "driver": "111.22",
    "torch": "9.8.7",
    "triton": "6.5.4",
    "commit": "0123456789abcdef",
    "dirty": True,
    "date": "2001-02-03",
}


def texts_of(figure):
    """Every visible text with its box in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    found = []
    # Ticks beyond the ends of their axis have a text that is not drawn.
    beyond = {
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in beyond:
            found.append((text.get_text(), text.get_window_extent(renderer)))
    return found, figure.bbox
