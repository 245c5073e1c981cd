"""The networks and data that FlexRound is tried on: small ResNets, a MobileNetV2-like net, a GPT.

Nothing here knows of quantization. The one thing that reconstruct.py asks of a network is .blocks,
an ordered list of Tensor -> Tensor modules that, run one after the other, *are* the network:

    for block in net.blocks: x = block(x)

A ResNet's blocks are the stem, each residual block (its addition and ReLU inside), and pooling with
the classifier; a GPT's are the embeddings, each transformer block, and the last norm with the head.
Fold batch norm into the convolutions first (fold_batchnorm), as the paper does.

Shapes at line ends: N images, C channels, H x W pixels; B sequences of T tokens, D channels.
"""
import hashlib
import os
import platform
import warnings
from collections.abc import Callable
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


# ---- ResNets of basic blocks (He et al. 2016) ----------------------------------------------------

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


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: identity, zero-padded ("pad") or 1 x 1 ("conv")."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, shortcut: str = "conv"):
        super().__init__()
        self.conv1 = conv_bn(c_in, c_out, 3, stride)
        self.conv2 = conv_bn(c_out, c_out, 3)
        if stride == 1 and c_in == c_out:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = PadShortcut(c_in, c_out, stride)
        elif shortcut == "conv":
            self.shortcut = conv_bn(c_in, c_out, 1, stride)
        else:
            raise ValueError(f"shortcut = {shortcut!r}: 'pad' and 'conv' are allowed")

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x)))                        # (N, c_out, H/s, W/s)
        return F.relu(y + self.shortcut(x))


