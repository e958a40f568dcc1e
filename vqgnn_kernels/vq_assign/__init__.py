"""Nearest codewords of product vector quantisation (VQ-GNN, FindNearest of algorithm 2)."""

import torch
from torch import Tensor

from .._backend import implementation
from .._library import register
from ..codebook_update import check_rows, code_dtype


def vq_assign(
    v: Tensor,  # [b, m*dv]
    codebook: Tensor,  # [m, K, dv]
    mean: Tensor | None = None,  # [m*dv]
    rstd: Tensor | None = None,  # [m*dv]
) -> Tensor:  # [b, m]
    """Nearest codeword of every row in each of m branches (line 5 of algorithm 2, whitening fused).

    codes[i, j] = argmin_k |w[i, j*dv:(j+1)*dv] - codebook[j, k]|^2, w = (v - mean) * rstd; ties go to the lowest k.

    Args:
        v: [b, m*dv] fp32, fp16 or bf16 rows.
        codebook: [m, K, dv] fp32, in whitened space, 1 <= K <= 32768.
        mean, rstd: [m*dv] fp32, both or neither (no whitening).

    Returns:
        codes [b, m]: uint8 for K <= 256, else int16. A row with NaN gets some code in range. Not differentiable.
        Codewords are compared by |c|^2 / 2 - w.c: two whose squared distances differ by less than fp32's rounding of
        |c|^2 may be exchanged. Far from 0 that is much; take a mean off then.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    _check(v, codebook, mean, rstd)
    return _vq_assign(v.detach(), codebook.detach(), mean, rstd)


def vq_assign_stats(
    v: Tensor,  # [b, m*dv]
    codebook: Tensor,  # [m, K, dv]
    mean: Tensor | None = None,  # [m*dv]
    rstd: Tensor | None = None,  # [m*dv]
    *,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [b, m], [m, K], [m, K, dv]
    """`vq_assign` and the statistics of its clusters: (codes, counts, sums), all that `codebook_update` needs.

    Arguments and errors are those of `vq_assign`, `deterministic` is that of `codebook_stats`; counts [m, K] and
    sums [m, K, dv] fp32 are `codebook_stats` of codes. Where sums need not be deterministic, one kernel does all.
    """
    _check(v, codebook, mean, rstd)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return _vq_assign_stats(v.detach(), codebook.detach(), mean, rstd, deterministic)


def _check(v, codebook, mean, rstd):
    if codebook.dim() != 3 or 0 in codebook.shape or codebook.dtype != torch.float32:
        raise ValueError(
            f"codebook must be [m, K, dv] torch.float32 and not empty, got {list(codebook.shape)} {codebook.dtype}"
        )
    m, K, dv = codebook.shape
    code_dtype(K)
    if v.dim() != 2 or v.shape[1] != m * dv:
        raise ValueError(
            f"v must be [b, m*dv] = [b, {m * dv}] for a codebook of shape {[m, K, dv]}, got {list(v.shape)}; "
            "pad its columns or change dv"
        )
    check_rows(v, m * dv, mean, rstd, codebook.device)


def _assign_implementation(v, codebook, mean, rstd):
    return implementation(__name__, v, codebook).vq_assign(v, codebook, mean, rstd)


def _assign_fake(v, codebook, mean, rstd):
    return v.new_empty((v.shape[0], codebook.shape[0]), dtype=code_dtype(codebook.shape[1]))


def _stats_implementation(v, codebook, mean, rstd, deterministic=False):
    return implementation(__name__, v, codebook).vq_assign_stats(v, codebook, mean, rstd, deterministic)


def _stats_fake(v, codebook, mean, rstd, deterministic=False):
    codes = _assign_fake(v, codebook, mean, rstd)
    return codes, torch.empty_like(codebook[:, :, 0]), torch.empty_like(codebook)


_vq_assign = register(
    "vq_assign(Tensor v, Tensor codebook, Tensor? mean, Tensor? rstd) -> Tensor", _assign_implementation, _assign_fake
)
_vq_assign_stats = register(
    "vq_assign_stats(Tensor v, Tensor codebook, Tensor? mean, Tensor? rstd, bool deterministic=False) "
    "-> (Tensor, Tensor, Tensor)",
    _stats_implementation,
    _stats_fake,
)
