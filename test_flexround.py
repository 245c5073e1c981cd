"""The tests: grids, gradients, the seam, reconstruction, networks, bad input, README.

No test needs the network, a GPU or ../shared: what is not there is skipped, with the reason.
Expected values are literals, or are computed a second way, by the loops in numpy below.
"""
import base64
import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import flexround
import models
import reconstruct
from flexround import (
    LSQ,
    METHODS,
    AdaQuant,
    AdaRound,
    FlexRound,
    RoundToNearest,
    fold,
    input_quantizers,
    quantize_layers,
    quantizers,
    search_range,
)
from reconstruct import ReconstructionConfig, quantize_model, reconstruct_block

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared" / "data"

# The shapes of a linear, a convolution's, a depthwise and a grouped convolution's weight.
SHAPES = {"linear": (6, 5), "conv": (4, 3, 3, 3), "depthwise": (6, 1, 3, 3),
          "grouped": (6, 2, 3, 3)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_grids = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
over_scope = pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
over_methods = pytest.mark.parametrize("method", METHODS)


def weight(shape, seed=0, dtype=torch.float64):
    """Weights with a few large ones, so that some lie outside the grid."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=g, dtype=torch.float64)
    return (W * torch.exp(0.5 * torch.randn(shape, generator=g, dtype=torch.float64))).to(dtype)


def disturbed(shape, bits=3, symmetric=True, per_channel=False, cls=FlexRound, seed=0):
    """A quantizer in the middle of its training: every learned factor moved off its start."""
    W = weight(shape, seed)
    q = cls(W, bits, symmetric, per_channel)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in q.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        q.log_s1.sub_(0.3)                                           # so that the clamp takes part
    return q, W


def correlated(n, *shape, seed=0):
    """Inputs such as activations are: few directions carry most of the variance."""
    g = torch.Generator().manual_seed(seed)
    d = int(np.prod(shape))
    return (torch.randn(n, 4, generator=g) @ torch.randn(4, d, generator=g) / 2).view(n, *shape)


# ---- A second implementation: numpy, one weight at a time ----------------------------------------

def at(factor, index):
    """The entry of a factor that weight `index` uses; 1 where the factor is absent."""
    if factor is None:
        return 1.0
    a = factor.detach().numpy()
    return float(a[tuple(min(i, n - 1) for i, n in zip(index, a.shape, strict=False))])


def slow_flexround(q, W, G):
    """W_hat, codes and dL/d(s1, S2, s3, s4) of sum(G * W_hat), from section 3.1 by loops."""
    lo, hi = {(True, 3): (-4, 3), (False, 3): (0, 7)}[q.symmetric, q.bits]
    W_hat, codes = np.zeros(W.shape), np.zeros(W.shape, int)
    grads = {n: np.zeros(getattr(q, n).shape) for n in ("s1", "S2", "s3", "s4")
             if getattr(q, n) is not None}
    for index in np.ndindex(*W.shape):
        w, g = float(W[index]), float(G[index])
        s1, S2, s3, s4 = (at(getattr(q, n), index) for n in ("s1", "S2", "s3", "s4"))
        z = at(q.zero_point, index)
        u = w / (s1 * S2 * s3 * s4)
        code = np.rint(u) + z
        inside = 1.0 if lo <= code <= hi else 0.0
        k = min(max(code, lo), hi) - z
        W_hat[index], codes[index] = s1 * k, k + z
        share = {"s1": g * (k - inside * u), "S2": -inside * g * w / (S2 ** 2 * s3 * s4),
                 "s3": -inside * g * w / (S2 * s3 ** 2 * s4),
                 "s4": -inside * g * w / (S2 * s3 * s4 ** 2)}
        for n, grad in grads.items():
            grad[tuple(min(i, m - 1) for i, m in zip(index, grad.shape, strict=False))] += share[n]
    return W_hat, codes, grads


def min_max(W, bits, symmetric, per_channel):
    """s1 and z of the smallest grid that clips nothing, in numpy; one entry a row."""
    rows = W.numpy().reshape(len(W) if per_channel else 1, -1)
    top, bottom = rows.max(1, keepdims=True), rows.min(1, keepdims=True)
    if symmetric:
        return rows, np.maximum(top / (2 ** (bits - 1) - 1), -bottom / 2 ** (bits - 1)), 0
    top, bottom = np.maximum(top, 0), np.minimum(bottom, 0)
    s1 = (top - bottom) / (2 ** bits - 1)
    return rows, s1, np.rint(-bottom / s1)


def lp_error(rows, s1, z, bits, symmetric, p):
    lo, hi = (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2 ** bits - 1)
    return (abs(s1 * (np.clip(np.rint(rows / s1) + z, lo, hi) - z) - rows) ** p).sum(1)


# ---- 1. Grids and forward ------------------------------------------------------------------------

def test_bounds_of_the_codes():
    symmetric = {2: (-2, 1), 3: (-4, 3), 4: (-8, 7), 5: (-16, 15), 6: (-32, 31), 7: (-64, 63),
                 8: (-128, 127)}
    asymmetric = {2: (0, 3), 3: (0, 7), 4: (0, 15), 5: (0, 31), 6: (0, 63), 7: (0, 127),
                  8: (0, 255)}
    for bits in range(2, 9):
        for is_symmetric, expected in ((True, symmetric), (False, asymmetric)):
            q = RoundToNearest(weight((40, 50)), bits, is_symmetric)
            codes = q.codes(1000 * weight((40, 50)))                 # both ends are hit
            assert (q.lo, q.hi) == (int(codes.min()), int(codes.max())) == expected[bits]


@over_shapes
@over_grids
@over_scope
def test_all_methods_start_as_round_to_nearest(shape, symmetric, per_channel):
    W = weight(shape, dtype=torch.float32)
    rtn = RoundToNearest(W, 3, symmetric, per_channel)
    assert not torch.equal(rtn(W), W)
    for method, cls in METHODS.items():
        q = cls(W, 3, symmetric, per_channel).eval()
        assert torch.equal(q.s1, rtn.s1) and torch.equal(q.zero_point, rtn.zero_point)
        assert torch.equal(q(W), rtn(W)), method


@over_methods
@over_shapes
@over_grids
@over_scope
def test_W_hat_is_s1_times_the_codes(method, shape, symmetric, per_channel):
    q, W = disturbed(shape, 3, symmetric, per_channel, METHODS[method])
    q.eval()
    codes = q.codes(W)
    assert torch.equal(q(W), q.s1 * (codes - q.zero_point))
    assert codes.dtype == torch.int32 and q.zero_point.dtype == torch.int32
    assert set(codes.unique().tolist()) <= set(range(-4, 4) if symmetric else range(8))
    grid = (shape[0],) + (1,) * (len(shape) - 1) if per_channel else ()
    assert q.s1.shape == q.zero_point.shape == grid
    assert not symmetric or not q.zero_point.any()


def test_a_weight_worked_out_by_hand():
    # S = 0.5 * 2 * 1 = 1: u = 0.9 rounds to 1. S = 0.5 * 1 * 0.8 = 0.4: u = -3.25 rounds to -3.
    # u = 1.2 / (0.5 * 1 * 1) = 2.4 rounds to 2; u = 5 / 0.4 = 12.5 is cut to 3.
    W = torch.tensor([[0.9, 1.2], [-1.3, 5.0]])
    q = FlexRound(W, 3)
    with torch.no_grad():
        q.log_s1.copy_(torch.tensor(0.5).log())
        q.log_S2.copy_(torch.tensor([[2.0, 1.0], [1.0, 1.0]]).log())
        q.log_s3.copy_(torch.tensor([[1.0], [0.8]]).log())
    assert q.codes(W).tolist() == [[1, 2], [-3, 3]]
    torch.testing.assert_close(q(W), torch.tensor([[0.5, 1.0], [-1.5, 1.5]]))


@over_grids
@over_scope
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.4, 4.0])
def test_search_is_never_worse_than_min_max_and_close_to_the_best(symmetric, per_channel, bits, p):
    for seed in range(3):
        W = weight((8, 60), seed)
        W[3, 7] *= 6                                                 # an outlier
        log_s1, z = search_range(W, bits, symmetric, per_channel, p)
        rows, widest, z_widest = min_max(W, bits, symmetric, per_channel)
        s1, z = log_s1.exp().reshape(-1, 1).numpy(), z.reshape(-1, 1).numpy()
        found = lp_error(rows, s1, z, bits, symmetric, p)
        assert (found <= lp_error(rows, widest, z_widest, bits, symmetric, p) * (1 + 1e-9)).all()
        best = np.min([lp_error(rows, widest * f, z_widest, bits, symmetric, p)
                       for f in np.linspace(0.02, 1, 2000)], axis=0)
        assert (found <= 1.1 * best).all()                           # spiky with 60 weights


def test_the_exponent_of_the_search_matters():
    W = weight((8, 60))
    rows = W.numpy().reshape(1, -1)
    s2, s4 = (search_range(W, 3, p=p)[0].exp().numpy() for p in (2.0, 4.0))
    assert s2 < s4                                                   # p = 4 shuns clipping
    assert lp_error(rows, s2, 0, 3, True, 2) < lp_error(rows, s4, 0, 3, True, 2)
    assert lp_error(rows, s4, 0, 3, True, 4) < lp_error(rows, s2, 0, 3, True, 4)


@over_methods
@over_grids
def test_an_all_zero_channel_has_step_one(method, symmetric):
    W = weight((4, 3, 3, 3), dtype=torch.float32)
    W[2] = 0
    q = METHODS[method](W, 4, symmetric, True).eval()
    assert q.s1[2].item() == 1 and torch.isfinite(q.log_s1).all()
    assert not q(W)[2].any()
    assert RoundToNearest(torch.zeros(3, 3), 4, symmetric).s1 == 1


def test_an_asymmetric_range_holds_zero():
    for sign in (1, -1):
        W = sign * (3 + torch.rand(4, 50, generator=torch.Generator().manual_seed(0)))
        q = RoundToNearest(W, 4, symmetric=False)
        assert q.zero_point == (0 if sign > 0 else 15)
        assert q(torch.zeros(1, 1)) == 0
        assert (q(W) - W).abs().max() < 0.2                          # steps of 4 / 15


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_search_does_not_depend_on_the_unit_of_W(scale):
    W = weight((5, 40))
    for p in (2.0, 4.0):
        a, b = (search_range(X, 3, False, True, p) for X in (W, W * scale))
        torch.testing.assert_close(a[0].exp() * scale, b[0].exp())
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@over_methods
def test_factors_take_the_dtype_of_W(method, dtype):
    W = weight((6, 5), dtype=dtype)
    q = METHODS[method](W, 4).eval()
    assert {t.dtype for t in (*q.parameters(), q.log_s1, q(W))} == {dtype}
    assert (q(W) - W).abs().max() < W.abs().max() / 4


def test_each_channel_is_searched_on_its_own():
    W = weight((70, 9))                                              # more than one chunk of 64
    log_s1, z = search_range(W, 3, False, True)
    for i in (0, 63, 64, 69):
        alone = search_range(W[i:i + 1], 3, False)
        assert torch.equal(alone[0], log_s1[i, 0]) and torch.equal(alone[1], z[i, 0])


def test_an_asymmetric_range_shrinks_each_end_alone():
    W = weight((1, 500))
    W[0, 0] = 30                                                     # one end has an outlier
    log_s1, z = search_range(W, 4, symmetric=False, p=1.0)
    rows, widest, z_widest = min_max(W, 4, False, False)
    together = np.min([lp_error(rows, widest * f, z_widest, 4, False, 1.0)
                       for f in np.linspace(0.02, 1, 2000)])
    assert lp_error(rows, log_s1.exp().numpy(), z.numpy(), 4, False, 1.0) < 0.9 * together


@pytest.mark.slow
def test_a_large_weight_is_searched_in_seconds():
    W = torch.randn(4096, 4096)
    began = time.perf_counter()
    search_range(W, 4, per_channel=True)
    assert time.perf_counter() - began < 20                          # 2 s on 2 idle cores


def test_adaround_is_soft_in_train_mode_only():
    W = weight((6, 5), dtype=torch.float32)
    q, rtn = AdaRound(W, 3), RoundToNearest(W, 3)
    clamped = W.clamp(-4 * q.s1, 3 * q.s1)
    q.train()
    torch.testing.assert_close(q(W), clamped)                        # h is the cut-off fraction
    assert torch.equal(q.codes(W), rtn.codes(W))                     # codes are hard in any mode
    q.eval()
    assert torch.equal(q(W), rtn(W))


def test_adaround_rounds_exact_ties_up_and_nothing_else_differs(monkeypatch):
    monkeypatch.setattr(flexround, "search_range", lambda *a: (torch.zeros(()), torch.tensor(0)))
    W = torch.tensor([[0.5, 1.5, -0.5, -1.5, 3.5, 9.0, -9.0, 0.4999999, 0.5000001, 0.0, -1e-9]])
    assert RoundToNearest(W, 3).codes(W).tolist() == [[0, 2, 0, -2, 3, 3, -4, 0, 1, 0, 0]]
    assert AdaRound(W, 3).codes(W).tolist() == [[1, 2, 0, -1, 3, 3, -4, 0, 1, 0, 0]]


def test_adarounds_schedule_and_regulariser():
    schedule = {0.0: (0, 20), 0.199: (0, 20), 0.2: (0.01, 20), 0.4: (0.01, 15.5), 0.6: (0.01, 11),
                0.8: (0.01, 6.5), 1.0: (0.01, 2)}
    for t, expected in schedule.items():
        assert AdaRound.schedule(t) == pytest.approx(expected)
    q = AdaRound(weight((1, 3)), 3)
    with torch.no_grad():                                            # h = 0.5, 1 and 0.2
        q.V.copy_(torch.tensor([[0.0, 9.0, np.log(0.25 / 0.75)]]))
    torch.testing.assert_close(q.h().flatten().tolist(), [0.5, 1.0, 0.2])
    assert float(q.regulariser(2.0).detach()) == pytest.approx(1 + 0 + (1 - 0.6 ** 2))
    assert float(q.regulariser(3.0).detach()) == pytest.approx(1 + 0 + (1 - 0.6 ** 3))


def test_adaquant_in_grid_steps_and_how_far_weights_move():
    W = weight((6, 5))
    q, steps = AdaQuant(W, 4), AdaQuant(W, 4, V_in_steps=True)
    with torch.no_grad():
        q.V += 2 * q.s1
        steps.V += 2
    torch.testing.assert_close(q(W), steps(W))
    moved = flexround.grid_shift(q, W)
    inside = RoundToNearest(W, 4).codes(W) <= 5                      # 5 + 2 is the last code
    assert (moved[inside] == 2).all() and (moved[~inside] < 2).all() and not inside.all()


@over_grids
def test_a_shift_with_and_without_what_the_step_shifts(symmetric):
    W = weight((6, 5))
    q = FlexRound(W, 8, symmetric)
    with torch.no_grad():
        q.log_s1 -= np.log(1.25)                                     # a finer grid: codes grow
    u = torch.round(W / q.s1), torch.round(1.25 ** -1 * W / q.s1)
    far = [((t + q.zero_point).clamp(q.lo, q.hi)).int() for t in u]
    assert torch.equal(flexround.grid_shift(q, W), far[0] - far[1]) and (far[0] != far[1]).any()
    assert not flexround.grid_shift(q, W, learned_s1=True).any()
    with torch.no_grad():
        q.log_S2[0] += np.log(2)
    k = [torch.round(W[0] / d / q.s1) for d in (2, 1)]
    k = [t.clamp(q.lo - q.zero_point, q.hi - q.zero_point) for t in k]
    moved = flexround.grid_shift(q, W, learned_s1=True)
    assert torch.equal(moved[0], (k[0] - k[1]).int()) and moved[0].any() and not moved[1:].any()


def test_adaquant_adds_in_the_units_of_W():
    W = torch.tensor([[0.9, -0.4, 0.24, 0.1]])
    q = AdaQuant(W, 3)
    with torch.no_grad():
        q.log_s1.copy_(torch.tensor(0.5).log())
        q.V.copy_(torch.tensor([[0.4, 0.0, 0.02, -0.5]]))
    assert q.codes(W).tolist() == [[3, -1, 1, -1]]                   # 2.6, -0.8, 0.52, -0.8


@over_shapes
def test_which_factors_there_are(shape):
    W = weight(shape)
    C_out, C_in, *kernel = shape
    q = FlexRound(W, 4)
    ones = [1] * len(kernel)
    assert q.S2.shape == shape and q.s3.shape == (C_out, 1, *ones)
    assert q.s4.shape == (1, C_in, *ones) if kernel else q.s4 is None
    assert all((f == 1).all() for f in (q.S2, q.s3, *([q.s4] if kernel else [])))
    learned = {"log_s1", "log_S2", "log_s3"} | ({"log_s4"} if kernel else set())
    assert {n for n, _ in q.named_parameters()} == learned
    fixed = FlexRound(W, 4, learn_s1=False)
    assert {n for n, _ in fixed.named_parameters()} == learned - {"log_s1"}
    assert "log_s1" in dict(fixed.named_buffers())
    bare = FlexRound(W, 4, use_s3_s4=False)
    assert {n for n, _ in bare.named_parameters()} == {"log_s1", "log_S2"}
    assert bare.s3 is None and bare.s4 is None
    assert torch.equal(bare(W), q(W)) and torch.equal(fixed(W), q(W))
    assert not list(RoundToNearest(W, 4).parameters())
    assert [n for n, _ in AdaRound(W, 4).named_parameters()] == ["V"]
    assert {n for n, _ in AdaQuant(W, 4).named_parameters()} == {"log_s1", "V"}


# ---- 2. Gradients --------------------------------------------------------------------------------

@over_shapes
@over_grids
@over_scope
def test_forward_and_gradients_agree_with_the_loops_in_numpy(shape, symmetric, per_channel):
    q, W = disturbed(shape, 3, symmetric, per_channel)
    G = weight(shape, seed=9)
    q(W).backward(G)
    W_hat, codes, grads = slow_flexround(q, W, G)
    np.testing.assert_allclose(q(W).detach(), W_hat, rtol=1e-12)
    np.testing.assert_array_equal(q.codes(W), codes)
    assert codes.min() == q.lo and codes.max() == q.hi               # the clamp took part
    for name, expected in grads.items():                             # dL/dlog f = f * dL/df
        factor, log = getattr(q, name).detach().numpy(), getattr(q, f"log_{name}")
        np.testing.assert_allclose(log.grad, factor * expected, rtol=1e-10, atol=1e-12,
                                   err_msg=name)
        assert np.abs(expected).max() > 0


@over_shapes
@over_grids
@over_scope
def test_gradients_of_adaquant_in_closed_form(shape, symmetric, per_channel):
    q, W = disturbed(shape, 3, symmetric, per_channel, AdaQuant)
    G = weight(shape, seed=9)
    q(W).backward(G)
    u = (W + q.V.detach()) / q.s1.detach()
    code = u.round() + q.zero_point
    inside = ((code >= q.lo) & (code <= q.hi)).double()
    k = code.clamp(q.lo, q.hi) - q.zero_point
    torch.testing.assert_close(q.V.grad, inside * G)                 # addition: W does not appear
    share = G * (k - inside * u) * q.s1.detach()
    over = tuple(range(1, W.dim()))
    torch.testing.assert_close(q.log_s1.grad, share.sum(over, keepdim=True) if per_channel
                               else share.sum())
    assert 0 < inside.sum() < inside.numel()


@over_grids
def test_gradient_of_adaround_is_the_true_one(symmetric):
    q, W = disturbed((4, 3, 3, 3), 3, symmetric, cls=AdaRound)
    q.train()
    k = torch.floor(W / q.s1) + q.h().detach()
    lo, hi = q.bounds
    kinks = ((k - lo).abs() < 1e-3) | ((k - hi).abs() < 1e-3) | (q.h() < 1e-3) | (q.h() > 1 - 1e-3)
    mask = (~kinks).double()
    assert mask.mean() > 0.5

    def surface(V):
        return mask * torch.func.functional_call(q, {"V": V}, (W,))

    assert torch.autograd.gradcheck(surface, (q.V.detach().clone().requires_grad_(),))


def frozen_residual(q, W):
    """The quantizer with round(u) replaced by u + c, c = round(u0) - u0 held constant, and a mask
    of the weights that do not sit on the clamp's kink. Smooth, with the estimator's gradients."""
    names = [n for n, _ in q.named_parameters()]
    start = [p.detach().clone().requires_grad_() for p in q.parameters()]
    rest = {n: b for n, b in q.named_buffers()}

    def u_of(logs):
        f = dict(zip(names, logs, strict=True))
        log_S = sum(f[n] for n in names if n != "log_s1") + f.get("log_s1", rest.get("log_s1"))
        return W / log_S.exp(), f.get("log_s1", rest.get("log_s1")).exp()

    u0 = u_of(start)[0].detach()
    c = u0.round() - u0
    lo, hi = (torch.as_tensor(b).expand(W.shape) for b in q.bounds)
    smooth = ((u0.round() != lo) & (u0.round() != hi)).double()

    def surrogate(*logs):
        u, s1 = u_of(logs)
        return smooth * s1 * torch.minimum(torch.maximum(u + c, lo.to(W)), hi.to(W))

    return surrogate, start, smooth


@over_shapes
@over_grids
@over_scope
def test_gradcheck_of_the_frozen_residual(shape, symmetric, per_channel):
    q, W = disturbed(shape, 3, symmetric, per_channel)
    surrogate, start, smooth = frozen_residual(q, W)
    assert 0.4 < smooth.mean() < 1
    assert torch.autograd.gradcheck(surrogate, start)
    # ... and the quantizer's own gradients are the surrogate's.
    G = weight(shape, seed=9) * smooth
    surrogate(*start).backward(G)
    q(W).backward(G)
    for p, s in zip(q.parameters(), start, strict=True):
        torch.testing.assert_close(p.grad, s.grad)


@over_shapes
@over_grids
@over_scope
def test_the_backward_by_hand_is_autograds_in_fewer_operations(shape, symmetric, per_channel):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        """Operations that compute; views cost nothing on a GPU."""
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            views = ("view", "expand", "detach", "t.default", "alias", "squeeze", "transpose")
            self.total += not any(name in str(func) for name in views)
            return func(*args, **(kwargs or {}))

    def chain(W):                                                    # Eq. 2 as it is printed
        S = q.s1 * q.S2 * q.s3 * (1 if q.s4 is None else q.s4)
        return q.s1 * flexround.Clamp.apply(flexround.Round.apply(W / S), *q.bounds)

    q, W = disturbed(shape, 3, symmetric, per_channel)
    G, grads, counts = weight(shape, seed=9), [], []
    for forward in (chain, q):
        q.zero_grad()
        with Count() as count:
            forward(W).backward(G)
        counts.append(count.total)
        grads.append([p.grad for p in q.parameters()])
    torch.testing.assert_close(chain(W), q(W))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    print(f"autograd {counts[0]}, by hand {counts[1]}")
    assert counts[1] < 0.7 * counts[0]


@pytest.mark.parametrize("cls", [FlexRound, AdaQuant])
def test_negative_control_gradcheck_rejects_the_estimator_itself(cls):
    """round() is flat: numerically nothing moves. The estimator is a choice, not a derivative."""
    q, W = disturbed((6, 5), cls=cls)
    names = [n for n, _ in q.named_parameters()]

    def raw(*values):
        return torch.func.functional_call(q, dict(zip(names, values, strict=True)), (W,))

    values = tuple(p.detach().clone().requires_grad_() for p in q.parameters())
    assert not torch.autograd.gradcheck(raw, values, raise_exception=False)


@over_shapes
def test_proposition_3_1_as_a_property(shape):
    W = weight(shape)
    q, a = FlexRound(W, 3), AdaQuant(W, 3)
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
    """Inside is lo <= round(u) <= hi, bounds included, as docstring and README say. Pinned here."""
    u = torch.tensor([-5.0, -4.51, -4.49, -4.0, 0.0, 2.9, 3.0, 3.49, 3.51, 4.0])
    q = FlexRound(u[None], 3)
    with torch.no_grad():
        q.log_s1.zero_()                                             # a step of 1: W is u
    q(u[None]).sum().backward()
    inside = torch.tensor([False, False, True, True, True, True, True, True, False, False])
    assert torch.equal(q.log_S2.grad[0] != 0, inside & (u != 0))
    x = u.clone().requires_grad_()
    flexround.Clamp.apply(x, -4, 3).sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    r = u.clone().requires_grad_()
    flexround.Round.apply(r).sum().backward()
    assert r.grad.tolist() == [1] * 10
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert flexround.Round.apply(halves).tolist() == [0, 2, 2, 0, -2]    # ties to even
    # AdaRound's rectified sigmoid uses the same clamp: h exactly at 0 and 1 passes.
    x = torch.tensor([-0.01, 0.0, 1.0, 1.01], requires_grad=True)
    flexround.Clamp.apply(x, 0, 1).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


# ---- 3. The seam ---------------------------------------------------------------------------------

class Doubled(nn.Conv2d):
    """A layer with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "no bias": lambda: nn.Linear(5, 4, bias=False),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated, reflected": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, padding_mode="reflect"),
    "same, circular": lambda: nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="circular"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "subclass": lambda: Doubled(4, 6, 3),
}
over_layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def inputs_of(layer):
    g = torch.Generator().manual_seed(1)
    return torch.randn(*((7, 5) if isinstance(layer, nn.Linear) else (2, 4, 9, 9)), generator=g)


