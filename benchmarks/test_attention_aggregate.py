"""attention_aggregate against the message passing of PyG's GATConv on the same scores, forward and backward.

With edge features: an epoch of training against the generic path, which runs PyG's code on the halo's decoded rows.

pytest benchmarks/test_attention_aggregate.py [-k small] [--device cuda] --rows rows.csv
"""

import copy

import pytest
import torch
import torch.nn.functional as nnf
from graphs import power_law_csr
from torch_geometric.data import Data
from torch_geometric.nn import GATConv, GATv2Conv
from torch_geometric.nn.models import GAT

import vqgnn
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


class GenericGAT(GATConv):
    """A class of its own, so that `convert` does not know it."""


class GenericGATv2(GATv2Conv):
    """The same of GATv2Conv."""


@pytest.mark.parametrize("v2", [False, True], ids=["gat", "gatv2"])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_epoch_with_edge_features(versus, no_default_device, request, size, v2):
    device = request.config.getoption("--device")
    num_nodes, num_edges, edge_dim = (2_000, 20_000, 8) if size == "small" else (20_000, 200_000, 8)
    edge_index = torch.randint(num_nodes, (2, num_edges))
    data = Data(x=torch.randn(num_nodes, 64), edge_index=edge_index, y=torch.randint(16, (num_nodes,)))
    data.edge_attr = torch.randn(num_edges, edge_dim)
    data = data.to(device)
    model = GAT(64, 128, 3, 16, heads=4, v2=v2, edge_dim=edge_dim).to(device)
    generic = copy.deepcopy(model)
    for conv in generic.convs:
        conv.__class__ = GenericGATv2 if v2 else GenericGAT

    def epoch(model):
        vqgnn.convert(model, data, method="vq")
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        loader = vqgnn.BatchLoader(data, batch_size=num_nodes // 10, seed=0, device=device)

        def call():
            for batch in loader:
                optimizer.zero_grad()
                nnf.cross_entropy(model(batch.x, batch.graph), batch.y).backward()
                optimizer.step()

        return call

    ours, peer = epoch(model), epoch(generic)
    assert [{path.path for path in vqgnn.paths(m)} for m in (model, generic)] == [{"fused"}, {"generic"}]
    exact = [vqgnn.inference.layerwise(m, data) for m in (model, generic)]
    torch.testing.assert_close(*exact, atol=1e-4, rtol=1e-4)
    label = f"n={num_nodes} e={num_edges} layers=3 heads=4 f=32 edge_dim={edge_dim} vq"
    versus(ours, {"generic": peer}, size=label, rounds=7)
