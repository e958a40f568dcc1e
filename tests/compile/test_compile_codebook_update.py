import pytest
import torch

from vqgnn_kernels import codebook_rows, codebook_stats, codebook_update
from vqgnn_kernels.codebook_update import code_dtype


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((1000, 32, 1024, 8), torch.float32),
        ((1000, 32, 256, 5), torch.float32),
        ((1000, 43, 256, 3), torch.bfloat16),
        ((1000, 2, 256, 64), torch.float32),
        ((1, 1, 1, 1), torch.float32),  # Triton makes constants of ones
    ],
    ids=str,
)
def test_codebook_update(compiled, size, dtype):
    b, m, K, dv = size
    v, codes = torch.zeros(b, m * dv, dtype=dtype), torch.zeros(b, m, dtype=code_dtype(K))
    mean, rstd = torch.zeros(m * dv), torch.ones(m * dv)
    counts, sums = torch.zeros(m, K), torch.zeros(m, K, dv)
    state = torch.zeros(m, K, dv), counts.clone(), sums.clone()
    case = f"K={K} dv={dv} {str(dtype).removeprefix('torch.')}"
    compiled(f"stats atomic {case}", lambda: codebook_stats(v, codes, K, mean, rstd, deterministic=False))
    compiled(f"stats sorted {case}", lambda: codebook_stats(v, codes, K, mean, rstd, deterministic=True))
    revival = {"v": v, "mean": mean, "rstd": rstd, "revive_below": 0.1, "seed": b}
    compiled(f"update {case}", lambda: codebook_update(*state, counts, sums, 0.9, **revival))


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((1000, 128, 4, 1), torch.float32),
        ((1000, 128, 4, 0), torch.bfloat16),
        ((1000, 47, 8, 8), torch.float16),
        ((1, 1, 1, 1), torch.float32),
    ],
    ids=str,
)
def test_codebook_rows(compiled, size, dtype):
    b, f, d, e = size
    x, g = torch.zeros(b, f, dtype=dtype), torch.zeros(b, -(-f // d) * e, dtype=dtype) if e else None
    compiled(f"rows f={f} d={d} e={e} {str(dtype).removeprefix('torch.')}", lambda: codebook_rows(x, g, d))
