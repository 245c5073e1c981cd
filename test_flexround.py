"""Tests to read beside the paper: gradients, rules, grid, loop, a network, a rule of your own.

Gradients come first, and `python -m pytest -m gradients` runs them alone. Expected values are
literals, or we compute them a second way. No test needs a download or a GPU. The folder tests/
holds the others, which guard what a user's own networks, devices and files ask for.
"""
import copy
import os
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flexround
import models
import reconstruct
from experiments.tools import rescale
from flexround import FlexRound, RoundToNearest, fold, quantize_layers, quantizers
from helpers import (
    NETWORKS,
    QUICK,
    RATES,
    correlated,
    equal_states,
    over_learned,
    over_methods,
    prepared,
    rates_of_adam,
    tiny,
    weight,
)
from reconstruct import ReconstructionConfig, block_loss, quantize_model, reconstruct_block

gradients = pytest.mark.gradients


# The shapes of a linear, a convolution's, a depthwise and a grouped convolution's weight. Each has
# two grids, so that each pair of (symmetric, per_channel) stands twice.
SHAPES = dict(linear=(6, 5), conv=(4, 3, 3, 3), depthwise=(6, 1, 3, 3), grouped=(6, 2, 3, 3))
CASES = {f"{name}-{'symmetric' if symmetric else 'asymmetric'}":
         (shape, symmetric, symmetric != (i % 2 == 0))
         for i, (name, shape) in enumerate(SHAPES.items()) for symmetric in (True, False)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_cases = pytest.mark.parametrize("shape, symmetric, per_channel", CASES.values(), ids=CASES)


def disturbed(shape, symmetric=True, per_channel=False, cls=FlexRound):
    """A quantizer in the middle of its training: each learned factor is off its start."""
    W, g = weight(shape), torch.Generator().manual_seed(1)
    q = cls(W, 3, symmetric, per_channel)
    with torch.no_grad():
        for p in q.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        q.log_s1.sub_(0.3)                                           # so that the clamp takes part
    return q, W


# ---- 1. Gradients --------------------------------------------------------------------------------
#
# The paper has one proposition, and it is about a gradient: a large weight gets a large gradient of
# its divisor. We hold it and all other gradients against the printed formulas, against loops over
# single weights, numerical differences, autograd, torch's own quantizer and the authors' code.

@gradients
@over_cases
def test_proposition_3_1(shape, symmetric, per_channel):
    """dL/dS' = -(W / S'^2) * dL/dW_hat for each weight inside the grid, at any S' and for any loss.
    Outside it is 0. The formula holds no s1, so we try two."""
    q, W = disturbed(shape, symmetric, per_channel)                  # s1, S2, s3, s4: all are off 1
    G = weight(shape, seed=9)                                        # dL/dW_hat
    with torch.no_grad():
        S = q.S2 * q.s3 if q.s4 is None else q.S2 * q.s3 * q.s4      # S'
    for factor in (1.0, 0.8):
        with torch.no_grad():
            q.log_s1.add_(np.log(factor))
        q.zero_grad()
        q(W).backward(G)
        code = (W / (q.s1.detach() * S)).round() + q.zero_point
        inside = (code >= q.lo) & (code <= q.hi)
        assert 0 < inside.sum() < inside.numel()
        dL_dS = torch.where(inside, -W / S ** 2 * G, 0.0)            # as it is printed
        # We store log S2. The chain rule makes a factor S' of that, whatever s3 and s4 are:
        # dS'/dlog S2 = S2 * dS'/dS2 = S2 * s3 * s4 = S'.
        torch.testing.assert_close(q.log_S2.grad, S * dL_dS)


def slow_flexround(q, W, G):
    """W_hat, codes and dL/d(s1, S2, s3, s4) of sum(G * W_hat), from section 3.1 by loops."""
    (lo, hi), names = (-4, 3) if q.symmetric else (0, 7), ("s1", "S2", "s3", "s4")    # 3 bits
    factors = {n: getattr(q, n).detach() for n in names if getattr(q, n) is not None}
    W_hat, codes = np.zeros(W.shape), np.zeros(W.shape, int)
    grads = {n: torch.zeros(W.shape, dtype=W.dtype) for n in factors}
    for i in np.ndindex(*W.shape):
        w, g, z = float(W[i]), float(G[i]), int(q.zero_point.expand(W.shape)[i])
        s1, S2, s3, s4 = (float(factors[n].expand(W.shape)[i]) if n in factors else 1.0
                          for n in names)
        u = w / (s1 * S2 * s3 * s4)
        code = np.rint(u) + z
        inside = 1.0 if lo <= code <= hi else 0.0
        k = min(max(code, lo), hi) - z
        W_hat[i], codes[i] = s1 * k, k + z
        share = {"s1": g * (k - inside * u), "S2": -inside * g * w / (S2 ** 2 * s3 * s4),
                 "s3": -inside * g * w / (S2 * s3 ** 2 * s4),
                 "s4": -inside * g * w / (S2 * s3 * s4 ** 2)}
        for n in grads:
            grads[n][i] = share[n]
    # Weights that share a factor add up.
    return W_hat, codes, {n: grads[n].sum_to_size(factors[n].shape) for n in factors}


@gradients
@over_cases
def test_forward_and_gradients_agree_with_the_loops_in_numpy(shape, symmetric, per_channel):
    """We repeat section 3.1 in loops over single weights, which share no line with the code."""
    q, W = disturbed(shape, symmetric, per_channel)
    G = weight(shape, seed=9)
    q(W).backward(G)
    W_hat, codes, grads = slow_flexround(q, W, G)
    np.testing.assert_allclose(q(W).detach(), W_hat, rtol=1e-12)
    np.testing.assert_array_equal(q.codes(W), codes)
    assert codes.min() == q.lo and codes.max() == q.hi               # the clamp took part
    for name, expected in grads.items():                             # dL/dlog f = f * dL/df
        factor, log = getattr(q, name).detach(), getattr(q, f"log_{name}")
        torch.testing.assert_close(log.grad, factor * expected, rtol=1e-10, atol=1e-12)
        assert expected.abs().max() > 0


@gradients
@over_cases
def test_gradcheck_with_the_rounding_error_held_constant(shape, symmetric, per_channel):
    """round(u) is u + c. If we hold the rounding error c constant, W_hat is smooth off the clamp's
    kinks. Numerical differences can check that, and its gradient is the straight-through one."""
    q, W = disturbed(shape, symmetric, per_channel)
    at_s1 = [n for n, _ in q.named_parameters()].index("log_s1")
    start = [p.detach().clone().requires_grad_() for p in q.parameters()]
    u0 = (W / sum(start).exp()).detach()                             # S is a product of factors
    c, (lo, hi) = u0.round() - u0, (torch.as_tensor(b).expand(W.shape).to(W) for b in q.bounds)
    smooth = ((u0.round() != lo) & (u0.round() != hi)).double()      # 0 at a kink
    assert 0.4 < smooth.mean() < 1

    def surrogate(*logs):
        return smooth * logs[at_s1].exp() * torch.clamp(W / sum(logs).exp() + c, lo, hi)

    assert torch.autograd.gradcheck(surrogate, start)
    G = weight(shape, seed=9) * smooth
    surrogate(*start).backward(G)
    q(W).backward(G)
    for p, s in zip(q.parameters(), start, strict=True):
        torch.testing.assert_close(p.grad, s.grad)


@gradients
def test_the_straight_through_estimator_of_round():
    """On the way back Round is the identity. Forward it rounds, and ties go to the even number."""
    u = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.4, -3.6], requires_grad=True)
    G = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, -7.0, 4.0])
    rounded = flexround.Round.apply(u)
    assert rounded.tolist() == [0, 2, 2, 0, -2, 0, -4]
    rounded.backward(G)
    assert torch.equal(u.grad, G)


