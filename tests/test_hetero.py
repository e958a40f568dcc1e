"""Heterogeneous graphs: PyG's `to_hetero` models and `HeteroConv` layers on mini-batches of nodes of every type."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData
from torch_geometric.nn import HeteroConv, to_hetero

import vqgnn
from vqgnn.hetero_graph import HeteroGraph
from vqgnn.inference import layerwise
from vqgnn.relation_conv import GIVEN_EDGES, RelationConv

CLASSES, HIDDEN = 3, 8
CITES, WRITES, BY = ("paper", "cites", "paper"), ("author", "writes", "paper"), ("paper", "by", "author")
IN, HAS, ABOUT = ("paper", "in", "venue"), ("venue", "has", "paper"), ("topic", "of", "paper")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def hetero_graph(topics: bool = False) -> HeteroData:
    """Types of different sizes and widths, edges within a type, duplicates, nodes without any, and a tiny type.

    topics: also a type that no edge leads to.
    """
    generator = torch.Generator().manual_seed(1)
    data = HeteroData()
    for node_type, size, features in (("paper", 40, 6), ("author", 25, 5), ("venue", 4, 7), ("topic", 9, 4)):
        if node_type != "topic" or topics:
            data[node_type].x = torch.randn(size, features, generator=generator)
            data[node_type].y = torch.randint(CLASSES, (size,), generator=generator)
    for edge_type, count in ((CITES, 110), (WRITES, 80), (BY, 70), (IN, 30), (HAS, 25), (ABOUT, 20)):
        if edge_type != ABOUT or topics:
            ends = [data[edge_type[k]].num_nodes - (1 if "venue" in edge_type else 2) for k in (0, 2)]
            edges = torch.stack([torch.randint(n, (count,), generator=generator) for n in ends])
            data[edge_type].edge_index = torch.cat([edges, edges[:, :5]], 1)
            data[edge_type].edge_weight = torch.rand(count + 5, generator=generator) + 0.2
    return data


class Stack(nn.Module):
    """A homogeneous model of three convs, for to_hetero."""

    def __init__(self, build):
        super().__init__()
        sizes = [HIDDEN, HIDDEN, CLASSES]
        self.convs = nn.ModuleList(build((-1, -1), size) for size in sizes)

    def forward(self, x, edge_index):
        for conv in self.convs[:-1]:
            x = conv(x, edge_index).tanh()
        return self.convs[-1](x, edge_index)


class Layers(nn.Module):
    """HeteroConv layers over encoded features, with a conv of another kind for every edge type."""

    def __init__(self, data: HeteroData, layers: int = 2):
        super().__init__()
        self.encoders = nn.ModuleDict({t: nn.Linear(data[t].num_features, HIDDEN) for t in data.node_types})
        self.layers = nn.ModuleList(HeteroConv(self.convs(), aggr="mean") for _ in range(layers))
        self.norms = nn.ModuleDict({t: nn.BatchNorm1d(HIDDEN) for t in data.node_types})
        self.heads = nn.ModuleDict({t: nn.Linear(HIDDEN, CLASSES) for t in data.node_types})

    def convs(self):
        return {
            CITES: pyg.GCNConv(HIDDEN, HIDDEN),
            WRITES: pyg.SAGEConv((HIDDEN, HIDDEN), HIDDEN, project=True),
            BY: pyg.GATv2Conv(HIDDEN, HIDDEN, heads=2, concat=False, add_self_loops=False),
            IN: pyg.GraphConv((HIDDEN, HIDDEN), HIDDEN),
            HAS: pyg.GINConv(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh())),
            ABOUT: pyg.SAGEConv(HIDDEN, HIDDEN, aggr="max"),
        }

    def forward(self, x_dict, edge_index_dict, edge_weight_dict=None):
        weights = {} if edge_weight_dict is None else {"edge_weight_dict": edge_weight_dict}
        x = {t: self.encoders[t](x).tanh() for t, x in x_dict.items()}
        for layer in self.layers:
            x = {t: self.norms[t](rows).tanh() for t, rows in {**x, **layer(x, edge_index_dict, **weights)}.items()}
        return {t: self.heads[t](rows) for t, rows in x.items()}


STACKS = {
    "SAGEConv": pyg.SAGEConv,
    "GraphConv": pyg.GraphConv,
    "GATConv": lambda i, o: pyg.GATConv(i, o, heads=2, concat=False, add_self_loops=False),
}
MODELS = [*STACKS, "layers"]


def build(name: str) -> tuple[nn.Module, HeteroData]:
    if name == "layers":
        data = hetero_graph(topics=True)
        for edge_type in data.edge_types:  # of those, GCNConv and GraphConv alone take weights
            if edge_type not in (CITES, IN):
                del data[edge_type].edge_weight
        return Layers(data).eval(), data
    data = hetero_graph()
    for edge_type in data.edge_types:
        del data[edge_type].edge_weight
    model = to_hetero(Stack(STACKS[name]), data.metadata())
    model(data.x_dict, data.edge_index_dict)  # lazy parameters get their shape
    return model, data


def pyg_forward(model: nn.Module, data: HeteroData) -> dict:
    weights = data.edge_weight_dict if any("edge_weight" in store for store in data.edge_stores) else None
    if weights is None:
        return model(data.x_dict, data.edge_index_dict)
    return model(data.x_dict, data.edge_index_dict, weights)


def loss_of(out: dict, y: dict):
    return sum(F.cross_entropy(out[t], y[t], reduction="sum") for t in out)


def full(model: nn.Module, data: HeteroData):
    """PyG's outputs, and the gradient of all weights."""
    model = copy.deepcopy(model)
    out = pyg_forward(model, data)
    loss_of(out, data.y_dict).backward()
    return {t: rows.detach() for t, rows in out.items()}, gradient(model)


