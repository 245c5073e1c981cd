"""Guards: the two-way table of experiments/steps.py, its rules and its page."""
import copy
import math
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import flexround
import models
from experiments import steps, studies, tools
from flexround import quantizers
from helpers import ROOT, correlated, weight
from reconstruct import (
    ReconstructionConfig,
    make_iteration,
    quantize_model,
    reconstruct_block,
)

FAST = dict(bits=2, iterations=20, batch_size=8, end_bits=None)


def layers():
    torch.manual_seed(0)
    return [nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6))]


@pytest.mark.parametrize("rule, learns", [("adaquant-fixed", False), ("flexround-fixed", False),
                                          ("adaround-outer", True), ("adaquant-relative", True),
                                          ("adaround-constant", False)])
def test_what_becomes_of_s1(rule, learns):
    """A column is called fixed or learned, so s1 has to stay or to move. All begin alike."""
    x, (layer, _) = correlated(40, 6), layers()
    y = layer(x).detach()
    config = ReconstructionConfig(rule, **FAST, lr=0.05, s1_lr=0.05)
    steps.place_quantizers(layer, config, {"": 2}, x, None)
    q = quantizers(layer)[""].eval()
    s1, W = q.s1.detach().clone(), layer.parametrizations.weight.original
    nearest = flexround.RoundToNearest(W, 2)
    assert torch.equal(q.s1, nearest.s1) and torch.equal(q.codes(W), nearest.codes(W))
    report = reconstruct_block(layer, x, y, config)
    assert report.best_iteration > 0 and torch.equal(q.s1, s1) != learns


def test_the_outer_step_leaves_the_floors_where_they_were():
    """s0 says what up and down are. If s1 grows, W_hat grows with it and the codes stay."""
    W = weight((4, 5))
    q = steps.OuterAdaRound(W, 3).eval()
    codes, W_hat = q.codes(W), q(W).detach()
    with torch.no_grad():
        q.log_s1.add_(math.log(2.0))
    assert torch.equal(q.codes(W), codes)
    torch.testing.assert_close(q(W).detach(), 2 * W_hat)


def test_v_in_units_of_s1_moves_each_layer_by_as_many_steps():
    """The same V moves a layer's codes alike, however large its weights are."""
    W = weight((4, 5))
    V = torch.randn(W.shape, generator=torch.Generator().manual_seed(1), dtype=W.dtype)
    small, large = (steps.RelativeAdaQuant(c * W, 3).eval() for c in (1.0, 1000.0))
    for q in (small, large):
        q.V.data.copy_(V)
    assert torch.equal(small.codes(W), large.codes(1000 * W))
    assert not torch.equal(small.codes(W), flexround.RoundToNearest(W, 3).codes(W))


def test_a_constant_learning_rate_does_not_fall():
    """Adam's updates are about as large as its learning rate. So with a constant one the last
    iteration moves V about as far as the first, and with the cosine hardly at all."""
    x, moves = correlated(40, 6), {}
    for name, where in (("cosine", nullcontext()), ("constant", tools.constant_learning_rate())):
        layer, _ = layers()
        y = layer(x).detach()
        config = ReconstructionConfig("adaround-constant", **FAST | {"batch_size": 40}, lr=1e-3)
        steps.place_quantizers(layer, config, {"": 2}, x, None)
        q = quantizers(layer)[""]
        with where:
            iterate, seen = make_iteration(layer, x, y, config), []
            for i in range(config.iterations):
                before = q.V.detach().clone()
                iterate(i)
                seen.append(float((q.V.detach() - before).abs().max()))
        moves[name] = seen
    assert moves["cosine"][0] == moves["constant"][0]
    assert moves["constant"][-1] > 0.5 * moves["constant"][0]
    assert moves["cosine"][-1] < 0.05 * moves["cosine"][0]