@gradients
def test_the_clipping_mask_of_clamp():
    """At few bits many weights round to the first or the last code. They are inside: the gradient
    passes where lo <= x <= hi, and a weight counts by what it rounds to."""
    u = torch.tensor([-5.0, -4.51, -4.49, -4.0, 0.1, 2.9, 3.0, 3.49, 3.51, 4.0])
    x = u.clone().requires_grad_()
    clipped = flexround.Clamp.apply(x, -4, 3)
    assert torch.equal(clipped, u.clamp(-4, 3))
    clipped.backward(u)
    assert (x.grad / u).tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    q = FlexRound(u[None], 3)
    with torch.no_grad():
        q.log_s1.zero_()                                             # a step size of 1: W is u
    q(u[None]).sum().backward()
    assert (q.log_S2.grad[0] != 0).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    x = torch.tensor([-0.01, 0.0, 1.0, 1.01], requires_grad=True)    # h of AdaRound: 0 and 1 pass
    flexround.Clamp.apply(x, 0, 1).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


class Count(TorchDispatchMode):
    total = 0                            # of operations that compute: a view costs nothing on a GPU

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = ("view", "expand", "detach", "t.default", "alias", "squeeze", "transpose")
        self.total += not any(name in str(func) for name in views)
        return func(*args, **(kwargs or {}))


@gradients
@over_cases
def test_the_backward_by_hand_is_autograds_in_fewer_operations(shape, symmetric, per_channel):
    """Autograd through Eq. 2 finds the gradients of Division. Division is in the code only because
    it needs fewer operations, so we count them."""
    def chain(W):                                                    # Eq. 2 as it is printed
        S = q.s1 * q.S2 * q.s3 * (1 if q.s4 is None else q.s4)
        return q.s1 * flexround.Clamp.apply(flexround.Round.apply(W / S), *q.bounds)

    q, W = disturbed(shape, symmetric, per_channel)
    grads, counts = [], []
    for forward in (chain, q):
        q.zero_grad()
        with Count() as count:
            forward(W).backward(weight(shape, seed=9))
        counts.append(count.total)
        grads.append([p.grad for p in q.parameters()])
    torch.testing.assert_close(chain(W), q(W))
    torch.testing.assert_close(*grads)
    assert counts[1] < 0.75 * counts[0]                              # 26 against 39 for "conv"


@gradients
@over_cases
def test_gradients_of_adaquant_in_closed_form(shape, symmetric, per_channel):
    """Addition's gradient is G inside the grid. It holds no W: a large weight gets what a small one
    gets, which is the paper's point against addition."""
    q, W = disturbed(shape, symmetric, per_channel, flexround.AdaQuant)
    G = weight(shape, seed=9)
    q(W).backward(G)
    u = (W + q.V.detach()) / q.s1.detach()
    code = u.round() + q.zero_point
    inside = ((code >= q.lo) & (code <= q.hi)).double()
    k = code.clamp(q.lo, q.hi) - q.zero_point
    torch.testing.assert_close(q.V.grad, inside * G)
    share = G * (k - inside * u) * q.s1.detach()
    torch.testing.assert_close(q.log_s1.grad, share.sum_to_size(q.s1.shape))
    assert 0 < inside.sum() < inside.numel()


@gradients
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_of_adaround_is_the_true_one(symmetric):
    """In train mode AdaRound is soft and does not round. So its gradient is the true one, and
    numerical differences agree with it off the kinks of h and of the clamp."""
    q, W = disturbed((4, 3, 3, 3), symmetric, cls=flexround.AdaRound)
    h, (lo, hi) = q.train().h().detach(), q.bounds
    k = torch.floor(W / q.s1) + h
    smooth = torch.stack([k - lo, k - hi, h, h - 1]).abs().amin(0) > 1e-3    # off each kink
    assert smooth.double().mean() > 0.5

    def surface(V):
        return smooth * torch.func.functional_call(q, {"V": V}, (W,))

    assert torch.autograd.gradcheck(surface, (q.V.detach().clone().requires_grad_(),))