def classifier(channels: int, classes: int) -> nn.Sequential:
    """Global average pooling and a linear layer: (N, C, H, W) -> (N, classes)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class ResNet(Blocks):
    """A ResNet for small images: a 3 x 3 stem, then stages of basic blocks, each halving H and W.

    ResNet(widths=(16, 32, 64), depth=3, shortcut="pad") is the CIFAR-10 ResNet-20.
    """

    def __init__(self, widths=(16, 32, 64), depth: int = 3, shortcut: str = "conv",
                 channels: int = 3, classes: int = 10):
        blocks = [nn.Sequential(*conv_bn(channels, widths[0], 3), nn.ReLU())]
        c_in = widths[0]
        for stage, c_out in enumerate(widths):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(BasicBlock(c_in, c_out, stride, shortcut))
                c_in = c_out
        super().__init__(*blocks, classifier(c_in, classes))


RESNET20_URL = ("https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
                "resnet20-12fca82f.th")


def resnet20(path: str | os.PathLike | None = None) -> ResNet:
    """The public CIFAR-10 ResNet-20 by akamaster (91.73 % on test), batch norm not folded.

    Args:
        path: resnet20-12fca82f.th; None downloads it once into torch's hub cache, hash checked.

    Raises:
        ValueError: a file that is not that checkpoint, naming the first tensor that is wrong.
        FileNotFoundError: no such file. RuntimeError: no path and no network.
    """
    if path is None:
        try:
            path = Path(torch.hub.get_dir()) / "checkpoints" / "resnet20-12fca82f.th"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(RESNET20_URL, str(path), hash_prefix="12fca82f")
        except OSError as error:
            raise RuntimeError(f"could not download {RESNET20_URL} ({error}): fetch it by hand and "
                               "give its path") from error
    net = ResNet(widths=(16, 32, 64), depth=3, shortcut="pad")
    saved = load_file(path)
    saved = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    # Both networks define the same layers in the same order under different names.
    theirs = [(k, v) for k, v in saved.items()
              if isinstance(v, Tensor) and not k.endswith("num_batches_tracked")]
    ours = [(k, v) for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")]
    if len(theirs) != len(ours):
        raise ValueError(f"{path} holds {len(theirs)} tensors instead of {len(ours)}: it is not "
                         "the CIFAR-10 ResNet-20")
    for (key, value), (_, mine) in zip(theirs, ours, strict=True):
        if value.shape != mine.shape:
            raise ValueError(f"{path}: {key!r} has shape {tuple(value.shape)} instead of "
                             f"{tuple(mine.shape)}: it is not the CIFAR-10 ResNet-20")
        mine.copy_(value)
    return net.eval()


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
        if width % heads:
            raise ValueError(f"width = {width} is not a multiple of heads = {heads}")
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
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = raw[:, 1:].reshape(-1, 3, 32, 32).float().div_(255)
    return x.sub_(mean).div_(std), raw[:, 0].long()


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
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 500) -> float:
    """Top-1 accuracy in percent on images x (N, C, H, W) with labels y (N,), which may lie on
    another device than the model. Leaves the model in eval mode."""
    model.eval()
    device = next(model.parameters(), x).device
    right = sum((model(xs.to(device)).argmax(1) == ys.to(device)).sum()
                for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True))
    return 100 * float(right) / len(y)


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


# ---- Training the small networks, once -----------------------------------------------------------

def load_file(path):
    """torch.load, weights only, with one clear error for a file that is no checkpoint."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:                                       # torch raises many kinds
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error


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
        name: "resnet" or "mobilenet" (on digits), "resnet20" (CIFAR-10), "gpt" (3 layers, width 64,
            on characters) or "shakespeare" (4 layers, width 128).
        data: resnet20 and, in place of digits, mobilenet: the folder of CIFAR-10's binary files;
            the GPTs: a text file, where gpt takes Python's without one.
        checkpoint: resnet20: its file, None downloads it.
        cache: folder for the small networks once trained.
        split: "test" scores test images, or the last 5 % of the text; "train" training images
            that are not calibration, or the 5 % of text before: what settings are chosen on.
        samples: how many calibration inputs, drawn from the training data by seed; None is 1,024
            images (512 digits) or 128 sequences.
        spread: of the ResNets, rescale the channels by it (see rescale).

    Raises:
        ValueError, OSError: unknown name, unusable data, or too few inputs for samples.
    """
    if split not in ("test", "train"):
        raise ValueError(f"split = {split!r}: 'test' and 'train' are allowed")

    def draw(n, default):
        count = default if samples is None else samples
        if not 0 < count < n:
            raise ValueError(f"samples = {count}: 1 to {n - 1} are allowed for {name}")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        return order[:count], order[count:]

    if spread != 1 and name not in ("resnet", "resnet20"):
        raise ValueError(f"spread = {spread}: of resnet and resnet20 only, not of {name}")
    if name in ("gpt", "shakespeare"):
        if name == "shakespeare" and data is None:
            raise ValueError("shakespeare needs a text file, tinyshakespeare.txt (--data)")
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
        start, _ = draw(a - net.context, 128)
        held = tokens[b:] if split == "test" else tokens[a:b]
        source = (Path(data).name if data else
                  f"pydoc_data.topics of Python {platform.python_version()}")
        return Task(net, tokens[start[:, None] + torch.arange(net.context)],
                    lambda net: perplexity(net, held, net.context), 8,
                    f"{layers} layers, width {width}; characters of {source}, "
                    f"sha256 {fingerprint(string)}; perplexity over the {split} split's "
                    f"{len(held) // net.context} windows of {net.context}")
    if name == "resnet20" or (name == "mobilenet" and data is not None):
        if data is None:
            raise ValueError("resnet20 needs the data folder with CIFAR-10's binary files (--data)")
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
        raise ValueError(f"model = {name!r}: resnet, mobilenet, gpt and resnet20 are allowed")
    index, rest = draw(len(x), default)
    if split == "train":
        x_test, y_test = x[rest], y[rest]
    return Task(rescale(fold_batchnorm(net), spread), x[index],
                lambda net: accuracy(net, x_test, y_test), 32,
                f"{sum(p.numel() for p in net.parameters()):,} weights; {source}; "
                f"{f'channels rescaled by up to {spread:g}; ' if spread != 1 else ''}"
                f"accuracy on {len(y_test):,} {split} images")
