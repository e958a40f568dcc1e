"""The C++ back-end of csr_slice: csrc/cpu/csr_slice.cpp."""

import torch
from torch import Tensor

from .._backend import _C


def csr_slice(rowptr: Tensor, col: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """None when a node comes twice or an entry is out of range."""
    rowptr, col, nodes = rowptr.contiguous(), col.contiguous(), nodes.contiguous()
    n, b = rowptr.shape[0] - 1, nodes.shape[0]
    if n < 0:
        return None
    rowptr_b = torch.empty(b + 1, dtype=torch.int64)
    if not _C.csr_slice_rowptr(rowptr.data_ptr(), n, col.shape[0], nodes.data_ptr(), b, rowptr_b.data_ptr()):
        return None
    e = int(rowptr_b[-1])
    col_b = torch.empty(e, dtype=torch.int32)
    halo = torch.empty(max(0, min(e, n - b)), dtype=torch.int64)
    h = _C.csr_slice(
        rowptr.data_ptr(), col.data_ptr(), n, nodes.data_ptr(), b, col_b.data_ptr(), halo.data_ptr()
    )  # fmt: skip
    return None if h < 0 else (rowptr_b, col_b, halo[:h])


def csr_slice_values(rowptr: Tensor, nodes: Tensor, rowptr_b: Tensor, values: Tensor) -> Tensor | None:
    """None when rowptr_b is not what csr_slice returns for these nodes."""
    rowptr, nodes = rowptr.contiguous(), nodes.contiguous()
    rowptr_b, values = rowptr_b.contiguous(), values.contiguous()
    out = torch.empty(max(0, int(rowptr_b[-1])), dtype=torch.float32)
    good = _C.csr_slice_values(
        rowptr.data_ptr(), rowptr.shape[0] - 1, values.shape[0], nodes.data_ptr(), nodes.shape[0],
        rowptr_b.data_ptr(), out.shape[0], values.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out if good else None
