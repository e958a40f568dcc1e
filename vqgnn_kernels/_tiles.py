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

# global_attention
TILES["global_attention_fwd_kernel"] = (
    Tile(
        {"BLOCK_B": 64, "BLOCK_K": 64},
        when=lambda sizes: sizes["width"] <= 64,
        why="tensor cores; a block's queries and outputs stay in registers while the codewords pass through L2",
    ),
    Tile(
        {"BLOCK_B": 64, "BLOCK_K": 32},
        num_warps=8,
        when=lambda sizes: sizes["width"] <= 128,
        why="registers: wider queries and outputs, and both halves of tf32x3's operands",
    ),
    Tile({"BLOCK_B": 32, "BLOCK_K": 32}, num_warps=8, num_stages=1, why="registers and shared memory"),
)
TILES["global_attention_bwd_query_kernel"] = TILES["global_attention_bwd_codewords_kernel"] = (
    Tile(
        {"BLOCK_B": 32, "BLOCK_K": 32},
        when=lambda sizes: sizes["width"] <= 64,
        why="registers: three products live at a time",
    ),
    Tile({"BLOCK_B": 32, "BLOCK_K": 32}, num_warps=8, num_stages=1, why="registers and shared memory"),
)


def pick(kernel: str, sizes: dict[str, int]) -> Tile:
    """The shipped tile of a kernel for a launch of these sizes."""
    return next(tile for tile in TILES[kernel] if tile.when(sizes))
