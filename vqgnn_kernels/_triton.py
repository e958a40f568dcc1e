"""How every Triton kernel is launched: its tile, its device, and optional autotuning.

Triton compiles a kernel anew for integers that are 1 or divisible by 16. Sizes that change from batch to batch are
named in the kernels' do_not_specialize, so that an epoch does not compile.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from ._backend import interpreted
from ._tiles import TILES, Tile, pick


def launch(
    kernel,
    grid: Callable[[dict[str, int]], tuple[int, ...]],
    arguments: dict[str, Any],
    sizes: dict[str, int] | None = None,
    pure: bool = False,
) -> None:
    """Run a kernel on the device of its tensors.

    Args:
        kernel: a `triton.jit` function.
        grid: number of programs from the tile's blocks, e.g. `lambda blocks: (triton.cdiv(b, blocks["BLOCK_B"]),)`.
        arguments: everything but the tile, by name: tensors, numbers, constants; None for an absent tensor.
        sizes: what the tile depends on, e.g. {"d": 4, "K": 256}.
        pure: running the kernel twice does no harm, so that it may be timed.
    """
    name, sizes = kernel.fn.__name__, sizes or {}
    devices = {value.device for value in arguments.values() if isinstance(value, torch.Tensor)}
    device = next((d for d in devices if d.type == "cuda"), None)  # others are pinned host memory

    def run(tile: Tile) -> None:
        programs = grid(tile.blocks)
        if 0 not in programs:
            kernel[programs](**arguments, **tile.blocks, num_warps=tile.num_warps, num_stages=tile.num_stages)

    if device is None:  # the interpreter
        run(pick(name, sizes))
        return
    with torch.cuda.device(device):
        tune = pure and os.environ.get("VQGNN_AUTOTUNE") == "1" and not interpreted()
        run(_fastest(name, sizes, run) if tune else pick(name, sizes))


def _fastest(name: str, sizes: dict[str, int], run: Callable[[Tile], None]) -> Tile:
    """The kernel's fastest tile for these sizes, from the cache on disk or timed now."""
    tiles = TILES[name]
    known = _autotuned()
    key = " ".join([torch.cuda.get_device_name(), triton.__version__, name, json.dumps(sizes, sort_keys=True)])
    # by its contents, not its position: a tile that has left the table since, or is not one at all, is not found
    fastest = next((tile for tile in tiles if _constants(tile) == known.get(key)), None)
    if fastest is None:
        if torch.cuda.is_current_stream_capturing():  # timing waits for the device, which a capture forbids
            return pick(name, sizes)
        fastest = min(tiles, key=lambda tile: _time(tile, run))
        known[key] = _constants(fastest)
        with suppress(OSError):  # a folder that cannot be written: this process remembers, the next one times again
            path = _cache_path()
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(known, indent=1))
            temporary.replace(path)
    return fastest


def _time(tile: Tile, run: Callable[[Tile], None]) -> float:
    """Milliseconds of a launch; infinite where the tile needs more than the device has."""
    try:
        return triton.testing.do_bench(lambda: run(tile))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _constants(tile: Tile) -> list:
    return [tile.blocks, tile.num_warps, tile.num_stages]


def _cache_path() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "vqgnn" / "tiles.json"


@cache
def _autotuned() -> dict[str, list]:
    """The fastest tile's constants by device, Triton version, kernel and sizes."""
    try:
        known = json.loads(_cache_path().read_text())
    except (OSError, ValueError):  # not there, or not ours: time again
        return {}
    return known if isinstance(known, dict) else {}
