"""Block-by-block reconstruction: how FlexRound's factors (and its rivals') are learned.

The objective of section 3.1, one block at a time, over a few calibration inputs:

    minimise  || block(X) - block_hat(X_tilde) ||^2    over s1, S2, s3, s4

    X        x_fp   the block's input when every earlier block is full precision
    X_tilde  x_q    the block's input when every earlier block is quantized
             y_fp   block(X), the target: taken before the block's layers are quantized

So the whole method, one_pass below, is this loop:

    x_fp = x_q = calibration inputs
    for block in blocks:
        y_fp = block(x_fp)
        quantize the block's layers                    # place_quantizers: round to nearest so far
        reconstruct_block(block, x_q, y_fp, config)    # learn the factors
        x_fp, x_q = y_fp, block(x_q)

Why X_tilde. In use, a block gets what the quantized blocks before it return. When it learns on
these inputs, it can mend a part of the errors that they made. The target stays the full-precision
output on the full-precision input.

Why blocks. A block is a part of the network that is tied together inside, such as a residual block
or a transformer block. If we learned each layer alone, no layer could make up for another one's
error. If we learned the whole network at once, a few hundred inputs would not be enough.

Activations (section 4). With `abits` we also round the input of each quantized layer, to a grid
with a learned step size (flexround.LSQ). The paper has two settings:

    B   two passes of the loop: the first learns the weights' factors, the second the step sizes
    Q   one pass that learns both. Meanwhile, with probability 0.5 (QDrop), an element of a layer's
        input stays unrounded, and an element of the block's input is X and not X_tilde

This file has three parts. Part one is the method, from top to bottom. Part two keeps a long run
safe, and you need it only if you bring your own network. Part three is the command line.

How we differ from the paper and from the authors' code, and why

- We evaluate the state before learning and four later states on all calibration inputs, and keep
  the best. So no block ends worse than it began, on these inputs.
- All methods share the optimizer (Adam), the decay of learning rates (a cosine to 0), the number of
  iterations and the batches. The learning rates, and what only one method has, are each method's
  own, and we searched all of them. The paper uses BRECQ's settings for AdaRound and AdaQuant.
  (BRECQ's AdaRound has a constant learning rate. On the small GPT that is better for it, on the
  rescaled ResNet it is not: experiments/RESULTS.md, steps.)
- Adam descends the loss divided by the loss before learning: see make_iteration.
- The paper states neither the loss's reduction nor a schedule of the learning rate. We follow the
  authors' code. But it always sums over dim 1, which for a GPT is the tokens: see block_loss.
- The learning rate of the activations' step sizes is 4e-4 in both settings. The paper has 4e-4 in
  B and 4e-5 in Q.
"""
import argparse
import copy
import math
import multiprocessing
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import flexround
from flexround import (
    LSQ,
    METHODS,
    AdaRound,
    code_range,
    input_quantizers,
    quantizable_layers,
    quantizers,
)

STEP_LR = 4e-4           # learning rate of log step size of an activation, if config has none
QDROP = 0.5              # section 4: with this probability setting Q keeps a float value
START_INPUTS = 64        # calibration inputs, drawn at random, that start = "outputs" looks at

# ==== Part one: the method ========================================================================

@dataclass(frozen=True)
class ReconstructionConfig:
    """All settings of a reconstruction. Raises ValueError if one is not allowed, and names it.

    Learning rates are the initial ones. They fall to 0 along half a cosine.
    """

    method: str = "flexround"        # a key of flexround.METHODS
    bits: int = 4                    # bits of a weight, 2 to 8. The paper's CNNs: 4, 3 and 2
    symmetric: bool = True           # the grid. In the paper it is symmetric for CNNs only
    per_channel: bool = False        # an s1 for each output channel. In the paper LLaMA only
    start: str = "weights"           # the initial s1 minimises the error of "weights" or "outputs"
    p: float = 2.0                   # exponent of the weights' error. The paper's is 2
    learn_s1: bool = True            # FlexRound only. False is ablation 1 of Table 1
    use_s3_s4: bool = True           # FlexRound only. False is ablation 2 of Table 1
    iterations: int = 1000           # for each block. The paper: 500 (GPTs) to 20,000 (GLUE)
    batch_size: int = 32             # inputs in an iteration. BRECQ's for CNNs is 32
    lr: float | None = None          # learning rate. None: the method's default_lr
    s1_lr: float | None = None       # learning rate of log s1. None: the method's default, or lr
    reg_weight: float | None = None  # AdaRound only. None: its default_reg_weight
    seed: int = 0                    # decides batches, what QDrop keeps, what a rule draws
    input_drop: float = 0.0          # share of a block's input that is X, not X_tilde (B only)
    channel_dim: int | None = None   # the channels of a block's output. None: see block_loss
    abits: int | None = None         # bits of each quantized layer's input. None: it stays float
    setting: str = "B"               # with abits. B: weights, then step sizes. Q: both at once
    step_lr: float | None = None     # learning rate of a step size's logarithm. None: STEP_LR
    end_bits: int | None = 8         # bits of the first and the last layer. None: as all others
    device: str | None = None        # blocks compute there in turn. None: where the first one is
    cache_device: str | None = None  # holds the activations. None: the device that computes
    cuda_graph: bool = False         # on CUDA, record the gradients once: see recorded

    def __post_init__(self):
        check_settings(self)

    @property
    def joint(self) -> bool:
        """Whether weights and step sizes are learned together: setting Q."""
        return self.abits is not None and self.setting == "Q"

    @property
    def two_passes(self) -> bool:
        """Whether a second pass learns step sizes: setting B. Round to nearest learns nothing."""
        return self.abits is not None and self.setting == "B" and self.method != "rtn"

    @property
    def keep_float(self) -> float:
        """The probability that an element of a block's input is the full-precision one."""
        return QDROP if self.joint else self.input_drop

    def block_seed(self, index: int) -> int:
        """Each block has a seed of its own."""
        return 1000 * self.seed + index

    def effective(self, name: str):
        """The value of "lr", "s1_lr" or "reg_weight" that is used: as set, else the method's
        default. A method without a learning rate for log s1 learns it with lr."""
        value = getattr(self, name)
        if value is None:
            value = getattr(METHODS[self.method], f"default_{name}")
        if value is None and name == "s1_lr":
            value = self.effective("lr")
        return value


