"""Learning the codewords: a batch's rows, their statistics by codeword and the EMA update (VQ-GNN, algorithm 2)."""

import torch
from torch import Tensor

from .._backend import implementation
from .._library import register
from .._types import FLOATS, check_tensor


def codebook_rows(
    x: Tensor,  # [b, f]
    g: Tensor | None,  # [b, m*e]
    branch_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [b, m*(d+e)], [m*(d+e)], [m*(d+e)]
    """What the branches of a product quantiser are given of a batch, and its moments, in one pass over x and g.

    With d = branch_dim, m = ceil(f / d) and w = d + e, columns j*w .. j*w + d - 1 of v are columns j*d .. j*d + d - 1
    of x (0 from f on), the e columns after them are columns j*e .. j*e + e - 1 of g: V = [X || G] of VQ-GNN, eq. 7.

    Args:
        x: [b, f] fp32, fp16 or bf16 node states.
        g: [b, m*e] fp32, fp16 or bf16, what is quantised together with them; None: nothing is, e = 0.
        branch_dim: d, channels a branch.

    Returns:
        v [b, m*w] fp32, and the mean and the variance (of b, not b - 1) of its columns, [m*w] fp32, 0 for b = 0. Not
        differentiable.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    if branch_dim < 1:
        raise ValueError(f"branch_dim={branch_dim} must be 1 or more")
    check_tensor("x", x, FLOATS, (None, None))
    m = -(-x.shape[1] // branch_dim)
    if not m:
        raise ValueError("x has no columns; it must be [b, f] with f of 1 or more")
    if g is not None:
        check_tensor("g", g, FLOATS, (x.shape[0], None))
        if g.shape[1] == 0 or g.shape[1] % m or g.device != x.device:
            raise ValueError(
                f"g must be [{x.shape[0]}, m*e] on {x.device} with m = {m} branches (of {branch_dim} of x's "
                f"{x.shape[1]} columns) and e of 1 or more, got {list(g.shape)} on {g.device}"
            )
        g = g.detach()
    return _codebook_rows(x.detach(), g, branch_dim)


def codebook_stats(
    v: Tensor,  # [b, m*dv]
    codes: Tensor,  # [b, m]
    num_codes: int,
    mean: Tensor | None = None,  # [m*dv]
    rstd: Tensor | None = None,  # [m*dv]
    *,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:  # [m, K], [m, K, dv]
    """Size and vector sum of every cluster of a batch.

    counts[j, k] = |{i: codes[i, j] = k}| and sums[j, k] = the sum of the whitened rows of these i, in branch j
    (R^T 1 and R^T V of lines 6 and 7 of algorithm 2, without a one-hot matrix).

    Args:
        v: [b, m*dv] fp32, fp16 or bf16 rows; branch j is columns j*dv to (j+1)*dv.
        codes: [b, m] assignment, uint8 for num_codes <= 256, else int16.
        num_codes: K, the codewords of a branch.
        mean, rstd: [m*dv] fp32; given both, rows are whitened, (v - mean) * rstd, on the fly.
        deterministic: add the rows of a codeword up in one fixed order on CUDA too, at the price of sorting the codes;
            None: as torch.use_deterministic_algorithms says. On the CPU the order is always fixed.

    Returns:
        counts [m, K] fp32 and sums [m, K, dv] fp32. Not differentiable.

    Raises:
        ValueError: wrong shape, dtype or device, or a code outside 0..num_codes-1. On CUDA such a code is left out
            instead: finding it would need a synchronisation.
    """
    dtype = code_dtype(num_codes)
    if codes.dim() != 2 or codes.shape[1] == 0 or codes.dtype != dtype:
        raise ValueError(
            f"codes must be [b, m] {dtype} for num_codes={num_codes}, got {list(codes.shape)} {codes.dtype}; "
            "pass the result of vq_assign"
        )
    m = codes.shape[1]
    if v.dim() != 2 or v.shape[0] != codes.shape[0] or v.shape[1] % m:
        raise ValueError(
            f"v must be [b, m*dv] with b, m = {codes.shape[0]}, {m} as in codes, got {list(v.shape)}; "
            "pass the rows that were assigned"
        )
    check_rows(v, v.shape[1], mean, rstd, codes.device)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return _codebook_stats(v.detach(), codes, num_codes, mean, rstd, deterministic)


def codebook_update(
    codebook: Tensor,  # [m, K, dv]
    ema_counts: Tensor,  # [m, K]
    ema_sums: Tensor,  # [m, K, dv]
    counts: Tensor,  # [m, K]
    sums: Tensor,  # [m, K, dv]
    decay: float,
    *,
    eps: float = 1e-5,
    v: Tensor | None = None,  # [b, m*dv]
    mean: Tensor | None = None,  # [m*dv]
    rstd: Tensor | None = None,  # [m*dv]
    revive_below: float = 0.0,
    seed: int = 0,
) -> Tensor:  # [m]
    """One EMA step of all codebooks of a layer, in place (lines 6 to 8 of algorithm 2, Laplace-smoothed).

    ema_counts = decay * ema_counts + (1 - decay) * counts, the same for ema_sums, then
    codebook[j, k] = ema_sums[j, k] / ((ema_counts[j, k] + eps) / (N + K * eps) * N), N = sum_k ema_counts[j, k].
    A codeword with ema_counts = 0 (nothing ever seen) stays where it is.

    Dead codes: given `v` and revive_below > 0, every code with ema_counts < revive_below (after the step) becomes the
    whitened branch slice of row r of v, with ema_counts = revive_below and ema_sums = codeword * revive_below, where
    r = z mod b and z is output number i = j*K + k of SplitMix64 seeded with `seed`, all modulo 2^64:
        z = seed + (i + 1) * 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z = z ^ (z >> 31)

    Args:
        codebook, ema_sums: [m, K, dv] fp32, contiguous, changed in place; codewords are in whitened space.
        ema_counts: [m, K] fp32, contiguous, changed in place.
        counts, sums: [m, K] and [m, K, dv] fp32 of the batch, from `codebook_stats` or `vq_assign_stats`.
        decay: gamma of the paper, in [0, 1]; 0 is a plain k-means step.
        eps: Laplace smoothing, >= 0.
        v: [b, m*dv] fp32, fp16 or bf16 rows to revive dead codes from.
        mean, rstd: [m*dv] fp32 whitening of v; both or neither.
        revive_below: size (in the units of ema_counts) under which a code is dead; 0 revives none.
        seed: any int64; take another one each step.

    Returns:
        [m] int64, the codes revived in each branch (0 everywhere for an empty v).

    Raises:
        ValueError: wrong shape, dtype, device, memory layout or range.
    """
    if codebook.dim() != 3 or 0 in codebook.shape:
        raise ValueError(f"codebook must be [m, K, dv] and not empty, got {list(codebook.shape)}")
    m, K, dv = codebook.shape
    state = {"codebook": (codebook, (m, K, dv)), "ema_counts": (ema_counts, (m, K)), "ema_sums": (ema_sums, (m, K, dv))}
    batch = {"counts": (counts, (m, K)), "sums": (sums, (m, K, dv))}
    for name, (tensor, shape) in {**state, **batch}.items():
        if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device != codebook.device:
            raise ValueError(
                f"{name} must be {list(shape)} torch.float32 on {codebook.device} (from the codebook's shape), "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    for name, (tensor, _) in state.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, it is changed in place; call .contiguous() where it is made")
    for name, value, most in (
        ("decay", decay, 1),
        ("eps", eps, float("inf")),
        ("revive_below", revive_below, float("inf")),
    ):
        if not 0 <= value <= most:
            raise ValueError(f"{name} must be in [0, {most}], got {value}")
    if v is not None:
        if v.dim() != 2 or v.shape[1] != m * dv:
            raise ValueError(f"v must be [b, {m * dv}] (m*dv of the codebook), got {list(v.shape)}")
        check_rows(v, m * dv, mean, rstd, codebook.device)
        v = v.detach()
    state = (codebook.detach(), ema_counts.detach(), ema_sums.detach())
    return _codebook_update(*state, counts, sums, decay, eps, v, mean, rstd, revive_below, seed)


def code_dtype(num_codes: int) -> torch.dtype:
    """Storage of codes: uint8 for up to 256 codewords a branch, int16 for up to 32768."""
    if not 1 <= num_codes <= 32768:
        raise ValueError(f"the number of codewords K must be in 1..32768, got {num_codes}")
    return torch.uint8 if num_codes <= 256 else torch.int16


def check_rows(v: Tensor, width: int, mean: Tensor | None, rstd: Tensor | None, device: torch.device) -> None:
    """ValueError unless v is floating point on `device` and its whitening is [width] fp32 there, or absent."""
    if not v.is_floating_point() or v.device != device:
        raise ValueError(f"v must be floating point on {device} like the other tensors, got {v.dtype} on {v.device}")
    if (mean is None) != (rstd is None):
        raise ValueError("mean and rstd must be given together (whitening) or not at all")
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        if tensor is None:
            continue
        if tensor.shape != (width,) or tensor.dtype != torch.float32 or tensor.device != device:
            raise ValueError(
                f"{name} must be [{width}] torch.float32 on {device}, one value a column of v, "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def _rows_implementation(x, g, branch_dim):
    return implementation(__name__, x, g).codebook_rows(x, g, branch_dim)


def _rows_fake(x, g, branch_dim):
    width = -(-x.shape[1] // branch_dim) * branch_dim + (0 if g is None else g.shape[1])
    empty = (x.new_empty(shape, dtype=torch.float32) for shape in ((x.shape[0], width), (width,), (width,)))
    return tuple(empty)


def _stats_implementation(v, codes, num_codes, mean, rstd, deterministic=False):
    return implementation(__name__, v, codes).codebook_stats(v, codes, num_codes, mean, rstd, deterministic)


def _stats_fake(v, codes, num_codes, mean, rstd, deterministic=False):
    m = codes.shape[1]
    counts = v.new_empty((m, num_codes), dtype=torch.float32)
    return counts, v.new_empty((m, num_codes, v.shape[1] // m), dtype=torch.float32)


def _update_implementation(codebook, ema_counts, ema_sums, counts, sums, decay, eps, v, mean, rstd, revive_below, seed):
    return implementation(__name__, codebook, v).codebook_update(
        codebook, ema_counts, ema_sums, counts, sums, decay, eps, v, mean, rstd, revive_below, seed
    )


def _update_fake(codebook, ema_counts, ema_sums, counts, sums, decay, eps, v, mean, rstd, revive_below, seed):
    return codebook.new_empty(codebook.shape[0], dtype=torch.int64)


_codebook_rows = register(
    "codebook_rows(Tensor x, Tensor? g, int branch_dim) -> (Tensor, Tensor, Tensor)",
    _rows_implementation,
    _rows_fake,
)
_codebook_stats = register(
    "codebook_stats(Tensor v, Tensor codes, int num_codes, Tensor? mean, Tensor? rstd, bool deterministic=False) "
    "-> (Tensor, Tensor)",
    _stats_implementation,
    _stats_fake,
)
_codebook_update = register(
    "codebook_update(Tensor(a!) codebook, Tensor(b!) ema_counts, Tensor(c!) ema_sums, Tensor counts, Tensor sums, "
    "float decay, float eps, Tensor? v, Tensor? mean, Tensor? rstd, float revive_below, int seed) -> Tensor",
    _update_implementation,
    _update_fake,
)
