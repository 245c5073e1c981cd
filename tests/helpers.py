"""What several test files share: weights, inputs, a small block, small networks, Adam's rates."""
import importlib
import importlib.util
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import models
from flexround import quantize_layers
from reconstruct import ReconstructionConfig

torch.set_num_threads(1)                 # for tensors this small, more threads take more time

ROOT = Path(__file__).parent.parent


LEARNED = ["adaround", "adaquant", "flexround"]
over_methods = pytest.mark.parametrize("method", ["rtn", *LEARNED])
over_learned = pytest.mark.parametrize("method", LEARNED)


def weight(shape, seed=0, dtype=torch.float64):
    """Weights with a few large ones, so that some lie outside the grid."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=g, dtype=torch.float64)
    return (W * torch.exp(0.5 * torch.randn(shape, generator=g, dtype=torch.float64))).to(dtype)


def correlated(n, *shape):
    """Inputs such as activations are: few directions carry most of the variance."""
    g, d = torch.Generator().manual_seed(0), int(np.prod(shape))
    return (torch.randn(n, 4, generator=g) @ torch.randn(4, d, generator=g) / 2).view(n, *shape)


def equal_states(a, b):
    """Whether two state_dicts hold the same bits under the same keys."""
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


RATES = {"rtn": None, "adaround": 0.03, "adaquant": 0.003, "flexround": 0.003}     # for this block


def small_block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))


def prepared(method="flexround", bits=3, x=None, **settings):
    """A quantized block, its inputs, targets and config."""
    settings = {"iterations": 60, "batch_size": 8, "lr": RATES.get(method), **settings}
    config, block = ReconstructionConfig(method, bits, **settings), small_block()
    x = correlated(32, 3, 6, 6) if x is None else x
    y = block(x).detach()
    quantize_layers(block, config)
    return block, x, y, config


@contextmanager
def rates_of_adam():
    """Within, the list that it gives gets the learning rates of Adam's groups at each update."""
    found = []
    handle = register_optimizer_step_pre_hook(
        lambda adam, *_: found.append([float(group["lr"]) for group in adam.param_groups]))
    try:
        yield found
    finally:
        handle.remove()


def tiny(name):
    """An untrained network, calibration inputs and the names of its layers, block by block."""
    torch.manual_seed(0)
    if name == "gpt":
        inner = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        return (models.GPT(11, context=16, layers=2, heads=2, width=16).eval(),
                torch.randint(0, 11, (16, 16)), [[], inner, inner, []])
    if name == "mobilenet":
        net, inner = models.MobileNet((4, 6), 1, channels=1), ["conv1", "conv2", "conv3"]
        layers = [["conv1"], inner, inner, ["conv1"], ["linear"]]
    else:
        shortcut = name.removeprefix("resnet ")
        net, inner = models.ResNet((4, 6), 1, shortcut, channels=1), ["conv1", "conv2"]
        layers = [["conv1"], inner, inner + ["downsample.0"] * (shortcut == "conv"), ["linear"]]
    x = correlated(16, 1, 8, 8)
    return models.fold_batchnorm(net, x), x, layers


NETWORKS = ["resnet conv", "resnet pad", "mobilenet", "gpt"]
QUICK = ReconstructionConfig(bits=3, iterations=20, batch_size=8)


def restless_norms(net):
    """net in eval mode, with batch norms that do something, as after training."""
    for m in net.eval().modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            for t in (m.weight, m.running_var, m.bias, m.running_mean):
                nn.init.uniform_(t, 0.5, 2.0)
    return net


DECLARED = []


def package(name):
    """timm, torchvision or transformers, which import torchvision. torchvision's networks are plain
    Python, but without a build for this torch its import misses two operators: we declare them."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    try:
        importlib.import_module("torchvision")
    except ImportError:                                              # transformers can do without
        pass
    except RuntimeError:
        DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))    # ends with its object
        for operator in ("nms", "qnms"):
            DECLARED[-1].define(f"{operator}(Tensor dets, Tensor s, float threshold) -> Tensor")
    return importlib.import_module(name)
