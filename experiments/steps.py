"""The step or the rule? A two-way table: how s1 is set, and which rule then rounds.

    python -m experiments.steps                                            the tables
    python -m experiments.steps --out mine.jsonl --network gpt             make the runs again

Each row of the table is a way to set the step size s1, each column a rule. Some rules keep s1 fixed
(round to nearest, AdaRound, and AdaQuant and FlexRound without their learned s1), others learn it
from there (AdaQuant, FlexRound, and AdaRound with an outer step of its own).

For each cell we can try several learning rates (--factors): by default the one that
experiments/knobs.py found for the method, a quarter of it, and four times as much. If the best is
at an edge, we go on by fours until it is not. The first seed decides, by the loss on inputs that no
rule has learned from. The other seeds are run with that learning rate. No test data are used for
it. RESULTS.md says which cells had how many.
"""
import argparse
import copy
import math
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

import flexround
import reconstruct
from experiments import studies, tools
from flexround import METHODS
from reconstruct import ReconstructionConfig

HERE = Path(__file__).parent / "steps.jsonl"


# ---- Rules that differ from the paper's in what becomes of s1 ------------------------------------

class FixedAdaQuant(flexround.AdaQuant):
    """AdaQuant that keeps the initial s1."""

    learns_s1 = False


class FixedFlexRound(flexround.FlexRound):
    """FlexRound that keeps the initial s1: the first ablation of the paper's Table 1."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings | {"learn_s1": False})


class OuterAdaRound(flexround.AdaRound):
    """AdaRound with a learned outer step: W_hat = s1 * (floor(W / s0) + h(V)).

    This is the idea of Genie-M (arXiv:2212.04780). s0 is the initial s1. It stays, because it
    defines what up and down are.
    """

    learns_s1 = True

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.register_buffer("log_s0", self.log_s1.detach().clone())

    def integers(self, W, soft: bool = False):
        up = self.h() if soft else (self.V >= 0).to(W.dtype)
        down = torch.floor(W / self.log_s0.exp())
        return flexround.Clamp.apply(down + up, *self.bounds)


class RelativeAdaQuant(flexround.AdaQuant):
    """AdaQuant with V in units of the initial s1, so that one learning rate suits all layers."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.register_buffer("s0", self.s1.detach().clone())

    def integers(self, W):
        moved = W + self.s0 * self.V
        return flexround.Clamp.apply(flexround.Round.apply(moved / self.s1), *self.bounds)


# Rules whose learning rates do not fall (tools.constant_learning_rate), as AdaRound's in BRECQ.
CONSTANT = {f"{method}-constant": METHODS[method]
            for method in ("adaround", "adaquant", "flexround")}
METHODS |= {"adaquant-fixed": FixedAdaQuant, "flexround-fixed": FixedFlexRound,
            "adaround-outer": OuterAdaRound, "adaquant-relative": RelativeAdaQuant, **CONSTANT}
# The rules that keep s1, and those that learn it. The last of each are what a rival might want.
FIXED = {"rtn": "round to nearest", "adaround": "AdaRound", "adaquant-fixed": "AdaQuant",
         "flexround-fixed": "FlexRound", "adaround-constant": "AdaRound, constant learning rate"}
LEARNED = {"adaquant": "AdaQuant", "flexround": "FlexRound", "adaround-outer": "AdaRound, outer s1",
           "adaquant-relative": "AdaQuant, V in units of s1",
           "adaquant-constant": "AdaQuant, constant learning rate",
           "flexround-constant": "FlexRound, constant learning rate"}
# In explained: with the cosine for all, and with AdaRound's constant learning rate.
COMPARED = ("adaround", "adaquant-fixed", "flexround-fixed")
COMPARED_CONSTANT = ("adaround-constant", *COMPARED[1:])


# ---- How s1 is set -------------------------------------------------------------------------------

STARTS = {"weights, p = 0.5": {"p": 0.5}, "weights, p = 1": {"p": 1.0},
          "weights, p = 2": {"p": 2.0}, "outputs": {"start": "outputs"}}
BEST = "best for each block"                # for each block the start with the least unseen loss
TAKEN = {"FlexRound's learned s1": "flexround", "AdaQuant's learned s1": "adaquant"}
ROWS = (*STARTS, BEST, *TAKEN)


class Place(NamedTuple):
    """A network of the table, and what experiments/knobs.py found for its methods."""

    run: studies.Run                     # network, spread and number of inputs
    settings: dict                       # of ReconstructionConfig, for all methods
    methods: dict[str, dict]             # of ReconstructionConfig, for each method
    start: str = "outputs"               # where the two learned s1 of TAKEN begin


