"""Guards: blocks on a GPU, in turn or all at once, and recorded iterations.

Without a GPU a stand-in computes in the computer's memory, and the tests on CUDA are skipped.
"""
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import reconstruct
from experiments import timing
from flexround import quantize_layers
from helpers import QUICK, correlated, equal_states, over_learned, tiny
from reconstruct import ReconstructionConfig, quantize_model

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# ---- 1. Without a GPU ----------------------------------------------------------------------------

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


# ---- 2. On a GPU ---------------------------------------------------------------------------------

@cuda
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


@cuda
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


@pytest.mark.gradients
@cuda
@over_learned
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


class Waits(nn.Module):
    def forward(self, x):
        return x * (1.0 + 0.0 * x.mean().item())                     # Python waits for the number


@cuda
def test_what_cuda_cannot_record_is_learned_and_timed_as_before():
    """A block may wait for the device, and a run of an hour should not end with that. A broken
    recording would also spoil all later kernels."""
    net, x, _ = tiny("resnet conv")
    block = nn.Sequential(net.blocks[0], Waits())
    config = replace(QUICK, device="cuda", lr=1e-6, s1_lr=1e-6, end_bits=None)
    eager, = quantize_model([copy.deepcopy(block)], x, config)
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph"):
        report, = quantize_model([block], x, replace(config, cuda_graph=True))
    assert report.history == pytest.approx(eager.history, rel=1e-3)
    assert not torch.cuda.get_sync_debug_mode()
    block = nn.Sequential(nn.Conv2d(3, 4, 3), Waits()).cuda()
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph"):
        took = timing.time_block(block, correlated(64, 3, 6, 6).cuda(), ReconstructionConfig(), 3)
    assert "iteration captured" not in took and torch.rand(3, device="cuda").shape == (3,)
