"""Block-by-block reconstruction: how FlexRound's factors (and its rivals') are learned.

The objective of section 3.1, one block at a time, over a few calibration inputs:

    minimise  || block(X) - block_hat(X_tilde) ||^2    over s1, S2, s3, s4

    X        x_fp   the block's input when every earlier block is full precision
    X_tilde  x_q    the block's input when every earlier block is quantized
             y_fp   block(X), the target: taken before the block's layers are quantized

So the whole driver, one_pass below, is this loop:

    x_fp = x_q = calibration inputs
    for block in blocks:
        y_fp = block(x_fp)
        quantize the block's layers                    # flexround.quantize_layers: round to nearest
        reconstruct_block(block, x_q, y_fp, config)    # learn the factors
        x_fp, x_q = y_fp, block(x_q)

Why X_tilde. In use, a block gets what the quantized blocks before it return. When it learns on
these inputs, it can mend a part of the errors that they made. The target stays the full-precision
output on the full-precision input.

Why blocks. A block is a part of the network that is tied together inside, such as a residual block
or a transformer block. If we learned each layer alone, no layer could make up for another one's
error. If we learned the whole network at once, a few hundred inputs would not be enough.

How we differ from the paper and from the authors' code, and why

- We evaluate the start and four later states on all calibration inputs, and keep the best. So the
  result is never worse than round to nearest there.
- All methods share the optimizer (Adam, cosine decay to 0), the iterations and the batches. Rates,
  and what only one method has, are each method's own, and we searched all of them. The paper uses
  BRECQ's settings for AdaRound and AdaQuant.
- The paper states neither the loss's reduction nor the rate's schedule. We follow the authors'
  code. But it always sums over dim 1, which for a GPT is the tokens: see block_loss.
"""
import argparse
import copy
import math
import multiprocessing
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import flexround
from flexround import METHODS, code_range, input_quantizers, quantizable_layers, quantizers

STEP_LR = 4e-4           # first rate of activations' steps. Section 4: 4e-4 in B, 4e-5 in Q
QDROP = 0.5              # section 4: with this probability setting Q keeps a float value
START_INPUTS = 64        # calibration inputs that start = "outputs" looks at


# ---- Settings and results ------------------------------------------------------------------------

@dataclass(frozen=True)
class ReconstructionConfig:
    """All settings of a reconstruction. A ValueError names the one that is not allowed."""

    method: str = "flexround"        # a key of flexround.METHODS
    bits: int = 4                    # bits of a weight, 2 to 8. The paper's CNNs: 4, 3 and 2
    symmetric: bool = True           # the grid. In the paper it is symmetric for CNNs only
    per_channel: bool = False        # an s1 for each output channel. In the paper LLaMA only
    start: str = "weights"           # s1 starts at the least error of "weights" or of "outputs"
    p: float = 2.0                   # exponent of the weights' error. The paper's is 2
    learn_s1: bool = True            # FlexRound only. False is ablation 1 of Table 1
    use_s3_s4: bool = True           # FlexRound only. False is ablation 2 of Table 1
    iterations: int = 1000           # for each block. The paper: 500 (GPTs) to 20,000 (GLUE)
    batch_size: int = 32             # inputs in an iteration. BRECQ's for CNNs is 32
    lr: float | None = None          # first rate. None: the method's default_lr
    s1_lr: float | None = None       # first rate of log s1. None: the method's default, or as lr
    reg_weight: float | None = None  # AdaRound only. None: its default_reg_weight
    seed: int = 0                    # decides batches, what is dropped, what a rule draws
    input_drop: float = 0.0          # share of X in a block's input, the rest is X_tilde (B only)
    channel_dim: int | None = None   # the channels of a block's output. None: see block_loss
    abits: int | None = None         # bits of each quantized layer's input. None: it stays float
    setting: str = "B"               # with abits. B: weights, then steps. Q: both at once, QDrop
    step_lr: float | None = None     # first rate of a step's logarithm. None: STEP_LR
    end_bits: int | None = 8         # bits of the first and the last layer. None: as the others
    device: str | None = None        # blocks compute there in turn. None: where the first one is
    cache_device: str | None = None  # holds the activations. None: the device that computes
    cuda_graph: bool = False         # on CUDA, record the gradients once: see recorded

    def __post_init__(self):
        def need(name, fits, allowed):
            if not fits(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)!r}: {allowed} is allowed")

        def positive(value):
            return value is None or 0 < value < math.inf

        def whole(least):
            return lambda value: type(value) is int and least <= value < 2 ** 32

        need("method", lambda value: value in METHODS, " or ".join(METHODS))
        need("start", lambda value: value in ("weights", "outputs"), "weights or outputs")
        need("setting", lambda value: value in ("B", "Q"), "B or Q")
        need("input_drop", lambda value: 0 <= value <= 1, "a probability from 0 to 1")
        need("channel_dim", lambda value: value is None or type(value) is int and value != 0,
             "an integer other than 0, which is the dim of the inputs,")
        for name in ("p", "lr", "s1_lr", "reg_weight", "step_lr"):
            need(name, positive, "a positive number")
        need("iterations", whole(1), "an integer from 1 to 2^32 - 1")
        need("batch_size", whole(1), "an integer from 1 to 2^32 - 1")
        need("seed", whole(0), "an integer from 0 to 2^32 - 1")
        code_range(self.bits, self.symmetric, "bits")
        if self.end_bits is not None:
            code_range(self.end_bits, self.symmetric, "end_bits")
        if self.abits is not None:
            code_range(self.abits, self.symmetric, "abits")
        elif self.setting != "B" or self.step_lr is not None:
            raise ValueError(f"setting = {self.setting!r}, step_lr = {self.step_lr}: need abits")
        if self.joint and self.input_drop not in (0, QDROP):
            raise ValueError(f"input_drop = {self.input_drop}: setting Q takes {QDROP}")

    @property
    def joint(self) -> bool:
        """Whether steps are learned together with weights, and activations dropped: setting Q."""
        return self.abits is not None and self.setting == "Q"

    @property
    def drop(self) -> float:
        """The probability that an element of a block's input is the full-precision one."""
        return QDROP if self.joint else self.input_drop

    def block_seed(self, index: int) -> int:
        """Each block has a seed of its own."""
        return 1000 * self.seed + index

    def default(self, knob: str):
        """The value of "lr", "s1_lr" or "reg_weight": as set, else the method's own default. A
        method without a rate for log s1 learns it with lr."""
        value = getattr(self, knob)
        if value is None:
            value = getattr(METHODS[self.method], f"default_{knob}")
        if value is None and knob == "s1_lr":
            value = self.default("lr")
        return value


