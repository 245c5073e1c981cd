"""Block-by-block reconstruction: how FlexRound's factors (and its rivals') are learned.

The objective of section 3.1, one block at a time, over a few calibration inputs:

    minimise  || block(X) - block_hat(X_tilde) ||^2    over s1, S2, s3, s4

    X        x_fp   the block's input when every earlier block is full precision
    X_tilde  x_q    the block's input when every earlier block is quantized
             y_fp   block(X), the target: taken just before the block's layers are quantized

So the whole driver, quantize_model below, is this loop:

    x_fp = x_q = calibration inputs
    for block in blocks:
        y_fp = block(x_fp)
        quantize the block's layers                    # flexround.quantize_layers: round to nearest
        reconstruct_block(block, x_q, y_fp, config)    # learn the factors
        x_fp, x_q = y_fp, block(x_q)

How this differs from the paper and from the authors' code, and why
- The best of the start and four evaluations is kept, so that the result is never worse than round
  to nearest on the calibration set. FlexRound on white noise, for one, ends worse without it.
- All methods share optimizer (Adam, cosine decay to 0), iterations and batches; only the rate is
  each method's own. The paper runs the baselines with BRECQ's settings (Adam 1e-3, 20k iterations).
- The paper states neither the loss's reduction nor the rate's schedule. Both are as in the authors'
  code, except that it sums over dim 1 always, which for a GPT is the tokens: see block_loss.

Activations, where abits asks for them: setting B goes through the blocks a second time to learn the
steps of the layers' inputs; setting Q learns these with the weights and drops (section 4).
"""
import argparse
import copy
import hashlib
import json
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from flexround import (
    BITS,
    LSQ,
    METHODS,
    AdaRound,
    code_range,
    fold,
    input_quantizers,
    place_input_quantizer,
    quantizable_layers,
    quantize_inputs,
    quantize_layers,
    quantizers,
    remove_input_quantizers,
    start_of,
)

# Adam's first rate at 1,000 iterations a block where the caller names none, the best of a search on
# training data (README, Results). The paper: FlexRound 4e-4 (ResNets at W4 and W3) or 1e-3 (ResNets
# at W2, MobileNetV2) at 5,000 iterations, 7e-6 to 7e-3 for language models; AdaRound and AdaQuant
# 1e-3 at 20,000: AdaRound's V is a logit, and Adam moves it by about lr * iterations / 2 at most.
DEFAULT_LR = {"rtn": 0.0, "adaround": 0.3, "adaquant": 1e-3, "flexround": 8e-3}

# Section 4, the rates of the activations' steps in settings B and Q, here for their logarithms; and
# the probability with which setting Q keeps a full-precision value.
STEP_LR, QDROP = {"B": 4e-4, "Q": 4e-5}, 0.5


def one_of(*values):
    """A rule for knob: what is allowed, in words, and the test."""
    return " or ".join(map(str, values)), lambda v: type(v) in map(type, values) and v in values


def at_least(least: int):
    return f"an integer of at least {least}", lambda v: type(v) is int and v >= least


def or_none(rule):
    return f"{rule[0]} or None", lambda v: v is None or rule[1](v)


def is_number(v) -> bool:
    return isinstance(v, int | float) and not isinstance(v, bool)


BITS_RULE = f"an integer from {BITS[0]} to {BITS[-1]}", lambda v: type(v) is int and v in BITS
POSITIVE = "a positive number", lambda v: is_number(v) and 0 < v < math.inf
SHARE = "a probability from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1
SWITCH = one_of(True, False)


def knob(default, rule, about: str):
    """A setting: its default, what is allowed, and what it is, for who reads and for --help."""
    return field(default=default, metadata={"rule": rule, "about": about})


@dataclass(frozen=True)
class ReconstructionConfig:
    """All settings of a reconstruction; each but layer_bits is a flag of the command line, too
    (--per-channel). ValueError names the one that is not allowed."""

    method: str = knob("flexround", one_of(*METHODS), ", ".join(METHODS))
    bits: int = knob(4, BITS_RULE, "of a weight, 2 to 8; the paper's CNNs: 4, 3, 2")
    symmetric: bool = knob(True, SWITCH, "the grid: the paper's CNNs so, its language models not")
    per_channel: bool = knob(False, SWITCH, "one s1 an output channel; in the paper for LLaMA")
    p: float = knob(2.4, POSITIVE, "exponent of the range search; the paper's is 2")
    learn_s1: bool = knob(True, SWITCH, "FlexRound only; without: ablation 1 of Table 1")
    use_s3_s4: bool = knob(True, SWITCH, "FlexRound only; without: ablation 2 of Table 1")
    V_in_steps: bool = knob(False, SWITCH, "AdaQuant only; an experiment: V counts grid steps")
    optimizer: str = knob("adam", one_of("adam", "sgd"), "adam, or plain sgd, which needs an lr")
    iterations: int = knob(1000, at_least(1), "a block; section 4: 5,000 for CNNs, 500 for "
                                              "language models")
    batch_size: int = knob(32, at_least(1), "inputs an iteration; 32 is BRECQ's for CNNs")
    lr: float | None = knob(None, or_none(POSITIVE), "first rate; None: the method's, DEFAULT_LR")
    seed: int = knob(0, at_least(0), "of the batches and of what is dropped")
    input_drop: float = knob(0.0, SHARE, "probability that an element of a block's input is "
                             "x_fp's: 0 is X_tilde (section 3.1), 1 is X; in setting B in both "
                             "passes; setting Q takes 0.5")
    abits: int | None = knob(None, or_none(BITS_RULE), "of what each quantized layer gets; None: "
                             "float, weights only")
    setting: str = knob("B", one_of("B", "Q"), "with abits: B learns weights, then, in a second "
                        "pass, steps; Q both together, dropping (section 4)")
    step_lr: float | None = knob(None, or_none(POSITIVE), "first rate of a step's logarithm; None: "
                                 "the setting's, STEP_LR")
    end_bits: int | None = knob(8, or_none(BITS_RULE), "of the first layer of the first block and "
                                "the last of the last; None, or --end-bits 0: no exception")
    device: str | None = knob(None, None, "where a block is computed: it is moved there for its "
                              "turn, and back; None: where it lies")
    cache_device: str | None = knob(None, None, "where cached activations live; None: where blocks "
                                    "are computed")
    cache_dtype: str | None = knob(None, or_none(one_of("float32", "bfloat16", "float16")),
                                   "theirs; None: the blocks' own. Tokens stay integers")
    precision: str = knob("float32", one_of("float32", "tf32", "bf16"), "of matmuls and "
                          "convolutions while learning; factors and moments stay float32")
    cuda_graph: bool = knob(True, SWITCH, "on CUDA: record an iteration once a block and replay it")
    layer_bits: dict = field(default_factory=dict)   # {"<block index>.<layer name>": bits}

    def __post_init__(self):
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata.get("rule")
            if rule and not rule[1](value):
                raise ValueError(f"{f.name} = {value!r}: {rule[0]} is allowed")
        if not isinstance(self.layer_bits, dict):
            raise ValueError(f"layer_bits = {self.layer_bits!r}: a dict of bits is allowed")
        for name, bits in self.layer_bits.items():
            code_range(bits, self.symmetric, f"layer_bits[{name!r}]")
        if self.optimizer == "sgd" and self.method != "rtn" and (
                self.lr is None or self.abits is not None and self.step_lr is None):
            raise ValueError("optimizer = 'sgd' needs an lr, with abits a step_lr, too: the "
                             "default rates are Adam's")
        if self.abits is None and (self.setting, self.step_lr) != ("B", None):
            raise ValueError(f"setting = {self.setting!r}, step_lr = {self.step_lr}: both are for "
                             "activations, and need abits")
        if self.joint and self.input_drop not in (0, QDROP):
            raise ValueError(f"input_drop = {self.input_drop}: setting Q takes {QDROP}")

    @property
    def joint(self) -> bool:
        """Whether steps are learned together with weights, and activations dropped."""
        return self.abits is not None and self.setting == "Q"

    @property
    def drop(self) -> float:
        """The probability that an element of a block's input is the full-precision one."""
        return QDROP if self.joint else self.input_drop


