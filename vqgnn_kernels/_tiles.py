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
        {"BLOCK_B": 64, "BLOCK_K": 16},
        num_warps=8,
        when=lambda sizes: sizes["width"] <= 64,
        why="three products live at a time: K = 32 spills",
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


def pick(kernel: str, sizes: dict[str, int]) -> Tile:
    """The shipped tile of a kernel for a launch of these sizes."""
    return next(tile for tile in TILES[kernel] if tile.when(sizes))
