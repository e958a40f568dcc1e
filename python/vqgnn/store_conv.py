"""What convs that read a node-state store have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqgnn_kernels import aggregate

from .dropout import draw_seed, dropped
from .graph import BatchGraph, Convolution
from .store import Exchange, Neighbours, NodeStore

INPUTS = ("auto", "precompute", "rows", "codes")


@dataclass
class StoreUse:
    """What `convert` gives a conv: where its out-of-batch neighbours come from.

    store: None drops their messages. input: None, or how the input layer reads the given features
    ("precompute": rows of C X; "rows": exact rows of the halo). whole: batches must be the whole graph. inputs: the
    store keeps what an attention is given, not what it tells neighbours, the projection of that. reads: of the whole
    model, stores whose rows take time to come, so that the first conv asks for all of them. queries: where gradients
    are kept, the queries of an attention whose `query_channels` are not 0.
    """

    convolution: Convolution
    store: NodeStore | None = None
    input: str | None = None
    whole: bool = False
    inputs: bool = False
    reads: list[tuple[NodeStore, Convolution]] = field(default_factory=list)
    queries: NodeStore | None = None

    def __str__(self) -> str:
        """What a conv reads of nodes outside a batch."""
        if self.input is not None:
            return {"precompute": "C x, computed once", "rows": "features"}[self.input]
        if self.store is None:
            return "none: batches are the graph" if self.whole else "none: dropped"
        return str(self.store.codec) + ", with gradients" * (self.store.grad or self.store.pending is not None)


class StoreConv:
    """Mix-in: a PyG conv that can read a node-state store."""

    store_use: StoreUse | None = None
    fixed = True  # whether messages are C X with a matrix C known beforehand
    input_slices: tuple[str, ...] = ("exact_neighbours",)  # the methods of BatchGraph that `input_messages` calls
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
        require_no_more(self, args, kwargs)
        if not isinstance(x, Tensor):
            came = f"{type(self).__name__} got x of type {type(x).__name__}"
            raise ValueError(f"{came}; with a batch graph it takes one tensor: conv(x, graph)")
        if edge_index.run is not None:
            return edge_index.run(self, x, edge_index)
        return self.combine(x, self._messages(x, edge_index))

    def slices(self) -> tuple[str, ...]:
        """The methods of BatchGraph that a batch of it calls: the loader's thread has called them by then."""
        use = self.store_use
        if use.input == "precompute":
            return (self.input_product,)
        return ("csr",) if use.input is None else self.input_slices

    def convolution(self) -> Convolution:
        """The matrix C of this conv (attention: its pattern); raises ValueError for options that have none."""
        raise NotImplementedError

    def message_input(self, x: Tensor) -> Tensor:
        """[b, f]: what neighbours are told, X of C X."""
        return x

    def message_query(self, x: Tensor) -> Tensor | None:
        """[b, query_channels]: what the batch's own nodes ask neighbours by; None where there is no such thing."""
        return None

    def state(self, x: Tensor) -> Tensor:
        """[b, f]: what the store keeps of nodes."""
        return self.message_input(x)

    def state_messages(
        self, source: Tensor, neighbours: Neighbours, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`batch_messages` of states: of what `state` gives, and of a table of it."""
        return self.batch_messages(source, neighbours, query)

    def batch_messages(
        self, source: Tensor, neighbours: Neighbours, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Messages M [r, f] of batch rows `source` [b, f] and of halo rows in a table, by eq. 6.

        Their gradient takes in the halo's from its table, by eq. 7. `query` [r + h_t, query_channels] are the queries
        of the rows, then of csr_t's halo where its gradients are known. The second result is the log-sum-exp
        [r, heads] of an attention's scores.
        """
        share = neighbours.dropout
        seed = draw_seed(share, source.device)
        basis = neighbours.grad_basis
        return aggregate(source, *neighbours[:4], dropout=share, seed=seed, grad_basis=basis), None

    def input_messages(self, x: Tensor, graph: BatchGraph) -> Tensor:
        """M [b, f] from features x [b, in_channels], with the halo's features read exactly."""
        neighbours = graph.exact_neighbours(self.store_use.convolution)
        return self.batch_messages(x, neighbours._replace(dropout=dropped(x)[1]))[0]

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        """[b, out_channels] from the node's own x [b, in_channels] and M [b, f]."""
        raise NotImplementedError

    def _messages(self, x: Tensor, graph: BatchGraph) -> Tensor:
        use = self.store_use
        if use is None:
            raise not_converted(self)
        if use.reads and not graph.started:
            start_reading(graph, use)
        if use.input == "precompute" and x is graph.x and graph.edge_dropout is None:
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"x of a batch requires a gradient, and {type(self).__name__} reads C X, which was computed once; "
                    "convert with input='rows'"
                )
            return graph.input_messages(use.convolution)
        require_whole(use, graph)
        if use.input is not None:  # attention, or dropout came between, or of edges: the halo is read exactly
            if not torch.compiler.is_compiling():
                graph.graph.wanted.add(self, *((use.convolution, name) for name in self.input_slices))
            return self.input_messages(x, graph)
        source, query, store = self.state(x), self.message_query(x), use.store
        kept, kept_query = source, query  # what the store is given of them
        clean, share = dropped(x) if store is not None else (x, 0.0)
        if clean is not x:
            with torch.no_grad():
                kept, kept_query = self.state(clean), self.message_query(clean)
        if store is None:
            csr, csr_t = graph.csr(use.convolution)
            return self.batch_messages(source, Neighbours(csr, None, csr_t), query)[0]
        if use.reads:
            neighbours, asked = _stored(graph, use)
        else:
            neighbours, asked = graph.neighbours(store, use.convolution), _stored_queries(graph, use)
        if source is x:  # where the store has what comes of x, dropping that would be another noise
            neighbours = neighbours._replace(dropout=share)
        if use.inputs:  # the gradient goes through the halo's rows to the projection
            neighbours = neighbours._replace(csr_t=graph.halo_transpose(use.convolution))
            if self.training and store.pending is not None and clean.requires_grad:
                halo = graph.csr(use.convolution)[0].halo
                neighbours = neighbours._replace(exchange=_exchanger(store, clean, halo, graph))
        query_all = query if asked is None else torch.cat([query, asked])
        messages, lse = self.state_messages(source, neighbours, query_all)
        if self.training:
            n_id = graph.n_id if store.in_place else graph.origin.n_id
            self._record(n_id, kept, kept_query, messages, lse)
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
def start_reading(graph: BatchGraph, use: StoreUse) -> None:
    graph.start(use.reads)


