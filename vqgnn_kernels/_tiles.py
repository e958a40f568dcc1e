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


def pick(kernel: str, sizes: dict[str, int]) -> Tile:
    """The shipped tile of a kernel for a launch of these sizes."""
    return next(tile for tile in TILES[kernel] if tile.when(sizes))
