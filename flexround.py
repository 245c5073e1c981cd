"""FlexRound: learnable rounding by element-wise division, and the methods it is measured against.

Read beside section 3 of the paper: Lee, Kim, Kwon, Lee, "FlexRound: Learnable Rounding based on
Element-wise Division for Post-Training Quantization", ICML 2023, arXiv:2306.00317v2.

    round to nearest   W_hat = s1 * round(W / s1)
    AdaRound           W_hat = s1 * (floor(W / s1) + h(V))            addition: up or down
    AdaQuant           W_hat = s1 * round((W + V) / s1)               addition; s1 learned
    FlexRound          W_hat = s1 * round(W / (s1 * S2 * s3 * s4))    division; all learned (Eq. 2)

Each round() is followed by a clamp to the codes that b bits can hold.

    symbol   shape for a linear layer   shape for a convolution   starts at
    W        (C_out, C_in)              (C_out, C_in, H, W)       pre-trained, never changed
    s1       () or (C_out, 1)           () or (C_out, 1, 1, 1)    the minimum of |W - W_hat|
    S2       (C_out, C_in)              (C_out, C_in, H, W)       ones
    s3       (C_out, 1)                 (C_out, 1, 1, 1)          ones
    s4       absent                     (1, C_in, 1, 1)           ones

C_in is W.shape[1]: a depthwise or grouped convolution needs no case of its own, it has few s4.
With S2 = s3 = s4 = 1 FlexRound is round to nearest, and that is where training starts.

    code     the integer that is stored: -2^(b-1)..2^(b-1)-1 (symmetric), 0..2^b-1 (asymmetric)
    z        zero_point, the code of the weight 0; 0 on a symmetric grid; an integer, never learned
    k        code - z, so W_hat = s1 * k
    u        what is rounded, W / (s1 S2 s3 s4) for FlexRound
    inside   1 where lo <= round(u) + z <= hi before clamping, 0 elsewhere

How this differs from the paper, and why
- Every factor is stored as its logarithm (log_s1, log_S2, ...) and used through exp, which keeps
  it positive; the paper only asks for positive factors. The authors' code does the same.
- Clamping, its gradient and zero_point are not in the paper. See Clamp and search_range.
- s1 starts at the minimum of the L_p error of W_hat with p = 2.4 by default, not the paper's p = 2:
  see search_range. The switch is p.

Activations, W4A4 for example, are rounded to a grid with a learned step: see LSQ. What this file
leaves out: learning the factors (reconstruct.py).
"""
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

BITS = range(2, 9)


# ---- The two steps that torch cannot differentiate the way we need -------------------------------

class Round(torch.autograd.Function):
    """Round to the nearest integer, ties to even; the gradient passes straight through.

    round() is flat almost everywhere, so its true derivative, 0, would teach nothing. The
    straight-through estimator pretends that it is the identity on the way back.
    """

    @staticmethod
    def forward(ctx, u):
        return u.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Clamp(torch.autograd.Function):
    """Clamp to [lo, hi]; the gradient passes where lo <= x <= hi, *the bounds included*.

    At few bits many weights round to the first or the last code, so what happens exactly there
    matters: the mask is ours, and a change of torch.clamp cannot move results. Where x has been
    rounded, a weight is inside as long as it *rounds* to a code that exists, as u = hi + 0.4 does.
    """

    @staticmethod
    def forward(ctx, x, lo, hi):
        ctx.save_for_backward((x >= lo) & (x <= hi))
        return x.clamp(lo, hi)

    @staticmethod
    def backward(ctx, grad):
        inside, = ctx.saved_tensors
        return grad * inside, None, None


# ---- The grid: how s1 and zero_point start -------------------------------------------------------

