"""What only experiments need: how far weights moved, unequal channels, rules and optimizers of no
paper, and how much memory a run took."""
import math
import sys
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

import flexround
import models
import reconstruct
from flexround import RoundToNearest


@torch.no_grad()
def grid_shift(q: RoundToNearest, W: Tensor) -> Tensor:
    """How many grid steps q moves each weight from round to nearest: int32, W's shape.

    We take the learned s1 for both, which leaves what S2, s3, s4 (or V) do. The paper does not say
    which s1 its Figs. 3 to 6 take, and a smaller s1 alone would shift every large weight.
    """
    return (q.integers(W) - RoundToNearest.integers(q, W)).to(torch.int32)


def inequality(net: nn.Module) -> list[float]:
    """For each layer, how large its largest output channel is beside its median one. We measure a
    channel by its largest |W|."""
    found = []
    for layer in flexround.quantizable_layers(net).values():
        most = layer.weight.detach().flatten(1).abs().amax(1)        # (C_out,)
        found.append(float(most.max() / most.median()))
    return found


@torch.no_grad()
def rescale(net: nn.Module, spread: float, seed: int = 0) -> nn.Module:
    """Make the channels inside each basic block unequal without changing what it computes.

    We multiply each output channel of conv1 by a factor from 1 / spread to spread (uniform in its
    logarithm) and divide the same input channel of conv2 by it. The ReLU between lets the factor
    pass. Batch norm has to be folded. In place; returns net.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in (b for b in net.modules() if isinstance(b, models.BasicBlock) and spread != 1):
        factor = spread ** (2 * torch.rand(block.conv1.out_channels, generator=generator) - 1)
        factor = factor.to(block.conv1.weight.device)
        block.conv1.weight.mul_(factor.view(-1, 1, 1, 1))
        block.conv1.bias.mul_(factor)
        block.conv2.weight.div_(factor.view(1, -1, 1, 1))
    return net


@torch.no_grad()
def block_losses(net: models.Blocks, net_hat: models.Blocks, x: Tensor, batch_size: int) -> list:
    """For each block the loss that reconstruction descends, on inputs x of the whole network: of
    net_hat's block behind quantized blocks against net's block behind float ones. Behind the last
    quantized block we run nothing."""
    device, totals = reconstruct.device_of([net]), torch.zeros(len(net.blocks))
    quantized = [i for i, block in enumerate(net_hat.blocks) if flexround.quantizers(block)]
    pairs = list(zip(net.blocks, net_hat.blocks, strict=True))[:max(quantized) + 1]
    for batch in x.split(batch_size):
        x_fp = x_q = batch.to(device)
        for i, (block, block_hat) in enumerate(pairs):
            x_fp, x_q = block(x_fp.clone()), block_hat(x_q.clone())  # a block may work in place
            totals[i] += len(batch) * reconstruct.block_loss(x_q, x_fp).cpu()
    return (totals / len(x)).tolist()


def mean_ratio(ours, theirs) -> float:
    """The geometric mean over the blocks of our losses divided by theirs."""
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    return math.exp(sum(logs) / len(logs))


class Watched(flexround.FlexRound):
    """FlexRound that notes W / S and W_hat of each step in which it learns, in the list `seen`."""

    seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, W):
        W_hat = super().forward(W)
        if torch.is_grad_enabled():
            self.seen.append(((W / self.S).detach(), W_hat.detach()))
        return W_hat


flexround.METHODS["watched"] = Watched


@contextmanager
def plain_sgd():
    """Within, reconstruct.py descends with SGD in place of Adam: an experiment. SGD keeps the size
    of a gradient, which Adam divides out. Rates are then other ones: name an lr."""
    def make(groups, fused):
        return torch.optim.SGD(groups, fused=fused)

    with mock.patch("torch.optim.Adam", make):
        yield


class ConstantAdam(torch.optim.Adam):
    """Adam that keeps its initial learning rates, whatever reconstruct.py sets."""

    def step(self):
        for group in self.param_groups:
            group["lr"] = group["initial"]
        super().step()


@contextmanager
def constant_learning_rate():
    """Within, the learning rates of reconstruct.py do not fall: an experiment. BRECQ keeps
    AdaRound's. Along the cosine 4 % of its summed learning rate is left at t = 0.7, when beta is 9.
    """
    with mock.patch("torch.optim.Adam", ConstantAdam):
        yield


def peak_memory(device: str) -> str:
    """The most memory that this process has used so far: a GPU's as torch counts it, else RAM."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e6:,.0f} MB on {device}"
    import resource  # Windows has none
    unit = 1 if sys.platform == "darwin" else 1024                   # bytes there, else kilobytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:,.0f} MB of RAM"
