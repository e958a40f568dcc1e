"""push_rows and pull_rows against torch's indexing: one batch of a 170k-node table.

pytest benchmarks/test_store_io.py --rows rows.csv
"""

import pytest
import torch

from vqgnn_kernels import Rows, pull_rows, push_rows
from vqgnn_kernels.store_io import reference

N, K_ROWS, F = 170_000, 60_000, 128


def table(codec):
    if codec == "pq":
        return Rows("pq", torch.randint(256, (N, 32)).to(torch.uint8), None, torch.randn(32, 256, 4))
    if codec in ("fp32", "fp16"):
        return Rows(codec, torch.randn(N, F).to(torch.float32 if codec == "fp32" else torch.float16))
    data = torch.zeros(N, F // 2 if codec == "int4" else F, dtype=torch.uint8)
    return Rows(codec, data, torch.zeros(N, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
def test_push(versus, codec):
    ours, theirs = table(codec), table(codec)
    n_id, x = torch.randperm(N)[:K_ROWS], torch.randn(K_ROWS, F)
    push_rows(ours, n_id, x)
    reference.push_rows(theirs, n_id, x)
    assert torch.equal(ours.data[n_id], theirs.data[n_id])
    peers = {"torch": lambda: reference.push_rows(theirs, n_id, x)}
    versus(lambda: push_rows(ours, n_id, x), peers, size=f"n={N} k={K_ROWS} f={F}", rounds=9)


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4", "pq"])
def test_pull(versus, codec):
    rows, n_id = table(codec), torch.randperm(N)[:K_ROWS]
    torch.testing.assert_close(pull_rows(rows, n_id, F), reference.pull_rows(rows, n_id, F))
    peers = {"torch": lambda: reference.pull_rows(rows, n_id, F)}
    versus(lambda: pull_rows(rows, n_id, F), peers, size=f"n={N} k={K_ROWS} f={F}", rounds=9)
