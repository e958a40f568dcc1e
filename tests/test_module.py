"""A converted model as any torch module: copied, saved, moved, cast and hooked, whatever path its convs take."""

import copy
import io

import conv_table
import pytest
import torch
import torch_geometric.nn as pyg
from graphs import awkward_graph
from torch import nn

import vqgnn
from vqgnn.inference import layerwise

# Sums, a mean, attentions, several propagates, polynomials, a maximum, and code of a user's own.
CONVS = ["GCNConv", "SAGEConv", "GINConv", "GATConv", "GATv2Conv", "ARMAConv", "ChebConv", "SAGEConv(max)"]
CONVS += ["own, edge MLP"]
every_conv = pytest.mark.parametrize("conv", CONVS)
# What a model of this dtype rounds off: of its outputs, and relatively of its gradient.
DTYPES = {torch.bfloat16: (0.1, 0.2), torch.float16: (0.02, 0.05)}


@pytest.fixture
def data():
    return awkward_graph()


def converted(conv, data, **options):
    return vqgnn.convert(conv_table.CONVS[conv](), data, **({"method": "lmc", "grad": True} | options))


def batches(data):
    return vqgnn.BatchLoader(data, batch_size=13, seed=1, prefetch=0)


def loss(model, batch):
    return conv_table._loss(model(batch.x, batch.graph), batch.y)


def steps(model):
    return [int(store.step) for store in vqgnn.stores(model).values()]