@over_layers
@over_methods
def test_a_layer_keeps_its_own_forward_and_folds_bit_for_bit(make, method):
    layer = make()
    keys, cls = set(layer.state_dict()), type(layer)
    x, W = inputs_of(layer), layer.weight.detach().clone()
    quantize_layers(layer, ReconstructionConfig(method, 3))
    layer.eval()
    q = quantizers(layer)[""]
    twin = make()                                                    # a float layer with W_hat
    with torch.no_grad():
        twin.weight.copy_(q(W))
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    y = layer(x)
    assert torch.equal(layer.weight, q(W)) and torch.equal(y, twin(x))
    assert isinstance(layer, cls)
    layer.train()                                                    # fold takes hard codes anyway
    assert fold(layer) is layer
    assert type(layer) is cls and set(layer.state_dict()) == keys
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
    assert torch.equal(layer.weight, twin.weight) and torch.equal(layer(x), y)


@over_layers
def test_gradient_reaches_the_factors_and_no_weight(make):
    layer = make().requires_grad_(False)
    quantize_layers(layer, ReconstructionConfig())
    layer(inputs_of(layer)).square().sum().backward()
    assert layer.parametrizations.weight.original.grad is None
    assert all(p.grad.abs().sum() > 0 for p in quantizers(layer)[""].parameters())


def test_folding_a_deep_copy_leaves_the_original_whole_and_the_reverse():
    x = torch.randn(2, 3, 8, 8)
    for first in (0, 1):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        quantize_layers(net, ReconstructionConfig(bits=3))
        pair = [net, copy.deepcopy(net)]
        y = net(x)
        fold(pair[first])
        assert torch.equal(pair[1 - first](x), y) and torch.equal(pair[first](x), y)
        assert not quantizers(pair[first]) and len(quantizers(pair[1 - first])) == 2
        fold(pair[1 - first])
        assert torch.equal(pair[1 - first](x), y)
        assert type(net[0]) is nn.Conv2d and type(pair[1][2]) is nn.Linear


def test_folding_leaves_a_float_layer_that_shares_the_weight_alone():
    for make in (lambda: nn.Linear(5, 5, bias=False), lambda: nn.Embedding(5, 5)):
        layer, other = nn.Linear(5, 5), make()
        other.weight = layer.weight
        before = other.weight.detach().clone()
        quantize_layers(layer, ReconstructionConfig(bits=2))
        fold(layer)
        assert torch.equal(other.weight, before) and not torch.equal(layer.weight, before)
        assert list(layer.state_dict()) == ["weight", "bias"]        # in their old order


def test_unfolding_puts_the_float_weight_back():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    before = copy.deepcopy(net.state_dict())
    quantize_layers(net, ReconstructionConfig(bits=2))
    assert fold(net, keep=False) is net
    assert set(net.state_dict()) == set(before)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


@over_methods
@over_grids
def test_state_dict_round_trip_and_to(method, symmetric):
    def make():
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).eval()
        quantize_layers(net, ReconstructionConfig(method, 3, symmetric, per_channel=True))
        return net.eval()

    net, other = make(), make()
    with torch.no_grad():
        for q in quantizers(net).values():
            for p in q.parameters():
                p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))
    net.to(torch.float64)
    q = quantizers(net)["0"]
    assert q.s1.dtype == torch.float64 and q.zero_point.dtype == torch.int32
    assert net(x.double()).dtype == torch.float64


def test_names_bits_and_what_is_skipped():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5), nn.Linear(5, 5))
    made = quantize_layers(net, ReconstructionConfig(bits=3), {"2": 8}, skip=("3",))
    assert {name: q.bits for name, q in made.items()} == {"0": 3, "2": 8}
    assert type(net[3]) is nn.Linear
    assert quantizers(net) == made


def test_a_head_tied_to_an_embedding_stays_float():
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False))
    net[2].weight = net[0].weight
    assert list(quantize_layers(net, ReconstructionConfig(bits=3))) == ["1"]
    assert net[2].weight is net[0].weight


# ---- 4. Reconstruction ---------------------------------------------------------------------------

def small_block(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))


RATES = {"rtn": None, "adaround": 0.03, "adaquant": 0.003, "flexround": 0.003}     # for this block


def prepared(method="flexround", bits=3, x=None, **settings):
    """A quantized block, its inputs, targets and config."""
    settings = {"iterations": 60, "batch_size": 8, "lr": RATES[method], **settings}
    config = ReconstructionConfig(method, bits, **settings)
    block = small_block()
    x = correlated(32, 3, 6, 6) if x is None else x
    y = block(x).detach()
    quantize_layers(block, config)
    return block, x, y, config


def test_the_reduction_of_the_loss():
    """Squared error summed over channels, mean over the rest: by hand, for each shape."""
    for shape, expected in (((2, 3, 4, 5), 3 * 4), ((2, 7, 5), 5 * 4), ((6, 5), 5 * 4)):
        assert float(reconstruct.block_loss(torch.zeros(shape), torch.full(shape, 2.0))) == expected
    y = torch.zeros(2, 3, 4, 5)
    y[1, :, 2, 3] = torch.tensor([1.0, 2.0, 3.0])
    assert float(reconstruct.block_loss(y, 0 * y)) == pytest.approx(14 / 40)
    y = torch.zeros(2, 4, 3)
    y[1, 2] = torch.tensor([1.0, 2.0, 3.0])
    assert float(reconstruct.block_loss(y, 0 * y)) == pytest.approx(14 / 8)


def test_when_all_of_the_calibration_set_is_evaluated():
    assert reconstruct.evaluation_marks(250) == {62, 125, 187, 250}
    assert reconstruct.evaluation_marks(3) == {1, 2, 3}
    assert reconstruct.evaluation_marks(1) == {1}
    for method in ("adaround", "flexround"):
        block, x, y, config = prepared(method, iterations=25)
        seen = []
        report = reconstruct_block(block, x, y, config,
                                   progress=lambda *a, seen=seen: seen.append(a))
        assert [i for i, _ in report.evaluations] == [0, 6, 12, 18, 25]
        assert seen == report.evaluations and len(report.history) == 25


