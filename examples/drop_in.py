"""A model that vqgnn has never seen: residual GATv2 and SAGE convs with jumping knowledge, converted by one call.

python examples/drop_in.py [generated:n=20000] [vq|gas|lmc|drop|full]
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.nn import GATv2Conv, JumpingKnowledge, SAGEConv

import vqgnn
from vqgnn.datasets import load


class Net(nn.Module):
    """Plain PyG; nothing here knows of mini-batches."""

    def __init__(self, features: int, hidden: int, classes: int):
        super().__init__()
        self.encode, self.decode = nn.Linear(features, hidden), nn.Linear(3 * hidden, classes)
        self.convs = nn.ModuleList([SAGEConv(hidden, hidden), GATv2Conv(hidden, hidden), SAGEConv(hidden, hidden)])
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in self.convs)
        self.jump = JumpingKnowledge("cat")

    def forward(self, x, edge_index):
        x, states = self.encode(x), []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.dropout(conv(norm(x).relu(), edge_index), 0.2, self.training)
            states.append(x)
        return self.decode(self.jump(states))


def main(dataset: str = "generated:n=20000", method: str = "vq", epochs: int = 10) -> float:
    torch.manual_seed(0)
    loaded = load(dataset)
    data = loaded.data
    model = vqgnn.convert(Net(data.num_features, 64, loaded.num_classes), data, method=method)
    print(vqgnn.paths(model))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    loader = vqgnn.BatchLoader(data, data.num_nodes if method == "full" else None)
    for _ in range(epochs):
        for batch in loader:
            loss = F.cross_entropy(model(batch.x, batch.graph)[batch.train_mask], batch.y[batch.train_mask])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    predicted = vqgnn.inference.layerwise(model, data).argmax(1)
    accuracy = (predicted == data.y)[data.test_mask].float().mean().item()
    print(f"{method}: test accuracy {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
