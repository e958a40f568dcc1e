"""Calls of the C++ kernels: allocates outputs, hands over addresses."""

import torch
from torch import Tensor

from .._backend import _C
from .._types import contiguous
from ..codebook_update import code_dtype
from ..codebook_update.cpp import codebook_stats, float_rows
from ..store_io.cpp import address


def vq_assign(v: Tensor, codebook: Tensor, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
    v, (codebook, mean, rstd) = float_rows(v), contiguous(codebook, mean, rstd)
    b, (m, K, dv) = v.shape[0], codebook.shape
    codes = torch.empty(b, m, dtype=code_dtype(K))
    _C.vq_assign(address(v), b, v.stride(0), address(codebook), m, K, dv, address(mean), address(rstd), address(codes))
    return codes


def vq_assign_stats(
    v: Tensor, codebook: Tensor, mean: Tensor | None, rstd: Tensor | None, deterministic: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    # Two passes: the search is far longer than adding up, and this way the sums always have one fixed order.
    v = float_rows(v)
    codes = vq_assign(v, codebook, mean, rstd)
    return codes, *codebook_stats(v, codes, codebook.shape[1], mean, rstd)
