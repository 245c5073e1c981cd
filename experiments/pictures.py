"""The pictures of README.md. `python -m experiments.pictures` draws them from knobs.jsonl."""
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

from experiments import knobs, studies

HERE = Path(__file__).parent
COLOURS = {"adaround": "#d95f02", "adaquant": "#7570b3", "flexround": "#1b6ca8"}
TITLES = {"lite0": "EfficientNet-Lite0, W4", "resnet x 16": "ResNet, channels x 16, W2",
          "mobilenet": "small MobileNet, W2", "resnet20": "ResNet-20, W3"}


def staircase() -> plt.Figure:
    """One weight's W_hat for three values of its scale S2, s1 = 1, 3 bits."""
    figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    W = torch.linspace(-4.5, 4.5, 2000)
    for S2, colour in ((0.7, "#d95f02"), (1.0, "#444444"), (1.4, "#1b6ca8")):
        W_hat = (W / S2).round().clamp(-4, 3)
        axes.plot(W, W_hat, color=colour, label=f"S2 = {S2:g}" + (": round to nearest" if S2 == 1
                                                                  else ""))
        at = round(1.8 / S2)
        axes.plot(1.8, min(max(at, -4), 3), "o", color=colour)
    axes.axvline(1.8, color="#999999", linestyle=":", linewidth=1)
    axes.annotate("the weight 1.8", (1.8, -3.6), xytext=(2.0, -3.6))
    axes.set(xlabel="weight W", ylabel="W_hat = s1 round(W / (s1 S2)), s1 = 1",
             title="A learned scale moves a weight to another step of the same grid")
    axes.legend(loc="upper left")
    return figure


def around_the_best(held: list[dict], place: str, method: str) -> list[tuple]:
    """(knob beside its best value, what is left) of the grid's runs with the other knob at its
    best. AdaRound's knob is its weight, AdaQuant's the rate of s1, FlexRound's its first rate."""
    rate, other = knobs.GRIDS[method]
    moved, fixed = (rate, other) if method == "flexround" else (other, rate)
    chosen = knobs.best(held, place, method)["settings"]
    points = []
    for r in held:
        if (r["part"], r["place"], r["method"]) == ("grid", place, method) and \
                r["settings"][fixed] == chosen[fixed]:
            points.append((r["settings"][moved] / chosen[moved], knobs.left(r, held)))
    return sorted(points)


def from_each_start(held: list[dict], place: str, method: str) -> list[tuple]:
    """(start, what is left) of the method's best settings: the exponents p, then the outputs."""
    found = knobs.from_starts(held, place, method)
    points = [(i, found[name]) for i, name in enumerate(map(knobs.start_of, knobs.STARTS))
              if name in found]
    return [*points, (len(knobs.STARTS), knobs.left(knobs.best(held, place, method), held))]


def sensitivity() -> plt.Figure:
    """What is left of the loss against how far the knob is from its best (above), and from which
    start of s1 (below), for each method."""
    held = studies.read_results(knobs.HERE)
    figure, rows = plt.subplots(2, len(TITLES), figsize=(3.1 * len(TITLES), 5.8),
                                layout="constrained", sharey=True)
    for (above, below), place in zip(rows.T, TITLES, strict=True):
        for method, own in knobs.GRIDS.items():
            style = {"color": COLOURS[method], "markersize": 4}
            knob = list(own)[method != "flexround"]
            above.plot(*zip(*around_the_best(held, place, method), strict=True), "o-", **style,
                       label=f"{studies.NAMES[method]}: {knob}")
            below.plot(*zip(*from_each_start(held, place, method), strict=True), "o-", **style)
        above.set(xscale="log", yscale="log", title=TITLES[place], xlabel="knob / its best value")
        names = [f"{own['p']:g}" for own in knobs.STARTS]
        below.set_xticks(range(len(names) + 1), [*names, "outputs"])
        below.set(xlabel="start of s1: weights with p = ..., or")
        ticks = [0.1, 0.2, 0.5, 1]
        above.set_yticks(ticks, [f"{t:g}" for t in ticks])
        above.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    for axes in rows[:, 0]:
        axes.set_ylabel("left of round to nearest's loss")
    rows[0, 0].legend(fontsize=8)
    return figure


def main() -> None:
    matplotlib.use("Agg")
    for draw in (staircase, sensitivity):
        path = HERE / f"{draw.__name__}.png"
        draw().savefig(path, dpi=110, facecolor="white")
        print(path)


if __name__ == "__main__":
    main()
