"""attention_aggregate's Triton kernels, compiled ahead of time: every tile, mode, codec and width of codes."""

import pytest
import torch

from vqgnn_kernels import CSR, Rows, attention_aggregate, code_scores

NODES = 64


def rows(codec, width, d=4, num_codes=256):
    if codec in ("pq8", "pq16"):
        codes = torch.zeros(NODES, -(-width // d), dtype=torch.uint8 if codec == "pq8" else torch.int16)
        return Rows("pq", codes, None, torch.zeros(codes.shape[1], num_codes, d))
    if codec in ("int8", "int4"):
        stored = width if codec == "int8" else (width + 1) // 2
        data = torch.zeros(NODES, stored, dtype=torch.uint8)
        return Rows(codec, data, torch.zeros(NODES, 2, dtype=torch.bfloat16))
    return Rows(codec, torch.zeros(NODES, width, dtype=torch.float16 if codec == "fp16" else torch.float32))


def step(mode, heads, features, table, grad_table, dtype, dropout, edge_dim=None):
    """Forward and backward of a batch of 32 rows with 32 halo entries and enough edges for two chunks."""
    r = h = 32
    rowptr, col, halo = torch.arange(r + 1) * 32, torch.zeros(32 * r, dtype=torch.int32), torch.arange(h)
    weight = matrix = None
    if edge_dim is not None:
        weight = torch.zeros(len(col), heads if mode == "additive" else edge_dim, requires_grad=mode == "additive")
        matrix = torch.zeros(edge_dim, heads, features, requires_grad=True) if mode == "gatv2" else None
    csr = CSR(rowptr, col, weight, halo)
    shape = (heads,) if mode == "additive" else (heads, features)
    x = torch.zeros(r, heads * features, dtype=dtype, requires_grad=True)
    query = torch.zeros(r + h, *shape, requires_grad=True)
    out, _ = attention_aggregate(
        x, csr, query, torch.zeros(r + h, heads) if mode == "additive" else None, heads=heads, mode=mode,
        rows=table, csr_t=csr, grad_rows=grad_table, halo_stats=torch.zeros(h, 2, heads) if grad_table else None,
        attention=torch.zeros(heads, features) if mode == "gatv2" else None, edge_matrix=matrix, dropout=dropout,
        seed=3,
    )  # fmt: skip
    out.sum().backward()


CASES = {  # the last of nine: edge_dim
    "gat-4x32-pq8": ("additive", 4, 32, rows("pq8", 128), rows("pq8", 128), torch.float32, 0.5),
    "gat-8x47-pq8": ("additive", 8, 47, rows("pq8", 376), None, torch.float32, 0.0),
    "gat-1x40-pq8": ("additive", 1, 40, rows("pq8", 40), rows("pq8", 40), torch.float32, 0.5),
    "gatv2-2x128-pq16": ("gatv2", 2, 128, rows("pq16", 256, 8, 1024), rows("fp16", 256), torch.bfloat16, 0.5),
    "gatv2-4x32-fp32": ("gatv2", 4, 32, rows("fp32", 128), rows("fp32", 128), torch.float32, 0.0),
    "dot-3x101-int4": ("dot", 3, 101, rows("int4", 303), rows("int4", 303), torch.float16, 0.0),
    "gatv2-2x512-int8": ("gatv2", 2, 512, rows("int8", 1024), rows("int8", 1024), torch.float32, 0.5),
    "gat-4x32-pq8-edges": ("additive", 4, 32, rows("pq8", 128), rows("pq8", 128), torch.float32, 0.5, 8),
    "gatv2-4x32-pq8-edges-1": ("gatv2", 4, 32, rows("pq8", 128), rows("pq8", 128), torch.float32, 0.5, 1),
    "gatv2-8x47-fp16-edges-5": ("gatv2", 8, 47, rows("fp16", 376), rows("fp16", 376), torch.float32, 0.0, 5),
    "gatv2-2x128-pq16-edges-16": (
        "gatv2",
        2,
        128,
        rows("pq16", 256, 8, 1024),
        rows("fp16", 256),
        torch.bfloat16,
        0.5,
        16,
    ),
    "gatv2-2x512-int8-edges-8": (
        "gatv2",
        2,
        512,
        rows("int8", 1024),
        rows("int8", 1024),
        torch.float32,
        0.5,
        8,
    ),
    "gatv2-1x2000-fp32-edges-8": ("gatv2", 1, 2000, rows("fp32", 2000), None, torch.float32, 0.0, 8),
    "dot-1x2000-fp16": ("dot", 1, 2000, rows("fp16", 2000), rows("fp16", 2000), torch.float32, 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_step(compiled, case):
    compiled(case, lambda: step(*CASES[case]))


@pytest.mark.parametrize("codec", ["pq8", "pq16"])
def test_code_scores(compiled, codec):
    table = rows(codec, 128, num_codes=256 if codec == "pq8" else 1024)
    compiled(f"scores-{codec}", lambda: code_scores(table, torch.arange(NODES), torch.zeros(32, 256, 8)))
