"""PyG's convolutions that also take a mini-batch's graph where `edge_index` goes.

Constructor, parameters, state_dict keys and the result on a plain `edge_index` are PyG's. Given a `BatchGraph` they
compute eq. 6 of VQ-GNN, M_B = C_BB X_B + C_BH X~_H. Where C is fixed that comes before their own weights (C X W =
(C X) W) and the store keeps the conv's input and the gradient of M; attention keeps W X.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.typing import OptPairTensor, OptTensor

from vqgnn_kernels import CSR, Rows, aggregate, attention_aggregate, pull_rows, row_scores

from .alignment import align
from .global_attention import GlobalAttention as GlobalAttention
from .graph import BatchGraph, Convolution
from .store import Neighbours, NodeStore

INPUTS = ("auto", "precompute", "rows", "codes")


@dataclass
class StoreUse:
    """What `convert` gives a conv: where its out-of-batch neighbours come from.

    store: None drops their messages. input: None, or how the input layer reads the given features
    ("precompute": rows of C X; "rows": exact rows of the halo). whole: batches must be the whole graph. align: the
    halo's rows follow the present weights (`align`). reads: of the whole model, stores whose rows take time to come, so
    that the first conv asks for all of them.
    """

    convolution: Convolution
    store: NodeStore | None = None
    input: str | None = None
    whole: bool = False
    align: bool = False
    reads: list[tuple[NodeStore, Convolution]] = field(default_factory=list)

    def __str__(self) -> str:
        """What a conv reads of nodes outside a batch."""
        if self.input is not None:
            return {"precompute": "C x, computed once", "rows": "features"}[self.input]
        if self.store is None:
            return "none: batches are the graph" if self.whole else "none: dropped"
        return str(self.store.codec) + ", with gradients" * self.store.grad + ", aligned" * self.align


class StoreConv:
    """Mix-in: a PyG conv that can read a node-state store."""

    store_use: StoreUse | None = None
    fixed = True  # whether messages are C X with a matrix C known beforehand
    input_slices = "exact_neighbours"  # the method of BatchGraph that `input_messages` calls
    chains = True  # whether x and a batch's graph are all that it takes
    softmax_heads = 0  # of which a store of gradients must keep the softmax

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
        return self.combine(x, self._messages(x, edge_index))

    def convolution(self) -> Convolution:
        """The matrix C of this conv (attention: its pattern); raises ValueError for options that have none."""
        raise NotImplementedError

    def message_input(self, x: Tensor) -> Tensor:
        """[b, f]: what neighbours are told, X of C X."""
        return x

    def batch_messages(self, source: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor | None]:
        """Messages M [r, f] of batch rows `source` [b, f] and of halo rows in a table, by eq. 6.

        Their gradient takes in the halo's from its table, by eq. 7. The second result is the log-sum-exp [r, heads] of
        an attention's scores.
        """
        return aggregate(source, *neighbours[:4]), None

    def input_messages(self, x: Tensor, graph: BatchGraph) -> Tensor:
        """M [b, f] from features x [b, in_channels], with the halo's features read exactly."""
        return self.batch_messages(x, graph.exact_neighbours(self.store_use.convolution))[0]

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        """[b, out_channels] from the node's own x [b, in_channels] and M [b, f]."""
        raise NotImplementedError

    def _messages(self, x: Tensor, graph: BatchGraph) -> Tensor:
        use = self.store_use
        if use is None:
            raise ValueError(f"{type(self).__name__} got a batch graph before vqgnn.convert; convert the model first")
        if use.reads and not graph.started:
            _start(graph, use)
        if use.input == "precompute" and x is graph.x:
            return graph.input_messages(use.convolution)
        require_whole(use, graph)
        if use.input is not None:  # attention, or dropout came between: the halo is read exactly
            graph.graph.wanted[use.convolution, self.input_slices] = None
            return self.input_messages(x, graph)
        source, store = self.message_input(x), use.store
        if store is None:
            csr, csr_t = graph.csr(use.convolution)
            return self.batch_messages(source, Neighbours(csr, None, csr_t))[0]
        neighbours = _stored(graph, use) if use.reads else graph.neighbours(store, use.convolution)
        if use.align:
            messages, lse = self.aligned_messages(source, graph, neighbours)
        else:
            messages, lse = self.batch_messages(source, neighbours)
        if self.training:
            n_id = graph.n_id if store.in_place else graph.origin.n_id
            self._record(store, n_id, source, messages, lse)
        return messages

    def aligned_messages(
        self, source: Tensor, graph: BatchGraph, neighbours: Neighbours
    ) -> tuple[Tensor, Tensor | None]:
        """`batch_messages` with the halo's rows decoded and aligned; their gradient goes to the batch's own rows.

        Before the batch's rows are pushed: what is stored of them says how rows have moved.
        """
        csr, csr_t, _ = graph.bipartite(self.store_use.convolution)
        halo = pull_rows(neighbours.rows, neighbours.csr.halo, source.size(1))
        halo = align(halo, _own_rows(graph, self.store_use.store), source)
        return self.batch_messages(torch.cat([source, halo]), Neighbours(csr, None, csr_t))

    def _record(self, store: NodeStore, n_id: Tensor, x: Tensor, messages: Tensor, lse: Tensor | None) -> None:
        """Push the batch's states: with its gradients once backward knows them, else now."""
        x, values = x.detach(), messages.detach()
        # compiled, every push goes through the one opaque op of the backward: a codebook's update cannot be traced
        if not (messages.requires_grad and (store.grad or torch.compiler.is_compiling())):
            store.push(n_id, x)
            return

        def push(g: Tensor) -> Tensor | None:
            softmax = None
            if lse is not None:
                softmax = torch.stack([lse, (g.float() * values.float()).view(*lse.shape, -1).sum(2)], 1)
            if torch.compiler.is_compiling():
                return torch.ops.vqgnn.record(store.handle, n_id, x, g, softmax)
            store.push(n_id, x, g, softmax)
            return None

        messages.register_hook(push)

    def reads(self) -> str:
        """Where the rows of out-of-batch nodes come from."""
        return str(self.store_use)

    def stores(self) -> dict[str, NodeStore]:
        """By what stands behind the conv's name."""
        found = {"": None if self.store_use is None else self.store_use.store}
        return {name: store for name, store in found.items() if store is not None}

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        for store in self.stores().values():
            store._apply(fn, *args, **kwargs)
        return self


