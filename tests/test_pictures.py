"""Guards: the pictures of README and of the notebook show what their numbers say."""
import copy
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import nn

from experiments import notebook, pictures, steps
from flexround import quantizers
from reconstruct import ReconstructionConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture
def axes():
    """Empty axes that no window shows."""
    matplotlib.use("Agg")
    figure, ax = matplotlib.pyplot.subplots()
    yield ax
    matplotlib.pyplot.close(figure)


def test_the_main_jobs_table_is_read_as_it_is_printed():
    """Act 6 draws its dots from the printed table, and README holds one."""
    printed = (ROOT / "README.md").read_text().split("<!-- main -->")[1].split("\n\n")[0]
    scores = notebook.scores_of(printed)
    assert list(scores) == ["resnet", "mobilenet", "gpt"]
    for row in scores.values():
        assert len(row) == 1 + len(notebook.METHODS)


@pytest.mark.parametrize("full, nearest, learned", [
    (99.16, 74.54, (98.99, 98.99, 99.33)),                           # one is above full precision
    (98.49, 10.05, (95.81, 95.81, 94.97)),
    (5.27, 12.21, (6.06, 5.77, 5.69))])                              # perplexities: right is less
def test_each_learned_method_has_its_dot_within_the_axis(full, nearest, learned):
    """In a first version a score above full precision was outside, and nobody was told."""
    matplotlib.use("Agg")
    figure = notebook.four_methods({"net": [full, nearest, *learned], "twin": [2, 1, 2, 2, 1.9]})
    low, high = sorted(figure.axes[0].get_xlim())
    worse, better = figure.axes[0].get_xlim()
    assert all(low < score < high for score in (full, *learned))
    assert (worse < better) == (full > nearest)
    matplotlib.pyplot.close(figure)


def test_labels_of_lines_that_end_together_stay_apart(axes):
    """Three labels in one place could not be read."""
    lines = [axes.plot([0, 1], [0, end], label=str(end))[0] for end in (1, 1.001, 0.2)]
    notebook.label_ends(axes, lines, gap=0.1)
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["1.001"] - heights["1"] == pytest.approx(0.1)
    assert heights["1"] - heights["0.2"] > 0.3


def record(way, rule, seed, loss):
    return {"network": "gpt", "step": way, "rule": rule, "factor": 1, "seed": seed,
            "unseen": [loss, 10 * loss]}


def test_the_picture_of_the_two_way_table_shows_medians_of_shares(axes):
    """A share is of round to nearest's loss with the same seed, from the paper's initial s1."""
    held = [record("weights, p = 2", "rtn", seed, 2.0 + seed) for seed in range(3)]
    held += [record("outputs", "adaround", seed, (2.0 + seed) * share)
             for seed, share in enumerate((0.1, 0.9, 0.3))]
    held += [record("weights, p = 2", "adaround", 0, 1.0),
             record("outputs", "flexround", 0, 0.5)]
    nearest, adaround, *_ = pictures.draw_steps(axes, held, "gpt")
    assert nearest.get_ydata() == pytest.approx([1])
    assert adaround.get_ydata() == pytest.approx([0.5, 0.3])
    hollow, = (line for line in axes.lines if len(line.get_xdata()) and
               line.get_markerfacecolor() == "white")
    assert (list(hollow.get_xdata()), hollow.get_ydata()) == ([1], pytest.approx([0.25]))


def test_a_rule_can_round_with_the_s1_that_another_rule_has_learned():
    """Otherwise a row of the table would be another one under its name."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 4))
    x = torch.randn(32, 6)
    config = ReconstructionConfig("flexround", 3, iterations=4, batch_size=8, end_bits=None)
    one, other = list(copy.deepcopy(net)), list(copy.deepcopy(net))
    steps.quantize(one, x[:16], x[16:], config, [{"start": "outputs"}], None)
    grids = [steps.grids_in(quantizers(block)) for block in one]
    losses = steps.quantize(other, x[:16], x[16:], replace(config, method="adaround"), [{}], grids)
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    for block, grid in zip(other, grids, strict=True):
        assert {layer: q.log_s1 for layer, q in quantizers(block).items()} == {
            layer: log_s1 for layer, (log_s1, _) in grid.items()}
