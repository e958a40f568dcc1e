"""The module; its op is tested in test_global_attention.py."""

import copy

import pytest
import torch
import torch_geometric.nn as pyg
from graphs import awkward_graph
from torch import nn

import vqgnn
from vqgnn.nn import GlobalAttention

C, H = 6, 2


def full_attention(module, x, others):
    """Every row of x to every row of others."""
    q, (k, v) = module.query(x), module.key_value(others).chunk(2, dim=1)
    by_head = [(t.view(len(t), H, C // H).transpose(0, 1)) for t in (q, k, v)]
    messages = nn.functional.scaled_dot_product_attention(*by_head)
    return module.out(messages.transpose(0, 1).flatten(1))


def test_with_a_codeword_for_every_row_it_is_full_attention():
    rows = torch.randn(12, C)
    x = rows[torch.randint(12, (60,))]  # some rows more often than others: counts must weigh
    module = GlobalAttention(C, H, num_codes=12)
    assert torch.equal(module.eval()(x), module.out.bias.expand(60, -1))  # nothing learnt yet
    out = module.train()(x.requires_grad_())
    expected = full_attention(module, x, x.detach())
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    weight = torch.randn_like(out)
    leaves = [x, *module.parameters()]
    for ours, truth in zip(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, atol=1e-3, rtol=1e-3)
    half = module.eval().bfloat16()(x.bfloat16()).float()
    torch.testing.assert_close(half, expected, atol=0.05, rtol=0.05)


class Hybrid(nn.Module):
    """A GAT layer with global attention beside it."""

    def __init__(self, data):
        super().__init__()
        self.first, self.last = pyg.GATConv(data.num_features, C), pyg.GATConv(C, 3)
        self.attention = GlobalAttention(C, H, num_codes=8)

    def forward(self, x, graph):
        x = self.first(x, graph).relu()
        return self.last(x + self.attention(x), graph)


def test_hybrid_trains_in_batches_and_inference_is_the_whole_graphs():
    data = awkward_graph(undirected=True)
    model = Hybrid(data)
    vqgnn.convert(model, data, method="vq", codec="pq:d=2,k=16")
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(15):
        for batch in vqgnn.BatchLoader(data, batch_size=20, prefetch=0):
            loss = nn.functional.cross_entropy(model(batch.x, batch.graph), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    before = copy.deepcopy(model.attention.state_dict())
    expected = model(data.x, data.edge_index)
    torch.testing.assert_close(vqgnn.inference.layerwise(model, data, batch_size=7), expected, atol=1e-5, rtol=1e-4)
    for name, value in model.attention.state_dict().items():
        assert torch.equal(value, before[name]), name  # evaluation learns nothing
    fresh = Hybrid(data).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(data.x, data.edge_index), expected, atol=1e-5, rtol=1e-4)


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="heads=4 must divide channels=6"):
        GlobalAttention(6, heads=4)


def test_rows_that_overflowed_count_as_zero():
    module = GlobalAttention(C, H, num_codes=4)
    module(torch.randn(30, C))
    module(torch.full((30, C), float("nan")))
    assert module(torch.randn(30, C)).isfinite().all()
