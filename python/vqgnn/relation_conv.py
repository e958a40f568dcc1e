"""A conv of one edge type on a mini-batch: conv((x_source, x_target), graph) with states of out-of-batch sources.

PyG's convs are bipartite already, so its own code runs, as it is, on the batch's sources with the halo's stored rows
behind them: every target has all its edges, so that a mean, a softmax or a maximum is the whole graph's. It may
propagate several times, each over some of the edges (RGCNConv). Where the matrix C is fixed (`FUSED`), `aggregate`
reads the stored states in place instead.

States are kept once for all convs that are given the same rows of a node type; the first of them pushes. The gradient G
of messages is each conv's own, with a row a target that has edges, and sources take in C_HB^T G~_H (eq. 7) as in
generic.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor
from torch_geometric.nn import MessagePassing

from vqgnn_kernels import CSR

from .dropout import dropped, undropped
from .generic import refuse_taken_names
from .graph import EDGE_TENSORS, BatchEdges, BatchGraph, Convolution, require_graph
from .hetero_graph import BatchRelation, EdgeType, Relation
from .nn import CONVS
from .pyg_code import Stop, flat, frozen_statistics, has_message_hooks, taken_edge_tensors
from .store import Neighbours, NodeStore
from .store_conv import StoreConv, StoreUse, not_converted, require_whole

GIVEN_EDGES = Convolution("sum")  # the relation's edges as they are
FUSED = (pyg.GCNConv, pyg.SAGEConv, pyg.GINConv)  # one product C X of the sources, then what is theirs of the targets


@dataclass(eq=False)
class Gradients:
    """Of what one propagate returns: a row a target with edges."""

    store: NodeStore | None = None


@dataclass
class RelationUse(StoreUse):
    """StoreUse of a conv of one edge type: `store` keeps states of its sources.

    pushes: whether this conv writes them, as the first of those that share them. grads: gradients of its messages,
    by propagate, or none. targets, pushes_targets: the same of its targets, where messages read these too.
    """

    edge_type: EdgeType = ("", "", "")
    pushes: bool = True
    grads: list[Gradients] = field(default_factory=list)
    targets: NodeStore | None = None
    pushes_targets: bool = True

    def __str__(self) -> str:
        text = super().__str__()
        if self.input is None and self.store is not None:
            text += f" of {self.edge_type[0]}" + ("" if self.pushes else ", shared")
        return f"{text}, with gradients" if self.grads else text

    def stores(self) -> dict[str, NodeStore]:
        """Those that this conv writes, by what stands behind its name."""
        found = {"": self.store if self.pushes else None}
        found.update({f".grad{k or ''}": gradients.store for k, gradients in enumerate(self.grads)})
        found[".target"] = self.targets if self.pushes_targets else None
        return {name: store for name, store in found.items() if store is not None}


@dataclass(eq=False)
class Form:
    """What a conv's own code does, found by running it on a few nodes.

    edge_values: the edge type's tensors with a row an edge that it takes. target_dim: channels of its targets.
    out_dims: of what each propagate returns for one. additive: whether messages are summed. reads_targets: whether
    they depend on their target's x. splits: whether what it makes of messages for a node needs no other targets.
    """

    edge_values: list[str]
    target_dim: int
    out_dims: list[int]
    additive: bool
    reads_targets: bool
    splits: bool = True


class RelationConv(StoreConv):
    """Mix-in: a PyG conv (`pyg_class`), or its class in nn.py where C is fixed, for one edge type."""

    pyg_class: ClassVar[type[MessagePassing]]
    form: Form | None = None  # None where C is fixed
    _visitor: Callable[[Tensor], None] | None = None  # sees what every propagate returns

    def forward(self, x, edge_index, *args, **kwargs):
        name = type(self).__name__
        if isinstance(edge_index, dict) and any(isinstance(value, BatchGraph) for value in edge_index.values()):
            raise ValueError(
                f"{name} takes all edge types at once and cannot read a node-state store; give every edge type a conv "
                "of its own, by HeteroConv or to_hetero"
            )
        if not isinstance(edge_index, BatchGraph):
            return self.pyg_class.forward(self, x, edge_index, *args, **kwargs)
        if not isinstance(edge_index, BatchRelation):
            raise ValueError(f"{name} was converted with a HeteroData and got a batch of a Data; convert it with that")
        if any(value is not None for value in (*args, *kwargs.values())):
            raise ValueError(
                f"{name} got more arguments beside a batch graph, which holds its own {', '.join(EDGE_TENSORS)}; set "
                "them in data before vqgnn.convert and leave them out"
            )
        source, target = x if isinstance(x, tuple | list) else (x, x)
        if source is None or target is None:
            side = edge_index.graph.edge_type[0 if source is None else 2]
            raise ValueError(
                f"{name} of {edge_index.graph.edge_type} got None as x of {side!r}, a type that no earlier layer gave "
                "rows; add edges into it, e.g. by torch_geometric.transforms.ToUndirected()"
            )
        return _on_batch(self, source, target, edge_index)

    def propagate(self, edge_index, size=None, **kwargs):
        out = self.pyg_class.propagate(self, edge_index, size=size, **kwargs)
        if self._visitor is not None:
            self._visitor(out)
        return out

    def stores(self) -> dict[str, NodeStore]:
        return {} if self.store_use is None else self.store_use.stores()

    def _set_jittable_templates(self, raise_on_error: bool = False) -> None:
        """PyG's class has its own; made for this class they would take the place of `propagate` above."""

    def __reduce_ex__(self, protocol):
        """A class made at run time is not found by its name."""
        _, _, *state = super().__reduce_ex__(protocol)
        return (_blank, (self.pyg_class, self.fixed), *state)


