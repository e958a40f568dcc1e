"""Dropout in plain torch: the truth that the kernels are tested against."""

import torch
from torch import Tensor

from .._dropout import kept


def hash_dropout(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    row, column = (torch.arange(size, device=x.device) for size in x.shape)
    mask = kept(dropout, seed, row[:, None], column)
    return torch.where(mask > 0, x.float() * mask, 0.0).to(x.dtype)  # not x * 0, which would keep an infinity
