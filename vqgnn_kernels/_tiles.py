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


def pick(kernel: str, sizes: dict[str, int]) -> Tile:
    """The shipped tile of a kernel for a launch of these sizes."""
    return next(tile for tile in TILES[kernel] if tile.when(sizes))