def code_range(bits: int, symmetric: bool, name: str = "bits") -> tuple[int, int]:
    """Least and greatest code (lo, hi) of a uniform grid; 3 bits: (-4, 3) or (0, 7).

    Raises ValueError for bits outside 2..8, under the name that the caller gives them.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"{name} = {bits!r}: an integer from {BITS[0]} to {BITS[-1]} is allowed")
    return (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2 ** bits - 1)


@torch.no_grad()
def search_range(W: Tensor, bits: int, symmetric: bool = True, per_channel: bool = False,
                 p: float = 2.4) -> tuple[Tensor, Tensor]:
    """Find the grid that minimises sum |W - W_hat|^p under round to nearest.

    Starts at min-max, the smallest grid that clips nothing, and shrinks it: the best of 32 steps
    of 10 %, then of 14 finer ones around that. Min-max is among the candidates, and each is scored
    with s1 as it will be used, so the result is never worse than min-max in this measure (but for
    rounding where W has half precision). A range always holds 0, so that zero_point is a code; on
    an asymmetric grid the two ends shrink together, then each alone.

    p = 2 is the paper's ||W - W_hat||^2; BRECQ and the authors' code take 2.4, which weighs the
    clipped outliers more. Which is better was measured, see README; the default is 2.4.

    Args:
        W: (C_out, C_in) or (C_out, C_in, H, W), floating point.
        per_channel: one grid for each of the C_out output channels instead of one for all of W.

    Returns:
        log_s1, in W's dtype, and zero_point, int32: both of shape () for one grid, and of shape
        (C_out, 1) or (C_out, 1, 1, 1) for one a channel. All-zero weights get s1 = 1, log_s1 = 0.

    Raises:
        ValueError: bits outside 2..8, p not positive, W of another shape, or not finite.
    """
    lo, hi = code_range(bits, symmetric)
    if not p > 0:
        raise ValueError(f"p = {p!r}: a positive number is allowed")
    if W.dim() not in (2, 4) or W.numel() == 0 or not W.is_floating_point():
        raise ValueError(f"W is {W.dtype} of shape {tuple(W.shape)}: the floating-point weight of "
                         "a linear layer (2-D) or a 2-D convolution (4-D), not empty, is allowed")
    if not torch.isfinite(W).all():
        raise ValueError("W holds NaN or infinity: only finite weights can be quantized")

    rows = W.detach().flatten(1) if per_channel else W.detach().reshape(1, -1)
    rows = rows.float() if W.dtype in (torch.float16, torch.bfloat16) else rows

    # 64 channels at a time: the temporaries then stay in the processor's cache (3 times faster).
    found = [_search_rows(part, W.dtype, lo, hi, symmetric, p) for part in rows.split(64)]
    log_s1, zero_point = (torch.cat(parts) for parts in zip(*found, strict=True))
    shape = (len(W),) + (1,) * (W.dim() - 1) if per_channel else ()
    return log_s1.reshape(shape), zero_point.reshape(shape)


def _search_rows(rows: Tensor, dtype: torch.dtype, lo: int, hi: int, symmetric: bool, p: float):
    """search_range for each row of (C, N) on its own; returns log_s1 and zero_point, (C, 1)."""
    least = rows.amin(1, keepdim=True).clamp(max=0)                  # (C, 1): 0 is in the range
    most = rows.amax(1, keepdim=True).clamp(min=0)                   # (C, 1)
    best = torch.full_like(least, math.inf)
    shrink_least = shrink_most = torch.ones_like(least)
    log_s1 = torch.zeros_like(least)
    zero_point = torch.zeros_like(least)
    unit = torch.where(most > least, most - least, 1.0)              # keeps |error|^p in range

    def score(least, most):
        if symmetric:
            s1 = torch.maximum(most / hi, least / lo)                # lo and least are negative
        else:
            s1 = (most - least) / (hi - lo)
        s1 = torch.where(s1 > 0, s1, 1.0)                            # all zero: a finite logarithm
        log_s1 = s1.log().to(dtype)
        s1 = log_s1.exp().to(rows.dtype)                             # as it will be used
        z = torch.zeros_like(s1) if symmetric else (-least / s1).round().clamp(lo, hi)
        W_hat = (rows / s1).round_().clamp_(lo - z, hi - z).mul_(s1)
        error = W_hat.sub_(rows).div_(unit).abs_().pow_(p).sum(1, keepdim=True)
        return log_s1.to(rows.dtype), z, error

    coarse = [0.9 ** i for i in range(32)]                           # down to 4 % of min-max
    fine = [0.9 ** (i / 8) for i in range(-7, 8) if i]               # steps of 1.3 %
    ends = [(True, True)] if symmetric else [(True, True), (True, False), (False, True)]
    for move_least, move_most in ends:
        for steps in (coarse, fine):
            from_least, from_most = shrink_least, shrink_most        # what the last sweep found
            for step in steps:
                a = from_least * step if move_least else from_least
                b = from_most * step if move_most else from_most
                candidate_log_s1, z, error = score(least * a, most * b)
                better = error < best
                best = torch.where(better, error, best)
                log_s1 = torch.where(better, candidate_log_s1, log_s1)
                zero_point = torch.where(better, z, zero_point)
                shrink_least = torch.where(better, a, shrink_least)
                shrink_most = torch.where(better, b, shrink_most)
    return log_s1.to(dtype), zero_point.to(torch.int32)


# ---- The quantizers: one face, four rules --------------------------------------------------------

class RoundToNearest(nn.Module):
    """Round to nearest, W_hat = s1 * round(W / s1) (section 2), and the face that all four share.

    q = RoundToNearest(W, bits, symmetric=True, per_channel=False); q(W) is W_hat, in W's shape;
    q.codes(W) are the integers that would be stored; W_hat = q.s1 * (q.codes(W) - q.zero_point)
    exactly. Each also is a parametrization of a layer's weight: see quantize_layers.

    Args:
        W: the pre-trained weight, (C_out, C_in) or (C_out, C_in, H, W). Only its shape, dtype,
            device and (for the starting s1 and AdaRound's V) values are used; it is not kept.
        bits: 2 to 8.
        symmetric: codes -2^(b-1)..2^(b-1)-1 and zero_point 0, or codes 0..2^b-1 and a zero_point.
        per_channel: one s1 (and zero_point) for each output channel, or one for W.
        p: exponent of the error that the starting s1 minimises.

    Raises:
        ValueError: as search_range does.
    """

    learns_s1 = False

    def __init__(self, W: Tensor, bits: int, symmetric: bool = True, per_channel: bool = False, *,
                 p: float = 2.4):
        super().__init__()
        self.lo, self.hi = code_range(bits, symmetric)
        self.bits, self.symmetric, self.per_channel = bits, symmetric, per_channel
        log_s1, zero_point = search_range(W, bits, symmetric, per_channel, p)
        if self.learns_s1:
            self.log_s1 = nn.Parameter(log_s1)
        else:
            self.register_buffer("log_s1", log_s1)
        self.register_buffer("zero_point", zero_point)

    @property
    def s1(self) -> Tensor:
        """The grid step, () or (C_out, 1[, 1, 1]). All methods take exp of the same logarithm, so
        that their grids agree to the last bit."""
        return self.log_s1.exp()

    @property
    def bounds(self):
        """Least and greatest k = code - zero_point."""
        if self.symmetric:                                           # zero_point is 0
            return self.lo, self.hi
        return self.lo - self.zero_point, self.hi - self.zero_point

    def integers(self, W: Tensor) -> Tensor:
        """k = code - zero_point as floating-point numbers, W's shape. The rule of each method."""
        return Clamp.apply(Round.apply(W / self.s1), *self.bounds)

    def forward(self, W: Tensor) -> Tensor:
        """W_hat = s1 * k, W's shape. Outside the rounding stands s1 alone."""
        return self.s1 * self.integers(W)

    @torch.no_grad()
    def codes(self, W: Tensor) -> Tensor:
        """The codes, zero_point included: int32, W's shape, all within [q.lo, q.hi]."""
        return self.integers(W).to(torch.int32) + self.zero_point

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}, per_channel={self.per_channel}"


