"""Models as PyG publishes them, converted by one call: they train, and exact inference is PyG's full-graph output."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from graphs import awkward_graph
from torch import nn
from torch_geometric.nn import models

import vqgnn
from vqgnn.inference import layerwise

DEGREES = torch.tensor([2, 6, 9, 10, 7, 4, 2])  # a histogram, which PNA takes its scales from
METHODS = {"vq": {"codec": "pq:d=4,k=8"}, "gas": {}}


class DeeperGCN(nn.Module):
    """Pre-activation residual blocks of GENConv, put together as PyG's documentation of DeepGCNLayer does."""

    def __init__(self, checkpointed=False, dropout=0.1):
        super().__init__()
        self.encode, self.decode, self.dropout = nn.Linear(6, 8), nn.Linear(8, 3), dropout
        self.layers = nn.ModuleList(
            pyg.DeepGCNLayer(
                pyg.GENConv(8, 8, aggr="softmax", learn_t=True, num_layers=2, norm="layer"),
                nn.LayerNorm(8), nn.ReLU(inplace=True), block="res+", dropout=dropout, ckpt_grad=checkpointed,
            )
            for _ in range(3)
        )  # fmt: skip

    def forward(self, x, edge_index):
        first = self.layers[0]
        x = first.conv(self.encode(x), edge_index)
        for layer in self.layers[1:]:
            x = layer(x, edge_index)
        x = F.dropout(first.act(first.norm(x)), self.dropout, self.training)
        return self.decode(x)


class Jumping(nn.Module):
    """Checkpointed convs whose outputs the last layer adds up; autograd does not see them while they are surveyed."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(
            pyg.DeepGCNLayer(pyg.GCNConv(8, 8), nn.LayerNorm(8), nn.ReLU(), block="plain", ckpt_grad=True)
            for _ in range(2)
        )

    def forward(self, x, edge_index):
        x, outs = self.encode(x), []
        for layer in self.layers:
            x = layer(x, edge_index)
            outs.append(x)
        return self.decode(sum(outs))


class Residual(nn.Module):
    """A linear path beside every conv, then a norm: as strong baselines are built."""

    def __init__(self, conv, norm):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 8), nn.Linear(8, 3)
        self.convs = nn.ModuleList(conv(8, 8) for _ in range(2))
        self.lins = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norms = nn.ModuleList(norm(8) for _ in range(2))

    def forward(self, x, edge_index):
        x = F.dropout(self.encode(x), 0.3, self.training)
        for conv, lin, norm in zip(self.convs, self.lins, self.norms, strict=True):
            x = F.dropout(norm(conv(x, edge_index) + lin(x)).relu(), 0.3, self.training)
        return self.decode(x)


class Centred(nn.Module):
    """Statistics over nodes, in the model's own code."""

    def __init__(self):
        super().__init__()
        self.first, self.last = pyg.GCNConv(6, 8), pyg.GCNConv(8, 3)

    def forward(self, x, edge_index):
        x = self.first(x, edge_index)
        return self.last((x - x.mean(0)).relu(), edge_index)


def sequential():
    return pyg.Sequential("x, edge_index", [
        (nn.Dropout(0.5), "x -> x"),
        (pyg.GCNConv(6, 8), "x, edge_index -> x1"), nn.ReLU(inplace=True),
        (pyg.GCNConv(8, 8), "x1, edge_index -> x2"), nn.ReLU(inplace=True),
        (lambda x1, x2: [x1, x2], "x1, x2 -> xs"),
        (pyg.JumpingKnowledge("cat", 8, num_layers=2), "xs -> x"),
        nn.Linear(16, 3),
    ])  # fmt: skip


def gnn(name, **options):
    return lambda: getattr(models, name)(6, 8, 3, 3, dropout=0.1, **options)


MODELS = {
    **{name: gnn(name) for name in ("GCN", "GraphSAGE", "GIN", "EdgeCNN")},
    "GAT": gnn("GAT", heads=2),
    "GATv2": gnn("GAT", v2=True, residual=True),
    "PNA": gnn("PNA", aggregators=["mean", "min", "max", "std"], scalers=["identity", "amplification"], deg=DEGREES),
    **{f"GCN, jk={jk}": gnn("GCN", jk=jk) for jk in ("cat", "max", "lstm")},
    "GCN, batch_norm": gnn("GCN", norm="batch_norm"),
    "GCN, layer_norm of a node": gnn("GCN", norm="layer_norm", norm_kwargs={"mode": "node"}),
    "DeepGCNLayer": DeeperGCN,
    "DeepGCNLayer, checkpointed": lambda: DeeperGCN(checkpointed=True),
    "DeepGCNLayer, plain, summed": Jumping,
    "residual SAGE": lambda: Residual(pyg.SAGEConv, pyg.BatchNorm),
    "residual GATv2": lambda: Residual(pyg.GATv2Conv, nn.LayerNorm),
    "Sequential": sequential,
}
# statistics over the nodes that they see, in evaluation too
OVER_NODES = {
    **{norm: gnn("GCN", norm=norm) for norm in ("layer_norm", "graph_norm", "pair_norm", "instance_norm")},
    "batch_norm without running statistics": gnn(
        "GraphSAGE", norm="batch_norm", norm_kwargs={"track_running_stats": False}
    ),
    "graph_norm in GIN's MLP": lambda: Residual(
        lambda i, o: pyg.GINConv(models.MLP([i, o, o], norm="graph_norm")), nn.LayerNorm
    ),
    "graph_norm after messages": lambda: pyg.GINEConv(models.MLP([6, 8, 3], norm="graph_norm"), edge_dim=2),
    "MeanSubtractionNorm": lambda: Residual(pyg.GATConv, lambda _: pyg.MeanSubtractionNorm()),
    "x.mean(0)": Centred,
}


