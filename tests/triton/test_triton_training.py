"""The tiny end-to-end example by the Triton kernels: the losses are the reference's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import awkward_graph
from torch_geometric.nn.models import GAT, GCN

import vqgnn


def train(model, data, method, codec):
    torch.manual_seed(0)
    vqgnn.convert(model, data, method=method, codec=codec, grad=method != "gas")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # Adam would blow up a rounding of a zero
    losses = []
    for _ in range(2):
        for batch in vqgnn.BatchLoader(data, batch_size=20, seed=0, prefetch=0):
            loss = F.cross_entropy(model(batch.x, batch.graph), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    return losses, vqgnn.inference.layerwise(model, data)


@pytest.mark.parametrize(
    ("build", "method", "codec"),
    [(GCN, "vq", "pq:d=4,k=8"), (GCN, "lmc", "int8"), (GCN, "gas", "fp16"), (GAT, "vq", "pq:d=4,k=8")],
)
def test_training_has_the_references_losses(build, method, codec, device, monkeypatch):
    torch.manual_seed(0)
    model = build(6, 8, 2, 3, norm="batch_norm").to(device)
    data = awkward_graph().to(device)
    ours = train(copy.deepcopy(model), data, method, codec)
    monkeypatch.setenv("VQGNN_BACKEND", "reference")
    theirs = train(copy.deepcopy(model), copy.copy(data), method, codec)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-4)