@torch.compiler.disable  # transfers are no part of a graph
def _start(graph: BatchGraph, use: StoreUse) -> None:
    graph.start(use.reads)


@torch.compiler.disable
def _stored(graph: BatchGraph, use: StoreUse) -> Neighbours:
    return graph.neighbours(use.store, use.convolution)


def _own_rows(graph: BatchGraph, store: NodeStore) -> Tensor:
    """[b, f] the batch's own rows as they were stored, before this step's push."""
    return store.pull(graph.n_id) if store.in_place else _fetched(graph, store)


@torch.compiler.disable
def _fetched(graph: BatchGraph, store: NodeStore) -> Tensor:
    return store.pull(graph.origin.n_id)


def _entries(csr: CSR, rows: Rows) -> Tensor:
    """[h] rows of the table, one a halo entry."""
    return torch.arange(len(rows.data), device=rows.data.device) if csr.halo is None else csr.halo


def require_whole(use: StoreUse, graph: BatchGraph) -> None:
    if use.whole and not graph.whole:
        raise ValueError(
            f"method='full' got a batch of {graph.n_id.numel()} of {graph.graph.num_nodes} nodes; give BatchLoader "
            "batch_size=data.num_nodes, or convert with another method"
        )


def _require(conv, allowed: bool, option: str, came, what: str) -> None:
    if not allowed:
        name = type(conv).__name__
        raise ValueError(
            f"{name}({option}={came!r}) cannot read a node-state store; use {what}, or torch_geometric.nn.{name}, of "
            "which PyG's own code then runs"
        )


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


