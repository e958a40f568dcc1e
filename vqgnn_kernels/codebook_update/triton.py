"""Triton kernels of codebook_rows, codebook_stats and codebook_update."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._types import contiguous


@triton.jit(do_not_specialize=["b"])
def codebook_rows_kernel(
    p_x,
    p_g,
    p_v,
    p_means,
    p_squares,
    b,
    stride_x,
    stride_g,
    f,
    width,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ROWS rows of v, their mean and the squares around it."""
    block = tl.program_id(0).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    branch, channel = columns // (D + E), columns % (D + E)
    m_row, m_column = (rows < b)[:, None], columns < width
    of_x = branch * D + channel
    m_x = m_row & (m_column & (channel < D) & (of_x < f))[None, :]
    b_v = tl.load(p_x + rows[:, None] * stride_x + of_x[None, :], mask=m_x, other=0.0).to(tl.float32)
    if E > 0:
        of_g = branch * E + channel - D
        m_g = m_row & (m_column & (channel >= D))[None, :]
        b_v += tl.load(p_g + rows[:, None] * stride_g + of_g[None, :], mask=m_g, other=0.0).to(tl.float32)
    tl.store(p_v + rows[:, None] * width + columns[None, :], b_v, mask=m_row & m_column[None, :])
    mean = tl.sum(b_v, 0) / tl.minimum(b - block * ROWS, ROWS).to(tl.float32)
    b_off = tl.where(m_row, b_v - mean[None, :], 0.0)
    tl.store(p_means + block * width + columns, mean, mask=m_column)
    tl.store(p_squares + block * width + columns, tl.sum(b_off * b_off, 0), mask=m_column)


@triton.jit
def some_blocks(first, b, blocks, width, columns, ROWS: tl.constexpr, BLOCK_B: tl.constexpr):
    """Of BLOCK_B blocks from `first` on: their numbers of rows, where their moments lie, which of these exist."""
    block = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
    count = tl.minimum(b - block * ROWS, ROWS).to(tl.float32)[:, None]
    return count, block[:, None] * width + columns[None, :], (block < blocks)[:, None] & (columns < width)[None, :]