@pytest.mark.parametrize("rule", ["adaround", "adaround-constant", "flexround-constant"])
def test_a_run_has_the_schedule_that_its_column_names(monkeypatch, tmp_path, rule):
    """The two columns differ in this alone."""
    def quantize(*args):
        seen.append(torch.optim.Adam)
        return [1.0]

    seen, x = [], torch.zeros(2, 1)
    net = models.Blocks(nn.Linear(1, 1))
    task = models.Task(net, x, lambda net: 1.0, 1, "accuracy")
    monkeypatch.setattr(studies, "load", lambda *args, **options: task)
    monkeypatch.setattr(steps, "quantize", quantize)
    steps.one_run("gpt", "outputs", rule, 1, 0, tmp_path, {})
    assert (seen == [tools.ConstantAdam]) == rule.endswith("constant")


def test_each_block_keeps_the_start_with_the_least_unseen_loss_and_grids_are_taken():
    """One start in a list of one is the driver's own loop. Of two, no block gets the worse one."""
    x, config = correlated(48, 6), ReconstructionConfig("flexround", **FAST)
    found = {}
    for name, starts in (("p2", [{"p": 2.0}]), ("p05", [{"p": 0.5}]),
                         ("both", [{"p": 0.5}, {"p": 2.0}])):
        blocks = layers()
        found[name] = steps.quantize(blocks, x[:32], x[32:], config, starts, None)
        if name == "p2":
            whole = layers()
            quantize_model(whole, x[:32], config)
            for mine, theirs in zip(blocks, whole, strict=True):
                assert torch.equal(mine(x), theirs(x))
            grids = [steps.grids_in(quantizers(block)) for block in blocks]
    assert found["both"][0] == min(found["p2"][0], found["p05"][0])
    blocks = layers()
    steps.quantize(blocks, x[:32], x[32:], ReconstructionConfig("adaround", **FAST), [{}], grids)
    for block, own in zip(blocks, grids, strict=True):
        for name, q in quantizers(block).items():
            assert torch.equal(q.log_s1, own[name][0])


def test_a_grid_that_is_taken_keeps_its_kind():
    """An asymmetric grid with one s1 a channel has other codes than a symmetric one of a layer."""
    one, other = nn.Linear(6, 5), nn.Linear(6, 5)
    other.load_state_dict(one.state_dict())
    config = ReconstructionConfig("rtn", symmetric=False, per_channel=True, **FAST)
    q, = steps.place_quantizers(one, config, {"": 2}, None, None).values()
    taken, = steps.place_quantizers(other, config, {"": 2}, None,
                                    {"": (q.log_s1, q.zero_point)}).values()
    assert (taken.symmetric, taken.per_channel) == (False, True)
    assert torch.equal(other.weight, one.weight)


def test_a_cell_takes_the_learning_rate_that_the_first_seed_chose():
    """The unseen loss of seed 0 decides, and never the score. The other seeds follow."""
    def run(factor, seed, unseen, score):
        return {"network": "n", "step": "outputs", "rule": "adaround", "factor": factor,
                "seed": seed, "unseen": unseen, "score": score}

    held = [run(1, 0, [2.0, 2.0], 90.0), run(4, 0, [1.0, 3.0], 10.0), run(1, 1, [1.0, 1.0], 95.0),
            run(4, 1, [9.0, 9.0], 20.0)]
    assert [r["score"] for r in steps.cell_of(held, "n", "outputs", "adaround")] == [10.0, 20.0]
    nearest = [{**copy.deepcopy(run(1, seed, [4.0, 4.0], 1.0)), "rule": "rtn",
                "step": "weights, p = 2"} for seed in (0, 1)]
    assert steps.share(held[0], held + nearest) == pytest.approx(0.5)
    assert math.isnan(steps.share(held[0], held))
    assert steps.median_share([run(1, 5, [1.0, 1.0], 1.0), held[0]], held + nearest) == 0.5


@pytest.mark.parametrize("of_step, of_rule, shares", [
    ((1, 2, 4), (1, 1, 1), (100, 0)), ((1, 1, 1), (1, 2, 4), (0, 100)),
    ((1, 2, 4), (1, 4, 16), (20, 80))])
