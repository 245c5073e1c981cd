"""The networks and data that FlexRound is tried on: ResNets, a MobileNetV2-like net, GPTs.

Nothing here knows of quantization. The one thing that reconstruct.py asks of a network is .blocks,
an ordered list of Tensor -> Tensor modules that, run one after the other, *are* the network:

    for block in net.blocks: x = block(x)

A ResNet's blocks are the stem, each residual block (its addition and ReLU inside), and pooling with
the classifier; a GPT's are the embeddings, each transformer block, and the last norm with the head.
Fold batch norm into the convolutions first (fold_batchnorm), as the paper does.

Shapes at line ends: N images, C channels, H x W pixels; B sequences of T tokens, D channels.
"""
import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm.auto import tqdm


class Blocks(nn.Module):
    """A network that is the list of its blocks."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# ---- Published weights ---------------------------------------------------------------------------

# Where from, by the name in torch's hub cache, which holds how the file's SHA-256 begins: as these
# files are called where they lie, but GPT-2's, whose hash is the one that its page states.
PUBLISHED = {
    "resnet20-12fca82f.th": "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/"
                            "pretrained_models/resnet20-12fca82f.th",
    "resnet18-f37072fd.pth": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet50-0676ba61.pth": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "gpt2-7c5d3f4b.bin": "https://huggingface.co/openai-community/gpt2/resolve/"
                         "607a30d783dfa663caf39e06633721c8d4cfcd7e/pytorch_model.bin",
}


def published(name: str) -> Path:
    """A file of PUBLISHED, downloaded once, its hash checked. RuntimeError where that fails."""
    path, url = Path(torch.hub.get_dir()) / "checkpoints" / name, PUBLISHED[name]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), re.search("-(.{8})", name)[1])
    except OSError as error:
        raise RuntimeError(f"could not download {url} ({error}): fetch it by hand and give its "
                           "path") from error
    return path


def load_file(path) -> dict:
    """The dict in a file of torch's (weights only: no code runs), of safetensors or of JSON, by
    its suffix. ValueError: not readable."""
    try:
        if Path(path).suffix == ".json":
            return dict(json.loads(Path(path).read_text(encoding="utf-8")))
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file as load_safetensors
            return load_safetensors(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: pip install safetensors") from error
    except FileNotFoundError:
        raise
    except Exception as error:                                       # torch raises many kinds
        raise ValueError(f"{path}: truncated or not readable ({type(error).__name__})") from error


@torch.no_grad()
def fill(net: nn.Module, saved: dict[str, Tensor], name_of: Callable[[str], str], what: str,
         transposed: tuple[str, ...] = ()) -> nn.Module:
    """Copy the tensors of a file into net, in place; return net in eval mode.

    By name, since published files have them in another order: name_of gives saved's key for one of
    ours. What ends in `transposed` is the transpose of ours. `what` is for the errors, ValueError,
    which name the first tensor that is missing, of another shape or without a place.
    """
    def tensors(state):                                              # counts are only for training
        return {key: value for key, value in state.items() if isinstance(value, Tensor)
                and not key.endswith("num_batches_tracked")}

    saved = tensors(saved)
    ours = {name_of(key): mine for key, mine in tensors(net.state_dict()).items()}
    for name, mine in ours.items():
        mine = mine.T if name.endswith(transposed) else mine         # a view: copy_ writes to net
        if name not in saved or saved[name].shape != mine.shape:
            found = f"has shape {tuple(saved[name].shape)}" if name in saved else "is missing"
            raise ValueError(f"{what}: {name!r} {found}; {tuple(mine.shape)} is needed")
        mine.copy_(saved[name])
    for name, value in saved.items():
        if name not in ours:
            raise ValueError(f"{what}: {name!r}, {tuple(value.shape)}, has no place there")
    return net.eval()


# ---- ResNets (He et al. 2016) --------------------------------------------------------------------

def conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm, same-size padding."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups,
                                   bias=False), nn.BatchNorm2d(c_out))


class PadShortcut(nn.Module):
    """The parameter-free shortcut ("option A"): every stride-th pixel, new channels zero."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride, self.before = stride, (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x):
        x = x[:, :, ::self.stride, ::self.stride]                    # (N, c_in, H/s, W/s)
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))       # (N, c_out, H/s, W/s)