class AdaRound(RoundToNearest):
    """Rounding by addition, up or down: W_hat = s1 * (floor(W / s1) + h(V)), Nagel et al. 2020.

    h is the rectified sigmoid, clamp(1.2 sigmoid(V) - 0.1, 0, 1), and V starts where h(V) is the
    fraction that floor cuts off. In train mode W_hat is soft: h lies anywhere between 0 and 1, and
    a regulariser pushes it to one of them. In eval mode, and in codes(), h is 0 or 1: hard codes.
    At the start these are round to nearest's, except at exact ties, which here always go up.
    s1 is fixed: it defines what up and down are.
    """

    def __init__(self, W, bits, symmetric=True, per_channel=False, *, p=2.4):
        super().__init__(W, bits, symmetric, per_channel, p=p)
        u = W.detach() / self.s1
        # The inverse of h, written so that the sign of V is the sign of (fraction - 0.5) exactly:
        # 1.2 sigmoid(V) - 0.1 = fraction  <=>  V = 2 atanh((fraction - 0.5) / 0.6).
        self.V = nn.Parameter(2 * torch.atanh((u - u.floor() - 0.5) / 0.6))    # W's shape

    def h(self) -> Tensor:
        """The rectified sigmoid of V, in [0, 1], W's shape."""
        return Clamp.apply(1.2 * torch.sigmoid(self.V) - 0.1, 0, 1)

    def integers(self, W, soft: bool = False):
        up = self.h() if soft else (self.V >= 0).to(W.dtype)
        return Clamp.apply(torch.floor(W / self.s1) + up, *self.bounds)

    def forward(self, W):
        return self.s1 * self.integers(W, soft=self.training)

    @staticmethod
    def schedule(t: float) -> tuple[float, float]:
        """Weight and exponent beta of the regulariser at t = iteration / iterations, in [0, 1].

        No regulariser for the first fifth, then weight 0.01 while beta falls from 20 to 2 in a
        straight line: BRECQ's settings, with which the paper runs AdaRound.
        """
        return (0.0, 20.0) if t < 0.2 else (0.01, 20 - 18 * (t - 0.2) / 0.8)

    def regulariser(self, beta: float) -> Tensor:
        """sum of 1 - |2 h(V) - 1|^beta, a scalar: 0 once every h is 0 or 1."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()


class AdaQuant(RoundToNearest):
    """Rounding by addition, anywhere: W_hat = s1 * round((W + V) / s1), Hubara et al. 2021.

    V has W's shape and W's units and starts at zeros; s1 is learned with it. With G = dL/dW_hat,
    dL/dV = inside G: how large the weight is does not enter, which is the paper's point.

    V_in_steps=True is not AdaQuant's but an experiment's (README, Why so close): W_hat =
    s1 * round(W / s1 + V), so that one rate moves the weights of each layer by as many grid steps.
    """

    learns_s1 = True

    def __init__(self, W, bits, symmetric=True, per_channel=False, *, p=2.4,
                 V_in_steps: bool = False):
        super().__init__(W, bits, symmetric, per_channel, p=p)
        self.V_in_steps = V_in_steps
        self.V = nn.Parameter(torch.zeros_like(W))                   # W's shape

    def integers(self, W):
        u = W / self.s1 + self.V if self.V_in_steps else (W + self.V) / self.s1
        return Clamp.apply(Round.apply(u), *self.bounds)


class Division(torch.autograd.Function):
    """W_hat = s1 * clamp(round(W / S)), Eqs. 1 and 2, from the logarithms of the factors; and on
    the way back Proposition 3.1, in the form that the logarithms give it:

        dW_hat/dlog S2 = dW_hat/dlog s3 = dW_hat/dlog s4 = -inside s1 u          (slope below)
        dW_hat/dlog s1 = s1 (k - inside u) = W_hat + slope

    Autograd finds the same through exp, product, division, Round and Clamp, in twice the
    operations. Here nothing of W's size is kept but slope (the layer keeps W_hat).
    """

    @staticmethod
    def forward(ctx, W, log_s1, log_S2, log_s3, log_s4, lo, hi):
        log_S = log_s1                                               # Eq. 2: S = s1 S2 s3 (s4),
        for log in (log_s3, log_s4, log_S2):                         # the small ones first
            log_S = log_S if log is None else log_S + log
        u = W / log_S.exp()
        code = u.round()
        k = code.clamp(lo, hi)
        s1 = log_s1.exp()
        # -W / S'^2, times S' for the logarithm, is -s1 u; inside the grid, where clamp did nothing.
        slope = u.mul_(code == k).mul_(-s1)
        W_hat = k.mul_(s1)                                           # Eq. 1: outside is s1 alone
        ctx.save_for_backward(slope, W_hat)
        ctx.shapes = [None if log is None else log.shape for log in (log_s1, log_s3, log_s4)]
        return W_hat

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        slope, W_hat = ctx.saved_tensors
        to_S2 = G * slope
        to_s1 = torch.addcmul(to_S2, G, W_hat)                       # G (W_hat + slope)
        # A factor that several weights share gets the sum of theirs.
        to_s1, to_s3, to_s4 = (None if shape is None else to.sum_to_size(shape)
                               for to, shape in zip((to_s1, to_S2, to_S2), ctx.shapes, strict=True))
        return None, to_s1, to_S2, to_s3, to_s4, None, None


class FlexRound(RoundToNearest):
    """Rounding by division: W_hat = s1 * round(W / (s1 * S2 * s3 * s4)), Eqs. 1 and 2.

    S2 (one scale a weight), s3 (one an output channel) and, for convolutions, s4 (one an input
    channel) start at ones; shapes at the head of this file.

    Proposition 3.1 (the reciprocal rule): with S' = S2 * s3 (* s4), a weight inside the grid has
    dL/dS' = -(W / S'^2) * dL/dW_hat: s1 cancels, and the gradient grows with the weight. Spelled
    out, with G = dL/dW_hat and the sums over all weights that share the factor:

        dL/dS2 =     -inside G W / (S2^2 s3 s4)        dL/ds3 = sum -inside G W / (S2 s3^2 s4)
        dL/ds4 = sum -inside G W / (S2 s3 s4^2)        dL/ds1 = sum G (k - inside u)

    and for a stored logarithm times the factor itself, dL/dlog S2 = S2 dL/dS2: see Division.

    Args (beyond RoundToNearest's), the ablations of the paper's Table 1:
        learn_s1: False fixes s1 at its start (ablation 1).
        use_s3_s4: False leaves s3 and s4 out (ablation 2); q.s3 and q.s4 are then None.
    """

    def __init__(self, W, bits, symmetric=True, per_channel=False, *, p=2.4, learn_s1: bool = True,
                 use_s3_s4: bool = True):
        self.learns_s1 = learn_s1
        super().__init__(W, bits, symmetric, per_channel, p=p)
        C_out, C_in, *kernel = W.shape
        ones = [1] * len(kernel)
        self.log_S2 = nn.Parameter(torch.zeros_like(W))              # log 1 = 0
        self.log_s3 = self.log_s4 = None
        if use_s3_s4:
            self.log_s3 = nn.Parameter(W.new_zeros(C_out, 1, *ones))
        if use_s3_s4 and kernel:                                     # Eq. 2: convolutions only
            self.log_s4 = nn.Parameter(W.new_zeros(1, C_in, *ones))

    @property
    def S2(self) -> Tensor:
        """One positive scale a weight, W's shape."""
        return self.log_S2.exp()

    @property
    def s3(self) -> Tensor | None:
        """One positive scale an output channel, (C_out, 1[, 1, 1]); None where absent."""
        return None if self.log_s3 is None else self.log_s3.exp()

    @property
    def s4(self) -> Tensor | None:
        """One positive scale an input channel, (1, C_in, 1, 1); None for a linear layer."""
        return None if self.log_s4 is None else self.log_s4.exp()

    @torch.no_grad()
    def integers(self, W):
        return (self(W) / self.s1).round()       # W_hat = s1 k: so Eq. 2 stands once, in Division

    def forward(self, W):
        return Division.apply(W, self.log_s1, self.log_S2, self.log_s3, self.log_s4, *self.bounds)


# ---- Activations: a learned step size (LSQ) ------------------------------------------------------

class LearnedStep(torch.autograd.Function):
    """LSQ's x_hat from the logarithm of the step, and its gradients."""

    @staticmethod
    def forward(ctx, x, log_step, lo, hi):
        step = log_step.exp()
        code = (x / step).round_()
        k = code.clamp(lo, hi)
        inside = code == k
        x_hat = k.mul_(step)
        ctx.save_for_backward(inside, x_hat - x * inside)
        return x_hat

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        inside, slope = ctx.saved_tensors
        return G * inside, (G * slope).sum(), None, None


class LSQ(nn.Module):
    """An activation on a grid with one learned step a tensor (Esser et al. 2020; section 4).

        x_hat = step * clamp(round(x / step), lo - zero_point, hi - zero_point)
        dL/dlog step = sum G (x_hat - inside x)        dL/dx = inside G        G = dL/dx_hat

    inside is 1 where x rounds to a code that exists, the bounds included. LSQ scales the step's
    gradient by 1 / sqrt(N Q); that is left out, since Adam divides the size of a gradient out
    (under SGD it would be part of the rate). The step is stored as its logarithm, which keeps it
    positive.

    Args:
        bits: 2 to 8. signed: codes -2^(b-1)..2^(b-1)-1 instead of 0..2^b-1.
        log_step, zero_point: scalars to start from; LSQ.of finds them.
        drop: QDrop's probability, in train mode, that an element stays x instead of x_hat.
    """

    def __init__(self, bits: int, signed: bool, log_step: Tensor, zero_point: Tensor,
                 drop: float = 0.0):
        super().__init__()
        self.lo, self.hi = code_range(bits, signed)
        self.bits, self.signed, self.drop = bits, signed, drop
        self.log_step = nn.Parameter(log_step.clone())
        self.register_buffer("zero_point", zero_point.clone())

    @classmethod
    def of(cls, x: Tensor, bits: int, symmetric: bool = True, p: float = 2.4, drop: float = 0.0,
           negative: bool = False):
        """The LSQ that starts at the least L_p error on x, any shape, what a layer gets on
        calibration inputs; of a large x, on 2^16 elements drawn at random, and its two ends.
        ValueError as search_range.

        symmetric: zero_point 0, and unsigned codes where x is nowhere negative (behind a ReLU), nor
        what x is a part of, as `negative` says; otherwise unsigned codes and an integer zero_point,
        which is not learned.
        """
        signed = symmetric and (negative or bool(x.min() < 0))
        x = x.detach().flatten()
        if len(x) > 2 ** 16:                                         # large: a sample does
            some = torch.randint(len(x), (2 ** 16,), generator=torch.Generator().manual_seed(0))
            x = torch.cat([x[some.to(x.device)], x.amin()[None], x.amax()[None]])
        return cls(bits, signed, *search_range(x[None], bits, signed, p=p), drop)

    def forward(self, x: Tensor) -> Tensor:
        """x_hat, x's shape."""
        lo, hi = self.lo - self.zero_point, self.hi - self.zero_point
        x_hat = LearnedStep.apply(x, self.log_step, lo, hi)
        if self.training and self.drop > 0:
            return torch.where(torch.rand_like(x) < self.drop, x, x_hat)
        return x_hat

    def extra_repr(self) -> str:
        return f"bits={self.bits}, codes {self.lo}..{self.hi}, drop={self.drop}"


METHODS = {"rtn": RoundToNearest, "adaround": AdaRound, "adaquant": AdaQuant,
           "flexround": FlexRound}
SWITCHES = {AdaQuant: ["V_in_steps"], FlexRound: ["learn_s1", "use_s3_s4"]}    # a method's own


def start_of(q: RoundToNearest, W: Tensor, p: float = 2.4) -> RoundToNearest:
    """Round to nearest on the grid that q started from, by the same search."""
    return RoundToNearest(W, q.bits, q.symmetric, q.per_channel, p=p)


@torch.no_grad()
def grid_shift(q: RoundToNearest, W: Tensor, p: float = 2.4, learned_s1: bool = False) -> Tensor:
    """How many grid steps q moves each weight from round to nearest: int32, W's shape.

    The difference of the codes, each on its own grid: q's with s1 as learned, round to nearest's
    with s1 as search_range finds it. So a smaller s1 alone shifts every large weight; learned_s1
    takes q's s1 for both, which leaves what S2, s3, s4 (or V) do. (Figs. 3 to 6; the paper does
    not say which s1 it takes.)
    """
    nearest = RoundToNearest.integers(q, W) if learned_s1 else start_of(q, W, p).integers(W)
    return (q.integers(W) - nearest).to(torch.int32)


# ---- The seam: a quantizer is a parametrization of a layer's weight ------------------------------
#
# torch.nn.utils.parametrize makes layer.weight the quantizer's output wherever it is read, so a
# layer keeps its own class and forward (stride, padding mode, groups, a subclass's own idea) and
# there are no quantized layers here. W itself rests in layer.parametrizations.weight.original.

def quantizable_layers(module: nn.Module, skip=()) -> dict[str, nn.Module]:
    """The layers of a module that can be quantized, by name, in the order of definition.

    These are nn.Linear, nn.Conv2d and their subclasses, less the names in skip and less those tied
    to an nn.Embedding of the module. A module that is such a layer itself has the name ''.

    Raises:
        ValueError: a name in skip that is not such a layer, a weight that something else makes
            already (a parametrization, weight norm, pruning), that is not finite, or that two of
            the layers share.
    """
    embedded = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    for name in skip:
        if name not in layers:
            raise ValueError(f"skip names {name!r}: the nn.Linear and nn.Conv2d are {list(layers)}")
    chosen, owner = {}, {}
    for name, layer in layers.items():
        if name in skip:
            continue
        if parametrize.is_parametrized(layer, "weight") or \
                not isinstance(layer.weight, nn.Parameter):
            raise ValueError(f"layer {name!r} has a parametrization of its weight already (or "
                             "weight norm, or pruning): fold or remove it first")
        if id(layer.weight) in embedded:
            continue
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"layer {name!r}: its weight holds NaN or infinity")
        twin = owner.setdefault(id(layer.weight), name)
        if twin != name:
            raise ValueError(f"layers {twin!r} and {name!r} share one weight: give each its own, "
                             "or let quantize_layers skip one")
        chosen[name] = layer
    return chosen


