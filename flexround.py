"""FlexRound: learnable rounding by element-wise division, and the methods it is measured against.

Read this beside section 3 of the paper: Lee, Kim, Kwon, Lee, "FlexRound: Learnable Rounding based
on Element-wise Division for Post-Training Quantization", ICML 2023, arXiv:2306.00317v2.

    round to nearest   W_hat = s1 * round(W / s1)
    AdaRound           W_hat = s1 * (floor(W / s1) + h(V))            addition: up or down
    AdaQuant           W_hat = s1 * round((W + V) / s1)               addition; s1 learned
    FlexRound          W_hat = s1 * round(W / (s1 * S2 * s3 * s4))    division; all learned (Eq. 2)

What was rounded is then clamped to the codes that b bits can hold.

We multiply by s1 alone, because S2, s3 and s4 only choose the code. What is stored is the code and
the grid (s1, and z below), so these three cost nothing in use.

    symbol   shape for a linear layer   shape for a convolution   initial value
    W        (C_out, C_in)              (C_out, C_in, H, W)       pre-trained, never changed
    s1       () or (C_out, 1)           () or (C_out, 1, 1, 1)    the smallest |W - W_hat| found
    S2       (C_out, C_in)              (C_out, C_in, H, W)       ones
    s3       (C_out, 1)                 (C_out, 1, 1, 1)          ones
    s4       absent                     (1, C_in, 1, 1)           ones

s1 is the step size of the grid. C_in is W.shape[1]. A depthwise or grouped convolution therefore
needs no case of its own: its C_in, and so its number of s4, is small. With S2 = s3 = s4 = 1
FlexRound is round to nearest, and that is where training starts.

    code     the integer that is stored: -2^(b-1)..2^(b-1)-1 (symmetric) or 0..2^b-1 (asymmetric)
    z        zero_point, the code of the weight 0; 0 on a symmetric grid; an integer, never learned
    k        code - z, so that W_hat = s1 * k
    u        the number that is rounded: W / (s1 S2 s3 s4) for FlexRound
    inside   1 where the code round(u) + z exists, so that the clamp changes nothing, 0 elsewhere

How we differ from the paper, and why

- We store the logarithm of each factor (log_s1, log_S2, ...) and take exp of it. This keeps the
  factor positive, which is all the paper asks for. The authors' code does the same.
- The paper does not mention clamping, its gradient or zero points. See Clamp and best_grid.
- The initial s1 can minimise the error of the layer's output instead of W's: grid_from_outputs.

The order of this file: FlexRound, the initial grid, how a rule is placed on a layer; then the
rivals; then what the paper does not have; then activations (section 4). The next file,
reconstruct.py, shows how the factors are learned.
"""
import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# ---- Two functions whose gradient we define ------------------------------------------------------

