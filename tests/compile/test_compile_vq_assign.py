import pytest
import torch

from vqgnn_kernels import vq_assign, vq_assign_stats


def problem(b, m, K, dv, dtype):
    v, codebook = torch.zeros(b, m * dv, dtype=dtype), torch.zeros(m, K, dv)
    return v, codebook, torch.zeros(m * dv), torch.ones(m * dv)


@pytest.mark.parametrize(
    ("size", "dtype", "statistics"),
    [
        ((40000, 32, 1024, 8), torch.float32, False),
        ((40000, 32, 1024, 8), torch.float32, True),
        ((40000, 32, 256, 4), torch.bfloat16, True),
        ((1000, 16, 256, 8), torch.float32, True),
        ((1000, 32, 256, 5), torch.float32, True),
        ((1000, 43, 256, 3), torch.float16, False),
        ((1000, 8, 1024, 16), torch.float32, True),
        ((1000, 2, 256, 64), torch.float32, False),
        ((1, 1, 1, 1), torch.float32, True),  # Triton makes constants of ones
        ((1, 1, 1, 16), torch.float32, True),
    ],
    ids=str,
)
def test_vq_assign(compiled, size, dtype, statistics):
    v, codebook, mean, rstd = problem(*size, dtype)
    case = f"K={size[2]} dv={size[3]} {str(dtype).removeprefix('torch.')} b={size[0]}"
    if statistics:
        compiled(f"stats {case}", lambda: vq_assign_stats(v, codebook, mean, rstd, deterministic=False))
    else:
        compiled(f"codes {case}", lambda: vq_assign(v, codebook))
