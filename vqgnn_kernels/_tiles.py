"""The tile of every Triton kernel: block sizes, warps and stages, each with what limits the kernel there.

A kernel's tiles are tried in order; the first whose condition holds for the launch's sizes is taken. VQGNN_AUTOTUNE=1
times all of them once for each new size instead (see `_triton.launch`). tests/compile holds every tile's registers,
spills and shared memory to its budget.
"""

from collections.abc import Callable
from typing import NamedTuple


class Tile(NamedTuple):
    """blocks: the kernel's BLOCK_* constants. when: whether the tile is meant for a launch of these sizes."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2
    when: Callable[[dict[str, int]], bool] = lambda sizes: True
    why: str = ""


TILES: dict[str, tuple[Tile, ...]] = {}

# vq_assign. Instructions are those of the loop over codewords, a score, sm_90.
TILES["vq_assign_fwd_kernel"] = (
    Tile(
        {"BLOCK_B": 1024, "BLOCK_K": 4},
        when=lambda sizes: sizes["rows"] >= 1 << 20,
        why="issue slots: 12.5 instructions at dv = 8 (8 are multiply-adds), 7.5 at dv = 4; 8 rows a thread share a "
        "codeword's loads and norm, 4 codewords a turn share the bookkeeping; 16 rows: 11.1, but all 255 registers",
    ),
    Tile(
        {"BLOCK_B": 128, "BLOCK_K": 4},
        num_warps=1,
        why="too few rows to fill the device with large tiles; 4 rows a thread, 15.2 instructions",
    ),
)
TILES["vq_assign_dot_fwd_kernel"] = (
    Tile(
        {"BLOCK_B": 64, "BLOCK_K": 64, "BLOCK_D": 16},
        when=lambda sizes: sizes["dv"] <= 16,
        why="issue slots: 13.8 instructions, of which tf32x3's splitting and the running minimum are nearly all; "
        "multiply-adds would take 22 and 247 registers",
    ),
    Tile(
        {"BLOCK_B": 64, "BLOCK_K": 32, "BLOCK_D": 32},
        why="registers on sm_80: 166 with the three parts of tf32x3; twice the codewords spill",
    ),
)

# codebook_update
TILES["codebook_rows_kernel"] = (
    Tile({"BLOCK_C": 64}, why="DRAM: reads x and g and writes v once; a block's rows wait in registers for their mean"),
)
TILES["codebook_moments_kernel"] = (
    Tile({"BLOCK_B": 32, "BLOCK_C": 32}, why="latency: b / 64 rows of partial moments, read twice"),
)
TILES["codebook_stats_atomic_kernel"] = (
    Tile(
        {"BLOCK_B": 128},
        when=lambda sizes: sizes["dv"] <= 16,
        why="atomics in L2, dv + 1 a row and branch; no reuse to block for",
    ),
    Tile({"BLOCK_B": 32}, why="the same; fewer rows, since a row takes dv registers over 128 threads"),
)
TILES["codebook_stats_sorted_kernel"] = (
    Tile(
        {"BLOCK_B": 32},
        num_warps=1,
        when=lambda sizes: sizes["dv"] <= 16,
        why="latency of gathered rows: a codeword has b / K of them, tens to hundreds, so one warp each",
    ),
    Tile({"BLOCK_B": 8}, num_warps=1, why="the same; a row of dv > 16 keeps a warp busy, and 32 take 240 registers"),
)
TILES["codebook_update_kernel"] = (
    Tile(
        {"BLOCK_K": 128},
        num_warps=8,
        when=lambda sizes: sizes["dv"] <= 16,
        why="latency: one program a branch, since N needs all its counts before any is overwritten",
    ),
    Tile({"BLOCK_K": 32}, num_warps=8, why="the same; a row of dv > 16 takes the registers of several codewords"),
)

# aggregate. Bytes an edge at f = 128: 16 of column, halo entry and weight; then its row, 512 of fp32 or 32 of codes,
# whose 512 bytes of codewords come from L1/L2. Rows are limited by DRAM, codes by the latency of dependent loads and by
# L1. Both want edges in flight: blocks of edges small enough for a dozen warps and more on an SM. A program is one
# warp, so that a short row wastes little and that, lanes spanning the features, edges are summed inside a thread.
TILES["aggregate_fwd_kernel"] = (
    Tile({"BLOCK_E": 32, "BLOCK_F": 32}, 1, 1, lambda sizes: sizes["f"] <= 32, "latency: a warp waits for 32 edges"),
    Tile({"BLOCK_E": 8, "BLOCK_F": 64}, 1, 1, lambda sizes: sizes["f"] <= 64, "registers, where an odd f loads singly"),
    Tile({"BLOCK_E": 8, "BLOCK_F": 128}, 1, 1, why="registers: 16 edges take 250 with codes, and spill with int4"),
)

# store_io: all limited by memory (or by PCIe, where the table is pinned). 8 values a thread keep most kernels at 32
# registers, so that the SM is full of loads; 16 spill in pull_rows. Short rows lie side by side: fewer idle lanes.
_NARROW, _WIDE = {"BLOCK_R": 32, "BLOCK_F": 32}, {"BLOCK_R": 8, "BLOCK_F": 128}
for _kernel in ("push_cast_kernel", "push_quantise_kernel", "pull_rows_kernel"):
    TILES[_kernel] = (
        Tile(_NARROW, when=lambda sizes: sizes["f"] <= 32, why="memory: short rows, such as codes of 32 branches"),
        Tile(_WIDE, why="memory: a row of 128 in one piece, longer ones in a loop"),
    )

# csr_slice: memory latency everywhere. Four edges a thread: its 4-byte stores become one of 16 bytes, and four look-ups
# are in flight; more warps on the device hide more than more edges a thread would.
TILES["csr_slice_gather_kernel"] = (
    Tile({"BLOCK_E": 512}, 4, 1, why="the bisection: log2(b) dependent loads, the upper levels from L1"),
)
TILES["csr_slice_first_kernel"] = (
    Tile({"BLOCK_E": 512}, 4, 1, why="one random 4-byte read of the map an edge, from L2 up to about 10M nodes"),
)
TILES["csr_slice_relabel_kernel"] = (
    Tile({"BLOCK_E": 512}, 4, 1, why="two dependent random reads an edge: the map, then the first edge's rank"),
)

# attention_aggregate: a program walks through one row's edges for one head. Typical rows have 5-30 edges, so short
# blocks of edges and few warps, and many programs on a multiprocessor hide the chain rowptr, col, code, codeword.
_ATTENTION = (
    Tile({"BLOCK_E": 16}, 1, 1, lambda s: s["F"] <= 32, "latency: one warp, so its sums need no shared memory"),
    Tile({"BLOCK_E": 8}, 1, 1, lambda s: s["F"] <= 64, "registers, where an odd F loads singly; 16 edges spill"),
)
_WIDE_ROWS = Tile({"BLOCK_E": 8}, 4, 1, lambda s: s["F"] <= 256, "registers: three arrays; 16 edges spill on sm_100")
TILES["attention_aggregate_fwd_kernel"] = (
    *_ATTENTION,
    Tile({"BLOCK_E": 4}, 2, 1, lambda s: s["F"] <= 256, "registers: 8 edges by 4 warps spill under Triton 3.6"),
    Tile({"BLOCK_E": 4}, 8, 1, why="registers: F may be thousands; an array takes 32 a thread at F = 2048"),
)
TILES["attention_aggregate_bwd_rows_kernel"] = (
    # edge_dim: of "gatv2" with edge features, whose products and their matrix's gradient take registers too
    Tile({"BLOCK_E": 8}, 2, 1, lambda s: "edge_dim" in s and 32 < s["F"] <= 64, "registers: one warp spills a little"),
    Tile({"BLOCK_E": 2}, 8, 1, lambda s: "edge_dim" in s and s["F"] > 256, "registers: 4 edges spill at F = 2048"),
    *_ATTENTION,
    _WIDE_ROWS,
    Tile({"BLOCK_E": 4}, 8, 1, why="registers: F may be thousands; an array takes 32 a thread at F = 2048"),
)
TILES["attention_aggregate_bwd_columns_kernel"] = (
    Tile({"BLOCK_E": 1}, 8, 1, lambda s: "edge_dim" in s and s["F"] > 1024, "registers: 2 edges spill at F = 2048"),
    *_ATTENTION,
    _WIDE_ROWS,
    Tile({"BLOCK_E": 2}, 8, 1, why="registers: two arrays of 16 a thread each at F = 2048; 4 edges spill"),
)
TILES["code_scores_kernel"] = (
    Tile({"BLOCK_B": 64}, 2, 1, why="L1 latency of one look-up a branch; few registers, so many warps at once"),
)

# global_attention: tensor cores. Registers bound it: tf32x3 holds both halves of every fp32 operand, so fp32 tiles are
# smaller than half precision ones, and 8 warps share what gets wide.
TILES["global_attention_fwd_kernel"] = (
    Tile(
        {"BLOCK_B": 64, "BLOCK_K": 64},
        when=lambda sizes: sizes["bits"] == 16 and sizes["width"] <= 64,
        why="queries and outputs stay in registers while the codewords, read from L2, pass by: fewer passes",
    ),
    Tile(
        {"BLOCK_B": 64, "BLOCK_K": 32},
        num_warps=8,
        when=lambda sizes: sizes["width"] <= 32,
        why="4 warps spill under Triton 3.6",
    ),
    Tile(
        {"BLOCK_B": 64, "BLOCK_K": 16},
        num_warps=8,
        when=lambda sizes: sizes["width"] <= 64,
        why="K = 32 spills, and so do 4 warps",
    ),
    Tile({"BLOCK_B": 16, "BLOCK_K": 32}, num_warps=8, why="B = 32 spills"),
)
TILES["global_attention_bwd_query_kernel"] = (
    Tile(
        {"BLOCK_B": 32, "BLOCK_K": 32},
        when=lambda sizes: sizes["bits"] == 16 and sizes["width"] <= 64,
        why="queries, output gradients and query gradients of the block stay in registers",
    ),
    Tile(
        {"BLOCK_B": 32, "BLOCK_K": 32},
        num_warps=8,
        num_stages=1,
        when=lambda sizes: sizes["bits"] == 16,
        why="wide: 8 warps share the block; B = 16 spills a little",
    ),
    Tile(
        {"BLOCK_B": 32, "BLOCK_K": 16},
        num_stages=1,
        when=lambda sizes: sizes["width"] <= 64,
        why="three products live at a time: K = 32 spills; with 64 rows Triton 3.6 takes Hopper's wgmma, and its third "
        "product reads outside the shared memory",
    ),
    Tile({"BLOCK_B": 16, "BLOCK_K": 32}, num_warps=8, num_stages=1, why="B = 32 spills"),
)
TILES["global_attention_bwd_codewords_kernel"] = (
    Tile(
        {"BLOCK_B": 32, "BLOCK_K": 32},
        when=lambda sizes: sizes["bits"] == 16 and sizes["width"] <= 64,
        why="keys, values and their gradients of the block stay in registers while the queries pass by",
    ),
    Tile(
        {"BLOCK_B": 16, "BLOCK_K": 32},
        when=lambda sizes: sizes["width"] <= 64,
        why="four products live at a time: B = 32 spills",
    ),
    Tile({"BLOCK_B": 32, "BLOCK_K": 16}, num_warps=8, num_stages=1, why="K = 32 spills"),
)

TILES["hash_dropout_kernel"] = (Tile({"BLOCK": 1024}, why="DRAM: reads and writes each number once"),)


def pick(kernel: str, sizes: dict[str, int]) -> Tile:
    """The shipped tile of a kernel for a launch of these sizes."""
    return next(tile for tile in TILES[kernel] if tile.when(sizes))
