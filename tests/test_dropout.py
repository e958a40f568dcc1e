"""Node states are stored without the noise of dropout, and get fresh noise where they are read."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from graphs import awkward_graph
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.data import HeteroData

import vqgnn
from vqgnn.conversion import stores

NODES, CHANNELS = 60, 8


class Net(nn.Module):
    """Two convs with dropout between them."""

    def __init__(self, kind, p):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = kind(CHANNELS, CHANNELS), kind(CHANNELS, CHANNELS)
        self.dropout = nn.Dropout(p)

    def forward(self, x, edge_index):
        return self.second(self.dropout(self.first(x, edge_index).relu()), edge_index)


class Custom(pyg.MessagePassing):
    """Runs by the generic path."""

    def __init__(self, in_channels, out_channels):
        super().__init__(aggr="max")
        self.lin = nn.Linear(in_channels, out_channels)

    def forward(self, x, edge_index):
        return self.lin(x + self.propagate(edge_index, x=x))


@pytest.fixture
def data():
    return awkward_graph(NODES, 240, CHANNELS)


def stored(model, data, call=lambda model, batch: model(batch.x, batch.graph), **options):
    """Rows of the second conv's store after one training batch."""
    vqgnn.convert(model, data, method="gas", fill=False, **options)
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=20, seed=0)))
    out = call(model.train(), batch)
    out.square().mean().backward()
    return {name: store.pull(batch.n_id) for name, store in stores(model).items() if not name.endswith("grad")}


@pytest.mark.parametrize(
    "kind", [pyg.GCNConv, pyg.SAGEConv, pyg.GATConv, pyg.GATv2Conv, pyg.TransformerConv, pyg.ChebConv, Custom]
)
def test_states_are_those_before_dropout(data, kind):
    def make(p):
        return Net((lambda i, o: kind(i, o, 2)) if kind is pyg.ChebConv else kind, p)

    dropped, plain = stored(make(0.9), data), stored(make(0.0), data)
    assert dropped.keys() == plain.keys()
    own = [name for name in plain if name.startswith("second")]
    assert own
    for name in own:
        torch.testing.assert_close(dropped[name], plain[name])
        assert plain[name].abs().sum() > 0


class Sum(pyg.MessagePassing):
    """Runs by the generic path; linear."""

    def __init__(self, in_channels, out_channels):
        super().__init__(aggr="mean")
        self.lin = nn.Linear(in_channels, out_channels)

    def forward(self, x, edge_index):
        return self.lin(x + self.propagate(edge_index, x=x))


class Functional(Net):
    """The same by F.dropout."""

    def forward(self, x, edge_index):
        x = self.first(x, edge_index).relu()
        return self.second(F.dropout(input=x, p=self.dropout.p, training=self.training), edge_index)


class DroppedFeatures(Net):
    """Dropout before the first conv, whose halo is then read exactly."""

    def __init__(self, kind, p):
        super().__init__(kind, p)
        del self.second

    def forward(self, x, edge_index):
        return self.first(self.dropout(x), edge_index)


def homogeneous(model, batch):
    return batch.n_id, model(batch.x, batch.graph)


def of_papers(model, batch):
    return batch["paper"].n_id, model(batch.x_dict, batch.graph_dict)["paper"]


