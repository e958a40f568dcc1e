"""The Triton back-end of csr_slice: edge-parallel, so a row of any length is spread over as many programs as it needs.

One map over the graph's nodes says what a column is: -1 - j for nodes[j], else the position of the column's first edge
in the batch. An atomic minimum finds that position, so the halo's order does not depend on which program comes first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton

_INT32_EDGES = 2**31  # graphs with fewer edges count them in int32, which halves the map


def csr_slice(rowptr: Tensor, col: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """None when a node comes twice or an entry is out of range.

    Waits for the device twice, for the sizes of its results: e, and then h. Whether the entries are good comes along.
    """
    rowptr, col, nodes = rowptr.contiguous(), col.contiguous(), nodes.contiguous()
    n, b = rowptr.shape[0] - 1, nodes.shape[0]
    if b > n:  # also a rowptr without entries
        return None
    rowptr_b, shift, node, good = _rows(rowptr, col.shape[0], nodes)
    position = torch.int32 if col.shape[0] < _INT32_EDGES else torch.int64
    labels = torch.full((n,), torch.iinfo(position).max, dtype=position, device=rowptr.device)
    label = torch.arange(-1, -1 - b, -1, dtype=position, device=rowptr.device)
    labels[node] = label
    good &= (labels[node] == label).all()  # a node that is there twice keeps one label
    e, good = torch.stack([rowptr_b[-1], good.long()]).tolist()
    if not good:
        return None
    col_b = torch.empty(e, dtype=torch.int32, device=rowptr.device)
    if e == 0:
        return rowptr_b, col_b, nodes[:0].clone()
    bad = labels.new_zeros(1)
    _gather(rowptr_b, shift, col, col_b, labels, bad)
    is_first = torch.empty(e, dtype=torch.uint8, device=rowptr.device)
    shape = {"num_edges": e, "num_nodes": n}
    arguments = {"p_col": col_b, "p_labels": labels, "p_is_first": is_first, **shape}
    _triton.launch(csr_slice_first_kernel, _programs(e), arguments, pure=True)
    rank = is_first.cumsum(0, dtype=position)
    h, bad = torch.cat([rank[-1:], bad]).tolist()
    if bad:
        return None
    halo = torch.empty(h, dtype=torch.int64, device=rowptr.device)
    arguments = {"p_col": col_b, "p_labels": labels, "p_rank": rank, "p_halo": halo, "num_rows": b, **shape}
    _triton.launch(csr_slice_relabel_kernel, _programs(e), arguments)
    return rowptr_b, col_b, halo


def csr_slice_values(rowptr: Tensor, nodes: Tensor, rowptr_b: Tensor, values: Tensor) -> Tensor | None:
    """None when rowptr_b is not what csr_slice returns for these nodes. Waits for the device once, for e."""
    rowptr, nodes, values = rowptr.contiguous(), nodes.contiguous(), values.contiguous()
    n, b = rowptr.shape[0] - 1, nodes.shape[0]
    if n < 0 or (n == 0 and b):
        return None
    wanted, shift, _, good = _rows(rowptr, values.shape[0], nodes)
    good &= (rowptr_b == wanted).all()
    e, good = torch.stack([wanted[-1], good.long()]).tolist()
    if not good:
        return None
    out = torch.empty(e, dtype=values.dtype, device=rowptr.device)
    if e:
        _gather(wanted, shift, values, out)
    return out


def _rows(rowptr: Tensor, num_edges: int, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rowptr_b, shift, node, good) of a graph that is not empty, all on the device.

    shift: [b], edge i of row j is the graph's edge i + shift[j]. node: [b], nodes with 0 for those out of range.
    good: whether every node and its row's bounds are in range.
    """
    inside = (nodes >= 0) & (nodes < rowptr.shape[0] - 1)
    node = torch.where(inside, nodes, 0)
    start, stop = rowptr[node], rowptr[node + 1]
    good = (inside & (start >= 0) & (start <= stop) & (stop <= num_edges)).all()
    rowptr_b = rowptr.new_zeros(nodes.shape[0] + 1)
    torch.cumsum(stop - start, 0, out=rowptr_b[1:])
    return rowptr_b, start - rowptr_b[:-1], node, good