def by_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", ["lmc", "vq"])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_file], ids=["deepcopy", "torch.save"])
@every_conv
def test_copies_go_on_by_themselves(conv, copied, method, data):
    model = converted(conv, data, method=method, codec="pq:d=4,k=8" if method == "vq" else None)
    batch = next(iter(batches(data)))
    loss(model, batch).backward()
    model.zero_grad()
    other = copied(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    before = steps(model)
    states = [{k: v.clone() for k, v in store.state_dict().items()} for store in vqgnn.stores(model).values()]
    loss(other, batch).backward()
    assert steps(model) == before and steps(other)[0] == before[0] + 1
    for store, state in zip(vqgnn.stores(model).values(), states, strict=True):
        torch.testing.assert_close(store.state_dict(), state, rtol=0, atol=0)
    loss(model, batch).backward()  # what the copy did is what the model does
    torch.testing.assert_close(conv_table._gradient(other), conv_table._gradient(model))
    for mine, its in zip(vqgnn.stores(other).values(), vqgnn.stores(model).values(), strict=True):
        torch.testing.assert_close(mine.state_dict(), its.state_dict())


@every_conv
def test_state_dicts_go_both_ways(conv, data):
    theirs, ours = conv_table.CONVS[conv](), converted(conv, data)
    ours.load_state_dict(theirs.state_dict())
    expected = theirs.eval()(data.x, data.edge_index).detach()
    torch.testing.assert_close(layerwise(ours, data), expected, atol=1e-5, rtol=1e-5)
    back = conv_table.CONVS[conv]()
    back.load_state_dict(ours.state_dict())
    torch.testing.assert_close(back(data.x, data.edge_index), expected)


@every_conv
def test_hooks_made_before_or_after_see_every_call_once(conv, data):
    model = conv_table.CONVS[conv]()
    seen = []

    def register(convs):
        convs[0].register_forward_pre_hook(lambda module, args: seen.append(("before", len(args[0]))))
        convs[0].register_forward_hook(lambda module, args, out: seen.append(("after", len(out))))
        convs[1].register_full_backward_hook(lambda module, into, out: seen.append(("back", len(out[0]), len(into[0]))))

    def heard():
        seen.clear()
        loss(model, batch).backward()
        return sorted(seen)

    batch = next(iter(batches(data)))
    once = [("after", 10), ("back", 10, 10), ("before", 10)]
    register(model.convs)
    vqgnn.convert(model, data, method="lmc", grad=True)
    assert heard() == once
    register(model.convs)
    assert heard() == sorted(2 * once)


@every_conv
def test_hooks_change_what_they_are_given(conv, data):
    """As PyG's model with the same hooks, gradients too."""
    model = conv_table.CONVS[conv]()
    model.convs[0].register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    model.convs[1].register_forward_hook(lambda module, args, out: out + 1)
    model.convs[2].register_full_backward_hook(lambda module, into, out: (3 * into[0], *into[1:]))
    out, gradient = conv_table._full(model, data)
    vqgnn.convert(model, data, method="lmc", grad=True)
    mine = conv_table._epoch(model, data, batch_size=data.num_nodes)
    torch.testing.assert_close(mine[0], out, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mine[1], gradient, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layerwise(model, data, 13), out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("build", [pyg.GCNConv, pyg.GATConv])
def test_a_conv_with_hooks_on_its_messages_runs_pygs_code(build, data):
    """A kernel makes no messages that a hook could see."""
    conv = build(6, 3)
    conv.register_message_forward_hook(lambda module, args, out: 2 * out)
    expected = conv(data.x, data.edge_index)
    vqgnn.convert(conv, data, method="gas")
    assert [path.path for path in vqgnn.paths(conv)] == ["generic"]
    for batch in batches(data):
        torch.testing.assert_close(conv(batch.x, batch.graph), expected[batch.n_id], atol=1e-5, rtol=1e-5)


@every_conv
def test_stores_move_with_the_model(conv, data, device):
    model = converted(conv, data)
    still = copy.deepcopy(model)
    assert model.to(device) is model
    moved = data.clone().to(device)  # another graph of the same edges
    for batch, other in zip(batches(moved), batches(data), strict=True):
        mine, its = loss(model, batch), loss(still, other)
        mine.backward()
        its.backward()
        torch.testing.assert_close(mine.cpu(), its)
    for store in vqgnn.stores(model.to("meta")).values():
        assert {tensor.device.type for tensor in store.buffers()} == {"meta"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", ["convert", "cast"])
@every_conv
def test_a_cast_model_keeps_its_state_in_fp32(conv, first, dtype, data):
    def forward(model, batch):
        return model(batch.x.to(dtype), batch.graph)

    exact = conv_table.CONVS[conv]()
    model = copy.deepcopy(exact)
    vqgnn.convert(exact, data, method="lmc", grad=True)
    if first == "convert":
        vqgnn.convert(model, data, method="lmc", grad=True)
    model = model.to(dtype)
    if first == "cast":
        vqgnn.convert(model, data, method="lmc", grad=True, forward=forward)
    off, gradient_off = DTYPES[dtype]
    tolerance = {"atol": off, "rtol": off, "check_dtype": False}
    torch.testing.assert_close(layerwise(model, data, 13, forward=forward), layerwise(exact, data, 13), **tolerance)
    for batch in batches(data):
        out, expected = forward(model, batch), exact(batch.x, batch.graph)
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected, **tolerance)
        conv_table._loss(out.float(), batch.y).backward()
        conv_table._loss(expected, batch.y).backward()
    assert all(p.dtype == p.grad.dtype == dtype for p in model.parameters() if p.grad is not None)
    error = conv_table._error(conv_table._gradient(model).float(), conv_table._gradient(exact))
    assert error < gradient_off
    floats = [b for s in vqgnn.stores(model).values() for b in s.buffers() if b.is_floating_point()]
    assert floats and all(b.dtype == torch.float32 for b in floats)


def test_a_model_among_others_is_one_module(data):
    """Parameters, modes and zero_grad reach it; stores stay out of the state_dict."""
    outer = nn.ModuleDict({"gnn": converted("GATv2Conv", data), "lin": nn.Linear(3, 3)})
    keys = set(outer.state_dict())
    assert keys == {f"gnn.{key}" for key in conv_table.CONVS["GATv2Conv"]().state_dict()} | {"lin.weight", "lin.bias"}
    outer.eval()
    assert not any(module.training for module in outer.modules())
    assert all(name.startswith("gnn.convs.") for name in vqgnn.stores(outer))
