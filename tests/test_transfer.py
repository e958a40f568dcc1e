"""The transfer engine: values, order, errors and its end, on the host and on a CUDA driver without a GPU."""

import ctypes
import gc
import mmap
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import needs_cpp

import vqgnn_kernels as kernels
from vqgnn.transfer import TransferEngine
from vqgnn_kernels import _backend

pytestmark = needs_cpp

ROOT = Path(__file__).resolve().parents[1]
# The names of csrc/transfer/engine.h's enum, in its order: the numbers that skip_wait takes, from 0.
WAITS = re.findall(r"^  (\w+),", (ROOT / "csrc/transfer/engine.h").read_text().split("enum class Wait {")[1], re.M)


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Folder with fake_cuda.so and the program `stress`."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"the fake driver needs a C++ compiler; {compiler} is not on PATH, set CXX")
    folder = tmp_path_factory.mktemp("transfer")
    subprocess.run(["bash", ROOT / "tests/transfer/build", folder], check=True)
    return folder


@pytest.fixture
def cuda(programs, monkeypatch):
    """The fake driver, which engines open too; device memory is host memory."""
    monkeypatch.setenv("VQGNN_LIBCUDA", str(programs / "fake_cuda.so"))
    return ctypes.CDLL(str(programs / "fake_cuda.so"))


class GatedStream:
    """A stream whose next work waits until `open`."""

    def __init__(self, cuda):
        self.cuda, handle = cuda, ctypes.c_void_p()
        assert cuda.cuStreamCreate(ctypes.byref(handle), 0) == 0
        self.handle, self.gate = handle.value, threading.Event()
        self.kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: self.gate.wait(60) or None)

    def close_gate(self):
        self.gate.clear()
        assert self.cuda.cuLaunchHostFunc(ctypes.c_void_p(self.handle), self.kernel, None) == 0

    def open(self):
        self.gate.set()

    def synchronize(self):
        assert self.cuda.cuStreamSynchronize(ctypes.c_void_p(self.handle)) == 0


@pytest.fixture
def stream(cuda):
    stream = GatedStream(cuda)
    yield stream
    stream.open()
    cuda.cuStreamDestroy_v2(ctypes.c_void_p(stream.handle))


class Native:
    """The native engine with tensors in place of addresses; every tensor outlives it."""

    def __init__(self, **options):
        self.engine = kernels.transfer_engine(**{"num_threads": 2, "slots": 2, "slot_bytes": 4096, **options})
        self.kept = []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def add_table(self, rows):
        self.kept.append(rows)
        return self.engine.add_table(rows.data_ptr(), rows.shape[0], rows.stride(0) * rows.element_size())

    def _start(self, operation, table, n_id, rows, stream):
        self.kept.append(rows)
        return operation(table, n_id.data_ptr(), len(n_id), rows.data_ptr(), stream)

    def pull(self, table, n_id, out, stream=None):
        return self._start(self.engine.pull, table, n_id, out, stream)

    def push(self, table, n_id, src, stream=None):
        return self._start(self.engine.push, table, n_id, src, stream)