def _programs(num_edges: int):
    return lambda blocks: (triton.cdiv(num_edges, blocks["BLOCK_E"]),)


def _gather(rowptr_b, shift, source, out, labels=None, bad=None) -> None:
    num_rows, num_edges = shift.shape[0], out.shape[0]
    arguments = {
        "p_rowptr_b": rowptr_b, "p_shift": shift, "p_source": source, "p_out": out, "p_labels": labels, "p_bad": bad,
        "num_rows": num_rows, "num_edges": num_edges, "num_nodes": None if labels is None else labels.shape[0],
        "num_steps": num_rows.bit_length(),
    }  # fmt: skip
    _triton.launch(csr_slice_gather_kernel, _programs(num_edges), arguments, pure=True)


@triton.jit(do_not_specialize=["num_rows", "num_edges", "num_nodes", "num_steps"])
def csr_slice_gather_kernel(
    p_rowptr_b, p_shift, p_source, p_out, p_labels, p_bad, num_rows, num_edges, num_nodes, num_steps,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Copy the rows' entries; where they are columns, note each column's first edge and whether one is out of range."""
    b_edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_edge = b_edge < num_edges
    # the edge's row by bisection: rowptr_b[low] <= edge < rowptr_b[high]
    b_low = tl.zeros((BLOCK_E,), tl.int64)
    b_high = b_low + num_rows
    for _ in range(num_steps):
        b_middle = (b_low + b_high) // 2
        below = tl.load(p_rowptr_b + b_middle) <= b_edge
        b_low = tl.where(below, b_middle, b_low)
        b_high = tl.where(below, b_high, b_middle)
    b_shift = tl.load(p_shift + b_low)
    b_value = tl.load(p_source + b_edge + b_shift, mask=m_edge)
    tl.store(p_out + b_edge, b_value, mask=m_edge)
    if p_labels is not None:
        m_node = m_edge & (b_value >= 0) & (b_value < num_nodes)
        tl.store(p_bad + tl.zeros((BLOCK_E,), tl.int32), 1, mask=m_edge & ~m_node)
        # labels only fall, so an old value may cost an atomic but never lose one; hubs would queue without this look
        b_column = b_value.to(tl.int64)
        b_position = b_edge.to(p_labels.dtype.element_ty)
        m_earlier = m_node & (tl.load(p_labels + b_column, mask=m_node, other=0) > b_position)
        tl.atomic_min(p_labels + b_column, b_position, mask=m_earlier, sem="relaxed")


@triton.jit(do_not_specialize=["num_edges", "num_nodes"])
def csr_slice_first_kernel(p_col, p_labels, p_is_first, num_edges, num_nodes, BLOCK_E: tl.constexpr):
    """Flag the edges at which a halo node appears first."""
    b_edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_edge = b_edge < num_edges
    b_column = tl.load(p_col + b_edge, mask=m_edge, other=-1).to(tl.int64)
    m_node = (b_column >= 0) & (b_column < num_nodes)
    b_label = tl.load(p_labels + b_column, mask=m_node, other=-1)
    tl.store(p_is_first + b_edge, (b_label == b_edge).to(tl.uint8), mask=m_edge)


@triton.jit(do_not_specialize=["num_rows", "num_edges", "num_nodes"])
def csr_slice_relabel_kernel(
    p_col, p_labels, p_rank, p_halo, num_rows, num_edges, num_nodes, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Write the columns' labels over them, and the halo from its first edges; rank counts these, itself included."""
    b_edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_edge = b_edge < num_edges
    b_column = tl.load(p_col + b_edge, mask=m_edge, other=-1).to(tl.int64)
    m_node = (b_column >= 0) & (b_column < num_nodes)
    b_label = tl.load(p_labels + b_column, mask=m_node, other=-1)
    m_halo = b_label >= 0
    b_rank = tl.load(p_rank + b_label, mask=m_halo, other=1) - 1
    tl.store(p_col + b_edge, tl.where(m_halo, num_rows + b_rank, -1 - b_label).to(tl.int32), mask=m_edge)
    tl.store(p_halo + b_rank, b_column, mask=m_halo & (b_label == b_edge))
