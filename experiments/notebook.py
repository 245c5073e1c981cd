"""What demo.ipynb needs and what is not its story: the look of a chart, many runs side by side,
tables, the committed runs of results.jsonl, and what a quantized network holds."""
import io
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, Markdown, display
from torch import nn

import flexround
import models
import reconstruct
from experiments import tools
from experiments.studies import read_results

RESULTS = Path(__file__).with_name("results.jsonl")

# One name, one colour and one marker for each method, throughout.
METHODS = ["rtn", "adaround", "adaquant", "flexround"]
NAME = {"rtn": "round to nearest", "adaround": "AdaRound", "adaquant": "AdaQuant",
        "flexround": "FlexRound", "adaquant-steps": "AdaQuant, $V$ in steps"}
COLOUR = {"rtn": "#666666", "adaround": "#D98E00", "adaquant": "#009E73", "flexround": "#0072B2"}
MARKER = {"rtn": "s", "adaround": "^", "adaquant": "D", "flexround": "o"}


def style() -> None:
    """The look of all charts: 110 dpi, no frame, a light grid."""
    plt.rcParams.update({
        "figure.dpi": 110, "savefig.dpi": 110, "font.size": 11, "axes.titlesize": 12,
        "figure.constrained_layout.use": True, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})


# ---- Runs ----------------------------------------------------------------------------------------

def one_run(job) -> dict:
    """Quantize and score one network, in a process of its own: a record like those of
    results.jsonl, with the losses of each block."""
    name, config, full, options = job
    task = models.load_task(name, **options)
    net = task.net.to(config.device)
    if len(task.calibration) < config.batch_size:                    # Fig. 7 has few inputs
        config = replace(config, batch_size=len(task.calibration))
    reports = reconstruct.quantize_model(net.blocks, task.calibration, config, show=False)
    return {"network": name, "about": task.about, "samples": len(task.calibration),
            "config": asdict(config), "full": full, "score": task.score(net),
            "losses": [(r.start_loss, r.final_loss) for r in reports]}


def side_by_side(jobs: list, full: dict, data=None) -> list[dict]:
    """A record for each job, in the order of the jobs. A job is a network's name, a config, and
    maybe a number of calibration inputs.

    On a CPU the runs go side by side, in processes of one thread each. A line says how long it
    still takes. full: the score of each network in full precision. data: as in models.load_task.
    """
    jobs = [(name, config, full[name], {"data": data, "seed": config.seed,
                                        "samples": samples[0] if samples else None})
            for name, config, *samples in jobs]
    on_cpu = all(config.device == "cpu" for _, config, *_ in jobs)
    workers = min(len(jobs), os.cpu_count() or 1, 8) if on_cpu else 1
    records, began = [], time.perf_counter()
    line = display(Markdown(f"{len(jobs)} runs, {workers} at a time"), display_id=True)
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        for record in pool.imap(one_run, jobs):
            records.append(record)
            left = (time.perf_counter() - began) * (len(jobs) / len(records) - 1)
            line.update(Markdown(f"{len(records)} of {len(jobs)} runs, about {left:.0f} s left"))
        pool.close()                                                 # as in reconstruct.main
        pool.join()
    line.update(Markdown(f"{len(jobs)} runs, {workers} at a time, "
                         f"{time.perf_counter() - began:.0f} s"))
    return records


def committed(study: str, **settings) -> list[dict]:
    """The records of one study in results.jsonl. settings: what their config has to hold."""
    return [r for r in read_results(RESULTS) if r["study"] == study
            and all(r["config"][key] == value for key, value in settings.items())]


# ---- Tables --------------------------------------------------------------------------------------

def method_name(config: dict) -> str:
    return NAME[config["method"]]


def spread(scores) -> tuple[float, float, float]:
    """Median, minimum and maximum."""
    return statistics.median(scores), min(scores), max(scores)


