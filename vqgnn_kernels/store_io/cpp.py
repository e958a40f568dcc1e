"""The C++ back-end of push_rows and pull_rows: csrc/cpu/store_io.cpp."""

import torch
from torch import Tensor

from .._backend import _C
from .._types import Rows, contiguous


def push_rows(rows: Rows, n_id: Tensor, x: Tensor) -> bool:
    """False when an n_id is out of range; nothing is written then."""
    x = x.contiguous() if rows.codec == "pq" else x.float().contiguous()
    n_id = n_id.contiguous()
    table, _ = as_table(rows)
    return _C.push_rows(table, n_id.data_ptr(), n_id.shape[0], x.data_ptr(), x.shape[1])


def pull_rows(rows: Rows, n_id: Tensor | None, f: int) -> Tensor | None:
    """None when an n_id is out of range."""
    table, kept = as_table(rows)
    n_id = None if n_id is None else n_id.contiguous()
    k = kept[0].shape[0] if n_id is None else n_id.shape[0]
    out = torch.empty(k, f, dtype=torch.float32)
    return out if _C.pull_rows(table, address(n_id), k, f, out.data_ptr()) else None


def as_table(rows: Rows | None) -> tuple[tuple | None, tuple]:
    """The table as csrc/bindings.cpp takes it, and the tensors that must outlive the call."""
    if rows is None:
        return None, ()
    data, scale, codebook = contiguous(*rows[1:])
    m, num_codes, d = (data.shape[1], 1, 1) if codebook is None else codebook.shape
    row_bytes = data.shape[1] * data.element_size()
    table = (rows.codec, data.data_ptr(), data.shape[0], row_bytes, address(scale), address(codebook), m, num_codes, d)
    return table, (data, scale, codebook)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
