"""What demo.ipynb needs and what is not its story: the look of a chart, the committed runs of
results.jsonl and the charts and tables drawn from them, and what a quantized network holds."""
import io
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from scipy.stats import gmean, spearmanr  # scikit-learn brings scipy
from torch import nn

import flexround
from experiments import tools
from experiments.studies import COMMITTED, by_place, left, read_results, settings_of
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


# ---- The committed runs --------------------------------------------------------------------------

def committed(*studies: str, **settings) -> list[dict]:
    """The records of some studies (none named: of all). settings: what their config has to hold."""
    return having([r for path in COMMITTED for r in read_results(path)
                   if r["study"] in studies or not studies], **settings)


def having(records: list[dict], **settings) -> list[dict]:
    """The records whose config holds these settings."""
    return [r for r in records if all(settings_of(r)[k] == v for k, v in settings.items())]


def spread(scores) -> tuple[float, float, float]:
    """Median, minimum and maximum."""
    return statistics.median(scores), min(scores), max(scores)


def scores(records: list[dict], **settings) -> list[float]:
    """The scores of the records whose config holds these settings, in the order of the seeds."""
    some = sorted(having(records, **settings), key=lambda r: settings_of(r)["seed"])
    return [r["score"] for r in some]


def table(records: list[dict], column: Callable = lambda c: NAME[c["method"]]) -> str:
    """Records as a Markdown table. A row for each network and number of bits, and a column for each
    column(config). A cell is the median of the seeds, in brackets minimum to maximum."""
    columns, rows = list(dict.fromkeys(column(settings_of(r)) for r in records)), {}
    for r in records:
        row = rows.setdefault((r["network"], r["config"]["bits"], round(r["full"], 2)), {})
        row.setdefault(column(settings_of(r)), []).append(r["score"])
    lines = [["network", "bits", "full precision", *columns], ["---"] * (3 + len(columns))]
    for (network, bits, full), cells in rows.items():
        line = [network, f"W{bits}", f"{full:.2f}"]
        for title in columns:
            middle, low, high = (f"{x:.2f}" for x in spread(cells.get(title, [float("nan")])))
            line.append(middle if low == high else f"{middle} ({low} to {high})")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# The networks of the picture, each with a letter: its studies, and its name there.
GAINS = {"a": ("digits ResNet, as it is", ["unequal"], "resnet"),
         **{letter: (f"the same, channels x {n}", ["unequal"], f"resnet, channels x {n}")
            for letter, n in zip("bcde", (2, 4, 8, 16), strict=True)},
         "f": ("digits MobileNet", ["first"], "mobilenet"), "g": ("small GPT", ["first"], "gpt"),
         "h": ("ResNet-20, CIFAR-10", ["resnet20"], "resnet20"),
         "i": ("MobileNet, CIFAR-10", ["mobilenet-long"], "mobilenet"),
         "j": ("small LLaMA", ["llama"], "llama"),
         "k": ("EfficientNet-Lite0", ["lite0", "lite0-3-bits", "lite0-2-bits"], "lite0")}


def unequal(record: dict, records: list[dict], mean: Callable = gmean) -> float:
    """How unequal the channels of a record's network are: of each layer the largest output channel
    over the median one (by the largest |W|), a geometric mean over the layers. One of the records
    of this network has to hold it."""
    for r in records:
        same = all(r[key] == record[key] for key in ("network", "about"))
        if "inequality" in r and same and abs(r["full"] - record["full"]) < 0.02:
            return float(mean(r["inequality"]))
    raise ValueError(f"no record of {record['network']} holds its inequality")


def gains(everything: list[dict], mean: Callable = gmean) -> list[tuple]:
    """Letter, bits, inequality, and FlexRound's gain over the better addition (of the medians, and
    the least and the largest of the seeds), in points of accuracy, or for text in hundredths of a
    nat. everything: all committed records. mean: as in unequal."""
    found = []
    for letter, (_, studies, network) in GAINS.items():
        records = [r for r in everything if r["study"] in studies and r["network"] == network]
        for bits in sorted({r["config"]["bits"] for r in records}, reverse=True):
            own = {"bits": bits, "use_s3_s4": True, "learn_s1": True,
                   "iterations": records[0]["config"]["iterations"]}
            ours, *others = (np.array(scores(records, method=m, **own))
                             for m in ("flexround", "adaround", "adaquant"))
            if "perplexity" in records[0]["about"]:
                ours, *others = (-100 * np.log(score) for score in (ours, *others))
            better = max(others, key=np.median)
            found.append((letter, bits, unequal(records[0], everything, mean),
                          float(np.median(ours) - np.median(better)),
                          float(min(ours - better)), float(max(ours - better))))
    return found


