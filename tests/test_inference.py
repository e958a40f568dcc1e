import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import awkward_graph
from torch import nn
from torch_geometric.nn.models import GAT, GCN, GIN, GraphSAGE

import vqgnn
from vqgnn import inference
from vqgnn.inference import layerwise

MODELS = [GCN, GraphSAGE, GIN, GAT]


@pytest.fixture
def data():
    return awkward_graph()


class Encoded(nn.Module):
    """An MLP before the first conv and input dropout: no conv sees the features themselves."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 8), nn.ReLU())
        self.gnn = GraphSAGE(8, 8, 2, 3)

    def forward(self, x, graph):
        return self.gnn(self.encoder(x), graph)


class InputDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.gnn = GCN(6, 8, 3, 3)

    def forward(self, x, graph):
        return self.gnn(F.dropout(x, 0.5, self.training), graph)


def with_statistics(model, data):
    """BatchNorm's running figures away from their start."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(data.x, data.edge_index)
    return model


def exact(model, data):
    was = model.training
    out = model.eval()(data.x, data.edge_index).detach()
    model.train(was)
    return out


@pytest.mark.parametrize("batch_size", [1, 7, 39, 40, None])
@pytest.mark.parametrize("method", ["vq", "gas", "drop", "full"])
@pytest.mark.parametrize("build", MODELS)
def test_exact_is_the_full_forward(build, method, batch_size, data):
    model = with_statistics(build(6, 8, 3, 3, norm="batch_norm", jk="cat", dropout=0.3), data)
    expected = exact(model, data)
    vqgnn.convert(model, data, method=method)
    torch.testing.assert_close(layerwise(model, data, batch_size), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ["auto", "rows", "codes"])
@pytest.mark.parametrize(
    "build",
    [
        Encoded,
        InputDropout,
        *(lambda n=n: GraphSAGE(6, 8, n, 3, project=True) for n in (1, 2)),
        lambda: GAT(6, 8, 1, 3),
    ],
)
def test_exact_for_every_kind_of_input(build, option, data):
    model = build().train()
    expected = exact(model, data)
    vqgnn.convert(model, data, input=option)
    assert all(int(store.step) > 0 for store in vqgnn.stores(model).values()), "a store was not filled"
    torch.testing.assert_close(layerwise(model, data, 9), expected, atol=1e-5, rtol=1e-5)