class Round(torch.autograd.Function):
    """Round to the nearest integer, ties to even. The gradient passes straight through.

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
    """Clamp to [lo, hi]. The gradient passes where lo <= x <= hi, *the bounds included*.

    At few bits many weights round to the first or the last code, so what happens exactly there
    matters. We own the mask, so that a change of torch.clamp cannot move results. Where x has been
    rounded, a weight is inside as long as it *rounds* to a code that exists, as u = hi + 0.4 does.
    Outside the grid only a learned s1 gets a gradient: the code cannot change, but W_hat = s1 k
    still moves with s1.
    """

    @staticmethod
    def forward(ctx, x, lo, hi):
        ctx.save_for_backward((x >= lo) & (x <= hi))                 # the clamp's mask
        return x.clamp(lo, hi)

    @staticmethod
    def backward(ctx, grad):
        inside, = ctx.saved_tensors
        return grad * inside, None, None


# ---- The rules: how W becomes W_hat --------------------------------------------------------------

class RoundToNearest(nn.Module):
    """Round to nearest, W_hat = s1 * round(W / s1) (section 2). The other three are subclasses.

    q(W) is W_hat, in W's shape. q.codes(W) are the integers that would be stored. In eval mode
    W_hat is exactly q.s1 * (q.codes(W) - q.zero_point). A rule of your own overrides integers().

    Args:
        W: the pre-trained weight, (C_out, C_in) or (C_out, C_in, H, W). We do not keep it.
        bits: 2 to 8.
        symmetric: codes -2^(b-1)..2^(b-1)-1 and zero_point 0, or codes 0..2^b-1 and a zero_point.
        per_channel: one s1 (and zero_point) for each output channel, or one for all of W.
        p: exponent of the error of W that the initial s1 minimises, see grid_from_weights.
        grid: (log_s1, zero_point) to begin with. None: those of grid_from_weights.

    Raises ValueError if bits are not allowed and, without a grid, if p or W are not.
    """

    learns_s1 = False
    default_lr = 1e-3                # learning rate. A rule that learns should have its own
    default_s1_lr = None             # learning rate of log s1. None: the same as lr

    def __init__(self, W: Tensor, bits: int, symmetric: bool = True, per_channel: bool = False, *,
                 p: float = 2.0, grid: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        self.lo, self.hi = code_range(bits, symmetric)
        self.bits = bits
        self.symmetric = symmetric
        self.per_channel = per_channel
        if grid is None:
            grid = grid_from_weights(W, bits, symmetric, per_channel, p)
        log_s1, zero_point = grid
        if self.learns_s1:
            self.log_s1 = nn.Parameter(log_s1)
        else:
            self.register_buffer("log_s1", log_s1)                   # saved and moved, not learned
        self.register_buffer("zero_point", zero_point)

    @property
    def s1(self) -> Tensor:
        """The step size of the grid, () or (C_out, 1[, 1, 1])."""
        return self.log_s1.exp()

    @property
    def bounds(self):
        """The smallest and the largest k = code - zero_point. Raises ValueError if the quantizer
        was cast to half precision, because its codes would be others."""
        if self.log_s1.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"a {type(self).__name__} was cast to {self.log_s1.dtype}, and its "
                             "codes would change: call flexround.fold first, then cast")
        if self.symmetric:                                           # zero_point is 0
            return self.lo, self.hi
        return self.lo - self.zero_point, self.hi - self.zero_point

    def integers(self, W: Tensor) -> Tensor:
        """Apply the rule of the method. Return k = code - zero_point, in W's dtype and shape."""
        return Clamp.apply(Round.apply(W / self.s1), *self.bounds)

    def forward(self, W: Tensor) -> Tensor:
        """Return W_hat = s1 * k, W's shape. All that integers() learns is in the codes k."""
        return self.s1 * self.integers(W)

    @torch.no_grad()
    def codes(self, W: Tensor) -> Tensor:
        """Return the codes, zero_point included: int32, W's shape, all within [q.lo, q.hi]."""
        return self.integers(W).to(torch.int32) + self.zero_point

    # state_dict holds the codes' range, so that the state of 3 bits is not loaded into 8.
    def get_extra_state(self):
        return torch.tensor([self.lo, self.hi], device="cpu")

    def set_extra_state(self, state):
        if state.tolist() != [self.lo, self.hi]:
            raise ValueError(f"the state has codes from {state.tolist()}, and this quantizer from "
                             f"{[self.lo, self.hi]}: other bits, or another sign")


class Division(torch.autograd.Function):
    """Return k = clamp(round(W / S), lo, hi). Its gradient is the reciprocal rule.

    lo and hi are the bounds of k, and W_hat is s1 * k. With G = dL/dW_hat, what arrives on the way
    back is dL/dk = s1 G, and by the straight-through estimator and the clamp's mask

        dL/dS = (s1 G) * dk/dS = -inside * (W / S^2) * s1 G

    With S = s1 S' this is Proposition 3.1: dL/dS' = s1 dL/dS = -(W / S'^2) G. s1 cancels.

    Clamp(Round(W / S)) has the same gradient, in 1.5 times the operations. Here we save two tensors
    of W's shape: S, and u = W / S with a 0 wherever a weight is outside the grid. They are enough,
    because -inside W / S^2 is -u / S. Neither W nor the mask has to be saved.
    """

    @staticmethod
    def forward(ctx, W, S, lo, hi):
        u = W / S
        rounded = u.round()
        k = rounded.clamp(lo, hi)
        inside = rounded == k                                        # the mask, bounds included
        ctx.save_for_backward(u.mul_(inside), S)
        return k

    @staticmethod
    def backward(ctx, s1_G):
        u, S = ctx.saved_tensors                                     # u is 0 outside the grid
        dk_dS = -u / S                                               # -inside W / S^2
        return None, dk_dS.mul_(s1_G), None, None                    # W, lo and hi do not learn


