"""What the training has brought, and what a step costs, as a picture."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .training import OURS, TOP, Result


def draw(
    name: str,
    results: list[Result],
    popularity: tuple[float, float],
    ms: dict[str, float],
    device: torch.device,
) -> Figure:
    """Recall and NDCG by epoch, with popularity's as lines; a bar for the step of each setup, if there are several."""
    figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
    if len(ms) > 1:
        left, right = figure.subplots(1, 2, width_ratios=[1.25, 1], gridspec_kw={"wspace": 0.06})
        draw_times(right, ms, device)
    else:
        left = figure.subplots()
    for column, (metric, values) in enumerate(
        {
            f"recall@{TOP}": [result.recall for result in results],
            f"NDCG@{TOP}": [result.ndcg for result in results],
        }.items()
    ):
        color = f"C{column}"
        left.plot(range(len(values)), values, "o-", color=color, label=f"{metric}, the model")
        left.axhline(
            popularity[column], color=color, linestyle="--", label=f"{metric}, by popularity"
        )
    left.set(
        title=f"{name}: each user's last click but one",
        xlabel="epochs of training (0: random tables)",
        ylabel=f"recall@{TOP} (share of users), NDCG@{TOP} (0 to 1)",
        ylim=(0, None),
    )
    left.locator_params(axis="x", integer=True)
    left.grid(alpha=0.3)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    return figure


def draw_times(axes: Axes, ms: dict[str, float], device: torch.device) -> None:
    labels = [setup.replace(", ", "\n").replace("d in", "d\nin") for setup in ms]
    colors = ["C2" if setup == OURS else "C7" for setup in ms]
    bars = axes.barh(labels, list(ms.values()), color=colors)
    axes.bar_label(bars, [f" {value:,.1f} ms" for value in ms.values()])
    axes.invert_yaxis()
    axes.set(
        title=f"A training step on {device.type.upper() if device.type == 'cpu' else device}",
        xlabel="forward, backward, update: the fastest (ms)",
        ylabel="layers, and what updates the tables",
        # Room for the longest bar's number.
        xlim=(0, 1.3 * max(ms.values())),
    )
