"""Rows of a sparse matrix, relabelled, in plain torch and Python: the truth that the kernels are tested against."""

import torch
from torch import Tensor


def csr_slice(rowptr: Tensor, col: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b = nodes.shape[0]
    label = {int(node): i for i, node in enumerate(nodes)}
    halo = []
    edges = csr_slice_values(rowptr, nodes, None, col)
    for c in edges.tolist():
        if c not in label:
            label[c] = b + len(halo)
            halo.append(c)
    col_b = torch.tensor([label[c] for c in edges.tolist()], dtype=torch.int32)
    degree = rowptr[nodes + 1] - rowptr[nodes]
    rowptr_b = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    return rowptr_b, col_b.to(col.device), torch.tensor(halo, dtype=torch.int64, device=col.device)


def csr_slice_values(rowptr: Tensor, nodes: Tensor, rowptr_b: Tensor | None, values: Tensor) -> Tensor:
    start, stop = rowptr[nodes].tolist(), rowptr[nodes + 1].tolist()
    return torch.cat([values[:0]] + [values[i:j] for i, j in zip(start, stop, strict=True)])
