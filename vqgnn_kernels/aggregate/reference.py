"""Aggregate in plain torch: the truth that the kernels are tested against."""

import torch
from torch import Tensor

from .._dropout import kept
from .._types import CSR, Rows
from ..store_io.reference import pull_rows


def aggregate(
    x: Tensor, csr: CSR, rows: Rows | None = None, dropout: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """Decode the halo, gather one message an edge, add them up."""
    num_rows = csr.rowptr.shape[0] - 1
    row = torch.repeat_interleave(torch.arange(num_rows, device=x.device), csr.rowptr.diff())
    col = csr.col.long()
    weight = torch.ones(col.shape[0], device=x.device, dtype=torch.float32) if csr.weight is None else csr.weight
    source = x.float()
    if rows is None:
        own = col < x.shape[0]
        row, col, weight = row[own], col[own], weight[own]
    else:
        halo = pull_rows(rows, csr.halo, x.shape[1])
        if dropout:
            unit = torch.arange(x.shape[1], device=x.device)
            if rows.codec == "pq":
                unit = unit // rows.codebook.shape[2]
            halo = halo * kept(dropout, seed, torch.arange(len(halo), device=x.device)[:, None], unit)
        source = torch.cat([source, halo])
    out = torch.zeros(num_rows, x.shape[1], device=x.device, dtype=torch.float32)
    return out.index_add_(0, row, source[col] * weight[:, None]).to(x.dtype)