@dataclass
class BlockReport:
    """What became of one block. Losses are block_loss on all of x_q, with hard codes, except those
    of history."""

    index: int                               # the block's place in the list
    bits: dict[str, int]                     # of each quantized layer, by its name in the block
    start_loss: float                        # of round to nearest, or of B's steps before learning
    final_loss: float                        # of the state that was kept, the smallest evaluation
    best_iteration: int                      # when that was. 0 is the start
    evaluations: list[tuple[int, float]]     # (iterations done, loss): start, then each quarter
    history: list[float]                     # of each batch, with AdaRound's regulariser
    seconds: float
    abits: dict[str, int] = field(default_factory=dict)    # of each quantized layer's input

    def __str__(self):
        line = f"loss {self.start_loss:.3g} -> {self.final_loss:.3g} in {self.seconds:.1f} s"
        done = len(self.history)
        if done > 0 and self.best_iteration == 0:
            return f"{line}: no gain, try a smaller rate"
        if self.best_iteration < done:
            return f"{line}, kept the state after {self.best_iteration} of {done} iterations"
        return line


# ---- One block -----------------------------------------------------------------------------------
#
# The order is: what the loss is, which parameters learn, how one iteration runs, and how we decide
# which state is kept.

def block_loss(y: Tensor, y_fp: Tensor, channel_dim: int | None = None) -> Tensor:
    """The squared error, summed over channels and averaged over the rest. Returns a scalar.

    channel_dim says which dim the channels are. None is dim 1 of a convolution's (N, C, H, W), and
    the last dim of anything else, such as (N, C) or a GPT's (B, T, C). An output (N,) has no
    channels, and the mean is all. For other orders, such as (N, H, W, C) or (N, C, L), pass it.
    ValueError where the shapes differ.
    """
    if y.shape != y_fp.shape:
        raise ValueError(f"the block returns {tuple(y.shape)}, its target has {tuple(y_fp.shape)}")
    if channel_dim is None:
        channel_dim = 1 if y.dim() == 4 else -1
    channels = 1 if y.dim() == 1 else y.shape[channel_dim]
    # Under autocast a block returns half precision. Its squares could overflow.
    if y.dtype in (torch.float16, torch.bfloat16):
        y, y_fp = y.float(), y_fp.float()

    # mse_loss is the mean over all elements. Times the number of channels, it is the sum over
    # channels and the mean over inputs and positions. The factor moves no minimum, and Adam divides
    # it out. We keep it because printed losses can then be compared with those of other code.
    return F.mse_loss(y, y_fp) * channels


def device_of(blocks) -> torch.device:
    """The device of the first parameter. The CPU where there is none."""
    for p in nn.ModuleList(blocks).parameters():
        return p.device
    return torch.device("cpu")


