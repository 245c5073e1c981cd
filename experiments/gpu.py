"""All that only a GPU can tell, in parts of a few minutes, in the order of their worth.

    python -m experiments.gpu --out FOLDER --data CIFAR-10 --images IMAGENET

It has not run on a GPU yet. Each result is written to FOLDER/gpu.json as soon as it is there, so a
run that is cut off loses one result at most. A part stops before a new result when its minutes are
over. A single long result is not cut. The table of all results comes last. The file keeps the
results of earlier parts.
"""
import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import models
from experiments import studies, timing, tools
from reconstruct import ReconstructionConfig, quantize_model

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: str) -> tuple[str, float]:
    """The last line that a command of this Python prints, and its seconds."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True,
                          check=False)
    lines = (done.stdout or done.stderr).strip().splitlines() or [""]
    return f"{lines[-1]} (exit {done.returncode})", time.perf_counter() - began


# ---- The parts. Each yields (what, result, seconds) ----------------------------------------------

def tests(args) -> Iterator[tuple]:
    """The tests that skip without CUDA."""
    yield "tests with cuda in their name", *command("-m", "pytest", "-q", "-k", "cuda or captured "
                                                    "or recorded")


def iterations(args) -> Iterator[tuple]:
    """Iterations beside their floor, eager and as a CUDA graph, in float32 and with TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for precision in ("highest", "high"):                        # high: TF32
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = precision == "high"
            began = time.perf_counter()
            for row in timing.rows(args.device):
                yield (f"precision {precision}", row.replace(" | ", ", "),
                       time.perf_counter() - began)
                began = time.perf_counter()
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def study(args, data, runs: list) -> Iterator[tuple]:
    """Runs as the studies have them: score and seconds."""
    task = studies.load(runs[0], data)                               # all are of one network
    task.net.to(args.device)
    facts = studies.facts_of("gpu", runs[0], task)
    for number, run in enumerate(runs):
        run = run._replace(config=replace(run.config, device=args.device))
        _, record = studies.one_run((number, run, facts, {"data": data}))
        if record is not None:
            own = run.config
            yield (f"{run.row} W{own.bits} {own.method} seed {own.seed}, {own.iterations} "
                   "iterations", f"{record['score']:.2f} of {facts['full']:.2f}", record["seconds"])


def resnet20(args) -> Iterator[tuple]:
    """ResNet-20 at the paper's 5,000 iterations and at 1,000."""
    runs = studies.grid("resnet20", studies.RTN, (4, 3, 2), (0,), iterations=1)
    yield from study(args, args.data, runs + [
        run for seed in range(3) for count in (5000, 1000) for run in studies.grid(
            "resnet20", studies.THREE, (4, 3, 2), (seed,), iterations=args.iterations or count)])


def lite0(args) -> Iterator[tuple]:
    """EfficientNet-Lite0 at 224 pixels, 1,000 iterations."""
    options = studies.LITE0 | {"iterations": args.iterations or 1000}
    yield from study(args, args.images, [run for seed in range(3) for run in studies.grid(
        "lite0-224", studies.RTN | studies.LITE, (4, 3), (seed,), **options)])


def gpt2(args) -> Iterator[tuple]:
    """GPT-2 small's shape with random weights: seconds and memory, not a score."""
    torch.manual_seed(0)
    blocks, x = models.GPT(50257, 1024, 12, 12, 768).blocks, torch.randint(50257, (128, 1024))
    config = ReconstructionConfig(iterations=args.iterations or 1000, batch_size=4, symmetric=False,
                                  device=args.device)
    began = time.perf_counter()
    quantize_model(blocks, x if args.iterations is None else x[:4, :64], config)
    yield (f"GPT-2 small's shape, {config.iterations} iterations", tools.peak_memory(args.device),
           time.perf_counter() - began)


def notebook(args) -> Iterator[tuple]:
    """demo.ipynb, executed into FOLDER."""
    yield "demo.ipynb", *command("-m", "jupyter", "execute", "demo.ipynb",
                                 f"--output={Path(args.out).resolve() / 'demo.ipynb'}")


PARTS = {part.__name__: part for part in (tests, iterations, resnet20, lite0, gpt2, notebook)}


# ---- The command line ----------------------------------------------------------------------------

def main(arguments=None) -> None:
    flags = argparse.ArgumentParser(prog="python -m experiments.gpu", description=(
        "Measure what only a GPU can tell, and write each result as it comes."))
    add = flags.add_argument
    add("--out", required=True, metavar="FOLDER", help="for gpu.json and the executed notebook")
    add("--part", nargs="+", default=list(PARTS), choices=PARTS, help="default: all")
    add("--data", help="folder of CIFAR-10 with ResNet-20's checkpoint")
    add("--images", help="folder of ImageNet's images, as for the study lite0")
    add("--minutes", type=float, default=9, help="of each part")
    add("--iterations", type=int, help="per block, for a trial. None: those of each part")
    add("--device", default="cuda")
    args = flags.parse_args(arguments)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no CUDA device here")
    path = Path(args.out, "gpu.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    held = json.loads(path.read_text()) if path.exists() else []
    card = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    for name in args.part:
        end = time.perf_counter() + 60 * args.minutes
        held = [row for row in held if row["part"] != name]          # a part is made anew
        try:
            for what, result, seconds in PARTS[name](args):
                held.append({"part": name, "what": what, "result": result, "seconds":
                             round(seconds, 1), "machine": f"{card}, torch {torch.__version__}"})
                path.write_text(json.dumps(held, indent=1))
                print(f"{name}: {what}: {result} ({seconds:.0f} s)", flush=True)
                if time.perf_counter() > end:
                    break
        except Exception as problem:                                 # the other parts go on
            print(f"{name}: {problem}", file=sys.stderr)             # the other parts go on
    print("\n| part | what | result | seconds | machine |\n|---|---|---|---|---|")
    for row in held:
        print("|", *(f"{row[key]} |" for key in ("part", "what", "result", "seconds", "machine")))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        sys.exit(f"gpu: {problem}")
