import importlib

import pytest
import torch
from test_aggregate import CODECS, check_basis, random_csr, random_rows, to
from test_aggregate import check as cpu_check

from vqgnn_kernels import CSR, Rows, _chunks, _tiles, aggregate
from vqgnn_kernels.aggregate import _flat, reference

OTHER = dict(zip(CODECS, CODECS[1:] + CODECS[:1], strict=True))  # the backward's table has another codec


@pytest.fixture
def split(monkeypatch):
    """Sets the length from which on rows are split."""
    return lambda size: monkeypatch.setattr(_chunks, "CHUNK", size)


def use_tile(monkeypatch, **blocks):
    monkeypatch.setitem(_tiles.TILES, "aggregate_fwd_kernel", (_tiles.Tile(blocks, 1, 1, why="test"),))


def check(device, x, *matrices, **options):
    """Values and gradients against reference.py."""
    cpu_check(x.to(device), *(to(device, t) for t in matrices), **options)


@pytest.mark.parametrize("f", [1, 47, 130])
@pytest.mark.parametrize("codec", CODECS)
def test_matches_reference(codec, f, device):
    r, b, h, n = 17, 11, 30, 40
    csr = random_csr(r, b, h, table_rows=n, num_edges=150)
    csr_t = random_csr(b, r, 20, table_rows=n, num_edges=100)
    check(device, torch.randn(b, f), csr, random_rows(codec, n, f), csr_t, random_rows(OTHER[codec], n, f))


@pytest.mark.parametrize(("f", "d"), [(45, 3), (130, 4)])
@pytest.mark.parametrize("codec", CODECS)
def test_dropout_of_the_halo(codec, f, d, device):
    rows = random_rows(codec, 40, f, d=d)
    csr, csr_t = random_csr(17, 11, 30, table_rows=40, num_edges=150), random_csr(11, 17, 20, table_rows=40)
    other = random_rows(OTHER[codec], 40, f)
    check(device, torch.randn(11, f), csr, rows, csr_t, other, dropout=0.3, seed=2**40 + 7)


@pytest.mark.parametrize("d", [1, 3, 8, 64])
@pytest.mark.parametrize("codec", ["pq8", "pq16"])
def test_branch_widths(codec, d, device):
    rows = random_rows(codec, 30, 45, d=d, num_codes=256 if codec == "pq8" else 700)
    csr, csr_t = random_csr(8, 5, 25, table_rows=30), random_csr(5, 8, 25, table_rows=30)
    check(device, torch.randn(5, 45), csr, rows, csr_t, rows)


