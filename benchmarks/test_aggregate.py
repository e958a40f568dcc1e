"""aggregate against torch.sparse and gather-scatter: the whole graph from stored rows, and one training batch.

torch_csr is also what PyG's `spmm` runs on a torch matrix. gather_scatter is message passing over a list of edges, as
PyG does it with an edge_index: it makes an [edges, f] array.

pytest benchmarks/test_aggregate.py [-k small] [--device cuda] --rows rows.csv
"""

import functools
import warnings

import pytest
import torch
from conftest import on_gpu, report
from graphs import power_law_csr

from vqgnn_kernels import CSR, Rows, aggregate, csr_slice, csr_slice_values, pull_rows, push_rows

F = 128
# nodes, edges
SIZES = {"small": (170_000, 2_300_000), "large": (2_000_000, 25_000_000), "gpu": (2_000_000, 60_000_000)}


@functools.lru_cache(maxsize=1)
def graph(size):
    if size == "gpu" and not on_gpu():
        pytest.skip("60M edges are for --device cuda")
    num_nodes, num_edges = SIZES[size]
    rowptr, col, weight = power_law_csr(num_nodes, num_edges)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "sparse CSR is in beta"
        # 32-bit indices: torch's faster form
        matrix = torch.sparse_csr_tensor(rowptr.int(), col, weight, (num_nodes, num_nodes), check_invariants=False)
    return CSR(rowptr, col, weight, None), matrix


def code_rows(num_nodes, d, num_codes):
    codes = torch.randint(num_codes, (num_nodes, F // d), dtype=torch.int16)
    return Rows("pq", codes.to(torch.uint8) if num_codes <= 256 else codes, None, torch.randn(F // d, num_codes, d))


def rows_bytes(rows):
    return rows.data.nbytes + (0 if rows.scale is None else rows.scale.nbytes)


def check(ours, peer):
    """Sums of up to thousands of terms in different orders."""
    torch.testing.assert_close(ours(), peer(), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("num_codes", [256, 1024])
@pytest.mark.parametrize("d", [4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_codes(versus, request, size, d, num_codes):
    csr, matrix = graph(size)
    num_nodes = SIZES[size][0]
    rows, x = code_rows(num_nodes, d, num_codes), torch.empty(0, F)
    decoded = pull_rows(rows, None, F)
    peers = {"decode_then_torch_csr": lambda: matrix @ pull_rows(rows, None, F), "torch_csr": lambda: matrix @ decoded}
    if on_gpu() or size == "small":
        row = torch.arange(num_nodes).repeat_interleave(csr.rowptr.diff())

        def gather_scatter():
            message = decoded.index_select(0, csr.col).mul_(csr.weight[:, None])
            return torch.zeros_like(decoded).index_add_(0, row, message)

        peers["gather_scatter"] = gather_scatter

    def ours():
        return aggregate(x, csr, rows)

    for name in peers.keys() - {"decode_then_torch_csr"}:
        check(ours, peers[name])
    label = f"n={num_nodes} e={SIZES[size][1]} f={F} d={d} K={num_codes}"
    # every edge's column, weight and codes, and the result once
    moved = csr.col.numel() * (8 + rows.data.nbytes / num_nodes) + decoded.nbytes
    rounds, slow = 3 if size == "large" else 7, () if on_gpu() else ("gather_scatter",)
    versus(ours, peers, size=label, rounds=rounds, slow=slow, slow_rounds=3, memory=True, moved=moved)
    state = rows.data.nbytes + rows.codebook.nbytes
    row = {
        "benchmark": request.node.name,
        "size": label,
        "state_mb": state / 1e6,
        "dense_state_mb": decoded.nbytes / 1e6,
    }
    report(request.config, {"device": "memory", **row, "dense_over_ours": decoded.nbytes / state})


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("size", SIZES)
def test_rows(versus, size, codec):
    csr, matrix = graph(size)
    num_nodes = SIZES[size][0]
    x, dense = torch.empty(0, F), torch.randn(num_nodes, F)
    rows = Rows("fp32", dense)
    if codec != "fp32":
        width = F // 2 if codec == "int4" else F
        data = torch.empty(num_nodes, width, dtype=torch.float16 if codec == "fp16" else torch.uint8)
        rows = Rows(codec, data, torch.empty(num_nodes, 2, dtype=torch.bfloat16) if codec[0] == "i" else None)
        push_rows(rows, torch.arange(num_nodes), dense)
        dense = pull_rows(rows, None, F)

    def ours():
        return aggregate(x, csr, rows)

    def torch_csr():
        return matrix @ dense

    check(ours, torch_csr)
    label = f"n={num_nodes} e={SIZES[size][1]} f={F}"
    moved = csr.col.numel() * (8 + rows_bytes(rows) / num_nodes) + dense.nbytes
    rounds = 3 if size == "large" else 7
    versus(ours, {"torch_csr": torch_csr}, size=label, rounds=rounds, memory=True, moved=moved)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_batch(versus, dropout):
    """A random batch of 10 %: most columns are halo. The peer pulls the halo (and drops), joins it to x, multiplies."""
    csr, _ = graph("small")
    num_nodes = SIZES["small"][0]
    rows = code_rows(num_nodes, 4, 256)
    nodes = torch.randperm(num_nodes)[: num_nodes // 10]
    rowptr_b, col_b, halo = csr_slice(csr.rowptr, csr.col, nodes)
    batch = CSR(rowptr_b, col_b, csr_slice_values(csr.rowptr, nodes, rowptr_b, csr.weight), halo)
    x = torch.randn(nodes.numel(), F)
    shape = (nodes.numel(), nodes.numel() + halo.numel())
    matrix = torch.sparse_csr_tensor(rowptr_b.int(), col_b, batch.weight, shape, check_invariants=False)

    def ours(share=dropout):
        return aggregate(x, batch, rows, dropout=share, seed=1)

    def pull_then_torch_csr(share=dropout):
        return matrix @ torch.cat([x, torch.dropout(pull_rows(rows, halo, F), share, share > 0)])

    check(lambda: ours(0.0), lambda: pull_then_torch_csr(0.0))  # each drops by its own draw
    label = f"b={shape[0]} halo={halo.numel()} e={col_b.numel()} f={F} dropout={dropout}"
    versus(ours, {"pull_then_torch_csr": pull_then_torch_csr}, size=label, rounds=15, memory=True)
