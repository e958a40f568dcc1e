"""Long rows split over programs: shared by the Triton kernels that walk through the rows of a CSR.

The edge array is cut at multiples of CHUNK and a kernel is launched twice. PASS "chunks" takes every chunk that lies
inside a single row as if it were a row, and leaves its result in a table of chunks. PASS "rows" takes each row's other
edges and adds the results of its chunks, in order. So no program reads 2 * CHUNK edges or more, sums are in a fixed
order, and the grids follow from shapes alone.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from . import _triton
from ._types import CSR

CHUNK = 512  # long enough to be worth the search for a chunk's row, short enough not to hold up the launch's end


def num_chunks(csr: CSR) -> int:
    return csr.col.shape[0] // CHUNK if csr.rowptr.shape[0] > 1 else 0


def launch(
    kernel,
    grid: Callable[[int, dict[str, int]], tuple[int, ...]],
    arguments: dict[str, Any],
    sizes: dict[str, int],
    *,
    chunks: tuple[int, dict[str, Any]],
    rows: tuple[int, dict[str, Any]],
) -> None:
    """Both passes of a kernel. chunks, rows: how many, as grid's first argument, and the arguments of that pass.

    What the first pass writes to p_name the second one reads as p_chunk_name.
    """
    results = {f"p_chunk_{name[2:]}": value for name, value in chunks[1].items() if name.startswith("p_")}
    passes = (("chunks", *chunks, dict.fromkeys(results)), ("rows", *rows, results))
    for name, count, own, read in passes:
        if count:
            _triton.launch(
                kernel,
                lambda blocks, count=count: grid(count, blocks),
                {**arguments, **own, **read, "PASS": name, "CHUNK": CHUNK},
                {**sizes, "chunks": name == "chunks"},
                pure=True,
            )


@triton.jit
def span(p_rowptr, program, num_rows, num_edges, PASS: tl.constexpr, CHUNK: tl.constexpr):
    """(row, begin, count, first_chunk, last_chunk) of a row, or of a chunk, whose row it looks for.

    `edge_block` gives its count edges, from edge `begin` on less those of chunks first_chunk .. last_chunk - 1, whose
    results are to be added. A row from num_rows on, and a chunk that no single row holds, have none of either.
    """
    if PASS == "chunks":
        begin = program * CHUNK
        # The chunk's row is the last one with rowptr <= begin; each step leaves 1/32 of the rows.
        row = program * 0
        high = row + num_rows
        while high - row > 1:
            step = (high - row + 31) // 32
            probe = row + step * tl.arange(0, 32)
            below = tl.load(p_rowptr + probe, mask=probe < high, other=9223372036854775807) <= begin
            row += step * tl.maximum(tl.sum(below.to(tl.int64)) - 1, 0)
            high = tl.minimum(row + step, high)
        count = tl.where(tl.load(p_rowptr + row + 1) >= begin + CHUNK, CHUNK, 0)
        first_chunk = program + 1
        last_chunk = first_chunk
    else:
        row = program
        begin = tl.load(p_rowptr + row, mask=row < num_rows, other=0)
        begin = tl.minimum(tl.maximum(begin, 0), num_edges)
        end = tl.minimum(tl.load(p_rowptr + row + 1, mask=row < num_rows, other=0), num_edges)
        first_chunk = (begin + CHUNK - 1) // CHUNK
        last_chunk = tl.maximum(end // CHUNK, first_chunk)
        count = (end - begin - (last_chunk - first_chunk) * CHUNK).to(tl.int32)
    return row, begin, count, first_chunk, last_chunk


@triton.jit
def edge_block(start, begin, count, first_chunk, last_chunk, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """(edge, mask): number start .. start + BLOCK_E - 1 of the edges that are not a chunk's."""
    edge = start + tl.arange(0, BLOCK_E)
    before = edge < (first_chunk * CHUNK - begin).to(tl.int32)
    return tl.where(before, begin, begin + (last_chunk - first_chunk) * CHUNK) + edge, edge < count


@triton.jit
def chunk_sum(p_chunk, first_chunk, last_chunk, stride, column, m_column, BLOCK_E: tl.constexpr):
    """Sum over chunks of p_chunk[chunk, column], fp32, of the shape of `column`: [N]."""
    total = tl.zeros([column.shape[0]], tl.float32)
    for start in range(first_chunk, last_chunk, BLOCK_E):
        chunk = start + tl.arange(0, BLOCK_E)
        mask = (chunk < last_chunk)[:, None] & m_column[None, :]
        total += tl.sum(tl.load(p_chunk + chunk[:, None] * stride + column[None, :], mask=mask, other=0.0), 0)
    return total
