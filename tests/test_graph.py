import pytest
import torch
from graphs import awkward_graph, dense_convolution, dense_rows
from torch_geometric.data import Data
from torch_geometric.nn.models import GAT, GCN, GIN, GraphSAGE

import vqgnn
from vqgnn import BatchGraph, Convolution, Graph
from vqgnn import graph as graph_module
from vqgnn.sparse_rows import SparseRows

CONVOLUTIONS = [
    Convolution("gcn"),
    Convolution("gcn", improved=True),
    Convolution("gcn", add_self_loops=False),
    Convolution("gcn", normalize=False, add_self_loops=False),
    Convolution("mean"),
    Convolution("sum"),
]
GRAPHS = [
    pytest.param({"undirected": u, "weighted": w}, id=f"{'un' if u else ''}directed{'-weighted' if w else ''}")
    for u in (False, True)
    for w in (False, True)
]


def truth(data, convolution):
    return dense_convolution(
        data, convolution.kind, convolution.normalize, convolution.add_self_loops, convolution.improved
    )


@pytest.mark.parametrize("b", [1, 7, 39, 40])
@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_batch_slices_are_rows_of_the_dense_matrix(convolution, kind, b):
    data = awkward_graph(**kind)
    expected = truth(data, convolution)
    n_id = torch.randperm(40)[:b]
    forward, backward = BatchGraph(Graph(data), n_id, data.x[n_id]).csr(convolution)
    torch.testing.assert_close(dense_rows(forward, n_id, 40), expected[n_id], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(dense_rows(backward, n_id, 40), expected.t()[n_id], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", GRAPHS)
def test_whole_batch_has_no_halo(kind):
    data = awkward_graph(**kind)
    graph = Graph(data)
    batch = BatchGraph(graph, torch.arange(40), data.x)
    assert batch.whole
    for csr, expected in zip(batch.csr(Convolution("gcn")), (truth(data, Convolution("gcn")),) * 2, strict=True):
        assert csr.halo.numel() == 0 and csr.col.max() < 40
        expected = expected if csr is batch.csr(Convolution("gcn"))[0] else expected.t()
        torch.testing.assert_close(dense_rows(csr, batch.n_id, 40), expected, atol=1e-6, rtol=1e-6)


def test_undirected_graphs_are_sliced_once():
    shared = Graph(awkward_graph(undirected=True)).matrix(Convolution("mean"))
    assert shared.symmetric_structure and shared.rowptr_t is shared.rowptr and shared.col_t is shared.col
    assert not torch.equal(shared.weight, shared.weight_t)
    assert not Graph(awkward_graph()).matrix(Convolution("mean")).symmetric_structure


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_product_is_c_x(convolution, monkeypatch):
    monkeypatch.setattr(graph_module, "_CHUNK", 7)  # several chunks, the last one short
    data = awkward_graph(weighted=True)
    graph = Graph(data)
    expected = (truth(data, convolution) @ data.x.double()).float()
    torch.testing.assert_close(graph.product(convolution), expected, atol=1e-5, rtol=1e-5)
    assert graph.product(convolution) is graph.product(convolution)
    n_id = torch.tensor([39, 3, 0])
    batch = BatchGraph(graph, n_id, data.x[n_id])
    torch.testing.assert_close(batch.input_messages(convolution), expected[n_id], atol=1e-5, rtol=1e-5)


def bags_of_words(filled=(1, 2), words=200):
    """The first 20 nodes have filled[0] words each, the others filled[1]."""
    data = awkward_graph(weighted=True)
    data.x = torch.zeros(40, words)
    for node in range(40):
        data.x[node, torch.randperm(words)[: filled[node // 20]]] = torch.rand(filled[node // 20]) + 0.5
    return data


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_product_of_bags_of_words_is_kept_without_zeros(convolution, monkeypatch):
    monkeypatch.setattr(graph_module, "_CHUNK", 7)
    data = bags_of_words()
    expected = (truth(data, convolution) @ data.x.double()).float()
    graph = Graph(data)
    product = graph.product(convolution)
    assert product.value.numel() == expected.count_nonzero() < expected.numel() / 8
    for rows in (
        slice(None),
        slice(3, 11),
        slice(40, 40),
        torch.tensor([39, 3, 3, 0]),
        torch.empty(0, dtype=torch.int64),
    ):
        torch.testing.assert_close(product[rows], expected[rows], atol=1e-5, rtol=1e-5)
    n_id = torch.tensor([39, 3, 0])
    messages = BatchGraph(graph, n_id, data.x[n_id]).input_messages(convolution)
    torch.testing.assert_close(messages, expected[n_id], atol=1e-5, rtol=1e-5)
    assert graph.product(convolution) is product
    whole = BatchGraph(graph, torch.arange(40), data.x).input_messages(convolution)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    assert BatchGraph(graph, torch.arange(40), data.x).input_messages(convolution) is whole


def test_zeros_are_kept_where_they_are_few():
    """Whatever the order of the nodes: here the first half has one word, the others a fifth of all."""
    assert isinstance(Graph(bags_of_words((1, 40))).product(Convolution("gcn")), torch.Tensor)


@pytest.mark.parametrize("model", [GCN, GraphSAGE, GIN])
def test_training_on_bags_of_words(model, monkeypatch):
    """Losses, weights and inference are those of the same features with their zeros kept."""

    def train():
        torch.manual_seed(0)
        data, net = bags_of_words(), model(200, 8, 3, 3)
        vqgnn.convert(net, data, codec="pq:d=4,k=16")
        optimizer, losses = torch.optim.Adam(net.parameters(), 0.01), []
        for epoch in range(2):
            for batch in vqgnn.BatchLoader(data, 10, seed=epoch):
                optimizer.zero_grad()
                loss = net(batch.x, batch.graph).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return Graph.of(data).product, losses, vqgnn.inference.layerwise(net, data, 7)

    product, losses, out = train()
    kind = {GCN: "gcn", GraphSAGE: "mean", GIN: "sum"}[model]
    assert isinstance(product(Convolution(kind)), SparseRows)
    monkeypatch.setattr(graph_module, "_FILLED", 0)
    product, losses_dense, out_dense = train()
    assert isinstance(product(Convolution(kind)), torch.Tensor)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(losses_dense), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, out_dense, atol=1e-5, rtol=1e-5)


def test_graph_is_built_once_and_again_when_a_tensor_is_replaced():
    data = awkward_graph(weighted=True)
    graph = Graph.of(data)
    assert Graph.of(data) is graph
    for key in ("x", "edge_index", "edge_weight"):
        data[key] = data[key].clone()
        assert Graph.of(data) is not graph, key
        graph = Graph.of(data)
    del data.edge_weight
    assert Graph.of(data).edge_weight is None


def test_double_weights_are_cast():
    data = awkward_graph(weighted=True)
    data.edge_weight = data.edge_weight.double()
    for convolution in CONVOLUTIONS[2:4]:
        weight = Graph(data).matrix(convolution).weight
        assert weight.dtype == torch.float32


def test_a_graph_without_edges():
    data = Data(x=torch.randn(3, 2), edge_index=torch.empty(2, 0, dtype=torch.int64))
    torch.testing.assert_close(Graph(data).product(Convolution("gcn")), data.x)
    assert not Graph(data).product(Convolution("mean"))[:].any()
    assert not Graph(data).product(Convolution("sum"))[:].any()


X, EDGES = torch.randn(3, 2), torch.tensor([[0, 1], [1, 2]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(x=X, edge_index=EDGES.t()[:1]), r"data.edge_index must be a \[2, num_edges\] tensor, got .*1, 2"),
        (Data(x=X), "data.edge_index must be .*NoneType"),
        (Data(edge_index=EDGES, num_nodes=3), r"data.x must be \[num_nodes=3, features\], got None"),
        (Data(x=X[0], edge_index=EDGES), "data.x must be"),
        (Data(x=X.double(), edge_index=EDGES), "data.x must be float32, got torch.float64"),
        (Data(x=X, edge_index=EDGES.int()), "data.edge_index must be int64, got torch.int32"),
        (Data(x=X, edge_index=EDGES + 1), r"data.edge_index holds node ids 1..3, allowed are 0..2"),
        (Data(x=X, edge_index=EDGES - 1), r"data.edge_index holds node ids -1..1, allowed are 0..2"),
        (
            Data(x=X, edge_index=EDGES, edge_weight=torch.ones(3)),
            r"data.edge_weight must be \[num_edges=2\], got \[3\]",
        ),
        (Data(x=X, edge_index=EDGES, edge_weight=torch.ones(2, 1)), r"data.edge_weight must be .*got \[2, 1\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_data_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        Graph(data)


@pytest.mark.parametrize("change", ["features", "edges", "weights"])
def test_changes_in_place_are_seen(change):
    data = awkward_graph(weighted=True)
    model = vqgnn.convert(GCN(6, 8, 2, 3), data, method="full")
    loader = vqgnn.BatchLoader(data, batch_size=10)
    before = Graph.of(data)
    list(loader)
    vqgnn.inference.layerwise(model, data)
    assert Graph.of(data) is before
    if change == "features":
        data.x[:10] = 0
    elif change == "edges":
        data.edge_index[:, :30] = 0
    else:
        data.edge_weight[:30] = 5
    assert Graph.of(data) is not before
    truth = model(data.x, data.edge_index, data.edge_weight)
    torch.testing.assert_close(vqgnn.inference.layerwise(model, data), truth.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"changed in place after this BatchLoader was made.*make a new one"):
        next(iter(loader))


@pytest.mark.parametrize(
    "name, build",
    [
        ("x", lambda: GCN(6, 8, 2, 3)),
        ("edge_weight", lambda: GCN(6, 8, 2, 3)),
        ("edge_attr", lambda: GAT(6, 8, 2, 3, edge_dim=4)),
    ],
)
def test_what_cannot_be_learnt(name, build):
    data = awkward_graph(weighted=True)
    data.edge_attr = torch.rand(data.num_edges, 4)
    data[name] = torch.nn.Parameter(data[name])
    with pytest.raises(ValueError, match=f"{name} requires a gradient.*detach"):
        model = vqgnn.convert(build(), data, method="full")
        for batch in vqgnn.BatchLoader(data):
            model(batch.x, batch.graph)


def test_features_that_are_a_slice_are_copied_once():
    data = awkward_graph(features=12)
    data.x = data.x[:, :6]
    graph = Graph.of(data)
    assert graph.features is graph.features and graph.features.data.is_contiguous()
    assert torch.equal(graph.features.data, data.x)