class FlexRound(RoundToNearest):
    """Rounding by division: W_hat = s1 * round(W / (s1 * S2 * s3 * s4)), Eqs. 1 and 2.

    S2 has a scale for each weight, s3 one for each output channel, and s4 (convolutions only) one
    for each input channel. The head of this file has their shapes and initial values.

    Proposition 3.1 (the reciprocal rule): with S' = S2 * s3 (* s4), a weight inside the grid has
    dL/dS' = -(W / S'^2) * dL/dW_hat. So at equal dL/dW_hat it grows with |W|. Spelled out, with
    G = dL/dW_hat and a sum over all weights that share the factor:

        dL/dS2 =     -inside G W / (S2^2 s3 s4)        dL/ds3 = sum -inside G W / (S2 s3^2 s4)
        dL/ds4 = sum -inside G W / (S2 s3 s4^2)        dL/ds1 = sum G (k - inside u)

    A weight outside the grid gives nothing to S2, s3 and s4. To s1 it gives G k, because W_hat is
    still s1 times the last code.

    What learns is the logarithm of each factor, and dL/dlog S2 = S2 dL/dS2: the exp in S multiplies
    by the factor on the way back. Adam then divides the size of a gradient out, so all logarithms
    move by similar amounts d. What remains of the rule is this: u changes by about |u| d, so a
    large weight travels further than a small one.

    For the two ablations of the paper's Table 1, learn_s1=False keeps the initial s1, and
    use_s3_s4=False leaves s3 and s4 out. s3 and s4 are then None, as s4 is for a linear layer.
    """

    default_lr = 3.2e-2
    default_s1_lr = 8e-3

    def __init__(self, W, bits, symmetric=True, per_channel=False, *, learn_s1: bool = True,
                 use_s3_s4: bool = True, **initial):
        self.learns_s1 = learn_s1                                    # read by super().__init__
        super().__init__(W, bits, symmetric, per_channel, **initial)
        C_out, C_in, *kernel = W.shape
        ones = [1] * len(kernel)
        self.log_S2 = nn.Parameter(torch.zeros_like(W))              # log 1 = 0
        self.log_s3 = self.log_s4 = None                             # None: absent
        if use_s3_s4:
            self.log_s3 = nn.Parameter(W.new_zeros(C_out, 1, *ones))
            if kernel:                                               # Eq. 2: convolutions only
                self.log_s4 = nn.Parameter(W.new_zeros(1, C_in, *ones))

    @property
    def S2(self) -> Tensor:
        return self.log_S2.exp()                                     # W's shape

    @property
    def s3(self) -> Tensor | None:                                   # (C_out, 1[, 1, 1])
        return None if self.log_s3 is None else self.log_s3.exp()

    @property
    def s4(self) -> Tensor | None:                                   # (1, C_in, 1, 1)
        return None if self.log_s4 is None else self.log_s4.exp()

    @property
    def S(self) -> Tensor:
        """The divisor, W's shape: the product of the factors that are there, as exp of a sum of
        logarithms. Autograd sums over all weights that share a factor."""
        logs = (self.log_s1, self.log_s3, self.log_s4, self.log_S2)
        return sum(log for log in logs if log is not None).exp()

    def integers(self, W):
        S = self.S                                                   # Eq. 2: S = s1 * S2 * s3 * s4
        return Division.apply(W, S, *self.bounds)    # Eq. 1: round(W / S). forward multiplies by s1


# ---- The initial grid: from the weights ----------------------------------------------------------
#
# Before anything is learned, s1 and zero_point are those with the smallest error of the weights,
# of all that we try.

def code_range(bits: int, symmetric: bool, name: str = "bits") -> tuple[int, int]:
    """Return the first and the last code (lo, hi) of a uniform grid. 3 bits: (-4, 3) or (0, 7).
    Raises ValueError for bits outside 2..8, under the name that the caller gives them."""
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"{name} = {bits!r}: an integer from 2 to 8 is allowed")
    return (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2 ** bits - 1)


@torch.no_grad()
def grid_from_weights(W: Tensor, bits: int, symmetric: bool = True, per_channel: bool = False,
                      p: float = 2.0) -> tuple[Tensor, Tensor]:
    """Find the grid with the smallest error of the weights, sum |W - W_hat|^p, by round to nearest.

    The paper minimises ||W - W_hat||^2, which is p = 2. BRECQ and the authors' code take 2.4,
    which gives the few large weights more say.

    Args:
        W: (C_out, C_in) or (C_out, C_in, H, W), floating point.
        per_channel: one grid for each of the C_out output channels instead of one for all of W.

    Returns:
        log_s1, in W's dtype, and zero_point, int32. Both have the shape () for one grid, and
        (C_out, 1) or (C_out, 1, 1, 1) for a grid per channel. Weights that are all zero get s1 = 1.

    Raises:
        ValueError: bits are outside 2..8, p is not positive, or check_weight refuses W.
    """
    lo, hi = code_range(bits, symmetric)
    if p is None or not 0 < p < math.inf:
        raise ValueError(f"p = {p!r}: a positive number is allowed")
    check_weight(W)
    rows = W.detach().flatten(1) if per_channel else W.detach().reshape(1, -1)
    width = rows.amax(1, keepdim=True).clamp(min=0) - rows.amin(1, keepdim=True).clamp(max=0)
    unit = torch.where(width > 0, width, 1.0)                        # keeps |error|^p in range

    def error(log_s1, z):
        s1 = log_s1.exp()
        W_hat = (rows / s1).round_().clamp_(lo - z, hi - z).mul_(s1)
        return W_hat.sub_(rows).div_(unit).abs_().pow_(p).sum(1, keepdim=True)

    return shaped(best_grid(rows, lo, hi, symmetric, error), W, per_channel)


