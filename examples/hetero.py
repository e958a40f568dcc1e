"""Several edge types: a GraphSAGE of two layers for each by PyG's to_hetero, in mini-batches that keep every message.

    python examples/hetero.py debian-bookworm.npz [vq|gas|lmc|drop|full] [epochs]

The file holds x [n, f], y [n], edge_index [2, e], edge_type [e] and train_mask, val_mask, test_mask [n]. Edges of one
type are a relation, and reversed another. The weights are averaged because exact inference wants it (see the README).
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch_geometric.data import HeteroData
from torch_geometric.nn import SAGEConv, to_hetero

import vqgnn


def load(path: str) -> HeteroData:
    arrays, data = np.load(path), HeteroData()
    data["node"].x = torch.from_numpy(arrays["x"]).float()
    data["node"].y = torch.from_numpy(arrays["y"]).long()
    for mask in ("train_mask", "val_mask", "test_mask"):
        data["node"][mask] = torch.from_numpy(arrays[mask])
    edge_index, edge_type = torch.from_numpy(arrays["edge_index"]).long(), torch.from_numpy(arrays["edge_type"])
    for k in edge_type.unique().tolist():
        data["node", f"to{k}", "node"].edge_index = edge_index[:, edge_type == k]
        data["node", f"from{k}", "node"].edge_index = edge_index[:, edge_type == k].flip(0)
    return data


class SAGE(torch.nn.Module):
    def __init__(self, hidden: int, classes: int):
        super().__init__()
        self.first, self.second = SAGEConv((-1, -1), hidden), SAGEConv((-1, -1), classes)
        self.norm, self.dropout = torch.nn.BatchNorm1d(hidden), torch.nn.Dropout(0.3)

    def forward(self, x, edge_index):
        return self.second(self.dropout(self.norm(self.first(x, edge_index)).relu()), edge_index)


def main(path: str, method: str = "vq", epochs: int = 20) -> float:
    torch.manual_seed(0)
    data = load(path)
    nodes = data["node"]
    model = to_hetero(SAGE(64, int(nodes.y.max()) + 1), data.metadata())
    with torch.no_grad():
        model.eval()(data.x_dict, data.edge_index_dict)  # gives the lazy parameters their shapes
    vqgnn.convert(model.train(), data, method=method)
    averaged = vqgnn.MovingAverage(model, 0.95)
    print(vqgnn.paths(model))
    loader = vqgnn.BatchLoader(data, data.num_nodes if method == "full" else None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(int(epochs)):
        for batch in loader:
            mask = batch["node"].train_mask
            out = model(batch.x_dict, batch.graph_dict)["node"]  # graph_dict goes where edge_index_dict went
            loss = F.cross_entropy(out[mask], batch["node"].y[mask])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            averaged.update_parameters(model)
    predicted = vqgnn.inference.layerwise(averaged.module, data)["node"].argmax(1)
    accuracy = (predicted == nodes.y)[nodes.test_mask].float().mean().item()
    print(f"{method}: test accuracy {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
