"""Memory of this process and of its machine: of RAM from the kernel's own counters, None where there is no /proc; of a
GPU what torch has allocated."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STATUS, _CLEAR, _MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
_CGROUP, _IO = Path("/sys/fs/cgroup"), Path("/proc/self/io")


def resident(device: torch.device | None = None) -> int | None:
    """Bytes in RAM now, or on the GPU `device`."""
    return _cuda().memory_allocated(device) if _is_gpu(device) else _field("VmRSS")


def peak(device: torch.device | None = None) -> int | None:
    """Most bytes in RAM, or on the GPU `device`, since `reset_peak` (or the start)."""
    return _cuda().max_memory_allocated(device) if _is_gpu(device) else _field("VmHWM")


def reset_peak(device: torch.device | None = None) -> None:
    """Let `peak` start from what is there now; RAM, without the right to do so, goes on from the start."""
    if _is_gpu(device):
        _cuda().reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def give_back() -> None:
    """Give the RAM of freed tensors that malloc keeps for others back to the system; without glibc nothing happens."""
    _glibc("malloc_trim", 0)


def keep_freed() -> None:
    """Let malloc give nothing back by itself, however large: for timing without page faults. Without glibc: nothing."""
    _glibc("mallopt", -4, 0)  # M_MMAP_MAX
    _glibc("mallopt", -1, 2**31 - 1)  # M_TRIM_THRESHOLD


def use_one_arena() -> None:
    """Let all threads that start from now on allocate from one arena of malloc; without glibc nothing happens.

    A thread's own arena keeps what it has freed from the others: the batches that the loader's threads build.
    """
    _glibc("mallopt", -8, 1)  # M_ARENA_MAX


def disk_traffic() -> tuple[int, int] | None:
    """Bytes that this process has had read from and written to disks, page faults of mapped files included."""
    try:
        counts = dict(line.split(": ") for line in _IO.read_text().splitlines())
        return int(counts["read_bytes"]), int(counts["write_bytes"])
    except (OSError, ValueError, KeyError):
        return None


def available(device: torch.device) -> int | None:
    """Bytes that new tensors on this device may take: the GPU's free ones, or RAM within the container's limit."""
    if _is_gpu(device):
        return _cuda().mem_get_info(device)[0]
    free = _field("MemAvailable", _MEMINFO)
    try:
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        kinds = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        limit -= used - int(kinds["active_file"]) - int(kinds["inactive_file"])  # cached files make room
    except (OSError, ValueError, KeyError):  # no such limit
        return free
    return max(0, limit if free is None else min(free, limit))


def size(count: int) -> str:
    """Bytes as a person reads them: 1536 is "1.5 kB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def _glibc(name: str, *numbers: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*numbers)


def _is_gpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def _cuda():
    import torch  # late: importing it takes a while, and RAM needs none of it

    return torch.cuda


def _field(name: str, path: Path = _STATUS) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)
