"""A batch's rows of the graph's sparse matrix, with its columns relabelled to the batch and its halo."""

import torch
from torch import Tensor

from .._backend import implementation
from .._library import register
from .._types import check_tensor
from . import reference


def csr_slice(rowptr: Tensor, col: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the rows of `nodes` out of a CSR matrix and relabel its columns.

    [C_BB, C_BH] of equation 6; on the transposed graph, [C_BB^T, C_HB^T] of equation 7.

    A column becomes j < b where the neighbour is nodes[j], else b + its position in halo. Edges keep their order inside
    a row. Costs O(b + edges of the batch), plus one map of 4*n bytes: in C++ one a thread, kept between calls, on the
    GPU one a call. The C++ form releases the GIL, so a background thread can build batches. The GPU form waits for the
    device twice, for the sizes e and h; with them comes whether the entries are good, so bad ones raise there too.

    Args:
        rowptr: [n + 1] int64.
        col: [E] int32, node ids.
        nodes: [b] int64, distinct.
    Returns:
        rowptr_b: [b + 1] int64.
        col_b: [e] int32.
        halo: [h] int64, the out-of-batch neighbours in order of first appearance.
    Raises:
        ValueError: wrong dtype or shape, a node twice, a node or a column outside 0..n-1, a rowptr that does not rise
            from 0 to E at the nodes' rows.
    """
    check_tensor("rowptr", rowptr, (torch.int64,), (None,))
    check_tensor("col", col, (torch.int32,), (None,))
    check_tensor("nodes", nodes, (torch.int64,), (None,))
    return _csr_slice(rowptr, col, nodes)


def csr_slice_values(rowptr: Tensor, nodes: Tensor, rowptr_b: Tensor, values: Tensor) -> Tensor:
    """The per-edge values of the same slice: values[e] for every edge e of csr_slice's result, in its order.

    On the GPU it waits for the device once, for e.

    Args:
        rowptr: [n + 1] int64, the graph's.
        nodes: [b] int64, as given to csr_slice.
        rowptr_b: [b + 1] int64, as returned by csr_slice.
        values: [E] fp32.
    Returns:
        [e] fp32, e = rowptr_b[-1].
    Raises:
        ValueError: wrong dtype or shape, a node outside 0..n-1, or a rowptr_b that is not the nodes' degrees summed up.
    """
    check_tensor("rowptr", rowptr, (torch.int64,), (None,))
    check_tensor("nodes", nodes, (torch.int64,), (None,))
    check_tensor("rowptr_b", rowptr_b, (torch.int64,), (nodes.shape[0] + 1,))
    check_tensor("values", values, (torch.float32,), (None,))
    return _csr_slice_values(rowptr, nodes, rowptr_b, values)


def check_entries(rowptr: Tensor, num_edges: int, nodes: Tensor, col: Tensor | None = None) -> None:
    """Raise ValueError when an entry is out of range or a node is there twice."""
    n = rowptr.shape[0] - 1
    if n < 0:
        raise ValueError("rowptr is empty; n nodes need n + 1 entries, the first one 0")
    if nodes.numel() and not (nodes.min() >= 0 and nodes.max() < n):
        raise ValueError(f"nodes spans {int(nodes.min())}..{int(nodes.max())}; the graph has nodes 0..{n - 1}")
    if nodes.unique().numel() != nodes.numel():
        raise ValueError("nodes holds a node twice; a batch's nodes must be distinct: pass nodes.unique()")
    start, stop = rowptr[nodes], rowptr[nodes + 1]
    if nodes.numel() and not (start.min() >= 0 and (start <= stop).all() and stop.max() <= num_edges):
        raise ValueError(f"rowptr must rise from 0 to the number of edges, {num_edges}")
    if col is not None and col.numel() and not (col.min() >= 0 and col.max() < n):
        raise ValueError(f"col spans {int(col.min())}..{int(col.max())}; the graph has nodes 0..{n - 1}")


def _impl(rowptr, col, nodes):
    kernels = implementation(__name__, rowptr, col, nodes)
    if kernels is not reference:
        sliced = kernels.csr_slice(rowptr, col, nodes)
        if sliced is not None:
            return sliced
    check_entries(rowptr, col.shape[0], nodes, col)
    return reference.csr_slice(rowptr, col, nodes)


def _values_impl(rowptr, nodes, rowptr_b, values):
    kernels = implementation(__name__, rowptr, nodes, rowptr_b, values)
    if kernels is not reference:
        sliced = kernels.csr_slice_values(rowptr, nodes, rowptr_b, values)
        if sliced is not None:
            return sliced
    check_entries(rowptr, values.shape[0], nodes)
    degree = rowptr[nodes + 1] - rowptr[nodes]
    if not torch.equal(rowptr_b, torch.cat([degree.new_zeros(1), degree.cumsum(0)])):
        raise ValueError("rowptr_b is not the nodes' degrees summed up; pass what csr_slice returned for these nodes")
    return reference.csr_slice_values(rowptr, nodes, rowptr_b, values)


def _fake(rowptr, col, nodes):
    context = torch.library.get_ctx()
    e, h = context.new_dynamic_size(), context.new_dynamic_size()
    return rowptr.new_empty(nodes.shape[0] + 1), col.new_empty(e), nodes.new_empty(h)


def _values_fake(rowptr, nodes, rowptr_b, values):
    return values.new_empty(torch.library.get_ctx().new_dynamic_size())


_csr_slice = register("csr_slice(Tensor rowptr, Tensor col, Tensor nodes) -> (Tensor, Tensor, Tensor)", _impl, _fake)
_csr_slice_values = register(
    "csr_slice_values(Tensor rowptr, Tensor nodes, Tensor rowptr_b, Tensor values) -> Tensor",
    _values_impl,
    _values_fake,
)