def python(script: str, timeout=120, **environment) -> subprocess.CompletedProcess:
    """Run a script in an interpreter of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# ---- random programs ------------------------------------------------------------------------------------------------


def stress(programs, *arguments, delay_us=100):
    environment = {**os.environ, "VQGNN_LIBCUDA": str(programs / "fake_cuda.so"), "FAKE_CUDA_DELAY_US": str(delay_us)}
    command = [programs / "stress", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_random_programs_equal_a_sequential_model(programs):
    result = stress(programs, "--programs", 10_000, "--runners", 8)
    assert result.returncode == 0, result.stdout + result.stderr
    done, wrong = re.match(r"(\d+) programs, .* (\d+) wrong values", result.stdout).groups()
    assert (int(done) >= 10_000, int(wrong)) == (True, 0)


@pytest.mark.parametrize("wait", WAITS[1:])
def test_without_any_wait_values_go_wrong(programs, wait):
    result = stress(programs, "--programs", 10_000, "--skip-wait", WAITS.index(wait), "--until-mismatch")
    assert result.returncode == 1, f"leaving out the wait {wait} changed nothing: {result.stdout}{result.stderr}"
    assert int(re.search(r"(\d+) wrong values", result.stdout)[1]) > 0


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((32,), torch.uint8), ((7,), torch.int16), ((128,), torch.float32), ((3, 5), torch.bfloat16), ((), torch.int64)],
    ids=str,
)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_pull_and_push_are_indexing(shape, dtype, num_threads):
    table = (torch.randn(5000, *shape) * 50).to(dtype)
    expected, n_id = table.clone(), torch.randperm(5000)[:4000]
    with TransferEngine(num_threads, slot_bytes=10_000) as engine:
        number = engine.add_table(table)
        repeated = n_id % 100
        assert torch.equal(engine.pull(number, repeated).wait(), expected[repeated])
        expected[n_id] = src = (torch.randn(4000, *shape) * 50).to(dtype)
        out = torch.empty_like(src)
        engine.push(number, n_id, src)
        ticket = engine.pull(number, n_id, out)
        assert ticket.wait() is out
        assert torch.equal(out, src)
        assert ticket.done()
    assert torch.equal(table, expected)


def test_of_equal_ids_the_last_wins():
    table, n_id, src = torch.zeros(50, 16), torch.randint(50, (30_000,)), torch.randn(30_000, 16)
    expected = table.clone()
    for row, values in zip(n_id.tolist(), src, strict=True):
        expected[row] = values
    with TransferEngine(3) as engine:
        engine.push(engine.add_table(table), n_id, src)
    assert torch.equal(table, expected)


def test_a_short_piece_does_not_overtake_a_long_one_with_the_same_row():
    table, n_id = torch.zeros(1024, 16), torch.arange(1025).clamp(max=1023)
    with TransferEngine(2, slot_bytes=1024 * 64) as engine:  # pieces of 1024 rows and of one
        number = engine.add_table(table)
        for step in range(2000):
            src = torch.zeros(1025, 16)
            src[-1] = step
            engine.push(number, n_id, src).wait()
            assert (table[-1] == step).all()


def test_no_rows():
    with TransferEngine() as engine:
        number = engine.add_table(torch.zeros(0, 4))
        none = torch.empty(0, dtype=torch.int64)
        assert engine.pull(number, none).wait().shape == (0, 4)
        assert engine.push(number, none, torch.empty(0, 4)).done()


def test_a_table_in_a_mapped_file(tmp_path):
    path = tmp_path / "rows"
    mapped = np.memmap(path, dtype=np.float32, mode="w+", shape=(3000, 24))
    n_id, src = torch.randperm(3000)[:2000], torch.randn(2000, 24)
    with TransferEngine() as engine:
        number = engine.add_table(torch.from_numpy(mapped))
        engine.push(number, n_id, src)
        assert torch.equal(engine.pull(number, n_id).wait(), src)
    read = torch.from_file(str(path), shared=False, size=3000 * 24).view(3000, 24)
    assert torch.equal(read[n_id], src)


def test_read_ahead_spares_the_reader_the_disk(tmp_path):
    """Page faults that wait for the disk are the workers', not those of the thread that uses the rows in place."""
    rows, bytes_a_row = 20_000, 100
    path = tmp_path / "rows"
    path.write_bytes(os.urandom(rows * bytes_a_row))
    n_id = torch.arange(0, rows, 1000)  # a fault reads some pages around its own

    def faults_of_reading(ahead: bool) -> int:
        with open(path, "rb") as handle, TransferEngine() as engine:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            mapped.madvise(mmap.MADV_RANDOM)
            table = torch.frombuffer(mapped, dtype=torch.uint8).view(rows, bytes_a_row)
            if ahead:
                engine.read_ahead(engine.add_table(table), n_id).wait()
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
            table[n_id].sum()
            return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before

    if faults_of_reading(ahead=False) < len(n_id) // 2:
        pytest.skip("this file system keeps its files in RAM")
    assert faults_of_reading(ahead=True) == 0


def test_operations_on_a_table_keep_the_order_of_the_calls():
    table, n_id = torch.zeros(2000, 64), torch.arange(2000)
    with TransferEngine(3, slot_bytes=1 << 16) as engine:
        number, outs = engine.add_table(table), []
        for value in range(1, 30):
            engine.push(number, n_id, torch.full((2000, 64), float(value)))
            outs.append(engine.pull(number, n_id))
        for value, ticket in enumerate(outs, 1):
            assert (ticket.wait() == value).all()


