"""The slow obvious truth of vq_assign."""

import torch
from torch import Tensor

from ..codebook_update import code_dtype
from ..codebook_update.reference import codebook_stats, whiten


def vq_assign(
    v: Tensor,  # [b, m*dv]
    codebook: Tensor,  # [m, K, dv]
    mean: Tensor | None = None,  # [m*dv]
    rstd: Tensor | None = None,  # [m*dv]
) -> Tensor:  # [b, m]
    (b, _), (m, K, dv) = v.shape, codebook.shape
    codes = torch.empty(b, m, dtype=code_dtype(K), device=v.device)
    block = max(1, (1 << 20) // (K * dv))  # rows at a time: bounds the [rows, K, dv] differences
    for start in range(0, b, block):
        rows = whiten(v[start : start + block], mean, rstd).view(-1, m, 1, dv)
        for j in range(m):
            distance = (rows[:, j] - codebook[j]).square().sum(-1)  # [rows, K]
            codes[start : start + block, j] = distance.argmin(1)  # the first of equals
    return codes


def vq_assign_stats(
    v: Tensor,  # [b, m*dv]
    codebook: Tensor,  # [m, K, dv]
    mean: Tensor | None = None,  # [m*dv]
    rstd: Tensor | None = None,  # [m*dv]
    deterministic: bool = True,  # the sums always are
) -> tuple[Tensor, Tensor, Tensor]:  # [b, m], [m, K], [m, K, dv]
    codes = vq_assign(v, codebook, mean, rstd)
    return codes, *codebook_stats(v, codes, codebook.shape[1], mean, rstd)