@torch.no_grad()
def put_back(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    """Overwrite parameters with values of an earlier state."""
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def learned_parameters(block: nn.Module, config: ReconstructionConfig) -> tuple[list, list]:
    """What is learned now, as two lists: the factors of weights, and the steps of activations.

    The factors are what the rule has: s1, S2, s3 and s4 of FlexRound, V and s1 of AdaQuant, V of
    AdaRound, nothing of round to nearest. The layers' biases are never learned.

    Setting B first learns the factors. In its second pass steps are in place, and it learns these.
    Setting Q learns both together. ValueError: the block holds other quantizers than config's.
    """
    kinds = {type(q) for q in quantizers(block).values()}
    if kinds != {METHODS[config.method]}:
        found = ", ".join(kind.__name__ for kind in kinds) or "no quantizers (see quantize_layers)"
        raise ValueError(f"the block holds {found}: {config.method} is needed, as config says")
    # A quantizer's parameters are its factors. What it only keeps, such as AdaRound's s1 or a
    # zero_point, is a buffer.
    factors, steps = [], []
    for q in quantizers(block).values():
        factors.extend(q.parameters())
    if config.method != "rtn" and config.abits is not None:
        for q in input_quantizers(block).values():
            steps.extend(q.parameters())

    # The weights of setting B are finished before its first step is placed. So if there are steps,
    # this is its second pass, and the factors stay as they are.
    if steps and not config.joint:
        factors = []
    return factors, steps


@contextmanager
def seeded(device: torch.device, seed: int):
    """Within, what torch draws on the CPU, and on device if it is CUDA, begins at seed. Afterwards
    your program's random numbers go on as if we had drawn none."""
    # CPU and CUDA have generators of their own. fork_rng puts the states back at the end.
    devices, generators = [], [torch.default_generator]
    if device.type == "cuda":
        devices = [device]
        generators.append(torch.cuda.default_generators[device.index])
    with torch.random.fork_rng(devices):
        for generator in generators:
            generator.manual_seed(seed)
        yield


@contextmanager
def learning(block: nn.Module, learned: list[nn.Parameter], seed: int):
    """Within, only `learned` requires a gradient, and the generator that drops values is seeded.

    Afterwards your parameters require a gradient again where they did, the quantizers are frozen,
    and the block is in eval mode.
    """
    # Quantizers are ours, and we freeze them at the end. All other parameters are yours: we note
    # which of them required a gradient, and give that back.
    own = set()
    for q in [*quantizers(block).values(), *input_quantizers(block).values()]:
        own.update(q.parameters())
    before = [(p, p.requires_grad) for p in block.parameters() if p not in own]

    block.requires_grad_(False)
    for p in learned:
        p.requires_grad_(True)
    try:
        with torch.enable_grad(), seeded(device_of([block]), seed):
            yield
    finally:
        for p, required in before:
            p.requires_grad_(required)
        for p in own:
            p.requires_grad_(False)
            p.grad = None
        block.eval()


def make_optimizer(block: nn.Module, factors: list, steps: list, config: ReconstructionConfig):
    """Adam with a first rate for each kind of parameter: log s1, other factors, activations' steps.

    The authors' code uses Adam with one rate. We searched the rate of log s1 on its own, because a
    step of s1 moves all weights of a layer at once.
    """
    s1s = []
    for q in quantizers(block).values():
        if q.learns_s1 and factors:
            s1s.append(q.log_s1)
    found = set(s1s)
    others = [p for p in factors if p not in found]

    # iterate reads "first" again in each iteration, because it lowers "lr" from there.
    rates = [(others, config.default("lr")), (s1s, config.default("s1_lr")),
             (steps, config.step_lr or STEP_LR)]
    groups = [{"params": p, "lr": rate, "first": rate} for p, rate in rates if p]
    return torch.optim.Adam(groups, fused=True)


def make_iteration(block: nn.Module, x_q: Tensor, y_fp: Tensor, config: ReconstructionConfig,
                   x_fp: Tensor | None = None, index: int = 0, start_loss: float = 1.0):
    """Return iterate(i), which runs iteration i (from 0) of a block and returns its batch's loss.

    The loss stays on the device as a scalar tensor, so that nothing waits for the device. The
    arguments are those of reconstruct_block, and start_loss, the loss before learning.
    """
    # First what all iterations share. iterate itself follows below.
    device, total = device_of([block]), config.iterations
    factors, steps = learned_parameters(block, config)
    optimizer = make_optimizer(block, factors, steps, config)

    # Each batch is a fresh draw from all inputs, so that no input is always seen together with the
    # same others. All methods draw the same batches: no method can be better because its batches
    # were easier.
    draw = torch.Generator().manual_seed(config.block_seed(index))
    batches = [torch.randperm(len(x_q), generator=draw)[:config.batch_size] for _ in range(total)]
    batches = torch.stack(batches).to(x_q.device)                    # (iterations, batch)

    # We descend the loss divided by what it was before learning. Adam is almost blind to the unit
    # of a loss, but its eps is not: if gradients were as small as eps, nothing would be learned.
    unit = start_loss or 1.0

    # Only AdaRound has a regulariser: a number from 0 to 1 for each weight, summed. We share its
    # coefficient out among the weights.
    regularised = [q for q in quantizers(block).values() if factors and hasattr(q, "regulariser")]
    reg_weight = 0.0
    if regularised:
        reg_weight = config.default("reg_weight") / sum(q.V.numel() for q in regularised)

    # In setting Q the inputs of layers are sometimes left unrounded: see flexround.LSQ.
    dropping = [q for q in input_quantizers(block).values() if q.drop > 0]

    def drawn(tensor, i):
        """Batch i of a tensor of all inputs, on the block's device."""
        return tensor.detach().index_select(0, batches[i].to(tensor.device)).to(device)

    def gradients(x, y, reg_weight, beta):
        """The loss of a batch. Its gradients go into .grad of all that is learned."""
        # The loss is the objective of section 3.1. To evaluate, reconstruct_block puts the block
        # into eval mode, and its own dropout and batch norm stay so. But here AdaRound has to be
        # soft and LSQ has to drop, which they do in train mode. The other rules have no modes. (A
        # replay runs no Python. It was recorded in train mode, so it is soft and drops.)
        for q in regularised + dropping:
            q.train()
        # Each layer computes W_hat from W and its factors, so that gradients reach the factors.
        loss = block_loss(block(x), y, config.channel_dim) / unit
        # AdaRound's soft start is W itself. In the first block, which gets the float inputs, the
        # loss is then 0, and its gradient is rounding noise. Adam would make whole steps of it,
        # different ones on each processor. So a loss that is only noise gets the gradient 0.
        loss = loss * (loss.detach() > torch.finfo(loss.dtype).eps)
        # AdaRound's regulariser pulls h to 0 or 1. The further beta falls, the more weights it
        # moves.
        for q in regularised:
            loss = loss + reg_weight * q.regulariser(beta)
        # backward() passes through round() (flexround.Round says how), and in FlexRound by the
        # reciprocal rule (flexround.Division).
        optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    if config.cuda_graph and device.type == "cuda":
        gradients = recorded(gradients, drawn(x_q, 0), drawn(y_fp, 0), 0.0, 1.0)

    def iterate(i):
        # 1. The rate. It falls to 0 along half a cosine: large steps first, to leave round to
        # nearest, and small ones at the end, so that the codes settle.
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * (1 + math.cos(math.pi * i / total)) / 2

        # 2. The batch: inputs behind quantized blocks, and what the float block made of float ones.
        x, y = drawn(x_q, i), drawn(y_fp, i)

        # 3. QDrop. Element by element and anew in each iteration, the input is the full-precision
        # one with this probability. The block then learns for both, and fits the errors of the
        # blocks before it less closely. These errors differ on inputs that it has not seen.
        if config.drop > 0:
            x = torch.where(torch.rand(x.shape, device=device) < config.drop, drawn(x_fp, i), x)

        # 4. The loss and its gradients, as above. The regulariser's share is 0 for the first fifth
        # of the iterations and 1 afterwards.
        share, beta = flexround.AdaRound.schedule(i / total)
        loss = gradients(x, y, share * reg_weight, beta)

        # 5. Adam's step.
        optimizer.step()
        return loss * unit

    return iterate


def recorded(step, *first):
    """step(*values) on CUDA, recorded once and replayed. Returns a function of new values.

    A small block computes faster than Python can launch its kernels. A CUDA graph replays all
    launches of a recorded call as one (experiments/RESULTS.md has the times). A replay runs no
    Python, and it reads and writes the memory of the recording. So new values are copied into the
    recorded ones, and what step decides or counts in Python stays as it was recorded. That is why
    config.cuda_graph is off by default. What torch draws on the GPU is new each time. The
    recording holds the memory of an iteration until the block is done.

    Args:
        step: runs four times here, so it may change nothing but gradients. It gets tensors only.
        first: values to record with, the first one a tensor. A number becomes a scalar tensor.

    Returns:
        A function that takes new values in the order of first. Each call fills the same tensor
        with its result and returns it. Or step itself, with a warning, if step waits for the
        device, as .item() does.

    Raises:
        RuntimeError: something else cannot be recorded. The attempt has spoiled the device's state.
    """
    device = first[0].device
    values = [value.clone() if isinstance(value, Tensor) else
              torch.tensor(value, dtype=torch.float64, device=device) for value in first]
    mode, graph = torch.cuda.get_sync_debug_mode(), torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.random.fork_rng([device]):
        # Torch needs some calls on another stream first. In the last of them we forbid step to wait
        # for the device. A step that waits would fail while we record, and the device with it.
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream), warnings.catch_warnings():
                warnings.simplefilter("ignore")                      # that the mode is a prototype
                step(*values)
                step(*values)
                torch.cuda.set_sync_debug_mode("error")
                step(*values)
        except RuntimeError as problem:
            warnings.warn("not recorded as a CUDA graph, so this block learns more slowly: "
                          f"{problem}", stacklevel=3)
            return step
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(stream)
        try:
            with torch.cuda.graph(graph, stream=stream):
                result = step(*values)
        except RuntimeError as problem:
            torch.cuda.set_stream(current)                           # else it stays the recording's
            raise RuntimeError("this block cannot be recorded as a CUDA graph: start Python again, "
                               f"with cuda_graph = False ({problem})") from problem

    def replay(*new):
        for value, other in zip(values, new, strict=True):
            if isinstance(other, Tensor):
                value.copy_(other)
            else:
                value.fill_(other)
        graph.replay()
        return result

    replay.step = step                                               # the graph uses its memory
    return replay


