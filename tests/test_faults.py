"""Faults of other people's bug reports: nothing silent, nothing lost, each message names its cause.

Each test is a kind of fault, in a network that is as small as it can be.
"""
import copy
import functools
import os
import random
import resource
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import flexround
import models
from experiments.integers import (
    checksum,
    integer_forward,
    load_quantized,
    save_quantized,
    weight_of,
)
from flexround import RoundToNearest, fold, input_quantizers, quantize_layers, quantizers
from helpers import ROOT
from reconstruct import ReconstructionConfig, bits_of_layers, quantize_model


def config(**settings):
    defaults = {"bits": 3, "end_bits": None, "iterations": 4, "batch_size": 16}
    return ReconstructionConfig(**{**defaults, **settings})


def quantize(blocks, x, skip=(), **settings):
    return quantize_model(blocks, x, config(**settings), show=False, skip=skip)


def data(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net_of(*layers):
    """A small network, the same in each call."""
    torch.manual_seed(0)
    return nn.Sequential(*(layer() for layer in layers)).eval()


def mlp():
    return net_of(lambda: nn.Linear(8, 8), nn.ReLU, lambda: nn.Linear(8, 4))


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


# ---- Calibration inputs --------------------------------------------------------------------------

@pytest.mark.parametrize("symmetric", [True, False])
def test_the_order_of_the_inputs_decides_no_step_size(symmetric):
    """Blank inputs in front would give the step size of zeros, and dim ones a tiny one."""
    x = data(256, 8).abs()
    blank, dim = torch.cat([torch.zeros(32, 8), x]), torch.cat([x[:32] / 100, x[32:]])
    steps = []
    for inputs in (x, blank, dim):
        net = mlp()
        quantize(net, inputs, method="rtn", abits=8, symmetric=symmetric, batch_size=32)
        steps.append(torch.stack([q.log_step for q in input_quantizers(net).values()]).exp())
    for others in steps[1:]:
        assert (others / steps[0] - 1).abs().max() < 0.5             # before: 0.01 and 250 times


def test_the_order_of_the_inputs_decides_no_start_on_outputs():
    x = data(512, 16)
    x[:, 0] *= 0.01
    found = []
    for inputs in (x, torch.cat([torch.zeros(64, 16), x])):
        layer = net_of(lambda: nn.Linear(16, 16))
        layer[0].weight.data[:, 0] *= 20
        y = layer(x).detach()
        quantize(layer, inputs, method="rtn", start="outputs")
        found.append(float(((layer(x) - y).norm() / y.norm()).detach()))
    assert max(found) < 0.2                                          # before: 0.97, blank first


def test_the_draw_is_the_blocks_seed():
    """The same seed gives the same digits, and another seed another draw."""
    def steps(seed):
        net = mlp()
        quantize(net, data(256, 8), method="rtn", abits=8, seed=seed)
        return [float(q.log_step.detach()) for q in input_quantizers(net).values()]

    assert steps(1) == steps(1) != steps(2)


class Tagged(torch.Tensor):
    """A tensor of another library."""


def test_a_tensor_subclass_does_not_get_into_the_file(tmp_path):
    net, x = mlp(), data(64, 8)
    quantize([net[:2], net[2:]], x.as_subclass(Tagged), abits=4, start="outputs")
    save_quantized(net, tmp_path / "a")
    assert torch.equal(load_quantized(mlp(), tmp_path / "a")(x), net(x))
    assert all(type(q.log_step.data) is torch.Tensor for q in input_quantizers(net).values())
    own = mlp()                                                      # a weight of such a class
    own[0].weight = nn.Parameter(own[0].weight.detach().as_subclass(Tagged))
    quantize_layers(own, config())
    save_quantized(own, tmp_path / "b")
    load_quantized(mlp(), tmp_path / "b")


def test_one_input_that_makes_most_of_the_loss_is_named():
    x = data(64, 8) @ data(8, 8, seed=1)
    x[7, 3] += 1e5
    report, = quantize([net_of(lambda: nn.Linear(8, 8))], x, method="adaquant")
    assert "hardly a gain, one input makes 100% of the loss" in str(report)
    report, = quantize([net_of(lambda: nn.Linear(8, 8))], data(64, 8), lr=10.0, s1_lr=10.0)
    assert "no gain, try a smaller" in str(report) and 0 < report.largest_share < 0.5


# ---- What a block does ---------------------------------------------------------------------------

class Does(nn.Module):
    """A block of three layers that computes forward(self, x)."""

    def __init__(self, forward=None):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.does, self.kept = forward, None

    def forward(self, x):
        return self.does(self, x)


def plain(self, x):
    return self.c(self.b(self.a(x).relu()).relu())


def fused(self, x):
    if self.kept is None:
        self.kept = torch.cat([self.a.weight, self.b.weight]).detach()
    return self.c(F.linear(x, self.kept)[..., :8])


@pytest.mark.parametrize("forward, missed", [
    (fused, "['a', 'b']"),
    (lambda self, x: self.c(self.b(x).relu().detach()) + F.linear(x, self.a.weight.data),
     "['a', 'b']"),
    (lambda self, x: self.c(self.b(checkpoint(self.a, x, use_reentrant=True))), "['a']")],
    ids=["fused", "detach", "checkpoint"])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_layers_that_no_gradient_reaches_are_named(forward, missed):
    """The report counts them as quantized, and maybe the block does not even compute with them."""
    with pytest.warns(UserWarning) as said:
        quantize([Does(forward)], data(32, 8))
    assert any(f"block 0: no gradient reaches its weights {missed}" in str(w.message)
               for w in said)


def test_gradients_within_no_grad_and_of_frozen_layers():
    """It learns within no_grad, and the check leaves requires_grad and .grad as they were."""
    reports, x = [], data(32, 8)
    for mode in (torch.enable_grad, torch.no_grad):
        torch.manual_seed(0)
        block = Does(plain).requires_grad_(False)
        block.a.weight.requires_grad_(True)
        block.a.weight.grad = gradient = torch.ones(8, 8)
        with mode(), warnings.catch_warnings():
            warnings.simplefilter("error")
            reports += quantize([block], x, start="weights")
        W = block.a.parametrizations.weight.original
        assert W.grad is gradient and W.requires_grad and not gradient.ne(1).any()
        assert not block.b.parametrizations.weight.original.requires_grad
    assert reports[0].final_loss == reports[1].final_loss


class Uncopied(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.lock = threading.Lock()


def replaced(block):
    """Let a function take the place of a forward, as somebody does who wants to log its calls."""
    old = block.forward

    @functools.wraps(old)
    def forward(x):
        return old(x)

    block.forward = forward
    return block


def partly_replaced():
    block = Does(plain)
    replaced(block.b)
    return block


def hooked():
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    first = block[0]
    block[1].register_forward_hook(lambda module, args, y: y + first(y))
    return block


@pytest.mark.parametrize("settings", [{}, {"abits": 4}, {"method": "rtn"}], ids=str)
@pytest.mark.parametrize("make, cause", [
    (Uncopied, "pickle"), (lambda: replaced(nn.Linear(8, 8)), "original's layers"),
    (lambda: replaced(Does(plain)), "original's layers"), (partly_replaced, "original's layers"),
    (hooked, "original's layers")], ids=["lock", "layer", "block", "part", "hook"])
def test_a_block_that_cannot_be_copied_is_refused_by_name(make, cause, settings):
    """A copy would compute the targets of setting B and of a resumed run."""
    first, block = nn.Linear(8, 8), make()
    block.requires_grad_(False)
    with pytest.raises(ValueError, match=f"block 1, a .*, cannot be copied.*{cause}"):
        quantize([first, block], data(32, 8), **settings)
    assert not quantizers(nn.ModuleList([first, block]))
    assert not any(p.requires_grad or p.grad is not None for p in block.parameters())


def max_norm(self, x):
    with torch.no_grad():
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)


def masked(self, x):
    self.weight.data *= torch.ones(8, 8).tril()


def not_negative(self, x):
    with torch.no_grad():
        self.weight.clamp_(min=0)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("method", ["flexround", "rtn"])
@pytest.mark.parametrize("writes", [max_norm, masked, not_negative])
def test_a_layer_that_writes_to_its_weight_is_refused(writes, method, before):
    """It writes to W and not to W_hat. After a run of the network it changes nothing any more."""
    class Writes(nn.Linear):
        def forward(self, x):
            writes(self, x)
            return super().forward(x)

    net, x = nn.Sequential(nn.Linear(8, 8), Writes(8, 8)), data(32, 8)
    if before:
        net(x)
    with pytest.raises(ValueError, match="block 1, a Writes, writes to weights"):
        quantize(list(net), x, method=method)
    assert not quantizers(net)


def test_a_block_that_returns_one_buffer_each_time_is_copied():
    class Buffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(8, 8), torch.empty(64, 8)

        def forward(self, x):
            y = self.layer(x)
            return y if torch.is_grad_enabled() else self.out[:len(x)].copy_(y)

    x, losses = data(64, 8), []
    for kind in (Buffer, lambda: nn.Linear(8, 8)):
        torch.manual_seed(0)
        losses.append([r.final_loss for r in quantize([kind(), nn.Linear(8, 8)], x)])
    assert losses[0] == losses[1]


def test_a_buffer_hides_no_state():
    """An output that the next call overwrites would equal that of the next call."""
    class Counts(nn.Linear):
        calls, out = 0, torch.empty(64, 8)

        def forward(self, x):
            self.calls = min(self.calls + 1, 2)                      # the first call is another
            return self.out[:len(x)].copy_((super().forward(x) + self.calls).detach())

    with pytest.raises(ValueError, match="block 0 returns something else"):
        quantize([Counts(8, 8)], data(32, 8), method="rtn")


class TimeMajor(nn.Module):
    """A block that attends along dim 0 and leaves one channel as it is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 7)

    def forward(self, x):
        y = x[..., 1:] + (x[..., 1:] @ x[..., 1:].mT).softmax(-1).mean(0) @ self.layer(x[..., 1:])
        return torch.cat([x[..., :1], y], -1)


@pytest.mark.filterwarnings("ignore:.*stay float")
@pytest.mark.parametrize("big", [1.0, 3000.0])
def test_a_large_channel_hides_no_dependence_of_inputs(big):
    x = data(24, 6, 8)
    x[..., 0] = big
    with pytest.raises(ValueError, match="block 0 returns something else"):
        quantize([TimeMajor()], x)
    quantize([nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)], 10 * x, method="rtn",
             skip=["0.self_attn.out_proj"])                          # none is refused that may be


def test_a_pre_hook_of_the_users_runs_once():
    """With start = "outputs" the layer is called with what it was called with."""
    s, x = torch.logspace(-1, 1, 16), data(256, 16)
    found = []
    for hook in (False, True):
        layer = net_of(lambda: nn.Linear(16, 16))
        layer[0].weight.data *= s
        if hook:
            layer[0].register_forward_pre_hook(lambda module, args: (args[0] / s, *args[1:]))
        inputs = x * s if hook else x
        for abits in (None, 8):
            report, *_ = quantize([copy.deepcopy(layer)], inputs, method="rtn", start="outputs",
                                  abits=abits)
            found.append(report.start_loss)
    torch.testing.assert_close(found[:2], found[2:])


def test_inputs_that_are_rounded_count_as_such_in_a_start_on_outputs(monkeypatch):
    """We look before the hooks, so the short way with R has to round the inputs itself."""
    layer, x = net_of(lambda: nn.Linear(16, 16))[0], data(256, 16) ** 3
    flexround.quantize_inputs(layer, x, {"": 2})
    calls = flexround.layer_inputs(layer, {"": layer}, x, before_hooks=True)[""]
    assert torch.equal(calls[0], x) and flexround.qr_factor(layer, calls) is not None
    found = [flexround.grid_from_outputs(layer, calls, bits, False, True) for bits in (2, 3)]
    monkeypatch.setattr(flexround, "qr_factor", lambda *args: None)
    slow = [flexround.grid_from_outputs(layer, calls, bits, False, True) for bits in (2, 3)]
    torch.testing.assert_close(found, slow)


# ---- First and last, other bits, half precision --------------------------------------------------

def test_the_ends_keep_their_bits_where_they_are():
    """A skipped end does not pass its 8 bits on, nor does a head that is tied to an embedding."""
    pair = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    assert bits_of_layers(pair, 3, 8) == [{"0": 8, "1": 3}, {"0": 3, "1": 8}]
    assert bits_of_layers(pair, 3, 8, ["0.0"]) == [{"1": 3}, {"0": 3, "1": 8}]
    assert bits_of_layers(pair, 3, 8, ["1.1"]) == [{"0": 8, "1": 3}, {"0": 3}]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6, bias=False))
    tied[1].weight = nn.Parameter(torch.zeros(6, 4))
    words = nn.Embedding(6, 4)
    words.weight = tied[1].weight
    assert bits_of_layers([words, tied], 3, 8) == [{}, {"0": 3}]


def test_a_state_of_other_bits_or_of_another_sign_is_refused():
    nets = [mlp() for _ in range(4)]
    for net, bits, symmetric in zip(nets, (3, 8, 3, 3), (True, True, False, True), strict=True):
        quantize_layers(net, config(bits=bits, symmetric=symmetric))
    for other in nets[1:3]:
        with pytest.raises(ValueError, match=r"the state has codes from \[-4, 3\]"):
            other.load_state_dict(nets[0].state_dict())
    nets[3].load_state_dict(copy.deepcopy(nets[0]).state_dict())     # the same is welcome
    signed, unsigned = mlp(), mlp()
    quantize([signed], data(32, 8), method="rtn", abits=4)
    quantize([unsigned], data(32, 8).abs(), method="rtn", abits=4)
    with pytest.raises(ValueError, match=r"from \[-8, 7\], and this quantizer from \[0, 15\]"):
        unsigned.load_state_dict(signed.state_dict())


@pytest.mark.parametrize("method", flexround.METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizers_that_are_cast_to_half_precision_are_refused(method, dtype):
    """Codes would flip without a word. To fold first and then to cast is right."""
    net = mlp()
    quantize_layers(net, config(method=method))
    good = fold(copy.deepcopy(net)).to(dtype)
    assert good(data(2, 8).to(dtype)).dtype == dtype
    net.to(dtype)
    for use in (lambda: net(data(2, 8).to(dtype)), lambda: fold(net)):
        with pytest.raises(ValueError, match=f"{flexround.METHODS[method].__name__} was cast to"):
            use()


# ---- Late or misleading --------------------------------------------------------------------------

def test_a_channel_dim_that_one_block_lacks_is_found_before_any_work():
    x = data(32, 4, 8)
    for channel_dim in (2, -3, 5):
        net = [nn.Linear(8, 8), nn.Sequential(nn.Flatten(), nn.Linear(32, 4))]
        with pytest.raises(ValueError, match=f"channel_dim = {channel_dim}: block ., a .* returns"):
            quantize(net, x, channel_dim=channel_dim)
        assert not quantizers(nn.ModuleList(net))
    quantize([nn.Linear(8, 8)], x, channel_dim=-2)


@pytest.mark.parametrize("blocks, message", [
    ([nn.Linear(8, 8), nn.MultiheadAttention(8, 2)],
     r"block 1, a MultiheadAttention, cannot be called with one tensor \(1, 8\): .*missing"),
    ([nn.Linear(8, 8), nn.Linear(9, 4)],
     r"block 1, a Linear, cannot be called with one tensor \(1, 8\): .*multiplied"),
    ([nn.Linear(8, 8), nn.Linear(8, 8, device="meta")], "layer '1': W lies on the device meta")],
    ids=["arguments", "shape", "meta"])
def test_a_block_that_fails_is_named_before_any_work(blocks, message):
    with pytest.raises(ValueError, match=message):
        quantize(blocks, data(32, 8))
    assert not quantizers(nn.ModuleList(blocks))


def test_a_gradient_that_is_nan_is_named():
    class Norm(nn.Module):
        def forward(self, x):
            return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)

    x = data(32, 5, 8)
    x[1:, 3:] = 0                                                    # padding
    block = nn.Sequential(nn.Linear(8, 8, bias=False), Norm())
    with pytest.raises(FloatingPointError, match="at iteration . .* is a gradient NaN"):
        quantize([block], x)
    assert not quantizers(block)


def test_a_weight_that_is_a_buffer_is_named_and_can_be_skipped():
    blur = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    del blur.weight
    blur.register_buffer("weight", torch.ones(4, 1, 3, 3) / 9)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), blur), data(32, 3, 6, 6)
    with pytest.raises(ValueError, match="layer '0.1' has .* a buffer in its place"):
        quantize([net], x)
    assert quantize([net], x, skip=["0.1"], method="rtn")[0].bits == {"0": 3}


@pytest.mark.parametrize("name, value", [("lr", "0.01"), ("p", "2"), ("input_drop", "x")])
def test_a_setting_of_a_wrong_kind(name, value):
    with pytest.raises(ValueError, match=f"{name} = '{value}': .* is allowed"):
        config(**{name: value})


@pytest.mark.parametrize("x, skip, message", [
    (torch.tensor(1.0), (), "calibration is empty"),
    (torch.eye(8).to_sparse(), (), "not sparse, is allowed"),
    (data(32, 8), "0.0", "skip = '0.0': a list of names is allowed")],
    ids=["0-D", "sparse", "skip"])
def test_arguments_of_a_wrong_kind(x, skip, message):
    with pytest.raises(ValueError, match=message):
        quantize([mlp()], x, skip)


def test_another_default_device_changes_nothing():
    """A default of "cuda" is usual. Here is none, and "meta" shows where a device is not named."""
    losses, x = [], data(32, 8)
    for device in ("cpu", "meta"):
        net = [mlp()]
        with torch.device(device):
            losses.append([r.final_loss for r in quantize(net, x, abits=4)])
    assert losses[0] == losses[1]


# ---- Batch norm ----------------------------------------------------------------------------------

class Scores(nn.Module):
    """Boxes in pixels beside scores whose norm follows the ReLU, so that it cannot be folded."""

    def __init__(self, unit, separate):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.cls, self.unit, self.separate = nn.Conv2d(8, 3, 1), unit, separate
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        score = self.cls(self.bn(self.conv(x).relu())).sigmoid()
        boxes, score = x.sigmoid() * self.unit, score * (self.unit > 0)
        if self.separate == "positions":                             # (N, positions, channels)
            return torch.cat([boxes.flatten(2), score.flatten(2)], 1).mT
        return torch.cat([boxes, score], 1)


@pytest.mark.parametrize("separate", ["channels", "positions"])
def test_a_wrong_fold_shows_beside_large_boxes_and_not_where_all_is_zero(separate):
    x = data(2, 3, 8, 8)
    with pytest.raises(ValueError, match="of the largest in their channel"):
        models.fold_batchnorm(Scores(640.0, separate).eval(), x)
    with pytest.warns(UserWarning, match="0 everywhere, so nothing was compared"):
        models.fold_batchnorm(Scores(0.0, separate).eval(), x)


# ---- Files ---------------------------------------------------------------------------------------

def saved(tmp_path):
    """A small quantized network with its inputs, and its file."""
    net, path = mlp(), tmp_path / "net.int"
    quantize([net[:2], net[2:]], data(32, 8), method="rtn", abits=4)
    save_quantized(net, path)
    return net, path


def refused(path, message=""):
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        load_quantized(net, path)
    assert equal(net.state_dict(), before) and not input_quantizers(net)


def test_no_flipped_bit_loads_as_another_network(tmp_path):
    """torch.load compares no checksum. Flips in its padding load as the same network."""
    net, path = saved(tmp_path)
    good, expected = path.read_bytes(), load_quantized(mlp(), path).state_dict()
    draw, loaded, errors = random.Random(0), 0, 0
    for _ in range(80):
        place = draw.randrange(8 * len(good))
        damaged = bytearray(good)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        other = mlp()
        try:
            assert equal(load_quantized(other, path).state_dict(), expected)
            loaded += 1
        except ValueError:
            errors += 1
    assert errors > 30 and loaded + errors == 80


def edits():
    layer = ("layers", "0")
    yield "codes", layer, lambda e: e.update(codes=e["codes"][:3])
    yield "codes", layer, lambda e: e.update(codes=torch.cat([e["codes"]] * 2))
    yield "bytes for 64 codes of 4 bits", layer, lambda e: e.update(bits=4)
    yield "bits = 9", layer, lambda e: e.update(bits=9)
    yield "bits = True", layer, lambda e: e.update(bits=True)
    yield "signed = 1", layer, lambda e: e.update(symmetric=1)
    yield "step size is not", layer, lambda e: e.update(s1=e["s1"] * torch.nan)
    yield "step size is not", layer, lambda e: e.update(s1=-e["s1"])
    yield "step size is not", layer, lambda e: e.update(s1=0 * e["s1"])
    yield "step size is not", layer, lambda e: e.update(s1=e["s1"] / 0)
    yield "step sizes", layer, lambda e: e.update(s1=e["s1"].expand(8))
    yield "zero points", layer, lambda e: e.update(zero_point=torch.zeros(8, 1).int())
    yield "zero point is no integer", layer, lambda e: e.update(zero_point=torch.tensor(0.5))
    yield "zero point is no integer", layer, lambda e: e.update(zero_point=torch.tensor(99).int())
    yield "other than 0", layer, lambda e: e.update(zero_point=torch.tensor(1).int())
    yield "codes of", layer, lambda e: e.update(shape=[10 ** 9, 10 ** 9])
    yield "file of save_quantized", layer, lambda e: e.update(shape=[-8, -8])
    yield "step size is not", ("inputs", "0"), lambda e: e["log_step"].fill_(torch.nan)
    yield "step sizes", ("inputs", "0"), lambda e: e.update(log_step=torch.zeros(8))
    yield "zero point is", ("inputs", "0"), lambda e: e.update(zero_point=torch.tensor(-99).int())


@pytest.mark.parametrize("message, place, change", list(edits()))
def test_an_entry_that_is_no_layer_is_refused(message, place, change, tmp_path):
    """Whether the checksum is the old one or, from another program, a right one."""
    _, path = saved(tmp_path)
    file = torch.load(path, weights_only=True)
    change(file[place[0]][place[1]])
    torch.save(file, path)
    refused(path, "checksum is wrong")
    del file["checksum"]
    file["checksum"] = checksum(file)
    torch.save(file, path)
    refused(path, message)


@pytest.mark.parametrize("change", [
    lambda f: f["layers"]["0"].update(symmetric=False), lambda f: f["inputs"].pop("0"),
    lambda f: f["inputs"]["2"].update(signed=True), lambda f: f["rest"]["0.bias"].neg_(),
    lambda f: f["layers"]["2"]["codes"].bitwise_xor_(1), lambda f: f.pop("checksum")],
    ids=["symmetric", "input missing", "signed", "bias", "codes", "no checksum"])
def test_a_change_that_looks_right_is_refused(change, tmp_path):
    _, path = saved(tmp_path)
    file = torch.load(path, weights_only=True)
    change(file)
    torch.save(file, path)
    refused(path, "checksum")


def test_each_archive_member_has_its_checksum_tested(tmp_path):
    """testzip comes first, so that nothing damaged reaches the unpickler."""
    _, path = saved(tmp_path)
    good = path.read_bytes()
    place = good.index(b"flexround-quantized")
    path.write_bytes(good[:place] + b"F" + good[place + 1:])
    refused(path, "the checksum of .*data.pkl is wrong")
    path.write_bytes(b"")
    refused(path, "truncated, damaged")


@pytest.mark.parametrize("other", [False, True], ids=["wrapped", "plain"])
def test_names_are_those_of_state_dict(other, tmp_path):
    """A checkpoint wrapper names its modules otherwise than its state. Both can load the file."""
    def wrapped(wrap=checkpoint_wrapper):
        torch.manual_seed(0)
        return nn.Sequential(wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), wrap(nn.Linear(8, 4)))

    net, x = wrapped().eval(), data(32, 8)
    quantize(list(net), x, method="rtn", abits=4)
    save_quantized(net, tmp_path / "net")
    loaded = load_quantized(wrapped(lambda m: m) if other else wrapped(), tmp_path / "net")
    assert torch.equal(loaded(x), net(x)) and len(input_quantizers(loaded)) == 2


def test_a_state_dict_that_hides_a_quantizer_is_not_saved(tmp_path):
    net, path = saved(tmp_path)
    old = path.read_bytes()

    def hide(module, state, prefix, metadata):
        state.pop(f"{prefix}0.parametrizations.weight.original")

    net._register_state_dict_hook(hide)
    with pytest.raises(ValueError, match="does not hold all quantizers"):
        save_quantized(net, path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_changed_is_not_loaded_into(tmp_path):
    _, path = saved(tmp_path)
    with torch.inference_mode():
        made = mlp()
    for model in (mlp().to("meta"), made):
        with pytest.raises(ValueError, match="of the model lies on the device meta or was made"):
            load_quantized(model, path)


def test_a_link_is_followed_and_a_read_only_target_is_kept(tmp_path):
    net, path = saved(tmp_path)
    target, link = tmp_path / "folder" / "real.int", tmp_path / "link.int"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    assert save_quantized(net, link) == path.stat().st_size
    assert link.is_symlink() and target.read_bytes() == path.read_bytes()
    path.chmod(0o444)
    path.parent.joinpath("folder", "real.int").write_bytes(b"old")
    old = path.read_bytes()
    with pytest.raises(PermissionError, match="net.int is read-only"):
        save_quantized(net, path)
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_is_said_and_what_a_killed_save_leaves_has_a_name(tmp_path, monkeypatch):
    net, path = saved(tmp_path)
    old, seen = path.read_bytes(), []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))     # as a disk with 1 kB left
    try:
        with pytest.raises(OSError, match="File too large|No space"):
            save_quantized(net, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr("pathlib.Path.replace",
                        lambda *args: seen.extend(os.listdir(tmp_path)))
    save_quantized(net, path)
    assert any(name.startswith("net.int.unfinished-") for name in seen)


@pytest.mark.parametrize("conv", [False, True])
def test_a_sum_over_many_inputs_does_not_overflow(conv):
    """75,000 products of 8 bits leave int32, and the sum came back with another sign."""
    W = torch.rand(2, 75000, dtype=torch.float64) * 0.02 + 0.98
    layer = nn.Conv2d(75000, 2, 1, bias=False) if conv else nn.Linear(75000, 2, bias=False)
    layer.double()
    layer.weight.data = W.reshape(layer.weight.shape)
    x = W[:1, :, None, None] if conv else W[:1]
    quantize_layers(layer, config(method="rtn", bits=8))
    q = RoundToNearest(x, 8, False)
    y = integer_forward(layer, q.codes(x), q.s1, q.zero_point)
    torch.testing.assert_close(y, layer(q(x)))


def test_weight_of_reads_what_integers_of_wrote(tmp_path):
    """The checks of a file refuse none of ours: each grid, and a layer whose weights are zero."""
    for symmetric in (True, False):
        for per_channel in (True, False):
            for bits in (2, 8):
                net = net_of(lambda: nn.Conv2d(2, 3, 3), nn.Flatten, lambda: nn.Linear(3, 4))
                nn.init.zeros_(net[2].weight)
                quantize_layers(net, config(bits=bits, symmetric=symmetric,
                                            per_channel=per_channel))
                save_quantized(net, tmp_path / "a")
                entry = torch.load(tmp_path / "a", weights_only=True)["layers"]["0"]
                assert torch.equal(weight_of(entry), net[0].weight)


@pytest.mark.slow
def test_four_files_are_enough_beside_modules_of_the_same_names(tmp_path):
    """A user may have a module `models` and a package `experiments`. Then ours are not on the path,
    and copies of four files have to do, models.py under another name."""
    for name, copy_of in (("flexround.py", "flexround.py"), ("reconstruct.py", "reconstruct.py"),
                          ("integers.py", "experiments/integers.py"), ("nets.py", "models.py")):
        (tmp_path / name).write_text((ROOT / copy_of).read_text(encoding="utf-8"))
    (tmp_path / "models.py").write_text("raise ImportError('this is the user\\'s')")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("raise ImportError('the user\\'s, too')")
    (tmp_path / "own.py").write_text("""
import torch
from integers import load_quantized, save_quantized
from nets import ResNet, fold_batchnorm
from reconstruct import ReconstructionConfig, quantize_model

torch.manual_seed(0)
x = torch.randn(8, 1, 8, 8)
net, fresh = (fold_batchnorm(ResNet((4,), 1, channels=1).eval(), x) for _ in range(2))
quantize_model(net.blocks, x, ReconstructionConfig(iterations=2, batch_size=4))
save_quantized(net, "net.int")
load_quantized(fresh, "net.int")
assert torch.equal(fresh(x), net(x))
""")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
