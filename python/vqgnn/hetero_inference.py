"""Inference layer by layer on a heterogeneous graph: exact for every node of every type, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from tqdm import tqdm

import vqgnn_kernels as kernels
from vqgnn_kernels import Rows

from . import tables
from .calling import call_model, evaluating
from .hetero_graph import BatchRelation, HeteroGraph, tensors_by_type
from .hetero_survey import Structure
from .loader import BatchLoader
from .relation_conv import GIVEN_EDGES, RelationConv, deliver
from .store import NodeStore
from .store_conv import StoreConv

_BATCH = 32_768  # nodes at a time, of all types together


@torch.no_grad()
def layerwise(
    model: nn.Module,
    data: HeteroData,
    batch_size: int | None = None,
    method: str = "exact",
    dtype: torch.dtype = torch.float32,
    folder: str | Path | None = None,
    forward: Callable = call_model,
    progress: bool = False,
) -> Tensor | dict[str, Tensor]:
    """`vqgnn.inference.layerwise` of a HeteroData; convs that need nothing of each other run in the same pass."""
    if any(isinstance(conv, StoreConv) and not isinstance(conv, RelationConv) for conv in model.modules()):
        raise ValueError("the model was converted with a Data, not with a HeteroData; convert it with this data")
    if method == "vq":
        raise ValueError("method='vq' is not there for a HeteroData; use method='exact' or 'stale'")
    if method == "stale":
        return _stale(model, data, batch_size, forward, progress)
    return _Sweep(model, data, batch_size, dtype, folder, forward, progress).run()


@torch.no_grad()
def fill_stores(
    model: nn.Module,
    data: HeteroData,
    forward: Callable = call_model,
    dtype: torch.dtype = torch.float32,
    folder: str | Path | None = None,
    progress: bool = False,
) -> None:
    """`vqgnn.warmup` of a HeteroData: fill the stores of states by one exact forward sweep."""
    _Sweep(model, data, None, dtype, folder, forward, progress, fills=True).run()


def _stale(
    model: nn.Module, data: HeteroData, batch_size: int | None, forward: Callable, progress: bool
) -> Tensor | dict[str, Tensor]:
    graph = HeteroGraph.of(data)
    with evaluating(model):
        output, results = Structure(model, data, forward).output_type(), {}
        for batch in tqdm(BatchLoader(data, batch_size), disable=not progress, desc="inference", leave=False):
            for node_type, rows in _by_type(forward(model, batch), output, graph.sizes).items():
                if node_type not in results:
                    results[node_type] = rows.new_empty(graph.sizes[node_type], *rows.shape[1:])
                results[node_type][batch[node_type].n_id] = rows
    return results if output is None else results[output]


def _by_type(out: Tensor | dict[str, Tensor], output: str | None, node_types: Iterable[str]) -> dict[str, Tensor]:
    """A model's result by node type; of types that it does not update PyG's models return None."""
    found = {k: v for k, v in out.items() if v is not None} if output is None else {output: out}
    for key, rows in found.items():
        if key not in node_types or not isinstance(rows, Tensor):
            raise ValueError(
                f"the model returned a {type(rows).__name__} under {key!r}; inference takes a dict of rows by node "
                f"type ({', '.join(node_types)}): give forward= to choose them"
            )
    return found


class _Enough(Exception):
    """Raised once all convs of a pass have what they need."""


class _Sweep:
    """The passes. Set as the `run` of a batch's graphs, it answers for every conv.

    Pass l computes the convs of level l (see `Call`) for every node, from exact rows of every source, and records what
    those of level l + 1 are given. Convs of lower levels answer with what they computed then, kept as long as others
    need it; those of higher levels with zeros, of which nothing that is kept depends.
    """

    def __init__(self, model, data, batch_size, dtype, folder, forward, progress, fills=False):
        self.model, self.data, self.graph, self.tensors = model, data, HeteroGraph.of(data), tensors_by_type(data)
        self.batch_size, self.dtype, self.folder = batch_size, dtype, folder
        self.forward, self.progress, self.fills = forward, progress, fills
        self.inputs: dict[int, Tensor] = {}  # rows of all sources, by their number
        self.kept: dict[RelationConv, Tensor] = {}  # results for all targets
        self.results: dict[str, Tensor] = {}

    def run(self) -> Tensor | dict[str, Tensor] | None:
        with evaluating(self.model):
            structure = Structure(self.model, self.data, self.forward)
            self.calls, self.levels = structure.calls, structure.levels
            self.last = dict.fromkeys(self.calls, 0)  # pass in which a conv's result is needed for the last time
            for call in self.calls.values():
                for conv in call.needs:
                    self.last[conv] = max(self.last[conv], call.level)
            for conv in structure.needs:
                self.last[conv] = self.levels
            output = None if self.fills else structure.output_type()
            stores = self._stores() if self.fills else {}
            batches = self._batches(structure.splits)
            first = [conv for conv, call in self.calls.items() if call.level == 1]
            known = all(self.calls[conv].source_is_x and conv.store_use.targets is None for conv in first)
            for level in range(1 if known else 0, self.levels + 1 - self.fills):
                self.level = level
                self.recorded: dict[int, Tensor] = {}
                for nodes in tqdm(batches, disable=not self.progress, desc=f"pass {self.level}", leave=False):
                    self._pass(nodes, output, stores)
                for number, rows in self.recorded.items():
                    for store in stores.pop(number, []):
                        store.fill(rows, self.progress)
                self._forget()
            if self.fills:
                return None
            return self.results if output is None else self.results[output]

    def _stores(self) -> dict[int, list[NodeStore]]:
        """The stores of states to fill, by the number of the rows. Those of features are filled now."""
        found: dict[int, list[NodeStore]] = {}
        for conv, call in self.calls.items():
            use = conv.store_use
            if use.store is not None and use.pushes and call.source_is_x:
                use.store.fill(call.relation.x, self.progress)
            elif use.store is not None and use.pushes:
                found.setdefault(call.source, []).append(use.store)
            if use.targets is not None and use.pushes_targets:
                found.setdefault(call.target, []).append(use.targets)
        return found

    def _batches(self, splits: bool) -> list[dict[str, slice]]:
        """Consecutive nodes of every type."""
        graph = self.graph
        size = self.batch_size or _BATCH
        if size < graph.num_nodes and not splits:
            if self.batch_size is not None:
                raise ValueError(
                    f"batch_size={size} splits the {graph.num_nodes} nodes, but {type(self.model).__name__} takes "
                    "statistics over all nodes that it sees (GraphNorm, PairNorm, x.mean(0), ...); leave batch_size "
                    "out, which runs all nodes at once"
                )
            size = graph.num_nodes
        count = math.ceil(graph.num_nodes / size)
        return [
            {node_type: slice(i * n // count, (i + 1) * n // count) for node_type, n in graph.sizes.items()}
            for i in range(count)
        ]

    def _pass(self, nodes: dict[str, slice], output: str | None, stores: dict[int, list[NodeStore]]) -> None:
        self.nodes, self.stores = nodes, stores
        self.done: set[int] = set()  # numbers of the rows recorded of this batch
        self.left = sum(call.level in (self.level, self.level + 1) for call in self.calls.values())
        n_id = {k: torch.arange(of.start, of.stop, device=self.graph.device) for k, of in nodes.items()}
        try:
            out = self.forward(self.model, self.graph.batch(n_id, self.tensors, run=self))
        except _Enough:
            return
        for node_type, rows in _by_type(out, output, self.graph.sizes).items():
            self._write(self.results, node_type, node_type, rows, rows.dtype)

    def __call__(self, conv: RelationConv, source: Tensor, target: Tensor, graph: BatchRelation) -> Tensor:
        call, use = self.calls[conv], conv.store_use
        source_type, _, target_type = graph.graph.edge_type
        if call.level < self.level and conv in self.kept:
            return self.kept[conv][self.nodes[target_type]].to(target)
        out = target.new_zeros(len(target), *call.out.shape[1:])
        if call.level == self.level:
            out = self._result(conv, source, target, graph)
            if self.last[conv] > self.level:
                self._write(self.kept, conv, target_type, out)
        elif call.level == self.level + 1:
            if not call.source_is_x:
                self._record(call.source, source_type, conv.message_input(source))
            if use.targets is not None and call.target in self.stores:
                self._record(call.target, target_type, target)
        if call.level in (self.level, self.level + 1):
            self.left -= 1
            if self.left == 0 and self.level < self.levels:
                raise _Enough
        return out

    def _result(self, conv: RelationConv, source: Tensor, target: Tensor, graph: BatchRelation) -> Tensor:
        call, use, relation = self.calls[conv], conv.store_use, graph.graph
        rows = relation.features if call.source_is_x else self._rows(self.inputs[call.source])
        if not conv.fixed:
            edges = graph.edges(GIVEN_EDGES, bool(conv.form.edge_values))
            others = kernels.pull_rows(rows, edges.others, call.source_dim)
            return deliver(conv, source, others, target, edges, relation)
        if use.input == "precompute" and call.source_is_x:
            messages = relation.product(use.convolution)[self.nodes[relation.edge_type[2]]]
        else:
            nodes = self.nodes[relation.edge_type[2]]
            messages = relation.propagate(use.convolution, rows, nodes.start, nodes.stop, call.source_dim)
        return conv.combine(target, messages.to(target))

    def _record(self, number: int, node_type: str, rows: Tensor) -> None:
        """Keep these rows of the batch's nodes, once."""
        if number not in self.inputs and number not in self.done:
            self.done.add(number)
            self._write(self.recorded, number, node_type, rows)

    def _write(self, into: dict, key: object, node_type: str, rows: Tensor, dtype: torch.dtype | None = None) -> None:
        """Rows of the batch's nodes, into the table of all."""
        if key not in into:
            size, dtype = (self.graph.sizes[node_type], *rows.shape[1:]), dtype or self.dtype
            if self.folder is None:
                into[key] = rows.new_empty(size, dtype=dtype)
            else:
                into[key] = tables.zeros(self.folder, *size, dtype=dtype)
        into[key][self.nodes[node_type]] = rows

    def _forget(self) -> None:
        """After a pass: its records are the next one's inputs, and what nobody needs any more goes."""
        later = {call.source for call in self.calls.values() if call.level > self.level}
        self.inputs = {k: rows for k, rows in {**self.inputs, **self.recorded}.items() if k in later}
        self.kept = {conv: rows for conv, rows in self.kept.items() if self.last[conv] > self.level}

    def _rows(self, table: Tensor) -> Rows:
        return Rows("fp32" if self.dtype == torch.float32 else "fp16", table, None, None)