@torch.no_grad()
def evaluate(block: nn.Module, x: Tensor, y_fp: Tensor, config: ReconstructionConfig) -> float:
    """block_loss over all of x, a batch at a time. Returns a number, so it waits for the device."""
    device, total = device_of([block]), 0.0
    # Within cached() each weight is quantized once, not for each batch.
    with parametrize.cached():
        for xs, ys in zip(x.split(config.batch_size), y_fp.split(config.batch_size), strict=True):
            # A copy, because the block may work in place, as nn.ReLU(inplace=True) does.
            y = block(xs.to(device, copy=True))
            loss = block_loss(y, ys.to(device), config.channel_dim)
            # The last batch may be smaller: weigh each by its inputs. In float64, because the sum
            # over thousands of inputs decides which state is kept.
            total += len(xs) * loss.double()
    return float(total) / len(x)


def check_finite(history: list[float], loss: float, index: int, config) -> None:
    """FloatingPointError that names the first iteration whose loss is not finite."""
    wrong = [i for i, value in enumerate([*history, loss], 1) if not math.isfinite(value)]
    if wrong:
        when = "before training. Do its activations overflow?"
        if history:
            i = min(wrong[0], len(history))
            when = f"at iteration {i} of {config.iterations}: try a smaller lr"
        raise FloatingPointError(f"block {index}, {config.method}: the loss is not finite {when}")


