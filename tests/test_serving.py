"""New nodes: `new_nodes` against exact inference on the enlarged graph."""

import numpy as np
import pytest
import torch
from graphs import awkward_graph
from torch_geometric.data import Data
from torch_geometric.nn.models import GAT, GCN, GIN, EdgeCNN, GraphSAGE
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


@pytest.mark.parametrize(
    ("build", "name"), [(lambda: Cheb(6, 8, 2, 3), "ChebHop"), (lambda: EdgeCNN(6, 8, 2, 3), "EdgeConv")]
)
def test_convs_that_need_the_whole_graph_are_named(build, name, new):
    data = awkward_graph()
    with pytest.raises(ValueError, match=f"the model has {name}, whose edges come from the whole of the known graph"):
        new_nodes(vqgnn.convert(build(), data), data, *new)


@pytest.mark.parametrize("method", ["drop", "full"])
def test_methods_without_states(method, new):
    data = awkward_graph()
    with pytest.raises(ValueError, match=r"no states of the known nodes.*vq, gas or lmc"):
        new_nodes(converted("gcn", data, method=method), data, *new)


def test_edges_of_a_graph_on_disk(tmp_path):
    data = awkward_graph()
    for key in datasets.MASKS:
        data[key] = torch.ones(KNOWN, dtype=torch.bool)
    saved = graph_writer.save(data, tmp_path / "graph", undirected=False)
    nodes = torch.tensor([0, 3, 17, 38, 39])
    expected = coalesce(serving._edges_to(data, nodes))
    assert expected.size(1) > 5
    assert torch.equal(coalesce(serving._edges_to(saved, nodes)), expected)


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