def make_shortcut(kind: str, c_in: int, c_out: int, stride: int) -> nn.Module:
    """Identity where shapes agree, else zero-padded ("pad") or a 1 x 1 convolution ("conv")."""
    if kind not in ("pad", "conv"):
        raise ValueError(f"shortcut = {kind!r}: 'pad' and 'conv' are allowed")
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return (PadShortcut(c_in, c_out, stride) if kind == "pad" else
            conv_bn(c_in, c_out, 1, stride))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, shortcut: str = "conv"):
        super().__init__()
        self.conv1 = conv_bn(c_in, c_out, 3, stride)
        self.conv2 = conv_bn(c_out, c_out, 3)
        self.shortcut = make_shortcut(shortcut, c_in, c_out, stride)

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x)))                        # (N, c_out, H/s, W/s)
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 x 1 to a quarter of c_out, 3 x 3 there, 1 x 1 to c_out, and a shortcut. The stride is the
    3 x 3's, as in torchvision; He et al. have it at the first 1 x 1."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, shortcut: str = "conv"):
        super().__init__()
        self.conv1 = conv_bn(c_in, c_out // 4, 1)
        self.conv2 = conv_bn(c_out // 4, c_out // 4, 3, stride)
        self.conv3 = conv_bn(c_out // 4, c_out, 1)
        self.shortcut = make_shortcut(shortcut, c_in, c_out, stride)

    def forward(self, x):
        y = F.relu(self.conv1(x))                                    # (N, c_out/4, H, W)
        y = F.relu(self.conv2(y))                                    # (N, c_out/4, H/s, W/s)
        return F.relu(self.conv3(y) + self.shortcut(x))              # (N, c_out, H/s, W/s)


def classifier(channels: int, classes: int) -> nn.Sequential:
    """Global average pooling and a linear layer: (N, C, H, W) -> (N, classes)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class ResNet(Blocks):
    """A stem, then stages of blocks, `depth` in all or each; all stages but the first halve H and
    W. The stem is a 3 x 3 convolution, or ImageNet's, 7 x 7 and max pooling: a quarter of H and W.

    ResNet(widths=(16, 32, 64), depth=3, shortcut="pad") is the CIFAR-10 ResNet-20.
    """

    def __init__(self, widths=(16, 32, 64), depth: int | tuple[int, ...] = 3,
                 shortcut: str = "conv", channels: int = 3, classes: int = 10, block=BasicBlock,
                 imagenet: bool = False):
        depths = depth if isinstance(depth, tuple) else (depth,) * len(widths)
        c_in = widths[0] // 4 if block is Bottleneck else widths[0]
        stem = ([*conv_bn(channels, c_in, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)] if imagenet else
                [*conv_bn(channels, c_in, 3), nn.ReLU()])
        blocks, names = [nn.Sequential(*stem)], ["conv1"]            # names: in published files
        for stage, (c_out, depth) in enumerate(zip(widths, depths, strict=True)):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(c_in, c_out, stride, shortcut))
                names.append(f"layer{stage + 1}.{i}")
                c_in = c_out
        super().__init__(*blocks, classifier(c_in, classes))
        self.names = [*names, "fc"]

    def published_name(self, key: str) -> str:
        """blocks.3.conv2.1.bias is layer2.0.bn2.bias in torchvision's files, say."""
        _, i, rest = key.split(".", 2)
        name = f"{self.names[int(i)]}.{rest}".replace("shortcut", "downsample")
        name = re.sub(r"conv(\d)\.(\d)", lambda m: ("conv", "bn")[int(m[2])] + m[1], name)
        return name.replace("fc.2.", "fc.")


def resnet20(path: str | os.PathLike | None = None) -> ResNet:
    """The public CIFAR-10 ResNet-20 by akamaster (91.73 % on test), batch norm not folded.

    Args:
        path: resnet20-12fca82f.th; None downloads it once into torch's hub cache, hash checked.

    Raises:
        ValueError: a file that is not that checkpoint, naming the first tensor that is wrong.
        FileNotFoundError: no such file. RuntimeError: no path and no network.
    """
    return _resnet("resnet20-12fca82f.th", path, ResNet(shortcut="pad"))


def resnet18(path: str | os.PathLike | None = None) -> ResNet:
    """torchvision's ResNet-18, IMAGENET1K_V1; path: resnet18-f37072fd.pth; else as resnet20."""
    return _resnet("resnet18-f37072fd.pth", path, ResNet(
        (64, 128, 256, 512), (2, 2, 2, 2), classes=1000, imagenet=True))


def resnet50(path: str | os.PathLike | None = None) -> ResNet:
    """torchvision's ResNet-50, IMAGENET1K_V1; path: resnet50-0676ba61.pth; else as resnet20."""
    return _resnet("resnet50-0676ba61.pth", path, ResNet(
        (256, 512, 1024, 2048), (3, 4, 6, 3), classes=1000, block=Bottleneck, imagenet=True))


def _resnet(file: str, path, net: ResNet) -> ResNet:
    path = published(file) if path is None else path
    saved = load_file(path)
    saved = {key.removeprefix("module.").replace("linear.", "fc."): value    # akamaster's names
             for key, value in saved.get("state_dict", saved).items()}
    return fill(net, saved, net.published_name, f"{path} is not {file}")


# ---- A MobileNetV2-like network (Sandler et al. 2018) --------------------------------------------

class InvertedResidual(nn.Module):
    """1 x 1 to more channels, 3 x 3 depthwise, 1 x 1 back; ReLU6; added to x where shapes agree."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, expand: int = 4):
        super().__init__()
        wide = c_in * expand
        self.expand = conv_bn(c_in, wide, 1)
        self.depthwise = conv_bn(wide, wide, 3, stride, groups=wide)
        self.project = conv_bn(wide, c_out, 1)
        self.add = stride == 1 and c_in == c_out

    def forward(self, x):
        y = F.relu6(self.expand(x))                                  # (N, wide, H, W)
        y = F.relu6(self.depthwise(y))                               # (N, wide, H/s, W/s)
        y = self.project(y)                                          # (N, c_out, H/s, W/s)
        return x + y if self.add else y


class MobileNet(Blocks):
    """A small MobileNetV2-like network: stem, inverted residuals, 1 x 1 convolution, classifier.

    The convolutions of the depthwise kind, a few weights a channel and very unequal channels, are
    where the paper reports FlexRound's largest gains.
    """

    def __init__(self, widths=(16, 24, 32), depth: int = 2, channels: int = 3, classes: int = 10,
                 stride: int = 1):
        blocks = [nn.Sequential(*conv_bn(channels, widths[0], 3, stride), nn.ReLU6())]
        c_in = widths[0]
        for stage, c_out in enumerate(widths):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(InvertedResidual(c_in, c_out, stride))
                c_in = c_out
        last = nn.Sequential(*conv_bn(c_in, 2 * c_in, 1), nn.ReLU6())
        super().__init__(*blocks, last, classifier(2 * c_in, classes))


def fold_batchnorm(net: nn.Module) -> nn.Module:
    """Fold each BatchNorm2d into the Conv2d that is defined just before it, in place; return net.

    Puts net in eval mode: what is folded are the running statistics. Batch norm becomes
    nn.Identity. Warns of those that follow no convolution and so stay.
    """
    net.eval()
    for parent in list(net.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (bn_name, bn) in zip(children, children[1:], strict=False):
            if (isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
                    and conv.out_channels == bn.num_features):
                fused = fuse_conv_bn_eval(conv, bn)
                fused.requires_grad_(conv.weight.requires_grad)      # the new bias, too
                setattr(parent, conv_name, fused)
                setattr(parent, bn_name, nn.Identity())
    left = [name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    if left:
        warnings.warn(f"batch norm not folded, no convolution right before it: {left}",
                      stacklevel=2)
    return net


@torch.no_grad()
def rescale(net: ResNet, spread: float, seed: int = 0) -> ResNet:
    """Make the channels inside each basic block unequal without changing what it computes.

    Each output channel of conv1 is multiplied by a factor from 1 / spread to spread (uniform in its
    logarithm) and the same input channel of conv2 divided by it; the ReLU between lets the factor
    pass. Batch norm has to be folded. In place; returns net.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in (b for b in net.modules() if isinstance(b, BasicBlock) and spread != 1):
        conv1, conv2 = block.conv1[0], block.conv2[0]
        factor = spread ** (2 * torch.rand(conv1.out_channels, generator=generator) - 1)
        conv1.weight.mul_(factor.view(-1, 1, 1, 1))
        conv1.bias.mul_(factor)
        conv2.weight.div_(factor.view(1, -1, 1, 1))
    return net


# ---- A GPT (GPT-2's architecture, in nanoGPT's spirit) -------------------------------------------

class Embeddings(nn.Module):
    """Token and learned position embeddings: (B, T) integers -> (B, T, D)."""

    def __init__(self, vocabulary: int, context: int, width: int):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)

    def forward(self, tokens):
        T = tokens.shape[1]
        if T > self.position.num_embeddings:
            raise ValueError(f"{T} tokens: at most {self.position.num_embeddings} are allowed")
        return self.token(tokens) + self.position.weight[:T]         # (B, T, D)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); causal; tanh GELU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.heads, D // self.heads).transpose(1, 2)
                   for part in self.qkv(self.norm1(x)).split(D, dim=2))   # (B, heads, T, D/heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, D/heads)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))         # (B, T, D)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Head(nn.Module):
    """Last norm and the projection to logits, tied to the embedding: (B, T, D) -> (B, T, V)."""

    def __init__(self, token: nn.Embedding):
        super().__init__()
        self.norm = nn.LayerNorm(token.embedding_dim)
        self.project = nn.Linear(token.embedding_dim, token.num_embeddings, bias=False)
        self.project.weight = token.weight                           # tied: it stays float

    def forward(self, x):
        return self.project(self.norm(x))


class GPT(Blocks):
    """GPT-2's architecture: model(tokens) returns logits, (B, T) -> (B, T, vocabulary).

    Args:
        vocabulary: how many different tokens; context: most tokens in a sequence; layers: how many
            transformer blocks; heads: attention heads, a divisor of width; width: D.
    """

    def __init__(self, vocabulary: int, context: int = 64, layers: int = 4, heads: int = 4,
                 width: int = 64):
        if heads < 1 or width % heads:
            raise ValueError(f"heads = {heads}: a divisor of the width, {width}, is allowed")
        embeddings = Embeddings(vocabulary, context, width)
        super().__init__(embeddings, *(TransformerBlock(width, heads) for _ in range(layers)),
                         Head(embeddings.token))
        for name, p in self.named_parameters():                      # GPT-2's start
            if name.endswith(("out.weight", "down.weight")):         # they add to the residual
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def context(self) -> int:
        return self.blocks[0].position.num_embeddings


# Ours on the left; on the right GPT-2's, of which all but the norms are Conv1D: (in, out) weights.
GPT2_NAMES = {"norm1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "norm2": "ln_2",
              "up": "mlp.c_fc", "down": "mlp.c_proj", "norm": "ln_f", "token": "wte",
              "position": "wpe", "project": "wte"}                   # the head is tied


def gpt2(path: str | os.PathLike | None = None, n_head: int | None = None) -> GPT:
    """A network of the GPT-2 family with its published weights; the sizes are the tensors'.

    Args:
        path: pytorch_model.bin or model.safetensors of openai-community/gpt2, -medium, -large, -xl
            or of another GPT-2; None downloads GPT-2 small once into torch's hub cache.
        n_head: attention heads; None is n_head of a config.json beside the file, or width / 64.

    Raises:
        ValueError: a file that is not a GPT-2, naming key and shape, or heads that do not fit.
        FileNotFoundError, RuntimeError: as resnet20. ImportError: no safetensors.
    """
    path = published("gpt2-7c5d3f4b.bin") if path is None else Path(path)
    # Old files hold the causal mask, too. A head, where there is one, is the embedding again.
    saved = {key.removeprefix("transformer."): value for key, value in load_file(path).items()
             if not key.endswith((".attn.bias", ".attn.masked_bias"))}
    shapes = [tuple(getattr(saved.get(key), "shape", ())) for key in ("wte.weight", "wpe.weight")]
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"{path} is not a GPT-2: 'wte.weight' and 'wpe.weight' have the shapes "
                         f"{shapes}; two dimensions each are needed")
    (vocabulary, width), (context, _) = shapes
    if not torch.equal(saved.pop("lm_head.weight", saved["wte.weight"]), saved["wte.weight"]):
        raise ValueError(f"{path}: 'lm_head.weight' is not 'wte.weight', {(vocabulary, width)}, as "
                         "it is in GPT-2")
    beside = path.with_name("config.json")
    config = load_file(beside) if beside.exists() else {}
    for key, ours in (("activation_function", "gelu_new"), ("layer_norm_epsilon", 1e-5)):
        if config.get(key, ours) != ours:
            raise ValueError(f"{beside}: {key} = {config[key]!r}: {ours!r} is allowed")
    heads = config.get("n_head") if n_head is None else n_head
    if heads is None and width % 64:
        raise ValueError(f"{path}: width {width} is no multiple of 64: give n_head")
    layers = {int(m[1]) for m in map(re.compile(r"h\.(\d+)\.").match, saved) if m}
    net = GPT(vocabulary, context, len(layers) or 1, width // 64 if heads is None else heads, width)

    def name_of(key):
        _, i, part, kind = key.split(".")
        inner = f"h.{int(i) - 1}." if 0 < int(i) < len(net.blocks) - 1 else ""
        return f"{inner}{GPT2_NAMES[part]}.{kind}"

    return fill(net, saved, name_of, f"{path} is not a GPT-2",
                ("c_attn.weight", "c_proj.weight", "c_fc.weight"))


# ---- Data ----------------------------------------------------------------------------------------

def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits, standardised: images and labels, 1,200 to train on
    (chosen once, at random), 597 to test on. Images (N, 1, 8, 8), labels (N,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.images[order], dtype=torch.float32)[:, None]    # (N, 1, 8, 8)
    y = torch.tensor(data.target[order])
    x = (x - x[:1200].mean()) / x[:1200].std()
    return x[:1200], y[:1200], x[1200:], y[1200:]


def cifar10(folder: str | os.PathLike, train: bool) -> tuple[Tensor, Tensor]:
    """CIFAR-10 from its official binary files: images (N, 3, 32, 32), normalised as the ResNet-20
    checkpoint wants them, and labels (N,).

    Args:
        folder: holds data_batch_*.bin and test_batch.bin, itself or in cifar-10-batches-bin.
        train: all the training batches that are there (of five), or the test batch.

    Raises:
        FileNotFoundError: none of the files is there. ValueError: a truncated file.
    """
    pattern = "data_batch_*.bin" if train else "test_batch.bin"
    folder = Path(folder)
    files = sorted(folder.glob(pattern)) or sorted(folder.glob(f"cifar-10-batches-bin/{pattern}"))
    if not files:
        raise FileNotFoundError(f"no {pattern} in {folder} or {folder}/cifar-10-batches-bin: the "
                                "binary version of CIFAR-10 is needed")
    raw = []
    for file in files:                                               # a record: label, RGB planes
        record = np.fromfile(file, dtype=np.uint8)
        if record.size == 0 or record.size % 3073:
            raise ValueError(f"{file}: {record.size} bytes is not a multiple of 3,073, a record")
        raw.append(record.reshape(-1, 3073))
    raw = torch.from_numpy(np.concatenate(raw))
    return normalised(raw[:, 1:].reshape(-1, 3, 32, 32)), raw[:, 0].long()


def normalised(raw: Tensor) -> Tensor:
    """Bytes (..., 3, H, W) as floats, less ImageNet's mean, over its standard deviation."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return raw.float().div_(255).sub_(mean).div_(std)


def imagenet(folder: str | os.PathLike, part: str) -> tuple[list[tuple[Path, int]], list[str]]:
    """The image files of folder/part (train or val), each with its class, for image_batches; and
    the classes' names: a folder each, numbered in order. FileNotFoundError: not this layout."""
    root = Path(folder) / part
    classes = sorted(d for d in root.iterdir() if d.is_dir()) if root.is_dir() else []
    files = [(file, label) for label, d in enumerate(classes) for file in sorted(d.iterdir())
             if file.suffix.lower() in (".jpeg", ".jpg", ".png")]
    if not files:
        raise FileNotFoundError(f"no images in {root}/<class>/: {folder} must hold train and val "
                                "with one folder a class, .jpeg, .jpg or .png files in each")
    return files, [d.name for d in classes]


def read_image(file: str | os.PathLike) -> Tensor:
    """An image as torchvision's IMAGENET1K_V1 weights want it: the shorter side to 256 (bilinear,
    antialiased), the centre 224 x 224, normalised: (3, 224, 224). ValueError: not readable."""
    from PIL import Image
    try:
        with Image.open(file) as image:
            image = image.convert("RGB")
    except Exception as error:                                       # Pillow raises many kinds
        raise ValueError(f"{file}: not a readable image ({type(error).__name__})") from error
    w, h = (256 * side // min(image.size) for side in image.size)
    left, top = round((w - 224) / 2), round((h - 224) / 2)
    image = image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + 224, top + 224))
    return normalised(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def image_batches(files: list[tuple[Path, int]], batch_size: int = 64, label: str = "images"
                  ) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (N, 3, 224, 224) and labels (N,), a batch at a time (50,000 would be 30 GB), each
    batch read by threads; with a progress bar."""
    with ThreadPoolExecutor() as pool, tqdm(total=len(files), desc=label, disable=None) as bar:
        for i in range(0, len(files), batch_size):
            paths, labels = zip(*files[i:i + batch_size], strict=True)
            yield torch.stack(list(pool.map(read_image, paths))), torch.tensor(labels)
            bar.update(len(paths))


def gpt2_tokens(string: str) -> Tensor:
    """A text as GPT-2's tokens, (length,), by the optional package tiktoken."""
    try:
        import tiktoken
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:                                       # of import, network or hash
        raise RuntimeError("GPT-2's tokens need tiktoken (pip install tiktoken) and its vocabulary,"
                           " which it downloads once or finds in the folder TIKTOKEN_CACHE_DIR: "
                           f"{type(error).__name__}") from error
    return torch.tensor(encoding.encode_ordinary(string))


def wikitext2(folder: str | os.PathLike, split: str = "test") -> tuple[Tensor, Tensor, str]:
    """WikiText-2 as GPT-2's tokens: what to calibrate on, what to score, and a line that says so.

    folder holds wiki.test.raw, wiki.valid.raw and wiki.train.raw, or wikitext2.test.txt and so on.
    Scored is test, with split "train" valid; calibrated is on train where it is there, else on
    valid: where that is scored, on its first half, and then only the second is scored.
    FileNotFoundError names what is missing.
    """
    folder = Path(folder)
    found = {part: file for part in ("train", "valid", "test") for file in
             (folder / f"wikitext2.{part}.txt", folder / f"wiki.{part}.raw") if file.exists()}
    held, pool = "test" if split == "test" else "valid", "train" if "train" in found else "valid"
    for part in (held, pool):
        if part not in found:
            raise FileNotFoundError(f"no wiki.{part}.raw and no wikitext2.{part}.txt in {folder}")
    about = f"calibrated on {found[pool].name}, scored on {found[held].name}"
    tokens = gpt2_tokens(text(found[pool]))
    if pool == held:
        half = len(tokens) // 2
        return tokens[:half], tokens[half:], f"{about}, its first and second half"
    return tokens, gpt2_tokens(text(found[held])), about


def text(path: str | os.PathLike | None = None) -> str:
    """A text file, UTF-8, or without a path the English reference text that ships with Python
    (pydoc_data.topics; it changes with Python's version, so quote its hash: see fingerprint)."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    from pydoc_data.topics import topics
    return "\n".join(topics[name] for name in sorted(topics))


def characters(string: str) -> tuple[Tensor, str]:
    """A text as character tokens, (length,), and its vocabulary: token i is vocabulary[i]."""
    vocabulary = "".join(sorted(set(string)))
    index = {c: i for i, c in enumerate(vocabulary)}
    return torch.tensor([index[c] for c in string]), vocabulary


def fingerprint(string: str) -> str:
    """The first 8 hex digits of the text's SHA-256."""
    return hashlib.sha256(string.encode()).hexdigest()[:8]


# ---- Figures of merit ----------------------------------------------------------------------------

@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor | Iterable, y: Tensor | None = None,
             batch_size: int = 500) -> float:
    """Top-1 accuracy in percent on images x (N, C, H, W) with labels y (N,), which may lie on
    another device than the model; or, without y, on the batches (images, labels) that x yields.
    Leaves the model in eval mode."""
    model.eval()
    right = count = 0
    for xs, ys in (x if y is None else
                   zip(x.split(batch_size), y.split(batch_size), strict=True)):
        device = next(model.parameters(), xs).device
        right += (model(xs.to(device)).argmax(1) == ys.to(device)).sum()
        count += len(ys)
    return 100 * float(right) / count


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, context: int, batch_size: int = 32) -> float:
    """exp(mean negative log-likelihood) of each next token, over non-overlapping windows.

    tokens (length,) is cut into windows of `context` inputs; what is left over is dropped. The
    first token of a window is not predicted from the window before it. Leaves the model in eval
    mode.
    """
    model.eval()
    device = next(model.parameters(), tokens).device
    count = (len(tokens) - 1) // context
    if count < 1:
        raise ValueError(f"{len(tokens)} tokens do not fill one window of {context} + 1")
    x = tokens[:count * context].view(count, context)                # (windows, context)
    y = tokens[1:count * context + 1].view(count, context)
    total = sum(F.cross_entropy(model(xs.to(device)).flatten(0, 1).float(), ys.to(device).flatten(),
                                reduction="sum").double()
                for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True))
    return float(torch.exp(total / y.numel()))