def gradient(model: nn.Module):
    """The last layer's convs into types of which the loss knows nothing have none."""
    return torch.cat([p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in model.parameters()])


def batches(data: HeteroData, size: int = 25, **options):
    return vqgnn.BatchLoader(data, batch_size=size, seed=1, prefetch=0, **options)


def epoch(model: nn.Module, data: HeteroData, size: int = 25, times: int = 1):
    """Outputs and summed gradients of the last of some passes over mini-batches, with frozen weights."""
    outputs = {t: torch.full((data[t].num_nodes, CLASSES), torch.nan) for t in data.node_types}
    loader = batches(data, size)
    for _ in range(times):
        model.zero_grad()
        for batch in loader:
            out = model(batch.x_dict, batch.graph_dict)
            loss_of(out, batch.y_dict).backward()
            for t, rows in out.items():
                outputs[t][batch[t].n_id] = rows.detach()
    return outputs, gradient(model)


def frozen(model: nn.Module) -> nn.Module:
    """Batch statistics would differ from the whole graph's; the convs train, and so write their stores."""
    for module in model.modules():
        module.training = isinstance(module, RelationConv)
    return model


def close(mine, truth):
    torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-3)


def error(mine, truth):
    return float((mine - truth).norm() / truth.norm())


# ---- the invariants of test_invariants.py ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vq", "gas", "lmc", "drop", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_1_batch_of_the_whole_graph_is_pyg(name, method):
    model, data = build(name)
    model.train()
    keys = list(model.state_dict())
    out, truth = full(model, data)
    vqgnn.convert(model, data, method=method, grad=True if method in ("vq", "lmc") else None)
    assert list(model.state_dict()) == keys
    close(full(model, data), (out, truth))
    close(epoch(model, data, size=data.num_nodes), (out, truth))


@pytest.mark.parametrize("method", ["gas", "lmc"])
@pytest.mark.parametrize("name", MODELS)
def test_2_frozen_weights_reach_the_full_output(name, method):
    model, data = build(name)
    out, _ = full(model, data)
    frozen(vqgnn.convert(model, data, method=method, fill=False))
    filled = copy.deepcopy(model)
    vqgnn.warmup(filled, data)
    close(epoch(filled, data)[0], out)
    first, _ = epoch(model, data)
    assert max((first[t] - out[t]).abs().max() for t in out) > 1e-2, "an empty store must show, or this proves nothing"
    close(epoch(model, data, times=3)[0], out)


@pytest.mark.parametrize("name", MODELS)
def test_3_batch_gradients_add_up_to_the_full_gradient(name):
    model, data = build(name)
    _, truth = full(model, data)
    other = copy.deepcopy(model)
    frozen(vqgnn.convert(model, data, method="lmc", grad=True))
    frozen(vqgnn.convert(other, data, method="gas"))
    close(epoch(model, data, times=6)[1], truth)
    assert error(epoch(other, data, times=6)[1], truth) > 0.05, "without gradient rows the sum must be biased"


@pytest.mark.parametrize("name", MODELS)
def test_4_vq_is_exact_with_a_code_for_every_row(name):
    model, data = build(name)
    out, _ = full(model, data)
    vqgnn.convert(model, data, method="vq", codec="pq:d=4,k=64").eval()
    close(epoch(model, data)[0], out)


@pytest.mark.parametrize("name", ["SAGEConv", "layers"])
def test_vq_gradient_codewords_compensate(name):
    model, data = build(name)
    _, truth = full(model, data)
    errors = {}
    for grad in (False, True):
        other = vqgnn.convert(copy.deepcopy(model), data, codec="pq:d=2,k=64", decay=0.5, grad=grad)
        errors[grad] = error(epoch(frozen(other), data, times=8)[1], truth)
    assert errors[True] < 0.2 and errors[True] < 0.5 * errors[False], errors


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fill", [True, False])
def test_layerwise_inference_is_exact(name, fill):
    model, data = build(name)
    out, _ = full(model.eval(), data)
    vqgnn.convert(model, data, method="vq", fill=fill)
    before = {k: store.state_dict() for k, store in copy.deepcopy(vqgnn.stores(model)).items()}
    for size in (None, 9):
        torch.testing.assert_close(layerwise(model, data, batch_size=size), out, rtol=1e-4, atol=1e-4)
    for k, store in vqgnn.stores(model).items():
        torch.testing.assert_close(store.state_dict(), before[k], rtol=0, atol=0)


# ---- stores ----------------------------------------------------------------------------------------------------------


def test_one_store_a_node_type_and_layer():
    model, data = build("SAGEConv")
    vqgnn.convert(model, data, method="lmc")
    stores = vqgnn.stores(model)
    states = {name: store.num_nodes for name, store in stores.items() if not name.endswith(".grad")}
    first = {"paper": "paper__cites__paper", "author": "author__writes__paper", "venue": "venue__has__paper"}
    assert states == {f"convs.{k}.{first[t]}": data[t].num_nodes for k in (1, 2) for t in first}
    receivers = data[BY].edge_index[1].unique().numel()  # no gradient is read of a node without edges
    assert stores["convs.2.paper__by__author.grad"].num_nodes == receivers < 25 and len(stores) == 6 + 2 * 5
    convs = model.convs[1]
    assert convs["paper__by__author"].store_use.store is convs["paper__cites__paper"].store_use.store
    before = {name: int(store.step) for name, store in stores.items()}
    batch = next(iter(batches(data)))
    loss_of(model(batch.x_dict, batch.graph_dict), batch.y_dict).backward()
    assert {name: int(store.step) - before[name] for name, store in stores.items()} == dict.fromkeys(stores, 1)
    model.eval()
    loss_of(model(batch.x_dict, batch.graph_dict), batch.y_dict).backward()
    assert {name: int(store.step) - before[name] for name, store in stores.items()} == dict.fromkeys(stores, 1)


