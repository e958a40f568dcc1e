"""Attention with edge features (edge_dim=D) in one kernel: it is PyG's, wherever the halo's rows come from."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from graphs import awkward_graph
from marks import needs_cpp
from test_host_state import moved
from test_store import assert_same, stored
from torch_geometric.nn.models import GAT
from torch_geometric.utils import add_self_loops, remove_self_loops

import vqgnn
from vqgnn.graph import Graph
from vqgnn.inference import layerwise

N, D = 40, 5
CONVS = {
    "gat": lambda d: pyg.GATConv(6, 5, heads=2, edge_dim=d),
    "gat-mean": lambda d: pyg.GATConv(6, 5, heads=3, concat=False, edge_dim=d, residual=True, negative_slope=0.5),
    "gat-no-loops": lambda d: pyg.GATConv(6, 5, edge_dim=d, add_self_loops=False),
    "gat-fill-max": lambda d: pyg.GATConv(6, 5, edge_dim=d, fill_value="max"),
    "gat-fill-number": lambda d: pyg.GATConv(6, 5, edge_dim=d, fill_value=0.5),
    "gat-fill-tensor": lambda d: pyg.GATConv(6, 5, edge_dim=d, fill_value=torch.linspace(-1, 1, d)),
    "gatv2": lambda d: pyg.GATv2Conv(6, 5, heads=2, edge_dim=d),
    "gatv2-mean": lambda d: pyg.GATv2Conv(6, 5, heads=3, concat=False, edge_dim=d, residual=True, negative_slope=0.5),
    "gatv2-shared": lambda d: pyg.GATv2Conv(6, 5, heads=2, edge_dim=d, share_weights=True),
    "gatv2-no-loops": lambda d: pyg.GATv2Conv(6, 5, edge_dim=d, add_self_loops=False),
}
every_conv = pytest.mark.parametrize("name", CONVS)
every_width = pytest.mark.parametrize("columns", [None, 1, D], ids=["flat", "1", str(D)])
both = pytest.mark.parametrize("v2", [False, True], ids=["gat", "gatv2"])


def graph(undirected=False, columns=D):
    """The awkward graph with features of edges: [e] (None) or [e, columns]. Its twin edges differ in them."""
    data = awkward_graph(undirected=undirected)
    data.edge_attr = torch.randn(data.num_edges, *([] if columns is None else [columns]))
    return data


def gat(v2, layers=3, **options):
    return GAT(6, 8, layers, 3, heads=2, v2=v2, edge_dim=D, **options)


def full(model, data):
    """PyG's output for the whole graph, and the gradient of all weights."""
    model = copy.deepcopy(model)
    out = model(data.x, data.edge_index, edge_attr=data.edge_attr)
    loss(out, data.y).backward()
    return out.detach(), gradient(model)


def loss(out, y):
    return F.cross_entropy(out, y, reduction="sum")


