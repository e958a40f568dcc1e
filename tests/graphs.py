"""Small awkward graphs, and their convolution matrices written out densely by hand."""

import torch
from torch import Tensor
from torch_geometric.data import Data


def awkward_graph(
    num_nodes: int = 40,
    num_edges: int = 120,
    features: int = 6,
    undirected: bool = False,
    weighted: bool = False,
    classes: int = 3,
    seed: int = 0,
) -> Data:
    """A random graph with self loops at nodes 0 and 3, duplicate edges, and two isolated nodes at the end."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(num_nodes - 2, (2, num_edges), generator=generator)
    edge_index = edge_index[:, edge_index[0] != edge_index[1]]
    edge_index = torch.cat([edge_index, edge_index[:, :9]], 1)
    weight = torch.rand(edge_index.size(1), generator=generator) + 0.1
    if undirected:
        edge_index, weight = torch.cat([edge_index, edge_index.flip(0)], 1), weight.repeat(2)
    edge_index = torch.cat([torch.tensor([[0, 3], [0, 3]]), edge_index], 1)
    weight = torch.cat([torch.tensor([0.7, 1.3]), weight])
    data = Data(
        x=torch.randn(num_nodes, features, generator=generator),
        y=torch.randint(classes, (num_nodes,), generator=generator),
        edge_index=edge_index,
        train_mask=torch.rand(num_nodes, generator=generator) < 0.5,
    )
    if weighted:
        data.edge_weight = weight
    return data


def dense_convolution(data: Data, kind: str, normalize=True, add_self_loops=True, improved=False) -> Tensor:
    """C [n, n] float64, edge by edge: C[i, j] is the weight of the message from j to i."""
    n = data.num_nodes
    weight = data.edge_weight if "edge_weight" in data and kind == "gcn" else torch.ones(data.num_edges)
    a = torch.zeros(n, n, dtype=torch.float64)
    for (source, target), w in zip(data.edge_index.t().tolist(), weight.tolist(), strict=True):
        a[target, source] += w
    if kind == "sum":
        return a
    if kind == "mean":
        return a / a.sum(1, keepdim=True).clamp(min=1)
    if not normalize:
        return a
    if add_self_loops:
        loop = 2.0 if improved and "edge_weight" in data else 1.0  # PyG's `improved` acts on weighted graphs only
        a += torch.diag(torch.where(a.diag() == 0, loop, 0.0))
    scale = a.sum(1).rsqrt()
    scale[scale.isinf()] = 0
    return scale[:, None] * a * scale


def dense_rows(csr, n_id: Tensor, num_nodes: int) -> Tensor:
    """A batch's CSR as [b, n] float64, its columns mapped back to the graph's nodes."""
    back = torch.cat([n_id, csr.halo])
    out = torch.zeros(n_id.numel(), num_nodes, dtype=torch.float64)
    rowptr = csr.rowptr.tolist()
    for i in range(n_id.numel()):
        for e in range(rowptr[i], rowptr[i + 1]):
            out[i, back[csr.col[e]]] += 1.0 if csr.weight is None else float(csr.weight[e])
    return out


def random_graph(undirected: bool, classes: int) -> Data:
    n = 50
    edge_index = torch.randint(0, n - 3, (2, 220))  # the last three nodes are isolated; duplicates are likely
    edge_index = torch.cat([edge_index, edge_index[:, :5]], 1)
    if undirected:
        edge_index = torch.cat([edge_index, edge_index.flip(0)], 1)
    return Data(x=torch.randn(n, 7), edge_index=edge_index, y=torch.randint(0, classes, (n,)))
