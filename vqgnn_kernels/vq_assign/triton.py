"""Triton kernels of vq_assign: nearest codewords of all branches in one launch, without an array of distances.

|c|^2 / 2 - x.c orders codewords as |x - c|^2 does, so a score costs dv multiply-adds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._types import contiguous
from ..codebook_update import code_dtype
from ..codebook_update.triton import codebook_stats, load_whitened

# Instructions a score in the code compiled for sm_90: multiply-adds in registers take 12.5 at dv = 8 and 22 at 16;
# tensor cores 14 at both, dv padded to 16 and in tf32x3 so that ties are those of fp32. No time was measured.
FMA_DV = 8


@triton.jit
def score(b_x, p_c, DV: tl.constexpr):
    """|c|^2 / 2 - x.c of the codeword at p_c (one, or one a row) for every row of the tuple of columns b_x."""
    c = ()
    for d in tl.static_range(DV):
        c += (tl.load(p_c + d),)
    s = c[0] * c[0]
    for d in tl.static_range(1, DV):
        s += c[d] * c[d]
    s = s * 0.5
    for d in tl.static_range(DV):
        s = s - b_x[d] * c[d]
    return s


@triton.jit(do_not_specialize=["b"])
def vq_assign_fwd_kernel(
    p_v,
    p_codebook,
    p_mean,
    p_rstd,
    p_codes,
    p_counts,
    p_sums,
    b,
    stride_row,
    stride_column,
    m,
    K,
    DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A thread holds whole rows in registers and meets the codewords one by one, BLOCK_K of them a turn.

    The pass over the codebook only finds the turn of the lowest score, which saves most of the index bookkeeping; the
    codeword within the turn is found by scoring the turn again, once a row.
    """
    j = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_row = rows < b
    p_codebook += j * K * DV
    b_x = ()
    for d in tl.static_range(DV):
        column = j * DV + d
        x = tl.load(p_v + rows * stride_row + column * stride_column, mask=m_row, other=0.0).to(tl.float32)
        if p_mean is not None:
            x = (x - tl.load(p_mean + column)) * tl.load(p_rstd + column)
        b_x += (x,)

    b_best = tl.full([BLOCK_B], float("inf"), tl.float32)
    b_turn = tl.zeros([BLOCK_B], tl.int32)
    for first in range(0, K, BLOCK_K):
        b_low = tl.full([BLOCK_B], float("inf"), tl.float32)
        for i in tl.static_range(BLOCK_K):
            # past the end the last codeword comes again, and a strict < never prefers it
            b_low = tl.minimum(b_low, score(b_x, p_codebook + tl.minimum(first + i, K - 1) * DV, DV))
        better = b_low < b_best  # never for NaN: such a row keeps code 0
        b_best = tl.where(better, b_low, b_best)
        b_turn = tl.where(better, first, b_turn)

    b_best = tl.full([BLOCK_B], float("inf"), tl.float32)
    b_code = b_turn
    for i in tl.static_range(BLOCK_K):
        k = tl.minimum(b_turn + i, K - 1)
        s = score(b_x, p_codebook + k * DV, DV)
        better = s < b_best
        b_best = tl.where(better, s, b_best)
        b_code = tl.where(better, k, b_code)
    tl.store(p_codes + rows * m + j, b_code.to(p_codes.dtype.element_ty), mask=m_row)

    if p_counts is not None:
        slot = j * K + b_code
        tl.atomic_add(p_counts + slot, tl.full([BLOCK_B], 1.0, tl.float32), mask=m_row, sem="relaxed")
        for d in tl.static_range(DV):
            tl.atomic_add(p_sums + slot * DV + d, b_x[d], mask=m_row, sem="relaxed")