def moments(model, data, method, call, runs=1500):
    """Mean and variance of a batch's outputs over the draws of dropout; weights and stores stay as they are."""
    vqgnn.convert(model, data, method=method, grad=False)
    loader = vqgnn.BatchLoader(data, batch_size=data.num_nodes // (1 if method == "full" else 4), seed=0)
    batch = next(iter(loader))
    with torch.no_grad():
        n_id, out = call(model.eval(), batch)  # the same whatever is read, where stores are exact
        model.train()
        outs = torch.stack([call(model, batch)[1] for _ in range(runs)])
    order = n_id.argsort()
    return n_id[order], out[order], outs.mean(0)[order], outs.var(0)[order]


def check_moments(model, data, call):
    """A batch's outputs have the mean and variance that full batch has of them."""
    n_id, out, mean, variance = moments(copy.deepcopy(model), data, "gas", call)
    every, full_out, full_mean, full_variance = moments(model, data, "full", call)
    assert torch.equal(every, torch.arange(NODES)) and 5 < len(n_id) < 25
    torch.testing.assert_close(out, full_out[n_id], atol=1e-5, rtol=1e-5)
    error = (variance.sum(1) / full_variance[n_id].sum(1)).log().abs()
    assert error.max() < 0.25, "without noise in the halo it is a fraction"
    deviation = (full_variance[n_id] / 1500).sqrt()
    assert ((mean - full_mean[n_id]).abs() < 6 * deviation + 1e-5).all()


@pytest.mark.parametrize(
    ("net", "kind"),
    [
        *((Net, kind) for kind in (pyg.GCNConv, pyg.SAGEConv, lambda i, o: pyg.GINConv(nn.Linear(i, o)), Sum)),
        *((Functional, kind) for kind in (pyg.GCNConv, Sum)),
        *((DroppedFeatures, kind) for kind in (pyg.GCNConv, pyg.GATConv, Sum)),
    ],
    ids=[
        *("gcn", "sage", "gin", "own code", "functional, gcn", "functional, own code"),
        *("features, gcn", "features, gat", "features, own code"),
    ],
)
def test_what_is_read_is_dropped_afresh(data, net, kind):
    torch.manual_seed(0)
    check_moments(net(kind, 0.5), data, homogeneous)


def test_states_are_those_before_functional_dropout(data):
    torch.testing.assert_close(
        stored(Functional(pyg.GCNConv, 0.9), data)["second"], stored(Net(pyg.GCNConv, 0.0), data)["second"]
    )


def test_a_forward_that_fails_leaves_nothing_on(data):
    class Failing(Net):
        def forward(self, x, edge_index):
            out = super().forward(x, edge_index)
            if isinstance(edge_index, vqgnn.graph.BatchGraph) and self.training:
                raise RuntimeError("by this test")
            return out

    before = torch.overrides._get_current_function_mode_stack()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="by this test"):
            stored(Failing(pyg.GCNConv, 0.5), data)
    assert torch.overrides._get_current_function_mode_stack() == before


@pytest.mark.parametrize("change", ["relu_", "in place"])
def test_what_is_changed_in_place_is_stored_as_it_is(data, change):
    """There is no row before dropout then: what came of it since is not known."""

    class Changed(Net):
        def forward(self, x, edge_index):
            x = self.dropout(self.first(x, edge_index))
            if change == "relu_":
                x.relu_()
            self.seen = x.detach().clone()
            return self.second(x, edge_index)

    model = Changed(pyg.GCNConv, 0.5)
    model.dropout.inplace = change == "in place"
    torch.testing.assert_close(stored(model, data)["second"], model.seen)


def test_compiled_models_store_the_same(data):
    run = lambda model, batch: torch.compile(model, backend="eager", fullgraph=True)(batch.x, batch.graph)  # noqa: E731
    compiled, plain = stored(Net(pyg.GCNConv, 0.9), data, run), stored(Net(pyg.GCNConv, 0.0), data)
    torch.testing.assert_close(compiled["second"], plain["second"])


def test_copies_and_pickles_do_too(data):
    model = Net(pyg.GCNConv, 0.9)
    want = stored(Net(pyg.GCNConv, 0.0), data)["second"]
    vqgnn.convert(model, data, method="gas")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(stored(copied, data)["second"], want)
        assert len(copied.dropout._forward_hooks) == 1, "converted twice, one hook"


def authors_and_papers():
    torch.manual_seed(0)
    data = HeteroData()
    for node_type in ("author", "paper"):
        data[node_type].x = torch.randn(NODES, CHANNELS)
    for edge_type in (("author", "writes", "paper"), ("paper", "by", "author")):
        data[edge_type].edge_index = torch.randint(NODES, (2, 200))
    return data


@pytest.mark.parametrize("kind", [pyg.SAGEConv, pyg.GraphConv], ids=["fused", "own code"])
def test_what_is_read_of_node_types_is_dropped_afresh(kind):
    data = authors_and_papers()
    check_moments(pyg.to_hetero(Net(kind, 0.5), data.metadata()), data, of_papers)


