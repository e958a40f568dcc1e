"""Where node state lies: in the memory of the device that computes, in RAM beside a GPU, or in memory-mapped files."""

from __future__ import annotations

import torch

from . import memory
from .memory import size

PLACES = ("device", "host", "disk", "pinned")  # "auto" takes the first that is large enough, "pinned" never
_SHARE = 0.5  # of the free memory that `auto` gives to node state: activations and the graph need the rest


def choose(nbytes: int, device: torch.device) -> tuple[str, str]:
    """The place of "auto" for so many bytes of node state of a graph in RAM, and why."""
    reasons = []
    for place, where in (("device", device), ("host", torch.device("cpu"))):
        if place == "host" and device.type == "cpu":
            continue
        free, name = memory.available(where), "" if where.type == "cpu" else " on the GPU"
        if free is None:
            return place, f"free memory{name} is unknown"
        if nbytes <= _SHARE * free:
            return place, "; ".join([*reasons, f"{size(nbytes)} is at most half of {size(free)} free{name}"])
        reasons.append(f"{size(nbytes)} is more than half of {size(free)} free{name}")
    return "disk", "; ".join(reasons)


def resolve(place: str, nbytes: int, device: torch.device, data: torch.device) -> str:
    """One of PLACES for a model on `device` and a graph on `data`; a ValueError where it is unknown or cannot be."""
    if place not in ("auto", *PLACES):
        raise ValueError(f"place={place!r} is unknown; choose one of auto, {', '.join(PLACES)}")
    if data.type != "cpu":  # then the ids of a batch's neighbours are there too, and reading them would stall
        if place not in ("auto", "device"):
            raise ValueError(f"place={place!r} needs the graph in RAM, the data is on {data}; give data.cpu()")
        return "device"
    return choose(nbytes, device)[0] if place == "auto" else place
