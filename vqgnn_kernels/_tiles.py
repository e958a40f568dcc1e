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


def pick(kernel: str, sizes: dict[str, int]) -> Tile:
    """The shipped tile of a kernel for a launch of these sizes."""
    return next(tile for tile in TILES[kernel] if tile.when(sizes))