@dataclass
class BlockReport:
    """What became of one block. Losses are block_loss on all of x_q, with hard codes. Those of
    history are the batches'."""

    index: int                               # the block's place in the list
    bits: dict[str, int]                     # of each quantized layer, by its name in the block
    start_loss: float                        # before learning: of round to nearest, or in B's
    #                                          second pass of step sizes that have not learned yet
    final_loss: float                        # of the state that was kept, the smallest evaluation
    best_iteration: int                      # when that was. 0 is before learning
    evaluations: list[tuple[int, float]]     # (iterations done, loss): 0, then each quarter
    history: list[float]                     # of each batch, with AdaRound's regulariser
    seconds: float
    abits: dict[str, int] = field(default_factory=dict)    # of each quantized layer's input
    largest_share: float = 0.0               # of final_loss, made by one input. 0: not looked at

    def __str__(self):
        line = f"loss {self.start_loss:.3g} -> {self.final_loss:.3g} in {self.seconds:.1f} s"
        done = len(self.history)
        if self.largest_share > 0.5:
            return f"{line}: hardly a gain, one input makes {self.largest_share:.0%} of the loss"
        if done > 0 and self.best_iteration == 0:
            return f"{line}: no gain, try a smaller learning rate"
        if self.best_iteration < done:
            return f"{line}, kept the state after {self.best_iteration} of {done} iterations"
        return line


# ---- One block: the loss, the optimizer, an iteration, which state is kept -----------------------

