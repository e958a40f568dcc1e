"""The Triton back-end of aggregate.

One program sums a row's edges, except for whole chunks of a long row: the edge array is cut at multiples of SPLIT, a
first launch sums every chunk that lies inside a single row, and the row's program adds those sums in order. So no
program reads 2 * SPLIT edges or more, sums are in a fixed order, and the grids follow from shapes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._decode import load_state, table_arguments
from .._types import CSR, Rows

SPLIT = 512  # long enough to be worth the search for a chunk's row, short enough not to hold up the launch's end


def aggregate(x: Tensor, csr: CSR, rows: Rows | None = None) -> Tensor:
    """Entries of rowptr, col and halo that are out of range are skipped: reporting them would need a sync."""
    x = x.contiguous()
    b, f = x.shape
    rowptr, col, weight, halo = (None if t is None else t.contiguous() for t in csr)
    num_rows, num_edges = rowptr.shape[0] - 1, col.shape[0]
    table = table_arguments(rows)
    num_halo = table["num_table"] if halo is None else halo.shape[0]
    # A chunk's sum is written if one row holds the whole chunk, and read in that case only.
    partial = torch.empty(num_edges // SPLIT, f, dtype=torch.float32, device=x.device)
    out = torch.empty(num_rows, f, dtype=x.dtype, device=x.device)
    arguments = {"p_x": x, "p_rowptr": rowptr, "p_col": col, "p_weight": weight, "p_halo": halo, "p_partial": partial}
    arguments |= {"b": b, "f": f, "num_edges": num_edges, "num_halo": num_halo, **table, "SPLIT": SPLIT}
    if num_rows and num_edges >= SPLIT:
        _triton.launch(
            aggregate_chunk_kernel,
            lambda blocks: (num_edges // SPLIT, triton.cdiv(f, blocks["BLOCK_F"])),
            arguments | {"num_rows": num_rows},
            {"f": f},
            pure=True,
        )
    _triton.launch(
        aggregate_fwd_kernel,
        lambda blocks: (num_rows, triton.cdiv(f, blocks["BLOCK_F"])),
        arguments | {"p_out": out},
        {"f": f},
        pure=True,
    )
    return out


@triton.jit
def _sum_edges(
    begin, end, hole, hole_size, p_x, p_col, p_weight, p_halo, p_data, p_scale, p_codebook, b, f, num_halo, num_table,
    width, first_col, K, D: tl.constexpr, CODEC: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Sum of the messages of edges begin .. end - 1, less the hole_size edges from `hole` on: fp32 [BLOCK_F]."""
    feature = first_col + tl.arange(0, BLOCK_F)
    total = tl.zeros([BLOCK_F], tl.float32)
    for start in range(begin, end - hole_size, BLOCK_E):
        edge = start + tl.arange(0, BLOCK_E).to(tl.int64)
        m_edge = edge < end - hole_size
        edge = tl.where(edge < hole, edge, edge + hole_size)
        col = tl.load(p_col + edge, mask=m_edge, other=-1).to(tl.int64)
        m_batch = (col >= 0) & (col < b)
        message = tl.load(
            p_x + col[:, None] * f + feature[None, :], mask=m_batch[:, None] & (feature < f)[None, :], other=0.0
        ).to(tl.float32)
        m_used = m_batch
        if CODEC != "none":
            row = col - b
            m_halo = (row >= 0) & (row < num_halo)
            if p_halo is not None:
                row = tl.load(p_halo + row, mask=m_halo, other=-1)
                m_halo = m_halo & (row >= 0) & (row < num_table)
            message += load_state(
                p_data, p_scale, p_codebook, row, m_halo, first_col, width, K, D, CODEC, BLOCK_F
            )  # one of the two is 0
            m_used = m_batch | m_halo
        if p_weight is not None:
            message *= tl.load(p_weight + edge, mask=m_used, other=0.0)[:, None]
        total += tl.sum(message, 0)
    return total


@triton.jit
def aggregate_chunk_kernel(
    p_x, p_rowptr, p_col, p_weight, p_halo, p_partial, p_data, p_scale, p_codebook, b, f, num_rows, num_edges,
    num_halo, num_table, width, K, D: tl.constexpr, CODEC: tl.constexpr, SPLIT: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """partial[i] = the sum of chunk i, edges i * SPLIT .. (i + 1) * SPLIT - 1, if it lies inside a single row."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * SPLIT
    # The chunk's row is the last one with rowptr <= begin; each step leaves 1/32 of the rows.
    low = chunk * 0
    high = low + num_rows
    while high - low > 1:
        step = (high - low + 31) // 32
        probe = low + step * tl.arange(0, 32)
        below = tl.load(p_rowptr + probe, mask=probe < high, other=9223372036854775807) <= begin
        low += step * tl.maximum(tl.sum(below.to(tl.int64)) - 1, 0)
        high = tl.minimum(low + step, high)
    if tl.load(p_rowptr + low + 1) >= begin + SPLIT:
        first_col = tl.program_id(1) * BLOCK_F
        total = _sum_edges(
            begin, begin + SPLIT, begin + SPLIT, 0, p_x, p_col, p_weight, p_halo, p_data, p_scale, p_codebook, b, f,
            num_halo, num_table, width, first_col, K, D, CODEC, BLOCK_E, BLOCK_F,
        )  # fmt: skip
        feature = first_col + tl.arange(0, BLOCK_F)
        tl.store(p_partial + chunk * f + feature, total, mask=feature < f)


@triton.jit
def aggregate_fwd_kernel(
    p_x, p_rowptr, p_col, p_weight, p_halo, p_partial, p_out, p_data, p_scale, p_codebook, b, f, num_edges, num_halo,
    num_table, width, K, D: tl.constexpr, CODEC: tl.constexpr, SPLIT: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[i] = the sum of row i's messages, its whole chunks taken from p_partial."""
    i = tl.program_id(0).to(tl.int64)
    first_col = tl.program_id(1) * BLOCK_F
    feature = first_col + tl.arange(0, BLOCK_F)
    begin = tl.minimum(tl.maximum(tl.load(p_rowptr + i), 0), num_edges)
    end = tl.minimum(tl.load(p_rowptr + i + 1), num_edges)
    first_chunk = (begin + SPLIT - 1) // SPLIT
    last_chunk = tl.maximum(end // SPLIT, first_chunk)
    total = _sum_edges(
        begin, end, first_chunk * SPLIT, (last_chunk - first_chunk) * SPLIT, p_x, p_col, p_weight, p_halo, p_data,
        p_scale, p_codebook, b, f, num_halo, num_table, width, first_col, K, D, CODEC, BLOCK_E, BLOCK_F,
    )  # fmt: skip
    for start in range(first_chunk, last_chunk, BLOCK_E):
        chunk = start + tl.arange(0, BLOCK_E)
        mask = (chunk < last_chunk)[:, None] & (feature < f)[None, :]
        total += tl.sum(tl.load(p_partial + chunk[:, None] * f + feature[None, :], mask=mask, other=0.0), 0)
    tl.store(p_out + i * f + feature, total.to(p_out.dtype.element_ty), mask=feature < f)
