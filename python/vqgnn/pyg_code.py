"""PyG's own code of a conv, run on a few rows, with `propagate` and `edge_updater` in our hands.

A visitor answers both for the length of a forward: `Listen` hears what a conv tells of rows, `Deliver` sends messages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import MessagePassing

from .dropout import dropped
from .graph import EDGE_TENSORS, BatchEdges, BatchGraph, Graph

if TYPE_CHECKING:
    from .generic import GenericConv
    from .hetero_graph import Relation
    from .relation_conv import RelationConv
    from .survey import Hop, Recorded


@dataclass
class Given:
    """The arguments of one call of a conv: `slot` names the one that holds the batch's graph.

    edge_tensors: the data's tensors with a row an edge that the conv takes, for all edges.
    """

    graph: BatchGraph
    bound: inspect.BoundArguments
    slot: str
    edge_tensors: dict[str, Tensor]

    def rows(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.bound.arguments[name] for name in names}


def bind(conv: GenericConv, args: tuple, kwargs: dict) -> Given:
    name = type(conv).__name__
    bound = _signature(conv.pyg_class).bind(conv, *args, **kwargs)
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
    return Given(bound.arguments[slot], bound, slot, taken_edge_tensors(conv, graph))


@contextmanager
def frozen_statistics(conv: MessagePassing) -> Iterator[None]:
    """For a time, norms inside keep their running statistics: messages are made a second time, of other rows."""
    norms = [m for m in conv.modules() if getattr(m, "track_running_stats", False)]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def has_message_hooks(conv: MessagePassing) -> bool:
    """Whether someone listens to a conv's messages, which a kernel never makes."""
    kinds = ("_propagate_", "_message_", "_aggregate_", "_edge_update_")
    return any(hooks for name, hooks in vars(conv).items() if name.startswith(kinds) and name.endswith("_hooks"))


def taken_edge_tensors(conv: GenericConv | RelationConv, graph: Graph | Relation) -> dict[str, Tensor]:
    """The data's tensors with a row an edge that a conv takes."""
    parameters = _signature(conv.pyg_class).parameters
    return {
        key: value
        for key, value in graph.edge_tensors.items()
        if key in parameters and not (key == "edge_attr" and getattr(conv, "edge_dim", conv) is None)
    }


