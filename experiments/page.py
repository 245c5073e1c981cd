"""The whole method on one page: FlexRound, from section 3 of the paper (arXiv:2306.00317v2).

    python -m experiments.page

This prints a small ResNet's accuracy on handwritten digits: in full precision, and with weights of
2 bits (8 in the first and the last layer) by round to nearest and by FlexRound. Where the paper
leaves a choice, we take logarithms to keep the factors positive, give the scales of a clamped
weight the gradient 0, and use flexround.py's learning rates. README's table starts from another s1.
"""
import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

import models


def initial_s1(W, lo, hi):
    """Return the one of 100 step sizes for which ||W - W_hat||^2 of round to nearest is least."""
    def error(s1):
        W_hat = s1 * (W / s1).round().clamp(lo, hi)
        return (W - W_hat).square().sum()

    sizes = W.abs().max() / hi * torch.arange(1, 101) / 100          # the last one clips nothing
    return min(sizes, key=error)


class FlexRound(nn.Module):
    """Return W_hat = s1 * round(W / S) with S = s1 * S2 * s3 * s4, Eqs. 1 and 2."""

    def __init__(self, W, bits):
        super().__init__()
        self.lo, self.hi = -2 ** (bits - 1), 2 ** (bits - 1) - 1     # 2 bits: -2, -1, 0, 1
        C_out, C_in, *kernel = W.shape
        ones = [1] * len(kernel)                                     # a linear layer has no kernel
        self.log_s1 = nn.Parameter(initial_s1(W, self.lo, self.hi).log())
        self.log_S2 = nn.Parameter(torch.zeros_like(W))              # all scales start at 1, so
        self.log_s3 = nn.Parameter(W.new_zeros(C_out, 1, *ones))     # we start at round to nearest
        self.log_s4 = nn.Parameter(W.new_zeros(1, C_in, *ones)) if kernel else 0

    def forward(self, W):
        u = W / (self.log_s1 + self.log_S2 + self.log_s3 + self.log_s4).exp()
        k = u.round().clamp(self.lo, self.hi)
        inside = k == u.round()                                      # not clamped
        # The straight-through estimator: inside, k has its own value, and the gradient of u.
        k = torch.where(inside, u + (k - u).detach(), k)
        return self.log_s1.exp() * k                                 # s1 alone stands outside


def reconstruct(block, x_q, y_fp, iterations):
    """Minimise ||y_fp - block(x_q)||^2 over s1, S2, s3 and s4 of the block's layers."""
    # s1 moves all weights of a layer at once, so it has a smaller learning rate than the rest.
    groups = [{"params": p, "lr": 0.008 if name.endswith("log_s1") else 0.032}
              for name, p in block.named_parameters() if p.requires_grad]
    adam = torch.optim.Adam(groups)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    for _ in range(iterations):
        batch = torch.randperm(len(x_q))[:32]
        loss = (y_fp[batch] - block(x_q[batch])).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()


def main(iterations=150):
    torch.manual_seed(0)
    task = models.load_task("resnet", dtype=torch.float64)
    print(f"full precision    {task.score(task.net):.2f}")

    net_fp = task.net.requires_grad_(False)                          # we learn factors only
    net = copy.deepcopy(net_fp)
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:                                             # layer.weight becomes W_hat
        bits = 8 if layer in (layers[0], layers[-1]) else 2
        parametrize.register_parametrization(layer, "weight", FlexRound(layer.weight, bits))
    print(f"round to nearest  {task.score(net):.2f}")

    # x_fp is the paper's X, from full-precision blocks. x_q is X_tilde, from quantized ones.
    x_fp = x_q = task.calibration                                    # 512 training images
    for block_fp, block in zip(net_fp.blocks, net.blocks, strict=True):
        y_fp = block_fp(x_fp)
        reconstruct(block, x_q, y_fp, iterations)
        x_fp, x_q = y_fp, block(x_q).detach()
    print(f"FlexRound         {task.score(net):.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)                                         # the layers are small
    main()