@pytest.fixture
def data():
    return awkward_graph()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def one_batch(data):
    return next(iter(vqgnn.BatchLoader(data, batch_size=20, prefetch=0)))


def trained(build, data, method):
    """A model after an epoch, and PyG's output for the whole graph with its weights."""
    theirs = build()
    model = vqgnn.convert(copy.deepcopy(theirs), data, method=method, **METHODS[method])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for batch in vqgnn.BatchLoader(data, batch_size=20, prefetch=0):
        loss = F.cross_entropy(model(batch.x, batch.graph), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), theirs.parameters(), strict=True)
               if p.grad is not None and p.grad.any())  # fmt: skip
    theirs.load_state_dict(model.state_dict())
    more = [data.edge_attr] if isinstance(theirs, pyg.GINEConv) else []
    return model, theirs.eval()(data.x, data.edge_index, *more).detach()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_trains_and_infers_exactly(name, method, data):
    model, expected = trained(MODELS[name], data, method)
    torch.testing.assert_close(layerwise(model, data, 13), expected, atol=1e-4, rtol=1e-4)
    other = vqgnn.convert(MODELS[name](), data, method="drop")
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(layerwise(other, data, 40), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OVER_NODES)
def test_statistics_over_nodes_need_all_of_them_at_once(name, data, monkeypatch):
    if name == "graph_norm after messages":
        data.edge_attr = torch.randn(data.num_edges, 2)
    model, expected = trained(OVER_NODES[name], data, "gas")
    monkeypatch.setattr(vqgnn.inference, "_BATCH", 13)
    torch.testing.assert_close(layerwise(model, data), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"batch_size=13 splits the 40 nodes.*leave batch_size out.*BatchNorm"):
        layerwise(model, data, 13)
    layerwise(model, data, 13, method="stale")  # as in training, of the batch's own nodes


def test_statistics_over_nodes_show_where_all_features_are_alike(data):
    data.x = torch.ones(40, 6)
    model = vqgnn.convert(Centred(), data, method="full")
    with pytest.raises(ValueError, match="batch_size=13 splits"):
        layerwise(model, data, 13)


def test_checkpointed_convs_have_the_same_gradients(data):
    model = vqgnn.convert(DeeperGCN(dropout=0.0), data, method="lmc", grad=True)
    other = vqgnn.convert(DeeperGCN(checkpointed=True, dropout=0.0), data, method="lmc", grad=True)
    other.load_state_dict(model.state_dict())
    vqgnn.inference.warmup(other, data)
    for batch in vqgnn.BatchLoader(data, batch_size=20, prefetch=0):
        for m in (model, other):
            F.cross_entropy(m(batch.x, batch.graph), batch.y).backward()
    for mine, its in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.LINKX(40, 6, 8, 3, 2), "SparseLinear takes no rows of nodes.*into data.x"),
        (
            lambda: models.PMLP(6, 8, 3, 3),
            "SimpleConv is called twice in one forward; give each call a conv of its own",
        ),
        (lambda: models.GraphUNet(6, 8, 3, 2), r"edge_index.*into a transform.*before vqgnn\.convert"),
    ],
    ids=["LINKX", "PMLP", "GraphUNet"],
)
def test_what_cannot_run_on_batches_says_what_to_do(build, message, data):
    with pytest.raises(ValueError, match=message):
        vqgnn.convert(build(), data)


def test_edge_tensors_that_a_conv_cannot_take_are_named(data):
    data.edge_attr = torch.randn(data.num_edges, 2)
    with pytest.raises(ValueError, match=r"GENConv.*given data\.edge_attr.*delete it from data if the model does not"):
        vqgnn.convert(DeeperGCN(), data)


@pytest.mark.parametrize("first", ["convert", "compile"])
def test_a_compiled_model_is_the_eager_one(first, data):
    """In either order; the passes of exact inference run eagerly and compile nothing."""
    torch._dynamo.reset()
    model = models.GCN(6, 8, 2, 3)
    expected = model(data.x, data.edge_index).detach()
    if first == "convert":
        vqgnn.convert(model, data, method="gas")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if first == "compile":
        vqgnn.convert(compiled, data, method="gas")
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(layerwise(compiled, data, 13), expected)
    assert not torch._dynamo.utils.counters["stats"]
    batch = one_batch(data)
    torch.testing.assert_close(compiled(batch.x, batch.graph), expected[batch.n_id])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
