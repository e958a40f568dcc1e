"""Outputs for nodes that came after training, without running the graph again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from vqgnn_kernels import Rows

from .disk_graph import MappedData
from .graph import BatchGraph, Graph
from .inference import call_model, device_of, evaluating
from .loader import Batch
from .store import Neighbours
from .store_conv import StoreConv


@torch.no_grad()
def new_nodes(
    model: nn.Module,
    data: Data,
    x: Tensor,
    edge_index: Tensor,
    forward: Callable[[nn.Module, Batch], Tensor] = call_model,
) -> Tensor:
    """The converted model's output [k, out_channels] for k new nodes of the graph `data` of n nodes.

    Layer by layer the new nodes hear each other, and known neighbours by their features (first layer) and by the states
    in the store. The known nodes do not hear the new ones, but all degrees are those of the enlarged graph: the result
    is exact where the store's states are (see `warmup`) and every edge leads to a new node. The cost is that of one
    batch; of the graph, only edges to the known neighbours are looked up.

    Args:
        model: converted with a method that keeps states ("vq", "gas", "lmc"); evaluated in evaluation mode.
        data: the graph that it was converted with.
        x: [k, f] float32, the new nodes' features.
        edge_index: [2, e] int64, edges from `edge_index[0]` to `edge_index[1]`, each with at least one new node; the
            new nodes' ids are n..n+k-1. Where the graph is undirected, give both directions.

    Raises:
        ValueError: features or edges that do not fit, or a model without states.
    """
    n, k = data.num_nodes, x.size(0)
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
    if "edge_weight" in data:
        raise ValueError("data has edge_weight, which new nodes' edges cannot have yet; use inference.layerwise")
    convs = [module for module in model.modules() if isinstance(module, StoreConv)]
    others = sorted({type(conv).__name__ for conv in convs if not conv.serves_new_nodes})
    if others:
        raise ValueError(
            f"the model has {', '.join(others)}, whose edges come from the whole of the known graph; add the new nodes "
            "to it and use inference.layerwise"
        )
    if any(conv.store_use is None or (conv.store_use.store is None and conv.store_use.input is None) for conv in convs):
        raise ValueError(
            "the model keeps no states of the known nodes; convert (train) it with method vq, gas or lmc, or add the "
            "new nodes to the graph and use exact inference"
        )
    device = device_of(model, data)
    known = edge_index[edge_index < n].unique()
    graph = Graph(_surroundings(data, x, edge_index, known).to(device))
    known = known.to(device)

    def answer(conv: StoreConv, value: Tensor, batch: BatchGraph) -> Tensor:
        use = conv.store_use
        states = conv.message_input(graph.x[k:-1]) if use.input is not None else use.store.pull(known)
        csr = batch.csr(use.convolution)[0]
        csr = csr._replace(halo=csr.halo - k)
        neighbours = Neighbours(csr, Rows("fp32", states.float().contiguous(), None, None))
        messages, _ = conv.batch_messages(conv.message_input(value), neighbours, conv.message_query(value))
        return conv.combine(value, messages)

    with evaluating(model):
        batch = BatchGraph(graph, torch.arange(k, device=device), graph.x[:k], run=answer)
        return forward(model, Batch(batch, {"x": batch.x}))


def _surroundings(data: Data, x: Tensor, edge_index: Tensor, known: Tensor) -> Data:
    """The graph of the new nodes 0..k-1, their known neighbours k.., and one last node for all others.

    It has every edge to those nodes, so that the rows of any convolution normalised by degrees are right.
    """
    n, k, h = data.num_nodes, x.size(0), known.numel()
    local = torch.full((n + k,), k + h, device=x.device)
    local[known] = torch.arange(k, k + h, device=x.device)
    local[n:] = torch.arange(k, device=x.device)
    edges = local[torch.cat([edge_index, _edges_to(data, known)], 1)]
    features = torch.cat([x, data.x[known], x.new_zeros(1, x.size(1))])
    return Data(x=features, edge_index=edges)


def _edges_to(data: Data, nodes: Tensor) -> Tensor:
    """[2, e] edges of the graph that lead to these nodes [h], ascending."""
    if not isinstance(data, MappedData):
        wanted = torch.zeros(data.num_nodes, dtype=torch.bool, device=nodes.device)
        wanted[nodes] = True
        return data.edge_index[:, wanted[data.edge_index[1]]]
    start = data.rowptr[nodes]
    count = data.rowptr[nodes + 1] - start
    first = count.cumsum(0) - count  # where a node's edges begin in the result
    edge = torch.arange(int(count.sum())) + (start - first).repeat_interleave(count)
    return torch.stack([data.col[edge].long(), nodes.repeat_interleave(count)])
