"""The tests, in the order of the code: the grid, rules, gradients, the seam, the loop, networks,
activations, bad input, the main job, README, notebook. Experiments and integers have their own.
No test needs a download or a GPU. Expected values are literals, or we compute them a second way.
"""
import copy
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import flexround
import models
import reconstruct
from experiments import instructions
from flexround import FlexRound, RoundToNearest, fold, input_quantizers, quantize_layers, quantizers
from reconstruct import ReconstructionConfig, block_loss, quantize_model, reconstruct_block

torch.set_num_threads(1)                 # for tensors this small, more threads take more time

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared" / "data"                             # CIFAR-10, where we have it
LEARNED = ["adaround", "adaquant", "flexround"]
over_methods = pytest.mark.parametrize("method", ["rtn", *LEARNED])
over_learned = pytest.mark.parametrize("method", LEARNED)

# The shapes of a linear, a convolution's, a depthwise and a grouped convolution's weight. Each has
# two grids, so that each pair of (symmetric, per_channel) stands twice.
SHAPES = dict(linear=(6, 5), conv=(4, 3, 3, 3), depthwise=(6, 1, 3, 3), grouped=(6, 2, 3, 3))
CASES = {f"{name}-{'symmetric' if symmetric else 'asymmetric'}":
         (shape, symmetric, symmetric != (i % 2 == 0))
         for i, (name, shape) in enumerate(SHAPES.items()) for symmetric in (True, False)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_cases = pytest.mark.parametrize("shape, symmetric, per_channel", CASES.values(), ids=CASES)


def weight(shape, seed=0, dtype=torch.float64):
    """Weights with a few large ones, so that some lie outside the grid."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=g, dtype=torch.float64)
    return (W * torch.exp(0.5 * torch.randn(shape, generator=g, dtype=torch.float64))).to(dtype)


def disturbed(shape, symmetric=True, per_channel=False, cls=FlexRound):
    """A quantizer in the middle of its training: each learned factor is off its start."""
    W, g = weight(shape), torch.Generator().manual_seed(1)
    q = cls(W, 3, symmetric, per_channel)
    with torch.no_grad():
        for p in q.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        q.log_s1.sub_(0.3)                                           # so that the clamp takes part
    return q, W


def correlated(n, *shape):
    """Inputs such as activations are: few directions carry most of the variance."""
    g, d = torch.Generator().manual_seed(0), int(np.prod(shape))
    return (torch.randn(n, 4, generator=g) @ torch.randn(4, d, generator=g) / 2).view(n, *shape)


def equal_states(a, b):
    """Whether two state_dicts hold the same bits under the same keys."""
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


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


def min_max(W, bits, symmetric, per_channel):
    """The rows of W, and s1 and z of the smallest grid that clips nothing, one entry a row."""
    rows = W.numpy().reshape(len(W) if per_channel else 1, -1)
    top, bottom = rows.max(1, keepdims=True), rows.min(1, keepdims=True)
    if symmetric:
        return rows, np.maximum(top / (2 ** (bits - 1) - 1), -bottom / 2 ** (bits - 1)), 0
    s1 = (np.maximum(top, 0) - np.minimum(bottom, 0)) / (2 ** bits - 1)
    return rows, s1, np.rint(-np.minimum(bottom, 0) / s1)


def lp_error(rows, s1, z, bits, symmetric, p):
    lo, hi = (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2 ** bits - 1)
    return (abs(s1 * (np.clip(np.rint(rows / s1) + z, lo, hi) - z) - rows) ** p).sum(1)


# ---- 1. The grid ---------------------------------------------------------------------------------

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


def test_each_channel_is_searched_on_its_own_and_in_any_unit():
    """We search 64 channels at a time, and |error|^p could overflow, and neither may show."""
    W = weight((70, 9), dtype=torch.float32)
    log_s1, z = flexround.grid_from_weights(W, 3, False, True)
    for i in (0, 63, 64, 69):
        alone = flexround.grid_from_weights(W[i:i + 1], 3, False)
        assert torch.equal(alone[0], log_s1[i, 0]) and torch.equal(alone[1], z[i, 0])
    for scale in (2.0 ** -70, 2.0 ** 70):
        for p in (2.0, 4.0):
            a, b = (flexround.grid_from_weights(X, 3, False, True, p) for X in (W, W * scale))
            torch.testing.assert_close(a[0].exp() * scale, b[0].exp(), rtol=1e-4, atol=0.0)
            assert torch.equal(a[1], b[1])


def layer_for(kind, dtype=torch.float64):
    """A layer whose first output channel is large, and (n, ...) inputs that reach each weight
    alone: behind them an error of a weight is an error of an output."""
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


def test_a_linear_layer_is_searched_by_a_triangle_with_the_same_errors(monkeypatch):
    """The search of many tokens must find what it finds with all of them, behind a quantized input
    as well. A layer that computes something else has no triangle."""
    class Squares(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()
    torch.manual_seed(0)
    layer, dW = nn.Linear(6, 5).double(), torch.randn(5, 6).double()
    xs = [correlated(20, 9, 6).double() + 1, correlated(40, 6).double()]
    R = flexround.qr_factor(layer, xs)
    assert R.shape == (6, 6) and flexround.qr_factor(layer, [xs[1][:4]]) is None
    torch.testing.assert_close((R @ dW.T).square().sum(0),
                               sum((x @ dW.T).flatten(0, -2).square().sum(0) for x in xs))
    autocast = [x.bfloat16() for x in xs]                            # as within autocast
    torch.testing.assert_close(flexround.qr_factor(layer, autocast).abs(), R.abs(), rtol=0.1, atol=1)
    for quantized in (False, True):
        if quantized:
            flexround.quantize_inputs(layer, xs[0], {"": 2})
        calls = flexround.layer_inputs(layer, {"": layer}, xs[0])[""]
        assert flexround.qr_factor(layer, calls) is not None
        found = [flexround.grid_from_outputs(layer, calls, bits, False, True) for bits in (2, 3)]
        with monkeypatch.context() as patch:
            patch.setattr(flexround, "qr_factor", lambda *args: None)
            slow = [flexround.grid_from_outputs(layer, calls, bits, False, True) for bits in (2, 3)]
        torch.testing.assert_close(found, slow)
    layer.register_forward_hook(lambda layer, args, y: 2 * y)
    patched, narrow = nn.Linear(6, 5), nn.Linear(60, 1)
    patched.forward = lambda x: x                                    # as accelerate does
    assert flexround.qr_factor(narrow, [torch.ones(99, 60)]) is None
    for other in (layer, patched, Squares(6, 5), nn.Conv2d(6, 5, 1)):
        assert flexround.qr_factor(other, xs) is None


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


# ---- 2. The four rules ---------------------------------------------------------------------------

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


def test_a_weight_worked_out_by_hand():
    """Weights by hand show that the divisor has all factors, the front s1 alone, and V W's unit."""
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@over_methods
def test_factors_take_the_dtype_of_W_and_an_all_zero_channel_has_step_one(method, dtype):
    """A factor of another dtype or a NaN would spread into W_hat, and from there to all."""
    W = weight((6, 5), dtype=dtype)
    W[2] = 0
    for symmetric in (True, False):
        q = flexround.METHODS[method](W, 4, symmetric, True).eval()
        assert {t.dtype for t in (*q.parameters(), q.log_s1, q(W))} == {dtype}
        assert (q(W) - W).abs().max() < W.abs().max() / 4
        assert q.s1[2].item() == 1 and torch.isfinite(q.log_s1).all() and not q(W)[2].any()
        assert RoundToNearest(0 * W, 4, symmetric).s1 == 1


def test_adaround_is_soft_in_train_mode_only_and_rounds_exact_ties_up(monkeypatch):
    """Soft codes learn and hard codes are stored, and ties are the one exception that we name."""
    W = weight((6, 5), dtype=torch.float32)
    q, rtn = flexround.AdaRound(W, 3).train(), RoundToNearest(W, 3)
    torch.testing.assert_close(q(W), W.clamp(-4 * q.s1, 3 * q.s1))   # h is the cut-off fraction
    assert torch.equal(q.codes(W), rtn.codes(W))                     # codes are hard in any mode
    assert torch.equal(q.eval()(W), rtn(W))
    monkeypatch.setattr(flexround, "grid_from_weights", lambda *a: (torch.zeros(()), torch.tensor(0)))
    W = torch.tensor([[0.5, 1.5, -0.5, -1.5, 3.5, 9.0, -9.0, 0.4999999, 0.5000001, 0.0, -1e-9]])
    assert RoundToNearest(W, 3).codes(W).tolist() == [[0, 2, 0, -2, 3, 3, -4, 0, 1, 0, 0]]
    assert flexround.AdaRound(W, 3).codes(W).tolist() == [[1, 2, 0, -1, 3, 3, -4, 0, 1, 0, 0]]


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


# ---- 3. Gradients --------------------------------------------------------------------------------

@over_cases
def test_forward_and_gradients_agree_with_the_loops_in_numpy(shape, symmetric, per_channel):
    """Loops over single weights repeat section 3.1, because they share no line with the code."""
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


@over_cases
def test_gradients_of_adaquant_in_closed_form(shape, symmetric, per_channel):
    """Addition's gradient holds no W, because that is the paper's point against it."""
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


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_of_adaround_is_the_true_one(symmetric):
    """Soft AdaRound does not round, so its gradient must pass gradcheck off the kinks."""
    q, W = disturbed((4, 3, 3, 3), symmetric, cls=flexround.AdaRound)
    h, (lo, hi) = q.train().h().detach(), q.bounds
    k = torch.floor(W / q.s1) + h
    smooth = torch.stack([k - lo, k - hi, h, h - 1]).abs().amin(0) > 1e-3    # off each kink
    assert smooth.double().mean() > 0.5

    def surface(V):
        return smooth * torch.func.functional_call(q, {"V": V}, (W,))

    assert torch.autograd.gradcheck(surface, (q.V.detach().clone().requires_grad_(),))


@over_cases
def test_gradcheck_of_the_frozen_residual(shape, symmetric, per_channel):
    """With round(u) = u + c, c constant, all is smooth off the kinks, and numerics can check it."""
    q, W = disturbed(shape, symmetric, per_channel)
    at_s1 = [n for n, _ in q.named_parameters()].index("log_s1")
    start = [p.detach().clone().requires_grad_() for p in q.parameters()]
    u0 = (W / sum(start).exp()).detach()                             # S is a product of factors
    c, (lo, hi) = u0.round() - u0, (torch.as_tensor(b).expand(W.shape).to(W) for b in q.bounds)
    smooth = ((u0.round() != lo) & (u0.round() != hi)).double()
    assert 0.4 < smooth.mean() < 1

    def surrogate(*logs):
        return smooth * logs[at_s1].exp() * torch.clamp(W / sum(logs).exp() + c, lo, hi)

    assert torch.autograd.gradcheck(surrogate, start)
    G = weight(shape, seed=9) * smooth
    surrogate(*start).backward(G)
    q(W).backward(G)
    for p, s in zip(q.parameters(), start, strict=True):
        torch.testing.assert_close(p.grad, s.grad)


class Count(TorchDispatchMode):
    total = 0                            # of operations that compute: a view costs nothing on a GPU

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = ("view", "expand", "detach", "t.default", "alias", "squeeze", "transpose")
        self.total += not any(name in str(func) for name in views)
        return func(*args, **(kwargs or {}))


@over_cases
def test_the_backward_by_hand_is_autograds_in_fewer_operations(shape, symmetric, per_channel):
    """Division stands in the code only because it is cheaper, so we count the operations."""
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


@over_shapes
def test_proposition_3_1_as_a_property(shape):
    """The reciprocal rule is the paper's one proposition: the gradient grows with the weight."""
    W = weight(shape)
    q, a = FlexRound(W, 3), flexround.AdaQuant(W, 3)
    with torch.no_grad():                                            # so that some lie outside
        q.log_s1.sub_(0.5)
        a.log_s1.sub_(0.5)
    q(W).sum().backward()                                            # G = 1, S2 = s3 = s4 = 1
    code = (W / q.s1.detach()).round()
    inside = (code >= -4) & (code <= 3)
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(q.log_S2.grad, torch.where(inside, -W, 0.0))
    # Addition does not look at the weight: the same |gradient| for each.
    a(W).sum().backward()
    torch.testing.assert_close(a.V.grad, inside.double())
    # s1 cancels: another step, the same gradient, as long as the weight stays inside.
    with torch.no_grad():
        q.log_s1.add_(np.log(4.0))
    q.zero_grad()
    q(W).sum().backward()
    torch.testing.assert_close(q.log_S2.grad[inside], -W[inside])


def test_the_mask_exactly_at_the_bound():
    """At few bits many weights sit on a bound, so we pin that lo <= round(u) <= hi is inside."""
    u = torch.tensor([-5.0, -4.51, -4.49, -4.0, 0.0, 2.9, 3.0, 3.49, 3.51, 4.0])
    q = FlexRound(u[None], 3)
    with torch.no_grad():
        q.log_s1.zero_()                                             # a step of 1: W is u
    q(u[None]).sum().backward()
    assert (q.log_S2.grad[0] != 0).tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 0, 0]    # 0 at u = 0
    x, y = u.clone().requires_grad_(), u.clone().requires_grad_()
    (flexround.Clamp.apply(x, -4, 3) + flexround.Round.apply(y)).sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0] and y.grad.tolist() == [1] * 10
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert flexround.Round.apply(halves).tolist() == [0, 2, 2, 0, -2]          # ties to even
    # AdaRound's rectified sigmoid uses the same clamp: h exactly at 0 and 1 passes.
    x = torch.tensor([-0.01, 0.0, 1.0, 1.01], requires_grad=True)
    flexround.Clamp.apply(x, 0, 1).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


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


