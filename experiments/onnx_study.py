"""What ONNX Runtime makes of our files, beside the simulation: scores, bytes and times.

    python -m experiments.onnx_study --data IMAGENET --out experiments/onnx.jsonl

The three small networks, and with --data EfficientNet-Lite0. Needs onnx, onnxscript, onnxruntime.
The file is run as it is ("plain"), optimised, and optimised without WeightBiasQuantization ("exact
biases"), a step of ONNX Runtime that rounds each bias to a multiple of step * s1.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import models
from experiments.onnx_file import export, save_onnx
from experiments.pretrained import lite_task, need
from flexround import fold
from reconstruct import ReconstructionConfig, quantize_model

WAYS = ("plain", "optimised", "exact biases")


class InRuntime(nn.Module):
    """A file of ONNX that takes and returns tensors, on one thread. A task's score reads a
    parameter's device, and of a GPT its context."""

    def __init__(self, path, net: nn.Module, way: str = "optimised"):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(()))
        self.context = getattr(net, "context", None)
        runtime = need("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3                               # errors only
        if way == "plain":
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        off = ["WeightBiasQuantization"] if way == "exact biases" else []
        self.session = runtime.InferenceSession(path, options, disabled_optimizers=off)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"x": x.numpy()})[0])


def milliseconds(nets: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of CPU time for each input of x: medians of rounds, in which all nets run in
    turn. There is one thread, so this is the time it takes, less the waiting for other programs."""
    taken = {name: [] for name in nets}
    for i in range(rounds + 1):
        for name, net in nets.items():
            began = time.process_time()
            net(x)
            if i > 0:                                                # the first is the warm-up
                taken[name].append(1000 * (time.process_time() - began) / len(x))
    return {name: statistics.median(times) for name, times in taken.items()}


@torch.no_grad()
def study(name: str, task: models.Task, config: ReconstructionConfig, rounds: int) -> dict:
    """A row of the study. The network is float again afterwards."""
    x = task.calibration[:64]
    with tempfile.TemporaryDirectory() as folder:
        float_file, file = Path(folder, "float.onnx"), Path(folder, "quantized.onnx")
        program = export(task.net, x)
        program.optimize()
        program.save(float_file)
        with torch.enable_grad():
            quantize_model(task.net.blocks, task.calibration, config)
        save_onnx(task.net, x, file)
        nets = {way: InRuntime(file, task.net, way) for way in WAYS}
        row = {"network": name, "bits": config.bits, "abits": config.abits,
               "method": config.method, "iterations": config.iterations,
               "per_channel": config.per_channel, "torch": torch.__version__,
               "onnxruntime": need("onnxruntime").__version__,
               "bytes": file.stat().st_size, "float_bytes": float_file.stat().st_size}
        with parametrize.cached():
            y = task.net(x)
            row |= {"simulation": task.score(task.net), "largest": float(y.abs().max())}
        for way, net in nets.items():
            ours = net(x)
            row[way] = {"score": task.score(net), "off": float((ours - y).abs().max()),
                        "median_off": float((ours - y).abs().median()),
                        "other_argmax": float((ours.argmax(-1) != y.argmax(-1)).double().mean())}
        nets["float"] = InRuntime(float_file, task.net)
        row["float"] = {"score": task.score(nets["float"])}
        for count in (1, 32):
            for way, took in milliseconds(nets, x[:count], rounds).items():
                row[way][f"ms_{count}"] = took
    fold(task.net, keep=False)
    return row


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = ["| network | bits | float | simulation | runtime, plain | optimised | exact biases | "
             "largest difference of the outputs | bytes, of float | time, of float: 1 input | 32 |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["network"], f"W{row['bits']}A{row['abits']}", f"{row['float']['score']:.2f}",
                 f"{row['simulation']:.2f}", *(f"{row[way]['score']:.2f}" for way in WAYS),
                 ", ".join(f"{row[way]['off']:.2g}" for way in WAYS) + f" of {row['largest']:.2g}",
                 f"{row['bytes']:,}, {row['bytes'] / row['float_bytes']:.2f}"]
        for count in (1, 32):
            key = f"ms_{count}"
            cells.append(", ".join(f"{row[way][key] / row['float'][key]:.2f}"
                                   for way in WAYS[:2]) + f" of {row['float'][key]:.3g} ms")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments=None) -> None:
    flags = argparse.ArgumentParser(prog="python -m experiments.onnx_study", description=__doc__)
    add = flags.add_argument
    add("--data", help="folder of ImageNet. None: only the small networks")
    add("--networks", nargs="+", default=["resnet", "mobilenet", "gpt", "lite0"])
    add("--iterations", type=int, default=50, help="of FlexRound, on the small networks")
    add("--rounds", type=int, default=20, help="of the times")
    add("--out", required=True, help="file of rows, one JSON object a line, added at its end")
    args = flags.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for name in args.networks:
        if name != "lite0":
            batch = 8 if name == "gpt" else 32
            configs = [ReconstructionConfig(bits=4, abits=8, iterations=args.iterations,
                                            batch_size=batch)]
            task = models.load_task(name)
        elif args.data:
            # Round to nearest, and a few updates of the inputs' step sizes.
            configs = [ReconstructionConfig("rtn", bits, abits=8, per_channel=True, iterations=5,
                                            batch_size=8) for bits in (8, 4)]
            task = lite_task(args.data, samples=32)
        else:
            continue
        for config in configs:
            rows.append(study(name, task, config, args.rounds))
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        sys.exit(f"onnx_study: {problem}")
