import copy

import pytest
import torch
import torch_geometric.nn as pyg
from graphs import awkward_graph, dense_convolution
from torch import nn

import vqgnn
from vqgnn import BatchGraph, Graph

F_IN, F_OUT, N = 6, 5, 40


def mlp():
    return nn.Sequential(nn.Linear(F_IN, 7), nn.ReLU(), nn.Linear(7, F_OUT))


CONVS = {
    "gcn": lambda m: m.GCNConv(F_IN, F_OUT),
    "gcn-improved": lambda m: m.GCNConv(F_IN, F_OUT, improved=True),
    "gcn-no-loops": lambda m: m.GCNConv(F_IN, F_OUT, add_self_loops=False),
    "gcn-not-normalised": lambda m: m.GCNConv(F_IN, F_OUT, normalize=False),
    "gcn-no-bias": lambda m: m.GCNConv(F_IN, F_OUT, bias=False),
    "gcn-cached": lambda m: m.GCNConv(F_IN, F_OUT, cached=True),
    "sage": lambda m: m.SAGEConv(F_IN, F_OUT),
    "sage-sum": lambda m: m.SAGEConv(F_IN, F_OUT, aggr="sum"),
    "sage-add": lambda m: m.SAGEConv(F_IN, F_OUT, aggr="add"),
    "sage-normalize": lambda m: m.SAGEConv(F_IN, F_OUT, normalize=True),
    "sage-no-root": lambda m: m.SAGEConv(F_IN, F_OUT, root_weight=False),
    "sage-project": lambda m: m.SAGEConv(F_IN, F_OUT, project=True),
    "sage-no-bias": lambda m: m.SAGEConv(F_IN, F_OUT, bias=False),
    "gin": lambda m: m.GINConv(mlp()),
    "gin-eps": lambda m: m.GINConv(mlp(), eps=0.3),
    "gin-train-eps": lambda m: m.GINConv(mlp(), train_eps=True),
    "gat": lambda m: m.GATConv(F_IN, F_OUT),
    "gat-heads": lambda m: m.GATConv(F_IN, F_OUT, heads=3),
    "gat-mean": lambda m: m.GATConv(F_IN, F_OUT, heads=3, concat=False, negative_slope=0.5),
    "gat-no-loops": lambda m: m.GATConv(F_IN, F_OUT, heads=2, add_self_loops=False),
    "gat-residual": lambda m: m.GATConv(F_IN, F_OUT, heads=2, residual=True),
    "gat-no-bias": lambda m: m.GATConv(F_IN, F_OUT, heads=2, bias=False),
    "gatv2": lambda m: m.GATv2Conv(F_IN, F_OUT),
    "gatv2-mean": lambda m: m.GATv2Conv(F_IN, F_OUT, heads=3, concat=False, negative_slope=0.5),
    "gatv2-shared": lambda m: m.GATv2Conv(F_IN, F_OUT, heads=2, share_weights=True, bias=False),
    "gatv2-residual": lambda m: m.GATv2Conv(F_IN, F_OUT, heads=2, residual=True, add_self_loops=False),
    "transformer": lambda m: m.TransformerConv(F_IN, F_OUT),
    "transformer-heads": lambda m: m.TransformerConv(F_IN, F_OUT, heads=3, bias=False),
    "transformer-mean": lambda m: m.TransformerConv(F_IN, F_OUT, heads=2, concat=False, beta=True),
    "transformer-beta": lambda m: m.TransformerConv(F_IN, F_OUT, heads=2, beta=True),
    "transformer-no-root": lambda m: m.TransformerConv(F_IN, F_OUT, heads=2, root_weight=False, beta=True),
    "cheb": lambda m: m.ChebConv(F_IN, F_OUT, K=4),
    "cheb-rw": lambda m: m.ChebConv(F_IN, F_OUT, K=2, normalization="rw", bias=False),
    "cheb-not-normalised": lambda m: m.ChebConv(F_IN, F_OUT, K=3, normalization=None),
}
every_conv = pytest.mark.parametrize("name", CONVS)
every_graph = pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"undirected": u, "weighted": w}, id=f"{'un' if u else ''}directed{'-weighted' if w else ''}")
        for u in (False, True)
        for w in (False, True)
    ],
)


def pair(name):
    """(PyG's conv, ours) with the same weights."""
    theirs, ours = CONVS[name](pyg), CONVS[name](vqgnn.nn)
    if name == "gin-train-eps":
        nn.init.constant_(theirs.eps, -0.4)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def matrix(data, name):
    if not name.startswith("gcn"):
        return dense_convolution(data, "sum" if name.startswith("gin") or name in ("sage-sum", "sage-add") else "mean")
    normalize = name != "gcn-not-normalised"
    return dense_convolution(data, "gcn", normalize, normalize and name != "gcn-no-loops", name == "gcn-improved")


