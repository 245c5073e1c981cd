"""Does another processor find the same codes? `python -m experiments.instructions` prints a table.

It makes the main job's runs under each instruction set that this processor has, with one thread and
with two. They add up in different orders, so the last bits of W_hat differ, but no code should.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import models
import reconstruct
from flexround import METHODS, quantizers

ROOT = Path(reconstruct.__file__).parent
# For torch's own kernels, for oneDNN's and for MKL's. Each set is in torch's name for it. MKL obeys
# ENABLE_INSTRUCTIONS on Intel's processors alone, and CBWR=COMPATIBLE (SSE2, no FMA) on all.
SETS = {
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
                "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "MKL_CBWR": "COMPATIBLE"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
             "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
               "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}


def sets_here() -> list[str]:
    """The names of SETS that this processor has."""
    best, names = torch.backends.cpu.get_cpu_capability(), list(SETS)
    return names[:names.index(best) + 1] if best in SETS else []


def one_run(network: str, method: str, threads: int = 1, dtype: str = "float64",
            samples: int | None = None, **changed) -> dict:
    """One run of the main job at 2 bits in this process. Its score and the sha256 of all codes and
    of all W_hat. changed: settings of the config that are not the main job's."""
    torch.set_num_threads(threads)
    main = reconstruct.parser().parse_args([])
    task = models.load_task(network, dtype=getattr(torch, dtype), samples=samples)
    config = reconstruct.ReconstructionConfig(
        method, *main.bits, start=main.start, iterations=main.iterations, lr=main.lr,
        seed=main.seed, batch_size=task.batch_size)
    reconstruct.quantize_model(task.net.blocks, task.calibration, replace(config, **changed),
                               show=False)
    codes, weights = hashlib.sha256(), hashlib.sha256()
    for name, q in quantizers(task.net).items():
        layer = task.net.get_submodule(name)
        codes.update(q.codes(layer.parametrizations.weight.original).numpy().tobytes())
        weights.update(layer.weight.detach().numpy().tobytes())
    return {"instructions": torch.backends.cpu.get_cpu_capability(), "codes": codes.hexdigest(),
            "weights": weights.hexdigest(), "score": f"{task.score(task.net):.2f}"}


def run_under(instructions: str, **settings) -> dict:
    """one_run(**settings) in a process that has only these instructions. RuntimeError: it failed.

    Its threads do not spin while they wait, which on a busy machine takes a tenth of the time."""
    code = ("import json, sys; from experiments.instructions import one_run; "
            "print(json.dumps(one_run(**json.loads(sys.argv[1]))))")
    done = subprocess.run([sys.executable, "-c", code, json.dumps(settings)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "OMP_WAIT_POLICY": "passive",
                                                    **SETS[instructions]})
    if done.returncode:
        raise RuntimeError(f"{instructions}, {settings}: {done.returncode}\n{done.stderr}")
    found = json.loads(done.stdout)
    if found["instructions"] != instructions:
        raise RuntimeError(f"torch took {found['instructions']} in place of {instructions}")
    return found


def agreed(found: dict[str, str]) -> str:
    """The value that all have in common, or which value each has."""
    first, *others = dict.fromkeys(found.values())
    if others:
        return ", ".join(f"{name}: {value}" for name, value in found.items())
    return f"{first}, the same in all {len(found)}"


def row(network: str, method: str, sets: list[str], threads: list[int], dtype: str) -> str:
    """A row of the table. We say each run on stderr."""
    score, codes, weights = {}, {}, set()
    for name in sets:
        for count in threads:
            began, run = time.perf_counter(), f"{name} x {count}"
            found = run_under(name, network=network, method=method, threads=count, dtype=dtype)
            score[run], codes[run] = found["score"], found["codes"][:10]
            weights.add(found["weights"])
            print(f"{network}, {method}, {run}: {score[run]}, {codes[run]}, W_hat "
                  f"{found['weights'][:10]}, {time.perf_counter() - began:.0f} s",
                  file=sys.stderr, flush=True)
    return (f"| {network} | {METHODS[method].__name__} | {agreed(score)} | {agreed(codes)} | "
            f"{len(weights)} |")


def main(arguments=None) -> None:
    flags = argparse.ArgumentParser(prog="python -m experiments.instructions", description=__doc__)
    flags.add_argument("--model", nargs="+", default=["resnet", "mobilenet", "gpt"])
    flags.add_argument("--method", nargs="+", default=["rtn", "adaround", "adaquant", "flexround"])
    flags.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    flags.add_argument("--dtype", default="float64", help="float32 shows what the main job avoids")
    args = flags.parse_args(arguments)
    sets = sets_here()
    print(f"torch {torch.__version__}, {' and '.join(sets)}, each with "
          f"{' and '.join(map(str, args.threads))} threads, {args.dtype}\n\n"
          "| network | method | score at W2 | codes | different W_hat |\n|---|---|---|---|---|",
          flush=True)
    for network in args.model:
        for method in args.method:
            print(row(network, method, sets, args.threads, args.dtype), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as problem:
        sys.exit(f"instructions: {problem}")
