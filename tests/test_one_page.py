"""experiments/page.py writes the method again in a few lines. The modules have to agree with it."""
import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import flexround
from experiments import page
from models import load_task
from reconstruct import ReconstructionConfig, reconstruct_block

SHAPES = {"linear": (8, 6), "convolution": (6, 4, 3, 3), "1 x 1": (8, 6, 1, 1),
          "depthwise": (12, 1, 3, 3)}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(W, bits, spread=0.3):
    """The page's and the modules' quantizer of W with the same random factors."""
    ours, theirs = page.FlexRound(W, bits), flexround.FlexRound(W, bits)
    named = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(named)
    with torch.no_grad():
        for seed, (name, p) in enumerate(ours.named_parameters()):
            named[name].add_(spread * numbers(*p.shape, seed=seed))
            p.copy_(named[name])
    return ours, theirs


@pytest.mark.gradients
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_W_hat_and_all_gradients_are_the_modules(shape, bits):
    """The page has autograd and a where in place of Division, so its gradients could differ."""
    W = numbers(*shape)
    ours, theirs = pair(W, bits)
    # These multiples of S are: on a bound, beyond it but rounded back to it, and clamped.
    lo, hi = theirs.lo, theirs.hi
    u = torch.tensor([lo, hi, lo - 0.4, hi + 0.4, lo - 0.6, hi + 0.6, 3 * lo, 3 * hi + 0.2])
    W.flatten()[:8] = u * theirs.S.detach().flatten()[:8]
    assert theirs.codes(W).flatten()[:8].tolist() == 4 * [lo, hi]

    G = numbers(*shape, seed=9)
    for q in (ours, theirs):
        q(W).backward(G)
    torch.testing.assert_close(ours(W), theirs(W), rtol=1e-12, atol=0)
    for name, p in ours.named_parameters():
        expected = theirs.get_parameter(name).grad
        assert (expected != 0).any()
        torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12)
    # Of these eight weights, S2 gets a gradient for the first four alone.
    assert (ours.log_S2.grad.flatten()[:8] != 0).tolist() == 4 * [True] + 4 * [False]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_initial_s1_is_as_good_as_the_modules(bits):
    """Both search for the smallest squared error, the page in steps of 1 % of the range."""
    W = numbers(64, 48)
    errors = []
    for q in (page.FlexRound(W, bits), flexround.RoundToNearest(W, bits)):
        errors.append((W - q(W)).detach().square().sum())
    assert errors[0] <= 1.02 * errors[1]


def test_the_loop_learns_the_modules_factors():
    """32 inputs are one batch, so the draws do not matter, and both make the same updates."""
    x = numbers(32, 3) @ numbers(3, 6, seed=1)                       # correlated, like activations
    W, bias = numbers(8, 6, seed=2), numbers(8, seed=3)
    y = nn.functional.linear(x, W, bias)
    ours, theirs = pair(W, 3, spread=0)
    layers = []
    for q in (ours, theirs):
        layer = nn.Linear(6, 8).double().requires_grad_(False)
        layer.weight.copy_(W)
        layer.bias.copy_(bias)
        parametrize.register_parametrization(layer, "weight", q)
        layers.append(layer)
    page.reconstruct(layers[0], x, y, 100)
    config = ReconstructionConfig(bits=3, iterations=100, lr=0.032, s1_lr=0.008)
    report = reconstruct_block(layers[1], x, y, config)
    assert report.best_iteration == 100                              # it kept the last one, too
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=0, atol=1e-4)


def test_blocks_get_X_tilde_and_the_target_of_X(monkeypatch, capsys):
    """With a wrong input or target the result would only be a little worse, and look right."""
    calls = []
    monkeypatch.setattr(page, "reconstruct", lambda *args: calls.append(args))
    page.main(7)
    net = load_task("resnet", dtype=torch.float64).net
    x_fp = x_q = load_task("resnet", dtype=torch.float64).calibration
    with torch.no_grad():
        for block_fp, (block, x, y, iterations) in zip(net.blocks, calls, strict=True):
            x_fp = block_fp(x_fp)
            assert iterations == 7 and torch.equal(x, x_q) and torch.equal(y, x_fp)
            x_q = block(x_q)
    assert not torch.equal(x_q, x_fp)
    last_codes = []
    for block, *_ in calls:
        last_codes += [m.hi for m in block.modules() if isinstance(m, page.FlexRound)]
    assert last_codes == [127, *8 * [1], 127]                        # 8 bits, 2 bits, 8 bits
    full, nearest, learned = capsys.readouterr().out.splitlines()
    assert learned.split()[-1] == nearest.split()[-1]                # we have learned nothing


def test_it_prints_three_accuracies_and_the_last_is_near_the_first(capsys):
    page.main(50)                                                    # a third of its iterations
    lines = capsys.readouterr().out.splitlines()
    full, nearest, learned = (float(line.split()[-1]) for line in lines)
    assert full > 99 and nearest < 60 and learned > full - 3


def test_the_page_needs_nothing_of_ours_but_models():
    """A reader of the page has to look up nothing else."""
    found = set()
    for node in ast.walk(ast.parse(Path(page.__file__).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert found == {"copy", "torch", "torch.nn.utils", "models"}
