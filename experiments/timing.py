"""What an iteration costs, beside its floor. `python -m experiments.timing` prints the table.

The floor is the block's own forward and backward in plain weights. Nothing that learns by gradient
can be faster. The CUDA part (CUDA graphs, ResNet-18's blocks) has not run on a GPU yet.
"""
import argparse
import copy
import importlib.util
import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

import models
from experiments.tools import peak_memory
from flexround import METHODS, quantizable_layers, quantize_layers, quantizers
from reconstruct import (
    ReconstructionConfig,
    block_loss,
    device_of,
    evaluate,
    learned_parameters,
    make_iteration,
    make_optimizer,
    run,
)


def captured(step):
    """Record step() as a CUDA graph, and return what replays it and returns the same tensor.

    Small blocks finish faster than Python can launch their kernels. So we record one iteration as a
    CUDA graph and replay it: one launch instead of hundreds. A replay always uses the same memory.
    Everything that changes between iterations must therefore be copied into the same tensors before
    each replay.

    RuntimeError: step() waits for the device, so it cannot be recorded. We find that out before we
    record, because a broken recording would spoil what comes after it.
    """
    side, before = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):                                # the warm-up: three calls
            step()
            step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                      # that it is a prototype
                torch.cuda.set_sync_debug_mode("error")              # to wait is now an error
            step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(side)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=side):
            result = step()
    finally:
        torch.cuda.set_stream(current)                               # a failed recording keeps side

    def replay():
        graph.replay()
        return result

    replay.step = step                                               # the graph uses its memory
    return replay


def recordable_iteration(block: nn.Module, x_q: Tensor, y_fp: Tensor, config: ReconstructionConfig,
                         record=None):
    """make_iteration's step for weights alone, with all that changes in tensors that are
    overwritten: a recorded step reads the same memory each time. record: captured, or None."""
    device, total = device_of([block]), config.iterations
    factors, _ = learned_parameters(block, config)
    regularised = [q for q in quantizers(block).values() if hasattr(q, "regulariser")]
    optimizer = make_optimizer(block, factors, [], config)
    groups = optimizer.param_groups
    now = torch.zeros(len(groups) + 2, device=device)                # rates, then weight and beta
    weight, beta = now[-2:].unbind()
    for i, group in enumerate(groups):
        group["lr"] = now[i]
        group["capturable"] = device.type == "cuda"
    draw = torch.Generator().manual_seed(1000 * config.seed)
    batches = torch.stack([torch.randperm(len(x_q), generator=draw)[:config.batch_size]
                           for _ in range(total)]).to(device)
    count = sum(q.V.numel() for q in regularised)
    changing = []
    for i in range(total):
        cosine = (1 + math.cos(math.pi * i / total)) / 2
        share, exponent = METHODS["adaround"].schedule(i / total)
        reg_weight = share * config.default("reg_weight") / count if regularised else 0.0
        changing.append([*(group["first"] * cosine for group in groups), reg_weight, exponent])
    changing = torch.tensor(changing, device=device)
    batch = batches[0].clone()

    def step():
        for q in regularised:
            q.train()
        loss = block_loss(block(x_q.index_select(0, batch)), y_fp.index_select(0, batch))
        loss = loss * (loss.detach() > torch.finfo(loss.dtype).eps)  # as in make_iteration
        for q in regularised:
            loss = loss + weight * q.regulariser(beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    run_step = step if record is None else record(step)

    def iterate(i):
        now.copy_(changing[i])
        batch.copy_(batches[i])
        return run_step()

    return iterate


def time_block(block: nn.Module, x: Tensor, config: ReconstructionConfig, rounds: int = 20
               ) -> dict[str, float]:
    """Seconds of one iteration of a float block's reconstruction, and of its floor: medians.

    We time both in turn, in `rounds` rounds of one iteration (on CUDA of 50). The block stays as it
    is.

    Args:
        x: (N, ...) inputs of the block, on its device. N is at least config.batch_size.

    Returns:
        "floor", "iteration", on CUDA also "floor captured" and "iteration captured" (absent, with a
        warning, where a step cannot be recorded), and "evaluations": what the five evaluations of a
        block cost, each of 32 batches.
    """
    device = device_of([block])
    cuda = device.type == "cuda"
    y = run(block.eval(), x, config.batch_size, device, device)
    plain, hat = (copy.deepcopy(block).requires_grad_(False) for _ in range(2))
    weights = [layer.weight.requires_grad_() for layer in quantizable_layers(plain).values()]
    batch, G = x[:config.batch_size].clone(), torch.randn_like(y[:config.batch_size])
    quantize_layers(hat, config)
    for q in quantizers(hat).values():
        q.requires_grad_()

    def floor():
        for W in weights:
            W.grad = None
        plain(batch).backward(G)

    def iteration(record=None):
        if record is None:
            iterate = make_iteration(hat, x, y, config)
        else:
            iterate = recordable_iteration(hat, x, y, config, record)
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
        steps = {"floor": floor, "iteration": iteration()}
        if cuda:
            try:
                steps |= {"floor captured": captured(floor),
                          "iteration captured": iteration(captured)}
            except RuntimeError as error:
                warnings.warn(f"not recorded as a CUDA graph: {error}", stacklevel=2)
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
            x = run(block, x, 32, device, device)

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
