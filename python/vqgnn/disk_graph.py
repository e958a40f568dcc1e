"""A graph in a folder of memory-mapped files, and what is derived from it: for graphs beyond RAM.

    meta.json                                   format, version, sizes, fingerprint
    x.npy [n, f] float32, y.npy [n] int64, train_mask.npy, val_mask.npy, test_mask.npy [n] bool
    rowptr.npy [n + 1] int64, col.npy [e] int32 row i: the sources of the edges to node i, ascending, each once
    rowptr_t.npy, col_t.npy                     directed graphs only: row i: the targets of the edges from node i
    cache/NAME.npy                              convolution matrices and C X, each built at its first use

Every file is written under another name and renamed when it is whole, the folder itself too.
"""

from __future__ import annotations

import json
import mmap
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data
from tqdm import tqdm

from .config import InputError
from .files import atomic_write, check_space, only_one, write_npy

if TYPE_CHECKING:
    from .graph import Convolution

FORMAT, VERSION = "vqgnn-graph", 1
NODE_ARRAYS = {"x": np.float32, "y": np.int64, "train_mask": bool, "val_mask": bool, "test_mask": bool}
_EDGES = 4_000_000  # edges in RAM at a time


class MappedData(Data):
    """A PyG `Data` over a graph folder: `rowptr` and `col` where `edge_index` would be, all tensors memory-mapped.

    The tensors are not to be written to: that changes this process's copy, not what is derived from the files.
    """

    def __init__(self, folder: GraphFolder | None = None):
        super().__init__()
        if folder is not None:  # PyG makes empty ones
            self.folder = folder
            for name in ("rowptr", "col", *NODE_ARRAYS):
                self[name] = folder.tensor(name)

    @property
    def num_edges(self) -> int:
        return self.col.numel()

    def is_node_attr(self, key: str) -> bool:
        return key in NODE_ARRAYS

    def is_edge_attr(self, key: str) -> bool:
        return key == "col"

    def edge_chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(sources, targets) int64 of some millions of edges at a time."""
        for start, stop in _row_ranges(self.rowptr):
            row, col = _edges_of(self.rowptr, self.col, start, stop)
            yield torch.from_numpy(col.astype(np.int64)), torch.from_numpy(row)


class GraphFolder:
    """An opened graph folder; an InputError where it is no such folder, or damaged."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.meta: dict[str, Any] = json.loads((self.path / "meta.json").read_text())
            if (self.meta["format"], self.meta["version"]) != (FORMAT, VERSION):
                raise KeyError
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"{self.path} is no graph folder of this version of vqgnn (see its meta.json)") from None
        self.seconds: dict[str, float] = {}  # spent on what was derived since it was opened
        self._maps: list[mmap.mmap] = []
        self._tensors: dict[str, Tensor] = {}

    @property
    def fingerprint(self) -> dict[str, int | str]:
        return {"nodes": self.meta["nodes"], "edges": self.meta["edges"], "hash": self.meta["hash"]}

    @property
    def undirected(self) -> bool:
        return self.meta["undirected"]

    def tensor(self, name: str) -> Tensor:
        """A file of the folder as a tensor, mapped once."""
        if name not in self._tensors:
            try:
                self._tensors[name] = self._map(self.path / f"{name}.npy", self.meta["shapes"][name])
            except (OSError, ValueError) as error:
                raise InputError(f"{self.path} is damaged: {error}; remove it to have it made anew") from error
        return self._tensors[name]

    def release(self) -> None:
        """Give back the RAM of the mapped pages; they are read again when they are needed. Nothing may be changed."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def structure(self, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """(rowptr, col) of the edges by target, or by source."""
        end = "_t" if transposed and not self.undirected else ""
        return self.tensor(f"rowptr{end}"), self.tensor(f"col{end}")

    def matrix(self, convolution: Convolution) -> tuple[Tensor | None, ...]:
        """The fields of `Matrix`, the very values of `Matrix.build`, made some million edges at a time."""
        kind, loops = self._kind(convolution)
        sides = [self._side(kind, loops, False)]
        sides.append(sides[0] if self.undirected and kind != "mean" else self._side(kind, loops, True))
        return *sides[0], *sides[1]

    def product(
        self, convolution: Convolution, shape: tuple[int, ...], chunks: Callable[[], Iterable[Tensor]]
    ) -> Tensor:
        """C X, written as its rows are computed."""
        kind, loops = self._kind(convolution)
        name = f"{kind}{'-loops' * loops}.product"
        return self._derived(name, np.float32, tuple(shape), lambda: (chunk.numpy() for chunk in chunks()))

    def _kind(self, convolution: Convolution) -> tuple[str, bool]:
        """(kind, whether self loops are added); `improved` counts for weighted edges only, which are not kept here."""
        kind = convolution.kind
        if kind not in ("gcn", "mean", "sum"):
            raise ValueError(f"a graph on disk has no matrix of kind {kind!r}; use GCN, SAGE, GIN or a graph in memory")
        if kind != "gcn" or not convolution.normalize:
            return ("sum" if kind == "gcn" else kind), False
        return kind, convolution.add_self_loops

    def _side(self, kind: str, loops: bool, transposed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """(rowptr, col, weight) of C or of its transpose."""
        rowptr, col = self.structure(transposed)
        end = "_t" if transposed and not self.undirected else ""
        if loops:
            rowptr, col = self._with_loops(rowptr, col, end)
        if kind == "sum":
            return rowptr, col, None

        def chunks() -> Iterator[np.ndarray]:
            by_target = rowptr
            if transposed and not self.undirected:
                by_target = self._with_loops(*self.structure(), "")[0] if loops else self.structure()[0]
            degree = by_target.diff().float()
            scale = (1.0 / degree if kind == "mean" else degree.pow(-0.5).masked_fill_(degree == 0, 0.0)).numpy()
            for start, stop in _row_ranges(rowptr):
                row, other = _edges_of(rowptr, col, start, stop)
                if kind == "gcn":
                    yield scale[row] * scale[other]
                else:
                    yield scale[other if transposed else row]

        name = f"{kind}{'-loops' * loops}.weight{'_t' * transposed}"
        return rowptr, col, self._derived(name, np.float32, tuple(col.shape), chunks)

    def _with_loops(self, rowptr: Tensor, col: Tensor, end: str) -> tuple[Tensor, Tensor]:
        """The structure with a self loop at every node."""

        def row_starts() -> Iterator[np.ndarray]:
            lacks = np.ones(rowptr.numel() - 1, bool)
            for start, stop in _row_ranges(rowptr):
                row, other = _edges_of(rowptr, col, start, stop)
                lacks[row[row == other]] = False
            yield rowptr.numpy() + np.concatenate([[0], np.cumsum(lacks)])

        starts = self._derived(f"loops.rowptr{end}", np.int64, tuple(rowptr.shape), row_starts)

        def columns() -> Iterator[np.ndarray]:
            added = (starts - rowptr).numpy()  # loops added in the rows before
            lacks = np.diff(added) > 0
            for start, stop in _row_ranges(rowptr):
                row, other = _edges_of(rowptr, col, start, stop)
                new = np.flatnonzero(lacks[start:stop]) + start
                out = np.empty(len(row) + len(new), np.int32)
                after = other > row  # behind the new loop, if there is one
                out[np.arange(len(row)) + added[row] - added[start] + (after & lacks[row])] = other
                before = np.bincount(row[~after] - start, minlength=stop - start)[new - start]
                out[starts.numpy()[new] - int(starts[start]) + before] = new
                yield out

        return starts, self._derived(f"loops.col{end}", np.int32, (int(starts[-1]),), columns)

    def _derived(
        self, name: str, dtype: type, shape: tuple[int, ...], chunks: Callable[[], Iterable[np.ndarray]]
    ) -> Tensor:
        """An array of the cache: mapped, and written first where it is missing or not whole."""
        if name in self._tensors:
            return self._tensors[name]
        path, wanted = self.path / "cache" / f"{name}.npy", [np.dtype(dtype).name, *shape]
        tensor = self._whole(path, wanted)
        if tensor is None:
            with only_one(path, f".{path.name}.*"):
                tensor = self._whole(path, wanted)  # by another process, meanwhile
                if tensor is None:
                    start = time.perf_counter()
                    needed = int(np.prod(shape)) * np.dtype(dtype).itemsize
                    check_space(path.parent, needed)
                    with atomic_write(path) as handle, _bar(needed, name) as bar:
                        write_npy(handle, dtype, shape, chunks(), bar)
                    self.seconds[name] = round(time.perf_counter() - start, 2)
                    tensor = self._map(path, wanted)
                    self.release()  # what it was made of need not stay in RAM
        self._tensors[name] = tensor
        return tensor

    def _whole(self, path: Path, wanted: list) -> Tensor | None:
        """The array in this file of the cache; None where there is no file, or, with a warning, where it is damaged."""
        try:
            return self._map(path, wanted)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is damaged ({error}) and is made anew", RuntimeWarning, stacklevel=4)
            return None

    def _map(self, path: Path, wanted: list) -> Tensor:
        """An .npy file of the wanted [dtype, *shape] as a tensor; a ValueError where it is another one or cut off."""
        with open(path, "rb") as handle:
            version = np.lib.format.read_magic(handle)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = read(handle)
            if by_column or [dtype.name, *shape] != wanted:
                raise ValueError(f"{path.name} holds {dtype.name} {list(shape)}, not {wanted[0]} {wanted[1:]}")
            offset, count = handle.tell(), int(np.prod(shape))
            found, needed = os.fstat(handle.fileno()).st_size, offset + count * dtype.itemsize
            if found != needed:
                raise ValueError(f"{path.name} is cut off: {found} of {needed} bytes")
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        kind = getattr(torch, dtype.name)
        if count == 0:
            return torch.empty(shape, dtype=kind)
        self._maps.append(mapped)
        return torch.frombuffer(mapped, dtype=kind, count=count, offset=offset).view(shape)


def _row_ranges(rowptr: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows with about _EDGES edges each (a longer row comes alone)."""
    rowptr, start = rowptr.numpy(), 0
    while start < len(rowptr) - 1:
        stop = int(np.searchsorted(rowptr, rowptr[start] + _EDGES, side="right")) - 1
        stop = min(max(stop, start + 1), start + _EDGES, len(rowptr) - 1)
        yield start, stop
        start = stop


def _edges_of(rowptr: Tensor, col: Tensor, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(row [k] int64, col [k] int32) of the edges of rows start..stop."""
    part = rowptr[start : stop + 1].numpy()
    return np.repeat(np.arange(start, stop), np.diff(part)), col[part[0] : part[-1]].numpy()


def _bar(total: int, name: str) -> tqdm:
    return tqdm(total=total, desc=name, unit="B", unit_scale=True, leave=False, disable=total < 1 << 28)