@gradients
@pytest.mark.parametrize("symmetric, shift, lo", [(True, 0.0, -4), (True, 5.0, 0), (False, 0.7, 0)])
def test_gradients_of_an_activations_step_size_in_closed_form(symmetric, shift, lo):
    """Section 4 learns the step sizes of activations by LSQ's gradients."""
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(3), dtype=torch.double) + shift
    q, G = flexround.LSQ.of(x, 3, symmetric), weight((7, 11), seed=9)
    with torch.no_grad():
        q.log_step -= 0.4                                            # so that it clips some of x
    x.requires_grad_()
    q(x).backward(G)
    step, z = q.log_step.detach().exp(), int(q.zero_point)
    u = x.detach() / step
    code = u.round() + z
    inside = ((code >= q.lo) & (code <= q.hi)).double()
    k = code.clamp(q.lo, q.hi) - z
    assert (q.lo, q.hi) == (lo, lo + 7) and (z == 0) == symmetric
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(q(x), step * k)
    torch.testing.assert_close(x.grad, inside * G)
    torch.testing.assert_close(q.log_step.grad, (G * step * (k - inside * u)).sum())


@gradients
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_torchs_own_learnable_quantizer_agrees(per_channel):
    """torch ships a compiled quantizer whose step is learned, so it checks our forward, the
    gradient of s1, and, as -W times its dL/dW, that of S2 (all at the start, where S2 = 1)."""
    name = f"_fake_quantize_learnable_per_{'channel' if per_channel else 'tensor'}_affine"
    if not hasattr(torch, name):
        pytest.skip(f"this torch has no {name}: it is private")
    W, G = weight((6, 40), dtype=torch.float32), weight((6, 40), seed=9, dtype=torch.float32)
    q = FlexRound(W, 3, False, per_channel)
    with torch.no_grad():
        q.log_s1.sub_(0.3)                                           # so that the clamp takes part
    q(W).backward(G)
    theirs, s1 = W.clone().requires_grad_(), q.s1.detach().reshape(-1).clone().requires_grad_()
    z = q.zero_point.reshape(-1).float()
    W_hat = getattr(torch, name)(theirs, s1, z, *([0] if per_channel else []), 0, 7, 1.0)
    W_hat.backward(G)
    torch.testing.assert_close(q(W), W_hat)
    torch.testing.assert_close(q.log_s1.grad.flatten(), s1.grad * s1.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.log_S2.grad, -W * theirs.grad)
    assert 0 < (theirs.grad == 0).float().mean() < 1


@gradients
@pytest.mark.skipif("FLEXROUND_AUTHORS" not in os.environ, reason="FLEXROUND_AUTHORS is not set")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_authors_code_agrees(bits):
    """The authors' release is the paper's own reading of Eq. 2, for linear layers of Llama."""
    file = Path(os.environ["FLEXROUND_AUTHORS"]) / "quant" / "UniformAffineQuantizer.py"
    quantizer = runpy.run_path(str(file))["UniformAffineQuantizer"]
    W, g = weight((6, 40)), torch.Generator().manual_seed(1)
    q = FlexRound(W, bits, symmetric=False, per_channel=True)
    with torch.no_grad():                                            # in the middle of training
        for p in q.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    theirs = quantizer(bits, channel_wise=True, mode="flexround", org_weight=W)
    theirs.zero_point = q.zero_point.double()
    pairs = (theirs.delta1, theirs.delta2, theirs.delta3), (q.log_s1, q.log_S2, q.log_s3)
    with torch.no_grad():
        for p, ours in zip(*pairs, strict=True):
            p.copy_(ours)
    G = weight((6, 40), seed=9)
    q(W).backward(G)
    W_hat = theirs(W)
    W_hat.backward(G)
    codes = (W_hat / theirs.delta1.exp()).round().int() + q.zero_point
    assert torch.equal(codes, q.codes(W))
    torch.testing.assert_close(q(W), W_hat, rtol=1e-14, atol=1e-14)
    for p, ours in zip(*pairs, strict=True):
        torch.testing.assert_close(ours.grad, p.grad, rtol=1e-12, atol=1e-13)


# ---- 2. The four rules ---------------------------------------------------------------------------
#
# A rule says which code each weight gets, and W_hat is s1 times the codes. All rules start as round
# to nearest, and a quantized layer computes with W_hat in place of W.

def test_a_weight_worked_out_by_hand():
    """The divisor holds all factors. In front of the rounding stands s1 alone. AdaQuant's V has the
    unit of W, because it is added before the division by s1."""
    # S = 0.5 * 2 * 1 = 1: u = 0.9 rounds to 1. S = 0.5 * 1 * 0.8 = 0.4: u = -3.25 rounds to -3.
    # u = 1.2 / (0.5 * 1 * 1) = 2.4 rounds to 2. u = 5 / 0.4 = 12.5 is cut to 3.
    W = torch.tensor([[0.9, 1.2], [-1.3, 5.0]])
    q = FlexRound(W, 3)
    with torch.no_grad():
        q.log_s1.copy_(torch.tensor(0.5).log())
        q.log_S2.copy_(torch.tensor([[2.0, 1.0], [1.0, 1.0]]).log())
        q.log_s3.copy_(torch.tensor([[1.0], [0.8]]).log())
    assert q.codes(W).tolist() == [[1, 2], [-3, 3]]
    torch.testing.assert_close(q(W), torch.tensor([[0.5, 1.0], [-1.5, 1.5]]))
    torch.testing.assert_close(q.S, torch.tensor([[1.0, 0.5], [0.4, 0.4]]))
    W = torch.tensor([[0.9, -0.4, 0.24, 0.1]])
    q = flexround.AdaQuant(W, 3)
    with torch.no_grad():
        q.log_s1.copy_(torch.tensor(0.5).log())
        q.V.copy_(torch.tensor([[0.4, 0.0, 0.02, -0.5]]))
    assert q.codes(W).tolist() == [[3, -1, 1, -1]]                   # 2.6, -0.8, 0.52, -0.8


