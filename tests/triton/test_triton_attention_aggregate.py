"""attention_aggregate's Triton kernels against reference.py."""

import pytest
import torch
from test_aggregate import random_rows as cpu_rows
from test_triton_aggregate import to

from vqgnn_kernels import CSR, _chunks, _tiles, attention_aggregate, code_scores
from vqgnn_kernels.attention_aggregate import reference as truth

TABLE = 20
OPTIONS = {"negative_slope": 0.2, "scale": 0.7}


def random_csr(num_rows, num_columns, num_halo, num_edges, device, halo=True):
    """Random edges, so with duplicates; rows beyond the first two thirds are empty."""
    row = torch.randint(max(1, -(-2 * num_rows // 3)), (num_edges,)).sort().values
    rowptr = torch.zeros(num_rows + 1, dtype=torch.int64)
    rowptr[1:] = torch.bincount(row, minlength=num_rows).cumsum(0)
    col = torch.randint(num_columns, (num_edges,), dtype=torch.int32)
    entries = torch.randint(TABLE, (num_halo,), device=device) if halo else None
    return CSR(rowptr.to(device), col.to(device), None, entries)


def random_rows(codec, width, device, **options):
    return to(device, cpu_rows(codec, TABLE, width, **options))


def check(
    device, mode, codec, features, *, heads=2, r=5, b=4, h=6, h_t=3, edges=20, dtype=torch.float32, dropout=0.0,
    grad_codec="fp16", halo=True, tolerance=1e-4, edge_dim=None, **table,
):  # fmt: skip
    """Values and every gradient against reference.py; csr and csr_t are unrelated: the kernels read one at a time."""
    w = heads * features
    if not halo:
        h = h_t = TABLE
    rows, grad_rows = random_rows(codec, w, device, **table), random_rows(grad_codec, heads * features, device)
    h, h_t = h if rows else 0, h_t if grad_rows else 0
    csr = random_csr(r, b + h + (3 if rows is None else 0), h, edges, device, halo)
    csr_t = random_csr(b, r + h_t + (3 if grad_rows is None else 0), h_t, edges, device, halo)
    shape = (heads,) if mode == "additive" else (heads, features)
    x = torch.randn(b, w, device=device).to(dtype).requires_grad_()
    query = torch.randn(r + h_t, *shape, device=device, requires_grad=True)
    key = torch.randn(b + h, heads, device=device, requires_grad=True) if mode == "additive" else None
    attention = torch.randn(heads, features, device=device, requires_grad=True) if mode == "gatv2" else None
    stats = torch.randn(h_t, 2, heads, device=device) + 3 if grad_rows else None
    matrix = None
    if edge_dim is not None:
        columns = heads if mode == "additive" else edge_dim
        csr, csr_t = (c._replace(weight=torch.randn(edges, columns, device=device)) for c in (csr, csr_t))
        if mode == "gatv2":
            matrix = torch.randn(edge_dim, heads, features, device=device, requires_grad=True)
    seed = torch.tensor(2**32 - 7, device=device)
    out, lse = attention_aggregate(
        x, csr, query, key, heads=heads, mode=mode, rows=rows, csr_t=csr_t, grad_rows=grad_rows,
        halo_stats=stats, attention=attention, edge_matrix=matrix, dropout=dropout, seed=seed, **OPTIONS,
    )  # fmt: skip
    options = (mode, heads, *OPTIONS.values(), dropout, seed)
    with torch.no_grad():
        want, want_lse = truth.forward(x, csr, rows, query, key, attention, matrix, *options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    near = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(out.detach(), want, **near)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)

    # csr_t's edges need a finite softmax; the backward is a function of any.
    lse = lse.nan_to_num(neginf=0.0) + 2
    grad_out = torch.randn_like(want)
    D = torch.randn_like(lse)
    from vqgnn_kernels.attention_aggregate import triton as kernels

    with torch.no_grad():
        for name, bundle in (
            ("backward_rows", (csr, rows)),
            ("backward_columns", (csr_t, grad_rows, stats)),
        ):
            args = (grad_out, D, lse, x, *bundle, query, key, attention, matrix, *options)
            for got, expected in zip(getattr(kernels, name)(*args), getattr(truth, name)(*args), strict=True):
                assert (got is None) == (expected is None)
                if got is not None:
                    torch.testing.assert_close(got, expected, **near, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "dropout"])
@pytest.mark.parametrize("mode", ["additive", "dot", "gatv2"])
def test_modes(device, mode, dropout):
    check(device, mode, "pq8", 8, dropout=dropout)


@pytest.mark.parametrize("codec", ["none", "pq8"])
@pytest.mark.parametrize("edge_dim", [1, 5, 9])  # 9: two programs share the gradient of the matrix
@pytest.mark.parametrize("mode", ["additive", "gatv2"])
def test_edge_features(device, mode, edge_dim, codec):
    check(device, mode, codec, 5, grad_codec=codec, edge_dim=edge_dim, dropout=0.3, tolerance=1e-3)


@pytest.mark.parametrize("features", [8, 5, 1])  # a head's columns begin at a codeword, inside one, inside a byte
@pytest.mark.parametrize("codec", ["none", "fp32", "fp16", "int8", "int4", "pq8", "pq16"])
def test_codecs(device, codec, features):
    check(device, "gatv2", codec, features, grad_codec=codec, r=3, b=3, edges=12)


@pytest.mark.parametrize("heads", [1, 3])  # of one, columns are read codeword by codeword
@pytest.mark.parametrize("codec", ["int4", "pq8"])
def test_odd_width(device, codec, heads):
    check(device, "dot", codec, 7, grad_codec=codec, heads=heads, d=3, num_codes=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    check(device, "gatv2", "pq8", 8, dtype=dtype, tolerance=2e-2)


def test_no_halo_map(device):
    check(device, "additive", "fp32", 4, halo=False)


@pytest.mark.parametrize("mode", ["additive", "dot", "gatv2"])
def test_split_rows(device, monkeypatch, mode):
    """Rows of some 10 edges: parts before and after their chunks, and chunks that two rows share."""
    monkeypatch.setattr(_chunks, "CHUNK", 4)
    edge_dim = None if mode == "dot" else 3
    check(device, mode, "pq8", 5, r=4, b=3, edges=30, dropout=0.2, tolerance=1e-3, edge_dim=edge_dim)


def test_row_longer_than_the_shipped_chunk(device, monkeypatch):
    for kernel in ("fwd", "bwd_rows", "bwd_columns"):
        tile = _tiles.Tile({"BLOCK_E": 128}, why="test")
        monkeypatch.setitem(_tiles.TILES, f"attention_aggregate_{kernel}_kernel", (tile,))
    check(device, "gatv2", "int8", 4, heads=1, r=1, b=1, edges=1100, grad_codec="int8", tolerance=1e-2)


def test_a_chunk_of_skipped_edges(device, monkeypatch):
    monkeypatch.setattr(_chunks, "CHUNK", 4)
    x, query = torch.randn(2, 4, device=device), torch.randn(2, 1, 4, device=device)
    rowptr = torch.tensor([0, 14, 30], device=device)
    col = torch.tensor([-1] * 8 + [0, 1, 0, 1, 1, 0] + [-1] * 16, dtype=torch.int32, device=device)
    got = attention_aggregate(x, CSR(rowptr, col), query, heads=1, mode="dot")
    good = CSR(torch.tensor([0, 6, 6], device=device), col[8:14])
    torch.testing.assert_close(got, attention_aggregate(x, good, query, heads=1, mode="dot"))


@pytest.mark.parametrize("features", [40, 70, 300])
def test_every_shipped_tile(device, features):
    check(device, "dot", "int8", features, heads=1, r=2, b=2, edges=21, tolerance=1e-3)


@pytest.mark.parametrize("features", [40, 300, 1100])
def test_every_shipped_tile_of_edge_features(device, features):
    check(device, "gatv2", "int8", features, heads=1, r=2, b=2, edges=21, edge_dim=3, tolerance=1e-2)


def test_partial_sums_of_attention(device, monkeypatch):
    from vqgnn_kernels.attention_aggregate import triton as kernels

    monkeypatch.setattr(kernels, "_ROWS_PER_PARTIAL", 2)
    check(device, "gatv2", "none", 4, r=5, b=3, edge_dim=3)


@pytest.mark.parametrize(("r", "b"), [(1, 1), (0, 3), (3, 0)], ids=str)
def test_small_shapes(device, r, b):
    for mode, edge_dim in (("additive", None), ("additive", 2), ("gatv2", 2)):
        check(device, mode, "fp32", 4, r=r, b=b, edges=0 if 0 in (r, b) else 5, edge_dim=edge_dim)


def test_gradients_reach_every_input(device, monkeypatch):
    """The public op's gradients are those of the reference back-end; the halo's keys and queries get zeros."""
    heads, features, b = 2, 4, 5
    csr = CSR(
        torch.tensor([0, 2, 4, 4, 5, 8], device=device),
        torch.tensor([0, 1, 1, 6, 2, 4, 5, 0], dtype=torch.int32, device=device),
        None,
        torch.tensor([3, 7], device=device),
    )
    csr_t = CSR(
        torch.tensor([0, 2, 4, 5, 5, 7], device=device),
        torch.tensor([0, 4, 0, 1, 3, 4, 5], dtype=torch.int32, device=device),
        None,
        torch.tensor([1], device=device),
    )
    rows, grad_rows = random_rows("pq8", 8, device), random_rows("fp32", 8, device)
    inputs = [torch.randn(b, 8, device=device), torch.randn(b + 1, heads, device=device)]
    inputs.append(torch.randn(b + 2, heads, device=device))
    stats, grad_out = torch.randn(1, 2, heads, device=device), torch.randn(b, heads, features, device=device)
    gradients = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("VQGNN_BACKEND", backend)
        x, query, key = (t.clone().requires_grad_() for t in inputs)
        out, _ = attention_aggregate(
            x, csr, query, key, heads=heads, mode="additive", rows=rows, csr_t=csr_t, grad_rows=grad_rows,
            halo_stats=stats, dropout=0.3, seed=1,
        )  # fmt: skip
        out.backward(grad_out)
        gradients.append((x.grad, query.grad, key.grad))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert not gradients[0][1][b:].any() and not gradients[0][2][b:].any()


def test_columns_out_of_range_are_skipped(device):
    """A CUDA launch cannot report them without a synchronisation; they must not be read."""
    x, query = torch.randn(2, 4, device=device), torch.randn(1, 1, 4, device=device)
    col = torch.tensor([0, -5, 1, 10**8, 3], dtype=torch.int32, device=device)  # 3: its halo entry has no row
    csr = CSR(torch.tensor([0, 5], device=device), col, None, torch.tensor([2, 10**9], device=device))
    good = CSR(torch.tensor([0, 2], device=device), torch.tensor([0, 1], dtype=torch.int32, device=device), None)
    args = {"heads": 1, "mode": "dot"}
    got = attention_aggregate(x, csr, query, rows=random_rows("fp32", 4, device), **args)
    torch.testing.assert_close(got, attention_aggregate(x, good, query, **args))


@pytest.mark.parametrize("codec", ["pq8", "pq16"])
def test_code_scores(device, codec):
    rows = random_rows(codec, 19, device)
    n_id = torch.randint(TABLE, (70,), device=device)
    table = torch.randn(5, 16, 3, device=device)
    torch.testing.assert_close(code_scores(rows, n_id, table), truth.code_scores(rows, n_id, table))


def test_tiles_have_reasons():
    assert all(tile.why for name in _tiles.TILES if name.startswith("attention") for tile in _tiles.TILES[name])
