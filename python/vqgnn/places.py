"""Where node state lies: in the memory of the device that computes, or in memory-mapped files."""

from __future__ import annotations

import torch

from . import memory
from .memory import size

PLACES = ("device", "disk")  # fastest first; "auto" takes the first that is large enough
_SHARE = 0.5  # of the free memory that `auto` gives to node state: activations and the graph need the rest


def choose(nbytes: int, device: torch.device) -> tuple[str, str]:
    """The place of "auto" for so many bytes of node state, and why."""
    free = memory.available(device)
    if free is None:
        return "device", "free memory is unknown"
    if nbytes <= _SHARE * free:
        return "device", f"{size(nbytes)} is at most half of {size(free)} free"
    if device.type != "cpu":
        return "device", f"{size(nbytes)} is more than half of {size(free)} free, but state on disk needs --device cpu"
    return "disk", f"{size(nbytes)} is more than half of {size(free)} free"


def resolve(place: str, nbytes: int, device: torch.device) -> str:
    """One of PLACES; a ValueError where it is unknown or does not go with the device."""
    if place == "auto":
        return choose(nbytes, device)[0]
    if place not in PLACES:
        raise ValueError(f"place={place!r} is unknown; choose one of auto, {', '.join(PLACES)}")
    if place == "disk" and device.type != "cpu":
        raise ValueError(f"place='disk' needs the CPU, the data is on {device}; use place='device' or --device cpu")
    return place
