"""Attention of every node to the whole graph, through the codewords of its states (Graph Transformer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import vqgnn_kernels as kernels

from .codebook import Codebook


class GlobalAttention(nn.Module):
    """Multi-head attention of nodes to all nodes, for which their codewords stand (VQ-GNN, table 5).

    out_i = W_o [sum_k softmax_k(<W_q x_i, W_k c_k> / sqrt(F) + log n_k) W_v c_k by head], n_k nodes at codeword c_k

    Costs O(b K) for b rows, not O(b n). The codewords learn from the rows that pass in training, before these look at
    them; the backward pass takes them for constants. In evaluation mode nothing learns and a row's output depends on no
    other row: batches, the whole graph and layer-wise inference agree. Edges play no part. With a codeword for every
    distinct row it is full attention. A hybrid adds it to a conv's output: `conv(x, graph) + attention(x)`.

    Args:
        channels: of x and of the output.
        heads: H, divides channels; F = channels / H.
        num_codes: K, at most 32768.
        options: further arguments of `Codebook`, e.g. decay=0.95.
    """

    def __init__(self, channels: int, heads: int = 4, num_codes: int = 256, **options):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads={heads} must divide channels={channels}; choose another number")
        self.channels, self.heads = channels, heads
        self.codebook = Codebook(channels, branch_dim=channels, num_codes=num_codes, grad=False, **options)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def extra_repr(self) -> str:
        return f"{self.channels}, heads={self.heads}"

    def forward(self, x: Tensor) -> Tensor:
        """[b, channels] from x [b, channels]; before the first training step there is nothing to attend to."""
        if self.training:
            self._learn(x.detach().float())
        codewords = self.codebook.x_values[0].clone()  # they may learn on between forward and backward
        shape = (-1, self.heads, self.channels // self.heads)
        keys, values = (t.view(shape).transpose(0, 1) for t in self.key_value(codewords).chunk(2, dim=1))
        counts = self.codebook.ema_counts.float().expand(self.heads, -1)
        messages = kernels.global_attention(self.query(x).view(shape), keys, values, counts)
        return self.out(messages.flatten(1))

    @torch.compiler.disable  # a codebook's update cannot be traced
    def _learn(self, x: Tensor) -> None:
        if len(x):
            self.codebook.update(x)
