"""The networks and data that FlexRound is tried on: ResNets, a MobileNetV2-like net, GPTs.

Nothing here knows of quantization. The one thing that reconstruct.py asks of a network is .blocks,
an ordered list of Tensor -> Tensor modules that, run one after the other, *are* the network:

    for block in net.blocks: x = block(x)

The blocks of a ResNet are the stem, each residual block (its addition and ReLU inside), and pooling
with the classifier. Those of a GPT are the embeddings, each transformer block, and the last norm
with the head. Our modules bear the names of the published files, so that read_into is short.

Shapes at line ends: N images, C channels, H x W pixels, or B sequences of T tokens, D channels.
"""
import hashlib
import platform
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

NETWORKS = Path(__file__).parent / "experiments" / "networks"        # small ones, trained
PARAGRAPHS = NETWORKS / "paragraphs.txt"                             # of the GPT's text


class Blocks(nn.Module):
    """A network that is the list of its blocks."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def read_into(net: Blocks, saved: dict[str, Tensor], prefixes: list[str], path) -> Blocks:
    """Copy a published file into net and return it in eval mode. In the file, block i's tensors
    have the same names as ours, after prefixes[i]. Raises ValueError if it is another network's."""
    ours = {}                                                        # the file's name -> ours
    for i, (prefix, block) in enumerate(zip(prefixes, net.blocks, strict=True)):
        for key in block.state_dict():
            ours[prefix + key] = f"blocks.{i}.{key}"
    # Old files lack the counts of batch norms' batches, and torch sets those to 0.
    state = {ours.get(key, key): t for key, t in saved.items()}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} holds another network: {error}") from error
    return net.eval()


# ---- ResNets (He et al. 2016) --------------------------------------------------------------------

def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution with same-size padding and no bias, because batch norm follows."""
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn_act(c_in: int, c_out: int, kernel: int, stride: int, act: nn.Module) -> nn.Sequential:
    """Return a convolution, its batch norm and an activation."""
    return nn.Sequential(OrderedDict(conv1=conv(c_in, c_out, kernel, stride),
                                     bn1=nn.BatchNorm2d(c_out), act=act))


def classifier(channels: int, classes: int) -> nn.Sequential:
    """Return global average pooling and a linear layer: (N, C, H, W) -> (N, classes)."""
    return nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
                                     linear=nn.Linear(channels, classes)))


class PadShortcut(nn.Module):
    """The parameter-free shortcut ("option A"): every stride-th pixel, new channels zero."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride = stride
        new = c_out - c_in
        self.pad = (0, 0, 0, 0, new // 2, new - new // 2)            # W, H, channels

    def forward(self, x):
        return F.pad(x[:, :, ::self.stride, ::self.stride], self.pad)    # (N, c_out, H/s, W/s)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: the identity where shapes agree, else zero-padded
    ("pad") or a 1 x 1 convolution ("conv")."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, shortcut: str = "conv"):
        super().__init__()
        self.conv1 = conv(c_in, c_out, 3, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = conv(c_out, c_out, 3)
        self.bn2 = nn.BatchNorm2d(c_out)
        if stride == 1 and c_in == c_out:
            self.downsample = nn.Identity()
        elif shortcut == "pad":
            self.downsample = PadShortcut(c_in, c_out, stride)
        else:
            self.downsample = nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))                          # (N, c_out, H/s, W/s)
        y = self.bn2(self.conv2(y))                                  # (N, c_out, H/s, W/s)
        return F.relu(y + self.downsample(x))


class ResNet(Blocks):
    """A stem, then stages of `depth` blocks. All stages but the first halve H and W.

    ResNet() is the CIFAR-10 ResNet-20 with the shortcuts of the public checkpoint.
    """

    def __init__(self, widths=(16, 32, 64), depth: int = 3, shortcut: str = "pad",
                 channels: int = 3, classes: int = 10):
        c_in = widths[0]
        blocks = [conv_bn_act(channels, c_in, 3, 1, nn.ReLU())]
        for stage, c_out in enumerate(widths):
            for i in range(depth):
                halve = stage > 0 and i == 0
                blocks.append(BasicBlock(c_in, c_out, 2 if halve else 1, shortcut))
                c_in = c_out
        super().__init__(*blocks, classifier(c_in, classes))


