"""Node state in files: scratch tables that training writes in place, and snapshots that are whole or not there.

A snapshot is one file: MAGIC, the header's length and CRC-32, the header (JSON), and then the tables, each at a
multiple of 4096 bytes so that it can be mapped. The header says whose state it is and has every table's own CRC-32.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .files import atomic_write
from .memory import size

MAGIC, VERSION = b"VQGNNTAB", 1
_PREFIX = struct.Struct("<8sII")  # MAGIC, bytes of the header, its CRC-32
_ALIGN, _PIECE = 4096, 1 << 24
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32)
}


def zeros(folder: str | Path, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A zeroed tensor in a memory-mapped file in `folder`, which is made if need be.

    The file has no name, so that nothing is left behind whatever ends the process. Its space is reserved here: a full
    disk is an OSError now and not a bus error at some later write.
    """
    folder = Path(folder)
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    if tensor.nbytes == 0:
        return torch.zeros(shape, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as handle:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, tensor.nbytes)
            else:
                handle.truncate(tensor.nbytes)
        except OSError as error:
            free = size(shutil.disk_usage(folder).free)
            text = f"{size(tensor.nbytes)} for node state do not fit ({error.strerror}; {free} free)"
            raise OSError(error.errno, text, str(folder)) from error
        mapped = mmap.mmap(handle.fileno(), tensor.nbytes)
    return torch.frombuffer(mapped, dtype=dtype).view(shape)


def save(path: str | Path, tables: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a snapshot: the tables and what they are (`about`, JSON). An OSError leaves the old file, or none.

    Dirty pages of a mapped table are read from the page cache: nothing needs to be flushed to it first.
    """
    offset, entries = _ALIGN, []
    for name, table in tables.items():
        kind = str(table.dtype).removeprefix("torch.")
        entries.append({"name": name, "dtype": kind, "shape": list(table.shape), "offset": offset, "crc": "0" * 8})
        offset += -(-table.nbytes // _ALIGN) * _ALIGN
    header = {"version": VERSION, **about, "size": offset, "tables": entries}
    with atomic_write(path) as handle:
        handle.write(_header(header).ljust(_ALIGN, b"\0"))
        for entry, table in zip(entries, tables.values(), strict=True):
            handle.seek(entry["offset"])
            crc = 0
            for piece in _pieces(table.detach().cpu()):
                handle.write(piece)
                crc = zlib.crc32(piece, crc)
            entry["crc"] = f"{crc:08x}"
        handle.truncate(offset)
        handle.seek(0)
        handle.write(_header(header))  # as long as the first one, now with the checksums


def load(path: str | Path, tables: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Fill the tables from a snapshot of exactly these tables, made with the same `about`.

    Raises:
        ValueError: there is no such file, it is cut off or damaged, or it holds another graph's or codec's state. The
            tables may have been written in part.
    """
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            header = read_header(handle, path)
            for key, wanted in about.items():
                if header.get(key) != wanted:
                    raise ValueError(_differs(path, key, header.get(key), wanted))
            entries = {entry["name"]: entry for entry in header["tables"]}
            for name, table in tables.items():
                _read_table(handle, path, entries.pop(name, {}), name, table)
            if entries:
                raise ValueError(f"{path} holds tables {', '.join(entries)}, which this store lacks; start a new run")
    except FileNotFoundError:
        raise ValueError(f"{path}, node state that the checkpoint names, is missing; start a new run") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); start a new run") from error


def read_header(handle: BinaryIO, path: Path) -> dict[str, Any]:
    """The header of a snapshot; a ValueError where it is damaged, or the file is not as long as it says."""
    start = handle.read(_ALIGN)
    if len(start) < _PREFIX.size or start[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} is not a file of node state; start a new run")
    _, length, crc = _PREFIX.unpack_from(start)
    text = start[_PREFIX.size : _PREFIX.size + length]
    if zlib.crc32(text) != crc:
        raise ValueError(f"{path} has a damaged header (its checksum differs); start a new run")
    header = json.loads(text)
    if header["version"] != VERSION:
        raise ValueError(f"{path} is of version {header['version']}, this vqgnn reads {VERSION}; start a new run")
    found = os.fstat(handle.fileno()).st_size
    if found != header["size"]:
        raise ValueError(f"{path} is cut off: {found} of {header['size']} bytes; start a new run")
    return header


def _header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    if _PREFIX.size + len(text) > _ALIGN:
        raise ValueError(f"the header of a snapshot takes {len(text)} bytes; shorten the conv's name")
    return _PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text


def _differs(path: Path, key: str, saved: Any, wanted: Any) -> str:
    if key == "graph":
        return f"{path} holds the state of another graph; start a new run"
    return f"{path} holds node state of {key} {saved}, this run's is {wanted}; start a new run"


def _read_table(handle: BinaryIO, path: Path, entry: dict[str, Any], name: str, table: Tensor) -> None:
    if (_DTYPES.get(entry.get("dtype")), entry.get("shape")) != (table.dtype, list(table.shape)):
        came = f"{entry['dtype']} {entry['shape']}" if entry else "nothing"
        raise ValueError(f"{path} holds {came} for {name}, not {table.dtype} {list(table.shape)}; start a new run")
    host = table if table.device.type == "cpu" and table.is_contiguous() else torch.empty_like(table, device="cpu")
    handle.seek(entry["offset"])
    crc = 0
    for piece in _pieces(host):
        if handle.readinto(piece) != len(piece):
            raise ValueError(f"{path} is cut off within {name}; start a new run")
        crc = zlib.crc32(piece, crc)
    if f"{crc:08x}" != entry["crc"]:
        raise ValueError(f"{path} is damaged (the checksum of {name} differs); start a new run")
    if host is not table:
        table.copy_(host)


def _pieces(table: Tensor):
    """The memory of a contiguous CPU tensor, some MB at a time."""
    if table.numel() == 0:
        return
    memory = memoryview(table.contiguous().view(-1).view(torch.uint8).numpy())
    for start in range(0, len(memory), _PIECE):
        yield memory[start : start + _PIECE]