def quantizers(module: nn.Module, every_name: bool = False) -> dict[str, RoundToNearest]:
    """The quantizers that are in place in a module, by the name of their layer ('' for itself); of
    a layer that the module holds under two names, by the first, or by every_name."""
    return {name: layer.parametrizations.weight[0]
            for name, layer in module.named_modules(remove_duplicate=not every_name)
            if parametrize.is_parametrized(layer, "weight")
            and isinstance(layer.parametrizations.weight[0], RoundToNearest)}


def quantize_layers(block: nn.Module, config, layer_bits: dict[str, int] | None = None, skip=()
                    ) -> dict[str, RoundToNearest]:
    """Put a quantizer on the weight of each nn.Linear and nn.Conv2d of a block, in place.

    All quantizers are made before the first is put in place: on an error the block is unchanged.
    Each starts equal to round to nearest (AdaRound in eval mode). fold() makes it permanent.

    Args:
        block: any module; a single layer is one too, and its name is then ''.
        config: a reconstruct.ReconstructionConfig; method, bits, symmetric, per_channel, p, and
            the method's switches are read.
        layer_bits: bits of single layers by their name within the block, before config.bits.
        skip: names within the block that stay as they are.

    Returns:
        The quantizers by the name of their layer.

    Raises:
        ValueError: layer_bits names an unknown or unsupported layer; else as quantizable_layers
            and search_range do.
    """
    layers, layer_bits = quantizable_layers(block, skip), layer_bits or {}
    for name in layer_bits:
        if name not in layers:
            found = dict(block.named_modules()).get(name)
            kind = "no such layer" if found is None else type(found).__name__
            raise ValueError(f"layer_bits names {name!r} ({kind}): the nn.Linear and nn.Conv2d to "
                             f"quantize are {list(layers)}")
    rule = METHODS[config.method]
    switches = {name: getattr(config, name) for name in SWITCHES.get(rule, ())}
    made = {name: rule(layer.weight, layer_bits.get(name, config.bits), config.symmetric,
                       config.per_channel, p=config.p, **switches)
            for name, layer in layers.items()}
    for name, quantizer in made.items():
        parametrize.register_parametrization(layers[name], "weight", quantizer)
    return made