@dataclass
class BlockReport:
    """What became of one block. Losses but history's are block_loss, hard codes, on all of x_q."""

    index: int                               # the block's place in the list
    bits: dict[str, int]                     # of each quantized layer, by its name in the block
    start_loss: float                        # before learning: round to nearest, or, in the second
    #                                          pass of setting B, the learned weights behind
    #                                          steps as they were found
    final_loss: float                        # of the state that was kept: the least of evaluations
    best_iteration: int                      # when that was; 0 is the start
    evaluations: list[tuple[int, float]]     # (iterations done, loss): start, each quarter
    history: list[float]                     # a batch's loss at each iteration, as descended: for
    #                                          AdaRound with soft codes and the regulariser, in
    #                                          setting Q with what is dropped
    seconds: float
    abits: dict[str, int] = field(default_factory=dict)    # of each quantized layer's input


# ---- One block -----------------------------------------------------------------------------------

def block_loss(y: Tensor, y_fp: Tensor) -> Tensor:
    """Squared error, summed over channels, mean over the rest; a scalar.

    Channels are dim 1 of a convolution's (N, C, H, W) and the last dim of anything else, such as
    (N, C) or a GPT's (B, T, C). ValueError where the shapes differ: none is stretched in silence.
    """
    if y.shape != y_fp.shape:
        raise ValueError(f"the block returns {tuple(y.shape)}, its target has {tuple(y_fp.shape)}")
    return F.mse_loss(y, y_fp) * y.shape[1 if y.dim() == 4 else -1]


def dtype_in_cache(x: Tensor, cache_dtype: str | None) -> torch.dtype:
    """Only floating tensors are cast: a GPT's inputs are integers."""
    return getattr(torch, cache_dtype) if cache_dtype and x.is_floating_point() else x.dtype


def dtype_of(block: nn.Module) -> torch.dtype | None:
    """The dtype of the first parameter; None where there is none: then that of the cache."""
    return next((p.dtype for p in block.parameters()), None)


def fetch(x: Tensor, dtype: torch.dtype | None, device, copy: bool = False) -> Tensor:
    """A batch from the cache on the device, in this dtype where it is floating."""
    return x.to(device, dtype if dtype and x.is_floating_point() else x.dtype, copy=copy)


@torch.no_grad()
def run(block: nn.Module, x: Tensor, batch_size: int, device, cache_device,
        cache_dtype: str | None = None) -> Tensor:
    """block(x) for all of x, a batch at a time; the result lies on cache_device, in cache_dtype."""
    out, dtype = None, dtype_of(block)
    with parametrize.cached():                                       # quantize each weight once
        for i in range(0, len(x), batch_size):
            # A copy: a block may begin with an in-place ReLU, and x is used again.
            y = block(fetch(x[i:i + batch_size], dtype, device, copy=True))
            if out is None:
                out = torch.empty(len(x), *y.shape[1:], dtype=dtype_in_cache(y, cache_dtype),
                                  device=cache_device)
            out[i:i + batch_size] = y
    return out


@torch.no_grad()
def evaluate(block: nn.Module, x: Tensor, y_fp: Tensor, batch_size: int, device) -> float:
    """block_loss over all of x, a batch at a time."""
    total, dtype = 0.0, dtype_of(block)
    with parametrize.cached():
        for xs, ys in zip(x.split(batch_size), y_fp.split(batch_size), strict=True):
            y = block(fetch(xs, dtype, device, copy=True))
            total += len(xs) * block_loss(y, fetch(ys, dtype, device))
    return float(total) / len(x)


