"""What a conv does with its arguments and with the edges, found by running PyG's code on a few nodes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch_geometric.nn import QuantileAggregation

from .calling import alike
from .graph import BatchEdges, Convolution, Graph
from .pyg_code import (
    Given,
    Listen,
    arguments_of,
    call_pyg,
    deliver,
    first_messages,
    flat,
    flatten,
    flow,
    has_rows,
    node_arguments,
    run,
    source_rows,
    tensors,
    uncached,
)
from .store import NodeStore
from .store_conv import StoreUse

if TYPE_CHECKING:
    from .generic import GenericConv

_GIVEN_EDGES = Convolution("sum")  # the graph's edges as they are


@dataclass(eq=False)
class Recorded:
    """Edges [2, e] (source, target) that a conv makes of the graph's, and the values that it gives each call for them.

    It stands where a `Convolution` stands: the key of the matrix of that graph.
    """

    edge_index: Tensor
    values: list[dict[str, Tensor]]
    edge_dim: ClassVar[None] = None  # PyG's code is given edges' values with their ids

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

    def state(self, x: Tensor) -> Tensor:
        return x


@dataclass(eq=False)
class Survey:
    """What a conv does with its arguments, found by running it on a few nodes.

    rows: names of the arguments with a row a node, and of these told: the ones that reach neighbours. records: whether
    edges and their values come from one run on the whole graph. edge_values: by call, the names of propagate's (or
    edge_updater's) arguments with a row an edge. additive: whether messages are summed. edges: which edges messages
    follow, and valued: whether these have values. dropout: by call, with which probability training drops such a value.
    accompanied: whether PyG's code fails without edges (`pyg_code.call_pyg`). splits: whether what it makes of a node's
    messages needs no other nodes, as statistics do.
    """

    rows: list[str]
    told: list[str]
    records: bool
    edge_values: list[list[str]]
    additive: bool
    hops: list[Hop]
    accompanied: bool
    splits: bool = True
    edges: Convolution | Recorded | None = None
    valued: bool = False
    dropout: list[dict[str, float]] = field(default_factory=list)


class Call(NamedTuple):
    propagates: bool  # else it was edge_updater
    edge_index: Tensor
    arguments: dict
    edge_values: list[str]  # the names of arguments with a row an edge
    out: Tensor


class Record:
    """Notes every call's edges and arguments. Nothing is sent, so that a run costs no more than its rows.

    accompanied: as in `Survey`; of a first run, what is found is set.
    """

    def __init__(self, edge_values: list[list[str]] | None = None, accompanied: bool = False):
        self.edge_values, self.accompanied = edge_values, accompanied
        self.calls: list[Call] = []

    def edge_updater(self, conv: GenericConv, edge_index: Tensor, arguments: dict) -> Tensor:
        return self._note(conv, False, edge_index, arguments)

    def propagate(self, conv: GenericConv, edge_index: Tensor, arguments: dict) -> Tensor:
        return self._note(conv, True, edge_index, arguments)

    def _note(self, conv: GenericConv, propagates: bool, edge_index: Tensor, arguments: dict) -> Tensor:
        if self.edge_values is not None:
            values = self.edge_values[len(self.calls)]
        else:  # a survey's few nodes have another number than its edges, so a row an edge is no row a node
            nodes = node_arguments(conv, propagates)
            values = [k for k, v in arguments.items() if k not in nodes and has_rows(v, edge_index.size(1))]
        none = {k: v[:0] if k in values else v for k, v in arguments.items()}
        out = self._silence(conv, propagates, edge_index[:, :0], none)
        self.calls.append(Call(propagates, edge_index, arguments, values, out))
        return out

    def _silence(self, conv: GenericConv, propagates: bool, none: Tensor, arguments: dict) -> Tensor:
        if not self.accompanied:
            try:
                return call_pyg(conv, propagates, none, None, arguments)
            except Exception:  # an error of PyG's code that is none of edges' comes again
                if not propagates:
                    raise
        out = call_pyg(conv, propagates, none, None, arguments, accompanied=True)
        self.accompanied = True
        return out

    def values(self) -> list[dict[str, Tensor]]:
        """By call, what it was given for every edge."""
        return [{key: call.arguments[key] for key in call.edge_values} for call in self.calls]

    def agrees(self, other: Record, edges: slice = slice(None)) -> bool:
        """Whether the other run gave the same for these edges."""
        pairs = zip(self.values(), other.values(), strict=True)
        return all(torch.equal(mine[key][edges], its[key]) for mine, its in pairs for key in mine)


@torch.enable_grad()
def examine(conv: GenericConv, given: Given) -> tuple[Tensor, bool]:
    """Set `survey` from a run on a few nodes.

    Returns the output for them, without messages, and whether neighbours are told the features themselves.
    """
    name, n = type(conv).__name__, given.graph.n_id.numel()
    names = [k for k, v in given.bound.arguments.items() if has_rows(v, n) and v.is_floating_point()]
    ends = torch.arange(n, device=given.graph.n_id.device)
    pairs = torch.stack([ends.repeat(2 * n), ends.repeat_interleave(2 * n)])  # all twice: never as many as nodes
    edge_index = flow(conv, pairs[:, pairs[0] != pairs[1]])  # by target, as some aggregations ask
    values = {k: v.new_full((edge_index.size(1), *v.shape[1:]), v.is_floating_point())
              for k, v in given.edge_tensors.items()}  # fmt: skip
    given = replace(given, edge_tensors=values)
    rows = {k: v.detach().clone().requires_grad_() for k, v in given.rows(names).items()}
    with uncached(conv):
        told = _told(conv, given, rows, edge_index)
        # a median without edges is an index out of bounds: no error that a GPU's process survives
        record = Record(accompanied=any(isinstance(module, QuantileAggregation) for module in conv.modules()))
        out = run(conv, record, given, rows, edge_index, slice(None))
        hops = _hops(conv, record, rows, told, n)
        edge_values = [call.edge_values for call in record.calls]
        records = any(call.edge_index is not edge_index for call in record.calls)
        if not records and any(edge_values):  # do the other edges or its nodes' numbers decide an edge's value?
            half, renumbered = (Record(edge_values, record.accompanied) for _ in range(2))
            run(conv, half, given, rows, edge_index[:, ::2], slice(None, None, 2))
            run(conv, renumbered, given, rows, n - 1 - edge_index, slice(None))
            records = not (record.agrees(half, slice(None, None, 2)) and record.agrees(renumbered))
            records |= len(hops) > 1  # which need it later
        _check_values(conv, record, rows, records)
        if not has_rows(out, n):
            raise ValueError(f"{name} returned {type(out).__name__}; with a batch graph it must return a row a node")
        conv.survey = Survey(names, told, records, edge_values, False, hops, record.accompanied)
        conv.survey.dropout = [{} for _ in edge_values]
        if records:
            conv.survey.dropout = _dropout(conv, record, given, rows, edge_index)
        conv.survey.edges = Recorded(flow(conv, record.calls[0].edge_index), record.values())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            source = torch.randn(n, hops[0].dim).to(source_rows(conv, given))
        other = Record(edge_values, record.accompanied)
        run(conv, other, given, arguments_of(conv, given, source), edge_index, slice(None))
        if not record.agrees(other):  # no gradient has told it
            raise _of_rows(conv, ", ".join(key for values in edge_values for key in values))
        _check_told(conv, given, source, edge_index)
        if all(torch.equal(call.edge_index, record.calls[0].edge_index) for call in record.calls):  # else see `_record`
            _check_batch(conv, given, source)
        conv.survey.additive = _additive(conv, given, source)
    return out.detach(), source_rows(conv, given) is given.graph.x


def _told(conv: GenericConv, given: Given, rows: dict[str, Tensor], edge_index: Tensor) -> list[str]:
    """Which of the arguments `rows` reach neighbours."""
    if not rows:
        raise ValueError(
            f"{type(conv).__name__} takes no rows of nodes, so that it cannot run on mini-batches; compute what it "
            "does once, into data.x, and leave it out of the model"
        )
    heard = run(conv, Listen(), given, rows, edge_index, slice(None))
    if not isinstance(heard, list):
        raise ValueError(f"{type(conv).__name__} does not call propagate, so that it cannot read a node-state store")
    reached = []
    for k, arguments in enumerate(heard):
        reached += tensors(arguments[name] for name in node_arguments(conv, k == len(heard) - 1))
    sums = [t.float().sum() for t in reached if t.requires_grad]
    if not sums:
        raise ValueError(f"{type(conv).__name__} tells neighbours nothing of its x; it can run without a batch graph")
    gradients = torch.autograd.grad(sum(sums), list(rows.values()), allow_unused=True)
    return [name for name, g in zip(rows, gradients, strict=True) if g is not None]


def _hops(conv: GenericConv, record: Record, rows: dict[str, Tensor], told: list[str], n: int) -> list[Hop]:
    name = type(conv).__name__
    sent = [call for call in record.calls if call.propagates]
    if len(sent) > 1 and len(sent) < len(record.calls):
        raise ValueError(
            f"{name} calls edge_updater and propagates {len(sent)} times; give each time a conv of its own"
        )
    hops = []
    for call in sent:
        nodes = node_arguments(conv, True)
        dim = sum(rows[k][0].numel() for k in told)
        if hops:
            dim = flatten(conv, {k: call.arguments[k] for k in nodes})[0].size(1)
            raw = [k for k, v in call.arguments.items()
                   if k not in nodes and k not in call.edge_values and has_rows(v, n)]  # fmt: skip
            if raw:
                raise ValueError(f"{name} gives its later propagates {raw[0]}, which no message reads; use it outside")
        out_shape = tuple(call.out.movedim(conv.node_dim, 0).shape[1:])
        hops.append(Hop(dim, out_shape, chains=len(sent) == 1 and len(rows) == 1))
    return hops


def _check_values(conv: GenericConv, record: Record, rows: dict[str, Tensor], records: bool) -> None:
    for values in record.values():
        for key, value in values.items():
            if not value.requires_grad:
                continue
            from_rows = torch.autograd.grad(value.sum(), list(rows.values()), retain_graph=True, allow_unused=True)
            if records or any(g is not None for g in from_rows):
                raise _of_rows(conv, key)


def _of_rows(conv: GenericConv, key: str) -> ValueError:
    return ValueError(
        f"{type(conv).__name__} computes {key} of every edge from weights or node rows before it calls propagate; "
        "compute it in message() or edge_update()"
    )


class _KeepAll(TorchFunctionMode):
    """Dropout that drops nothing: what it would keep is only scaled."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            bound = inspect.signature(F.dropout).bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            return given["input"] / (1 - given["p"]) if given["training"] else given["input"]
        return function(*args, **kwargs)