def quantize_input(layer, args):
    """The forward pre-hook of a layer whose input is quantized; a copy's is the copy's own LSQ."""
    return layer.input_quantizer(args[0]), *args[1:]


def quantize_inputs(block: nn.Module, x: Tensor, bits: dict[str, int], symmetric: bool = True,
                    p: float = 2.4, drop: float = 0.0, more=()) -> dict[str, LSQ]:
    """Quantize what single layers of a block get, in place: an LSQ each, started on one batch.

    What a layer multiplies its weight with is rounded; shortcuts, their additions, the two products
    within attention, softmax and norms stay float. A ReLU's output is rounded where the next layer
    takes it, behind the ReLU, so on an unsigned grid.

    Args:
        block: run on x and more, as it is.
        x: (N, ...) inputs of the block, on its device: steps and zero points start on these.
        bits: of each layer's input, by the layer's name in the block.
        symmetric, p, drop: as LSQ.of takes them.
        more: further batches, to see there, too, whether a layer ever gets a negative value: a
            symmetric grid is unsigned or not for good.

    Returns:
        The LSQs by the name of their layer. A layer that did not run gets none, with a warning.

    Raises:
        ValueError: a layer called with keywords only, one whose input is quantized already, or as
            search_range does; the block is unchanged.
    """
    names = {block.get_submodule(name): name for name in bits}
    seen, negative = {name: [] for name in bits}, dict.fromkeys(bits, False)

    def look(layer, args):                                           # maybe more than once a layer
        if not args:
            raise ValueError(f"layer {names[layer]!r} is called with keywords only: what is "
                             "quantized is its first argument")
        if starting:
            seen[names[layer]].append(args[0].detach().flatten().clone())
        else:
            negative[names[layer]] |= bool((args[0] < 0).any())

    for layer, name in names.items():
        if hasattr(layer, "input_quantizer"):
            raise ValueError(f"layer {name!r}: its input is quantized already")
    handles = [layer.register_forward_pre_hook(look) for layer in names]
    try:
        with torch.no_grad(), parametrize.cached():                  # quantize each weight once
            starting = True
            block(x.clone())
            starting = False
            for batch in more if symmetric else ():                  # else there is no sign to see
                block(batch.clone())
    finally:
        for handle in handles:
            handle.remove()
    made = {name: LSQ.of(torch.cat(parts), bits[name], symmetric, p, drop, negative[name])
            for name, parts in seen.items() if parts}
    if len(made) < len(bits):
        warnings.warn(f"these layers were not called, their inputs stay float (their weights do "
                      f"not): {set(bits) - set(made)}", stacklevel=2)
    for name, quantizer in made.items():
        place_input_quantizer(block.get_submodule(name), quantizer)
    return made


