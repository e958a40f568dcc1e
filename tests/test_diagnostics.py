"""Measured errors of stored states and gradients, and the bounds of theorem 2 and corollary 3."""

import pytest
import torch
import torch.nn.functional as F
from graphs import awkward_graph, dense_convolution
from test_invariants import CLASSES, FIXED, build
from test_store import assert_same, stored
from torch_geometric.nn import APPNP, DeepGCNLayer, GCNConv, Linear

import vqgnn
from vqgnn.diagnostics import error_bound


@pytest.fixture(params=[False, True], ids=["directed", "undirected"])
def data(request):
    return awkward_graph(undirected=request.param)


def trained(name, data, method, codec, input="auto", steps=3, **options):
    model = build(name, data)
    vqgnn.convert(model, data, method, codec, input=input, **options)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = vqgnn.BatchLoader(data, batch_size=13)
    for _, batch in zip(range(steps), loader, strict=False):
        loss = F.cross_entropy(model(batch.x, batch.graph), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, batch


@pytest.mark.parametrize("input", ["auto", "codes"])
@pytest.mark.parametrize("name", FIXED)
def test_messages_are_within_the_bound(name, input, data):
    model, batch = trained(name, data, "vq", "pq:d=4,k=8", input)
    stores = vqgnn.stores(model).values()
    before = [stored(store) for store in stores]
    found = error_bound(model, data, batch)
    assert [layer.store for layer in found] == list(vqgnn.stores(model))
    for layer in found:
        assert layer.quantisation > 0 and 0 < layer.messages <= layer.bound
    for state, store in zip(before, stores, strict=True):
        assert_same(stored(store), state)
    assert model.training


def test_figures_are_those_of_dense_matrices(data):
    """On the last conv of a model whose stores are stale, from the definitions."""
    model, batch = trained("gcn", data, "gas", "fp32")
    model.eval()
    x = model.convs[0](data.x, data.edge_index).relu()
    x = model.convs[1](x, data.edge_index).relu()
    kept = vqgnn.stores(model)["convs.2"].pull()
    dense = dense_convolution(data, "gcn").float()
    mixed = kept.index_copy(0, batch.n_id, x[batch.n_id])
    last = error_bound(model, data, batch)[-1]
    torch.testing.assert_close(torch.tensor(last.relative_error), (kept - x).norm() / x.norm())
    torch.testing.assert_close(torch.tensor(last.messages), (dense @ (mixed - x))[batch.n_id].norm())
    torch.testing.assert_close(torch.tensor(last.bound), dense.norm() * (kept - x).norm())
    assert last.quantisation == 0  # fp32 rows: all of it is staleness


def sum_loss(data):
    """As the batches' mean of 13 nodes counts each node."""
    return lambda out: F.cross_entropy(out, data.y, reduction="sum") / 13


@pytest.mark.parametrize(("method", "codec"), [("vq", "pq:d=4,k=8"), ("lmc", "int8"), ("gas", "fp32")])
@pytest.mark.parametrize("name", FIXED)
def test_gradients_are_within_the_bound(name, method, codec, data):
    model, batch = trained(name, data, method, codec)
    model.zero_grad()
    before = [stored(store) for store in vqgnn.stores(model).values()]
    for layer in error_bound(model, data, batch, loss=sum_loss(data)):
        assert 0 < layer.gradients <= layer.gradient_bound
        assert layer.relative_error_grad == 1 if method == "gas" else layer.relative_error_grad > 0
    for state, store in zip(before, vqgnn.stores(model).values(), strict=True):
        assert_same(stored(store), state)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(layer.gradients is None for layer in error_bound(model, data, batch))


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_gradients_are_those_of_dense_matrices(place, data, tmp_path):
    """On the last conv, whose messages' gradient is that of the logits times its weights."""
    model = build("gcn", data)
    vqgnn.convert(model, data, "lmc", "fp32", place=place, folder=tmp_path)
    kept = torch.randn(40, model.convs[2].in_channels)
    store = vqgnn.stores(model)["convs.2"]
    store.push(torch.arange(40), store.pull(), kept)
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=13)))
    dense = dense_convolution(data, "gcn").float()
    out = model.eval()(data.x, data.edge_index).detach().requires_grad_()
    (of_logits,) = torch.autograd.grad(sum_loss(data)(out), out)
    g = of_logits @ model.convs[2].lin.weight.detach()
    mixed = kept.index_copy(0, batch.n_id, g[batch.n_id])
    last = error_bound(model, data, batch, loss=sum_loss(data))[-1]
    torch.testing.assert_close(torch.tensor(last.relative_error_grad), (kept - g).norm() / g.norm())
    torch.testing.assert_close(torch.tensor(last.gradients), (dense.t() @ (mixed - g))[batch.n_id].norm())
    torch.testing.assert_close(torch.tensor(last.gradient_bound), dense.norm() * (kept - g).norm())


