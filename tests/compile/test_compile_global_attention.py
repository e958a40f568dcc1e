import pytest
import torch

from vqgnn_kernels import global_attention


@pytest.mark.parametrize(
    ("F", "V", "dtype"),
    [(32, 32, torch.float32), (64, 64, torch.float32), (47, 64, torch.bfloat16),
     (128, 128, torch.float16), (128, 128, torch.float32)],
    ids=str,
)  # fmt: skip
def test_compile(compiled, F, V, dtype):
    def call():
        query = torch.randn(1000, 4, F).to(dtype).requires_grad_()
        keys, values = torch.randn(4, 256, F), torch.randn(4, 256, V)
        global_attention(query, keys, values, torch.ones(4, 256)).sum().backward()

    compiled(f"F={F} V={V} {str(dtype).removeprefix('torch.')}", call)
