"""Benchmarks compare ours with named peers, interleaved in one run.

    pytest benchmarks/test_vq_assign.py --benchmark-json out.json

With `--device cuda` every tensor is made on the GPU, and times include the wait for it.

Each row (device, op, size, ours p20/p50/p80, every peer's median and the ratio) is appended to the CSV that
`--rows FILE` names, so that figures keep the command and the machine that made them.
"""

import csv
import functools
import gc
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch

from vqgnn.doctor import cpu_name

_on_gpu = False  # set by --device


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device of the tensors measured")
    parser.addoption("--rows", default=None, help="CSV file to append one row a benchmark to")


@pytest.fixture(scope="session", autouse=True)
def device(request):
    """The device of --device; factory functions such as torch.randn make their tensors there."""
    global _on_gpu
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda was given, but torch sees no CUDA device; leave the option out")
    _on_gpu = name == "cuda"
    torch.set_default_device(name)
    yield torch.device(name)
    torch.set_default_device(None)


@pytest.fixture
def no_default_device(device):
    """For a benchmark of whole models, in which parts of the host make tensors of their own."""
    torch.set_default_device(None)
    yield
    torch.set_default_device(device)


def on_gpu() -> bool:
    return _on_gpu


def device_name() -> str:
    if on_gpu():
        return torch.cuda.get_device_name()
    return f"{cpu_name()} x {torch.get_num_threads()} threads"


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def finished(function):
    """`function`, and on a GPU the wait for its end."""
    if not on_gpu():
        return function

    def run():
        result = function()
        torch.cuda.synchronize()
        return result

    return run


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second that the GPU reads and writes when it copies 1 GiB: what a kernel's bandwidth is compared with."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = finished(lambda: target.copy_(source))
    copy()
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds)


def peak_extra_mb(function) -> float:
    """Peak memory that one call adds, in MB (10^6 bytes); the call's own result counts.

    On the CPU the process's resident memory (Linux only), sampled every 0.2 ms; on a GPU what torch allocates.
    """
    gc.collect()
    if on_gpu():
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - base) / 1e6
    base = peak = resident_mb()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.0002):
            peak = max(peak, resident_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = function()
        peak = max(peak, resident_mb())
    finally:
        done.set()
        thread.join()
    del result
    return peak - base


@pytest.fixture
def versus(benchmark, request):
    """versus(ours, {name: peer}, size=...): medians of interleaved rounds; returns {name: peer median / our median}.

    Every round runs each peer once (in the benchmark's set-up, timed apart) and then ours once. Functions named in
    `slow` run in the first `slow_rounds` rounds only. `memory=True` also measures each one's peak extra
    memory. `moved`: bytes that our call must move at least; gives GB/s and, on a GPU, the share of its copy
    bandwidth.
    """

    def run(ours, peers, size, rounds=7, slow=(), slow_rounds=1, memory=False, moved=None):
        ours, peers = finished(ours), {name: finished(function) for name, function in peers.items()}
        times = {name: [] for name in peers}
        for name, function in {"ours": ours, **peers}.items():
            if name not in slow:
                function()  # warm-up
        turn = 0

        def setup():
            nonlocal turn
            for name, function in peers.items():
                if name in slow and turn >= slow_rounds:
                    continue
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
            turn += 1

        benchmark.pedantic(ours, setup=setup, rounds=rounds, iterations=1, warmup_rounds=0)
        mine = sorted(benchmark.stats.stats.data)
        p20, p50, p80 = (mine[round(q * (len(mine) - 1))] for q in (0.2, 0.5, 0.8))
        row = {
            "device": device_name(),
            "benchmark": request.node.name,
            "size": size,
            "ours_p20_ms": p20 * 1e3,
            "ours_p50_ms": p50 * 1e3,
            "ours_p80_ms": p80 * 1e3,
        }
        ratios = {}
        for name, seconds in times.items():
            median = statistics.median(seconds)
            ratios[name] = median / p50
            row[f"{name}_ms"] = median * 1e3
            row[f"{name}_over_ours"] = ratios[name]
        if moved is not None:
            row["gb_per_s"] = moved / p50 / 1e9
            if on_gpu():
                row["share_of_copy_bandwidth"] = moved / p50 / copy_bandwidth()
        if memory:
            for name, function in {"ours": ours, **peers}.items():
                row[f"{name}_peak_mb"] = peak_extra_mb(function)
        benchmark.extra_info.update(row)
        report(request.config, row)
        return ratios

    return run


def report(config, row: dict) -> None:
    """Print one row and, with --rows, append it as `column=value` pairs under a fixed header."""
    text = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
    print(f"\n{text}")
    target = config.getoption("--rows")
    if target is None:
        return
    path = Path(target)
    new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.writer(handle)
        if new:
            writer.writerow(["device", "benchmark", "size", "figure", "value"])
        for key, value in row.items():
            if key not in ("device", "benchmark", "size"):
                writer.writerow([row["device"], row["benchmark"], row["size"], key, f"{value:.5g}"])