def explained(points: list[tuple]) -> float:
    """How well inequality explains the gains: their correlation by rank, from -1 to 1."""
    return float(spearmanr([p[2] for p in points], [p[3] for p in points]).statistic)


# ---- Charts --------------------------------------------------------------------------------------

def with_bars(ax, x, seeds: list, method: str, **more) -> None:
    """At each x the median of the seeds' values, with a bar from minimum to maximum."""
    middle, low, high = zip(*map(spread, seeds), strict=True)
    bars = [[m - a for m, a in zip(middle, low, strict=True)],
            [b - m for m, b in zip(middle, high, strict=True)]]
    ax.errorbar(x, middle, bars, **{"fmt": MARKER[method], "color": COLOUR[method], "ms": 7,
                                    "capsize": 4, "label": NAME[method], "zorder": 3, **more})


def when(points: list[tuple], bits: int = 2):
    """Left: channels made unequal on purpose, and what each method has left. Right: FlexRound's
    gain over the better addition, for each network, against its own inequality.

    points: what gains returns.
    """
    spreads = (1, 2, 4, 8, 16)
    records = committed("unequal", bits=bits, use_s3_s4=True, learn_s1=True)
    fig, (one, two) = plt.subplots(1, 2, figsize=(13, 5.4))
    for method in METHODS:
        rows = [scores([r for r in records if r["network"] == "resnet" + f", channels x {n}" *
                        (n > 1)], method=method) for n in spreads]
        with_bars(one, spreads, rows, method, ls="-")
    one.axhline(records[0]["full"], color="k", lw=1, ls="--", label="full precision")
    one.set_xscale("log", base=2)
    one.set(xticks=spreads, xticklabels=spreads, ylabel="test accuracy, %", title=(
        f"A small ResNet, {bits} bits: the same outputs,\nchannels made unequal"),
        xlabel="channels up to this many times larger or smaller")
    one.legend(loc="lower left")

    marks = {4: "x", 3: "+", 2: "*"}
    for _, width, x, gain, low, high in points:
        x *= 1.02 ** (width - 3)                                     # so that the bars part
        two.errorbar(x, gain, [[gain - low], [high - gain]], fmt=f"k{marks[width]}", ms=7, lw=0.8)
    for letter in GAINS:                                             # at the point farthest from 0
        _, width, x, gain, *_ = max((p for p in points if p[0] == letter), key=lambda p: abs(p[3]))
        two.annotate(letter, (x * 1.02 ** (width - 3), gain), (-4, 0), ha="right",
                     textcoords="offset points", va="bottom" if gain > 0 else "top")
    for width, mark in marks.items():
        two.plot([], [], f"k{mark}", ms=7, label=f"{width} bits")
    two.legend(loc="upper left")
    two.axhline(0, color="k", lw=1)
    two.set_xscale("log")
    two.set_yscale("symlog", linthresh=1, linscale=0.6)
    x, y = (1.5, 2, 3, 4), (-3, -1, 0, 1, 3, 10, 30)
    two.set(xticks=x, xticklabels=x, xlim=(1.3, 4.8), yticks=y, yticklabels=y,
            ylabel="FlexRound ahead by, points", xlabel="largest over median channel",
            title="Each network: FlexRound's lead\nover the better of AdaRound and AdaQuant")
    two.minorticks_off()
    two.text(1.02, 0.5, "\n".join(f"{letter}  {name}" for letter, (name, *_) in GAINS.items()),
             transform=two.transAxes, va="center", fontsize=11)
    return fig


