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


def sensitivity() -> plt.Figure:
    """What is left of the loss against how far the knob is from its best, for each method: the
    other knob at its best."""
    held = studies.read_results(knobs.HERE)
    places = [place for place in TITLES if any(r["place"] == place for r in held)]
    figure, rows = plt.subplots(1, len(places), figsize=(3.1 * len(places), 3.3),
                                layout="constrained", sharey=True)
    for axes, place in zip(rows, places, strict=True):
        for method, own in knobs.GRIDS.items():
            rate, knob = own                                         # FlexRound: its rate
            moved = knob if method != "flexround" else rate
            fixed = rate if moved == knob else knob
            chosen = knobs.best(held, place, method)["settings"]
            points = []
            for r in held:
                if (r["part"], r["place"], r["method"]) == ("grid", place, method) and \
                        r["settings"][fixed] == chosen[fixed]:
                    points.append((r["settings"][moved] / chosen[moved], knobs.left(r, held)))
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, "o-", color=COLOURS[method], markersize=4,
                      label=f"{studies.NAMES[method]}: {moved}")
        axes.set(xscale="log", yscale="log", title=TITLES[place], xlabel="knob / its best value")
        ticks = [0.1, 0.2, 0.5, 1]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    rows[0].set_ylabel("left of round to nearest's loss")
    rows[0].legend(fontsize=8)
    return figure


def main() -> None:
    matplotlib.use("Agg")
    for draw in (staircase, sensitivity):
        path = HERE / f"{draw.__name__}.png"
        draw().savefig(path, dpi=110, facecolor="white")
        print(path)


if __name__ == "__main__":
    main()