# ---- 4. The seam ---------------------------------------------------------------------------------

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


def test_folding_a_deep_copy_leaves_the_original_whole_and_the_reverse():
    """A deep copy shares the class that torch injected, so folding one could break the other."""
    x = torch.randn(2, 3, 8, 8)
    for first in (0, 1):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        quantize_layers(net, ReconstructionConfig(bits=3))
        pair, y = [net, copy.deepcopy(net)], net(x)
        one, other = pair[first], pair[1 - first]
        assert torch.equal(fold(one)(x), y) and torch.equal(other(x), y)
        assert not quantizers(one) and len(quantizers(other)) == 2
        assert torch.equal(fold(other)(x), y)
        assert type(net[0]) is nn.Conv2d and type(pair[1][2]) is nn.Linear


def test_folding_leaves_a_float_layer_that_shares_the_weight_alone():
    """W_hat goes into a new Parameter, because the old one may be an embedding's, too."""
    for make in (lambda: nn.Linear(5, 5, bias=False), lambda: nn.Embedding(5, 5)):
        layer, other = nn.Linear(5, 5), make()
        other.weight = layer.weight
        before = copy.deepcopy(layer.state_dict())
        quantize_layers(layer, ReconstructionConfig(bits=2))
        assert equal_states(fold(layer, keep=False).state_dict(), before)
        quantize_layers(layer, ReconstructionConfig(bits=2))
        assert list(fold(layer).state_dict()) == ["weight", "bias"]  # in their old order
        assert torch.equal(other.weight, before["weight"]) and (layer.weight != other.weight).any()


@over_methods
def test_state_dict_round_trip_and_to(method):
    """A user saves a half-done network with torch's own means, so these have to carry the lot."""
    net, other = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
                  for _ in range(2))
    for each in (net, other):
        quantize_layers(each, ReconstructionConfig(method, 3, symmetric=False, per_channel=True))
    with torch.no_grad():
        for p in net.eval().parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 3, 8, 8)
    other.eval().load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x)) and net.double()(x.double()).dtype == torch.float64
    assert quantizers(net)["0"].zero_point.dtype == torch.int32


def test_names_bits_and_what_is_skipped():
    """Single layers can have their own bits or stay float, because the paper's ends do."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5), nn.Linear(5, 5))
    made = quantize_layers(net, ReconstructionConfig(bits=3), {"0": 3, "2": 8})
    assert {name: q.bits for name, q in made.items()} == {"0": 3, "2": 8}
    assert type(net[3]) is nn.Linear and quantizers(net) == made
    config = ReconstructionConfig(symmetric=False, per_channel=True, p=1.5, learn_s1=False,
                                  use_s3_s4=False)                   # the config's switches arrive
    s1, z = flexround.grid_from_weights(net[3].weight, 4, False, True, 1.5)
    q = quantize_layers(net[3], config)[""]
    assert torch.equal(q.log_s1, s1) and torch.equal(q.zero_point, z)
    assert [n for n, _ in q.named_parameters()] == ["log_S2"]


def test_a_start_on_outputs_needs_inputs_and_a_layer_that_is_called():
    """An expert that gets no inputs has no outputs, so that its start is the one on weights."""
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.idle, self.empty = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = self.twice(self.twice(x.relu_()))
            return torch.cat([x, self.empty(x[:0])])

    torch.manual_seed(0)
    block, x = Experts(), correlated(32, 4)
    kept, first = x.clone(), x.relu()
    config = ReconstructionConfig(bits=3, start="outputs")
    with pytest.raises(ValueError, match="start = 'outputs' needs x"):
        quantize_layers(block, config)
    calls = [first, block.twice(first).detach()]
    grids = {name: flexround.grid_from_weights(layer.weight, 3) for name, layer in
             block.named_children()}
    on_weights = grids["twice"][0]
    grids["twice"] = flexround.grid_from_outputs(block.twice, calls, 3)
    assert grids["twice"][0] != on_weights
    for name, q in quantize_layers(block, config, x=x).items():
        assert torch.equal(q.log_s1, grids[name][0])
    assert torch.equal(x, kept)                                      # the block works in place


# ---- 5. The loop: one block ----------------------------------------------------------------------

RATES = {"rtn": None, "adaround": 0.03, "adaquant": 0.003, "flexround": 0.003}     # for this block


def small_block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))


def prepared(method="flexround", bits=3, x=None, **settings):
    """A quantized block, its inputs, targets and config."""
    settings = {"iterations": 60, "batch_size": 8, "lr": RATES.get(method), **settings}
    config, block = ReconstructionConfig(method, bits, **settings), small_block()
    x = correlated(32, 3, 6, 6) if x is None else x
    y = block(x).detach()
    quantize_layers(block, config)
    return block, x, y, config


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


def test_the_channels_that_are_asked_for_are_those_that_are_used():
    """Only the user knows that (N, C, L) has its channels in the middle."""
    reports = []
    for dim in (None, 1):                                            # 4 and 5 channels
        torch.manual_seed(0)
        layer, x = nn.Linear(4, 4), torch.randn(16, 5, 4)
        y = layer(x).detach()
        config = ReconstructionConfig(iterations=4, batch_size=8, channel_dim=dim)
        quantize_layers(layer, config)
        reports.append(reconstruct_block(layer, x, y, config))
    last, middle = reports
    assert middle.start_loss == pytest.approx(last.start_loss * 5 / 4)
    assert middle.history[0] == pytest.approx(last.history[0] * 5 / 4)


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
    assert float(block_loss(block(x), y)) == pytest.approx(report.final_loss, rel=1e-4)
    assert float(block_loss(fold(block)(x), y)) == pytest.approx(report.final_loss, rel=1e-4)


@over_learned
def test_never_worse_than_round_to_nearest_on_white_noise(method):
    """With a rate far too high, on inputs without structure, the start has to be what we keep."""
    for lr in (RATES[method], 0.5 if method == "flexround" else 3.0):
        x = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(5))
        block, x, y, config = prepared(method, 4, x, lr=lr)
        rtn = copy.deepcopy(block).eval()
        report = reconstruct_block(block, x, y, config)
        assert report.start_loss == pytest.approx(float(block_loss(rtn(x), y)), rel=1e-4)
        assert float(block_loss(block(x), y)) <= float(block_loss(rtn(x), y)) * (1 + 1e-6)
    assert report.best_iteration == 0 and torch.equal(block[0].weight, rtn[0].weight)
    torch.manual_seed(0)
    layer, x, config = nn.Linear(64, 64), torch.randn(256, 64), ReconstructionConfig(iterations=200)
    y = layer(x)
    quantize_layers(layer, config)
    report = reconstruct_block(layer, x, y, config)                  # FlexRound at its own rate
    assert report.evaluations[-1][1] > 1.1 * report.start_loss == 1.1 * report.final_loss


def test_division_learns_to_make_unequal_channels_equal():
    """README of experiments, unequal: rescale changes no output, and FlexRound divides a large
    channel by a large S' and the weights that read it by a small one."""
    from experiments.tools import rescale
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
    print("correlation {:.2f} and {:.2f}".format(*follows))
    assert min(follows) > 0.9 and 2 < factor.exp().max() <= 4


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


@pytest.fixture
def rates():
    """The rates of Adam's groups at each of its steps."""
    found = []
    handle = register_optimizer_step_pre_hook(
        lambda adam, *_: found.append([float(group["lr"]) for group in adam.param_groups]))
    yield found
    handle.remove()


def test_the_rate_falls_to_zero_along_a_cosine(rates):
    """The schedule is the authors' code's and in no paper, so we pin its values."""
    for method, lr, s1_lr, firsts in (                               # a last one is that of log s1
            ("flexround", 0.01, None, [0.01, 8e-3]), ("flexround", None, None, [3.2e-2, 8e-3]),
            ("flexround", 0.01, 0.2, [0.01, 0.2]), ("adaquant", None, None, [4e-3, 4e-3]),
            ("adaquant", 0.01, None, [0.01, 4e-3]), ("adaround", None, 0.2, [0.3])):
        rates.clear()
        reconstruct_block(*prepared(method, iterations=4, lr=lr, s1_lr=s1_lr))
        for rate, cosine in zip(rates, [1, 0.853553, 0.5, 0.146447], strict=True):
            assert rate == pytest.approx([first * cosine for first in firsts], rel=1e-5)


def test_a_rule_without_a_rate_for_log_s1_learns_it_with_lr(rates, monkeypatch):
    """A rule of one's own may be learned with one rate, as the authors' code does."""
    class OneRate(flexround.AdaQuant):
        default_lr, default_s1_lr = 2e-3, None

    monkeypatch.setitem(flexround.METHODS, "one", OneRate)
    reconstruct_block(*prepared("one", iterations=1))
    assert rates[0] == [2e-3, 2e-3]


@pytest.mark.parametrize("method", ["adaquant", "flexround"])
def test_the_rate_of_s1_moves_s1_and_nothing_else(method):
    """AdaQuant's V has the unit of a weight and log s1 has none, so that one rate cannot fit."""
    block, x, y, config = prepared(method, iterations=1, lr=1e-3, s1_lr=0.5)
    before = copy.deepcopy(block)
    reconstruct.make_iteration(block, x, y, config)(0)
    for name, q in quantizers(block).items():
        start = dict(quantizers(before)[name].named_parameters())
        for key, p in q.named_parameters():                          # Adam's first step is the rate
            rate = 0.5 if key == "log_s1" else 1e-3
            assert float((p - start[key]).abs().max()) == pytest.approx(rate, rel=1e-3)


