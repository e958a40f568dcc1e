"""How wrong a model's stored states are now, and what that does to a batch's messages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from vqgnn_kernels import Rows

from .conversion import stores
from .graph import Convolution, Graph
from .inference import call_model, evaluating, visit_inputs
from .loader import Batch
from .nn import StoreConv
from .store import Neighbours
from .survey import Hop


@dataclass(frozen=True)
class LayerError:
    """What one conv reads, against the exact states X of the present weights. Norms are Frobenius'.

    relative_error: eps = |X~ - X| / |X| over all nodes; of it quantisation alone, with fresh codes (or rows) of X:
        `quantisation`. The rest is staleness.
    messages: |M~_B - M_B|, the error of the batch's messages, from rows aligned where the conv does; None of a conv
        that PyG's own code computes.
    bound: eps |C| |X| >= messages, theorem 2 of VQ-GNN before the layer's own weights; None where C depends on X
        (attention): the constant is then a matter of how fast it changes.
    """

    store: str
    relative_error: float
    quantisation: float
    messages: float | None = None
    bound: float | None = None


@torch.no_grad()
def error_bound(model: nn.Module, data: Data, batch: Batch, forward=call_model) -> list[LayerError]:
    """Measured error and bound for every store of states of a converted model; the stores are only read.

    Costs an exact inference sweep over the graph, with fp32 rows of one layer at a time.

    Args:
        model: converted; put in evaluation mode for the time.
        data: the whole graph, of which `batch` is a batch of `BatchLoader`.
        forward: how to call the model on a batch, as for `convert`.
    Raises:
        ValueError: no conv of the model reads a store (method "drop" or "full").
    """
    names = {store: name for name, store in stores(model).items()}
    graph, found = Graph.of(data), {}

    def visit(conv: StoreConv | Hop, exact: Tensor) -> None:
        name = names[conv.store_use.store]
        found[name] = _layer_error(name, conv, exact, graph, batch)

    with evaluating(model):
        visit_inputs(model, data, visit, forward)
    if not found:
        raise ValueError(f"model {type(model).__name__} reads no store; convert it with method='vq', 'gas' or 'lmc'")
    return [found[name] for name in names.values() if name in found]


def _layer_error(name: str, conv: StoreConv | Hop, exact: Tensor, graph: Graph, batch: Batch) -> LayerError:
    store, convolution, scale = conv.store_use.store, conv.store_use.convolution, exact.norm()
    error = (store.pull() - exact).norm() / scale
    quantisation = (store.quantised(exact) - exact).norm() / scale
    if isinstance(conv, Hop):
        return LayerError(name, float(error), float(quantisation))
    csr, csr_t = batch.graph.csr(convolution)
    source = exact[batch.graph.n_id]
    truth = conv.batch_messages(source, Neighbours(csr, Rows("fp32", exact), csr_t))[0]
    neighbours = batch.graph.neighbours(store, convolution)._replace(grad_rows=None)
    if conv.store_use.align:
        read = conv.aligned_messages(source, batch.graph, neighbours)[0]
    else:
        read = conv.batch_messages(source, neighbours)[0]
    bound = float(error * scale * _norm(graph, convolution)) if conv.fixed else None
    return LayerError(name, float(error), float(quantisation), float((read - truth).norm()), bound)


def _norm(graph: Graph, convolution: Convolution) -> Tensor:
    """|C|_F; of duplicate edges the weights add up first."""
    matrix = graph.matrix(convolution)
    row = torch.repeat_interleave(matrix.rowptr.diff())  # of every edge
    _, place = torch.unique_consecutive(row * graph.num_nodes + matrix.col, return_inverse=True)  # they are sorted
    weight = torch.ones_like(place, dtype=torch.float32) if matrix.weight is None else matrix.weight
    return weight.new_zeros(len(place)).index_add_(0, place, weight).norm()
