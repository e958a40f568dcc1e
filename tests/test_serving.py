"""New nodes: `new_nodes` against exact inference on the enlarged graph."""

import conv_table
import numpy as np
import pytest
import torch
import torch_geometric.nn as pyg
from graphs import awkward_graph
from torch_geometric.data import Data
from torch_geometric.nn.models import GAT, GCN, GIN, GraphSAGE
from torch_geometric.utils import coalesce

import vqgnn
from vqgnn import datasets, graph_writer, new_nodes, serving
from vqgnn.cli import main
from vqgnn.inference import layerwise
from vqgnn.models import Cheb, Transformer

MODELS = {"gcn": GCN, "sage": GraphSAGE, "gin": GIN, "gat": GAT, "transformer": Transformer}
NEW, KNOWN = 9, 40


@pytest.fixture
def new():
    """Features [9, 6] and edges of new nodes: from known nodes, among themselves, a self loop, one node alone."""
    known = torch.randint(KNOWN, (20,))
    among = torch.randint(NEW - 1, (2, 8)) + KNOWN
    edges = torch.cat([torch.stack([known, torch.randint(NEW - 1, (20,)) + KNOWN]), among], 1)
    return torch.randn(NEW, 6), torch.cat([edges, torch.tensor([[KNOWN], [KNOWN]])], 1).unique(dim=1)


def enlarged(data, x, edges):
    return Data(x=torch.cat([data.x, x]), edge_index=torch.cat([data.edge_index, edges], 1))


def converted(name, data, layers=3, **options):
    model = MODELS[name](6, 8, layers, 3, norm="batch_norm", dropout=0.3).train()
    with torch.no_grad():  # BatchNorm's running figures away from their start
        model(data.x, data.edge_index)
    return vqgnn.convert(model, data, **options)


@pytest.mark.parametrize("input", ["auto", "rows"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_states_give_exact_outputs(name, input, new):
    data = awkward_graph()
    model = converted(name, data, method="gas", input=input)
    before = {key: store.data.clone() for key, store in vqgnn.stores(model).items()}
    out = new_nodes(model, data, *new)
    torch.testing.assert_close(out, layerwise(model, enlarged(data, *new))[KNOWN:], atol=1e-5, rtol=1e-5)
    assert model.training and all(torch.equal(before[key], store.data) for key, store in vqgnn.stores(model).items())


@pytest.mark.parametrize("name", MODELS)
def test_degrees_are_those_of_the_enlarged_graph(name, new):
    """Edges in both directions: known nodes' degrees grow, and a GNN of one layer shows nothing else of that."""
    data = awkward_graph(undirected=True)
    x, edges = new
    edges = torch.cat([edges, edges.flip(0)], 1).unique(dim=1)
    model = converted(name, data, layers=1, method="gas")
    torch.testing.assert_close(
        new_nodes(model, data, x, edges), layerwise(model, enlarged(data, x, edges))[KNOWN:], atol=1e-5, rtol=1e-5
    )


# Of Chebyshev's polynomials, a known node's state depends on how many edges leave it: that is another test's.
GENERIC = [name for name in conv_table.CONVS if name not in ("GCNConv", "SAGEConv", "GINConv", "GATConv", "ChebConv")]


@pytest.mark.parametrize("name", GENERIC)
def test_pygs_own_code_serves_new_nodes(name, new):
    data = awkward_graph()
    model = vqgnn.convert(conv_table.CONVS[name](), data, method="gas")
    states = [store.pull() for store in vqgnn.stores(model).values()]
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=13)))
    before = model.eval()(batch.x, batch.graph)
    edges = [conv.survey.edges for conv in model.modules() if hasattr(conv, "survey")]
    out = new_nodes(model, data, *new)
    assert all(conv.survey.edges is edges.pop(0) for conv in model.modules() if hasattr(conv, "survey"))
    torch.testing.assert_close(out, layerwise(model, enlarged(data, *new))[KNOWN:], atol=1e-5, rtol=1e-5)
    for mine, its in zip(vqgnn.stores(model).values(), states, strict=True):
        assert torch.equal(mine.pull(), its)
    torch.testing.assert_close(model(batch.x, batch.graph), before)  # by the known graph's edges again


