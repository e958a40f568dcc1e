"""The C++ back-end of hash_dropout: csrc/cpu/hash_dropout.cpp."""

import torch
from torch import Tensor

from .._backend import _C


def hash_dropout(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    values = x.float().contiguous()
    out = torch.empty_like(values)
    _C.hash_dropout(values.data_ptr(), *values.shape, dropout, int(seed) & 0xFFFFFFFF, out.data_ptr())
    return out.to(x.dtype)
