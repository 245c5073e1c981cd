"""The studies: of which runs they consist, how a run is made, and the tables of their scores.

    python -m experiments.studies NAME --table               the table of the runs that lie here
    python -m experiments.studies NAME --out mine.jsonl      make the study again, into your file

A study is a list of runs. A run is one network, quantized with one configuration. Its record is one
line of JSON: the study, the network, all settings, the score, the seconds, the machine. If a study
is stopped, the same command goes on where its file ends. Some studies need networks that are
trained first, and kept in the folder --networks. experiments/README.md says what each study shows.
"""
import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import combinations, product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils import parametrize

import experiments.lrq  # noqa: F401 (it puts its rule into flexround.METHODS)
import models
from experiments import pretrained, tools, train
from reconstruct import ReconstructionConfig, device_of, quantize_model

# For the worker processes: Linux's malloc shall keep large tensors' memory. Else each activation of
# more than 32 MB is mapped anew, which takes 40 % of EfficientNet-Lite0's time.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 ** 34),
          "MALLOC_TOP_PAD_": str(2 ** 27)}
HERE = Path(__file__).parent
COMMITTED = HERE / "runs.jsonl"                                      # no run is added to it
NAMES = {"rtn": "round to nearest", "adaround": "AdaRound", "adaquant": "AdaQuant",
         "flexround": "FlexRound", "lrq": "LRQ"}
# Networks of tinyshakespeare's characters: layers, width, context, steps of training, kind, heads.
TEXTS = {"shakespeare": (4, 128, 128, 2500), "small-shakespeare": (3, 64, 64, 1000),
         "llama": (5, 64, 64, 2000, train.llama, 8)}
# Inputs of an iteration, if not 32.
BATCHES = {"gpt": 8, **dict.fromkeys(TEXTS, 8), "gemma": 2, "minilm": 16}
# The table's name of a network that is not the one of models.load_task.
ROWS = {"cifar-mobilenet": "mobilenet", "small-shakespeare": "gpt"}


class Run(NamedTuple):
    network: str                     # of models.load_task, "cifar-mobilenet", or a key of TEXTS
    config: ReconstructionConfig
    spread: float = 1                # tools.rescale makes the channels unequal by it
    split: str = "test"              # "train" scores data on which you may choose settings
    sgd: bool = False                # plain SGD in place of Adam
    samples: int | None = None       # calibration inputs. None: the network's default
    equal: bool = False              # channels equalised first (pretrained.equalise)

    @property
    def row(self) -> str:
        """The network's name in the table."""
        name = ROWS.get(self.network, self.network)
        if self.equal:
            name = f"{name}, equalised"
        return name if self.spread == 1 else f"{name}, channels x {self.spread:g}"

    @property
    def settings(self) -> dict:
        """The configuration as a record holds it."""
        return {**asdict(self.config), "optimizer": "sgd" if self.sgd else "adam"}


# ---- The studies, as data ------------------------------------------------------------------------

def grid(networks: str, methods: dict, bits=(3, 2), seeds=(0, 1, 2), split="test",
         sgd=False, samples=None, equal=False, **settings) -> list[Run]:
    """A run for each combination. methods: for each method a list of its settings."""
    runs = []
    for network, b in product(networks.split(), bits):
        batch_size = min(BATCHES.get(network, 32), samples or 32)
        for method, some in methods.items():
            for own, seed in product(some, seeds):
                config = ReconstructionConfig(method, b, seed=seed, batch_size=batch_size,
                                              **(settings | own))
                runs.append(Run(network, config, 1, split, sgd, samples, equal))
    return runs


