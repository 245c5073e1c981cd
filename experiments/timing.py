"""What an iteration costs, beside its floor. `python -m experiments.timing` prints the table.

The floor is the block's own forward and backward in plain weights. Nothing that learns by gradient
can be faster. On CUDA each is timed as Python launches it, and recorded as a CUDA graph.
"""
import argparse
import copy
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

import models
from experiments.tools import peak_memory
from flexround import quantizable_layers, quantize_layers, quantizers
from reconstruct import (
    ReconstructionConfig,
    device_of,
    evaluate,
    make_iteration,
    outputs_of,
    recorded,
)


def time_block(block: nn.Module, x: Tensor, config: ReconstructionConfig, rounds: int = 20
               ) -> dict[str, float]:
    """Seconds of one iteration of a float block's reconstruction, and of its floor: medians.

    We time both in turn, in `rounds` rounds of one iteration (on CUDA of 50). The block stays as it
    is.

    Args:
        x: (N, ...) inputs of the block, on its device. N is at least config.batch_size.

    Returns:
        "floor", "iteration", on CUDA also "floor captured" and "iteration captured", which copy
        their batch first (absent, with a warning, where reconstruct.recorded cannot record), and
        "evaluations": what the five evaluations of a block cost, each of 32 batches.
    """
    device = device_of([block])
    cuda = device.type == "cuda"
    y = outputs_of(block.eval(), x, config.batch_size, device, device)
    plain, hat = (copy.deepcopy(block).requires_grad_(False) for _ in range(2))
    weights = [layer.weight.requires_grad_() for layer in quantizable_layers(plain).values()]
    batch, G = x[:config.batch_size].clone(), torch.randn_like(y[:config.batch_size])
    quantize_layers(hat, config)
    for q in quantizers(hat).values():
        q.requires_grad_()

    def floor(batch):
        for W in weights:
            W.grad = None
        plain(batch).backward(G)

    def iteration(cuda_graph):
        iterate = make_iteration(copy.deepcopy(hat), x, y, replace(config, cuda_graph=cuda_graph))
        order = itertools.cycle(range(config.iterations))
        return lambda: iterate(next(order))

    def seconds(step, count):
        began = time.perf_counter()
        for _ in range(count):
            step()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    with torch.enable_grad(), torch.cuda.device(device) if cuda else nullcontext():
        steps = {"floor": lambda: floor(batch), "iteration": iteration(False)}
        if cuda:
            replay = recorded(floor, batch)
            if replay is not floor:
                steps |= {"floor captured": lambda: replay(batch),
                          "iteration captured": iteration(True)}
        for step in steps.values():                                  # the warm-up
            seconds(step, 3)
        taken = [{name: seconds(step, 50 if cuda else 1) for name, step in steps.items()}
                 for _ in range(rounds)]
    once = statistics.median(seconds(lambda: evaluate(hat, x, y, config), 1)
                             for _ in range(3))
    return {**{name: statistics.median(t[name] for t in taken) for name in steps},
            "evaluations": 5 * 32 * config.batch_size / len(x) * once}


def rows(device: str, rounds: int = 20) -> Iterator[str]:
    """The rows of print_times, as they come: the blocks of ResNet-20 at batch 32, a block of GPT-2
    small's size, and on CUDA, where torchvision is installed, the blocks of ResNet-18. Weights and
    inputs are random, because the time does not depend on them."""
    torch.manual_seed(0)
    cuda, todo, config = device.startswith("cuda"), [], ReconstructionConfig()

    def add(name, net, x):
        x = x.to(device)
        for i, block in enumerate(models.fold_batchnorm(net).to(device).blocks):
            todo.append((f"{name}, block {i}", block, x, config))
            x = outputs_of(block, x, 32, device, device)

    add("ResNet-20", models.ResNet(), torch.randn(256, 3, 32, 32))
    length = 1024 if cuda else 256
    todo.append((f"GPT, 768 channels, 4 x {length} tokens",
                 models.TransformerBlock(768, 12).to(device),
                 torch.randn(8, length, 768, device=device), replace(config, batch_size=4)))
    if cuda and importlib.util.find_spec("torchvision"):
        from experiments.pretrained import resnet
        add("ResNet-18", resnet("resnet18", None), torch.randn(64, 3, 224, 224))
    for name, block, x, config in todo:
        took = time_block(block, x, config, rounds)
        for kind in ("", " captured"):
            if f"iteration{kind}" in took:
                floor, iteration = took[f"floor{kind}"], took[f"iteration{kind}"]
                yield (f"{name}{kind} | {1e6 * floor:,.0f} | {1e6 * iteration:,.0f} | "
                       f"{iteration / floor:.2f} | {took['evaluations'] / iteration / 10:.1f} %")


def print_times(device: str) -> None:
    """time_block of each block as a table, and the peak memory."""
    print(f"torch {torch.__version__} on {device}, {torch.get_num_threads()} threads\n\n"
          "| block | floor, us | iteration, us | ratio | five evaluations, of 1,000 iterations |\n"
          "|---|---|---|---|---|")
    for row in rows(device):
        print(f"| {row} |", flush=True)
    print(f"\nPeak memory: {peak_memory(device)}")


def main(arguments=None) -> None:
    flags = argparse.ArgumentParser(prog="python -m experiments.timing", description=__doc__)
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    print_times(flags.parse_args(arguments).device)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, RuntimeError) as problem:
        sys.exit(f"timing: {problem}")