def block_loss(y: Tensor, y_fp: Tensor, channel_dim: int | None = None) -> Tensor:
    """Return the squared error, summed over channels and averaged over the rest, a scalar.

    channel_dim says which dim the channels are. None is dim 1 of a convolution's (N, C, H, W), and
    the last dim of anything else, such as (N, C) or a GPT's (B, T, C). An output (N,) has no
    channels, and we only take the mean. For other orders, such as (N, H, W, C) or (N, C, L), pass
    it. Raises ValueError if the shapes differ.
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


def make_optimizer(placed: list[nn.Module], config: ReconstructionConfig) -> torch.optim.Adam:
    """Return Adam over the parameters of quantizers, each kind with its own learning rate: log s1,
    the other factors, and the activations' step sizes.

    The authors' code uses Adam with one learning rate. We searched that of log s1 on its own,
    because an update of s1 moves all weights of a layer at once.
    """
    # A quantizer's parameters are its factors: s1, S2, s3 and s4 of FlexRound, V and s1 of
    # AdaQuant, V of AdaRound. What it only keeps, such as AdaRound's s1 or a zero_point, is a
    # buffer. Biases of layers are never learned.
    s1s, others, steps = [], [], []
    for q in placed:
        for name, parameter in q.named_parameters():
            if isinstance(q, LSQ):
                steps.append(parameter)
            elif name == "log_s1":
                s1s.append(parameter)
            else:
                others.append(parameter)
    rates = [(others, config.effective("lr")), (s1s, config.effective("s1_lr")),
             (steps, config.step_lr or STEP_LR)]
    # iterate reads "initial" again in each iteration, because it lowers "lr" from there.
    groups = [{"params": p, "lr": rate, "initial": rate} for p, rate in rates if p]
    return torch.optim.Adam(groups, fused=True)


def make_iteration(block: nn.Module, x_q: Tensor, y_fp: Tensor, config: ReconstructionConfig,
                   x_fp: Tensor | None = None, index: int = 0, start_loss: float = 1.0,
                   placed: list[nn.Module] | None = None):
    """Return iterate(i), which runs iteration i (from 0) of a block and returns its batch's loss.

    The loss stays on the device as a scalar tensor, so that nothing waits for the device. The
    arguments are those of reconstruct_block, and start_loss is the loss before learning.
    """
    # First what all iterations share. iterate itself follows below.
    placed = all_quantizers(block) if placed is None else placed
    device, total = device_of([block]), config.iterations
    optimizer = make_optimizer(placed, config)

    # Adam descends the loss divided by the loss before learning. Adam is nearly blind to the unit
    # of a loss. But it adds eps (1e-8) to the size of a gradient, and a gradient that is smaller
    # than this would hardly move anything.
    unit = start_loss or 1.0

    # Each batch is a fresh draw from all inputs, so that no input is always seen together with the
    # same others. All methods draw the same batches: no method can be better because its batches
    # were easier.
    draw = torch.Generator().manual_seed(config.block_seed(index))
    batches = [torch.randperm(len(x_q), generator=draw, device="cpu")[:config.batch_size]
               for _ in range(total)]
    batches = torch.stack(batches).to(x_q.device)                    # (iterations, batch)

    def drawn(tensor, i):
        """Batch i of a tensor of all inputs, on the block's device."""
        return tensor.detach().index_select(0, batches[i].to(tensor.device)).to(device)

    # Of all rules only AdaRound has a regulariser. Its strength changes with the iterations.
    adarounds = [q for q in placed if isinstance(q, AdaRound)]
    reg_weight = config.effective("reg_weight") if adarounds else None

    def schedule_at(i):
        """Return what gradients takes as `strength`: AdaRound's share and beta, else nothing."""
        return AdaRound.schedule(i / total) if adarounds else ()

    def gradients(x, y, *strength):
        """Return the loss of a batch, and put its gradients into .grad of all that is learned."""
        # reconstruct_block evaluates in eval mode, and the block's own dropout and batch norm stay
        # in it. Here AdaRound has to be soft and LSQ has to drop, which they do in train mode.
        for q in placed:
            q.train()
        # Each layer computes W_hat from W and its factors, so that gradients reach the factors.
        loss = block_loss(block(x), y, config.channel_dim) / unit    # section 3.1
        if adarounds:
            loss = flexround.adaround_loss(loss, adarounds, reg_weight, *strength)
        # backward() passes through round() (flexround.Round says how), and in FlexRound by the
        # reciprocal rule (flexround.Division).
        optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    if config.cuda_graph and device.type == "cuda":
        gradients = recorded(gradients, drawn(x_q, 0), drawn(y_fp, 0), *schedule_at(0))

    def iterate(i):
        # 1. The learning rates. They fall to 0 along half a cosine: large updates first, to leave
        # round to nearest, and small ones at the end, so that the codes settle.
        for group in optimizer.param_groups:
            group["lr"] = group["initial"] * (1 + math.cos(math.pi * i / total)) / 2

        # 2. The batch: inputs after quantized blocks, and what the float block made of float ones.
        x, y = drawn(x_q, i), drawn(y_fp, i)

        # 3. QDrop. Element by element and anew in each iteration, the input is the full-precision
        # one with this probability. The block then learns for both, and fits the errors of the
        # blocks before it less closely. These errors differ on inputs that it has not seen.
        if config.keep_float > 0:
            kept = torch.rand(x.shape, device=device) < config.keep_float
            x = torch.where(kept, drawn(x_fp, i), x)

        # 4. The loss and its gradients, as above.
        loss = gradients(x, y, *schedule_at(i))

        # 5. Adam's update. The loss is reported in its own unit.
        optimizer.step()
        return loss * unit

    return iterate


@torch.no_grad()
def evaluate(block: nn.Module, x: Tensor, y_fp: Tensor, config: ReconstructionConfig) -> float:
    """Return block_loss over all of x, a batch at a time, as a float. So we wait for the device."""
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


