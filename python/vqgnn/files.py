"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .memory import size

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes may then make the same file, and one of the two is kept
    fcntl = None


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name; on success sync and rename it to `path`, on failure remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def only_one(path: Path, unfinished: str) -> Iterator[None]:
    """One process at a time makes `path`; what a killed one left half made, named like `unfinished`, is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}-lock", "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in path.parent.glob(unfinished):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def check_space(folder: Path, needed: int) -> None:
    """An OSError where the disk of `folder`, which is made if need be, has fewer bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        text = f"{size(needed)} are needed in {folder}, {size(free)} are free"
        raise OSError(errno.ENOSPC, text)


def write_npy(
    handle: BinaryIO, dtype: type, shape: tuple[int, ...] | None, chunks: Iterable[np.ndarray], bar: Any = None
) -> tuple[int, ...]:
    """An .npy file of the chunks, one after another; the shape, found by counting where none is given, is returned."""

    def header(shape: tuple[int, ...]) -> None:
        form = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, form)

    header(shape or (0,))
    start, count = handle.tell(), 0
    for chunk in chunks:
        handle.write(np.ascontiguousarray(chunk, dtype))
        count += chunk.size
        if bar is not None:
            bar.update(chunk.nbytes)
    if shape is not None and count != int(np.prod(shape)):
        raise RuntimeError(f"{count} values were written of an array {list(shape)}")
    if shape is None:
        shape = (count,)
        handle.seek(0)
        header(shape)  # numpy leaves room for the number to grow
        if handle.tell() != start:
            raise RuntimeError("numpy's header has grown")
    return shape
