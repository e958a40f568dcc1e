"""Node state and graph off the device that computes: the same training, bit for bit, as where both are on it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import random_graph
from marks import needs_cpp
from test_invariants import CLASSES, build
from test_store import assert_same, stored

import vqgnn
from vqgnn import NodeStore
from vqgnn.graph import MovedBatch
from vqgnn.loader import Batch
from vqgnn.transfer import TransferEngine

pytestmark = needs_cpp
N, DIM = 30, 6
CODECS = ["fp32", "fp16", "int8", "int4", "pq:d=4,k=8", "pq:d=4,k=300"]


@pytest.fixture(params=[False, True], ids=["directed", "undirected"])
def data(request):
    torch.manual_seed(5)
    return random_graph(request.param, CLASSES)


def moved(batch):
    """The batch as the loader gives it to a GPU, with another copy of the CPU's memory in its place."""
    graph = MovedBatch(batch.graph, torch.clone).prepare()
    return Batch(graph, {"x": graph.x, "y": batch.y})


def trained(name, data, method, place, folder, grad=None, move=False, input="auto", epochs=2):
    """A model after some epochs, and its stores."""
    torch.manual_seed(0)
    model = build(name, data, dropout=0.3)
    codec = "pq:d=4,k=8" if method == "vq" else None if method == "drop" else "int8"
    vqgnn.convert(model, data, method, codec, input=input, grad=grad, place=place, folder=folder)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loader = vqgnn.BatchLoader(data, batch_size=13, seed=3)
    for _ in range(epochs):
        for batch in loader:
            batch = moved(batch) if move else batch
            loss = F.cross_entropy(model(batch.x, batch.graph), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("move", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("method", ["vq", "gas", "lmc"])
@pytest.mark.parametrize("name", ["gcn", "sage", "gat", "gatv2", "gatv2-shared", "cheb"])
def test_training_is_the_same_wherever_state_and_graph_lie(name, method, move, place, data, tmp_path):
    grad = None if method == "gas" else True
    expected = trained(name, data, method, "device", tmp_path, grad)
    model = trained(name, data, method, place, tmp_path, grad, move)
    assert_same(model.state_dict(), expected.state_dict())
    for store, other in zip(vqgnn.stores(model).values(), vqgnn.stores(expected).values(), strict=True):
        assert store.place == place and int(store.step) > 0
        assert_same(stored(store), stored(other))


@pytest.mark.parametrize("method", ["drop", "lmc"])
@pytest.mark.parametrize("input", ["rows", "codes"])
@pytest.mark.parametrize("name", ["sage", "gat", "cheb"])
def test_moved_batches_have_every_input(name, input, method, data, tmp_path):
    options = {"method": method, "folder": tmp_path, "input": input}
    expected = trained(name, data, place="device", **options)
    model = trained(name, data, place="host", move=True, **options)
    assert_same(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("method", ["vq", "lmc"])
def test_pinned_state_is_used_in_place(method, data, tmp_path, monkeypatch):
    """With memory that is not pinned in its place: a GPU is needed for that."""
    zeros = torch.zeros
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch, "zeros", lambda *size, pin_memory=False, **options: pinned.append(pin_memory) or zeros(*size, **options)
    )
    model = trained("gcn", data, method, "pinned", tmp_path, move=True)
    assert any(pinned)
    monkeypatch.undo()
    expected = trained("gcn", data, method, "device", tmp_path)
    assert_same(model.state_dict(), expected.state_dict())


def test_pinned_state_needs_a_gpu(data, device):
    if device.type == "cuda":
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="place='pinned' is for the kernels of a GPU"):
        vqgnn.convert(build("gcn", data), data, place="pinned")


@pytest.mark.parametrize("place", ["device", "host", "disk", "pinned"])
@pytest.mark.parametrize("method", ["vq", "lmc", "drop"])
@pytest.mark.parametrize("name", ["gcn", "sage", "gat"])
def test_a_gpu_trains_on_a_graph_in_ram(name, method, place, data, tmp_path, device):
    """The same states and gradients as with graph and state on the GPU, and exact inference."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    results = []
    for source, where in ((copy.copy(data).to(device), "device"), (data, place)):
        torch.manual_seed(0)
        model = build(name, source).to(device)
        vqgnn.convert(model, source, method, place=where, folder=tmp_path)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(2):
            for batch in vqgnn.BatchLoader(source, batch_size=13, seed=3, device=device):
                loss = F.cross_entropy(model(batch.x, batch.graph), batch.y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        results.append([loss.detach().cpu(), vqgnn.inference.layerwise(model, source).cpu()])
    # C X by the CPU is rounded otherwise, and a row half-way between two codewords may then take the other
    rtol, atol = (2e-2, 1e-2) if method == "vq" else (1e-3, 1e-4)
    for value, truth in zip(*results, strict=True):
        torch.testing.assert_close(value, truth, rtol=rtol, atol=atol)


def test_a_moved_batch_takes_what_it_needs_once(data, tmp_path):
    model = vqgnn.convert(build("gcn", data), data, "gas", place="host")
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=13)))
    copies = []
    graph = MovedBatch(batch.graph, lambda tensor: copies.append(tensor) or tensor.clone()).prepare()
    count = len(copies)
    model(graph.x, graph)
    assert len(copies) == count and len({id(tensor) for tensor in copies}) == count


@pytest.mark.parametrize("method", ["gas", "vq"])
def test_a_moved_batch_of_a_copy_of_the_data_reads_the_same_rows(data, method):
    model = vqgnn.convert(build("gcn", data), data, method).eval()
    other = copy.copy(data)
    batch = next(iter(vqgnn.BatchLoader(other, batch_size=13)))
    moved = MovedBatch(batch.graph, torch.clone)
    torch.testing.assert_close(model(moved.x, moved), model(batch.x, batch.graph))


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_on_the_host_is_the_one_in_place(codec):
    both = []
    for place in ("host", "device"):
        torch.manual_seed(1)
        store = NodeStore(N, DIM, codec, grad=True, place=place)
        for _ in range(2):
            store.push(torch.randperm(N)[:20], torch.randn(20, DIM), torch.randn(20, DIM))
        both.append(store)
    host, device = both
    n_id = torch.tensor([3, 3, 29, 0])
    assert torch.equal(host.pull(n_id), device.pull(n_id)) and torch.equal(host.pull(), device.pull())
    twin = copy.deepcopy(host)
    assert_same(stored(host), stored(device))
    twin.push(n_id[1:], torch.ones(3, DIM), torch.ones(3, DIM))
    assert_same(stored(host), stored(device))  # the twin has an engine and tables of its own
    assert not torch.equal(twin.pull(), host.pull())


def test_stores_of_a_model_share_an_engine(data):
    model = vqgnn.convert(build("gcn", data), data, place="host")
    assert len({store.engine for store in vqgnn.stores(model).values()}) == 1


def test_reading_starts_with_the_first_conv(data, tmp_path, monkeypatch):
    """Before anything is computed, for every store of the model."""
    started = []
    start = NodeStore.start
    monkeypatch.setattr(NodeStore, "start", lambda store, *csrs: started.append(store) or start(store, *csrs))
    model = vqgnn.convert(build("gcn", data), data, "gas", place="host")
    seen = []
    model.convs[0].register_forward_hook(lambda *_: seen.append(len(started)))
    for batch in vqgnn.BatchLoader(data, batch_size=13):
        started.clear()
        for _ in range(2):  # the second pass must not read what the first one read
            model(batch.x, batch.graph)
        assert seen[-2] == 2 and len(started) == 4


def test_state_on_disk_is_read_ahead_and_used_in_place(data, tmp_path, monkeypatch):
    ahead = []
    read_ahead = TransferEngine.read_ahead
    monkeypatch.setattr(
        TransferEngine, "read_ahead", lambda engine, table, n_id: ahead.append(n_id) or read_ahead(engine, table, n_id)
    )
    monkeypatch.setattr(TransferEngine, "pull", None)
    model = vqgnn.convert(build("gcn", data), data, place="disk", folder=tmp_path)
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=13)))
    model(batch.x, batch.graph)
    halos = [csr.halo for csr in batch.graph.csr(model.convs[1].store_use.convolution)]
    assert ahead and all(any(n_id is halo for halo in halos) for n_id in ahead)


def test_state_off_the_device_cannot_follow_the_model(data):
    model = vqgnn.convert(build("gcn", data), data, place="host")
    with pytest.raises(ValueError, match=r"node state on host serves cpu and cannot move to meta"):
        model.to("meta")
    model.double().float()  # dtypes are the model's alone
