import pytest
import torch

from vqgnn_kernels import csr_slice, csr_slice_values


def random_csr(num_nodes, num_edges):
    row = torch.randint(num_nodes, (num_edges,)).sort().values
    rowptr = torch.zeros(num_nodes + 1, dtype=torch.int64)
    rowptr[1:] = torch.bincount(row, minlength=num_nodes).cumsum(0)
    return rowptr, torch.randint(num_nodes, (num_edges,), dtype=torch.int32)


@pytest.mark.parametrize("b", [0, 1, 7, 40])
def test_slice_is_the_rows_relabelled(b):
    rowptr, col = random_csr(40, 200)
    values = torch.rand(200)
    nodes = torch.randperm(40)[:b]
    rowptr_b, col_b, halo = csr_slice(rowptr, col, nodes)
    values_b = csr_slice_values(rowptr, nodes, rowptr_b, values)
    back = torch.cat([nodes, halo])
    assert back.unique().numel() == back.numel()
    for i, node in enumerate(nodes.tolist()):
        mine = slice(rowptr_b[i], rowptr_b[i + 1])
        theirs = slice(rowptr[node], rowptr[node + 1])
        assert back[col_b[mine].long()].tolist() == col[theirs].tolist()
        assert values_b[mine].tolist() == values[theirs].tolist()
