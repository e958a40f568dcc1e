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

# attention_aggregate: a program walks through one row's edges for one head. Typical rows have 5-30 edges, so short
# blocks of edges and few warps, and many programs on a multiprocessor hide the chain rowptr, col, code, codeword.
for _name in ("attention_aggregate_fwd_kernel", "attention_aggregate_bwd_rows_kernel"):
    TILES[_name] = (
        Tile({"BLOCK_E": 16}, 1, 1, lambda s: s["F"] <= 64, "latency: one warp, so its sums need no shared memory"),
        Tile({"BLOCK_E": 16}, 4, 1, lambda s: s["F"] <= 256, "registers: an array of [16, 256] takes 32 a thread"),
        Tile({"BLOCK_E": 4}, 8, 1, why="registers: F may be thousands; an array takes 32 a thread at F = 2048"),
    )
TILES["attention_aggregate_bwd_columns_kernel"] = (
    Tile({"BLOCK_E": 16}, 1, 1, lambda s: s["F"] <= 64, "latency: one warp, so its sums need no shared memory"),
    Tile({"BLOCK_E": 8}, 4, 1, lambda s: s["F"] <= 256, "registers: gradients and queries; 16 edges spill on sm_100"),
    Tile({"BLOCK_E": 2}, 8, 1, why="registers: two arrays of 16 a thread each at F = 2048; 4 edges spill"),
)
TILES["code_scores_kernel"] = (
    Tile({"BLOCK_B": 64}, 2, 1, why="L1 latency of one look-up a branch; few registers, so many warps at once"),
)


def pick(kernel: str, sizes: dict[str, int]) -> Tile:
    """The shipped tile of a kernel for a launch of these sizes."""
    return next(tile for tile in TILES[kernel] if tile.when(sizes))
