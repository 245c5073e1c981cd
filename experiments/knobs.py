"""The search for the settings of each method: what each knob leaves of a block's loss.

    python -m experiments.knobs --out mine.jsonl --data SHARED --jobs 2      make the search again
    python -m experiments.knobs --table                                      the tables

Each method has the same number of runs in each place. A place is a few blocks of one network. We
reconstruct each block by itself, on float inputs, and measure the loss on inputs that it did not
see. Both kinds of inputs are calibration data. Nothing here sees the data that are scored.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

import models
import reconstruct
from experiments import pretrained, studies, tools
from reconstruct import ReconstructionConfig, quantize_model

HERE = Path(__file__).parent / "knobs.jsonl"
START = {"start": "outputs"}

# network: bits, blocks, spread of the channels, inputs
PLACES = {"lite0": (4, (1, 13), 1, 256), "resnet20": (3, (1, 4, 8), 1, 256),
          "resnet": (2, (1, 2, 3), 1, 256), "resnet x 16": (2, (1, 2, 3), 16, 256),
          "mobilenet": (2, (1, 3, 5), 1, 256), "gpt": (2, (1, 2, 3), 1, 128)}
# 15 runs a method: the rate, and the one knob beside it. Then its best with three other starts.
GRIDS = {
    "adaround": {"lr": (0.03, 0.1, 0.3), "reg_weight": (10, 100, 1000, 1e4, 1e5)},
    "adaquant": {"lr": (2.5e-4, 1e-3, 4e-3), "s1_lr": (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256)},
    "flexround": {"lr": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2), "s1_lr": (8e-3, 3.2e-2, 0.128)},
}
RTN = [("rtn", own) for own in (START, {"p": 2.0}, {"p": 2.4}, {"p": 3.0})]


def grid() -> list[tuple[str, dict]]:
    """(method, settings) of each run of the grid, from the start on outputs."""
    runs = list(RTN)
    for method, knobs in GRIDS.items():
        for values in product(*knobs.values()):
            runs.append((method, dict(zip(knobs, values, strict=True)) | START))
    return runs


def place_inputs(place: str, data, networks=models.NETWORKS):
    """The chosen blocks of a place and their float inputs: [(block, calibration, unseen)], and the
    size of a batch."""
    bits, chosen, spread, count = PLACES[place]
    name = place.split()[0]
    if name == "lite0":
        task = pretrained.lite0_task(Path(data, "imagenet"), 160, 2 * count, 0, "train")
    else:
        task = models.load_task(name, data, networks, 0, "train", 2 * count)
    tools.rescale(task.net, spread)
    x, found = task.calibration, []
    for i, block in enumerate(task.net.blocks[:max(chosen) + 1]):
        if i in chosen:
            found.append((block, x[:count], x[count:]))
        x = reconstruct.run(block, x, 32, "cpu", "cpu")
    return found, task.batch_size


def one_run(job) -> dict:
    """The losses of one place with one method and its settings."""
    place, method, settings, data, iterations = job
    blocks, batch_size = place_inputs(place, data)
    config = ReconstructionConfig(method, PLACES[place][0], end_bits=None, batch_size=batch_size,
                                  iterations=iterations, **settings)
    calibration, unseen, kept, began = [], [], [], time.perf_counter()
    for block, x, x_unseen in blocks:
        y = reconstruct.run(block, x_unseen, batch_size, "cpu", "cpu")
        hat = copy.deepcopy(block)
        try:
            report, = quantize_model([hat], x, config, show=False)
        except FloatingPointError:                                   # a rate that is far too large
            calibration.append(math.inf), unseen.append(math.inf), kept.append(0)
            continue
        calibration.append(report.final_loss)
        unseen.append(reconstruct.evaluate(hat, x_unseen, y, batch_size, "cpu"))
        kept.append(report.best_iteration / max(len(report.history), 1))
    return {"place": place, "method": method, "settings": settings, "iterations": iterations,
            "calibration": calibration, "unseen": unseen, "kept": kept,
            "seconds": round(time.perf_counter() - began, 1)}


def main(arguments=None) -> None:
    flags = argparse.ArgumentParser(prog="python -m experiments.knobs")
    flags.add_argument("--out", metavar="FILE")
    flags.add_argument("--place", nargs="+", default=list(PLACES), choices=PLACES)
    flags.add_argument("--data", help="folder of imagenet and of CIFAR-10")
    flags.add_argument("--jobs", type=int, default=1)
    flags.add_argument("--iterations", type=int, default=250)
    args = flags.parse_args(arguments)
    held = studies.read_results(args.out)
    done = {(r["place"], r["method"], str(r["settings"]), r["iterations"]) for r in held}
    jobs = [(place, method, settings, args.data, args.iterations) for place in args.place
            for method, settings in grid()
            if (place, method, str(settings), args.iterations) not in done]
    os.environ.update(studies.MALLOC)
    began = time.perf_counter()
    with get_context("spawn").Pool(args.jobs, torch.set_num_threads, (1,)) as pool:
        for count, record in enumerate(pool.imap_unordered(one_run, jobs), 1):
            studies.append_result(args.out, record)
            left = (time.perf_counter() - began) * (len(jobs) / count - 1)
            print(f"{count} of {len(jobs)}: {json.dumps(record)} (about {left:.0f} s left)",
                  flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        sys.exit(f"knobs: {problem}")