def few():
    """Paper's Fig. 7: score against the number of calibration inputs. Below, the loss on these, and
    on inputs that were not calibrated on, as a share of round to nearest's."""
    places, counts = by_place(committed("samples")), (8, 16, 32, 64, 128, 256, 512)
    fig, axes = plt.subplots(2, 2, figsize=(12, 7), sharex=True)
    for column, (network, title) in zip(axes.T, (("resnet", "digits ResNet"),
                                                 ("gpt", "small GPT")), strict=True):
        runs = [places[network, 2, n] for n in counts]
        for j, method in enumerate(METHODS[1:]):
            x = [n * 1.06 ** (j - 1) for n in counts]
            with_bars(column[0], x, [scores(place[method]) for place in runs], method, ls="-")
            for kind, style in (("unseen", "-"), ("calibration", "--")):
                losses = [[left(r, n, kind) for r, n in
                           zip(place[method], place["rtn"], strict=True)] for place in runs]
                with_bars(column[1], x, losses, method, ls=style, ms=7 if style == "-" else 4,
                          label=f"{kind} inputs" if method == "flexround" else None)
        full = runs[0]["rtn"][0]["full"]
        column[0].axhline(full, color="k", lw=1, ls="--", label="full precision")
        column[0].set(title=f"{title}, 2 bits", ylabel="test accuracy, %" if network == "resnet"
                      else "perplexity (lower is better)")
        column[1].set(xscale="log", ylim=(0, 0.45), xticks=counts, xticklabels=counts,
                      xlabel="calibration inputs", ylabel="loss, of round to nearest's")
        column[1].minorticks_off()
    axes[0, 0].legend(loc="lower right")
    axes[1, 0].legend(loc="upper right")
    return fig


def loop():
    """The reconstruction of one block, drawn: which inputs, which target, what learns when."""
    fig, ax = plt.subplots(figsize=(12, 5))
    ax.set(xlim=(0, 12), ylim=(0, 5))
    ax.axis("off")
    blue = COLOUR["flexround"]

    def box(x, y, text, face, edge="k"):
        ax.add_patch(FancyBboxPatch((x, y), 2, 1, boxstyle="round,pad=0.05", fc=face, ec=edge,
                                    lw=2))
        ax.text(x + 1, y + 0.5, text, ha="center", va="center")

    def arrow(x, y, to_x, to_y, text="", colour="k", **more):
        ax.add_patch(FancyArrowPatch((x, y), (to_x, to_y), arrowstyle="-|>", mutation_scale=18,
                                     lw=2, color=colour, **more))
        ax.text((x + to_x) / 2, (y + to_y) / 2 + 0.15, text, ha="center", va="bottom", fontsize=16)

    for y, before, own in ((3.7, "blocks before $i$,\nin floats", "block $i$,\nin floats"),
                           (1.1, "blocks before $i$,\nquantized, fixed", "block $i$\nlearns")):
        quantized = y < 2
        box(1.7, y, before, "0.93")
        box(5.3, y, own, "#DCEBF7" if quantized else "0.93", blue if quantized else "k")
        arrow(1.1, 2.9 if y > 2 else 2.7, 1.6, y + 0.5)
        arrow(3.8, y + 0.5, 5.2, y + 0.5, r"$\widetilde X$" if quantized else "$X$")
        arrow(7.4, y + 0.5, 9.6, 2.5 if quantized else 3.3)
    ax.text(8.4, 4, "$y_{fp} = WX$", fontsize=16)
    ax.text(7.5, 2.3, r"$\widehat W\widetilde X$", fontsize=16)
    ax.text(0.6, 2.8, "calibration\ninputs", ha="center", va="center")
    ax.text(10.6, 2.9, "loss\n$\\|\\widehat W\\widetilde X - y_{fp}\\|^2$", ha="center",
            fontsize=16, va="center", bbox={"boxstyle": "round", "fc": "white", "ec": "k", "lw": 2})
    arrow(10.6, 2.2, 6.3, 1, colour=blue, connectionstyle="arc3,rad=-0.4")
    ax.text(8.6, 0.1, "gradient: to $s_1$, $S_2$, $s_3$, $s_4$ of block $i$ only", color=blue,
            ha="center")
    return fig


