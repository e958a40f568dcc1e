"""Benchmarks compare ours with named peers, interleaved in one run.

    pytest benchmarks/test_vq_assign.py --benchmark-json out.json

Each row (device, op, size, ours p20/p50/p80, every peer's median and the ratio) is appended to the CSV that
`--rows FILE` names, so that figures keep the command and the machine that made them.
"""

import csv
import gc
import platform
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device of the tensors measured")
    parser.addoption("--rows", default=None, help="CSV file to append one row a benchmark to")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()} x {torch.get_num_threads()} threads"
    return platform.processor()


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def peak_extra_mb(function) -> float:
    """Peak resident memory that one call adds, in MB (10^6 bytes), sampled every 0.2 ms.

    The call's own result counts. Linux only.
    """
    gc.collect()
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
    `slow` run in the first `slow_rounds` rounds only. `memory=True` also measures each one's peak extra memory.
    """

    def run(ours, peers, size, rounds=7, slow=(), slow_rounds=1, memory=False):
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
