"""Dropout whose mask is a hash of what it drops: nothing is stored of it, and every back-end drops the same."""

import torch
from torch import Tensor


def check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must lie in [0, 1)")


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """As ops take it: int64 [], so that a compiled step or a CUDA graph can draw it anew."""
    return seed if isinstance(seed, Tensor) else torch.full((), seed & 0xFFFFFFFF, dtype=torch.int64, device=device)


def kept(dropout: float, seed: int | Tensor, *where: Tensor) -> Tensor:
    """0 or 1 / (1 - dropout), by the hash of (seed mod 2^32, *where); `where` are int64 and broadcast."""
    z = mix(torch.as_tensor(seed, device=where[0].device) & 0xFFFFFFFF)
    for number in where:
        z = mix(z ^ number)
    return (z.double() / 2**32 >= dropout).float() / (1 - dropout)


def mix(z: Tensor) -> Tensor:
    """The 32-bit hash lowbias32; z int64 in 0..2^32-1."""
    z = (z ^ (z >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    z = (z ^ (z >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return z ^ (z >> 16)