def place_of(network, method_settings, spread=1, samples=None, start="outputs", **settings):
    """A Place for a network, with the size of its batches."""
    config = ReconstructionConfig(batch_size=studies.BATCHES.get(network, 32))
    methods = {method: {k: v for k, v in own[0].items() if k in ("lr", "s1_lr", "reg_weight")}
               for method, own in method_settings.items()}
    return Place(studies.Run(network, config, spread, samples=samples), settings, methods, start)


RESNET20 = {"adaround": [{"lr": 0.3, "reg_weight": 1e5}], "adaquant": [{"lr": 1e-3, "s1_lr": 1e-3}],
            "flexround": [{"lr": 3.2e-2, "s1_lr": 8e-3}]}
PLACES = {
    "resnet, channels x 16": place_of("resnet", studies.UNEQUAL, 16, bits=2, iterations=250,
                                      start="weights, p = 0.5"),
    "gpt": place_of("gpt", studies.THREE, bits=2, iterations=250),
    "mobilenet": place_of("mobilenet", studies.THREE, bits=2, iterations=250),
    "resnet20": place_of("resnet20", RESNET20, samples=256, bits=3, iterations=250),
    "minilm": place_of("minilm", studies.MINILM, samples=128, bits=3, iterations=60, end_bits=None,
                       start="weights, p = 2"),
    "lite0": place_of("lite0", studies.LITE, samples=256, bits=4, iterations=250),
    # With one s1 for each output channel.
    "resnet, channels x 16, per channel": place_of("resnet", studies.UNEQUAL, 16, bits=2,
                                                   iterations=250, per_channel=True),
    "gpt, per channel": place_of("gpt", studies.THREE, bits=2, iterations=250, per_channel=True),
    "lite0, per channel": place_of("lite0", studies.LITE, samples=256, bits=4, iterations=250,
                                   per_channel=True),
}
# Learning rates of two variants, times FACTORS: AdaRound's outer step, V in units of s1.
OUTER_LR, RELATIVE_LR = 3.2e-2, 3.2e-2
FACTORS = (1, 0.25, 4)


def config_of(place: Place, rule: str, factor: float, seed: int) -> ReconstructionConfig:
    """The configuration of a rule. factor multiplies the learning rate that is searched."""
    own = dict(place.methods.get(rule.partition("-")[0], {}))
    if rule == "adaround-outer":
        own["s1_lr"] = OUTER_LR * factor
    elif rule == "adaquant-relative":
        own["lr"] = RELATIVE_LR * factor
    elif "lr" in own:
        own["lr"] *= factor
    elif rule != "rtn":
        own["lr"] = METHODS[rule].default_lr * factor
    return replace(place.run.config, method=rule, seed=seed, **place.settings, **own)


def place_quantizers(block: nn.Module, config: ReconstructionConfig, bits: dict[str, int], x,
                     grids: dict | None) -> dict[str, flexround.RoundToNearest]:
    """Put quantizers on a block, on the grids that we pass, or (None) on those of config.start.
    Return them by the name of their layer."""
    if grids is None:
        return flexround.quantize_layers(block, config, bits, x)
    made = {}
    for name, layer in flexround.quantizable_layers(block).items():
        made[name] = METHODS[config.method](layer.weight, bits[name], config.symmetric,
                                            config.per_channel, grid=grids[name])
        parametrize.register_parametrization(layer, "weight", made[name])
    return made


def quantize(blocks, x, unseen, config: ReconstructionConfig, starts: list[dict],
             grids: list | None) -> list[float]:
    """reconstruct.one_pass with one more loop inside: of several starts each block keeps the one
    with the least loss on unseen inputs. Returns these losses, one for each block."""
    losses = []
    bits = reconstruct.bits_of_layers(blocks, config.bits, config.end_bits)
    x_fp = x_q = x
    u_fp = u_q = unseen

    def run(block, x):
        return reconstruct.outputs_of(block, x, config.batch_size, "cpu", "cpu")

    for i, block in enumerate(blocks):
        y_fp, v_fp = run(block, x_fp), run(block, u_fp)
        if bits[i]:
            tried = []
            for start in starts:
                hat, own = copy.deepcopy(block), replace(config, **start)
                place_quantizers(hat, own, bits[i], x_fp[:reconstruct.START_INPUTS],
                                 grids and grids[i])
                reconstruct.reconstruct_block(hat, x_q, y_fp, own, x_fp, i)
                tried.append((reconstruct.evaluate(hat, u_q, v_fp, own), hat))
            loss, blocks[i] = min(tried, key=lambda pair: pair[0])
            losses.append(loss)
        x_fp, x_q = y_fp, run(blocks[i], x_q)
        u_fp, u_q = v_fp, run(blocks[i], u_q)
    return losses


