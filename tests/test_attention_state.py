"""What is kept for an attention: its input, projected where it is read, or the projection."""

import copy
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from graphs import awkward_graph
from test_convert import GATv2, Transformer
from torch_geometric.nn.models import GAT, GCN

import vqgnn
from vqgnn import conversion

N = 200
kinds = pytest.mark.parametrize("build", [GAT, GATv2, Transformer], ids=["gat", "gatv2", "transformer"])


def graph():
    return awkward_graph(N, 900, undirected=True)


def batches(data, size=90):
    return vqgnn.BatchLoader(data, batch_size=size, seed=0)


@kinds
@pytest.mark.parametrize("method, codec", [("gas", None), ("gas", "int8"), ("vq", f"pq:d=2,k={N}")])
@pytest.mark.parametrize("place", ["device", "disk"])
def test_inputs_know_of_no_change_of_the_projection(build, method, codec, place, tmp_path):
    """The attention's own weights change after its states were stored: messages stay right, projected ones do not."""
    data, errors = graph(), {}
    for state in ("input", "projected"):
        torch.manual_seed(0)
        model = build(6, 8, 2, 3, heads=2).eval()
        options = {"place": place, "folder": tmp_path, "attention_state": state}
        vqgnn.convert(model, data, method=method, codec=codec, **options)
        with torch.no_grad():
            for parameter in model.convs[1].parameters():
                parameter.mul_(-0.8)
        truth = vqgnn.inference.layerwise(model, data)
        batch = next(iter(batches(data)))
        with torch.no_grad():
            out = model(batch.x, batch.graph)
        errors[state] = float((out - truth[batch.n_id]).norm() / truth[batch.n_id].norm())
        if state == "input":
            (layer,) = vqgnn.diagnostics.error_bound(model, data, batch)
            assert layer.relative_error < 0.02 and layer.messages < 0.02 * truth[batch.n_id].norm()
    assert errors["input"] < 0.02 and errors["projected"] > 0.2, errors


@kinds
def test_the_projection_learns_from_the_halo(build):
    """A batch's gradient is the whole graph's with the other nodes' inputs held fixed."""
    data = graph()
    torch.manual_seed(0)
    theirs = build(6, 8, 2, 3, heads=2)
    model = vqgnn.convert(copy.deepcopy(theirs), data, method="gas")
    batch = next(iter(batches(data, 40)))
    F.cross_entropy(model(batch.x, batch.graph), batch.y).backward()
    inside = torch.zeros(N, 1, dtype=torch.bool)
    inside[batch.n_id] = True
    hidden = theirs.act(theirs.convs[0](data.x, data.edge_index))
    out = theirs.convs[1](torch.where(inside, hidden, hidden.detach()), data.edge_index)
    F.cross_entropy(out[batch.n_id], batch.y).backward()
    for mine, truth in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, truth.grad, rtol=1e-4, atol=1e-6)


@kinds
@pytest.mark.parametrize("codec, error", [("fp32", 1e-5), ("fp16", 0.1)])
@pytest.mark.parametrize("compiled, kept", [(False, False), (True, False), (False, True)])
def test_pending_gradients_are_exact(build, codec, error, compiled, kept):
    """With frozen weights the same batches, kept in a list or not, give the gradient of the whole graph's loss."""
    data = graph()
    torch.manual_seed(0)
    theirs = build(6, 8, 3, 3, heads=2)
    model = copy.deepcopy(theirs)
    vqgnn.convert(model, data, method="lmc", codec=codec)
    step = torch.compile(model, backend="aot_eager") if compiled else model
    loader = vqgnn.BatchLoader(data, batch_size=45, shuffle=False)
    loader = list(loader) if kept else loader
    for _ in range(40):  # what is pending is a mean over epochs, in which the first ones must have faded
        model.zero_grad()
        for batch in loader:
            F.cross_entropy(step(batch.x, batch.graph), batch.y, reduction="sum").backward()
    F.cross_entropy(theirs(data.x, data.edge_index), data.y, reduction="sum").backward()
    for mine, truth in zip(model.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - truth.grad).norm() <= error * truth.grad.norm() + 1e-4