def reconstruct_block(block: nn.Module, x_q: Tensor, y_fp: Tensor, config: ReconstructionConfig,
                      x_fp: Tensor | None = None, index: int = 0, progress=None,
                      placed: list[nn.Module] | None = None) -> BlockReport:
    """Learn the factors of a block's quantizers, in place: descend block_loss(block(x_q), y_fp).

    Why the best of five states. Before learning and after each quarter of the iterations we
    evaluate all of the calibration set, because single batches differ too much in difficulty. At
    the end we keep the state with the smallest loss. So a block never ends worse than it began.

    Why hard codes. We evaluate with the codes that will be stored. AdaRound learns with soft ones:
    while h is between 0 and 1 its loss can be small, and it may still be large once h is 0 or 1.

    Afterwards the block is in eval mode and its factors are frozen. We touch no other parameter.

    Args:
        block: a module with quantizers in place (flexround.quantize_layers).
        x_q: (N, ...) the block's inputs after quantized blocks, X_tilde.
        y_fp: (N, ...) its full-precision outputs on full-precision inputs.
        config: see ReconstructionConfig.
        x_fp: (N, ...) the full-precision inputs X. Needed if config.keep_float > 0.
        index: the block's place in the network. It seeds the batches and is named in errors.
        progress: called as progress(iterations done, last evaluated loss) after each iteration.
        placed: the quantizers that learn. None: all that the block holds.

    Raises:
        FloatingPointError: a loss is not finite. On any exception the factors have their old
            values.
        ValueError: the block holds other quantizers than config's, x_fp is missing, block(x_q) and
            y_fp differ in shape, or the call is within parametrize.cached().
    """
    began = time.perf_counter()
    placed = all_quantizers(block) if placed is None else placed
    learned = list(nn.ModuleList(placed).parameters())
    if config.method == "rtn":                                       # it learns nothing
        learned = []
    check_reconstruction(block, x_q, x_fp, config, learned)
    total = config.iterations if learned else 0
    marks = {total * quarter // 4 for quarter in range(1, 5)}        # when to evaluate

    # The losses of the batches stay on the device too. If we read each one, each iteration would
    # wait for the device. We read all of them at the marks, where evaluate waits anyway.
    history = torch.zeros(total, dtype=torch.float64, device=device_of([block]))
    evaluations, best = [], None                                     # best: (loss, when, values)

    def evaluated(done):
        """Evaluate as in use, and remember the state if it is the best yet. Return the loss."""
        nonlocal best
        block.eval()                                                 # hard codes, nothing drops
        loss = evaluate(block, x_q, y_fp, config)
        check_finite(history[:done].tolist(), loss, index, config)
        evaluations.append((done, loss))
        if best is None or loss < best[0]:
            best = loss, done, [p.detach().clone() for p in learned]
        return loss

    with learning(block, learned, config.block_seed(index)):
        # Before learning all factors are as they were placed. In a first pass the rule is then
        # round to nearest. In B's second pass the weights have learned, and only the step sizes of
        # activations are new.
        loss = evaluated(0)
        if learned:
            iterate = make_iteration(block, x_q, y_fp, config, x_fp, index, loss, placed)
        for done in range(1, total + 1):
            history[done - 1] = iterate(done - 1)
            if done in marks:
                loss = evaluated(done)
            if progress is not None:
                progress(done, loss)
    best_loss, best_iteration, values = best
    put_back(learned, values)
    share = 0.0
    if learned and best_loss > 0.9 * evaluations[0][1]:              # why was there no gain?
        share = largest_share(block, x_q, y_fp, config)
    return BlockReport(index, bits_in_place(quantizers(block)), evaluations[0][1], best_loss,
                       best_iteration, evaluations, history.tolist(), time.perf_counter() - began,
                       bits_in_place(input_quantizers(block)), share)


# ---- A network: block after block ----------------------------------------------------------------

def bits_of_layers(blocks, bits: int, end_bits: int | None, skip=()) -> list[dict[str, int]]:
    """Return how many bits each layer gets: for each block a dictionary from layer name to bits.

    The first layer of the first block and the last layer of the last block get end_bits (section
    4 of the paper: 8), unless it is None. First and last are by the order in which a block defines
    its layers, also those that stay float. skip: names "<block>.<layer>" that stay float.
    """
    layers = quantizable_layers(nn.ModuleList(blocks), skip)         # "<block>.<layer>", or
    found = [{} for _ in blocks]                                     # "<block>" for a bare layer
    for full_name in layers:
        index, _, name = full_name.partition(".")
        found[int(index)][name] = bits
    if end_bits is not None:
        for block, end, own in ((blocks[0], 0, found[0]), (blocks[-1], -1, found[-1])):
            defined = [name for name, module in block.named_modules()
                       if isinstance(module, nn.Linear | nn.Conv2d)]
            if defined and defined[end] in own:
                own[defined[end]] = end_bits
    return found


@torch.no_grad()
def outputs_of(block: nn.Module, x: Tensor, batch_size: int, device, cache_device) -> Tensor:
    """Return block(x) for all of x, a batch at a time, on cache_device.

    A whole calibration set at once would need too much memory inside the block. Its outputs alone
    usually fit. If they do not, use cache_device = "cpu".
    """
    outputs = []
    with parametrize.cached():                                       # quantize each weight once
        for xs in x.split(batch_size):
            y = block(xs.to(device, copy=True))                      # it may work in place
            outputs.append(y.to(cache_device, copy=True))            # it may own one buffer for all
    return torch.cat(outputs)


def place_quantizers(block: nn.Module, x_q: Tensor, x_fp: Tensor, config: ReconstructionConfig,
                     bits: dict[str, int], abits: dict[str, int], index: int) -> list[nn.Module]:
    """Put quantizers on the weights of the layers in bits, and on the inputs of those in abits.

    Afterwards the block computes with W_hat in place of W. At first that is round to nearest.
    Returns the quantizers that are new. A layer that is never called with a positional argument
    gets none for its input.
    """
    device, placed = device_of([block]), []
    # Initial grids are found on inputs that are drawn at random, so that sorted ones do no harm.
    draw = torch.Generator().manual_seed(config.block_seed(index))
    order = torch.randperm(len(x_q), generator=draw, device="cpu").to(x_q.device)
    with seeded(device, config.block_seed(index)):                   # a rule may draw its start
        # Activations first: their step sizes are found on inputs that no new W_hat has changed. The
        # first batch decides each step size. The other batches only show whether a layer gets
        # negative values. New LSQs are in train mode, in which setting Q drops, so we change that.
        if abits:
            batches = (x_q[some].to(device) for some in order.split(config.batch_size))
            keep_float = QDROP if config.joint else 0.0
            made = flexround.quantize_inputs(block, next(batches), abits, config.symmetric,
                                             config.p, keep_float, batches)
            placed.extend(made.values())
            block.eval()
        # Then weights. start = "outputs" compares what a layer returns with W_hat and with W. The
        # block gets x_fp for it, so that the initial s1 does not depend on the blocks before.
        if bits:
            x = x_fp[order[:START_INPUTS]].to(device)
            placed.extend(flexround.quantize_layers(block, config, bits, x).values())
    return placed


def one_pass(blocks, floats, calibration: Tensor, config: ReconstructionConfig,
             bits: list[dict[str, int]], abits: list[dict[str, int]], clock) -> list[BlockReport]:
    """Run the loop at the head of this file: once through the blocks, in place.

    floats are the same blocks in full precision, for the targets. They may be the blocks
    themselves, because we take a block's target before we quantize it. bits and abits say for each
    block which weights and which inputs are quantized in this pass. A block that has neither, {},
    is only run. Blocks after the end of these lists are not run.
    """
    home = device_of(blocks)
    device = torch.device(config.device or home)
    cache = torch.device(config.cache_device or device)
    reports = []

    # Two streams of activations run through the network side by side. x_fp has seen no quantized
    # block, x_q has seen only quantized ones. Before the first block they are the same.
    x_fp = x_q = calibration.detach().as_subclass(Tensor).to(cache)  # plain, also a MetaTensor
    for i in range(len(bits)):
        block = blocks[i]
        with moved(device, home, block, floats[i]):
            # The target comes first, before we quantize the block (it may be floats[i] itself).
            y_fp = outputs_of(floats[i], x_fp, config.batch_size, device, cache)

            # Learn on x_q: what this block will get in use, the errors of earlier blocks included.
            if bits[i] or abits[i]:
                with undone_on_failure(block, weights=bool(bits[i])):
                    placed = place_quantizers(block, x_q, x_fp, config, bits[i], abits[i], i)
                    report = reconstruct_block(block, x_q, y_fp, config, x_fp, i, clock.iteration,
                                               placed)
                reports.append(report)
                clock.block(report)

            # Both streams move on: one through the float block, which is the target that we have,
            # the other through the block with what it has learned.
            x_fp, x_q = y_fp, outputs_of(block, x_q, config.batch_size, device, cache)
    return reports


def quantize_model(blocks, calibration: Tensor, config: ReconstructionConfig, show: bool = True,
                   skip=()) -> list[BlockReport]:
    """Quantize a network block after block, in place: the paper's method from end to end.

    Afterwards the factors are frozen and the blocks are in eval mode. flexround.fold makes the
    result permanent. Fold before you call net.train(), because in train mode AdaRound is soft.

    If a call was interrupted, call it again with the same arguments. It keeps the blocks that have
    learned and continues after them, and the result is what it would have been. We compare the
    method, the grid and the bits of what is in place with config. We cannot see with which inputs,
    seed, learning rates or number of iterations it was learned.

    Args:
        blocks: a list or nn.ModuleList of Tensor -> Tensor modules which, one after the other, are
            the network. Fold batch norm first.
        calibration: (N, ...) inputs of the first block, on any device.
        config: see ReconstructionConfig.
        show: print a line for each block that learns, and in long blocks one every ten seconds,
            with the time left.
        skip: layers that stay float, by the name "<block>.<layer>".

    Returns:
        A report for each block that this call has learned. With abits, setting B has a second
        report for each block, of its step sizes (but not with rtn). There "no gain" is usual, and
        it does no harm.

    Raises:
        ValueError: check_network refuses the network, or quantizers are in place that are not
            config's. This comes before any work.
        FloatingPointError: a loss is not finite. On any exception that block is float again, and
            the earlier ones stay quantized.
    """
    blocks = list(nn.ModuleList(blocks))
    model = nn.ModuleList(blocks)

    # Targets come from a float network. In one pass that is the network itself, because each block
    # is still float when we take its target. In a second pass, or after an interrupted call, blocks
    # are quantized already. Then we need a copy without its quantizers.
    floats = float_copy(blocks) if quantizers(model) else blocks
    passes = plan(blocks, floats, calibration, config, skip)         # errors come before any work
    if config.two_passes and floats is blocks:
        floats = float_copy(blocks)

    clock = Clock(passes, config, show)
    model.eval()
    nn.ModuleList(floats).eval()
    reports = []
    for bits, abits in passes:
        reports += one_pass(blocks, floats, calibration, config, bits, abits, clock)
    return reports


# ==== Part two: what keeps a long run safe ========================================================
#
# You do not need this part to understand the method. It is for readers who bring a network of their
# own: a run of an hour should not end with an error that was there from the start, and a run that
# ends early should leave everything as it was.

run = outputs_of                                                     # its earlier name


def device_of(blocks) -> torch.device:
    """Return the device of the first parameter, or the CPU if there is none."""
    for p in nn.ModuleList(blocks).parameters():
        return p.device
    return torch.device("cpu")


def all_quantizers(block: nn.Module) -> list[nn.Module]:
    """Return all quantizers of a block: first those of weights, then those of inputs."""
    return [*quantizers(block).values(), *input_quantizers(block).values()]


def float_copy(blocks: list[nn.Module]) -> list[nn.Module]:
    """Return a copy of the blocks without their quantizers."""
    floats = copy.deepcopy(blocks)
    flexround.fold(nn.ModuleList(floats), keep=False)
    return floats


def bits_in_place(found: dict[str, nn.Module]) -> dict[str, int]:
    """Return the bits of quantizers, by the name of their layer."""
    return {name: q.bits for name, q in found.items()}


# ---- Checks before any work ----------------------------------------------------------------------

def check_settings(config: ReconstructionConfig) -> None:
    """Raises ValueError if a setting is not allowed, and names it."""
    def need(name, fits, allowed):
        with suppress(TypeError):                                    # "0.01" is no number
            if fits(getattr(config, name)):
                return
        raise ValueError(f"{name} = {getattr(config, name)!r}: {allowed} is allowed")

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
    code_range(config.bits, config.symmetric, "bits")
    if config.end_bits is not None:
        code_range(config.end_bits, config.symmetric, "end_bits")
    if config.abits is not None:
        code_range(config.abits, config.symmetric, "abits")
    elif config.setting != "B" or config.step_lr is not None:
        raise ValueError(f"setting = {config.setting!r}, step_lr = {config.step_lr}: need abits")
    if config.joint and config.input_drop not in (0, QDROP):
        raise ValueError(f"input_drop = {config.input_drop}: setting Q takes {QDROP}")


def check_reconstruction(block: nn.Module, x_q: Tensor, x_fp: Tensor | None,
                         config: ReconstructionConfig, learned: list) -> None:
    """Raises ValueError if reconstruct_block cannot learn as config says."""
    kinds = {type(q) for q in quantizers(block).values()}
    if kinds != {METHODS[config.method]}:
        found = ", ".join(kind.__name__ for kind in kinds) or "no quantizers (see quantize_layers)"
        raise ValueError(f"the block holds {found}: {config.method} is needed, as config says")
    # A cache of W_hat would hide from the block that its factors change.
    if learned and parametrize._cache_enabled:
        raise ValueError("within parametrize.cached() nothing can be learned: leave it first")
    if config.keep_float > 0 and x_fp is None:
        raise ValueError(f"x_fp is missing: with probability {config.keep_float} the "
                         "full-precision input is needed (input_drop, or setting Q)")
    if config.batch_size > len(x_q) and learned:
        warnings.warn(f"batch_size = {config.batch_size}, but there are only {len(x_q)} inputs",
                      stacklevel=3)


def plan(blocks, floats, calibration: Tensor, config: ReconstructionConfig, skip) -> list:
    """Check and warn, and return what each pass of quantize_model quantizes: for each pass two
    lists, which hold for each block the bits of its weights and of its layers' inputs."""
    check_network(floats, calibration, config, skip)
    warn_of_float_weights(floats, skip)
    bits = bits_of_layers(floats, config.bits, config.end_bits, skip)
    last = max(i for i, layers in enumerate(bits) if layers)         # nothing after it is run
    bits = bits[:last + 1]
    nothing = [{} for _ in bits]
    abits = nothing
    if config.abits is not None:
        abits = bits_of_layers(floats, config.abits, config.end_bits, skip)[:last + 1]
    warn_of_end_bits(bits, config)
    if quantizers(nn.ModuleList(blocks)):
        leave_out_done(blocks, bits, abits, config)
    # weights alone; setting Q; round to nearest    one pass
    # abits in setting B                            two passes: first weights, then step sizes
    return [(bits, nothing), (nothing, abits)] if config.two_passes else [(bits, abits)]


def check_call(calibration: Tensor, skip) -> None:
    """Raises ValueError for what would go wrong with any network."""
    if not isinstance(calibration, Tensor) or calibration.layout != torch.strided:
        kind = type(calibration).__name__
        raise ValueError(f"calibration is a {kind}: one Tensor, (N, ...), not sparse, is allowed")
    if calibration.dim() == 0 or len(calibration) == 0 or not torch.isfinite(calibration).all():
        raise ValueError("calibration is empty or holds NaN or infinity")
    if isinstance(skip, str):
        raise ValueError(f"skip = {skip!r}: a list of names is allowed")
    if torch.is_inference_mode_enabled():
        raise ValueError("within torch.inference_mode() nothing can be learned: leave it first")


def check_network(blocks, calibration: Tensor, config: ReconstructionConfig, skip=()) -> None:
    """Find what would fail, or would silently go wrong, before any work is done. blocks are float.
    Raises ValueError for what is not allowed, by block or layer."""
    check_call(calibration, skip)
    model = nn.ModuleList(blocks)
    modules = dict(model.named_modules())                            # a module is named only once
    known = [name for name, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)]
    for name in skip:
        if name not in known:
            raise ValueError(f"skip names {name!r}: the layers are {known}")
    layers = quantizable_layers(model, skip)
    if not layers:
        raise ValueError("nothing to quantize: no block has an nn.Linear or nn.Conv2d left")
    for name, layer in layers.items():
        flexround.check_weight(layer.weight, f"layer {name!r}: W")
    for i, block in enumerate(blocks):
        for name, module in block.named_modules():
            full_name = f"{i}.{name}".rstrip(".")                    # a bare layer's name is ''
            if module in layers.values() and full_name not in layers:
                raise ValueError(f"layer {name!r} of block {i} is in an earlier block as well")
    learned = bits_of_layers(blocks, config.bits, None, skip)
    last = max(i for i, own in enumerate(learned) if own)            # nothing after it is run
    x = calibration[:2].as_subclass(Tensor).to(device_of(blocks))
    for i, block in enumerate(blocks[:last + 1]):
        x = check_block(block, x, i, list(learned[i]), config)