# What the search found for each method (experiments/knobs.py), where it is not the default.
RTN = {"rtn": [{}]}
THREE = {"adaround": [{}], "adaquant": [{}], "flexround": [{}]}
CANDIDATES = {
    "adaround": [{"lr": 0.3, "reg_weight": weight} for weight in (1e3, 1e4, 1e5)],
    "adaquant": [{"lr": lr, "s1_lr": s1_lr} for lr, s1_lr in (
        (1e-3, 4e-3), (1e-3, 1.6e-2), (4e-3, 4e-3))],
    "flexround": [{"lr": lr, "s1_lr": 8e-3} for lr in (8e-3, 1.6e-2, 3.2e-2)],
    "lrq": [{"lr": lr, "s1_lr": s1_lr} for lr, s1_lr in (
        (3.2e-2, 8e-3), (6.4e-2, 8e-3), (0.128, 3.2e-2))]}
LRQ = {"lrq": [{"lr": 0.128, "s1_lr": 3.2e-2}]}
UNEQUAL = {"adaround": [{"lr": 0.2, "reg_weight": 1e5, "p": 0.5}],
           "adaquant": [{"lr": 4e-3, "s1_lr": 0.256, "p": 1.0}],
           "flexround": [{"lr": 6.4e-2, "s1_lr": 0.128, "p": 0.5}]}
LITE = {"adaround": [{"lr": 0.3, "reg_weight": 1e4}], "adaquant": [{"lr": 1e-3, "s1_lr": 0.256}],
        "flexround": [{"lr": 1.6e-2, "s1_lr": 0.128}]}
# Gemma's at 6 and at 8 bits, and MiniLM's at 3. Gemma starts on the outputs, because that leaves
# less of the whole network's losses on text that is not scored: for each method at 6 bits, and at 8
# for AdaRound, the only one that ran from both starts there.
GEMMA = {"adaround": [{"lr": 0.03, "reg_weight": 1e4}], "adaquant": [{"lr": 1e-4, "s1_lr": 2e-3}],
         "flexround": [{"lr": 2e-3, "s1_lr": 5e-4}]}
GEMMA_8 = {"adaround": [{"lr": 7.5e-3, "reg_weight": 1e4}],
           "adaquant": [{"lr": 2.5e-5, "s1_lr": 1.25e-4}],
           "flexround": [{"lr": 5e-4, "s1_lr": 5e-4}]}
MINILM = {"adaround": [{"lr": 0.1, "reg_weight": 2.5e4, "p": 1.0}],
          "adaquant": [{"lr": 5e-4, "s1_lr": 5e-4}], "flexround": [{"lr": 8e-3, "s1_lr": 2e-3}]}
# As the paper quantizes transformers: no exception of the first and the last layer.
WORDS = {"iterations": 60, "samples": 32, "end_bits": None}
SENTENCES = {"iterations": 60, "samples": 128, "end_bits": None}
LITE0 = {"iterations": 250, "samples": 256}
OUTPUTS, PAPER = {"start": "outputs"}, {"start": "weights", "p": 2.0}
# What we had copied: one rate for all of FlexRound, V's rate for AdaQuant's s1, and for AdaRound a
# weight as small as BRECQ's 0.01, which in our unit depends on the block and is below 1 in most.
COPIED = {"adaround": [{"lr": 0.3, "reg_weight": 0.1}], "adaquant": [{"lr": 1e-3, "s1_lr": 1e-3}],
          "flexround": [{"lr": 1.6e-2, "s1_lr": 1.6e-2}]}