def resnet20(path=None) -> ResNet:
    """Return the public CIFAR-10 ResNet-20 by akamaster (91.73 % on test), batch norm not folded.

    path: resnet20-12fca82f.th. None downloads it once into torch's hub cache and checks its hash.
    Raises ValueError if the file is not that checkpoint.
    """
    url = ("https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
           "resnet20-12fca82f.th")
    if path is None:
        saved = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        path = url
    else:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    saved = saved.get("state_dict", saved)
    saved = {key.removeprefix("module."): t for key, t in saved.items()}
    inner = [f"layer{1 + i // 3}.{i % 3}." for i in range(9)]        # 3 stages of 3 blocks
    return read_into(ResNet(), saved, ["", *inner, ""], path)


# ---- A MobileNetV2-like network (Sandler et al. 2018) --------------------------------------------

class InvertedResidual(nn.Module):
    """1 x 1 to more channels, 3 x 3 depthwise, 1 x 1 back, added to x where shapes agree."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, expand: int = 4):
        super().__init__()
        wide = c_in * expand
        self.conv1 = conv(c_in, wide, 1)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = conv(wide, wide, 3, stride, groups=wide)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = conv(wide, c_out, 1)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.add = stride == 1 and c_in == c_out

    def forward(self, x):
        y = F.relu6(self.bn1(self.conv1(x)))                         # (N, wide, H, W)
        y = F.relu6(self.bn2(self.conv2(y)))                         # (N, wide, H/s, W/s)
        y = self.bn3(self.conv3(y))                                  # (N, c_out, H/s, W/s)
        return x + y if self.add else y


class MobileNet(Blocks):
    """A small MobileNetV2-like network: stem, inverted residuals, 1 x 1 convolution, classifier.
    The paper reports FlexRound's largest gains for its depthwise convolutions."""

    def __init__(self, widths=(16, 24, 32), depth: int = 2, channels: int = 3, classes: int = 10,
                 stride: int = 1):
        c_in = widths[0]
        blocks = [conv_bn_act(channels, c_in, 3, stride, nn.ReLU6())]
        for stage, c_out in enumerate(widths):
            for i in range(depth):
                halve = stage > 0 and i == 0
                blocks.append(InvertedResidual(c_in, c_out, 2 if halve else 1))
                c_in = c_out
        last = conv_bn_act(c_in, 2 * c_in, 1, 1, nn.ReLU6())
        super().__init__(*blocks, last, classifier(2 * c_in, classes))


# ---- A GPT (GPT-2's architecture, in nanoGPT's spirit) -------------------------------------------

class Embeddings(nn.Module):
    """Token and learned position embeddings: (B, T) integers -> (B, T, D)."""

    def __init__(self, vocabulary: int, context: int, width: int):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)

    def forward(self, tokens):
        T = tokens.shape[1]                                          # at most the context
        return self.wte(tokens) + self.wpe.weight[:T]                # (B, T, D)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)                    # queries, keys, values
        self.c_proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                         # each (B, heads, T, D/heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, D/heads)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))       # (B, T, D)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            act=nn.GELU("tanh"),
            c_proj=nn.Linear(4 * width, width)))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Head(nn.Module):
    """Last norm and the projection to logits: (B, T, D) -> (B, T, V)."""

    def __init__(self, wte: nn.Embedding):
        super().__init__()
        self.ln_f = nn.LayerNorm(wte.embedding_dim)
        self.lm_head = nn.Linear(wte.embedding_dim, wte.num_embeddings, bias=False)
        self.lm_head.weight = wte.weight                             # tied: it stays float

    def forward(self, x):
        return self.lm_head(self.ln_f(x))


