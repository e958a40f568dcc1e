"""attention_aggregate against the message passing of PyG's GATConv on the same scores, forward and backward.

pytest benchmarks/test_attention_aggregate.py [-k small] [--device cuda] --rows rows.csv
"""

import pytest
import torch
from graphs import power_law_csr
from torch_geometric.nn import GATConv

from vqgnn_kernels import CSR, Rows
from vqgnn_kernels.attention_aggregate import attention_aggregate

HEADS, F = 4, 32
SIZES = {"small": (20_000, 250_000), "large": (170_000, 2_300_000)}


def transposed(rowptr, col, num_columns):
    row = torch.arange(rowptr.shape[0] - 1, dtype=torch.int32).repeat_interleave(rowptr.diff())
    order = col.argsort(stable=True)
    counts = torch.bincount(col, minlength=num_columns)
    return torch.cat([rowptr[:1], counts.cumsum(0)]), row[order]


def gat_conv(edge_index):
    """out of GATConv from given scores, without its linear layers."""
    conv = GATConv(F, F, heads=HEADS)

    def forward(x, key, query):
        alpha = conv.edge_updater(edge_index, alpha=(key, query), edge_attr=None, size=None)
        return conv.propagate(edge_index, x=(x, x), alpha=alpha, size=None)

    return forward


def timed(forward, leaves, grad):
    """A call of forward and backward; it returns out and the leaves' gradients."""

    def call():
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        out = forward(*inputs)
        out.backward(grad)
        return [out.detach(), *(leaf.grad for leaf in inputs)]

    return call


def check(ours, peer):
    """Sums of up to thousands of terms in different orders."""
    for mine, theirs in zip(ours(), peer(), strict=True):
        torch.testing.assert_close(mine.flatten(1), theirs.flatten(1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_whole_graph(versus, request, size):
    device = request.config.getoption("--device")
    num_nodes, num_edges = SIZES[size]
    rowptr, col, _ = power_law_csr(num_nodes, num_edges)
    row = torch.arange(num_nodes).repeat_interleave(rowptr.diff())
    edge_index = torch.stack([col.long(), row]).to(device)
    matrix = CSR(rowptr.to(device), col.to(device))
    matrix_t = CSR(*(t.to(device) for t in transposed(rowptr, col, num_nodes)))
    x = torch.randn(num_nodes, HEADS * F, device=device)
    key, query = torch.randn(2, num_nodes, HEADS, device=device)
    grad = torch.randn(num_nodes, HEADS, F, device=device)
    propagate = gat_conv(edge_index)

    def attend(x, key, query):
        return attention_aggregate(x, matrix, query, key, heads=HEADS, mode="additive", csr_t=matrix_t)[0]

    def pyg(x, key, query):
        return propagate(x.view(-1, HEADS, F), key, query)

    ours, gat = timed(attend, (x, key, query), grad), timed(pyg, (x, key, query), grad)
    check(ours, gat)
    label = f"n={num_nodes} e={num_edges} heads={HEADS} f={F}"
    versus(ours, {"pyg_gat_conv": gat}, size=label, rounds=7 if size == "small" else 3, memory=True)


@pytest.mark.parametrize("size", SIZES)
def test_halo_of_codes(versus, request, size):
    """Forward of a batch of 10 % over codes. The peer decodes the halo first, which is not counted."""
    device = request.config.getoption("--device")
    num_nodes, num_edges = SIZES[size]
    b = num_nodes // 10
    rowptr, col, _ = power_law_csr(num_nodes, num_edges)
    rowptr = rowptr[: b + 1]
    col = col[: int(rowptr[-1])]
    row = torch.arange(b).repeat_interleave(rowptr.diff())
    edge_index = torch.stack([col.long(), row]).to(device)
    codebook = torch.randn(HEADS * F // 4, 256, 4, device=device)
    codes = torch.randint(256, (num_nodes - b, HEADS * F // 4), device=device).to(torch.uint8)
    decoded = codebook[torch.arange(codes.shape[1], device=device), codes.long()].flatten(1)
    matrix, rows = CSR(rowptr.to(device), col.to(device)), Rows("pq", codes, None, codebook)
    x = torch.randn(b, HEADS * F, device=device)
    source = torch.cat([x, decoded]).view(-1, HEADS, F)
    key, query = torch.randn(2, num_nodes, HEADS, device=device)
    conv = GATConv(F, F, heads=HEADS)

    def ours():
        return [attention_aggregate(x, matrix, query[:b], key, heads=HEADS, mode="additive", rows=rows)[0]]

    def pyg_gat_conv():
        sizes = (num_nodes, b)
        alpha = conv.edge_updater(edge_index, alpha=(key, query[:b]), edge_attr=None, size=sizes)
        return [conv.propagate(edge_index, x=(source, source[:b]), alpha=alpha, size=sizes)]

    check(ours, pyg_gat_conv)
    label = f"b={b} n={num_nodes} e={col.numel()} heads={HEADS} f={F}"
    versus(ours, {"pyg_gat_conv": pyg_gat_conv}, size=label, rounds=15, memory=True)
