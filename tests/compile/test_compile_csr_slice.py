import pytest
import torch

from vqgnn_kernels import csr_slice, csr_slice_values
from vqgnn_kernels.csr_slice import triton as kernels


@pytest.fixture
def graph():
    """20 edges a row; 6,000 edges in the batch."""
    rowptr = torch.arange(0, 20001, 20)
    return rowptr, torch.randint(1000, (20000,), dtype=torch.int32), torch.randperm(1000)[:300]


@pytest.mark.parametrize("bits", [32, 64])
def test_csr_slice(compiled, graph, bits, monkeypatch):
    if bits == 64:
        monkeypatch.setattr(kernels, "_INT32_EDGES", 0)  # as for a graph of 2**31 edges
    compiled(f"positions of {bits} bits", lambda: csr_slice(*graph))


def test_csr_slice_values(compiled, graph):
    rowptr, col, nodes = graph
    rowptr_b = torch.arange(0, 6001, 20)
    compiled("values", lambda: csr_slice_values(rowptr, nodes, rowptr_b, torch.rand(col.shape[0])))