class GPT(Blocks):
    """GPT-2's architecture: model(tokens) returns logits, (B, T) -> (B, T, vocabulary).

    vocabulary is the number of tokens, context the largest T, and width is D, a multiple of heads.
    """

    def __init__(self, vocabulary: int, context: int = 64, layers: int = 4, heads: int = 4,
                 width: int = 64):
        first = Embeddings(vocabulary, context, width)
        inner = [TransformerBlock(width, heads) for _ in range(layers)]
        super().__init__(first, *inner, Head(first.wte))
        self.context = context
        for name, p in self.named_parameters():                      # GPT-2's initial weights
            if name.endswith("c_proj.weight"):                       # they add to the residual
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)


def gpt2(path, n_head: int | None = None) -> GPT:
    """Return a network of the GPT-2 family with its published weights: pytorch_model.bin or
    model.safetensors of openai-community/gpt2, -medium, -large or -xl. All of these have width / 64
    attention heads, which is n_head = None. Raises ValueError if the file is not a GPT-2."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file
        saved = load_file(path)
    else:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    state = {}
    for key, t in saved.items():
        key = key.removeprefix("transformer.")
        if key.endswith((".attn.bias", ".masked_bias")):             # old files hold the mask
            continue
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            t = t.T                                                  # Conv1D's (in, out)
        state[key] = t
    if "wte.weight" not in state or "wpe.weight" not in state:
        raise ValueError(f"{path} is not a GPT-2: it has no wte.weight or no wpe.weight")
    state.setdefault("lm_head.weight", state["wte.weight"])          # tied

    vocabulary, width = state["wte.weight"].shape
    context = len(state["wpe.weight"])
    layers = 0
    for key in state:
        if key.startswith("h."):                                     # h.3.ln_1.weight: layer 3
            layers = max(layers, 1 + int(key.split(".")[1]))
    if n_head is None:
        n_head = width // 64
    net = GPT(vocabulary, context, layers, n_head, width)
    inner = [f"h.{i}." for i in range(layers)]
    return read_into(net, state, ["", *inner, ""], path)


# ---- Batch norm goes into the convolution before it ----------------------------------------------

# How far the outputs may be off after folding, of the largest, by the coarsest dtype in the net.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


def is_batchnorm(module: nn.Module) -> bool:
    """Whether it is a batch norm of torch, or one of another library by its name."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or \
        "BatchNorm" in type(module).__name__


def is_batchnorm_act(bn: nn.Module) -> bool:
    """Whether it is timm's BatchNormAct2d, which runs dropout and activation behind the norm."""
    return any(kind.__name__ == "BatchNormAct2d" and kind.forward is type(bn).forward
               for kind in type(bn).__mro__)


def why_not_folded(layer: nn.Module | None, bn: nn.Module, compared: bool) -> str:
    """Why we leave bn behind layer as it is, or "" if we can fold it. compared: whether we compare
    the network's outputs afterwards."""
    if not isinstance(bn, nn.BatchNorm2d):
        return f"a {type(bn).__name__} stays float, because we fold BatchNorm2d only"
    if not isinstance(layer, nn.Conv2d):
        return "no Conv2d is defined right before it"
    if layer.out_channels != bn.num_features:
        return "the Conv2d before it has another number of channels"
    if bn.running_mean is None:
        return "it has no running statistics"
    if layer._forward_hooks or bn._forward_hooks or bn._forward_pre_hooks:
        return "a hook can change what it reads or returns"
    if type(bn).forward is not nn.BatchNorm2d.forward and not is_batchnorm_act(bn):
        return f"{type(bn).__name__} has a forward of its own"
    own = dict(layer.named_parameters(recurse=False))
    if "weight" not in own or (layer.bias is not None and "bias" not in own):
        return "the weight or bias of the Conv2d before it is computed from others (weight norm?)"
    if type(layer).forward is not nn.Conv2d.forward and not compared:
        # Padding as in TensorFlow is no problem, but standardising the weight is.
        return f"{type(layer).__name__} has a forward of its own. Give an example input x to try it"
    return ""