STUDIES = {
    # AdaRound from the paper's start as well, which the search by blocks prefers in two places.
    "first": grid("resnet mobilenet gpt", RTN | THREE, [2], iterations=250, **OUTPUTS) +
    grid("resnet mobilenet gpt", {"adaround": [PAPER]}, [2], iterations=250),
    # Three candidates a method, from the search by blocks, on whole networks. Not the test split.
    "choice": grid("resnet mobilenet gpt", CANDIDATES, [2], (0,), split="train", iterations=250,
                   **OUTPUTS),
    # AdaRound from its better start of the two.
    "samples": [run for (network, start), samples in product(
        (("resnet", PAPER), ("mobilenet", OUTPUTS), ("gpt", PAPER)), (8, 32, 128, 512))
        for run in grid(network, RTN | THREE | LRQ | {"adaround": [start]}, [2], iterations=250,
                        samples=samples, **OUTPUTS)],
    "lite0": grid("lite0", RTN | LITE, [4], (0, 1, 2, 3, 4), **LITE0, **OUTPUTS),
    # On two blocks AdaRound is best with p = 0.5. The others, whose s1 learns, hardly differ.
    "lite0-start": [run for p in (0.5, 2.0) for run in grid(
        "lite0", {"adaround": LITE["adaround"]}, [4], (0,), **LITE0, p=p)],
    "lite0-copied": grid("lite0", COPIED, [4], (0,), **LITE0, p=2.4),
    # Beside the study lite0: s1 fixed, from both starts; learned from the other; no s3 and s4.
    "lite0-ablation": grid("lite0", {"flexround": [LITE["flexround"][0] | own for own in (
        OUTPUTS | {"learn_s1": False}, {"learn_s1": False}, {},
        OUTPUTS | {"use_s3_s4": False})]}, [4], (0,), **LITE0),
    "lite0-equal": grid("lite0", RTN | LITE, [4], (0,), **LITE0, **OUTPUTS, equal=True),
    "lite0-travel": grid("lite0", {"adaquant": [{"lr": 0.16, "s1_lr": 0.16}]}, [4], (0,), **LITE0,
                         **OUTPUTS),
    "lite1": grid("lite1", RTN | LITE, [4], (0,), **LITE0, **OUTPUTS),
    "lite0-3-bits": grid("lite0", RTN | LITE, [3], (0,), **LITE0, **OUTPUTS),
    # Round to nearest has no setting.
    "lite0-activations": grid("lite0", RTN, [4], (0,), **LITE0, **OUTPUTS, abits=4) +
    [run for setting in "QB" for run in grid(
        "lite0", LITE, [4], (0,), **LITE0, **OUTPUTS, abits=4, setting=setting)],
    "lite0-samples": grid("lite0", RTN | LITE, [4], (0,), **LITE0 | {"samples": 32}, **OUTPUTS),
    "lite0-channels": grid("lite0", RTN | LITE, [4], (0,), per_channel=True, **LITE0, **OUTPUTS),
    # One step a layer, weights alone. One seed: a run takes 5 to 20 minutes.
    "gemma": grid("gemma", RTN | GEMMA, [6], (0,), **WORDS, **OUTPUTS),
    "gemma-starts": grid("gemma", RTN | GEMMA, [6], (0,), **WORDS),   # from the paper's start
    "gemma-8-bits": grid("gemma", RTN | GEMMA_8, [8], (0,), **WORDS, **OUTPUTS),
    "gemma-8-starts": grid("gemma", {"adaround": [{"lr": 0.03, "reg_weight": 1e4}]}, [8], (0,),
                           **WORDS),                                  # its best one from there
    "gemma-asymmetric": [run for bits, settings in ((6, GEMMA), (8, GEMMA_8)) for run in grid(
        "gemma", RTN | settings, [bits], (0,), symmetric=False, **WORDS, **OUTPUTS)],
    # As the paper quantizes language models.
    "gemma-activations": grid("gemma", RTN, [8], (0,), symmetric=False, abits=8, **WORDS,
                              **OUTPUTS) +
    grid("gemma", GEMMA_8, [8], (0,), symmetric=False, abits=8, setting="Q", **WORDS, **OUTPUTS),
    "minilm": grid("minilm", RTN | MINILM, [4, 3], (0,), **SENTENCES),
    "minilm-starts": grid("minilm", {"adaround": [MINILM["adaround"][0] | PAPER]}, [4, 3], (0,),
                          **SENTENCES),
    "minilm-activations": grid("minilm", RTN, [4, 8], (0,), symmetric=False, abits=8,
                               **SENTENCES) +
    grid("minilm", MINILM, [4, 8], (0,), symmetric=False, abits=8, setting="Q", **SENTENCES) +
    # AdaRound's start was searched at W3, where p = 1 clips. At more bits that is wrong.
    grid("minilm", {"adaround": [MINILM["adaround"][0] | PAPER]}, [4, 8], (0,),
         symmetric=False, abits=8, setting="Q", **SENTENCES),
    # Not made again yet with searched knobs. Each needs a search of its own first.
    "resnet20": grid("resnet20", RTN | THREE, [4, 3, 2], iterations=1000, **OUTPUTS),
    "mobilenet": grid("cifar-mobilenet", RTN | THREE, [4, 3, 2], iterations=1000, **OUTPUTS),
    "shakespeare": grid("shakespeare", RTN | THREE, [4, 3, 2], iterations=500, **OUTPUTS),
    "llama": grid("llama", RTN | THREE, [4, 3, 2], iterations=500, **OUTPUTS),
}