def test_what_is_left_counts_by_what_comes_again():
    """The mean over epochs that is handed out, times what least squares gave it for the last epoch."""
    store = vqgnn.NodeStore(3, 2, "fp32", grad=False, pending=True)
    ids, mean, share, epochs = torch.arange(3), torch.zeros(6), 1.0, itertools.count()
    for left in ([3, 0, 0, 0, 0, 4], [0, 5, 0, 0, 0, 2], [0, 3, 0, 0, 0, 8], [0, -3, 0, 0, 0, -4], [0] * 6, [0] * 6):
        left = torch.tensor(left, dtype=torch.float32)
        store.leave(ids, left.view(3, 2))
        torch.testing.assert_close(store.collect(ids).flatten(), share * mean)
        store.begin((next(epochs), 0, 0))
        if mean.any():
            share = float(torch.linalg.lstsq(mean[:, None], left[:, None]).solution.clamp(0, 1))
            mean = 0.7 * mean + 0.3 * left
        else:
            mean = left  # there is nothing to compare it with
        torch.testing.assert_close(store.pending_share, torch.tensor(share))
        assert store.stats()["pending_share"] == float(store.pending_share)
    assert "pending_share" in store.state_dict()


def test_a_mean_over_epochs_tells_the_next_one_better_than_the_last():
    """Of gradients that are the same in all epochs, and as much noise."""
    torch.manual_seed(0)
    store, ids = vqgnn.NodeStore(500, 8, "fp32", grad=False, pending=True), torch.arange(500)
    truth = torch.randn(500, 8)
    for epoch in range(20):
        store.leave(ids, last := truth + torch.randn(500, 8))
        store.begin((epoch, 0, 0))
    error = (store.collect(ids) - truth).square().mean()
    best = (0.5 * last - truth).square().mean()  # of the last epoch alone, by least squares
    assert error < 0.5 * best


def test_what_was_left_is_collected_an_epoch_later():
    store = vqgnn.NodeStore(5, 2, "fp32", grad=False, pending=True)
    ids, g = torch.tensor([3, 1]), torch.tensor([[1.0, 2], [3, 4]])

    def batch(visit, left, n_id):
        store.begin(visit)
        store.leave(left, g[: len(left)])
        return store.collect(torch.tensor(n_id))

    def check(collected, *rows):
        torch.testing.assert_close(collected, torch.tensor(rows, dtype=torch.float32))

    check(batch((7, 0, 0), ids, [1, 0, 3]), *[[0, 0]] * 3)
    check(batch((7, 1, 0), ids[:1], [4, 2]), *[[0, 0]] * 2)
    check(batch((9, 0, 0), torch.tensor([0]), [1, 0, 3]), [3, 4], [0, 0], [2, 4])  # and here it is broken off
    store.begin((8, 0, 0))
    store.pending_share.fill_(0.5)
    mean = torch.tensor([[0.3, 0.6], [2.1, 2.8], [0, 0], [1.4, 2.8], [0, 0]])
    check(batch((8, 0, 0), ids[:0], range(5)), *(0.5 * mean).tolist())
    check(batch((8, 1, 0), ids[:0], range(5)), *(0.5 * mean).tolist())
    check(batch(None, ids, range(5)), *(0.5 * mean).tolist())  # it is not known that one is over
    store.begin((8, 0, 0))  # the first batch again: kept batches come round
    store.pending_share.fill_(1.0)
    mean = 0.7 * mean
    mean[ids] += 0.3 * g
    check(batch((8, 0, 0), ids[:0], range(5)), *mean.tolist())
    for codec, nbytes in (("fp32", 8 * 128), ("int4", 4 * 128), ("pq:d=4,k=256", 28), ("pq:d=4,k=256,e=1", 128)):
        plain, kept = (vqgnn.NodeStore(7, 128, codec, grad=False, pending=pending) for pending in (False, True))
        added = sum(table.nbytes for table in kept.tables.values()) - sum(t.nbytes for t in plain.tables.values())
        assert added == 7 * nbytes


