import pytest
import torch
from test_global_attention import problem as cpu_problem

from vqgnn_kernels import _tiles, global_attention
from vqgnn_kernels.global_attention import reference as truth
from vqgnn_kernels.global_attention import triton as kernels


def problem(device, *sizes):
    return [t.to(device) for t in cpu_problem(*sizes)]


def check(query, keys, values, counts, tolerance=1e-4):
    """Value and gradients against reference.py."""
    tensors = [t.detach().requires_grad_() for t in (query, keys, values)]
    out = global_attention(*tensors, counts)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, grad_out)
    scale = query.shape[2] ** -0.5
    want, lse = truth.global_attention(query, keys, values, counts, scale)
    want_grads = truth.global_attention_backward(grad_out, query, keys, values, counts, scale, want, lse)
    torch.testing.assert_close(out, want, atol=tolerance, rtol=tolerance)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want_grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("b", "H", "K", "F", "V"),
    [
        (70, 2, 130, 20, 33),
        (5, 1, 1, 1, 1),
        (0, 2, 5, 8, 8),
        (64, 1, 64, 16, 16),
        (33, 1, 40, 128, 70),
        (3, 1, 5, 3, 100),
    ],
    ids=lambda v: str(v),
)
def test_matches_reference(device, b, H, K, F, V):
    check(*problem(device, b, H, K, F, V))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    query, keys, values, counts = problem(device, 40, 2, 70, 24, 24)
    query = query.to(dtype)
    check(query, keys, values, counts, tolerance=2e-2)  # autocast: codewords stay fp32
    check(query, keys.to(dtype), values.to(dtype), counts, tolerance=2e-2)


def test_head_without_nodes_gives_zero(device):
    query, keys, values, counts = problem(device, 40, 3, 90, 8, 8)
    counts[1] = 0
    counts[2, :70] = 0  # a first block without nodes
    check(query, keys, values, counts)
    assert not global_attention(query, keys, values, counts)[:, 1].any()


def test_queries_in_parts(device, monkeypatch):
    name = "global_attention_bwd_codewords_kernel"
    monkeypatch.setattr(kernels, "PART", 32)
    monkeypatch.setitem(_tiles.TILES, name, (_tiles.Tile({"BLOCK_B": 16, "BLOCK_K": 32}),))
    check(*problem(device, 75, 1, 40, 8, 8))


def test_tables_that_are_not_contiguous(device):
    query, keys, values, counts = problem(device, 20, 2, 10, 8, 8)
    check(query, keys.mT.contiguous().mT, values.mT.contiguous().mT, counts)


def test_wide_heads_are_refused(device):
    with pytest.raises(ValueError, match="V = 129; on a GPU both are at most 128"):
        global_attention(*problem(device, 2, 1, 2, 8, 129))
