"""Attention over edges in plain torch: the truth that the kernels are tested against."""

import torch
from torch import Tensor

from .._dropout import kept
from .._types import CSR, Rows
from ..store_io.reference import pull_rows


def forward(
    x: Tensor, csr: CSR, rows: Rows | None,
    query: Tensor, key: Tensor | None, attention: Tensor | None, edge_matrix: Tensor | None,
    mode: str, heads: int, slope: float, scale: float, dropout: float, seed: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [r, H, F] of x's dtype, lse [r, H] fp32."""
    i, j, kept, num_rows = _edges(csr, None if rows else x.shape[0])
    source = _source(x, csr, rows, heads)[j]
    asked = _asked(query[i], csr.weight, kept, edge_matrix)
    score, _ = _score(asked, None if key is None else key[j], source, attention, mode, slope, scale)
    top = score.new_full((num_rows, heads), -torch.inf).scatter_reduce(0, i[:, None].expand_as(score), score, "amax")
    lse = torch.zeros_like(top).index_add(0, i, (score - top[i]).exp()).log() + top
    p = (score - lse[i]).exp() * _mask(i, j, heads, dropout, seed)
    out = source.new_zeros(num_rows, *source.shape[1:]).index_add(0, i, p[:, :, None] * source)
    return out.to(x.dtype), lse


def backward_rows(
    grad_out: Tensor, D: Tensor, lse: Tensor, x: Tensor, csr: CSR, rows: Rows | None,
    query: Tensor, key: Tensor | None, attention: Tensor | None, edge_matrix: Tensor | None,
    mode: str, heads: int, slope: float, scale: float, dropout: float, seed: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """grad_query [r, H(, F)], grad_attention [H, F] or None, grad_edge or None; D [r, H] = <grad_out, out>.

    grad_edge: of csr.weight [e, H] ("additive") or of edge_matrix [D, H, F] ("gatv2").
    """
    i, j, kept, num_rows = _edges(csr, None if rows else x.shape[0])
    source = _source(x, csr, rows, heads)[j]
    asked = _asked(query[i], csr.weight, kept, edge_matrix)
    score, inner = _score(asked, None if key is None else key[j], source, attention, mode, slope, scale)
    p = (score - lse[i]).exp()
    ds = p * (_mask(i, j, heads, dropout, seed) * (grad_out[i].float() * source).sum(2) - D[i])
    by_query, _ = _score_gradient(ds, inner, asked, source, attention, mode, slope, scale)
    grad_query = query.new_zeros(num_rows, *query.shape[1:]).index_add(0, i, by_query)
    grad_attention = grad_edge = None
    if mode == "gatv2":
        grad_attention = (ds[:, :, None] * torch.nn.functional.leaky_relu(inner, slope)).sum(0)
    # The score sees the sum of query and what the edge brings: their gradients are one.
    if edge_matrix is not None:
        grad_edge = torch.einsum("ed,ehf->dhf", csr.weight[kept], by_query)
    elif csr.weight is not None:
        grad_edge = torch.zeros_like(csr.weight).index_copy(0, kept, by_query)
    return grad_query, grad_attention, grad_edge


def backward_columns(
    grad_out: Tensor, D: Tensor, lse: Tensor, x: Tensor, csr_t: CSR, grad_rows: Rows | None, halo_stats: Tensor | None,
    query: Tensor, key: Tensor | None, attention: Tensor | None, edge_matrix: Tensor | None,
    mode: str, heads: int, slope: float, scale: float, dropout: float, seed: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """grad_x [b, w] of x's dtype, grad_key [b, H] or None."""
    r, (b, w) = grad_out.shape[0], x.shape
    j, i, kept, _ = _edges(csr_t, None if grad_rows else r)
    grad = grad_out.float()
    if grad_rows is not None:
        stored = pull_rows(grad_rows, csr_t.halo, grad.shape[1] * grad.shape[2])
        grad = torch.cat([grad, stored.view(-1, *grad.shape[1:])])
        lse, D = torch.cat([lse, halo_stats[:, 0]]), torch.cat([D, halo_stats[:, 1]])
    grad = grad[i]
    source = _heads(x.float(), heads)[j]
    asked = _asked(query[i], csr_t.weight, kept, edge_matrix)
    score, inner = _score(asked, None if key is None else key[j], source, attention, mode, slope, scale)
    p = (score - lse[i]).clamp(max=0).exp()  # a stored lse may be older than the score
    mask = torch.where(i[:, None] < r, _mask(i, j, heads, dropout, seed), 1.0)  # stored destinations: no dropout
    ds = p * (mask * (grad * source).sum(2) - D[i])
    by_query, by_source = _score_gradient(ds, inner, asked, source, attention, mode, slope, scale)
    by_edge = (p * mask)[:, :, None] * grad + by_source
    grad_x = by_edge.new_zeros(b, w).index_add(0, j, by_edge.flatten(1))
    # d s / d key is d s / d query: the score sees their sum.
    grad_key = by_query.new_zeros(b, heads).index_add(0, j, by_query) if mode == "additive" else None
    return grad_x.to(x.dtype), grad_key


def code_scores(rows: Rows, n_id: Tensor, table: Tensor) -> Tensor:
    branch = torch.arange(table.shape[0], device=table.device)
    return table[branch, rows.data[n_id].long()].sum(1)


def _edges(csr: CSR, limit: int | None) -> tuple[Tensor, Tensor, Tensor, int]:
    """(row, column, place in csr) of every edge, without columns from `limit` on, and the number of rows."""
    num_rows = csr.rowptr.shape[0] - 1
    row = torch.repeat_interleave(torch.arange(num_rows, device=csr.col.device), csr.rowptr.diff())
    col = csr.col.long()
    kept = torch.arange(len(col), device=col.device)
    if limit is not None:
        kept = kept[col < limit]
    return row[kept], col[kept], kept, num_rows


def _asked(query: Tensor, weight: Tensor | None, kept: Tensor, edge_matrix: Tensor | None) -> Tensor:
    """[e, H(, F)]: the queries of edges' destinations and what the edges bring."""
    if weight is None:
        return query
    return query + (weight[kept] if edge_matrix is None else torch.einsum("ed,dhf->ehf", weight[kept], edge_matrix))


def _source(x: Tensor, csr: CSR, rows: Rows | None, heads: int) -> Tensor:
    """[b + h, H, F] fp32."""
    values = x.float() if rows is None else torch.cat([x.float(), pull_rows(rows, csr.halo, x.shape[1])])
    return _heads(values, heads)


def _heads(values: Tensor, heads: int) -> Tensor:
    k, w = values.shape
    return values.view(k, heads, w // heads)


def _score(query, key, source, attention, mode, slope, scale) -> tuple[Tensor, Tensor | None]:
    """Score [e, H], and what the leaky relu is applied to."""
    if mode == "dot":
        return scale * (query * source).sum(2), None
    inner = query + (key if mode == "additive" else source)
    score = torch.nn.functional.leaky_relu(inner, slope)
    return (score if mode == "additive" else (attention * score).sum(2)), inner


def _score_gradient(ds, inner, query, source, attention, mode, slope, scale) -> tuple[Tensor, Tensor | float]:
    """ds times d score / d query, and times d score / d source."""
    if mode == "dot":
        return scale * ds[:, :, None] * source, scale * ds[:, :, None] * query
    slopes = torch.where(inner > 0, 1.0, slope)
    if mode == "additive":
        return ds * slopes, 0.0
    both = ds[:, :, None] * attention * slopes
    return both, both


def _mask(i: Tensor, j: Tensor, heads: int, dropout: float, seed: int | Tensor) -> Tensor | float:
    """m_ijh / (1 - dropout), [e, H]."""
    if dropout == 0:
        return 1.0
    return kept(dropout, seed, i[:, None], j[:, None], torch.arange(heads, device=i.device))