@pytest.mark.parametrize("broken", ["break", "continue"])
def test_an_epoch_may_be_broken_off(broken):
    """Later ones are as good as before: each hands out what the whole of the one before has left."""
    data = awkward_graph(400, 2500, undirected=True)
    torch.manual_seed(0)
    theirs = GAT(6, 16, 3, 3, heads=2)
    model = vqgnn.convert(copy.deepcopy(theirs), data, method="lmc", codec="fp32")
    F.cross_entropy(theirs(data.x, data.edge_index), data.y, reduction="sum").backward()
    truth = torch.cat([parameter.grad.flatten() for parameter in theirs.parameters()])
    errors, loader = [], vqgnn.BatchLoader(data, batch_size=40, seed=0)
    for epoch in range(12):
        model.zero_grad()
        for i, batch in enumerate(loader):
            if (epoch, i) == (2, 5):
                if broken == "break":
                    break
                continue
            F.cross_entropy(model(batch.x, batch.graph), batch.y, reduction="sum").backward()
        found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        errors.append(float((found - truth).norm() / truth.norm()))
    assert sum(errors[6:]) / len(errors[6:]) < 0.12, errors  # undisturbed 0.08, without such gradients 0.45


def test_state_beside_a_gpu_has_none(monkeypatch):
    made = []
    monkeypatch.setattr(conversion, "NodeStore", lambda **options: made.append(options["pending"]))
    monkeypatch.setattr(conversion.NodeStore, "size_of", lambda **options: 0, raising=False)
    monkeypatch.setattr(conversion, "TransferEngine", lambda **options: None)
    wanted = [(SimpleNamespace(), "store", {"pending": pending}) for pending in (True, True, False)]
    for device, place, expected in (("cuda", "device", True), ("cpu", "disk", True), ("cuda", "host", False)):
        made.clear()
        with warnings.catch_warnings(record=True) as caught:
            conversion._make_stores(wanted, torch.device(device), torch.device("cpu"), place, None, {})
        assert made == [expected, expected, False]
        assert ["place='host': gradients of an attention" in str(w.message) for w in caught] == [True] * (not expected)


@kinds
@pytest.mark.parametrize("state", ["input", "projected"])
def test_frozen_weights_are_exact(build, state):
    data = graph()
    torch.manual_seed(0)
    model = build(6, 8, 3, 3, heads=2).eval()
    truth = model(data.x, data.edge_index).detach()
    vqgnn.convert(model, data, method="vq", codec=f"pq:d=2,k={N}", input="codes", attention_state=state)
    for size in (N, 13):
        for batch in batches(data, size):
            torch.testing.assert_close(model(batch.x, batch.graph), truth[batch.n_id], rtol=1e-3, atol=1e-4)
    for method in ("exact", "vq", "stale"):
        found = vqgnn.inference.layerwise(model, data, 13, method=method)
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4)


def test_what_is_kept():
    data = awkward_graph(30, 90)

    def kept(build, **options):
        model = vqgnn.convert(build(6, 8, 3, 3), data, **options)
        held = vqgnn.stores(model).values()
        return [(store.dim, store.grad, None if store.pending is None else store.pending.size(1)) for store in held]

    assert kept(GAT, method="gas") == kept(GAT, method="lmc", grad=False) == [(8, False, None), (8, False, None)]
    assert kept(GAT) == kept(GAT, grad=True) == [(8, False, 4), (8, False, 4)]
    assert kept(GAT, codec="pq:d=4,k=16,e=1") == [(8, False, 2), (8, False, 2)]
    assert kept(GAT, codec="pq:d=4,k=16,e=4") == kept(GAT, method="lmc") == [(8, False, 8), (8, False, 8)]
    assert kept(GAT, input="codes")[0] == (6, False, None)  # nothing learns from features' gradients
    assert kept(GAT, attention_state="projected") == [(8, False, None), (3, False, None)]
    assert kept(GAT, grad=True, attention_state="projected") == [(8, True, None), (3, True, None)]
    with pytest.raises(ValueError, match="attention_state='x' is unknown; choose one of input, projected"):
        kept(GAT, attention_state="x")
    for build, method in ((GCN, "vq"), (GAT, "drop")):
        with pytest.raises(ValueError, match=f"no fused attention of {build.__name__} reads.*method='{method}'"):
            kept(build, method=method, attention_state="input")


