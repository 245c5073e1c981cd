"""Guards: what may go wrong with a user's own layers, blocks, networks, settings and inputs.

test_flexround.py shows how the method works. These tests keep what was once wrong from coming back.
"""
import copy
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import flexround
import reconstruct
from flexround import (
    RoundToNearest,
    fold,
    input_quantizers,
    quantize_layers,
    quantizers,
)
from helpers import (
    LEARNED,
    NETWORKS,
    QUICK,
    correlated,
    equal_states,
    over_methods,
    prepared,
    rates_of_adam,
    small_block,
    tiny,
    weight,
)
from reconstruct import ReconstructionConfig, quantize_model, reconstruct_block

# ---- 1. Grids ------------------------------------------------------------------------------------

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
    rough = flexround.qr_factor(layer, autocast)
    torch.testing.assert_close(rough.abs(), R.abs(), rtol=0.1, atol=1)
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


class Odd(nn.Module):
    """A block that calls its layers twice, never, by keyword and with no rows, as an expert without
    tokens is called. It works in place on its input."""

    def __init__(self):
        super().__init__()
        self.twice, self.never, self.named, self.empty = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        y = self.twice(self.named(input=self.twice(x.relu_())) - 2)
        self.empty(x[:0])
        x.zero_()
        return y

    def calls_of_twice(self, x):
        first = x.relu()
        return [first, self.named(self.twice(first)).detach() - 2]


def test_a_start_on_outputs_needs_inputs_and_a_layer_that_is_called():
    """A layer that gets no inputs has no outputs, so that its start is the one on weights."""
    torch.manual_seed(0)
    block, x = Odd(), correlated(32, 4)
    kept = x.clone()
    config = ReconstructionConfig(bits=3, start="outputs")
    with pytest.raises(ValueError, match="start = 'outputs' needs x"):
        quantize_layers(block, config)
    grids = {}
    for name, layer in block.named_children():
        grids[name] = flexround.grid_from_weights(layer.weight, 3)
    on_weights = grids["twice"][0]
    grids["twice"] = flexround.grid_from_outputs(block.twice, block.calls_of_twice(x), 3)
    assert grids["twice"][0] != on_weights
    for name, q in quantize_layers(block, config, x=x).items():
        assert torch.equal(q.log_s1, grids[name][0])
    assert torch.equal(x, kept)


def test_a_start_on_outputs_looks_at_the_first_64_float_inputs():
    """All methods share this start, so that it must not depend on how well a block has learned."""
    torch.manual_seed(0)
    blocks, x = [nn.Linear(4, 4), nn.Linear(4, 4)], torch.randn(96, 4)
    x[32:64, 0] *= 4                                                 # each third asks for its own
    x[64:, 1] *= 16
    with torch.no_grad():
        expected = [flexround.grid_from_outputs(blocks[0], [x[:64]], 2),
                    flexround.grid_from_outputs(blocks[1], [blocks[0](x[:64])], 2)]
    quantize_model(blocks, x, replace(QUICK, method="rtn", bits=2, end_bits=None, start="outputs"))
    for block, (log_s1, _) in zip(blocks, expected, strict=True):
        assert torch.equal(quantizers(block)[""].log_s1, log_s1)


# ---- 2. Quantizers on layers ---------------------------------------------------------------------

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


@pytest.mark.parametrize("required", [True, False])
def test_a_folded_weight_requires_a_gradient_where_the_float_one_did(required):
    """A user freezes a network for a reason, and fold makes a new Parameter."""
    layer = nn.Linear(5, 5).requires_grad_(required)
    quantize_layers(layer, ReconstructionConfig(bits=2))
    assert fold(layer).weight.requires_grad == required


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


def test_single_layers_have_their_own_bits_and_the_configs_switches_arrive():
    """A wrong default here would quantize otherwise than the user asked, without a word."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5), nn.Linear(5, 5))
    made = quantize_layers(net, ReconstructionConfig(bits=3), {"0": 3, "2": 8})
    assert {name: q.bits for name, q in made.items()} == {"0": 3, "2": 8}
    assert type(net[3]) is nn.Linear and quantizers(net) == made
    config = ReconstructionConfig(symmetric=False, per_channel=True, p=1.5, learn_s1=False,
                                  use_s3_s4=False)
    s1, z = flexround.grid_from_weights(net[3].weight, 4, False, True, 1.5)
    q = quantize_layers(net[3], config)[""]
    assert torch.equal(q.log_s1, s1) and torch.equal(q.zero_point, z)
    assert [n for n, _ in q.named_parameters()] == ["log_S2"]


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


# ---- 3. One block --------------------------------------------------------------------------------

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


class OneRate(flexround.AdaQuant):
    """A rule of one's own without a rate for log s1, which then learns with lr."""

    default_lr, default_s1_lr = 2e-3, None


@pytest.mark.parametrize("method, lr, s1_lr, firsts", [           # a second one is log s1's
    ("flexround", 0.01, None, [0.01, 8e-3]), ("flexround", None, None, [3.2e-2, 8e-3]),
    ("adaquant", None, None, [4e-3, 4e-3]), ("adaquant", 0.01, None, [0.01, 4e-3]),
    ("adaround", None, 0.2, [0.3]), ("one", None, None, [2e-3, 2e-3])])