def test_the_schedule_of_adaround_is_the_one_that_is_run(monkeypatch):
    """BRECQ's numbers are literals here, because the paper takes AdaRound with these settings."""
    betas, weighted = [], flexround.AdaRound.regulariser
    monkeypatch.setattr(flexround.AdaRound, "regulariser",
                        lambda q, beta: betas.append(float(beta)) or weighted(q, beta))
    block, x, y, config = prepared("adaround", iterations=10)
    start = copy.deepcopy(list(quantizers(block).values()))          # V hardly moves in 2 steps
    report = reconstruct_block(block, x, y, config)
    history, unit = report.history, 10_000 * report.start_loss
    falling = [20, 17.75, 15.5, 13.25, 11, 8.75, 6.5, 4.25]          # to 2 at the end
    assert betas[::2] == pytest.approx([20, 20, *falling])           # once for each of 2 layers
    assert max(history[:2]) < 0.01 * unit < min(history[2:])         # none in the first fifth
    count = sum(q.V.numel() for q in start)
    expected = unit / count * sum(float(weighted(q, 20.0).detach()) for q in start)
    assert history[2] == pytest.approx(expected, rel=0.05)
    doubled = reconstruct_block(*prepared("adaround", iterations=10, reg_weight=20_000)).history
    assert doubled[2] == pytest.approx(2 * history[2], rel=0.05)
    q = flexround.AdaRound(weight((1, 3)), 3)
    q.V.data = torch.tensor([[0.0, 9.0, np.log(0.25 / 0.75)]])
    torch.testing.assert_close(q.h().flatten().tolist(), [0.5, 1.0, 0.2])
    for beta in (2.0, 3.0):
        assert float(weighted(q, beta).detach()) == pytest.approx(1 + 0 + (1 - 0.6 ** beta))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adaround_takes_no_step_where_its_loss_is_rounding_noise(dtype):
    """Its soft start is W itself. In a first block the loss is then 0 but for noise, and Adam would
    make whole steps of that: other ones, and other codes, on each processor."""
    block, x = small_block().to(dtype), correlated(32, 3, 6, 6).to(dtype)
    config = ReconstructionConfig("adaround", 8, iterations=50, batch_size=8)
    y = block(x).detach()
    quantize_layers(block, config)
    start = reconstruct.evaluate(block.eval(), x, y, config)
    V = [q.V for q in quantizers(block).values()]
    initial = [v.detach().clone() for v in V]
    with reconstruct.learning(block, V, 0):
        iterate = reconstruct.make_iteration(block, x, y, config, start_loss=start)
        for i in range(10):
            assert iterate(i) < 1e-6 * start
        assert all(torch.equal(v, v0) for v, v0 in zip(V, initial, strict=True))
        iterate(10)                                                  # the regulariser begins
        assert not any(torch.equal(v, v0) for v, v0 in zip(V, initial, strict=True))


