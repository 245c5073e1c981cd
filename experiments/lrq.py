"""LRQ (arXiv:2407.11534), the rule that FlexRound's authors published next.

It is README's example of a rule of your own. The study samples in RESULTS.md has its scores.

    python -m experiments.lrq
"""
from torch import nn

import flexround
import reconstruct


class LRQ(flexround.FlexRound):                       # arXiv:2407.11534
    def __init__(self, W, *args, **settings):
        super().__init__(W, *args, **settings)
        del self.log_S2
        rank, inputs = 4, W[0].numel()
        self.L = nn.Parameter(W.new_zeros(len(W), rank))
        self.U = nn.Parameter(nn.init.kaiming_uniform_(W.new_empty(rank, inputs), 5 ** 0.5))
        self.column = nn.Parameter(W.new_zeros(1, inputs))
        self.shape = W.shape

    @property
    def S(self):                                      # L U + column in place of log S2
        return (self.log_s1 + self.log_s3 + (self.L @ self.U + self.column).view(self.shape)).exp()


flexround.METHODS["lrq"] = LRQ

if __name__ == "__main__":
    reconstruct.main(["--model", "resnet"])