@pytest.mark.parametrize("method", ["adaround", "adaquant", "flexround"])
@over_grids
@over_scope
def test_the_loss_falls(method, symmetric, per_channel):
    block, x, y, config = prepared(method, symmetric=symmetric, per_channel=per_channel,
                                   iterations=200)
    report = reconstruct_block(block, x, y, config)
    assert report.final_loss < 0.85 * report.start_loss
    assert report.final_loss == min(loss for _, loss in report.evaluations)
    assert (report.best_iteration, report.final_loss) in report.evaluations
    # What is reported is the kept state's loss with hard codes on all inputs at once.
    final = pytest.approx(report.final_loss, rel=1e-4)
    with torch.no_grad():
        assert float(reconstruct.block_loss(block(x), y)) == final
        assert float(reconstruct.block_loss(fold(block)(x), y)) == final


@pytest.mark.parametrize("method", ["adaround", "adaquant", "flexround"])
def test_same_seed_same_bits(method):
    states, histories = [], []
    for seed in (0, 0, 1):
        block, x, y, config = prepared(method, seed=seed, input_drop=0.5)
        torch.manual_seed(len(states))                               # the global stream is not used
        report = reconstruct_block(block, x, y, config, x_fp=x + 0.1)
        states.append(block.state_dict())
        histories.append(report.history)
    assert histories[0] == histories[1] != histories[2]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    for index in (0, 1):                                             # a stream a block
        block, x, y, config = prepared(method, input_drop=0.5, seed=1 - index)
        histories.append(reconstruct_block(block, x, y, config, x + 0.1, index).history)
    assert all(histories[4] != other for other in histories[:4])


@pytest.mark.parametrize("method", ["rtn", "adaround", "adaquant", "flexround"])
def test_only_the_quantizers_parameters_are_touched(method):
    block, x, y, config = prepared(method)
    block.insert(1, nn.BatchNorm2d(16))
    block[0].bias.requires_grad_(False)
    block.train()
    others = {n: v.clone() for n, v in block.state_dict().items() if "weight.0." not in n}
    required = {n: p.requires_grad for n, p in block.named_parameters() if "weight.0." not in n}
    learned = [p for q in quantizers(block).values() for p in q.parameters()]
    before = [p.detach().clone() for p in learned]
    reconstruct_block(block, x, y, config)
    after = block.state_dict()
    assert all(torch.equal(after[n], v) for n, v in others.items())
    assert required == {n: p.requires_grad for n, p in block.named_parameters()
                        if "weight.0." not in n}
    assert not required["0.bias"] and sum(required.values()) == 5
    assert all(p.grad is None and not (p.requires_grad and "weight.0." in n)
               for n, p in block.named_parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, learned, strict=True))
    assert not any(m.training for m in block.modules())


@pytest.mark.parametrize("method", ["adaround", "adaquant", "flexround"])
def test_never_worse_than_round_to_nearest_on_white_noise(method):
    """With a rate that is far too high, on inputs without structure, the start is what is kept."""
    for lr in (RATES[method], 0.5 if method == "flexround" else 3.0):
        x = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(5))
        block, x, y, config = prepared(method, 4, x, lr=lr)
        rtn = copy.deepcopy(block)
        for q in quantizers(rtn).values():
            q.eval()
        start = float(reconstruct.block_loss(rtn(x), y).detach())
        report = reconstruct_block(block, x, y, config)
        assert report.start_loss == pytest.approx(start, rel=1e-4)
        with torch.no_grad():
            assert float(reconstruct.block_loss(block(x), y)) <= start * (1 + 1e-6)
    assert report.best_iteration == 0 and torch.equal(block[0].weight, rtn[0].weight)


def test_on_white_noise_flexround_ends_worse_than_it_starts():
    """Why the best state is kept: README and the head of reconstruct.py say so."""
    for seed in range(3):
        torch.manual_seed(seed)
        layer, x = nn.Linear(64, 64), torch.randn(256, 64)
        y, config = layer(x), ReconstructionConfig(iterations=200)
        quantize_layers(layer, config)
        report = reconstruct_block(layer, x, y, config)
        assert report.evaluations[-1][1] > 1.1 * report.start_loss
        assert report.final_loss == report.start_loss and report.best_iteration == 0


def test_division_learns_to_make_unequal_channels_equal():
    """README, Why so close: FlexRound divides a large channel by a large S', and the next layer's
    weights that read it by a small one, as if the network had been equalised beforehand."""
    torch.manual_seed(0)
    net = models.fold_batchnorm(nn.Sequential(models.BasicBlock(8, 8)))
    x = correlated(64, 8, 8, 8)
    conv1 = net[0].conv1[0]
    W1 = conv1.weight.detach().clone()
    y = net(x).detach()
    models.rescale(net, 4.0)
    factor = (conv1.weight.detach() / W1).flatten(1).median(1).values.log()
    config = ReconstructionConfig(bits=3, iterations=500, lr=0.032)
    quantize_layers(net, config)
    report = reconstruct_block(net, x, y, config)
    q1, q2 = quantizers(net).values()
    with torch.no_grad():                                            # mean log S' of each channel
        out = (q1.log_S2 + q1.log_s3 + q1.log_s4).mean((1, 2, 3))
        into = (q2.log_S2 + q2.log_s3 + q2.log_s4).mean((0, 2, 3))
    follows = [float(torch.corrcoef(torch.stack([log_S, sign * factor]))[0, 1])
               for log_S, sign in ((out, 1), (into, -1))]
    print(f"correlation {follows[0]:.2f} and {follows[1]:.2f}, loss "
          f"{report.final_loss / report.start_loss:.3f} of the start")
    assert min(follows) > 0.9


def test_input_drop_is_the_share_of_full_precision_inputs():
    def history(drop, x_q, x_fp):
        block, _, y, config = prepared(input_drop=drop)
        report = reconstruct_block(block, x_q, y, config, x_fp)
        return report.history, report.start_loss

    x = correlated(32, 3, 6, 6)
    noisy = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    only_q, only_fp = history(0.0, noisy, None), history(0.0, x, None)
    assert history(0.0, noisy, x) == only_q                          # 0: X_tilde alone
    all_fp = history(1.0, noisy, x)
    assert all_fp[0] == only_fp[0]                                   # 1: trained on X alone ...
    assert all_fp[1] == only_q[1]                                    # ... evaluated on X_tilde
    assert history(0.5, noisy, x)[0] not in (only_q[0], only_fp[0])


def test_half_of_the_elements_are_dropped():
    """The block reports the share of x_fp's elements (ones) among x_q's (zeros), one by one."""
    shares = []

    class Share(nn.Linear):
        def forward(self, x):
            if torch.is_grad_enabled():                              # not the evaluations
                shares.append(float(x.mean()))
                assert 0 < x[0].mean() < 1                           # not whole rows
            return super().forward(x)

    block = Share(400, 2)
    config = ReconstructionConfig(iterations=20, batch_size=8, input_drop=0.3)
    quantize_layers(block, config)
    x_fp = torch.ones(16, 400)
    reconstruct_block(block, 0 * x_fp, torch.zeros(16, 2), config, x_fp)
    assert len(shares) == 20 and np.mean(shares) == pytest.approx(0.3, abs=0.02)
    assert len(set(shares)) > 10                                     # anew at each iteration


class Exploding(nn.Module):
    """Returns NaN from the given training step on, evaluations not counted; 0: always."""

    def __init__(self, step):
        super().__init__()
        self.step, self.count = step, 0

    def forward(self, x):
        self.count += x.requires_grad
        return x * float("nan") if self.count >= self.step else x


def test_a_loss_that_is_not_finite_names_block_and_iteration():
    block, x, y, config = prepared(iterations=50)
    before = copy.deepcopy(block.state_dict())
    broken = nn.Sequential(block, Exploding(12))
    with pytest.raises(FloatingPointError, match=r"block 4, .* at iteration 12 of 50"):
        reconstruct_block(broken, x, y, config, index=4)
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())
    with pytest.raises(FloatingPointError, match="before training"):
        reconstruct_block(nn.Sequential(block, Exploding(0)), x, y, config)


def test_after_a_failure_the_block_is_float_and_earlier_ones_quantized():
    first, second = small_block(), nn.Sequential(nn.Conv2d(16, 8, 3), Exploding(12))
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(FloatingPointError, match="block 1"):
        quantize_model([first, second], correlated(32, 3, 6, 6),
                       ReconstructionConfig(iterations=50, batch_size=8))
    assert len(quantizers(first)) == 2 and not quantizers(second)
    assert type(second[0]) is nn.Conv2d and set(second.state_dict()) == set(before)
    assert all(torch.equal(second.state_dict()[k], v) for k, v in before.items())
    assert all(p.requires_grad for p in second.parameters())


def test_the_schedule_of_adaround_is_the_one_that_is_run(monkeypatch):
    betas, weighted = [], AdaRound.regulariser
    monkeypatch.setattr(AdaRound, "regulariser",
                        lambda q, beta: betas.append(float(beta)) or weighted(q, beta))
    block, x, y, config = prepared("adaround", iterations=10)
    history = reconstruct_block(block, x, y, config).history
    falling = [20, 17.75, 15.5, 13.25, 11, 8.75, 6.5, 4.25]
    assert betas[::2] == pytest.approx([20, 20, *falling])           # once for each of 2 layers
    assert max(history[:2]) < 0.1 < min(history[2:])                 # none in the first fifth


def test_learning_works_where_gradients_are_off():
    results = []
    for context in (torch.enable_grad, torch.no_grad):
        block, x, y, config = prepared()
        with context():
            results.append(reconstruct_block(block, x, y, config).final_loss)
    assert results[0] == results[1]
    y = block(x.requires_grad_())                                    # not detached, with a graph
    assert y.requires_grad
    reconstruct_block(block, x, y, config)
    assert x.grad is None


def test_an_interrupt_leaves_the_block_as_it_was():
    def stop(iteration, loss):
        if iteration > 20:
            raise KeyboardInterrupt

    block, x, y, config = prepared()
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(KeyboardInterrupt):
        reconstruct_block(block, x, y, config, progress=stop)
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


def test_the_rate_falls_to_zero_along_a_cosine(monkeypatch):
    rates = []
    step = torch.optim.Adam.step

    def spy(self, *args):
        rates.append(float(self.param_groups[0]["lr"]))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    block, x, y, config = prepared(iterations=4, lr=0.01)
    reconstruct_block(block, x, y, config)
    assert rates == pytest.approx([0.01, 0.00853553, 0.005, 0.00146447], rel=1e-5)


# ---- 5. Networks, end to end ---------------------------------------------------------------------

def tiny(name):
    """An untrained network, calibration inputs and the names of its layers, block by block."""
    torch.manual_seed(0)
    if name == "gpt":
        gpt_layers = ["qkv", "out", "up", "down"]
        return (models.GPT(11, context=16, layers=2, heads=2, width=16).eval(),
                torch.randint(0, 11, (16, 16)), [[], gpt_layers, gpt_layers, []])
    if name == "mobilenet":
        net = models.MobileNet(widths=(4, 6), depth=1, channels=1)
        inner = ["expand.0", "depthwise.0", "project.0"]
        layers = [["0"], inner, inner, ["0"], ["2"]]
        return models.fold_batchnorm(net), correlated(16, 1, 8, 8), layers
    net = models.ResNet(widths=(4, 6), depth=1, channels=1, shortcut=name.removeprefix("resnet "))
    inner = ["conv1.0", "conv2.0"]
    end = inner + ["shortcut.0"] * (name == "resnet conv")
    return models.fold_batchnorm(net), correlated(16, 1, 8, 8), [["0"], inner, end, ["2"]]


NETWORKS = ["resnet conv", "resnet pad", "mobilenet", "gpt"]
QUICK = ReconstructionConfig(bits=3, iterations=20, batch_size=8)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_end_to_end(name):
    net, x, layers = tiny(name)
    net.train()
    full = net.eval()(x).detach()
    rtn = copy.deepcopy(net)
    start = quantize_model(rtn.blocks, x, replace(QUICK, method="rtn"))
    reports = quantize_model(net.blocks, x, QUICK)
    assert [list(r.bits) for r in reports] == [names for names in layers if names]
    assert [r.index for r in reports] == [i for i, names in enumerate(layers) if names]
    bits = {f"{r.index}.{n}": b for r in reports for n, b in r.bits.items()}
    ends = set() if name == "gpt" else {"0.0", f"{len(layers) - 1}.2"}
    assert {n for n, b in bits.items() if b == 8} == ends and set(bits.values()) <= {3, 8}
    assert all(r.final_loss <= r.start_loss for r in reports)
    assert reports[-1].final_loss < start[-1].final_loss
    assert not any(m.training for m in net.modules())
    assert not any(p.requires_grad for q in quantizers(net).values() for p in q.parameters())
    assert all(p.requires_grad for n, p in net.named_parameters() if "weight.0." not in n)
    y = net(x)
    assert torch.equal(fold(net)(x), y) and not torch.equal(y, full)
    assert not quantizers(net)


def test_each_block_gets_the_quantized_blocks_outputs_and_the_float_networks_targets():
    net, x, _ = tiny("resnet conv")
    floats = copy.deepcopy(net)
    reports = quantize_model(net.blocks, x, QUICK)
    x_fp, x_q = x, x
    with torch.no_grad():
        for i, report in enumerate(reports):
            y_fp = floats.blocks[i](x_fp)
            fresh = copy.deepcopy(floats.blocks[i])
            quantize_layers(fresh, QUICK, report.bits)
            fresh.eval()
            loss = float(reconstruct.block_loss(fresh(x_q), y_fp))
            assert loss == pytest.approx(report.start_loss, rel=1e-4), i
            x_fp, x_q = y_fp, net.blocks[i](x_q)
            assert float(reconstruct.block_loss(x_q, y_fp)) == pytest.approx(report.final_loss,
                                                                             rel=1e-4), i


def test_bits_of_ends_and_of_single_layers():
    net, x, _ = tiny("resnet conv")
    assert {b for p in reconstruct.plan(net.blocks, replace(QUICK, end_bits=None))
            for b in p.values()} == {3}
    config = replace(QUICK, method="rtn", end_bits=6, layer_bits={"1.conv1.0": 5, "0.0": 4})
    reports = quantize_model(net.blocks, x, config)
    assert [r.bits for r in reports] == [
        {"0": 4}, {"conv1.0": 5, "conv2.0": 3}, {"conv1.0": 3, "conv2.0": 3, "shortcut.0": 3},
        {"2": 6}]
    assert net.blocks[1].conv1[0].parametrizations.weight[0].bits == 5
    pair = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    assert reconstruct.plan(pair, QUICK) == [{"0": 8, "1": 3}, {"0": 3, "1": 8}]
    single = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]           # a block that is a layer
    config = replace(QUICK, method="rtn", layer_bits={"2": 4})
    assert reconstruct.plan(single, config) == [{"": 8}, {}, {"": 4}]
    assert [r.bits for r in quantize_model(single, torch.randn(9, 4), config)] == [{"": 8}, {"": 4}]


def test_embeddings_and_the_tied_head_of_a_gpt_stay_float():
    net, x, _ = tiny("gpt")
    before = net.blocks[0].token.weight.detach().clone()
    quantize_model(net.blocks, x, QUICK)
    assert torch.equal(net.blocks[0].token.weight, before)
    assert net.blocks[-1].project.weight is net.blocks[0].token.weight


def test_a_layer_tied_to_another_blocks_embedding_stays_float_beside_one_that_does_not():
    class Last(nn.Module):
        def __init__(self, token):
            super().__init__()
            self.hidden, self.head = nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
            self.head.weight = token.weight

        def forward(self, x):
            return self.head(self.hidden(x))

    token = nn.Embedding(7, 5)
    blocks = [token, Last(token)]
    before = token.weight.detach().clone()
    reports = quantize_model(blocks, torch.randint(0, 7, (16, 3)), QUICK)
    assert [r.bits for r in reports] == [{"hidden": 8}]
    fold(blocks[1])
    assert torch.equal(token.weight, before) and blocks[1].head.weight is token.weight


