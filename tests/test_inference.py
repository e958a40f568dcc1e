import copy

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
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


def routed(h: torch.Tensor) -> torch.Tensor:
    """Written into a view of a fresh tensor, where the condition alone comes from h."""
    out = torch.zeros(h.size(0), 9)
    out[:, :8][(h > 0).all(1) | (h[:, 0] > 0)] = 1.0
    return out[:, :8] + out.size(1)


# what of an earlier conv's output h [n, 8] is used again, in ways that autograd does not see, or only in part
SKIPS = {
    "detach": lambda h: h.detach(),
    "gate": lambda h: (h > 0).float(),
    "argmax": lambda h: F.one_hot(h.argmax(1), 8).float(),
    "threshold": lambda h: (h > 3).float(),  # which a probe's values need not reach
    "data": lambda h: h.data.clone(),
    "in place": lambda h: torch.zeros(h.size(0), 8).copy_(h),
    "routed": routed,
    "numpy": lambda h: torch.from_numpy(h.numpy().copy()),
    "list": lambda h: torch.tensor(h.tolist()),
    "rows read": lambda h: torch.stack([row if float(row.max()) > 0 else -row for row in h]),
    "count": lambda h: torch.full((h.size(0), 8), 0.5 if (h > 0).nonzero().size(0) else 0.0),
    "rounded": lambda h: h.round().int() * torch.ones(8),
}


class Skip(nn.Module):
    """The first conv's output goes on to the second, and skips it: to the third, or without one to the result."""

    def __init__(self, skip: str, convs: int = 3):
        super().__init__()
        self.skip, self.convs = skip, nn.ModuleList(pyg.GCNConv(c, 8) for c in (6, 8, 8)[:convs])

    def forward(self, x, graph):
        h = self.convs[0](x, graph) * 8
        with torch.no_grad():
            skipped = SKIPS[self.skip](h)
        x = self.convs[1](h.relu(), graph) + skipped
        return self.convs[2](x, graph) if len(self.convs) > 2 else x


@pytest.mark.parametrize("convs", [2, 3])
@pytest.mark.parametrize("skip", SKIPS)
def test_what_skips_a_conv_without_a_gradient(skip, convs, data):
    model = Skip(skip, convs)
    expected, third = exact(model, data), []
    if convs == 3:
        model.convs[2].register_forward_pre_hook(lambda conv, given: third.append(given[0].detach()))
        exact(model, data)
        model.convs[2]._forward_pre_hooks.clear()
    vqgnn.convert(model, data, method="gas")
    for rows in third:
        torch.testing.assert_close(vqgnn.stores(model)["convs.2"].pull(), rows, atol=1e-5, rtol=1e-5)
    for size in (7, None):
        torch.testing.assert_close(layerwise(model, data, size), expected, atol=1e-5, rtol=1e-5)


class Chain(nn.Module):
    """Nothing skips a conv, and what comes between is no obstacle to knowing it."""

    def __init__(self, between):
        super().__init__()
        self.between, self.convs = between, nn.ModuleList(pyg.GCNConv(c, 8) for c in (6, 8, 8))
        self.norm, self.scale = nn.BatchNorm1d(8), torch.tensor(0.5)

    def forward(self, x, graph):
        for conv in self.convs:
            x = self.between(self, conv(x, graph))
        return x


@pytest.mark.parametrize(
    "between",
    [
        lambda model, x: x.detach() * (x > 0),
        lambda model, x: model.norm(x).relu_().mul_(model.scale) * torch.tensor(2.0),
        lambda model, x: torch.utils.checkpoint.checkpoint(model.norm, x, use_reentrant=True),
        lambda model, x: F.dropout(x[:, [1, 0, 2, 3, 4, 5, 6, 7]], 0.5, model.training),
        lambda model, x: torch.cat([x.new_zeros(len(x), 1), x], 1)[:, 1:] + torch.zeros_like(x),
    ],
    ids=["detach", "in-place", "checkpoint", "columns", "shapes"],
)
def test_a_chain_keeps_no_output(between, data):
    model = Chain(between)
    expected = exact(model, data)
    vqgnn.convert(model, data, method="full")
    sweep = inference._Sweep(data, 7, torch.float32, None, inference.call_model, False)
    with inference.evaluating(model), torch.no_grad():
        out = sweep.run(model)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert sweep.chain and not any(output is not None for output in sweep.outputs)


