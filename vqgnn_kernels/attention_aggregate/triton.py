"""The Triton back-end of attention_aggregate.

A program takes one head of one row, or of one chunk of a long row, and walks through its edges, BLOCK_E at a time.
Edges whose column is out of range are skipped.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _chunks, _triton
from .._chunks import chunk_sum, edge_block, span
from .._decode import _clamp_code, _dequantise, load_state, table_arguments
from .._dropout_triton import chain, dropout_arguments, first_hash, kept
from .._types import CSR, Rows

_ROWS_PER_PARTIAL = 32  # "gatv2": rows whose parts of the weights' gradients one program adds up, in a fixed order
_EDGE_BLOCK = 512  # "gatv2": numbers of edge_matrix's gradient that a program sums in registers, but at most 8 rows


def forward(
    x: Tensor, csr: CSR, rows: Rows | None,
    query: Tensor, key: Tensor | None, attention: Tensor | None, edge_matrix: Tensor | None,
    mode: str, heads: int, slope: float, scale: float, dropout: float, seed: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_rows, num_chunks = csr.rowptr.shape[0] - 1, _chunks.num_chunks(csr)
    features = x.shape[1] // heads

    sizes = {"F": features, **_edge_size(edge_matrix)}

    def new(count, dtype):
        out, lse = x.new_empty(count, heads, features, dtype=dtype), x.new_empty(count, heads, dtype=torch.float32)
        return {"p_out": out, "p_lse": lse}

    results = new(num_rows, x.dtype)
    _chunks.launch(
        attention_aggregate_fwd_kernel,
        lambda count, blocks: (count * heads,),
        {
            "p_x": x.contiguous(), "b": x.shape[0],
            **_arguments(
                csr, rows, query, key, attention, edge_matrix, mode, heads, features, slope, scale, dropout, seed
            ),
        },
        sizes,
        chunks=(num_chunks, new(num_chunks, torch.float32)),
        rows=(num_rows, results),
    )  # fmt: skip
    return results["p_out"], results["p_lse"]


def backward_rows(
    grad_out: Tensor, D: Tensor, lse: Tensor, x: Tensor, csr: CSR, rows: Rows | None,
    query: Tensor, key: Tensor | None, attention: Tensor | None, edge_matrix: Tensor | None,
    mode: str, heads: int, slope: float, scale: float, dropout: float, seed: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    num_rows, num_chunks, features = grad_out.shape[0], _chunks.num_chunks(csr), grad_out.shape[2]
    each = _ROWS_PER_PARTIAL if mode == "gatv2" else 1
    programs = triton.cdiv(num_rows, each)
    edge_dim = 0 if edge_matrix is None else edge_matrix.shape[0]
    edge_rows = min(8, max(1, _EDGE_BLOCK // triton.next_power_of_2(features)))
    edge_block = min(triton.next_power_of_2(max(edge_dim, 1)), edge_rows)
    by_edge = mode == "additive" and csr.weight is not None
    grad_edges = torch.zeros_like(csr.weight, memory_format=torch.contiguous_format) if by_edge else None

    sizes = {"F": features, **_edge_size(edge_matrix)}

    def new(count, programs):
        partial = query.new_empty(programs, 1 + edge_dim, heads, features) if mode == "gatv2" else None
        return {"p_grad_query": query.new_empty(count, *query.shape[1:]), "p_partial": partial}

    results, by_chunk = new(num_rows, programs), new(num_chunks, num_chunks)
    _chunks.launch(
        attention_aggregate_bwd_rows_kernel,
        lambda count, blocks: (count * heads, triton.cdiv(edge_dim, edge_block)) if edge_dim else (count * heads,),
        {
            "p_grad": grad_out.contiguous(), "p_delta": D.contiguous(), "p_lse": lse.contiguous(),
            "p_x": x.contiguous(), "b": x.shape[0],
            **_arguments(
                csr, rows, query, key, attention, edge_matrix, mode, heads, features, slope, scale, dropout, seed
            ),
            "p_grad_edges": grad_edges, "EDGE_BLOCK": edge_block,
        },
        sizes,
        chunks=(num_chunks, by_chunk | {"ROWS": 1}),
        rows=(programs, results | {"ROWS": each}),
    )  # fmt: skip
    if mode != "gatv2":
        return results["p_grad_query"], None, grad_edges
    partial = results["p_partial"].sum(0) + by_chunk["p_partial"].sum(0)
    return results["p_grad_query"], partial[0].clone(), partial[1:] if edge_dim else None


def backward_columns(
    grad_out: Tensor, D: Tensor, lse: Tensor, x: Tensor, csr_t: CSR, grad_rows: Rows | None, halo_stats: Tensor | None,
    query: Tensor, key: Tensor | None, attention: Tensor | None, edge_matrix: Tensor | None,
    mode: str, heads: int, slope: float, scale: float, dropout: float, seed: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    (r, _, features), b, num_chunks = grad_out.shape, x.shape[0], _chunks.num_chunks(csr_t)

    sizes = {"F": features, **_edge_size(edge_matrix)}

    def new(count, dtype):
        grad_key = None if key is None else key.new_empty(count, heads)
        return {"p_grad_x": x.new_empty(count, x.shape[1], dtype=dtype), "p_grad_key": grad_key}

    results = new(b, x.dtype)
    _chunks.launch(
        attention_aggregate_bwd_columns_kernel,
        lambda count, blocks: (count * heads,),
        {
            "p_grad": grad_out.contiguous(), "p_delta": D.contiguous(), "p_lse": lse.contiguous(), "b": r,
            "p_x": x.contiguous(), "p_stats": None if halo_stats is None else halo_stats.contiguous(),
            **_arguments(
                csr_t, grad_rows, query, key, attention, edge_matrix, mode, heads, features, slope, scale,
                dropout, seed,
            ),
        },
        sizes,
        chunks=(num_chunks, new(num_chunks, torch.float32)),
        rows=(b, results),
    )  # fmt: skip
    return results["p_grad_x"], results["p_grad_key"]


def code_scores(rows: Rows, n_id: Tensor, table: Tensor) -> Tensor:
    codes, (m, num_codes, heads) = rows.data.contiguous(), table.shape
    num_rows = n_id.shape[0]
    out = table.new_empty(num_rows, heads)
    _triton.launch(
        code_scores_kernel,
        lambda blocks: (triton.cdiv(num_rows, blocks["BLOCK_B"]),),
        {
            "p_codes": codes, "p_n_id": n_id.contiguous(), "p_table": table.contiguous(), "p_out": out,
            "num_rows": num_rows, "num_table": codes.shape[0], "m": m, "K": num_codes, "H": heads,
            "BLOCK_H": triton.next_power_of_2(heads),
        },
        {"H": heads},
        pure=True,
    )  # fmt: skip
    return out


def _arguments(
    csr, rows, query, key, attention, edge_matrix, mode, heads, features, slope, scale, dropout, seed
) -> dict:
    """What the three kernels share."""
    block = triton.next_power_of_2(max(features, 2))  # int4 unpacks pairs
    halo = None if csr.halo is None else csr.halo.contiguous()
    num_halo = 0 if rows is None else (rows.data if halo is None else halo).shape[0]
    return {
        "p_rowptr": csr.rowptr.contiguous(), "p_col": csr.col.contiguous(),
        "num_rows": csr.rowptr.shape[0] - 1, "num_edges": csr.col.shape[0],
        "p_halo": halo, "num_halo": num_halo, **table_arguments(rows),
        "p_query": query.contiguous(), "p_key": None if key is None else key.contiguous(),
        "p_attention": None if attention is None else attention.contiguous(),
        "p_edges": None if csr.weight is None else csr.weight.contiguous(),
        "p_edge_matrix": None if edge_matrix is None else edge_matrix.contiguous(),
        "slope": slope, "score_scale": scale,
        **dropout_arguments(dropout, seed),
        "EDGE_DIM": 0 if csr.weight is None else csr.weight.shape[1],
        "MODE": mode, "H": heads, "F": features, "ALIGNED": features == block or heads == 1,
        "BLOCK_F": block,
    }  # fmt: skip


def _edge_size(edge_matrix: Tensor | None) -> dict[str, int]:
    return {} if edge_matrix is None else {"edge_dim": edge_matrix.shape[0]}


@triton.jit
def _dropout(seed, threshold, kept_scale, i, j, head):
    """m_ijh / (1 - dropout)."""
    return kept(chain(chain(chain(first_hash(seed), i), j), head), threshold, kept_scale)


@triton.jit
def _columns(
    p_col, p_halo, start, begin, count, first_chunk, last_chunk, b, num_halo, num_table,
    CODEC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_E edges: place, column, its row of the table, whether it is of the batch, whether it is a stored one."""
    edge, m_edge = edge_block(start, begin, count, first_chunk, last_chunk, CHUNK, BLOCK_E)
    col = tl.load(p_col + edge, mask=m_edge, other=-1).to(tl.int64)
    m_batch = (col >= 0) & (col < b)
    if CODEC == "none":
        return edge, col, col, m_batch, m_batch & False
    m_halo = (col >= b) & (col < b + num_halo)
    row = col - b
    if p_halo is not None:
        row = tl.load(p_halo + row, mask=m_halo, other=-1)
    m_halo &= (row >= 0) & (row < num_table)
    return edge, col, row, m_batch, m_halo