def test_input_drop_and_blocks_without_layers_in_a_network():
    """A second block's inputs: X for input_drop = 1, X_tilde for 0, also behind a bare ReLU."""
    def reports(drop):
        torch.manual_seed(0)
        blocks = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6)]
        floats, x = copy.deepcopy(blocks), correlated(32, 6)
        config = replace(QUICK, input_drop=drop, end_bits=2)
        found = quantize_model(blocks, x, config)
        x_fp, x_q = floats[1](floats[0](x)).detach(), blocks[1](blocks[0](x)).detach()
        y_fp = floats[2](x_fp).detach()
        alone = copy.deepcopy(floats[2])
        quantize_layers(alone, config)
        expected = reconstruct_block(alone, x_q, y_fp, config, x_fp, index=2)
        return found[1], expected, x_fp, x_q

    for drop in (0.0, 0.5, 1.0):
        found, expected, x_fp, x_q = reports(drop)
        assert not torch.equal(x_fp, x_q)
        assert found.index == 2 and found.history == pytest.approx(expected.history, rel=1e-4)
        assert found.start_loss == pytest.approx(expected.start_loss, rel=1e-4)
    assert reports(0.0)[0].history != reports(0.5)[0].history != reports(1.0)[0].history


def test_blocks_behind_the_last_layer_are_not_run():
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("was run")

    never = Never().train()
    quantize_model([nn.Linear(4, 4), nn.ReLU(), never], torch.randn(9, 4), QUICK)
    assert not never.training


def test_a_block_that_works_in_place_does_not_spoil_the_cache():
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    blocks = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(2)]
    safe = copy.deepcopy(blocks)
    for block in safe:
        block[0] = nn.ReLU()
    kept = x.clone()
    a = quantize_model(blocks, x, QUICK)
    b = quantize_model(safe, x, QUICK)
    assert torch.equal(x, kept)
    assert [r.final_loss for r in a] == [r.final_loss for r in b]


def test_the_size_of_the_cache_is_known_beforehand():
    net, x, _ = tiny("resnet pad")
    # The widest pair: 16 x (4 + 4) x 8 x 8 float32 into and out of block 1, both paths.
    assert reconstruct.cache_bytes(net.blocks, x, QUICK) == 2 * 16 * (4 + 4) * 64 * 4


@pytest.mark.parametrize("name", ["resnet conv", "gpt"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_cached_can_be_half_as_large(name, dtype, monkeypatch):
    net, x, _ = tiny(name)
    # At 8 bits bfloat16's own error, 8 bits too, would be most of the loss.
    config, seen = replace(QUICK, cache_dtype=dtype, input_drop=0.5, end_bits=None), []
    size, half = (reconstruct.cache_bytes(net.blocks[:3], x, c) for c in (QUICK, config))
    assert half == size / 2                                          # no integers at the widest
    whole = quantize_model(copy.deepcopy(net).blocks, x, replace(config, cache_dtype=None))

    def watched(block, x_q, y_fp, config, x_fp, *rest):
        seen.extend((x_q.dtype, y_fp.dtype, x_fp.dtype))
        return reconstruct_block(block, x_q, y_fp, config, x_fp, *rest)

    monkeypatch.setattr(reconstruct, "reconstruct_block", watched)
    reports = quantize_model(net.blocks, x, config)
    assert set(seen) == {getattr(torch, dtype)}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    for a, b in zip(reports, whole, strict=True):                    # start and end, near float32's
        assert a.start_loss == pytest.approx(b.start_loss, rel=0.1)
        assert a.final_loss == pytest.approx(b.final_loss, rel=0.3) and a.final_loss != b.final_loss


def test_one_block_at_a_time_is_moved_to_the_device_and_back(monkeypatch):
    net, x, _ = tiny("resnet conv")
    moves, to = [], nn.Module.to
    places = {id(block): i for i, block in enumerate(net.blocks)}

    def watched(module, device):
        moves.append((places[id(module)], str(device)))
        return to(module, device)

    monkeypatch.setattr(nn.Module, "to", watched)
    quantize_model(net.blocks, x, replace(QUICK, method="rtn"))
    assert moves == []                                               # blocks stay where they are
    quantize_model(fold(net).blocks, x, replace(QUICK, method="rtn", device="cpu"))
    # There and back for its target, there and back to be learned, then the next.
    assert moves == [(i, "cpu") for i in range(4) for _ in range(4)]


@pytest.mark.parametrize("name", ["resnet conv", "resnet pad", "mobilenet"])
def test_folding_batch_norm_changes_no_output(name):
    torch.manual_seed(0)
    net = (models.MobileNet(widths=(4, 6), depth=1) if name == "mobilenet" else
           models.ResNet(widths=(4, 6), depth=1, shortcut=name.removeprefix("resnet ")))
    x = torch.randn(16, 3, 8, 8)
    for _ in range(20):
        net(x)                                                       # running statistics
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 2.0)
            nn.init.uniform_(m.bias)
    y = net.eval()(x)
    assert models.fold_batchnorm(net) is net
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="not folded"):
        models.fold_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))


def test_rescaling_channels_changes_the_weights_and_no_output():
    net, x, _ = tiny("resnet pad")
    models.fold_batchnorm(net)
    before, W = net(x), net.blocks[1].conv1[0].weight.detach().clone()
    torch.testing.assert_close(models.rescale(net, 8.0)(x), before, rtol=1e-3, atol=1e-4)
    ratio = (net.blocks[1].conv1[0].weight / W)[:, 0, 0, 0].detach()
    assert 1 / 8 <= ratio.min() < 0.5 and 2 < ratio.max() <= 8


def test_a_gpt_looks_only_back():
    net, x, _ = tiny("gpt")
    y = net(x)
    assert y.shape == (16, 16, 11)
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 11
    same = (net(changed) == y).all(2)
    assert same[:, :9].all() and not same[:, 9].any()
    with pytest.raises(ValueError, match="17 tokens: at most 16"):
        net(torch.zeros(1, 17, dtype=torch.long))


def test_a_sample_of_text_follows_the_seed():
    net, x, _ = tiny("gpt")
    drawn = models.sample(net, x[:2, :3], 20)
    assert drawn.shape == (2, 23) and torch.equal(drawn[:, :3], x[:2, :3])      # past the context
    assert torch.equal(drawn, models.sample(net, x[:2, :3], 20))
    assert not torch.equal(drawn, models.sample(net, x[:2, :3], 20, seed=1))


def test_accuracy_and_perplexity_by_hand():
    class Fixed(nn.Module):
        def forward(self, x):
            return x

    x = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])]
    assert models.accuracy(Fixed(), x, torch.tensor([0, 1, 2, 0, 0]), batch_size=2) == 80

    class Uniform(nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 7)

    tokens = torch.randint(0, 7, (100,))
    assert models.perplexity(Uniform(), tokens, 16) == pytest.approx(7)

    class Knows(nn.Module):                                          # next comes x + 1: p = 0.5
        def forward(self, tokens):
            logits = torch.full((*tokens.shape, 120), -1e9)
            logits.scatter_(2, tokens[..., None] + 1, 0.0)
            return logits.scatter_(2, torch.full_like(tokens, 119)[..., None], 0.0)

    assert models.perplexity(Knows(), torch.arange(100), 16, batch_size=2) == pytest.approx(2)
    with pytest.raises(ValueError, match="16 tokens"):
        models.perplexity(Uniform(), tokens[:16], 16)


def akamaster_checkpoint(net):
    """The state of our ResNet-20 under the public checkpoint's names."""
    kind, state = {"0": "conv", "1": "bn"}, {}
    for key, value in net.state_dict().items():
        _, i, *rest = key.split(".")
        if i == "0":
            name = f"{kind[rest[0]]}1.{rest[1]}"
        elif i == "10":
            name = f"linear.{rest[1]}"
        else:
            stage, j = divmod(int(i) - 1, 3)
            name = f"layer{stage + 1}.{j}.{kind[rest[1]]}{rest[0][-1]}.{rest[2]}"
        if "num_batches" not in name:
            state[f"module.{name}"] = value
    return {"state_dict": state, "best_prec1": 91.7}


def test_the_resnet20_checkpoint_is_read_and_others_are_refused(tmp_path):
    torch.manual_seed(0)
    source = models.ResNet(shortcut="pad").eval()
    good = akamaster_checkpoint(source)
    assert "module.layer3.2.bn2.running_var" in good["state_dict"]
    torch.save(good, tmp_path / "good.th")
    x = torch.randn(2, 3, 32, 32)
    net = models.resnet20(tmp_path / "good.th")
    assert torch.equal(net(x), source(x)) and not net.training
    assert sum(p.numel() for p in net.parameters()) == 269_722       # 0.27 M, He et al.

    good["state_dict"]["module.layer2.0.conv1.weight"] = torch.zeros(32, 16, 5, 5)
    torch.save(good, tmp_path / "shape.th")
    wrong = r"layer2.0.conv1.weight.*\(32, 16, 5, 5\).*\(32, 16, 3, 3\)"
    with pytest.raises(ValueError, match=wrong):
        models.resnet20(tmp_path / "shape.th")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.th")
    with pytest.raises(ValueError, match=r"'conv1.weight' is missing; \(16, 3, 3, 3\) is needed"):
        models.resnet20(tmp_path / "other.th")
    (tmp_path / "cut.th").write_bytes((tmp_path / "good.th").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut.th"):
        models.resnet20(tmp_path / "cut.th")
    with pytest.raises(FileNotFoundError):
        models.resnet20(tmp_path / "none.th")


@pytest.mark.parametrize("name, file", [
    ("resnet20", "resnet20-12fca82f.th"), ("resnet18", "resnet18-f37072fd.pth"),
    ("resnet50", "resnet50-0676ba61.pth"), ("gpt2", "gpt2-7c5d3f4b.bin")])
def test_a_download_and_no_network(name, file, tmp_path, monkeypatch):
    def refuse(url, path, prefix):
        assert Path(path).name == file and prefix in file and len(prefix) == 8
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match=r"could not download https://\S+ \(no route to host\)"):
        getattr(models, name)()
    (tmp_path / "checkpoints" / file).write_bytes(b"once downloaded")    # is read, not fetched
    with pytest.raises(ValueError, match=f"{file}: truncated or not readable"):
        getattr(models, name)()


# What torchvision documents, or is seen in its files: tensors (without num_batches_tracked, which
# the oldest lack), parameters, the strides of a block that halves, and some names and shapes.
IMAGENET = {
    "resnet18": (102, 11_689_512, [2, 1], {
        "conv1.weight": (64, 3, 7, 7), "bn1.running_mean": (64,), "fc.bias": (1000,),
        "layer1.0.conv1.weight": (64, 64, 3, 3), "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer4.1.bn2.running_var": (512,), "fc.weight": (1000, 512)}),
    "resnet50": (267, 25_557_032, [1, 2, 1], {
        "conv1.weight": (64, 3, 7, 7), "layer1.0.conv1.weight": (64, 64, 1, 1),
        "layer1.0.conv3.weight": (256, 64, 1, 1), "layer1.0.downsample.1.bias": (256,),
        "layer3.5.conv2.weight": (256, 256, 3, 3), "layer4.2.bn3.weight": (2048,),
        "fc.weight": (1000, 2048)}),
}


def imagenet_checkpoint(name, folder, monkeypatch):
    """A file as torchvision's, its values random; and the network that holds these."""
    nets = []
    monkeypatch.setattr(models, "fill", lambda net, *rest: nets.append(net))
    torch.save({}, folder / "empty.pth")
    getattr(models, name)(folder / "empty.pth")
    monkeypatch.undo()
    net = restless(nets[0])
    torch.save({net.published_name(key): value for key, value in net.state_dict().items()
                if "num_batches" not in key}, folder / f"{name}.pth")
    return net, folder / f"{name}.pth"


def restless(net):
    """In eval mode, with a batch norm that does something and no two alike."""
    for m in net.eval().modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.running_var):
                nn.init.uniform_(t, 0.5, 1.5)
            for t in (m.bias, m.running_mean):
                nn.init.normal_(t, std=0.1)
    return net


@pytest.mark.parametrize("name", IMAGENET)
def test_the_imagenet_resnets_have_the_published_tensors(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    source, path = imagenet_checkpoint(name, tmp_path, monkeypatch)
    saved = torch.load(path)
    tensors, parameters, strides, some = IMAGENET[name]
    assert len(saved) == tensors and {k: tuple(saved[k].shape) for k in some} == some
    torch.save(dict(sorted(saved.items(), reverse=True)), path)      # their order does not matter
    net = getattr(models, name)(path)
    assert sum(p.numel() for p in net.parameters()) == parameters and not net.training
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), source.parameters(),
                                                 strict=True))
    halving = [b for b in net.blocks[1:-1] if not isinstance(b.shortcut, nn.Identity)][-1]
    convs = [m for child, m in halving.named_children() if "conv" in child]
    assert [conv[0].stride[0] for conv in convs] == strides
    assert net.blocks[0](torch.zeros(1, 3, 224, 224)).shape == (1, 64, 56, 56)
    value = saved.pop("layer4.0.bn1.running_mean")
    for wrong, message in (({}, "'layer4.0.bn1.running_mean' is missing; .*is needed"),
                           ({"layer4.0.bn1.running_mean": value[:7]}, r"has shape \(7,\); "),
                           ({"layer4.0.bn1.running_mean": value, "layer5.x": value[:3]},
                            r"'layer5.x', \(3,\), has no place")):
        torch.save({**saved, **wrong}, path)
        with pytest.raises(ValueError, match=message):
            getattr(models, name)(path)


def import_torchvision():
    """torchvision, or None where it is not installed. Its networks are plain Python, but without a
    build for this torch (there is none for the CPU) its import misses two operators: declared."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)                                     # it ends with its object
        return importlib.import_module("torchvision")


DECLARED = []


@pytest.fixture
def torchvision():
    return import_torchvision() or pytest.skip("torchvision is not installed")


def relative(ours, theirs):
    """The largest difference, relative to the largest output."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", IMAGENET)
def test_our_resnets_compute_what_torchvisions_do(name, tmp_path, torchvision):
    torch.manual_seed(0)
    theirs = restless(getattr(torchvision.models, name)())
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, x = getattr(models, name)(tmp_path / "theirs.pth"), torch.randn(2, 3, 224, 224)
    error, folded = relative(ours(x), theirs(x)), relative(models.fold_batchnorm(ours)(x),
                                                           theirs(x))
    print(f"{name}: relative difference {error:.1e}, with batch norm folded {folded:.1e}")
    assert error < 1e-4 and folded < 1e-4


def test_our_preprocessing_is_torchvisions(tmp_path, torchvision):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (333, 401, 3), dtype=np.uint8)
    image = image_module.fromarray(pixels)
    for i, picture in enumerate((image, image.transpose(2), image.resize((100, 90)))):
        picture.save(tmp_path / f"{i}.png")
        theirs = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()(picture)
        assert relative(models.read_image(tmp_path / f"{i}.png"), theirs) < 1e-6


def gpt2_checkpoint(net, prefix="transformer."):
    """The state of our GPT under GPT-2's names, its linear weights (in, out)."""
    names = {"norm1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "norm2": "ln_2",
             "up": "mlp.c_fc", "down": "mlp.c_proj"}
    first, *inner, last = net.blocks
    state = {"wte.weight": first.token.weight, "wpe.weight": first.position.weight,
             "ln_f.weight": last.norm.weight, "ln_f.bias": last.norm.bias}
    for i, block in enumerate(inner):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        for key, value in block.named_parameters():
            part, kind = key.split(".")
            state[f"h.{i}.{names[part]}.{kind}"] = (value.T.contiguous() if value.dim() == 2
                                                    else value)
    return {prefix + key: value.detach() for key, value in state.items()}


