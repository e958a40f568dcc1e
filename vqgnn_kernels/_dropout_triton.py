"""`_dropout.py` inside a Triton kernel."""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


def dropout_arguments(dropout: float, seed: Tensor | None) -> dict[str, Any]:
    """The kernel arguments that `kept` needs, by name."""
    threshold = min(math.ceil(dropout * 2**32), 2**32 - 1)
    return {
        # the int32 of the same bits: one type of kernel argument for all values
        "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,
        # in memory: a CUDA graph can draw it anew, and no value of it compiles a kernel again
        "p_seed": seed,
        "kept_scale": 1 / (1 - dropout),
        "DROPOUT": dropout > 0,
    }


@triton.jit
def mix(z):
    """The 32-bit hash lowbias32."""
    z ^= z >> 16
    z *= 0x7FEB352D
    z ^= z >> 15
    z *= 0x846CA68B
    return z ^ (z >> 16)


@triton.jit
def chain(z, number):
    """The hash that goes on from hash z by a number."""
    return mix((z ^ number).to(tl.uint32))  # loop variables are plain ints in the interpreter


@triton.jit
def first_hash(seed):
    return mix(seed.to(tl.uint32))


@triton.jit
def kept(z, threshold, kept_scale):
    """0 or 1 / (1 - dropout), by hash z."""
    return tl.where(z >= threshold.to(tl.uint32, bitcast=True), kept_scale, 0.0)