def tensors_in(output) -> list[Tensor]:
    """The floating-point tensors of a network's output: a tensor, or dicts, tuples, lists and
    dataclasses of them."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    if isinstance(output, dict):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    else:
        parts = vars(output).values() if is_dataclass(output) else []
    found = []
    for part in parts:
        found += tensors_in(part)
    return found


@torch.no_grad()
def exact_outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    """tensors_in net's output, in float64. x stays as it is, because net gets a copy to work on.
    TF32 is off meanwhile, because cuDNN's convolutions then round their inputs to 11 bits."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return [t.cpu().double() for t in tensors_in(net(x.clone()))]
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def distance(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference between outputs, in units of the largest number of each tensor. A
    tensor of zeros has no unit, so there we take the difference itself."""
    worst = torch.zeros((), dtype=torch.float64)
    for a, b in zip(before, after, strict=True):
        largest = a.abs().max()
        unit = largest if largest > 0 else torch.ones_like(largest)
        worst = torch.maximum(worst, (a - b).abs().max() / unit)     # nan stays nan
    return float(worst)


def swap(places: list[tuple]) -> list[tuple]:
    """Put each (parent, name, module) into its place, and return what was there, as such a list."""
    old = [(parent, name, getattr(parent, name)) for parent, name, _ in places]
    for parent, name, module in places:
        setattr(parent, name, module)
    return old


def fold_batchnorm(net: nn.Module, x: Tensor | None = None) -> nn.Module:
    """Fold each BatchNorm2d into the Conv2d that is defined just before it, in place. Return net.

    We put net in eval mode, because what we fold are the running statistics. Batch norm becomes
    nn.Identity, and of timm's BatchNormAct2d dropout and activation stay. A norm that computes
    anything else stays, and we warn which and why.

    The order of definition can differ from the order of use, for example in a pre-activation
    network: norm, ReLU, convolution. So give an example input x, and we compare the outputs.
    ValueError: the folded network computes something else. Then net's modules are as before.
    """
    places = []
    left = {}                                                        # why -> names
    for path, parent in net.eval().named_modules():
        children = [("", None), *parent.named_children()]
        for (conv_name, layer), (bn_name, bn) in zip(children, children[1:], strict=False):
            if not is_batchnorm(bn):
                continue
            why = why_not_folded(layer, bn, x is not None)
            if why:
                left.setdefault(why, []).append(f"{path}.{bn_name}".removeprefix("."))
                continue
            fused = fuse_conv_bn_eval(layer, bn)
            fused.requires_grad_(layer.weight.requires_grad)         # also the new bias
            behind = nn.Sequential(bn.drop, bn.act) if is_batchnorm_act(bn) else nn.Identity()
            places += [(parent, conv_name, fused), (parent, bn_name, behind)]
    for why, names in left.items():
        warnings.warn(f"batch norm not folded, {why}: {names}", stacklevel=2)
    if x is None:
        swap(places)
        return net

    before = exact_outputs(net, x)
    if not before:
        raise ValueError("net(x) returns no floating-point tensor that we can compare: leave out x")
    allowed = max((TOLERANCE.get(p.dtype, 0.1) for p in net.parameters()), default=1e-3)
    old = swap(places)
    try:
        off = distance(before, exact_outputs(net, x))
        if not off <= allowed:                                       # nan is not, either
            raise ValueError(
                f"the folded network's outputs are off by {off:.2g} of the largest: a batch norm "
                "does not follow the convolution before it. We left the network as it was")
    except BaseException:
        swap(old)
        raise
    return net


# ---- Another library's network, cut into blocks --------------------------------------------------

class Reached(Exception):
    """The last layer of a piece has returned. We raise this to leave the network there."""


def first_tensor(output) -> Tensor:
    """What a layer or a network passes on: the tensor that it returns, or the first of several."""
    if isinstance(output, dict):                                     # Hugging Face's are dicts
        output = tuple(output.values())
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise ValueError(f"a layer or the network returns a {type(output).__name__}: a tensor, or "
                         "several, is allowed")
    return first


class Piece(nn.Module):
    """A network from the output of one of its layers to that of the next. blocks_of makes it.

    We run the network itself, but the layers before our piece compute nothing. They return what
    they returned for the example, and the last of them returns x. So the network makes masks,
    positions and the like as it always does, and gives them to the layer that we want.
    """

    def __init__(self, own: dict[str, nn.Module], index: int, *shared):
        super().__init__()
        for path, module in own.items():
            self.add_module(path.replace(".", "/"), module)
        self.index = index
        self.shared = shared                                         # a tuple holds no submodules

    def forward(self, x):
        net, layers, states, others = self.shared
        shape = states[self.index].shape[1:]
        if x.shape[1:] != shape:
            raise ValueError(f"piece {self.index} gets {tuple(x.shape)}: (N, *{tuple(shape)}) is "
                             "allowed, as in the example")
        # What goes into the network, and after that what each layer before our piece returns.
        states = [state.repeat_interleave(len(x), 0) for state in states[:self.index]] + [x]

        def answer(i):
            output = states[i + 1] if others[i] is None else (states[i + 1], *others[i])
            return lambda *args, **kwargs: output

        def and_leave(forward):
            def last(*args, **kwargs):
                raise Reached(forward(*args, **kwargs))
            return last

        with ExitStack() as stack:                                   # at its end all are put back
            for i, layer in enumerate(layers[:self.index]):
                stack.enter_context(patch.object(layer, "forward", answer(i)))
            for layer in layers[self.index:self.index + 1]:          # the last piece may have none
                stack.enter_context(patch.object(layer, "forward", and_leave(layer.forward)))
            try:
                return first_tensor(net(states[0]))
            except Reached as reached:
                return first_tensor(reached.args[0])

    def _apply(self, fn, recurse=True):
        # .to(device) and .double() call this. A piece needs the whole network in the same place.
        net, _, states, _ = self.shared
        net._apply(fn)
        states[:] = map(fn, states)
        return self


def compare(blocks: list[Piece], net: nn.Module, x: Tensor) -> None:
    """ValueError unless the blocks, one after the other, return on x what net returns."""
    for some in x.split(32):
        y, expected = some, first_tensor(net(some.clone()))
        for block in blocks:
            y = block(y.clone())                                     # it may work in place
        off, largest = (y - expected).abs().max(), expected.abs().max()
        if not off <= 100 * torch.finfo(y.dtype).eps * largest:
            raise ValueError(
                f"the pieces are not the network: their outputs are off by {off:.2g}, the largest "
                f"is {largest:.2g}. Something that depends on the input goes past the cuts, such "
                "as a skip or a mask of padding. Give the part that it spans as one layer")


@torch.no_grad()
def blocks_of(net: nn.Module, x: Tensor, layers) -> list[Piece]:
    """Cut a network after each of its repeated layers. Return its pieces, as quantize_model's
    blocks.

    The first piece is everything up to the output of layers[0]. The last piece is what follows the
    last layer, and if that has no parameters, it belongs to the piece before it. A piece owns the
    layers that run in it. It names them by their path in net, with "/" in the outer part, for
    example "blocks/3.attn.qkv". The layers are net's own, so you quantize net itself.

    One tensor goes from piece to piece. All else that a layer gets, for example a mask, is made
    anew in each call, from x[0]. So it may not depend on the inputs, and we refuse padding and
    skips past the layers. It also takes time: in each iteration a piece computes the stem again,
    and what stands between the layers before it. On one core, a piece of ViT-Tiny took 1.0 to 1.3
    times as long as the bare layer, of ResNet-18 about twice, of MobileNetV3 1.2 to 3 times.

    Args:
        net: a network that takes x. Afterwards it is in eval mode, and no parameter of it requires
            a gradient.
        x: (N, ...) calibration inputs, at least two. On all of them we compare the pieces with net.
            We find a dependence only if it shows in x: padding, if lengths differ.
        layers: modules inside net, in the order in which they run, such as net.blocks. Each of them
            runs once, and returns the next one's input, alone or as the first of a tuple.

    Raises:
        ValueError: the layers do not run as listed, or the pieces are not the network.
    """
    layers = list(layers)
    paths = {module: path for path, module in net.named_modules() if path}
    for layer in layers:
        if layer not in paths:
            raise ValueError(f"layers has a {type(layer).__name__} that is not inside net")
    if (x == x[:1]).all():
        raise ValueError("x has to hold two inputs that differ: on them we compare")
    net.eval().requires_grad_(False)

    # We run one input, keep what each layer returns, and note in which pieces each module runs.
    pieces = {}
    ran, states, others = [], [x[:1].clone()], []

    def enter(module, args):
        pieces.setdefault(module, set()).add(len(ran))

    def leave(module, args, output):
        enter(module, args)
        if module in layers:
            ran.append(module)
            states.append(first_tensor(output).clone())              # net may change it in place
            others.append(tuple(output[1:]) if isinstance(output, tuple | list) else None)

    with (nn.modules.module.register_module_forward_pre_hook(enter),
          nn.modules.module.register_module_forward_hook(leave)):
        net(x[:1].clone())
    if ran != layers or not layers:
        raise ValueError(f"layers are {[paths[layer] for layer in layers]}, but what runs is "
                         f"{[paths[layer] for layer in ran]}: each has to run once, in this order")

    # A piece owns the largest modules that run in it alone, with all that is inside them.
    owned = [{} for _ in range(len(layers) + 1)]
    inside = set()
    for path, module in net.named_modules():                         # outer ones come first
        found = pieces.get(module, set())
        if module not in inside and (len(found) == 1 or not list(module.children())):
            inside.update(module.modules())
            for i in found:
                owned[i][path] = module
    if not list(nn.ModuleList(owned[-1].values()).parameters()):
        owned[-2].update(owned.pop())
        layers.pop()
    blocks = [Piece(own, i, net, layers, states, others) for i, own in enumerate(owned)]

    compare(blocks, net, x)
    return blocks


# ---- Data ----------------------------------------------------------------------------------------

def digits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's 1,797 handwritten digits, standardised: images (N, 1, 8, 8) and labels
    (N,), 1,200 to train on (chosen once, at random), then 597 to test on. We standardise in dtype,
    because the mean of 76,800 pixels in float32 differs between processors."""
    from sklearn.datasets import load_digits
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.images[order], dtype=dtype)[:, None]       # (N, 1, 8, 8)
    y = torch.tensor(data.target[order])
    x = (x - x[:1200].mean()) / x[:1200].std()
    return x[:1200], y[:1200], x[1200:], y[1200:]