def evaluation_marks(iterations: int) -> set[int]:
    """After how many iterations all calibration inputs are evaluated: quarters, rounded down."""
    return {iterations * quarter // 4 for quarter in range(1, 5)} - {0}


def device_of(blocks) -> torch.device:
    """Where the first parameter lies; the CPU where there is none."""
    return next((p.device for block in blocks for p in block.parameters()), torch.device("cpu"))


def check_inputs(**inputs: Tensor | None) -> None:
    """ValueError unless all inputs that are not None are finite and equally many, at least one."""
    if torch.is_inference_mode_enabled():
        raise ValueError("inference mode is enabled: nothing can be learned within")
    inputs = {name: x for name, x in inputs.items() if x is not None}
    for name, x in inputs.items():
        if not isinstance(x, Tensor) or x.dim() == 0 or len(x) == 0:
            raise ValueError(f"{name} is {type(x).__name__} of shape "
                             f"{tuple(getattr(x, 'shape', ()))}: a torch.Tensor of one input or "
                             "more, along its first dim, is allowed")
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} holds NaN or infinity: only finite inputs are allowed")
    counts = {name: len(x) for name, x in inputs.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{counts}: equally many inputs are allowed")


def check_precision(tensors, name: str) -> None:
    """ValueError for half precision: Adam's steps are too small for it and its losses overflow."""
    for dtype in {t.dtype for t in tensors} & {torch.float16, torch.bfloat16}:
        raise ValueError(f"{name} is in {dtype}: float32 and float64 can be learned; use .float()")


def reconstruct_block(block: nn.Module, x_q: Tensor, y_fp: Tensor, config: ReconstructionConfig,
                      x_fp: Tensor | None = None, index: int = 0, progress=None) -> BlockReport:
    """Learn the factors of a block's quantizers, in place: descend block_loss(block(x_q), y_fp).

    Where inputs of layers are quantized (flexround.quantize_inputs), setting B learns their steps
    alone, since the weights have been before, setting Q all of it, round to nearest none.

    The rate falls to 0 along a cosine. At the start and after each quarter of the iterations all of
    the calibration set is evaluated with hard codes on x_q, and the best state seen is the one that
    is kept. Afterwards the block is in eval mode and its factors are frozen; no other parameter is
    touched, and requires_grad of the others is as it was.

    Args:
        block: a module with quantizers in place (flexround.quantize_layers).
        x_q: (N, ...) the block's inputs behind quantized blocks, X_tilde.
        y_fp: (N, ...) its full-precision outputs on full-precision inputs, on any device.
        config: method, iterations, batch_size, optimizer, rates, seed, abits, setting, input_drop,
            precision, cuda_graph are read.
        x_fp: (N, ...) the full-precision inputs X; needed where config.drop > 0.
        index: the block's place in the network, which seeds its batches and is named in errors.
        progress: called as progress(iterations done, loss) at each evaluation.

    Raises:
        ValueError: no quantizers, or another method's; quantized inputs of layers without abits;
            half precision; empty, unequal or non-finite inputs.
        FloatingPointError: a loss that is not finite, naming block and iteration (counted from 1).
            Then, and on any other exception, the factors are as they were before.
    """
    began = time.perf_counter()
    placed = quantizers(block)
    kinds = {type(q) for q in placed.values()}
    if kinds != {METHODS[config.method]}:
        found = ", ".join(kind.__name__ for kind in kinds) or "no quantizers: call quantize_layers"
        raise ValueError(f"block {index} holds {found}: {config.method} is needed, as config says")
    rounded = input_quantizers(block)
    if rounded and config.abits is None:
        raise ValueError(f"block {index} rounds the inputs of {list(rounded)}, but abits = None")
    check_inputs(x_q=x_q, y_fp=y_fp, x_fp=x_fp)
    if config.drop > 0 and x_fp is None:
        raise ValueError(f"input_drop = {config.drop} needs x_fp, the full-precision input")
    x_q, y_fp, x_fp = x_q.detach(), y_fp.detach(), None if x_fp is None else x_fp.detach()
    device = device_of([block])
    factors = [p for q in placed.values() for p in q.parameters()]
    steps = [p for q in rounded.values() for p in q.parameters()]
    if config.method == "rtn":
        steps = []                                                   # as they were found
    elif rounded and not config.joint:
        factors = []                                                 # as they were learned
    learned = factors + steps
    check_precision(learned, f"block {index}")
    if config.batch_size > len(x_q) and learned:
        warnings.warn(f"batch_size = {config.batch_size}, but there are only {len(x_q)} "
                      "calibration inputs: each iteration takes them all", stacklevel=2)
    evaluations, history = [], torch.zeros(0)
    initial = best = [p.detach().clone() for p in learned]

    def loss_after(iteration):
        block.eval()                                                 # AdaRound: hard codes
        loss = evaluate(block, x_q, y_fp, config.batch_size, device)
        if not math.isfinite(loss):
            raise _not_finite(index, iteration, config)
        evaluations.append((iteration, loss))
        if progress:
            progress(iteration, loss)
        return loss

    cuda = device.type == "cuda"
    with (torch.enable_grad(), _learning(block, learned), _tf32(config.precision == "tf32", device),
          torch.cuda.device(device) if cuda else nullcontext(),
          nullcontext() if factors else parametrize.cached(),        # weights that do not change
          torch.random.fork_rng([device] if cuda else [])):
        dropped = torch.cuda if cuda else torch.default_generator
        dropped.manual_seed(1000 * config.seed + index)              # what is dropped
        try:
            best_loss, best_iteration = loss_after(0), 0
            if learned:                                              # not round to nearest
                history = torch.zeros(config.iterations, dtype=torch.float32, device=device)
                marks = evaluation_marks(config.iterations)
                for i in _iterate(block, factors, steps, x_q, y_fp, x_fp, config, index, history):
                    if i not in marks:
                        continue
                    bad = (~torch.isfinite(history[:i])).nonzero()
                    if len(bad):
                        raise _not_finite(index, int(bad[0]) + 1, config)
                    loss = loss_after(i)
                    if loss < best_loss:
                        best_loss, best_iteration = loss, i
                        best = [p.detach().clone() for p in learned]
        except BaseException:                                        # an interrupt, too
            best = initial
            raise
        finally:
            with torch.no_grad():
                for p, value in zip(learned, best, strict=True):
                    p.copy_(value)
    return BlockReport(index, {name: q.bits for name, q in placed.items()}, evaluations[0][1],
                       best_loss, best_iteration, evaluations, history.tolist(),
                       time.perf_counter() - began, {name: q.bits for name, q in rounded.items()})


@contextmanager
def _learning(block: nn.Module, learned: list[nn.Parameter]):
    """Within, nothing but `learned` requires a gradient. Afterwards the quantizers are frozen, the
    others' requires_grad is as before, and the block is in eval mode."""
    before = [(p, p.requires_grad) for p in block.parameters()]
    placed = [*quantizers(block).values(), *input_quantizers(block).values()]
    block.requires_grad_(False)
    for p in learned:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)
        for p in (p for q in placed for p in q.parameters()):
            p.requires_grad_(False)
            p.grad = None
        block.eval()


@contextmanager
def _tf32(allowed: bool, device: torch.device):
    """Within, CUDA's float32 matmuls and convolutions may round their inputs to TF32, or not."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):                            # torch 2.9 renamed it
        places, key, value = (matmul, cudnn.conv), "fp32_precision", "tf32" if allowed else "ieee"
    else:
        places, key, value = (matmul, cudnn), "allow_tf32", allowed
    places = places if device.type == "cuda" else ()
    before = [getattr(place, key) for place in places]
    for place in places:
        setattr(place, key, value)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, key, value)


def _captured(step):
    """Records the kernels that step() launches as a CUDA graph, and returns what replays them: one
    launch instead of hundreds, each of which takes longer than its kernel. A replay reads and
    writes the very tensors that step() used, so what changes is copied into these before; torch's
    own generator is known to the graph and goes on drawing.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay():
        graph.replay()
        return result

    return replay


def _aside(step):
    """step() on a stream of its own, as CUDA asks of what runs before a capture."""
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = step()
    main.wait_stream(side)
    return result


def _iterate(block, factors, steps, x_q, y_fp, x_fp, config, index, history):
    """The iterations of reconstruct_block; yields how many are done. Nothing here waits for the
    device, unless the cache is elsewhere: the loss stays there, in history."""
    device, dtype, total = history.device, dtype_of(block), config.iterations
    # Its own stream for each block: what one block draws does not depend on the others.
    draw = torch.Generator().manual_seed(1000 * config.seed + index)
    size = min(config.batch_size, len(x_q))
    batches = torch.stack([torch.randperm(len(x_q), generator=draw)[:size].clone()
                           for _ in range(total)]).to(x_q.device)    # (iterations, batch)
    regularised = [q for q in quantizers(block).values() if isinstance(q, AdaRound) and factors]
    dropping = [q for q in input_quantizers(block).values() if q.drop > 0]

    lr = DEFAULT_LR[config.method] if config.lr is None else config.lr
    step_lr = STEP_LR[config.setting] if config.step_lr is None else config.step_lr
    # What changes from iteration to iteration lies in tensors that are filled before each: the
    # rates (a cosine that falls to 0), AdaRound's weight and beta, and the batch.
    cosine = [(1 + math.cos(math.pi * i / total)) / 2 for i in range(total)]
    changing = torch.tensor([(lr * c, step_lr * c, *AdaRound.schedule(i / total))
                             for i, c in enumerate(cosine)], dtype=torch.float32, device=device)
    rate, step_rate, weight, beta = now = changing[0].clone()
    batch = batches[0].clone()
    groups = [{"params": p, "lr": r} for p, r in ((factors, rate), (steps, step_rate)) if p]
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, fused=True)
    else:
        optimizer = torch.optim.Adam(groups, fused=True, capturable=device.type == "cuda")

    def iteration():
        for q in regularised + dropping:
            q.train()                                                # soft codes; dropping
        def drawn(t):
            return fetch(t.index_select(0, batch.to(t.device)), dtype, device)

        x, y = drawn(x_q), drawn(y_fp)
        if config.drop > 0:                                          # QDrop, element by element
            x = torch.where(torch.rand(x.shape, device=device) < config.drop, drawn(x_fp), x)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16",
                            cache_enabled=False):
            y_hat = block(x)
        loss = block_loss(y_hat.to(y.dtype), y)
        for q in regularised:                                        # AdaRound only
            loss = loss + weight * q.regulariser(beta)
        for p in factors + steps:
            p.grad = None
        loss.backward()
        optimizer.step()
        return loss.detach()

    # A batch that comes from another device needs the host, and cannot be recorded.
    here = all(t.device == device for t in (x_q, y_fp, x_fp) if t is not None)
    capture = device.type == "cuda" and config.cuda_graph and here
    step = (lambda: _aside(iteration)) if capture else iteration
    for i in range(total):
        now.copy_(changing[i])
        batch.copy_(batches[i])
        if capture and i == 3:                                       # the first three warmed up
            try:
                step = _captured(iteration)
            except RuntimeError as error:
                warnings.warn(f"block {index} cannot be recorded as a CUDA graph and runs eagerly: "
                              f"{error}", stacklevel=2)
                step = iteration
        history[i] = step()
        yield i + 1


