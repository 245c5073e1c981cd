"""What demo.ipynb needs and what is not its story: the look of a chart, two drawings, and what a
quantized network holds."""
import io

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor, nn
from torch.func import functional_call

import flexround
from experiments import tools
from experiments.studies import NAMES as NAME

# One name, one colour and one marker for each method, throughout. All else is black or grey.
METHODS = ["rtn", "adaround", "adaquant", "flexround"]
COLOUR = {"rtn": "#666666", "adaround": "#D98E00", "adaquant": "#009E73", "flexround": "#0072B2"}
MARKER = {"rtn": "s", "adaround": "^", "adaquant": "D", "flexround": "o"}


def style() -> None:
    """The look of all charts: 110 dpi, no frame, a light grid, white also on a dark page."""
    plt.rcParams.update({
        "figure.dpi": 110, "savefig.dpi": 110, "font.size": 13, "axes.titlesize": 14,
        "figure.facecolor": "white", "figure.constrained_layout.use": True, "axes.grid": True,
        "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3,
        "legend.frameon": False, "legend.fontsize": 12})


# ---- Charts --------------------------------------------------------------------------------------

def loop():
    """The reconstruction of one block, drawn: which inputs, which target, what learns when."""
    fig, ax = plt.subplots(figsize=(13, 5))
    ax.set(xlim=(-0.1, 13), ylim=(0.2, 5))
    ax.axis("off")
    blue = COLOUR["flexround"]

    def box(x, y, text, face="0.93", edge="k", size=13):
        """A box of 2.1 by 1 with its lower left corner at (x, y)."""
        ax.add_patch(FancyBboxPatch((x, y), 2.1, 1, boxstyle="round,pad=0", fc=face, ec=edge, lw=2))
        ax.text(x + 1.05, y + 0.5, text, ha="center", va="center", fontsize=size)

    def arrow(x, y, to_x, to_y, text="", colour="k"):
        ax.add_patch(FancyArrowPatch((x, y), (to_x, to_y), arrowstyle="-|>", mutation_scale=18,
                                     lw=2, color=colour, shrinkA=0, shrinkB=0))
        ax.text((x + to_x) / 2, y + 0.1, text, ha="center", va="bottom", fontsize=16)

    box(0, 2.3, "calibration\ninputs", "white")
    rows = ((3.8, "floats", "block $i$,\nfloats", "0.93", "k", "$X$", "$y_{fp} = block(X)$"),
            (0.8, "quantized", "block $i$\nlearns", "#DCEBF7", blue, r"$\widetilde{X}$",
             r"$\widehat{block}\,(\widetilde{X})$"))
    for y, before, block, face, edge, x, output in rows:
        start = 3.3 if y > 2 else 2.3                                # top or bottom of the inputs
        arrow(1.05, start, 2.3, y + 0.5)
        box(2.3, y, f"blocks before,\n{before}")
        arrow(4.4, y + 0.5, 5.4, y + 0.5, x)
        box(5.4, y, block, face, edge)
        arrow(7.5, y + 0.5, 8.3, y + 0.5)
        box(8.3, y, output, "white", size=14)
        arrow(10.4, y + 0.5, 11.2, y + 0.5)
        ax.text(11.3, y + 0.5, f"becomes {x} of\nblock $i + 1$", va="center")
    box(8.3, 2.3, "loss: squared\ndifference", "white")
    arrow(9.35, 3.8, 9.35, 3.3)
    arrow(9.35, 1.8, 9.35, 2.3)
    arrow(8.3, 2.8, 6.45, 1.8, colour=blue)
    ax.text(6.45, 0.65, "the gradient reaches $s_1$, $S_2$, $s_3$, $s_4$ of block $i$ only",
            color=blue, ha="center", va="top")
    return fig


@torch.no_grad()
def seen(layer: nn.Module, X: Tensor, rules: dict):
    """One layer: its weights and their codes as maps, with a row for each filter. Below, for each
    filter, the error of the weights and the error of the output on inputs X.

    rules: two quantizers of the layer's weight, by method.
    """
    W, Y = layer.weight, layer(X)
    fig, axes = plt.subplot_mosaic([["W", *rules], ["weights", "weights", "output"]],
                                   figsize=(13, 6.4))
    for name, q in (("W", None), *rules.items()):
        drawn = W if q is None else q.codes(W)
        most = float(drawn.abs().max())
        image = axes[name].imshow(drawn.flatten(1), cmap="RdGy", aspect="auto", vmin=-most,
                                  vmax=most)
        title = "weights $W$" if q is None else f"codes of {NAME[name]}"
        axes[name].set(title=title, xticks=[], yticks=[], ylabel="filter" if q is None else "")
        axes[name].grid(False)
        plt.colorbar(image, ax=axes[name], ticks=None if q is None else range(q.lo, q.hi + 1))
    for side, (method, q) in zip((-0.2, 0.2), rules.items(), strict=True):
        off = functional_call(layer, {"weight": q(W)}, (X,)) - Y
        places = torch.arange(len(W)) + side
        style = {"width": 0.4, "color": COLOUR[method], "label": NAME[method]}
        axes["weights"].bar(places, (W - q(W)).square().flatten(1).mean(1).sqrt(), **style)
        axes["output"].bar(places, off.square().mean((0, 2, 3)).sqrt(), **style)
    axes["weights"].set(title=r"error of the weights, $\widehat W - W$", xlabel="filter",
                        ylabel="root mean square")
    axes["output"].set(title="error of the output", xlabel="filter")
    axes["weights"].legend()
    return fig


def picture(fig):
    """The figure as a PNG of few bytes, for display: IPython's Image."""
    from IPython.display import Image  # here, because the tests run without IPython
    held = io.BytesIO()
    fig.savefig(held, format="png", pil_kwargs={"optimize": True})
    plt.close(fig)
    return Image(held.getvalue())


# ---- What a quantized network holds --------------------------------------------------------------

def parts(net: nn.Module, bits: int):
    """Of each layer of so many bits: name, quantizer, W, and log S' = log(S2 s3 s4), which is 0
    where the quantizer does not divide."""
    for name, q in flexround.quantizers(net).items():
        if q.bits == bits:
            logs = (getattr(q, f"log_{s}", None) for s in ("S2", "s3", "s4"))
            W = net.get_submodule(name).parametrizations.weight.original.detach()
            yield name, q, W, sum((log.detach() for log in logs if log is not None),
                                  torch.zeros_like(W))


def freer(net: nn.Module, bits: int) -> str:
    """In how many layers of so many bits the largest third of the weights changes its code more
    often than the middle third (the paper's Figs. 3 and 4)."""
    found = []
    for _, q, W, _ in parts(net, bits):
        moved = (tools.grid_shift(q, W) != 0).float().flatten()[W.abs().flatten().argsort()]
        third = len(moved) // 3
        found.append(float(moved[2 * third:].mean()) > float(moved[third:2 * third].mean()))
    return f"{sum(found)} of {len(found)} layers"