@over_methods
@over_cases
def test_W_hat_is_s1_times_the_codes(method, shape, symmetric, per_channel):
    """All rules share one start, and the integers and s1, which are stored, give W_hat exactly."""
    W = weight(shape)
    q, rtn = (flexround.METHODS[name](W, 3, symmetric, per_channel).eval()
              for name in (method, "rtn"))
    assert torch.equal(q(W), rtn(W)) and not torch.equal(rtn(W), W)
    q, W = disturbed(shape, symmetric, per_channel, flexround.METHODS[method])
    codes = q.eval().codes(W)
    assert torch.equal(q(W), q.s1 * (codes - q.zero_point))
    assert codes.dtype == torch.int32 and q.zero_point.dtype == torch.int32
    assert set(codes.unique().tolist()) <= set(range(-4, 4) if symmetric else range(8))
    grid = (shape[0],) + (1,) * (len(shape) - 1) if per_channel else ()
    assert q.s1.shape == q.zero_point.shape == grid
    assert not symmetric or not q.zero_point.any()
    if method == "flexround":                                        # any tool that rounds to
        with torch.no_grad():                                        # nearest recovers the codes
            V = W / (q.S2 * q.s3 * (1 if q.s4 is None else q.s4))
        assert torch.equal(((V / q.s1).round() + q.zero_point).clamp(q.lo, q.hi).int(), codes)


@over_shapes
def test_which_factors_there_are(shape):
    """The table at the head of flexround.py gives shapes and starts, and Table 1 the ablations."""
    def names(q):
        return {name for name, _ in q.named_parameters()}

    W, (C_out, C_in, *kernel) = weight(shape), shape
    q, ones = FlexRound(W, 4), [1] * len(kernel)
    assert q.S2.shape == shape and q.s3.shape == (C_out, 1, *ones)
    assert q.s4.shape == (1, C_in, *ones) if kernel else q.s4 is None
    assert all((f == 1).all() for f in (q.S2, q.s3, *([q.s4] if kernel else [])))
    assert names(q) == {"log_s1", "log_S2", "log_s3"} | ({"log_s4"} if kernel else set())
    fixed, bare = FlexRound(W, 4, learn_s1=False), FlexRound(W, 4, use_s3_s4=False)
    assert names(fixed) == names(q) - {"log_s1"} and "log_s1" in fixed.state_dict()
    assert names(bare) == {"log_s1", "log_S2"} and bare.s3 is None and bare.s4 is None
    assert torch.equal(bare(W), q(W)) and torch.equal(fixed(W), q(W))
    assert names(RoundToNearest(W, 4)) == set() and names(flexround.AdaRound(W, 4)) == {"V"}
    assert names(flexround.AdaQuant(W, 4)) == {"log_s1", "V"}


def test_adaround_is_soft_in_train_mode_only_and_rounds_exact_ties_up(monkeypatch):
    """Soft codes learn and hard codes are stored, and ties are the one exception that we name."""
    W = weight((6, 5), dtype=torch.float32)
    q, rtn = flexround.AdaRound(W, 3).train(), RoundToNearest(W, 3)
    torch.testing.assert_close(q(W), W.clamp(-4 * q.s1, 3 * q.s1))   # h is the cut-off fraction
    assert torch.equal(q.codes(W), rtn.codes(W))                     # codes are hard in any mode
    assert torch.equal(q.eval()(W), rtn(W))
    unit = torch.zeros(()), torch.tensor(0)                          # log_s1 and zero_point
    monkeypatch.setattr(flexround, "grid_from_weights", lambda *args: unit)
    W = torch.tensor([[0.5, 1.5, -0.5, -1.5, 3.5, 9.0, -9.0, 0.4999999, 0.5000001, 0.0, -1e-9]])
    assert RoundToNearest(W, 3).codes(W).tolist() == [[0, 2, 0, -2, 3, 3, -4, 0, 1, 0, 0]]
    assert flexround.AdaRound(W, 3).codes(W).tolist() == [[1, 2, 0, -1, 3, 3, -4, 0, 1, 0, 0]]


LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "no bias": lambda: nn.Linear(5, 4, bias=False),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated, reflected": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, padding_mode="reflect"),
    "same, circular": lambda: nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="circular"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "subclass": type("Doubled", (nn.Conv2d,), {                      # with a forward of its own
        "__init__": lambda self: nn.Conv2d.__init__(self, 4, 6, 3),
        "forward": lambda self, x: 2 * nn.Conv2d.forward(self, x)}),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@over_methods
def test_a_layer_keeps_its_own_forward_and_folds_bit_for_bit(make, method):
    """A quantized layer is a float layer with W_hat, before fold and after, to the last bit."""
    layer, twin = make(), make()
    keys, cls = set(layer.state_dict()), type(layer)
    x = torch.randn(*((7, 5) if isinstance(layer, nn.Linear) else (2, 4, 9, 9)))
    twin.load_state_dict(layer.state_dict())
    quantize_layers(layer, ReconstructionConfig(method, 3))
    with torch.no_grad():
        twin.weight.copy_(quantizers(layer.eval())[""](layer.parametrizations.weight.original))
    y = layer(x)
    assert torch.equal(layer.weight, twin.weight) and torch.equal(y, twin(x))
    assert isinstance(layer, cls)
    layer.train()                                                    # fold takes hard codes anyway
    assert fold(layer) is layer and type(layer) is cls and set(layer.state_dict()) == keys
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
    assert torch.equal(layer.weight, twin.weight) and torch.equal(layer(x), y)


# ---- 3. The grid ---------------------------------------------------------------------------------
#
# The step size s1 and the zero point decide what can be represented at all. A plain sweep over many
# grids judges both searches, because all methods start from what they find.

