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
from torch_geometric.typing import OptPairTensor, OptTensor, PairTensor

from vqgnn_kernels import CSR, Rows, aggregate, attention_aggregate, pull_rows, row_scores

from .global_attention import GlobalAttention as GlobalAttention
from .graph import BatchGraph, Convolution
from .store import Neighbours, NodeStore

INPUTS = ("auto", "precompute", "rows", "codes")


@dataclass
class StoreUse:
    """What `convert` gives a conv: where its out-of-batch neighbours come from.

    store: None drops their messages. input: None, or how the input layer reads the given features
    ("precompute": rows of C X; "rows": exact rows of the halo). whole: batches must be the whole graph. reads: of the
    whole model, stores whose rows take time to come, so that the first conv asks for all of them. queries: where
    gradients are kept, the queries of an attention whose `query_channels` are not 0.
    """

    convolution: Convolution
    store: NodeStore | None = None
    input: str | None = None
    whole: bool = False
    reads: list[tuple[NodeStore, Convolution]] = field(default_factory=list)
    queries: NodeStore | None = None

    def __str__(self) -> str:
        """What a conv reads of nodes outside a batch."""
        if self.input is not None:
            return {"precompute": "C x, computed once", "rows": "features"}[self.input]
        if self.store is None:
            return "none: batches are the graph" if self.whole else "none: dropped"
        return f"{self.store.codec}, with gradients" if self.store.grad else str(self.store.codec)