def source_rows(conv: GenericConv, given: Given, of: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """[b, dim]: `of` the arguments that neighbours are told, side by side; x itself where it is the only one."""
    told = [of(value).flatten(1) if value.dim() > 2 else of(value) for value in given.rows(conv.survey.told).values()]
    return told[0] if len(told) == 1 else torch.cat(told, 1)


def drop_like(conv: GenericConv, given: Given, rows: Tensor) -> Tensor:
    """Other nodes' rows [h, dim] with fresh dropout, of the shares that the same arguments of the batch have had."""
    told = given.rows(conv.survey.told).values()
    shares = [dropped(value)[1] for value in told]
    if not any(shares):
        return rows
    parts = rows.split([value[:1].numel() for value in told], 1)
    return torch.cat([F.dropout(part, share) for part, share in zip(parts, shares, strict=True)], 1)


def arguments_of(conv: GenericConv, given: Given, source: Tensor) -> dict[str, Tensor]:
    """The arguments with a row a node, for rows of `source_rows`; what neighbours are not told is zero for others."""
    rows = given.rows(conv.survey.rows)
    told = [rows[name] for name in conv.survey.told]
    parts = source.split([value[:1].numel() for value in told], 1) if len(told) > 1 else [source]
    parts = {k: p.reshape(-1, *v.shape[1:]) for k, v, p in zip(conv.survey.told, told, parts, strict=True)}
    return {k: parts.get(k, v if len(v) == len(source) else v.new_zeros(len(source), *v.shape[1:]))
            for k, v in rows.items()}  # fmt: skip


def _run_over(conv: GenericConv, visitor, given: Given, rows: dict[str, Tensor], edges: BatchEdges | None) -> Any:
    """`_run` on a batch's edges. Where the conv makes its own, or sends nothing, it needs none."""
    if edges is None or conv.survey.records:
        none = torch.empty(2, 0, dtype=torch.int64, device=given.graph.n_id.device)
        return run(conv, visitor, given, rows, none, none[0])
    return run(conv, visitor, given, rows, flow(conv, edges.edge_index), edges.ids)


def run(
    conv: GenericConv, visitor, given: Given, rows: dict[str, Tensor], edge_index: Tensor, ids: Tensor | slice
) -> Any:
    """The conv's own forward on rows and edges, or the result at which the visitor stopped it."""
    values = {key: value[ids] for key, value in given.edge_tensors.items()}
    arguments = {**given.bound.arguments, given.slot: edge_index, **values, **rows}
    bound = inspect.BoundArguments(given.bound.signature, arguments)
    before, conv._visitor = conv._visitor, visitor
    try:
        return conv.pyg_class.forward(*bound.args, **bound.kwargs)
    except Stop as stop:
        return stop.result
    finally:
        conv._visitor = before


def send(conv: GenericConv, propagates: bool, edges: BatchEdges, arguments: dict, told: dict | None) -> Tensor:
    """PyG's `propagate` (else `edge_updater`) over `edges`; `told` are the node arguments of the nodes behind."""
    size = None
    own = 0
    if told is not None:
        names = node_arguments(conv, propagates)
        # Pairs (own and others, own) are the rule. They do not go where a function reads x itself beside x_j, nor,
        # in PyG, against the flow; then all nodes get a result, the others' for nothing.
        read = conv._user_args if propagates else conv._edge_user_args
        square = conv.flow != "source_to_target" or not names.isdisjoint(read)
        joined = {name: _join(conv, arguments[name], told[name], square) for name in names}
        own, others = (tensors(values[name] for name in names)[0].size(conv.node_dim) for values in (arguments, told))
        if not square:
            size = (own + others, own)
        arguments = {**arguments, **joined}
    accompanied = propagates and conv.survey.accompanied
    out = call_pyg(conv, propagates, flow(conv, edges.edge_index), size, arguments, accompanied)
    return out.narrow(conv.node_dim, 0, own) if propagates and told is not None and size is None else out


def call_pyg(
    conv: GenericConv,
    propagates: bool,
    edge_index: Tensor,
    size: tuple[int, int] | None,
    arguments: dict,
    accompanied: bool = False,
) -> Tensor:
    """PyG's `propagate` (else `edge_updater`); accompanied: with `_company` before the nodes."""
    if not propagates:
        return conv.pyg_class.edge_updater(conv, edge_index, size=size, **arguments)
    if not accompanied:
        return conv.pyg_class.propagate(conv, edge_index, size=size, **arguments)
    size = None if size is None else (size[0] + 1, size[1] + 1)
    arguments = _company(conv, edge_index.size(1), arguments)
    loops = edge_index.new_zeros(2, 2)
    out = conv.pyg_class.propagate(conv, torch.cat([loops, edge_index + 1], 1), size=size, **arguments)
    return out.narrow(conv.node_dim, 1, out.size(conv.node_dim) - 1)


def _company(conv: GenericConv, edges: int, arguments: dict) -> dict:
    """The arguments for a copy of the first node before all nodes, and for two edges from it to itself.

    Some messages (FeaSt) and aggregations (median, sort) fail where there is no edge, and PyG's quantiles also where
    the first node has none or the last has the only one.
    """
    names, updates = node_arguments(conv, True), conv.inspector.get_param_names("update")

    def row(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.cat([value.narrow(conv.node_dim, 0, 1).detach(), value], conv.node_dim)

    def padded(name: str, value: Any) -> Any:
        if name in names:
            return tuple(map(row, value)) if isinstance(value, tuple | list) else row(value)
        if has_rows(value, edges) and name not in updates:
            return torch.cat([value.new_zeros(2, *value.shape[1:]), value])
        return row(value) if isinstance(value, Tensor) and name in updates else value

    return {name: padded(name, value) for name, value in arguments.items()}


def _join(conv: GenericConv, own, told, square: bool):
    """Own rows and the others' behind them where messages start, own rows where they end."""
    if own is None:
        return None
    if isinstance(own, Tensor) and square:
        return _cat(conv, own, told)
    if isinstance(own, Tensor):
        own, told = (own, own), (told, told)
    return tuple(_cat(conv, own[k], told[k]) if square or k == 0 else own[k] for k in (0, 1))


def _cat(conv: GenericConv, own: Tensor | None, told: Tensor | None) -> Tensor | None:
    return None if own is None else torch.cat([own, told.to(own.dtype)], conv.node_dim)


def flow(conv: GenericConv, edge_index: Tensor) -> Tensor:
    """(source, target) as this conv's flow writes it, and back."""
    return edge_index if conv.flow == "source_to_target" else edge_index.flip(0)


def node_arguments(conv: GenericConv, propagates: bool) -> set[str]:
    """The arguments of `propagate` (else `edge_updater`) that are gathered by edges' ends: x of x_i and x_j."""
    names = conv._user_args if propagates else conv._edge_user_args
    return {name[:-2] for name in names if name.endswith(("_i", "_j"))}


def flatten(conv: GenericConv, arguments: dict) -> tuple[Tensor, Callable[[Tensor], dict]]:
    """Node arguments as rows [n, dim], and the way back."""
    distinct = {id(tensor): tensor for tensor in tensors(arguments.values())}
    parts = [flat(conv, tensor) for tensor in distinct.values()]

    def rebuild(rows: Tensor) -> dict:
        found = {id(None): None}
        for (key, tensor), part in zip(distinct.items(), rows.split([p.size(1) for p in parts], 1), strict=True):
            shape = tensor.movedim(conv.node_dim, 0).shape[1:]
            found[key] = unflat(conv, part, shape).to(tensor.dtype)
        return {
            name: tuple(found[id(v)] for v in value) if isinstance(value, tuple | list) else found[id(value)]
            for name, value in arguments.items()
        }

    return parts[0] if len(parts) == 1 else torch.cat(parts, 1), rebuild


def flat(conv: GenericConv, tensor: Tensor) -> Tensor:
    """[n, dim] of a tensor with its nodes at PyG's node_dim."""
    return tensor.movedim(conv.node_dim, 0).flatten(1)


def unflat(conv: GenericConv, rows: Tensor, shape: Iterable[int]) -> Tensor:
    return rows.reshape(-1, *shape).movedim(0, conv.node_dim)


def deliver(
    conv: GenericConv, given: Given, own: Tensor, others: Tensor | None, edges: BatchEdges, answer: Callable
) -> Tensor:
    """The conv's output for own rows [o, dim], of which `edges` come from them and from rows `others` [h, dim]."""
    told = None
    if others is None:
        edges = edges.among(own.size(0))
    elif others.size(0):
        told = _run_over(conv, Listen(), given, arguments_of(conv, given, others.to(own.dtype)), None)
    survey = conv.survey
    visitor = Deliver(edges, survey.edges if survey.records else None, told, answer)
    return _run_over(conv, visitor, given, arguments_of(conv, given, own), edges)


def first_messages(conv: GenericConv, given: Given, own: Tensor, others: Tensor | None, edges: BatchEdges) -> Tensor:
    """What the first propagate returns for own rows."""

    def stop(hop: Hop, state: Tensor | None, send: Callable) -> Tensor:
        raise Stop(send())

    return deliver(conv, given, own, others, edges, stop)


class Stop(Exception):
    """Ends a forward at the call whose result is wanted."""

    def __init__(self, result: Any):
        self.result = result


class Listen:
    """Hears what a conv tells of the given rows: the arguments of its calls up to the first propagate."""

    def __init__(self):
        self.heard: list[dict] = []

    def edge_updater(self, conv: GenericConv, edge_index: Tensor, arguments: dict) -> Tensor:
        self.heard.append(arguments)
        return conv.pyg_class.edge_updater(conv, edge_index, **arguments)

    def propagate(self, conv: GenericConv, edge_index: Tensor, arguments: dict) -> Tensor:
        raise Stop([*self.heard, arguments])


class Deliver:
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
        source, rebuild = flatten(conv, {name: arguments[name] for name in node_arguments(conv, True)})

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
        for name, value in values.items():
            dropped = F.dropout(value[edges.ids], conv.survey.dropout[call].get(name, 0.0), conv.training)
            arguments = {**arguments, name: dropped.to(arguments[name].dtype)}  # the model may have been cast since
        return send(conv, propagates, edges, arguments, told)


@cache
def _signature(cls: type[MessagePassing]) -> inspect.Signature:
    return inspect.signature(cls.forward)


def tensors(values: Iterable) -> list[Tensor]:
    """Of arguments that are tensors, pairs of them, or None."""
    return [t for v in values for t in (v if isinstance(v, tuple | list) else [v]) if t is not None]


def has_rows(value, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == count


@contextmanager
def uncached(conv: MessagePassing) -> Iterator[None]:
    """PyG's `cached=True` keeps the first graph that a conv sees, which must not be a batch."""
    kept = {name: value for name, value in conv.__dict__.items() if name == "cached" or name.startswith("_cached")}
    try:
        for name in kept:
            setattr(conv, name, False if name == "cached" else None)
        yield
    finally:
        for name, value in kept.items():
            setattr(conv, name, value)
