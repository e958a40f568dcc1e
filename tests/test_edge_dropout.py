"""BatchLoader(edge_dropout=): which edges a batch lacks, and that all of a batch's views of the graph agree on it."""

import pytest
import torch
import torch_geometric.nn as pyg
from graphs import awkward_graph
from torch_geometric.data import HeteroData
from torch_geometric.nn import GAT, GCN, PNA, GraphSAGE

import vqgnn
from vqgnn import graph_writer
from vqgnn.edge_dropout import EdgeDropout
from vqgnn.graph import BatchGraph, Convolution, Graph
from vqgnn_kernels import CSR

KINDS = [Convolution("gcn"), Convolution("mean"), Convolution("sum"), Convolution("attention")]
ids = pytest.mark.parametrize("convolution", KINDS, ids=lambda c: c.kind)


def dense(csr: CSR, n_id, n: int) -> torch.Tensor:
    """[b, n] of a batch's rows."""
    ends = n_id if csr.halo is None else torch.cat([n_id, csr.halo])
    row = torch.arange(n_id.numel()).repeat_interleave(csr.rowptr.diff())
    out = torch.zeros(n_id.numel(), n)
    weight = torch.ones(csr.col.numel()) if csr.weight is None else csr.weight
    return out.index_put_((row, ends[csr.col.long()]), weight, accumulate=True)


def batch_of(data, n_id, share=0.0, seed=0):
    x = data.x if n_id.numel() == data.num_nodes else data.x[n_id]
    return BatchGraph(Graph.of(data), n_id, x, edge_dropout=EdgeDropout(share, seed) if share else None)


@ids
@pytest.mark.parametrize("undirected", [False, True])
def test_a_batch_agrees_with_its_transpose(convolution, undirected):
    """Within the batch the same edges are dropped; those that leave it stay."""
    data, n_id = awkward_graph(undirected=undirected), torch.arange(0, 40, 3)
    whole = dense(batch_of(data, n_id).csr(convolution)[1], n_id, 40)
    csr, csr_t = batch_of(data, n_id, 0.5).csr(convolution)
    rows, rows_t = dense(csr, n_id, 40), dense(csr_t, n_id, 40)
    torch.testing.assert_close(rows[:, n_id].T, rows_t[:, n_id])
    outside = torch.ones(40, dtype=torch.bool).index_fill(0, n_id, False)
    torch.testing.assert_close(rows_t[:, outside], whole[:, outside])
    assert (rows_t[:, n_id] == 0).sum() > (whole[:, n_id] == 0).sum()


@ids
def test_batches_agree_with_the_whole_graph(convolution):
    """An edge's fate is the epoch's, not the batch's."""
    data = awkward_graph()
    everything = torch.arange(40)
    whole = dense(batch_of(data, everything, 0.4, 7).csr(convolution)[0], everything, 40)
    for n_id in everything[torch.randperm(40)].split(13):
        torch.testing.assert_close(dense(batch_of(data, n_id, 0.4, 7).csr(convolution)[0], n_id, 40), whole[n_id])


@ids
def test_the_mean_over_epochs_is_the_matrix(convolution):
    data = awkward_graph()
    n_id, rounds = torch.arange(40), 400
    graph = batch_of(data, n_id)
    expected = dense(graph.csr(convolution)[0], n_id, 40)
    found = torch.zeros(40, 40)
    loops = torch.eye(40, dtype=torch.bool)
    for seed in range(rounds):
        epoch = dense(batch_of(data, n_id, 0.3, seed * 12345).csr(convolution)[0], n_id, 40)
        torch.testing.assert_close(epoch[loops], expected[loops])  # self loops stay as they are
        found += epoch / rounds
    if convolution.kind == "attention":
        expected = torch.where(loops, expected, 0.7 * expected)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_dropped(share):
    source, target = torch.arange(200).repeat_interleave(200), torch.arange(200).repeat(200)
    between = source != target
    first, second = (EdgeDropout(share, seed).keeps(source, target) for seed in (1, 2))
    assert first[~between].all()
    for kept in (first, second, *first.view(200, 200)[:3], *first.view(200, 200).T[:3]):
        count = kept.numel()
        assert abs(float(kept.float().mean()) - (1 - share)) < 5 * (share * (1 - share) / count) ** 0.5 + 1 / count**0.5
    both = (first & second)[between].float().mean()
    assert abs(float(both) - (1 - share) ** 2) < 0.01, "epochs are independent"
    there, back = first.view(200, 200), first.view(200, 200).T
    off = torch.ones(200, 200).triu(1).bool()
    assert abs(float((there & back)[off].float().mean()) - (1 - share) ** 2) < 0.02, "directions are independent"