def test_paths_tell_what_is_shared():
    model, data = build("layers")
    vqgnn.convert(model, data, method="lmc", grad=True)
    found = {path.name.removeprefix("layers.0.convs."): path for path in vqgnn.paths(model)}
    by = {name.strip("<>").split("___")[1]: path for name, path in found.items() if "layers" not in name}
    assert by["cites"][1:] == ("GCNConv", "fused", "fp32 of paper, with gradients", 72)
    assert by["in"][1:] == ("GraphConv", "generic", "fp32 of paper, shared, with gradients", 36)
    assert by["of"][1:] == ("SAGEConv", "generic", "fp32 of topic, with gradients", 72)
    assert by["writes"][1:] == ("SAGEConv", "fused", "fp32 of author, with gradients", 72)  # of its projection
    assert by["by"][1:] == (
        "GATv2Conv",
        "generic",
        "fp32 of paper, shared, with gradients",
        68 + 36,
    )  # of two heads, and what targets are


@pytest.mark.parametrize("copies", ["deepcopy", "torch.save"])
def test_copies_share_among_themselves(copies):
    model, data = build("layers")
    vqgnn.convert(model, data, method="lmc", grad=True)
    if copies == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    steps = [int(store.step) for store in vqgnn.stores(model).values()]
    assert list(vqgnn.stores(other)) == list(vqgnn.stores(model))

    def fewest(batch):
        return min(graph.receivers(GIVEN_EDGES)[0].numel() for graph in batch.graph_dict.values())

    batch = max(batches(data), key=fewest)  # in which each conv has something to push
    assert fewest(batch) > 0
    out = frozen(other)(batch.x_dict, batch.graph_dict)
    close(out, model.eval()(batch.x_dict, batch.graph_dict))
    loss_of(out, batch.y_dict).backward()
    assert [int(store.step) for store in vqgnn.stores(model).values()] == steps
    assert [int(store.step) for store in vqgnn.stores(other).values()] == [step + 1 for step in steps]


def test_dropped_messages_leave_the_whole_graphs_normalisation():
    model, data = build("SAGEConv")
    hidden = {}
    for conv in (layer[key] for layer in model.convs for key in layer):
        conv.register_forward_hook(lambda conv, args, out: hidden.update({conv: (args[0], out)}))
    model(data.x_dict, data.edge_index_dict)
    exact = dict(hidden)
    vqgnn.convert(model, data, method="drop")
    batch = next(iter(batches(data)))
    model(batch.x_dict, batch.graph_dict)
    for key, edge_type in {"__".join(edge_type): edge_type for edge_type in data.edge_types}.items():
        first, second = model.convs[0][key], model.convs[1][key]
        n_id, sources = batch[edge_type[2]].n_id, batch[edge_type[0]].n_id
        close(hidden[first][1], exact[first][1][n_id])  # the input layer reads the halo's features
        mean = torch.zeros(data[edge_type[2]].num_nodes, data[edge_type[0]].num_nodes)
        source, target = data[edge_type].edge_index
        mean.index_put_((target, source), torch.ones(len(source)), accumulate=True)
        mean = (mean / mean.sum(1, keepdim=True).clamp(min=1))[n_id][:, sources]
        x, out = hidden[second]
        x = x if isinstance(x, tuple) else (x, x)
        close(out, second.lin_l(mean @ x[0]) + second.lin_r(x[1]))


@pytest.mark.parametrize("input", ["precompute", "rows", "codes"])
def test_inputs(input):
    model, data = build("SAGEConv")
    out, _ = full(model, data)
    vqgnn.convert(model, data, method="gas", input=input)
    assert ("convs.0.paper__cites__paper" in vqgnn.stores(model)) == (input == "codes")
    close(epoch(model, data)[0], out)
    close(layerwise(model, data, 25), out)


def test_stores_on_disk(tmp_path):
    model, data = build("layers")
    out, _ = full(model, data)
    vqgnn.convert(model, data, method="gas", place="disk", folder=tmp_path)
    assert {store.place for store in vqgnn.stores(model).values()} == {"disk"}
    close(epoch(frozen(model), data)[0], out)
    close(layerwise(model, data, 25, folder=tmp_path), out)


@pytest.mark.parametrize("name", ["SAGEConv", "layers"])
def test_vq_trains(name):
    model, data = build(name)
    vqgnn.convert(model.train(), data, method="vq", codec="pq:d=4,k=8")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)  # 0.02 overfits: full batch's exact loss then rises, too

    def loss():
        return loss_of(layerwise(model, data), data.y_dict) / data.num_nodes

    before, loader = loss(), batches(data, 40)
    for _ in range(12):
        for batch in loader:
            optimizer.zero_grad()
            loss_of(model(batch.x_dict, batch.graph_dict), batch.y_dict).backward()
            optimizer.step()
    assert loss() < 0.85 * before