# ---- One run -------------------------------------------------------------------------------------

def load(run: Run, data=None, networks=None, samples=None) -> models.Task:
    """The run's network and data. data and networks: see the command line. samples: calibration
    inputs, if not as many as the run says. ValueError, OSError: what is missing."""
    name, seed, split = run.network, run.config.seed, run.split
    samples = samples or run.samples
    if name in ("cifar-mobilenet", *TEXTS):
        if data is None or networks is None:
            raise ValueError(f"{name} needs --data, and --networks, a folder where the trained "
                             "network is kept")
    if name == "cifar-mobilenet":
        x, y = models.cifar10(data, train=True)

        def fit(net):
            train.train(net, train.image_batches(x, y, shift=4), 6000, 5e-3)

        net = train.kept(Path(networks, f"{name}.pt"), lambda: models.MobileNet(stride=2), fit)
        task = models.image_task(net, x, y, models.cifar10(data, train=False), "CIFAR-10",
                                 samples or 1024, seed, split)
    elif name in TEXTS:
        layers, width = TEXTS[name][:2]
        path = Path(data) if Path(data).is_file() else Path(data, "tinyshakespeare.txt")
        net, tokens = train.text_network(Path(networks, f"{name}.pt"), models.text(path),
                                         *TEXTS[name])
        task = models.text_task(net, tokens, f"{layers} layers, width {width}; characters of "
                                f"{path.name}", samples or 128, seed, split)
    elif name in ("lite0", "lite0-224", "lite1"):
        if data is None:
            raise ValueError(f"{name} needs --data, a folder of ImageNet's images")
        size = 224 if name == "lite0-224" else 160
        task = pretrained.lite_task(data, size, samples, seed, split, name[:5])
        if run.equal:
            pretrained.equalise(task.net)
    elif name in ("gemma", "minilm"):
        if data is None:
            raise ValueError(f"{name} needs --data, a folder of WikiText-2's files (gemma) or of "
                             "SST-2's (minilm)")
        make = pretrained.gemma_task if name == "gemma" else pretrained.minilm_task
        task = make(data, samples, seed, split)
    else:
        # As the main job: on a CPU in float64, so that each processor finds the same codes.
        cpu = name != "resnet20" and run.config.device in (None, "cpu")
        task = models.load_task(name, data, networks or models.NETWORKS, seed, split, samples,
                                torch.float64 if cpu else torch.float32)
    tools.rescale(task.net, run.spread)
    return task


def facts_of(study: str, run: Run, task: models.Task) -> dict:
    """The beginning of a record: the study, the network, its data, its score in full precision."""
    return {"study": study, "network": run.row, "about": task.about,
            "samples": len(task.calibration), "full": round(task.score(task.net), 6)}


