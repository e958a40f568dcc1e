"""MovingAverage: the copy that is evaluated, and shares the stores of the model that trains."""

import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import awkward_graph
from torch_geometric.nn.models import GAT, GCN, GIN

import vqgnn
from vqgnn.inference import layerwise

MODELS = {"gcn": GCN, "gat": GAT, "gin": GIN}


def graph():
    data = awkward_graph(80, 400, 8)
    data.train_mask = torch.ones(80, dtype=torch.bool)
    return data


def build(model: str):
    torch.manual_seed(0)
    return MODELS[model](8, 16, 3, 3, norm="batch_norm", dropout=0.2)


def train(model, averaged, data, steps: int = 6):
    """The model's weights after each step."""
    optimizer, seen = torch.optim.Adam(model.parameters(), 0.01), []
    for batch in [*vqgnn.BatchLoader(data, 20, seed=0)] * 2:
        loss = F.cross_entropy(model(batch.x, batch.graph), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
        seen.append(copy.deepcopy(model.state_dict()))
        if len(seen) == steps:
            break
    return seen


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["vq", "lmc", "full"])
def test_it_evaluates_the_average_of_the_weights(model, method):
    data, net = graph(), build(model)
    plain = copy.deepcopy(net)
    vqgnn.convert(net, data, method=method, codec="pq:d=4,k=16" if method == "vq" else None)
    averaged = vqgnn.MovingAverage(net, 0.9)
    if method == "full":
        for batch in vqgnn.BatchLoader(data, 80):
            net(batch.x, batch.graph).sum().backward()
            averaged.update_parameters(net)
        seen = [net.state_dict()]
    else:
        seen = train(net, averaged, data)
    expected = seen[0]
    for t, state in enumerate(seen[1:], start=1):
        decay = min(0.9, (1 + t) / (10 + t))
        expected = {
            name: decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
            for name, value in state.items()
        }
    plain.load_state_dict(expected)
    with torch.no_grad():
        truth = plain.eval()(data.x, data.edge_index)
    torch.testing.assert_close(layerwise(averaged.module, data), truth, rtol=1e-4, atol=1e-4)


def test_it_shares_the_stores_and_only_reads_them():
    data = graph()
    net = vqgnn.convert(build("gcn"), data, codec="pq:d=4,k=16")
    averaged = vqgnn.MovingAverage(net)
    mine, its = vqgnn.stores(net), vqgnn.stores(averaged.module)
    assert mine.keys() == its.keys() and all(mine[name] is its[name] for name in mine)
    train(net, averaged, data)
    before = {name: copy.deepcopy(store.state_dict()) for name, store in mine.items()}
    batch = next(iter(vqgnn.BatchLoader(data, 20)))
    averaged.train()
    averaged(batch.x, batch.graph)
    layerwise(averaged.module, data)
    for name, store in mine.items():
        torch.testing.assert_close(store.state_dict(), before[name], rtol=0, atol=0)
    assert not averaged.module.training
    assert not any(weight.requires_grad for weight in averaged.parameters())
    assert all(weight.requires_grad for weight in net.parameters())


def test_it_can_be_saved_and_go_on():
    data = graph()
    net = vqgnn.convert(build("gcn"), data, codec="pq:d=4,k=16")
    averaged = vqgnn.MovingAverage(net)
    train(net, averaged, data, 3)
    other = vqgnn.MovingAverage(vqgnn.convert(build("gcn"), data, codec="pq:d=4,k=16"))
    other.load_state_dict(averaged.state_dict())
    for average in (averaged, other):
        average.update_parameters(net)
    torch.testing.assert_close(dict(other.state_dict()), dict(averaged.state_dict()), rtol=0, atol=0)
    assert int(other.n_averaged) == 4


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_a_decay_that_is_none_is_named(decay):
    with pytest.raises(ValueError, match=r"decay=.* between 0 and 1"):
        vqgnn.MovingAverage(build("gcn"), decay)
