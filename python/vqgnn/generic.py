"""Any PyG conv on a mini-batch: its own code runs, and its `propagate` is handed the rows of nodes outside the batch.

A conv computes row by row, then `propagate` gathers rows over the edges, then it goes on row by row. So only
`propagate` (and `edge_updater`, which attentions call before it) must know that the graph is larger than the batch:

- forward runs on the batch's rows;
- what it hands to the first `propagate`, it also hands over for the halo: its code runs up to there on the halo's
  stored inputs, with this step's weights, which get gradients from both;
- a later `propagate` of the same forward (APPNP, ARMA) keeps its inputs in a store of its own;
- a conv that changes the edges first (self loops, gcn_norm) did so once to the whole graph, and a batch takes its edges
  and their values from there: normalisation comes from the whole graph, whatever a conv normalises. Values that
  training drops (APPNP) are dropped batch by batch.

With a gradient store the gradient G of what every `propagate` returns is kept. Backward computes the halo's messages
anew from the batch's rows and adds their gradient, eq. 7. Where messages are summed, the edges that leave the batch are
enough; elsewhere (softmax, max, mean, std) a message's gradient depends on the others to the same node, and the rows of
all neighbours of the halo are read too: exact as well, but two hops wide.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing

import vqgnn_kernels as kernels
from vqgnn_kernels import Rows

from .dropout import undropped
from .graph import BatchGraph, require_graph
from .pyg_code import (
    Given,
    bind,
    deliver,
    drop_like,
    first_messages,
    flat,
    frozen_statistics,
    source_rows,
    uncached,
    unflat,
)
from .store import NodeStore
from .store_conv import StoreConv, not_converted, require_whole
from .survey import Hop, Survey, settle_again


class GenericConv(StoreConv):
    """Mix-in: any other PyG conv (`pyg_class`) that can read a node-state store."""

    fixed = False
    pyg_class: ClassVar[type[MessagePassing]]
    survey: Survey | None = None
    _visitor = None

    def forward(self, *args, **kwargs):
        if not any(isinstance(value, BatchGraph) for value in (*args, *kwargs.values())):
            return self.pyg_class.forward(self, *args, **kwargs)
        return _on_batch(self, args, kwargs)

    def propagate(self, edge_index, size=None, **kwargs):
        if self._visitor is None:
            return self.pyg_class.propagate(self, edge_index, size=size, **kwargs)
        return self._visitor.propagate(self, edge_index, kwargs)

    def edge_updater(self, edge_index, size=None, **kwargs):
        if self._visitor is None:
            return self.pyg_class.edge_updater(self, edge_index, size=size, **kwargs)
        return self._visitor.edge_updater(self, edge_index, kwargs)

    def slices(self) -> tuple[str, ...]:
        return ("valued_edges" if self.survey.valued else "edges",)

    def convolution(self) -> None:
        """Known from the survey alone."""

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


def make_generic(conv: MessagePassing) -> None:
    """Give a PyG conv its generic class."""
    refuse_taken_names(conv, StoreConv, GenericConv)
    conv.__class__ = generic_class(type(conv))


def refuse_taken_names(conv: MessagePassing, *mixins: type) -> None:
    """Raise a ValueError where a conv has a name that these classes would give it."""
    added = {name for mixin in mixins for name in vars(mixin) if not hasattr(MessagePassing, name)}
    taken = sorted(name for name in added if hasattr(conv, name))
    if taken:
        raise ValueError(f"{type(conv).__name__} has {', '.join(taken)}, a name that vqgnn gives to convs; rename it")


@cache
def generic_class(cls: type[MessagePassing]) -> type[GenericConv]:
    """The class of PyG's `cls` that takes a batch's graph too; it has the same name."""
    return type(cls.__name__, (GenericConv, cls), {"pyg_class": cls, "__doc__": cls.__doc__})


def _blank(cls: type[MessagePassing]) -> GenericConv:
    made = generic_class(cls)
    return made.__new__(made)


@torch.compiler.disable
def _on_batch(conv: GenericConv, args: tuple, kwargs: dict):
    given = bind(conv, args, kwargs)
    run = given.graph.run
    if hasattr(run, "survey"):
        return run.survey(conv, given)
    if conv.survey is None:
        raise not_converted(conv)
    settle_again(conv, given)
    with uncached(conv):
        return _train(conv, given) if run is None else _sweep(conv, given)


def _train(conv: GenericConv, given: Given) -> Tensor:
    """On a mini-batch, with the rows of its halo from the stores."""
    graph, survey = given.graph, conv.survey
    first = survey.hops[0]
    use = first.store_use
    require_whole(use, graph)
    if use.store is not None:
        require_graph(use.store.num_nodes, graph.graph.num_nodes)
    edges = graph.edges(survey.edges, survey.valued)
    source, rows = source_rows(conv, given), None
    if use.input == "rows":
        rows = graph.graph.x[edges.others]
    elif use.store is not None:
        rows = use.store.pull(edges.others)
        source = _compensated(conv, source, first, given, None)
    if rows is not None:
        rows = drop_like(conv, given, rows)

    def answer(hop: Hop, state: Tensor | None, send: Callable) -> Tensor:
        store = hop.store_use.store
        if hop is first:
            state, messages = source, send()
        else:
            others = None if store is None else store.pull(edges.others)
            state = _compensated(conv, state, hop, given, send)
            messages = send(state, others, edges)
        if conv.training and store is not None:
            kept = source_rows(conv, given, undropped) if hop is first else state
            store.push(graph.n_id, kept.detach().float())
            if hop.grads is not None and messages.requires_grad:
                messages.register_hook(lambda g: hop.grads.push(graph.n_id, flat(conv, g).float()))
        return messages

    return deliver(conv, given, source, rows, edges, answer)


def _sweep(conv: GenericConv, given: Given) -> Tensor:
    """In layer-wise inference: `run` knows the rows of all nodes (or, looking for the model's structure, none)."""
    graph, survey, hops = given.graph, conv.survey, conv.survey.hops
    source, edges = source_rows(conv, given), graph.edges(survey.edges, survey.valued)

    def others(hop: Hop, table: Rows | None) -> Tensor | None:
        return None if table is None else kernels.pull_rows(table, edges.others, hop.dim)

    if len(hops) == 1:

        def output(table: Rows | None, source: Tensor) -> Tensor:
            return deliver(conv, given, source, others(hops[0], table), edges, lambda hop, state, send: send())

        return graph.run(hops[0], source, graph, output)

    def messages_of_first(table: Rows | None, source: Tensor) -> Tensor:
        return flat(conv, first_messages(conv, given, source, others(hops[0], table), edges))

    def answer(hop: Hop, state: Tensor | None, send: Callable) -> Tensor:
        def messages(table: Rows | None, state: Tensor) -> Tensor:
            return flat(conv, send(state, others(hop, table), edges))

        rows = first if hop is hops[0] else graph.run(hop, state, graph, messages)
        return unflat(conv, rows, hop.out_shape)

    first = graph.run(hops[0], source, graph, messages_of_first)
    return deliver(conv, given, source, None, edges, answer)


def _compensated(conv: GenericConv, source: Tensor, hop: Hop, given: Given, send: Callable | None) -> Tensor:
    """The same rows; their gradient takes in the halo's messages' by eq. 7."""
    if hop.grads is None or not source.requires_grad:
        return source
    rows, source = source.detach(), source.view_as(source)  # the hook must not hold the tensor that holds it
    source.register_hook(lambda g: g + _halo_gradient(conv, rows, hop, given, send).to(g.dtype))
    return source


@torch.enable_grad()
def _halo_gradient(conv: GenericConv, source: Tensor, hop: Hop, given: Given, send: Callable | None) -> Tensor:
    """C_HB^T G~_H [b, dim]: of out-of-batch nodes' messages, computed again from source [b, dim]."""
    graph, survey = given.graph, conv.survey
    targets, edges = graph.edges_out(survey.edges, not survey.additive, survey.valued)
    if targets.numel() == 0:
        return torch.zeros_like(source)
    dtype = next((p.dtype for p in conv.parameters()), torch.float32)  # autocast is over in a backward
    source = source.to(dtype).requires_grad_()
    own, others = hop.store_use.store.pull(targets).to(source.dtype), source
    if not survey.additive:
        position = graph.position[edges.others]  # in the batch, whose rows are known exactly
        others = hop.store_use.store.pull(edges.others).to(source.dtype)
        others = torch.where((position >= 0)[:, None], source[position.clamp(min=0)], others)
    with uncached(conv), frozen_statistics(conv):
        messages = first_messages(conv, given, own, others, edges) if send is None else send(own, others, edges)
    known = hop.grads.written[targets] >= 0
    g = (hop.grads.pull(targets) * known[:, None]).to(messages.dtype)
    return torch.autograd.grad(flat(conv, messages), source, g)[0]