def test_tables_do_not_wait_for_each_other(cuda, stream):
    native, rows, n_id = Native(device=0), torch.randn(500, 8), torch.arange(500)
    tables = [native.add_table(torch.zeros(500, 8)), native.add_table(rows)]
    stream.close_gate()
    held = native.push(tables[0], n_id, torch.ones(500, 8), stream.handle)
    for _ in range(20):
        out = torch.empty(500, 8)
        native.wait(native.pull(tables[1], n_id, out))
        assert torch.equal(out, rows)
    assert not native.done(held)
    stream.open()
    native.flush()
    assert native.done(held)
    assert (native.kept[0] == 1).all()
    native.close()


def test_pull_waits_for_the_push_of_its_table(cuda, stream):
    native, n_id, out = Native(device=0), torch.arange(500), torch.empty(500, 8)
    table = native.add_table(torch.zeros(500, 8))
    stream.close_gate()
    native.push(table, n_id, torch.ones(500, 8), stream.handle)
    pull = native.pull(table, n_id, out)
    assert not native.done(pull)
    stream.open()
    native.wait(pull)
    assert (out == 1).all()


# ---- arguments ------------------------------------------------------------------------------------------------------

IDS, ROWS = torch.arange(3), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.pull(1, IDS), "table=1 is unknown; add_table has made 1"),
        (lambda e: e.pull(0, IDS.int()), r"n_id must be \[k\] int64 in host memory, got \[3\] torch.int32"),
        (lambda e: e.pull(0, [1]), r"n_id must be .*, got \[1\]"),
        (lambda e: e.pull(0, torch.tensor([3, 10, 2])), r"ids must be in 0\.\.9, got 10 at position 1"),
        (lambda e: e.pull(0, torch.tensor([-1])), r"ids must be in 0\.\.9, got -1 at position 0"),
        (lambda e: e.push(0, torch.tensor([-(2**63), 0, 1]), ROWS), "ids must be in 0"),
        (lambda e: e.pull(0, IDS, torch.zeros(3, 5)), r"out must be \[3, 4\] torch.float32, .*, got \[3, 5\]"),
        (lambda e: e.pull(0, IDS, torch.zeros(4, 3).T), "out must be contiguous"),
        (lambda e: e.push(0, IDS, ROWS.half()), r"src must be \[3, 4\] torch.float32, .* torch.float16"),
        (lambda e: e.push(0, IDS, ROWS.to("meta")), "src must be in host memory or on the engine's device, cpu"),
        (lambda e: e.push(e.add_table(ROWS, writable=False), IDS, ROWS), "push to a writable table"),
        (lambda e: e.add_table(ROWS.T), "rows must be contiguous"),
        (lambda e: e.add_table(ROWS.to("meta")), "rows must be in host memory"),
        (lambda e: e.add_table(torch.zeros(3, 0)), "rows must be .* a byte or more"),
        (lambda e: e.add_table(ROWS, pin=True), "pin needs an engine with a CUDA device"),
        (lambda e: TransferEngine(0), r"num_threads must be in 1\.\.1024, got 0"),
        (lambda e: TransferEngine(slots=0), "slots must be in"),
        (lambda e: TransferEngine(device="meta"), "device='meta' is not supported"),
    ],
)
def test_a_wrong_argument_is_a_value_error_and_changes_nothing(call, message):
    table = torch.randn(10, 4)
    before = table.clone()
    with TransferEngine() as engine:
        engine.add_table(table)
        with pytest.raises(ValueError, match=message):
            call(engine)
        assert torch.equal(engine.pull(0, IDS).wait(), before[IDS])
    assert torch.equal(table, before)


def test_a_ticket_belongs_to_its_engine():
    mine, other = Native(), Native()
    ticket = mine.pull(mine.add_table(torch.zeros(3, 4)), IDS, torch.empty(3, 4))
    with pytest.raises(ValueError, match="ticket must come from this engine"):
        other.wait(ticket)


def test_native_checks_of_the_device(cuda):
    with pytest.raises(ValueError, match="device must be below the number of CUDA devices, 2, got 2"):
        Native(device=2)
    with pytest.raises(ValueError, match="a stream needs an engine with a CUDA device"):
        native = Native()
        native.pull(native.add_table(torch.zeros(3, 4)), IDS, torch.empty(3, 4), stream=0)
    with pytest.raises(ValueError, match=r"a row must have 1\.\.4096 bytes, .* got 8192"):
        Native(device=0).add_table(torch.zeros(3, 2048))