def check_block(block: nn.Module, x: Tensor, index: int, layers: list[str],
                config: ReconstructionConfig) -> Tensor:
    """Do check_network for one block, on x of one or two inputs. Returns block(x). We run a copy on
    the first input, on both, and on the first again. Its output for the first has to be the same
    each time, because we cut batches along dim 0 and draw them at random."""
    name = f"block {index}, a {type(block).__name__},"
    try:
        twin = copy.deepcopy(block).eval()
    except Exception as problem:
        raise ValueError(f"{name} cannot be copied (it keeps outputs?): {problem}") from problem

    def call(x):
        try:
            return twin(x.clone())
        except Exception as problem:
            raise ValueError(f"{name} cannot be called with one tensor {tuple(x.shape)}: "
                             f"{problem}") from problem

    with torch.no_grad():
        y = call(x[:1])
        if not isinstance(y, Tensor) or y.shape[:1] != (1,) or not torch.isfinite(y).all():
            raise ValueError(f"block {index} returns {type(y).__name__} {getattr(y, 'shape', '')}: "
                             "for one input a finite tensor with one row is needed")
        y = y.clone()                                                # it may be one buffer for all
        both = call(x).clone()
        again = call(x[:1])
    # Kernels depend on the shape, so we allow noise, by the largest number of the same channel or
    # position: one channel of 3,000 says nothing of the others.
    size = y.abs().max()
    for dim in range(1, y.dim()):
        size = torch.minimum(size, y.abs().amax([d for d in range(y.dim()) if d != dim], True))
    eps = torch.finfo(y.dtype).eps if y.is_floating_point() else 0.0
    noise = eps ** 0.5 * (size + y.abs().max() / 100)
    alike = both.shape[:1] == x.shape[:1] and ((both[:1] - y).abs() <= noise).all()
    if not alike or not ((again - y).abs() <= noise).all():
        raise ValueError(f"block {index} returns something else for an input when another one is "
                         "beside it or was there before it: dim 0 has to be the inputs (batch "
                         "first), and a block has to depend on its input alone, row by row")
    if layers and y.dim() > 1 and abs(config.channel_dim or 1) >= y.dim():
        raise ValueError(f"channel_dim = {config.channel_dim}: {name} returns {tuple(y.shape)}")
    if layers:
        check_layers(block, twin, lambda: call(x[:1]), name, layers, config.method != "rtn")
    return both