def _dropout(
    conv: GenericConv, record: Record, given: Given, rows: dict[str, Tensor], edge_index: Tensor
) -> list[dict[str, float]]:
    """By call, the probability with which training drops values of edges before it: 1 - 1 / (what it scales others by).

    Repeated dropout, as APPNP's, is one of a larger probability then; which values a later hop drops is drawn anew.
    """
    again = Record([call.edge_values for call in record.calls], record.accompanied)
    conv.training = True  # alone: modules inside stay as they are, and keep their statistics
    try:
        with torch.random.fork_rng(), _KeepAll():
            run(conv, again, given, rows, edge_index, slice(None))
    finally:
        conv.training = False
    found = []
    for kept, scaled in zip(record.values(), again.values(), strict=True):
        found.append({})
        for name, value in kept.items():
            if torch.equal(value, scaled[name]):
                continue
            share = float(value.norm() / scaled[name].norm())
            if scaled[name].shape != value.shape or not torch.allclose(scaled[name] * share, value):
                raise ValueError(
                    f"{type(conv).__name__} changes {name} of edges in training before propagate, and not by dropout; "
                    "here it comes from the whole graph, once: change it in message()"
                )
            found[-1][name] = 1 - share
    return found


@torch.no_grad()
def _check_told(conv: GenericConv, given: Given, source: Tensor, edge_index: Tensor) -> None:
    """Raise where what a node tells the others depends on edges or on other rows: the halo has none of the edges."""
    name, ends = type(conv).__name__, torch.arange(len(source), device=source.device)

    def heard(nodes: Tensor, kept: Tensor) -> list[dict]:
        some = _part(given, nodes)
        return run(conv, Listen(), some, arguments_of(conv, some, source[nodes]), edge_index[:, kept], kept)

    uneven = (edge_index[0] < edge_index[1]).nonzero()[:, 0]  # so that degrees differ
    advice = (
        "of the nodes that a batch reads from outside it has neither all edges nor all neighbours; compute {} once, of "
        "the whole graph, and give it to the model as a node-level tensor (a feature beside x), or weigh edges with it"
    )
    try:
        alone = heard(ends, uneven[:0])
    except Exception as error:
        raise ValueError(
            f"{name} fails without edges ({type(error).__name__}: {error}), and "
            f"{advice.format('what it reads of them')}"
        ) from error
    if key := _difference(conv, heard(ends, uneven), alone, ends):
        raise ValueError(
            f"{name} makes the {key} of a node that it gives propagate depend on which edges there are (its degree?), "
            f"and {advice.format('what is made of them')}"
        )
    for nodes in (ends.flip(0)[::2], ends.flip(0)[1::2]):
        if nodes.numel() and (key := _difference(conv, alone, heard(nodes, uneven[:0]), nodes)):
            raise ValueError(
                f"{name} makes the {key} of a node that it gives propagate depend on other nodes' rows (their mean?), "
                "of which a batch has not all; do that outside the conv, or once to the features"
            )