class StoreConv:
    """Mix-in: a PyG conv that can read a node-state store."""

    store_use: StoreUse | None = None
    fixed = True  # whether messages are C X with a matrix C known beforehand
    input_slices = "exact_neighbours"  # the method of BatchGraph that `input_messages` calls
    chains = True  # whether x and a batch's graph are all that it takes
    softmax_heads = 0  # of which a store of gradients must keep the softmax
    query_channels = 0  # of an attention's queries, where they do not follow from what neighbours are told
    input_product = "input_messages"  # the method of BatchGraph that knows what becomes of the features
    follows_hop: StoreConv | None = None  # an earlier hop of the same conv, which reads the features if that one does
    serves_new_nodes = True  # whether edges to a few nodes are enough to know their rows of C

    def store_parts(self) -> dict[str, StoreConv]:
        """What has a store each, by what stands behind the conv's name: the conv, or each of its hops."""
        return {"": self}

    def forward(self, x, edge_index, *args, **kwargs):
        if not isinstance(edge_index, BatchGraph):
            return super().forward(x, edge_index, *args, **kwargs)
        _require_no_more(self, args, kwargs)
        if edge_index.run is not None:
            return edge_index.run(self, x, edge_index)
        return self.combine(x, self._messages(x, edge_index))

    def convolution(self) -> Convolution:
        """The matrix C of this conv (attention: its pattern); raises ValueError for options that have none."""
        raise NotImplementedError

    def message_input(self, x: Tensor) -> Tensor:
        """[b, f]: what neighbours are told, X of C X."""
        return x

    def message_query(self, x: Tensor) -> Tensor | None:
        """[b, query_channels]: what the batch's own nodes ask neighbours by; None where there is no such thing."""
        return None

    def batch_messages(
        self, source: Tensor, neighbours: Neighbours, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Messages M [r, f] of batch rows `source` [b, f] and of halo rows in a table, by eq. 6.

        Their gradient takes in the halo's from its table, by eq. 7. `query` [r + h_t, query_channels] are the queries
        of the rows, then of csr_t's halo where its gradients are known. The second result is the log-sum-exp
        [r, heads] of an attention's scores.
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
            raise _not_converted(self)
        if use.reads and not graph.started:
            _start(graph, use)
        if use.input == "precompute" and x is graph.x:
            return graph.input_messages(use.convolution)
        require_whole(use, graph)
        if use.input is not None:  # attention, or dropout came between: the halo is read exactly
            graph.graph.wanted[use.convolution, self.input_slices] = None
            return self.input_messages(x, graph)
        source, query, store = self.message_input(x), self.message_query(x), use.store
        if store is None:
            csr, csr_t = graph.csr(use.convolution)
            return self.batch_messages(source, Neighbours(csr, None, csr_t), query)[0]
        if use.reads:
            neighbours, asked = _stored(graph, use)
        else:
            neighbours, asked = graph.neighbours(store, use.convolution), _stored_queries(graph, use)
        messages, lse = self.batch_messages(source, neighbours, query if asked is None else torch.cat([query, asked]))
        if self.training:
            n_id = graph.n_id if store.in_place else graph.origin.n_id
            self._record(n_id, source, query, messages, lse)
        return messages

    def _record(self, n_id: Tensor, x: Tensor, query: Tensor | None, messages: Tensor, lse: Tensor | None) -> None:
        """Push the batch's states: with its gradients once backward knows them, else now."""
        store, queries = self.store_use.store, self.store_use.queries
        x, values = x.detach(), messages.detach()
        query = None if queries is None else query.detach()
        # compiled, every push goes through the one opaque op of the backward: a codebook's update cannot be traced
        if not (messages.requires_grad and (store.grad or torch.compiler.is_compiling())):
            store.push(n_id, x)
            return

        def push(g: Tensor) -> Tensor | None:
            softmax = None
            if lse is not None:
                softmax = torch.stack([lse, (g.float() * values.float()).view(*lse.shape, -1).sum(2)], 1)
            if torch.compiler.is_compiling():
                if queries is not None:
                    g = torch.ops.vqgnn.record(queries.handle, n_id, query, g)
                return torch.ops.vqgnn.record(store.handle, n_id, x, g, softmax)
            store.push(n_id, x, g, softmax)
            if queries is not None:
                queries.push(n_id, query)
            return None

        messages.register_hook(push)

    def reads(self) -> str:
        """Where the rows of out-of-batch nodes come from."""
        return str(self.store_use)

    def stores(self) -> dict[str, NodeStore]:
        """By what stands behind the conv's name."""
        use = self.store_use
        found = {} if use is None else {"": use.store, ".query": use.queries}
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
def _stored(graph: BatchGraph, use: StoreUse) -> tuple[Neighbours, Tensor | None]:
    return graph.neighbours(use.store, use.convolution), _stored_queries(graph, use)


def _stored_queries(graph: BatchGraph, use: StoreUse) -> Tensor | None:
    """[h_t, query_channels] of the nodes that the batch sends to, where their gradients are kept."""
    if use.queries is None:
        return None
    where = graph if use.queries.in_place else graph.origin
    return use.queries.pull(where.csr(use.convolution)[1].halo)


def _not_converted(conv) -> ValueError:
    return ValueError(f"{type(conv).__name__} got a batch graph before vqgnn.convert; convert the model first")


def _require_no_more(conv, args: tuple, kwargs: dict) -> None:
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    if given:
        raise ValueError(
            f"{type(conv).__name__} got {len(given)} more argument(s) beside a batch graph, which holds its own "
            "weights; set data.edge_weight before vqgnn.convert instead"
        )


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


def _require_attention(conv: Attention) -> None:
    _require(conv, conv.flow == "source_to_target", "flow", conv.flow, "flow='source_to_target'")
    _require(conv, conv.aggr in ("sum", "add"), "aggr", conv.aggr, "aggr='sum'")
    _require(
        conv, isinstance(conv.in_channels, int), "in_channels", conv.in_channels, "one number for source and target"
    )
    _require(conv, conv.edge_dim is None, "edge_dim", conv.edge_dim, "edge_dim=None")


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


class Attention(StoreConv):
    """Mix-in: a softmax over edges weighs the messages. Has `heads` and `dropout`.

    Gradients reach the weights through the batch's own rows, from messages to the batch alone or, with a gradient store
    (`convert(..., grad=True)`), to out-of-batch nodes too.
    """

    fixed = False
    input_slices = "bipartite"

    @property
    def softmax_heads(self) -> int:
        return self.heads

    def input_messages(self, x: Tensor, graph: BatchGraph) -> Tensor:
        csr, csr_t, halo = graph.bipartite(self.store_use.convolution)
        source = self.message_input(torch.cat([x, halo.to(x.dtype)]))
        return self.batch_messages(source, Neighbours(csr, None, csr_t), self.message_query(x))[0]

    def attend(self, source: Tensor, neighbours: Neighbours, query: Tensor, **options) -> tuple[Tensor, Tensor]:
        """Messages [r, heads * width] and their log-sum-exp [r, heads]; the options are attention_aggregate's."""
        csr, rows, csr_t, grad_rows, _, softmax = neighbours
        if rows is not None and rows.codebook is not None:
            # learns between forward and backward, which must read the same rows
            rows = rows._replace(codebook=rows.codebook.clone())
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(2**31, (), device=source.device) if dropout else 0
        out, lse = attention_aggregate(
            source, csr, query, heads=self.heads, rows=rows, csr_t=csr_t, grad_rows=grad_rows, halo_stats=softmax,
            dropout=dropout, seed=seed, **options,
        )  # fmt: skip
        return out.flatten(1), lse

    def join_heads(self, messages: Tensor) -> Tensor:
        """[b, heads * out_channels], or with concat=False their mean over the heads."""
        return messages if self.concat else messages.view(-1, self.heads, self.out_channels).mean(1)


class GATConv(Attention, pyg.GATConv):
    """PyG's GATConv (Velickovic et al.): M_i = sum_j softmax_j(leaky_relu(a_src z_j + a_dst z_i)) z_j with z = W x.

    The store keeps z.
    """

    propagate_type: ClassVar = {"x": OptPairTensor, "alpha": Tensor}
    edge_updater_type: ClassVar = {"alpha": OptPairTensor, "edge_attr": OptTensor}

    def convolution(self) -> Convolution:
        _require_attention(self)
        return Convolution("attention", add_self_loops=self.add_self_loops)

    def message_input(self, x: Tensor) -> Tensor:
        return self.lin(x)

    def batch_messages(
        self, source: Tensor, neighbours: Neighbours, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        csr, rows, csr_t, grad_rows, rows_t, _ = neighbours
        values = source.view(-1, self.heads, self.out_channels)
        key = (values * self.att_src).sum(2)
        query = (values[: csr.rowptr.numel() - 1] * self.att_dst).sum(2)
        if rows is not None:
            key = torch.cat([key, row_scores(rows, _entries(csr, rows), self._score_weight(self.att_src))])
        if grad_rows is not None:
            query = torch.cat([query, row_scores(rows_t, _entries(csr_t, rows_t), self._score_weight(self.att_dst))])
        return self.attend(source, neighbours, query, key=key, mode="additive", negative_slope=self.negative_slope)

    def _score_weight(self, attention: Tensor) -> Tensor:
        """[heads * out_channels, heads]: z @ it is z's score by head."""
        by_head = attention[0, :, :, None] * torch.eye(self.heads, device=attention.device)[:, None, :]
        return by_head.flatten(0, 1).detach()

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        out = self.join_heads(messages)
        if self.res is not None:
            out = out + self.res(x)
        return out if self.bias is None else out + self.bias


class GATv2Conv(Attention, pyg.GATv2Conv):
    """PyG's GATv2Conv (Brody et al.): M_i = sum_j softmax_j(a . leaky_relu(W_l x_j + W_r x_i)) W_l x_j.

    The store keeps W_l x; with gradients and without share_weights a second one keeps W_r x.
    """

    propagate_type: ClassVar = {"x": PairTensor, "alpha": Tensor}
    edge_updater_type: ClassVar = {"x": PairTensor, "edge_attr": OptTensor}

    @property
    def query_channels(self) -> int:
        return 0 if self.share_weights else self.heads * self.out_channels

    def convolution(self) -> Convolution:
        _require_attention(self)
        return Convolution("attention", add_self_loops=self.add_self_loops)

    def message_input(self, x: Tensor) -> Tensor:
        return self.lin_l(x)

    def message_query(self, x: Tensor) -> Tensor | None:
        return None if self.share_weights else self.lin_r(x)

    def batch_messages(
        self, source: Tensor, neighbours: Neighbours, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if query is None:  # what neighbours are told is what they are asked by
            query = source[: neighbours.csr.rowptr.numel() - 1]
            if neighbours.grad_rows is not None:
                rows = neighbours.rows_t
                query = torch.cat([query, pull_rows(rows, _entries(neighbours.csr_t, rows), source.size(1))])
        query = query.view(-1, self.heads, self.out_channels)
        options = {"attention": self.att[0], "negative_slope": self.negative_slope}
        return self.attend(source, neighbours, query, mode="gatv2", **options)

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        out = self.join_heads(messages)
        if self.res is not None:
            out = out + self.res(x)
        return out if self.bias is None else out + self.bias


class TransformerConv(Attention, pyg.TransformerConv):
    """PyG's TransformerConv (Shi et al.): M_i = sum_j softmax_j(<W_q x_i, W_k x_j> / sqrt(F)) W_v x_j, by head.

    The store keeps W_k x and W_v x, head by head side by side: to the kernel that is one row of 2 F channels, of which
    the query, padded with zeros, sees the first half. With gradients a second store keeps W_q x.
    """

    propagate_type: ClassVar = {"query": Tensor, "key": Tensor, "value": Tensor, "edge_attr": OptTensor}

    @property
    def query_channels(self) -> int:
        return self.heads * self.out_channels

    def convolution(self) -> Convolution:
        _require_attention(self)
        return Convolution("attention", add_self_loops=False)

    def message_input(self, x: Tensor) -> Tensor:
        parts = (lin(x).view(-1, self.heads, self.out_channels) for lin in (self.lin_key, self.lin_value))
        return torch.cat([*parts], 2).flatten(1)

    def message_query(self, x: Tensor) -> Tensor:
        return self.lin_query(x)

    def batch_messages(
        self, source: Tensor, neighbours: Neighbours, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        query = F.pad(query.view(-1, self.heads, self.out_channels), (0, self.out_channels))
        return self.attend(source, neighbours, query, mode="dot", scale=self.out_channels**-0.5)

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        values = messages.view(-1, self.heads, 2 * self.out_channels)[:, :, self.out_channels :]
        out = self.join_heads(values.flatten(1))
        if not self.root_weight:
            return out
        own = self.lin_skip(x)
        if self.lin_beta is None:
            return out + own
        beta = self.lin_beta(torch.cat([out, own, out - own], 1)).sigmoid()
        return beta * own + (1 - beta) * out


class ChebHop(StoreConv, nn.Module):
    """One product with the matrix of a ChebConv, of what the hop before gave (`follows_hop`) or of the conv's x."""

    input_product = "input_terms"
    serves_new_nodes = False  # lambda_max and the degrees that normalise are the whole graph's

    def __init__(self, convolution: Convolution, index: int, follows: ChebHop | None):
        super().__init__()
        self._convolution, self.index = convolution, index
        self.__dict__["follows_hop"] = follows  # no child module

    def convolution(self) -> Convolution:
        return self._convolution

    @property
    def input_slices(self) -> str:
        return "exact_neighbours" if self.index == 0 else "csr"

    def input_messages(self, x: Tensor, graph: BatchGraph) -> Tensor:
        if self.index == 0:
            return super().input_messages(x, graph)
        convolution = self.store_use.convolution
        table = Rows("fp32", graph.graph.terms(convolution)[self.index - 1], None, None)
        neighbours = graph.read(table, convolution)._replace(csr_t=graph.csr(convolution)[1])
        return self.batch_messages(x, neighbours)[0]

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        return messages


class ChebConv(pyg.ChebConv):
    """PyG's ChebConv (Defferrard et al.): sum_k T_k W_k, T_0 = X, T_1 = C X, T_k = 2 C T_k-1 - T_k-2.

    C is the scaled Laplacian of the whole graph. Each of the K - 1 products has a store: of X, T_1, ...; of the given
    features all T_k are computed once.
    """

    propagate_type: ClassVar = {"x": Tensor, "norm": Tensor}

    def convolution(self) -> Convolution:
        _require(self, self.flow == "source_to_target", "flow", self.flow, "flow='source_to_target'")
        _require(self, self.aggr in ("sum", "add"), "aggr", self.aggr, "aggr='sum'")
        _require(self, len(self.lins) > 1, "K", len(self.lins), "K >= 2")
        return Convolution("cheb", normalization=self.normalization, order=len(self.lins))

    def store_parts(self) -> dict[str, StoreConv]:
        if "hops" not in self._modules:
            hops = []
            for index in range(len(self.lins) - 1):
                hops.append(ChebHop(self.convolution(), index, hops[-1] if hops else None))
            self.hops = nn.ModuleList(hops)
        return {f".hops.{hop.index}": hop for hop in self.hops}

    def forward(self, x, edge_index, *args, **kwargs):
        if not isinstance(edge_index, BatchGraph):
            return super().forward(x, edge_index, *args, **kwargs)
        _require_no_more(self, args, kwargs)
        if "hops" not in self._modules:
            raise _not_converted(self)
        out = sum(lin(term) for lin, term in zip(self.lins, self._terms(x, edge_index), strict=True))
        return out if self.bias is None else out + self.bias

    def _terms(self, x: Tensor, graph: BatchGraph) -> list[Tensor]:
        """T_0, T_1, ... [b, in_channels] of the batch."""
        use = self.hops[0].store_use
        if graph.run is None and use is not None and use.input == "precompute" and x is graph.x:
            if use.reads and not graph.started:
                _start(graph, use)
            return [x, *graph.input_terms(use.convolution)]
        terms = [x, self.hops[0](x, graph)]
        for hop in self.hops[1:]:
            terms.append(2 * hop(terms[-1], graph) - terms[-2])
        return terms


CONVS = {
    pyg.GCNConv: GCNConv,
    pyg.SAGEConv: SAGEConv,
    pyg.GINConv: GINConv,
    pyg.GATConv: GATConv,
    pyg.GATv2Conv: GATv2Conv,
    pyg.TransformerConv: TransformerConv,
    pyg.ChebConv: ChebConv,
}