# ---- One cell ------------------------------------------------------------------------------------

def grids_in(found: dict[str, flexround.RoundToNearest]) -> dict[str, tuple]:
    """The grids of quantizers by the name of their layer, as place_quantizers takes them."""
    return {name: (q.log_s1.detach(), q.zero_point) for name, q in found.items()}


def grids_of(folder: Path, name: str, rule: str, seed: int) -> Path:
    """The file of the s1 that a rule has learned."""
    return folder / f"{name.replace(' ', '-')}-{rule}-{seed}.pt"


def one_run(name: str, row: str, rule: str, factor: float, seed: int, folder: Path,
            options: dict) -> dict:
    """Make one run and return its record. The learned s1 of AdaQuant and FlexRound are kept in
    folder, for the rows that take them."""
    place = PLACES[name]
    config = config_of(place, rule, factor, seed)
    load = place.run._replace(config=config)
    count = load.samples or len(studies.load(load, **options).calibration)
    task = studies.load(load, **options, samples=2 * count)
    kept = grids_of(folder, name, TAKEN.get(row, rule), seed)
    grids = torch.load(kept) if row in TAKEN else None
    starts = [{}] if row in TAKEN else [STARTS[row]] if row in STARTS else list(STARTS.values())
    began = time.perf_counter()
    with tools.constant_learning_rate() if rule in CONSTANT else nullcontext():
        losses = quantize(task.net.blocks, task.calibration[:count], task.calibration[count:],
                          config, starts, grids)
    seconds = time.perf_counter() - began
    with parametrize.cached():                                       # quantize each weight once
        score = task.score(task.net)
    if rule in TAKEN.values() and row == place.start and factor == 1:
        torch.save([grids_in(flexround.quantizers(block)) for block in task.net.blocks], kept)
    right = getattr(task.score, "right", None)                       # of each input
    return {"network": name, "step": row, "rule": rule, "factor": factor, "seed": seed,
            "bits": config.bits, "lr": config.lr, "s1_lr": config.s1_lr,
            "iterations": config.iterations, "score": round(score, 6), "unseen": losses,
            "accuracy": "accuracy" in task.about, "seconds": round(seconds, 1),
            "machine": f"{platform.machine()}, torch {torch.__version__}",
            **({} if right is None else {"right": np.packbits(right).tobytes().hex()})}


def key_of(record: dict) -> tuple:
    """What a run is, as one_run takes it."""
    return tuple(record[k] for k in ("network", "step", "rule", "factor", "seed"))


def cell_of(held: list[dict], name: str, row: str, rule: str) -> list[dict]:
    """The runs of a cell, one for each seed, at the learning rate that the first seed chose."""
    runs = [r for r in held if (r["network"], r["step"], r["rule"]) == (name, row, rule)]
    first = [r for r in runs if r["seed"] == 0]
    if not first:
        return []
    # All losses are positive, so the sum of logarithms orders the geometric means.
    chosen = min(first, key=lambda r: sum(math.log(loss) for loss in r["unseen"]))
    return [r for r in runs if r["factor"] == chosen["factor"]]


def make(out: Path, name: str, rows, rules, seeds, factors, options) -> None:
    """Make the runs of one network that the file `out` does not hold yet, and add them to it."""
    torch.set_num_threads(1)
    folder = out.parent / "grids"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    def run(row, rule, factor, seed, again=False):
        held = (name, row, rule, factor, seed) in map(key_of, studies.read_results(out))
        if held and not again:
            return
        record = one_run(name, row, rule, factor, seed, folder, options)
        if not held:
            studies.append_result(out, record)
        print(f"{name}, {row}, {rule} x {factor}, seed {seed}: {record['score']:.2f}, "
              f"{record['seconds']:.0f} s ({time.perf_counter() - began:.0f} s so far)", flush=True)

    # First what the rows of TAKEN need, then a row at a time. The file of runs has no grids.
    needed = [TAKEN[row] for row in rows if row in TAKEN]
    for rule, seed in product(needed, seeds):
        run(PLACES[name].start, rule, 1, seed,
            again=not grids_of(folder, name, rule, seed).exists())
    for row, rule in product(rows, rules):
        if rule in LEARNED and row in (BEST, *TAKEN):
            continue                                                 # s1 is learned from a start
        tried = [1] if rule == "rtn" or row == BEST else list(factors)
        for factor in tried:                                         # it grows, see below
            run(row, rule, factor, 0)
            chosen = cell_of(studies.read_results(out), name, row, rule)[0]["factor"]
            if factor == tried[-1] and len(tried) > 1 and chosen in (min(tried), max(tried)):
                tried.append(chosen * (4 if chosen == max(tried) else 0.25))
        for seed in seeds:
            run(row, rule, chosen, seed)