def test_a_gpt2_checkpoint_is_read_and_others_are_refused(tmp_path):
    torch.manual_seed(0)
    net = models.GPT(61, context=16, layers=2, heads=2, width=128).eval()
    tokens, path = torch.randint(0, 61, (3, 16)), tmp_path / "gpt2.bin"
    for prefix in ("", "transformer."):
        good = gpt2_checkpoint(net, prefix)
        torch.save({**good, "lm_head.weight": good[f"{prefix}wte.weight"]}, path)
        again = models.gpt2(path)
        assert torch.equal(again(tokens), net(tokens)) and not again.training
        assert again.blocks[-1].project.weight is again.blocks[0].token.weight
    assert models.gpt2(path, n_head=4).blocks[1].heads == 4
    (tmp_path / "config.json").write_text('{"n_head": 8}')
    assert models.gpt2(path).blocks[1].heads == 8 and models.gpt2(path, 4).blocks[1].heads == 4
    for config, message in (("{", "config.json: truncated or not readable"),
                            ('{"activation_function": "relu"}', "'relu': 'gelu_new' is allowed"),
                            ('{"n_head": 7}', "heads = 7: a divisor of the width, 128")):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match=message):
            models.gpt2(path)
    (tmp_path / "config.json").unlink()

    key = "transformer.h.1.mlp.c_fc.weight"
    for wrong, message in (({key: good[key].T}, r"'h.1.mlp.c_fc.weight' has shape \(512, 128\); "
                                                r"\(128, 512\) is needed"),
                           ({"lm_head.weight": torch.zeros(61, 128)}, "'lm_head.weight' is not"),
                           ({"score.weight": torch.zeros(2, 128)}, r"'score.weight', \(2, 128\)"),
                           ({"transformer.wpe.weight": torch.zeros(16)}, r"\(61, 128\), \(16,\)")):
        torch.save({**good, **wrong}, path)
        with pytest.raises(ValueError, match=message):
            models.gpt2(path)
    del good[key]
    torch.save(good, path)
    with pytest.raises(ValueError, match="'h.1.mlp.c_fc.weight' is missing"):
        models.gpt2(path)
    torch.save(gpt2_checkpoint(models.GPT(61, 16, 1, 1, 96)), path)
    with pytest.raises(ValueError, match="width 96 is no multiple of 64: give n_head"):
        models.gpt2(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="gpt2.bin: truncated or not readable"):
        models.gpt2(path)


def test_gpt2_small_has_the_published_size():
    with torch.device("meta"):
        net = models.GPT(50257, 1024, 12, 12, 768)
    assert sum(p.numel() for p in net.parameters()) == 124_439_808
    assert len([k for k in gpt2_checkpoint(net) if not k.endswith(".attn.bias")]) == 148


@torch.no_grad()
@pytest.mark.parametrize("heads, told", [(2, "width / 64"), (4, "n_head"), (8, "config.json")])
def test_our_gpt2_computes_what_transformers_does(heads, told, tmp_path):
    import_torchvision()                                             # transformers imports it
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=128, n_layer=3, n_head=heads, bos_token_id=0,
        eos_token_id=0)).eval()
    for p in theirs.parameters():                                    # biases and norms, too
        p.add_(0.05 * torch.randn(p.shape))
    if told == "config.json":
        theirs.save_pretrained(tmp_path)                             # model.safetensors beside it
        ours = models.gpt2(tmp_path / "model.safetensors")
    else:
        torch.save(theirs.state_dict(), tmp_path / "model.bin")
        ours = models.gpt2(tmp_path / "model.bin", heads if told == "n_head" else None)
    tokens = torch.randint(0, 97, (3, 32))
    error = relative(ours(tokens), theirs(tokens).logits)
    print(f"GPT-2, {heads} heads by {told}: relative difference {error:.1e}")
    assert error < 1e-4


def test_cifar10_is_read_from_its_binary_files(tmp_path):
    record = np.zeros((3, 3073), np.uint8)
    record[:, 0] = [3, 1, 9]
    record[1, 1] = 255                                               # red, top left
    record[2, 1 + 1024 + 32 * 5 + 7] = 51                            # green, row 5, column 7
    record.tofile(tmp_path / "test_batch.bin")
    x, y = models.cifar10(tmp_path, train=False)
    assert x.shape == (3, 3, 32, 32) and y.tolist() == [3, 1, 9]
    assert float(x[0, 0, 0, 0]) == pytest.approx(-0.485 / 0.229)
    assert float(x[1, 0, 0, 0]) == pytest.approx((1 - 0.485) / 0.229)
    assert float(x[2, 1, 5, 7]) == pytest.approx((0.2 - 0.456) / 0.224, rel=1e-5)
    with pytest.raises(FileNotFoundError, match="data_batch"):
        models.cifar10(tmp_path, train=True)
    (tmp_path / "test_batch.bin").write_bytes(record.tobytes()[:-1])
    with pytest.raises(ValueError, match="9218 bytes"):
        models.cifar10(tmp_path, train=False)


@pytest.fixture
def photos(tmp_path):
    """ImageNet's layout in small: two classes, three images each to train on, two to score."""
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    generator = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 2)):
        for name in ("n01", "n02"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40 + 8 * i, 56, 3), dtype=np.uint8)
                kind = "png" if i else "JPEG"
                image_module.fromarray(pixels).save(tmp_path / part / name / f"{i}.{kind}")
    (tmp_path / "train" / "notes.txt").touch()
    return tmp_path


def test_imagenet_is_read_from_its_folders(photos):
    from PIL import Image
    files, classes = models.imagenet(photos, "val")
    assert classes == ["n01", "n02"] and [label for _, label in files] == [0, 0, 1, 1]
    batches = list(models.image_batches(files, batch_size=3))
    assert [tuple(x.shape) for x, _ in batches] == [(3, 3, 224, 224), (1, 3, 224, 224)]
    assert torch.equal(batches[1][0][0], models.read_image(files[3][0]))
    assert torch.cat([y for _, y in batches]).tolist() == [0, 0, 1, 1]
    # 512 x 256 is not resized: the crop starts at row 16, column 144.
    pixels = np.zeros((256, 512, 3), np.uint8)
    pixels[16, 144] = 255, 51, 0
    Image.fromarray(pixels).save(photos / "one.png")
    x = models.read_image(photos / "one.png")
    assert x[:, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224,
                                                 -0.406 / 0.225], rel=1e-5)
    assert (x[0] > 0).sum() == 1
    Image.fromarray(pixels[..., 0]).save(photos / "grey.png")        # one channel
    assert models.read_image(photos / "grey.png").shape == (3, 224, 224)
    (photos / "val" / "n02" / "2.jpg").write_bytes(files[0][0].read_bytes()[:300])
    with pytest.raises(ValueError, match=r"n02/2.jpg: not a readable image"):
        list(models.image_batches(models.imagenet(photos, "val")[0]))
    for folder in (photos / "val", photos / "nowhere"):
        with pytest.raises(FileNotFoundError, match="must hold train and val"):
            models.imagenet(folder, "train")
    (photos / "val" / "n02").rename(photos / "val" / "n03")
    with pytest.raises(ValueError, match="n02 is not a class folder of both train and val"):
        models.load_task("resnet18", photos, samples=2)


def test_no_image_is_both_calibrated_on_and_scored(photos, monkeypatch):
    read, image_batches = [], models.image_batches

    def watched(files, **settings):
        read.append({file for file, _ in files})
        return image_batches(files, **settings)

    monkeypatch.setattr(models, "resnet18", lambda path: models.ResNet((4,), 1, imagenet=True))
    monkeypatch.setattr(models, "image_batches", watched)
    for split, folder, count in (("train", "train", 4), ("test", "val", 4)):
        read.clear()
        with pytest.warns(UserWarning, match="2 classes"):
            task = models.load_task("resnet18", photos, split=split, samples=2)
        task.score(task.net)
        calibrated, scored = read
        assert len(calibrated) == 2 and len(scored) == count and not calibrated & scored
        assert {file.parts[-3] for file in calibrated} == {"train"}
        assert {file.parts[-3] for file in scored} == {folder}


def fake_tiktoken(monkeypatch, get_encoding=None):
    """Characters instead of tokens."""
    def encoding(name):
        assert name == "gpt2"
        return SimpleNamespace(encode_ordinary=lambda string: [ord(c) % 61 for c in string])

    monkeypatch.setitem(sys.modules, "tiktoken",
                        SimpleNamespace(get_encoding=get_encoding or encoding))


def test_wikitext2_and_what_is_scored(tmp_path, monkeypatch):
    fake_tiktoken(monkeypatch)
    (tmp_path / "wikitext2.test.txt").write_text("ccc")
    with pytest.raises(FileNotFoundError, match="no wiki.valid.raw and no wikitext2.valid.txt in"):
        models.wikitext2(tmp_path)
    (tmp_path / "wiki.valid.raw").write_text("aabb")
    a, b, c, d = (ord(letter) % 61 for letter in "abcd")

    def tokens(split):
        pool, held, about = models.wikitext2(tmp_path, split)
        return pool.tolist(), held.tolist(), about

    said = "calibrated on wiki.valid.raw, scored on "
    assert tokens("test") == ([a, a, b, b], [c, c, c], f"{said}wikitext2.test.txt")
    assert tokens("train") == ([a, a], [b, b],                       # never the same tokens
                               f"{said}wiki.valid.raw, its first and second half")
    (tmp_path / "wiki.train.raw").write_text("dd")
    assert tokens("test")[:2] == ([d, d], [c, c, c]) and tokens("train")[:2] == ([d, d],
                                                                                 [a, a, b, b])

    def offline(name):
        raise ConnectionError("no route to host")

    fake_tiktoken(monkeypatch, offline)
    with pytest.raises(RuntimeError, match="TIKTOKEN_CACHE_DIR: ConnectionError"):
        models.gpt2_tokens("a")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(RuntimeError, match="pip install tiktoken"):
        models.gpt2_tokens("a")


def test_resnet18_in_the_main_job(photos, monkeypatch, capsys):
    _, path = imagenet_checkpoint("resnet18", photos, monkeypatch)
    with pytest.warns(UserWarning, match="has 2 classes, the checkpoints 1,000"):
        reconstruct.main(["--model", "resnet18", "--data", str(photos), "--checkpoint", str(path),
                          "--samples", "2", "--batch-size", "2", "--iterations", "1", "--bits", "4",
                          "--method", "flexround", "--cache-dtype", "bfloat16"])
    said = capsys.readouterr().out
    # Two images, 64 x 56 x 56 in bfloat16 into and out of block 1, both paths.
    assert f"at most {2 * 2 * 2 * 2 * 64 * 56 ** 2 / 1e6:,.1f} MB" in said
    assert "; ImageNet; accuracy on 4 test images; 21 layers, at 8 bits ['0.0', '9.2']" in said
    assert list(rows_of(said)) == [("resnet18", "W4")]
    assert re.search(r", seed 0: \d+\.\d+ \(\d+ s; a block \d+\.\d, at most \d+\.\d\)", said)
    assert re.search(r"^Peak memory: [\d,]+ MB of RAM$", said, re.M)


def test_gpt2_in_the_main_job(tmp_path, monkeypatch, capsys):
    fake_tiktoken(monkeypatch)
    torch.manual_seed(0)
    net = models.GPT(200, context=16, layers=2, heads=1, width=64)
    torch.save(gpt2_checkpoint(net), tmp_path / "gpt2.bin")
    for part in ("valid", "test"):
        (tmp_path / f"wiki.{part}.raw").write_text("the quick brown fox jumps over the dog; " * 9)
    command = ["--model", "gpt2", "--data", str(tmp_path), "--checkpoint",
               str(tmp_path / "gpt2.bin"), "--samples", "8"]
    reconstruct.main([*command, "--iterations", "2", "--bits", "4", "--method", "flexround",
                      "--no-symmetric", "--per-channel", "--save", str(tmp_path / "net.int")])
    said = capsys.readouterr().out
    assert "perplexity over the test split's 22 windows of 16; 8 layers, at 8 bits []" in said
    # No logits among what is cached: 8 x 16 x 64 float32 into and out of a block, both paths.
    assert f"at most {2 * 2 * 8 * 16 * 64 * 4 / 1e6:,.1f} MB" in said
    reconstruct.main([*command, "--load", str(tmp_path / "net.int")])
    assert capsys.readouterr().out.split("score")[1].strip() in said
    (tmp_path / "wiki.test.raw").write_text("too short")
    with pytest.raises(ValueError, match="360 and 9 tokens; more than 16 each are needed"):
        models.load_task("gpt2", tmp_path, tmp_path / "gpt2.bin", samples=8)


def test_digits_and_text_need_no_download():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    x, y, x_test, y_test = models.digits()
    assert x.shape == (1200, 1, 8, 8) and x_test.shape == (597, 1, 8, 8)
    assert len(set(y.tolist())) == 10 and abs(float(x.mean())) < 1e-5
    string = models.text()
    assert len(string) > 100_000 and re.fullmatch("[0-9a-f]{8}", models.fingerprint(string))
    tokens, vocabulary = models.characters("banana")
    assert tokens.tolist() == [1, 0, 2, 0, 2, 0] and vocabulary == "abn"


def test_training_is_the_same_from_the_same_seed(tmp_path):
    def net():
        torch.manual_seed(0)
        return models.GPT(11, context=8, layers=1, heads=2, width=16)

    tokens = torch.arange(500) % 11
    a, b, c = (models.train_gpt(net(), tokens, steps=30, seed=s) for s in (0, 0, 1))
    assert torch.equal(a(tokens[None, :8]), b(tokens[None, :8]))
    assert not torch.equal(a(tokens[None, :8]), c(tokens[None, :8]))
    assert models.perplexity(a, tokens, 8) < models.perplexity(net(), tokens, 8)


def test_a_trained_network_is_kept_and_a_foreign_file_refused(tmp_path):
    calls = []
    path = tmp_path / "deep" / "net.pt"

    def fit(net):
        calls.append(net)
        nn.init.ones_(net.weight)

    models.trained(nn.Linear(2, 2), path, fit)
    again = models.trained(nn.Linear(2, 2), path, fit)
    assert len(calls) == 1 and (again.weight == 1).all()
    assert [f.name for f in path.parent.iterdir()] == ["net.pt"]
    with pytest.raises(ValueError, match="delete it"):
        models.trained(nn.Linear(3, 2), path, fit)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="delete it"):
        models.trained(nn.Linear(2, 2), path, fit)


def command(*arguments, cwd=HERE):
    return subprocess.run([sys.executable, str(HERE / "reconstruct.py"), *arguments], cwd=cwd,
                          capture_output=True, text=True)


def rows_of(output):
    """The table of the main job: {(network, bits): {column: cell}}."""
    head, _, *rows = ([c.strip() for c in line.strip("|").split("|")]
                      for line in output.splitlines() if line.startswith("|"))
    return {(r[0], r[1]): dict(zip(head[2:], r[2:], strict=True)) for r in rows}