def _not_finite(index, iteration, config):
    rate = "lr" if config.abits is None else "lr or step_lr"
    when = (f"at iteration {iteration} of {config.iterations}: try a smaller {rate}"
            if iteration else "before training: do its activations overflow?")
    return FloatingPointError(f"block {index}, {config.method}: the loss is not finite {when}. The "
                              "block is left as it was")


# ---- A network: block after block ----------------------------------------------------------------

def plan(blocks, config: ReconstructionConfig, inputs: bool = False) -> list[dict[str, int]]:
    """The bits of each layer that will be quantized, a dict {name in the block: bits} a block; or
    of these layers' inputs: abits, end_bits at the two ends, too, and layer_bits does not count.

    nn.Linear and nn.Conv2d are quantized; embeddings, a head tied to an embedding, norms and all
    else stay float. end_bits goes to the first layer of the first block and the last of the last,
    where the block has one; layer_bits goes before both. Warns of other layers' weight matrices,
    and where end_bits leaves no layer at the bits, or abits, that were asked for.

    Raises:
        ValueError: layer_bits names what is not there, a layer stands in two blocks, there is
            nothing to quantize; else as flexround.quantizable_layers does.
    """
    model = nn.ModuleList(blocks)                                    # names: "<block>.<layer>"
    layers, names = quantizable_layers(model), dict(model.named_modules())
    for i, block in enumerate(blocks):                               # a module is named only once
        for name in quantizable_layers(block):
            if f"{i}.{name}".rstrip(".") not in names:
                raise ValueError(f"layer {name!r} of block {i} stands in an earlier block, too")
    if not layers:
        raise ValueError("nothing to quantize: no block has an nn.Linear or an nn.Conv2d")
    for name in config.layer_bits:
        if name not in layers:
            raise ValueError(f"layer_bits names {name!r}: the layers are {list(layers)}")
    left = [f"{name} ({type(m).__name__})" for name, m in names.items()
            if name not in layers and not isinstance(m, nn.Embedding | nn.Linear | nn.Conv2d)
            and any("weight" in n and p.dim() > 1 for n, p in m.named_parameters(recurse=False))]
    if left and not inputs:
        warnings.warn(f"only nn.Linear and nn.Conv2d are quantized; these stay float: {left}",
                      stacklevel=3)

    asked = config.abits if inputs else config.bits
    bits = dict.fromkeys(layers, asked)
    if config.end_bits is not None:
        of_block = [[n for n in layers if n.split(".")[0] == str(i)] for i in (0, len(blocks) - 1)]
        for name in of_block[0][:1] + of_block[1][-1:]:
            bits[name] = config.end_bits
    if not inputs:
        bits.update(config.layer_bits)
    if set(bits.values()) == {config.end_bits} != {asked}:
        warnings.warn(f"no layer is left at {'abits' if inputs else 'bits'} = {asked}: {bits}; "
                      "end_bits = None makes no exception of the first and the last", stacklevel=3)
    return [{name.partition(".")[2]: b for name, b in bits.items() if name.split(".")[0] == str(i)}
            for i in range(len(blocks))]


@torch.no_grad()
def cache_bytes(blocks, calibration: Tensor, config: ReconstructionConfig) -> int:
    """Most bytes of cached activations at a time: a dry run of one input through the blocks.

    Raises:
        ValueError: a block that does not return a finite tensor for one input.
    """
    device = device_of(blocks)
    sizes, x = [], calibration[:1]
    for i, block in enumerate(blocks):
        try:
            x = block.eval()(x.to(device, copy=True))
        except Exception as error:
            raise ValueError(f"block {i} does not run on one calibration input: "
                             f"{type(error).__name__}: {error}") from error
        if not isinstance(x, Tensor) or x.shape[:1] != (1,) or not torch.isfinite(x).all():
            raise ValueError(f"block {i} returns {type(x).__name__}"
                             f"{f' {tuple(x.shape)}' if isinstance(x, Tensor) else ''} for one "
                             "calibration input: a finite tensor with one row an input is needed")
        sizes.append(x.numel() * dtype_in_cache(x, config.cache_dtype).itemsize)
    first = calibration[0].numel() * dtype_in_cache(calibration, config.cache_dtype).itemsize
    # At most x_fp and x_q, a block's inputs, and the same two of its outputs.
    return len(calibration) * max(2 * (a + b) for a, b in zip([first, *sizes], sizes, strict=False))


@contextmanager
def _on(block: nn.Module, device: str | None):
    """Within, the block lies on the device (None: where it is); afterwards where it was."""
    home = device_of([block])
    if device is not None:
        block.to(device)
    try:
        yield
    finally:
        if device is not None:
            block.to(home)