def _part(given: Given, nodes: Tensor) -> Given:
    """The same call for some of its nodes."""
    arguments = given.bound.arguments
    n = given.graph.n_id.numel()
    arguments = {key: value[nodes] if has_rows(value, n) else value for key, value in arguments.items()}
    return replace(given, bound=inspect.BoundArguments(given.bound.signature, arguments))


def _difference(conv: GenericConv, all_nodes: list[dict], some: list[dict], nodes: Tensor) -> str | None:
    """Which argument that neighbours are told is another for the same nodes."""
    for k, (arguments, its) in enumerate(zip(all_nodes, some, strict=False)):
        for name in sorted(node_arguments(conv, k == len(all_nodes) - 1)):
            pairs = zip(tensors([arguments[name]]), tensors([its[name]]), strict=True)
            if not all(_same(mine.index_select(conv.node_dim, nodes), other) for mine, other in pairs):
                return name
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = (t.nan_to_num() if t.is_floating_point() else t.float() for t in (a, b))
    return a.shape == b.shape and alike(a, b)


@torch.no_grad()
def _check_batch(conv: GenericConv, given: Given, source: Tensor) -> None:
    """Raise where a batch of the first nodes, its halo known exactly, gets other messages than in the whole graph.

    Or where what is made of them for a node depends on other edges than those into it. Sets the survey's `splits`.
    """
    survey, n = conv.survey, len(source)
    ends, b = torch.arange(n, device=source.device), max(1, n // 2 - 1)
    back = ends.flip(0)  # the batch numbers its nodes the other way round: the last are its first
    batch, some = back[:b], _part(given, back[:b])
    edge_index = survey.edges.edge_index
    sources, targets = its_index = n - 1 - edge_index
    keeps = (targets >= b) | (sources % 3 == 1)  # fewer edges into the batch than elsewhere
    kept, into = (order[keeps[order]] for order in (i.argsort(stable=True) for i in (edge_index[1], targets)))
    into = into[targets[into] < b]
    within, halo = into[sources[into] < b], sources[into].unique()
    halo = halo[halo >= b]
    place = ends.clone()
    place[halo] = b + ends[: halo.numel()]
    messages = []  # of every hop; copied, as convs work in place

    def all_nodes(ids: Tensor) -> BatchEdges:
        return BatchEdges(edge_index[:, ids], ids[:0], ids)

    def send_all(hop: Hop, state: Tensor | None, send: Callable) -> Tensor:
        messages.append(send() if state is None else send(state, None, all_nodes(kept)))
        return messages[-1].clone()

    def made(given: Given, nodes: Tensor, edges: BatchEdges) -> list[Tensor]:
        """What these nodes and edges make of the same messages for the batch: the states of later hops, the output."""
        found = []

        def known(hop: Hop, state: Tensor | None, send: Callable) -> Tensor:
            found.append(source[nodes] if state is None else state.clone())
            return messages[len(found) - 1].index_select(conv.node_dim, nodes)

        found.append(deliver(conv, given, source[nodes], None, edges, known))
        return [rows if len(rows) == b else rows[batch] for rows in found]

    def same(mine: list[Tensor], its: list[Tensor]) -> bool:
        return all(_same(a, b) for a, b in zip(mine, its, strict=True))

    deliver(conv, given, source[ends], None, all_nodes(kept), send_all)
    error = None
    try:
        edges = BatchEdges(place[its_index[:, into]], back[halo], into)
        own = first_messages(conv, some, source[batch], source[back[halo]], edges)
        whole, inside = made(given, ends, all_nodes(kept)), made(given, ends, all_nodes(within))
        holds = _same(flat(conv, messages[0])[batch], flat(conv, own)) and same(
            whole, made(given, ends, all_nodes(into))
        )
        if len(survey.hops) > 1:  # of which inference knows only the edges within a batch
            holds &= same(whole, inside)
        alone = made(some, batch, BatchEdges(its_index[:, within], within[:0], within))
        survey.splits = same(inside, alone)
    except Exception as raised:
        holds, error = False, raised
    if not holds:
        raise ValueError(
            f"{type(conv).__name__} gives a node another result in a batch than in the whole graph"
            f"{f' ({type(error).__name__}: {error})' if error else ''}: it takes more than the node's row and messages,"
            " as a degree or nodes' numbers from edge_index, a statistic over nodes or edges, or an aggregation of as "
            "many steps as any node has edges (aggr='lstm', 'gru'); take another aggregation, or compute that once, of "
            "the whole graph, and give it to the model as a node-level tensor (a feature beside x) or as edge weights"
        ) from error


@torch.no_grad()
def _additive(conv: GenericConv, given: Given, source: Tensor) -> bool:
    """Whether the messages of two halves of the edges add up to those of all."""
    edge_index = conv.survey.edges.edge_index

    def messages(ids: Tensor) -> Tensor:
        edges = BatchEdges(edge_index[:, ids], ids[:0], ids)
        return flat(conv, first_messages(conv, given, source.clone(), None, edges)).float()

    ids = edge_index[1].argsort(stable=True)
    whole, none = messages(ids), messages(ids[:0])
    odd, low = torch.arange(ids.numel(), device=ids.device) % 2 == 1, edge_index[0][ids] < (len(source) + 1) // 2
    for half in (odd, low):
        rest = whole - messages(ids[half]) - messages(ids[~half]) + none
        if not rest.abs().max() <= 1e-4 * whole.abs().max():
            return False
    return True


def settle_again(conv: GenericConv, given: Given) -> None:
    """For a batch of another graph than the last: a conv with edges of its own makes them of that graph's."""
    edges = conv.survey.edges
    if isinstance(edges, Recorded) and not any(edges is known for known in given.graph.graph.recorded):
        modes = {module: module.training for module in conv.modules()}
        conv.eval()
        try:
            settle(conv, given)
        finally:
            for module, mode in modes.items():
                module.training = mode


def settle(conv: GenericConv, given: Given) -> None:
    """Fix which edges messages follow: for edges of the conv's own, by running it on the whole graph once."""
    graph, survey, name = given.graph.graph, conv.survey, type(conv).__name__
    survey.edges = _GIVEN_EDGES
    if survey.records or conv.flow != "source_to_target":
        if graph.edge_index is None:
            raise ValueError(f"{name} makes edges of its own, for which it needs data.edge_index in memory")
        recorded = Recorded(flow(conv, graph.edge_index), [])
        if survey.records:
            recorded = _record(conv, given)
        survey.edges = next((known for known in graph.recorded if known.equals(recorded)), recorded)
        if survey.edges is recorded:
            graph.recorded.append(recorded)
    survey.valued = bool(given.edge_tensors) or (survey.records and any(survey.edges.values))


@torch.no_grad()
def _record(conv: GenericConv, given: Given) -> Recorded:
    graph = given.graph.graph
    rows = {k: v.new_zeros(1, *v.shape[1:]).expand(graph.num_nodes, *v.shape[1:])
            for k, v in given.rows(conv.survey.rows).items()}  # fmt: skip
    record = Record(conv.survey.edge_values, conv.survey.accompanied)
    with uncached(conv):
        run(conv, record, given, rows, graph.edge_index, slice(None))
    edge_index = record.calls[0].edge_index
    if not all(torch.equal(call.edge_index, edge_index) for call in record.calls[1:]):
        raise ValueError(
            f"{type(conv).__name__} propagates over several sets of edges, which works where data is a HeteroData, if "
            "of one node and one edge type: vqgnn.convert(model, data, forward=lambda model, batch: "
            "model(batch['node'].x, batch['node', 'to', 'node'].graph))"
        )
    return Recorded(flow(conv, edge_index), record.values())