# ---- The tables ----------------------------------------------------------------------------------

def share(record: dict, held: list[dict]) -> float:
    """Return the share of round to nearest's loss, from the paper's initial s1, that remains on
    unseen inputs: the geometric mean over the blocks. nan if that run was not made."""
    nearest = [r for r in held if (r["network"], r["step"], r["rule"], r["seed"]) ==
               (record["network"], "weights, p = 2", "rtn", record["seed"])]
    if not nearest:
        return math.nan
    return tools.mean_ratio(record["unseen"], nearest[0]["unseen"])


def median_share(runs: list[dict], held: list[dict]) -> float:
    """The median share of the seeds that round to nearest has run with, too. nan if there is none.
    """
    shares = [share(r, held) for r in runs]
    return statistics.median([s for s in shares if not math.isnan(s)] or [math.nan])


def table(held: list[dict], name: str) -> str:
    """The two-way table of a network in Markdown: first the rules that keep s1, then those that
    learn it. A cell is the median score of the seeds, and in brackets their range and the median
    share of the loss that remains."""
    parts = (part_of_table(held, name, FIXED, "s1 stays"),
             part_of_table(held, name, LEARNED, "s1 is learned"))
    return "\n\n".join(part for part in parts if part)


def part_of_table(held: list[dict], name: str, names: dict[str, str], what: str) -> str:
    """The columns of some rules, by their names. "" if none of them has run."""
    rules = [rule for rule in names if any(
        (r["network"], r["rule"]) == (name, rule) for r in held)]
    lines = [f"| {name}: {what} | " + " | ".join(names[rule] for rule in rules) + " |",
             "|---" * (1 + len(rules)) + "|"]
    for row in ROWS:
        cells = []
        for rule in rules:
            runs = cell_of(held, name, row, rule)
            if not runs:
                cells.append("")
                continue
            scores = [r["score"] for r in runs]
            spread = f"{min(scores):.2f} to {max(scores):.2f}; " if len(runs) > 1 else ""
            left = median_share(runs, held)
            cells.append(f"{statistics.median(scores):.2f} ({spread}{left:.2f})")
        if any(cells):
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if rules else ""


def explained(held: list[dict], name: str, rows=ROWS, rules=COMPARED) -> str:
    """How much of the variance of the cells of some rules that keep s1 the step explains, how much
    the rule, and how much neither alone (two-way analysis of variance of the median log share). The
    row BEST is left out: each rule has another s1 there."""
    rows = [row for row in rows
            if row != BEST and all(cell_of(held, name, row, rule) for rule in rules)]
    if len(rows) < 2:
        return f"{name}: too few rows with {', '.join(rules)} to say what the step explains"
    cells = np.log([[median_share(cell_of(held, name, row, rule), held) for rule in rules]
                    for row in rows])
    step = len(rules) * ((cells.mean(1) - cells.mean()) ** 2).sum()
    rule = len(rows) * ((cells.mean(0) - cells.mean()) ** 2).sum()
    total = ((cells - cells.mean()) ** 2).sum()
    return (f"{name}: of the variance of the logarithm of what remains, over {len(rows)} steps and "
            f"the rules {', '.join(rules)}, the step explains {step / total:.0%}, the rule "
            f"{rule / total:.0%}, neither alone {1 - (step + rule) / total:.0%}")


def main(arguments=None) -> None:
    flags = argparse.ArgumentParser(prog="python -m experiments.steps")
    add = flags.add_argument
    add("--out", type=Path, metavar="FILE", help="add the runs to this file, and continue it")
    add("--network", choices=PLACES, default="gpt", help="the network to run")
    add("--step", nargs="+", choices=ROWS, default=ROWS, help="rows to run, and to explain")
    add("--rule", nargs="+", choices=FIXED | LEARNED, default=[*FIXED, *LEARNED])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--factors", nargs="+", type=float, default=FACTORS, help="of the learning rate")
    add("--data", help="as experiments.studies takes it")
    args = flags.parse_args(arguments)
    if args.out is not None:
        os.environ.update(studies.MALLOC)
        make(args.out, args.network, args.step, args.rule, args.seeds, args.factors,
             {"data": args.data})
    held = studies.read_results(args.out or HERE)
    for name in dict.fromkeys(r["network"] for r in held):
        print(table(held, name) + "\n")
        for rules in (COMPARED, COMPARED_CONSTANT):
            print(explained(held, name, args.step, rules) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        sys.exit(f"steps: {problem}")