def test_without_a_driver_the_reason_is_said(monkeypatch):
    monkeypatch.setenv("VQGNN_LIBCUDA", "/nowhere/libcuda.so")
    with pytest.raises(RuntimeError, match=r"the CUDA driver could not be opened: /nowhere/libcuda\.so: cannot open"):
        Native(device=0)


def test_without_the_extension_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(_backend, "_C", None)
    monkeypatch.setattr(_backend, "_C_ERROR", "no module named _C", raising=False)
    with pytest.raises(RuntimeError, match=r"needs the native extension, which is not there \(no module named _C\)"):
        TransferEngine()


# ---- errors ---------------------------------------------------------------------------------------------------------


def failed_engine():
    native = Native(fail_piece=1)
    table = native.add_table(torch.zeros(500, 8))
    good = native.pull(table, IDS, torch.empty(3, 8))
    native.wait(good)
    return native, table, good, native.push(table, torch.arange(500), torch.ones(500, 8))


CAUSE = "the transfer engine stopped: push to table 0: a worker was told to fail"


def test_a_worker_that_throws_stops_the_engine():
    native, table, good, bad = failed_engine()
    later = native.kept[0].new_empty(3, 8)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=CAUSE):
            native.wait(bad)
    native.wait(good)  # what was done is done
    for call in (native.flush, lambda: native.pull(table, IDS, later), lambda: native.push(table, IDS, later)):
        with pytest.raises(RuntimeError, match=CAUSE):
            call()
    native.close()  # everybody knows


def test_a_pull_behind_a_failed_push_fails():
    native, table, _, _ = failed_engine()
    with pytest.raises(RuntimeError, match=CAUSE):
        native.wait(native.pull(table, IDS, torch.empty(3, 8)))


def test_an_error_that_nobody_saw_is_raised_at_the_end():
    native, *_ = failed_engine()
    with pytest.raises(RuntimeError, match=CAUSE):
        native.close()
    native.close()


def three_steps(cuda, stream, pin):
    """Push and pull a table three times; the errors on the way, in their order."""
    errors = []

    def attempt(call, *arguments):
        try:
            return call(*arguments)
        except RuntimeError as error:
            errors.append(str(error))

    def run():
        native = Native(device=0)
        rows, n_id = torch.zeros(500, 8), torch.arange(500)
        table = attempt(native.engine.add_table, rows.data_ptr(), 500, 32, pin)
        for operation in (native.push, native.pull) * (0 if table is None else 3):
            ticket = attempt(operation, table, n_id, torch.ones(500, 8), stream.handle)
            if ticket is not None:
                attempt(native.wait, ticket, stream.handle)
        attempt(native.flush)
        attempt(native.close)

    attempt(run)
    stream.synchronize()
    return errors


@pytest.mark.parametrize(
    "failing",
    [
        *("cuInit:1", "cuDevicePrimaryCtxRetain:1", "cuStreamCreate:2", "cuMemHostAlloc:3", "cuEventCreate:3"),
        *("cuCtxPushCurrent_v2:1", "cuCtxPushCurrent_v2:2", "cuCtxPushCurrent_v2:6", "cuMemHostRegister_v2:1"),
        *("cuEventRecord:1", "cuEventRecord:5", "cuStreamWaitEvent:1", "cuStreamWaitEvent:2", "cuStreamWaitEvent:4"),
        *("cuMemcpyDtoHAsync_v2:1", "cuMemcpyDtoHAsync_v2:7", "cuMemcpyHtoDAsync_v2:1", "cuMemcpyHtoDAsync_v2:7"),
        *("cuEventSynchronize:1", "cuEventSynchronize:9"),
    ],
)
def test_an_error_of_the_driver_reaches_the_caller_and_nothing_is_left(cuda, stream, failing):
    name, call = failing.split(":")
    live = cuda.fake_live()
    cuda.fake_fail(name.encode(), int(call))
    errors = three_steps(cuda, stream, pin="Register" in failing)
    cuda.fake_fail(b"", 0)
    assert f"{name.removesuffix('_v2')} failed: CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)" in errors[0]
    assert cuda.fake_live() == live
    assert three_steps(cuda, stream, pin=False) == []


