"""The Triton back-end of aggregate: a program sums the edges of one row, or of one chunk of a long row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _chunks
from .._chunks import chunk_sum, edge_block, span
from .._decode import load_state, table_arguments
from .._dropout_triton import chain, dropout_arguments, first_hash, kept
from .._types import CSR, Rows


def aggregate(
    x: Tensor, csr: CSR, rows: Rows | None = None, dropout: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """Entries of rowptr, col and halo that are out of range are skipped: reporting them would need a sync."""
    x = x.contiguous()
    b, f = x.shape
    rowptr, col, weight, halo = (None if t is None else t.contiguous() for t in csr)
    num_rows, chunks = rowptr.shape[0] - 1, _chunks.num_chunks(csr)
    table = table_arguments(rows)
    out = torch.empty(num_rows, f, dtype=x.dtype, device=x.device)
    partial = torch.empty(chunks, f, dtype=torch.float32, device=x.device)
    _chunks.launch(
        aggregate_fwd_kernel,
        lambda count, blocks: (count, triton.cdiv(f, blocks["BLOCK_F"])),
        {
            "p_x": x, "p_rowptr": rowptr, "p_col": col, "p_weight": weight, "p_halo": halo, "b": b, "f": f,
            "num_rows": num_rows, "num_edges": col.shape[0],
            "num_halo": table["num_table"] if halo is None else halo.shape[0], **table,
            **dropout_arguments(dropout, seed),
        },
        {"f": f},
        chunks=(chunks, {"p_out": partial}),
        rows=(num_rows, {"p_out": out}),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["b", "num_rows", "num_edges", "num_halo", "num_table"])
def aggregate_fwd_kernel(
    p_x, p_rowptr, p_col, p_weight, p_halo, p_out, p_chunk_out, p_data, p_scale, p_codebook, b, f, num_rows, num_edges,
    num_halo, num_table, width, K, threshold, p_seed, kept_scale, D: tl.constexpr, CODEC: tl.constexpr,
    DROPOUT: tl.constexpr, PASS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first_col = tl.program_id(1) * BLOCK_F
    feature = first_col + tl.arange(0, BLOCK_F)
    m_feature = feature < f
    _, begin, count, first_chunk, last_chunk = span(p_rowptr, program, num_rows, num_edges, PASS, CHUNK)
    total = tl.zeros([BLOCK_F], tl.float32)
    if PASS == "rows":
        total = chunk_sum(p_chunk_out, first_chunk, last_chunk, f, feature, m_feature, BLOCK_E)
    for start in range(0, count, BLOCK_E):
        edge, m_edge = edge_block(start, begin, count, first_chunk, last_chunk, CHUNK, BLOCK_E)
        col = tl.load(p_col + edge, mask=m_edge, other=-1).to(tl.int64)
        m_batch = (col >= 0) & (col < b)
        message = tl.load(
            p_x + col[:, None] * f + feature[None, :], mask=m_batch[:, None] & m_feature[None, :], other=0.0
        ).to(tl.float32)
        m_used = m_batch
        if CODEC != "none":
            entry = col - b
            row = entry
            m_halo = (row >= 0) & (row < num_halo)
            if p_halo is not None:
                row = tl.load(p_halo + row, mask=m_halo, other=-1)
                m_halo = m_halo & (row >= 0) & (row < num_table)
            state = load_state(p_data, p_scale, p_codebook, row, m_halo, first_col, width, K, D, CODEC, BLOCK_F)
            if DROPOUT:
                hashed = chain(first_hash(tl.load(p_seed)), entry)
                state *= _kept_units(hashed, first_col, threshold, kept_scale, D, CODEC, BLOCK_E, BLOCK_F)
            message += state  # one of the two is 0
            m_used = m_batch | m_halo
        if p_weight is not None:
            message *= tl.load(p_weight + edge, mask=m_used, other=0.0)[:, None]
        total += tl.sum(message, 0)
    tl.store(p_out + program * f + feature, total.to(p_out.dtype.element_ty), mask=m_feature)


@triton.jit
def _kept_units(
    hashed, first_col, threshold, kept_scale, D: tl.constexpr, CODEC: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """[E, BLOCK_F]: what of each halo entry dropout keeps, a channel alone or a branch together."""
    if CODEC == "pq" and BLOCK_F % D == 0:  # one hash a branch
        branch = first_col // D + tl.arange(0, BLOCK_F // D)
        keep = kept(chain(hashed[:, None], branch[None, :]), threshold, kept_scale)
        keep = tl.broadcast_to(keep[:, :, None], [BLOCK_E, BLOCK_F // D, D])
        return tl.reshape(keep, [BLOCK_E, BLOCK_F])
    unit = first_col + tl.arange(0, BLOCK_F)
    if CODEC == "pq":
        unit = unit // D
    return kept(chain(hashed[:, None], unit[None, :]), threshold, kept_scale)