def test_the_main_job_in_small(tmp_path):
    string = "the quick brown fox jumps over the lazy dog; " * 300
    (tmp_path / "text.txt").write_text(string)
    torch.manual_seed(0)
    tokens, vocabulary = models.characters(string)
    net = models.GPT(len(vocabulary), context=64, layers=3, heads=4, width=64)
    (tmp_path / "cache").mkdir()
    torch.save(net.state_dict(), tmp_path / "cache" / f"gpt-{models.fingerprint(string)}.pt")
    same = ["--model", "gpt", "--data", "text.txt", "--iterations", "2", "--samples", "16",
            "--study", "trial", "--results", "runs.jsonl"]
    done = command(*same, "--bits", "3", "2", "--method", "rtn", "flexround", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert list(rows) == [("gpt", "W3"), ("gpt", "W2")]
    for cells in rows.values():
        assert list(cells) == ["full precision", "round to nearest", "FlexRound, lr 0.008"]
        assert re.fullmatch(r"\d+\.\d\d", cells.pop("full precision"))
        assert all(re.fullmatch(r"\d+\.\d\d \(\d+ s\)", c) for c in cells.values())
    assert "16 calibration inputs" in done.stdout and "12 layers" in done.stdout
    assert "%|" not in done.stderr                                   # no bar without a terminal
    # A study goes on where it was stopped: two of these four runs are there already.
    first = reconstruct.read_results(tmp_path / "runs.jsonl")
    assert [r["config"]["bits"] for r in first if r["study"] == "trial"] == [3, 3, 2, 2]
    done = command(*same, "--bits", "3", "--method", "flexround", "--seed", "0", "1", cwd=tmp_path)
    assert done.stdout.count("FlexRound, seed") == 1 and "FlexRound, seed 1" in done.stdout
    assert "1 of these 2 runs were not made now but taken from runs.jsonl" in done.stdout
    records = reconstruct.read_results(tmp_path / "runs.jsonl")
    assert records[:4] == first and len(records) == 5
    a, b = sorted((records[1]["score"], records[4]["score"]))
    cell = rows_of(done.stdout)["gpt", "W3"]["FlexRound, lr 0.008"]
    assert cell.startswith(f"{(a + b) / 2:.2f} ({a:.2f} to {b:.2f}; ")


def test_a_study_knows_its_runs(tmp_path):
    class task:
        about, calibration = "a network", torch.zeros(16, 3)

    config, path = ReconstructionConfig(), tmp_path / "runs.jsonl"
    record = {"study": "s", "network": "n", "about": "a network", "samples": 16,
              "config": {**reconstruct.asdict(config), "device": "cuda"}}
    same = reconstruct.same_run
    assert same(record, "s", "n", task, config)
    assert not same(record, "t", "n", task, config) and not same(record, "s", "m", task, config)
    assert not same(record, "s", "n", task, replace(config, end_bits=None))
    assert not same({**record, "about": "another"}, "s", "n", task, config)
    assert not same({**record, "samples": 17}, "s", "n", task, config)
    assert not same({**record, "config": {"gone": 1}}, "s", "n", task, config)
    old = {k: v for k, v in record["config"].items() if k != "precision"}
    assert same({**record, "config": old}, "s", "n", task, config)   # it had the default then
    # What was cut off while it was written is made again, and spoils nothing.
    for _ in range(2):
        reconstruct.append_result(path, record)
    path.write_text(path.read_text()[:-30])
    with pytest.warns(UserWarning, match="last line is cut off"):
        assert len(reconstruct.read_results(path)) == 1
    reconstruct.append_result(path, record)
    assert reconstruct.read_results(path) == [record, record]
    path.write_text(path.read_text()[:-1])                           # only the line's end
    reconstruct.append_result(path, record)
    assert reconstruct.read_results(path) == [record] * 3
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        reconstruct.read_results(path)


def test_the_table_by_hand():
    def run(score, seconds=3, full=90.0, **config):
        return {"network": "net", "full": full, "score": score, "seconds": seconds,
                "config": reconstruct.asdict(ReconstructionConfig(**config))}

    base = {"bits": 2, "lr": 0.1}
    runs = [run(80.0, **base), run(70.0, **base, seed=1), run(75.0, **base, seed=2),
            run(60.0, **base, end_bits=None), run(50.0, bits=2, method="rtn")]
    assert reconstruct.table(runs).splitlines() == [
        "| network | bits | full precision | FlexRound, lr 0.1 | FlexRound, lr 0.1, end_bits None "
        "| round to nearest |",
        "|---|---|---|---|---|---|",
        "| net | W2 | 90.00 | 75.00 (70.00 to 80.00; 3 s) | 60.00 (3 s) | 50.00 (3 s) |"]


@pytest.mark.slow
def test_the_main_job_as_the_readme_runs_it(tmp_path):
    done = command("--cache", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    rows = rows_of(done.stdout)
    assert list(rows) == [(n, b) for n in ("resnet", "mobilenet", "gpt") for b in ("W3", "W2")]
    for (name, bits), cells in rows.items():
        full, rtn, *learned = (float(c.split()[0]) for c in cells.values())
        better = (lambda a, b: a < b) if name == "gpt" else (lambda a, b: a > b)
        assert not better(rtn, full) and all(better(score, rtn) for score in learned), (name, bits)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_resnet20_reaches_its_published_accuracy():
    net = models.fold_batchnorm(models.resnet20(SHARED / "weights" / "resnet20-12fca82f.th"))
    x, y = models.cifar10(SHARED, train=False)
    assert models.accuracy(net, x, y) == pytest.approx(91.73, abs=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cache", [None, "cpu"])
def test_the_same_code_on_cuda(cache):
    net, x, _ = tiny("resnet conv")
    on_cpu = quantize_model(copy.deepcopy(net).blocks, x, QUICK)
    net.to("cuda")
    reports = quantize_model(net.blocks, x, replace(QUICK, cache_device=cache))
    assert all(p.device.type == "cuda" for p in net.parameters())
    moved = tiny("resnet conv")[0]                                   # lies on the CPU throughout
    in_turn = quantize_model(moved.blocks, x, replace(QUICK, device="cuda", cache_device=cache))
    assert all(p.device.type == "cpu" for p in moved.parameters())
    for a, b, c in zip(on_cpu, reports, in_turn, strict=True):       # losses, not codes: see README
        assert b.final_loss <= b.start_loss and c.final_loss <= c.start_loss
        assert b.start_loss == pytest.approx(a.start_loss, rel=0.2)
        assert c.start_loss == pytest.approx(a.start_loss, rel=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["adaround", "adaquant", "flexround"])
@pytest.mark.parametrize("settings", [{}, {"input_drop": 0.5}, {"abits": 4, "setting": "Q"},
                                      {"precision": "bf16"}, {"optimizer": "sgd", "lr": 1e-3}])
def test_a_captured_iteration_is_the_eager_one(method, settings):
    histories = []
    for graph in (True, False):
        block, x, y, config = prepared(method, iterations=50, cuda_graph=graph, **settings)
        block, x, y = block.cuda(), x.cuda(), y.cuda()
        if config.abits:
            flexround.quantize_inputs(block, x, {"0": 4, "2": 4}, drop=config.drop)
        with warnings.catch_warnings():
            warnings.simplefilter("error")                           # capturing did not fail
            histories.append(reconstruct_block(block, x, y, config, 1.01 * x).history)
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)
    assert histories[0][-1] < histories[0][0] or method == "adaround"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_block_that_cannot_be_captured_runs_eagerly():
    class Waits(nn.Module):
        def forward(self, x):
            return x * (1.0 + 0.0 * x.mean().item())                 # the host waits for the device

    block, x, y, config = prepared(input_drop=0.5)
    block, x, y = nn.Sequential(block, Waits()).cuda(), x.cuda(), y.cuda()
    with pytest.warns(UserWarning, match="runs eagerly"):
        report = reconstruct_block(block, x, y, config, x)
    assert report.final_loss < report.start_loss
    assert torch.rand(3, device="cuda").shape == (3,)                # the generator is whole


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_block_is_timed_on_cuda():
    took = reconstruct.time_block(small_block().cuda(), correlated(32, 3, 6, 6).cuda(), QUICK, 3)
    assert took["iteration captured"] < took["iteration"]
    assert took["floor captured"] < took["floor"]


def test_an_iteration_is_timed_beside_its_floor():
    block = small_block().requires_grad_(False)
    before = copy.deepcopy(block.state_dict())
    took = reconstruct.time_block(block, correlated(32, 3, 6, 6), QUICK, rounds=5)
    assert 0 < took["floor"] < took["iteration"] and took["evaluations"] > 0
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


def test_bf16_is_for_the_matmuls_alone():
    seen = []
    block, x, y, config = prepared(precision="bf16")
    block[0].register_forward_hook(lambda layer, args, out: seen.append(out.dtype))
    report = reconstruct_block(block, x, y, config)
    assert seen.count(torch.bfloat16) == config.iterations           # not the five evaluations
    assert seen.count(torch.float32) == len(seen) - config.iterations > 0
    assert all(p.dtype == torch.float32 for q in quantizers(block).values() for p in q.parameters())
    block, *_ = prepared()
    full = reconstruct_block(block, x, y, replace(config, precision="float32"))
    assert report.final_loss == pytest.approx(full.final_loss, rel=0.2)
    assert report.history != full.history


# ---- Activations ---------------------------------------------------------------------------------

def disturbed_lsq(symmetric, shift=0.0, bits=3):
    """An LSQ whose grid clips some of x, and x in double precision."""
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(3), dtype=torch.double) + shift
    q = LSQ.of(x, bits, symmetric)
    with torch.no_grad():
        q.log_step -= 0.4
    return q, x


@pytest.mark.parametrize("symmetric, shift, lo, zero", [
    (True, 0.0, -4, True), (True, 5.0, 0, True), (False, 0.7, 0, False)])
def test_an_activation_in_closed_form_and_by_gradcheck(symmetric, shift, lo, zero):
    q, x = disturbed_lsq(symmetric, shift)
    assert (q.lo, q.hi) == (lo, lo + 7) and (int(q.zero_point) == 0) == zero
    G = weight((7, 11), seed=9)
    x.requires_grad_()
    x_hat = q(x)
    x_hat.backward(G)
    step, z = float(q.log_step.detach().exp()), int(q.zero_point)
    code = (x.detach() / step).round() + z
    inside = ((code >= q.lo) & (code <= q.hi)).double()
    assert 0 < inside.sum() < inside.numel()
    k = code.clamp(q.lo, q.hi) - z
    torch.testing.assert_close(x_hat, step * k)
    torch.testing.assert_close(x.grad, inside * G)
    torch.testing.assert_close(q.log_step.grad, (G * step * (k - inside * x.detach() / step)).sum())
    # The frozen residual: round(u) = u + c; away from the bounds, where the clamp has its kinks.
    u = x.detach() / step
    c, smooth = u.round() - u, ((code != q.lo) & (code != q.hi)).double()

    def surrogate(x, log_step):
        lo, hi = (float(b - z) for b in (q.lo, q.hi))
        return smooth * log_step.exp() * (x / log_step.exp() + c).clamp(lo, hi)

    start = x.detach().clone().requires_grad_(), q.log_step.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(surrogate, start)
    surrogate(*start).backward(G)
    x.grad = q.log_step.grad = None
    q(x).backward(G * smooth)
    torch.testing.assert_close(x.grad, start[0].grad)
    torch.testing.assert_close(q.log_step.grad, start[1].grad)


def test_dropping_is_for_training_alone():
    q, x = disturbed_lsq(True)
    q.drop = 0.2
    torch.manual_seed(0)
    x_hat = q.eval()(x)
    assert torch.equal(q(x), x_hat)
    mixed = q.train()(x)
    kept = (mixed == x).double().mean()
    assert 0.05 < kept < 0.4 and ((mixed == x) | (mixed == x_hat)).all()


def test_a_large_activation_is_searched_on_a_part_that_knows_its_ends():
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        x[123_456] = sign * 50.0
        began = time.perf_counter()
        q = LSQ.of(x, 8, p=8.0)                                      # such a p minds outliers
        assert time.perf_counter() - began < 5
        assert float(q.log_step.detach().exp()) > 0.9 * 50 / 128


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("setting", ["B", "Q"])
@over_grids
def test_weights_and_activations_end_to_end(name, setting, symmetric):
    net, x, layers = tiny(name)
    full = net(x).detach()
    own = replace(QUICK, bits=8, abits=8, setting=setting, symmetric=symmetric)
    reports = quantize_model(net.blocks, x, own)
    # Near the float network at 8 bits; all tensors are named in the reports.
    assert float((net(x).detach() - full).norm() / full.norm()) < 0.1
    flat = [name for names in layers for name in names]
    passes = {"B": 2, "Q": 1}[setting]
    assert [n for r in reports for n in r.bits] == flat * passes
    assert [n for r in reports for n in r.abits] == flat
    assert len(input_quantizers(net)) == len(quantizers(net)) == len(flat)
    if symmetric and name == "resnet conv":                          # behind the ReLUs: unsigned
        signed = {n: q.signed for n, q in input_quantizers(net).items()}
        assert signed.pop("blocks.0.0") and not any(signed.values())
    # Grids are used: each layer gets at most 2^8 different values.
    seen = []
    layer = net.blocks[1].get_submodule(layers[1][0])
    layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].unique().numel()))
    net(x)
    assert 4 < seen[0] <= 256


def test_bits_of_activations():
    net, x, _ = tiny("resnet conv")
    reports = quantize_model(net.blocks, x, replace(QUICK, abits=4, setting="Q",
                                                    layer_bits={"1.conv1.0": 5}))
    bits = {f"{r.index}.{n}": b for r in reports for n, b in r.abits.items()}
    ends = {"0.0": 8, f"{len(net.blocks) - 1}.2": 8}
    assert bits == {**dict.fromkeys(bits, 4), **ends} and len(bits) > 4
    assert reports[1].bits["conv1.0"] == 5 and reports[1].abits["conv1.0"] == 4


def test_which_inputs_are_seen():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.twice(5 * self.twice(x.relu_()) - 2)         # in place, then negative, too

    block, x = Odd(), torch.randn(8, 3)
    before = x.clone()
    with pytest.warns(UserWarning, match="not called.*never"):
        made = flexround.quantize_inputs(block, x, {"twice": 4, "never": 4})
    assert torch.equal(x, before) and list(made) == ["twice"] and made["twice"].signed
    with pytest.raises(ValueError, match="'twice': its input is quantized already"):
        flexround.quantize_inputs(block, x, {"twice": 4})

    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    block = nn.Sequential(Named(3, 3))
    block.forward = lambda x: block[0](x=x)
    with pytest.raises(ValueError, match="layer '0' is called with keywords only"):
        flexround.quantize_inputs(block, x, {"0": 4})
    assert not block[0]._forward_pre_hooks