def cifar10(folder, train: bool) -> tuple[Tensor, Tensor]:
    """Read CIFAR-10 from its binary files in the folder or its cifar-10-batches-bin: all training
    batches that are there, or the test batch. Returns images (N, 3, 32, 32), normalised as the
    ResNet-20 checkpoint wants them, and labels (N,)."""
    pattern = "data_batch_*.bin" if train else "test_batch.bin"
    files = sorted(Path(folder).glob(pattern))
    if not files:
        files = sorted(Path(folder).glob(f"cifar-10-batches-bin/{pattern}"))
    if not files:
        raise FileNotFoundError(f"no {pattern} in {folder}: CIFAR-10's binary version is needed")
    raw = np.concatenate([np.fromfile(file, dtype=np.uint8) for file in files])
    raw = torch.from_numpy(raw).view(-1, 3073)                       # a record: label, RGB planes
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = raw[:, 1:].reshape(-1, 3, 32, 32).float().div_(255).sub_(mean).div_(std)
    return x, raw[:, 0].long()


def paragraphs(topics: dict[str, str]) -> dict[str, str]:
    """Return the paragraphs of Python's help topics by the first 8 hex digits of their SHA-256.
    White space becomes single spaces, because line breaks differ between versions of Python."""
    found = {}
    for topic in sorted(topics):
        for part in topics[topic].split("\n\n"):
            paragraph = " ".join(part.split())
            found[hashlib.sha256(paragraph.encode()).hexdigest()[:8]] = paragraph
    return found