def quantize_model(blocks, calibration: Tensor, config: ReconstructionConfig) -> list[BlockReport]:
    """Quantize a network block after block, in place: the paper's method from end to end.

    Afterwards the blocks are in eval mode, the quantizers are in place with their factors frozen
    and requires_grad of all else is as it was. flexround.fold makes the result permanent; do that
    before training mode, in which AdaRound is soft. Shows a progress bar where there is a terminal,
    after the size of the cached activations.

    Args:
        blocks: a list or nn.ModuleList of Tensor -> Tensor modules which, one after the other, are
            the network. Any network that can be given so will do. Fold batch norm first.
        calibration: (N, ...) inputs of the first block, on any device.
        config: see ReconstructionConfig.

    Returns:
        A report for each block that has layers to quantize, in order; in setting B with activations
        then a second one for each, of its steps (but round to nearest learns none: one pass).

    Raises:
        ValueError: inputs of layers that are quantized already, or as ReconstructionConfig, plan
            and cache_bytes do, before any work; as quantize_inputs does, at the block.
        FloatingPointError: a loss that is not finite. Then, and on any other exception, that block
            is as before (full precision, or in B's second pass with float activations) and the
            earlier ones stay quantized.
    """
    if not (isinstance(blocks, Iterable) and all(isinstance(b, nn.Module) for b in blocks)):
        raise ValueError(f"blocks is {type(blocks).__name__}: a list of modules is allowed, such "
                         "as a network's .blocks")
    blocks = list(blocks)
    check_inputs(calibration=calibration)
    rounded = list(input_quantizers(nn.ModuleList(blocks)))
    if rounded:
        raise ValueError(f"the inputs of {rounded} are quantized already: take a float network, or "
                         "flexround.remove_input_quantizers first")
    bits = plan(blocks, config)
    if config.method != "rtn":
        check_precision((p for block in blocks for p in block.parameters()), "the network")
    last = max(i for i, layers in enumerate(bits) if layers)         # nothing behind it is run
    size = cache_bytes(blocks[:last + 1], calibration, config)
    device = torch.device(config.device or device_of(blocks))
    cache = torch.device(config.cache_device or device)

    def outputs(block, x):
        return run(block, x, config.batch_size, device, cache, config.cache_dtype)

    abits = plan(blocks, config, inputs=True) if config.abits else None
    # Setting B; setting Q is config.joint. Round to nearest learns nothing: one pass in either.
    two_passes = bool(config.abits) and not config.joint and config.method != "rtn"
    floats = copy.deepcopy(blocks) if two_passes else None           # the second pass's targets
    reports = []
    steps = 0 if config.method == "rtn" else config.iterations * (1 + two_passes)
    bar = tqdm(total=steps * sum(map(bool, bits)), disable=None, desc=f"{config.method} "
               f"W{config.bits}{f'A{config.abits}, {config.setting}' if config.abits else ''}")
    if not bar.disable:
        bar.write(f"cached activations: at most {size / 1e6:,.1f} MB on {cache}", file=sys.stderr)

    def sweep(targets, weights, activations):
        """The loop at the head of this file. Each pass is one."""
        x_fp = x_q = calibration.detach().to(cache, dtype_in_cache(calibration, config.cache_dtype))
        for i, block in enumerate(blocks[:last + 1]):
            with _on(targets[i].eval(), config.device):
                y_fp = outputs(targets[i], x_fp)
            with _on(block.eval(), config.device):
                if not bits[i]:
                    untouched = x_q is x_fp                          # nothing quantized so far
                    x_q = y_fp if untouched else outputs(block, x_q)
                    x_fp = y_fp
                    continue
                done = bar.n

                def progress(iteration, loss, i=i, done=done):
                    bar.set_postfix_str(f"block {i}, loss {loss:.3g}", refresh=False)
                    bar.update(done + iteration - bar.n)

                try:
                    if activations:                                  # their steps: on one batch
                        batches = (fetch(x, dtype_of(block), device)
                                   for x in x_q.split(config.batch_size))
                        quantize_inputs(block, next(batches), abits[i], config.symmetric, config.p,
                                        QDROP if config.joint else 0.0, batches)
                    if weights:                                      # less what is tied elsewhere
                        skip = set(quantizable_layers(block)) - set(bits[i])
                        quantize_layers(block, config, bits[i], skip)
                    x_fp = x_fp if config.drop > 0 else None         # else its memory is free
                    reports.append(reconstruct_block(block, x_q, y_fp, config, x_fp, i, progress))
                    for q in input_quantizers(block).values():       # not in train mode, either
                        q.drop = 0.0
                except BaseException:
                    remove_input_quantizers(block)
                    if weights:
                        fold(block, keep=False)
                    raise
                if i < last:
                    x_fp, x_q = y_fp, outputs(block, x_q)

    with bar, _tf32(config.precision == "tf32", device):
        if two_passes:
            sweep(blocks, weights=True, activations=False)
            sweep(floats, weights=False, activations=True)
        else:
            sweep(blocks, weights=True, activations=bool(config.abits))
    for block in blocks[last + 1:]:
        block.eval()
    return reports


# ---- The integers, out and back ------------------------------------------------------------------

FORMAT, VERSION = "flexround-quantized", 2


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes below 2^bits, any shape, as uint8 bytes: ceil(codes * bits / 8) of them.

    The codes stand one behind the other, least significant bit first, across byte borders.
    """
    bytes_ = codes.to(torch.uint8).numpy().reshape(-1, 1)
    ones = np.unpackbits(bytes_, axis=1, bitorder="little")          # (count, 8)
    return torch.from_numpy(np.packbits(ones[:, :bits], bitorder="little"))


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of pack: int32, (count,)."""
    ones = np.unpackbits(data.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(ones, axis=1, bitorder="little")[:, 0].astype(np.int32))


def _decode(file: dict) -> dict[str, Tensor]:
    """The state_dict that the content of a file stands for: W_hat of each layer, and the rest."""
    state = dict(file["rest"])
    for name, layer in file["layers"].items():
        lo, _ = code_range(layer["bits"], layer["symmetric"])
        data = file["codes"][layer["offset"]:layer["offset"] + layer["bytes"]]
        codes = unpack(data, layer["bits"], math.prod(layer["shape"])).view(layer["shape"]) + lo
        W_hat = file["s1"][name] * (codes - file["zero_point"][name])
        state[f"{name}.weight" if name else "weight"] = W_hat
    for name, q in file["inputs"].items():
        codes = torch.tensor(code_range(q["bits"], q["signed"]))
        state |= {f"{name}.input_quantizer.{key}".lstrip("."): value for key, value in
                  (("log_step", q["log_step"]), ("zero_point", q["zero_point"]), ("codes", codes))}
    return state