def min_max(W, bits, symmetric, per_channel):
    """The rows of W, and s1 and z of the smallest grid that clips nothing, one entry a row."""
    rows = W.numpy().reshape(len(W) if per_channel else 1, -1)
    top, bottom = rows.max(1, keepdims=True), rows.min(1, keepdims=True)
    if symmetric:
        return rows, np.maximum(top / (2 ** (bits - 1) - 1), -bottom / 2 ** (bits - 1)), 0
    s1 = (np.maximum(top, 0) - np.minimum(bottom, 0)) / (2 ** bits - 1)
    return rows, s1, np.rint(-np.minimum(bottom, 0) / s1)


def lp_error(rows, s1, z, bits, symmetric, p):
    """sum |W - W_hat|^p of each row, by round to nearest on the grid (s1, z)."""
    lo, hi = (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2 ** bits - 1)
    return (abs(s1 * (np.clip(np.rint(rows / s1) + z, lo, hi) - z) - rows) ** p).sum(1)


@pytest.mark.parametrize("symmetric, per_channel", [(True, False), (False, True)])
@pytest.mark.parametrize("bits, p", [(2, 2.4), (3, 1.0), (4, 2.0), (8, 4.0)])
def test_search_is_never_worse_than_min_max_and_close_to_the_best(symmetric, per_channel, bits, p):
    """A plain sweep of 2,000 steps judges the search, because all methods start from its grid."""
    for seed in range(2):
        W = weight((8, 60), seed)
        W[3, 7] *= 6                                                 # an outlier
        rows, widest, z_widest = min_max(W, bits, symmetric, per_channel)
        found = flexround.grid_from_weights(W, bits, symmetric, per_channel, p)
        log_s1, z = (t.reshape(-1, 1) for t in found)
        found = lp_error(rows, log_s1.exp().numpy(), z.numpy(), bits, symmetric, p)
        assert (found <= lp_error(rows, widest, z_widest, bits, symmetric, p) * (1 + 1e-9)).all()
        best = np.min([lp_error(rows, widest * f, z_widest, bits, symmetric, p)
                       for f in np.linspace(0.02, 1, 2000)], axis=0)
        assert (found <= 1.1 * best).all()                           # spiky with 60 weights
    s2, s4 = (RoundToNearest(W, 3, p=p).s1.numpy() for p in (2.0, 4.0))
    rows = W.numpy().reshape(1, -1)                                  # each exponent by its measure
    assert s2 < s4 and lp_error(rows, s2, 0, 3, True, 2) < lp_error(rows, s4, 0, 3, True, 2)
    assert lp_error(rows, s4, 0, 3, True, 4) < lp_error(rows, s2, 0, 3, True, 4)


def test_an_asymmetric_range_holds_zero_and_shrinks_each_end_alone():
    """Padding is 0, so 0 keeps a code, and an outlier at one end must not cost the other end."""
    for sign in (1, -1):
        W = sign * (3 + torch.rand(4, 50, generator=torch.Generator().manual_seed(0)))
        q = RoundToNearest(W, 4, symmetric=False)
        assert q.zero_point == (0 if sign > 0 else 15) and q(torch.zeros(1, 1)) == 0
        assert (q(W) - W).abs().max() < 0.2                          # steps of 4 / 15
    W = weight((1, 500))
    W[0, 0] = 30
    log_s1, z = flexround.grid_from_weights(W, 4, symmetric=False, p=1.0)
    rows, widest, z_widest = min_max(W, 4, False, False)
    together = np.min([lp_error(rows, widest * f, z_widest, 4, False, 1.0)
                       for f in np.linspace(0.02, 1, 2000)])
    assert lp_error(rows, log_s1.exp().numpy(), z.numpy(), 4, False, 1.0) < 0.9 * together


def layer_for(kind, dtype=torch.float64):
    """A layer whose first output channel is large, and (n, ...) inputs that each reach one weight
    of a channel. The error of an output is then the error of one weight."""
    torch.manual_seed(0)
    layer = {"linear": lambda: nn.Linear(5, 6), "conv": lambda: nn.Conv2d(3, 4, 3),
             "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6)}[kind]().to(dtype)
    with torch.no_grad():
        layer.weight.copy_(weight(layer.weight.shape, dtype=dtype))
        layer.weight[0] *= 6
    shape = {"linear": (5,), "conv": (3, 3, 3), "depthwise": (6, 3, 3)}[kind]
    n = int(np.prod(shape))
    return layer, torch.eye(n, dtype=dtype).view(n, *shape)


over_kinds = pytest.mark.parametrize("kind", ["linear", "conv", "depthwise"])
over_grids = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
over_channels = pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])


@over_kinds
@over_grids
@over_channels
def test_a_start_on_outputs_is_close_to_the_best(kind, symmetric, per_channel):
    """A plain sweep of 400 steps judges the search again, now by what the layer computes."""
    def error(s1, z):
        s1, z = (torch.as_tensor(t).reshape(-1, *[1] * (W.dim() - 1)) for t in (s1, z))
        lo, hi = (-4, 3) if symmetric else (0, 7)
        with torch.no_grad():
            twin.weight.copy_(s1 * ((W / s1).round().clamp(lo - z, hi - z)))
            off = sum((twin(x) - layer(x)).square().transpose(0, 1).flatten(1).sum(1) for x in xs)
        return (off if per_channel else off.sum(0, keepdim=True)).numpy()

    layer, alone = layer_for(kind)
    W, twin = layer.weight.detach(), copy.deepcopy(layer)
    xs = [correlated(40, *alone.shape[1:]).double() + 1, correlated(9, *alone.shape[1:]).double()]
    found = [t.exp() if t.is_floating_point() else t for t in
             flexround.grid_from_outputs(layer, xs, 3, symmetric, per_channel)]
    q = RoundToNearest(W, 3, symmetric, per_channel)
    assert found[0].shape == q.s1.shape and found[1].dtype == torch.int32
    _, widest, z_widest = min_max(W, 3, symmetric, per_channel)
    best = np.min([error(widest * f, z_widest) for f in np.linspace(0.02, 1, 400)], axis=0)
    ratio = error(*found) / best
    assert np.median(ratio) <= 1.1 and ratio.max() <= 1.5            # spiky with 9 weights
    if kind != "linear":                                             # the start on weights
        assert error(*found).sum() < 0.9 * error(q.s1, q.zero_point).sum()