def best_grid(rows: Tensor, lo: int, hi: int, symmetric: bool, error) -> tuple[Tensor, Tensor]:
    """Return the best grid that we try for each row of (C, n): log_s1 and zero_point, both (C, 1).

    error(log_s1, zero_point) takes two tensors (C, 1) and returns one. We begin with min-max, the
    smallest grid that clips nothing, and shrink it: we try 32 factors 10 % apart, and then 14 finer
    ones around the best. On an asymmetric grid the two ends shrink together first, and then each
    alone. Min-max is a candidate, so the result is never worse. The range always holds 0, because
    zero_point has to be a code.
    """
    bottom = rows.amin(1, keepdim=True).clamp(max=0)                 # (C, 1)
    top = rows.amax(1, keepdim=True).clamp(min=0)                    # (C, 1)

    def grid(shrink_bottom, shrink_top):
        low, high = bottom * shrink_bottom, top * shrink_top
        s1 = torch.maximum(high / hi, low / lo) if symmetric else (high - low) / (hi - lo)
        log_s1 = torch.where(s1 > 0, s1, 1.0).log()                  # all zero: a finite logarithm
        z = torch.zeros_like(s1)
        if not symmetric:
            z = (-low / log_s1.exp()).round().clamp(lo, hi)
        return log_s1, z

    coarse = [0.9 ** i for i in range(32)]                           # down to 4 % of min-max
    fine = [0.9 ** (i / 8) for i in range(-7, 8) if i != 0]          # 1.3 % apart
    together = [(True, True)]                                        # which ends shrink
    ends = together if symmetric else [*together, (True, False), (False, True)]
    least = torch.full_like(bottom, math.inf)                        # the smallest error so far
    best_bottom = best_top = torch.ones_like(bottom)                 # and how far it has shrunk
    for move_bottom, move_top in ends:
        for factors in (coarse, fine):
            from_bottom, from_top = best_bottom, best_top            # what the last sweep found
            for factor in factors:
                a = from_bottom * factor if move_bottom else from_bottom
                b = from_top * factor if move_top else from_top
                found = error(*grid(a, b))
                better = found < least
                least = torch.where(better, found, least)
                best_bottom = torch.where(better, a, best_bottom)
                best_top = torch.where(better, b, best_top)
    return grid(best_bottom, best_top)


