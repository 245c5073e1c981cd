"""The search for the settings of each method: what each knob leaves of a block's loss.

    python -m experiments.knobs                                          the tables
    python -m experiments.knobs --out mine.jsonl --data DATA --jobs 2    make the search again

A place is a few blocks of one network. We reconstruct each block by itself, on float inputs, and
measure the loss on inputs that it did not see. Both kinds of inputs are training data. Nothing here
sees the data that are scored. The search has three parts, with the same number of runs for each
method in each place:

    grid         15 runs: five by three values of the two knobs, from the start on outputs
    starts       the best of the grid from five other starts: the weights with p = 0.5 to 3
    beyond       the best of both with larger knobs, because several are best at the grid's edge
    longer       the best of all. It is new only with other --iterations than before

The transformers, gemma and minilm, have other parts, because an iteration of them takes long: a
grid of 6 runs from the paper's start, the weights with p = 2, three other starts, and beyond it
one of the two knobs at a quarter.

studies.py then compares three candidates of each method on whole networks (the study choice).

DATA is a folder that holds imagenet (see pretrained.lite_task), CIFAR-10's files, WikiText-2's
files in text, and SST-2's in text/sst2.
"""
import argparse
import copy
import math
import os
import statistics
import sys
import time
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

import models
import reconstruct
from experiments import pretrained, studies, tools
from reconstruct import ReconstructionConfig, quantize_model

HERE = Path(__file__).parent / "knobs.jsonl"
START, PAPER = studies.OUTPUTS, studies.PAPER

# network: bits, blocks, spread of the channels, inputs
PLACES = {"lite0": (4, (1, 13), 1, 256), "resnet20": (3, (1, 4, 8), 1, 256),
          "resnet": (2, (1, 2, 3), 1, 256), "resnet x 16": (2, (1, 2, 3), 16, 256),
          "mobilenet": (2, (1, 3, 5), 1, 256), "gpt": (2, (1, 2, 3), 1, 128),
          "gemma": (6, (6, 13), 1, 32), "gemma at W8": (8, (6, 13), 1, 32),
          "minilm": (3, (2, 5), 1, 128)}
# 15 runs a method: the rate, and the one knob beside it. Then its best with five other starts.
GRIDS = {
    "adaround": {"lr": (0.03, 0.1, 0.3), "reg_weight": (10, 100, 1000, 1e4, 1e5)},
    "adaquant": {"lr": (2.5e-4, 1e-3, 4e-3), "s1_lr": (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256)},
    "flexround": {"lr": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2), "s1_lr": (8e-3, 3.2e-2, 0.128)},
}
# 6 runs a method. The finer the grid, the smaller are the steps of V, which has a weight's unit,
# and of log S2, which moves a weight by more steps of the grid. So 8 bits have a grid of their own.
# (At 6 bits our first grids were four times as high, AdaRound's ten times, and had their best at
# the lower edge. So we moved all of them down.)
WEIGHTS = (1e4, 1e5)
COARSE = {
    "gemma": {"adaround": {"lr": (0.01, 0.03, 0.1), "reg_weight": WEIGHTS},
              "adaquant": {"lr": (2.5e-5, 1e-4, 4e-4), "s1_lr": (2e-3, 1.6e-2)},
              "flexround": {"lr": (5e-4, 2e-3, 8e-3), "s1_lr": (2e-3, 1.6e-2)}},
    "gemma at W8": {"adaround": {"lr": (0.01, 0.03, 0.1), "reg_weight": WEIGHTS},
                    "adaquant": {"lr": (6e-6, 2.5e-5, 1e-4), "s1_lr": (5e-4, 4e-3)},
                    "flexround": {"lr": (5e-4, 2e-3, 8e-3), "s1_lr": (5e-4, 4e-3)}},
    "minilm": {"adaround": {"lr": (0.03, 0.1, 0.3), "reg_weight": WEIGHTS},
               "adaquant": {"lr": (1.2e-4, 5e-4, 2e-3), "s1_lr": (2e-3, 1.6e-2)},
               "flexround": {"lr": (2e-3, 8e-3, 3.2e-2), "s1_lr": (2e-3, 1.6e-2)}},
}
# The smaller p, the smaller the s1 that the search finds, because large weights count less.
STARTS = [{"start": "weights", "p": p} for p in (0.5, 1.0, 2.0, 2.4, 3.0)]


def grids(place: str) -> dict:
    """The grid of each method in a place."""
    return COARSE.get(place, GRIDS)


