"""The slow obvious truth of codebook_rows, codebook_stats and codebook_update."""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def whiten(v: Tensor, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
    """(v - mean) * rstd in fp32; v in fp32 where there is no whitening."""
    v = v.float()
    return v if mean is None else (v - mean) * rstd


def splitmix64(seed: int, index: int) -> int:
    """Output number `index` (from 0) of the SplitMix64 generator that starts at `seed`."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def codebook_rows(
    x: Tensor,  # [b, f]
    g: Tensor | None,  # [b, m*e]
    branch_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [b, m*(d+e)], [m*(d+e)], [m*(d+e)]
    (b, f), m = x.shape, -(-x.shape[1] // branch_dim)
    e = 0 if g is None else g.shape[1] // m
    v = torch.zeros(b, m, branch_dim + e, device=x.device)
    v[..., :branch_dim] = torch.nn.functional.pad(x.float(), (0, m * branch_dim - f)).view(b, m, branch_dim)
    if g is not None:
        v[..., branch_dim:] = g.view(b, m, e)
    v = v.view(b, m * (branch_dim + e))
    mean = v.double().sum(0) / max(b, 1)
    var = (v - mean).square().sum(0) / max(b, 1)
    return v, mean.float(), var.float()


def codebook_stats(
    v: Tensor,  # [b, m*dv]
    codes: Tensor,  # [b, m]
    num_codes: int,
    mean: Tensor | None = None,  # [m*dv]
    rstd: Tensor | None = None,  # [m*dv]
    deterministic: bool = True,  # on the CPU the sums always are
) -> tuple[Tensor, Tensor]:  # [m, K], [m, K, dv]
    (b, m), K = codes.shape, num_codes
    dv = v.shape[1] // m
    rows = whiten(v, mean, rstd).reshape(b * m, dv)
    codes = codes.long()  # first: uint8 wraps K = 256 to 0 in comparisons
    if b and (codes.min() < 0 or codes.max() >= K):
        raise ValueError(f"codes must be in 0..{K - 1}, got {int(codes.min())}..{int(codes.max())}")
    slot = (codes + K * torch.arange(m, device=codes.device)).view(-1)
    counts = torch.bincount(slot, minlength=m * K).float()
    sums = torch.zeros(m * K, dv, dtype=torch.float64, device=v.device).index_add_(0, slot, rows.double())
    return counts.view(m, K), sums.float().view(m, K, dv)


def codebook_update(
    codebook: Tensor,  # [m, K, dv]
    ema_counts: Tensor,  # [m, K]
    ema_sums: Tensor,  # [m, K, dv]
    counts: Tensor,  # [m, K]
    sums: Tensor,  # [m, K, dv]
    decay: float,
    eps: float,
    v: Tensor | None,  # [b, m*dv]
    mean: Tensor | None,  # [m*dv]
    rstd: Tensor | None,  # [m*dv]
    revive_below: float,
    seed: int,
) -> Tensor:  # [m]
    m, K, dv = codebook.shape
    ema_counts.mul_(decay).add_(counts, alpha=1 - decay)
    ema_sums.mul_(decay).add_(sums, alpha=1 - decay)
    total = ema_counts.sum(1, keepdim=True, dtype=torch.float64)
    scale = (total / (total + K * eps)).float()  # NaN where total and eps are 0: every code of the branch is unseen
    smoothed = (ema_counts + eps) * scale
    seen = (ema_counts > 0).unsqueeze(-1)
    codebook.copy_(torch.where(seen, ema_sums / smoothed.unsqueeze(-1), codebook))

    revived = torch.zeros(m, dtype=torch.int64, device=codebook.device)
    if v is None or revive_below <= 0 or v.shape[0] == 0:
        return revived
    for j, k in (ema_counts < revive_below).nonzero().tolist():
        row = splitmix64(seed, j * K + k) % v.shape[0]
        codebook[j, k] = whiten(v[row], mean, rstd).view(m, dv)[j]
        ema_counts[j, k] = revive_below
        ema_sums[j, k] = codebook[j, k] * revive_below
        revived[j] += 1
    return revived