def gradient(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def batches(data, size=13):
    return vqgnn.BatchLoader(data, batch_size=size, seed=1, prefetch=0)


def close(mine, truth, tolerance=1e-4):
    torch.testing.assert_close(mine, truth, rtol=tolerance, atol=tolerance)


def fused(model):
    return {path.path for path in vqgnn.paths(model)} == {"fused"}


@pytest.mark.parametrize("undirected", [False, True], ids=["directed", "undirected"])
@every_width
@every_conv
def test_a_batch_of_the_whole_graph_is_pyg(name, columns, undirected):
    data = graph(undirected, columns)
    theirs = CONVS[name](columns or 1)
    ours = copy.deepcopy(theirs)

    def run(conv, *arguments):
        x = (2 * data.x).requires_grad_()  # not the features themselves: a gradient reaches it
        conv.zero_grad()
        out = conv(x, *arguments)
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
        return out.detach(), x.grad, gradient(conv)

    expected = run(theirs, data.edge_index, data.edge_attr)
    for method in ("full", "lmc", "vq"):
        vqgnn.convert(ours, data, method=method, grad=None if method == "full" else True, input="codes")
        assert fused(ours) and list(ours.state_dict()) == list(theirs.state_dict())
        (batch,) = batches(data, N)
        close(run(ours, batch.graph), expected)
    close(run(ours, data.edge_index, data.edge_attr), expected)


@every_width
@every_conv
def test_exact_rows_of_the_halo_give_the_whole_graphs_rows_and_weights_gradients(name, columns):
    data = graph(columns=columns)
    conv = CONVS[name](columns or 1)
    expected, gradients = full_of_conv(conv, data)
    vqgnn.convert(conv, data)
    assert not vqgnn.stores(conv)
    for batch in batches(data):
        out = conv(batch.x, batch.graph)
        close(out.detach(), expected[batch.n_id])
        out.square().sum().backward()
    close(gradient(conv), gradients, 1e-3)
    close(layerwise(conv, data, 7), expected)


def full_of_conv(conv, data):
    conv = copy.deepcopy(conv)
    out = conv(data.x, data.edge_index, data.edge_attr)
    out.square().sum().backward()
    return out.detach(), gradient(conv)


@pytest.mark.parametrize("undirected", [False, True], ids=["directed", "undirected"])
@both
def test_settled_rows_and_gradients_are_the_whole_graphs(v2, undirected):
    """Gradients of out-of-batch nodes pass through scores with their edges' features (eq. 7); without, it is biased."""
    data = graph(undirected)
    model = gat(v2)
    expected, gradients = full(model, data)

    def epochs(grad):
        vqgnn.convert(model, data, method="lmc", grad=grad, fill=False)
        assert fused(model)
        for _ in range(40 if grad else 6):  # of what is left for other nodes the first epochs fade from the mean
            model.zero_grad()
            for batch in batches(data):
                out = model(batch.x, batch.graph)
                loss(out, batch.y).backward()
        close(out.detach(), expected[batch.n_id], 1e-3)
        return gradient(model)

    close(epochs(True), gradients, 1e-3)
    biased = epochs(False)
    assert max(float((biased[name] - truth).abs().max()) for name, truth in gradients.items()) > 0.1


@both
def test_codes_for_every_row_are_exact(v2):
    data = graph()
    model = gat(v2)
    expected, _ = full(model, data)
    vqgnn.convert(model, data, method="vq", codec=f"pq:d=4,k={N}")
    model.eval()
    for batch in batches(data):
        close(model(batch.x, batch.graph), expected[batch.n_id])
    for method in ("exact", "vq"):
        close(layerwise(model, data, 13, method=method), expected)
    close(layerwise(model, data, 13, dtype=torch.float16), expected, 1e-2)


@pytest.mark.parametrize("state", ["input", "projected"])
@both
def test_rows_of_frozen_weights_are_exact(v2, state):
    data = graph()
    model = gat(v2)
    expected, _ = full(model, data)
    vqgnn.convert(model, data, method="gas", attention_state=state)
    for size in (13, N):
        for batch in batches(data, size):
            close(model(batch.x, batch.graph), expected[batch.n_id], 1e-3)


@both
def test_dropped_messages_leave_the_loops_features_the_whole_graphs(v2):
    """Without the halo a node hears itself by the mean of all edges to it, and twins differ in theirs."""
    data = graph()
    conv = (pyg.GATv2Conv if v2 else pyg.GATConv)(6, 5, edge_dim=D)
    vqgnn.convert(conv, data, method="drop", input="codes")
    (batch, *_) = batches(data)
    position = torch.full((N,), -1)
    position[batch.n_id] = torch.arange(len(batch.n_id))
    features = add_self_loops(*remove_self_loops(data.edge_index, data.edge_attr), "mean", N)
    inside = (position[features[0]] >= 0).all(0)
    plain = copy.deepcopy(conv)
    plain.add_self_loops = False
    expected = plain(batch.x, position[features[0][:, inside]], features[1][inside])
    assert inside.sum() < data.num_edges
    close(conv(batch.x, batch.graph), expected)


@needs_cpp
@pytest.mark.parametrize("input", ["auto", "codes"])
@both
def test_training_is_the_same_wherever_state_and_graph_lie(v2, input, tmp_path):
    data = graph()

    def trained(place, move):
        torch.manual_seed(0)
        model = vqgnn.convert(
            gat(v2, dropout=0.3), data, method="lmc", codec="int8", grad=True, input=input, place=place, folder=tmp_path
        ).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for batch in batches(data):
            batch = moved(batch) if move else batch
            optimizer.zero_grad()
            F.cross_entropy(model(batch.x, batch.graph), batch.y).backward()
            optimizer.step()
        return model

    expected = trained("device", False)
    for place, move in (("device", True), ("host", False), ("disk", True)):
        model = trained(place, move)
        assert_same(model.state_dict(), expected.state_dict())
        for store, other in zip(vqgnn.stores(model).values(), vqgnn.stores(expected).values(), strict=True):
            assert_same(stored(store), stored(other))


@pytest.mark.parametrize("options", [{"grad": True}, {"grad": False}], ids=["grad", "input"])
@both
def test_a_compiled_step_is_one_graph(v2, options):
    data = graph()
    model = vqgnn.convert(gat(v2, 2), data, method="gas", **options)
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    step = torch.compile(lambda model, x, g, y: loss(model(x, g), y), backend="aot_eager", fullgraph=True)
    for batch in batches(data, 20):
        value, again = loss(model(batch.x, batch.graph), batch.y), step(other, batch.x, batch.graph, batch.y)
        value.backward()
        again.backward()
    close(again, value)
    close(gradient(other), gradient(model), 1e-3)


@both
def test_error_bounds_see_them(v2):
    """Of frozen weights and exact rows: no message is off, and no gradient."""
    data = graph()
    model = vqgnn.convert(gat(v2, share_weights=True) if v2 else gat(v2), data, method="gas")
    (batch, *_) = batches(data)
    found = vqgnn.diagnostics.error_bound(model, data, batch)
    assert len(found) == 2 and all(layer.messages < 1e-4 for layer in found)


def test_convs_alike_share_the_features_of_edges():
    data = graph()
    model = vqgnn.convert(gat(False), data, method="gas")
    assert len(Graph.of(data)._edge_features) == 1
    batch = next(iter(batches(data)))  # has what the model wants, as long as it lives
    assert fused(model) and {key[0] for key in batch.graph._made} == {"halo_transpose", "csr", "exact_neighbours"}


@pytest.mark.parametrize("edge_dim", [None, D])
@both
def test_what_edges_have_and_convs_take(v2, edge_dim):
    """As PyG: a conv without edge_dim ignores them, and one with it runs without where data has none."""
    conv = (pyg.GATv2Conv if v2 else pyg.GATConv)(6, 5, edge_dim=edge_dim)
    data = graph() if edge_dim is None else awkward_graph()
    expected = conv(data.x, data.edge_index)
    vqgnn.convert(conv, data)
    assert fused(conv)
    for batch in batches(data):
        close(conv(batch.x, batch.graph), expected[batch.n_id])


E = awkward_graph().num_edges


@pytest.mark.parametrize(
    ("attr", "options", "message"),
    [
        (torch.ones(E, 3), {}, rf"edge_attr is \[{E}, 3\].*edge_dim={D} needs \[num_edges={E}, {D}\]"),
        (torch.ones(E - 1, D), {}, rf"edge_attr must be \[num_edges={E}, ...\], got \[{E - 1}, {D}\]"),
        (torch.ones(E), {}, rf"edge_attr is \[{E}\] torch.float32.*or set the conv's edge_dim"),
        (torch.ones(E, D).long(), {}, r"torch.int64.*needs .* torch.float32.*by \.float\(\)"),
        (torch.ones(E, D), {"fill_value": torch.ones(2)}, f"fill_value has 2 numbers for edge_dim={D}; give one a"),
    ],
    ids=["columns", "edges", "flat", "dtype", "fill"],
)
@both
def test_features_that_do_not_fit_are_refused(v2, attr, options, message):
    data = awkward_graph()
    data.edge_attr = attr
    cls = pyg.GATv2Conv if v2 else pyg.GATConv
    conv = cls(6, 5, edge_dim=D, **options)
    with pytest.raises(ValueError, match=message):
        vqgnn.convert(conv, data)
    assert type(conv) is cls


def test_edges_that_bring_values_too_are_left_to_pygs_code():
    data = graph()
    with pytest.raises(ValueError, match=rf"TransformerConv\(edge_dim={D}\).*use edge_dim=None, or torch_geometric.nn"):
        vqgnn.convert(vqgnn.nn.TransformerConv(6, 3, edge_dim=D), data)
    conv = pyg.TransformerConv(6, 3, edge_dim=D)
    expected = conv(data.x, data.edge_index, data.edge_attr)
    assert not fused(vqgnn.convert(conv, data))
    for batch in batches(data):
        close(conv(batch.x, batch.graph), expected[batch.n_id])


def test_features_beside_a_batch_graph_are_refused():
    data = graph()
    model = vqgnn.convert(gat(False), data)
    batch = next(iter(batches(data)))
    with pytest.raises(ValueError, match=r"1 more argument.*set data\.edge_attr before"):
        model(batch.x, batch.graph, edge_attr=data.edge_attr)
