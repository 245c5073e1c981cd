"""What demo.ipynb needs and what is not its story: the look of a chart, and three drawings."""
import re

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from experiments.studies import NAMES as NAME

# One name, one colour and one marker for each method, throughout. All else is black or grey.
METHODS = ["rtn", "adaround", "adaquant", "flexround"]
COLOUR = {"rtn": "#666666", "adaround": "#D98E00", "adaquant": "#009E73", "flexround": "#0072B2"}
MARKER = {"rtn": "s", "adaround": "^", "adaquant": "D", "flexround": "o"}


def style() -> None:
    """The look of all charts: 110 dpi, no frame, a light grid, white also on a dark page."""
    plt.rcParams.update({
        "figure.dpi": 110,
        "savefig.dpi": 110,
        "figure.facecolor": "white",
        "figure.constrained_layout.use": True,
        "font.size": 13,
        "axes.titlesize": 14,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "legend.fontsize": 12,
    })


def label_ends(ax, lines, gap: float = 0.085, size: int = 12) -> None:
    """Write the label of each line beside its right end, in its colour.

    Set the limits of the axes first. gap is the least distance of two labels, as a part of the
    height of the axes.
    """
    heights = {}
    for line in lines:
        end = ax.transData.transform(line.get_xydata()[-1])
        heights[line] = ax.transAxes.inverted().transform(end)[1]
    lowest = -gap
    for line in sorted(heights, key=heights.get):
        lowest = max(heights[line], lowest + gap)
        ax.text(1.02, lowest, line.get_label(), color=line.get_color(), fontsize=size, va="center",
                transform=ax.transAxes)


def loop() -> plt.Figure:
    """The reconstruction of one block, drawn: which inputs, which target, what learns when."""
    fig, ax = plt.subplots(figsize=(13, 5))
    ax.set(xlim=(-0.1, 13), ylim=(0.2, 5))
    ax.axis("off")
    blue = COLOUR["flexround"]

    def box(x, y, text, face="0.93", edge="k", size=13):
        """A box of 2.1 by 1 with its lower left corner at (x, y)."""
        shape = FancyBboxPatch((x, y), 2.1, 1, boxstyle="round,pad=0", fc=face, ec=edge, lw=2)
        ax.add_patch(shape)
        ax.text(x + 1.05, y + 0.5, text, ha="center", va="center", fontsize=size)

    def arrow(start, end, text="", colour="k"):
        ax.annotate("", end, start, arrowprops={
            "arrowstyle": "-|>", "mutation_scale": 18, "lw": 2, "color": colour,
            "shrinkA": 0, "shrinkB": 0})
        middle = (start[0] + end[0]) / 2
        ax.text(middle, start[1] + 0.1, text, ha="center", va="bottom", fontsize=16)

    def stream(y, before, x, output):
        """What a row has around its block: the blocks before it and its output."""
        box(2.3, y, f"blocks before,\n{before}")
        arrow((4.4, y + 0.5), (5.4, y + 0.5), x)
        arrow((7.5, y + 0.5), (8.3, y + 0.5))
        box(8.3, y, output, "white", size=14)
        arrow((10.4, y + 0.5), (11.2, y + 0.5))
        ax.text(11.3, y + 0.5, f"becomes {x} of\nblock $i + 1$", va="center")

    box(0, 2.3, "calibration\ninputs", "white")
    arrow((1.05, 3.3), (2.3, 4.3))
    arrow((1.05, 2.3), (2.3, 1.3))
    stream(3.8, "floats", "$X$", "$y_{fp} = block(X)$")
    stream(0.8, "quantized", r"$\widetilde{X}$", r"$\widehat{block}\,(\widetilde{X})$")
    box(5.4, 3.8, "block $i$,\nfloats")
    box(5.4, 0.8, "block $i$\nlearns", "#DCEBF7", blue)
    box(8.3, 2.3, "loss: squared\ndifference", "white")
    arrow((9.35, 3.8), (9.35, 3.3))
    arrow((9.35, 1.8), (9.35, 2.3))
    arrow((8.3, 2.8), (6.45, 1.8), colour=blue)
    ax.text(6.45, 0.65, "the gradient reaches $s_1$, $S_2$, $s_3$, $s_4$ of block $i$ only",
            color=blue, ha="center", va="top")
    return fig


def map_of_changes(ax, codes: Tensor, nearest: Tensor) -> None:
    """A map of the codes that differ from round to nearest's: one row for each filter, one column
    for each of its weights. Dark went up and light went down."""
    up, down = COLOUR["flexround"], "#76B7E0"
    change = (codes - nearest).flatten(1).sign()                     # (C_out, weights of a filter)
    colours = ListedColormap([down, "#EEEEEE", up])
    ax.pcolormesh(change, cmap=colours, vmin=-1, vmax=1, edgecolors="white", linewidth=1)
    ax.invert_yaxis()                                                # filter 0 is the upper row
    ax.set(xlabel="weight of the filter", ylabel="filter")
    ax.set_yticks(np.arange(len(change)) + 0.5, range(len(change)))
    ax.grid(False)
    style = {"transform": ax.transAxes, "ha": "right"}
    ax.text(0.7, 1.03, f"a higher code: {int((change > 0).sum())}", color=up, **style)
    ax.text(1, 1.03, f"a lower code: {int((change < 0).sum())}", color=down, **style)


def scores_of(printed: str) -> dict[str, list[float]]:
    """The rows of the main job's table: {network: [full precision, then each method's score]}."""
    rows = re.findall(r"^\| (\w+) \| W\d \| (.*) \|$", printed, re.M)
    return {name: list(map(float, scores.split(" | "))) for name, scores in rows}


def four_methods(scores: dict[str, list[float]]) -> plt.Figure:
    """The main job's table as dots, a panel for each network, a row for each of METHODS. Right is
    better. The axis spans the learned methods, and an arrow says where round to nearest is."""
    fig, axes = plt.subplots(1, len(scores), figsize=(13, 3.4), sharey=True)
    for ax, (name, (full, nearest, *learned)) in zip(axes, scores.items(), strict=True):
        better = 1 if full > nearest else -1                         # -1: a perplexity
        width = better * max(abs(full - score) for score in learned)
        best = better * max(better * score for score in (full, *learned))
        left = full - 1.5 * width
        ax.set(xlim=(left, best + 0.3 * width), ylim=(3.6, -0.8), title=name)
        ax.set_xlabel("accuracy, %" if better == 1 else "perplexity (lower is better)")
        ax.axvline(full, color="k", lw=1.5, ls="--")
        ax.text(full, -0.45, "full precision ", ha="right", va="center", fontsize=11)
        ax.text(left, 0, f" ← far away, at {nearest:.2f}", color=COLOUR["rtn"], va="center",
                fontsize=12)
        for row, score in enumerate(learned, 1):
            colour = COLOUR[METHODS[row]]
            ax.plot(score, row, MARKER[METHODS[row]], color=colour, ms=10)
            ax.annotate(f"{score:.2f}", (score, row), (-10, 0), textcoords="offset points",
                        color=colour, ha="right", va="center", fontsize=12)
    axes[0].set_yticks(range(len(METHODS)), [NAME[method] for method in METHODS])
    return fig
