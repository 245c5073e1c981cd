"""The pictures of README.md and of the pages beside it.

    python -m experiments.pictures                      draws all of them
    python -m experiments.pictures staircase            draws one

sensitivity is drawn from knobs.jsonl, and steps from steps.jsonl.
"""
import statistics
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

from experiments import knobs, steps, studies
from experiments.notebook import COLOUR, MARKER, NAME, label_ends

HERE = Path(__file__).parent
TITLES = {"lite0": "EfficientNet-Lite0, W4", "resnet x 16": "ResNet, channels x 16, W2",
          "mobilenet": "small MobileNet, W2", "resnet20": "ResNet-20, W3"}


def draw_staircase(ax) -> None:
    """One weight's W_hat for three values of its scale S2, s1 = 1, 3 bits."""
    W = torch.linspace(-4.5, 4.5, 2000)
    for S2, line in ((0.7, "--"), (1.0, "-"), (1.4, ":")):
        colour = COLOUR["rtn" if S2 == 1 else "flexround"]
        W_hat = round(1.8 / S2)
        ax.plot(W, (W / S2).round().clamp(-4, 3), line, color=colour, linewidth=2)
        ax.plot(1.8, W_hat, "o", color=colour, markersize=8)
        name = " (nearest)" if S2 == 1 else ""
        ax.text(0.2, W_hat, f"$S_2$ = {S2:g}{name}: 1.8 becomes {W_hat}", color=colour, ha="right",
                va="center", fontsize=12)
    ax.axvline(1.8, color="#999999", linestyle=":", linewidth=1)
    ax.annotate("the weight 1.8", (1.8, -3.7), (6, 0), textcoords="offset points")
    ax.set(xlabel="weight $W$", ylabel=r"$\widehat W$, $s_1$ = 1", xlim=(-4.6, 4.6))


def staircase() -> plt.Figure:
    """The staircase as README shows it."""
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    draw_staircase(axes)
    axes.set(title="A learned scale moves a weight to another step of the same grid")
    return figure


def around_the_best(held: list[dict], place: str, method: str) -> list[tuple]:
    """(hyperparameter / its best value, share that remains) of the grid's runs that have the other
    one at its best. AdaRound's is its coefficient, AdaQuant's the learning rate of s1, FlexRound's
    that of the other factors."""
    rate, other = knobs.GRIDS[method]
    moved, fixed = (rate, other) if method == "flexround" else (other, rate)
    chosen = knobs.best(held, place, method)["settings"]
    points = []
    for r in held:
        own = r["settings"]
        if (r["part"], r["place"], r["method"]) != ("grid", place, method):
            continue
        if own[fixed] == chosen[fixed]:
            points.append((own[moved] / chosen[moved], knobs.left(r, held)))
    return sorted(points)


def from_each_start(held: list[dict], place: str, method: str) -> list[tuple]:
    """(initial s1, share that remains) of the method's best settings: from each p, then outputs."""
    found = knobs.from_starts(held, place, method)
    best = knobs.left(knobs.best(held, place, method), held)
    names = [knobs.start_of(own) for own in knobs.STARTS]
    points = [(i, found[name]) for i, name in enumerate(names) if name in found]
    return [*points, (len(names), best)]


# What is varied, as the panels say it.
WORDS = {"reg_weight": "coefficient of the regulariser", "s1_lr": "learning rate of $s_1$",
         "lr": "learning rate of $S_2$, $s_3$, $s_4$"}


def sensitivity() -> plt.Figure:
    """The share of the loss that remains if a hyperparameter is off (above) and from each initial
    s1 (below), for each method."""
    held = studies.read_results(knobs.HERE)
    figure, rows = plt.subplots(2, len(TITLES), figsize=(3.3 * len(TITLES), 6.4),
                                layout="constrained", sharey=True)
    for (above, below), place in zip(rows.T, TITLES, strict=True):
        for method, own in knobs.GRIDS.items():
            style = {"color": COLOUR[method], "marker": MARKER[method], "markersize": 5}
            word = WORDS[list(own)[method != "flexround"]]
            above.plot(*zip(*around_the_best(held, place, method), strict=True), **style,
                       label=f"{NAME[method]}: {word}")
            below.plot(*zip(*from_each_start(held, place, method), strict=True), **style)
        above.set(xscale="log", yscale="log", title=TITLES[place],
                  xlabel="hyperparameter / its best value")
        names = [f"{own['p']:g}" for own in knobs.STARTS]
        below.set_xticks(range(len(names) + 1), [*names, "outputs"])
        below.set(xlabel="initial $s_1$: weights with p = ..., or")
        ticks = [0.1, 0.2, 0.5, 1]
        above.set_yticks(ticks, [f"{t:g}" for t in ticks])
        above.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    for axes in rows[:, 0]:
        axes.set_ylabel("share of round to\nnearest's loss that remains")
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