@pytest.mark.parametrize("name", ["gcn", "gat"])
def test_settled_gradients_have_no_error(name, data):
    """With frozen weights what is stored becomes exact, of an attention too; there no bound is known."""
    options = {"attention_state": "projected"} if name == "gat" else {}
    model = vqgnn.convert(build(name, data), data, "lmc", "fp32", grad=True, **options)
    for _ in range(6):
        for batch in vqgnn.BatchLoader(data, batch_size=13):
            (F.cross_entropy(model(batch.x, batch.graph), batch.y, reduction="sum") / 13).backward()
    for layer in error_bound(model, data, batch, loss=sum_loss(data)):
        assert layer.relative_error_grad < 1e-4 and layer.gradients < 1e-4
        assert (layer.gradient_bound is None) == (name == "gat")


@pytest.mark.parametrize("name", ["gat", "gatv2", "transformer"])
def test_gradients_of_inputs(name, data):
    """Of a batch that is the graph nothing is missing; of a smaller one all that other nodes' messages would send."""
    model = vqgnn.convert(build(name, data), data, "gas")
    for size, missing in ((data.num_nodes, False), (13, True)):
        batch = next(iter(vqgnn.BatchLoader(data, batch_size=size)))
        for layer in error_bound(model, data, batch, loss=sum_loss(data)):
            assert layer.relative_error_grad == 1 and layer.gradient_bound is None
            assert (layer.gradients > 1e-3) == missing and layer.messages < 1e-4


def test_fresh_rows_have_no_error(data):
    model = build("gcn", data)
    vqgnn.convert(model, data, "gas", "fp32")
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=13)))
    for layer in error_bound(model, data, batch):
        assert layer.relative_error < 1e-6 and layer.messages < 1e-5


@pytest.mark.parametrize("state", ["input", "projected"])
@pytest.mark.parametrize("name", ["gat", "gatv2-shared", "gatv2", "transformer"])
def test_attention_has_no_bound(name, state, data):
    model, batch = trained(name, data, "vq", "pq:d=4,k=8", attention_state=state)
    for layer in error_bound(model, data, batch):
        assert layer.bound is None and layer.relative_error > 0
        # with queries of their own, messages do not follow from projected states
        unknown = state == "projected" and name in ("gatv2", "transformer")
        assert layer.messages is None if unknown else layer.messages > 0


def test_every_hop_has_a_bound(data):
    model, batch = trained("cheb", data, "vq", "pq:d=4,k=8")
    found = error_bound(model, data, batch)
    assert [layer.store for layer in found] == [f"convs.{conv}.hops.{hop}" for conv in (1, 2) for hop in (0, 1)]
    assert all(1e-4 < layer.messages <= layer.bound for layer in found)


def test_pygs_own_code_has_states_alone(data):
    model = APPNPNet(data.num_features)
    vqgnn.convert(model, data, "gas", "fp32")
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=13)))
    found = error_bound(model, data, batch, loss=sum_loss(data))
    assert [layer.store for layer in found] == list(vqgnn.stores(model)) and len(found) == 2
    assert all(layer.relative_error < 1e-6 and layer.messages is layer.gradients is None for layer in found)


def test_a_checkpoint_is_named(data):
    layer = DeepGCNLayer(GCNConv(6, 6), torch.nn.LayerNorm(6), torch.nn.ReLU(), block="plain", ckpt_grad=True)
    model = torch.nn.ModuleList([Linear(6, 6), layer])

    def forward(model, batch):
        return model[1](model[0](batch.x), batch.graph)

    vqgnn.convert(model, data, "lmc", "fp32", forward=forward)
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=13)))
    with pytest.raises(ValueError, match="GCNConv runs within a checkpoint"):
        error_bound(model, data, batch, forward, torch.sum)


class APPNPNet(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.lin, self.propagation = torch.nn.Linear(features, CLASSES), APPNP(K=2, alpha=0.1)

    def forward(self, x, edge_index):
        return self.propagation(self.lin(x), edge_index)


def test_a_model_without_stores_is_refused(data):
    model = vqgnn.convert(build("gcn", data), data, "drop")
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=13)))
    with pytest.raises(ValueError, match="GCN reads no store; convert it with method='vq', 'gas' or 'lmc'"):
        error_bound(model, data, batch)
