"""Edges dropped at random while training (DropEdge, Rong et al., arXiv 1907.10903)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqgnn_kernels import CSR

_BITS = 31


def _mixed(h: Tensor) -> Tensor:
    """A hash of 64 bits, each of which depends on all of h's (Steele et al.'s SplitMix64; products wrap)."""
    h = (h ^ (h >> 30)) * -0x40A7B892E31B1A47
    h = (h ^ (h >> 27)) * -0x6B2FB644ECCEEE15
    return h ^ (h >> 31)


@dataclass(frozen=True)
class EdgeDropout:
    """Drops a share of the edges; `seed` says which.

    Each edge's fate is a hash of its ends: the same wherever a batch meets it, in its rows of C and in the transpose.
    Self loops stay.
    """

    share: float
    seed: int

    def keeps(self, source: Tensor, target: Tensor) -> Tensor:
        """[e] bool, of edges between these nodes, ids of the whole graph."""
        h = _mixed(_mixed(source + self.seed) ^ target) & (2**_BITS - 1)
        return (h >= int(self.share * 2**_BITS)) | (source == target)

    def rows(self, csr: CSR, n_id: Tensor, scaled: bool, transposed: bool = False) -> CSR:
        """What is left of a batch's rows of C, or of its transpose, whose other rows and columns are those of `n_id`.

        scaled: the weights become 1 / (1 - share) as large, so that their mean is C's. In a transpose only the edges
        within the batch are dropped: by the others come kept gradients, to which C itself applies.
        """
        b, e = n_id.numel(), csr.col.numel()
        row = torch.arange(b, device=n_id.device).repeat_interleave(csr.rowptr.diff(), output_size=e)
        ends = n_id[row], torch.cat([n_id, csr.halo])[csr.col]
        target, source = reversed(ends) if transposed else ends
        kept = self.keeps(source, target)
        changed = source != target
        if transposed:
            kept |= csr.col >= b
            changed &= csr.col < b
        weight = csr.weight
        if scaled:
            scale = torch.where(changed, 1 / (1 - self.share), 1.0)
            weight = scale if weight is None else weight * scale
        before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
        weight = None if weight is None else weight[kept]
        return csr._replace(rowptr=before[csr.rowptr], col=csr.col[kept], weight=weight)