def test_adaround_learns_the_same_in_any_unit():
    """A block whose loss is 10,000 times as large needs no other weight of the regulariser."""
    codes = []
    for unit in (100, 10_000):                                       # so large that Adam's eps is 0
        block, x, y, config = prepared("adaround", iterations=100, lr=0.3)
        other = small_block()
        with torch.no_grad():
            other[2].weight.mul_(unit)
            other[2].bias.mul_(unit)
        quantize_layers(other, config)
        report = reconstruct_block(other, x, unit * y, config)
        assert report.best_iteration == 100
        codes.append([q.codes(layer.parametrizations.weight.original) for layer, q in
                      zip((other[0], other[2]), quantizers(other).values(), strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


def test_a_report_says_when_the_last_state_is_not_the_one_kept():
    """A rate that is too high shows in the evaluations, and the user has to see that."""
    said = {}
    for kept in (0, 30, 60):
        report = reconstruct.BlockReport(3, {"": 4}, 2.0, 1.0, kept, [], [1.5] * 60, 7.0)
        said[kept] = str(report)
    line = "loss 2 -> 1 in 7.0 s"
    assert said == {0: f"{line}: no gain, try a smaller learning rate", 60: line,
                    30: f"{line}, kept the state after 30 of 60 iterations"}
    assert str(replace(report, best_iteration=0, history=[])) == line    # round to nearest


def test_the_evaluation_adds_up_in_full_precision():
    """bfloat16 sums stall: 4,096 batches of one came out as a tenth, and this sum chooses states"""
    class Half(nn.Module):
        def forward(self, x):
            return x.bfloat16()

    config = ReconstructionConfig(batch_size=1)
    x = torch.full((4096, 4), 0.2)
    loss = reconstruct.evaluate(Half(), x, (0 * x).bfloat16(), config)
    assert loss == pytest.approx(4 * float(x.bfloat16()[0, 0]) ** 2, rel=1e-6)
    layer = nn.Linear(4, 4)
    quantize_layers(layer, config)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = reconstruct.evaluate(layer, x, layer(x) + 1, config)
    assert found == pytest.approx(4, rel=0.02)


class Exploding(nn.Module):
    """Returns NaN from the given training step on, evaluations not counted. 0: always."""

    def __init__(self, step):
        super().__init__()
        self.step, self.count = step, 0

    def forward(self, x):
        self.count += x.requires_grad
        return x * float("nan") if self.count >= self.step else x


def test_a_loss_that_is_not_finite_and_an_interrupt_leave_the_block_as_it_was():
    """NaN or Control-C in the middle must not leave factors of no known state, and we say where."""
    def stop(iteration, loss):
        if iteration > 20:
            raise KeyboardInterrupt("at 21")

    block, x, y, config = prepared(iterations=50)
    before = copy.deepcopy(block.state_dict())
    for last, message in ((Exploding(7), "block 4.* iteration 7 of 50"),    # seen at the mark 12
                          (Exploding(0), "before training"), (nn.Identity(), "at 21")):
        with pytest.raises((FloatingPointError, KeyboardInterrupt), match=message):
            reconstruct_block(nn.Sequential(block, last), x, y, config, index=4, progress=stop)
        assert equal_states(block.state_dict(), before)


# ---- 6. Networks, end to end ---------------------------------------------------------------------

def tiny(name):
    """An untrained network, calibration inputs and the names of its layers, block by block."""
    torch.manual_seed(0)
    if name == "gpt":
        inner = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        return (models.GPT(11, context=16, layers=2, heads=2, width=16).eval(),
                torch.randint(0, 11, (16, 16)), [[], inner, inner, []])
    if name == "mobilenet":
        net, inner = models.MobileNet((4, 6), 1, channels=1), ["conv1", "conv2", "conv3"]
        layers = [["conv1"], inner, inner, ["conv1"], ["linear"]]
    else:
        shortcut = name.removeprefix("resnet ")
        net, inner = models.ResNet((4, 6), 1, shortcut, channels=1), ["conv1", "conv2"]
        layers = [["conv1"], inner, inner + ["downsample.0"] * (shortcut == "conv"), ["linear"]]
    x = correlated(16, 1, 8, 8)
    return models.fold_batchnorm(net, x), x, layers


NETWORKS = ["resnet conv", "resnet pad", "mobilenet", "gpt"]
QUICK = ReconstructionConfig(bits=3, iterations=20, batch_size=8)


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

    def spy(block, x_q, y_fp, config, x_fp, index, *rest):
        handed[index] = x_q, y_fp, x_fp                              # B's second pass comes last
        return learn(block, x_q, y_fp, config, x_fp, index, *rest)

    monkeypatch.setattr(reconstruct, "reconstruct_block", spy)
    net, x, _ = tiny("resnet conv")
    blocks = [*net.blocks[:2], nn.ReLU(), *net.blocks[2:]]           # a block without layers
    floats, config = copy.deepcopy(blocks), replace(QUICK, **settings)
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
    assert bits(pair, 3, 8, skip=("0.0", "1.0")) == [{"1": 3}, {"1": 8}]    # no end moves
    single = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]           # a block that is a layer
    assert bits(single, 3, 8) == [{"": 8}, {}, {"": 8}]
    assert bits(single, 3, 8, skip=("2",)) == [{"": 8}, {}, {}]
    reports = quantize_model(single, torch.randn(9, 4), config, skip=("0",))
    assert [(r.index, r.bits) for r in reports] == [(2, {"": 6})]
    assert not quantizers(single[0])


def test_a_start_on_outputs_looks_at_64_float_inputs_that_are_drawn():
    """All methods share this start, so that it must not depend on how well a block has learned."""
    torch.manual_seed(0)
    blocks, x = [nn.Linear(4, 4), nn.Linear(4, 4)], torch.randn(96, 4)
    x[32:64, 0] *= 4                                                 # each third asks for its own
    x[64:, 1] *= 16
    some = [torch.randperm(96, generator=torch.Generator().manual_seed(QUICK.block_seed(i)))[:64]
            for i in range(2)]
    with torch.no_grad():
        expected = [flexround.grid_from_outputs(blocks[0], [x[some[0]]], 2),
                    flexround.grid_from_outputs(blocks[1], [blocks[0](x)[some[1]]], 2)]
    quantize_model(blocks, x, replace(QUICK, method="rtn", bits=2, end_bits=None, start="outputs"))
    for block, (log_s1, _) in zip(blocks, expected, strict=True):
        assert torch.equal(quantizers(block)[""].log_s1, log_s1)


def test_a_head_tied_to_an_embedding_stays_float():
    """The paper does not quantize embeddings, and a tied head is one, maybe of another block."""
    token, hidden, head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
    head.weight = token.weight
    before, blocks = token.weight.detach().clone(), [token, nn.Sequential(hidden, head)]
    assert list(quantize_layers(nn.Sequential(*copy.deepcopy(blocks)), QUICK)) == ["1.0"]
    tokens, own = torch.randint(0, 7, (16, 3)), replace(QUICK, end_bits=None)
    assert [r.bits for r in quantize_model(blocks, tokens, own)] == [{"0": 3}]
    fold(blocks[1])
    assert torch.equal(token.weight, before) and head.weight is token.weight
    bag = nn.EmbeddingBag(7, 5)                                      # it averages its 3 rows
    head.weight = bag.weight
    assert [r.bits for r in quantize_model([bag, blocks[1]], tokens, own)] == [{"0": 3}]
    assert head.weight is bag.weight


@pytest.mark.parametrize("settings", [{}, {"abits": 4}, {"input_drop": 0.5}], ids=str)
def test_a_block_that_works_in_place_does_not_spoil_the_cache(settings):
    """A block with an in-place operation changes its input, and we use each input again."""
    torch.manual_seed(0)                                             # ELU twice is not ELU once
    x, layers = torch.randn(40, 4), [nn.Linear(4, 4), nn.Linear(4, 8)]
    kept, own = x.clone(), replace(QUICK, end_bits=None, **settings)
    a, b = (quantize_model([nn.Sequential(nn.ELU(inplace=in_place), copy.deepcopy(layer))
                            for layer in layers], x, own) for in_place in (True, False))
    assert torch.equal(x, kept)
    assert [r.evaluations for r in a] == [r.evaluations for r in b]


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


def test_after_a_failure_the_block_is_float_and_earlier_ones_quantized():
    """What was learned for hours has to survive, and the failing block has to be whole."""
    first, second = small_block(), nn.Sequential(nn.Conv2d(16, 8, 3), Exploding(12))
    before = copy.deepcopy(second.state_dict())
    config, x = ReconstructionConfig(iterations=50, batch_size=8), correlated(32, 3, 6, 6)
    with pytest.raises(FloatingPointError, match="block 1"):
        quantize_model([first, second], x, config)
    assert len(quantizers(first)) == 2 and not quantizers(second)
    assert type(second[0]) is nn.Conv2d and equal_states(second.state_dict(), before)
    assert all(p.requires_grad for p in second.parameters())
    second[1] = Exploding(62)                                        # in setting B's second pass
    with pytest.raises(FloatingPointError, match="block 1, flexround.* iteration 12 of 50"):
        quantize_model([fold(first), second], x, replace(config, abits=4))
    assert len(quantizers(first)) == len(input_quantizers(first)) == 2
    assert quantizers(second) and not input_quantizers(second)
    first, second = small_block(), nn.Sequential(nn.Conv2d(16, 8, 3), Exploding(12))
    with pytest.raises(FloatingPointError, match="block 1"):         # in setting Q: nothing drops
        quantize_model([first, second], x, replace(config, abits=4, setting="Q"))
    assert [q.keep_float for q in input_quantizers(first).values()] == [0.0, 0.0]


class Drawn(flexround.FlexRound):
    """A rule of one's own that draws its start."""

    def __init__(self, W, *args, **settings):
        super().__init__(W, *args, **settings)
        self.log_S2.data += torch.randn_like(W)


@pytest.mark.parametrize("settings, stop, rest", [
    ({}, 3, [2, 3]), ({"method": "adaround", "start": "outputs", "input_drop": 0.5}, 2, [1, 2, 3]),
    ({"abits": 4, "step_lr": 0.02}, 3, [2, 3, 0, 1, 2, 3]), ({"abits": 4, "step_lr": 0.02}, 7,
    [2, 3]), ({"abits": 4, "setting": "Q", "start": "outputs"}, 3, [2, 3]),
    ({"method": "drawn"}, 3, [2, 3])], ids=str)
def test_an_interrupted_call_goes_on_with_the_same_digits(settings, stop, rest, monkeypatch):
    """Hours of work must survive Control-C. B is stopped in its first and in its second pass. A
    rule that draws its start draws it by the seed and the block. And the time left has to count
    the blocks that are learned, no more and no less."""
    learn, calls, clocks = reconstruct.reconstruct_block, [], []

    class Kept(reconstruct.Clock):
        def __init__(self, *args):
            super().__init__(*args)
            clocks.append(self)

    def interrupt(iteration, loss):
        raise KeyboardInterrupt

    def learn_until(*args):
        calls.append(args[5])                                        # the index
        return learn(*args[:6], interrupt if len(calls) == stop else args[6], *args[7:])

    net, x, _ = tiny("resnet conv")
    monkeypatch.setitem(flexround.METHODS, "drawn", Drawn)
    config, whole = replace(QUICK, iterations=8, **settings), copy.deepcopy(net)
    monkeypatch.setattr(reconstruct, "Clock", Kept)
    quantize_model(whole.blocks, x, config)
    monkeypatch.setattr(reconstruct, "reconstruct_block", learn_until)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(net.blocks, x, config)
    torch.manual_seed(99)                                            # nothing depends on it
    with pytest.warns(UserWarning, match=r"blocks \[0.*\] are quantized already: we keep them"):
        reports = quantize_model(net.blocks, x, config)
    assert [r.index for r in reports] == calls[stop:] == rest
    assert equal_states(net.state_dict(), whole.state_dict())
    for clock in (clocks[0], clocks[-1]):                            # of the calls that ended
        assert clock.done == clock.total > 0


def test_a_rule_draws_anew_in_each_block_and_by_the_seed(monkeypatch):
    """Else a whole network would start in the same corner, or nobody could make a run again."""
    monkeypatch.setitem(flexround.METHODS, "drawn", Drawn)
    drawn = {}
    for run, seed in ((0, 0), (1, 0), (2, 1)):
        blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
        config = replace(QUICK, method="drawn", iterations=1, lr=1e-9, seed=seed, end_bits=None)
        before = torch.get_rng_state()
        quantize_model(blocks, torch.ones(9, 4), config)
        assert torch.equal(torch.get_rng_state(), before)            # yours goes on undisturbed
        for i, block in enumerate(blocks):
            drawn[run, i] = block.parametrizations.weight[0].log_S2.detach()
    torch.testing.assert_close(drawn[0, 0], drawn[1, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn[0, 1], drawn[1, 1], rtol=0, atol=1e-6)
    for other in ((0, 1), (2, 0), (2, 1)):
        assert (drawn[0, 0] - drawn[other]).abs().max() > 0.1


@pytest.mark.parametrize("settings", [
    {"bits": 4}, {"method": "adaround"}, {"symmetric": False}, {"per_channel": True},
    {"end_bits": None}, {"abits": 4, "setting": "Q"}], ids=str)
def test_a_network_that_is_quantized_otherwise_is_refused(settings):
    """Only what this very call would have learned may stay, or the result is nobody's."""
    net, x, _ = tiny("resnet conv")
    quantize_model(net.blocks, x, replace(QUICK, iterations=1))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="block 0 is quantized already, and not as config says|"
                                         "block 1 is quantized already, and not as config says"):
        quantize_model(net.blocks, x, replace(QUICK, **settings))
    assert equal_states(net.state_dict(), before)
    by_hand = nn.Sequential(nn.Linear(4, 4))                         # placed and not learned
    quantize_layers(by_hand, ReconstructionConfig(bits=8))
    with pytest.raises(ValueError, match="block 0 is quantized already"):
        quantize_model([by_hand, nn.Linear(4, 4)], torch.ones(9, 4), QUICK)


def test_a_block_comes_home_when_its_turn_fails():
    """A GPU that runs out of memory must not leave one block there and the others here."""
    class Traveller(nn.Sequential):
        places = ("cpu",)

        def to(self, device):
            self.places += (str(device),)
            return self

        def forward(self, x):
            if self.places[-1] != "cpu":
                raise RuntimeError("out of memory")
            return super().forward(x)

    block = Traveller(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="out of memory"):
        quantize_model([block], torch.ones(9, 4), replace(QUICK, device="meta", end_bits=None))
    assert block.places[:2] == ("cpu", "meta") and block.places[-1] == "cpu"


def test_a_long_block_says_where_it_is_every_ten_seconds(monkeypatch, capsys):
    """A line a block is none for an hour where the block is large."""
    now = [0.0]
    monkeypatch.setattr(reconstruct.time, "perf_counter", lambda: now[0])
    for show in (True, False):
        clock = reconstruct.Clock([([{"": 4}], [{}])], replace(QUICK, iterations=100), show)
        for i in range(1, 6):                                        # at 4 s, 8 s, ..., 20 s
            now[0] += 4
            clock.iteration(i, 0.5)
    assert capsys.readouterr().err == "iteration 3, last evaluated loss 0.5 (about 388 s left)\n"


def test_a_compiled_layer_is_found_once():
    """torch.compile's wrapper answers for what it wraps, so that a layer could count twice."""
    layer = nn.Linear(4, 4)
    block = torch.compile(layer, backend="eager")                    # nothing is compiled here
    made = quantize_layers(block, QUICK)
    assert quantizers(block) == made and list(made) == ["_orig_mod"]
    W_hat = layer.weight.detach()
    flexround.quantize_inputs(block, torch.ones(9, 4), {"_orig_mod": 4})
    assert list(input_quantizers(block)) == ["_orig_mod"]
    with pytest.warns(UserWarning, match="float inputs again"):
        fold(block)
    assert not quantizers(block) and torch.equal(layer.weight, W_hat)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_code_on_cuda():
    """A GPU gives other last bits, so we compare losses, with blocks there and blocks in turn."""
    for cache in (None, "cpu"):
        net, x, _ = tiny("resnet conv")
        on_cpu, moved = quantize_model(copy.deepcopy(net).blocks, x, QUICK), copy.deepcopy(net)
        reports = quantize_model(net.to("cuda").blocks, x, replace(QUICK, cache_device=cache))
        in_turn = quantize_model(moved.blocks, x, replace(QUICK, device="cuda", cache_device=cache))
        assert all(p.device.type == "cuda" for p in net.parameters())
        assert all(p.device.type == "cpu" for p in moved.parameters())
        for a, b, c in zip(on_cpu, reports, in_turn, strict=True):
            assert b.final_loss <= b.start_loss and c.final_loss <= c.start_loss
            assert [b.start_loss, c.start_loss] == pytest.approx([a.start_loss] * 2, rel=0.2)


# What a recording must not freeze: the batch, the regulariser, what is dropped. The last is
# AdaQuant and then the steps, behind inputs that are cached on the CPU.
RECORDED = {
    "AdaRound": ("resnet conv", dict(method="adaround")),
    "drop": ("resnet conv", dict(method="flexround", input_drop=0.5)),
    "Q": ("gpt", dict(method="flexround", abits=4, setting="Q", symmetric=False)),
    "B": ("resnet conv", dict(method="adaquant", abits=4, cache_device="cpu"))}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name, settings", RECORDED.values(), ids=RECORDED)
def test_a_recorded_cuda_iteration_learns_what_the_eager_one_learns(name, settings):
    """A graph that replayed an old batch, beta or random number would see another loss. A rate this
    small flips no rounding, so that the last bits stay the last bits."""
    net, x, _ = tiny(name)
    config = replace(QUICK, iterations=40, device="cuda", lr=1e-6, s1_lr=1e-6, **settings)
    eager, replayed = (quantize_model(copy.deepcopy(net).blocks, x, replace(config, cuda_graph=on))
                       for on in (False, True))
    for a, b in zip(eager, replayed, strict=True):
        assert b.history == pytest.approx(a.history, rel=1e-3)
        assert b.final_loss == pytest.approx(a.final_loss, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["adaround", "adaquant", "flexround"])
def test_a_replay_on_cuda_leaves_the_eager_gradients(method):
    """Adam is not in the graph. If it read other gradients than a replay writes, or old ones, the
    loss would hardly show it at a small rate."""
    gradients = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        layer, x = nn.Linear(6, 5).cuda().requires_grad_(False), correlated(64, 6).cuda()
        y = layer(x).detach()
        config = replace(QUICK, method=method, lr=1e-6, s1_lr=1e-6, cuda_graph=cuda_graph)
        quantize_layers(layer, config)
        iterate = reconstruct.make_iteration(layer, x, y, config)
        found = []
        for i in range(4):
            iterate(i)
            found += [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        gradients.append(found)
    assert not torch.equal(gradients[0][0], gradients[0][len(gradients[0]) // 4])    # new batch
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_cuda_cannot_record_is_learned_as_before():
    """A block may wait for the device, and a run of an hour should not end with that."""
    class Waits(nn.Module):
        def forward(self, x):
            return x * (1.0 + 0.0 * x.mean().item())                 # Python waits for the number
    net, x, _ = tiny("resnet conv")
    block = nn.Sequential(net.blocks[0], Waits())
    config = replace(QUICK, device="cuda", lr=1e-6, s1_lr=1e-6, end_bits=None)
    eager, = quantize_model([copy.deepcopy(block)], x, config)
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph"):
        report, = quantize_model([block], x, replace(config, cuda_graph=True))
    assert report.history == pytest.approx(eager.history, rel=1e-3)
    assert not torch.cuda.get_sync_debug_mode()


class OnDevice(torch.Tensor):
    """A tensor in the computer's memory that says it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl      # Device says what results are
    device = torch.device("cuda", 0)
    is_cuda = True
    numpy = None                                                     # an error, as it is on CUDA

    def to(self, *args, copy=False, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = device or self.device, dtype or self.dtype
        if (device.type, dtype, copy) == ("cuda", self.dtype, False):
            return self
        return torch.ops.aten._to_copy(self, dtype=dtype, device=device)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()


class Device(TorchDispatchMode):
    """Within, a CUDA device on a machine without one. It computes the CPU's bits. Like CUDA it
    refuses operands on two devices and draws from its own generator. `waits` counts how often
    Python waits for it: for a number, for a copy, for how many elements a mask holds."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        asked = kwargs.pop("device", None)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        ours = [t for t in tensors if isinstance(t, OnDevice)]
        others = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
        here = bool(ours) if asked is None else torch.device(asked).type == "cuda"
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):                            # from one to the other?
            self.waits += here != bool(ours) or len(ours) not in (0, len(tensors))
        elif name in ("index", "index_put_") and ours:               # these take a CPU's index
            self.waits += bool(others) or any(t.dtype == torch.bool for t in tensors[1:])
        elif ours:
            self.waits += name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
            if others:
                raise RuntimeError(f"{name}: operands on two devices, {others} on the CPU")
        if here and torch.Tag.nondeterministic_seeded in func.tags:
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"{name}: a generator on the CPU for a tensor on the device")
            with torch.random.fork_rng([]):
                torch.set_rng_state(self.generator.get_state())
                result = func(*args, **kwargs)
                self.generator.set_state(torch.get_rng_state())
        else:
            result = func(*args, **kwargs)

        def placed(t):                                               # in place: it is where it was
            return t if any(t is operand for operand in tensors) else t.as_subclass(OnDevice)

        return tree_map_only(torch.Tensor, placed, result) if here else result


@pytest.fixture
def device(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    device, cuda = Device(), torch.cuda
    device.generator = torch.Generator()
    monkeypatch.setattr(cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(cuda, "default_generators", [device.generator])
    monkeypatch.setattr(cuda, "get_rng_state", lambda _: device.generator.get_state())
    monkeypatch.setattr(cuda, "set_rng_state", lambda state, _: device.generator.set_state(state))
    torch.__future__.set_overwrite_module_params_on_conversion(True)    # .data keeps the old class
    yield device
    torch.__future__.set_overwrite_module_params_on_conversion(False)


# A network, where it is at first, its settings, and how many copies an iteration waits for.
# (FlexRound's gradient of a 1 x 1 convolution is copied inside torch, which knows no OnDevice.)
ON_A_DEVICE = {
    "drop": ("resnet pad", "cpu", dict(method="flexround", input_drop=0.5), 0),
    "AdaRound": ("mobilenet", "cuda", dict(method="adaround", symmetric=False,
                                           per_channel=True), 0),
    "Q": ("gpt", "cpu", dict(method="adaquant", abits=4, setting="Q", symmetric=False), 0),
    "B": ("resnet pad", "cpu", dict(method="flexround", abits=4, start="outputs",
                                    cache_device="cpu"), 2)}


@pytest.mark.parametrize("name, home, settings, copies", ON_A_DEVICE.values(), ids=ON_A_DEVICE)
def test_a_device_computes_the_cpus_bits_and_no_iteration_waits(name, home, settings, copies,
                                                                device, monkeypatch):
    """Without a GPU nobody would see that a tensor is made on the wrong device, or that an .item()
    in the loop makes each iteration wait."""
    seen = []                                                        # after each iteration
    monkeypatch.setattr(reconstruct.Clock, "iteration",
                        lambda clock, done, loss: seen.append((done, device.waits)))
    net, x, _ = tiny(name)
    blocks = net.blocks[:2]
    expected = copy.deepcopy(blocks)
    config = replace(QUICK, iterations=8, end_bits=None, **settings)
    there = replace(config, device="cuda:0" if home == "cpu" else None)
    state = device.generator.get_state()
    with device:
        found = quantize_model(blocks.to(torch.device(home, 0)), x, there, show=False)
    assert all(p.device.type == home for p in blocks.parameters())
    assert torch.equal(device.generator.get_state(), state)
    waits = [after - before for (_, before), (done, after) in zip(seen, seen[1:], strict=False)
             if done in (3, 5, 7)]                                   # others have an evaluation
    assert len(waits) == 3 * len(found) and set(waits) == {copies}
    for ours, theirs in zip(found, quantize_model(expected, x, config), strict=True):
        assert replace(ours, seconds=0) == replace(theirs, seconds=0)
    assert equal_states(blocks.state_dict(), expected.state_dict())


# ---- 7. The networks themselves, and their data --------------------------------------------------

class PreActivation(nn.Sequential):
    def forward(self, x):
        return self[0](torch.relu(self[1](x)))


def test_folding_batch_norm_changes_no_output_or_is_refused():
    """Definition order is not use order, as before an activation, so the outputs must decide."""
    torch.manual_seed(0)
    x, wrong = torch.randn(16, 3, 8, 8), PreActivation(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    nets = (models.MobileNet((4, 6), 1), models.ResNet((4, 6), 1, "conv"), models.ResNet((4, 6), 1))
    for m in (m for net in (*nets, wrong) for m in net.modules()):
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.running_var, m.bias, m.running_mean):
                nn.init.uniform_(t, 0.5, 2.0)
    for net in nets:
        y = net.eval()(x)
        assert models.fold_batchnorm(net, x) is net
        assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
        torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="outputs are off by .* does not follow the convolution"):
        models.fold_batchnorm(wrong, x)
    with pytest.warns(UserWarning, match=r"not folded.*\['0'\]"):
        net = models.fold_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), x)
    with pytest.warns(UserWarning, match=r"0\.0.*models\.fold_batchnorm"):
        quantize_model([net], x, replace(QUICK, end_bits=None))


def restless_norms(net):
    """net in eval mode, with batch norms that do something, as after training."""
    for m in net.eval().modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            for t in (m.weight, m.running_var, m.bias, m.running_mean):
                nn.init.uniform_(t, 0.5, 2.0)
    return net


class NormThenReLU(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's, which is no nn.BatchNorm2d."""

    def forward(self, x):
        return 2 * x + 1


def standardised_conv():
    """A convolution that computes its weight anew in forward, as some of timm's."""
    class StdConv2d(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / self.weight.std((1, 2, 3), keepdim=True),
                                      self.bias)

    return StdConv2d(3, 4, 1)


def hooked(layer):
    layer.register_forward_hook(lambda layer, args, y: y.abs())
    return layer


def changed_input(layer):
    layer.register_forward_pre_hook(lambda layer, args: (args[0].abs(),))
    return layer


def bias_of(layer):
    parametrize.register_parametrization(layer, "bias", nn.ReLU())
    return layer


LEFT = {"an activation inside": (lambda: (nn.Conv2d(3, 4, 1), NormThenReLU(4)), "forward of its"),
        "a hook behind the norm": (lambda: (nn.Conv2d(3, 4, 1), hooked(nn.BatchNorm2d(4))), "hook"),
        "a hook between": (lambda: (hooked(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)), "hook"),
        "a hook before the norm": (lambda: (nn.Conv2d(3, 4, 1), changed_input(nn.BatchNorm2d(4))),
                                   "hook"),
        "batch statistics": (lambda: (nn.Conv2d(3, 4, 1),
                                      nn.BatchNorm2d(4, track_running_stats=False)), "no running"),
        "weight norm": (lambda: (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)),
                                 nn.BatchNorm2d(4)), "weight norm"),
        "a pruned weight": (lambda: (prune.l1_unstructured(nn.Conv2d(3, 4, 1), "weight", 3),
                                     nn.BatchNorm2d(4)), "computed from others"),
        "a bias computed": (lambda: (bias_of(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)), "or bias"),
        "a conv of its own": (lambda: (standardised_conv(), nn.BatchNorm2d(4)), "Give an example"),
        "no conv before": (lambda: (nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), "no Conv2d"),
        "a frozen norm": (lambda: (nn.Conv2d(3, 4, 1), FrozenBatchNorm2d()), "a FrozenBatchNorm2d"),
        "a linear layer": (lambda: (nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4)),
                           "a BatchNorm1d stays float")}


