"""Rows of host tables, moved to and from batches by threads of their own while the caller computes."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

import vqgnn_kernels as kernels


class TransferEngine:
    """Pulls rows of tables into batches and pushes them back, beside the computation.

    A table is a tensor in host memory: RAM, pinned or memory-mapped. Batches are in host memory or on `device`; rows
    for the device go through pinned slots and a copy stream of their own in each direction.

    **Order.** Operations on one table take effect in the order of the calls: a pull returns what the pushes before it
    wrote, and nothing of later ones. Tables are independent of each other. Any thread may call.

    **Memory.** The engine keeps a batch's memory alive until it is done with it. Until `Ticket.wait` the rows of
    `out` are undefined and those of `src` must not be changed. On a GPU, `src` is read after, and `out` written
    after, the work that was on the current stream at the call.

    **Errors.** Wrong arguments raise a ValueError and leave the engine as it was. When a transfer fails the engine
    stops: this and every later `wait`, `pull`, `push` and `flush` raises a RuntimeError with the cause. Tables are
    then part old and part new.

    Leaving the `with` block, the last reference's end and the interpreter's exit wait for what is queued. A forked
    child cannot use its parent's engine: calls raise a RuntimeError.

    Args:
        num_threads: threads that gather and scatter, beside two that wait for copies if there is a device. Default:
            half as many as there are cores, at most 16.
        slots: pinned staging buffers for each direction, if there is a device. Two batches' rows should fit into them:
            there they wait, off the bus, for their turn at the table.
        slot_bytes: size of one; a table's row must fit into it.
        device: the CUDA device of the batches; None for host memory only.

    Source: GNNAutoScale, "Fast historical embeddings"; its transfers, without its device-wide synchronisation.
    """

    def __init__(
        self,
        num_threads: int | None = None,
        slots: int = 32,
        slot_bytes: int = 1 << 20,
        device: torch.device | str | None = None,
    ):
        self.device = torch.device("cpu" if device is None else device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device={device!r} is not supported; use None for host memory or a CUDA device")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        index = self.device.index if self.device.type == "cuda" else -1
        if num_threads is None:
            num_threads = min(max(1, (os.cpu_count() or 1) // 2), 16)
        sizes = dict(num_threads=num_threads, slots=slots, slot_bytes=slot_bytes)
        self._native = kernels.transfer_engine(**sizes, device=index)
        self._copy_stream = None
        if self.device.type == "cuda":
            self._copy_stream = torch.cuda.ExternalStream(self._native.pull_stream, device=self.device)
        self._tables: list[tuple[Tensor, bool]] = []
        self._pending: deque[tuple[object, torch.UntypedStorage]] = deque()  # tickets and memory of batches under way
        self._forgetting = threading.Lock()
        # Also at exit, before modules are torn down; the memory outlives the threads that use it.
        self._close = weakref.finalize(self, _close, self._native, self._tables, self._pending)

    def add_table(self, rows: Tensor, writable: bool = True, pin: bool = False) -> int:
        """Make a table known; returns its number, for `pull` and `push`.

        Args:
            rows: [n, ...] of any dtype, contiguous, in host memory. The engine keeps it alive; nobody else may use
                rows that a queued operation touches (`flush` first).
            writable: False for a mapping that may only be read; pushes are then refused.
            pin: page-lock it, so that kernels can read it in place.
        """
        _require(isinstance(rows, Tensor), "rows", rows, "a tensor [n, ...]")
        _require(rows.device.type == "cpu", "rows", rows, "in host memory; move it with .cpu()")
        _require(rows.dim() >= 1 and _row_bytes(rows) > 0, "rows", rows, "[n, ...] with rows of a byte or more")
        _require(rows.is_contiguous(), "rows", rows, "contiguous: a copy would not be the table")
        number = self._native.add_table(rows.data_ptr(), rows.shape[0], _row_bytes(rows), pin)
        assert number == len(self._tables)
        self._tables.append((rows, writable))
        return number

    def pull(self, table: int, n_id: Tensor, out: Tensor | None = None) -> Ticket:
        """Start `out[i] = table[n_id[i]]`; `wait` of the ticket returns `out`.

        Args:
            table: of `add_table`.
            n_id: [k] int64 in host memory, copied; any order, repeated at will.
            out: [k, ...] with the table's row shape and dtype, contiguous, in host memory or on the engine's device.
                Left out, it is made on the engine's device, and on a GPU free for the copies at once: they need not
                wait for earlier computation.
        """
        rows, _ = self._table(table)
        n_id = _checked_ids(n_id)
        if out is None:
            out, stream = self._empty(n_id.shape[0], rows)
        else:
            self._check_batch("out", out, n_id, rows)
            stream = self._stream(out)
        return self._start(self._native.pull, table, n_id, out, stream)

    def read_ahead(self, table: int, n_id: Tensor) -> Ticket:
        """Start to read rows of a memory-mapped table from disk, so that who uses them in place need not wait.

        Nothing is copied, and other threads may read and write the rows meanwhile.

        Args:
            table: of `add_table`.
            n_id: [k] int64 in host memory, copied.
        """
        self._table(table)
        return self._start(self._native.pull, table, _checked_ids(n_id), None, None)

    def push(self, table: int, n_id: Tensor, src: Tensor) -> Ticket:
        """Start `table[n_id[i]] = src[i]`; where ids are equal, the last wins.

        Args:
            table: of `add_table`.
            n_id: [k] int64 in host memory, copied. Increasing ids save a check for equal ones.
            src: [k, ...] with the table's row shape and dtype, contiguous, in host memory or on the engine's device;
                not copied: leave it unchanged until `wait`.
        """
        rows, writable = self._table(table)
        if not writable:
            raise ValueError(f"table {table} was added with writable=False; push to a writable table")
        n_id = _checked_ids(n_id)
        self._check_batch("src", src, n_id, rows)
        return self._start(self._native.push, table, n_id, src, self._stream(src))

    def flush(self) -> None:
        """Block until everything queued is done: tables hold every push, and every `out` its rows."""
        self._native.flush()
        self._forget()

    def close(self) -> None:
        """Finish what is queued and end the threads; may be called again. Raises an error that nobody has seen yet."""
        self._close()

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _table(self, number: int) -> tuple[Tensor, bool]:
        if not 0 <= number < len(self._tables):
            raise ValueError(f"table={number} is unknown; add_table has made {len(self._tables)} tables, from 0")
        return self._tables[number]

    def _check_batch(self, name: str, batch: Tensor, n_id: Tensor, rows: Tensor) -> None:
        wanted = (n_id.shape[0], *rows.shape[1:])
        good = isinstance(batch, Tensor) and batch.shape == wanted and batch.dtype == rows.dtype
        _require(good, name, batch, f"{list(wanted)} {rows.dtype}, a row of the table for each of n_id")
        _require(batch.is_contiguous(), name, batch, "contiguous")
        there = batch.device.type == "cpu" or batch.device == self.device
        _require(there, name, batch, f"in host memory or on the engine's device, {self.device}")

    def _empty(self, k: int, rows: Tensor) -> tuple[Tensor, int | None]:
        shape = (k, *rows.shape[1:])
        if self._copy_stream is None:
            return torch.empty(shape, dtype=rows.dtype), None
        with torch.cuda.stream(self._copy_stream):  # its memory pool: no kernel of another stream may still use it
            return torch.empty(shape, dtype=rows.dtype, device=self.device), self._native.pull_stream

    def _stream(self, batch: Tensor) -> int | None:
        return None if batch.device.type == "cpu" else torch.cuda.current_stream(self.device).cuda_stream

    def _start(self, operation, table: int, n_id: Tensor, batch: Tensor | None, stream: int | None) -> Ticket:
        self._forget()
        handle = operation(table, n_id.data_ptr(), n_id.shape[0], 0 if batch is None else batch.data_ptr(), stream)
        if batch is not None:
            # not the tensor, which may hold its autograd graph
            self._pending.append((handle, batch.untyped_storage()))
        return Ticket(self, handle, batch)

    def _forget(self) -> None:
        # The oldest first, up to one under way: a call costs the same however many transfers are queued.
        with self._forgetting:
            while self._pending and self._native.done(self._pending[0][0]):
                self._pending.popleft()


class Ticket:
    """One pull, push or read-ahead under way."""

    def __init__(self, engine: TransferEngine, handle: object, batch: Tensor | None):
        self._engine, self._handle, self._batch = engine, handle, batch

    def done(self) -> bool:
        """Whether the engine has finished with the batch's tensors and the table's rows."""
        return self._engine._native.done(self._handle)

    def wait(self) -> Tensor | None:
        """Return the batch's `out`, or its `src`, which may then be used and changed; None of a read-ahead.

        In host memory this blocks until the rows are there. On a GPU it makes the current stream wait for the copies,
        and blocks only until they are queued.
        """
        stream = None if self._batch is None else self._engine._stream(self._batch)
        self._engine._native.wait(self._handle, stream)
        if stream is not None:  # the allocator must not hand it on while this stream uses it
            self._batch.record_stream(torch.cuda.current_stream(self._batch.device))
        return self._batch


def _close(native, *kept: object) -> None:
    native.close()


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1:].numel() * rows.element_size()


def _checked_ids(n_id: Tensor) -> Tensor:
    good = isinstance(n_id, Tensor) and n_id.dtype == torch.int64 and n_id.dim() == 1 and n_id.device.type == "cpu"
    _require(good, "n_id", n_id, "[k] int64 in host memory")
    return n_id.contiguous()


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if condition:
        return
    got = f"{list(value.shape)} {value.dtype} on {value.device}" if isinstance(value, Tensor) else repr(value)
    raise ValueError(f"{name} must be {wanted}, got {got}")
