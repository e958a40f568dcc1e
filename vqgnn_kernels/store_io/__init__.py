"""Push and pull: write and read rows of a node-state table, whichever its codec."""

import torch
from torch import Tensor

from .._backend import implementation
from .._library import register
from .._types import FLOATS, Rows, check_rows, check_tensor
from . import reference


def push_rows(rows: Rows, n_id: Tensor, x: Tensor) -> None:
    """Write rows into a node-state table in place (GNNAutoScale's push).

    rows[n_id[i]] = encode(x[i])

    int8 and int4 are quantised row by row: offset is the largest bf16 <= min(x[i]), scale the smallest bf16 >=
    (max(x[i]) - offset) / levels with levels = 255 or 15, both divisions and differences in fp32, and
    q = round_half_even((x - offset) / scale). A row that equals its offset everywhere has scale 0. fp16 rounds to
    nearest even and overflows to infinity. Rows with NaN or infinities give unspecified values (fp32, fp16: kept).

    On a GPU the call is asynchronous, also where the table lies in pinned host memory: synchronise before the CPU
    reads it.

    Args:
        rows: the table, contiguous; its data (and scale) are changed. It may lie in pinned host memory while n_id and
            x are on the GPU.
        n_id: [k] int64, distinct rows of the table. With duplicates one of the rows wins, unspecified which.
        x: [k, f] fp32/fp16/bf16; for codec "pq" the codes, [k, m] of the table's dtype, copied as they are.
    Raises:
        ValueError: wrong dtype or shape, memory that the GPU cannot address, or an n_id outside 0..N-1 (then nothing
            is written). The Triton back-end does not report an n_id outside, it skips the row: to report it, the
            CPU would have to wait for the GPU.
    """
    check_tensor("n_id", n_id, (torch.int64,), (None,))
    k = n_id.shape[0]
    if rows.codec == "pq":
        check_rows("rows", rows, 0, codebook=False)
        check_tensor("x", x, (rows.data.dtype,), (k, rows.data.shape[1]))
    else:
        check_tensor("x", x, FLOATS, (k, None))
        check_rows("rows", rows, x.shape[1])
    if not rows.data.is_contiguous() or (rows.scale is not None and not rows.scale.is_contiguous()):
        raise ValueError("rows.data and rows.scale must be contiguous to be written; allocate them with torch.empty")
    _push_rows(rows.codec, rows.data, rows.scale, n_id, x.detach())


def pull_rows(rows: Rows, n_id: Tensor | None, f: int) -> Tensor:
    """Read rows of a node-state table as fp32 (GNNAutoScale's pull).

    out[i] = decode(rows[n_id[i]])

    Args:
        rows: the table; codec "pq" is decoded with its codebook. It may lie in pinned host memory while n_id is on
            the GPU.
        n_id: [k] int64, rows to read, repeats allowed; None reads the whole table in order.
        f: number of columns of the result.
    Returns:
        [k, f] fp32, a new tensor without gradient, on the device of n_id (of the table where n_id is None).
    Raises:
        ValueError: wrong dtype or shape, memory that the GPU cannot address, or an n_id outside 0..N-1. The Triton
            back-end does not report an n_id outside, its row of the result is 0.
    """
    check_rows("rows", rows, f)
    if n_id is not None:
        check_tensor("n_id", n_id, (torch.int64,), (None,))
    return _pull_rows(rows.codec, rows.data, rows.scale, rows.codebook, n_id, f)


def _push_impl(codec, data, scale, n_id, x):
    kernels = implementation(__name__, data, n_id, x)
    if kernels is not reference and kernels.push_rows(Rows(codec, data, scale), n_id, x):
        return
    n_id, x = n_id.to(data.device), x.to(data.device)
    _check_range(n_id, data.shape[0])
    reference.push_rows(Rows(codec, data, scale), n_id, x)


def _pull_impl(codec, data, scale, codebook, n_id, f):
    kernels = implementation(__name__, data, n_id)
    if kernels is not reference:
        out = kernels.pull_rows(Rows(codec, data, scale, codebook), n_id, f)
        if out is not None:
            return out
    if n_id is None:
        return reference.pull_rows(Rows(codec, data, scale, codebook), None, f)
    local = n_id.to(data.device)
    _check_range(local, data.shape[0])
    return reference.pull_rows(Rows(codec, data, scale, codebook), local, f).to(n_id.device)


def _check_range(n_id: Tensor, num_rows: int) -> None:
    if n_id.numel() and not (n_id.min() >= 0 and n_id.max() < num_rows):
        raise ValueError(
            f"n_id spans {int(n_id.min())}..{int(n_id.max())}, but rows.data has {num_rows} rows; "
            "every entry must be a row of the table"
        )


def _push_fake(codec, data, scale, n_id, x):
    return None


def _pull_fake(codec, data, scale, codebook, n_id, f):
    source = data if n_id is None else n_id
    return source.new_empty(source.shape[0], f, dtype=torch.float32)


_push_rows = register(
    "push_rows(str codec, Tensor(a!) data, Tensor(b!)? scale, Tensor n_id, Tensor x) -> ()", _push_impl, _push_fake
)
_pull_rows = register(
    "pull_rows(str codec, Tensor data, Tensor? scale, Tensor? codebook, Tensor? n_id, SymInt f) -> Tensor",
    _pull_impl,
    _pull_fake,
)