def one_run(job) -> tuple[int, dict | None]:
    """Make one run. job: its number, the Run, its record so far, and the options of load. Returns
    the number and the whole record. None: its loss was not finite, and we have said so."""
    number, run, record, options = job
    count = record["samples"]
    # Drawn by one seed, the first half of twice as many inputs are the calibration inputs. The
    # others are unseen: we compare the losses on both. With "train" they would be scored.
    task = load(run, **options, samples=2 * count if run.split == "test" else None)
    calibration, unseen = task.calibration[:count], task.calibration[count:]
    before, unequal = copy.deepcopy(task.net), tools.inequality(task.net)
    began = time.perf_counter()
    try:
        with tools.plain_sgd() if run.sgd else nullcontext():
            reports = quantize_model(task.net.blocks, calibration, run.config, show=False)
    except FloatingPointError as error:                              # the other runs go on
        print(f"{run.row}: {error}", file=sys.stderr)
        return number, None
    seconds = time.perf_counter() - began
    device = device_of([task.net.to(run.config.device or "cpu")])    # whole, for the score
    with parametrize.cached():                                       # quantize each weight once
        score = task.score(task.net)
        losses = {name: tools.block_losses(before.to(device), task.net, x, task.batch_size)
                  for name, x in (("calibration", calibration), ("unseen", unseen)) if len(x)}
    right = getattr(task.score, "right", None)                       # of each input: paired tests
    more = {name: getattr(task.score, name) for name in ("nats", "cosine")
            if hasattr(task.score, name)}
    machine = (torch.cuda.get_device_name(device) if device.type == "cuda" else
               f"{platform.machine()}, {torch.get_num_threads()} threads")
    return number, {
        **record, "config": run.settings, "score": round(score, 6),
        "loss": reports[-1].final_loss, "losses": losses, "seconds": round(seconds, 1),
        "kept_last": sum(r.best_iteration == run.config.iterations for r in reports) / len(reports),
        "block_seconds": [round(r.seconds, 2) for r in reports],
        "starts": [r.start_loss for r in reports], "finals": [r.final_loss for r in reports],
        "inequality": unequal,
        "machine": f"{machine}, torch {torch.__version__}",
        **more, **({} if right is None else {"right": np.packbits(right).tobytes().hex()})}


# ---- Files of runs -------------------------------------------------------------------------------

DEFAULTS = {**asdict(ReconstructionConfig()), "optimizer": "adam"}


def settings_of(record: dict) -> dict:
    """The settings of a record, in one order. What it does not hold had its default. We leave
    devices out."""
    settings = DEFAULTS | record["config"]
    return {k: v for k, v in settings.items() if k not in ("device", "cache_device", "cuda_graph")}


def same_run(record: dict, run: Run, facts: dict) -> bool:
    """Whether a record is of this run, on whatever device. facts: the record's beginning, which
    holds the study, the network, its data, and its score in full precision."""
    return (all(record[key] == value for key, value in facts.items() if key != "full")
            and math.isclose(record["full"], facts["full"], rel_tol=1e-4)    # the same weights
            and settings_of(record) == settings_of({"config": run.settings}))


def read_results(path) -> list[dict]:
    """The records of a file, one JSON a line. Where there is no file, none. A last line without its
    end was cut off: we leave it out, with a warning. ValueError: a line that is no JSON."""
    whole, _, cut = (Path(path).read_text() if Path(path).exists() else "").rpartition("\n")
    if cut:
        warnings.warn(f"{path}: its last line is cut off", stacklevel=2)
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is no file of runs, one JSON a line ({error})") from error


def append_result(path, record: dict) -> None:
    """Add a record as a line of its own. A last line that was cut off goes."""
    whole = Path(path).read_bytes().rfind(b"\n") + 1 if Path(path).exists() else 0
    with open(path, "a") as out:
        out.truncate(whole)
        out.write(json.dumps(record) + "\n")


def precision(own: dict) -> str:
    """What a row calls its bits: W4, or W4A8 where the layers' inputs are quantized too."""
    return f"W{own['bits']}" + (f"A{own['abits']}" if own["abits"] else "")