def check_layers(block, twin, call, name: str, layers: list[str], learns: bool) -> None:
    """Do check_block for the layers of twin, a copy of block. call() runs it."""
    own = [twin.get_submodule(layer).weight for layer in layers]
    theirs = [block.get_submodule(layer).weight for layer in layers]
    before = [(W, W.requires_grad, W.grad) for W in theirs]          # they are the user's
    for W in [*own, *theirs]:
        W.requires_grad_(True).grad = None
    try:
        with torch.enable_grad():
            y = call()
            if y.requires_grad:
                y.sum().backward()
        borrowed = any(W.grad is not None for W in theirs)
    finally:
        for W, required, gradient in before:
            W.requires_grad_(required).grad = gradient
    if borrowed:
        raise ValueError(f"{name} cannot be copied: the copy computes with the original's layers "
                         "(was a forward or a hook replaced by a function?)")
    missed = [layer for layer, W in zip(layers, own, strict=True) if W.grad is None]
    problem = (f"{name.partition(',')[0]}: no gradient reaches its weights {missed} (no_grad, "
               "detach, .data, or layers that it does not call in eval mode)")
    if missed == layers and learns:
        raise ValueError(problem)
    if missed and y.requires_grad:
        warnings.warn(f"{problem}: they do not learn, or are not used at all", stacklevel=5)

    # If a forward writes a mask or a norm to W, W_hat does not get it. We try other weights,
    # because writing the same mask a second time changes nothing.
    with torch.no_grad(), suppress(ValueError):                      # they may not suit the block
        tried = [W.mul_(-7.7).sub_(1.3).clone() for W in own]
        call()
    after = [twin.get_submodule(layer).weight for layer in layers]
    if not all(map(torch.equal, tried, after)):
        raise ValueError(f"{name} writes to weights when it is called: make that permanent first")


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
                      stacklevel=4)
    if norms:
        warnings.warn(f"batch norm stays float: {norms}. Fold it first: models.fold_batchnorm",
                      stacklevel=4)