def test_the_first_rates_are_the_methods_own_or_as_set(method, lr, s1_lr, firsts, monkeypatch):
    """A rate that goes to another group, or a default that changes, would move all results."""
    monkeypatch.setitem(flexround.METHODS, "one", OneRate)
    with rates_of_adam() as rates:
        reconstruct_block(*prepared(method, iterations=1, lr=lr, s1_lr=s1_lr))
    assert rates == [firsts]


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
            assert float((p - start[key]).detach().abs().max()) == pytest.approx(rate, rel=1e-3)


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


def test_a_pass_learns_only_what_it_has_placed():
    """A layer that is called by keyword gets no LSQ. In setting B's second pass its block therefore
    has nothing to learn. It must not learn its weights again."""
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(input=x)

    config = replace(QUICK, abits=4, end_bits=None, iterations=8)
    with pytest.warns(UserWarning, match="so their inputs stay float: .'layer'."):
        reports = quantize_model([nn.Linear(4, 4), ByKeyword()], correlated(16, 4), config)
    assert [(r.index, len(r.history)) for r in reports] == [(0, 8), (1, 8), (0, 8), (1, 0)]


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


# ---- 4. Networks ---------------------------------------------------------------------------------

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
    config, whole = replace(QUICK, iterations=4, **settings), copy.deepcopy(net)
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
        quantize_model([by_hand, nn.Linear(4, 4), nn.Linear(4, 4)], torch.ones(9, 4), QUICK)


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


# ---- 5. Activations ------------------------------------------------------------------------------

@pytest.mark.parametrize("symmetric", [True, False])
def test_an_activation_is_dropped_in_train_mode_alone_and_may_be_in_half_precision(symmetric):
    """A value that stayed float in use would not be what was measured."""
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    q = flexround.LSQ.of(x, 3, symmetric, keep_float=0.2)
    x_hat = q.eval()(x)
    mixed = q.train()(x)
    kept = mixed == x
    assert 0.05 < kept.double().mean() < 0.4 and (kept | (mixed == x_hat)).all()
    assert len(x_hat.unique()) <= 8 and not (x_hat == x).any()
    half = x.half()                                                  # of a network in .half()
    q, exact = (flexround.LSQ.of(h, 8, symmetric).half() for h in (half, half.float()))
    assert torch.equal(q(half), exact.float()(half.float()).half())


@pytest.mark.parametrize("name, setting, symmetric",
                         [*zip(NETWORKS, "BQBQ", (True, False, False, True), strict=True)])
def test_weights_and_activations_end_to_end(name, setting, symmetric):
    """At 8 bits all is near the float network, and each layer's input lies on its grid."""
    net, x, layers = tiny(name)
    full = net(x).detach()
    own = replace(QUICK, bits=8, abits=8, setting=setting, symmetric=symmetric, iterations=4)
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
    torch.manual_seed(0)
    block, x = Odd(), 30 * torch.randn(8, 4)
    before, first, both = x.clone(), x.relu(), torch.cat(block.calls_of_twice(x))
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
        own = replace(QUICK, abits=4, setting="Q", start="outputs", learn_s1=False, iterations=1)
        quantize_model(net.blocks, x, own)
        grids.append([q.log_s1.tolist() for q in quantizers(net).values()])
    assert grids[0] == grids[1]


def test_a_sign_is_seen_on_all_calibration_inputs():
    """Steps start on a sample of one batch, so what lies elsewhere must not be forgotten."""
    for batch in range(5):                                           # only there it is negative
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), correlated(64, 6).abs()
        x[16 * batch:, 2][:1] = -0.1                                 # 4: nowhere
        own = replace(QUICK, bits=8, abits=8, batch_size=16, iterations=1)
        quantize_model(net, x, own)
        assert input_quantizers(net)["0"].signed == (batch < 4)
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    for x[123_456] in (50.0, -50.0):
        assert float(flexround.LSQ.of(x, 8, p=8.0).log_step.exp().detach()) > 0.9 * 50 / 128


@pytest.mark.parametrize("setting", ["B", "Q"])
def test_rates_and_drops_of_the_settings(setting, monkeypatch):
    """Section 4 states these numbers, and after learning nothing may drop any more."""
    dropped, learn = set(), reconstruct.reconstruct_block

    def look(block, *args):
        dropped.update(q.keep_float for q in input_quantizers(block).values())
        return learn(block, *args)

    monkeypatch.setattr(reconstruct, "reconstruct_block", look)
    net, x, _ = tiny("resnet conv")
    own = replace(QUICK, abits=4, setting=setting, lr=0.01, s1_lr=0.02)
    with rates_of_adam() as rates:
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


def test_steps_and_hooks_come_and_go_with_their_layer():
    """A copy has steps of its own, state_dict has them, and fold leaves the user's hooks alone."""
    net, x, _ = tiny("resnet conv")
    plain, twin = copy.deepcopy(net), copy.deepcopy(net)
    own = replace(QUICK, abits=4, setting="Q", step_lr=0.02, iterations=4)
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


# ---- 6. Bad input --------------------------------------------------------------------------------

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
            ([nn.Linear(4, 4)], {}, r"all layers are a first or a last one .*: \[\{'': 8\}\]"),
            ([nn.Linear(4, 4)], {"bits": 8, "abits": 4}, "all layers are a first or a last one")):
        with pytest.warns(UserWarning) as said:
            quantize_model(blocks, torch.randn(9, 1, 4), replace(QUICK, iterations=1, **settings))
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