def help_text() -> tuple[str, str]:
    """Return the English reference text that ships with Python, one paragraph a line, and what it
    lacks: "" or, for example, "2 of 1,440 paragraphs".

    The reference text changes with Python's version. So we take only the paragraphs that are the
    same in each version from 3.10 to 3.14. PARAGRAPHS lists their hashes, in the order of the text.
    """
    from pydoc_data.topics import topics
    here = paragraphs(topics)
    wanted = PARAGRAPHS.read_text().split()
    found = [here[key] for key in wanted if key in here]
    lacks = ""
    if len(found) < len(wanted):
        lacks = f"{len(wanted) - len(found):,} of {len(wanted):,} paragraphs"
        warnings.warn(f"Python {platform.python_version()} lacks {lacks} of the text on which the "
                      "GPT was trained, so its perplexity differs from ours", stacklevel=3)
    return "\n".join(found), lacks


def text(path=None) -> str:
    """Read a text file, UTF-8. Without a path, return the text on which the GPT was trained."""
    if path is None:
        return help_text()[0]
    return Path(path).read_text(encoding="utf-8")


def characters(string: str, vocabulary: str) -> Tensor:
    """Return a text as character tokens, (length,). Token i is vocabulary[i], and we leave out
    characters that are not in it."""
    index = {c: i for i, c in enumerate(vocabulary)}
    return torch.tensor([index[c] for c in string if c in index])