def heat(W, quantizers: dict, text: str = ""):
    """One layer as heat maps: its weights, and for each of two quantizers the codes and the errors.
    Maps of the same kind share one colour scale, with a bar. Rows are output channels. text stands
    below the weights."""
    fig, axes = plt.subplot_mosaic([["W", "k0", "e0"], ["text", "k1", "e1"]], figsize=(13, 6))
    axes["text"].axis("off")
    axes["text"].text(0.5, 0.5, text, ha="center", va="center", fontsize=14)
    with torch.no_grad():
        maps = {"W": W}
        for i, q in enumerate(quantizers.values()):
            maps |= {f"k{i}": q.codes(W), f"e{i}": (W - q(W)).abs()}
    titles = {"W": "weights $W$", **{kind + str(i): f"{name}: {what}" for i, name in enumerate(
        quantizers) for kind, what in (("k", "codes"), ("e", r"error $|W - \widehat W|$"))}}
    for kind, cmap in (("W", "RdGy"), ("k", "RdGy"), ("e", "Greys")):
        some = [name for name in maps if name[0] == kind]
        most = max(float(maps[name].abs().max()) for name in some)
        for name in some:
            drawn = axes[name].imshow(maps[name].flatten(1), cmap=cmap, aspect="auto", vmax=most,
                                      vmin=0 if kind == "e" else -most)
            axes[name].set(title=titles[name], xticks=[], yticks=[])
            axes[name].grid(False)
        codes = {"ticks": range(q.lo, q.hi + 1)} if kind == "k" else {}
        plt.colorbar(drawn, ax=[axes[name] for name in some], **codes)
    return fig


def chart(studies: dict[str, list[dict]]):
    """A panel for each study: score against bits. A median off the scale becomes a number at the
    edge, with an arrow."""
    fig, axes = plt.subplots(1, len(studies), figsize=(12, 4.8))
    fig.get_layout_engine().set(w_pad=0.12)
    for ax, (title, records) in zip(axes, studies.items(), strict=True):
        learned = [r["score"] for r in records if r["config"]["method"] != "rtn"]
        learned.append(records[0]["full"])
        pad = 0.1 * (max(learned) - min(learned))
        low, high = min(learned) - 2 * pad, max(learned) + 2 * pad
        ax.axhline(records[0]["full"], color="k", lw=1, ls="--", label="full precision")
        for j, method in enumerate(METHODS):
            for i, bits in enumerate((4, 3, 2)):
                seeds = scores(records, method=method, bits=bits)
                middle, x = statistics.median(seeds), i + 0.17 * (j - 1.5)
                if low <= middle <= high:
                    with_bars(ax, [x], [seeds], method, label=None if i else NAME[method])
                else:
                    text, y, va = ((f"{middle:.1f}\n$\\downarrow$", low, "bottom") if middle < low
                                   else (f"$\\uparrow$\n{middle:.1f}", high, "top"))
                    ax.text(x, y, text, color=COLOUR[method], va=va, ha="center", weight="bold")
        unit = ("test accuracy, % (higher is better)" if "accuracy" in records[0]["about"]
                else "test perplexity (lower is better)")
        ax.set(xticks=range(3), xticklabels=["4 bits", "3 bits", "2 bits"], title=title,
               xlim=(-0.6, 2.5), ylim=(low, high), ylabel=unit)
        ax.grid(False, axis="x")
    for method in METHODS:                                           # in the legend even where off
        axes[0].errorbar([], [], [], fmt=MARKER[method], color=COLOUR[method], ms=7, capsize=4)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=5)
    fig.supxlabel("A marker is the median of three seeds, its bar goes from minimum to maximum. "
                  "A number with an arrow is a median off the scale.", fontsize=10)
    return fig


def picture(fig, path=None) -> Image:
    """The figure as a PNG, for display, and written to path where there is one: the same bytes."""
    held = io.BytesIO()
    fig.savefig(held, format="png", pil_kwargs={"optimize": True})
    plt.close(fig)
    if path is not None:
        Path(path).write_bytes(held.getvalue())
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


if __name__ == "__main__":                                           # README's picture
    style()
    everything = committed()
    for of in (gmean, np.median, max):
        points = gains(everything, of)
        print(f"inequality, {of.__name__} of the layers: rank correlation with FlexRound's lead "
              f"{explained(points):.2f}, {len(points)} points")
    picture(when(gains(everything)), Path(__file__).with_name("when.png"))