@triton.jit
def _load_unaligned(p_data, p_scale, p_codebook, row, m_value, col, width, K, D: tl.constexpr, CODEC: tl.constexpr):
    """load_state of any columns [BLOCK_F], value by value: a head's columns may begin inside a codeword or a byte."""
    p_row = p_data + row[:, None] * width
    if CODEC == "pq":
        code = _clamp_code(tl.load(p_row + (col // D)[None, :], mask=m_value, other=0), K)
        p_word = p_codebook + (col // D).to(tl.int64) * K * D + col % D
        value = tl.load(p_word[None, :] + code * D, mask=m_value, other=0.0).to(tl.float32)
    elif CODEC == "int4":
        byte = tl.load(p_row + (col // 2)[None, :], mask=m_value, other=0).to(tl.int32)
        value = ((byte >> (4 * (col % 2))[None, :]) & 15).to(tl.float32)
    else:
        value = tl.load(p_row + col[None, :], mask=m_value, other=0).to(tl.float32)
    if CODEC == "int8" or CODEC == "int4":
        m_row = tl.max(m_value.to(tl.int32), 1) > 0
        value = _dequantise(value, p_scale, row, m_row)
    return value


@triton.jit
def _values(
    p_x, head, col, row, m_batch, m_halo,
    p_data, p_scale, p_codebook, width, K,
    D: tl.constexpr, CODEC: tl.constexpr, H: tl.constexpr, F: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """[BLOCK_E, BLOCK_F] fp32: the head's columns of rows of x and of the table, 0 beyond F."""
    first = head * F
    feature = tl.arange(0, BLOCK_F)
    m_feature = (feature < F)[None, :]
    m_x = m_batch[:, None] & m_feature
    value = tl.load(p_x + (col * (H * F) + first)[:, None] + feature[None, :], mask=m_x, other=0.0).to(tl.float32)
    if CODEC != "none":
        m_state = m_halo[:, None] & m_feature
        if ALIGNED:
            state = load_state(p_data, p_scale, p_codebook, row, m_halo, first, width, K, D, CODEC, BLOCK_F)
        else:
            state = _load_unaligned(p_data, p_scale, p_codebook, row, m_state, first + feature, width, K, D, CODEC)
        value = tl.where(m_state, state, value)
    return value


@triton.jit
def _ask(
    query, p_edges, p_edge_matrix, edge, m_edge, head,
    MODE: tl.constexpr, H: tl.constexpr, F: tl.constexpr, EDGE_DIM: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Queries of edges' destinations, and with EDGE_DIM what the edges bring: the score sees their sum."""
    if EDGE_DIM == 0:
        asked = query
    elif MODE == "additive":
        asked = query + tl.load(p_edges + edge * H + head, mask=m_edge, other=0.0)
    else:
        feature = tl.arange(0, BLOCK_F)
        asked = query + tl.zeros([BLOCK_E, BLOCK_F], tl.float32)
        for d in range(EDGE_DIM):
            by_d = tl.load(p_edges + edge * EDGE_DIM + d, mask=m_edge, other=0.0)
            row = tl.load(p_edge_matrix + (d * H + head) * F + feature, mask=feature < F, other=0.0)
            asked += by_d[:, None] * row[None, :]
    return asked


@triton.jit
def _chunk_scalar(p_chunk, first_chunk, last_chunk, stride, BLOCK_E: tl.constexpr):
    """chunk_sum of a single column."""
    column = tl.arange(0, 1)
    return tl.sum(chunk_sum(p_chunk, first_chunk, last_chunk, stride, column, column == 0, BLOCK_E), 0)


@triton.jit
def _leaky(inner, slope):
    return tl.where(inner > 0, inner, inner * slope)


@triton.jit
def _softmax_step(top, total, acc, score, kept, value):
    """Edges of some score and value join the running maximum and sums."""
    new_top = tl.maximum(top, tl.max(score, 0))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # all skipped so far: -inf - -inf would be NaN
    p = tl.exp(score - shift)
    shrink = tl.exp(top - shift)
    return new_top, total * shrink + tl.sum(p, 0), acc * shrink + tl.sum((p * kept)[:, None] * value, 0)


@triton.jit(do_not_specialize=["b", "num_rows", "num_edges", "num_halo", "num_table"])
def attention_aggregate_fwd_kernel(
    p_x, b, p_rowptr, p_col, num_rows, num_edges, p_halo, num_halo, p_data, p_scale, p_codebook, num_table, width, K,
    p_query, p_key, p_attention, p_edges, p_edge_matrix, slope, score_scale, threshold, p_seed, kept_scale,
    p_out, p_lse, p_chunk_out, p_chunk_lse,
    D: tl.constexpr, CODEC: tl.constexpr, MODE: tl.constexpr, H: tl.constexpr, F: tl.constexpr, EDGE_DIM: tl.constexpr,
    ALIGNED: tl.constexpr, DROPOUT: tl.constexpr, PASS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    program = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    i, begin, count, first_chunk, last_chunk = span(p_rowptr, program, num_rows, num_edges, PASS, CHUNK)
    feature = tl.arange(0, BLOCK_F)
    m_feature = feature < F
    if MODE == "additive":
        query = tl.load(p_query + i * H + head)
    else:
        query = tl.load(p_query + (i * H + head) * F + feature, mask=m_feature, other=0.0)[None, :]
    if MODE == "gatv2":
        attention = tl.load(p_attention + head * F + feature, mask=m_feature, other=0.0)[None, :]

    if DROPOUT:
        seed = tl.load(p_seed)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_F], tl.float32)
    for start in range(0, count, BLOCK_E):
        edge, col, row, m_batch, m_halo = _columns(
            p_col, p_halo, start, begin, count, first_chunk, last_chunk, b, num_halo, num_table, CODEC, CHUNK, BLOCK_E
        )
        m_edge = m_batch | m_halo
        value = _values(
            p_x, head, col, row, m_batch, m_halo, p_data, p_scale, p_codebook, width, K,
            D, CODEC, H, F, ALIGNED, BLOCK_F,
        )  # fmt: skip
        asked = _ask(query, p_edges, p_edge_matrix, edge, m_edge, head, MODE, H, F, EDGE_DIM, BLOCK_F, BLOCK_E)
        if MODE == "additive":
            score = _leaky(tl.load(p_key + col * H + head, mask=m_edge, other=0.0) + asked, slope)
        elif MODE == "dot":
            score = score_scale * tl.sum(query * value, 1)
        else:
            score = tl.sum(attention * _leaky(value + asked, slope), 1)
        score = tl.where(m_edge, score, float("-inf"))
        kept = 1.0
        if DROPOUT:
            kept = _dropout(seed, threshold, kept_scale, i, col, head)
        top, total, acc = _softmax_step(top, total, acc, score, kept, value)
    if PASS == "rows":  # a chunk is an edge whose score is its lse and whose value is its out
        for start in range(first_chunk, last_chunk, BLOCK_E):
            chunk = start + tl.arange(0, BLOCK_E)
            m_chunk = chunk < last_chunk
            position = chunk * H + head
            score = tl.load(p_chunk_lse + position, mask=m_chunk, other=float("-inf"))
            p_value = p_chunk_out + (position * F)[:, None] + feature[None, :]
            value = tl.load(p_value, mask=m_chunk[:, None] & m_feature[None, :], other=0.0)
            top, total, acc = _softmax_step(top, total, acc, score, 1.0, value)
    # An empty row: 0 and -inf.
    position = program * H + head
    tl.store(p_lse + position, top + tl.log(tl.where(total == 0.0, 1.0, total)))
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + position * F + feature, out.to(p_out.dtype.element_ty), mask=m_feature)


@triton.jit(do_not_specialize=["b", "num_rows", "num_edges", "num_halo", "num_table"])
def attention_aggregate_bwd_rows_kernel(
    p_grad, p_delta, p_lse, p_x, b, p_rowptr, p_col, num_rows, num_edges, p_halo, num_halo, p_data, p_scale, p_codebook,
    num_table, width, K, p_query, p_key, p_attention, p_edges, p_edge_matrix, slope, score_scale, threshold, p_seed,
    kept_scale, p_grad_edges,
    p_grad_query, p_partial, p_chunk_grad_query, p_chunk_partial,  # the last one: its sum is the host's
    D: tl.constexpr, CODEC: tl.constexpr, MODE: tl.constexpr, H: tl.constexpr, F: tl.constexpr, EDGE_DIM: tl.constexpr,
    EDGE_BLOCK: tl.constexpr, ALIGNED: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, PASS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    program = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    feature = tl.arange(0, BLOCK_F)
    m_feature = feature < F
    if MODE == "gatv2":
        attention = tl.load(p_attention + head * F + feature, mask=m_feature, other=0.0)
        grad_attention = tl.zeros([BLOCK_F], tl.float32)
        if EDGE_DIM > 0:  # grid's second axis: rows of the matrix; all else its programs compute alike, and write alike
            first_d = tl.program_id(1) * EDGE_BLOCK
            in_block = tl.arange(0, EDGE_BLOCK)
            grad_matrix = tl.zeros([EDGE_BLOCK, BLOCK_F], tl.float32)

    if DROPOUT:
        seed = tl.load(p_seed)
    for each in range(ROWS):
        at = program * ROWS + each
        i, begin, count, first_chunk, last_chunk = span(p_rowptr, at, num_rows, num_edges, PASS, CHUNK)
        m_row = i < num_rows
        m_out = feature < tl.where(m_row, F, 0)
        position = i * H + head
        if MODE == "additive":
            query = tl.load(p_query + position, mask=m_row, other=0.0)
            grad_query = tl.full([], 0.0, tl.float32)
        else:
            query = tl.load(p_query + position * F + feature, mask=m_out, other=0.0)[None, :]
            grad_query = tl.zeros([BLOCK_F], tl.float32)
        grad = tl.load(p_grad + position * F + feature, mask=m_out, other=0.0).to(tl.float32)
        delta = tl.load(p_delta + position, mask=m_row, other=0.0)
        lse = tl.load(p_lse + position, mask=m_row, other=0.0)
        for start in range(0, count, BLOCK_E):
            edge, col, row, m_batch, m_halo = _columns(
                p_col,
                p_halo,
                start,
                begin,
                count,
                first_chunk,
                last_chunk,
                b,
                num_halo,
                num_table,
                CODEC,
                CHUNK,
                BLOCK_E,
            )
            m_edge = m_batch | m_halo
            value = _values(
                p_x, head, col, row, m_batch, m_halo, p_data, p_scale, p_codebook, width, K,
                D, CODEC, H, F, ALIGNED, BLOCK_F,
            )  # fmt: skip
            asked = _ask(query, p_edges, p_edge_matrix, edge, m_edge, head, MODE, H, F, EDGE_DIM, BLOCK_F, BLOCK_E)
            if MODE == "additive":
                inner = tl.load(p_key + col * H + head, mask=m_edge, other=0.0) + asked
                score = _leaky(inner, slope)
            elif MODE == "dot":
                score = score_scale * tl.sum(query * value, 1)
            else:
                inner = value + asked
                score = tl.sum(attention[None, :] * _leaky(inner, slope), 1)
            p = tl.exp(tl.where(m_edge, score - lse, float("-inf")))
            by_weight = tl.sum(grad[None, :] * value, 1)
            if DROPOUT:
                by_weight *= _dropout(seed, threshold, kept_scale, i, col, head)
            grad_score = p * (by_weight - delta)
            if MODE == "additive":
                by_query = tl.where(inner > 0, grad_score, grad_score * slope)
                grad_query += tl.sum(by_query, 0)
                if EDGE_DIM > 0:
                    tl.store(p_grad_edges + edge * H + head, by_query, mask=m_edge)
            elif MODE == "dot":
                grad_query += tl.sum(grad_score[:, None] * value, 0)
            else:
                slopes = tl.where(inner > 0, grad_score[:, None], (grad_score * slope)[:, None])
                grad_query += tl.sum(slopes, 0)
                grad_attention += tl.sum(slopes * inner, 0)
                if EDGE_DIM > 0:
                    for d in range(EDGE_BLOCK):
                        m_edge_d = m_edge & (edge < tl.where(first_d + d < EDGE_DIM, num_edges, 0))
                        by_d = tl.load(p_edges + edge * EDGE_DIM + first_d + d, mask=m_edge_d, other=0.0)
                        part = tl.sum(by_d[:, None] * slopes, 0)
                        grad_matrix += tl.where((in_block == d)[:, None], part[None, :], 0.0)
        position = at * H + head
        if MODE == "additive":
            if PASS == "rows":
                grad_query += _chunk_scalar(p_chunk_grad_query + head, first_chunk, last_chunk, H, BLOCK_E)
            tl.store(p_grad_query + position, grad_query, mask=m_row)
        else:
            grad_query *= score_scale if MODE == "dot" else attention
            if PASS == "rows":
                p_chunk = p_chunk_grad_query + head * F
                grad_query += chunk_sum(p_chunk, first_chunk, last_chunk, H * F, feature, m_feature, BLOCK_E)
            tl.store(p_grad_query + position * F + feature, grad_query, mask=m_out)
    if MODE == "gatv2":
        p_partial += (program * (1 + EDGE_DIM) * H + head) * F
        tl.store(p_partial + feature, grad_attention, mask=m_feature)
        if EDGE_DIM > 0:
            in_matrix = first_d + in_block
            p_matrix = p_partial + ((1 + in_matrix) * (H * F))[:, None] + feature[None, :]
            m_matrix = (in_matrix < EDGE_DIM)[:, None] & m_feature[None, :]
            tl.store(p_matrix, grad_matrix * attention[None, :], mask=m_matrix)


@triton.jit(do_not_specialize=["b", "num_rows", "num_edges", "num_halo", "num_table"])
def attention_aggregate_bwd_columns_kernel(
    p_grad, p_delta, p_lse, b, p_x, p_stats, p_rowptr, p_col, num_rows, num_edges, p_halo, num_halo, p_data, p_scale,
    p_codebook, num_table, width, K, p_query, p_key, p_attention, p_edges, p_edge_matrix, slope, score_scale, threshold,
    p_seed, kept_scale,
    p_grad_x, p_grad_key, p_chunk_grad_x, p_chunk_grad_key,
    D: tl.constexpr, CODEC: tl.constexpr, MODE: tl.constexpr, H: tl.constexpr, F: tl.constexpr, EDGE_DIM: tl.constexpr,
    ALIGNED: tl.constexpr, DROPOUT: tl.constexpr, PASS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Row j of the transposed matrix: its edges are the destinations i that read x_j; columns < b are the batch's."""
    program = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    j, begin, count, first_chunk, last_chunk = span(p_rowptr, program, num_rows, num_edges, PASS, CHUNK)
    p_x += (j * H + head) * F
    p_grad_x += (program * H + head) * F
    feature = tl.arange(0, BLOCK_F)
    m_feature = feature < F
    x = tl.load(p_x + feature, mask=m_feature, other=0.0).to(tl.float32)[None, :]
    grad_x = tl.zeros([BLOCK_F], tl.float32)

    if DROPOUT:
        seed = tl.load(p_seed)
    if MODE == "additive":
        key = tl.load(p_key + j * H + head)
        grad_key = tl.full([], 0.0, tl.float32)
    else:
        by_score = tl.zeros([BLOCK_F], tl.float32)
    if MODE == "gatv2":
        attention = tl.load(p_attention + head * F + feature, mask=m_feature, other=0.0)
    for start in range(0, count, BLOCK_E):
        edge, col, row, m_batch, m_halo = _columns(
            p_col, p_halo, start, begin, count, first_chunk, last_chunk, b, num_halo, num_table, CODEC, CHUNK, BLOCK_E
        )
        m_edge = m_batch | m_halo
        grad = _values(
            p_grad, head, col, row, m_batch, m_halo, p_data, p_scale, p_codebook, width, K,
            D, CODEC, H, F, ALIGNED, BLOCK_F,
        )  # fmt: skip
        position = col * H + head
        lse = tl.load(p_lse + position, mask=m_batch, other=0.0)
        delta = tl.load(p_delta + position, mask=m_batch, other=0.0)
        if CODEC != "none":
            p_stat = p_stats + (col - b) * (2 * H) + head
            lse += tl.load(p_stat, mask=m_halo, other=0.0)
            delta += tl.load(p_stat + H, mask=m_halo, other=0.0)
        if MODE == "additive":
            query = tl.load(p_query + position, mask=m_edge, other=0.0)
            asked = _ask(query, p_edges, p_edge_matrix, edge, m_edge, head, MODE, H, F, EDGE_DIM, BLOCK_F, BLOCK_E)
            inner = asked + key
            score = _leaky(inner, slope)
        else:
            p_q = p_query + (position * F)[:, None] + feature[None, :]
            query = tl.load(p_q, mask=m_edge[:, None] & m_feature[None, :], other=0.0)
            if MODE == "dot":
                score = score_scale * tl.sum(query * x, 1)
            else:
                asked = _ask(query, p_edges, p_edge_matrix, edge, m_edge, head, MODE, H, F, EDGE_DIM, BLOCK_F, BLOCK_E)
                inner = x + asked
                score = tl.sum(attention[None, :] * _leaky(inner, slope), 1)
        p = tl.exp(tl.where(m_edge, tl.minimum(score - lse, 0.0), float("-inf")))  # a stored lse may be stale
        by_weight = tl.sum(grad * x, 1)
        weight = p
        if DROPOUT:
            mask = tl.where(m_halo, 1.0, _dropout(seed, threshold, kept_scale, col, j, head))
            by_weight *= mask
            weight *= mask
        grad_score = p * (by_weight - delta)
        grad_x += tl.sum(weight[:, None] * grad, 0)
        if MODE == "additive":
            grad_key += tl.sum(tl.where(inner > 0, grad_score, grad_score * slope), 0)
        elif MODE == "dot":
            by_score += tl.sum(grad_score[:, None] * query, 0)
        else:
            by_score += tl.sum(tl.where(inner > 0, grad_score[:, None], (grad_score * slope)[:, None]), 0)
    if MODE == "additive":
        if PASS == "rows":
            grad_key += _chunk_scalar(p_chunk_grad_key + head, first_chunk, last_chunk, H, BLOCK_E)
        tl.store(p_grad_key + program * H + head, grad_key)
    elif MODE == "dot":
        grad_x += by_score * score_scale
    else:
        grad_x += by_score * attention
    if PASS == "rows":
        p_chunk = p_chunk_grad_x + head * F
        grad_x += chunk_sum(p_chunk, first_chunk, last_chunk, H * F, feature, m_feature, BLOCK_E)
    tl.store(p_grad_x + feature, grad_x.to(p_grad_x.dtype.element_ty), mask=m_feature)


@triton.jit
def code_scores_kernel(
    p_codes, p_n_id, p_table, p_out, num_rows, num_table, m, K,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    head = tl.arange(0, BLOCK_H)
    row = tl.load(p_n_id + i, mask=i < num_rows, other=-1)
    m_row = (row >= 0) & (row < num_table)
    m_score = m_row[:, None] & (head < H)[None, :]
    acc = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for branch in range(m):
        code = _clamp_code(tl.load(p_codes + row * m + branch, mask=m_row, other=0), K)
        acc += tl.load(p_table + code[:, None] * H + head[None, :], mask=m_score, other=0.0)
        p_table += K * H
    tl.store(p_out + i[:, None] * H + head[None, :], acc, mask=(i < num_rows)[:, None] & (head < H)[None, :])