def reconstruct_block(block: nn.Module, x_q: Tensor, y_fp: Tensor, config: ReconstructionConfig,
                      x_fp: Tensor | None = None, index: int = 0, progress=None) -> BlockReport:
    """Learn the factors of a block's quantizers, in place: descend block_loss(block(x_q), y_fp).

    Why the best of five states. At the start and after each quarter of the iterations we evaluate
    all of the calibration set, because single batches differ too much in difficulty. At the end we
    keep the state with the smallest loss. So a block never ends worse than it began.

    Why hard codes. We evaluate with the codes that will be stored. AdaRound learns with soft ones:
    while h is between 0 and 1 its loss can be small, and it may still be large once h is 0 or 1.

    Afterwards the block is in eval mode and its factors are frozen. We touch no other parameter.

    Args:
        block: a module with quantizers in place (flexround.quantize_layers).
        x_q: (N, ...) the block's inputs behind quantized blocks, X_tilde.
        y_fp: (N, ...) its full-precision outputs on full-precision inputs.
        config: see ReconstructionConfig, and learned_parameters for what is learned.
        x_fp: (N, ...) the full-precision inputs X. Needed where config.drop > 0.
        index: the block's place in the network. It seeds the batches and is named in errors.
        progress: called as progress(iterations done, last evaluated loss) after each iteration.

    Raises:
        FloatingPointError: a loss that is not finite. On any exception the factors have their old
            values.
        ValueError: other quantizers than config's, x_fp is missing, block(x_q) and y_fp differ in
            shape, or within parametrize.cached().
    """
    began = time.perf_counter()
    factors, steps = learned_parameters(block, config)
    learned = factors + steps
    # A cache of W_hat would hide from the block that its factors change.
    if learned and parametrize._cache_enabled:
        raise ValueError("within parametrize.cached() nothing can be learned: leave it first")
    if config.drop > 0 and x_fp is None:
        raise ValueError(f"x_fp is missing: with probability {config.drop} the full-precision "
                         "input is needed (input_drop, or setting Q)")
    if config.batch_size > len(x_q) and learned:
        warnings.warn(f"batch_size = {config.batch_size}, but there are only {len(x_q)} inputs",
                      stacklevel=2)

    # Round to nearest learns nothing. For it we only evaluate the start.
    total = config.iterations if learned else 0
    marks = {total * quarter // 4 for quarter in range(1, 5)}        # when to evaluate
    initial = [p.detach().clone() for p in learned]

    # The losses of the batches stay on the device too. If we read each one, each iteration would
    # wait for the device. We read all of them at the marks, where evaluate waits anyway.
    history = torch.zeros(total, dtype=torch.float64, device=device_of([block]))

    with learning(block, learned, config.block_seed(index)):
        try:
            # The start: all factors as they were placed, so the rule is round to nearest. It is the
            # first candidate. In eval mode codes are hard, and nothing drops.
            block.eval()
            loss = evaluate(block, x_q, y_fp, config)
            check_finite([], loss, index, config)
            evaluations = [(0, loss)]
            best, best_loss, best_iteration = initial, loss, 0
            if learned:
                iterate = make_iteration(block, x_q, y_fp, config, x_fp, index, loss)

            for done in range(1, total + 1):
                history[done - 1] = iterate(done - 1)

                # At the marks: evaluate as in use, and remember the state if it is the best yet.
                if done in marks:
                    block.eval()
                    loss = evaluate(block, x_q, y_fp, config)
                    check_finite(history[:done].tolist(), loss, index, config)
                    evaluations.append((done, loss))
                    if loss < best_loss:
                        best = [p.detach().clone() for p in learned]
                        best_loss, best_iteration = loss, done
                if progress is not None:
                    progress(done, loss)
        except BaseException:                                        # an interrupt as well
            put_back(learned, initial)
            raise
    put_back(learned, best)
    return BlockReport(index, bits_in_place(quantizers(block)), evaluations[0][1], best_loss,
                       best_iteration, evaluations, history.tolist(), time.perf_counter() - began,
                       bits_in_place(input_quantizers(block)))


def bits_in_place(found: dict[str, nn.Module]) -> dict[str, int]:
    """The bits of quantizers, by the name of their layer."""
    return {name: q.bits for name, q in found.items()}


# ---- Before any work: which layers, how many bits, what we refuse --------------------------------
#
# Section 3 goes on at `run`, and you may skip to it. These functions are for readers who bring
# their own network: a run of an hour should not end with an error that was there from the start.

def bits_of_layers(blocks, bits: int, end_bits: int | None, skip=()) -> list[dict[str, int]]:
    """How many bits each layer gets: for each block a dictionary from layer name to bits.

    The first layer of the first block and the last layer of the last block get end_bits (section
    4 of the paper: 8), unless it is None. skip: names "<block>.<layer>" that stay float.
    """
    layers = quantizable_layers(nn.ModuleList(blocks), skip)         # "<block>.<layer>", or
    found = [{} for _ in blocks]                                     # "<block>" for a bare layer
    for full_name in layers:
        index, _, name = full_name.partition(".")
        found[int(index)][name] = bits
    if end_bits is not None:
        first, last = list(found[0]), list(found[-1])
        if first:
            found[0][first[0]] = end_bits
        if last:
            found[-1][last[-1]] = end_bits
    return found


def check_call(calibration: Tensor) -> None:
    """ValueError: what would go wrong with any network."""
    if not isinstance(calibration, Tensor):
        raise ValueError(f"calibration is a {type(calibration).__name__}: one Tensor, (N, ...), "
                         "is allowed")
    if len(calibration) == 0 or not torch.isfinite(calibration).all():
        raise ValueError("calibration is empty or holds NaN or infinity")
    if torch.is_inference_mode_enabled():
        raise ValueError("within torch.inference_mode() nothing can be learned: leave it first")


def check_network(blocks, calibration: Tensor, config: ReconstructionConfig, skip=()) -> None:
    """Find what would fail, or would silently go wrong, before any work is done. blocks are float.
    ValueError: what is not allowed, by block or layer."""
    check_call(calibration)
    model = nn.ModuleList(blocks)
    modules = dict(model.named_modules())                            # a module is named only once
    known = [name for name, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)]
    for name in skip:
        if name not in known:
            raise ValueError(f"skip names {name!r}: the layers are {known}")
    layers = quantizable_layers(model, skip)
    if not layers:
        raise ValueError("nothing to quantize: no block has an nn.Linear or an nn.Conv2d")
    for name, layer in layers.items():
        flexround.check_weight(layer.weight, f"layer {name!r}: W")
    for i, block in enumerate(blocks):
        for name, module in block.named_modules():
            full_name = f"{i}.{name}".rstrip(".")                    # a bare layer's name is ''
            if module in layers.values() and full_name not in layers:
                raise ValueError(f"layer {name!r} of block {i} is in an earlier block as well")
    learned = bits_of_layers(blocks, config.bits, None, skip)
    last = max(i for i, own in enumerate(learned) if own)            # nothing behind it is run
    x = calibration[:2].to(device_of(blocks))
    for i, block in enumerate(blocks[:last + 1]):
        own = list(learned[i]) if config.method != "rtn" else []
        x = check_block(copy.deepcopy(block).eval(), x, i, own)


