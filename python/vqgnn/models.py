"""Models that PyG's `torch_geometric.nn.models` lack, in the form of those."""

from __future__ import annotations

from typing import Final

from torch import nn
from torch_geometric.nn import ChebConv, TransformerConv
from torch_geometric.nn.models.basic_gnn import BasicGNN


class Transformer(BasicGNN):
    """Layers of PyG's TransformerConv (Shi et al.), whose heads share the hidden channels as in PyG's GAT."""

    supports_edge_weight: Final[bool] = False
    supports_edge_attr: Final[bool] = False
    supports_norm_batch: Final[bool]

    def init_conv(self, in_channels: int, out_channels: int, heads: int = 1, **kwargs) -> nn.Module:
        concat = not getattr(self, "_is_conv_to_out", False)
        if concat and out_channels % heads:
            raise ValueError(f"heads={heads} must divide the {out_channels} channels of a hidden layer")
        channels = out_channels // heads if concat else out_channels
        return TransformerConv(in_channels, channels, heads, concat, dropout=self.dropout.p, **kwargs)


class Cheb(BasicGNN):
    """Layers of PyG's ChebConv (Defferrard et al.), each a polynomial of K terms."""

    supports_edge_weight: Final[bool] = True
    supports_edge_attr: Final[bool] = False
    supports_norm_batch: Final[bool]

    def init_conv(self, in_channels: int, out_channels: int, K: int = 3, **kwargs) -> nn.Module:
        return ChebConv(in_channels, out_channels, K, **kwargs)