@cache
def relation_class(cls: type[MessagePassing], fixed: bool) -> type[RelationConv]:
    """The class of PyG's `cls` for one edge type; it has the same name."""
    base = CONVS[cls] if fixed else cls
    return type(cls.__name__, (RelationConv, base), {"pyg_class": cls, "fixed": fixed, "__doc__": cls.__doc__})


def _blank(cls: type[MessagePassing], fixed: bool) -> RelationConv:
    made = relation_class(cls, fixed)
    return made.__new__(made)


def make_relation_conv(conv: MessagePassing) -> None:
    """Give a PyG conv its class for one edge type."""
    cls = type(conv)
    if isinstance(conv, RelationConv):
        return
    if isinstance(conv, StoreConv):
        raise ValueError(f"{cls.__name__} was converted with a Data before; convert a model of PyG's convs")
    if cls in FUSED and not has_message_hooks(conv):
        conv.__class__ = relation_class(cls, True)
        try:
            conv.convolution()
            return
        except ValueError:  # an option that the fused path lacks
            conv.__class__ = cls
    if conv.flow != "source_to_target":
        raise ValueError(f"{cls.__name__}(flow={conv.flow!r}) cannot run on mini-batches of one edge type; reverse the "
                         "edges in data instead")  # fmt: skip
    refuse_taken_names(conv, StoreConv, RelationConv)
    conv.__class__ = relation_class(cls, False)


@torch.compiler.disable
def _on_batch(conv: RelationConv, source: Tensor, target: Tensor, graph: BatchRelation) -> Tensor:
    if graph.run is not None:
        return graph.run(conv, source, target, graph)
    if conv.store_use is None:
        raise not_converted(conv)
    require_whole(conv.store_use, graph)
    _require_same(conv.store_use, graph)
    if conv.fixed:
        return conv.combine(target, _messages(conv, source, graph))
    return _own_code(conv, source, target, graph)


def _require_same(use: RelationUse, graph: BatchRelation) -> None:
    relation = graph.graph
    sizes = [(use.store, relation.num_sources), (use.targets, relation.num_nodes)]
    if use.grads:
        sizes.append((use.grads[0].store, len(relation.receivers(use.convolution))))
    for store, num_nodes in sizes:
        if store is not None:
            require_graph(store.num_nodes, num_nodes)


def _messages(conv: RelationConv, x: Tensor, graph: BatchRelation) -> Tensor:
    """M [b, f] by eq. 6 from the batch's sources x [s, in_channels] and the halo's states, C being fixed."""
    use = conv.store_use
    if use.input == "precompute" and x is graph.x:
        return graph.input_messages(use.convolution)
    source, rows, grad_rows = conv.message_input(x), None, None
    csr, csr_t = graph.csr(use.convolution)
    if use.input is not None:
        rows = graph.graph.features
    elif use.store is not None:
        rows = use.store.rows
    if use.grads:
        grads = use.grads[0].store
        csr_t = _known(csr_t._replace(halo=graph.outside_receivers(use.convolution)), graph.n_id.numel(), grads)
        grad_rows = grads.rows
    neighbours = Neighbours(csr, rows, csr_t, grad_rows, dropout=dropped(x)[1] if source is x else 0.0)
    messages = conv.batch_messages(source, neighbours)[0]
    if conv.training:
        with torch.no_grad():
            _push(use, conv.message_input(undropped(x)), None, graph)
        if use.grads and messages.requires_grad:
            messages.register_hook(lambda g: _push_gradients(grads, g, graph, use.convolution))
    return messages


def _known(csr_t: CSR, b: int, grads: NodeStore) -> CSR:
    """The same without edges to targets whose gradient was never pushed: rows of them are 0, but codes are not."""
    if grads.codebook is None or csr_t.halo.numel() == 0:
        return csr_t
    known = torch.cat([grads.written.new_ones(b), grads.written[csr_t.halo] >= 0])[csr_t.col.long()].float()
    return csr_t._replace(weight=known if csr_t.weight is None else csr_t.weight * known)


def _push(use: RelationUse, source: Tensor, target: Tensor | None, graph: BatchRelation) -> None:
    if use.store is not None and use.pushes:
        use.store.push(graph.source_id, source.detach().float())
    if use.targets is not None and use.pushes_targets:
        use.targets.push(graph.n_id, target.detach().float())


