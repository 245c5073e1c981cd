"""Networks of other libraries: models.blocks_of cuts them, and what it cannot cut it refuses."""
import copy
import importlib
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import helpers
import models
from experiments import pretrained
from experiments.integers import load_quantized, save_quantized
from flexround import fold, quantizable_layers
from models import blocks_of, first_tensor, fold_batchnorm
from reconstruct import ReconstructionConfig, quantize_model

HERE = Path(__file__).parent.parent
CONFIG = ReconstructionConfig(bits=4, iterations=2, batch_size=4)


# ---- Networks ------------------------------------------------------------------------------------

def package(name):
    """helpers.package. Skips where the package is there and cannot be imported."""
    try:
        return helpers.package(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(x + self.conv2(self.act(self.conv1(x))))


class SmallResNet(nn.Module):
    """Two residual blocks, and between them a convolution that halves the image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = Residual(8), Residual(12)
        self.down = nn.Conv2d(8, 12, 3, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.first(self.act(self.stem(x)))
        x = self.second(self.act(self.down(self.act(x))))            # in place in x, too
        return self.head(x.mean((2, 3)))


class UNet(SmallResNet):
    """A skip leads past both blocks."""

    def __init__(self):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)
        self.join = nn.Conv2d(20, 5, 1)

    def forward(self, x):
        skip = self.act(self.stem(x))
        x = self.second(self.act(self.down(self.first(skip.clone()))))
        return self.join(torch.cat([self.up(x), skip], 1))


class TextLayer(nn.Module):
    """As a layer of T5: the first one makes a table of positions, and the others are given it. It
    returns a tuple, and it is not called with a mask if there is none."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.table = nn.Embedding(6, 16)

    def forward(self, x, table=None, mask=None):
        if table is None:
            table = self.table(torch.arange(x.shape[1]))[None]
        y = self.linear((x + table).cumsum(1) / 4).tanh()
        return (x + y if mask is None else x + y * mask[..., None]), table


class Text(nn.Module):
    """Tokens, 0 is padding. padded: whether the layers get a mask of the padding."""

    def __init__(self, padded=False):
        super().__init__()
        self.padded = padded
        self.embedding = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(TextLayer() for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, tokens):
        x, table, mask = self.embedding(tokens), None, (tokens != 0) if self.padded else None
        for layer in self.layers:
            x, table = layer(x, table, mask=mask)
        return {"logits": self.head(x.mean(1)), "table": table}        # as Hugging Face's


def transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, 3)


def images(*shape):
    return torch.randn(6, 3, *shape)


def tokens():
    return torch.randint(1, 20, (6, 6))


def timm_net(name, size, cut, **options):
    def make():
        return package("timm").create_model(name, pretrained=False, **options), images(size, size)
    return pytest.param(make, cut, id=f"timm {name}")