# ---- Scores --------------------------------------------------------------------------------------

@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 500) -> float:
    """Return the top-1 accuracy in percent on images x (N, C, H, W) with labels y (N,), in eval
    mode."""
    device = next(model.eval().parameters(), x).device
    right = 0
    for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
        guesses = model(xs.to(device)).argmax(1)
        right += int((guesses == ys.to(device)).sum())
    return 100 * right / len(y)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, context: int, batch_size: int = 32) -> float:
    """Return exp(mean negative log-likelihood) of each next token, in eval mode. We cut tokens
    (length,) into windows of `context` inputs that do not overlap, and drop what is left over."""
    device = next(model.eval().parameters(), tokens).device
    count = (len(tokens) - 1) // context
    if count < 1:
        raise ValueError(f"{len(tokens)} tokens do not fill one window of {context} + 1")
    x = tokens[:count * context].view(count, context)                # (windows, context)
    y = tokens[1:count * context + 1].view(count, context)
    total = 0
    for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
        logits = model(xs.to(device)).flatten(0, 1)                  # (windows * context, V)
        if logits.dtype != torch.float64:
            logits = logits.float()                                  # half precision loses digits
        loss = F.cross_entropy(logits, ys.to(device).flatten(), reduction="sum")
        total = total + loss.double()
    return float(torch.exp(total / y.numel()))


# ---- What the main job runs on -------------------------------------------------------------------

@dataclass
class Task:
    net: nn.Module                   # trained, batch norm folded, eval mode
    calibration: Tensor              # (N, ...) training inputs, drawn by the seed
    score: Callable                  # score(net) -> percent or perplexity
    batch_size: int                  # inputs per iteration
    about: str                       # one line: the network, the data, what is scored


