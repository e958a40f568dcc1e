"""Any PyG conv on a mini-batch: its own code runs, and its `propagate` is handed the rows of nodes outside the batch.

A conv computes row by row, then `propagate` gathers rows over the edges, then it goes on row by row. So only
`propagate` (and `edge_updater`, which attentions call before it) must know that the graph is larger than the batch:

- forward runs on the batch's rows;
- what it hands to the first `propagate`, it also hands over for the halo: its code runs up to there on the halo's
  stored inputs, with this step's weights, which get gradients from both;
- a later `propagate` of the same forward (APPNP, ARMA, Cheb) keeps its inputs in a store of its own;
- a conv that changes the edges first (self loops, gcn_norm) did so once to the whole graph, and a batch takes its edges
  and their values from there: normalisation comes from the whole graph, whatever a conv normalises.

With a gradient store the gradient G of what every `propagate` returns is kept. Backward computes the halo's messages
anew from the batch's rows and adds their gradient, eq. 7. Where messages are summed, the edges that leave the batch are
enough; elsewhere (softmax, max, mean, std) a message's gradient depends on the others to the same node, and the rows of
all neighbours of the halo are read too: exact as well, but two hops wide.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing

import vqgnn_kernels as kernels
from vqgnn_kernels import Rows

from .graph import EDGE_TENSORS, BatchEdges, BatchGraph, Convolution, Graph
from .nn import StoreConv, StoreUse, require_whole
from .store import NodeStore

_GIVEN_EDGES = Convolution("sum")  # the graph's edges as they are


@dataclass(eq=False)
class Recorded:
    """Edges [2, e] (source, target) that a conv makes of the graph's, and the values that it gives each call for them.

    It stands where a `Convolution` stands: the key of a graph's matrix.
    """

    edge_index: Tensor
    values: list[dict[str, Tensor]]

    def edges(self, graph: Graph) -> tuple[Tensor, None]:
        return self.edge_index, None

    def tensors(self) -> list[Tensor]:
        return [self.edge_index, *(value for call in self.values for value in call.values())]

    def equals(self, other: Recorded) -> bool:
        if [list(call) for call in self.values] != [list(call) for call in other.values]:
            return False
        return all(torch.equal(a, b) for a, b in zip(self.tensors(), other.tensors(), strict=True))

    def __deepcopy__(self, memo: dict) -> Recorded:
        return self  # never written, and the graph knows it by identity


@dataclass(eq=False)
class Hop:
    """A `propagate` of a conv: what it reads and keeps of nodes outside the batch. Like a conv it has a `store_use`.

    dim: channels of a node's state. out_shape: of what propagate returns for a node. grads: the gradients of that.
    chains: whether a conv is this hop alone and takes nothing but its x.
    """

    dim: int
    out_shape: tuple[int, ...]
    chains: bool
    store_use: StoreUse | None = None
    grads: NodeStore | None = None
    fixed: ClassVar[bool] = False

    @property
    def out_dim(self) -> int:
        return torch.Size(self.out_shape).numel()

    def message_input(self, x: Tensor) -> Tensor:
        return x


@dataclass(eq=False)
class Survey:
    """What a conv does with its arguments, found by running it on a few nodes.

    rows: names of the arguments with a row a node, and of these told: the ones that reach neighbours. records: whether
    edges and their values come from one run on the whole graph. edge_values: by call, the names of propagate's (or
    edge_updater's) arguments with a row an edge. additive: whether messages are summed. edges: which edges messages
    follow, and valued: whether these have values.
    """

    rows: list[str]
    told: list[str]
    records: bool
    edge_values: list[list[str]]
    additive: bool
    hops: list[Hop]
    edges: Convolution | Recorded | None = None
    valued: bool = False


class _Stop(Exception):
    """Ends a forward at the call whose result is wanted."""

    def __init__(self, result: Any):
        self.result = result


class _Listen:
    """Hears what a conv tells of the given rows: the arguments of its calls up to the first propagate."""

    def __init__(self):
        self.heard: list[dict] = []

    def edge_updater(self, conv: GenericConv, edge_index: Tensor, arguments: dict) -> Tensor:
        self.heard.append(arguments)
        return conv.pyg_class.edge_updater(conv, edge_index, **arguments)

    def propagate(self, conv: GenericConv, edge_index: Tensor, arguments: dict) -> Tensor:
        raise _Stop([*self.heard, arguments])


class _Call(NamedTuple):
    propagates: bool  # else it was edge_updater
    edge_index: Tensor
    arguments: dict
    edge_values: list[str]  # the names of arguments with a row an edge
    out: Tensor


class _Record:
    """Notes every call's edges and arguments. Nothing is sent, so that a run costs no more than its rows."""

    def __init__(self, edge_values: list[list[str]] | None = None):
        self.edge_values = edge_values
        self.calls: list[_Call] = []

    def edge_updater(self, conv: GenericConv, edge_index: Tensor, arguments: dict) -> Tensor:
        return self._note(conv, False, edge_index, arguments)

    def propagate(self, conv: GenericConv, edge_index: Tensor, arguments: dict) -> Tensor:
        return self._note(conv, True, edge_index, arguments)

    def _note(self, conv: GenericConv, propagates: bool, edge_index: Tensor, arguments: dict) -> Tensor:
        if self.edge_values is not None:
            values = self.edge_values[len(self.calls)]
        else:  # a survey's few nodes have another number than its edges, so a row an edge is no row a node
            nodes = conv.node_arguments(propagates)
            values = [k for k, v in arguments.items() if k not in nodes and _has_rows(v, edge_index.size(1))]
        none = {k: v[:0] if k in values else v for k, v in arguments.items()}
        call = conv.pyg_class.propagate if propagates else conv.pyg_class.edge_updater
        out = call(conv, edge_index[:, :0], **none)
        self.calls.append(_Call(propagates, edge_index, arguments, values, out))
        return out

    def values(self) -> list[dict[str, Tensor]]:
        """By call, what it was given for every edge."""
        return [{key: call.arguments[key] for key in call.edge_values} for call in self.calls]

    def agrees(self, other: _Record, edges: slice = slice(None)) -> bool:
        """Whether the other run gave the same for these edges."""
        pairs = zip(self.values(), other.values(), strict=True)
        return all(torch.equal(mine[key][edges], its[key]) for mine, its in pairs for key in mine)