def bert():
    transformers = package("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32)), tokens()


def llama():
    transformers = package("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32)), tokens()


def blocks_in(stages):
    return [block for stage in stages for block in stage]


NETWORKS = [
    pytest.param(lambda: (SmallResNet(), images(8, 8)), lambda net: [net.first, net.second],
                 id="ResNet"),
    pytest.param(lambda: (transformer(), torch.randn(6, 5, 16)), lambda net: net.layers,
                 id="nn.TransformerEncoder"),
    pytest.param(lambda: (Text(), tokens()), lambda net: net.layers, id="tuples"),
    timm_net("resnet18", 32, lambda net: [net.conv1, *net.layer1, *net.layer2, *net.layer3,
                                          *net.layer4], channels=(8, 8, 16, 16)),
    timm_net("test_efficientnet", 32, lambda net: blocks_in(net.blocks)),
    timm_net("vit_tiny_patch16_224", 32, lambda net: net.blocks, img_size=32, depth=2,
             embed_dim=48),
    timm_net("convnext_atto", 32, lambda net: blocks_in(stage.blocks for stage in net.stages),
             depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    timm_net("swin_tiny_patch4_window7_224", 32,
             lambda net: blocks_in(stage.blocks for stage in net.layers), img_size=32,
             window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 2)),
    pytest.param(bert, lambda net: net.bert.encoder.layer, id="BERT"),
    pytest.param(llama, lambda net: net.model.layers, id="Llama"),
]


# ---- The pieces are the network ------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:.*of the parameters stay float")
@pytest.mark.parametrize("make, cut", NETWORKS)
def test_the_pieces_are_the_network_and_quantize_it(make, cut, tmp_path):
    """A user wants from one line: blocks, a network that is quantized, and a file to load."""
    torch.manual_seed(0)
    net, x = make()
    torch.manual_seed(1)
    fresh, _ = make()                                                # other weights
    if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        fold_batchnorm(net, x)
        fold_batchnorm(fresh, x)
    names = set(net.state_dict())
    layers = {id(layer) for layer in quantizable_layers(net).values()}
    blocks = blocks_of(net, x, cut(net))

    # Each piece is a block, and together they own the layers that the network has, each once.
    owned = [id(layer) for b in blocks for layer in quantizable_layers(b).values()]
    assert len(owned) == len(set(owned)) and set(owned) == layers
    with torch.no_grad():
        y = x
        for block in blocks:
            y = block(y.clone())
        before = first_tensor(net(x.clone()))
    assert torch.equal(y, before)

    reports = quantize_model(blocks, x, CONFIG, show=False)
    assert sum(len(report.bits) for report in reports) == len(layers)
    assert all(report.final_loss > 0 for report in reports)
    save_quantized(net, tmp_path / "net.int")
    fresh.requires_grad_(False)
    with torch.no_grad():
        after = first_tensor(net(x.clone()))
        loaded = first_tensor(load_quantized(fresh, tmp_path / "net.int")(x.clone()))
        folded = first_tensor(fold(net)(x.clone()))
    assert torch.equal(loaded, after) and torch.equal(folded, after)
    assert not torch.equal(after, before) and set(net.state_dict()) == names


def test_pieces_in_setting_B_are_learned_like_a_list_of_modules():
    """Setting B copies all blocks, and both lists are the same network, so all losses agree."""
    torch.manual_seed(0)
    net, x = SmallResNet(), images(8, 8)
    net.act = nn.ReLU()
    net.first.act = net.second.act = nn.ReLU()
    config = ReconstructionConfig(bits=3, abits=4, iterations=3, batch_size=4, end_bits=None)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    by_hand = [nn.Sequential(net.stem, nn.ReLU(), net.first),
               nn.Sequential(nn.ReLU(), net.down, nn.ReLU(), net.second),
               nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head)]
    ours = [r.evaluations for r in quantize_model(by_hand, x, config, show=False)]
    other = SmallResNet()
    other.load_state_dict(state)
    pieces = blocks_of(other, x, [other.first, other.second])
    theirs = [r.evaluations for r in quantize_model(pieces, x, config, show=False)]
    assert len(ours) == 6
    assert torch.tensor(ours) == pytest.approx(torch.tensor(theirs), rel=1e-3)


def test_a_piece_moves_with_the_whole_network_and_leaves_it_as_it_was():
    """A GPU's block needs the stem there. And net must be yours again, also after an exception."""
    net, x = Text(), tokens()
    blocks = blocks_of(net, x, net.layers)
    blocks[2].double()
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    with torch.no_grad():
        h = blocks[1](blocks[0](x))
        with pytest.raises(RuntimeError, match="shape|size|mat"):
            blocks[2].get_submodule("layers/2.linear").register_forward_pre_hook(
                lambda layer, args: args[0][..., :3])
            blocks[2](h)
    assert h.dtype == torch.float64
    assert not any("forward" in vars(module) for module in net.modules())


def test_a_piece_without_parameters_at_the_end_joins_the_one_before():
    """Else the last layer of the network would not be in the last block, and end_bits miss it."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Flatten())
    x = torch.randn(4, 4)
    assert len(blocks_of(net, x, [net[0], net[2]])) == 2
    assert len(blocks_of(net, x, [net[0]])) == 2


# ---- What is refused -----------------------------------------------------------------------------

def test_a_skip_past_the_layers_is_refused():
    """The pieces would run, and the skip would always bring the first input's values."""
    net = UNet()
    with pytest.raises(ValueError, match="not the network.*past the cuts, such as a skip"):
        blocks_of(net, images(8, 8), [net.first, net.second])


def test_a_mask_of_padding_is_refused_and_no_padding_is_none():
    """A mask that depends on the inputs would be the first input's for all of them."""
    net, x = Text(padded=True), tokens()
    assert len(blocks_of(net, x, net.layers)) == 4
    x[3, 4:] = 0
    with pytest.raises(ValueError, match="not the network.*mask of padding"):
        blocks_of(net, x, net.layers)


@pytest.mark.parametrize("layers, says", [
    (lambda net: [net.layers[1], net.layers[0], net.layers[2]],
     r"are \['layers.1', 'layers.0', 'layers.2'\], but what runs is \['layers.0', 'layers.1'"),
    (lambda net: [net.layers[0], net.layers[0]], "has to run once, in this order"),
    (lambda net: [], r"layers are \[\]"),
    (lambda net: [net.layers], r"layers are \['layers'\], but what runs is \[\]"),
    (lambda net: [nn.Linear(2, 2)], "has a Linear that is not inside net"),
    (lambda net: [net], "has a Text that is not inside net")])
def test_a_wrong_list_of_layers_is_refused(layers, says):
    net = Text()
    with pytest.raises(ValueError, match=says):
        blocks_of(net, tokens(), layers(net))


def test_inputs_that_cannot_show_a_difference_and_other_shapes_are_refused():
    net, x = Text(), tokens()
    for same in (x[:1], x[:1].expand(6, -1)):
        with pytest.raises(ValueError, match="two inputs that differ"):
            blocks_of(net, same, net.layers)
    blocks = blocks_of(net, x, net.layers)
    with pytest.raises(ValueError, match=r"piece 0 gets \(1, 5\): \(N, \*\(6,\)\) is allowed"):
        quantize_model(blocks, x[:, :5], CONFIG, show=False)


def test_a_layer_that_runs_in_two_pieces_is_refused_before_any_work():
    """One weight cannot be learned for two blocks, one after the other."""
    net, x = Text(), tokens()
    net.layers[2].linear = net.layers[0].linear
    with pytest.raises(ValueError, match="is in an earlier block as well"):
        quantize_model(blocks_of(net, x, net.layers), x, CONFIG, show=False)


# ---- The command line for published networks ----------------------------------------------------

@pytest.mark.parametrize("name", ["lite2", "minilm"])
def test_the_command_says_which_layers_get_how_many_bits_and_keeps_a_file(
        name, tmp_path, monkeypatch, capsys):
    """After hours of work a user wants to know what was done, and to have it."""
    torch.manual_seed(0)
    net, x = models.MobileNet((8, 8), depth=1), images(8, 8)
    fold_batchnorm(net, x)
    fresh = copy.deepcopy(net)

    def task(*args):
        assert name != "lite2" or args[-1] == "lite2"
        return models.Task(net, x, lambda net: 7.0, 4, "a test")

    monkeypatch.setattr(pretrained, "lite_task", task)
    monkeypatch.setattr(pretrained, "minilm_task", task)
    path = tmp_path / "net.int"
    command = f"{name} --data . --bits 3 --iterations 2 --device cpu --save {path}".split()
    pretrained.main(command)
    lines = capsys.readouterr().out.splitlines()
    says = "3 bits: 9 layers from 0.conv1 to 4.linear"               # no exception of ends
    if name == "lite2":
        says = "8 bits: 0.conv1, 4.linear; 3 bits: 7 layers from 1.conv1 to 3.conv1"
    assert lines[2] == says and lines[3].startswith("W3 FlexRound: 7.00")
    assert lines[-1] == f"{path}: {path.stat().st_size:,} bytes"
    before = fresh(x)
    assert not torch.equal(load_quantized(fresh, path)(x), before)

    with pytest.raises(ValueError, match="one method and one number of bits"):
        pretrained.main([*command, "--method", "rtn", "adaround"])
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        pretrained.main([*command, "--save", str(tmp_path / "no" / "net.int")])


def test_the_command_keeps_onnx_by_the_files_ending(tmp_path, monkeypatch, capsys):
    for needed in ("onnx", "onnxscript", "experiments.onnx_file"):
        pytest.importorskip(needed)
    net, x = models.MobileNet((8, 8), depth=1), images(8, 8)
    task = models.Task(fold_batchnorm(net, x), x, lambda net: 7.0, 4, "a test")
    monkeypatch.setattr(pretrained, "lite_task", lambda *args: task)
    path = tmp_path / "net.onnx"
    pretrained.main(f"lite0 --data . --method rtn --device cpu --save {path}".split())
    assert capsys.readouterr().out.endswith(f"{path}: {path.stat().st_size:,} bytes\n")
    importlib.import_module("onnx").checker.check_model(str(path))


# ---- README --------------------------------------------------------------------------------------

def test_the_readmes_network_from_timm_prints_what_it_says(tmp_path, monkeypatch, capsys):
    """A reader copies it first. It is a block of "py", because test_flexround.py runs those of
    "python", which need torch alone."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- timm -->\n```py\n(.*?)```\n\n```\n(.*?)```", readme, re.S)
    if found is None:
        pytest.skip("README has no block that is marked by <!-- timm -->")
    package("timm")
    code, said = found.groups()
    (tmp_path / "own.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("own.py", run_name="__main__")
    printed = capsys.readouterr().out
    number = r"\d+\.\d+"                                             # other machines, other digits
    assert re.sub(number, "#", printed) == re.sub(number, "#", said)
    printed, said = (list(map(float, re.findall(number, output))) for output in (printed, said))
    assert printed == pytest.approx(said, rel=0.3, abs=0.02)