def test_after_an_error_no_copy_still_writes(cuda, stream):
    native = Native(device=0)
    table = native.add_table(torch.ones(500, 8))
    stream.close_gate()
    cuda.fake_fail(b"cuEventRecord", 2)  # the second is behind the first copy, which waits for the stream
    threading.Timer(0.3, stream.open).start()
    pull = native.pull(table, torch.arange(500), torch.empty(500, 8), stream.handle)
    with pytest.raises(RuntimeError, match="pull from table 0: cuEventRecord failed"):
        native.wait(pull)
    assert stream.gate.is_set()  # its memory is the caller's again: the copy is over
    cuda.fake_fail(b"", 0)


# ---- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "del", "with"])
def test_the_end_finishes_what_is_queued(end):
    table, n_id = torch.zeros(20_000, 64), torch.arange(20_000)
    engine = TransferEngine()
    number = engine.add_table(table)
    for value in range(1, 6):
        last = engine.push(number, n_id, torch.full((20_000, 64), float(value)))
    if end == "close":
        engine.close()
        assert last.done()
    elif end == "with":
        with engine:
            pass
    else:
        del engine, last
        gc.collect()
    assert (table == 5).all()


def test_a_closed_engine_says_so():
    engine = TransferEngine()
    number = engine.add_table(torch.ones(3, 4))
    ticket = engine.pull(number, IDS)
    engine.close()
    engine.close()
    assert (ticket.wait() == 1).all()
    for call in (lambda: engine.pull(number, IDS), lambda: engine.push(number, IDS, ROWS), engine.flush):
        with pytest.raises(RuntimeError, match="the transfer engine is closed"):
            call()


def test_the_device_gets_everything_back(cuda, stream):
    live, native = cuda.fake_live(), Native(device=1)
    rows = torch.randn(1000, 16)
    table = native.engine.add_table(rows.data_ptr(), 1000, 64, True)
    out = torch.empty_like(rows)
    native.wait(native.pull(table, torch.arange(1000), out, stream.handle), stream.handle)
    stream.synchronize()
    assert torch.equal(out, rows)
    assert cuda.fake_live() > live
    native.close()
    assert cuda.fake_live() == live


def test_waiting_releases_the_gil_and_sleeps(cuda, stream):
    native = Native(device=0)
    table = native.add_table(torch.zeros(500, 8))
    stream.close_gate()
    threading.Timer(0.5, stream.open).start()  # which needs the GIL
    start = time.process_time()
    native.push(table, torch.arange(500), torch.ones(500, 8), stream.handle)
    native.flush()
    assert time.process_time() - start < 0.25  # of 0.5 s; one busy thread would take it all
    assert (native.kept[0] == 1).all()


def test_the_memory_of_a_transfer_under_way_stays():
    class Slow:
        """A native engine that is never done."""

        pull = push = lambda self, *arguments: object()
        done = lambda self, handle: False  # noqa: E731

    engine = TransferEngine()
    number = engine.add_table(torch.zeros(3, 4))
    engine._native, native = Slow(), engine._native
    src = np.zeros((3, 4), dtype=np.float32)
    seen = weakref.ref(src)
    engine.push(number, IDS, torch.from_numpy(src))
    del src
    gc.collect()
    assert seen() is not None
    Slow.done = lambda self, handle: True
    engine.pull(number, IDS)
    assert seen() is None
    engine._native = native