@triton.jit(do_not_specialize=["b"])
def vq_assign_dot_fwd_kernel(
    p_v,
    p_codebook,
    p_mean,
    p_rstd,
    p_codes,
    p_counts,
    p_sums,
    b,
    stride_row,
    stride_column,
    m,
    K,
    DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores of a tile by tensor cores, BLOCK_D dimensions at a time."""
    j = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    codes, dims = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    m_row = rows < b
    p_codebook += j * K * DV
    # the lowest score of each column of tiles and its tile: the columns meet only once, at the end
    b_best = tl.full([BLOCK_B, BLOCK_K], float("inf"), tl.float32)
    b_tile = tl.zeros([BLOCK_B, BLOCK_K], tl.int32)
    for first in range(0, K, BLOCK_K):
        k = first + codes
        b_norm = tl.where(k < K, 0.0, float("inf"))
        b_dot = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
        for start in tl.static_range(0, DV, BLOCK_D):
            m_d = (start + dims < DV)[None, :]
            columns = (j * DV + start + dims)[None, :]
            m_x = m_row[:, None] & m_d
            b_x = load_whitened(p_v, p_mean, p_rstd, rows[:, None], columns, stride_row, stride_column, m_x)
            b_c = tl.load(p_codebook + k[:, None] * DV + start + dims[None, :], mask=(k < K)[:, None] & m_d, other=0.0)
            b_norm += 0.5 * tl.sum(b_c * b_c, 1)
            b_dot = tl.dot(b_x, b_c.T, b_dot, input_precision="tf32x3")
        b_score = b_norm[None, :] - b_dot
        better = b_score < b_best  # never for NaN: such a row gets code 0
        b_best = tl.where(better, b_score, b_best)
        b_tile = tl.where(better, first, b_tile)
    b_low = tl.min(b_best, 1)
    b_code = tl.min(tl.where(b_best == b_low[:, None], b_tile + codes[None, :], K), 1)
    tl.store(p_codes + rows * m + j, b_code.to(p_codes.dtype.element_ty), mask=m_row)

    if p_counts is not None:
        slot = j * K + b_code
        tl.atomic_add(p_counts + slot, tl.full([BLOCK_B], 1.0, tl.float32), mask=m_row, sem="relaxed")
        for start in tl.static_range(0, DV, BLOCK_D):
            m_x = m_row[:, None] & (start + dims < DV)[None, :]
            columns = (j * DV + start + dims)[None, :]
            b_x = load_whitened(p_v, p_mean, p_rstd, rows[:, None], columns, stride_row, stride_column, m_x)
            tl.atomic_add(p_sums + slot[:, None] * DV + start + dims[None, :], b_x, mask=m_x, sem="relaxed")


def vq_assign(v: Tensor, codebook: Tensor, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
    return _assign(v, codebook, mean, rstd, None, None)


def vq_assign_stats(
    v: Tensor, codebook: Tensor, mean: Tensor | None, rstd: Tensor | None, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    m, K, dv = codebook.shape
    if deterministic:
        codes = vq_assign(v, codebook, mean, rstd)
        return codes, *codebook_stats(v, codes, K, mean, rstd, deterministic)
    counts, sums = codebook.new_zeros(m, K), codebook.new_zeros(m, K, dv)
    return _assign(v, codebook, mean, rstd, counts, sums), counts, sums


def _assign(
    v: Tensor, codebook: Tensor, mean: Tensor | None, rstd: Tensor | None, counts: Tensor | None, sums: Tensor | None
) -> Tensor:
    codebook, mean, rstd = contiguous(codebook, mean, rstd)
    b, (m, K, dv) = v.shape[0], codebook.shape
    codes = torch.empty(b, m, dtype=code_dtype(K), device=v.device)
    arguments = {
        "p_v": v, "p_codebook": codebook, "p_mean": mean, "p_rstd": rstd, "p_codes": codes, "p_counts": counts,
        "p_sums": sums, "b": b, "stride_row": v.stride(0), "stride_column": v.stride(1), "m": m, "K": K, "DV": dv,
    }  # fmt: skip
    _triton.launch(
        vq_assign_fwd_kernel if dv <= FMA_DV else vq_assign_dot_fwd_kernel,
        lambda blocks: (triton.cdiv(b, blocks["BLOCK_B"]), m),
        arguments,
        {"rows": triton.next_power_of_2(b * m), "K": K, "dv": dv},
        pure=counts is None,
    )
    return codes
