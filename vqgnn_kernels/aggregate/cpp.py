"""The C++ back-end of aggregate: csrc/cpu/aggregate.cpp."""

import torch
from torch import Tensor

from .._backend import _C
from .._types import CSR, Rows, contiguous
from ..store_io.cpp import address, as_table


def aggregate(
    x: Tensor, csr: CSR, rows: Rows | None = None, dropout: float = 0.0, seed: Tensor | None = None
) -> Tensor | None:
    """None when rowptr, col or halo holds an entry out of range."""
    rowptr, col, weight, halo = contiguous(*csr)
    values = x.float().contiguous()
    b, f = values.shape
    num_rows = rowptr.shape[0] - 1
    table, kept = as_table(rows)
    out = torch.empty(num_rows, f, dtype=torch.float32)
    good = _C.aggregate(
        values.data_ptr(), b, f, rowptr.data_ptr(), num_rows, col.data_ptr(), col.shape[0], address(weight),
        address(halo), -1 if halo is None else halo.shape[0], table, dropout,
        0 if seed is None else int(seed) & 0xFFFFFFFF, out.data_ptr(),
    )  # fmt: skip
    del kept
    return out.to(x.dtype) if good else None
