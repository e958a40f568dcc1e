"""PyG's convolutions that also take a mini-batch's graph where `edge_index` goes.

Constructor, parameters, state_dict keys and the result on a plain `edge_index` are PyG's. Given a `BatchGraph` they
compute eq. 6 of VQ-GNN, M_B = C_BB X_B + C_BH X~_H. Where C is fixed that comes before their own weights (C X W =
(C X) W) and the store keeps the conv's input and the gradient of M; attention keeps its input, and the gradients that
messages to other batches send to it, or on request W X.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor
from torch_geometric.typing import OptPairTensor, OptTensor

from .attention import GATConv as GATConv
from .attention import GATv2Conv as GATv2Conv
from .attention import TransformerConv as TransformerConv
from .attention import limit_attention as limit_attention
from .chebyshev import ChebConv as ChebConv
from .global_attention import GlobalAttention as GlobalAttention
from .graph import Convolution
from .store_conv import StoreConv as StoreConv
from .store_conv import require


class GCNConv(StoreConv, pyg.GCNConv):
    """PyG's GCNConv (Kipf & Welling): C = D^-1/2 (A + I) D^-1/2 of the whole graph."""

    # PyG reads these types from the source of a class and, for a subclass, does not find them
    propagate_type: ClassVar = {"x": Tensor, "edge_weight": OptTensor}

    def convolution(self) -> Convolution:
        require(self, self.flow == "source_to_target", "flow", self.flow, "flow='source_to_target'")
        require(self, self.aggr in ("sum", "add"), "aggr", self.aggr, "aggr='sum'")
        return Convolution("gcn", self.normalize, self.add_self_loops, self.improved)

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        return F.linear(messages, self.lin.weight, self.bias)


class SAGEConv(StoreConv, pyg.SAGEConv):
    """PyG's SAGEConv (Hamilton et al.) with mean or sum aggregation: C = D^-1 A or A."""

    propagate_type: ClassVar = {"x": OptPairTensor}

    def convolution(self) -> Convolution:
        require(self, self.flow == "source_to_target", "flow", self.flow, "flow='source_to_target'")
        require(self, self.aggr in ("mean", "sum", "add"), "aggr", self.aggr, "aggr='mean' or 'sum'")
        return Convolution("mean" if self.aggr == "mean" else "sum")

    def message_input(self, x: Tensor) -> Tensor:
        return self.lin(x).relu() if self.project else x

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        out = self.lin_l(messages)
        if self.root_weight:
            out = out + self.lin_r(x)
        return F.normalize(out, p=2.0, dim=-1) if self.normalize else out


class GINConv(StoreConv, pyg.GINConv):
    """PyG's GINConv (Xu et al.): C = A, the node itself enters with weight 1 + epsilon."""

    propagate_type: ClassVar = {"x": OptPairTensor}

    def convolution(self) -> Convolution:
        require(self, self.flow == "source_to_target", "flow", self.flow, "flow='source_to_target'")
        require(self, self.aggr in ("sum", "add"), "aggr", self.aggr, "aggr='sum'")
        return Convolution("sum")

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        return self.nn(messages + (1 + self.eps) * x)


CONVS = {
    pyg.GCNConv: GCNConv,
    pyg.SAGEConv: SAGEConv,
    pyg.GINConv: GINConv,
    pyg.GATConv: GATConv,
    pyg.GATv2Conv: GATv2Conv,
    pyg.TransformerConv: TransformerConv,
    pyg.ChebConv: ChebConv,
}
