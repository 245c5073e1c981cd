"""Guards: folding batch norm, published checkpoints, data, scores."""
import hashlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import models
from helpers import QUICK, ROOT, restless_norms, tiny
from reconstruct import quantize_model

# ---- 1. Folding batch norm -----------------------------------------------------------------------

class PreActivation(nn.Sequential):
    def forward(self, x):
        return self[0](torch.relu(self[1](x)))


def test_folding_batch_norm_changes_no_output_or_is_refused():
    """Definition order is not use order, as before an activation, so the outputs must decide."""
    torch.manual_seed(0)
    x, wrong = torch.randn(16, 3, 8, 8), PreActivation(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    nets = (models.MobileNet((4, 6), 1), models.ResNet((4, 6), 1, "conv"), models.ResNet((4, 6), 1))
    for net in nets:
        y = restless_norms(net)(x)
        assert models.fold_batchnorm(net, x) is net
        assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
        torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="outputs are off by .* does not follow the convolution"):
        models.fold_batchnorm(restless_norms(wrong), x)
    with pytest.warns(UserWarning, match=r"not folded.*\['0'\]"):
        net = models.fold_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), x)
    with pytest.warns(UserWarning, match=r"0\.0.*models\.fold_batchnorm"):
        quantize_model([net], x, replace(QUICK, end_bits=None))


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


@pytest.mark.filterwarnings("ignore:net.x. is 0 everywhere")           # a story of test_faults.py
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


# ---- 2. Published files --------------------------------------------------------------------------

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


SHARED = ROOT.parent / "shared" / "data"                             # CIFAR-10, where we have it


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_resnet20_reaches_its_published_accuracy():
    """91.73 % is the checkpoint's own number, so reading, folding and normalising must be right."""
    task = models.load_task("resnet20", SHARED)
    assert task.score(task.net) == pytest.approx(91.73, abs=0.02)


# ---- 3. Tasks and scores -------------------------------------------------------------------------

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