def _digest(tensors: dict[str, Tensor]) -> str:
    """A SHA-256 of names and values, whatever the order."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(key.encode())
        total.update(tensors[key].flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_quantized(model: nn.Module, path) -> int:
    """Write a quantized model as integers; return the file's size in bytes.

    The file is torch's own format and holds tensors and plain values only, so that it is read with
    weights_only (no code runs) and without a further package:

        format, version   "flexround-quantized", 2
        layers            by name: bits, shape, symmetric, axis (0: one s1 a channel, None: one),
                          offset and bytes of its codes in the buffer
        codes             uint8: all layers' codes - lo at their true width, each layer from a new
                          byte on; lo is -2^(b-1) on a symmetric grid and 0 otherwise
        s1, zero_point    by name; W_hat = s1 * (code - zero_point)
        inputs            of layers whose input is quantized, by name: bits, signed, log_step,
                          zero_point
        rest              what else state_dict holds: biases, norms, embeddings, other buffers
        sha256            of all tensors that the loaded network will have, and its inputs' codes

    It is written beside path and then moved there: a file of that name is never half a file.

    Args:
        model: holds quantizers (quantize_model, not folded yet).
        path: where to, in a folder that exists.

    Raises:
        ValueError: no quantizers in model. OSError: path cannot be written.
    """
    placed = quantizers(model, every_name=True)                      # as in state_dict
    if not placed:
        raise ValueError("the model holds no quantizers: save it after quantize_model, before fold")
    layers, s1, zero_point, buffer, offset = {}, {}, {}, [], 0
    for name, q in placed.items():
        W = model.get_submodule(name).parametrizations.weight.original
        data = pack(q.codes(W).cpu() - q.lo, q.bits)
        layers[name] = {"bits": q.bits, "shape": list(W.shape), "symmetric": q.symmetric,
                        "axis": 0 if q.per_channel else None, "offset": offset, "bytes": len(data)}
        s1[name], zero_point[name] = q.s1.detach().cpu(), q.zero_point.cpu()
        buffer.append(data)
        offset += len(data)
    inputs = {name: {"bits": q.bits, "signed": q.signed, "log_step": q.log_step.detach().cpu(),
                     "zero_point": q.zero_point.cpu()}
              for name, q in input_quantizers(model).items()}
    ours = tuple(f"{name}.{own}.".lstrip(".") for name in placed
                 for own in ("parametrizations.weight", "input_quantizer"))
    rest = {k: v.cpu() for k, v in model.state_dict().items() if not k.startswith(ours)}
    file = {"format": FORMAT, "version": VERSION, "layers": layers, "codes": torch.cat(buffer),
            "s1": s1, "zero_point": zero_point, "inputs": inputs, "rest": rest}
    file["sha256"] = _digest(_decode(file))
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as out:
            torch.save(file, out)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return Path(path).stat().st_size


def load_quantized(model: nn.Module, path) -> nn.Module:
    """Put the weights of a file of save_quantized into a float network; return it in eval mode.

    The result computes what the saved model does, with plain layers that hold W_hat (torch.equal; a
    weight -0.0 becomes 0.0); where inputs of layers were quantized, they are again. All is checked
    before the first tensor is changed.

    Args:
        model: the float architecture of the saved model, batch norm folded where it was there; its
            values do not matter.
        path: a file of save_quantized.

    Raises:
        ValueError: a file that is damaged, foreign, newer than this code, or of another
            architecture (naming the layer). FileNotFoundError: no such file.
    """
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        if file["format"] != FORMAT:
            raise KeyError("format")
        version = int(file["version"])
        file.setdefault("inputs", {})                                # version 1 had none
        state = _decode(file) if version <= VERSION else {}
        damaged = version <= VERSION and _digest(state) != file["sha256"]
    except FileNotFoundError:
        raise
    except Exception as error:                                       # torch raises many kinds
        raise ValueError(f"{path}: truncated, damaged or not a file of save_quantized "
                         f"({type(error).__name__})") from error
    if version > VERSION:
        raise ValueError(f"{path}: version {version}; this code reads up to version {VERSION}")
    if damaged:
        raise ValueError(f"{path}: damaged: its tensors do not have the SHA-256 that it names")
    inputs = {name: LSQ(q["bits"], q["signed"], q["log_step"], q["zero_point"])
              for name, q in file["inputs"].items()}
    state = {key: t for key, t in state.items() if ".input_quantizer." not in f".{key}"}
    own, at = model.state_dict(), {}
    for key in [*state, *own]:
        if key not in own or key not in state:
            raise ValueError(f"{path}: another architecture: {key!r} is only in "
                             f"{'the file' if key in state else 'the model'}")
        theirs, ours = ((t.dtype, tuple(t.shape)) for t in (state[key], own[key]))
        if theirs != ours:
            raise ValueError(f"{path}: another architecture: {key!r} is {theirs} in the file, "
                             f"{ours} in the model")
        twin = at.setdefault((own[key].data_ptr(), *ours), key)
        if not torch.equal(state[twin], state[key]):
            raise ValueError(f"{path}: another architecture: {twin!r} and {key!r} are one tensor "
                             "in the model, two in the file")
    model.load_state_dict(state)
    for name, quantizer in inputs.items():
        quantizer.requires_grad_(False)
        place_input_quantizer(model.get_submodule(name), quantizer.to(device_of([model])))
    return model.eval()


# ---- What an iteration costs ---------------------------------------------------------------------

def time_block(block: nn.Module, x: Tensor, config: ReconstructionConfig, rounds: int = 20
               ) -> dict[str, float]:
    """Seconds of one iteration of a float block's reconstruction, beside its floor; medians.

    The floor is the block's own forward and backward on one batch, in plain weights: nothing that
    learns by gradient can be faster. All are timed in turn. On CUDA a round is 50 iterations, and
    both are also timed as replayed CUDA graphs. The block itself is left alone.

    Args:
        x: (N, ...) inputs of the block, beside it; N at least config.batch_size.

    Returns:
        "floor", "iteration", on CUDA "floor captured" and "iteration captured", and "evaluations":
        what the start's and four more cost, each of 32 batches.
    """
    device = device_of([block])
    cuda = device.type == "cuda"
    y = run(block.eval(), x, config.batch_size, device, device)
    plain = copy.deepcopy(block).requires_grad_(False)
    weights = [layer.weight.requires_grad_() for layer in quantizable_layers(plain).values()]
    batch, G = x[:config.batch_size].clone(), torch.randn_like(y[:config.batch_size])

    def floor():
        for W in weights:
            W.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16",
                            cache_enabled=False):
            y = plain(batch)
        y.backward(G.to(y.dtype))

    repeat = 50 if cuda else 1
    total = (rounds + 1) * repeat + 3
    steps = {"floor": floor}
    with (torch.enable_grad(), _tf32(config.precision == "tf32", device),
          torch.cuda.device(device) if cuda else nullcontext()):
        for graph in [False, True] if cuda else [False]:
            hat = copy.deepcopy(block)
            learned = [p for q in quantize_layers(hat, config).values() for p in q.parameters()]
            hat.requires_grad_(False)
            for p in learned:
                p.requires_grad_()
            own = replace(config, iterations=total, cuda_graph=graph)
            steps["iteration captured" if graph else "iteration"] = _iterate(
                hat, learned, [], x, y, None, own, 0, torch.zeros(total, device=device)).__next__
            for _ in range(4):                                       # the warm-up and the capture
                list(steps.values())[-1]()
        if cuda:
            for _ in range(3):
                _aside(floor)
            steps["floor captured"] = _captured(floor)

        def seconds(step, count):
            began = time.perf_counter()
            for _ in range(count):
                step()
            if cuda:
                torch.cuda.synchronize()
            return (time.perf_counter() - began) / count

        taken = [{name: seconds(step, repeat) for name, step in steps.items()}
                 for _ in range(rounds)]
        found = {name: statistics.median(t[name] for t in taken) for name in steps}
        once = statistics.median(seconds(lambda: evaluate(hat, x, y, config.batch_size, device), 1)
                                 for _ in range(3))
    return {**found, "evaluations": 5 * 32 * config.batch_size / len(x) * once}


def print_times(models, device: str, precision: str) -> None:
    """time_block as a table: the blocks of ResNet-20 and, on CUDA, of ResNet-18 at batch 32, and
    one of GPT-2 small's. Weights and inputs are random: the time does not depend on their values.
    """
    torch.manual_seed(0)
    cuda, todo = device.startswith("cuda"), []
    nets = [("ResNet-20", models.ResNet(shortcut="pad"), torch.randn(256, 3, 32, 32))]
    if cuda:
        nets.append(("ResNet-18", models.ResNet((64, 128, 256, 512), (2, 2, 2, 2), classes=1000,
                                                imagenet=True), torch.randn(64, 3, 224, 224)))
    for name, net, x in nets:
        x, config = x.to(device), ReconstructionConfig(precision=precision)
        for i, block in enumerate(models.fold_batchnorm(net).to(device).blocks):
            todo.append((f"{name}, block {i}", block, x, config))
            x = run(block, x, 32, device, device)
    length = 1024 if cuda else 256
    todo.append((f"GPT, 768 channels, 4 x {length} tokens",
                 models.TransformerBlock(768, 12).to(device),
                 torch.randn(8, length, 768, device=device), replace(config, batch_size=4)))
    print(f"torch {torch.__version__} on {device}, {torch.get_num_threads()} threads\n\n"
          "| block | floor, us | iteration, us | ratio | five evaluations, of 1,000 iterations |\n"
          "|---|---|---|---|---|")
    for name, block, x, config in todo:
        took = time_block(block, x, config)
        for kind in ("", " captured") if "floor captured" in took else ("",):
            floor, iteration = took[f"floor{kind}"], took[f"iteration{kind}"]
            print(f"| {name}{kind} | {1e6 * floor:,.0f} | {1e6 * iteration:,.0f} | "
                  f"{iteration / floor:.2f} | {took['evaluations'] / iteration / 10:.1f} % |",
                  flush=True)
    print(f"\nPeak memory: {peak_memory(device)}")


# ---- The main job --------------------------------------------------------------------------------

NAMES = {"rtn": "round to nearest", "adaround": "AdaRound", "adaquant": "AdaQuant",
         "flexround": "FlexRound"}


def parser() -> argparse.ArgumentParser:
    """The command line; each flag is explained by --help."""
    flags = argparse.ArgumentParser(
        description="Quantize networks with each method and print one table. Without arguments: "
                    "small networks, trained on the first run; no download, no GPU needed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = flags.add_argument
    add("--model", nargs="+", default=["resnet", "mobilenet", "gpt"], metavar="NAME",
        choices=["resnet", "mobilenet", "gpt", "resnet20", "resnet18", "resnet50", "shakespeare",
                 "gpt2"],
        help="resnet, mobilenet: small ones on scikit-learn's digits; gpt: a small one on "
             "characters; shakespeare: a larger one; resnet20 (CIFAR-10), resnet18, resnet50 "
             "(ImageNet), gpt2 (WikiText-2): public checkpoints. All but the first three need "
             "--data")
    many = {"method": list(NAMES), "bits": [3, 2], "seed": [0]}      # a run for each of them
    for f in fields(ReconstructionConfig):
        if "about" not in f.metadata:
            continue
        kind = next(t for t in (*get_args(f.type), f.type) if t is not type(None))
        allowed = f" [{f.metadata['rule'][0]}]" if f.metadata["rule"] else ""
        add("--" + f.name.replace("_", "-"), default=many.get(f.name, f.default),
            help=f.metadata["about"] + allowed, **(
                {"action": argparse.BooleanOptionalAction} if kind is bool else
                {"type": kind, "nargs": "+" if f.name in many else None}))
    flags.set_defaults(iterations=250, batch_size=None,
                       device="cuda" if torch.cuda.is_available() else "cpu")
    add("--samples", type=int, help="calibration inputs, drawn by the seed; None: 512 digits, "
                                    "1,024 other images, 128 sequences")
    add("--rescale", type=float, default=1.0, help="resnet, resnet20: multiply channels by up to "
        "this and divide by it behind the ReLU, which changes no output (an experiment)")
    add("--split", choices=["test", "train"], default="test",
        help="score test data, or what settings are chosen on: held-out training images, "
             "validation text")
    add("--data", help="resnet20, mobilenet (in place of digits): folder of CIFAR-10's binary "
        "files; resnet18, resnet50: folder with ImageNet's train and val; gpt2: folder of "
        "WikiText-2's wiki.*.raw; gpt, shakespeare: a text file")
    add("--checkpoint", help="file of resnet20's, resnet18's, resnet50's or gpt2's weights; None: "
                             "downloaded")
    add("--cache", default="cache", help="folder of the small networks once trained")
    add("--save", metavar="FILE", help="write the integers (one model, one method, one --bits)")
    add("--load", metavar="FILE", help="score a file of --save instead of quantizing (one model)")
    add("--study", metavar="NAME", help="append each run to --results under this name, and take "
        "from there what ran before: a long study can be stopped and continued")
    add("--results", metavar="FILE", default="docs/results.jsonl", help="runs, one JSON a line")
    add("--time", action="store_true", help="only time an iteration of some blocks and its floor, "
        "with --device and --precision")
    return flags


def proof(net: nn.Module, task) -> str:
    """The score to the last digit, and a hash of the logits on the calibration inputs."""
    digest = hashlib.sha256()
    for x in task.calibration.split(task.batch_size):                # GPT-2's would be gigabytes
        digest.update(run(net.eval(), x, len(x), device_of([net]), "cpu").numpy().tobytes())
    return f"score {task.score(net)!r}, sha256 of the logits {digest.hexdigest()[:16]}"


def one_run(name: str, task, config: ReconstructionConfig, full: float):
    """Quantize a copy of task.net; return it with the run's record, a dict of plain values."""
    net = copy.deepcopy(task.net)
    began = time.perf_counter()
    reports = quantize_model(net.blocks, task.calibration, config)
    seconds = time.perf_counter() - began
    net.to(config.device or device_of([net]))                        # whole, for the score
    moved, ratios = [], []
    for layer, q in quantizers(net).items():
        W = net.get_submodule(layer).parametrizations.weight.original
        start = start_of(q, W, config.p)                             # one search for both figures
        moved.append((q.codes(W) - start.codes(W)).abs().flatten())
        ratios.append(float((q.log_s1 - start.log_s1).exp().median()))
    moved = torch.cat(moved)
    with parametrize.cached():                                       # quantize each weight once
        score = task.score(net)
    device = device_of([net])
    machine = (torch.cuda.get_device_name(device) if device.type == "cuda" else
               f"{platform.machine()}, {torch.get_num_threads()} threads")
    return net, {
        "network": name, "about": task.about, "samples": len(task.calibration),
        "config": asdict(config), "full": full,
        "score": score, "loss": reports[-1].final_loss, "seconds": round(seconds, 1),
        "kept_last": sum(r.best_iteration == config.iterations for r in reports) / len(reports),
        "block_seconds": [round(r.seconds, 2) for r in reports],
        "moved": [float((moved >= steps).float().mean()) for steps in (1, 2)],
        "s1_ratio": [min(ratios), max(ratios)],
        "machine": f"{machine}, torch {torch.__version__}"}