@triton.jit(do_not_specialize=["b", "blocks"])
def codebook_moments_kernel(
    p_means,
    p_squares,
    p_mean,
    p_var,
    b,
    blocks,
    width,
    ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Moments of all rows from those of blocks of ROWS of them."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for first in range(0, blocks, BLOCK_B):
        count, place, m_block = some_blocks(first, b, blocks, width, columns, ROWS, BLOCK_B)
        b_sum += count * tl.load(p_means + place, mask=m_block, other=0.0)
    mean = tl.sum(b_sum, 0) / b
    b_square = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for first in range(0, blocks, BLOCK_B):
        count, place, m_block = some_blocks(first, b, blocks, width, columns, ROWS, BLOCK_B)
        off = tl.load(p_means + place, mask=m_block, other=0.0) - mean[None, :]
        square = tl.load(p_squares + place, mask=m_block, other=0.0)
        b_square += tl.where(m_block, square + count * off * off, 0.0)
    tl.store(p_mean + columns, mean, mask=columns < width)
    tl.store(p_var + columns, tl.sum(b_square, 0) / b, mask=columns < width)


@triton.jit
def load_whitened(p_v, p_mean, p_rstd, rows, columns, stride_row, stride_column, mask):
    """v[rows, columns] in fp32, (x - mean) * rstd where there is whitening; 0 outside the mask."""
    x = tl.load(p_v + rows * stride_row + columns * stride_column, mask=mask, other=0.0).to(tl.float32)
    if p_mean is not None:
        x = (x - tl.load(p_mean + columns, mask=mask, other=0.0)) * tl.load(p_rstd + columns, mask=mask, other=0.0)
    return tl.where(mask, x, 0.0)


@triton.jit(do_not_specialize=["b"])
def codebook_stats_atomic_kernel(
    p_v,
    p_codes,
    p_mean,
    p_rstd,
    p_counts,
    p_sums,
    b,
    stride_row,
    stride_column,
    m,
    K,
    DV: tl.constexpr,
    PAD_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    j = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    dims = tl.arange(0, PAD_DV)
    b_code = tl.load(p_codes + rows * m + j, mask=rows < b, other=0).to(tl.int32)
    m_row = (rows < b) & (b_code >= 0) & (b_code < K)
    slot = j * K + b_code
    tl.atomic_add(p_counts + slot, tl.full([BLOCK_B], 1.0, tl.float32), mask=m_row, sem="relaxed")
    m_x = m_row[:, None] & (dims < DV)[None, :]
    columns = (j * DV + dims)[None, :]
    b_x = load_whitened(p_v, p_mean, p_rstd, rows[:, None], columns, stride_row, stride_column, m_x)
    tl.atomic_add(p_sums + slot[:, None] * DV + dims[None, :], b_x, mask=m_x, sem="relaxed")


@triton.jit
def first_at_least(p_sorted, b, code):
    """Position of the first of b sorted codes that is >= code, or b."""
    low = tl.full([], 0, tl.int64)
    high = low + b
    while low < high:
        middle = (low + high) // 2
        smaller = tl.load(p_sorted + middle).to(tl.int32) < code
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(smaller, high, middle)
    return low


@triton.jit(do_not_specialize=["b"])
def codebook_stats_sorted_kernel(
    p_v,
    p_sorted,
    p_order,
    p_mean,
    p_rstd,
    p_counts,
    p_sums,
    b,
    stride_row,
    stride_column,
    K,
    DV: tl.constexpr,
    PAD_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    k = tl.program_id(0)
    j = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, PAD_DV)
    columns = (j * DV + dims)[None, :]
    start = first_at_least(p_sorted + j * b, b, k)
    end = first_at_least(p_sorted + j * b, b, k + 1)
    b_sum = tl.zeros([BLOCK_B, PAD_DV], tl.float32)
    for first in range(start, end, BLOCK_B):
        place = first + tl.arange(0, BLOCK_B)
        rows = tl.load(p_order + j * b + place, mask=place < end, other=0)
        m_x = (place < end)[:, None] & (dims < DV)[None, :]
        b_sum += load_whitened(p_v, p_mean, p_rstd, rows[:, None], columns, stride_row, stride_column, m_x)
    tl.store(p_counts + j * K + k, (end - start).to(tl.float32))
    tl.store(p_sums + (j * K + k) * DV + dims, tl.sum(b_sum, 0), mask=dims < DV)


@triton.jit
def splitmix64(seed, index):
    """Output number `index` of the generator that starts at `seed`, both uint64."""
    z = seed + (index + 1) * tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    z = (z ^ (z >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit(do_not_specialize=["b", "seed"])
def codebook_update_kernel(
    p_codebook,
    p_ema_counts,
    p_ema_sums,
    p_counts,
    p_sums,
    p_v,
    p_mean,
    p_rstd,
    p_revived,
    decay,
    fresh,
    eps,
    revive_below,
    seed,
    b,
    stride_row,
    stride_column,
    K,
    DV: tl.constexpr,
    PAD_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64)
    codes, dims = tl.arange(0, BLOCK_K), tl.arange(0, PAD_DV)
    b_total = tl.zeros([BLOCK_K], tl.float64)
    for first in range(0, K, BLOCK_K):
        k = first + codes
        b_count = tl.load(p_ema_counts + j * K + k, mask=k < K, other=0.0) * decay
        b_total += b_count + fresh * tl.load(p_counts + j * K + k, mask=k < K, other=0.0)
    total = tl.sum(b_total, 0)
    # with no count and no eps, 0 / 0 is never used: every codeword stays
    scale = (total / (total + eps * K)).to(tl.float32)

    b_revived = tl.zeros([BLOCK_K], tl.int64)
    for first in range(0, K, BLOCK_K):
        k = first + codes
        m_k = k < K
        slot = j * K + k
        m_c = m_k[:, None] & (dims < DV)[None, :]
        place = slot[:, None] * DV + dims[None, :]
        b_count = tl.load(p_ema_counts + slot, mask=m_k, other=0.0) * decay
        b_count += fresh * tl.load(p_counts + slot, mask=m_k, other=0.0)
        b_sum = tl.load(p_ema_sums + place, mask=m_c, other=0.0) * decay
        b_sum += fresh * tl.load(p_sums + place, mask=m_c, other=0.0)
        m_write = m_c & (b_count > 0)[:, None]
        b_c = b_sum / ((b_count + eps) * scale)[:, None]
        if p_v is not None:
            m_dead = m_k & (b_count < revive_below)
            b_row = splitmix64(tl.cast(seed, tl.int64).to(tl.uint64), slot.to(tl.uint64)) % tl.cast(b, tl.uint64)
            m_x = m_c & m_dead[:, None]
            columns = (j * DV + dims)[None, :]
            rows = b_row.to(tl.int64)[:, None]
            b_x = load_whitened(p_v, p_mean, p_rstd, rows, columns, stride_row, stride_column, m_x)
            b_c = tl.where(m_x, b_x, b_c)
            b_sum = tl.where(m_x, b_x * revive_below, b_sum)
            b_count = tl.where(m_dead, revive_below, b_count)
            m_write = m_write | m_x
            b_revived += m_dead.to(tl.int64)
        # The compiler may load a count once for each layout that it is needed in, by different warps: without the
        # barrier one of them could read what another has written, and a count would decay twice.
        tl.debug_barrier()
        tl.store(p_ema_counts + slot, b_count, mask=m_k)
        tl.store(p_ema_sums + place, b_sum, mask=m_c)
        tl.store(p_codebook + place, b_c, mask=m_write)
    tl.store(p_revived + j, tl.sum(b_revived, 0))


_ROWS = 64  # a block of codebook_rows


def codebook_rows(x: Tensor, g: Tensor | None, branch_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    x, g = contiguous(x, g)
    (b, f), m = x.shape, -(-x.shape[1] // branch_dim)
    e = 0 if g is None else g.shape[1] // m
    width, blocks = m * (branch_dim + e), triton.cdiv(b, _ROWS)
    if b == 0:
        return tuple(x.new_zeros(shape, dtype=torch.float32) for shape in ((0, width), (width,), (width,)))
    shapes = (b, width), (width,), (width,), (blocks, width), (blocks, width)
    v, mean, var, means, squares = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    arguments = {
        "p_x": x, "p_g": g, "p_v": v, "p_means": means, "p_squares": squares, "b": b, "stride_x": f,
        "stride_g": m * e, "f": f, "width": width, "D": branch_dim, "E": e, "ROWS": _ROWS,
    }  # fmt: skip
    _triton.launch(
        codebook_rows_kernel, lambda tile: (blocks, triton.cdiv(width, tile["BLOCK_C"])), arguments, pure=True
    )
    arguments = {
        "p_means": means, "p_squares": squares, "p_mean": mean, "p_var": var, "b": b, "blocks": blocks,
        "width": width, "ROWS": _ROWS,
    }  # fmt: skip
    _triton.launch(codebook_moments_kernel, lambda tile: (triton.cdiv(width, tile["BLOCK_C"]),), arguments, pure=True)
    return v, mean, var


def codebook_stats(
    v: Tensor,
    codes: Tensor,
    num_codes: int,
    mean: Tensor | None,
    rstd: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    codes, mean, rstd = contiguous(codes, mean, rstd)
    (b, m), K = codes.shape, num_codes
    dv = v.shape[1] // m
    arguments = {
        "p_v": v, "p_mean": mean, "p_rstd": rstd, "b": b, "stride_row": v.stride(0), "stride_column": v.stride(1),
        "K": K, "DV": dv, "PAD_DV": triton.next_power_of_2(dv),
    }  # fmt: skip
    sizes = {"K": K, "dv": dv}
    if deterministic:
        # stable: the rows of a codeword are added in the order of the batch
        ordered, order = codes.t().contiguous().sort(dim=1, stable=True)
        counts, sums = v.new_empty((m, K), dtype=torch.float32), v.new_empty((m, K, dv), dtype=torch.float32)
        arguments |= {"p_sorted": ordered, "p_order": order, "p_counts": counts, "p_sums": sums}
        _triton.launch(codebook_stats_sorted_kernel, lambda blocks: (K, m), arguments, sizes, pure=True)
        return counts, sums
    counts, sums = v.new_zeros((m, K), dtype=torch.float32), v.new_zeros((m, K, dv), dtype=torch.float32)
    arguments |= {"p_codes": codes, "p_counts": counts, "p_sums": sums, "m": m}
    _triton.launch(
        codebook_stats_atomic_kernel, lambda blocks: (triton.cdiv(b, blocks["BLOCK_B"]), m), arguments, sizes
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
    if v is None or revive_below == 0 or v.shape[0] == 0:
        v = mean = rstd = None
    counts, sums, mean, rstd = contiguous(counts, sums, mean, rstd)
    revived = torch.empty(m, dtype=torch.int64, device=codebook.device)
    b, stride_row, stride_column = (1, 1, 1) if v is None else (v.shape[0], *v.stride())
    arguments = {
        "p_codebook": codebook, "p_ema_counts": ema_counts, "p_ema_sums": ema_sums, "p_counts": counts, "p_sums": sums,
        "p_v": v, "p_mean": mean, "p_rstd": rstd, "p_revived": revived, "decay": float(decay),
        "fresh": float(1 - decay), "eps": float(eps), "revive_below": float(revive_below), "seed": seed,
        "b": b, "stride_row": stride_row, "stride_column": stride_column,
        "K": K, "DV": dv, "PAD_DV": triton.next_power_of_2(dv),
    }  # fmt: skip
    _triton.launch(codebook_update_kernel, lambda blocks: (m,), arguments, {"K": K, "dv": dv})
    return revived