@pytest.mark.parametrize(
    "conv",
    [pyg.ARMAConv(6, 3), pyg.APPNP(K=1, alpha=0.1), pyg.GATv2Conv(6, 3), pyg.GraphConv(6, 3)],
    ids=lambda conv: type(conv).__name__,
)
def test_pygs_own_code_knows_the_enlarged_graphs_degrees(conv, new):
    data = awkward_graph()
    x, edges = new
    edges = torch.cat([edges, edges.flip(0)], 1).unique(dim=1)
    vqgnn.convert(conv, data, method="gas")
    torch.testing.assert_close(
        new_nodes(conv, data, x, edges), layerwise(conv, enlarged(data, x, edges))[KNOWN:], atol=1e-5, rtol=1e-5
    )


EDGE_CONVS = {
    "GATConv": lambda: pyg.GATConv(6, 3, edge_dim=3, heads=2),
    "GATv2Conv": lambda: pyg.GATv2Conv(6, 3, edge_dim=3),
    "TransformerConv": lambda: pyg.TransformerConv(6, 3, edge_dim=3),  # PyG's own code
}


@pytest.mark.parametrize("name", EDGE_CONVS)
def test_new_edges_bring_their_features(name, new):
    x, edges = new
    data, attr = awkward_graph(), torch.randn(edges.size(1), 3)
    data.edge_attr = torch.randn(data.num_edges, 3)
    conv = vqgnn.convert(EDGE_CONVS[name](), data, method="gas", input="codes")
    larger = enlarged(data, x, edges)
    larger.edge_attr = torch.cat([data.edge_attr, attr])
    out = new_nodes(conv, data, x, edges, edge_attr=attr)
    torch.testing.assert_close(out, layerwise(conv, larger)[KNOWN:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EDGE_CONVS)
def test_edge_features_that_new_edges_lack_are_named(name, new):
    data = awkward_graph()
    data.edge_attr = torch.randn(data.num_edges, 3)
    conv = vqgnn.convert(EDGE_CONVS[name](), data, method="gas")
    e = new[1].size(1)
    with pytest.raises(ValueError, match=f"{name} takes data.edge_attr, and edge_attr is None; give .* {e} new edges"):
        new_nodes(conv, data, *new)
    with pytest.raises(ValueError, match=rf"edge_attr is \[2, 3\] torch.float32; it must be \[{e}, 3\]"):
        new_nodes(conv, data, *new, edge_attr=torch.randn(2, 3))
    del data.edge_attr
    with pytest.raises(ValueError, match="it must be left out, as data has none"):
        new_nodes(conv, data, *new, edge_attr=torch.randn(e, 3))


@pytest.mark.parametrize("name", ["FastRGCNConv"])
def test_edge_types_that_new_edges_lack_are_named(name, new):
    data = awkward_graph()
    data.edge_type = torch.randint(2, (data.num_edges,))
    conv = vqgnn.convert(getattr(pyg, name)(6, 3, 2), data, method="gas")
    with pytest.raises(ValueError, match=f"{name} takes data.edge_type, which new nodes' edges cannot have yet"):
        new_nodes(conv, data, *new)


@pytest.mark.parametrize("name", MODELS)
def test_codes_agree(name):
    data = awkward_graph(400, 1600)
    x = torch.randn(100, 6)
    edges = torch.stack([torch.randint(400, (500,)), 400 + torch.arange(500) % 100])
    model = converted(name, data, method="vq", codec="pq:d=2,k=64")
    out = new_nodes(model, data, x, edges)
    exact = layerwise(model, enlarged(data, x, edges))[400:]
    assert float((out.argmax(1) == exact.argmax(1)).float().mean()) > 0.85
    assert float((out - exact).norm() / exact.norm()) < 0.2


def test_nodes_without_edges(new):
    data = awkward_graph()
    model = converted("gcn", data, method="gas")
    none = torch.empty(2, 0, dtype=torch.int64)
    out = new_nodes(model, data, new[0], none)
    torch.testing.assert_close(out, layerwise(model, enlarged(data, new[0], none))[KNOWN:], atol=1e-5, rtol=1e-5)


def edges_with(*more):
    return torch.tensor([(0, KNOWN), *more]).t()


BAD = {
    "width": (torch.randn(2, 5), edges_with(), r"x is \[2, 5\].*\[new nodes, 6\]"),
    "none": (torch.randn(0, 6), edges_with(), r"x is \[0, 6\]"),
    "id": (torch.randn(2, 6), edges_with((1, 42)), r"0\.\.42; known are 0\.\.39, new are 40\.\.41"),
    "known": (torch.randn(2, 6), edges_with((1, 2)), "1 edges between known nodes"),
    "shape": (torch.randn(2, 6), torch.zeros(3, 4, dtype=torch.int64), r"\[2, edges\]"),
}


@pytest.mark.parametrize(("x", "edges", "message"), BAD.values(), ids=BAD)
def test_bad_input(x, edges, message):
    data = awkward_graph()
    with pytest.raises(ValueError, match=message):
        new_nodes(converted("gcn", data, method="gas"), data, x, edges)


def test_convs_that_need_the_whole_graph_are_named(new):
    data = awkward_graph()
    with pytest.raises(ValueError, match="ChebHop reads more of the graph than a node's edges"):
        new_nodes(vqgnn.convert(Cheb(6, 8, 2, 3), data), data, *new)


@pytest.mark.parametrize("method", ["drop", "full"])
@pytest.mark.parametrize("build", [lambda: GCN(6, 8, 3, 3), lambda: pyg.APPNP(K=2, alpha=0.1)], ids=["GCN", "APPNP"])
def test_methods_without_states(build, method, new):
    data = awkward_graph()
    with pytest.raises(ValueError, match=r"no states of the known nodes.*vq, gas or lmc"):
        new_nodes(vqgnn.convert(build(), data, method=method), data, *new)


def test_edges_of_a_graph_on_disk(tmp_path):
    data = awkward_graph()
    for k, key in enumerate(datasets.MASKS):
        data[key] = torch.arange(KNOWN) % 3 == k
    saved = graph_writer.save(data, tmp_path / "graph", undirected=False)
    nodes = torch.tensor([0, 3, 17, 38, 39])
    found = coalesce(serving._edges_of(data, nodes)[0])
    assert torch.equal(found, coalesce(data.edge_index[:, torch.isin(data.edge_index, nodes).any(0)]))
    expected = found[:, torch.isin(found[1], nodes)]
    assert 5 < expected.size(1) < found.size(1)
    assert torch.equal(coalesce(serving._edges_of(saved, nodes)[0]), expected)


# The command.

SMALL = ["--hidden", "8", "--layers", "2", "--threads", "1", "--epochs", "1"]


@pytest.fixture
def known_and_new(tmp_path, command_line):
    """Files of a graph with 20 nodes left out, and of those nodes with their edges."""
    whole = datasets.load("generated:n=300,classes=3,features=8").data
    part = whole.subgraph(torch.arange(300) < 280)
    np.savez(tmp_path / "graph.npz", **{key: value.numpy() for key, value in part})
    edges = whole.edge_index[:, (whole.edge_index >= 280).any(0)]
    np.savez(tmp_path / "new.npz", x=whole.x[280:].numpy(), edge_index=edges.numpy())
    return tmp_path


@pytest.mark.parametrize("method", ["vq", "gas", "drop", "mlp"])
def test_command(method, known_and_new, capsys):
    path = known_and_new
    kind = ["--model", "mlp"] if method == "mlp" else ["--method", method]
    run, out = str(path / "run"), path / "pred.npz"
    assert main(["train", "--dataset", str(path / "graph.npz"), *kind, *SMALL, "--out", run]) == 0
    arguments = ["predict", run, "--new", str(path / "new.npz"), "--out", str(out)]
    capsys.readouterr()
    if method == "drop":
        assert main(arguments) == 2
        assert "vq, gas or lmc" in capsys.readouterr().err
        return
    assert main([*arguments, "--inference", "vq"]) == 2 and "leave it out" in capsys.readouterr().err
    logits = []
    for more in ([], ["--refresh"]):
        assert main(arguments + more) == 0
        with np.load(out) as file:
            assert file["pred"].shape == (20,)
            logits.append(file["logits"])
    assert (logits[0] == logits[1]).all() == (method == "mlp")


def test_files_that_do_not_fit(known_and_new, capsys):
    path = known_and_new
    run = str(path / "run")
    assert main(["train", "--dataset", str(path / "graph.npz"), *SMALL, "--out", run]) == 0
    for arrays, word in (
        ({"x": np.ones((2, 8))}, "lacks edge_index"),
        ({"x": np.ones((2, 7)), "edge_index": np.array([[0], [280]])}, "[new nodes, 8]"),
        ({"x": np.ones((2, 8)), "edge_index": np.array([[0], [282]])}, "new are 280..281"),
        ({"x": np.ones((2, 8)), "edge_index": np.zeros((2, 3))}, "float64"),
        ({"x": np.full((2, 8), np.nan), "edge_index": np.array([[0], [280]])}, "NaN"),
    ):
        np.savez(path / "bad.npz", **arrays)
        capsys.readouterr()
        assert main(["predict", run, "--new", str(path / "bad.npz"), "--out", str(path / "pred.npz")]) == 2
        assert word in capsys.readouterr().err


def test_other_tensors_of_new_nodes_are_not_known(new):
    """Only their x is given: a model that takes more is told so, and one that does not runs."""
    data = awkward_graph()
    data.pe = torch.randn(KNOWN, 6)
    model = converted("gcn", data, method="gas")
    with pytest.raises(AttributeError, match=r"new nodes have no 'pe', only x.*put it into data\.x"):
        new_nodes(model, data, *new, forward=lambda model, batch: model(batch.x + batch.pe, batch.graph))
    with pytest.raises(AttributeError, match="a batch has no 'nothing'"):
        new_nodes(model, data, *new, forward=lambda model, batch: model(batch.nothing, batch.graph))
    assert len(new_nodes(model, data, *new)) == NEW


def test_another_graph_than_the_stores_is_named(new):
    data = awkward_graph()
    model, other = converted("gcn", data, method="gas"), awkward_graph(50, 200)
    with pytest.raises(ValueError, match="converted for a graph of 40 nodes and got a batch of one of 50"):
        new_nodes(model, other, new[0], new[1] + 10)
    before = {key: store.data.clone() for key, store in vqgnn.stores(model).items()}
    with pytest.raises(ValueError, match="the store is of 40 nodes and got rows of 50"):
        vqgnn.warmup(model, other)
    assert all(torch.equal(before[key], store.data) for key, store in vqgnn.stores(model).items())


@pytest.mark.parametrize("norm", ["layer_norm", "graph_norm", "pair_norm"])
def test_statistics_over_nodes_are_refused(norm, new):
    data = awkward_graph()
    model = vqgnn.convert(GCN(6, 8, 2, 3, norm=norm), data, method="gas")
    with pytest.raises(ValueError, match="GCN takes statistics over all nodes that it sees"):
        new_nodes(model, data, *new)
    model = vqgnn.convert(GCN(6, 8, 2, 3, norm="layer_norm", norm_kwargs={"mode": "node"}), data, method="gas")
    torch.testing.assert_close(new_nodes(model, data, *new), layerwise(model, enlarged(data, *new))[KNOWN:])