def table(records: list[dict]) -> str:
    """The records as a Markdown table, networks and bits down, methods and their settings across.
    With more than 7 columns it is the other way round.

    A cell is the median over the seeds. Behind it are, where they differ, the minimum and the
    maximum, and the share of blocks that kept their last state. A setting is named where it varies
    within its method and is not the default. Rates, p and AdaRound's weight are always named.
    """
    hidden = ("method", "bits", "abits", "seed", "batch_size")
    seen = [settings_of(record) for record in records]
    cells, full, columns = {}, {}, {}
    for record, own in zip(records, seen, strict=True):
        same = [other for other in seen if other["method"] == own["method"]]
        named = [f"{k} {v}" for k, v in own.items() if k not in hidden and v != DEFAULTS[k] and (
            k in ("lr", "s1_lr", "reg_weight", "p") or any(other[k] != v for other in same))]
        column = ", ".join([NAMES.get(own["method"], own["method"]), *named])
        row = f"{record['network']} | {precision(own)}"
        full.setdefault(row, []).append(record["full"])              # with "train" each seed's own
        columns[column] = None                                       # in the order of the records
        cells.setdefault((row, column), []).append(record)

    def cell(row, column):
        runs = cells.get((row, column))
        if runs is None:
            return ""
        low, middle, high = (f"{f([r['score'] for r in runs]):.2f}"
                             for f in (min, statistics.median, max))
        spread = "" if low == high else f"{low} to {high}; "
        kept = statistics.mean(r["kept_last"] for r in runs)
        return f"{middle} ({spread}{kept:.2f})"

    heads = {row: f"{row} | {statistics.median(scores):.2f}" for row, scores in full.items()}
    lines = [["network | bits | full precision", *columns]] + [
        [head, *(cell(row, column) for column in columns)] for row, head in heads.items()]
    if len(columns) > 7:                                             # too wide: turn it
        lines = [[text.replace(" |", ",") for text in line] for line in zip(*lines, strict=True)]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * head.count(" | ") + "|---|", *body])


def mean_and_error(difference: np.ndarray) -> tuple[float, float]:
    """The mean of paired differences, and 1.96 standard errors of it."""
    return difference.mean(), 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))


def paired(records: list[dict]) -> str:
    """FlexRound beside each other column of the table, on the same images, as a Markdown table.

    Of each image we take how often it is named rightly, over the seeds, and of the difference the
    mean over the images, with 1.96 standard errors. Wins and losses are the images that FlexRound
    names rightly and the other does not, and the reverse, a mean over the seeds.
    """
    right = {}
    seeds = {r["config"]["seed"] for r in records if r["config"]["method"] == "flexround"}
    for record in records:
        if record["config"]["seed"] not in seeds:                    # nothing to pair it with
            continue
        own, bits = settings_of(record), np.frombuffer(bytes.fromhex(record["right"]), np.uint8)
        setting = f", setting {own['setting']}" if own["abits"] else ""
        channels = ", per channel" if own["per_channel"] else ""
        key = f"{record['network']} | {precision(own)}{setting}{channels}"
        count = int(record["about"].split(" on ")[-1].split()[0].replace(",", ""))
        right.setdefault(key, {}).setdefault(own["method"], []).append(
            np.unpackbits(bits, count=count))
    lines = ["| network | bits | FlexRound less | points | wins | losses |", "|---" * 6 + "|"]
    for key, methods in right.items():
        ours = np.array(methods.pop("flexround"), float)             # (seeds, images)
        for method, theirs in methods.items():
            theirs = np.array(theirs, float)
            mean, error = mean_and_error(100 * (ours.mean(0) - theirs.mean(0)))
            wins, losses = ((a * (1 - b)).sum(1).mean() for a, b in
                            ((ours, theirs), (theirs, ours)))
            lines.append(f"| {key} | {NAMES[method]} | {mean:+.1f} ± {error:.1f} | "
                         f"{wins:.1f} | {losses:.1f} |")
    return "\n".join(lines)


def left(record: dict, nearest: dict, kind: str) -> float:
    """How much of round to nearest's loss a run leaves, on inputs of a kind ("calibration" or
    "unseen"): the geometric mean over the blocks. Smaller is better, 1 is no gain."""
    ours, theirs = (np.array(r["losses"][kind]) for r in (record, nearest))
    known = theirs > 0                                               # embeddings have none
    return tools.mean_ratio(ours[known], theirs[known])