# Networks that steps has a panel for, the first three of which there are runs, and their titles.
PANELS = {"lite0": "EfficientNet-Lite0, W4", "resnet, channels x 16": "ResNet, channels x 16, W2",
          "gpt": "small GPT, W2", "minilm": "MiniLM, W3", "resnet20": "ResNet-20, W3"}
# How s1 is set, as the axis says it. Learned rules begin at the first three.
WAYS = {"weights, p = 2": "weights,\np = 2", "outputs": "outputs",
        "weights, p = 0.5": "weights,\np = 0.5",
        "FlexRound's learned s1": "FlexRound's\nlearned $s_1$"}


RULES = ("rtn", *steps.COMPARED)                                     # they keep s1
LEARNED = ("adaquant", "flexround")                                  # they learn it from there


def draw_steps(ax, held: list[dict], network: str) -> list:
    """The share of the loss that remains against the way in which s1 is set, a line for each rule.
    Return the lines of the rules that keep s1. AdaRound with a constant learning rate is dotted."""
    ways = [way for way in WAYS if steps.cell_of(held, network, way, "adaround")]
    lines = []
    for rule in (*RULES, "adaround-constant", *LEARNED):
        method, points = rule.partition("-")[0], {}
        for i, way in enumerate(ways):
            shares = [steps.share(r, held) for r in steps.cell_of(held, network, way, rule)]
            if shares:                                               # one for each seed
                points[i] = statistics.median(shares)
        kept = rule not in LEARNED
        style = ":" if rule == "adaround-constant" else "-" if kept else "none"
        line, = ax.plot(points.keys(), points.values(), color=COLOUR[method], linewidth=2,
                        linestyle=style, marker=MARKER[method], markersize=8,
                        markerfacecolor=COLOUR[method] if kept else "white", markeredgewidth=2,
                        label=NAME[method])
        lines += [line] if rule in RULES else []
    ax.set(yscale="log", xlim=(-0.3, len(ways) - 0.7))
    ax.set_xticks(range(len(ways)), [WAYS[way] for way in ways])
    ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    return lines


def steps_picture(held: list[dict] | None = None) -> plt.Figure:
    """The two-way table of experiments/steps.py: how s1 is set, and which rule then rounds."""
    held = studies.read_results(steps.HERE) if held is None else held
    shown = [network for network in PANELS
             if steps.cell_of(held, network, "weights, p = 2", "adaround")][:3]
    figure, row = plt.subplots(1, len(shown), figsize=(4.4 * len(shown), 3.9), sharey=True,
                               layout="constrained", squeeze=False)
    for ax, network in zip(row[0], shown, strict=True):
        lines = draw_steps(ax, held, network)
        ax.set(title=PANELS[network])
    row[0, 0].set_ylabel("share of round to\nnearest's loss that remains")
    label_ends(row[0, -1], lines)
    figure.supxlabel("how $s_1$ is set (filled: the rule keeps it, hollow: the rule learns it from "
                     "there, dotted: constant learning rate)", fontsize=11)
    return figure


PICTURES = {"staircase": staircase, "sensitivity": sensitivity, "steps": steps_picture}


def main() -> None:
    matplotlib.use("Agg")
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                         "axes.spines.right": False, "legend.frameon": False})
    for name in sys.argv[1:] or PICTURES:
        path = HERE / f"{name}.png"
        PICTURES[name]().savefig(path, dpi=110, facecolor="white")
        print(path)


if __name__ == "__main__":
    main()
