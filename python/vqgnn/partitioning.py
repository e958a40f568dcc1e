"""Clusters of nodes for Cluster-GCN style batches."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import atomic_write


def cache_folder() -> Path:
    """Where partitions and generated graphs are kept: $VQGNN_CACHE, else ~/.cache/vqgnn."""
    return Path(os.environ.get("VQGNN_CACHE", Path.home() / ".cache" / "vqgnn"))


def partition(edge_index: Tensor, num_nodes: int, num_parts: int, cache_dir: str | Path | None = None) -> list[Tensor]:
    """Split the nodes into `num_parts` clusters of about equal size with few edges between them.

    METIS (pymetis) over the symmetrised graph; where pymetis is missing, consecutive pieces of a breadth-first order.
    The result is kept in `cache_dir` (default: the user's cache folder).

    Returns:
        One int64 tensor of ascending node ids a cluster; together every node once.
    """
    if not 1 <= num_parts <= num_nodes:
        raise ValueError(f"num_parts={num_parts} is not in 1..{num_nodes} (the number of nodes); choose fewer parts")
    source, target = (side.cpu().numpy() for side in edge_index)
    keep = source != target
    pairs = np.unique(
        np.concatenate([source[keep] * num_nodes + target[keep], target[keep] * num_nodes + source[keep]])
    )
    rowptr = np.zeros(num_nodes + 1, np.int64)
    np.cumsum(np.bincount(pairs // num_nodes, minlength=num_nodes), out=rowptr[1:])
    col = pairs % num_nodes

    try:
        import pymetis
    except ImportError:
        warnings.warn("pymetis is missing: clusters are pieces of a breadth-first order", RuntimeWarning, stacklevel=2)
        return _by_breadth_first_order(rowptr, col, num_parts)

    digest = hashlib.sha256(pairs.tobytes() + f"{num_nodes},{num_parts},metis".encode()).hexdigest()[:16]
    path = Path(cache_dir or cache_folder()) / f"parts-{digest}.npy"
    part = _read_parts(path, num_nodes, num_parts)
    if part is None:
        part = [0] * num_nodes
        if num_parts > 1:
            _, part = pymetis.part_graph(num_parts, adjacency=pymetis.CSRAdjacency(rowptr, col))
        part = np.asarray(part, np.int32)
        with atomic_write(path) as handle:
            np.save(handle, part)
    order = np.argsort(part, kind="stable")
    bounds = np.cumsum(np.bincount(part, minlength=num_parts))[:-1]
    return [torch.from_numpy(ids) for ids in np.split(order, bounds) if len(ids)]


def _read_parts(path: Path, num_nodes: int, num_parts: int) -> np.ndarray | None:
    """Every node's part from the cache; None where there is no file, or, with a warning, where it is damaged."""
    if not path.exists():
        return None
    try:
        part = np.load(path)
        if part.shape == (num_nodes,) and part.dtype == np.int32 and part.min() >= 0 and part.max() < num_parts:
            return part
        reason = f"it holds {part.dtype} {list(part.shape)}"
    except (OSError, ValueError, EOFError) as error:
        reason = str(error)
    warnings.warn(f"{path} is damaged ({reason}) and is made anew", RuntimeWarning, stacklevel=3)
    return None


def _by_breadth_first_order(rowptr: np.ndarray, col: np.ndarray, num_parts: int) -> list[Tensor]:
    num_nodes = len(rowptr) - 1
    seen = np.zeros(num_nodes, bool)
    levels, found = [], 0
    roots = iter(np.argsort(np.diff(rowptr), kind="stable"))  # from the rim of the graph inwards
    while found < num_nodes:
        frontier = np.array([next(r for r in roots if not seen[r])])
        while len(frontier):
            seen[frontier] = True
            levels.append(frontier)
            found += len(frontier)
            degree = rowptr[frontier + 1] - rowptr[frontier]
            first = np.repeat(rowptr[frontier] - (np.cumsum(degree) - degree), degree)
            neighbours = np.unique(col[first + np.arange(degree.sum())])
            frontier = neighbours[~seen[neighbours]]
    order = np.concatenate(levels)
    return [torch.from_numpy(np.sort(piece)) for piece in np.array_split(order, num_parts) if len(piece)]
