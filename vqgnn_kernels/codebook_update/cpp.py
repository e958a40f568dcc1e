"""Calls of the C++ kernels: allocates outputs, hands over addresses."""

import torch
from torch import Tensor

from .._backend import _C
from .._types import contiguous
from ..store_io.cpp import address


def float_rows(v: Tensor) -> Tensor:
    """v in fp32 with contiguous columns and rows that do not overlap, copied only where it is not so already."""
    v = v.float()
    return v if v.stride(1) == 1 and v.stride(0) >= v.shape[1] else v.contiguous()


def codebook_rows(x: Tensor, g: Tensor | None, branch_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    x, g = float_rows(x), None if g is None else float_rows(g)
    (b, f), m = x.shape, -(-x.shape[1] // branch_dim)
    e = 0 if g is None else g.shape[1] // m
    width = m * (branch_dim + e)
    v, mean, var = (torch.empty(shape, dtype=torch.float32) for shape in ((b, width), (width,), (width,)))
    _C.codebook_rows(
        address(x), b, x.stride(0), f, address(g), 0 if g is None else g.stride(0), branch_dim, e,
        address(v), address(mean), address(var),
    )  # fmt: skip
    return v, mean, var


def codebook_stats(
    v: Tensor, codes: Tensor, num_codes: int, mean: Tensor | None, rstd: Tensor | None, deterministic: bool = True
) -> tuple[Tensor, Tensor]:  # the sums have one fixed order in any case
    v, (codes, mean, rstd) = float_rows(v), contiguous(codes, mean, rstd)
    (b, m), K = codes.shape, num_codes
    dv = v.shape[1] // m
    counts = torch.empty(m, K, dtype=torch.float32)
    sums = torch.empty(m, K, dv, dtype=torch.float32)
    _C.codebook_stats(
        address(v),
        b,
        v.stride(0),
        address(codes),
        m,
        K,
        dv,
        address(mean),
        address(rstd),
        address(counts),
        address(sums),
    )
    return counts, sums


def codebook_update(
    codebook: Tensor,
    ema_counts: Tensor,
    ema_sums: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    v: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    revive_below: float,
    seed: int,
) -> Tensor:
    m, K, dv = codebook.shape
    if v is None or revive_below == 0:
        v = mean = rstd = None
    else:
        v = float_rows(v)
    counts, sums, mean, rstd = contiguous(counts, sums, mean, rstd)
    revived = torch.empty(m, dtype=torch.int64)
    b, row_stride = (0, 0) if v is None else (v.shape[0], v.stride(0))
    _C.codebook_update(
        *(address(t) for t in (codebook, ema_counts, ema_sums, counts, sums)), m, K, dv, decay, eps,
        address(v), b, row_stride, address(mean), address(rstd), revive_below, seed % (1 << 64), address(revived),
    )  # fmt: skip
    return revived