def same_run(record: dict, study: str, name: str, task, config: ReconstructionConfig) -> bool:
    """Whether a record is of this run, on whatever device. Settings that came later had their
    defaults; a record of settings that are gone is another run's."""
    if any(record[key] != value for key, value in (
            ("study", study), ("network", name), ("about", task.about),
            ("samples", len(task.calibration)))):
        return False
    try:
        then = ReconstructionConfig(**record["config"])
    except TypeError:
        return False
    return replace(then, device=None, cache_device=None) == replace(config, device=None,
                                                                    cache_device=None)


def read_results(path) -> list[dict]:
    """The runs of a results file, one JSON a line; none where there is no file. A last line that
    was cut off is left out with a warning: that run is made again."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    records = []
    for i, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if i < len(lines) - 1:
                raise ValueError(f"{path}: line {i + 1} is no JSON ({error})") from error
            warnings.warn(f"{path}: its last line is cut off", stacklevel=2)
    return records


def append_result(path, record: dict) -> None:
    """Write a run as a line of its own, also where the last line was cut off: that one goes."""
    text = Path(path).read_text() if Path(path).exists() else ""
    if text and not text.endswith("\n"):
        whole, _, last = text.rpartition("\n")
        try:
            json.loads(last)
            Path(path).write_text(text + "\n")
        except ValueError:
            Path(path).write_text(whole + "\n" * bool(whole))
    with open(path, "a") as out:
        out.write(json.dumps(record) + "\n")


def table(records: list[dict]) -> str:
    """Runs as a Markdown table: networks and bits down, methods and settings across (the other way
    round where these are many); the median over seeds, in brackets the least and the greatest
    where they differ, and the median of the seconds. A setting is named where it varies and is not
    the default.
    """
    seen = {}                                                        # of each method's settings
    for config in (r["config"] for r in records):
        for key, value in config.items():
            seen.setdefault((config["method"], key), set()).add(str(value))
    hidden = ("method", "bits", "abits", "seed", "batch_size", "device", "cache_device",
              "layer_bits")
    cells, full, columns = {}, {}, {}
    for record in records:
        config = record["config"]
        settings = [f"{k} {v}" for k, v in config.items() if k not in hidden and (
            k == "lr" and v is not None or len(seen[config["method"], k]) > 1
            and v != getattr(ReconstructionConfig, k))]
        abits = f"A{config['abits']}" if config.get("abits") else ""
        row = f"{record['network']} | W{config['bits']}{abits}"
        full.setdefault(row, []).append(record["full"])              # of other images with each
        #                                                              seed where the split is train
        column = ", ".join([NAMES[config["method"]], *settings])
        columns[column] = None                                       # in the order of the records
        cells.setdefault((row, column), []).append(record)

    def cell(runs):
        if not runs:
            return ""
        scores, seconds = zip(*((r["score"], r["seconds"]) for r in runs), strict=True)
        least, middle, most = (f"{f(scores):.2f}" for f in (min, statistics.median, max))
        spread = f"{least} to {most}; " if least != most else ""
        return f"{middle} ({spread}{statistics.median(seconds):.0f} s)"

    rows = {row: f"{row} | {statistics.median(scores):.2f}" for row, scores in full.items()}
    if len(columns) <= 7:
        lines = [["network | bits | full precision", *columns]] + [
            [head, *(cell(cells.get((row, c))) for c in columns)] for row, head in rows.items()]
    else:
        lines = [["network, bits, full precision",
                  *(head.replace(" |", ",") for head in rows.values())]] + [
            [c, *(cell(cells.get((row, c))) for row in rows)] for c in columns]
    rule = "|---" * (" | ".join(lines[0]).count(" | ") + 1) + "|"
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, rule, *body])


def peak_memory(device: str) -> str:
    """The most memory that this process has used so far: a GPU's as torch counts it, else RAM."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e6:,.0f} MB on {device}"
    try:
        import resource
    except ImportError:                                              # Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024                   # bytes there, else kilobytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:,.0f} MB of RAM"