class RGCN(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.second = (
            pyg.RGCNConv(6, 6, 3, **options),
            pyg.RGCNConv(6, 3, 3, aggr=options.get("aggr", "mean")),
        )

    def forward(self, x, edge_index, edge_type=None):
        return self.second(self.first(x, edge_index, edge_type).tanh(), edge_index, edge_type)


@pytest.mark.parametrize("options", [{"num_bases": 2}, {"num_blocks": 3}, {"aggr": "sum"}], ids=str)
def test_rgcn_propagates_over_several_sets_of_edges(options):
    model = RGCN(**options)
    x, edge_index, edge_type = torch.randn(30, 6), torch.randint(28, (2, 150)), torch.randint(3, (150,))
    y = torch.randint(CLASSES, (30,))
    with pytest.raises(ValueError, match=r"RGCNConv propagates over several sets of edges.*HeteroData"):
        vqgnn.convert(copy.deepcopy(model), Data(x=x, edge_index=edge_index, edge_type=edge_type))
    data = HeteroData({"node": {"x": x, "y": y}})
    data["node", "to", "node"].edge_index, data["node", "to", "node"].edge_type = edge_index, edge_type
    truth = copy.deepcopy(model)
    expected = truth(x, edge_index, edge_type)
    F.cross_entropy(expected, y, reduction="sum").backward()

    def forward(model, batch):
        return model(batch["node"].x, batch["node", "to", "node"].graph)

    # of a mean, gradients are kept on request: then the halo's messages are computed from the rows of two hops
    vqgnn.convert(model, data, method="lmc", grad=None if "aggr" in options else True, forward=forward)
    assert list(vqgnn.stores(model)) == ["second", "second.grad", "second.grad1", "second.grad2"]
    close(layerwise(model, data, 7, forward=forward), expected.detach())
    for _ in range(3):
        model.zero_grad()
        for batch in batches(data, 10):
            out = forward(model, batch)
            close(out.detach(), expected[batch["node"].n_id].detach())
            F.cross_entropy(out, batch["node"].y, reduction="sum").backward()
    close(gradient(model), gradient(truth))


def test_edge_attributes_come_from_the_data():
    data = hetero_graph()
    data[WRITES].edge_attr = torch.randn(data[WRITES].num_edges, 2)
    data[CITES].edge_attr = torch.randn(data[CITES].num_edges, 2)
    convs = {WRITES: pyg.GATv2Conv((5, 6), 6, edge_dim=2, add_self_loops=False), CITES: pyg.GATConv(6, 6, edge_dim=2)}
    model = HeteroConv(convs)
    expected = model(data.x_dict, data.edge_index_dict, edge_attr_dict=data.edge_attr_dict)["paper"].detach()
    vqgnn.convert(model, data, method="gas")
    for batch in batches(data):
        close(model(batch.x_dict, batch.graph_dict)["paper"], expected[batch["paper"].n_id])
    close(layerwise(model, data, 7)["paper"], expected)
    batch = next(iter(batches(data)))
    with pytest.raises(ValueError, match=r"got more arguments beside a batch graph.*before vqgnn\.convert"):
        model(batch.x_dict, batch.graph_dict, edge_attr_dict=data.edge_attr_dict)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_keeps_states_in_fp32(name):
    model, data = build(name)
    vqgnn.convert(model, data, method="lmc", grad=True)
    other, batch = frozen(copy.deepcopy(model)), next(iter(batches(data)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(other(batch.x_dict, batch.graph_dict), batch.y_dict)
    loss.backward()
    loss_of(frozen(model)(batch.x_dict, batch.graph_dict), batch.y_dict).backward()
    assert error(gradient(other), gradient(model)) < 0.05
    floats = [t for store in vqgnn.stores(other).values() for t in store.buffers() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float32}


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["node", "cluster"])
def test_each_node_is_in_one_batch_of_an_epoch(sampler, tmp_path):
    data = hetero_graph(topics=True)
    loader = batches(data, 16, sampler=sampler, cache_dir=tmp_path)
    found = list(loader)
    assert len(found) == len(loader) == 5
    for t in data.node_types:
        n_id = torch.cat([batch[t].n_id for batch in found])
        assert n_id.sort().values.tolist() == list(range(data[t].num_nodes))
        for batch in found:
            assert (batch[t].n_id.diff() > 0).all()
            assert torch.equal(batch[t].x, data[t].x[batch[t].n_id])
            assert torch.equal(batch[t].y, data[t].y[batch[t].n_id])
    if sampler == "node":
        sizes = [batch.num_nodes for batch in found]
        assert max(sizes) - min(sizes) <= len(data.node_types)
        assert {batch["paper"].num_nodes for batch in found} == {8}
        assert {batch["venue"].num_nodes for batch in found} == {0, 1}
    assert not torch.equal(next(iter(loader))["paper"].n_id, found[0]["paper"].n_id)
    loader.set_epoch(0)
    assert torch.equal(next(iter(loader))["paper"].n_id, found[0]["paper"].n_id)


@pytest.mark.parametrize("edge_type", [CITES, WRITES, HAS], ids=lambda edge_type: edge_type[1])
def test_a_batchs_share_of_a_rectangular_matrix(edge_type):
    data = hetero_graph()
    relation = HeteroGraph.of(data).relations[edge_type]
    dense = torch.zeros(relation.num_nodes, relation.num_sources)
    weight = torch.rand(data[edge_type].num_edges)
    source, target = data[edge_type].edge_index
    dense.index_put_((target, source), weight, accumulate=True)
    for batch in batches(data, 30):
        graph = batch[edge_type].graph
        for valued in (False, True):  # edges into the batch
            edges = graph.edges(GIVEN_EDGES, valued)
        rows = torch.cat([graph.source_id, edges.others])
        mine = torch.zeros(graph.n_id.numel(), relation.num_sources)
        mine.index_put_((edges.edge_index[1], rows[edges.edge_index[0]]), weight[edges.ids], accumulate=True)
        torch.testing.assert_close(mine, dense[graph.n_id])
        csr, csr_t = graph.csr(vqgnn.Convolution("mean"))
        assert csr.rowptr.numel() == graph.n_id.numel() + 1 and csr_t.rowptr.numel() == graph.source_id.numel() + 1
        assert csr.col.numel() == csr.weight.numel() == int(csr.rowptr[-1])
        for all_sources in (False, True):  # edges out of it
            targets, edges = graph.edges_out(GIVEN_EDGES, all_sources, True)
            rows = torch.cat([targets, edges.others]) if relation.square else edges.others
            mine = torch.zeros(targets.numel(), relation.num_sources)
            mine.index_put_((edges.edge_index[1], rows[edges.edge_index[0]]), weight[edges.ids], accumulate=True)
            expected = dense[targets].clone()
            if not all_sources:
                outside = torch.ones(relation.num_sources, dtype=torch.bool)
                outside[graph.source_id] = False
                expected[:, outside] = 0
            assert set(targets.tolist()) == set(target[torch.isin(source, graph.source_id)].tolist()) - set(
                graph.n_id.tolist()
            )
            torch.testing.assert_close(mine, expected)


# ---- inference -------------------------------------------------------------------------------------------------------


class Skips(nn.Module):
    """Convs of one edge type in a row, with skips over them, and a result for one type."""

    def __init__(self, norm: bool = False):
        super().__init__()
        self.first, self.second = pyg.SAGEConv((5, 6), 6), pyg.GATConv((6, 5), 6, add_self_loops=False)
        self.third, self.loop = pyg.SAGEConv((6, 6), CLASSES), pyg.GATConv(6, 6)
        self.norm = pyg.GraphNorm(6) if norm else nn.Identity()

    def forward(self, x, edges):
        paper, author = x["paper"], x["author"]
        paper = paper + self.first((author, paper), edges[WRITES])
        paper = self.norm(paper + self.loop(paper, edges[CITES]))
        author = self.second((paper, author), edges[BY]).tanh()
        return self.third((author, paper + x["paper"]), edges[WRITES])


@pytest.mark.parametrize("norm", [False, True])
def test_convs_in_a_row_with_skips_and_self_loops(norm):
    model, data = Skips(norm), hetero_graph()
    expected = model(data.x_dict, data.edge_index_dict).detach()
    vqgnn.convert(model, data, method="gas")
    torch.testing.assert_close(layerwise(model, data, None if norm else 7), expected, atol=1e-4, rtol=1e-4)
    if norm:
        with pytest.raises(ValueError, match=r"batch_size=7 splits the 69 nodes, but Skips takes statistics"):
            layerwise(model, data, 7)
        return
    for batch in batches(data):
        torch.testing.assert_close(
            model(batch.x_dict, batch.graph_dict), expected[batch["paper"].n_id], atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(layerwise(model, data, 25, method="stale"), expected, atol=1e-4, rtol=1e-4)
    half = layerwise(model, data, 25, dtype=torch.float16)
    torch.testing.assert_close(half, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("skip", ["detach", "gate", "numpy"])
def test_what_skips_a_conv_without_a_gradient(skip):
    """An earlier conv's result, used again where autograd does not see it, is the whole graph's too."""
    use = {"detach": Tensor.detach, "gate": lambda h: h > 0, "numpy": lambda h: torch.from_numpy(h.detach().numpy())}

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(pyg.GraphConv(6, 6) for _ in range(3))

        def forward(self, x_dict, edges):
            h = self.convs[0](x_dict["paper"], edges[CITES])
            later = self.convs[1](h.relu(), edges[CITES]) + use[skip](h)
            return self.convs[2](later, edges[CITES]) + use[skip](h)

    graph, model, data = hetero_graph(), Skips().eval(), HeteroData()
    data["paper"].x, data[CITES].edge_index = graph["paper"].x, graph[CITES].edge_index
    expected = model(data.x_dict, data.edge_index_dict).detach()
    vqgnn.convert(model, data, method="gas")
    torch.testing.assert_close(layerwise(model, data, 7), expected, atol=1e-4, rtol=1e-4)
    loader = vqgnn.BatchLoader(data, 7)
    for batch in loader:
        out = model(batch.x_dict, batch.graph_dict)
        torch.testing.assert_close(out, expected[batch["paper"].n_id], atol=1e-4, rtol=1e-4)


def test_batches_bring_the_datas_other_tensors():
    model, data = build("layers")
    data["author"].pe = torch.randn(25, 5)
    data["paper"].scale = torch.randint(1, 3, (40,))

    def inputs(batch):
        x = batch.x_dict
        return x | {"author": x["author"] + batch["author"].pe, "paper": x["paper"] * batch["paper"].scale[:, None]}

    def forward(model, batch):
        return model(inputs(batch), batch.graph_dict)

    expected = model(inputs(data), data.edge_index_dict, data.edge_weight_dict)
    vqgnn.convert(model, data, method="gas", forward=forward)
    out = layerwise(model, data, 25, forward=forward)
    stale = layerwise(model, data, 25, method="stale", forward=forward)
    for node_type, rows in expected.items():
        torch.testing.assert_close(out[node_type], rows.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(stale[node_type], rows.detach(), atol=1e-4, rtol=1e-4)


def test_a_pass_serves_all_convs_of_a_layer(monkeypatch):
    model, data = build("SAGEConv")
    vqgnn.convert(model, data, method="gas")
    calls = []
    real = HeteroGraph.batch
    monkeypatch.setattr(HeteroGraph, "batch", lambda *args, **options: calls.append(0) or real(*args, **options))
    layerwise(model, data)
    assert len(calls) == 3 + 3  # looks at the model's structure, and a pass a layer


# ---- what is said ----------------------------------------------------------------------------------------------------


def without(name):
    data = hetero_graph()
    del data["venue"][name]
    return data


def with_x(x):
    data = hetero_graph()
    data["venue"].x = x
    return data


def with_edges(edges):
    data = hetero_graph()
    data[IN].edge_index = edges
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: with_x(torch.ones(4)), r"data\['venue'\]\.x must be \[num_nodes=4, features\], got \(4,\)"),
        (lambda: with_x(torch.ones(4, 3).double()), r"data\['venue'\]\.x must be float32"),
        (lambda: with_edges([[0], [0]]), r"data\[\('paper', 'in', 'venue'\)\]\.edge_index must be a \[2, num_edges\]"),
        (lambda: with_edges(torch.tensor([[0, 40], [0, 0]])), r"edge_index\[0\] holds .* 0\.\.40, allowed are 0\.\.39"),
        (lambda: with_edges(torch.tensor([[0, 39], [0, 4]])), r"edge_index\[1\] holds .* 0\.\.4.*'venue'\]\.num_nodes"),
        (lambda: without("x"), r"data\['venue'\]\.x must be .* got None; give every node features"),
    ],
    ids=["x-shape", "x-dtype", "edges-list", "source-id", "target-id", "no-x"],
)  # fmt: skip
def test_data_that_is_wrong_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        vqgnn.BatchLoader(data())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = pyg.SAGEConv((5, 6), 6)

    def forward(self, x, edges):
        paper = self.conv((x["author"], x["paper"]), edges[WRITES])
        return self.conv((x["author"], paper), edges[WRITES])


class Touches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = pyg.SAGEConv((5, 6), 6)

    def forward(self, x, edges):
        return self.conv((x["author"], x["paper"]), edges[WRITES][:, :3])


class OutDegrees(pyg.MessagePassing):
    """Normalises by the degrees of sources, which have edges out of a batch."""

    def forward(self, x, edge_index):
        degree = torch.bincount(edge_index[0], minlength=len(x[0])).clamp(min=1)
        return self.propagate(edge_index, x=(x[0] / degree[:, None], x[1]))

    def message(self, x_j):
        return x_j


class Centred(pyg.MessagePassing):
    """Takes a mean over all sources (k = 0) or targets (k = 1) from what it sends."""

    def __init__(self, k):
        super().__init__()
        self.k = k
        self.lin = nn.Linear(6, 5)

    def forward(self, x, edge_index):
        source, target = (rows - rows.mean(0) if k == self.k else rows for k, rows in enumerate(x))
        return self.propagate(edge_index, x=(source, self.lin(target)))

    def message(self, x_j, x_i):
        return x_j * x_i.tanh()


def single(conv, edge_type):
    return HeteroConv({edge_type: conv})


def refused(model, message, data=None, **options):
    data = hetero_graph() if data is None else data
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        vqgnn.convert(model, data, **options)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.filterwarnings("ignore:There exist node types")
def test_models_that_cannot_be_converted_are_named():
    refused(to_hetero(Stack(pyg.SAGEConv), hetero_graph().metadata()), "lazy parameters.*run it once")
    refused(Twice(), "SAGEConv is called twice in one forward")
    refused(Touches(), r"uses \[\.\.\.\] of its edge_index.*into a transform")
    refused(single(OutDegrees(), WRITES), "OutDegrees of .*'writes'.* depend on edges into other nodes")
    for k in (0, 1):
        refused(single(Centred(k), WRITES), "Centred of .*'writes'.* rows of others than its sources")
    refused(single(pyg.ChebConv(6, 3, 2), CITES), "ChebConv of .*'cites'.* cannot run on mini-batches: called as conv")
    data = hetero_graph()
    data["author"].x = torch.randn(25, 6)
    refused(
        single(pyg.GCNConv(6, 3, add_self_loops=False), WRITES),
        "GCNConv of .*'writes'.* between two types use SAGEConv",
        data,
    )
    refused(single(pyg.GraphConv(6, 3, flow="target_to_source"), CITES), "GraphConv.*reverse the edges")
    channels = {"paper": 6, "author": 5, "venue": 7}
    refused(pyg.HGTConv(channels, 8, hetero_graph().metadata()), "HGTConv takes all edge types at once.*HeteroConv")
    refused(single(pyg.SAGEConv((5, 6), 3), WRITES), "place='host' is for Data", place="host")
    refused(
        single(pyg.GATConv((5, 6), 3, add_self_loops=False), WRITES), "needs a fixed C, GATConv", input="precompute"
    )
    model = nn.ModuleDict({"used": Skips(), "left": pyg.SAGEConv((5, 6), 6)})
    refused(model, "conv 'left' is not reached", forward=lambda m, batch: m["used"](batch.x_dict, batch.graph_dict))


def test_a_result_that_is_no_row_a_node_is_named():
    data = hetero_graph()
    model = single(pyg.SAGEConv((5, 6), 3), WRITES)

    def forward(model, batch):
        return model(batch.x_dict, batch.graph_dict)["paper"][:2]

    vqgnn.convert(model, data, forward=forward)  # which may do as it likes; inference may not
    with pytest.raises(ValueError, match=r"returned \[2, 3\] for .* return a dict \{node_type: rows\}"):
        layerwise(model, data, forward=forward)


def test_a_type_without_rows_is_named():
    data = hetero_graph(topics=True)
    layers = nn.ModuleList(
        HeteroConv({ABOUT: pyg.SAGEConv((4, 6), 6) if k == 0 else pyg.SAGEConv((6, 6), 3)}) for k in (0, 1)
    )

    def forward(model, batch):
        x = batch.x_dict
        for layer in model:
            x = layer(x, batch.graph_dict)
        return x

    with pytest.raises(ValueError, match=r"SAGEConv of .*'of'.* got None as x of 'topic'.*ToUndirected"):
        vqgnn.convert(layers, data, forward=forward)


class Own(pyg.MessagePassing):
    """A conv of a user: what `prepare` does to sources before they are told, what `finish` does to results."""

    def __init__(self, prepare=lambda x: x, finish=lambda out: out, gate=None):
        super().__init__(aggr="add")
        self.lin, self.prepare, self.finish, self.gate = nn.Linear(6, 6), prepare, finish, gate

    def forward(self, x, edge_index):
        source, target = x if isinstance(x, tuple) else (x, x)
        return self.finish(self.propagate(edge_index, x=(self.prepare(source), target)))

    def message(self, x_j, x_i):
        return self.lin(x_j) if self.gate is None else self.lin(x_j) * self.gate(x_i)


class TwoOwn(nn.Module):
    """Two layers of a conv for each edge type, between types of 30 and `small` nodes; `mix` sees rows between them."""

    TYPES = (("a", "to", "b"), ("b", "back", "a"), ("a", "self", "a"))

    def __init__(self, conv=Own, mix=lambda x: x):
        super().__init__()
        self.layers = nn.ModuleList(HeteroConv({edge_type: conv() for edge_type in self.TYPES}) for _ in range(2))
        self.mix = mix

    def forward(self, x, edges):
        return self.layers[1](self.mix(self.layers[0](x, edges)), edges)

    @classmethod
    def graph(cls, small=20):
        data = HeteroData({node_type: {"x": torch.randn(n, 6)} for node_type, n in (("a", 30), ("b", small))})
        for edge_type in cls.TYPES:
            ends = (data[edge_type[k]].num_nodes for k in (0, 2))
            data[edge_type].edge_index = torch.stack([torch.randint(n, (90,)) for n in ends])
        return data


def assert_pyg(model, data):
    """Batches with stores of exact rows, and inference by parts, give what PyG's model gives."""
    with torch.no_grad():
        truth = model.eval()(data.x_dict, data.edge_index_dict)
    vqgnn.convert(model, data, method="gas")
    for batch in vqgnn.BatchLoader(data, batch_size=12):
        close(model(batch.x_dict, batch.graph_dict), {k: rows[batch[k].n_id] for k, rows in truth.items()})
    close(layerwise(model, data, batch_size=9), truth)


def test_hooks_on_messages_are_called():
    model = TwoOwn(lambda: pyg.SAGEConv((6, 6), 6))
    for conv in model.modules():
        if isinstance(conv, pyg.SAGEConv):
            conv.register_message_forward_hook(lambda conv, given, out: 2 * out)
    assert_pyg(model, TwoOwn.graph())


class InPlaceBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.first, self.second = nn.Linear(6, 6), pyg.GraphConv((6, 6), 3), pyg.GraphConv((6, 6), 3)

    def forward(self, x, edges):
        h = self.lin(x["a"])
        b = self.first((h, x["b"]), edges[TwoOwn.TYPES[0]])
        return {"b": b, "a": self.second(torch.relu_(h), edges[TwoOwn.TYPES[2]])}


def test_rows_changed_in_place_are_others():
    assert_pyg(InPlaceBetween(), TwoOwn.graph())


def test_messages_gated_by_targets_are_compensated():
    """By a comparison, which has no gradient."""
    data, lin = TwoOwn.graph(), nn.Linear(6, 6)
    model = TwoOwn(lambda: Own(gate=lambda x_i: (x_i[:, :1] > 0).float()), lambda x: {k: lin(x[k]) for k in x})

    def gradient():
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    loss_of(model(data.x_dict, data.edge_index_dict), data.x_dict).backward()
    truth = gradient()
    vqgnn.convert(model, data, method="lmc", grad=True)
    for _ in range(5):
        model.zero_grad()
        for batch in vqgnn.BatchLoader(data, batch_size=12, seed=1):
            loss_of(model(batch.x_dict, batch.graph_dict), batch.x_dict).backward()
    assert (gradient() - truth).norm() < 1e-5 * truth.norm()


@pytest.mark.parametrize(
    "prepare",
    [lambda x: x - x[:1], lambda x: x + torch.arange(len(x))[:, None], lambda x: x.cumsum(0)],
    ids=["first row", "position", "sum"],
)
def test_convs_that_know_where_rows_stand_are_refused(prepare):
    refused(TwoOwn(lambda: Own(prepare)), "Own of .* rows of others than its sources", TwoOwn.graph())


class Single(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x, edges):
        return {"b": self.conv((x["a"], x["b"]), edges[TwoOwn.TYPES[0]])}


@pytest.mark.parametrize("conv", [pyg.GATConv, pyg.GATv2Conv])
@pytest.mark.parametrize("small", [20, 40])
def test_self_loops_between_two_types_are_refused(conv, small):
    refused(Single(conv((6, 6), 6)), "add_self_loops=False", TwoOwn.graph(small))


@pytest.mark.parametrize("small", [20, 2, 1])
@pytest.mark.parametrize(
    "statistic",
    [lambda x: x - x.mean(0), lambda x: x / x.abs().amax(0), lambda x: x.cumsum(0)],
    ids=["mean", "max", "sum"],
)
@pytest.mark.parametrize("where", ["in the conv", "of a type", "of another type"])
def test_statistics_over_nodes_need_all_of_them(where, statistic, small):
    if where == "in the conv":
        model = TwoOwn(lambda: Own(finish=statistic))
    elif where == "of a type":
        model = TwoOwn(mix=lambda x: {k: statistic(rows) for k, rows in x.items()})
    else:
        model = TwoOwn(mix=lambda x: {"a": x["a"] + statistic(x["b"])[:1], "b": x["b"]})
    data = TwoOwn.graph(small)
    with torch.no_grad():
        truth = model.eval()(data.x_dict, data.edge_index_dict)
    vqgnn.convert(model, data, method="drop")
    close(layerwise(model, data), truth)
    with pytest.raises(ValueError, match=r"batch_size=9 splits the .* nodes, but TwoOwn takes statistics"):
        layerwise(model, data, batch_size=9)


def test_a_graph_of_another_size_is_refused():
    data, other = TwoOwn.graph(), TwoOwn.graph(25)
    model = vqgnn.convert(TwoOwn(), data, method="gas")
    batch = next(iter(vqgnn.BatchLoader(other)))
    with pytest.raises(ValueError, match="converted for a graph of 20 nodes and got a batch of one of 25"):
        model(batch.x_dict, batch.graph_dict)


def test_other_edge_tensors_are_refused():
    data, weighted = TwoOwn.graph(), TwoOwn.graph()
    model = vqgnn.convert(TwoOwn(lambda: pyg.GraphConv((6, 6), 6)), data)
    for edge_type in TwoOwn.TYPES:
        weighted[edge_type].edge_weight = torch.rand(90)
    with pytest.raises(ValueError, match=r"GraphConv of .* edges with \[\] and got some with \['edge_weight'\]"):
        layerwise(model, weighted)


def test_norms_of_messages_count_a_batch_once():
    data = TwoOwn.graph()
    model = TwoOwn(lambda: pyg.EdgeConv(nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6)), aggr="add"))
    vqgnn.convert(model, data, method="lmc", grad=True).train()
    count = 0
    for batch in vqgnn.BatchLoader(data, batch_size=12):
        loss_of(model(batch.x_dict, batch.graph_dict), batch.x_dict).backward()
        count += 1
    assert {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm1d)} == {count}