@torch.no_grad()
def sample(net: GPT, tokens: Tensor, count: int, seed: int = 0) -> Tensor:
    """tokens (B, T) and `count` more, each drawn from what net makes of the last `context`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        seen = tokens[:, -net.context:].to(net.blocks[0].token.weight.device)
        logits = net(seen)[:, -1]                                    # (B, V)
        drawn = torch.multinomial(logits.float().softmax(1).cpu(), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], 1)
    return tokens


# ---- Training the small networks, once -----------------------------------------------------------

def train(net: nn.Module, batches, loss_of, steps: int, lr: float, label: str) -> nn.Module:
    """AdamW with a one-cycle rate on loss_of(net, batches()), in place."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in (bar := tqdm(range(steps), desc=label, disable=None)):
        loss = loss_of(net, batches())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if bar.n % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return net.eval()


def train_classifier(net, x, y, steps: int = 400, lr: float = 5e-3, batch_size: int = 64,
                     seed: int = 0, label: str = "training", shift: int = 0):
    """Cross-entropy on images x (N, C, H, W) and labels y (N,); batches drawn from the seed, and
    where shift > 0 mirrored and shifted by up to so many pixels, a batch at a time."""
    generator = torch.Generator().manual_seed(seed)

    def batches():
        index = torch.randint(len(x), (batch_size,), generator=generator)
        images = x[index]
        if shift:
            mirror, i, j = torch.randint(2 * shift + 1, (3,), generator=generator).tolist()
            images = F.pad(images.flip(3) if mirror % 2 else images, [shift] * 4)
            images = images[:, :, i:i + x.shape[2], j:j + x.shape[3]]
        return images, y[index]

    return train(net, batches, lambda net, b: F.cross_entropy(net(b[0]), b[1]), steps, lr, label)