def warn_of_end_bits(bits: list[dict[str, int]], config: ReconstructionConfig) -> None:
    """Warn if all layers get end_bits, and none the bits that were asked for."""
    used = set().union(*(layers.values() for layers in bits))
    if used == {config.end_bits} and {config.bits, config.abits} - {None} != used:
        warnings.warn(f"all layers are a first or a last one and get end_bits: {bits}. With "
                      "end_bits = None they get bits", stacklevel=4)


def leave_out_done(blocks, bits: list, abits: list, config: ReconstructionConfig) -> None:
    """Empty the entries of bits and abits whose blocks an interrupted call has learned already, so
    that one_pass only runs these blocks.

    Raises ValueError if quantizers are of another method, grid or number of bits than config's, or
    not frozen.
    """
    done = []
    grid = (METHODS[config.method], config.symmetric, config.per_channel)
    for i in range(len(bits)):
        own, rounded = quantizers(blocks[i]), input_quantizers(blocks[i])
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
    warnings.warn(f"blocks {done} are quantized already: we keep them and continue", stacklevel=4)


def check_finite(history: list[float], loss: float, index: int, config) -> None:
    """Raises FloatingPointError that names the first iteration whose loss is not finite."""
    wrong = [i for i, value in enumerate([*history, loss], 1) if not math.isfinite(value)]
    if wrong:
        when = "before training. Do its activations overflow?"
        if history:
            i = min(wrong[0], len(history))
            when = f"at iteration {i} of {config.iterations}: try a smaller lr"
            if max(history[:i - 1], default=0.0) <= 10 * history[0]:  # it did not grow
                when += ", or is a gradient NaN, as that of sqrt at 0?"
        raise FloatingPointError(f"block {index}, {config.method}: the loss is not finite {when}")


