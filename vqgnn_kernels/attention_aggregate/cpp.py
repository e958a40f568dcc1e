"""The C++ back-end of attention_aggregate and code_scores: csrc/cpu/attention_aggregate.cpp."""

import torch
from torch import Tensor

from .._backend import _C
from .._types import CSR, Rows, contiguous
from ..store_io.cpp import address, as_table


def forward(
    x: Tensor, csr: CSR, rows: Rows | None,
    query: Tensor, key: Tensor | None, attention: Tensor | None, edge_matrix: Tensor | None,
    mode: str, heads: int, slope: float, scale: float, dropout: float, seed: Tensor,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """None when rowptr, col or halo holds an entry out of range."""
    options = (mode, heads, slope, scale, dropout, seed)
    problem, kept = _problem(
        csr, rows, x.shape[0], key, options, x=x, query=query, key=key, attention=attention, edge_matrix=edge_matrix
    )
    num_rows = problem["num_rows"]
    out = torch.empty(num_rows, heads, problem["f"], dtype=torch.float32)
    lse = torch.empty(num_rows, heads, dtype=torch.float32)
    good = _C.attention_forward(problem, out.data_ptr(), lse.data_ptr())
    del kept
    return (out.to(x.dtype), lse) if good else None


def backward_rows(
    grad_out: Tensor, D: Tensor, lse: Tensor, x: Tensor, csr: CSR, rows: Rows | None,
    query: Tensor, key: Tensor | None, attention: Tensor | None, edge_matrix: Tensor | None,
    mode: str, heads: int, slope: float, scale: float, dropout: float, seed: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:  # fmt: skip
    """None when rowptr, col or halo holds an entry out of range."""
    options = (mode, heads, slope, scale, dropout, seed)
    problem, kept = _problem(
        csr, rows, x.shape[0], key, options,
        x=x, query=query, key=key, attention=attention, edge_matrix=edge_matrix, grad_out=grad_out, lse=lse, delta=D,
    )  # fmt: skip
    grad_query = torch.empty(problem["num_rows"], *query.shape[1:], dtype=torch.float32)
    grad_attention = None if attention is None else torch.empty(heads, problem["f"], dtype=torch.float32)
    edges = csr.weight if edge_matrix is None else edge_matrix
    grad_edges = None if edges is None else torch.zeros(edges.shape, dtype=torch.float32)  # skipped edges keep theirs
    good = _C.attention_backward_rows(problem, grad_query.data_ptr(), address(grad_attention), address(grad_edges))
    del kept
    return (grad_query, grad_attention, grad_edges) if good else None


def backward_columns(
    grad_out: Tensor, D: Tensor, lse: Tensor, x: Tensor, csr_t: CSR, grad_rows: Rows | None, halo_stats: Tensor | None,
    query: Tensor, key: Tensor | None, attention: Tensor | None, edge_matrix: Tensor | None,
    mode: str, heads: int, slope: float, scale: float, dropout: float, seed: Tensor,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """None when rowptr, col or halo holds an entry out of range."""
    options = (mode, heads, slope, scale, dropout, seed)
    problem, kept = _problem(
        csr_t, grad_rows, grad_out.shape[0], query, options,
        x=x, query=query, key=key, attention=attention, edge_matrix=edge_matrix,
        grad_out=grad_out, lse=lse, delta=D, halo_stats=halo_stats,
    )  # fmt: skip
    grad_x = torch.empty(x.shape, dtype=torch.float32)
    grad_key = None if key is None else torch.empty(x.shape[0], heads, dtype=torch.float32)
    good = _C.attention_backward_columns(problem, grad_x.data_ptr(), address(grad_key))
    del kept
    return (grad_x.to(x.dtype), grad_key) if good else None


def code_scores(rows: Rows, n_id: Tensor, table: Tensor) -> Tensor | None:
    """None when an n_id is out of range."""
    codes, kept = as_table(rows)
    n_id, table = n_id.contiguous(), table.contiguous()
    out = torch.empty(n_id.shape[0], table.shape[2], dtype=torch.float32)
    good = _C.code_scores(
        codes, n_id.data_ptr(), n_id.shape[0], table.data_ptr(), table.shape[1], table.shape[2], out.data_ptr()
    )
    del kept
    return out if good else None


def _problem(
    csr: CSR, rows: Rows | None, num_own: int, by_column: Tensor | None, options: tuple, **operands: Tensor | None
) -> tuple[dict, tuple]:
    """The fields of csrc/cpu/attention_aggregate.h, and the tensors that must outlive the call.

    by_column: the operand (key or query) with a row for every column of csr.
    """
    mode, heads, slope, scale, dropout, seed = options
    rowptr, col, halo = contiguous(csr.rowptr, csr.col, csr.halo)
    table, kept = as_table(rows)
    operands["edges"] = csr.weight
    operands = {name: None if t is None else t.float().contiguous() for name, t in operands.items()}
    width = operands["x"].shape[1]
    problem = {
        "mode": mode, "heads": heads, "f": width // heads,
        "slope": slope, "scale": scale, "dropout": dropout, "seed": int(seed) & 0xFFFFFFFF,
        "rowptr": rowptr.data_ptr(), "num_rows": rowptr.shape[0] - 1, "col": col.data_ptr(), "num_edges": col.shape[0],
        "halo": address(halo), "num_halo": -1 if halo is None else halo.shape[0], "table": table,
        "num_own": num_own, "max_columns": 2**31 if by_column is None else by_column.shape[0],
        "edge_dim": 0 if csr.weight is None else csr.weight.shape[1],
        "grad_out": 0, "lse": 0, "delta": 0, "halo_stats": 0,
        **{name: address(t) for name, t in operands.items()},
    }  # fmt: skip
    return problem, (rowptr, col, halo, kept, operands)