class _Deliver:
    """Sends messages over `edges` to a conv's own rows, from them and from the rows of the nodes behind them.

    told: what those nodes tell the calls up to the first propagate; None where there are none.
    answer(hop, source, send): the result of each propagate, of which send is the real one. For the first, source is
    None and send takes nothing; for a later one source [own, dim] are the rows that it is given, and send takes own
    rows, the other nodes' (or None) and edges.
    """

    def __init__(self, edges: BatchEdges, recorded: Recorded | None, told: list[dict] | None, answer: Callable):
        self.edges, self.recorded, self.told, self.answer = edges, recorded, told, answer
        self.calls = self.hops = 0

    def edge_updater(self, conv: GenericConv, edge_index: Tensor, arguments: dict) -> Tensor:
        return self._send(conv, False, arguments, self._told(), self.edges, self._next())

    def propagate(self, conv: GenericConv, edge_index: Tensor, arguments: dict) -> Tensor:
        told, call = self._told(), self._next()
        hop, self.hops = conv.survey.hops[self.hops], self.hops + 1
        if self.hops == 1:
            return self.answer(hop, None, lambda: self._send(conv, True, arguments, told, self.edges, call))
        source, rebuild = conv.flatten({name: arguments[name] for name in conv.node_arguments(True)})

        def send(own: Tensor, others: Tensor | None, edges: BatchEdges) -> Tensor:
            if others is None:
                edges = edges.among(own.size(0))
            told = None if others is None else rebuild(others)
            return self._send(conv, True, {**arguments, **rebuild(own)}, told, edges, call)

        return self.answer(hop, source, send)

    def _told(self) -> dict | None:
        return self.told[self.calls] if self.told is not None and self.calls < len(self.told) else None

    def _next(self) -> int:
        self.calls += 1
        return self.calls - 1

    def _send(self, conv, propagates: bool, arguments: dict, told: dict | None, edges: BatchEdges, call: int) -> Tensor:
        values = {} if self.recorded is None else self.recorded.values[call]
        values = {name: value[edges.ids] for name, value in values.items()}
        return conv.send(propagates, edges, {**arguments, **values}, told)