@torch.no_grad()
def largest_share(block: nn.Module, x_q: Tensor, y_fp: Tensor, config) -> float:
    """Return the largest share of the block's loss that a single input makes."""
    pairs = zip(x_q.split(1), y_fp.split(1), strict=True)
    with parametrize.cached():                                       # quantize each weight once
        losses = [evaluate(block, x, y, config) for x, y in pairs]
    return max(losses) / (sum(losses) or 1.0)


# ---- What is put back, whatever happens ----------------------------------------------------------

@torch.no_grad()
def put_back(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    """Overwrite parameters with values of an earlier state."""
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


@contextmanager
def seeded(device: torch.device, seed: int):
    """Let what torch draws within, on the CPU and on a CUDA device, begin at seed. Afterwards your
    program's random numbers continue as if we had drawn none."""
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
    """Let only `learned` require a gradient within, and seed the generator that drops values.

    Afterwards your parameters require a gradient again where they did, the quantizers are frozen
    and drop nothing, and the block is in eval mode. After an exception what was learned has its old
    values again.
    """
    # Quantizers are ours. All other parameters are yours and get back what they required.
    own = set(nn.ModuleList(all_quantizers(block)).parameters())
    before = [(p, p.requires_grad) for p in block.parameters() if p not in own]
    initial = [p.detach().clone() for p in learned]

    block.requires_grad_(False)
    for p in learned:
        p.requires_grad_(True)
    try:
        with torch.enable_grad(), seeded(device_of([block]), seed):
            yield
    except BaseException:                                            # an interrupt as well
        put_back(learned, initial)
        raise
    finally:
        for p, required in before:
            p.requires_grad_(required)
        for p in own:
            p.requires_grad_(False)
            p.grad = None
        for q in input_quantizers(block).values():
            q.keep_float = 0.0                       # not even if you call net.train() later
        block.eval()


@contextmanager
def moved(device: torch.device, home: torch.device, *modules: nn.Module):
    """Keep the modules on device within, and bring them home afterwards, also after an exception.
    So a GPU has to hold one block at a time, and not the network."""
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module in modules:
            module.to(home)


@contextmanager
def undone_on_failure(block: nn.Module, weights: bool):
    """After an exception within, remove what place_quantizers has placed: quantizers of inputs, and
    if weights is True those of weights. So a block is learned as a whole or not at all, and if you
    call quantize_model again it continues at this block."""
    try:
        yield
    except BaseException:                                            # an interrupt as well
        flexround.remove_input_quantizers(block)
        if weights:
            flexround.fold(block, keep=False)
        raise


class Clock:
    """Says on stderr how far we are: a line a block, in a long block one every ten seconds."""

    def __init__(self, passes: list, config: ReconstructionConfig, show: bool):
        turns = 0                                                    # of blocks that learn
        for bits, abits in passes:
            turns += sum(bool(own or rounded) for own, rounded in zip(bits, abits, strict=True))
        self.total = turns * config.iterations                       # of all blocks and passes
        self.show = show and config.method != "rtn"
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


# ---- A CUDA graph of an iteration ---------------------------------------------------------------

def recorded(step, *first):
    """Record step(*values) on CUDA once, and return a function that replays it with new values.

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
        RuntimeError: something else cannot be recorded. The attempt spoils the device's state.
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


# ==== Part three: the command line, and the main job ==============================================

def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = flags.add_argument
    add("--model", nargs="+", default=["resnet", "mobilenet", "gpt"],
        help="resnet, mobilenet (digits), gpt (characters), resnet20 (CIFAR-10, needs --data)")
    add("--method", nargs="+", default=list(METHODS), help="keys of flexround.METHODS")
    add("--bits", nargs="+", type=int, default=[2], help="of a weight, 2 to 8")
    add("--abits", type=int, help="of each layer's input, 2 to 8. None: weights only")
    add("--setting", default="B", help="with --abits: B or Q")
    add("--start", default="outputs", help="initial s1 minimises the error of outputs or weights")
    add("--iterations", type=int, default=250, help="per block. The paper's CNNs: 5,000")
    add("--lr", type=float, help="learning rate. None: each method's default_lr")
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