@pytest.mark.parametrize("kind", [pyg.SAGEConv, pyg.GraphConv], ids=["fused", "own code"])
def test_states_of_node_types_are_those_before_dropout(kind):
    data = authors_and_papers()

    def rows(p):
        model = pyg.to_hetero(Net(kind, p), data.metadata())
        vqgnn.convert(model, data, method="gas", fill=False, grad=False)
        batch = next(iter(vqgnn.BatchLoader(data, batch_size=40, seed=0)))
        out = model.train()(batch.x_dict, batch.graph_dict)
        sum(value.square().mean() for value in out.values()).backward()
        return {name: store.pull(torch.arange(NODES)) for name, store in stores(model).items() if "second" in name}

    dropped, plain = rows(0.9), rows(0.0)
    assert plain and dropped.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(dropped[name], plain[name])


def test_a_part_of_what_was_converted_may_be_called(data):
    class Task(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.gnn = Functional(pyg.GCNConv, p)

        def forward(self, x, graph):
            return self.gnn(x, graph)

        def training_step(self, batch):
            return self.gnn(batch.x, batch.graph)

    want = stored(Task(0.0), data)["gnn.second"]
    for call in (Task.training_step, lambda model, batch: model(batch.x, batch.graph)):
        torch.testing.assert_close(stored(Task(0.9), data, call)["gnn.second"], want)


def test_dropout_called_by_keyword(data):
    class Keyword(Net):
        def forward(self, x, edge_index):
            return self.second(self.dropout(input=self.first(x, edge_index).relu()), edge_index)

    want = stored(Keyword(pyg.GCNConv, 0.0), data)["second"]
    torch.testing.assert_close(stored(Keyword(pyg.GCNConv, 0.9), data)["second"], want)


def trained(model, data, seed=0):
    """What a training batch gives of a converted model."""
    torch.manual_seed(seed)
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=20, seed=0)))
    return model.train()(batch.x, batch.graph)


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_is_torchs_in_all_but_its_speed(data, dtype, p):
    """Share, scale, gradient, and the seed that decides; in evaluation nothing is dropped."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.x = pyg.GCNConv(CHANNELS, CHANNELS), torch.ones(500, 40, dtype=dtype, requires_grad=True)
            self.dropout = nn.Dropout(p)

        def forward(self, x, edge_index):
            self.conv(x, edge_index)
            return self.dropout(self.x)

    model = vqgnn.convert(Linear(), data)
    out = trained(model, data)
    assert out.dtype == dtype and out.unique().tolist() == pytest.approx([0] if p == 1 else [0, 1 / (1 - p)])
    assert (out == 0).double().mean().item() == pytest.approx(p, abs=0.02)
    (grad,) = torch.autograd.grad(out.sum(), model.x)
    assert torch.equal(grad, out)
    assert torch.equal(trained(model, data), out)
    assert p == 1 or not torch.equal(trained(model, data, seed=1), out)
    batch = next(iter(vqgnn.BatchLoader(data)))
    assert model.eval()(batch.x, batch.graph) is model.x


def test_dropout_on_a_cpu_is_the_kernels(data, monkeypatch):
    shares = []
    monkeypatch.setattr("vqgnn.dropout.hash_dropout", lambda x, p, seed: shares.append(p) or x)
    trained(vqgnn.convert(Net(pyg.GCNConv, 0.3), data), data)
    assert shares == [0.3]


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), lambda x: F.dropout(x, 0.5)], ids=["module", "function"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_part_drops_the_same_again(data, dropout, reentrant):
    """torch.utils.checkpoint runs it again in the backward, outside of the model's forward."""

    class Model(nn.Module):
        def __init__(self, again):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.again = pyg.GCNConv(CHANNELS, CHANNELS), again
            self.part = (
                nn.Sequential(nn.Linear(CHANNELS, CHANNELS), dropout) if isinstance(dropout, nn.Module) else None
            )
            self.lin = nn.Linear(CHANNELS, CHANNELS)

        def run(self, x):
            return self.lin(dropout(x).relu()) if self.part is None else self.lin(self.part(x))

        def forward(self, x, edge_index):
            x = self.conv(x, edge_index)
            return checkpoint(self.run, x, use_reentrant=reentrant) if self.again else self.run(x)

    gradients = []
    for again in (False, True):
        model = vqgnn.convert(Model(again), data)
        trained(model, data).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)