@pytest.mark.parametrize("case", LEFT)
def test_a_batch_norm_that_we_cannot_fold_stays_and_is_named(case):
    """Folding it would change the outputs without a word, or fail half-way."""
    torch.manual_seed(0)
    make, why = LEFT[case]
    net, x = restless_norms(nn.Sequential(*make())), torch.randn(5, 3, 8, 8)
    y, norm = net(x), net[-1]
    with pytest.warns(UserWarning, match=rf"not folded, .*{why}.*: \['{len(net) - 1}'\]"):
        models.fold_batchnorm(net)
    assert net[-1] is norm and torch.equal(net(x), y)


def test_the_norm_before_which_another_branch_is_defined_stays():
    """Two branches side by side: the order of definition says nothing here."""
    net = nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "b": nn.BatchNorm2d(8)})
    with pytest.warns(UserWarning, match=r"another number of channels: \['b'\]"):
        models.fold_batchnorm(net)


def test_a_convolution_of_its_own_is_folded_where_x_shows_that_it_may_be():
    """Padding of its own, as in TensorFlow's networks, is no problem. A weight of its own is."""
    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))

    torch.manual_seed(0)
    x, net = torch.randn(5, 3, 8, 8), restless_norms(nn.Sequential(Padded(3, 4, 2),
                                                                   nn.BatchNorm2d(4)))
    assert isinstance(models.fold_batchnorm(net, x)[1], nn.Identity)
    with pytest.raises(ValueError, match="outputs are off by"):
        models.fold_batchnorm(restless_norms(nn.Sequential(standardised_conv(),
                                                           nn.BatchNorm2d(4))), x)


@pytest.mark.parametrize("learned", [True, False])
def test_the_new_bias_is_learned_where_the_weight_is(learned):
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).requires_grad_(learned)
    conv = models.fold_batchnorm(net)[0]
    assert conv.weight.requires_grad == conv.bias.requires_grad == learned


def test_of_timms_batch_norm_the_activation_stays():
    """All of timm's MobileNets and EfficientNets have it. We take timm itself where it is there."""
    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.drop = nn.Dropout(0.5)
            self.act = nn.Hardswish()

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    class Louder(BatchNormAct2d):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, 8)
    net = restless_norms(nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4)))
    y, drop, act = net(x), net[1].drop, net[1].act
    models.fold_batchnorm(net, x)
    assert list(net[1]) == [drop, act]
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="Louder has a forward of its own"):
        models.fold_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), Louder(4)))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_b0", "tf_efficientnet_b0"])
def test_networks_of_timm_are_folded(name):
    """tf_efficientnet_b0 has convolutions with a padding of their own."""
    try:
        import timm
    except Exception:                                                # its torchvision may also fail
        pytest.skip("no timm")
    torch.manual_seed(0)
    net, x = restless_norms(timm.create_model(name)), torch.randn(2, 3, 64, 64)
    y = net(x)
    models.fold_batchnorm(net, x)
    assert not any(models.is_batchnorm(m) for m in net.modules())
    assert (net(x) - y).abs().max() < 1e-3 * y.abs().max()


def folding(change, dtype=torch.float32):
    """A convolution and its norm, with change behind them, folded and compared on x."""
    class Net(nn.Sequential):
        def forward(self, x):
            return change(super().forward(x))

    torch.manual_seed(0)
    net = restless_norms(Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    return models.fold_batchnorm(net, torch.randn(5, 3, 8, 8).to(dtype))


@dataclass
class Output:
    logits: torch.Tensor


OUTPUTS = {"dict": lambda y: {"logits": y, "more": [y, None]}, "tuple": lambda y: (y, y > 0),
           "dataclass": Output, "zeros": lambda y: 0 * y, "small": lambda y: 1e-9 * y,
           "empty": lambda y: (y[:0], y)}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_is_compared_after_folding(kind):
    """Whatever a network returns, its floating-point tensors are compared. Zeros are no error."""
    calls = []

    def differs(y):                                                  # 1 more in the second call
        calls.append(y)
        return OUTPUTS[kind](y) if kind != "zeros" or len(calls) == 1 else y

    assert isinstance(folding(OUTPUTS[kind])[1], nn.Identity)
    with pytest.raises(ValueError, match="outputs are off by"):
        folding(lambda y: differs(y + len(calls)))


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-6), (torch.float32, 0.01),
                                          (torch.float16, 0.1), (torch.bfloat16, 0.5)])
def test_the_tolerance_of_folding_is_the_dtypes(dtype, error):
    """A right fold passes in each dtype, and an error that float32 would hide is one in float64."""
    assert isinstance(folding(lambda y: y, dtype)[1], nn.Identity)
    assert isinstance(folding(lambda y: y.float(), dtype)[1], nn.Identity)    # float32 outputs
    for wrong, off in ((error, r"\d"), (torch.nan, "nan")):
        factors = iter([1, 1 + wrong])                               # of the first and second call
        with pytest.raises(ValueError, match=f"outputs are off by {off}"):
            folding(lambda y, factors=factors: y * next(factors), dtype)