def by_place(records: list[dict]) -> dict:
    """{(network, precision, number of inputs): {method: [record of each seed]}}"""
    places = {}
    for record in records:
        own = settings_of(record)
        place = places.setdefault((record["network"], precision(own), record["samples"]), {})
        place.setdefault(own["method"], []).append(record)
    return places


def few_inputs(records: list[dict]) -> str:
    """Score and losses by the number of calibration inputs, as a Markdown table: the median score
    of the seeds, and in brackets what is left of the loss on calibration and on unseen inputs."""
    places = by_place(records)
    methods = [m for m in next(iter(places.values())) if m != "rtn"]
    lines = ["| network | bits | inputs |" + "".join(f" {NAMES[m]} |" for m in methods),
             "|---" * (3 + len(methods)) + "|"]
    for (network, bits, samples), runs in places.items():
        line = f"| {network} | {bits} | {samples} |"
        for method in methods:
            score, *losses = (statistics.median(values) for values in (
                [r["score"] for r in runs[method]],
                *([left(r, n, kind) for r, n in zip(runs[method], runs["rtn"], strict=True)]
                  for kind in ("calibration", "unseen"))))
            line += f" {score:.2f} ({losses[0]:.2f}, {losses[1]:.2f}) |"
        lines.append(line)
    return "\n".join(lines)


def ranking(records: list[dict]) -> str:
    """Whether the loss tells which of two methods has the better score: a Markdown table. We take
    two learned methods of the same network, bits, inputs and seed whose scores differ, and count
    how often the one with the smaller loss is the better one. LRQ, whose median is always the last,
    would make that easy."""
    agrees = {"calibration": [], "unseen": []}
    for runs in by_place(records).values():
        seeds = zip(*(runs[m] for m in runs if m not in ("rtn", "lrq")), strict=True)
        for (a, b), kind in product((pair for seed in seeds for pair in combinations(seed, 2)),
                                    agrees):
            gain = (a["score"] - b["score"]) * (1 if "accuracy" in a["about"] else -1)
            if gain:
                agrees[kind].append((left(a, b, kind) < 1) == (gain > 0))
    return "\n".join([
        "| losses on | pairs of methods | in the order of their scores |", "|---|---|---|",
        *(f"| {kind} inputs | {len(seen)} | {100 * np.mean(seen):.0f} % |"
          for kind, seen in agrees.items())])


def paired_windows(records: list[dict]) -> str:
    """FlexRound beside each other method on the same windows of a text, as a Markdown table: the
    mean difference of the windows' losses with 1.96 standard errors, and on how many windows
    FlexRound's is the smaller or the larger one. With several seeds we take their mean first."""
    lines = ["| network | bits | FlexRound less | nats a token | wins | losses |", "|---" * 6 + "|"]
    for (network, bits, _), runs in by_place(records).items():
        nats = {method: np.mean([r["nats"] for r in own], 0) for method, own in runs.items()}
        for method, theirs in nats.items():
            if method == "flexround" or "flexround" not in nats:     # nothing to pair it with
                continue
            difference = nats["flexround"] - theirs                  # (windows,)
            mean, error = mean_and_error(difference)
            lines.append(f"| {network} | {bits} | {NAMES[method]} | {mean:+.3f} ± "
                         f"{error:.3f} | {(difference < 0).sum()} | {(difference > 0).sum()} |")
    return "\n".join(lines)


def cosines(records: list[dict]) -> str:
    """The table of the mean cosine between quantized and float sentence vectors, times 100."""
    return table([{**r, "score": 100 * r["cosine"], "full": 100.0} for r in records])


# The tables of a study, where they are not the one of its scores.
TABLES = {"samples": [few_inputs, ranking], "lite0": [table, paired], "lite1": [table, paired],
          **dict.fromkeys([name for name in STUDIES if name.startswith("gemma")],
                          [table, paired_windows]),
          "gemma-8-starts": [table],
          "minilm": [table, cosines, paired],
          **dict.fromkeys([name for name in STUDIES if name.startswith("minilm-")],
                          [table, cosines]),
          "lite0-activations": [table, paired]}


