"""Models that PyG's `torch_geometric.nn.models` lack, in the form of those."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn
from torch_geometric.nn import ChebConv, GATConv, TransformerConv
from torch_geometric.nn.models.basic_gnn import BasicGNN

from .global_attention import GlobalAttention


class _Heads(BasicGNN):
    """Models of attention: heads share the hidden channels, as in PyG's GAT; those of the last layer are averaged."""

    supports_edge_weight: Final[bool] = False
    supports_edge_attr: Final[bool] = False
    supports_norm_batch: Final[bool]

    def attention(self, kind: type[nn.Module], in_channels: int, out_channels: int, heads: int, **kwargs) -> nn.Module:
        concat = not getattr(self, "_is_conv_to_out", False)
        if concat and out_channels % heads:
            raise ValueError(f"heads={heads} must divide the {out_channels} channels of a hidden layer")
        channels = out_channels // heads if concat else out_channels
        return kind(in_channels, channels, heads, concat, dropout=self.dropout.p, **kwargs)


class Transformer(_Heads):
    """Layers of PyG's TransformerConv (Shi et al.)."""

    def init_conv(self, in_channels: int, out_channels: int, heads: int = 1, **kwargs) -> nn.Module:
        return self.attention(TransformerConv, in_channels, out_channels, heads, **kwargs)


class Cheb(BasicGNN):
    """Layers of PyG's ChebConv (Defferrard et al.), each a polynomial of K terms."""

    supports_edge_weight: Final[bool] = True
    supports_edge_attr: Final[bool] = False
    supports_norm_batch: Final[bool]

    def init_conv(self, in_channels: int, out_channels: int, K: int = 3, **kwargs) -> nn.Module:
        return ChebConv(in_channels, out_channels, K, **kwargs)


class Residual(nn.Module):
    """conv(x, graph) + W x."""

    def __init__(self, conv: nn.Module, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = conv
        self.skip = nn.Linear(in_channels, out_channels, bias=False)

    def reset_parameters(self) -> None:
        self.conv.reset_parameters()
        self.skip.reset_parameters()

    def forward(self, x: Tensor, graph: object, **options) -> Tensor:
        return self.conv(x, graph, **options) + self.skip(x)


def add_residuals(model: BasicGNN, in_channels: int, hidden: int, out_channels: int) -> None:
    """Put a linear map beside every conv of a model, in place (Luo et al., arXiv 2406.08993)."""
    widths = [in_channels, *[hidden] * (len(model.convs) - 1), out_channels]
    for layer, conv in enumerate(model.convs):
        model.convs[layer] = Residual(conv, widths[layer], widths[layer + 1])


class Hybrid(_Heads):
    """Layers that add a GATConv's messages and global attention over codewords (VQ-GNN, tables 5 and 8)."""

    def init_conv(self, in_channels: int, out_channels: int, heads: int = 1, **kwargs) -> nn.Module:
        conv = self.attention(GATConv, in_channels, out_channels, heads, **kwargs)
        return _BesideGlobal(conv, in_channels, self.hidden_channels, out_channels, heads)


class _BesideGlobal(nn.Module):
    """conv(x, graph) + what global attention makes of x."""

    def __init__(self, conv: GATConv, in_channels: int, hidden: int, out_channels: int, heads: int):
        super().__init__()
        self.conv = conv
        self.into = nn.Linear(in_channels, hidden)
        # Unnormalised, the rows' scale follows the step size (137 after 50 steps of Adam on amazon-photo, whose rows
        # have 260 features), the softmax is an argmax, and nothing trains.
        self.norm = nn.LayerNorm(hidden)
        self.attention = GlobalAttention(hidden, heads)
        self.out = nn.Linear(hidden, out_channels, bias=False)

    def reset_parameters(self) -> None:
        attention = self.attention
        for module in (self.conv, self.into, self.norm, self.out, attention.query, attention.key_value, attention.out):
            module.reset_parameters()

    def forward(self, x: Tensor, graph: object) -> Tensor:
        return self.conv(x, graph) + self.out(self.attention(self.norm(self.into(x))))