@pytest.mark.parametrize("method", ["vq", "lmc"])
def test_a_loss_that_overflows_leaves_no_trace(method):
    data = hetero_graph()
    model = to_hetero(Stack(pyg.SAGEConv), data.metadata())
    with torch.no_grad():
        model(data.x_dict, data.edge_index_dict)
    vqgnn.convert(model, data, method=method, codec="pq:d=4,k=4" if method == "vq" else "fp32")
    for scale in (1.0, torch.inf, 1.0):
        for batch in vqgnn.BatchLoader(data, batch_size=23):
            (scale * model(batch.x_dict, batch.graph_dict)["paper"].square().sum()).backward()
    for name, store in vqgnn.stores(model).items():
        for table in store.buffers():
            assert table.isfinite().all(), name


@pytest.mark.parametrize("sizes", [(20, 20, 20), (3, 1, 1), (7, 30, 2)])
def test_no_batch_is_empty(sizes):
    data = HeteroData({str(k): {"x": torch.zeros(size, 1)} for k, size in enumerate(sizes)})
    data["0", "to", "1"].edge_index = torch.zeros(2, 1, dtype=torch.int64)
    for batch_size in range(1, 8):
        loader = vqgnn.BatchLoader(data, batch_size=batch_size)
        got = [sum(batch[k].num_nodes for k in batch.node_types) for batch in loader]
        assert sum(got) == sum(sizes) and max(got) - min(got) <= 1 and min(got) > 0


