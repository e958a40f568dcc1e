"""hash_dropout's Triton kernel, compiled ahead of time."""

import pytest
import torch

from vqgnn_kernels import hash_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_step(dtype, compiled):
    x = torch.zeros(64, 128, dtype=dtype, requires_grad=True)
    compiled(f"{dtype}".removeprefix("torch."), lambda: hash_dropout(x, 0.5, 3).sum().backward())
