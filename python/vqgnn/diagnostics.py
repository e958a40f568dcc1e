"""How wrong a model's stored states and gradients are now, and what that does to a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from vqgnn_kernels import Rows

from .conversion import stores
from .graph import BatchGraph, Convolution, Graph, MovedBatch, node_tensors
from .inference import call_model, device_of, evaluating, visit_inputs
from .loader import Batch
from .store import Neighbours
from .store_conv import StoreConv
from .survey import Hop


@dataclass(frozen=True)
class LayerError:
    """What one conv reads, against the exact states X and gradients G of the present weights. Norms are Frobenius'.

    relative_error: eps = |X~ - X| / |X| over all nodes; of it quantisation alone, with fresh codes (or rows) of X:
        `quantisation`. The rest is staleness.
    messages: |M~_B - M_B|, the error of the batch's messages; None of a conv that PyG's own code computes, and of an
        attention whose queries do not follow from what is stored.
    bound: eps |C| |X| >= messages, theorem 2 of VQ-GNN before the layer's own weights; None where C depends on X
        (attention): the constant is then a matter of how fast it changes.

    With a loss also, of the conv's messages' gradients G, the same three; None of a conv that PyG's own code computes:

    relative_error_grad: eps_G = |G~ - G| / |G| over all nodes; 1 where no gradients are kept.
    gradients: |dX~_B - dX_B|, the error of what comes back to the batch's rows by eq. 7 from its own exact G_B and the
        other nodes' G~.
    gradient_bound: eps_G |C| |G| >= gradients, corollary 3 of VQ-GNN. G is the gradient of the loss by what the layer's
        weights and non-linearity are given, whose factors |W| and sigma'max are thus within G. None of attention.
    """

    store: str
    relative_error: float
    quantisation: float
    messages: float | None = None
    bound: float | None = None
    relative_error_grad: float | None = None
    gradients: float | None = None
    gradient_bound: float | None = None


@torch.no_grad()
def error_bound(
    model: nn.Module,
    data: Data,
    batch: Batch,
    forward: Callable[[nn.Module, Batch], Tensor] = call_model,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> list[LayerError]:
    """Measured error and bound for every store of states of a converted model; the stores are only read.

    Costs an exact inference sweep over the graph, with fp32 rows of one layer at a time, and with `loss` the memory and
    time of a full-batch step.

    Args:
        model: converted; put in evaluation mode for the time. Its parameters' `grad` stays as it is.
        data: the whole graph, of which `batch` is a batch of `BatchLoader`.
        forward: how to call the model on a batch, as for `convert`.
        loss: of the outputs [n, out_channels] for all nodes, a number; then gradients are measured too. A node must
            count in it as in a batch's loss, whose gradients are stored: in a sum over nodes it does; for means over
            batches of b nodes, give n / b times the mean over all.
    Raises:
        ValueError: no conv of the model reads a store (method "drop" or "full"); with loss, a conv that runs within a
            checkpoint.
    """
    names = {store: name for name, store in stores(model).items()}
    graph, found = Graph.of(data), {}
    gradients: dict[StoreConv, tuple[Tensor, Tensor]] = {}

    def visit(conv: StoreConv | Hop, exact: Tensor) -> None:
        name = names[conv.store_use.store]
        found[name] = _layer_error(name, conv, exact, graph, batch, gradients.get(conv))

    with evaluating(model):
        if names and loss is not None:
            gradients |= _full_batch_gradients(model, data, loss, forward)
        visit_inputs(model, data, visit, forward)
    if not found:
        raise ValueError(f"model {type(model).__name__} reads no store; convert it with method='vq', 'gas' or 'lmc'")
    return [found[name] for name in names.values() if name in found]


def _layer_error(
    name: str,
    conv: StoreConv | Hop,
    exact: Tensor,
    graph: Graph,
    batch: Batch,
    gradients: tuple[Tensor, Tensor] | None,
) -> LayerError:
    store, convolution, scale = conv.store_use.store, conv.store_use.convolution, exact.norm()
    error = (store.pull() - exact).norm() / scale
    quantisation = (store.quantised(exact) - exact).norm() / scale
    if isinstance(conv, Hop) or (conv.query_channels and not conv.store_use.inputs):
        return LayerError(name, float(error), float(quantisation))
    n_id = batch.graph.origin.n_id
    csr, csr_t = batch.graph.csr(convolution)
    source = exact[n_id]

    def messages(neighbours: Neighbours) -> Tensor:
        if conv.store_use.inputs:
            neighbours = neighbours._replace(csr_t=batch.graph.halo_transpose(convolution))
        return conv.state_messages(source, neighbours, conv.message_query(source.detach()))[0]

    truth = messages(Neighbours(csr, Rows("fp32", exact), csr_t))
    read = messages(batch.graph.neighbours(store, convolution)._replace(grad_rows=None, grad_basis=None))
    norm = _norm(graph, convolution).to(exact.device) if conv.fixed else None
    bound = float(error * norm * scale) if conv.fixed else None
    of_states = (name, float(error), float(quantisation), float((read - truth).norm()), bound)
    if gradients is None:
        return LayerError(*of_states)
    of_messages, of_rows = gradients
    scale = of_messages.norm()
    error = (store.pull_gradients() - of_messages).norm() / scale if store.grad else torch.ones(())
    with torch.enable_grad():
        source.requires_grad_()
        told = messages(batch.graph.neighbours(store, convolution))
        (read,) = torch.autograd.grad(told, source, of_messages[n_id])
    bound = float(error * norm * scale) if conv.fixed else None
    return LayerError(*of_states, float(error), float((read - of_rows[n_id]).norm()), bound)


@torch.enable_grad()
def _full_batch_gradients(
    model: nn.Module, data: Data, loss: Callable[[Tensor], Tensor], forward: Callable[[nn.Module, Batch], Tensor]
) -> dict[StoreConv, tuple[Tensor, Tensor]]:
    """Of each conv with a kernel and a store, exact gradients [n, f]: its messages', and those of the rows told."""
    graph, device = Graph.of(data), device_of(model, data)
    found: dict[StoreConv, tuple[Tensor, Tensor]] = {}

    def answer(conv: StoreConv | Hop, x: Tensor, batch: BatchGraph, output=None) -> Tensor:
        if output is not None:
            return output(None, x)
        if not torch.is_grad_enabled():
            raise ValueError(f"{type(conv).__name__} runs within a checkpoint; for its gradients' error, switch it off")
        source = conv.state(x)
        # A tensor of its own: x may go elsewhere, too.
        told = source.view_as(source) if source.requires_grad else source.detach().requires_grad_()
        csr, csr_t = batch.csr(conv.store_use.convolution)
        messages = conv.state_messages(told, Neighbours(csr, None, csr_t), conv.message_query(x))[0]
        if conv.store_use.store is not None:
            found[conv] = messages, told
        return conv.combine(x, messages)

    whole = BatchGraph(graph, torch.arange(graph.num_nodes, device=graph.x.device), graph.x, run=answer)
    if device != graph.x.device:
        whole = MovedBatch(whole, lambda tensor: tensor.to(device))
    value = loss(forward(model, Batch.of(whole, node_tensors(data))))
    wanted = [tensor for pair in found.values() for tensor in pair]
    if not wanted:
        return {}
    gradients = iter(torch.autograd.grad(value, wanted, materialize_grads=True))
    return {conv: (next(gradients), next(gradients)) for conv in found}


def _norm(graph: Graph, convolution: Convolution) -> Tensor:
    """|C|_F; of duplicate edges the weights add up first."""
    matrix = graph.matrix(convolution)
    row = torch.repeat_interleave(matrix.rowptr.diff())  # of every edge
    _, place = torch.unique_consecutive(row * graph.num_nodes + matrix.col, return_inverse=True)  # they are sorted
    weight = torch.ones_like(place, dtype=torch.float32) if matrix.weight is None else matrix.weight
    return weight.new_zeros(len(place)).index_add_(0, place, weight).norm()
