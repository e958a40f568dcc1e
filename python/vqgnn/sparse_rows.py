"""Tables of mostly zeros, as products of bags of words are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseRows:
    """A table [n, f] without its zeros; an index gives dense rows.

    Row i has value[z] in column col[z], for z in rowptr[i]:rowptr[i + 1]. rowptr [n + 1] int64, col int32.
    """

    rowptr: Tensor
    col: Tensor
    value: Tensor
    width: int

    @classmethod
    def of(cls, chunks: Iterable[Tensor]) -> SparseRows:
        """From chunks [r, f] of its rows, in order."""
        counts, cols, values = [], [], []
        for chunk in chunks:
            there = chunk != 0
            counts.append(there.sum(1))
            cols.append(there.nonzero()[:, 1].int())
            values.append(chunk[there])
        count = torch.cat(counts)
        rowptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
        return cls(rowptr, torch.cat(cols), torch.cat(values), chunk.size(1))

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """[r, f], of ids or a range. On a GPU it waits for the device once, for the number of entries."""
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(self.rowptr.numel() - 1), device=self.rowptr.device)
        start = self.rowptr[rows]
        count = self.rowptr[rows + 1] - start
        row = torch.repeat_interleave(count)  # of each entry
        before = start - count.cumsum(0) + count
        place = before.index_select(0, row).add_(torch.arange(row.numel(), device=row.device))
        where = row.mul_(self.width).add_(self.col.index_select(0, place))
        out = self.value.new_zeros(rows.numel() * self.width)
        return out.scatter_(0, where, self.value.index_select(0, place)).view(rows.numel(), self.width)
