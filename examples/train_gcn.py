"""A PyG training script, and the lines that make it train in mini-batches which keep every message.

    python examples/train_gcn.py [generated:n=20000] [vq|gas|lmc|drop|full]

The lines marked `vqgnn` are the change; the weights are averaged because exact inference wants it (see the README).
"""

import sys

import torch
import torch.nn.functional as F
from torch_geometric.nn.models import GCN

import vqgnn
from vqgnn.datasets import load


def main(dataset: str = "generated:n=20000", method: str = "vq", epochs: int = 15) -> float:
    torch.manual_seed(0)
    loaded = load(dataset)
    data = loaded.data
    model = GCN(data.num_features, 128, 3, loaded.num_classes, norm="batch_norm", dropout=0.3)
    vqgnn.convert(model, data, method=method)  # vqgnn
    averaged = vqgnn.MovingAverage(model, 0.95)  # vqgnn
    batch_size = data.num_nodes if method == "full" else data.num_nodes // 10
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for batches in [vqgnn.BatchLoader(data, batch_size)] * epochs:  # vqgnn
        for batch in batches:
            loss = F.cross_entropy(model(batch.x, batch.graph)[batch.train_mask], batch.y[batch.train_mask])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            averaged.update_parameters(model)
    predicted = vqgnn.inference.layerwise(averaged.module, data).argmax(1)  # vqgnn
    accuracy = (predicted == data.y)[data.test_mask].float().mean().item()
    print(f"{method}: test accuracy {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
