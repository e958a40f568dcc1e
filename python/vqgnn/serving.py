"""Outputs for nodes that came after training, without running the graph again."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData

from vqgnn_kernels import Rows

from .calling import call_model, device_of, evaluating
from .disk_graph import MappedData
from .generic import GenericConv
from .graph import BatchGraph, Graph, node_tensors, require_graph
from .inference import can_split
from .loader import Batch
from .pyg_code import taken_edge_tensors
from .store_conv import StoreConv
from .survey import Hop


class _NewNodes(Batch):
    """A batch of nodes of which only x is given; `known` are names of the data's other tensors."""

    known: frozenset[str] = frozenset()

    def __getattr__(self, name: str):
        if name in self.known:
            raise AttributeError(
                f"new nodes have no {name!r}, only x; for a model that takes data.{name}, put it into data.x before "
                "vqgnn.convert, or add the new nodes to the graph and use inference.layerwise"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@torch.no_grad()
def new_nodes(
    model: nn.Module,
    data: Data,
    x: Tensor,
    edge_index: Tensor,
    forward: Callable[[nn.Module, Batch], Tensor] = call_model,
    edge_attr: Tensor | None = None,
) -> Tensor:
    """The converted model's output [k, out_channels] for k new nodes of the graph `data` of n nodes.

    Layer by layer the new nodes hear each other, and known neighbours by their features (first layer) and by the states
    in the store. The known nodes do not hear the new ones, but all degrees are those of the enlarged graph: the result
    is exact where the store's states are (see `warmup`) and every edge leads to a new node. The cost is that of one
    batch; of the graph, only edges of the known neighbours are looked up. A conv that makes edges of its own (self
    loops, a normalisation) makes them of these: what it does to an edge may depend on the degrees of its ends alone.
    Of the new nodes x alone is known: the batch that `forward` gets has none of the data's other tensors of nodes.

    Args:
        model: converted with a method that keeps states ("vq", "gas", "lmc"); evaluated in evaluation mode.
        data: the graph that it was converted with.
        x: [k, f] float32, the new nodes' features.
        edge_index: [2, e] int64, edges from `edge_index[0]` to `edge_index[1]`, each with at least one new node; the
            new nodes' ids are n..n+k-1. Where the graph is undirected, give both directions.
        edge_attr: [e, D] or [e], as data.edge_attr, of these edges. Needed where a conv takes it.

    Raises:
        ValueError: features or edges that do not fit, or a model without states.
        AttributeError: `forward` takes another tensor of the nodes than x.
    """
    if isinstance(data, HeteroData):
        raise ValueError("data is a HeteroData; new nodes are served for a Data")
    for name, value in (("x", x), ("edge_index", edge_index)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got a {type(value).__name__}; convert it by torch.as_tensor")
    n, k = data.num_nodes, x.size(0) if x.dim() else 0
    if x.dim() != 2 or x.size(1) != data.num_features or k == 0 or x.dtype != torch.float32:
        raise ValueError(
            f"x is {list(x.shape)} {x.dtype}; it must be [new nodes, {data.num_features}] float32, as the graph's"
        )
    if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.dtype != torch.int64:
        raise ValueError(f"edge_index is {list(edge_index.shape)} {edge_index.dtype}; it must be [2, edges] int64")
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < n + k:
        low, high = int(edge_index.min()), int(edge_index.max())
        raise ValueError(f"edge_index holds node ids {low}..{high}; known are 0..{n - 1}, new are {n}..{n + k - 1}")
    between_known = int((edge_index < n).all(0).sum())
    if between_known:
        raise ValueError(f"edge_index has {between_known} edges between known nodes; each needs a new one, {n}..")
    known_attr = data.get("edge_attr")
    if edge_attr is not None:
        wanted = None if known_attr is None else (edge_index.size(1), *known_attr.shape[1:])
        if wanted is None or edge_attr.shape != wanted or edge_attr.dtype != known_attr.dtype:
            needed = "left out, as data has none" if wanted is None else f"{list(wanted)} {known_attr.dtype}"
            raise ValueError(f"edge_attr is {list(edge_attr.shape)} {edge_attr.dtype}; it must be {needed}")
    if "edge_weight" in data:
        raise ValueError("data has edge_weight, which new nodes' edges cannot have yet; use inference.layerwise")
    uses = []
    for conv in (module for module in model.modules() if isinstance(module, StoreConv)):
        if not conv.serves_new_nodes:
            raise ValueError(
                f"{type(conv).__name__} reads more of the graph than a node's edges; add the new nodes to the graph "
                "and use inference.layerwise"
            )
        if isinstance(conv, GenericConv):
            uses += [hop.store_use for hop in conv.survey.hops] if conv.survey else [None]
            taken = [*taken_edge_tensors(conv, Graph.of(data))]
        else:
            uses.append(conv.store_use)
            takes = conv.store_use is not None and Graph.of(data).edge_features(conv.store_use.convolution) is not None
            taken = ["edge_attr"] if takes else []
        if "edge_attr" in taken and edge_attr is None:
            raise ValueError(
                f"{type(conv).__name__} takes data.edge_attr, and edge_attr is None; give that of the "
                f"{edge_index.size(1)} new edges"
            )
        other = [f"data.{name}" for name in taken if name != "edge_attr"]
        if other:
            raise ValueError(
                f"{type(conv).__name__} takes {' and '.join(other)}, which new nodes' edges cannot have yet; add the "
                "new nodes to the graph and use inference.layerwise"
            )
    if any(use is None or (use.store is None and use.input is None) for use in uses):
        raise ValueError(
            "the model keeps no states of the known nodes; convert (train) it with method vq, gas or lmc, or add the "
            "new nodes to the graph and use exact inference"
        )
    for use in uses:
        if use.store is not None:
            require_graph(use.store.num_nodes, n)
    if not can_split(model, data, forward):
        raise ValueError(
            f"{type(model).__name__} takes statistics over all nodes that it sees (GraphNorm, PairNorm, "
            "LayerNorm(mode='graph'), ...), which new nodes alone do not have; add them to the graph and use "
            "inference.layerwise"
        )
    device = device_of(model, data)
    known = edge_index[edge_index < n].unique()
    graph = Graph(_surroundings(data, x, edge_index, known, edge_attr).to(device))
    known = known.to(device)

    def answer(conv: StoreConv | Hop, value: Tensor, batch: BatchGraph, output=None) -> Tensor:
        use = conv.store_use
        states = conv.state(graph.x[k:-1]) if use.input is not None else use.store.pull(known)
        table = Rows("fp32", F.pad(states.float(), (0, 0, k, 1)), None, None)  # by the ids of `graph`
        if output is not None:
            return output(table, value)
        neighbours = batch.read(table, use.convolution)
        messages, _ = conv.state_messages(conv.state(value), neighbours, conv.message_query(value))
        return conv.combine(value, messages)

    batch = BatchGraph(graph, torch.arange(k, device=device), graph.x[:k], run=answer)
    surveys = [conv.survey for conv in model.modules() if isinstance(conv, GenericConv)]
    edges = [survey.edges for survey in surveys]
    try:
        with evaluating(model):
            nodes = _NewNodes(batch, {"x": batch.x})
            nodes.known = frozenset(node_tensors(data))
            return forward(model, nodes)
    finally:  # of the known graph, which need not be made again
        for survey, known_edges in zip(surveys, edges, strict=True):
            survey.edges = known_edges


def _surroundings(data: Data, x: Tensor, edge_index: Tensor, known: Tensor, edge_attr: Tensor | None) -> Data:
    """The graph of the new nodes 0..k-1, their known neighbours k.., and one last node for all others.

    It has every edge of those nodes, so that the rows of any convolution normalised by degrees are right.
    """
    n, k, h = data.num_nodes, x.size(0), known.numel()
    local = torch.full((n + k,), k + h, device=x.device)
    local[known] = torch.arange(k, k + h, device=x.device)
    local[n:] = torch.arange(k, device=x.device)
    edges_of, ids = _edges_of(data, known)
    edges = local[torch.cat([edge_index, edges_of], 1)]
    features = torch.cat([x, data.x[known], x.new_zeros(1, x.size(1))])
    surroundings = Data(x=features, edge_index=edges)
    if edge_attr is not None:
        surroundings.edge_attr = torch.cat([edge_attr, data.edge_attr[ids]])
    return surroundings


def _edges_of(data: Data, nodes: Tensor) -> tuple[Tensor, Tensor | None]:
    """[2, e] edges of the graph at these nodes [h], ascending, and their numbers.

    Of one on disk, whose edges have no features, only those that lead to them, without numbers. Only PyG's own code may
    ask for how many leave a node, and that needs a graph in memory.
    """
    if not isinstance(data, MappedData):
        wanted = torch.zeros(data.num_nodes, dtype=torch.bool, device=nodes.device)
        wanted[nodes] = True
        ids = wanted[data.edge_index].any(0).nonzero().flatten()
        return data.edge_index[:, ids], ids
    start = data.rowptr[nodes]
    count = data.rowptr[nodes + 1] - start
    first = count.cumsum(0) - count  # where a node's edges begin in the result
    edge = torch.arange(int(count.sum())) + (start - first).repeat_interleave(count)
    return torch.stack([data.col[edge].long(), nodes.repeat_interleave(count)]), None