@pytest.mark.parametrize("d", [1, 2])
def test_gradients_in_a_basis(d, device):
    check_basis(d, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codebook_of_half_precision(dtype, device):
    """The public op takes fp32 codewords; the kernels take any."""
    kernels = importlib.import_module("vqgnn_kernels.aggregate.triton")
    csr, rows = to(device, random_csr(9, 5, 12)), to(device, random_rows("pq8", 12, 20))
    rows = rows._replace(codebook=rows.codebook.to(dtype))
    x = torch.randn(5, 20, device=device)
    want = reference.aggregate(x, csr, rows._replace(codebook=rows.codebook.float()))
    torch.testing.assert_close(kernels.aggregate(x, csr, rows), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("codec", ["none", "int4", "pq8"])
@pytest.mark.parametrize(
    ("r", "b", "h"), [(1, 1, 0), (1, 1, 3), (8, 0, 12), (8, 8, 0), (0, 4, 4), (3, 0, 0)], ids=lambda v: str(v)
)
def test_small_shapes(codec, r, b, h, device):
    rows = random_rows(codec, 12, 20)
    csr, csr_t = random_csr(r, b, h, table_rows=12), random_csr(b, r, h, table_rows=12)
    check(device, torch.randn(b, 20), csr, rows, csr_t, rows)


@pytest.mark.parametrize("codec", CODECS[1:])
def test_no_halo_map_no_weight_one_code(codec, device):
    rows = random_rows(codec, 20, 24, num_codes=1)
    csr, csr_t = random_csr(12, 6, 20, weighted=False), random_csr(6, 12, 20, weighted=False)
    check(device, torch.randn(6, 24), csr, rows, csr_t, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(dtype, device):
    rows = random_rows("pq8", 20, 24)
    csr, csr_t = random_csr(15, 10, 20), random_csr(10, 15, 20)
    check(device, torch.randn(10, 24).to(dtype), csr, rows, csr_t, rows, tolerance=2e-2)


def csr_of_degrees(degrees, num_columns):
    rowptr = torch.tensor([0, *degrees]).cumsum(0)
    num_edges = int(rowptr[-1])
    return CSR(rowptr, torch.randint(num_columns, (num_edges,), dtype=torch.int32), torch.randn(num_edges))


@pytest.mark.parametrize(
    "degrees",
    [
        (16,),  # exactly one chunk
        (0, 16, 16, 0, 0),  # chunks that begin and end with a row
        (5, 15, 40, 3),  # a head and a tail, and a row that crosses a cut without holding a chunk
        (1,) * 17,  # a chunk of many rows
        (3, 0, 0, 161, 0, 7, *(0,) * 33, 1),  # more chunks than a block of partial sums, more rows than a step probes
    ],
    ids=lambda degrees: f"{len(degrees)}rows{sum(degrees)}edges",
)
def test_split_rows(degrees, device, split, monkeypatch):
    split(16)
    use_tile(monkeypatch, BLOCK_E=8, BLOCK_F=16)
    rows = random_rows("pq8", 20, 20)
    csr, csr_t = csr_of_degrees(degrees, 25), csr_of_degrees((2, 33, 0, 0, 4), len(degrees) + 20)
    check(device, torch.randn(5, 20), csr, rows, csr_t, random_rows("int8", 20, 20), tolerance=1e-4)


def test_row_longer_than_the_shipped_split(device):
    rows = random_rows("int8", 20, 30)
    csr, csr_t = csr_of_degrees((3, 1200), 24), csr_of_degrees((1, 2, 0, 1), 22)
    check(device, torch.randn(4, 30), csr, rows, csr_t, rows, tolerance=1e-4)


def test_partial_sums_that_nobody_wrote_are_not_read(device, split, monkeypatch):
    split(16)
    use_tile(monkeypatch, BLOCK_E=32, BLOCK_F=16)
    csr = to(device, csr_of_degrees((10, 60, 3, 5, 2, 9, 30, 0, 16), 8))
    x = torch.randn(8, 10, device=device)
    want = reference.aggregate(x, csr)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    torch.testing.assert_close(aggregate(x, csr), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blocks", [{"BLOCK_E": 2, "BLOCK_F": 4}, {"BLOCK_E": 64, "BLOCK_F": 64}], ids=str)
@pytest.mark.parametrize("codec", ["int4", "pq8"])
def test_any_tile(codec, blocks, device, split, monkeypatch):
    split(16)
    use_tile(monkeypatch, **blocks)
    rows = random_rows(codec, 9, 9, d=8)
    csr, csr_t = csr_of_degrees((4, 37, 0, 1), 12), csr_of_degrees((2, 0, 5), 13)
    check(device, torch.randn(3, 9), csr, rows, csr_t, rows, tolerance=1e-4)


def test_entries_out_of_range_are_skipped(device):
    """No sync, so no report; but nothing outside the tensors is read."""
    col = torch.tensor([0, -1, 4, 5, 6, 7, 8, 100, 2**31 - 1, 1], dtype=torch.int32, device=device)
    halo = torch.tensor([2, -7, 6, 1], device=device)
    csr = CSR(torch.tensor([0, 9, 10], device=device), col, torch.ones(10, device=device), halo)
    x, rows = torch.randn(4, 6, device=device), Rows("fp32", torch.randn(6, 6, device=device))
    want = torch.stack([x[0] + rows.data[2] + rows.data[1], x[1]])  # columns 4 and 7; 5 and 6 point outside the table
    torch.testing.assert_close(aggregate(x, csr, rows), want)
    wild = csr._replace(rowptr=torch.tensor([-3, 1, 99], device=device))
    torch.testing.assert_close(aggregate(x, wild, rows)[0], x[0])


def test_codes_beyond_the_codebook_stay_in_it(device):
    for codec, code in (("pq8", 200), ("pq16", -1)):
        rows = to(device, random_rows(codec, 10, 12, num_codes=3))
        wild, last = (rows._replace(data=torch.full_like(rows.data, c)) for c in (code, 2))
        csr, x = to(device, random_csr(8, 0, 10)), torch.empty(0, 12, device=device)
        assert torch.equal(aggregate(x, csr, wild), aggregate(x, csr, last))


def test_infinite_weight_of_a_skipped_edge(device):
    csr = to(device, CSR(torch.tensor([0, 2]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1, torch.inf])))
    x = torch.randn(1, 3, device=device)
    assert torch.equal(aggregate(x, csr), x)


def test_non_contiguous_arguments(device):
    csr, rows = to(device, random_csr(10, 10, 30)), to(device, random_rows("pq8", 30, 24))
    strided = Rows("pq", rows.data.T.contiguous().T, None, rows.codebook.transpose(0, 1).contiguous().transpose(0, 1))
    x = torch.randn(24, 10, device=device).T
    torch.testing.assert_close(aggregate(x, csr, strided), reference.aggregate(x, csr, rows), atol=1e-5, rtol=1e-5)


def test_opcheck(device):
    rows, grad_rows = to(device, random_rows("pq8", 4, 6)), to(device, random_rows("int8", 4, 6))
    csr, csr_t = to(device, random_csr(3, 2, 4)), to(device, random_csr(2, 3, 4))
    x = torch.randn(2, 6, device=device, requires_grad=True)
    for rest in ((None, 0.0, None), (torch.randn(6, 6, device=device), 0.3, torch.tensor(5, device=device))):
        torch.library.opcheck(torch.ops.vqgnn.aggregate, (x, *_flat(csr, rows), *_flat(csr_t, grad_rows), *rest))
