"""Writing a graph folder (see disk_graph) from edges in any order, which are never in RAM all at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from .config import InputError
from .disk_graph import FORMAT, NODE_ARRAYS, VERSION, GraphFolder, MappedData
from .files import atomic_write, check_space, only_one, write_npy
from .graph import check_edge_index, check_features, check_ids

_EDGES = 4_000_000  # edges in RAM at a time; which buckets a generated graph's edges meet in is part of the result
_MASKS = [name for name in NODE_ARRAYS if name.endswith("_mask")]
_MAX_BUCKETS = 512  # files open at a time


def save(data: Data, path: str | Path, num_classes: int | None = None, undirected: bool = True) -> MappedData:
    """Write a PyG `Data` of x, y, edge_index and the three masks to a graph folder, and open it.

    Duplicate edges are kept once; `undirected` adds the opposite directions. FolderWriter writes what does not fit RAM.

    Raises:
        InputError: `path` exists already, or the disk is too full.
        ValueError: one of these is missing or not what it must be, or the graph has more, as edge weights or several
            labels a node, which a folder does not keep.
    """
    num_classes = _check(data, num_classes)
    path, edge_index = Path(path), data.edge_index.numpy()
    needed = sum(data[name].nbytes for name in NODE_ARRAYS) + 48 * edge_index.shape[1]
    with creating(path, data.num_nodes, undirected, needed) as writer:
        if writer is None:
            raise InputError(f"{path} exists already; give another path")
        starts = range(0, edge_index.shape[1], _EDGES)
        writer.edges((edge_index[:, start : start + _EDGES] for start in starts), 2 * edge_index.shape[1])
        for name in NODE_ARRAYS:
            writer.array(name, data[name].split(_EDGES), tuple(data[name].shape[1:]))
        writer.finish(num_classes)
    return MappedData(GraphFolder(path))


def _check(data: Data, num_classes: int | None) -> int:
    """The number of classes of data that a folder can keep; else a ValueError."""
    n = data.num_nodes
    check_edge_index("data.edge_index", data.edge_index)
    check_features("data.x", data.x, n)
    check_ids("data.edge_index", data.edge_index, n, "data.num_nodes")
    tensors = {name for name, value in data.to_dict().items() if isinstance(value, Tensor)}
    if more := sorted(tensors - {"edge_index", *NODE_ARRAYS}):
        raise ValueError(f"data has {', '.join(more)}, which a graph folder does not keep; remove it from data")
    if not data.x.sum(dtype=torch.float64).isfinite():
        raise ValueError("data.x has values that are NaN or infinite; clean them first")
    y, masks = data.get("y"), {name: data.get(name) for name in _MASKS}
    if y is None or y.shape != (n,) or y.is_floating_point() or y.dtype == torch.bool:
        came = None if y is None else f"{list(y.shape)} {y.dtype}"
        raise ValueError(f"data.y must be [num_nodes={n}] class numbers, integers, got {came}; keep one label a node")
    for name, mask in masks.items():
        if mask is None or mask.shape != (n,) or mask.dtype != torch.bool or not mask.any():
            came = None if mask is None else f"{list(mask.shape)} {mask.dtype} with {int((mask != 0).sum())} nodes"
            raise ValueError(f"data.{name} must be bool [num_nodes={n}] with a node or more, got {came}; set it")
    if (sum(mask.int() for mask in masks.values()) > 1).any():
        raise ValueError(f"data.{', '.join(_MASKS)} overlap; every node may be in one of them")
    known = y[torch.stack([*masks.values()]).any(0)]
    classes = int(known.max()) + 1 if num_classes is None else num_classes
    if known.min() < 0 or known.max() >= classes:
        raise ValueError(
            f"data.y has classes {int(known.min())}..{int(known.max())} where a mask is set; allowed are "
            f"0..{classes - 1}: give other labels or num_classes"
        )
    return classes


@contextmanager
def creating(path: Path, num_nodes: int, undirected: bool, needed: int) -> Iterator[FolderWriter | None]:
    """A writer for a graph folder that is there at the end or not at all; None where it is there already.

    needed: bytes that the disk must have free, or InputError. Another process that makes the same folder is waited for.
    """
    with only_one(path, f".{path.name}.building-*"):
        if (path / "meta.json").exists():
            yield None
            return
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} exists and is no graph folder; remove it or choose another path")
        try:
            check_space(path.parent, needed)
        except OSError as error:
            text = f"{path} cannot be made: {error.strerror}; free some space or set VQGNN_CACHE to another disk"
            raise InputError(text) from error
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.building-"))
        try:
            yield FolderWriter(temporary, num_nodes, undirected)
            os.chmod(temporary, 0o755)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


class FolderWriter:
    """Writes a graph folder: `edges` once, `array` for each of NODE_ARRAYS, then `finish`. Use `creating`."""

    def __init__(self, path: Path, num_nodes: int, undirected: bool):
        self.path, self.n, self.undirected = path, num_nodes, undirected
        self.meta: dict[str, Any] = {"format": FORMAT, "version": VERSION, "nodes": num_nodes, "undirected": undirected}
        self.shapes: dict[str, list] = {}
        self.seconds: dict[str, float] = {}
        self.bytes = 0  # written, temporary files included
        self._digest = hashlib.blake2b(digest_size=16)

    def edges(self, chunks: Iterable[tuple[np.ndarray, np.ndarray]], expected: int) -> None:
        """(sources, targets), in any order, each edge once or more; undirected: in one direction or both.

        `expected` is about how many there are, both directions counted.
        """
        with self.timed("sort edges"), Buckets(self.path / "by-target", self.n, expected) as by_target:
            others = None if self.undirected else Buckets(self.path / "by-source", self.n, expected)
            for source, target in chunks:
                for ends in (source, target):
                    if len(ends) and not 0 <= ends.min() <= ends.max() < self.n:
                        raise ValueError(f"edges have ends {ends.min()}..{ends.max()}; nodes are 0..{self.n - 1}")
                by_target.add(target, source)
                (others or by_target).add(source, target)
            self.bytes += by_target.bytes
            self._sorted(by_target, "")
            if others is not None:
                with others:
                    self._sorted(others, "_t")
                    self.bytes += others.bytes

    def array(self, name: str, chunks: Iterable[np.ndarray], width: tuple[int, ...] = ()) -> None:
        """A node array, some rows at a time."""
        with self.timed(name):
            self._write(name, NODE_ARRAYS[name], (self.n, *width), chunks)

    def finish(self, num_classes: int) -> None:
        self.meta |= {"edges": self.shapes["col"][1], "classes": num_classes, "shapes": self.shapes}
        self.meta |= {"hash": self._digest.hexdigest(), "seconds": self.seconds, "bytes_written": self.bytes}
        with atomic_write(self.path / "meta.json") as handle:
            handle.write((json.dumps(self.meta, indent=2) + "\n").encode())

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 2)

    def _sorted(self, buckets: Buckets, end: str) -> None:
        rowptr = np.zeros(self.n + 1, np.int64)

        def columns() -> Iterator[np.ndarray]:
            for i, (low, high) in enumerate(zip(buckets.bounds[:-1], buckets.bounds[1:], strict=True)):
                keys = buckets.read(i)
                row, col = np.divmod(keys, self.n)
                rowptr[low + 1 : high + 1] = np.bincount(row - low, minlength=high - low)
                buckets.drop(i)
                yield col.astype(np.int32)

        self._write(f"col{end}", np.int32, None, columns())
        self._write(f"rowptr{end}", np.int64, (self.n + 1,), iter([np.cumsum(rowptr)]))

    def _write(self, name: str, dtype: type, shape: tuple[int, ...] | None, chunks: Iterable[np.ndarray]) -> None:
        def noted() -> Iterator[np.ndarray]:
            for chunk in chunks:
                chunk = np.ascontiguousarray(chunk, dtype)
                self._digest.update(chunk)
                self.bytes += chunk.nbytes
                yield chunk

        with open(self.path / f"{name}.npy", "wb") as handle:
            written = write_npy(handle, dtype, shape, noted())
            handle.flush()
            os.fsync(handle.fileno())
        self.shapes[name] = [np.dtype(dtype).name, *written]


class Buckets:
    """Edges on their way to a sorted list, kept on disk as keys row * n + col, by ranges of rows."""

    def __init__(self, folder: Path, num_nodes: int, expected: int):
        self.folder, self.n = folder, num_nodes
        folder.mkdir()
        count = min(max(1, -(-expected // _EDGES)), _MAX_BUCKETS, num_nodes)
        self.bounds = np.linspace(0, num_nodes, count + 1).astype(np.int64)  # rows of each bucket
        self.files = [open(folder / str(i), "w+b") for i in range(count)]  # noqa: SIM115
        self.bytes = 0

    def add(self, row: np.ndarray, col: np.ndarray) -> None:
        self.add_keys(row.astype(np.int64) * self.n + col)

    def add_keys(self, keys: np.ndarray) -> None:
        keys = np.sort(keys)
        ends = np.searchsorted(keys, self.bounds * self.n)
        for file, start, stop in zip(self.files, ends[:-1], ends[1:], strict=True):
            file.write(keys[start:stop])
        self.bytes += keys.nbytes

    def read(self, i: int) -> np.ndarray:
        """The distinct keys of a bucket, ascending."""
        self.files[i].flush()
        keys = np.sort(np.fromfile(self.folder / str(i), np.int64))
        return keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys

    def replace(self, i: int, keys: np.ndarray) -> None:
        self.files[i].seek(0)
        self.files[i].truncate()
        self.files[i].write(keys)
        self.bytes += keys.nbytes

    def drop(self, i: int) -> None:
        """Give back the space of a bucket that is done."""
        self.files[i].truncate(0)

    def __enter__(self) -> Buckets:
        return self

    def __exit__(self, *_) -> None:
        for file in self.files:
            file.close()
        shutil.rmtree(self.folder)