def grid(held: list[dict], place: str) -> list[tuple[str, dict]]:
    """(method, settings) of each run of the grid, and of round to nearest."""
    start, nearest = START, [START, *STARTS]
    if place in COARSE:
        start, nearest = PAPER, [PAPER]
    runs = [("rtn", own) for own in nearest]
    for method, knobs in grids(place).items():
        for values in product(*knobs.values()):
            runs.append((method, dict(zip(knobs, values, strict=True)) | start))
    return runs


def starts(held: list[dict], place: str) -> list[tuple[str, dict]]:
    """The best of the grid from the other starts."""
    others = [START, STARTS[1], STARTS[4]] if place in COARSE else STARTS
    return [(method, best(held, place, method)["settings"] | own)
            for method in GRIDS for own in others]


def beyond(held: list[dict], place: str) -> list[tuple[str, dict]]:
    """The best so far, with the rate twice, the other knob four times as large, and both. In a
    coarse place either is a quarter: the other knob because the best ones are at the lower edge,
    the rate because another start than the grid's may want a smaller one."""
    factors = ((1, 0.25), (0.25, 1)) if place in COARSE else ((2, 1), (1, 4), (2, 4))
    runs = []
    for method, knobs in grids(place).items():
        rate, other = knobs
        chosen = best(held, place, method, ("grid", "starts"))["settings"]
        for a, b in factors:
            runs.append((method, chosen | {rate: a * chosen[rate], other: b * chosen[other]}))
    return runs


def longer(held: list[dict], place: str) -> list[tuple[str, dict]]:
    """The best of all parts before, to see whether its rank holds with more iterations."""
    return [(method, best(held, place, method, ("grid", "starts", "beyond"))["settings"])
            for method in GRIDS]


PARTS = {part.__name__: part for part in (grid, starts, beyond, longer)}


def left(record: dict, held: list[dict]) -> float:
    """What a run leaves of round to nearest's loss on unseen inputs (from the paper's start): the
    geometric mean over the blocks."""
    nearest, = [r for r in held if r["place"] == record["place"] and r["method"] == "rtn"
                and r["settings"] == PAPER]
    return tools.mean_ratio(record["unseen"], nearest["unseen"])


def best(held: list[dict], place: str, method: str, parts=("grid",)) -> dict:
    """The run of some parts with the least loss on unseen inputs."""
    own = [r for r in held if (r["place"], r["method"]) == (place, method) and r["part"] in parts]
    return min(own, key=lambda r: left(r, held))


def from_starts(held: list[dict], place: str, method: str) -> dict[str, float]:
    """{start: what the best of the grid leaves from another start than the grid's}"""
    return {start_of(r["settings"]): left(r, held) for r in held
            if (r["part"], r["place"], r["method"]) == ("starts", place, method)}


def start_of(settings: dict) -> str:
    """The start's name in a table."""
    return "outputs" if settings["start"] == "outputs" else f"p = {settings['p']:g}"


@lru_cache(1)                                                        # Gemma's take minutes
def place_inputs(place: str, data, networks=models.NETWORKS):
    """The chosen blocks of a place and their float inputs: [(block, calibration, unseen)], and the
    size of a batch."""
    bits, chosen, spread, count = PLACES[place]
    name = place.split()[0]
    if name == "lite0":
        task = pretrained.lite_task(Path(data, "imagenet"), 160, 2 * count, 0, "train")
    elif name == "gemma":
        task = pretrained.gemma_task(Path(data, "text"), 2 * count, 0, "train")
    elif name == "minilm":
        task = pretrained.minilm_task(Path(data, "text", "sst2"), 2 * count, 0, "train")
    else:
        task = models.load_task(name, data, networks, 0, "train", 2 * count)
    tools.rescale(task.net, spread)
    x, found = task.calibration, []
    for i, block in enumerate(task.net.blocks[:max(chosen) + 1]):
        if i in chosen:
            found.append((block, x[:count], x[count:]))
        x = reconstruct.outputs_of(block, x, 32, "cpu", "cpu")
    return found, task.batch_size


