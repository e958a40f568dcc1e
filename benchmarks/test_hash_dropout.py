"""Dropout of a layer against torch's, forward and backward; the mask is not stored.

pytest benchmarks/test_hash_dropout.py [--device cuda] --rows rows.csv
"""

import pytest
import torch
from conftest import on_gpu

from vqgnn_kernels import hash_dropout


@pytest.mark.parametrize("b", [17_000, 170_000])
def test_against_torch(versus, b):
    x, grad = torch.randn(b, 128, requires_grad=True), torch.randn(b, 128)

    def step(drop):
        return torch.autograd.grad(drop(x), x, grad)

    kept = (hash_dropout(x, 0.5, 1) != 0).float().mean().item()
    assert abs(kept - 0.5) < 0.01
    versus(
        lambda: step(lambda x: hash_dropout(x, 0.5, 1)),
        {"torch": lambda: step(lambda x: torch.nn.functional.dropout(x, 0.5))},
        size=f"b={b} f=128",
        memory=True,
        moved=4 * x.nbytes,
        rounds=9 if on_gpu() else 7,
    )
