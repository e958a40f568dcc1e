"""What a training step must be for a GPU: all on one device, and without waiting for it.

Without a GPU this is shown on torch's "meta" device, which has shapes and no numbers: an operation that mixes it with
the CPU, or whose result the host would have to wait for (a number, the size of `x[mask]`), is an error there.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import awkward_graph
from torch_geometric.nn.models import GAT, GCN, GIN, GraphSAGE

import vqgnn
from vqgnn import BatchLoader
from vqgnn.store import NodeStore

METHODS = [("vq", "pq:d=4,k=8"), ("lmc", "int8"), ("gas", "fp32"), ("drop", None)]
METHOD_IDS = [method for method, _ in METHODS]


def graph():
    data = awkward_graph(60, 300, 8)
    data.train_mask = torch.rand(60) < 0.6
    return data


def converted(build, method, codec, data):
    model = build(8, 16, 3, 3, norm="batch_norm", dropout=0.3).to(data.x.device)
    vqgnn.convert(model, data, method=method, codec=codec, grad=method in ("vq", "lmc"))
    return model, torch.optim.Adam(model.parameters())


def step(model, optimizer, batch):
    out = model(batch.x, batch.graph)
    loss = F.cross_entropy(out, torch.where(batch.train_mask, batch.y, -100), ignore_index=-100)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def to_meta(value):
    """A batch, or anything inside one, on the meta device."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple):
        items = [to_meta(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        return {key: to_meta(item) for key, item in value.items()}
    if type(value).__name__ in ("Batch", "BatchGraph", "Graph"):
        moved = copy.copy(value)
        moved.__dict__.update(to_meta(value.__dict__))
        return moved
    return value


@pytest.mark.parametrize("build", [GCN, GraphSAGE, GIN, GAT])
@pytest.mark.parametrize(("method", "codec"), METHODS, ids=METHOD_IDS)
def test_a_training_step_keeps_to_its_device_and_asks_it_for_nothing(build, method, codec):
    data = graph()
    model, optimizer = converted(build, method, codec, data)
    batches = list(BatchLoader(data, batch_size=20, prefetch=0))
    step(model, optimizer, batches[0])  # a codebook's first gradients
    model.to("meta")
    optimizer = torch.optim.Adam(model.parameters())
    for batch in batches:
        loss = step(model, optimizer, to_meta(batch))
    assert loss.device.type == "meta"
    for store in vqgnn.stores(model).values():
        assert {buffer.device.type for buffer in store.buffers()} == {"meta"}


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4", "pq:d=4,k=8", "pq:d=4,k=300"])
def test_a_store_refuses_rows_of_another_device(codec):
    store = NodeStore(500, 10, codec, grad=True).to("meta")
    if store.codebook is not None:
        store.codebook.updates, store.codebook.grad_seen = 3, True  # k-means on the first batch has run
    n_id, x = torch.empty(40, dtype=torch.int64, device="meta"), torch.empty(40, 10, device="meta")
    store.push(n_id, x)
    store.push(n_id, x, x)
    assert store.pull(n_id).device.type == "meta"
    if store.codebook is not None:
        with pytest.raises((RuntimeError, ValueError)):
            store.push(n_id, torch.empty(40, 10))


@pytest.mark.parametrize("ask", [lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: x + torch.ones(5)])
def test_the_meta_device_sees_it(ask):
    with pytest.raises((RuntimeError, NotImplementedError)):
        ask(torch.empty(5, device="meta"))


@pytest.mark.parametrize(("method", "codec"), METHODS, ids=METHOD_IDS)
@pytest.mark.parametrize("build", [GCN, GAT])
def test_a_training_step_does_not_synchronise_cuda(build, method, codec, device):
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    data = graph().to(device)
    model, optimizer = converted(build, method, codec, data)
    batches = list(BatchLoader(data, batch_size=20, prefetch=0))
    for batch in batches:  # compiles the kernels
        step(model, optimizer, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(model, optimizer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