@over_kinds
@over_grids
@over_channels
def test_a_start_on_outputs_is_that_on_weights_where_each_input_reaches_one_weight(
        kind, symmetric, per_channel):
    """White inputs tell nothing of which weights matter, so that both searches have to agree."""
    layer, x = layer_for(kind)
    ours = flexround.grid_from_outputs(layer, [x], 3, symmetric, per_channel)
    theirs = flexround.grid_from_weights(layer.weight, 3, symmetric, per_channel, p=2.0)
    torch.testing.assert_close(ours, theirs)


# ---- 4. The loop: one block ----------------------------------------------------------------------
#
# Adam moves the factors so that the block's output comes closer to that of full precision. We keep
# the best of five states, the seed decides all that is drawn, and nothing else is touched.

def test_the_reduction_of_the_loss():
    """We work out the reduction for each shape, because the paper does not state it."""
    for shape, dim, channels, rest in (
            ((2, 3, 4, 5), None, 1, 40), ((2, 7, 3), None, 2, 14), ((6, 3), None, 1, 6),
            ((2, 4, 5, 3), 3, 3, 40), ((2, 4, 5, 3), -1, 3, 40), ((2, 3, 7), 1, 1, 14)):
        y = torch.zeros(shape)
        assert float(block_loss(y, y + 2, dim)) == 4 * 3             # 3 channels
        y.movedim(channels, -1)[(1,) * (y.dim() - 1)] = torch.tensor([1.0, 2.0, 3.0])
        assert float(block_loss(y, 0 * y, dim)) == pytest.approx(14 / rest)
    y = torch.tensor([1.0, 2.0, 3.0])                                # 3 inputs, no channels
    assert float(block_loss(y, 0 * y)) == pytest.approx(14 / 3)


@torch.no_grad()
def loss_of(block, x, y):
    """The loss on all inputs at once, as a number."""
    return float(block_loss(block(x), y))


@over_learned
@pytest.mark.parametrize("symmetric, per_channel", [(True, False), (False, True)])
def test_the_loss_falls(method, symmetric, per_channel):
    """Each rule learns on each kind of grid, and the report tells the truth about the result."""
    block, x, y, config = prepared(method, symmetric=symmetric, per_channel=per_channel,
                                   iterations=201)
    seen = []
    report = reconstruct_block(block, x, y, config, progress=lambda *args: seen.append(args))
    assert [i for i, _ in report.evaluations] == [0, 50, 100, 150, 201]
    assert [i for i, _ in seen] == list(range(1, 202)) and len(report.history) == 201
    assert set(report.evaluations[1:]) < set(seen)
    assert report.final_loss < 0.85 * report.start_loss
    assert report.final_loss == min(loss for _, loss in report.evaluations)
    assert (report.best_iteration, report.final_loss) in report.evaluations
    assert loss_of(block, x, y) == pytest.approx(report.final_loss, rel=1e-4)
    assert loss_of(fold(block), x, y) == pytest.approx(report.final_loss, rel=1e-4)


@over_learned
def test_never_worse_than_round_to_nearest_on_white_noise(method):
    """With a rate far too high, on inputs without structure, the start has to be what we keep."""
    for lr in (RATES[method], 0.5 if method == "flexround" else 3.0):
        x = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(5))
        block, x, y, config = prepared(method, 4, x, lr=lr)
        rtn = copy.deepcopy(block).eval()
        report = reconstruct_block(block, x, y, config)
        assert report.start_loss == pytest.approx(loss_of(rtn, x, y), rel=1e-4)
        assert loss_of(block, x, y) <= loss_of(rtn, x, y) * (1 + 1e-6)
    assert report.best_iteration == 0 and torch.equal(block[0].weight, rtn[0].weight)
    torch.manual_seed(0)
    layer, x, config = nn.Linear(64, 64), torch.randn(256, 64), ReconstructionConfig(iterations=200)
    y = layer(x)
    quantize_layers(layer, config)
    report = reconstruct_block(layer, x, y, config)                  # FlexRound at its own rate
    assert report.evaluations[-1][1] > 1.1 * report.start_loss == 1.1 * report.final_loss


def test_division_learns_to_make_unequal_channels_equal():
    """rescale makes channels unequal and changes no output. FlexRound learns to divide a large
    channel by a large S', and the weights that read this channel by a small one."""
    torch.manual_seed(0)
    net = models.fold_batchnorm(nn.Sequential(models.BasicBlock(8, 8)))
    x, W1 = correlated(64, 8, 8, 8), net[0].conv1.weight.detach().clone()
    y = net(x).detach()
    torch.testing.assert_close(rescale(net, 4.0)(x), y, rtol=1e-3, atol=1e-4)
    factor = (net[0].conv1.weight.detach() / W1).flatten(1).median(1).values.log()
    config = ReconstructionConfig(bits=3, iterations=300, lr=0.032)
    quantize_layers(net, config)
    reconstruct_block(net, x, y, config)
    q1, q2 = ((q.log_S2 + q.log_s3 + q.log_s4).detach() for q in quantizers(net).values())
    follows = [float(torch.corrcoef(torch.stack([log_S, sign * factor]))[0, 1]) for log_S, sign in
               ((q1.mean((1, 2, 3)), 1), (q2.mean((0, 2, 3)), -1))]  # of each channel
    assert min(follows) > 0.9 and 2 < factor.exp().max() <= 4


