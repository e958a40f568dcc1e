"""Section 7 of the design: what must hold for every method. Number 6 is in the tests of the ops."""

import copy
import hashlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from graphs import random_graph
from torch_geometric.nn import models
from torch_geometric.utils import to_dense_adj

import vqgnn
from vqgnn.graph import Graph
from vqgnn.models import Cheb, Transformer
from vqgnn.store_conv import StoreConv
from vqgnn_kernels import aggregate

FIXED = {"gcn": models.GCN, "sage": models.GraphSAGE, "gin": models.GIN}  # convolutions
ATTENTIONS = {
    "gat": models.GAT,
    "gatv2": partial(models.GAT, v2=True),
    "gatv2-shared": partial(models.GAT, v2=True, share_weights=True),
    "transformer": partial(Transformer, beta=True),
}
MODELS = {**FIXED, **ATTENTIONS, "cheb": Cheb}
METHODS = ("vq", "gas", "lmc", "drop", "full")
LAYERS, HIDDEN, CLASSES = 3, 10, 4


@pytest.fixture(params=["directed", "undirected"])
def data(request):
    return random_graph(undirected=request.param == "undirected", classes=CLASSES)


def build(name, data, **options):
    options = {"norm": None, "dropout": 0.0, **options}
    if name in ATTENTIONS:
        options["heads"] = 2
    return MODELS[name](data.num_features, HIDDEN, LAYERS, CLASSES, **options)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def depth(model):
    """How many times a converted model asks neighbours."""
    return sum(isinstance(module, StoreConv) for module in model.modules())


def sum_loss(out, y):
    return F.cross_entropy(out, y, reduction="sum")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_1_batch_of_the_whole_graph_is_pyg(name, method, data):
    ours = build(name, data, norm="batch_norm")
    pyg = copy.deepcopy(ours)
    vqgnn.convert(ours, data, method=method)
    (batch,) = vqgnn.BatchLoader(data, batch_size=data.num_nodes)
    out, expected = ours(batch.x, batch.graph), pyg(data.x, data.edge_index)
    loss, expected_loss = sum_loss(out, batch.y), sum_loss(expected, data.y)
    loss.backward()
    expected_loss.backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)
    for mine, truth in zip(gradients(ours), gradients(pyg), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["gas", "lmc"])
@pytest.mark.parametrize("name", MODELS)
def test_2_frozen_weights_reach_the_full_output(name, method, data):
    model = build(name, data)
    expected = model(data.x, data.edge_index)
    vqgnn.convert(model, data, method=method, codec="fp32", fill=False)
    loader = vqgnn.BatchLoader(data, batch_size=11, seed=1)
    first = None
    for _ in range(depth(model)):  # the store's last layer is right one sweep after the layer below it
        for batch in loader:
            out = model(batch.x, batch.graph)
            first = (out - expected[batch.n_id]).abs().max() if first is None else first
            sum_loss(out, batch.y).backward()
    assert first > 1e-2, "an empty store must show, or this test proves nothing"
    for batch in loader:
        torch.testing.assert_close(model(batch.x, batch.graph), expected[batch.n_id], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, state", [*((name, None) for name in MODELS), *((name, "projected") for name in ATTENTIONS)]
)
def test_3_batch_gradients_add_up_to_the_full_gradient(name, state, data):
    model = build(name, data)
    pyg = copy.deepcopy(model)
    sum_loss(pyg(data.x, data.edge_index), data.y).backward()
    pending = name in ATTENTIONS and state is None  # exact where batches stay the same
    loader = vqgnn.BatchLoader(data, batch_size=11, seed=1, shuffle=not pending)

    def epoch_gradient(method):
        vqgnn.convert(model, data, method=method, codec="fp32", grad=method == "lmc", attention_state=state)
        # states settle upwards, then gradients downwards; of what is pending the first epochs fade from the mean
        for _ in range((15 if pending else 2) * depth(model)):
            model.zero_grad()
            for batch in loader:
                sum_loss(model(batch.x, batch.graph), batch.y).backward()
        return gradients(model)

    for mine, truth in zip(epoch_gradient("lmc"), gradients(pyg), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-3)
    wrong = max((m - t).abs().max() for m, t in zip(epoch_gradient("gas"), gradients(pyg), strict=True))
    assert wrong > 1e-1, "without gradient rows the sum must be biased"