def run(conv, x, *graph):
    """Output and gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    conv.zero_grad()
    out = conv(x, *graph)
    weight = torch.linspace(-1, 2, out.numel()).view_as(out)
    (out * weight).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in conv.parameters())]


def graph_arguments(data, name):
    weighted = name.startswith(("gcn", "cheb")) and "edge_weight" in data
    return (data.edge_index, data.edge_weight) if weighted else (data.edge_index,)


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@every_graph
@every_conv
def test_plain_edge_index_gives_pygs_result(name, kind):
    data = awkward_graph(**kind)
    theirs, ours = pair(name)
    arguments = graph_arguments(data, name)
    assert_close(run(ours, data.x, *arguments), run(theirs, data.x, *arguments))


@every_graph
@every_conv
@pytest.mark.parametrize("method", ["full", "vq", "lmc"])
def test_whole_graph_batch_gives_pygs_result(name, kind, method):
    data = awkward_graph(**kind)
    theirs, ours = pair(name)
    vqgnn.convert(ours, data, method=method)
    data_graph = BatchGraph(Graph.of(data), torch.arange(N), data.x)
    expected = run(theirs, data.x, *graph_arguments(data, name))
    assert_close(run(ours, data.x, data_graph), expected)  # x is not the features themselves: a gradient reaches it
    assert_close([ours(data.x, data_graph)], expected[:1])  # the precomputed C X


@every_conv
def test_state_dict_is_pygs_and_loads_both_ways(name):
    data = awkward_graph()
    theirs, _ = pair(name)
    ours = vqgnn.convert(copy.deepcopy(theirs), data, method="lmc", input="codes")
    assert vqgnn.stores(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    fresh = CONVS[name](pyg)
    fresh.load_state_dict(ours.state_dict())
    assert_close([fresh(data.x, data.edge_index)], [theirs(data.x, data.edge_index)])
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(fresh.state_dict())
    assert_close([ours(data.x, data.edge_index)], [fresh(data.x, data.edge_index)])


def middle_conv(name, data, method, **options):
    """A converted conv that reads a store: its input is not the features themselves."""
    theirs, ours = pair(name)
    model = nn.Module()
    model.conv = ours
    model.forward = lambda x, graph: ours(2 * x, graph)
    vqgnn.convert(model, data, method=method, fill=False, **options)
    return theirs, ours


def batch_of(data, b):
    n_id = torch.randperm(N)[:b]
    return n_id, BatchGraph(Graph.of(data), n_id, data.x[n_id])


@every_graph
@pytest.mark.parametrize("b", [1, 13, 39])
@pytest.mark.parametrize("name", ["gcn", "gcn-improved", "sage", "sage-sum", "gin"])
def test_equations_6_and_7(name, b, kind):
    data = awkward_graph(**kind)
    c = matrix(data, name)
    _, conv = middle_conv(name, data, "lmc")
    store = conv.store_use.store
    state, grads = torch.randn(N, F_IN), torch.randn(N, F_IN)
    store.push(torch.arange(N), state, grads)
    n_id, graph = batch_of(data, b)
    halo = torch.ones(N, dtype=torch.bool).index_fill(0, n_id, False)
    x = torch.randn(b, F_IN, requires_grad=True)
    seen = []
    conv.combine = lambda x, messages: seen.append(messages) or messages  # what is under test is M alone
    g = torch.randn(b, F_IN)
    conv(x, graph).backward(g)
    messages = c[n_id][:, n_id] @ x.detach().double() + c[n_id][:, halo] @ state[halo].double()
    torch.testing.assert_close(seen[0].detach(), messages.float(), atol=1e-5, rtol=1e-5)
    grad_x = c[n_id][:, n_id].t() @ g.double() + c[halo][:, n_id].t() @ grads[halo].double()
    torch.testing.assert_close(x.grad, grad_x.float(), atol=1e-5, rtol=1e-5)
    state[n_id], grads[n_id] = x.detach(), g  # the batch's own were written
    assert torch.equal(store.pull(), state) and torch.equal(store.grad_rows.data, grads)


@pytest.mark.parametrize("method", ["drop", "gas"])
def test_methods_without_some_messages(method):
    data = awkward_graph()
    c = matrix(data, "sage")
    theirs, conv = middle_conv("sage", data, method)
    state = torch.randn(N, F_IN)
    if method == "gas":
        conv.store_use.store.push(torch.arange(N), state)
    else:
        state.zero_()
    n_id, graph = batch_of(data, 11)
    state[n_id] = x = torch.randn(11, F_IN)
    out, grad_x, *_ = run(conv, x, graph)
    expected = theirs.lin_l((c[n_id] @ state.double()).float()) + theirs.lin_r(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weight = torch.linspace(-1, 2, out.numel()).view_as(out)
    expected = c[n_id][:, n_id].t().float() @ (weight @ theirs.lin_l.weight) + weight @ theirs.lin_r.weight
    torch.testing.assert_close(grad_x, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["vq", "gas", "lmc"])
def test_only_training_writes_the_store(method):
    data = awkward_graph()
    _, conv = middle_conv("gcn", data, method)
    store = conv.store_use.store
    n_id, graph = batch_of(data, 9)
    x = torch.randn(9, F_IN)
    conv.eval()
    run(conv, x, graph)
    assert int(store.step) == 0 and not store.data.any()
    conv.train()
    with torch.no_grad():  # no gradient will come: the state is written at once
        conv(x, graph)
    assert int(store.step) == 1
    run(conv, x, graph)
    assert int(store.step) == 2
    assert store.age[n_id].tolist() == [0] * 9
    if method != "vq":
        assert torch.equal(store.pull(n_id), x)


@pytest.mark.parametrize(("kind", "option"), [("gcn", "auto"), ("gcn", "rows"), ("cheb", "auto")])
def test_dropped_out_features_need_no_store(kind, option):
    """The halo's are read exactly and dropped like the batch's own (Cheb: at its first hop): right on average."""
    data = awkward_graph()
    theirs, conv = pair(kind)
    model = nn.Module()
    model.conv = conv
    model.forward = lambda x, graph: conv(nn.functional.dropout(x, 0.5, model.training), graph)
    vqgnn.convert(model, data, method="vq", input=option)
    assert not vqgnn.stores(model)
    n_id, graph = batch_of(data, 12)
    expected = theirs(data.x, data.edge_index)[n_id]
    torch.testing.assert_close(model.eval()(graph.x, graph), expected, atol=1e-5, rtol=1e-5)
    torch.manual_seed(3)
    model.train()
    with torch.no_grad():
        outs = torch.stack([model(graph.x, graph) for _ in range(1000)])
    assert ((outs.mean(0) - expected).abs() < 5 * outs.std(0) / 1000**0.5 + 1e-5).all()
    assert outs.std(0).min() > 0


@pytest.mark.parametrize("name", ["gcn", "sage", "gin", "cheb"])
def test_a_batch_graph_needs_convert(name):
    data = awkward_graph()
    _, conv = pair(name)
    with pytest.raises(ValueError, match=r"before vqgnn\.convert; convert the model first"):
        conv(data.x, BatchGraph(Graph(data), torch.arange(N), data.x))


@pytest.mark.parametrize("build", [lambda: pyg.GCNConv(F_IN, F_OUT), lambda: pyg.ChebConv(F_IN, F_OUT, 3)])
def test_edge_weights_beside_a_batch_graph_are_refused(build):
    data = awkward_graph()
    conv = vqgnn.convert(build(), data, method="full")
    graph = BatchGraph(Graph.of(data), torch.arange(N), data.x)
    conv(data.x, graph, None)
    conv(data.x, graph, edge_weight=None)
    for call in (lambda w: conv(data.x, graph, w), lambda w: conv(data.x, graph, edge_weight=w)):
        with pytest.raises(ValueError, match=r"1 more argument.*set data\.edge_weight.* before"):
            call(torch.ones(3))


def test_to_moves_the_store_and_half_leaves_it():
    data = awkward_graph()
    model = pyg.GCN(F_IN, 8, 2, F_OUT)
    vqgnn.convert(model, data, method="gas", codec="int8")
    (store,) = vqgnn.stores(model).values()
    before = store.pull()
    model.double().float().half()
    assert store.scale.dtype == torch.bfloat16 and torch.equal(store.pull(), before)
    model.to("meta")
    assert store.data.device.type == "meta" and store.written.device.type == "meta"


@pytest.mark.parametrize("build", [pyg.GCNConv, pyg.SAGEConv, pyg.GATConv])
def test_a_batch_graph_takes_one_x(build):
    data = awkward_graph()
    conv = vqgnn.convert(build(F_IN, F_OUT), data, method="full")
    graph = BatchGraph(Graph.of(data), torch.arange(N), data.x)
    with pytest.raises(ValueError, match=f"{build.__name__} got x of type tuple.*one tensor"):
        conv((data.x, data.x), graph)


def test_edge_features_beside_a_batch_graph_are_refused():
    data = awkward_graph()
    conv = vqgnn.convert(pyg.GATConv(F_IN, F_OUT), data, method="full")
    with pytest.raises(ValueError, match=r"set data\.edge_attr before"):
        conv(data.x, BatchGraph(Graph.of(data), torch.arange(N), data.x), torch.ones(3, 2))


@pytest.mark.parametrize("build", [pyg.GCNConv, pyg.SAGEConv, pyg.GINConv, pyg.GATConv])
def test_gradients_of_features(build):
    """Right, or refused where C X was computed once."""
    data = awkward_graph()
    theirs = build(torch.nn.Linear(F_IN, F_OUT)) if build is pyg.GINConv else build(F_IN, F_OUT)
    x = data.x.clone().requires_grad_()
    theirs(x, data.edge_index).square().sum().backward()
    for option in ("auto", "rows"):
        conv = vqgnn.convert(copy.deepcopy(theirs), data, method="full", input=option)
        batch = next(iter(vqgnn.BatchLoader(data.clone(), batch_size=N)))
        batch.x.requires_grad_()
        if option == "auto" and build is not pyg.GATConv:
            with pytest.raises(ValueError, match=r"requires a gradient.*input='rows'"):
                conv(batch.x, batch.graph)
            continue
        conv(batch.x, batch.graph).square().sum().backward()
        torch.testing.assert_close(batch.x.grad, x.grad, atol=1e-5, rtol=1e-4)