@dataclass
class _Given:
    """The arguments of one call of a conv: `slot` names the one that holds the batch's graph.

    edge_tensors: the data's tensors with a row an edge that the conv takes, for all edges.
    """

    graph: BatchGraph
    bound: inspect.BoundArguments
    slot: str
    edge_tensors: dict[str, Tensor]

    def rows(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.bound.arguments[name] for name in names}


class GenericConv(StoreConv):
    """Mix-in: any other PyG conv (`pyg_class`) that can read a node-state store."""

    fixed = False
    pyg_class: ClassVar[type[MessagePassing]]
    survey: Survey | None = None
    _visitor = None

    def forward(self, *args, **kwargs):
        if not any(isinstance(value, BatchGraph) for value in (*args, *kwargs.values())):
            return self.pyg_class.forward(self, *args, **kwargs)
        return self._on_batch(args, kwargs)

    def propagate(self, edge_index, size=None, **kwargs):
        if self._visitor is None:
            return self.pyg_class.propagate(self, edge_index, size=size, **kwargs)
        return self._visitor.propagate(self, edge_index, kwargs)

    def edge_updater(self, edge_index, size=None, **kwargs):
        if self._visitor is None:
            return self.pyg_class.edge_updater(self, edge_index, size=size, **kwargs)
        return self._visitor.edge_updater(self, edge_index, kwargs)

    @property
    def input_slices(self) -> str:
        return "valued_edges" if self.survey.valued else "edges"

    def convolution(self) -> None:
        """Known from the survey alone."""

    # ---- a call on a batch -------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _on_batch(self, args: tuple, kwargs: dict):
        given = self._given(args, kwargs)
        run = given.graph.run
        if hasattr(run, "survey"):
            return run.survey(self, given)
        if self.survey is None:
            raise ValueError(f"{type(self).__name__} got a batch graph before vqgnn.convert; convert the model first")
        with _uncached(self):
            return self._train(given) if run is None else self._sweep(given)

    def _train(self, given: _Given) -> Tensor:
        """On a mini-batch, with the rows of its halo from the stores."""
        graph, survey = given.graph, self.survey
        first = survey.hops[0]
        use = first.store_use
        require_whole(use, graph)
        edges = graph.edges(survey.edges, survey.valued)
        source, rows = self._source(given), None
        if use.input == "rows":
            rows = graph.graph.x[edges.others]
        elif use.store is not None:
            rows = use.store.pull(edges.others)
            source = self._compensated(source, first, given, None)

        def answer(hop: Hop, state: Tensor | None, send: Callable) -> Tensor:
            store = hop.store_use.store
            if hop is first:
                state, messages = source, send()
            else:
                others = None if store is None else store.pull(edges.others)
                state = self._compensated(state, hop, given, send)
                messages = send(state, others, edges)
            if self.training and store is not None:
                store.push(graph.n_id, state.detach().float())
                if hop.grads is not None and messages.requires_grad:
                    messages.register_hook(lambda g: hop.grads.push(graph.n_id, self._flat(g).float()))
            return messages

        return self._deliver(given, source, rows, edges, answer)

    def _sweep(self, given: _Given) -> Tensor:
        """In layer-wise inference: `run` knows the rows of all nodes (or, looking for the model's structure, none)."""
        graph, survey, hops = given.graph, self.survey, self.survey.hops
        source, edges = self._source(given), graph.edges(survey.edges, survey.valued)

        def others(hop: Hop, table: Rows | None) -> Tensor | None:
            return None if table is None else kernels.pull_rows(table, edges.others, hop.dim)

        if len(hops) == 1:

            def output(table: Rows | None, source: Tensor) -> Tensor:
                return self._deliver(given, source, others(hops[0], table), edges, lambda hop, state, send: send())

            return graph.run(hops[0], source, graph, output)

        def first_messages(table: Rows | None, source: Tensor) -> Tensor:
            return self._flat(self._first(given, source, others(hops[0], table), edges))

        def answer(hop: Hop, state: Tensor | None, send: Callable) -> Tensor:
            def messages(table: Rows | None, state: Tensor) -> Tensor:
                return self._flat(send(state, others(hop, table), edges))

            rows = first if hop is hops[0] else graph.run(hop, state, graph, messages)
            return self._unflat(rows, hop.out_shape)

        first = graph.run(hops[0], source, graph, first_messages)
        return self._deliver(given, source, None, edges, answer)

    def _deliver(
        self, given: _Given, own: Tensor, others: Tensor | None, edges: BatchEdges, answer: Callable
    ) -> Tensor:
        """The conv's output for own rows [o, dim], of which `edges` come from them and from rows `others` [h, dim]."""
        told = None
        if others is None:
            edges = edges.among(own.size(0))
        elif others.size(0):
            told = self._run_over(_Listen(), given, self._arguments(given, others.to(own.dtype)), None)
        survey = self.survey
        visitor = _Deliver(edges, survey.edges if survey.records else None, told, answer)
        return self._run_over(visitor, given, self._arguments(given, own), edges)

    def _first(self, given: _Given, own: Tensor, others: Tensor | None, edges: BatchEdges) -> Tensor:
        """What the first propagate returns for own rows."""

        def stop(hop: Hop, state: Tensor | None, send: Callable) -> Tensor:
            raise _Stop(send())

        return self._deliver(given, own, others, edges, stop)

    def _compensated(self, source: Tensor, hop: Hop, given: _Given, send: Callable | None) -> Tensor:
        """The same rows; their gradient takes in the halo's messages' by eq. 7."""
        if hop.grads is None or not source.requires_grad:
            return source
        source = source.view_as(source)
        source.register_hook(lambda g: g + self._halo_gradient(source.detach(), hop, given, send).to(g.dtype))
        return source

    @torch.enable_grad()
    def _halo_gradient(self, source: Tensor, hop: Hop, given: _Given, send: Callable | None) -> Tensor:
        """C_HB^T G~_H [b, dim]: of out-of-batch nodes' messages, computed again from source [b, dim]."""
        graph, survey = given.graph, self.survey
        targets, edges = graph.edges_out(survey.edges, not survey.additive, survey.valued)
        if targets.numel() == 0:
            return torch.zeros_like(source)
        source = source.to(next(self.parameters(), hop.store_use.store.pull(targets[:1])).dtype).requires_grad_()
        own, others = hop.store_use.store.pull(targets).to(source.dtype), source
        if not survey.additive:
            position = graph.position[edges.others]  # in the batch, whose rows are known exactly
            others = hop.store_use.store.pull(edges.others).to(source.dtype)
            others = torch.where((position >= 0)[:, None], source[position.clamp(min=0)], others)
        with _uncached(self):
            messages = self._first(given, own, others, edges) if send is None else send(own, others, edges)
        known = hop.grads.written[targets] >= 0
        g = (hop.grads.pull(targets) * known[:, None]).to(messages.dtype)
        return torch.autograd.grad(self._flat(messages), source, g)[0]

    # ---- what the conv does ------------------------------------------------------------------------------------------

    @torch.enable_grad()
    def examine(self, given: _Given) -> tuple[Tensor, bool]:
        """Set `survey` from a run on a few nodes.

        Returns the output for them, without messages, and whether neighbours are told the features themselves.
        """
        name, n = type(self).__name__, given.graph.n_id.numel()
        names = [k for k, v in given.bound.arguments.items() if _has_rows(v, n) and v.is_floating_point()]
        ends = torch.arange(n, device=given.graph.n_id.device)
        pairs = torch.stack([ends.repeat_interleave(n), ends.repeat(n)])
        edge_index = pairs[:, pairs[0] != pairs[1]].repeat(1, 2)  # all twice: never as many as nodes
        values = {k: v.new_full((edge_index.size(1), *v.shape[1:]), v.is_floating_point())
                  for k, v in given.edge_tensors.items()}  # fmt: skip
        given = replace(given, edge_tensors=values)
        rows = {k: v.detach().clone().requires_grad_() for k, v in given.rows(names).items()}
        with _uncached(self):
            told = self._told(given, rows, edge_index)
            record = _Record()
            out = self._run(record, given, rows, edge_index, slice(None))
            hops = self._hops(record, rows, told, n)
            edge_values = [call.edge_values for call in record.calls]
            records = any(call.edge_index is not edge_index for call in record.calls)
            if not records and any(
                edge_values
            ):  # do the other edges decide an edge's value, or will later hops need it?
                half = _Record(edge_values)
                self._run(half, given, rows, edge_index[:, ::2], slice(None, None, 2))
                records = len(hops) > 1 or not record.agrees(half, slice(None, None, 2))
            self._check_values(record, rows, records)
            if records:
                self._check_dropout(record, given, rows, edge_index)
            self.survey = Survey(names, told, records, edge_values, False, hops)
            self.survey.additive = self._additive(given, record)
        if not _has_rows(out, n):
            raise ValueError(f"{name} returned {type(out).__name__}; with a batch graph it must return a row a node")
        return out.detach(), self._source(given) is given.graph.x

    def _told(self, given: _Given, rows: dict[str, Tensor], edge_index: Tensor) -> list[str]:
        """Which of the arguments `rows` reach neighbours."""
        heard = self._run(_Listen(), given, rows, edge_index, slice(None))
        if not isinstance(heard, list):
            raise ValueError(
                f"{type(self).__name__} does not call propagate, so that it cannot read a node-state store"
            )
        reached = []
        for k, arguments in enumerate(heard):
            reached += _tensors(arguments[name] for name in self.node_arguments(k == len(heard) - 1))
        sums = [t.float().sum() for t in reached if t.requires_grad]
        if not sums:
            raise ValueError(
                f"{type(self).__name__} tells neighbours nothing of its x; it can run without a batch graph"
            )
        gradients = torch.autograd.grad(sum(sums), list(rows.values()), allow_unused=True)
        return [name for name, g in zip(rows, gradients, strict=True) if g is not None]

    def _hops(self, record: _Record, rows: dict[str, Tensor], told: list[str], n: int) -> list[Hop]:
        name = type(self).__name__
        sent = [call for call in record.calls if call.propagates]
        if len(sent) > 1 and len(sent) < len(record.calls):
            raise ValueError(
                f"{name} calls edge_updater and propagates {len(sent)} times; give each time a conv of its own"
            )
        hops = []
        for call in sent:
            nodes = self.node_arguments(True)
            dim = sum(rows[k][0].numel() for k in told)
            if hops:
                dim = self.flatten({k: call.arguments[k] for k in nodes})[0].size(1)
                raw = [k for k, v in call.arguments.items()
                       if k not in nodes and k not in call.edge_values and _has_rows(v, n)]  # fmt: skip
                if raw:
                    raise ValueError(
                        f"{name} gives its later propagates {raw[0]}, which no message reads; use it outside"
                    )
            out_shape = tuple(call.out.movedim(self.node_dim, 0).shape[1:])
            hops.append(Hop(dim, out_shape, chains=len(sent) == 1 and len(rows) == 1))
        return hops

    def _check_values(self, record: _Record, rows: dict[str, Tensor], records: bool) -> None:
        for values in record.values():
            for key, value in values.items():
                if not value.requires_grad:
                    continue
                from_rows = torch.autograd.grad(value.sum(), list(rows.values()), retain_graph=True, allow_unused=True)
                if records or any(g is not None for g in from_rows):
                    raise ValueError(
                        f"{type(self).__name__} computes {key} of every edge from weights or node rows before it calls "
                        "propagate; compute it in message() or edge_update()"
                    )

    def _check_dropout(self, record: _Record, given: _Given, rows: dict[str, Tensor], edge_index: Tensor) -> None:
        again = _Record([call.edge_values for call in record.calls])
        self.training = True  # alone: modules inside stay as they are, and keep their statistics
        try:
            with torch.random.fork_rng():
                self._run(again, given, rows, edge_index, slice(None))
        finally:
            self.training = False
        if not record.agrees(again):
            raise ValueError(
                f"{type(self).__name__} drops out values of edges before propagate; here they come from "
                "the whole graph, once: set its dropout to 0"
            )

    @torch.no_grad()
    def _additive(self, given: _Given, record: _Record) -> bool:
        """Whether the messages of two halves of the edges add up to those of all."""
        survey, edge_index = self.survey, self._flow(record.calls[0].edge_index)
        survey.edges = Recorded(edge_index, record.values())
        ids = torch.arange(edge_index.size(1), device=edge_index.device)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            source = torch.randn(given.graph.n_id.numel(), survey.hops[0].dim).to(self._source(given))

        def messages(ids: Tensor) -> Tensor:
            edges = BatchEdges(edge_index[:, ids], ids[:0], ids)
            return self._flat(self._first(given, source, None, edges)).float()

        whole = messages(ids)
        rest = whole - messages(ids[::2]) - messages(ids[1::2]) + messages(ids[:0])
        return bool(rest.abs().max() <= 1e-4 * whole.abs().max())

    def settle(self, given: _Given) -> None:
        """Fix which edges messages follow: for edges of the conv's own, by running it on the whole graph once."""
        graph, survey, name = given.graph.graph, self.survey, type(self).__name__
        survey.edges = _GIVEN_EDGES
        if survey.records or self.flow != "source_to_target":
            if graph.edge_index is None:
                raise ValueError(f"{name} makes edges of its own, for which it needs data.edge_index in memory")
            recorded = Recorded(self._flow(graph.edge_index), [])
            if survey.records:
                recorded = self._record(given)
            survey.edges = next((known for known in graph.recorded if known.equals(recorded)), recorded)
            if survey.edges is recorded:
                graph.recorded.append(recorded)
        survey.valued = bool(given.edge_tensors) or (survey.records and any(survey.edges.values))

    @torch.no_grad()
    def _record(self, given: _Given) -> Recorded:
        graph = given.graph.graph
        rows = {k: v.new_zeros(1, *v.shape[1:]).expand(graph.num_nodes, *v.shape[1:])
                for k, v in given.rows(self.survey.rows).items()}  # fmt: skip
        record = _Record(self.survey.edge_values)
        with _uncached(self):
            self._run(record, given, rows, graph.edge_index, slice(None))
        edge_index = record.calls[0].edge_index
        if not all(torch.equal(call.edge_index, edge_index) for call in record.calls[1:]):
            raise ValueError(
                f"{type(self).__name__} propagates over several sets of edges; give each a conv of its own"
            )
        return Recorded(self._flow(edge_index), record.values())

    # ---- PyG's code --------------------------------------------------------------------------------------------------

    def _given(self, args: tuple, kwargs: dict) -> _Given:
        name = type(self).__name__
        bound = _signature(self.pyg_class).bind(self, *args, **kwargs)
        (slot,) = (k for k, v in bound.arguments.items() if isinstance(v, BatchGraph))
        graph = bound.arguments[slot].graph
        for key, value in bound.arguments.items():
            if isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
                if any(v is not value[0] for v in value):
                    raise ValueError(f"{name} got different tensors for {key}; with a batch graph, give it one tensor")
                bound.arguments[key] = value[0]
            if key in EDGE_TENSORS and value is not None:
                raise ValueError(
                    f"{name} got {key} beside a batch graph, which holds its own; set data.{key} before vqgnn.convert "
                    "and pass None"
                )
        edge_tensors = {
            key: value
            for key, value in graph.edge_tensors.items()
            if key in bound.signature.parameters
            and not (key == "edge_attr" and getattr(self, "edge_dim", self) is None)
        }
        return _Given(bound.arguments[slot], bound, slot, edge_tensors)

    def _source(self, given: _Given) -> Tensor:
        """[b, dim]: the arguments that neighbours are told, side by side; x itself where it is the only one."""
        told = [value.flatten(1) if value.dim() > 2 else value for value in given.rows(self.survey.told).values()]
        return told[0] if len(told) == 1 else torch.cat(told, 1)

    def _arguments(self, given: _Given, source: Tensor) -> dict[str, Tensor]:
        """The arguments with a row a node, for rows of `_source`; what neighbours are not told is zero for others."""
        rows = given.rows(self.survey.rows)
        told = [rows[name] for name in self.survey.told]
        parts = source.split([value[:1].numel() for value in told], 1) if len(told) > 1 else [source]
        parts = {k: p.reshape(-1, *v.shape[1:]) for k, v, p in zip(self.survey.told, told, parts, strict=True)}
        return {k: parts.get(k, v if len(v) == len(source) else v.new_zeros(len(source), *v.shape[1:]))
                for k, v in rows.items()}  # fmt: skip

    def _run_over(self, visitor, given: _Given, rows: dict[str, Tensor], edges: BatchEdges | None) -> Any:
        """`_run` on a batch's edges. Where the conv makes its own, or sends nothing, it needs none."""
        if edges is None or self.survey.records:
            none = torch.empty(2, 0, dtype=torch.int64, device=given.graph.n_id.device)
            return self._run(visitor, given, rows, none, none[0])
        return self._run(visitor, given, rows, self._flow(edges.edge_index), edges.ids)

    def _run(self, visitor, given: _Given, rows: dict[str, Tensor], edge_index: Tensor, ids: Tensor | slice) -> Any:
        """The conv's own forward on rows and edges, or the result at which the visitor stopped it."""
        values = {key: value[ids] for key, value in given.edge_tensors.items()}
        arguments = {**given.bound.arguments, given.slot: edge_index, **values, **rows}
        bound = inspect.BoundArguments(given.bound.signature, arguments)
        before, self._visitor = self._visitor, visitor
        try:
            return self.pyg_class.forward(*bound.args, **bound.kwargs)
        except _Stop as stop:
            return stop.result
        finally:
            self._visitor = before

    def send(self, propagates: bool, edges: BatchEdges, arguments: dict, told: dict | None) -> Tensor:
        """PyG's `propagate` (else `edge_updater`) over `edges`; `told` are the node arguments of the nodes behind."""
        size = None
        call = self.pyg_class.propagate if propagates else self.pyg_class.edge_updater
        own = 0
        if told is not None:
            names = self.node_arguments(propagates)
            # Pairs (own and others, own) are the rule. They do not go where a function reads x itself beside x_j, nor,
            # in PyG, against the flow; then all nodes get a result, the others' for nothing.
            read = self._user_args if propagates else self._edge_user_args
            square = self.flow != "source_to_target" or not names.isdisjoint(read)
            joined = {name: self._join(arguments[name], told[name], square) for name in names}
            own, others = (
                _tensors(values[name] for name in names)[0].size(self.node_dim) for values in (arguments, told)
            )
            if not square:
                size = (own + others, own)
            arguments = {**arguments, **joined}
        out = call(self, self._flow(edges.edge_index), size=size, **arguments)
        return out.narrow(self.node_dim, 0, own) if propagates and told is not None and size is None else out

    def _join(self, own, told, square: bool):
        """Own rows and the others' behind them where messages start, own rows where they end."""
        if own is None:
            return None
        if isinstance(own, Tensor) and square:
            return self._cat(own, told)
        if isinstance(own, Tensor):
            own, told = (own, own), (told, told)
        return tuple(self._cat(own[k], told[k]) if square or k == 0 else own[k] for k in (0, 1))

    def _cat(self, own: Tensor | None, told: Tensor | None) -> Tensor | None:
        return None if own is None else torch.cat([own, told.to(own.dtype)], self.node_dim)

    def _flow(self, edge_index: Tensor) -> Tensor:
        """(source, target) as this conv's flow writes it, and back."""
        return edge_index if self.flow == "source_to_target" else edge_index.flip(0)

    def node_arguments(self, propagates: bool) -> set[str]:
        """The arguments of `propagate` (else `edge_updater`) that are gathered by edges' ends: x of x_i and x_j."""
        names = self._user_args if propagates else self._edge_user_args
        return {name[:-2] for name in names if name.endswith(("_i", "_j"))}

    def flatten(self, arguments: dict) -> tuple[Tensor, Callable[[Tensor], dict]]:
        """Node arguments as rows [n, dim], and the way back."""
        tensors = {id(tensor): tensor for tensor in _tensors(arguments.values())}
        flat = [self._flat(tensor) for tensor in tensors.values()]

        def rebuild(rows: Tensor) -> dict:
            parts = {}
            for (key, tensor), part in zip(tensors.items(), rows.split([f.size(1) for f in flat], 1), strict=True):
                shape = tensor.movedim(self.node_dim, 0).shape[1:]
                parts[key] = self._unflat(part, shape).to(tensor.dtype)
            parts[id(None)] = None
            return {
                name: tuple(parts[id(v)] for v in value) if isinstance(value, tuple | list) else parts[id(value)]
                for name, value in arguments.items()
            }

        return flat[0] if len(flat) == 1 else torch.cat(flat, 1), rebuild

    def _flat(self, tensor: Tensor) -> Tensor:
        """[n, dim] of a tensor with its nodes at PyG's node_dim."""
        return tensor.movedim(self.node_dim, 0).flatten(1)

    def _unflat(self, rows: Tensor, shape: Iterable[int]) -> Tensor:
        return rows.reshape(-1, *shape).movedim(0, self.node_dim)

    # ---- as a module -------------------------------------------------------------------------------------------------

    def _set_jittable_templates(self, raise_on_error: bool = False) -> None:
        """PyG's class has its own; made for this class they would take the place of `propagate` above."""

    def __reduce_ex__(self, protocol):
        """A class made at run time is not found by its name."""
        _, _, *state = super().__reduce_ex__(protocol)
        return (_blank, (self.pyg_class,), *state)

    def reads(self) -> str:
        hops = self.survey.hops
        text = "; ".join(str(hop.store_use) for hop in hops[:2]) + (f" x {len(hops) - 1}" if len(hops) > 2 else "")
        if not any(hop.grads is not None for hop in hops):
            return text
        return f"{text}, with gradients" if self.survey.additive else f"{text}, with gradients over two hops"

    def stores(self) -> dict[str, NodeStore]:
        """By what comes behind the conv's name: "" is of its inputs, ".hop1" of those of its second propagate."""
        found = {}
        for k, hop in enumerate(self.survey.hops if self.survey else []):
            name = f".hop{k}" if k else ""
            found[name] = hop.store_use.store if hop.store_use else None
            found[f"{name}.grad"] = hop.grads
        return {name: store for name, store in found.items() if store is not None}


@cache
def generic_class(cls: type[MessagePassing]) -> type[GenericConv]:
    """The class of PyG's `cls` that takes a batch's graph too; it has the same name."""
    return type(cls.__name__, (GenericConv, cls), {"pyg_class": cls, "__doc__": cls.__doc__})


def _blank(cls: type[MessagePassing]) -> GenericConv:
    made = generic_class(cls)
    return made.__new__(made)


@cache
def _signature(cls: type[MessagePassing]) -> inspect.Signature:
    return inspect.signature(cls.forward)


def _tensors(values: Iterable) -> list[Tensor]:
    """Of arguments that are tensors, pairs of them, or None."""
    return [t for v in values for t in (v if isinstance(v, tuple | list) else [v]) if t is not None]


def _has_rows(value, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == count


@contextmanager
def _uncached(conv: MessagePassing) -> Iterator[None]:
    """PyG's `cached=True` keeps the first graph that a conv sees, which must not be a batch."""
    kept = {name: value for name, value in conv.__dict__.items() if name == "cached" or name.startswith("_cached")}
    try:
        for name in kept:
            setattr(conv, name, False if name == "cached" else None)
        yield
    finally:
        for name, value in kept.items():
            setattr(conv, name, value)
