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
import vqgnn_kernels as kernels
from vqgnn import BatchLoader
from vqgnn.averaging import MovingAverage
from vqgnn.store import NodeStore
from vqgnn_kernels import CSR, Rows

METHODS = [("vq", "pq:d=4,k=8"), ("lmc", "int8"), ("gas", "fp32"), ("drop", None)]
METHOD_IDS = [method for method, _ in METHODS]


def graph():
    data = awkward_graph(60, 300, 8)
    data.train_mask = torch.rand(60) < 0.6
    return data


def converted(build, method, codec, data):
    model = build(8, 16, 3, 3, norm="batch_norm", dropout=0.3).to(data.x.device)
    vqgnn.convert(model, data, method=method, codec=codec, grad=method in ("vq", "lmc"))
    return model, torch.optim.Adam(model.parameters()), MovingAverage(model, 0.98)


def step(model, optimizer, average, batch):
    out = model(batch.x, batch.graph)
    loss = F.cross_entropy(out, torch.where(batch.train_mask, batch.y, -100), ignore_index=-100)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update_parameters(model)
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
        moved.__dict__.update(to_meta(value.__dict__) | {"visit": getattr(value, "visit", None)})  # the host's
        return moved
    return value


@pytest.mark.parametrize("build", [GCN, GraphSAGE, GIN, GAT])
@pytest.mark.parametrize(("method", "codec"), METHODS, ids=METHOD_IDS)
def test_a_training_step_keeps_to_its_device_and_asks_it_for_nothing(build, method, codec):
    data = graph()
    model, optimizer, average = converted(build, method, codec, data)
    batches = list(BatchLoader(data, batch_size=20, prefetch=0))
    step(model, optimizer, average, batches[0])  # a codebook's first gradients
    model.to("meta")
    average.module.to("meta")
    optimizer = torch.optim.Adam(model.parameters())
    for batch in batches:
        loss = step(model, optimizer, average, to_meta(batch))
    assert loss.device.type == "meta"
    for store in vqgnn.stores(model).values():
        assert {buffer.device.type for buffer in store.buffers()} == {"meta"}


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4", "pq:d=4,k=8", "pq:d=4,k=300"])
def test_a_store_refuses_rows_of_another_device(codec):
    store = NodeStore(500, 10, codec, grad=True).to("meta")
    if store.codebook is not None:
        store.codebook.updates, store.codebook.grad_seen = 3, True  # k-means on the first batch has run
        store.codebook.basis.seen = True
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
    model, optimizer, average = converted(build, method, codec, data)
    batches = list(BatchLoader(data, batch_size=20, prefetch=0))
    for batch in batches:  # compiles the kernels
        step(model, optimizer, average, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(model, optimizer, average, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def random_batch(num_rows, num_columns, edges, num_halo, device, weighted):
    """A CSR with one row of half the edges, so that the Triton kernels split it."""
    row = torch.where(torch.rand(edges) < 0.5, 0, torch.randint(num_rows, (edges,))).sort().values
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=num_rows).cumsum(0)])
    col, weight = torch.randint(num_columns, (edges,), dtype=torch.int32), torch.rand(edges) if weighted else None
    return CSR(*(t if t is None else t.to(device) for t in (rowptr, col, weight, torch.arange(num_halo))))


def ops_of_a_step(device):
    """(step, state): the ops of a training step as a function that returns its results and changes `state` in place."""
    b, h, heads, f, m, K = 50, 30, 2, 8, 2, 16
    n = b + h
    codebook, ema_counts = torch.randn(m, K, 2 * f // m, device=device), torch.ones(m, K, device=device)
    codes, table = torch.zeros(n, m, dtype=torch.uint8, device=device), torch.zeros(n, f, device=device)
    state = [codebook, ema_counts, codebook.clone(), codes, table]
    n_id = torch.randperm(n)[:b].to(device)
    x, g = torch.randn(2, b, f, device=device)
    key, query = torch.randn(2, n, heads, device=device)
    stats = torch.randn(h, 2, heads, device=device)
    weighted, plain = (random_batch(b, n, 3000, h, device, weighted) for weighted in (True, False))

    def step():
        v = torch.cat([x.view(b, m, -1), g.view(b, m, -1)], 2).view(b, -1)
        new_codes, counts, sums = kernels.vq_assign_stats(v, codebook)
        kernels.codebook_update(*state[:3], counts, sums, 0.9, v=v, revive_below=0.1, seed=3)
        values = codebook[..., : f // m].contiguous()
        stored = Rows("pq", codes, None, values)
        kernels.push_rows(stored, n_id, new_codes)
        kernels.push_rows(Rows("fp32", table), n_id, x)
        leaves = [t.detach().requires_grad_() for t in (x, key, query)]
        messages = kernels.aggregate(leaves[0], weighted, stored, weighted, Rows("fp32", table))
        attended, _ = kernels.attention_aggregate(
            leaves[0], plain, leaves[2], leaves[1], heads=heads, mode="additive", rows=stored, csr_t=plain,
            grad_rows=Rows("fp32", table), halo_stats=stats, dropout=0.2, seed=5,
        )  # fmt: skip
        loss = (messages * g).sum() + (attended.flatten(1) * g).sum()
        gradients = torch.autograd.grad(loss, leaves)
        return [messages.detach(), attended.detach(), *gradients, kernels.pull_rows(stored, n_id, f)]

    return step, state


def test_the_ops_of_a_step_run_in_a_cuda_graph(device):
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    step, state = ops_of_a_step(device)
    start = [tensor.clone() for tensor in state]

    def restore():
        for tensor, value in zip(state, start, strict=True):
            tensor.copy_(value)

    want = [*step(), *(tensor.clone() for tensor in state)]  # compiles the kernels
    stream = torch.cuda.Stream()  # torch's rule: a warm-up on another stream before the capture
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(2):  # a replay needs nothing that the one before it left
        restore()
        for tensor in results:
            tensor.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close([*results, *state], want, atol=1e-4, rtol=1e-4)  # sums by atomics vary a little
