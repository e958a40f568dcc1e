"""This process's memory, from the kernel's own counters; None where there is no /proc."""

from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> int | None:
    """Bytes in RAM now."""
    return _field("VmRSS")


def peak() -> int | None:
    """Most bytes in RAM since `reset_peak` (or the start)."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Let `peak` start from what is in RAM now; without the right to do so it goes on from the start."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def _field(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)