@pytest.mark.parametrize("name", ["gat", "pna"])
def test_attention_and_other_convs_get_the_rest(name):
    """In a batch of all nodes they compute what PyG does with the edges that are left."""
    data = awkward_graph()
    if name == "gat":
        theirs = GAT(6, 8, 2, 3, heads=2)
    else:
        theirs = PNA(6, 8, 2, 3, aggregators=["mean", "max"], scalers=["identity"], deg=torch.tensor([2, 9, 9, 9]))
    model = vqgnn.convert(theirs, data, method="full")
    source, target = data.edge_index
    kept = EdgeDropout(0.5, 3).keeps(source, target)
    assert 0 < int((~kept).sum()) < kept.numel()
    expected = model(data.x, data.edge_index[:, kept])
    torch.testing.assert_close(model(data.x, batch_of(data, torch.arange(40), 0.5, 3)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [GCN, GraphSAGE, GAT])
def test_gradients_of_a_whole_batch(kind):
    """Backward goes through the same edges: against finite differences, which see the forward alone."""
    data = awkward_graph(features=3)
    model = vqgnn.convert(kind(3, 8, 2, 3, act="tanh"), data, method="full")
    weights = torch.randn(40, 3)

    def loss():
        return (model(data.x, batch_of(data, torch.arange(40), 0.5, 3)) * weights).sum()

    loss().backward()
    for p in model.parameters():
        direction = torch.randn_like(p)
        direction /= direction.norm()
        with torch.no_grad():
            p += 1e-2 * direction
            up = loss()
            p -= 2e-2 * direction
            down = loss()
            p += 1e-2 * direction
        torch.testing.assert_close((p.grad * direction).sum(), (up - down) / 2e-2, rtol=2e-2, atol=2e-2)


def test_the_input_layer_drops_too():
    """Its C X, which was computed once, has all edges."""
    data, n_id = awkward_graph(), torch.arange(10, 20)
    model = vqgnn.convert(pyg.Sequential("x, graph", [(pyg.GCNConv(6, 4), "x, graph -> x")]), data)
    matrix = dense(batch_of(data, n_id, 0.5).csr(Convolution("gcn"))[0], n_id, 40)
    conv = model[0]
    expected = matrix @ conv.lin(data.x) + conv.bias
    torch.testing.assert_close(model(data.x[n_id], batch_of(data, n_id, 0.5)), expected)
    assert not torch.allclose(model(data.x[n_id], batch_of(data, n_id)), expected)


@pytest.mark.parametrize("method", ["vq", "gas", "lmc", "drop"])
@pytest.mark.parametrize("kind", [GCN, GraphSAGE, GAT])
def test_training_and_exact_inference(method, kind, device):
    data = awkward_graph().to(device)
    codec = "pq:d=4,k=8" if method == "vq" else None
    model = vqgnn.convert(kind(6, 8, 3, 3).to(device), data, method=method, codec=codec)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    loader = vqgnn.BatchLoader(data, 10, edge_dropout=0.5)
    for _ in range(2):
        for batch in loader:
            loss = torch.nn.functional.cross_entropy(model(batch.x, batch.graph), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss.isfinite()
    model.eval()
    out = vqgnn.inference.layerwise(model, data)
    torch.testing.assert_close(out, model(data.x, data.edge_index), rtol=1e-4, atol=1e-5)


def test_seed_and_epoch_decide():
    data = awkward_graph()

    def epochs(seed):
        loader = vqgnn.BatchLoader(data, 40, shuffle=False, seed=seed, edge_dropout=0.5)
        return [batch.graph.csr(Convolution("sum"))[0].col.tolist() for _ in range(2) for batch in loader]

    first = epochs(0)
    assert first == epochs(0) and first[0] != first[1] and first[0] != epochs(1)[0]
    loader = vqgnn.BatchLoader(data, 40, shuffle=False, edge_dropout=0.5)
    loader.set_epoch(1)
    assert next(iter(loader)).graph.csr(Convolution("sum"))[0].col.tolist() == first[1]


def test_a_graph_on_disk(tmp_path):
    data = awkward_graph()
    for name, nodes in (("train_mask", slice(20)), ("val_mask", slice(20, 30)), ("test_mask", slice(30, 40))):
        data[name] = torch.zeros(40, dtype=torch.bool)
        data[name][nodes] = True
    mapped = graph_writer.save(data, tmp_path / "graph", undirected=False)
    n_id = torch.arange(10, 20)
    found, expected = (batch_of(d, n_id, 0.5).csr(Convolution("gcn"))[0] for d in (mapped, data))
    assert torch.equal(dense(found, n_id, 40) > 0, dense(expected, n_id, 40) > 0), "its weights are without duplicates"


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError, match=f"edge_dropout={share} must be a share of the edges, 0 or more and below 1"):
        vqgnn.BatchLoader(awkward_graph(), edge_dropout=share)


def test_what_cannot_drop_says_so():
    with pytest.raises(ValueError, match=r"edge_dropout=0\.5 is for Data, and data is a HeteroData; leave it out"):
        vqgnn.BatchLoader(HeteroData(), edge_dropout=0.5)
    for conv, which in (
        (pyg.ChebConv(6, 3, 3), "ChebConv"),
        (pyg.SGConv(6, 3), "a conv that weighs the edges itself"),
    ):
        data = awkward_graph(undirected=True)
        model = vqgnn.convert(pyg.Sequential("x, graph", [(conv, "x, graph -> x")]), data)
        with pytest.raises(ValueError, match=rf"edge_dropout=0\.5 is not for {which}"):
            for batch in vqgnn.BatchLoader(data, edge_dropout=0.5):
                model(batch.x, batch.graph)
