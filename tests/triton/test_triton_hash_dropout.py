"""hash_dropout's Triton kernel against reference.py."""

import pytest
import torch

from vqgnn_kernels import _tiles, hash_dropout
from vqgnn_kernels.hash_dropout import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3, 64), (1, 1), (40, 77), (0, 3)], ids=str)
def test_matches_reference(device, shape, dtype):
    x = torch.randn(shape).to(dtype)
    seed = torch.tensor(2**40 - 5)
    got = hash_dropout(x.to(device), 0.3, seed.to(device))
    torch.testing.assert_close(
        got.cpu(), reference.hash_dropout(x, 0.3, seed), atol=0, rtol=1e-2 if dtype != torch.float32 else 1e-6
    )


def test_gradient(device):
    x = torch.randn(9, 5, device=device, requires_grad=True)
    grad = torch.randn(9, 5, device=device)
    hash_dropout(x, 0.5, 3).backward(grad)
    torch.testing.assert_close(x.grad, grad * hash_dropout(torch.ones_like(grad), 0.5, 3))


def test_what_is_dropped_need_not_be_finite(device):
    dropped = hash_dropout(torch.ones(4, 40, device=device), 0.5, 9) == 0
    out = hash_dropout(torch.full((4, 40), torch.inf, device=device), 0.5, 9)
    assert torch.equal(out == 0, dropped) and out[~dropped].isinf().all()


def test_tiles_have_reasons():
    assert all(tile.why for tile in _tiles.TILES["hash_dropout_kernel"])
