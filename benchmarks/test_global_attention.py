"""global_attention against torch's scaled_dot_product_attention with the logarithm of the counts for a bias."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vqgnn_kernels import global_attention


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("b", "H", "K", "F"), [(2_000, 4, 256, 32), (85_000, 4, 256, 32), (85_000, 4, 1024, 32)])
def test_global_attention(versus, request, b, H, K, F, backward):
    device = request.config.getoption("--device")
    torch.manual_seed(0)
    query = torch.randn(b, H, F, device=device, requires_grad=backward)
    tables = [torch.randn(H, K, F, device=device, requires_grad=backward) for _ in range(2)]
    counts = torch.randint(1, 500, (H, K), device=device).float()
    grad_out = torch.randn(b, H, F, device=device)
    leaves = [query, *tables]

    def torch_attention():
        bias = counts.log()[:, None].expand(H, b, K)
        return scaled_dot_product_attention(query.transpose(0, 1), *tables, attn_mask=bias).transpose(0, 1)

    def step(attention):
        out = attention()
        grads = torch.autograd.grad(out, leaves, grad_out) if backward else ()
        return out, *grads

    def ours():
        return step(lambda: global_attention(query, *tables, counts))

    def peer():
        return step(torch_attention)

    for mine, theirs in zip(ours(), peer(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    versus(ours, {"torch": peer}, size=f"b={b} H={H} K={K} F={F}", rounds=5, memory=True)