def test_a_wrong_fold_leaves_the_network_as_it_was():
    """An error that comes after the work would cost the user the network."""
    class Reads(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x)) * self[1].eps                 # nn.Identity has no eps

    class InPlace(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(3))

    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, 8)
    for kind, error in ((Reads, AttributeError), (PreActivation, ValueError)):
        net = restless_norms(kind(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
        y, modules = net(x), list(net)
        with pytest.raises(error):
            models.fold_batchnorm(net, x)
        assert list(net) == modules and torch.equal(net(x), y)
    with pytest.raises(ValueError, match="no floating-point tensor"):
        folding(lambda y: y.argmax(1))

    # A network that works in place on its input gets copies.
    net, before = restless_norms(InPlace(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), x.clone()
    models.fold_batchnorm(net, x)
    assert isinstance(net[1], nn.Identity) and torch.equal(x, before)


def test_folding_is_compared_without_tf32(monkeypatch):
    """On a GPU cuDNN's convolutions round to 11 bits by default, and the comparison would fail."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    def watch(y):
        seen.append(torch.backends.cudnn.allow_tf32)
        return y

    folding(watch)
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "gpt"])
def test_a_task_in_float64(name):
    """It is the same network. Its data is standardised in float64, not only cast to it."""
    task, exact = models.load_task(name), models.load_task(name, dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in exact.net.parameters())
    assert exact.score(exact.net) == pytest.approx(task.score(task.net), rel=1e-6)
    assert exact.about == task.about
    if name == "gpt":
        assert torch.equal(exact.calibration, task.calibration)      # tokens stay integers
    else:
        images = models.digits(torch.float64)[0]
        assert float(images.mean().abs()) < 1e-12 and float(images.std()) == pytest.approx(1, 1e-12)
        assert exact.calibration.dtype == torch.float64
        torch.testing.assert_close(exact.calibration.float(), task.calibration)


def test_accuracy_and_perplexity_by_hand():
    """All results are these two numbers, so we work them out where the answer is known."""
    def network(forward):
        return type("Net", (nn.Module,), {"forward": lambda self, x: forward(x)})()

    x, y, tokens = torch.eye(4)[[0, 1, 2, 3, 0]], torch.tensor([0, 1, 2, 0, 0]), torch.arange(100)
    assert models.accuracy(network(lambda x: x), x, y, batch_size=2) == 80
    uniform = network(lambda tokens: torch.zeros(*tokens.shape, 100))
    assert models.perplexity(uniform, tokens, 16) == pytest.approx(100)
    knows = network(lambda tokens: np.log(119) * nn.functional.one_hot(tokens + 1, 120))
    assert models.perplexity(knows, tokens, 16, batch_size=2) == pytest.approx(2)    # p = 0.5
    # Half precision is scored in float32, and float64 stays.
    half = network(lambda tokens: torch.zeros(*tokens.shape, 100, dtype=torch.bfloat16))
    assert models.perplexity(half, tokens, 16) == pytest.approx(100, rel=1e-5)
    exact = network(lambda x: np.log(119) * nn.functional.one_hot(x + 1, 120).double())
    assert models.perplexity(exact, tokens, 16) == pytest.approx(2, rel=1e-12)
    with pytest.raises(ValueError, match="16 tokens"):
        models.perplexity(uniform, tokens[:16], 16)
    net, x, _ = tiny("gpt")                                          # looks only back
    changed = x.index_copy(1, torch.tensor([9]), (x[:, 9:10] + 1) % 11)
    same = (net(changed) == net(x)).all(2)
    assert same[:, :9].all() and not same[:, 9].any()


def test_the_resnet20_checkpoint_is_read_and_others_are_refused(tmp_path):
    """We have no network to download it, so a file under the published names stands in for it."""
    torch.manual_seed(0)
    source, x = models.ResNet().eval(), torch.randn(2, 3, 32, 32)
    prefixes = ["", *(f"layer{stage}.{i}." for stage in (1, 2, 3) for i in range(3)), ""]
    state = {f"module.{prefix}{key}": value
             for prefix, block in zip(prefixes, source.blocks, strict=True)
             for key, value in block.state_dict().items() if "num_batches" not in key}
    assert {"module.conv1.weight", "module.layer3.2.bn2.running_var"} < set(state)
    path = tmp_path / "net.th"
    torch.save({"state_dict": state}, path)
    net = models.resnet20(path)
    assert torch.equal(net(x), source(x)) and not net.training
    assert sum(p.numel() for p in net.parameters()) == 269_722       # 0.27 M, He et al.
    for wrong in (state | {"module.layer2.0.conv1.weight": torch.zeros(32, 16, 5, 5)},
                  state | {"module.x": x}, dict(list(state.items())[1:])):
        for file in ({"state_dict": wrong}, wrong):
            torch.save(file, path)
            with pytest.raises(ValueError, match="net.th holds another network"):
                models.resnet20(path)


def test_a_gpt2_checkpoint_is_read_and_others_are_refused(tmp_path):
    """GPT-2's files have weights (in, out), and old ones a mask, so reading can go wrong."""
    torch.manual_seed(0)
    net = models.GPT(61, context=16, layers=2, heads=2, width=128).eval()
    tokens, path = torch.randint(0, 61, (3, 16)), tmp_path / "gpt2.bin"
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)                                  # biases and norms, too
    good = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    for prefix, block in zip(("", "h.0.", "h.1.", ""), net.blocks, strict=True):
        good |= {prefix + key: t.T if prefix and t.dim() == 2 else t
                 for key, t in block.state_dict().items()}
    assert good["h.1.mlp.c_fc.weight"].shape == (128, 512) and "wte.weight" in good
    for prefix, tied in (("", True), ("transformer.", False)):
        torch.save({prefix + k: v for k, v in good.items() if tied or k != "lm_head.weight"}, path)
        again = models.gpt2(path)
        assert torch.equal(again(tokens), net(tokens)) and not again.training
        assert again.blocks[-1].lm_head.weight is again.blocks[0].wte.weight
    assert models.gpt2(path, n_head=4).blocks[1].attn.heads == 4
    for wrong, message in ((good | {"h.1.mlp.c_fc.weight": torch.zeros(2, 128)}, "another network"),
                           ({"a": torch.zeros(1)}, "is not a GPT-2")):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=message):
            models.gpt2(path)


def test_cifar10_is_read_from_its_binary_files(tmp_path):
    """A transposed plane would cost accuracy silently, so we follow single bytes."""
    record = np.zeros((3, 3073), np.uint8)                           # labels, then planes
    record[:, 0], record[1, 1], record[2, 1 + 1024 + 32 * 5 + 7] = [3, 1, 9], 255, 51
    (tmp_path / "cifar-10-batches-bin").mkdir()
    record.tofile(tmp_path / "cifar-10-batches-bin" / "test_batch.bin")
    x, y = models.cifar10(tmp_path, train=False)
    assert x.shape == (3, 3, 32, 32) and y.tolist() == [3, 1, 9]
    assert [float(x[0, 0, 0, 0]), float(x[1, 0, 0, 0]), float(x[2, 1, 5, 7])] == pytest.approx(
        [-0.485 / 0.229, (1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224], rel=1e-5)
    with pytest.raises(FileNotFoundError, match="data_batch"):
        models.cifar10(tmp_path, train=True)


def test_the_gpts_text_is_the_same_on_each_python(monkeypatch):
    """Python's help texts change with its version, so the text that they share is pinned."""
    string = models.text()
    assert hashlib.sha256(string.encode()).hexdigest().startswith("68d348b66e6ae2a4")
    assert len(string) == 206_696 and string.count("\n") == 1439    # 1,440 paragraphs

    # Another Python names its topics otherwise, breaks lines elsewhere and has more to say.
    assert models.load_task("gpt", samples=1).about.startswith("Python's help texts; perplexity")
    from pydoc_data import topics
    renamed = {name[::-1]: topic.replace("\n   ", "\n ") for name, topic in topics.topics.items()}
    monkeypatch.setattr(topics, "topics", renamed | {"news": "A new paragraph."})
    assert models.text() == string

    # Where a paragraph is missing, the others stay, and we say so.
    renamed["tressa"] = renamed["tressa"].replace("convenient", "fine")      # "assert", reversed
    monkeypatch.setattr(topics, "topics", renamed)
    with pytest.warns(UserWarning, match="lacks 1 of 1,440 paragraphs of the text"):
        short = models.text()
    lost = "Assert statements are a convenient way to insert debugging assertions into a program:\n"
    assert lost in string and short == string.replace(lost, "")
    with pytest.warns(UserWarning, match="lacks 1"):
        about = models.load_task("gpt", samples=1).about
    assert about.startswith("Python's help texts without 1 of 1,440 paragraphs; perplexity")


@pytest.mark.parametrize("split, digits, last", [("test", 597, 395), ("train", 688, 375)])
def test_nothing_is_both_calibrated_on_and_scored(split, digits, last):
    """Settings are chosen with split "train" and judged with "test", so nothing may leak."""
    def watch(task):
        scored = []
        task.net.register_forward_pre_hook(lambda net, args: scored.extend(args[0].tolist()))
        return task.score(task.net), task.calibration.tolist(), scored

    for name in ("resnet", "mobilenet"):                             # committed: already trained
        score, drawn, scored = watch(models.load_task(name, split=split))
        assert score > 97 and (len(drawn), len(scored)) == (512, digits)
        assert not any(image in scored for image in drawn)
    gpt = models.load_task("gpt")
    assert gpt.calibration.shape == (128, 64) and 4 < gpt.score(gpt.net) < 6
    gpt = models.GPT(400, context=8, layers=1, heads=1, width=8)
    _, drawn, scored = watch(models.text_task(gpt, torch.arange(400), "", 9, split=split))
    assert np.max(drawn) < 360 and (np.min(scored), np.max(scored)) == (last - 15, last)
    drawn = [models.load_task("resnet", seed=seed, samples=5).calibration for seed in (0, 0, 1)]
    assert len(drawn[0]) == 5 and drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_resnet20_reaches_its_published_accuracy():
    """91.73 % is the checkpoint's own number, so reading, folding and normalising must be right."""
    task = models.load_task("resnet20", SHARED)
    assert task.score(task.net) == pytest.approx(91.73, abs=0.02)


# ---- 8. Activations ------------------------------------------------------------------------------

@pytest.mark.parametrize("symmetric, shift, lo", [(True, 0.0, -4), (True, 5.0, 0), (False, 0.7, 0)])
def test_an_activation_in_closed_form(symmetric, shift, lo):
    """LSQ's two gradients are in its docstring, and dropping is for training alone."""
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
    q.keep_float = 0.2
    assert torch.equal(q.eval()(x), step * k)
    kept = (mixed := q.train()(x)) == x
    assert 0.05 < kept.double().mean() < 0.4 and (kept | (mixed == step * k)).all()
    half = x.detach().half()                                         # of a network in .half()
    q, exact = (flexround.LSQ.of(h, 8, symmetric).half() for h in (half, half.float()))
    assert torch.equal(q(half), exact.float()(half.float()).half())


@pytest.mark.parametrize("name, setting, symmetric",
                         [*zip(NETWORKS, "BQBQ", (True, False, False, True), strict=True)])
def test_weights_and_activations_end_to_end(name, setting, symmetric):
    """At 8 bits all is near the float network, and each layer's input lies on its grid."""
    net, x, layers = tiny(name)
    full = net(x).detach()
    own = replace(QUICK, bits=8, abits=8, setting=setting, symmetric=symmetric)
    reports = quantize_model(net.blocks, x, own)
    assert float((net(x).detach() - full).norm() / full.norm()) < 0.1
    flat = [name for names in layers for name in names]
    assert [n for r in reports for n in r.bits] == flat * {"B": 2, "Q": 1}[setting]
    assert [n for r in reports for n in r.abits] == flat
    signed = {n: q.signed for n, q in input_quantizers(net).items()}
    assert len(signed) == len(quantizers(net)) == len(flat)
    if name == "resnet conv":                                        # behind the ReLUs: unsigned
        assert signed.pop("blocks.0.conv1") and not any(signed.values())
    seen, layer = [], net.blocks[1].get_submodule(layers[1][0])
    layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].unique().numel()))
    assert net(x).shape == full.shape and 4 < seen[0] <= 256


def test_which_inputs_are_seen():
    """A layer may be called twice, never, or by keyword, and a block may overwrite what it got."""
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never, self.named, self.empty = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x):
            y = self.twice(self.named(input=self.twice(x.relu_())) - 2)
            self.empty(x[:0])                                        # an expert without tokens
            x.zero_()
            return y

    torch.manual_seed(0)
    block, x = Odd(), 30 * torch.randn(8, 3)
    before, first = x.clone(), x.relu()
    both = torch.cat([first, block.named(block.twice(first)) - 2])
    names = ("twice", "never", "named", "empty")
    with pytest.warns(UserWarning, match=r"positional.*\['empty', 'named', 'never'\]"):
        made = flexround.quantize_inputs(block, x, dict.fromkeys(names, 4))
    assert torch.equal(x, before) and list(made) == ["twice"] and made["twice"].signed
    assert made["twice"].log_step == flexround.LSQ.of(both, 4).log_step
    with pytest.raises(ValueError, match="'twice': its input is quantized already"):
        flexround.quantize_inputs(block, x, {"twice": 4})
    with torch.no_grad():                                            # by keyword it stays float
        y = nn.functional.linear(first, block.twice.weight, block.twice.bias)
        assert torch.equal(block.twice(input=first), y) and not torch.equal(block.twice(first), y)


def test_the_start_of_q_draws_nothing():
    """New steps drop inputs in train mode, and a start on outputs ran them before learning."""
    grids = []
    for seed in (1, 2):
        net, x, _ = tiny("resnet conv")
        torch.manual_seed(seed)
        quantize_model(net.blocks, x, replace(QUICK, abits=4, setting="Q", start="outputs",
                                              learn_s1=False))
        grids.append([q.log_s1.tolist() for q in quantizers(net).values()])
    assert grids[0] == grids[1]