@pytest.mark.parametrize("setting", ["B", "Q"])
def test_a_sign_is_seen_on_all_calibration_inputs(setting):
    x = correlated(64, 6)
    x = x[x[:, 0].argsort()]
    x[:16].abs_()                                                    # sorted: the first batch is
    signed = []                                                      # nowhere negative
    for inputs in (x, x[16:], x.abs()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        quantize_model(net, inputs, replace(QUICK, bits=8, abits=8, batch_size=16, setting=setting))
        signed.append(input_quantizers(net)["0"].signed)
    assert signed == [True, True, False]


def test_inputs_that_are_quantized_already(tmp_path):
    net, x, _ = tiny("resnet conv")
    quantize_model(net.blocks, x, replace(QUICK, abits=4))
    file = tmp_path / "net.int"
    reconstruct.save_quantized(net, file)
    loaded = reconstruct.load_quantized(tiny("resnet conv")[0], file)
    y, count = loaded(x), len(input_quantizers(loaded))
    for abits in (None, 4):                                          # and all is as it was
        with pytest.raises(ValueError, match="'0.0'.* are quantized already"):
            quantize_model(loaded.blocks, x, replace(QUICK, abits=abits))
        assert torch.equal(loaded(x), y) and len(input_quantizers(loaded)) == count
    block, x, y, config = prepared()
    flexround.quantize_inputs(block, x, {"0": 4})
    with pytest.raises(ValueError, match=r"rounds the inputs of \['0'\], but abits = None"):
        reconstruct_block(block, x, y, config)


def test_a_layer_with_two_names_is_saved_under_both(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b, self.blocks = self.a, nn.ModuleList([self.a, nn.ReLU(), nn.Linear(6, 3)])

        def forward(self, x):
            return self.blocks[2](self.blocks[1](self.b(x)))

    torch.manual_seed(0)
    net, x = Twice(), correlated(32, 6)
    plain = copy.deepcopy(net)
    quantize_model(net.blocks, x, replace(QUICK, abits=4, setting="Q", end_bits=None))
    reconstruct.save_quantized(net, tmp_path / "net.int")
    loaded = reconstruct.load_quantized(plain, tmp_path / "net.int")
    assert torch.equal(loaded(x), net(x)) and not torch.equal(loaded(x), Twice()(x))
    assert loaded.a is loaded.b and len(loaded.a._forward_pre_hooks) == 1


@pytest.mark.parametrize("setting, method", [("B", "flexround"), ("Q", "flexround"), ("Q", "rtn")])
def test_rates_and_drops_of_the_settings(setting, method, monkeypatch):
    rates, dropped, adam, learn = [], set(), torch.optim.Adam.step, reconstruct.reconstruct_block

    def look(block, *args):
        dropped.update(q.drop for q in input_quantizers(block).values())
        return learn(block, *args)

    def spy(self, *args):
        rates.append([float(g["lr"]) for g in self.param_groups])
        return adam(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    monkeypatch.setattr(reconstruct, "reconstruct_block", look)
    net, x, _ = tiny("resnet conv")
    start = copy.deepcopy(net)
    own = replace(QUICK, method=method, abits=4, setting=setting, lr=0.01)
    quantize_model(net.blocks, x, own)
    assert (own.drop, dropped) == ((0.5, {0.5}) if setting == "Q" else (0.0, {0.0}))
    net.train()                                                      # learned: nothing drops
    assert torch.equal(net(x), net(x)) and torch.equal(net(x), net.eval()(x))
    assert not any(p.requires_grad for q in (*quantizers(net).values(),
                                             *input_quantizers(net).values())
                   for p in q.parameters())
    if method == "rtn":
        assert not rates
        return
    count, half = len(net.blocks) * 20, (1 + np.cos(np.pi / 2)) / 2
    first, tenth = ([0.01, 4e-5], [0.01 * half, 4e-5 * half]) if setting == "Q" else (
        [0.01], [0.01 * half])
    assert rates[0] == pytest.approx(first) and rates[10] == pytest.approx(tenth)
    if setting == "B":
        assert len(rates) == 2 * count
        assert rates[count] == pytest.approx([4e-4]) and rates[count + 10][0] == pytest.approx(2e-4)
    else:                                                            # the weights learn, too
        quantize_model(start.blocks, x, replace(own, method="rtn"))
        assert any(not torch.equal(q.S2, torch.ones_like(q.S2)) for q in quantizers(net).values())


def test_the_second_pass_has_the_float_networks_targets(monkeypatch):
    net, x, _ = tiny("resnet conv")
    floats, targets, inputs = copy.deepcopy(net), {}, {}
    learn = reconstruct.reconstruct_block

    def spy(block, x_q, y_fp, *args):
        inputs[args[2]], targets[args[2]] = x_q, y_fp                # the second pass's are last
        return learn(block, x_q, y_fp, *args)

    monkeypatch.setattr(reconstruct, "reconstruct_block", spy)
    quantize_model(net.blocks, x, replace(QUICK, abits=3))
    y, y_q = x, x
    for i, (block, quantized) in enumerate(zip(floats.blocks, net.blocks, strict=True)):
        torch.testing.assert_close(inputs[i], y_q)
        y, y_q = block(y).detach(), quantized(y_q).detach()
        torch.testing.assert_close(targets[i], y)


@pytest.mark.parametrize("method", ["rtn", "adaround", "flexround"])
def test_what_each_setting_learns(method):
    net, x, _ = tiny("resnet conv")
    alone = copy.deepcopy(net)
    quantize_model(alone.blocks, x, replace(QUICK, method=method))
    in_b = copy.deepcopy(net)
    reports = quantize_model(in_b.blocks, x, replace(QUICK, method=method, abits=3, step_lr=0.02))
    # B: the weights are what they are without activations; then the steps lower the loss.
    for q, p in zip(quantizers(alone).values(), quantizers(in_b).values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(q.parameters(), p.parameters(), strict=True))
    second = [r for r in reports if r.abits]
    assert any(r.final_loss < r.start_loss for r in second) == (method != "rtn")
    if method == "rtn":
        return
    in_q = copy.deepcopy(net)
    together = replace(QUICK, method=method, abits=3, setting="Q", step_lr=0.02)
    quantize_model(in_q.blocks, x, together)
    again = copy.deepcopy(net)
    quantize_model(again.blocks, x, together)
    assert torch.equal(in_q(x), again(x))                            # dropping has the seed's bits
    other = copy.deepcopy(net)
    quantize_model(other.blocks, x, replace(together, seed=1))
    assert not torch.equal(in_q(x), other(x))


def test_steps_and_hooks_come_and_go_with_their_layer(tmp_path):
    net, x, _ = tiny("resnet conv")
    plain = copy.deepcopy(net)
    own = replace(QUICK, abits=4, setting="Q", step_lr=0.02)
    quantize_model(net.blocks, x, own)
    twin = copy.deepcopy(plain)
    quantize_model(twin.blocks, x, replace(own, method="flexround", iterations=1))
    twin.load_state_dict(net.state_dict())                           # steps are in the state_dict
    assert torch.equal(twin(x), net(x))
    twin.double().float()
    y = net(x)
    with torch.no_grad():                                            # a copy has steps of its own
        for q in input_quantizers(twin).values():
            q.log_step += 1
    assert torch.equal(net(x), y) and not torch.equal(twin(x), y)
    reconstruct.save_quantized(net, tmp_path / "net.int")
    loaded = reconstruct.load_quantized(copy.deepcopy(plain), tmp_path / "net.int")
    assert torch.equal(loaded(x), y)
    assert not any(p.requires_grad for q in input_quantizers(loaded).values()
                   for p in q.parameters())
    file = torch.load(tmp_path / "net.int", weights_only=True)
    file["inputs"]["blocks.1.conv1.0"]["bits"] = 5
    torch.save(file, tmp_path / "net.int")
    with pytest.raises(ValueError, match="SHA-256"):
        reconstruct.load_quantized(copy.deepcopy(plain), tmp_path / "net.int")
    own_hook = twin.blocks[1].conv1[0].register_forward_pre_hook(lambda layer, args: None)
    with pytest.warns(UserWarning, match="float inputs again"):
        flexround.fold(twin)
    assert not input_quantizers(twin) and set(twin.state_dict()) == set(plain.state_dict())
    assert [m for m in twin.modules() if m._forward_pre_hooks] == [twin.blocks[1].conv1[0]]
    own_hook.remove()                                                # the user's stays until then
    assert not any(m._forward_pre_hooks for m in twin.modules())


def test_a_failing_second_pass_leaves_weights_quantized_and_inputs_float():
    first, second = small_block(), nn.Sequential(nn.Conv2d(16, 8, 3), Exploding(62))
    with pytest.raises(FloatingPointError, match="block 1, flexround.* iteration 12 of 50"):
        quantize_model([first, second], correlated(32, 3, 6, 6),
                       ReconstructionConfig(iterations=50, batch_size=8, abits=4))
    assert len(quantizers(first)) == len(input_quantizers(first)) == 2
    assert quantizers(second) and not input_quantizers(second)


# ---- The integers, out and back ------------------------------------------------------------------

@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_packed_at_their_true_width(bits):
    codes = torch.randint(0, 2 ** bits, (7, 3, 5), generator=torch.Generator().manual_seed(bits))
    data = reconstruct.pack(codes, bits)
    assert data.dtype == torch.uint8 and len(data) == -(-105 * bits // 8)
    assert torch.equal(reconstruct.unpack(data, bits, 105).view(7, 3, 5), codes)
    if bits == 3:                                                    # 5, 1, 7 by hand: 101 001 111
        packed = reconstruct.pack(torch.tensor([5, 1, 7]), 3)
        assert packed.tolist() == [0b11001101, 0b1]


@pytest.mark.parametrize("name", NETWORKS)
@over_methods
@over_grids
def test_saved_and_loaded_is_the_same_network(name, method, symmetric, tmp_path):
    net, x, _ = tiny(name)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.train().parameters():
            p.zero_()                                                # nothing of the old is left
    config = replace(QUICK, method=method, symmetric=symmetric, per_channel=method != "adaround",
                     iterations=3)
    quantize_model(net.blocks, x, config)
    y = net(x)
    size = reconstruct.save_quantized(net, tmp_path / "net.pt")
    assert size == (tmp_path / "net.pt").stat().st_size and len(list(tmp_path.iterdir())) == 1
    assert reconstruct.load_quantized(other, tmp_path / "net.pt") is other
    assert torch.equal(other(x), y) and not any(m.training for m in other.modules())
    fold(net)
    assert set(net.state_dict()) == set(other.state_dict())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items())


def test_a_wrong_file_is_refused_and_changes_nothing(tmp_path):
    net, x, _ = tiny("resnet conv")
    floats = copy.deepcopy(net)
    with pytest.raises(ValueError, match="no quantizers"):
        reconstruct.save_quantized(net, tmp_path / "no.pt")
    assert not list(tmp_path.iterdir())
    quantize_model(net.blocks, x, replace(QUICK, method="rtn"))
    path = tmp_path / "net.pt"
    reconstruct.save_quantized(net, path)
    good = torch.load(path, weights_only=True)

    def refuse(model, message, content=None):
        if content is not None:
            torch.save(content, path)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            reconstruct.load_quantized(model, path)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    wider = models.ResNet(widths=(4, 8), depth=1, channels=1)
    refuse(models.fold_batchnorm(wider), r"'blocks.2.conv1.0.\w+' is .*\(6, 4, 3, 3\)|\(6,\)")
    refuse(copy.deepcopy(floats).double(), "torch.float32.* in the file, .*torch.float64")
    refuse(tiny("mobilenet")[0], r"another architecture: 'blocks.1.\w+.*' is only in the file")
    refuse(floats, "version 3; this code reads up to version 2", {**good, "version": 3})
    refuse(floats, "not a file of save_quantized", floats.state_dict())
    for key in set(good) - {"inputs"}:                               # version 1 had no inputs
        refuse(floats, "not a file of save_quantized", {k: v for k, v in good.items() if k != key})
    refuse(floats, "damaged", {**good, "codes": good["codes"][:-3]})
    refuse(floats, "SHA-256", {**good, "codes": good["codes"] ^ 1})
    assert good["layers"]["blocks.0.0"]["axis"] is None
    torch.save(good, path)
    path.write_bytes(path.read_bytes()[:-50])
    refuse(floats, "truncated")
    with pytest.raises(FileNotFoundError):
        reconstruct.load_quantized(floats, tmp_path / "none.pt")


def test_a_tied_architecture_does_not_take_an_untied_file(tmp_path):
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False))
    tied = copy.deepcopy(net)
    tied[1].weight = tied[0].weight
    quantize_layers(net, ReconstructionConfig(bits=3))
    reconstruct.save_quantized(net, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="are one tensor in the model"):
        reconstruct.load_quantized(tied, tmp_path / "net.pt")


def test_a_failing_save_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    net = nn.Linear(4, 4)
    quantize_layers(net, ReconstructionConfig(bits=3, per_channel=True))
    path = tmp_path / "net.pt"
    reconstruct.save_quantized(net, path)
    assert torch.load(path, weights_only=True)["layers"][""]["axis"] == 0
    old = path.read_bytes()

    def fail(file, out):
        out.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        reconstruct.save_quantized(net, path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        reconstruct.save_quantized(net, tmp_path / "nowhere" / "net.pt")


@over_shapes
@over_grids
@over_scope
def test_any_round_to_nearest_tool_recovers_the_codes(shape, symmetric, per_channel):
    """README: W / (S2 s3 s4) rounded to nearest on the grid (s1, zero_point)."""
    q, W = disturbed(shape, 3, symmetric, per_channel)
    with torch.no_grad():
        V = W / (q.S2 * q.s3 * (1 if q.s4 is None else q.s4))
        theirs = (torch.round(V / q.s1) + q.zero_point).clamp(q.lo, q.hi)
    assert torch.equal(theirs.int(), q.codes(W))


@pytest.mark.parametrize("make", [LAYERS[k] for k in LAYERS if k not in
                                  ("dilated, reflected", "same, circular", "subclass")])
@over_grids
@over_scope
def test_a_layer_in_integers_equals_the_simulated_one(make, symmetric, per_channel):
    layer = make()
    config = ReconstructionConfig(bits=4, symmetric=symmetric, per_channel=per_channel)
    quantize_layers(layer, config)
    x = 3 * inputs_of(layer) + 1
    q_x = RoundToNearest(x, 8, symmetric=False)
    with torch.no_grad():
        simulated = layer(q_x(x))
        y = flexround.integer_forward(layer, q_x.codes(x), q_x.s1, q_x.zero_point)
    torch.testing.assert_close(y, simulated, rtol=1e-4, atol=1e-4)
    assert (y - layer(x)).abs().max() > 1e-3                         # the inputs were rounded, too
    with pytest.raises(ValueError, match="is allowed"):
        flexround.integer_forward(fold(layer), q_x.codes(x), q_x.s1, q_x.zero_point)


@pytest.mark.parametrize("name", ["dilated, reflected", "same, circular", "subclass"])
def test_a_layer_that_integers_cannot_compute_is_refused(name):
    layer = LAYERS[name]()
    quantize_layers(layer, ReconstructionConfig(bits=4))
    with pytest.raises(ValueError, match="is allowed"):
        flexround.integer_forward(layer, torch.zeros(1, 4, 9, 9), torch.ones(()), torch.zeros(()))


def test_save_and_load_from_the_command_line(tmp_path):
    string = "the quick brown fox jumps over the lazy dog; " * 300
    (tmp_path / "text.txt").write_text(string)
    (tmp_path / "cache").mkdir()
    net = models.GPT(len(set(string)), context=64, layers=3, heads=4, width=64)
    torch.save(net.state_dict(), tmp_path / "cache" / f"gpt-{models.fingerprint(string)}.pt")
    same = ["--model", "gpt", "--data", "text.txt", "--samples", "16"]
    done = command(*same, "--method", "flexround", "--bits", "4", "--iterations", "2",
                   "--save", "q.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = command(*same, "--load", "q.pt", cwd=tmp_path)           # a new process
    assert again.returncode == 0, again.stderr
    assert "sha256" in again.stdout
    assert again.stdout.split("score")[1].strip() in done.stdout
    wrong = command(*same, "--save", "q.pt", cwd=tmp_path)
    assert wrong.returncode == 1 and "--save takes one each of --model" in wrong.stderr
    one = ["--method", "flexround", "--bits", "4", "--save"]
    for extra, message in (([*one, "q.pt", "--bits", "4", "3"], "--save takes one"),
                           ([*one, "q.pt", "--load", "q"], "--save takes one"),
                           ([*one, "nowhere/q.pt"], "there is no such folder")):
        assert message in command(*same, *extra, cwd=tmp_path).stderr


# ---- 6. Bad input --------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, message", [
    ({"bits": 1}, "bits = 1: an integer from 2 to 8"),
    ({"bits": 9}, "bits = 9: an integer from 2 to 8"),
    ({"bits": 4.0}, "bits = 4.0: an integer from 2 to 8"),
    ({"bits": True}, "bits = True"),
    ({"end_bits": 16}, "end_bits = 16: an integer from 2 to 8"),
    ({"layer_bits": {"0.a": 1}}, r"layer_bits\['0.a'\] = 1"),
    ({"method": "gptq"}, "method = 'gptq': rtn or adaround or adaquant or flexround"),
    ({"iterations": 0}, "iterations = 0: an integer of at least 1"),
    ({"batch_size": 0}, "batch_size = 0"),
    ({"batch_size": 2.5}, "batch_size = 2.5"),
    ({"seed": -1}, "seed = -1"),
    ({"lr": 0.0}, "lr = 0.0: a positive number"),
    ({"lr": float("nan")}, "lr = nan"),
    ({"input_drop": 1.5}, "input_drop = 1.5: a probability from 0 to 1"),
    ({"p": 0}, "p = 0: a positive number"),
    ({"p": float("inf")}, "p = inf"),
    ({"lr": "1e-3"}, "lr = '1e-3': a positive number"),
    ({"symmetric": "no"}, "symmetric = 'no': True or False"),
    ({"layer_bits": None}, "layer_bits = None: a dict"),
    ({"cache_dtype": "int8"}, "cache_dtype = 'int8': float32 or bfloat16 or float16 or None"),
    ({"optimizer": "adamw"}, "optimizer = 'adamw': adam or sgd"),
    ({"optimizer": "sgd"}, "optimizer = 'sgd' needs an lr"),
    ({"abits": 9}, "abits = 9: an integer from 2 to 8"),
    ({"setting": "C"}, "setting = 'C': B or Q"),
    ({"setting": "Q"}, "setting = 'Q', step_lr = None: .*need abits"),
    ({"step_lr": 0.1}, "step_lr = 0.1: .*need abits"),
    ({"abits": 4, "optimizer": "sgd", "lr": 0.1}, "'sgd' needs an lr, with abits a step_lr"),
    ({"abits": 4, "setting": "Q", "input_drop": 0.3}, "input_drop = 0.3: setting Q takes 0.5"),
    ({"step_lr": 0}, "step_lr = 0: a positive number"),
    ({"precision": "fp8"}, "precision = 'fp8': float32 or tf32 or bf16"),
])
def test_a_setting_that_is_not_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionConfig(**settings)


@over_methods
def test_a_weight_that_cannot_be_quantized(method):
    cls = METHODS[method]
    for bits in (1, 9, 2.0, "4"):
        with pytest.raises(ValueError, match="an integer from 2 to 8"):
            cls(weight((3, 3)), bits)
    for W, message in ((torch.ones(3), r"shape \(3,\)"), (torch.ones(3, 3, 3), r"\(3, 3, 3\)"),
                       (torch.ones(0, 3), r"\(0, 3\)"), (torch.ones(3, 3).char(), "int8"),
                       (torch.tensor([[1.0, float("nan")]]), "NaN"),
                       (torch.tensor([[1.0, float("inf")]]), "infinity")):
        with pytest.raises(ValueError, match=message):
            cls(W, 4)
    with pytest.raises(ValueError, match="p = -1"):
        cls(weight((3, 3)), 4, p=-1)


def test_layers_that_cannot_be_quantized_leave_the_block_unchanged():
    def refuse(net, message, *arguments):
        keys = list(net.state_dict())
        with pytest.raises(ValueError, match=message):
            quantize_layers(net, ReconstructionConfig(), *arguments)
        assert list(net.state_dict()) == keys

    def make():
        return nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4))

    refuse(make(), r"layer_bits names '7' \(no such layer\).*\['0', '2'\]", {"7": 4})
    refuse(make(), r"layer_bits names '1' \(Conv1d\)", {"1": 4})
    refuse(make(), "skip names '1'", None, ("1",))
    refuse(make(), "bits = 12", {"2": 12})
    net = make()
    with torch.no_grad():
        net[2].weight[1, 1] = float("nan")
    refuse(net, "layer '2': its weight holds NaN")
    net = make()
    net[2].weight = net[0].weight
    refuse(net, "layers '0' and '2' share one weight")
    net = make()
    quantize_layers(net, ReconstructionConfig())
    refuse(net, "layer '0' has a parametrization")
    refuse(nn.Sequential(nn.Linear(4, 4), prune.identity(nn.Linear(4, 4), "weight")),
           "layer '1' has .* pruning")
    refuse(nn.Sequential(parametrize.register_parametrization(
        nn.Linear(2, 2), "weight", nn.Identity())), "has a parametrization")