class GATConv(StoreConv, pyg.GATConv):
    """PyG's GATConv (Velickovic et al.): M_i = sum_j softmax_j(leaky_relu(a_src z_j + a_dst z_i)) z_j with z = W x.

    The store keeps z. Gradients reach W and a through the batch's own rows, from messages to the batch alone or, with
    a gradient store (`convert(..., grad=True)`), to out-of-batch nodes too.
    """

    propagate_type: ClassVar = {"x": OptPairTensor, "alpha": Tensor}
    edge_updater_type: ClassVar = {"alpha": OptPairTensor, "edge_attr": OptTensor}
    fixed = False
    input_slices = "bipartite"

    @property
    def softmax_heads(self) -> int:
        return self.heads

    def convolution(self) -> Convolution:
        _require(self, self.flow == "source_to_target", "flow", self.flow, "flow='source_to_target'")
        _require(self, self.aggr in ("sum", "add"), "aggr", self.aggr, "aggr='sum'")
        _require(self, self.lin is not None, "in_channels", self.in_channels, "one number for source and target")
        _require(self, self.edge_dim is None, "edge_dim", self.edge_dim, "edge_dim=None")
        return Convolution("attention", add_self_loops=self.add_self_loops)

    def message_input(self, x: Tensor) -> Tensor:
        return self.lin(x)

    def batch_messages(self, source: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor | None]:
        csr, rows, csr_t, grad_rows, rows_t, softmax = neighbours
        values = source.view(-1, self.heads, self.out_channels)
        key = (values * self.att_src).sum(2)
        query = (values[: csr.rowptr.numel() - 1] * self.att_dst).sum(2)
        if rows is not None:
            key = torch.cat([key, row_scores(rows, _entries(csr, rows), self._score_weight(self.att_src))])
            if rows.codebook is not None:  # learns between forward and backward, which must read the same rows
                rows = rows._replace(codebook=rows.codebook.clone())
        if grad_rows is not None:
            query = torch.cat([query, row_scores(rows_t, _entries(csr_t, rows_t), self._score_weight(self.att_dst))])
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(2**31, (), device=key.device) if dropout else 0
        out, lse = attention_aggregate(
            source, csr, query, key, heads=self.heads, mode="additive", rows=rows, csr_t=csr_t, grad_rows=grad_rows,
            halo_stats=softmax, negative_slope=self.negative_slope, dropout=dropout, seed=seed,
        )  # fmt: skip
        return out.flatten(1), lse

    def _score_weight(self, attention: Tensor) -> Tensor:
        """[heads * out_channels, heads]: z @ it is z's score by head."""
        by_head = attention[0, :, :, None] * torch.eye(self.heads, device=attention.device)[:, None, :]
        return by_head.flatten(0, 1).detach()

    def input_messages(self, x: Tensor, graph: BatchGraph) -> Tensor:
        csr, csr_t, halo = graph.bipartite(self.store_use.convolution)
        x = torch.cat([x, halo])
        return self.batch_messages(self.message_input(x), Neighbours(csr, None, csr_t))[0]

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        out = messages if self.concat else messages.view(-1, self.heads, self.out_channels).mean(1)
        if self.res is not None:
            out = out + self.res(x)
        return out if self.bias is None else out + self.bias


CONVS = {pyg.GCNConv: GCNConv, pyg.SAGEConv: SAGEConv, pyg.GINConv: GINConv, pyg.GATConv: GATConv}


@torch.no_grad()
def limit_attention(model: nn.Module, lipschitz: float) -> None:
    """Scale attention vectors, in place, to norm at most `lipschitz` by head; call it after every optimiser step.

    A score then moves by at most `lipschitz` times what a row z = W x does, and by that much a stale or quantised row
    can mislead it (VQ-GNN, theorem 2 and appendix E). Of GATConv and GATv2Conv, PyG's own included; the weights stay
    ordinary ones. The scores of other attention, as TransformerConv's inner products, have no such constant.

    Raises:
        ValueError: lipschitz <= 0, or a model without such convs.
    """
    vectors = []
    for conv in model.modules():
        if isinstance(conv, pyg.GATConv):
            vectors += [conv.att_src, conv.att_dst]
        elif isinstance(conv, pyg.GATv2Conv):
            vectors.append(conv.att)
    if not lipschitz > 0 or not vectors:
        raise ValueError(
            f"lipschitz={lipschitz!r} for a {type(model).__name__} of {len(vectors)} attention vectors: it must be "
            "above 0, and the model have GATConv or GATv2Conv"
        )
    for vector in vectors:
        vector.mul_((lipschitz / vector.norm(dim=-1, keepdim=True)).clamp(max=1))