def test_a_sign_is_seen_on_all_calibration_inputs():
    """Steps start on a sample of one batch, so what lies elsewhere must not be forgotten."""
    for batch in range(5):                                           # only there it is negative
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), correlated(64, 6).abs()
        x[16 * batch:, 2][:1] = -0.1                                 # 4: nowhere
        quantize_model(net, x, replace(QUICK, bits=8, abits=8, batch_size=16))
        assert input_quantizers(net)["0"].signed == (batch < 4)
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    for x[123_456] in (50.0, -50.0):
        assert float(flexround.LSQ.of(x, 8, p=8.0).log_step.exp().detach()) > 0.9 * 50 / 128


@pytest.mark.parametrize("setting", ["B", "Q"])
def test_rates_and_drops_of_the_settings(setting, rates, monkeypatch):
    """Section 4 states these numbers, and after learning nothing may drop any more."""
    dropped, learn = set(), reconstruct.reconstruct_block

    def look(block, *args):
        dropped.update(q.keep_float for q in input_quantizers(block).values())
        return learn(block, *args)

    monkeypatch.setattr(reconstruct, "reconstruct_block", look)
    net, x, _ = tiny("resnet conv")
    own = replace(QUICK, abits=4, setting=setting, lr=0.01, s1_lr=0.02)
    reports = quantize_model(net.blocks, x, own)
    assert (own.keep_float, dropped) == ((0.5, {0.5}) if setting == "Q" else (0.0, {0.0}))
    net.train()
    assert torch.equal(net(x), net(x)) and torch.equal(net(x), net.eval()(x))
    assert all(p.requires_grad != ("_quantizer" in n or "weight.0" in n)
               for n, p in net.named_parameters())
    groups = [0.01, 0.02, 4e-4]                                      # S2 to s4, s1, steps
    passes = {"Q": [groups], "B": [groups[:2], groups[2:]]}[setting]
    expected = []
    for first in passes:                                             # 4 blocks, 20 iterations each
        expected += [first, [rate / 2 for rate in first]] * 4
    assert len(rates) == 10 * len(expected)
    for rate, wanted in zip(rates[::10], expected, strict=True):
        assert rate == pytest.approx(wanted)
    bits = {f"{r.index}.{n}": b for r in reports for n, b in r.abits.items()}
    assert bits == {**dict.fromkeys(bits, 4), "0.conv1": 8, "3.linear": 8} and len(bits) == 7


@pytest.mark.parametrize("method", ["rtn", "adaround", "flexround"])
def test_what_each_setting_learns(method):
    """B first learns the weights as if there were no activations, and Q learns both at once."""
    def learned(**settings):
        net, x, _ = tiny("resnet conv")
        reports = quantize_model(net.blocks, x, replace(QUICK, method=method, iterations=8,
                                                        **settings))
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


def test_steps_and_hooks_come_and_go_with_their_layer():
    """A copy has steps of its own, state_dict has them, and fold leaves the user's hooks alone."""
    net, x, _ = tiny("resnet conv")
    plain, twin = copy.deepcopy(net), copy.deepcopy(net)
    own = replace(QUICK, abits=4, setting="Q", step_lr=0.02)
    quantize_model(net.blocks, x, own)
    quantize_model(twin.blocks, x, replace(own, iterations=1))
    assert not torch.equal(twin(x), net(x))
    twin.load_state_dict(net.state_dict())
    y, other = net(x), copy.deepcopy(net)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        for q in input_quantizers(other).values():
            q.log_step += 1
    assert torch.equal(net(x), y) and not torch.equal(other(x), y)
    for abits in (None, 8):                                          # twice rounded is no method's
        with pytest.raises(ValueError, match="block . is quantized already, and not as config"):
            quantize_model(net.blocks, x, replace(QUICK, abits=abits))
    assert torch.equal(net(x), y)
    other.blocks[1].conv1.register_forward_pre_hook(mine := lambda layer, args: None)
    with pytest.warns(UserWarning, match="float inputs again"):
        fold(other)
    assert not input_quantizers(other) and set(other.state_dict()) == set(plain.state_dict())
    assert [hook for m in other.modules() for hook in m._forward_pre_hooks.values()] == [mine]


# ---- 9. Bad input --------------------------------------------------------------------------------

@pytest.mark.parametrize("name, value, allowed", [
    *(("bits", bits, "an integer from 2 to 8") for bits in (1, 9, 4.0, True)),
    *((name, 9, "an integer from 2 to 8") for name in ("end_bits", "abits")),
    ("method", "gptq", "rtn or adaround or adaquant or flexround"),
    *((name, 0, "an integer from 1 to 2^32 - 1") for name in ("iterations", "batch_size")),
    *(("seed", seed, "an integer from 0 to 2^32 - 1") for seed in (-1, 0.5, 10 ** 17)),
    *(("lr", x, "a positive number") for x in (0.0, -1, np.inf, np.nan)),
    *((name, 0.0, "a positive number") for name in ("p", "s1_lr", "reg_weight", "step_lr")),
    *(("channel_dim", dim, "an integer other than 0") for dim in (0, 1.0)),
    ("start", "inputs", "weights or outputs"),
    *(("input_drop", share, "a probability from 0 to 1") for share in (-0.1, 1.5)),
    ("setting", "C", "B or Q"), ("setting", "Q", "need abits"),
    ("step_lr", 0.1, "need abits")])
def test_a_setting_that_is_not_allowed(name, value, allowed):
    """A wrong setting is named before any work, because a run can take hours."""
    with pytest.raises(ValueError, match=f"{name} = {value!r}.*{re.escape(allowed)}"):
        ReconstructionConfig(**{name: value})
    with pytest.raises(ValueError, match="input_drop = 0.3: setting Q takes 0.5"):
        ReconstructionConfig(abits=4, setting="Q", input_drop=0.3)


def test_a_weight_that_cannot_be_quantized():
    """Each rule says what is wrong with a weight, because torch would speak of something else."""
    good = weight((3, 3))
    for W, settings, message in (
            (good, {"bits": 1}, "from 2 to 8"), (good, {"p": -1}, "p = -1"),
            (torch.ones(3), {}, r"shape \(3,\)"), (torch.ones(3, 3, 3), {}, r"\(3, 3, 3\)"),
            (torch.ones(0, 3), {}, r"\(0, 3\)"), (torch.ones(3, 3).char(), {}, "int8"),
            (good / 0, {}, "infinity"), (good * np.nan, {}, "NaN"),
            (good.bfloat16(), {}, r"torch.bfloat16: float32 or float64 .* use .float\(\)"),
            (good.half(), {}, r"torch.float16: float32 or float64 .* use .float\(\)")):
        for method in ("rtn", *LEARNED):
            with pytest.raises(ValueError, match=message):
                flexround.METHODS[method](W, **{"bits": 4, **settings})


def test_layers_that_cannot_be_quantized_leave_the_block_unchanged():
    """All quantizers are made before the first is placed, so that an error leaves no half."""
    def make():
        return nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4))

    broken, shared, twice, pruned = make(), make(), make(), make()
    nn.init.constant_(broken[2].weight, np.nan)
    shared[2].weight = shared[0].weight
    quantize_layers(twice, ReconstructionConfig())
    prune.identity(pruned[2], "weight")
    own = parametrize.register_parametrization(nn.Linear(2, 2), "weight", nn.Identity())
    for net, bits, message in (
            (make().bfloat16(), None, r"layer '0': W is in torch.bfloat16: .* use .float\(\)"),
            (make(), {"7": 4}, r"bits names '7': the layers are \['0', '2'\]"),
            (make(), {"1": 4}, "bits names '1'"), (make(), {"2": 12}, "bits = 12"),
            (broken, None, "W holds NaN"), (shared, None, "layers '0' and '2' share one weight"),
            (twice, None, "layer '0' has a parametrization"), (own, None, "has a parametrization"),
            (pruned, None, "layer '2' has .* pruning")):
        keys = list(net.state_dict())
        with pytest.raises(ValueError, match=message):
            quantize_layers(net, ReconstructionConfig(), bits)
        assert list(net.state_dict()) == keys


