"""PyG's convolutions that also take a mini-batch's graph where `edge_index` goes.

Constructor, parameters, state_dict keys and the result on a plain `edge_index` are PyG's. Given a `BatchGraph` they
compute eq. 6 of VQ-GNN, M_B = C_BB X_B + C_BH X~_H, before their own weights (C X W = (C X) W), so that the store keeps
the conv's input and the gradient of M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor
from torch_geometric.typing import OptPairTensor, OptTensor

from vqgnn_kernels import aggregate

from .graph import BatchGraph, Convolution
from .store import NodeStore

INPUTS = ("auto", "precompute", "rows", "codes")


@dataclass
class StoreUse:
    """What `convert` gives a conv: where its out-of-batch neighbours come from.

    store: None drops their messages. input: None, or how the input layer reads the given features
    ("precompute": rows of C X; "rows": exact rows of the halo). whole: batches must be the whole graph.
    """

    convolution: Convolution
    store: NodeStore | None = None
    input: str | None = None
    whole: bool = False


class StoreConv:
    """Mix-in: a PyG conv with one fixed convolution matrix that can read a node-state store."""

    store_use: StoreUse | None = None

    def forward(self, x, edge_index, *args, **kwargs):
        if not isinstance(edge_index, BatchGraph):
            return super().forward(x, edge_index, *args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        if given:
            raise ValueError(
                f"{type(self).__name__} got {len(given)} more argument(s) beside a batch graph, which holds its own "
                "weights; set data.edge_weight before vqgnn.convert instead"
            )
        if edge_index.run is not None:
            return edge_index.run(self, x, edge_index)
        source = self.message_input(x)
        return self.combine(x, self._messages(source, edge_index))

    def convolution(self) -> Convolution:
        """The matrix C of this conv; raises ValueError for options that have no fixed C."""
        raise NotImplementedError

    def message_input(self, x: Tensor) -> Tensor:
        """[b, f]: what neighbours are told, X of C X."""
        return x

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        """[b, out_channels] from the node's own x [b, in_channels] and M [b, f]."""
        raise NotImplementedError

    def _messages(self, x: Tensor, graph: BatchGraph) -> Tensor:
        use = self.store_use
        if use is None:
            raise ValueError(f"{type(self).__name__} got a batch graph before vqgnn.convert; convert the model first")
        if use.input == "precompute" and x is graph.x:
            return graph.input_messages(use.convolution)
        if use.whole and not graph.whole:
            raise ValueError(
                f"method='full' got a batch of {graph.n_id.numel()} of {graph.graph.num_nodes} nodes; give BatchLoader "
                "batch_size=data.num_nodes, or convert with another method"
            )
        csr, csr_t = graph.csr(use.convolution)
        if use.input is not None:  # dropout came between: the halo is read exactly
            graph.graph.wanted[use.convolution, False] = None
            return aggregate(x, csr, graph.graph.features, csr_t)
        store = use.store
        if store is None:
            return aggregate(x, csr, None, csr_t)
        messages = aggregate(x, csr, store.rows, csr_t, store.grad_rows)
        if self.training:
            self._record(store, graph.n_id, x, messages)
        return messages

    def _record(self, store: NodeStore, n_id: Tensor, x: Tensor, messages: Tensor) -> None:
        """Push the batch's states: with its gradients once backward knows them, else now."""
        x = x.detach()
        # compiled, every push goes through the one opaque op of the backward: a codebook's update cannot be traced
        if not (messages.requires_grad and (store.grad or torch.compiler.is_compiling())):
            store.push(n_id, x)
            return

        def push(g: Tensor) -> Tensor | None:
            if torch.compiler.is_compiling():
                return torch.ops.vqgnn.record(store.handle, n_id, x, g)
            store.push(n_id, x, g)
            return None

        messages.register_hook(push)

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        if self.store_use is not None and self.store_use.store is not None:
            self.store_use.store._apply(fn, *args, **kwargs)
        return self


def _require(conv, allowed: bool, option: str, came, what: str) -> None:
    if not allowed:
        raise ValueError(f"{type(conv).__name__}({option}={came!r}) cannot read a node-state store; use {what}")


class GCNConv(StoreConv, pyg.GCNConv):
    """PyG's GCNConv (Kipf & Welling): C = D^-1/2 (A + I) D^-1/2 of the whole graph."""

    # PyG reads these types from the source of a class and, for a subclass, does not find them
    propagate_type: ClassVar = {"x": Tensor, "edge_weight": OptTensor}

    def convolution(self) -> Convolution:
        _require(self, self.flow == "source_to_target", "flow", self.flow, "flow='source_to_target'")
        _require(self, self.aggr in ("sum", "add"), "aggr", self.aggr, "aggr='sum'")
        return Convolution("gcn", self.normalize, self.add_self_loops, self.improved)

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        return F.linear(messages, self.lin.weight, self.bias)


class SAGEConv(StoreConv, pyg.SAGEConv):
    """PyG's SAGEConv (Hamilton et al.) with mean or sum aggregation: C = D^-1 A or A."""

    propagate_type: ClassVar = {"x": OptPairTensor}

    def convolution(self) -> Convolution:
        _require(self, self.flow == "source_to_target", "flow", self.flow, "flow='source_to_target'")
        _require(self, self.aggr in ("mean", "sum", "add"), "aggr", self.aggr, "aggr='mean' or 'sum'")
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
        _require(self, self.flow == "source_to_target", "flow", self.flow, "flow='source_to_target'")
        _require(self, self.aggr in ("sum", "add"), "aggr", self.aggr, "aggr='sum'")
        return Convolution("sum")

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        return self.nn(messages + (1 + self.eps) * x)


CONVS = {pyg.GCNConv: GCNConv, pyg.SAGEConv: SAGEConv, pyg.GINConv: GINConv}