PUSH_AND_LEAVE = """
    import os, sys, torch
    from vqgnn.transfer import TransferEngine

    table = torch.from_file({path!r}, shared=True, size=40_000 * 64).view(40_000, 64)
    engine = TransferEngine()
    number = engine.add_table(table)
    for value in range(1, 8):
        engine.push(number, torch.arange(40_000), torch.full((40_000, 64), float(value)))
        engine.pull(number, torch.arange(40_000))
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code", "stderr"),
    [("pass", 0, ""), ("raise KeyError('mine')", 1, "KeyError: 'mine'")],
)
def test_the_interpreter_may_end_with_transfers_under_way(tmp_path, end, code, stderr):
    path = tmp_path / "rows"
    path.write_bytes(bytes(40_000 * 64 * 4))
    result = python(PUSH_AND_LEAVE.format(path=str(path), end=end))
    assert result.returncode == code, result.stderr
    assert stderr in result.stderr
    assert (result.stderr == "") == (stderr == "")
    assert (torch.from_file(str(path), size=40_000 * 64) == 7).all()


FORK = """
    import os, sys, torch
    from vqgnn.transfer import TransferEngine
    import vqgnn_kernels as kernels

    table, n_id = torch.zeros(20_000, 64), torch.arange(20_000)
    engine = TransferEngine()
    number = engine.add_table(table)
    native = kernels.transfer_engine(num_threads=1, slots=2, slot_bytes=4096, device=0)
    ticket = engine.push(number, n_id, torch.ones(20_000, 64))
    child = os.fork()
    if child == 0:
        for call in (lambda: engine.pull(number, n_id), ticket.wait, ticket.done, engine.flush, native.flush):
            try:
                call()
                print("no error", flush=True)
            except RuntimeError as error:
                print(error, flush=True)
        native.close()
        mine = TransferEngine()
        print(mine.pull(mine.add_table(torch.ones(3, 4)), torch.arange(3)).wait().sum().item(), flush=True)
        sys.exit(5)  # its exit does not wait for threads that it does not have
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    engine.flush()
    print((table == 1).all().item())
"""


def test_a_forked_child_is_told_and_ends(programs):
    result = python(FORK, VQGNN_LIBCUDA=str(programs / "fake_cuda.so"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    *errors, own, code, pushed = result.stdout.splitlines()
    assert len(errors) == 5
    assert all(re.match(r"the transfer engine belongs to process \d+, which forked this one", line) for line in errors)
    assert (own, code, pushed) == ("12.0", "5", "True")


# ---- tensors on a device --------------------------------------------------------------------------------------------


class OnCuda(torch.Tensor):
    """A tensor in host memory, which is the fake driver's device memory, that says that it lies on the first GPU."""

    device = torch.device("cuda", 0)

    def record_stream(self, stream):
        self.recorded = stream


def test_batches_on_the_device_use_the_current_stream(cuda, stream, monkeypatch):
    class Stream:
        cuda_stream = stream.handle

    class Pool:
        def __init__(self, *arguments, **options):
            pass

        __enter__ = __exit__ = __init__

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(torch.cuda, "ExternalStream", Pool)
    monkeypatch.setattr(torch.cuda, "stream", Pool)
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k).as_subclass(OnCuda))

    table, n_id = torch.zeros(400, 24), torch.randperm(400)
    src = torch.zeros(400, 24).as_subclass(OnCuda)
    values = torch.randn(400, 24)
    fill = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda _: ctypes.memmove(src.data_ptr(), values.data_ptr(), values.nbytes)
    )
    with TransferEngine(slot_bytes=4096, device="cuda:0") as engine:
        number = engine.add_table(table)
        stream.close_gate()
        cuda.cuLaunchHostFunc(ctypes.c_void_p(stream.handle), fill, None)
        push = engine.push(number, n_id, src)
        pull = engine.pull(number, n_id)  # into memory of the copy stream: not behind the current stream's work
        stream.open()
        out = pull.wait()
        stream.synchronize()
        assert torch.equal(out.as_subclass(torch.Tensor), values)
        assert push.wait() is src
        assert out.recorded is Stream
        engine.flush()
        assert torch.equal(table[n_id], values)
        again = engine.pull(number, n_id, torch.empty(400, 24, device="cuda")).wait()
        stream.synchronize()
        assert torch.equal(again.as_subclass(torch.Tensor), values)
        assert torch.equal(engine.pull(number, n_id, torch.zeros(400, 24)).wait(), values)  # host memory as well


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_beside_computation():
    table = torch.randn(100_000, 64)
    expected, work = table.clone(), torch.randn(2000, 2000, device="cuda")
    with TransferEngine(4, device="cuda") as engine:
        number = engine.add_table(table)
        for _ in range(50):
            n_id = torch.randperm(100_000)[:20_000]
            pull = engine.pull(number, n_id)
            work @ work
            engine.push(number, n_id, pull.wait() * 0.5 + 1)  # whose memory the allocator may hand out again at once
            del pull
            expected[n_id] = expected[n_id] * 0.5 + 1
    assert torch.equal(table, expected)