def table(records: list[dict], column: Callable = method_name) -> str:
    """Records as a Markdown table. A row for each network and number of bits, and a column for each
    column(config). A cell is the median of the seeds, in brackets minimum to maximum."""
    columns, rows = list(dict.fromkeys(column(r["config"]) for r in records)), {}
    for r in records:
        row = rows.setdefault((r["network"], r["config"]["bits"], round(r["full"], 2)), {})
        row.setdefault(column(r["config"]), []).append(r["score"])
    lines = [["network", "bits", "full precision", *columns], ["---"] * (3 + len(columns))]
    for (network, bits, full), cells in rows.items():
        line = [network, f"W{bits}", f"{full:.2f}"]
        for title in columns:
            middle, low, high = (f"{x:.2f}" for x in spread(cells.get(title, [float("nan")])))
            line.append(middle if low == high else f"{middle} ({low} to {high})")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def leads(studies: dict[str, list[dict]]) -> str:
    """By how much FlexRound's median is better than AdaRound's and AdaQuant's, as a Markdown table.
    Bold: all seeds of one are better than all seeds of the other."""
    lines = ["| network | bits | ahead of AdaRound | ahead of AdaQuant |", "|---|---|---|---|"]
    for title, records in studies.items():
        better, digits = (1, 2) if "accuracy" in records[0]["about"] else (-1, 3)    # perplexity
        for bits in sorted({r["config"]["bits"] for r in records}, reverse=True):
            scores = {m: [better * r["score"] for r in records if r["config"]["bits"] == bits
                          and r["config"]["method"] == m] for m in METHODS}
            ours, line = spread(scores["flexround"]), [title, f"W{bits}"]
            for method in ("adaround", "adaquant"):
                other = spread(scores[method])
                bold = "**" if ours[1] > other[2] or other[1] > ours[2] else ""
                line.append(f"{bold}{ours[0] - other[0]:+.{digits}f}{bold}")
            lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


# ---- Charts --------------------------------------------------------------------------------------

def with_bars(ax, x, seeds: list, method: str, **more) -> None:
    """At each x the median of the seeds' values, with a bar from minimum to maximum."""
    middle, low, high = zip(*map(spread, seeds), strict=True)
    bars = [[m - a for m, a in zip(middle, low, strict=True)],
            [b - m for m, b in zip(middle, high, strict=True)]]
    ax.errorbar(x, middle, bars, **{"fmt": MARKER[method], "color": COLOUR[method], "ms": 7,
                                    "capsize": 4, "label": NAME[method], "zorder": 3, **more})


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
                scores = [r["score"] for r in records if r["config"]["method"] == method
                          and r["config"]["bits"] == bits]
                middle, x = statistics.median(scores), i + 0.17 * (j - 1.5)
                if low <= middle <= high:
                    with_bars(ax, [x], [scores], method, label=None if i else NAME[method])
                else:
                    text, y, va = ((f"{middle:.1f}\n$\\downarrow$", low, "bottom") if middle < low
                                   else (f"$\\uparrow$\n{middle:.1f}", high, "top"))
                    ax.text(x, y, text, color=COLOUR[method], va=va, ha="center", weight="bold")
        unit = ("test accuracy, % (higher is better)" if "accuracy" in records[0]["about"]
                else "test perplexity (lower is better)")
        ax.set(xticks=range(3), xticklabels=["4 bits", "3 bits", "2 bits"], title=title,
               xlim=(-0.5, 2.5), ylim=(low, high), ylabel=unit)
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
    fig.savefig(held, format="png")
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


def shifts(net: nn.Module, bits: int, learned_s1: bool = True) -> dict:
    """W and tools.grid_shift of each layer of so many bits, by its name."""
    return {name: (W.cpu(), tools.grid_shift(q, W, learned_s1=learned_s1).cpu())
            for name, q, W, _ in parts(net, bits)}


def share(shifts: dict, steps: int) -> float:
    """Per cent of all weights that moved by at least so many grid steps."""
    moved = torch.cat([shift.flatten().abs() for _, shift in shifts.values()])
    return 100 * float((moved >= steps).float().mean())