def test_mixing_data_and_hetero_data_is_refused():
    model, data = build("SAGEConv")
    vqgnn.convert(model, data, method="gas")
    homogeneous = Data(x=torch.randn(9, 6), edge_index=torch.randint(9, (2, 20)))
    gcn = vqgnn.convert(pyg.GCN(6, 8, 2, 3), homogeneous, method="gas")
    with pytest.raises(ValueError, match="converted with a Data, not with a HeteroData"):
        layerwise(gcn, data)
    with pytest.raises(ValueError, match="GCNConv was converted with a Data before"):
        vqgnn.convert(gcn, data)
    with pytest.raises(ValueError, match="HeteroData and got a batch of a Data"):
        model.convs[0]["paper__cites__paper"](homogeneous.x, next(iter(vqgnn.BatchLoader(homogeneous))).graph)
    with pytest.raises(ValueError, match="data is a HeteroData, which only"):
        vqgnn.Graph.of(data)
    with pytest.raises(ValueError, match="method='vq' is not there for a HeteroData"):
        layerwise(model, data, method="vq")
    with pytest.raises(ValueError, match="sampler='walk' is for Data; a HeteroData takes 'node' or 'cluster'"):
        vqgnn.BatchLoader(data, sampler="walk")
    vqgnn.convert(model, data, method="full")
    batch = next(iter(batches(data)))
    with pytest.raises(ValueError, match="method='full' got a batch of"):
        model(batch.x_dict, batch.graph_dict)