@pytest.mark.parametrize("v2", [False, True])
def test_limited_attention(v2):
    """Scores move by at most L times what a row does, and vectors within the bound stay."""
    torch.manual_seed(0)
    model = GAT(6, 8, 2, 3, heads=2, v2=v2)
    conv = model.convs[0]
    vectors = [conv.att] if v2 else [conv.att_src, conv.att_dst]
    with torch.no_grad():
        for vector in vectors:
            vector[0, 0] *= 30 / vector[0, 0].norm()
            vector[0, 1] *= 0.5 / vector[0, 1].norm()
    kept = [vector[0, 1].clone() for vector in vectors]
    vqgnn.nn.limit_attention(model, 2.0)
    for vector, small in zip(vectors, kept, strict=True):
        assert vector.norm(dim=-1).flatten().tolist() == pytest.approx([2.0, 0.5])
        assert torch.equal(vector[0, 1], small)


@pytest.mark.parametrize("build, lipschitz", [(GAT, 0.0), (GAT, -1.0), (GCN, 8.0)])
def test_attention_without_a_bound(build, lipschitz):
    with pytest.raises(ValueError, match=f"lipschitz={lipschitz} for a {build.__name__}"):
        vqgnn.nn.limit_attention(build(6, 8, 2, 3), lipschitz)


@kinds
@pytest.mark.parametrize("compiled", [False, True])
def test_features_are_projected_block_by_block(build, compiled, monkeypatch):
    """And dropped alike in both passes, though not kept between them: the gradient is that of blocks that are kept."""
    data, found = graph(), []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.net = torch.nn.Dropout(0.5), build(6, 8, 1, 3, heads=2)

        def forward(self, x, edge_index):
            return self.net(self.drop(x), edge_index)

    monkeypatch.setattr("vqgnn.attention._BLOCK", 6 * 30)
    for keep in (False, True):
        if keep:
            monkeypatch.setattr("vqgnn.attention.checkpoint", lambda run, *args, use_reentrant: run(*args))
        torch.manual_seed(0)
        model = vqgnn.convert(Model(), data, method="gas")
        step = torch.compile(model, backend="aot_eager") if compiled else model
        batch = next(iter(batches(data, 40)))
        assert batch.graph.csr(model.net.convs[0].store_use.convolution)[0].halo.numel() > 60
        F.cross_entropy(step(batch.x, batch.graph), batch.y).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found)


def test_two_forwards_of_a_batch_are_one_visit():
    """Of two losses of one batch, what others have left is handed out once."""
    data = graph()
    torch.manual_seed(0)
    theirs = GAT(6, 8, 2, 3, heads=2)
    model = vqgnn.convert(copy.deepcopy(theirs), data, method="lmc")
    for _ in range(40):
        model.zero_grad()
        for batch in vqgnn.BatchLoader(data, batch_size=45, shuffle=False):
            losses = [F.cross_entropy(model(batch.x, batch.graph), batch.y, reduction="sum") for _ in range(2)]
            sum(losses).backward()
    (2 * F.cross_entropy(theirs(data.x, data.edge_index), data.y, reduction="sum")).backward()
    for mine, truth in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, truth.grad, rtol=1e-3, atol=1e-4)