def place_input_quantizer(layer: nn.Module, quantizer: LSQ) -> None:
    """From now on the layer computes with quantizer(x) instead of x."""
    layer.input_quantizer = quantizer
    layer.register_forward_pre_hook(quantize_input)


def input_quantizers(module: nn.Module) -> dict[str, LSQ]:
    """The LSQs that are in place in a module, by the name of their layer ('' for itself)."""
    return {name: layer.input_quantizer for name, layer in module.named_modules()
            if isinstance(getattr(layer, "input_quantizer", None), LSQ)}


def remove_input_quantizers(module: nn.Module) -> None:
    """Let the layers of a module take float inputs again."""
    for name in input_quantizers(module):
        layer = module.get_submodule(name)
        del layer.input_quantizer
        for key, hook in list(layer._forward_pre_hooks.items()):     # a copied layer has no handle
            if hook is quantize_input:
                del layer._forward_pre_hooks[key]


def fold(module: nn.Module, keep: bool = True) -> nn.Module:
    """Remove the quantizers of a module, in place, leaving W_hat as the plain weight; return it.

    Afterwards classes and state_dict keys are those of the float module and each weight is q(W)
    with hard codes, to the last bit: a new Parameter, so that a float layer which shared the old
    one keeps its values. keep=False puts the weight from before back instead. A plain layer cannot
    round its input: quantizers of inputs are removed, where keep with a warning.
    """
    if input_quantizers(module) and keep:
        warnings.warn("folded layers get float inputs again", stacklevel=2)
    remove_input_quantizers(module)
    for name, quantizer in quantizers(module).items():
        layer = module.get_submodule(name)
        quantizer.eval()                                             # AdaRound: hard codes
        # A deep copy shares the class that torch injected, and removing a parametrization takes the
        # property `weight` off that class, the copy's included. So the layer gets its own first.
        injected = type(layer)
        body = {k: v for k, v in vars(injected).items() if k not in ("__dict__", "__weakref__")}
        layer.__class__ = type(injected.__name__, injected.__bases__, body)
        held = layer.parametrizations.weight
        if keep:                                                     # torch writes W_hat into it
            held.original = nn.Parameter(held.original.detach().clone(),
                                         held.original.requires_grad)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=keep)
        for key, p in list(layer.named_parameters(recurse=False)):   # weight first, as it was
            if key != "weight":
                delattr(layer, key)
                layer.register_parameter(key, p)
    return module