def test_what_the_step_explains(of_step, of_rule, shares):
    """Where a share is a product of one factor of the step and one of the rule, nothing else is
    left. An effect on the logarithm that is twice as large explains four times as much."""
    held = [{"network": "n", "step": "weights, p = 2", "rule": "rtn", "factor": 1, "seed": 0,
             "unseen": [1.0]}]
    for row, a in zip(steps.STARTS, of_step, strict=False):
        for rule, b in zip(steps.COMPARED, of_rule, strict=True):
            held.append(held[0] | {"step": row, "rule": rule, "unseen": [0.01 * a * b]})
    for rule in steps.COMPARED:                                      # it does not count
        held.append(held[0] | {"step": steps.BEST, "rule": rule, "unseen": [1e-9]})
    said = steps.explained(held, "n")
    assert f"step explains {shares[0]}%, the rule {shares[1]}%, neither alone 0%" in said
    assert "too few rows" in steps.explained(held, "n", rules=steps.COMPARED_CONSTANT)


@pytest.mark.parametrize("rule", [rule for rule in steps.FIXED | steps.LEARNED if rule != "rtn"])
@pytest.mark.parametrize("name", steps.PLACES)
def test_a_factor_multiplies_one_learning_rate(name, rule):
    """Else several columns of a search would be the same run."""
    one, four = (steps.config_of(steps.PLACES[name], rule, factor, 0) for factor in (1, 4))
    moved = [key for key in ("lr", "s1_lr") if getattr(one, key) != getattr(four, key)]
    assert len(moved) == 1
    assert getattr(four, moved[0]) == pytest.approx(4 * getattr(one, moved[0]))


def test_learning_rates_go_on_until_the_best_is_between_two(monkeypatch, tmp_path):
    """A best at the edge of what was tried might be anywhere beyond it."""
    def made(name, row, rule, factor, seed, folder, options):
        return {"network": name, "step": row, "rule": rule, "factor": factor, "seed": seed,
                "unseen": [1 + math.log2(factor / 16) ** 2], "score": 1.0, "seconds": 0.0}

    monkeypatch.setattr(steps, "one_run", made)
    out = tmp_path / "runs.jsonl"
    steps.make(out, "gpt", ["outputs"], ["adaround", "rtn"], [0, 1], (1, 0.25, 4), {})
    runs = [(r["rule"], r["factor"], r["seed"]) for r in studies.read_results(out)]
    assert runs == [("adaround", f, 0) for f in (1, 0.25, 4, 16, 64)] + [("adaround", 16, 1)] + [
        ("rtn", 1, 0), ("rtn", 1, 1)]


def test_a_learned_s1_that_is_not_kept_is_learned_again(monkeypatch, tmp_path):
    """The file of runs is published and the grids are not. The record does not come twice."""
    made = []

    def one_run(name, row, rule, factor, seed, folder, options):
        made.append((row, rule))
        kept = steps.grids_of(folder, name, steps.TAKEN.get(row, rule), seed)
        kept.write_bytes(b"") if row == "outputs" else kept.read_bytes()
        return {"network": name, "step": row, "rule": rule, "factor": factor, "seed": seed,
                "unseen": [1.0], "score": 1.0, "seconds": 0.0}

    monkeypatch.setattr(steps, "one_run", one_run)
    out, row = tmp_path / "runs.jsonl", "FlexRound's learned s1"
    steps.make(out, "gpt", [row], ["adaround"], [0], (1,), {})
    next((tmp_path / "grids").iterdir()).unlink()
    steps.make(out, "gpt", [row], ["rtn"], [0], (1,), {})
    learned = ("outputs", "flexround")
    assert made == [learned, (row, "adaround"), learned, (row, "rtn")]
    assert len(studies.read_results(out)) == 3


def test_the_page_shows_the_runs():
    """A table that was written by hand would rot."""
    held = studies.read_results(steps.HERE)
    page = (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- steps -->\n(.*?)\n<!-- end -->", page, re.S)[1]
    names = dict.fromkeys(r["network"] for r in held)
    assert shown == "\n\n".join(steps.table(held, name) for name in names)