def check_block(block: nn.Module, x: Tensor, index: int, learned: list[str]) -> Tensor:
    """check_network for one block, a copy, on x of one or two inputs. Returns block(x).

    We run it on the first input, on both, and on the first again. Its output for the first has to
    be the same each time, because we cut batches along dim 0 and draw them at random. And a
    gradient has to reach at least one of the layers that are learned.
    """
    with torch.no_grad():
        y = block(x[:1].clone())
        if not isinstance(y, Tensor) or y.shape[:1] != (1,) or not torch.isfinite(y).all():
            raise ValueError(f"block {index} returns {type(y).__name__} {getattr(y, 'shape', '')}: "
                             "for one input a finite tensor with one row is needed")
        both = block(x.clone())
        again = block(x[:1].clone())
    eps = torch.finfo(y.dtype).eps if y.is_floating_point() else 0.0
    noise = eps ** 0.5 * y.abs().max()                               # kernels depend on the shape
    alike = both.shape[:1] == x.shape[:1] and (both[:1] - y).abs().max() <= noise
    if not alike or (again - y).abs().max() > noise:
        raise ValueError(f"block {index} returns something else for an input when another one is "
                         "beside it or was there before it: dim 0 has to be the inputs (batch "
                         "first), and a block has to depend on its input alone, row by row")
    if learned:
        weights = [block.get_submodule(name).weight.requires_grad_() for name in learned]
        with torch.enable_grad():
            y = block(x[:1].clone())
        reached = [None]
        if y.requires_grad:
            reached = torch.autograd.grad(y.sum(), weights, allow_unused=True)
        if all(gradient is None for gradient in reached):
            raise ValueError(f"block {index}: no gradient reaches its weights {learned} (no_grad, "
                             "detach, or layers that it does not call in eval mode)")
    return both


def warn_of_float_weights(blocks, skip=()) -> None:
    """Warn of weights that stay float, where somebody might expect otherwise: batch norm, and what
    is neither a layer that we quantize or skip nor an embedding, if it is more than 3 % of all
    parameters."""
    model = nn.ModuleList(blocks)
    known = {id(layer.weight) for layer in quantizable_layers(model, skip).values()}
    norms = []
    for name, module in model.named_modules():
        if name in skip or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            known.update(map(id, module.parameters()))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            norms.append(name)
    left = {name: p.numel() for name, p in model.named_parameters()
            if p.dim() > 1 and id(p) not in known}
    share = sum(left.values()) / sum(p.numel() for p in model.parameters())
    if share > 0.03:
        warnings.warn(f"{share:.0%} of the parameters stay float, the largest is "
                      f"{max(left, key=left.get)}: we quantize nn.Linear and nn.Conv2d",
                      stacklevel=3)
    if norms:
        warnings.warn(f"batch norm stays float: {norms}. Fold it first: models.fold_batchnorm",
                      stacklevel=3)


def warn_of_end_bits(blocks, bits: list[dict[str, int]], config: ReconstructionConfig) -> None:
    """Warn where the first or the last block has no parameters, so that no layer of it can get
    end_bits, or where all layers get them."""
    if config.end_bits is None:
        return
    for i in (0, len(blocks) - 1):
        if not list(blocks[i].parameters()):
            warnings.warn(f"end_bits skips block {i}, no weight: join it to one", stacklevel=3)
    used = set().union(*(layers.values() for layers in bits))
    for name in ("bits", "abits"):
        asked = getattr(config, name)
        if used == {config.end_bits} and asked not in (None, config.end_bits):
            warnings.warn(f"no layer is left at {name} = {asked}: {bits}. end_bits = None makes no "
                          "exception of the first and the last", stacklevel=3)


def leave_out_done(blocks, bits: list, abits: list, config: ReconstructionConfig) -> None:
    """Empty the entries of bits and abits whose blocks an interrupted call has learned already, so
    that one_pass only runs these blocks. ValueError: quantizers of another method, grid or number
    of bits than config's, or not frozen."""
    done = []
    grid = (METHODS[config.method], config.symmetric, config.per_channel)
    for i, block in enumerate(blocks):
        own, rounded = quantizers(block), input_quantizers(block)
        if not own and not rounded:
            continue
        grids = {(type(q), q.symmetric, q.per_channel) for q in own.values()}
        fresh = any(p.requires_grad for p in nn.ModuleList(own.values()).parameters())
        as_asked = bits_in_place(own) == bits[i] and grids == {grid} and not fresh
        as_asked &= bits_in_place(rounded).items() <= abits[i].items()
        as_asked &= bool(rounded) or not config.joint                # Q learns both together
        if not as_asked:
            raise ValueError(f"block {i} is quantized already, and not as config says: give a "
                             "float network (flexround.fold(block, keep=False) makes it one)")
        bits[i] = {}
        if rounded:
            abits[i] = {}
        done.append(i)
    warnings.warn(f"blocks {done} are quantized already: we keep them and go on", stacklevel=3)


class Clock:
    """Says on stderr how far we are: a line a block, in a long block one every ten seconds."""

    def __init__(self, iterations: int, show: bool):
        self.total = iterations                                      # of all blocks and passes
        self.show = show
        self.done = 0
        self.began = self.spoken = time.perf_counter()

    def say(self, line: str) -> None:
        self.spoken = time.perf_counter()
        left = (self.spoken - self.began) * (self.total / max(self.done, 1) - 1)
        if self.show:
            print(f"{line} (about {max(left, 0):.0f} s left)", file=sys.stderr, flush=True)

    def iteration(self, i: int, loss: float) -> None:
        self.done += 1
        if time.perf_counter() - self.spoken > 10:
            self.say(f"iteration {i}, last evaluated loss {loss:.3g}")

    def block(self, report: BlockReport) -> None:
        self.say(f"block {report.index}, bits {report.bits}: {report}")