def test_the_learning_rate_falls_to_zero_along_a_cosine():
    """The paper does not state the schedule. It is that of the authors' code, so we pin it."""
    with rates_of_adam() as rates:                                   # of S2 and s3, then of s1
        reconstruct_block(*prepared("flexround", iterations=4, lr=0.01, s1_lr=0.2))
    for rate, cosine in zip(rates, [1, 0.853553, 0.5, 0.146447], strict=True):
        assert rate == pytest.approx([0.01 * cosine, 0.2 * cosine], rel=1e-5)


def seen(x_q, x_fp=None, index=0, **settings):
    """What a block gets in its 20 iterations: (iterations, batch, features)."""
    found, block = [], nn.Linear(x_q.shape[1], 2)
    block.register_forward_pre_hook(                                 # the evaluations do not count
        lambda layer, args: found.append(args[0].clone()) if torch.is_grad_enabled() else None)
    config = ReconstructionConfig(iterations=20, batch_size=8, **settings)
    quantize_layers(block, config)
    reconstruct_block(block, x_q, torch.zeros(len(x_q), 2), config, x_fp, index)
    return torch.stack(found)


def test_each_block_and_each_seed_has_streams_of_its_own():
    """Seed 0's block 1 must not repeat seed 1's block 0, because then two runs would share luck."""
    rows, ones = torch.arange(64.0)[:, None].expand(64, 3), torch.ones(16, 100)
    for args, drop in (((rows,), 0.0), ((0 * ones, ones), 0.5)):     # what is drawn, and dropped
        a, b, c, again = (seen(*args, index=index, seed=seed, input_drop=drop)
                          for seed, index in ((0, 0), (0, 1), (1, 0), (0, 0)))
        assert torch.equal(a, again)
        assert not any(torch.equal(s, t) for s, t in ((a, b), (a, c), (b, c)))
    batches = seen(rows)[:, :, 0]
    assert all(len(batch.unique()) == 8 for batch in batches)        # no input twice in a batch
    assert len(batches.unique()) > 50 and len(batches.unique(dim=0)) == 20


@over_learned
def test_same_seed_same_bits(method):
    """A result that nobody can repeat is none, so the seed decides and nothing else."""
    states, histories = [], []
    for seed in (0, 0, 1):
        block, x, y, config = prepared(method, seed=seed, input_drop=0.5)
        torch.manual_seed(len(states))                               # the global stream is not used
        histories.append(reconstruct_block(block, x, y, config, x_fp=x + 0.1).history)
        assert torch.initial_seed() == len(states)                   # and is as it was
        states.append(block.state_dict())
    assert histories[0] == histories[1] != histories[2]
    assert equal_states(states[0], states[1]) and not equal_states(states[0], states[2])


def test_input_drop_is_the_share_of_full_precision_inputs():
    """QDrop draws each element anew at each iteration, and not whole inputs."""
    ones = torch.ones(16, 400)
    for drop in (0.0, 0.3, 1.0):                                     # 0 is X_tilde, 1 is X
        shares = seen(0 * ones, ones, input_drop=drop).mean(2)       # (iterations, batch)
        assert float(shares.mean()) == pytest.approx(drop, abs=0.02 * (drop == 0.3))
        assert (shares - drop).abs().max() < 0.15                    # not whole rows
    assert len(seen(0 * ones, ones, input_drop=0.3).mean((1, 2)).unique()) > 10


@over_methods
def test_only_the_quantizers_parameters_are_touched(method):
    """All else is the user's and has to survive, also under no_grad and on tensors with a graph."""
    def others(named):
        return {n: v for n, v in named if "weight.0." not in n}

    block, x, y, config = prepared(method)
    block.insert(1, nn.BatchNorm2d(16))
    block.train()[0].bias.requires_grad_(False)
    learned = [p for q in quantizers(block).values() for p in q.parameters()]
    before = [p.detach().clone() for p in learned]
    state = copy.deepcopy(others(block.state_dict().items()))
    target = y + 0 * x.requires_grad_().sum()
    with torch.no_grad():
        reconstruct_block(block, x, target, config)
    assert x.grad is None and equal_states(state, others(block.state_dict().items()))
    required = {n: p.requires_grad for n, p in others(block.named_parameters()).items()}
    assert not required.pop("0.bias") and all(required.values()) and len(required) == 5
    assert not any(p.requires_grad for p in learned)
    assert all(p.grad is None for p in block.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, learned, strict=True))
    assert not any(m.training for m in block.modules())


# ---- 5. A network, end to end --------------------------------------------------------------------
#
# Each block learns on what the quantized blocks before it return, and its target is the output of
# the float network. The first and the last layer get 8 bits, and activations can be rounded, too.

@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_end_to_end(name, capsys):
    """Each kind of network goes from float to folded, and we print a line a block."""
    net, x, layers = tiny(name)
    full, rtn = net(x).detach(), copy.deepcopy(net)
    net.blocks.train()
    start = quantize_model(rtn.blocks, x, replace(QUICK, method="rtn"))
    reports = quantize_model(net.blocks, x, QUICK)
    said = capsys.readouterr().err.splitlines()                      # nothing of round to nearest
    for line, r in zip(said, reports, strict=True):
        assert line.startswith(f"block {r.index}, bits {r.bits}: {r}")
    assert said[-1].endswith("(about 0 s left)")
    quantize_model(copy.deepcopy(fold(rtn)).blocks, x, QUICK, show=False)
    assert capsys.readouterr() == ("", "")                           # asked to be quiet
    assert [(r.index, list(r.bits)) for r in reports] == [
        (i, names) for i, names in enumerate(layers) if names]
    bits = {f"{r.index}.{n}": b for r in reports for n, b in r.bits.items()}
    ends = set() if name == "gpt" else {"0.conv1", f"{len(layers) - 1}.linear"}
    assert {n for n, b in bits.items() if b == 8} == ends and set(bits.values()) <= {3, 8}
    assert all(r.final_loss <= r.start_loss for r in reports)
    assert reports[-1].final_loss < start[-1].final_loss
    assert not any(m.training for block in net.blocks for m in block.modules())
    assert all(p.requires_grad != ("weight.0." in n) for n, p in net.named_parameters())
    y = net(x)
    assert torch.equal(fold(net)(x), y) and not torch.equal(y, full) and not quantizers(net)