def _before(conv, skip, x, graph):
    skipped = skip(x)
    return conv(x, graph) + skipped


def _part(conv, skip, x, graph):
    wide = torch.cat([x, 2 * x], 1)
    return conv(wide[:, :8], graph) + skip(wide[:, 8:])


# a layer of conv(x) and what skips it, and whether the conv's input and output are all that is used of it
RESIDUALS = {
    "map": (lambda conv, skip, x, graph: conv(x, graph) + skip(x), True),
    "identity": (lambda conv, skip, x, graph: conv(x, graph) + x, True),
    "in place": (lambda conv, skip, x, graph: conv(x.relu_(), graph).add_(x), True),
    "view": (lambda conv, skip, x, graph: conv(x.view(-1, 8), graph) + x.t().t(), True),
    "twice": (lambda conv, skip, x, graph: conv(x, graph) * x.sigmoid() + skip(x), True),
    "before": (_before, False),
    "copy": (lambda conv, skip, x, graph: (lambda copy: conv(x, graph) + copy)(x.clone()), False),
    "part": (_part, False),
    "expanded": (lambda conv, skip, x, graph: conv(x[:, :1].expand(-1, 8), graph) + skip(x), False),
    "two convs": (lambda conv, skip, x, graph: conv(x, graph) + skip(x, graph), False),
}


class Residuals(nn.Module):
    """The first layer's input is a parameter's product, or the features themselves: nobody may write there."""

    def __init__(self, layer: str, encode: bool):
        super().__init__()
        self.layer, self.encoder = RESIDUALS[layer][0], nn.Linear(6, 8) if encode else nn.ZeroPad1d((0, 2))
        self.convs = nn.ModuleList(pyg.GCNConv(8, 8) for _ in range(3))
        skip = pyg.GCNConv if layer == "two convs" else nn.Linear
        self.skips = nn.ModuleList(skip(8, 8) for _ in range(3))

    def forward(self, x, graph):
        x = self.encoder(x)
        for conv, skip in zip(self.convs, self.skips, strict=True):
            x = self.layer(conv, skip, x, graph).tanh()
        return x


@pytest.mark.parametrize("encode", [True, False], ids=["encoded", "features"])
@pytest.mark.parametrize("layer", RESIDUALS)
def test_residuals_need_no_convs_output(layer, encode, data):
    model, chain, given = Residuals(layer, encode), RESIDUALS[layer][1], data.x.clone()
    expected = exact(model, data)
    vqgnn.convert(model, data, method="full")
    weights = copy.deepcopy(model.state_dict())
    for size, dtype in ((7, torch.float32), (None, torch.float32), (7, torch.float16)):
        sweep = inference._Sweep(data, size, dtype, None, inference.call_model, False)
        with inference.evaluating(model), torch.no_grad():
            out = sweep.run(model)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
        assert sweep.chain is chain
        assert all(output is None for output in sweep.outputs) is chain
    assert torch.equal(data.x, given)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layer", RESIDUALS)
def test_stores_of_residual_models_are_filled_with_exact_rows(layer, data):
    model, given = Residuals(layer, True), []
    for conv in model.convs:
        conv.register_forward_pre_hook(lambda conv, args: given.append(args[0].detach().clone()))
    exact(model, data)
    for conv in model.convs:
        conv._forward_pre_hooks.clear()
    vqgnn.convert(model, data, method="gas")
    for i in (1, 2):
        rows = vqgnn.stores(model)[f"convs.{i}"].pull()
        torch.testing.assert_close(rows, given[i], atol=1e-5, rtol=1e-5)


class Encodings(nn.Module):
    """A model with more inputs: a positional encoding, and a scale a node."""

    def __init__(self):
        super().__init__()
        self.lin, self.gnn = nn.Linear(4, 6), GCN(6, 8, 3, 3)

    def forward(self, x, pe, scale, graph):
        return self.gnn(x + self.lin(pe) * scale[:, None], graph)