# ---- A network: block after block ----------------------------------------------------------------

@torch.no_grad()
def run(block: nn.Module, x: Tensor, batch_size: int, device, cache_device) -> Tensor:
    """block(x) for all of x, a batch at a time. The result is on cache_device.

    A whole calibration set at once would need too much memory inside the block. Its outputs alone
    usually fit. If they do not, use cache_device = "cpu".
    """
    outputs = []
    with parametrize.cached():                                       # quantize each weight once
        for xs in x.split(batch_size):
            y = block(xs.to(device, copy=True))                      # it may work in place
            outputs.append(y.to(cache_device))
    return torch.cat(outputs)


def place_quantizers(block: nn.Module, x_q: Tensor, x_fp: Tensor, config: ReconstructionConfig,
                     bits: dict[str, int], abits: dict[str, int]) -> None:
    """Put quantizers on the weights of the layers in bits, and on the inputs of those in abits.

    Afterwards the block computes with W_hat in place of W. At first that is round to nearest.
    """
    device = device_of([block])
    # Activations first: their steps start from inputs that no new W_hat has changed. The first
    # batch decides the step, and all batches whether a sign is needed. New LSQs are in train mode.
    # In eval mode they drop nothing while quantize_layers runs the block.
    if abits:
        batches = (xs.to(device) for xs in x_q.split(config.batch_size))
        drop = QDROP if config.joint else 0.0
        flexround.quantize_inputs(block, next(batches), abits, config.symmetric, config.p, drop,
                                  batches)
        block.eval()
    # Then weights. start = "outputs" compares what a layer returns with W_hat and with W. We do
    # that on float inputs, so that the start does not depend on the blocks before.
    if bits:
        skip = {name for name, _ in block.named_modules() if name not in bits}
        flexround.quantize_layers(block, config, bits, skip, x_fp[:START_INPUTS].to(device))


@contextmanager
def moved(device: torch.device, home: torch.device, *modules: nn.Module):
    """Within, the modules are on device. Afterwards they are home, also after an exception. So a
    GPU has to hold one block at a time, and not the network."""
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module in modules:
            module.to(home)


@contextmanager
def undone_on_failure(block: nn.Module, weights: bool):
    """After an exception within, remove what place_quantizers has placed: steps, and if weights is
    True the rules. So a block is learned as a whole or not at all, and if you call quantize_model
    again it continues at this block."""
    try:
        yield
    except BaseException:                                            # an interrupt as well
        flexround.remove_input_quantizers(block)
        if weights:
            flexround.fold(block, keep=False)
        raise


def one_pass(blocks, floats, calibration: Tensor, config: ReconstructionConfig,
             bits: list[dict[str, int]], abits: list[dict[str, int]], clock) -> list[BlockReport]:
    """The loop at the head of this file: once through all blocks, in place.

    floats are the same blocks in full precision, for the targets. They may be the blocks
    themselves, because we take a block's target before we quantize it. bits and abits say for each
    block which weights and which inputs are quantized in this pass. A block that has neither, {},
    is only run.
    """
    home = device_of(blocks)
    device = torch.device(config.device or home)
    cache = torch.device(config.cache_device or device)
    reports = []

    # Two streams of activations run through the network side by side. x_fp has seen no quantized
    # block, x_q has seen only quantized ones. In front of the first block they are the same.
    x_fp = x_q = calibration.detach().to(cache)
    for i, block in enumerate(blocks):
        block.eval()
        floats[i].eval()
        with moved(device, home, block, floats[i]):
            # The target comes first, before we quantize the block (it may be floats[i] itself).
            y_fp = run(floats[i], x_fp, config.batch_size, device, cache)

            # Learn on x_q: what this block will get in use, the errors of earlier blocks included.
            if bits[i] or abits[i]:
                with undone_on_failure(block, weights=bool(bits[i])):
                    with seeded(device_of([block]), config.block_seed(i)):    # a rule may draw
                        place_quantizers(block, x_q, x_fp, config, bits[i], abits[i])
                    report = reconstruct_block(block, x_q, y_fp, config, x_fp, i, clock.iteration)
                for q in input_quantizers(block).values():
                    q.drop = 0.0                     # not even if you call net.train() later
                reports.append(report)
                clock.block(report)

            # Both streams move on: one through the float block, which is the target that we have,
            # the other through the block with what it has learned.
            x_fp, x_q = y_fp, run(block, x_q, config.batch_size, device, cache)
    return reports