@pytest.mark.parametrize("name", MODELS)
def test_4_vq_is_exact_with_a_code_for_every_row(name, data):
    model = build(name, data)
    expected = model(data.x, data.edge_index)
    vqgnn.convert(model, data, method="vq", codec=f"pq:d=4,k={data.num_nodes}")
    model.eval()
    for batch in vqgnn.BatchLoader(data, batch_size=11):
        torch.testing.assert_close(model(batch.x, batch.graph), expected[batch.n_id], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vqgnn.inference.layerwise(model, data, method="vq"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("branch_dim,num_codes", [(2, 16), (4, 8), (4, 1)])
@pytest.mark.parametrize("name", FIXED)
def test_5_theorem_2_and_corollary_3(name, branch_dim, num_codes, data):
    """Errors of messages and of back-propagated gradients stay below eps |C|_F |X|_F and eps |C|_F |G|_F (W = I)."""
    n, b = data.num_nodes, 20
    model = build(name, data)
    vqgnn.convert(model, data, method="vq", codec=f"pq:d={branch_dim},k={num_codes}", fill=False)
    conv = model.convs[1]
    store = conv.store_use.store
    x, g = torch.randn(n, HIDDEN).relu(), torch.randn(n, HIDDEN)
    for _ in range(3):
        store.push(torch.arange(n), x, g)
    x_read = store.pull()
    g_read = store.pull_gradients()
    edges, weight = conv.store_use.convolution.edges(Graph.of(data))
    dense = to_dense_adj(edges, edge_attr=weight, max_num_nodes=n)[0].T  # C[target, source]

    n_id = torch.randperm(n)[:b]
    csr, csr_t = vqgnn.BatchGraph(Graph.of(data), n_id, data.x[n_id]).csr(conv.store_use.convolution)
    x_b = x[n_id].clone().requires_grad_()
    messages = aggregate(x_b, csr, store.rows, csr_t, store.grad_rows, grad_basis=store.grad_basis)
    messages.backward(g[n_id])

    error = (messages - dense[n_id] @ x).norm()
    bound = (x - x_read).norm() / x.norm() * dense.norm() * x.norm()
    assert 1e-4 < error <= bound
    error = (x_b.grad - (dense.T @ g)[n_id]).norm()
    bound = (g - g_read).norm() / g.norm() * dense.norm() * g.norm()
    assert 1e-4 < error <= bound


def fingerprint(model):
    digest = hashlib.sha256()
    tensors = [*model.state_dict().values()]
    for store in vqgnn.stores(model).values():
        tensors += [t for t in store.state_dict().values()]
    for tensor in tensors:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train(model, optimizer, data, epochs):
    loader = vqgnn.BatchLoader(data, batch_size=13, seed=3)
    losses = []
    for epoch in epochs:
        loader.set_epoch(epoch)
        torch.manual_seed(epoch)
        for batch in loader:
            optimizer.zero_grad()
            loss = sum_loss(model(batch.x, batch.graph), batch.y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["gcn", "gat", "gatv2"])
@pytest.mark.parametrize("method", ["vq", "gas", "lmc"])
def test_7_resumed_training_goes_on_bit_for_bit(name, method, data, tmp_path):
    codec = "pq:d=4,k=8" if method == "vq" else "int8"

    def fresh():
        torch.manual_seed(5)
        model = vqgnn.convert(
            build(name, data, norm="batch_norm", dropout=0.3), data, method, codec, grad=method != "gas"
        )
        return model, torch.optim.Adam(model.parameters(), 1e-2)

    model, optimizer = fresh()
    train(model, optimizer, data, [0, 1])
    stores = {name: store.state_dict() for name, store in vqgnn.stores(model).items()}
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "stores": stores}, tmp_path / "c.pt")
    uninterrupted = train(model, optimizer, data, [2, 3])

    resumed, optimizer = fresh()
    checkpoint = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for name, store in vqgnn.stores(resumed).items():
        store.load_state_dict(checkpoint["stores"][name])
    assert train(resumed, optimizer, data, [2, 3]) == uninterrupted
    assert fingerprint(resumed) == fingerprint(model)


@pytest.mark.parametrize("name", ["gcn", "gat"])
@pytest.mark.parametrize("inference", ["exact", "vq", "stale"])
def test_8_evaluation_leaves_the_training_state_alone(name, inference, data):
    model = vqgnn.convert(build(name, data, norm="batch_norm", dropout=0.5), data, codec="pq:d=4,k=8")
    train(model, torch.optim.Adam(model.parameters(), 1e-2), data, [0])
    before, modes = fingerprint(model), [m.training for m in model.modules()]
    vqgnn.inference.layerwise(model, data, batch_size=17, method=inference)
    assert fingerprint(model) == before
    assert [m.training for m in model.modules()] == modes