def main(arguments=None) -> None:
    """Quantize each network at each number of bits with each method and seed; print the table."""
    import models

    args = parser().parse_args(arguments)
    settings = {f.name: getattr(args, f.name) for f in fields(ReconstructionConfig)
                if f.name != "layer_bits"}
    settings["end_bits"] = args.end_bits or None
    if args.batch_size is None:                                      # the task's, below
        del settings["batch_size"]

    def rate(method):
        given = args.lr if args.lr is not None or args.optimizer == "sgd" else \
            DEFAULT_LR.get(method)
        return None if method == "rtn" else given

    configs = [ReconstructionConfig(**{**settings, "method": method, "bits": bits, "seed": seed,
                                       "lr": rate(method)})
               for bits in dict.fromkeys(args.bits) for method in dict.fromkeys(args.method)
               for seed in dict.fromkeys(args.seed)]
    if args.time:
        return print_times(models, args.device, args.precision)
    if (args.save and (len(args.model), len(configs)) != (1, 1)) or (
            args.load and (len(args.model) != 1 or args.save)):
        raise ValueError("--save takes one each of --model, --method, --bits and --seed, and "
                         "--load one --model without --save")
    for flag in ("device", "cache_device"):
        try:
            torch.empty(0, device=getattr(args, flag))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: "
                             f"{str(error).splitlines()[0]}") from error
    for flag in ("save", "results"):
        path = args.save if flag == "save" else args.study and args.results
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--{flag} {path}: there is no such folder")
    tasks = {(name, seed): models.load_task(
        name, args.data, args.checkpoint, args.cache, args.split, args.samples, seed, args.rescale)
        for name in args.model for seed in args.seed}
    if args.load:
        task = tasks[args.model[0], args.seed[0]]
        print(f"{args.load}: {proof(load_quantized(task.net, args.load).to(args.device), task)}")
        return

    grid = f"{'symmetric' if args.symmetric else 'asymmetric'}, per " + \
        ("channel" if args.per_channel else "tensor")
    print(f"{grid} grid, p = {args.p}, {args.iterations} iterations a block, seed "
          f"{', '.join(map(str, args.seed))}; torch {torch.__version__} on {args.device}, "
          f"{torch.get_num_threads()} threads, {platform.machine()}")
    full = {}
    for (name, seed), task in tasks.items():
        if seed == args.seed[0] or args.split == "train":            # there it has its own images
            full[name, seed] = task.score(task.net.to(args.device))
            task.net.cpu()                                           # from now on block by block
        full.setdefault((name, seed), full[name, args.seed[0]])
        if seed != args.seed[0]:
            continue
        bits = {f"{i}.{n}": b for i, layers in enumerate(plan(task.net.blocks, configs[0]))
                for n, b in layers.items()}
        ends = [n for n, b in bits.items() if args.end_bits and b == args.end_bits]
        last = int(list(bits)[-1].split(".")[0])                     # nothing behind it is cached
        most = [task.net.blocks.get_submodule(n).weight.detach().flatten(1).abs().amax(1)
                for n in bits]                                       # of each output channel
        unequal = [float(m.max() / m.median()) for m in most]
        print(f"{name}: {task.about}; {len(bits)} layers, at {args.end_bits} bits {ends}; the "
              f"largest channel of a layer is {min(unequal):.1f} to {max(unequal):.1f} times its "
              f"median; {len(task.calibration)} calibration inputs, cached activations at most "
              f"{cache_bytes(task.net.blocks[:last + 1], task.calibration, configs[0]) / 1e6:,.1f}"
              " MB")
    records, made = [], 0
    earlier = read_results(args.results) if args.study else []
    for name in args.model:
        row = name if args.rescale == 1 else f"{name}, channels x {args.rescale:g}"
        for config in configs:
            task = tasks[name, config.seed]
            if args.batch_size is None:
                config = replace(config, batch_size=task.batch_size)
            about = (f"W{config.bits}{f'A{config.abits} {config.setting}' if config.abits else ''} "
                     f"{NAMES[config.method]}, seed {config.seed}")
            known = [r for r in earlier if same_run(r, args.study, row, task, config)]
            if known and not args.save:
                records.append(known[0])
                continue
            try:
                net, record = one_run(row, task, config, full[name, config.seed])
            except FloatingPointError as error:                      # the others go on
                print(f"{row} {about}: {error}", file=sys.stderr)
                continue
            records.append(record)
            made += 1
            if args.study and not known:
                append_result(args.results, {"study": args.study, **record})
            took = record["block_seconds"]
            print(f"{row} {about}: {record['score']:.2f} ({record['seconds']:.0f} s; a block "
                  f"{statistics.median(took):.1f}, at most {max(took):.1f})", flush=True)
            if args.save:
                print(f"{args.save}: {save_quantized(net, args.save):,} bytes, in float32 "
                      f"{sum(4 * p.numel() for p in task.net.parameters()):,}; {proof(net, task)}")
    if records:
        print(f"\n{table(records)}")
    if made < len(records):
        print(f"\n{len(records) - made} of these {len(records)} runs were not made now but taken "
              f"from {args.results}; --results names another file")
    print(f"\nPeak memory: {peak_memory(args.device)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        sys.exit(f"reconstruct.py: {problem}")
    except KeyboardInterrupt:
        sys.exit("reconstruct.py: stopped; with --study the same command goes on from here")