def quantize_model(blocks, calibration: Tensor, config: ReconstructionConfig, show: bool = True,
                   skip=()) -> list[BlockReport]:
    """Quantize a network block after block, in place: the paper's method from end to end.

    Afterwards the factors are frozen and the blocks are in eval mode. flexround.fold makes the
    result permanent. Fold before you call net.train(), because in train mode AdaRound is soft.

    If a call was interrupted, call it again with the same arguments: it keeps the blocks that were
    learned and goes on behind them. The result is what it would have been.

    Args:
        blocks: a list or nn.ModuleList of Tensor -> Tensor modules which, one after the other, are
            the network. Fold batch norm first.
        calibration: (N, ...) inputs of the first block, on any device, in no particular order.
        config: see ReconstructionConfig.
        show: print a line for each block that learns, and in long blocks one every ten seconds,
            with the time left.
        skip: layers that stay float, by the name "<block>.<layer>".

    Returns:
        A report for each block that was learned. With abits, setting B has a second report for
        each block, of its steps (but not with rtn).

    Raises:
        ValueError: as check_network, or quantizers in place that are not config's. This comes
            before any work.
        FloatingPointError: a loss that is not finite. On any exception that block is as before, and
            the earlier ones stay quantized.
    """
    blocks = list(nn.ModuleList(blocks))
    model = nn.ModuleList(blocks)

    # weights alone; setting Q; round to nearest    one pass
    # abits in setting B                            two passes: first weights, then steps
    twice = config.abits is not None and not config.joint and config.method != "rtn"

    # Targets come from a float network. In one pass that is the network itself, because each block
    # is still float when we take its target. In a second pass, or after an interrupted call, blocks
    # are quantized already. Then we need a copy without its quantizers.
    floats = blocks
    if twice or quantizers(model):
        floats = copy.deepcopy(blocks)
        flexround.fold(nn.ModuleList(floats), keep=False)

    # Errors and warnings come before any work.
    check_network(floats, calibration, config, skip)
    warn_of_float_weights(floats, skip)

    # For each block, which layers get how many bits, and which layers' inputs.
    nothing = [{} for _ in blocks]
    bits = bits_of_layers(floats, config.bits, config.end_bits, skip)
    abits = nothing
    if config.abits is not None:
        abits = bits_of_layers(floats, config.abits, config.end_bits, skip)
    warn_of_end_bits(floats, bits, config)
    last = max(i for i, layers in enumerate(bits) if layers)         # nothing behind it is run
    if quantizers(model):
        leave_out_done(blocks, bits, abits, config)

    passes = [(bits, abits)]
    turns = sum(map(bool, bits))                                     # of blocks that learn
    if twice:
        passes = [(bits, nothing), (nothing, abits)]
        turns += sum(map(bool, abits))
    clock = Clock(turns * config.iterations, show and config.method != "rtn")
    reports = []
    for weights, inputs in passes:
        reports += one_pass(blocks[:last + 1], floats, calibration, config, weights, inputs, clock)
    model.eval()
    return reports


# ---- The main job --------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = flags.add_argument
    add("--model", nargs="+", default=["resnet", "mobilenet", "gpt"],
        help="resnet, mobilenet (digits), gpt (characters), resnet20 (CIFAR-10, needs --data)")
    add("--method", nargs="+", default=list(METHODS), help="keys of flexround.METHODS")
    add("--bits", nargs="+", type=int, default=[2], help="of a weight, 2 to 8")
    add("--abits", type=int, help="of each layer's input, 2 to 8. None: weights only")
    add("--setting", default="B", help="with --abits: B or Q")
    add("--start", default="outputs", help="of s1: the least error of the outputs or the weights")
    add("--iterations", type=int, default=250, help="per block. The paper's CNNs: 5,000")
    add("--lr", type=float, help="first rate. None: each method's default_lr")
    add("--seed", type=int, default=0, help="of the calibration inputs and of the batches")
    add("--data", help="resnet20: folder of CIFAR-10's binary files, maybe with the checkpoint")
    add("--networks", help="folder of the small trained networks. None: ours")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    return flags


def one_run(job) -> float:
    """Score one network with one config (None: full precision).

    On a CPU we compute in float64. Processors add up in different orders. In float32 the noise of
    that, about 1e-7, flips a rounding now and then, and training makes it larger. In float64 it is
    1e-16, and each processor finds the same codes.
    """
    import models
    config, name, options, device = job
    task = models.load_task(name, **options)
    if config is not None:
        config = replace(config, batch_size=task.batch_size)
        quantize_model(task.net.blocks, task.calibration, config, show=False)
    with parametrize.cached():                                       # quantize each weight once
        return task.score(task.net.to(device))


def main(arguments=None) -> None:
    """Score each network at each number of bits with each method, and print the table."""
    import models
    args = parser().parse_args(arguments)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no CUDA device here")
    cpu = args.device == "cpu"
    options = {"data": args.data, "networks": args.networks or models.NETWORKS, "seed": args.seed,
               "dtype": torch.float64 if cpu else torch.float32}
    configs = {}                                                     # first report wrong settings
    for bits in args.bits:
        for method in args.method:
            configs[bits, method] = ReconstructionConfig(
                method, bits, start=args.start, iterations=args.iterations, lr=args.lr,
                seed=args.seed, abits=args.abits, setting=args.setting, device=args.device,
                cuda_graph=True)                                     # no effect on a CPU
    for name in args.model:                                          # then missing files
        print(f"{name}: {models.load_task(name, **options).about}")

    # A row of the table is a network and its bits: full precision, then each method.
    rows = list(product(args.model, args.bits))
    jobs = []
    for name, bits in rows:
        jobs.append((None, name, options, args.device))
        jobs += [(configs[bits, method], name, options, args.device) for method in args.method]

    # The runs do not depend on each other. On a CPU we make them side by side, in processes of one
    # thread each. This takes the least time, and the number of cores then changes no result.
    workers = min(len(jobs), multiprocessing.cpu_count(), 8) if cpu else 1
    print(f"{len(jobs)} runs, {workers} at a time, {args.iterations} iterations for each block, "
          f"torch {torch.__version__} on {args.device}\n")
    titles = ["network", "bits", "full precision", *(METHODS[m].__name__ for m in args.method)]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|", flush=True)
    activations = f"A{args.abits}" if args.abits else ""
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        scores = pool.imap(one_run, jobs)                            # in the order of the jobs
        for count, (name, bits) in enumerate(rows, 1):
            own = [f"{next(scores):.2f}" for _ in range(1 + len(args.method))]
            print(f"| {name} | W{bits}{activations} | {' | '.join(own)} |", flush=True)
            left = (time.perf_counter() - began) * (len(rows) / count - 1)
            print(f"(about {left:.0f} s left)", file=sys.stderr, flush=True)
        pool.close()
        pool.join()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as problem:
        sys.exit(f"reconstruct.py: {problem}")
    except KeyboardInterrupt:
        sys.exit("reconstruct.py: stopped")