# ---- What the codes are for: a layer computed in integers ----------------------------------------

def integer_forward(layer: nn.Module, x_codes: Tensor, x_step: Tensor, x_zero: Tensor) -> Tensor:
    """A quantized layer's output from integer codes and integer inputs: to learn from, not fast.

    With x = x_step * (x_codes - x_zero) and W_hat = s1 * (codes - zero_point) the steps leave the
    sum, which is over int32 alone; a single multiplication at the end brings the scale back:

        layer(x) = x_step * s1 * sum (x_codes - x_zero) * (codes - zero_point) + bias

    Args:
        layer: an nn.Linear or nn.Conv2d itself (no subclass), padded with zeros, not dilated (there
            torch has no convolution of integers), with a quantizer in place. Sums stay below 2^31
            as long as a weight's fan-in is below 33,000.
        x_codes: integers, (..., C_in) or (N, C_in, H, W); RoundToNearest(x, 8, False) finds such
            codes, their step (its s1) and zero (its zero_point) for a 2-D or 4-D x.

    Raises:
        ValueError: another layer, or no quantizer on it.
    """
    q = quantizers(layer).get("")
    plain = parametrize.type_before_parametrizations(layer) in (nn.Linear, nn.Conv2d)
    padding, dilation = getattr(layer, "padding_mode", "zeros"), getattr(layer, "dilation", (1, 1))
    if not plain or q is None or padding != "zeros" or tuple(dilation) != (1, 1):
        raise ValueError(f"{layer}: a quantized nn.Linear, or nn.Conv2d padded with zeros and not "
                         "dilated, is allowed")
    k = q.codes(layer.parametrizations.weight.original) - q.zero_point   # int32, W's shape
    k_x = x_codes.to(torch.int32) - x_zero                           # int32: 0 stands for x = 0
    if isinstance(layer, nn.Linear):
        total, channels = F.linear(k_x, k), (-1,)
    else:
        total = F.conv2d(k_x, k, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        channels = (-1, 1, 1)
    y = total * (x_step * q.s1.reshape(channels))                    # float from here on
    return y if layer.bias is None else y + layer.bias.reshape(channels)