def draw(n: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of `count` inputs out of n, drawn by the seed, and those of the others."""
    if not 0 < count < n:
        raise ValueError(f"samples = {count}: 1 to {n - 1} are allowed")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[:count], order[count:]


def image_task(net, x, y, test, about: str, samples: int, seed: int = 0, split: str = "test"):
    """Calibrate on training images x, and score the test images. With split "train" score the
    other training images instead: on these you may choose settings."""
    index, rest = draw(len(x), samples, seed)
    fold_batchnorm(net, x[:8])
    if split == "test":
        x_test, y_test = test
    else:
        x_test, y_test = x[rest], y[rest]
    weights = sum(p.numel() for p in net.parameters())
    return Task(net, x[index], lambda net: accuracy(net, x_test, y_test), 32,
                f"{weights:,} weights; {about}; accuracy on {len(y_test):,} {split} images")


def text_task(net: GPT, tokens: Tensor, about: str, samples: int, seed: int = 0,
              split: str = "test"):
    """Calibrate on the first 90 % of the tokens, on which net was trained, and score the last 5 %.
    With split "train" score the 5 % between instead: on these you may choose settings."""
    a = int(0.9 * len(tokens))
    b = int(0.95 * len(tokens))
    held = tokens[b:] if split == "test" else tokens[a:b]
    start, _ = draw(a - net.context, samples, seed)
    windows = start[:, None] + torch.arange(net.context)             # (samples, context)
    return Task(net.eval(), tokens[windows], lambda net: perplexity(net, held, net.context), 8,
                f"{about}; perplexity on {len(held):,} {split} tokens")


# The main job's networks, and how many calibration inputs each of them gets.
SAMPLES = {"resnet": 512, "mobilenet": 512, "gpt": 128, "resnet20": 1024}


def load_task(name: str, data=None, networks=NETWORKS, seed: int = 0, split: str = "test",
              samples: int | None = None, dtype: torch.dtype | None = None) -> Task:
    """Return one of the main job's networks, with its data.

    "resnet" and "mobilenet" classify digits, and "gpt" continues Python's own help texts. Their
    trained weights lie in the folder `networks` (experiments/train.py made them). "resnet20"
    classifies CIFAR-10, whose files lie in the folder `data`. If the checkpoint is also there, it
    is not downloaded. The seed draws `samples` calibration inputs. Raises ValueError if the name is
    unknown.

    dtype: of the network and its images. None is float32, as the networks were trained. Processors
    add up in different orders. In float32 the noise of that (1e-7) flips a rounding now and then,
    and training amplifies it. In float64 the noise is 1e-16, and no rounding flips.
    """
    if name not in SAMPLES:
        raise ValueError(f"model = {name!r}: {', '.join(SAMPLES)} are allowed")
    if samples is None:
        samples = SAMPLES[name]
    if dtype is None:
        dtype = torch.float32
    if name == "resnet20":
        if data is None:
            raise ValueError("resnet20 needs the folder of CIFAR-10's binary files (--data)")
        here = [Path(data, part, "resnet20-12fca82f.th") for part in ("", "weights")]
        net = resnet20(next((path for path in here if path.exists()), None)).to(dtype)
        x, y = cifar10(data, train=True)
        x_test, y_test = cifar10(data, train=False)
        return image_task(net, x.to(dtype), y, (x_test.to(dtype), y_test), "CIFAR-10", samples,
                          seed, split)

    saved = torch.load(Path(networks) / f"{name}.pt", weights_only=True)
    if name == "resnet":
        net = ResNet((8, 16, 32), 1, "conv", channels=1)
    elif name == "mobilenet":
        net = MobileNet((8, 16, 24), channels=1)
    else:
        net = GPT(len(saved["vocabulary"]), layers=3)
    net.load_state_dict(saved["state"])
    net = net.to(dtype)
    if name == "gpt":
        string, lacks = help_text()
        about = f"Python's help texts without {lacks}" if lacks else "Python's help texts"
        return text_task(net, characters(string, saved["vocabulary"]), about, samples, seed, split)
    x, y, *test = digits(dtype)
    return image_task(net, x, y, test, "scikit-learn's digits", samples, seed, split)