@torch.compiler.disable
def _stored(graph: BatchGraph, use: StoreUse) -> tuple[Neighbours, Tensor | None]:
    return graph.neighbours(use.store, use.convolution), _stored_queries(graph, use)


def _exchanger(store: NodeStore, own: Tensor, halo: Tensor, graph: BatchGraph) -> Callable[[Tensor], Tensor]:
    return lambda rows: Exchange.apply(rows, own, store.handle, halo, graph.n_id, graph.visit)


def _stored_queries(graph: BatchGraph, use: StoreUse) -> Tensor | None:
    """[h_t, query_channels] of the nodes that the batch sends to, where their gradients are kept."""
    if use.queries is None:
        return None
    where = graph if use.queries.in_place else graph.origin
    return use.queries.pull(where.csr(use.convolution)[1].halo)


def not_converted(conv) -> ValueError:
    return ValueError(f"{type(conv).__name__} got a batch graph before vqgnn.convert; convert the model first")


def require_no_more(conv, args: tuple, kwargs: dict) -> None:
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    if kwargs.get("return_attention_weights") is not None:
        raise ValueError(
            f"{type(conv).__name__} got return_attention_weights, which a batch does not have; leave it out, and "
            "call the conv on the whole data.edge_index for them"
        )
    if given:
        name = "edge_attr" if hasattr(conv, "edge_dim") else "edge_weight"
        raise ValueError(
            f"{type(conv).__name__} got {len(given)} more argument(s) beside a batch graph, which has its own {name}; "
            f"set data.{name} before vqgnn.convert instead"
        )


def require_whole(use: StoreUse, graph: BatchGraph) -> None:
    if use.whole and not graph.whole:
        raise ValueError(
            f"method='full' got a batch of {graph.n_id.numel()} of {graph.graph.num_nodes} nodes; give BatchLoader "
            "batch_size=data.num_nodes, or convert with another method"
        )


def require(conv, allowed: bool, option: str, came, what: str) -> None:
    if not allowed:
        name = type(conv).__name__
        raise ValueError(
            f"{name}({option}={came!r}) cannot read a node-state store; use {what}, or torch_geometric.nn.{name}, of "
            "which PyG's own code then runs"
        )