def test_networks_and_calibration_are_refused_before_any_work():
    """What is refused is refused at once, and the weights stay float."""
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    a, b, twin, broken, quantized = (nn.Linear(4, 4) for _ in range(5))
    x, nan = torch.ones(9, 4), torch.ones(9, 4)
    twin.weight, nan[3, 2] = a.weight, np.nan
    nn.init.constant_(broken.weight, np.inf)
    quantize_layers(quantized, QUICK)
    for blocks, x_in, message in (
            ([nn.ReLU()], x, "nothing to quantize"), ([], x, "nothing to quantize"),
            ([a, nn.Sequential(nn.ReLU(), a)], x, "'1' of block 1 is in an earlier block as well"),
            ([a, twin], x, "'0' and '1' share one weight"),
            ([a, nn.Linear(5, 4)], x, "shapes cannot be multiplied"),
            ([a, Pair(4, 4)], x, "block 1 returns "), ([a, broken], x, "layer '1': W holds NaN"),
            ([a, quantized], x, "block 1 is quantized already, and not as config says"),
            ([a], nan, "calibration .*holds NaN or infinity"),
            ([a], nan / 0, "calibration .*holds NaN or infinity"),
            ([a], x[:0], "calibration .*is empty"),
            ([a], x.tolist(), "calibration is a list: one Tensor"),
            ([a], (x, x), "calibration is a tuple: one Tensor"),
            ([a], x.numpy(), "calibration is a ndarray: one Tensor")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            quantize_model(blocks, x_in, replace(QUICK, end_bits=None))
        assert not any(quantizers(block) for block in blocks if block is not quantized)
        assert all(block.training for block in blocks)


class Wrapped(nn.Module):
    """A block of one linear layer, which does something around it."""

    def __init__(self, forward, features=4):
        super().__init__()
        self.layer, self.call, self.last = nn.Linear(features, 4), forward, torch.zeros(4)

    def forward(self, x):
        return self.call(self, x)


def without_gradient(self, x):
    with torch.no_grad():
        return self.layer(x)


def remembers(self, x):
    y = self.layer(x) + self.last
    if len(x) > 1:
        self.last = y[-1].detach()
    return y


def test_what_would_go_wrong_in_the_last_block_is_found_before_the_first(monkeypatch):
    """After an hour at the earlier blocks torch's message would name neither block nor layer."""
    def reduced(dtype):
        layer = nn.Linear(4, 4)
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
        return layer

    monkeypatch.setattr(reconstruct, "reconstruct_block", lambda *args: pytest.fail("too late"))
    broken, empty = nn.Linear(4, 4), nn.Linear(4, 4)
    nn.init.constant_(broken.weight, np.nan)
    empty.weight = nn.Parameter(torch.empty(0, 4))
    stateful = Wrapped(remembers)
    no_gradient = r"block 1: no gradient reaches its weights \['layer'\]"
    for block, message in (
            (nn.Sequential(broken), "layer '1.0': W holds NaN"),
            (empty, r"layer '1': W is .* shape \(0, 4\).* not empty"),
            (reduced(torch.float8_e4m3fn), "layer '1': W is in torch.float8"),
            (reduced(torch.bfloat16), r"layer '1': W is in torch.bfloat16.* use .float\(\)"),
            (Wrapped(without_gradient), no_gradient),
            (Wrapped(lambda self, x: self.layer(x).detach()), no_gradient),
            (Wrapped(lambda self, x: self.layer(x) if self.training else x), no_gradient),
            (Wrapped(lambda self, x: self.layer(x) - x.mean(0)), "block 1 .* row by row"),
            (Wrapped(lambda self, x: self.layer(x)[:1]), "block 1 .* row by row"),
            (nn.TransformerEncoderLayer(4, 2, 8), "block 1 .*batch first.* row by row"),
            (stateful, "block 1 .* was there before it")):
        first = nn.Linear(4, 4)
        with pytest.raises(ValueError, match=message):
            quantize_model([first, block], torch.randn(9, 5, 4), QUICK)
        assert type(first) is nn.Linear and not quantizers(block)
    assert not stateful.last.any()                                   # we looked at a copy
    with torch.inference_mode(), pytest.raises(ValueError, match=r"within torch.inference_mode"):
        quantize_model([nn.Linear(4, 4)], torch.ones(9, 4), QUICK)


def test_what_a_block_may_do():
    """A check that refuses what would work costs a user more than one that is missing."""
    torch.manual_seed(0)
    x, own = torch.randn(16, 5, 4), replace(QUICK, end_bits=None)
    attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    tokens = nn.Flatten(1)                                           # integers in, integers out
    words = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    scores = Wrapped(lambda self, x: self.layer(x)[:, 0, 0])         # (N,)
    for blocks, inputs, method, indices in (
            ([attention], x, "flexround", [0]),
            ([tokens, words], torch.randint(0, 9, (16, 5)), "rtn", [1]),
            ([scores, nn.Softmax(0)], x, "flexround", [0]),          # nothing is behind scores
            ([Wrapped(without_gradient)], x, "rtn", [0])):           # it learns nothing
        with warnings.catch_warnings():                              # a part of attention is float
            warnings.simplefilter("ignore")
            reports = quantize_model(blocks, inputs, replace(own, method=method))
        assert [r.index for r in reports] == indices


def test_what_skip_names_stays_float_and_is_not_warned_of():
    """Who names a layer knows of it. A module that holds layers would be skipped in part only."""
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    block = nn.Sequential(normed, nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = replace(QUICK, end_bits=None)
        reports = quantize_model([block], x, own, skip=("0.0", "0.3"))
    assert [r.bits for r in reports] == [{"2": 3}] and list(quantizers(block)) == ["2"]
    for wrong in ("0", "0.1", "0.9", "1"):
        with pytest.raises(ValueError, match=f"skip names '{wrong}': the layers are .*'0.2'"):
            quantize_model([nn.Sequential(*map(copy.deepcopy, block))], x, QUICK, skip=(wrong,))


def test_weights_that_stay_float_are_one_line_with_their_share():
    """transformers fuses experts in one Parameter, and who sees only the router warned is misled"""
    class Fused(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.fused, self.layer = nn.Parameter(torch.randn(shape) / 9), nn.Linear(32, 32)

        def forward(self, x):
            return self.layer(x) + self.fused.sum(0)

    x, own = torch.randn(16, 5, 32), replace(QUICK, iterations=1, end_bits=None)
    with pytest.warns(UserWarning) as said:
        quantize_model([Fused(16, 5, 32), Fused(2, 5, 32)], x, own)
    found, = (str(warning.message) for warning in said)
    assert found.startswith("58% of the parameters stay float, the largest is 0.fused")
    with warnings.catch_warnings():                                  # as a ViT's positions
        warnings.simplefilter("error")
        quantize_model([Fused(1, 32)], x, own)


def test_bad_inputs_of_one_block():
    """reconstruct_block can be called alone, so it checks what quantize_model gives it."""
    block, x, y, config = prepared()
    for net, own, message in (
            (block[:1], config, "its target has"), (small_block(), config, "no quantizers"),
            (block, replace(config, input_drop=0.5), "x_fp is missing"),
            (block, replace(config, method="adaround"), "holds FlexRound: adaround is needed")):
        with pytest.raises(ValueError, match=message):
            reconstruct_block(net, x, y[:, :1], own)
    with parametrize.cached(), pytest.raises(ValueError, match=r"within parametrize.cached\(\)"):
        reconstruct_block(block, x, y, config)


def test_what_is_not_done_as_asked_is_said():
    """A warning is due where a network gets something else than its user may think."""
    conv = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(1, 1, 1))
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(1))
    for blocks, settings, message in (
            ([nn.Linear(4, 4)], {"batch_size": 100}, "batch_size = 100, but there are only 9"),
            ([conv], {"end_bits": None}, "5% of the .* stay float, the largest is 0.1.weight"),
            ([norm], {"end_bits": None}, r"batch norm stays float: \['0.1'\]. Fold it first"),
            ([nn.Linear(4, 4)], {}, r"all layers are a first or a last one and get end_bits: \[\{'': 8\}\]"),
            ([nn.Linear(4, 4)], {"bits": 8, "abits": 4}, "all layers are a first or a last one")):
        with pytest.warns(UserWarning) as said:
            quantize_model(blocks, torch.randn(9, 1, 4), replace(QUICK, **settings))
        assert any(re.search(message, str(warning.message)) for warning in said)
    net, x, _ = tiny("gpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")                               # nothing to say of these
        learned = quantize_model(net.blocks, x, QUICK)
        bare = [nn.ReLU(), nn.Linear(4, 4)]                          # its end has no layer
        quantize_model(bare, torch.randn(9, 4), replace(QUICK, end_bits=None))
    nothing = quantize_model(tiny("gpt")[0].blocks, x, replace(QUICK, lr=1.0))
    assert all("no gain" in str(r) and r.best_iteration == 0 for r in nothing)
    assert not any("no gain" in str(r) or r.best_iteration == 0 for r in learned)


# ---- 10. The main job ----------------------------------------------------------------------------

def python(*arguments, cwd=HERE):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})


def rows_of(output):
    """The first table of an output: {(network, bits): {column: cell}}."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")]
                      for line in output[output.index("|"):].split("\n\n")[0].splitlines())
    return {(row[0], row[1]): dict(zip(head[2:], row[2:], strict=True)) for row in rows}


def test_the_main_job_in_small(capsys):
    """The main job prints one table, with the scores that we find outside its processes."""
    reconstruct.main(["--model", "resnet", "--method", "rtn", "flexround", "--bits", "3",
                      "--iterations", "4", "--device", "cpu"])
    printed = capsys.readouterr().out
    scores = {"full precision": None, "RoundToNearest": "rtn", "FlexRound": "flexround"}
    for column, method in scores.items():
        task = models.load_task("resnet", dtype=torch.float64)
        if method:
            config = ReconstructionConfig(method, 3, start="outputs", iterations=4,
                                          batch_size=task.batch_size)
            quantize_model(task.net.blocks, task.calibration, config)
        scores[column] = f"{task.score(task.net):.2f}"
    assert rows_of(printed) == {("resnet", "W3"): scores}
    assert "resnet: 19,642 weights; scikit-learn's digits; accuracy on 597" in printed


def test_a_wrong_command_line_gives_one_line(monkeypatch, capsys):
    """A traceback tells the user of our code, and one line of what to write instead."""
    monkeypatch.setattr(models, "resnet20", lambda path: models.ResNet())    # no download
    for line, message in (
            ("--bits 9", "bits = 9: an integer from 2 to 8 is allowed"),
            ("--lr 0", "lr = 0.0: a positive number"), ("--networks nowhere", "nowhere"),
            ("--method gptq", "method = 'gptq': rtn or adaround"), ("--model resnet20", "--data"),
            ("--model shakespeare", "model = 'shakespeare': resnet, mobilenet, gpt, resnet20 are"),
            ("--model resnet20 --data nowhere", "no data_batch_*.bin in nowhere")):
        monkeypatch.setattr(sys, "argv", ["reconstruct.py", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(HERE / "reconstruct.py"), run_name="__main__")
        said = stopped.value.code
        assert said.startswith("reconstruct.py: ") and message in said and "\n" not in said
        assert capsys.readouterr() == ("", "")
    done = python("reconstruct.py", "--bits", "9")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1


# ---- 11. README and the notebook, as committed ---------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
# A python block whose next block is a plain one, its output. Main jobs take longer.
EXAMPLES = [pytest.param(code, said, id=str(i),
                         marks=[pytest.mark.slow] if "reconstruct.main" in code else [])
            for i, ((kind, code), (after, said)) in enumerate(zip(FENCED, FENCED[1:], strict=False))
            if (kind, after) == ("python", "")]


@pytest.mark.slow
def test_the_main_job_as_the_readme_runs_it():
    """The README's first table is what its first command prints, so we print it again."""
    expected = rows_of(README.split("<!-- main -->")[1])
    done = python("reconstruct.py")
    assert done.returncode == 0, done.stderr
    assert rows_of(done.stdout) == expected                          # to the digit: float64


@pytest.mark.slow
@pytest.mark.parametrize("network, method", [("mobilenet", "flexround"), ("gpt", "adaquant"),
                                             ("resnet", "adaround")])
def test_in_float64_each_instruction_set_finds_the_same_codes(network, method):
    """A reader's processor may be another one than ours, and the README promises our digits."""
    found = {name: instructions.run_under(name, network=network, method=method, samples=128,
                                          iterations=60, batch_size=8)["codes"]
             for name in instructions.sets_here()}
    if len(found) < 2:
        pytest.skip("this processor has one instruction set only")
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("code, said", EXAMPLES)
def test_the_readmes_code_prints_what_it_says(code, said, tmp_path, monkeypatch, capsys):
    """A reader copies these blocks first, so they have to run and print what stands there."""
    (tmp_path / "own.py").write_text(code)
    if "reconstruct.main" in code:                                   # its processes import own.py
        done = python("own.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        monkeypatch.chdir(tmp_path)
        runpy.run_path("own.py", run_name="__main__")
        printed = capsys.readouterr().out
    printed = "".join(printed.splitlines(keepends=True)[-said.count("\n"):])
    number = r"\d+\.\d+"                                             # other machines, other digits
    assert re.sub(number, "#", printed) == re.sub(number, "#", said)
    printed, said = (list(map(float, re.findall(number, output))) for output in (printed, said))
    assert printed == pytest.approx(said, rel=0.3, abs=2e-4) and len(EXAMPLES) >= 3


def test_the_readmes_map_names_what_is_there():
    """The map leads from the paper to the code, and a renamed function would break it."""
    rows = README.split("| in the paper | here |")[1].split("\n\n")[0]
    names = [name for name in re.findall(r"`([\w.]+)`", rows)
             if not name.startswith("experiments") and not (HERE / name).exists()]
    assert sum("." in name for name in names) > 10
    for name in names:
        module, *parts = name.split(".")
        thing = sys.modules.get(__name__ if module == "test_flexround" else module)
        for part in parts:
            thing = getattr(thing, part)
        assert parts or name in ReconstructionConfig.__dataclass_fields__, name


def test_the_readmes_links_and_flags_are_there_and_ci_runs_its_commands():
    """A dead link or a flag that is gone tells the reader that nobody looks here."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", re.sub("(?ms)^```.*?^```", "", README)):
        assert target.startswith("http") or (HERE / target).exists(), target
    known = {flag for action in reconstruct.parser()._actions for flag in action.option_strings}
    commands = re.findall(r"^python reconstruct.py.*|^.*&& python reconstruct.py.*", README, re.M)
    assert commands and set(re.findall(r"--[\w-]+", " ".join(commands))) <= known
    for line, after in (("pip install -r requirements.txt", " && python reconstruct.py"),
                        ("python -m pytest", ""),
                        ("jupyter execute demo.ipynb", "")):
        assert f"grep -oE -m1 '^{line}' README.md" in (HERE / ".ci" / "run").read_text()
        assert re.search(f"^{line}{after}$", README, re.M)


NOTEBOOK = (HERE / "demo.ipynb").read_text(encoding="utf-8")
CODE = [cell for cell in json.loads(NOTEBOOK)["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_one_whole_run_and_defines_no_algorithm():
    """Its pictures are only evidence if all cells ran in order, and of the code of the modules."""
    assert [c["execution_count"] for c in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for c in CODE for output in c["outputs"]]
    assert outputs and not any(output["output_type"] == "error" for output in outputs)
    assert len(NOTEBOOK.encode()) < 1.5 * 2 ** 20
    said = json.dumps([o for o in outputs if "image/png" not in o.get("data", {})])
    assert not re.search(r"/(tmp|home|root|work|Users|usr|opt)/|site-packages", said)
    source = "\n".join("".join(c["source"]) for c in CODE)
    assert source and not re.search(r"^\s*class |optim\.|autograd", source, re.M)
    assert max(len(c["source"]) for c in CODE) <= 30                 # lines that fit a screen


def test_no_score_stands_in_the_notebooks_text():
    """Prose rots first. A score belongs to the output of a cell, which a run makes anew."""
    text = "".join(line for c in json.loads(NOTEBOOK)["cells"] if c not in CODE
                   for line in c["source"])
    assert not re.findall(r"\b\d\d\.\d", text)