def test_bad_calibration_is_refused_before_any_work():
    net, x, _ = tiny("resnet conv")
    keys = list(net.state_dict())
    bad = x.clone()
    bad[3, 0, 2, 2] = float("nan")
    for calibration, message in ((x[:0], r"shape \(0, 1, 8, 8\)"), (bad, "calibration holds NaN"),
                                 (bad.nan_to_num(float("inf")), "infinity"), ("images", "is str"),
                                 (torch.tensor(1.0), r"shape \(\)"),
                                 (x.repeat(1, 2, 1, 1), "block 0 does not run")):
        with pytest.raises(ValueError, match=message):
            quantize_model(net.blocks, calibration, QUICK)
    for config, message in ((replace(QUICK, layer_bits={"1.conv9": 4}), "names '1.conv9'"),):
        with pytest.raises(ValueError, match=message):
            quantize_model(net.blocks, x, config)
    assert list(net.state_dict()) == keys


def test_networks_that_cannot_be_quantized_are_refused_before_any_work():
    def refuse(blocks, message, x=None):
        with pytest.raises(ValueError, match=message):
            quantize_model(blocks, torch.randn(9, 4) if x is None else x, QUICK)
        assert not any(quantizers(b) for b in blocks)

    layer = nn.Linear(4, 4)
    for blocks in (layer, {"a": layer}, [print], 3):
        with pytest.raises(ValueError, match="a list of modules"):
            quantize_model(blocks, torch.randn(9, 4), QUICK)
    with pytest.raises(ValueError, match="the network is in torch.float16"):
        quantize_model([nn.Linear(4, 4).half()], torch.randn(9, 4), QUICK)
    refuse([nn.ReLU()], "nothing to quantize")
    refuse([], "nothing to quantize")
    refuse([layer, nn.Sequential(nn.ReLU(), layer)], "stands in an earlier block")
    twin = nn.Linear(4, 4)
    twin.weight = layer.weight
    refuse([layer, twin], "'0' and '1' share one weight")
    refuse([nn.Linear(4, 4), nn.Linear(5, 4)], "block 1 does not run")

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    refuse([nn.Linear(4, 4), Pair(4, 4)], "block 1 returns tuple")
    broken = nn.Linear(4, 4)
    with torch.no_grad():
        broken.weight[0, 0] = float("inf")
    refuse([nn.Linear(4, 4), broken], "layer '1': its weight holds NaN or infinity")
    quantized = nn.Linear(4, 4)
    quantize_layers(quantized, QUICK)
    with pytest.raises(ValueError, match="has a parametrization"):
        quantize_model([nn.Linear(4, 4), quantized], torch.randn(9, 4), QUICK)


def test_bad_inputs_of_one_block():
    block, x, y, config = prepared()
    for args, message in (((x, y[:, :1]), r"has \(8, 1, 6, 6\)"),
                          ((x[:5], y), "{'x_q': 5, 'y_fp': 32}"), ((x[:0], y[:0]), "shape"),
                          ((x, y * float("nan")), "y_fp holds")):
        with pytest.raises(ValueError, match=message):
            reconstruct_block(block, *args, config)
    with pytest.raises(ValueError, match="needs x_fp"):
        reconstruct_block(block, x, y, replace(config, input_drop=0.5))
    with pytest.raises(ValueError, match="no quantizers"):
        reconstruct_block(small_block(), x, y, config)
    with pytest.raises(ValueError, match="block 0 holds FlexRound: adaround is needed"):
        reconstruct_block(block, x, y, replace(config, method="adaround"))
    with pytest.raises(ValueError, match="torch.bfloat16: float32 and float64"):
        reconstruct_block(block.bfloat16(), x.bfloat16(), y.bfloat16(), config)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference mode"):
        reconstruct_block(block, x, y, config)


def test_what_is_not_done_as_asked_is_said():
    block, x, y, config = prepared(batch_size=100, iterations=2)
    with pytest.warns(UserWarning, match="batch_size = 100, but there are only 32"):
        reconstruct_block(block, x, y, config)
    with pytest.warns(UserWarning, match=r"stay float: \['0.1 \(Conv1d\)'\]"):
        block = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(1, 1, 1))
        quantize_model([block], torch.randn(9, 1, 4), QUICK)
    with pytest.warns(UserWarning, match="no layer is left at bits = 3: .*'0.0': 8, '1.0': 8"):
        blocks = [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]
        quantize_model(blocks, torch.randn(9, 4), replace(QUICK, bits=3))
    with pytest.warns(UserWarning, match="no layer is left at abits = 4: .*'0.0': 8, '1.0': 8"):
        blocks = [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]
        quantize_model(blocks, torch.randn(9, 4), replace(QUICK, bits=8, abits=4))
    net, x, _ = tiny("gpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")                               # nothing to say of these
        quantize_model(net.blocks, x, QUICK)


@pytest.mark.parametrize("arguments, message", [
    (["--bits", "9"], "bits = 9: an integer from 2 to 8 is allowed"),
    (["--model", "resnet20"], "--data"),
    (["--model", "resnet20", "--data", "nowhere"], "no data_batch_*.bin in nowhere"),
    (["--model", "gpt", "--data", "nowhere.txt"], "nowhere.txt"),
    (["--lr", "-1"], "lr = -1.0"),
    (["--lr", "0"], "lr = 0.0"),
    (["--method", "gptq"], "method = 'gptq': rtn or adaround"),
    (["--device", "nowhere"], "--device nowhere: "),
    (["--cache-device", "nowhere"], "--cache-device nowhere: "),
    (["--model", "resnet", "--rescale", "0"], "rescale = 0.0: a positive number"),
    (["--batch-size", "0"], "batch_size = 0"),
    (["--study", "x", "--results", "nowhere/x"], "--results nowhere/x: there is no such folder"),
    (["--model", "resnet50"], "resnet50 needs ImageNet's folder (--data)"),
    (["--model", "resnet18", "--data", "nowhere"], "nowhere must hold train and val"),
    (["--model", "gpt2", "--data", "nowhere"], "no wiki.test.raw and no wikitext2.test.txt"),
    (["--model", "gpt", "--rescale", "2"], "rescale = 2.0: a positive number is"),
    (["--model", "shakespeare"], "--data"),
    (["--model", "resnet", "--samples", "5000"], "samples = 5000: 1 to 1199 are allowed"),
])
def test_a_wrong_command_line_gives_one_line(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    torch.save(models.ResNet(widths=(8, 16, 32), depth=1, channels=1).state_dict(),
               tmp_path / "cache" / "digits-resnet.pt")
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("reconstruct.py: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


# ---- 7. README -----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def python_blocks():
    """The README's python code blocks, each with the plain block that follows it, its output."""
    return re.findall(r"```python\n(.*?)```\n(?:\s*```\n(.*?)```)?", README, re.S)


def numbers(output):
    """The numbers of an output, and the output with these taken out."""
    return [float(n) for n in re.findall(r"\d+\.\d+", output)], re.sub(r"\d+\.\d+", "#", output)


@pytest.mark.parametrize("block", range(4))
def test_the_readmes_code_prints_what_it_says(block, tmp_path):
    code, said = python_blocks()[block]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    (printed, text), (expected, expected_text) = numbers(done.stdout), numbers(said)
    assert text == expected_text
    # Training amplifies float noise, so other machines print other digits.
    assert printed == pytest.approx(expected, rel=0.3, abs=2e-4)
    assert len(python_blocks()) == 4 and len(python_blocks()[0][0].splitlines()) <= 12


def test_the_readmes_map_names_what_is_there():
    rows = README.split("| in the paper | here |")[1].split("\n\n")[0]
    names = re.findall(r"`([\w.]+)`", rows)
    dotted = [n for n in names if "." in n]
    assert len(dotted) > 15
    for name in dotted:
        thing = sys.modules[__name__ if name.startswith("test_flexround") else name.split(".")[0]]
        for part in name.split(".")[1:]:
            thing = getattr(thing, part)
    for name in set(names) - set(dotted):
        assert name in ReconstructionConfig.__dataclass_fields__, name


def test_the_readmes_tables_are_the_files():
    """Each table between marks is drawn anew from docs/results.jsonl; no study is left out."""
    records = reconstruct.read_results(HERE / "docs" / "results.jsonl")
    marked = dict(re.findall(r"<!-- study: ([\w-]+) -->\n(.*?)\n\n", README, re.S))
    assert set(marked) == {r["study"] for r in records}
    for study, shown in marked.items():
        runs = [r for r in records if r["study"] == study]
        assert shown == reconstruct.table(runs), study
        # What the table hides has to be one and the same: no run twice, one machine's torch.
        keys = [(r["network"], r["about"], tuple(map(str, r["config"].values()))) for r in runs]
        assert len(set(keys)) == len(keys), study


def test_the_readmes_links_files_and_flags_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (HERE / target).exists(), target
    known = {flag for action in reconstruct.parser()._actions for flag in action.option_strings}
    commands = re.findall(r"^python reconstruct.py.*", README, re.M)
    flags = {flag for line in commands for flag in re.findall(r"--[\w-]+", line)}
    assert flags and flags <= known, flags - known


def test_ci_runs_the_readmes_commands():
    run = (HERE / ".ci" / "run").read_text()
    assert "grep -oE -m1 '^pip install -r requirements.txt' README.md" in run
    assert "grep -oE -m1 '^python -m pytest' README.md" in run
    assert re.search(r"^pip install -r requirements.txt && python reconstruct.py$", README, re.M)
    assert re.search(r"^python -m pytest$", README, re.M)
    assert "grep -oE -m1 '^FLEXROUND_FAST=1 jupyter execute demo.ipynb' README.md" in run
    assert re.search(r"^FLEXROUND_FAST=1 jupyter execute demo.ipynb$", README, re.M)


# ---- 8. The notebook, as committed; continuous integration executes it ---------------------------

NOTEBOOK = HERE / "demo.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [c for c in CELLS if c["cell_type"] == "code"]
OUTPUTS = [o for c in CODE for o in c["outputs"]]


def shown(kind):
    """What the notebook's outputs hold of one MIME type, as strings."""
    return ["".join(o["data"][kind]) for o in OUTPUTS if kind in o.get("data", {})]


def test_the_notebook_is_one_whole_run():
    assert [c["execution_count"] for c in CODE] == list(range(1, len(CODE) + 1))
    kinds = {(o["output_type"], o.get("name")) for o in OUTPUTS}
    assert not any("error" in kind or "stderr" in kind for kind in kinds), kinds
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 2 ** 20
    said = json.dumps([o for o in OUTPUTS if "image/png" not in o.get("data", {})])
    said += "".join(shown("text/plain"))
    assert not re.search(r"/(tmp|home|root|work|Users|usr|opt)/|site-packages", said)
    assert "full setting" in said                                    # not the shortened one
    assert sum("image/png" in o.get("data", {}) for o in OUTPUTS) >= 8


def test_the_notebook_defines_no_algorithm():
    source = "\n".join("".join(c["source"]) for c in CODE)
    assert not re.search(r"^\s*class |optim\.|autograd", source, re.M)
    assert set(re.findall(r"^def (\w+)", source, re.M)) <= {"load", "setting", "quantized", "runs",
                                                           "chart", "parts", "shifts", "share",
                                                           "scatter"}


def test_readme_notebook_and_results_file_agree():
    records = reconstruct.read_results(HERE / "docs" / "results.jsonl")
    tables = "\n".join(shown("text/markdown"))
    runs = {study: [r for r in records if r["study"] == study]
            for study in ("resnet20", "mobilenet", "shakespeare", "ablation")}
    runs["ablation"] = [r for r in runs["mobilenet"] if r["config"]["method"] == "flexround"
                        ] + runs["ablation"]                         # beside FlexRound whole
    for study, those in runs.items():
        assert reconstruct.table(those) in tables, study
    # The picture of these is the README's.
    picture = (HERE / re.search(r"!\[[^]]*\]\((docs/\S+\.png)\)", README)[1]).read_bytes()
    assert picture in [base64.b64decode(png) for png in shown("image/png")]
    # What the notebook ran itself are the README's first runs again, with 4 bits besides.
    live, first = {}, rows_of(README.split("<!-- study: main -->")[1].split("\n\n")[0])
    for printed in shown("text/markdown"):                           # act 6's come later
        if printed.startswith("| network | bits"):
            live = {**rows_of(printed.split("\n\n")[0]), **live}
    seconds = re.compile(r"\d+ s")
    for (network, bits), cells in first.items():
        for column, cell in cells.items():
            method = column.split(",")[0]
            again = next(c for k, c in live[network, bits].items() if k.split(",")[0] == method)
            assert seconds.sub("", again) == seconds.sub("", cell), (network, bits, method)
