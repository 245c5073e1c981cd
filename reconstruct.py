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

How we differ from the paper and from the authors' code, and why

- We evaluate the start and four later states on all calibration inputs, and keep the best. So the
  result is never worse than round to nearest there. (On white noise the last state is worse.)
- All methods share the optimizer (Adam, cosine decay to 0), the iterations and the batches. Only
  the rate is each method's own. The paper gives AdaRound and AdaQuant BRECQ's settings.
- The paper states neither the loss's reduction nor the rate's schedule. We follow the authors'
  code. But it always sums over dim 1, which for a GPT is the tokens: see block_loss.
"""
import argparse
import copy
import itertools
import math
import multiprocessing
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

import flexround
from flexround import METHODS, code_range, input_quantizers, quantizable_layers, quantizers

STEP_LR = 4e-4           # first rate of activations' steps: section 4's in B. In Q it has 4e-5
REG_WEIGHT = 1.0
START_INPUTS = 64                    # of calibration, for start = "outputs"
QDROP = 0.5                          # section 4: with this probability Q keeps a float value


@dataclass(frozen=True)
class ReconstructionConfig:
    """All settings of a reconstruction. A ValueError names the one that is not allowed."""

    method: str = "flexround"        # a key of flexround.METHODS
    bits: int = 4                    # of a weight, 2 to 8. The paper's CNNs have 4, 3 and 2
    symmetric: bool = True           # the grid. In the paper it is symmetric for CNNs only
    per_channel: bool = False        # an s1 for each output channel. In the paper LLaMA only
    start: str = "weights"           # s1 starts at the smallest error of W, or of layers' "outputs"
    p: float = 2.0                   # exponent of the weights' error. 2 is the paper's
    learn_s1: bool = True            # FlexRound only. False is ablation 1 of Table 1
    use_s3_s4: bool = True           # FlexRound only. False is ablation 2 of Table 1
    iterations: int = 1000           # per block. Section 4: 5,000 for CNNs, 500 for language models
    batch_size: int = 32             # inputs per iteration. 32 is BRECQ's for CNNs
    lr: float | None = None          # first rate. None is the method's default_lr
    s1_lr: float | None = None       # of log s1. None is the method's default_s1_lr, or lr
    reg_weight: float | None = None  # AdaRound's regulariser, see make_iteration
    seed: int = 0                    # of the batches, and of what is dropped
    input_drop: float = 0.0          # share of x_fp in a block's input. 0 is X_tilde, 1 is X
    abits: int | None = None         # of what each quantized layer takes as input. None is float
    setting: str = "B"               # B learns weights, then steps. Q learns both, and drops
    step_lr: float | None = None     # first rate of a step's logarithm. None is STEP_LR
    end_bits: int | None = 8         # of the first and the last layer. None: as the others
    layer_bits: dict = field(default_factory=dict)   # {"<block index>.<layer name>": bits}
    device: str | None = None        # each block is moved there for its turn. None: it stays
    cache_device: str | None = None  # where cached activations lie. None: where blocks compute

    def __post_init__(self):
        own = vars(self)
        for name, ok, allowed in [
                ("method", self.method in METHODS, " or ".join(METHODS)),
                *((name, own[name] is None or 0 < own[name] < math.inf, "a positive number")
                  for name in ("p", "lr", "step_lr", "s1_lr", "reg_weight")),
                *((name, type(own[name]) is int and least <= own[name] < 2 ** 32,
                   f"an integer from {least} to 2^32 - 1")
                  for name, least in (("iterations", 1), ("batch_size", 1), ("seed", 0))),
                ("input_drop", 0 <= self.input_drop <= 1, "a probability from 0 to 1"),
                ("start", self.start in ("weights", "outputs"), "weights or outputs"),
                ("setting", self.setting in ("B", "Q"), "B or Q")]:
            if not ok:
                raise ValueError(f"{name} = {own[name]!r}: {allowed} is allowed")
        for name, bits in [("bits", self.bits), ("end_bits", self.end_bits), ("abits", self.abits),
                           *((f"layer_bits[{n!r}]", b) for n, b in self.layer_bits.items())]:
            if bits is not None or name not in ("end_bits", "abits"):
                code_range(bits, self.symmetric, name)
        if self.abits is None and (self.setting, self.step_lr) != ("B", None):
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


@dataclass
class BlockReport:
    """What became of one block. Losses are block_loss on all of x_q, with hard codes."""

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
        hint, done = "", len(self.history)
        if done and self.best_iteration == 0:
            hint = ": no gain, try a smaller rate"
        elif self.best_iteration < done:
            hint = f", kept the state after {self.best_iteration} of {done} iterations"
        return f"loss {self.start_loss:.3g} -> {self.final_loss:.3g} in {self.seconds:.1f} s{hint}"


# ---- One block -----------------------------------------------------------------------------------

def block_loss(y: Tensor, y_fp: Tensor) -> Tensor:
    """The squared error, summed over channels and averaged over the rest. Returns a scalar.

    Channels are dim 1 of a convolution's (N, C, H, W) and the last dim of anything else, such as
    (N, C) or a GPT's (B, T, C). ValueError where the shapes differ.
    """
    if y.shape != y_fp.shape:
        raise ValueError(f"the block returns {tuple(y.shape)}, its target has {tuple(y_fp.shape)}")
    return F.mse_loss(y, y_fp) * y.shape[1 if y.dim() == 4 else -1]


@torch.no_grad()
def evaluate(block: nn.Module, x: Tensor, y_fp: Tensor, batch_size: int, device) -> float:
    """block_loss over all of x, a batch at a time."""
    with parametrize.cached():
        total = sum(len(xs) * block_loss(block(xs.to(device, copy=True)), ys.to(device))
                    for xs, ys in zip(x.split(batch_size), y_fp.split(batch_size), strict=True))
    return float(total) / len(x)


def reconstruct_block(block: nn.Module, x_q: Tensor, y_fp: Tensor, config: ReconstructionConfig,
                      x_fp: Tensor | None = None, index: int = 0, progress=None) -> BlockReport:
    """Learn the factors of a block's quantizers, in place: descend block_loss(block(x_q), y_fp).

    At the start and after each quarter of the iterations we evaluate all of the calibration set
    with hard codes, because batches differ too much in difficulty, and we keep the best state.
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
        FloatingPointError: a loss that is not finite. On any exception the factors are as before.
        ValueError: other quantizers than config's, or within parametrize.cached().
    """
    began = time.perf_counter()
    learned, device = sum(learned_parameters(block, config), []), device_of([block])
    if learned and parametrize._cache_enabled:                       # it would hide what is learned
        raise ValueError("within parametrize.cached() nothing can be learned: leave it first")
    if config.drop > 0 and x_fp is None:
        raise ValueError(f"input_drop = {config.drop} needs x_fp, the full-precision input")
    if config.batch_size > len(x_q) and learned:
        warnings.warn(f"batch_size = {config.batch_size}, but there are only {len(x_q)} inputs",
                      stacklevel=2)

    total = config.iterations if learned else 0                      # round to nearest: none
    marks = {total * quarter // 4 for quarter in range(5)}           # when to evaluate
    evaluations, history = [], torch.zeros(total, device=device)
    best_loss, best_iteration = math.inf, 0
    best = initial = [p.detach().clone() for p in learned]
    with learning(block, learned, 1000 * config.seed + index):       # a seed for each block
        try:
            iterate = None
            # i counts the iterations that are done, so the start, i = 0, is evaluated as well.
            for i in range(total + 1):
                if i in marks:
                    block.eval()                                     # AdaRound: hard codes
                    loss = evaluate(block, x_q, y_fp, config.batch_size, device)
                    check_finite(history[:i].tolist(), loss, index, config)
                    evaluations.append((i, loss))
                    if loss < best_loss:
                        best_loss, best_iteration = loss, i
                        best = [p.detach().clone() for p in learned]
                if progress and i > 0:
                    progress(i, loss)
                if i == 0 and total:
                    iterate = make_iteration(block, x_q, y_fp, config, x_fp, index, loss)
                if i < total:
                    history[i] = iterate(i)
        except BaseException:                                        # an interrupt, too
            best = initial
            raise
        finally:
            with torch.no_grad():
                for p, value in zip(learned, best, strict=True):
                    p.copy_(value)
    bits = [{name: q.bits for name, q in find(block).items()}
            for find in (quantizers, input_quantizers)]
    return BlockReport(index, bits[0], evaluations[0][1], best_loss, best_iteration, evaluations,
                       history.tolist(), time.perf_counter() - began, bits[1])


def make_iteration(block: nn.Module, x_q: Tensor, y_fp: Tensor, config: ReconstructionConfig,
                   x_fp: Tensor | None = None, index: int = 0, start_loss: float = 1.0,
                   record=None):
    """Return iterate(i), which runs iteration i (from 0) of a block and returns its batch's loss.

    The loss stays on the device as a scalar tensor, so that nothing waits for the device. The rate
    falls to 0 along a cosine. The arguments are those of reconstruct_block. `record` may replace a
    step by something that does the same, such as a CUDA graph (experiments/timing.py).
    """
    device, total = device_of([block]), config.iterations
    draw = torch.Generator().manual_seed(1000 * config.seed + index)
    batches = torch.stack([torch.randperm(len(x_q), generator=draw)[:config.batch_size].clone()
                           for _ in range(total)]).to(x_q.device)    # (iterations, batch)
    factors, steps = learned_parameters(block, config)
    regularised = [q for q in quantizers(block).values() if factors and hasattr(q, "regulariser")]
    dropping = [q for q in input_quantizers(block).values() if q.drop > 0]

    # What changes between iterations: two rates, AdaRound's weight and beta, the batch. They lie in
    # tensors that we overwrite, because a recorded step reads the same memory each time.
    lr = METHODS[config.method].default_lr if config.lr is None else config.lr
    step_lr = STEP_LR if config.step_lr is None else config.step_lr
    s1_lr = METHODS[config.method].default_s1_lr if config.s1_lr is None else config.s1_lr
    s1_lr = lr if s1_lr is None else s1_lr
    s1s = [q.log_s1 for q in quantizers(block).values() if q.learns_s1 and factors]
    others = [p for p in factors if all(p is not s for s in s1s)]
    count = sum(q.V.numel() for q in regularised)
    full = REG_WEIGHT if config.reg_weight is None else config.reg_weight
    full = full * start_loss / max(count, 1)
    cosine = [(1 + math.cos(math.pi * i / total)) / 2 for i in range(total)]
    schedule = [flexround.AdaRound.schedule(i / total) for i in range(total)]
    changing = torch.tensor([(lr * c, step_lr * c, s1_lr * c, full * share, beta)
                             for c, (share, beta) in zip(cosine, schedule, strict=True)],
                            dtype=torch.float32, device=device)
    rate, step_rate, s1_rate, weight, beta = now = changing[0].clone()        # views of `now`
    batch = batches[0].clone()
    groups = [{"params": p, "lr": r} for p, r in (
        (others, rate), (s1s, s1_rate), (steps, step_rate)) if p]
    optimizer = torch.optim.Adam(groups, fused=True, capturable=device.type == "cuda")

    def drawn(t):
        return t.detach().index_select(0, batch.to(t.device)).to(device)

    def step():
        for q in regularised + dropping:                             # AdaRound is soft in train
            q.train()                                                # mode, LSQ drops in it
        x, y = drawn(x_q), drawn(y_fp)                               # X_tilde and the target
        if config.drop > 0:                                          # QDrop, element by element
            x = torch.where(torch.rand(x.shape, device=device) < config.drop, drawn(x_fp), x)
        loss = block_loss(block(x), y)                               # the objective of section 3.1
        for q in regularised:                                        # AdaRound only
            loss = loss + weight * q.regulariser(beta)
        for p in factors + steps:
            p.grad = None
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = step if record is None else record(step)

    def iterate(i):
        now.copy_(changing[i])
        batch.copy_(batches[i])
        with nullcontext() if factors else parametrize.cached():     # weights that do not change
            return step()

    return iterate


# ---- A network: block after block ----------------------------------------------------------------

@torch.no_grad()
def run(block: nn.Module, x: Tensor, batch_size: int, device, cache_device) -> Tensor:
    """block(x) for all of x, a batch at a time. The result lies on cache_device."""
    with parametrize.cached():                                       # quantize each weight once
        # We copy each batch, because a block may work in place and x is used again.
        return torch.cat([block(xs.to(device, copy=True)).to(cache_device)
                          for xs in x.split(batch_size)])


def quantize_model(blocks, calibration: Tensor, config: ReconstructionConfig, show: bool = True):
    """Quantize a network block after block, in place: the paper's method from end to end.

    Afterwards the factors are frozen and the blocks are in eval mode. flexround.fold makes the
    result permanent. Fold before you call net.train(), because in train mode AdaRound is soft.

    Args:
        blocks: a list or nn.ModuleList of Tensor -> Tensor modules which, one after the other, are
            the network. Any network that can be given so will do. Fold batch norm first.
        calibration: (N, ...) inputs of the first block, on any device, in no particular order.
        config: see ReconstructionConfig.
        show: a progress bar. Where there is no terminal, a line for each block.

    Returns:
        A report for each block that has layers. In setting B a second one for each, of its steps.

    Raises:
        ValueError: what is quantized already, or as plan and cache_bytes. This comes before work.
        FloatingPointError: a loss that is not finite. On any exception that block is as before, and
            the earlier ones stay quantized.
    """
    blocks = list(nn.ModuleList(blocks))
    if len(calibration) == 0 or not torch.isfinite(calibration).all():
        raise ValueError("calibration is empty or holds NaN or infinity")
    if rounded := list(input_quantizers(nn.ModuleList(blocks))):
        raise ValueError(f"the inputs of {rounded} are quantized already: take a float network")
    bits = plan(blocks, config)
    abits = plan(blocks, config, inputs=True) if config.abits else None
    last = max(i for i, layers in enumerate(bits) if layers)         # nothing behind it is run
    home, size = device_of(blocks), cache_bytes(blocks[:last + 1], calibration)
    device = torch.device(config.device or home)
    cache = torch.device(config.cache_device or device)
    # Setting B goes through the blocks twice: weights, then steps. The targets of its second pass
    # come from a float copy. Round to nearest learns nothing, so one pass is enough.
    twice = abits is not None and not config.joint and config.method != "rtn"
    passes = [(blocks, bits, None if twice else abits)]              # targets, weights, inputs
    if twice:
        passes.append((copy.deepcopy(blocks), None, abits))
    show, reports = show and config.method != "rtn", []
    bar = tqdm(total=len(passes) * sum(map(bool, bits)) * config.iterations, disable=None if show
               else True, desc=f"{config.method} W{config.bits}, {size / 1e6:,.0f} MB cached")
    for targets, weights, inputs in passes:
        x_fp = x_q = calibration.detach().to(cache)
        # The loop at the head of this file. y_fp comes first, while the block is full precision.
        for i, block in enumerate(blocks[:last + 1]):
            y_fp = run(targets[i].eval().to(device), x_fp, config.batch_size, device, cache)
            if bits[i]:
                reports.append(_quantize_block(block.eval().to(device), x_q, y_fp, x_fp, config, i,
                                               weights, inputs, home, bar))
                if show and (bar.disable or reports[-1].best_iteration == 0):
                    bar.write(f"block {i} of {last}: {reports[-1]}", file=sys.stderr)
            x_fp, x_q = y_fp, run(block.eval().to(device), x_q, config.batch_size, device, cache)
            targets[i].to(home), block.to(home)
    bar.close()
    nn.ModuleList(blocks).eval()
    return reports


# ---- What the method needs around it -------------------------------------------------------------

def _quantize_block(block, x_q, y_fp, x_fp, config, i, bits, abits, home, bar) -> BlockReport:
    """Place the quantizers of block i and learn them. `bits` are those of weights, `abits` those of
    inputs, block by block. None: not in this pass. On any exception the block is as it was."""
    try:
        if abits is not None:                                        # steps start on one batch
            batches = (x.to(device_of([block])) for x in x_q.split(config.batch_size))
            flexround.quantize_inputs(block, next(batches), abits[i], config.symmetric, config.p,
                                      QDROP if config.joint else 0.0, batches)
        if bits is not None:                                         # a tied weight stays float
            skip = set(quantizable_layers(block)) - set(bits[i])
            x = x_fp[:START_INPUTS].to(device_of([block]))
            flexround.quantize_layers(block, config, bits[i], skip, x)
        report = reconstruct_block(block, x_q, y_fp, config, x_fp if config.drop > 0 else None, i,
                                   lambda *_: bar.update())
    except BaseException:
        flexround.remove_input_quantizers(block.to(home))
        if bits is not None:
            flexround.fold(block, keep=False)
        raise
    for q in input_quantizers(block).values():
        q.drop = 0.0                                                 # learned: nothing drops now
    return report


def learned_parameters(block: nn.Module, config: ReconstructionConfig) -> tuple[list, list]:
    """What is learned now, as two lists: the factors of weights, and the steps of activations.

    Setting B first learns the factors. In its second pass steps are in place, and it learns these.
    Setting Q learns both together. ValueError: the block holds other quantizers than config's.
    """
    kinds = {type(q) for q in quantizers(block).values()}
    if kinds != {METHODS[config.method]}:
        found = ", ".join(kind.__name__ for kind in kinds) or "no quantizers (see quantize_layers)"
        raise ValueError(f"the block holds {found}: {config.method} is needed, as config says")
    factors = [p for q in quantizers(block).values() for p in q.parameters()]
    steps = [p for q in input_quantizers(block).values() for p in q.parameters()
             if config.method != "rtn" and config.abits is not None]
    return ([] if steps and not config.joint else factors), steps


@contextmanager
def learning(block: nn.Module, learned: list[nn.Parameter], seed: int):
    """Within, only `learned` requires a gradient, and torch's generator, which draws what drops, is
    seeded. Afterwards both are as before, the quantizers are frozen, the block is in eval mode."""
    before, device = [(p, p.requires_grad) for p in block.parameters()], device_of([block])
    cuda = device.type == "cuda"
    own = {p for q in (*quantizers(block).values(), *input_quantizers(block).values())
           for p in q.parameters()}
    block.requires_grad_(False)
    for p in learned:
        p.requires_grad_(True)
    try:
        with torch.enable_grad(), torch.random.fork_rng([device] if cuda else []):
            draw = torch.cuda.default_generators[device.index] if cuda else torch.default_generator
            draw.manual_seed(seed)
            yield
    finally:
        for p, required in before:
            p.requires_grad_(required and p not in own)
        for p in own:
            p.grad = None
        block.eval()


def check_finite(history: list[float], loss: float, index: int, config) -> None:
    """FloatingPointError that names the first iteration whose loss is not finite."""
    if bad := [i for i, value in enumerate([*history, loss], 1) if not math.isfinite(value)]:
        when = (f"at iteration {min(bad[0], len(history))} of {config.iterations}: try a smaller lr"
                if history else "before training. Do its activations overflow?")
        raise FloatingPointError(f"block {index}, {config.method}: the loss is not finite {when}")


def plan(blocks, config: ReconstructionConfig, inputs: bool = False) -> list[dict[str, int]]:
    """How many bits each layer gets: for each block a dictionary from layer name to bits.

    nn.Linear and nn.Conv2d are quantized. Embeddings, a head tied to an embedding, norms and all
    else stay float. end_bits goes to the first layer of the first block and the last of the last,
    layer_bits overrides both. With inputs=True, the bits of the layers' inputs: abits, end_bits.
    We warn of weights that stay float, and of bits that no layer has. ValueError: layer_bits names
    what is not there, a layer in two blocks, no layer, or as flexround.quantizable_layers.
    """
    model = nn.ModuleList(blocks)                                    # names: "<block>.<layer>"
    if config.method != "rtn" and any(p.dtype == torch.float16 for p in model.parameters()):
        raise ValueError("the network is in torch.float16, where Adam overflows: use .float()")
    layers, names = quantizable_layers(model), dict(model.named_modules())
    for i, block in enumerate(blocks):                               # a module is named only once
        for name in quantizable_layers(block):
            if f"{i}.{name}".rstrip(".") not in names:
                raise ValueError(f"layer {name!r} of block {i} stands in an earlier block, too")
    for name in config.layer_bits:
        if name not in layers:
            raise ValueError(f"layer_bits names {name!r}: the layers are {list(layers)}")
    if not layers:
        raise ValueError("nothing to quantize: no block has an nn.Linear or an nn.Conv2d")
    asked = config.abits if inputs else config.bits
    bits = dict.fromkeys(layers, asked)
    if config.end_bits is not None:
        first, last = ([name for name in layers if name.split(".")[0] == str(i)]
                       for i in (0, len(blocks) - 1))
        bits |= dict.fromkeys(first[:1] + last[-1:], config.end_bits)
        if empty := [i for i in (0, len(blocks) - 1) if not [*blocks[i].parameters()]]:
            warnings.warn(f"end_bits skips block {empty}, no weight: join it to one", stacklevel=3)
    bits |= {} if inputs else config.layer_bits
    norm, known = nn.modules.batchnorm._BatchNorm, (nn.Embedding, nn.Linear, nn.Conv2d)
    left = [f"{name} ({type(m).__name__})" for name, m in names.items() if isinstance(m, norm)
            or name not in layers and not isinstance(m, known)
            and any("weight" in n and p.dim() > 1 for n, p in m.named_parameters(recurse=False))]
    if left and not inputs:
        hint = ". Fold batch norm first: models.fold_batchnorm" if "BatchNorm" in str(left) else ""
        warnings.warn(f"we quantize nn.Linear and nn.Conv2d, these stay float: {left}{hint}",
                      stacklevel=3)
    if set(bits.values()) == {config.end_bits} != {asked}:
        warnings.warn(f"no layer is left at {'abits' if inputs else 'bits'} = {asked}: {bits}. "
                      "end_bits = None makes no exception of the first and the last", stacklevel=3)
    return [{name.partition(".")[2]: b for name, b in bits.items() if name.split(".")[0] == str(i)}
            for i in range(len(blocks))]


@torch.no_grad()
def cache_bytes(blocks, calibration: Tensor) -> int:
    """The most bytes of activations that are cached at a time, found by a run on one input.
    ValueError: a block that does not return a finite tensor for it."""
    sizes, x = [calibration[0].nbytes], calibration[:1]
    for i, block in enumerate(blocks):                               # a copy: the mode stays
        x = copy.deepcopy(block).eval()(x.to(device_of(blocks), copy=True))
        if not isinstance(x, Tensor) or x.shape[:1] != (1,) or not torch.isfinite(x).all():
            raise ValueError(f"block {i} returns {type(x).__name__} {getattr(x, 'shape', '')}: for "
                             "one input a finite tensor with one row is needed")
        sizes.append(x.nbytes)
    # At most x_fp and x_q, the inputs of a block, and the same two of its outputs.
    return len(calibration) * max(2 * (a + b) for a, b in zip(sizes, sizes[1:], strict=False))


def device_of(blocks) -> torch.device:
    """The device of the first parameter. The CPU where there is none."""
    return next((p.device for block in blocks for p in block.parameters()), torch.device("cpu"))


# ---- The integers, out and back ------------------------------------------------------------------

def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes below 2^bits as bytes: one behind the other, least significant bit first."""
    ones = np.unpackbits(codes.to(torch.uint8).numpy().reshape(-1, 1), axis=1, bitorder="little")
    return torch.from_numpy(np.packbits(ones[:, :bits], bitorder="little"))


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of pack: int32, (count,)."""
    ones = np.unpackbits(data.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(ones, axis=1, bitorder="little")[:, 0].astype(np.int32))


@torch.no_grad()
def save_quantized(model: nn.Module, path) -> int:
    """Write a quantized model as integers, and return the file's size in bytes.

    The file is torch's own format, read with weights_only=True, so that no code runs. A dict of:

        format   "flexround-quantized, 3"
        layers   by name: bits, symmetric, shape, s1, zero_point and codes. The codes are packed,
                 and are code - lo, where lo is -2^(bits-1) if symmetric, else 0. Then
                 W_hat = s1 * (code - zero_point)
        inputs   of layers whose input is quantized, by name: bits, signed, log_step, zero_point
        rest     what else state_dict holds: biases, norms, embeddings, buffers

    We write beside path and move the file there, so that a file of that name is never half a file.
    ValueError: no quantizers in model.
    """
    if not quantizers(model):
        raise ValueError("the model holds no quantizers: save it after quantize_model, before fold")
    file = {"format": "flexround-quantized, 3", "layers": {}, "inputs": {}, "rest": {
        key: value.cpu() for key, value in model.state_dict().items()
        if ".parametrizations.weight." not in f".{key}" and ".input_quantizer." not in f".{key}"}}
    for name, layer in model.named_modules(remove_duplicate=False):  # every name, as in state_dict
        if q := quantizers(layer).get(""):
            codes = q.codes(layer.parametrizations.weight.original).cpu().clamp(q.lo, q.hi)
            if not torch.equal(q.s1.cpu() * (codes - q.zero_point.cpu()), layer.weight.cpu()):
                raise ValueError(f"{name}: W_hat is not s1 * integers() within bounds (call eval?)")
            file["layers"][name] = {
                "bits": q.bits, "symmetric": q.symmetric, "s1": q.s1.cpu(), "zero_point":
                q.zero_point.cpu(), "shape": list(codes.shape), "codes": pack(codes - q.lo, q.bits)}
    for name, q in input_quantizers(model).items():
        file["inputs"][name] = {"bits": q.bits, "signed": q.signed, "log_step": q.log_step.cpu(),
                                "zero_point": q.zero_point.cpu()}
    with tempfile.TemporaryDirectory(dir=Path(path).absolute().parent) as beside:
        torch.save(file, Path(beside) / "file")
        Path(beside, "file").replace(path)
    return Path(path).stat().st_size


def load_quantized(model: nn.Module, path) -> nn.Module:
    """Put the weights of a file of save_quantized into a float network. Return it in eval mode.

    The result computes what the saved model does. Its layers are plain and hold W_hat, and inputs
    that were quantized are quantized again. We check all before we change the first tensor. model
    is the saved model's float architecture, batch norm folded where it was there.
    ValueError: another kind of file, or another architecture (it names the layer).
    """
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        if file["format"] != "flexround-quantized, 3":
            raise ValueError(f"format {file['format']!r}")
        state, inputs = dict(file["rest"]), {}
        for name, a in file["layers"].items():
            codes = unpack(a["codes"], a["bits"], math.prod(a["shape"])).view(a["shape"])
            codes += code_range(a["bits"], a["symmetric"])[0]
            state[f"{name}.weight".lstrip(".")] = a["s1"] * (codes - a["zero_point"])
        for name, a in file["inputs"].items():
            inputs[name] = flexround.LSQ(a["bits"], a["signed"], a["log_step"], a["zero_point"])
    except FileNotFoundError:
        raise
    except Exception as error:                                       # torch raises many kinds
        raise ValueError(f"{path}: truncated, damaged or not a file of save_quantized "
                         f"({type(error).__name__}: {str(error).partition(chr(10))[0]})") from error
    theirs, ours = ({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
                    for tensors in (state, model.state_dict()))
    theirs |= dict.fromkeys(inputs, "a layer")
    ours |= {name: "a layer" for name, _ in model.named_modules() if name in inputs}
    for key in [*theirs, *ours]:
        if theirs.get(key) != ours.get(key):
            raise ValueError(f"{path}: another architecture, or no float network: {key!r} is "
                             f"{theirs.get(key)} in the file, {ours.get(key)} in the model")
    model.load_state_dict(state)
    for name, quantizer in inputs.items():
        quantizer.requires_grad_(False).to(device_of([model]))
        flexround.place_input_quantizer(model.get_submodule(name), quantizer)
    return model.eval()


# ---- The main job --------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = flags.add_argument
    add("--model", nargs="+", default=["resnet", "mobilenet", "gpt"],
        help="resnet, mobilenet (digits), gpt (characters), resnet20 (CIFAR-10, needs --data)")
    add("--method", nargs="+", default=list(METHODS), help="keys of flexround.METHODS")
    add("--bits", nargs="+", type=int, default=[3, 2], help="of a weight, 2 to 8")
    add("--abits", type=int, help="of each layer's input, 2 to 8. None: weights only")
    add("--setting", default="B", help="with --abits: B or Q")
    add("--iterations", type=int, default=250, help="per block. The paper has 5,000 for CNNs")
    add("--lr", type=float, help="first rate. None: each method's default_lr")
    add("--seed", type=int, default=0, help="of the calibration inputs and of the batches")
    add("--data", help="resnet20: folder of CIFAR-10's binary files, maybe with the checkpoint")
    add("--networks", help="folder of the small trained networks. None: ours")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    return flags


def one_run(job) -> tuple:
    """Score one network with one config (None: full precision)."""
    import models
    key, config, name, options = job
    task = models.load_task(name, **options)
    if config is not None:
        quantize_model(task.net.blocks, task.calibration,
                       replace(config, batch_size=task.batch_size), show=False)
    with parametrize.cached():                                       # quantize each weight once
        return key, task.score(task.net.to(config.device if config else "cpu"))


def main(arguments=None) -> None:
    """Score each network at each number of bits with each method, and print the table."""
    import models
    args = parser().parse_args(arguments)
    options = {"data": args.data, "networks": args.networks or models.NETWORKS, "seed": args.seed}
    configs = [ReconstructionConfig(method, bits, iterations=args.iterations, seed=args.seed,
                                    lr=args.lr, abits=args.abits, setting=args.setting,
                                    device=args.device)
               for bits in args.bits for method in args.method]
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no CUDA device here")
    for name in args.model:                                          # what is missing is said here
        print(f"{name}: {models.load_task(name, **options).about}")
    activations = f"A{args.abits}" if args.abits else ""
    labels = {f"W{config.bits}{activations} {config.method}": config for config in configs}
    jobs = [(f"{name} {label}", config, name, options) for name in args.model
            for label, config in {"full precision": None, **labels}.items()]
    # The runs do not depend on each other. On a CPU we make them side by side, in processes of one
    # thread each. This takes the least time, and the number of cores then changes no result.
    workers = min(len(jobs), multiprocessing.cpu_count(), 8) if args.device == "cpu" else 1
    print(f"{len(jobs)} runs, {workers} at a time, {args.iterations} iterations for each block, "
          f"torch {torch.__version__} on {args.device}", flush=True)
    names, began, found = [METHODS[m].__name__ for m in args.method], time.perf_counter(), {}
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        for key, score in pool.imap_unordered(one_run, jobs):
            found[key] = score
            left = (time.perf_counter() - began) * (len(jobs) / len(found) - 1)
            print(f"{key}: {score:.2f} (about {left:.0f} s left)", flush=True)
        pool.close(), pool.join()
    print("\n| network | bits | full precision |", " | ".join(names), "|")
    print("|---|---|---|" + "---|" * len(names))
    for name, bits in itertools.product(args.model, (f"W{b}{activations}" for b in args.bits)):
        keys = [f"{name} full precision", *(f"{name} {bits} {method}" for method in args.method)]
        print(f"| {name} | {bits} |", *(f"{found[key]:.2f} |" for key in keys))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as problem:
        sys.exit(f"reconstruct.py: {problem}")
    except KeyboardInterrupt:
        sys.exit("reconstruct.py: stopped")