@pytest.mark.parametrize("method", ["exact", "stale", "vq"])
def test_batches_bring_the_datas_other_tensors(method, data):
    data.pe, data.scale = torch.randn(40, 4), torch.randint(3, (40,))
    model = Encodings()
    expected = model.eval()(data.x, data.pe, data.scale, data.edge_index).detach()

    def forward(model, batch):
        return model(batch.x, batch.pe, batch.scale, batch.graph)

    vqgnn.convert(model, data, codec="pq:d=8,k=40", forward=forward)  # a code a row
    out = layerwise(model, data, None if method == "exact" else 7, method, forward=forward)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if method == "exact":
        torch.testing.assert_close(layerwise(model, data, 7, forward=forward), expected, atol=1e-5, rtol=1e-5)
    inference.estimate_norms(model, data, forward)
    vqgnn.warmup(model, data, forward)
    assert vqgnn.diagnostics.error_bound(
        model, data, next(iter(vqgnn.BatchLoader(data))), forward, loss=lambda out: out.pow(2).sum()
    )


def test_statistics_over_another_tensor_split_no_nodes(data):
    """As those of x: also where the probe's nodes are all alike."""
    data.pe = torch.zeros(40, 6)
    data.pe[20:] = torch.randn(20, 6)
    model = GCN(6, 8, 2, 3)

    def forward(model, batch):
        return model(batch.x + batch.pe.mean(0), batch.graph)

    expected = model.eval()(data.x + data.pe.mean(0), data.edge_index).detach()
    vqgnn.convert(model, data, forward=forward)
    torch.testing.assert_close(layerwise(model, data, forward=forward), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="takes statistics over all nodes"):
        layerwise(model, data, 7, forward=forward)


class _Returns(torch.nn.Module):
    def __init__(self, what):
        super().__init__()
        self.convs, self.what = torch.nn.ModuleList([pyg.SAGEConv(6, 8), pyg.GCNConv(8, 3)]), what

    def forward(self, x, edge_index):
        hidden = self.convs[0](x, edge_index).relu()
        return self.what(self.convs[1](hidden, edge_index), hidden)


@pytest.mark.parametrize(
    "what, came, key",
    [
        (lambda z, h: (z, h), "a tuple", 0),
        (lambda z, h: {"z": z}, "a dict", "z"),
        (lambda z, h: z.mean(0, keepdim=True), "a tensor", None),
    ],
)
def test_results_that_are_no_rows_of_nodes(what, came, key):
    data = awkward_graph()
    model = vqgnn.convert(_Returns(what), data)
    for method in ("exact", "stale"):
        with pytest.raises(ValueError, match=f"returned {came}.* for .* nodes.*forward="):
            layerwise(model, data, method=method)
    if key is not None:
        found = layerwise(model, data, forward=lambda model, batch: model(batch.x, batch.graph)[key])
        torch.testing.assert_close(found, model(data.x, data.edge_index)[key].detach())


@pytest.mark.parametrize("method", ["exact", "vq", "stale"])
def test_one_number_a_node(method):
    data = awkward_graph()
    model = vqgnn.convert(_Returns(lambda z, h: z[:, 0]), data, codec="pq:d=1,k=40")
    assert layerwise(model, data, method=method).shape == (data.num_nodes,)


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h / h.abs().max(),
        lambda h: h - h.amax(0),
        lambda h: h - h[:1],
        lambda h: h.cumsum(0),
        lambda h: h + torch.arange(len(h))[:, None],
    ],
    ids=["largest", "largest of a channel", "first row", "sums", "position"],
)
def test_what_depends_on_other_rows_splits_no_nodes(mix, data):
    """Also where some rows, as the first ones, are the same with and without the others."""
    model = TwoConvs(mix).eval()
    with torch.no_grad():
        expected = model(data.x, data.edge_index)
    vqgnn.convert(model, data, method="drop")
    torch.testing.assert_close(vqgnn.inference.layerwise(model, data), expected)
    with pytest.raises(ValueError, match="batch_size=7 splits the 40 nodes"):
        vqgnn.inference.layerwise(model, data, batch_size=7)


class TwoConvs(torch.nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.first, self.second, self.mix = pyg.GCNConv(6, 8), pyg.GCNConv(8, 3), mix

    def forward(self, x, edge_index):
        return self.second(self.mix(self.first(x, edge_index)), edge_index)