def test_weighted_directed_graphs_and_another_forward():
    data = awkward_graph(weighted=True)
    model = GCN(6, 8, 3, 3).eval()
    expected = model(data.x, data.edge_index, data.edge_weight).detach().softmax(1)

    def forward(model, batch):
        return model(batch.x, batch.graph).softmax(1)

    vqgnn.convert(model, data, forward=forward)
    torch.testing.assert_close(layerwise(model, data, 9, forward=forward), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("folder", [False, True], ids=["ram", "disk"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_kept_rows(dtype, error, folder, data, tmp_path):
    model = GCN(6, 8, 3, 3, jk="cat")
    expected = exact(model, data)
    vqgnn.convert(model, data, method="full")
    kept = tmp_path / "rows" if folder else None
    out = layerwise(model, data, 9, dtype=dtype, folder=kept)
    torch.testing.assert_close(out, expected, atol=error, rtol=error)
    if folder:
        assert kept.is_dir() and not any(kept.iterdir())  # the files have no names, so that none is left behind


@pytest.mark.parametrize("method", ["exact", "vq", "stale"])
def test_training_state_is_untouched(method, data):
    model = vqgnn.convert(with_statistics(GCN(6, 8, 3, 3, norm="batch_norm", dropout=0.5), data), data)
    model.train()
    model.convs[1].eval()  # a part that its owner froze
    state = copy.deepcopy([model.state_dict(), *(store.state_dict() for store in vqgnn.stores(model).values())])
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    layerwise(model, data, 9, method=method)
    after = [model.state_dict(), *(store.state_dict() for store in vqgnn.stores(model).values())]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(state, after, strict=True) for key in a)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_modes_are_restored_after_an_error(data):
    model = vqgnn.convert(GCN(6, 8, 2, 3), data).train()
    with pytest.raises(ZeroDivisionError):
        layerwise(model, data, forward=lambda model, batch: 1 / 0)
    assert all(module.training for module in model.modules())


def test_stale_reads_the_training_store(data):
    model = GCN(6, 8, 2, 3)
    expected = exact(model, data)
    vqgnn.convert(model, data, method="gas")
    torch.testing.assert_close(layerwise(model, data, 9, method="stale"), expected, atol=1e-5, rtol=1e-5)
    store = vqgnn.stores(model)["convs.1"]
    store.data.zero_()
    assert (layerwise(model, data, 9, method="stale") - expected).abs().max() > 1e-2
    torch.testing.assert_close(layerwise(model, data, 9), expected, atol=1e-5, rtol=1e-5)


def test_vq_reads_neighbours_through_the_codebook(data):
    model = GCN(6, 8, 2, 3)
    hidden = model.eval().convs[0](data.x, data.edge_index).relu()
    vqgnn.convert(model, data, codec="pq:d=4,k=4")
    codebook = vqgnn.stores(model)["convs.1"].codebook
    codes = codebook.assign(hidden).long()
    quantised = torch.cat([codebook.x_values[j, codes[:, j]] for j in range(2)], 1)
    seen = []
    for start in range(0, 40, 8):
        x = quantised.clone()
        x[start : start + 8] = hidden[start : start + 8]  # a batch's own rows are exact
        seen.append(model.convs[1](x, data.edge_index)[start : start + 8])
    torch.testing.assert_close(layerwise(model, data, 8, method="vq"), torch.cat(seen).detach(), atol=1e-5, rtol=1e-5)
    tenth = layerwise(model, data, 4, method="vq")  # of one batch, the graph, nothing would be read from codes
    torch.testing.assert_close(layerwise(model, data, method="vq"), tenth)
    with pytest.raises(ValueError, match="method='vq' needs a model converted with method='vq'"):
        layerwise(vqgnn.convert(model, data, method="gas"), data, method="vq")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fast"}, "method='fast' is unknown; choose one of exact, vq, stale"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"dtype": torch.float64}, "dtype=torch.float64 is not supported"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message, data):
    model = vqgnn.convert(GCN(6, 8, 2, 3), data)
    with pytest.raises(ValueError, match=message):
        layerwise(model, data, **options)


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


@pytest.mark.parametrize("method", ["vq", "full"])
def test_norms_of_one_exact_pass(method, data):
    """Their statistics become those of all nodes' rows in the full graph; nothing else of the model changes."""
    model = GCN(6, 8, 3, 3, norm="batch_norm", dropout=0.5)
    plain = copy.deepcopy(model).eval()
    for norm in batch_norms(plain):
        norm.train()
        norm.momentum = 1.0
    plain(data.x, data.edge_index)
    vqgnn.convert(model, data, method=method, **({"codec": "pq:d=4,k=8"} if method == "vq" else {}))
    model.train()
    inference.estimate_norms(model, data)
    assert all(norm.momentum == 0.1 and norm.training for norm in batch_norms(model))
    expected = plain.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("build", [lambda: GCN(6, 8, 2, 3), lambda: vqgnn.nn.GCNConv(6, 8)], ids=["pyg", "ours"])
def test_a_model_that_is_not_converted_is_named(build, data):
    with pytest.raises(ValueError, match=r"is not converted; call vqgnn\.convert"):
        layerwise(build(), data)


@pytest.mark.parametrize("jk,chain", [(None, True), ("last", True), ("cat", False), ("max", False)])
def test_only_skip_connections_keep_every_convs_output(jk, chain, data):
    model = vqgnn.convert(GCN(6, 8, 3, 4, jk=jk), data, method="full")
    sweep = inference._Sweep(data, 7, torch.float32, None, inference.call_model, False)
    with inference.evaluating(model), torch.no_grad():
        sweep.run(model)
    assert sweep.chain is chain
    assert all(output is None for output in sweep.outputs) is chain
