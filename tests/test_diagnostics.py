"""Measured errors of stored states, and the bound of theorem 2."""

import pytest
import torch
import torch.nn.functional as F
from graphs import awkward_graph, dense_convolution
from test_invariants import CLASSES, FIXED, build
from test_store import assert_same, stored
from torch_geometric.nn import APPNP

import vqgnn
from vqgnn.diagnostics import error_bound


@pytest.fixture(params=[False, True], ids=["directed", "undirected"])
def data(request):
    return awkward_graph(undirected=request.param)


def trained(name, data, method, codec, input="auto", steps=3):
    model = build(name, data)
    vqgnn.convert(model, data, method, codec, input=input)
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


def test_fresh_rows_have_no_error(data):
    model = build("gcn", data)
    vqgnn.convert(model, data, "gas", "fp32")
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=13)))
    for layer in error_bound(model, data, batch):
        assert layer.relative_error < 1e-6 and layer.messages < 1e-5


@pytest.mark.parametrize("name", ["gat", "gatv2-shared", "gatv2", "transformer"])
def test_attention_has_no_bound(name, data):
    model, batch = trained(name, data, "vq", "pq:d=4,k=8")
    for layer in error_bound(model, data, batch):
        assert layer.bound is None and layer.relative_error > 0
        # with queries of their own, messages do not follow from what is stored
        assert layer.messages is None if name in ("gatv2", "transformer") else layer.messages > 0


def test_every_hop_has_a_bound(data):
    model, batch = trained("cheb", data, "vq", "pq:d=4,k=8")
    found = error_bound(model, data, batch)
    assert [layer.store for layer in found] == [f"convs.{conv}.hops.{hop}" for conv in (1, 2) for hop in (0, 1)]
    assert all(1e-4 < layer.messages <= layer.bound for layer in found)


def test_pygs_own_code_has_states_alone(data):
    model = APPNPNet(data.num_features)
    vqgnn.convert(model, data, "gas", "fp32")
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=13)))
    found = error_bound(model, data, batch)
    assert [layer.store for layer in found] == list(vqgnn.stores(model)) and len(found) == 2
    assert all(layer.relative_error < 1e-6 and layer.messages is None for layer in found)


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