def one_run(job) -> dict:
    """The losses of one place with one method and its settings."""
    part, place, method, settings, data, iterations = job
    blocks, batch_size = place_inputs(place, data)
    config = ReconstructionConfig(method, PLACES[place][0], end_bits=None, batch_size=batch_size,
                                  iterations=iterations, **settings)
    calibration, unseen, kept, began = [], [], [], time.perf_counter()
    for block, x, x_unseen in blocks:
        y = reconstruct.outputs_of(block, x_unseen, batch_size, "cpu", "cpu")
        hat = copy.deepcopy(block)
        try:
            report, = quantize_model([hat], x, config, show=False)
        except FloatingPointError:                                   # a rate that is far too large
            calibration.append(math.inf)
            unseen.append(math.inf)
            kept.append(0)
            continue
        calibration.append(report.final_loss)
        unseen.append(reconstruct.evaluate(hat, x_unseen, y, config))
        kept.append(report.best_iteration / max(len(report.history), 1))
    return {"part": part, "place": place, "method": method, "settings": settings,
            "iterations": iterations, "calibration": calibration, "unseen": unseen, "kept": kept,
            "seconds": round(time.perf_counter() - began, 1)}


def best_table(held: list[dict]) -> str:
    """The best of the grid, as a Markdown table: what is left of the loss, in brackets the median
    and the worst of its runs, kept_last of the best, and what the best leaves from other starts."""
    names = [start_of(own) for own in (START, *STARTS)]
    lines = ["| place | bits | method | settings | remains (median, worst) | kept last | "
             + " | ".join(names) + " |", "|---" * (6 + len(names)) + "|"]
    for place in dict.fromkeys(r["place"] for r in held):
        for method in GRIDS:
            own = [r for r in held if (r["place"], r["method"]) == (place, method)]
            runs = sorted(left(r, held) for r in own if r["part"] == "grid")
            chosen = best(held, place, method)
            settings = ", ".join(f"{k} {chosen['settings'][k]:g}" for k in GRIDS[method])
            found = from_starts(held, place, method)
            others = " | ".join(f"{found[name]:.2f}" if name in found else "" for name in names)
            kept = sum(chosen["kept"]) / len(chosen["kept"])
            spread = f"{runs[0]:.2f} ({statistics.median(runs):.2f}, {runs[-1]:.2f})"
            lines.append(f"| {place} | W{PLACES[place][0]} | {studies.NAMES[method]} | {settings} "
                         f"| {spread} | {kept:.2f} | {others} |")
    return "\n".join(lines)


def grid_table(held: list[dict], place: str) -> str:
    """All runs of the grid of a place, as Markdown tables: rates down, the other knob across."""
    parts = []
    for method, knobs in grids(place).items():
        (down, rates), (across, values) = knobs.items()
        found = {(r["settings"][down], r["settings"][across]): left(r, held) for r in held
                 if (r["part"], r["place"], r["method"]) == ("grid", place, method)}
        lines = [f"| {studies.NAMES[method]}, {down} | "
                 + " | ".join(f"{across} {v:g}" for v in values) + " |",
                 "|---" * (1 + len(values)) + "|"]
        for rate in rates:
            cells = " | ".join(f"{found[rate, v]:.2f}" for v in values)
            lines.append(f"| {rate:g} | {cells} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def make(out, parts: list[str], places: list[str], data, jobs: int, iterations: int) -> None:
    """Make the runs that the file `out` does not hold yet, and add them to it."""
    os.environ.update(studies.MALLOC)
    for part in parts:
        held = studies.read_results(out)
        done = [(r["place"], r["method"], r["settings"], r["iterations"]) for r in held]
        todo = [(part, place, method, settings, data, iterations) for place in places
                for method, settings in PARTS[part](held, place)
                if (place, method, settings, iterations) not in done]
        began = time.perf_counter()
        with get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
            for count, record in enumerate(pool.imap_unordered(one_run, todo), 1):
                studies.append_result(out, record)
                seconds = (time.perf_counter() - began) * (len(todo) / count - 1)
                print(f"{part}, {count} of {len(todo)}: {record['place']} {record['method']} "
                      f"{record['settings']} (about {seconds:.0f} s left)", flush=True)


def main(arguments=None) -> None:
    flags = argparse.ArgumentParser(prog="python -m experiments.knobs")
    flags.add_argument("--out", metavar="FILE", help="add the runs to this file")
    flags.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    flags.add_argument("--place", nargs="+", default=list(PLACES), choices=PLACES)
    flags.add_argument("--data", help="folder of imagenet and of CIFAR-10")
    flags.add_argument("--jobs", type=int, default=1)
    flags.add_argument("--iterations", type=int, default=250)
    args = flags.parse_args(arguments)
    if args.out is not None:
        make(args.out, args.part, args.place, args.data, args.jobs, args.iterations)
    held = studies.read_results(args.out or HERE)
    print(best_table(held))
    for place in dict.fromkeys(r["place"] for r in held):
        print(f"\n{place}\n\n{grid_table(held, place)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        sys.exit(f"knobs: {problem}")