@pytest.mark.parametrize("settings", [{}, {"input_drop": 0.5}, {"abits": 4}], ids=str)
def test_each_block_gets_the_quantized_blocks_outputs_and_the_float_networks_targets(settings,
                                                                                    monkeypatch):
    """X and X_tilde are the heart of section 3.1, so we follow both through a network by hand."""
    learn, handed = reconstruct.reconstruct_block, {}

    def spy(block, x_q, y_fp, config, x_fp, index, *rest, **named):
        handed[index] = x_q, y_fp, x_fp                              # B's second pass comes last
        return learn(block, x_q, y_fp, config, x_fp, index, *rest, **named)

    monkeypatch.setattr(reconstruct, "reconstruct_block", spy)
    net, x, _ = tiny("resnet conv")
    blocks = [*net.blocks[:2], nn.ReLU(), *net.blocks[2:]]           # a block without layers
    floats, config = copy.deepcopy(blocks), replace(QUICK, end_bits=None, **settings)
    never = nn.Module()                                              # it has no forward
    quantize_model((block for block in [*blocks, never]), x, config)    # a generator
    assert list(handed) == [0, 1, 3, 4] and not never.training
    x_fp = x_q = x
    with torch.no_grad():
        for i, (block, quantized) in enumerate(zip(floats, blocks, strict=True)):
            y_fp, y_q = block(x_fp), quantized(x_q)
            if i in handed:
                assert i == 0 or not torch.allclose(x_fp, x_q, atol=1e-3)
                for given, expected in zip(handed[i], (x_q, y_fp, x_fp), strict=True):
                    assert torch.allclose(given, expected, atol=1e-6)
            x_fp, x_q = y_fp, y_q


def test_bits_of_the_ends_and_what_is_skipped():
    """The first and the last layer have 8 bits in the paper. A router or a head may stay float."""
    net, x, _ = tiny("resnet conv")
    config = replace(QUICK, method="rtn", end_bits=6)
    reports = quantize_model(net.blocks, x, config, skip=("1.conv2", "2.downsample.0"))
    assert [r.bits for r in reports] == [
        {"conv1": 6}, {"conv1": 3}, {"conv1": 3, "conv2": 3}, {"linear": 6}]
    assert type(net.blocks[1].conv2) is nn.Conv2d
    pair = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    bits = reconstruct.bits_of_layers
    assert bits(pair, 3, None) == [{"0": 3, "1": 3}, {"0": 3, "1": 3}]
    assert bits(pair, 3, 8) == [{"0": 8, "1": 3}, {"0": 3, "1": 8}]
    assert bits(pair, 3, 8, skip=("0.0", "1.0")) == [{"1": 8}, {"1": 8}]
    single = [nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]    # a block is a layer
    assert bits(single, 3, 8) == [{"": 8}, {"": 3}, {}, {"": 8}]
    assert bits(single, 3, 8, skip=("3",)) == [{"": 8}, {"": 3}, {}, {}]
    reports = quantize_model(single, torch.randn(9, 4), config, skip=("0",))
    assert [(r.index, r.bits) for r in reports] == [(1, {"": 3}), (3, {"": 6})]
    assert not quantizers(single[0])


@pytest.mark.parametrize("method", ["rtn", "adaround", "flexround"])
def test_what_each_setting_learns(method):
    """B first learns the weights as if there were no activations, and Q learns both at once."""
    def learned(**settings):
        net, x, _ = tiny("resnet conv")
        own = replace(QUICK, method=method, iterations=4, **settings)
        reports = quantize_model(net.blocks, x, own)
        weights = {n: q.state_dict() for n, q in quantizers(net).items()}
        return weights, net(x), any(r.final_loss < r.start_loss for r in reports if r.abits)

    def equal(a, b):
        return all(equal_states(a[name], b[name]) for name in a)

    alone, in_b = learned()[0], learned(abits=3, step_lr=0.02)
    assert equal(alone, in_b[0]) and in_b[2] == (method != "rtn")
    if method != "rtn":
        in_q, again, other = (learned(abits=3, setting="Q", step_lr=0.02, seed=seed)
                              for seed in (0, 0, 1))
        assert torch.equal(in_q[1], again[1]) and not torch.equal(in_q[1], other[1])
        assert not equal(in_q[0], alone)


# ---- 6. A rule of your own -----------------------------------------------------------------------
#
# A rule is a class with one method. The loop, the bits and the activations come with it.

@pytest.mark.parametrize("base", [RoundToNearest, FlexRound])
def test_a_rule_of_your_own(base, monkeypatch):
    """The interface promises that a rule overrides integers() and no more."""
    class Ceiling(base):
        learns_s1, default_lr = True, 1e-2

        def integers(self, W):
            return flexround.Clamp.apply(torch.ceil(W.detach() / self.s1), *self.bounds)

    monkeypatch.setitem(flexround.METHODS, "ceiling", Ceiling)
    net, x, _ = tiny("resnet conv")
    reports = quantize_model(net.blocks, x, replace(QUICK, method="ceiling", abits=8, setting="Q"))
    assert any(r.final_loss < r.start_loss for r in reports)
    for layer in (net.blocks[1].conv1, net.blocks[-1].linear):
        q, W = quantizers(layer)[""], layer.parametrizations.weight.original
        assert torch.equal(layer.weight, q.s1 * torch.ceil(W / q.s1).clamp(q.lo, q.hi))