def train_gpt(net, tokens, steps: int = 1000, lr: float = 3e-3, batch_size: int = 32, seed: int = 0,
              label: str = "training"):
    """Next-token cross-entropy on windows of tokens (length,) that start anywhere."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(net.context + 1)

    def batches():
        start = torch.randint(len(tokens) - net.context, (batch_size, 1), generator=generator)
        return tokens[start + window]                                # (B, context + 1)

    def loss_of(net, batch):
        return F.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    return train(net, batches, loss_of, steps, lr, label)


# ---- What the main job runs on -------------------------------------------------------------------

@dataclass
class Task:
    """A trained network, its calibration inputs, and the score that counts."""

    net: nn.Module                   # batch norm folded, eval mode
    calibration: Tensor              # (N, ...) training inputs, drawn by the seed
    score: Callable                  # score(net) -> percent or perplexity
    batch_size: int                  # inputs an iteration
    about: str                       # one line: the network, the data, what is scored


def trained(net: nn.Module, path: Path, fit: Callable) -> nn.Module:
    """net with the weights in path; where there is no such file, fit(net) first and write it."""
    if path.exists():
        try:
            net.load_state_dict(load_file(path))
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path} does not hold this network: delete it, and it is trained "
                             "again") from error
    else:
        fit(net)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")                       # never half a file
        torch.save(net.state_dict(), partial)
        partial.replace(path)
    return net.eval()


def load_task(name: str, data=None, checkpoint=None, cache="cache", split: str = "test",
              samples: int | None = None, seed: int = 0, spread: float = 1.0) -> Task:
    """One of the main job's networks, trained where it has to be.

    Args:
        name: "resnet" or "mobilenet" (on digits), "resnet20" (CIFAR-10), "resnet18" or "resnet50"
            (ImageNet), "gpt" (3 layers, width 64, on characters), "shakespeare" (4 layers, width
            128) or "gpt2" (WikiText-2).
        data: resnet20 and, in place of digits, mobilenet: the folder of CIFAR-10's binary files;
            resnet18, resnet50: see imagenet; gpt2: see wikitext2; the other GPTs: a text file,
            where gpt takes Python's without one.
        checkpoint: resnet20, resnet18, resnet50, gpt2: its file, None downloads it.
        cache: folder for the small networks once trained.
        split: "test" scores test images (ImageNet's val), or the last 5 % of the text; "train"
            training images that are not calibration (of ImageNet's 10,000 at most), or the 5 % of
            text before: what settings are chosen on.
        samples: how many calibration inputs, drawn from the training data by seed; None is 1,024
            images (512 digits) or 128 sequences.
        spread: of resnet and resnet20, rescale the channels by it (see rescale).

    Raises:
        ValueError, OSError: unknown name, unusable data, or too few inputs for samples.
    """
    if split not in ("test", "train"):
        raise ValueError(f"split = {split!r}: 'test' and 'train' are allowed")
    if not spread > 0 or (spread != 1 and name not in ("resnet", "resnet20")):
        raise ValueError(f"rescale = {spread}: a positive number is allowed, of {name} only 1 "
                         "(others for resnet and resnet20)")
    needs = {"resnet20": "the folder of CIFAR-10's binary files", "resnet18": "ImageNet's folder",
             "resnet50": "ImageNet's folder", "shakespeare": "a text file, tinyshakespeare.txt",
             "gpt2": "the folder of WikiText-2's files"}
    if data is None and name in needs:
        raise ValueError(f"{name} needs {needs[name]} (--data)")

    def draw(n, default):
        count = default if samples is None else samples
        if not 0 < count < n:
            raise ValueError(f"samples = {count}: 1 to {n - 1} are allowed for {name}")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        return order[:count], order[count:]

    def language_task(net, pool, held, batch_size, score_batch, about):
        start, _ = draw(len(pool) - net.context, 128)
        return Task(net, pool[start[:, None] + torch.arange(net.context)],
                    lambda net: perplexity(net, held, net.context, score_batch), batch_size,
                    f"{len(net.blocks) - 2} layers, width {net.blocks[0].token.embedding_dim}; "
                    f"{about}; perplexity over the {split} split's "
                    f"{(len(held) - 1) // net.context} windows of {net.context}")

    if name == "gpt2":
        pool, held, about = wikitext2(data, split)
        net = gpt2(checkpoint)
        most, least = net.blocks[0].token.num_embeddings, min(len(pool), len(held))
        if least <= net.context or max(int(pool.max()), int(held.max())) >= most:
            raise ValueError(f"{data}: {len(pool):,} and {len(held):,} tokens; more than "
                             f"{net.context:,} each are needed, of a vocabulary of {most:,}")
        return language_task(net, pool, held, 4, 1, about)           # a window's logits: 0.2 GB
    if name in ("gpt", "shakespeare"):
        context, layers, width, steps = (64, 3, 64, 1000) if name == "gpt" else (128, 4, 128, 2500)
        string = text(data)
        tokens, vocabulary = characters(string)
        with torch.random.fork_rng(devices=[]):                      # the caller's stream stays
            torch.manual_seed(0)
            net = GPT(len(vocabulary), context, layers, heads=4, width=width)
        if len(tokens) < 100 * net.context:
            raise ValueError(f"{data}: {len(tokens)} characters; at least {100 * net.context} are "
                             "needed")
        a, b = int(0.9 * len(tokens)), int(0.95 * len(tokens))
        trained(net, Path(cache) / f"{name}-{fingerprint(string)}.pt",
                lambda net: train_gpt(net, tokens[:a], steps, label="training the GPT"))
        source = (Path(data).name if data else
                  f"pydoc_data.topics of Python {platform.python_version()}")
        return language_task(net, tokens[:a], tokens[b:] if split == "test" else tokens[a:b], 8, 32,
                             f"characters of {source}, sha256 {fingerprint(string)}")

    def image_task(net, calibration, score, count, source):
        return Task(rescale(fold_batchnorm(net), spread), calibration, score, 32,
                    f"{sum(p.numel() for p in net.parameters()):,} weights; {source}; "
                    f"{f'channels rescaled by up to {spread:g}; ' if spread != 1 else ''}"
                    f"accuracy on {count:,} {split} images")

    if name in ("resnet18", "resnet50"):
        files, classes = imagenet(data, "train")
        index, rest = draw(len(files), 1024)
        held = [files[i] for i in rest[:10_000]]
        if split == "test":
            held, others = imagenet(data, "val")
            for odd in sorted(set(classes) ^ set(others)):
                raise ValueError(f"{data}: {odd} is not a class folder of both train and val")
        if len(classes) != 1000:
            warnings.warn(f"{data} has {len(classes)} classes, the checkpoints 1,000 (ImageNet's): "
                          "the accuracy says nothing", stacklevel=2)
        net = (resnet18 if name == "resnet18" else resnet50)(checkpoint)
        drawn = image_batches([files[i] for i in index], label="calibration images")
        return image_task(net, torch.cat([x for x, _ in drawn]), lambda net: accuracy(
            net, image_batches(held, label=f"{split} images")), len(held), "ImageNet")
    if name == "resnet20" or (name == "mobilenet" and data is not None):
        x, y = cifar10(data, train=True)
        x_test, y_test = cifar10(data, train=False) if split == "test" else (None, None)
        source, default = "CIFAR-10", 1024
        if name == "resnet20":
            net = resnet20(checkpoint)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                net = MobileNet(widths=(16, 24, 32), depth=2, stride=2)
            trained(net, Path(cache) / f"cifar-mobilenet-{len(x)}.pt", lambda net: train_classifier(
                net, x, y, steps=6000, shift=4, label="training the mobilenet"))
    elif name in ("resnet", "mobilenet"):
        x, y, x_test, y_test = digits()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = (ResNet(widths=(8, 16, 32), depth=1, channels=1) if name == "resnet" else
                   MobileNet(widths=(8, 16, 24), depth=2, channels=1))
        trained(net, Path(cache) / f"digits-{name}.pt",
                lambda net: train_classifier(net, x, y, label=f"training the {name}"))
        source, default = "scikit-learn's digits", 512
    else:
        raise ValueError(f"model = {name!r}: resnet, mobilenet, gpt, {', '.join(needs)} are "
                         "allowed")
    index, rest = draw(len(x), default)
    if split == "train":
        x_test, y_test = x[rest], y[rest]
    return image_task(net, x[index], lambda net: accuracy(net, x_test, y_test), len(y_test), source)