def shaped(grid: tuple[Tensor, Tensor], W: Tensor, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Return a grid of best_grid in the shape that a quantizer of W holds: (), or
    (C_out, 1[, 1, 1])."""
    shape = (len(W),) + (1,) * (W.dim() - 1) if per_channel else ()
    log_s1, zero_point = grid
    return log_s1.reshape(shape), zero_point.reshape(shape).to(torch.int32)


search_range = grid_from_weights                                     # its earlier name


# ---- How a quantizer sits on a layer -------------------------------------------------------------
#
# torch.nn.utils.parametrize makes layer.weight the quantizer's output wherever it is read. So the
# layer keeps its own class and forward (stride, padding, groups), and we need no quantized layers.
# W itself is in layer.parametrizations.weight.original.

def quantizers(module: nn.Module) -> dict[str, RoundToNearest]:
    """Return the quantizers that are in place in a module, by the name of their layer ('' for the
    module itself)."""
    found = {}
    for name, layer in module.named_modules():
        # We ask _modules, because a wrapper such as torch.compile's answers for what it wraps.
        held = layer._modules.get("parametrizations")
        if held is not None and "weight" in held and isinstance(held.weight[0], RoundToNearest):
            found[name] = held.weight[0]
    return found


def quantize_layers(block: nn.Module, config, bits: dict[str, int] | None = None,
                    x: Tensor | None = None) -> dict[str, RoundToNearest]:
    """Put a quantizer on the weight of each nn.Linear and nn.Conv2d of a block, in place.

    At first W_hat is round to nearest (AdaRound's is so in eval mode). fold() makes it permanent.
    We make all quantizers before we place the first, so that an error leaves the block unchanged.

    Args:
        block: any module, float. A single layer is a block as well, and its name is then ''.
        config: a reconstruct.ReconstructionConfig: method, bits, grid and FlexRound's switches.
        bits: for each layer that shall be quantized its bits, by its name within the block. None:
            all layers get config.bits.
        x: (N, ...) the block's full-precision inputs. Needed if config.start = "outputs".

    Returns the quantizers by the name of their layer. Raises ValueError if bits names an unknown
    layer, x is missing, or check_weight or quantizable_layers refuses a weight.
    """
    if bits is None:
        layers = quantizable_layers(block)
        bits = dict.fromkeys(layers, config.bits)
    else:
        skip = [name for name, _ in block.named_modules() if name not in bits]
        layers = quantizable_layers(block, skip)
    for name in bits:
        if name not in layers:
            known = list(quantizable_layers(block))
            raise ValueError(f"bits names {name!r}: the layers are {known}")
    calls = {}
    if config.start == "outputs":
        if x is None:
            raise ValueError("start = 'outputs' needs x, float inputs of the block")
        calls = layer_inputs(block, layers, x, before_hooks=True)
    rule = METHODS[config.method]
    own = {}
    if issubclass(rule, FlexRound):
        own = {"learn_s1": config.learn_s1, "use_s3_s4": config.use_s3_s4}
    made = {}
    for name, layer in layers.items():
        check_weight(layer.weight, f"layer {name!r}: W")
        grid = None                                                  # grid_from_weights
        if calls.get(name):                                          # a layer that block calls
            grid = grid_from_outputs(layer, calls[name], bits[name], config.symmetric,
                                     config.per_channel)
        made[name] = rule(layer.weight, bits[name], config.symmetric, config.per_channel,
                          p=config.p, grid=grid, **own)
    for name, quantizer in made.items():
        parametrize.register_parametrization(layers[name], "weight", quantizer)
    return made


def fold(module: nn.Module, keep: bool = True) -> nn.Module:
    """Remove the quantizers of a module, in place, and leave W_hat as the plain weight. Return the
    module.

    Afterwards the classes and the keys of state_dict are the float module's. Each weight is q(W)
    with hard codes, to the last bit, in a new Parameter. Another module that used the float
    Parameter keeps it. keep=False puts the float weight back instead. Quantizers of inputs are
    removed as well, with a warning if keep is True, because a plain layer cannot round its input.
    """
    if input_quantizers(module) and keep:
        warnings.warn("folded layers get float inputs again", stacklevel=2)
    remove_input_quantizers(module)
    for name, quantizer in quantizers(module).items():
        layer = module.get_submodule(name)
        quantizer.eval()                                             # AdaRound: hard codes
        W = layer.parametrizations.weight.original
        W_hat = layer.weight.detach().clone()
        # torch made a class for this layer, with a property `weight` that computes W_hat. Deep
        # copies of the layer share that class. Removing the parametrization deletes the property
        # from the class, and so for each copy. We therefore give this layer a class of its own.
        # type() makes __dict__ and __weakref__ anew.
        injected = type(layer)
        body = {k: v for k, v in vars(injected).items() if k not in ("__dict__", "__weakref__")}
        layer.__class__ = type(injected.__name__, injected.__bases__, body)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        if keep:
            layer.weight = nn.Parameter(W_hat, W.requires_grad)
        # torch has put the weight last. state_dict shall have it first again, as before.
        others = [key for key in layer._parameters if key != "weight"]
        for key in others:
            layer._parameters[key] = layer._parameters.pop(key)
    return module


# ---- The rivals: rounding by addition ------------------------------------------------------------

class AdaRound(RoundToNearest):
    """Rounding by addition, up or down: W_hat = s1 * (floor(W / s1) + h(V)), Nagel et al. 2020.

    h is the rectified sigmoid, clamp(1.2 sigmoid(V) - 0.1, 0, 1). The initial V is such that h(V)
    is the fraction that floor cuts off. In train mode W_hat is soft: h is anywhere between 0 and 1,
    and a regulariser pushes it to one of them. In eval mode, and in codes(), h is 0 or 1. These
    hard codes are at first round to nearest, except at exact ties, which here always go up. s1 is
    fixed, because it defines what up and down are. So AdaRound depends on a good initial s1.
    """

    default_lr = 0.3                 # V is a logit: Adam moves it by about lr * iterations / 2
    default_reg_weight = 1e4         # the regulariser's coefficient, see adaround_loss

    def __init__(self, W, bits, symmetric=True, per_channel=False, **initial):
        super().__init__(W, bits, symmetric, per_channel, **initial)
        u = W.detach() / self.s1
        # The inverse of h. With atanh the sign of V is the sign of (fraction - 0.5) exactly.
        self.V = nn.Parameter(2 * torch.atanh((u - u.floor() - 0.5) / 0.6))    # W's shape

    def h(self) -> Tensor:
        """Return the rectified sigmoid of V, in [0, 1], W's shape."""
        return Clamp.apply(1.2 * torch.sigmoid(self.V) - 0.1, 0, 1)

    def integers(self, W, soft: bool = False):
        up = self.h() if soft else (self.V >= 0).to(W.dtype)
        return Clamp.apply(torch.floor(W / self.s1) + up, *self.bounds)

    def forward(self, W):
        return self.s1 * self.integers(W, soft=self.training)

    @staticmethod
    def schedule(t: float) -> tuple[float, float]:
        """Return the share of the regulariser's coefficient that counts, and its exponent beta, at
        t = iteration / iterations. The share is 0 for the first fifth. Then it is 1, and beta falls
        from 20 to 2. This is BRECQ's schedule, as in the paper."""
        return (0.0, 20.0) if t < 0.2 else (1.0, 20 - 18 * (t - 0.2) / 0.8)

    def regulariser(self, beta: float | Tensor) -> Tensor:
        """Return the sum of 1 - |2 h(V) - 1|^beta, a scalar. It is 0 once every h is 0 or 1. A
        large beta affects only h that are close to 0 or 1, a small one moves all of them."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()


def adaround_loss(loss: Tensor, rules: list[AdaRound], reg_weight: float, share, beta) -> Tensor:
    """Return what AdaRound minimises: a block's loss plus the regulariser of its layers, a scalar.

    BRECQ's coefficient is 0.01, in the unit of the loss. In a block whose loss is a thousand times
    larger, that would close no h. So we take a loss that is divided by its value before learning,
    and share the coefficient out among the weights of the block. We searched the
    coefficient (experiments/SEARCHES.md). From 10,000 on it hardly matters.

    Args:
        loss: the block's loss, divided by round to nearest's.
        rules: the AdaRounds of the block's layers.
        reg_weight: the coefficient of the regulariser's mean over all weights of the block.
        share, beta: as AdaRound.schedule returns them.
    """
    # AdaRound's soft W_hat is at first W itself, where the grid clips nothing. In the first block,
    # which gets the float inputs, the loss is then 0, and its gradient is rounding noise. Adam
    # would make whole updates of it, different ones on each processor. So a loss that is only noise
    # gets the gradient 0.
    loss = loss * (loss.detach() > torch.finfo(loss.dtype).eps)
    coefficient = share * (reg_weight / sum(q.V.numel() for q in rules))
    for q in rules:
        loss = loss + coefficient * q.regulariser(beta)
    return loss


class AdaQuant(RoundToNearest):
    """Rounding by addition, anywhere: W_hat = s1 * round((W + V) / s1), Hubara et al. 2021.

    V has W's shape and W's units and is 0 at first. s1 is learned with it. It has a learning rate
    of its own (s1_lr), because V is a weight and log s1 a logarithm: what is a large update for one
    is a small one for the other. With G = dL/dW_hat we have dL/dV = inside G: it does not matter
    how large the weight is, which is the paper's point.
    """

    learns_s1 = True
    default_lr = 4e-3
    default_s1_lr = 4e-3

    def __init__(self, W, bits, symmetric=True, per_channel=False, **initial):
        super().__init__(W, bits, symmetric, per_channel, **initial)
        self.V = nn.Parameter(torch.zeros_like(W))                   # W's shape

    def integers(self, W):
        return Clamp.apply(Round.apply((W + self.V) / self.s1), *self.bounds)


METHODS = {"rtn": RoundToNearest, "adaround": AdaRound, "adaquant": AdaQuant,
           "flexround": FlexRound}


# ---- What is ours: the initial grid from the layer's outputs -------------------------------------

@torch.no_grad()
def grid_from_outputs(layer: nn.Module, inputs: list[Tensor], bits: int, symmetric: bool = True,
                      per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """Find the grid with the smallest squared error of the layer's output, by round to nearest.

    A step size that is good for the weights can be bad for what the layer computes. Depthwise
    layers show it best: a few large channels ask for a large step size, and most weights of the
    other channels then round to zero. AdaRound can move such a weight by one step and no further.
    So a method that keeps its initial s1 needs one that knows the inputs. The reverse exists, too:
    if a few channels dominate the output, and a norm after the layer makes them small again, the
    output asks for a step size that is far too large (MiniLM in experiments/SEARCHES.md).

    Args:
        layer: an nn.Linear or nn.Conv2d, float.
        inputs: what the layer was called with, one tensor a call, see layer_inputs.

    Returns and raises what grid_from_weights does.
    """
    lo, hi = code_range(bits, symmetric)
    W = layer.weight.detach()
    check_weight(W)
    rows = W.flatten(1) if per_channel else W.reshape(1, -1)
    R = qr_factor(layer, inputs)
    targets = [layer(x) for x in inputs] if R is None else []
    channel = 1 if W.dim() == 4 else -1

    def error(log_s1, z):
        log_s1, z = shaped((log_s1, z), W, per_channel)
        s1 = log_s1.exp()
        W_hat = s1 * (W / s1).round().clamp(lo - z, hi - z)
        if R is not None:
            total = ((W_hat - W) @ R.T).square().sum(1, keepdim=True)
        else:
            total = 0
            for x, y in zip(inputs, targets, strict=True):
                y_hat = torch.func.functional_call(layer, {"weight": W_hat}, (x,))
                off = (y_hat - y).movedim(channel, 0).flatten(1)     # (C_out, all else)
                total = total + off.square().sum(1, keepdim=True)    # W[c] makes output channel c
        return total if per_channel else total.sum(0, keepdim=True)

    return shaped(best_grid(rows, lo, hi, symmetric, error), W, per_channel)


def qr_factor(layer: nn.Module, inputs: list[Tensor]) -> Tensor | None:
    """Return R (C_in, C_in) that can stand for all input rows X of a plain linear layer, or None.

    With dW = W_hat - W the squared error of the output is || X dW^T ||^2 = || R dW^T ||^2, where R
    comes from X = QR. X has a row for each token, often ten times as many as C_in, and we try 46
    grids, or 138 asymmetric ones. We return None if R would be wrong or save nothing: the layer has
    another forward or hooks that are not ours, or there are few rows or very few outputs.
    """
    if getattr(layer.forward, "__func__", None) is not nn.Linear.forward:
        return None
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    C_out, C_in = layer.weight.shape
    rows = sum(x.numel() for x in inputs) // C_in
    if any(hook is not quantize_input for hook in hooks) or rows <= C_in or 46 * C_out < C_in:
        return None
    own = input_quantizers(layer).get("", nn.Identity())             # of inputs, if it has one
    X = torch.cat([own(x).flatten(0, -2) for x in inputs])
    return torch.linalg.qr(X.to(layer.weight.dtype), mode="r").R


@torch.no_grad()
def layer_inputs(block: nn.Module, layers: dict[str, nn.Module], x: Tensor,
                 before_hooks: bool = False) -> dict:
    """Return what each layer is called with when the block runs on x: {name: [its input in each
    call]}. A layer that the block does not call, or only by keyword, has an empty list. These are
    the inputs after the layer's own pre-hooks. With before_hooks they are the inputs before them,
    so that layer(input) runs its hooks once more.
    """
    seen = {name: [] for name in layers}
    names = {layer: name for name, layer in layers.items()}

    def look(layer, args):
        if args and args[0].numel() > 0:                             # an expert may get no rows
            seen[names[layer]].append(args[0].detach().clone())

    handles = [layer.register_forward_pre_hook(look, prepend=before_hooks) for layer in names]
    try:
        block(x.clone())                                             # it may work in place
    finally:
        for handle in handles:
            handle.remove()
    return seen


# ---- Checks --------------------------------------------------------------------------------------

def quantizable_layers(module: nn.Module, skip=()) -> dict[str, nn.Module]:
    """Return the layers of a module that can be quantized, by name, in the order of definition.

    These are nn.Linear, nn.Conv2d and their subclasses. We leave out the names in skip, and layers
    that share their weight with an embedding (a tied head). A module that is itself a layer has
    the name ''.
    Raises ValueError if a weight is quantized already, if something else makes it (weight norm,
    pruning), or if two of the layers share it.
    """
    embeddings = [m for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    embedded = {id(m.weight) for m in embeddings}
    chosen, owner = {}, {}
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or name in skip:
            continue
        if parametrize.is_parametrized(layer, "weight") or \
                not isinstance(layer.weight, nn.Parameter):
            raise ValueError(f"layer {name!r} has a parametrization of its weight already (a "
                             "quantizer, weight norm, pruning), or a buffer in its place: fold or "
                             "remove it first, or name the layer in skip")
        if id(layer.weight) in embedded:
            continue
        twin = owner.setdefault(id(layer.weight), name)
        if twin != name:
            raise ValueError(f"layers {twin!r} and {name!r} share one weight: give each its own")
        chosen[name] = layer
    return chosen


def check_weight(W: Tensor, name: str = "W") -> None:
    """Raises ValueError if W is not a weight that we can quantize.

    Half precision is not allowed. Adam's updates of a logarithm are too small for bfloat16, and in
    float16 Adam's squared gradients overflow. Call .float() on the network first, and cast it after
    fold().
    """
    if W.dim() not in (2, 4) or W.numel() == 0 or not W.is_floating_point():
        raise ValueError(f"{name} is {W.dtype} of shape {tuple(W.shape)}: the floating-point "
                         "weight of a linear layer (2-D) or a 2-D convolution (4-D), not empty, "
                         "is allowed")
    if W.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is in {W.dtype}: float32 or float64 is allowed, use .float()")
    if W.is_meta or W.is_inference():
        raise ValueError(f"{name} lies on the device meta or was made within inference_mode: a "
                         "weight with numbers that can learn is allowed")
    if not torch.isfinite(W).all():
        raise ValueError(f"{name} holds NaN or infinity: only finite weights can be quantized")


# ==== Part two: activations =======================================================================
#
# If you read section 3 of the paper, you may stop here. The rest is section 4's, where the inputs
# of layers are rounded as well: a learned step size, and the hooks that put it in front of a layer.

class LSQ(nn.Module):
    """Round an activation to a grid with one learned step size (Esser et al. 2020, section 4).

        x_hat = step * clamp(round(x / step), lo - zero_point, hi - zero_point)
        dL/dlog step = sum G (x_hat - inside x)        dL/dx = inside G        G = dL/dx_hat

    LSQ scales the gradient of the step size by 1 / sqrt(N Q). We leave that out, because Adam
    divides the size of a gradient out. The step size is positive, because we store its logarithm.
    Codes are signed, -2^(b-1)..2^(b-1)-1, or 0..2^b-1. LSQ.of finds log_step and zero_point, two
    scalars. In train mode an element stays x with the probability keep_float (QDrop).
    """

    def __init__(self, bits: int, signed: bool, log_step: Tensor, zero_point: Tensor,
                 keep_float: float = 0.0):
        super().__init__()
        self.lo, self.hi = code_range(bits, signed)
        self.bits = bits
        self.signed = signed
        self.keep_float = keep_float
        self.log_step = nn.Parameter(log_step.clone())
        self.register_buffer("zero_point", zero_point.clone())

    @classmethod
    def of(cls, x: Tensor, bits: int, symmetric: bool = True, p: float = 2.0,
           keep_float: float = 0.0, negative: bool = False):
        """Return an LSQ for calibration inputs x, any shape. Raises what grid_from_weights does.

        The initial step size minimises the L_p error on x. If x is large, a random sample of 65,536
        elements and the two extremes is enough. A symmetric grid has zero_point 0. Its codes are
        unsigned if x has no negative value and `negative` is False, as after a ReLU. An asymmetric
        grid has unsigned codes and an integer zero_point.
        """
        signed = symmetric and (negative or bool(x.min() < 0))
        x = x.detach().flatten().to(torch.promote_types(x.dtype, torch.float32))
        if len(x) > 2 ** 16:
            draw = torch.Generator().manual_seed(0)
            some = torch.randint(len(x), (2 ** 16,), generator=draw, device="cpu").to(x.device)
            x = torch.cat([x[some], x.amin()[None], x.amax()[None]])
        log_step, zero_point = grid_from_weights(x[None], bits, signed, p=p)     # one row
        return cls(bits, signed, log_step, zero_point, keep_float)

    def forward(self, x: Tensor) -> Tensor:
        """Return x_hat, x's shape and dtype. We compute in float32 or better, because half
        precision would choose wrong codes at 8 bits."""
        own = torch.promote_types(self.log_step.dtype, torch.float32)
        step = self.log_step.to(own).exp()
        z = self.zero_point
        k = Clamp.apply(Round.apply(x.to(own) / step), self.lo - z, self.hi - z)
        x_hat = (step * k).to(x.dtype)
        if self.training and self.keep_float > 0:                    # QDrop, element by element
            x_hat = torch.where(torch.rand_like(x) < self.keep_float, x, x_hat)
        return x_hat

    get_extra_state = RoundToNearest.get_extra_state
    set_extra_state = RoundToNearest.set_extra_state


def quantize_input(layer, args):
    """Round a layer's first argument: its forward pre-hook. What comes by keyword stays float."""
    if args:
        return layer.input_quantizer(args[0]), *args[1:]
    return None


def place_input_quantizer(layer: nn.Module, quantizer: LSQ) -> None:
    """Make a layer compute with quantizer(x) instead of x from now on."""
    layer.input_quantizer = quantizer
    layer.register_forward_pre_hook(quantize_input)


def quantize_inputs(block: nn.Module, x: Tensor, bits: dict[str, int], symmetric: bool = True,
                    p: float = 2.0, keep_float: float = 0.0, more=()) -> dict[str, LSQ]:
    """Quantize what single layers of a block take as input, in place: each layer gets an LSQ.

    We round what a layer multiplies its weight with. Shortcuts and their additions, the two
    products within attention, softmax and norms stay float.

    Args:
        block: run on x and on more, in its current mode.
        x: (N, ...) inputs of the block, on its device. They decide step sizes and zero points.
        bits: of each layer's input, by the layer's name in the block.
        symmetric, p, keep_float: as LSQ.of takes them.
        more: further batches, to see whether a layer gets a negative value there.

    Returns:
        The LSQs by the name of their layer. A layer that got no positional argument, or an empty
        one, gets none, with a warning.

    Raises:
        ValueError: an input is quantized already, or LSQ.of refuses one.
    """
    layers = {name: block.get_submodule(name) for name in bits}
    for name in set(input_quantizers(block)) & set(layers):
        raise ValueError(f"layer {name!r}: its input is quantized already")
    with parametrize.cached():                                       # quantize each weight once
        calls = layer_inputs(block, layers, x)
        negative = {name: holds_negative(parts) for name, parts in calls.items()}
        for batch in more if symmetric else ():                      # asymmetric: no sign needed
            for name, parts in layer_inputs(block, layers, batch).items():
                negative[name] |= holds_negative(parts)
    made = {}
    for name, parts in calls.items():
        if parts:                                                    # maybe several calls
            seen = torch.cat([part.flatten() for part in parts])
            made[name] = LSQ.of(seen, bits[name], symmetric, p, keep_float, negative[name])
    if len(made) < len(bits):
        warnings.warn("these layers were not called with a positional argument that holds "
                      f"something, so their inputs stay float: {sorted(set(bits) - set(made))}",
                      stacklevel=2)
    for name, quantizer in made.items():
        place_input_quantizer(layers[name], quantizer)
    return made


def holds_negative(parts: list[Tensor]) -> bool:
    """Return whether one of the tensors holds a negative value."""
    return any(bool((part < 0).any()) for part in parts)


def input_quantizers(module: nn.Module) -> dict[str, LSQ]:
    """Return the LSQs that are in place in a module, by the name of their layer."""
    found = {}
    for name, layer in module.named_modules():
        quantizer = layer._modules.get("input_quantizer")
        if isinstance(quantizer, LSQ):
            found[name] = quantizer
    return found


def remove_input_quantizers(module: nn.Module) -> None:
    """Let the layers of a module take float inputs again."""
    for name in input_quantizers(module):
        layer = module.get_submodule(name)
        del layer.input_quantizer
        for key, hook in list(layer._forward_pre_hooks.items()):     # a copied layer has no handle
            if hook is quantize_input:
                del layer._forward_pre_hooks[key]