def shown(records: list[dict]) -> str:
    """What the command prints of a study."""
    return "\n\n".join(draw(records) for draw in TABLES.get(records[0]["study"], [table]))


# ---- The command line ----------------------------------------------------------------------------

def make(study: str, out, jobs: int = 1, device=None, **options) -> list[dict]:
    """Make the runs of a study that the file `out` does not hold yet, and add them to it. Returns
    all records, in the study's order. options: those of load."""
    open(out, "a").close()                                           # an error comes before work
    torch.set_num_threads(1)                                         # as in the other processes
    runs = [run._replace(config=replace(run.config, device=device)) for run in STUDIES[study]]
    facts, earlier, records, todo = {}, read_results(out), {}, []
    for number, run in enumerate(runs):                              # what is missing is said first
        key = run.row, run.split, run.samples, run.config.seed if run.split == "train" else None
        if key not in facts:
            task = load(run, **options)
            unequal = tools.inequality(task.net)
            facts[key] = facts_of(study, run, task)
            print(f"{run.row}: {task.about}; in full precision {facts[key]['full']:.2f}; the "
                  f"largest channel of a layer is {min(unequal):.1f} to {max(unequal):.1f} times "
                  "its median channel", flush=True)
        known = [r for r in earlier if same_run(r, run, facts[key])]
        if known:
            records[number] = known[0]
        else:
            todo.append((number, run, facts[key], options))
    print(f"taken from {out}: {len(records)} runs of {len(runs)}", flush=True)
    began = time.perf_counter()
    os.environ.update({name: value for name, value in MALLOC.items() if name not in os.environ})
    with (get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) if jobs > 1 else
          nullcontext()) as pool:
        done = (pool.imap_unordered if pool else map)(one_run, todo)
        for count, (number, record) in enumerate(done, 1):
            if record is None:
                continue
            append_result(out, record)
            records[number], own = record, runs[number].config
            left = (time.perf_counter() - began) * (len(todo) / count - 1)
            print(f"{count} of {len(todo)}: {record['network']} W{own.bits} {own.method} seed "
                  f"{own.seed}: {record['score']:.2f} (about {left:.0f} s left)", flush=True)
        if pool:                                                     # an interrupt does not wait
            pool.close()
            pool.join()
    return [records[number] for number in sorted(records)]


def main(arguments=None) -> None:
    flags = argparse.ArgumentParser(prog="python -m experiments.studies", description=(
        "Print the table of a study, or make the study again."))
    add = flags.add_argument
    add("name", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    add("--table", action="store_true", help="only print the table of the runs that lie here")
    add("--out", metavar="FILE", help="add the runs to this file, and go on where it ends")
    add("--data", help="folder of CIFAR-10's binary files, of ImageNet's, of WikiText-2's (gemma) "
        "or SST-2's (minilm), or of tinyshakespeare.txt")
    add("--networks", metavar="FOLDER", help="of trained networks. None: experiments/networks. "
        "Networks that are not there are trained, if a study needs them")
    add("--jobs", type=int, default=1, help="runs at a time, each a process of one thread")
    add("--device", help="cpu, cuda, ...; None: cpu")
    args = flags.parse_args(arguments)
    if args.table == bool(args.out):
        raise ValueError("either --table or --out FILE is needed")
    if args.table:
        records = [r for r in read_results(COMMITTED) if r["study"] == args.name]
        if not records:
            raise ValueError(f"there are no runs of {args.name} here: make them (--out)")
        print(f"taken from experiments/{COMMITTED.name}: {len(records)} runs\n")
        return print(shown(records))
    if Path(args.out).resolve() == COMMITTED.resolve():
        raise ValueError(f"--out {args.out}: these runs stay as they are, name another file")
    records = make(args.name, args.out, args.jobs, args.device, data=args.data,
                   networks=args.networks)
    print(f"\n{shown(records)}" if records else "no run has a finite loss")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        sys.exit(f"studies: {problem}")
    except KeyboardInterrupt:
        sys.exit("studies: stopped; the same command goes on from here")