def _push_gradients(grads: NodeStore, g: Tensor, graph: BatchRelation, convolution: Convolution) -> None:
    own, places = graph.receivers(convolution)
    grads.push(places, g[own].float())


def _own_code(conv: RelationConv, source: Tensor, target: Tensor, graph: BatchRelation) -> Tensor:
    use, others = conv.store_use, None
    edges = graph.edges(GIVEN_EDGES, bool(conv.form.edge_values))
    if use.input is not None:
        others = graph.graph.x[edges.others]
    elif use.store is not None:
        others = use.store.pull(edges.others)
    if others is not None:
        others = F.dropout(others, dropped(source)[1], conv.training)
    if conv.training:
        _push(use, undropped(source), undropped(target), graph)
    rows = source
    if use.grads and source.requires_grad:
        state, rows = source.detach(), source.view_as(source)  # the hook must not hold the tensor that holds it
        rows.register_hook(lambda g: g + _halo_gradient(conv, state, graph).to(g.dtype))

    remaining = iter(use.grads)

    def visit(messages: Tensor) -> None:
        gradients = next(remaining, None)
        if conv.training and gradients is not None and messages.requires_grad:
            messages.register_hook(lambda g: _push_gradients(gradients.store, flat(conv, g), graph, GIVEN_EDGES))

    return deliver(conv, rows, others, target, edges, graph.graph, visit)


def deliver(
    conv: RelationConv,
    source: Tensor,
    others: Tensor | None,
    target: Tensor,
    edges: BatchEdges,
    relation: Relation,
    visit: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The conv's own result for target [b, f'], of which `edges` come from source [s, f] and then others [h, f].

    Without others their edges are left out. visit: sees what every propagate returns.
    """
    if others is None:
        edges = edges.among(source.size(0))
    elif others.size(0):
        source = torch.cat([source, others.to(source.dtype)])
    taken = taken_edge_tensors(conv, relation)
    if list(taken) != conv.form.edge_values:
        raise ValueError(
            f"{type(conv).__name__} of {relation.edge_type} was converted for edges with {conv.form.edge_values} and "
            f"got some with {[*taken]}; give it data with the same, or convert the model anew"
        )
    values = {name: taken[name][edges.ids] for name in conv.form.edge_values}
    return run_code(conv, source, target, edges.edge_index, values, visit)


def run_code(
    conv: RelationConv,
    source: Tensor,
    target: Tensor,
    edge_index: Tensor,
    values: dict[str, Tensor],
    visit: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """PyG's own forward; the result at which `visit` stopped it, if it did."""
    before, conv._visitor = conv._visitor, visit
    try:
        return conv.pyg_class.forward(conv, (source, target), edge_index, **values)
    except Stop as stop:
        return stop.result
    finally:
        conv._visitor = before


def messages_only(conv: RelationConv, count: int) -> Callable[[Tensor], None]:
    """Visitor: ends a forward after `count` propagates, with what they return, side by side, as its result."""
    seen: list[Tensor] = []

    def visit(messages: Tensor) -> None:
        seen.append(flat(conv, messages))
        if len(seen) == count:
            raise Stop(torch.cat(seen, 1))

    return visit


@torch.enable_grad()
def _halo_gradient(conv: RelationConv, source: Tensor, graph: BatchRelation) -> Tensor:
    """C_HB^T G~_H [s, f]: of the messages of out-of-batch targets, computed again from the batch's source [s, f]."""
    use, form = conv.store_use, conv.form
    targets, edges = graph.edges_out(GIVEN_EDGES, not form.additive, bool(form.edge_values))
    if targets.numel() == 0:
        return torch.zeros_like(source)
    dtype = next((p.dtype for p in conv.parameters()), torch.float32)  # autocast is over in a backward
    source = source.to(dtype).requires_grad_()
    if form.reads_targets and use.targets is not None:
        own = use.targets.pull(targets).to(dtype)
    elif form.reads_targets:
        own = graph.graph.target_x[targets].to(dtype)
    else:
        own = source.new_zeros(targets.numel(), form.target_dim)
    others = source
    if not form.additive:
        position = graph.position[edges.others]  # in the batch, whose rows are known exactly
        others = use.store.pull(edges.others).to(dtype)
        others = torch.where((position >= 0)[:, None], source[position.clamp(min=0)], others)
    if graph.graph.square:  # targets are sources too, and stand before the others
        others = torch.cat([use.store.pull(targets).to(dtype), others])
    visit, places = messages_only(conv, len(use.grads)), graph.outside_receivers(GIVEN_EDGES)
    with frozen_statistics(conv):
        messages = deliver(conv, others, others[:0], own, edges, graph.graph, visit)
    stores = [gradients.store for gradients in use.grads]
    g = torch.cat([store.pull(places) * (store.written[places] >= 0)[:, None] for store in stores], 1)
    return torch.autograd.grad(messages, source, g.to(messages.dtype))[0]
