import os
import subprocess
import sys

import pytest
import torch
from marks import needs_cpp

from vqgnn_kernels import CSR, Rows, aggregate, push_rows
from vqgnn_kernels.aggregate import _flat
from vqgnn_kernels.aggregate import reference as truth
from vqgnn_kernels.store_io import reference as store

CODECS = ["none", "fp32", "fp16", "int8", "int4", "pq8", "pq16"]


def random_csr(num_rows, b, num_halo, *, num_edges=None, weighted=True, table_rows=None):
    """Random columns, so with empty rows and duplicate edges; the last row is always empty."""
    num_edges = 4 * num_rows if num_edges is None else num_edges
    if num_rows < 2 or b + num_halo == 0:
        num_edges = num_edges if num_rows == 1 and b + num_halo else 0
    row = torch.randint(max(1, num_rows - 1), (num_edges,)).sort().values
    rowptr = torch.zeros(num_rows + 1, dtype=torch.int64)
    rowptr[1:] = torch.bincount(row, minlength=num_rows).cumsum(0)[:num_rows]
    col = torch.randint(max(1, b + num_halo), (num_edges,), dtype=torch.int32)
    weight = torch.randn(num_edges) if weighted else None
    halo = torch.randint(table_rows, (num_halo,)) if table_rows else None
    return CSR(rowptr, col, weight, halo)


def random_rows(codec, num_rows, f, *, d=4, num_codes=16):
    if codec == "none":
        return None
    if codec in ("pq8", "pq16"):
        m = -(-f // d)
        dtype = torch.uint8 if codec == "pq8" else torch.int16
        codes = torch.randint(num_codes, (num_rows, m)).to(dtype)
        return Rows("pq", codes, None, torch.randn(m, num_codes, d))
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(codec, torch.uint8)
    width = (f + 1) // 2 if codec == "int4" else f
    scale = torch.zeros(num_rows, 2, dtype=torch.bfloat16) if codec in ("int8", "int4") else None
    rows = Rows(codec, torch.zeros(num_rows, width, dtype=dtype), scale)
    store.push_rows(rows, torch.arange(num_rows), torch.randn(num_rows, f))
    return rows


def dense(csr, num_columns):
    """[r, b + h], the matrix with its duplicate edges added up."""
    row = torch.repeat_interleave(torch.arange(csr.rowptr.shape[0] - 1), csr.rowptr.diff())
    weight = torch.ones(csr.col.shape[0]) if csr.weight is None else csr.weight
    out = torch.zeros(csr.rowptr.shape[0] - 1, num_columns)
    return out.index_put_((row, csr.col.long()), weight, accumulate=True)


def to(device, bundle):
    return bundle and type(bundle)(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in bundle))


def check(x, csr, rows, csr_t, grad_rows, tolerance=1e-5, dropout=0.0, seed=0):
    """Values and gradients against reference.py."""
    x = x.requires_grad_()
    out = aggregate(x, csr, rows, csr_t, grad_rows, dropout=dropout, seed=seed)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    with torch.no_grad():
        want = truth.aggregate(x, csr, rows, dropout, seed)
        want_grad = truth.aggregate(grad_out, csr_t, grad_rows)
    assert out.dtype == x.dtype and x.grad.dtype == x.dtype
    torch.testing.assert_close(out.detach(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(x.grad, want_grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("f", [1, 5, 64, 128, 130])
@pytest.mark.parametrize("codec", CODECS)
def test_matches_reference(codec, f):
    r, b, h, n = 75, 40, 90, 120  # a rectangular matrix, more than one chunk of rows
    csr = random_csr(r, b, h, table_rows=n, num_edges=600)
    csr_t = random_csr(b, r, 50, table_rows=n, num_edges=500)
    check(torch.randn(b, f), csr, random_rows(codec, n, f), csr_t, random_rows(codec, n, f))


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("f", [16, 47, 128])
@pytest.mark.parametrize("codec", ["pq8", "pq16"])
def test_branch_widths(codec, f, d):
    rows = random_rows(codec, 60, f, d=d, num_codes=256 if codec == "pq8" else 700)
    csr, csr_t = random_csr(30, 10, 25, table_rows=60), random_csr(10, 30, 25, table_rows=60)
    check(torch.randn(10, f), csr, rows, csr_t, rows)


def test_surplus_branches_are_ignored():
    rows = random_rows("pq8", 20, 64, d=8)
    check(torch.randn(5, 21), random_csr(9, 5, 20), rows, random_csr(5, 9, 20), rows)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("r", "b", "h"), [(1, 1, 0), (1, 1, 3), (8, 0, 12), (8, 8, 0), (0, 4, 4), (3, 0, 0)], ids=lambda v: str(v)
)
def test_small_shapes(codec, r, b, h):
    rows = random_rows(codec, 12, 20)
    csr, csr_t = random_csr(r, b, h, table_rows=12), random_csr(b, r, h, table_rows=12)
    check(torch.randn(b, 20), csr, rows, csr_t, rows)


@pytest.mark.parametrize("codec", CODECS[1:])
def test_no_halo_map_and_no_weight(codec):
    rows = random_rows(codec, 30, 24, num_codes=1)
    check(
        torch.randn(6, 24),
        random_csr(20, 6, 30, weighted=False),
        rows,
        random_csr(6, 20, 30, weighted=False),
        rows,
    )


@pytest.mark.parametrize(("f", "d"), [(5, 2), (47, 3), (130, 4), (128, 8)])
@pytest.mark.parametrize("codec", CODECS)
def test_dropout_of_the_halo(codec, f, d):
    rows = random_rows(codec, 40, f, d=d)
    csr, csr_t = random_csr(75, 40, 90, table_rows=40, num_edges=600), random_csr(40, 75, 50, table_rows=40)
    check(torch.randn(40, f), csr, rows, csr_t, random_rows(codec, 40, f, d=d), dropout=0.3, seed=2**40 + 7)


@pytest.mark.parametrize("codec", ["fp32", "int4", "pq8"])
def test_dropout_is_that_of_whole_halo_entries(codec):
    """By its definition: an entry's row is multiplied by one mask of mean 1, in-batch rows by none."""
    b, h, f = 3, 400, 64
    rows = random_rows(codec, h, f)
    identity = CSR(torch.arange(b + h + 1), torch.arange(b + h, dtype=torch.int32), None, torch.arange(h).flip(0))
    x, decoded = torch.randn(b, f), store.pull_rows(rows, identity.halo, f)
    out = aggregate(x, identity, rows, dropout=0.25, seed=3)
    torch.testing.assert_close(out[:b], x)
    kept = out[b:] != 0
    torch.testing.assert_close(out[b:], decoded / 0.75 * kept)
    assert abs(kept.float().mean() - 0.75) < 0.02
    units = kept.view(h, -1, 4 if codec == "pq8" else 1)
    assert (units.any(2) == units.all(2)).all() and 0.7 < units.any(2).float().mean() < 0.8
    assert not torch.equal(out, aggregate(x, identity, rows, dropout=0.25, seed=4))
    twice = CSR(torch.tensor([0, 2]), torch.tensor([b + 5, b + 5], dtype=torch.int32), None, identity.halo)
    torch.testing.assert_close(aggregate(x, twice, rows, dropout=0.25, seed=3)[0], 2 * out[b + 5])


@pytest.mark.parametrize("codec", CODECS)
def test_long_row_is_summed_in_pieces(codec):
    rows = random_rows(codec, 200, 40)
    csr = random_csr(3, 50, 200, num_edges=9001)
    check(torch.randn(50, 40), csr, rows, random_csr(50, 3, 200, num_edges=5000), rows, tolerance=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(dtype):
    rows = random_rows("pq8", 40, 24)
    csr, csr_t = random_csr(30, 20, 40), random_csr(20, 30, 40)
    check(torch.randn(20, 24).to(dtype), csr, rows, csr_t, rows, tolerance=2e-2)


@pytest.mark.parametrize("codec", CODECS)
def test_reference_is_the_dense_product(codec):
    b, h, n, f = 12, 30, 30, 10
    rows, csr = random_rows(codec, n, f), random_csr(25, b, h, table_rows=n)
    x = torch.randn(b, f)
    halo = torch.zeros(h, f) if rows is None else store.pull_rows(rows, csr.halo, f)
    want = dense(csr, b + h) @ torch.cat([x, halo])
    torch.testing.assert_close(truth.aggregate(x, csr, rows), want, atol=1e-5, rtol=1e-5)


def test_gradient_is_equation_7():
    """grad_x = C_BB^T G + C_HB^T G~, of a batch of a random weighted graph."""
    n, b, f = 30, 11, 8
    matrix = torch.randn(n, n) * (torch.rand(n, n) < 0.3)
    x, stored_x, stored_g = torch.randn(n, f), torch.randn(n, f), torch.randn(n, f)

    def batch_rows(dense_matrix):  # rows of the batch, columns: batch, then the table from row b on
        sparse = dense_matrix[:b].to_sparse_csr()
        halo = torch.arange(b, n)
        return CSR(sparse.crow_indices(), sparse.col_indices().int(), sparse.values(), halo)

    x_b = x[:b].clone().requires_grad_()
    out = aggregate(x_b, batch_rows(matrix), Rows("fp32", stored_x), batch_rows(matrix.T), Rows("fp32", stored_g))
    grad_out = torch.randn(b, f)
    out.backward(grad_out)
    torch.testing.assert_close(out.detach(), matrix[:b, :b] @ x[:b] + matrix[:b, b:] @ stored_x[b:])
    torch.testing.assert_close(x_b.grad, matrix[:b, :b].T @ grad_out + matrix[b:, :b].T @ stored_g[b:])


def check_basis(d, dtype, device="cpu"):
    """Coordinates in a basis are rows of gradients: as if these were stored."""
    n, f, r = 120, 24, 6
    csr = random_csr(75, 40, 90, table_rows=n, num_edges=600)
    csr_t = random_csr(40, 75, 50, table_rows=n, num_edges=500)
    rows, coordinates, basis = random_rows("pq8", n, f), random_rows("pq8", n, r, d=d), torch.randn(f, r)
    stored = Rows("fp32", store.pull_rows(coordinates, None, r) @ basis.T)
    x, grad_out = torch.randn(40, f).to(device, dtype), torch.randn(75, f).to(device, dtype)
    csr, rows, csr_t = (to(device, bundle) for bundle in (csr, rows, csr_t))
    grads = []
    for grad_rows, options in ((coordinates, {"grad_basis": basis.to(device)}), (stored, {})):
        leaf = x.clone().requires_grad_()
        out = aggregate(leaf, csr, rows, csr_t, to(device, grad_rows), **options)
        out.backward(grad_out)
        grads.append(leaf.grad)
    assert grads[0].dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(grads[0], grads[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 2])
def test_gradients_in_a_basis(d, dtype):
    check_basis(d, dtype)


def test_second_derivative_sees_the_matrix_alone():
    csr, csr_t = random_csr(9, 9, 0), random_csr(9, 9, 0)
    x = torch.randn(9, 4, requires_grad=True)
    grad_out = torch.randn(9, 4, requires_grad=True)
    (grad_x,) = torch.autograd.grad(aggregate(x, csr, None, csr_t), x, grad_out, create_graph=True)
    (second,) = torch.autograd.grad(grad_x, grad_out, torch.ones_like(x))
    torch.testing.assert_close(second, dense(csr, 9) @ torch.ones(9, 4))


def test_table_written_between_forward_and_backward_is_read_as_it_is_then():
    csr, csr_t = random_csr(20, 10, 15), random_csr(10, 20, 15)
    rows, grad_rows = random_rows("fp32", 15, 6), random_rows("fp32", 15, 6)
    x = torch.randn(10, 6, requires_grad=True)
    out = aggregate(x, csr, rows, csr_t, grad_rows)
    rows.data.zero_()
    push_rows(grad_rows, torch.arange(15), torch.randn(15, 6))
    out.sum().backward()
    torch.testing.assert_close(x.grad, truth.aggregate(torch.ones(20, 6), csr_t, grad_rows), atol=1e-5, rtol=1e-5)


@needs_cpp
@pytest.mark.parametrize("codec", CODECS)
def test_thread_count_does_not_change_a_bit(codec):
    rows, csr, x = random_rows(codec, 300, 37), random_csr(1000, 100, 300, num_edges=20_000), torch.randn(100, 37)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(aggregate(x, csr, rows))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_cpp
def test_codes_beyond_the_codebook_stay_in_it():
    for codec, dtype in (("pq8", torch.uint8), ("pq16", torch.int16)):
        rows = random_rows(codec, 10, 12, num_codes=3)
        wild = rows._replace(data=torch.full_like(rows.data, 200 if dtype == torch.uint8 else -1))
        last = rows._replace(data=torch.full_like(rows.data, 2))
        csr, x = random_csr(8, 0, 10), torch.empty(0, 12)
        assert torch.equal(aggregate(x, csr, wild), aggregate(x, csr, last))


def test_non_contiguous_arguments():
    csr, rows = random_csr(20, 10, 30), random_rows("pq8", 30, 24)
    strided = Rows("pq", rows.data.T.contiguous().T, None, rows.codebook.transpose(0, 1).contiguous().transpose(0, 1))
    x = torch.randn(24, 10).T
    torch.testing.assert_close(aggregate(x, csr, strided), truth.aggregate(x, csr, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("codec", ["none", "int8", "pq8"])
def test_opcheck(codec):
    rows = random_rows(codec, 30, 12)
    csr, csr_t = random_csr(20, 10, 30), random_csr(10, 20, 30)
    x = torch.randn(10, 12, requires_grad=True)
    for rest in ((None, 0.0, None), (None, 0.3, torch.tensor(5)), (torch.randn(12, 12), 0.0, None)):
        if rows is not None or rest[0] is None:
            torch.library.opcheck(torch.ops.vqgnn.aggregate, (x, *_flat(csr, rows), *_flat(csr_t, rows), *rest))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend):
    rows, grad_rows, basis = random_rows("pq8", 30, 12), random_rows("fp16", 30, 5), torch.randn(12, 5)
    csr, csr_t = random_csr(20, 10, 30), random_csr(10, 20, 30)
    weight = torch.randn(12, 12)

    def layer(x, csr, rows, csr_t, grad_rows):
        return aggregate(x @ weight, csr, rows, csr_t, grad_rows, grad_basis=basis).relu()

    x = torch.randn(10, 12)
    results = []
    for function in (layer, torch.compile(layer, backend=backend, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = function(leaf, csr, rows, csr_t, grad_rows)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@needs_cpp
def test_an_unknown_instruction_set_is_named():
    program = "import vqgnn_kernels as k; k.backends()"
    environment = {**os.environ, "VQGNN_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "ValueError: VQGNN_ISA='AVX2' is unknown; set it to base, avx2 or avx512" in result.stderr


@needs_cpp
def test_baseline_instructions_agree(tmp_path):
    """VQGNN_ISA is read once a process, so the baseline kernels run in another one."""
    cases = []
    for codec in CODECS:
        rows, csr, x = random_rows(codec, 50, 43), random_csr(80, 20, 50, num_edges=500), torch.randn(20, 43)
        cases.append((x, tuple(csr), None if rows is None else tuple(rows), aggregate(x, csr, rows)))
    torch.save(cases, tmp_path / "cases.pt")
    program = (
        "import sys, torch, vqgnn_kernels as k\n"
        "assert '(base)' in k.backends()['cpp'], k.backends()\n"
        "for x, csr, rows, want in torch.load(sys.argv[1]):\n"
        "    out = k.aggregate(x, k.CSR(*csr), rows and k.Rows(*rows))\n"
        "    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)\n"
    )
    environment = {**os.environ, "VQGNN_ISA": "base", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("VQGNN_BACKEND", None)
    command = [sys.executable, "-c", program, str(tmp_path / "cases.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def good_arguments():
    csr = random_csr(20, 10, 15, table_rows=30, num_edges=60)
    return {"x": torch.randn(10, 8), "csr": csr, "rows": random_rows("fp32", 30, 8)}


BAD = {
    "x has dtype": lambda a: a.update(x=a["x"].double()),
    "x has shape": lambda a: a.update(x=a["x"][0]),
    "csr.col has dtype": lambda a: a.update(csr=a["csr"]._replace(col=a["csr"].col.long())),
    "csr.rowptr has dtype": lambda a: a.update(csr=a["csr"]._replace(rowptr=a["csr"].rowptr.int())),
    "csr.weight has shape": lambda a: a.update(csr=a["csr"]._replace(weight=torch.ones(3))),
    "csr.halo has dtype": lambda a: a.update(csr=a["csr"]._replace(halo=a["csr"].halo.int())),
    "0 halo entries it must lie in": lambda a: a.update(csr=a["csr"]._replace(halo=a["csr"].halo[:0])),
    "csr.rowptr is empty": lambda a: a.update(csr=a["csr"]._replace(rowptr=a["csr"].rowptr[:0])),
    "rowptr must rise": lambda a: a["csr"].rowptr.__setitem__(3, 61),
    "rowptr must rise from 0 to the number of edges, 60": lambda a: a["csr"].rowptr.__setitem__(20, 61),
    "col spans [0-9]..25; with 10 rows": lambda a: a["csr"].col.__setitem__(59, 25),
    "col spans -1": lambda a: a["csr"].col.__setitem__(0, -1),
    "halo spans": lambda a: (a["csr"].col.__setitem__(0, 14), a["csr"].halo.__setitem__(4, 30)),
    "halo spans -7": lambda a: (a["csr"].col.__setitem__(0, 14), a["csr"].halo.__setitem__(4, -7)),
    "rows.codec is 'fp8'": lambda a: a.update(rows=a["rows"]._replace(codec="fp8")),
    "rows.data has dtype": lambda a: a.update(rows=a["rows"]._replace(codec="fp16")),
    "rows.data has 8 columns": lambda a: a.update(x=torch.randn(10, 9)),
    "rows.scale is None": lambda a: a.update(rows=random_rows("int8", 30, 8)._replace(scale=None)),
    "rows.codebook is None": lambda a: a.update(rows=random_rows("pq8", 30, 8)._replace(codebook=None)),
    "rows.codebook covers": lambda a: a.update(rows=random_rows("pq8", 30, 4)),
    "rows.codebook has K": lambda a: a.update(rows=random_rows("pq8", 30, 8)._replace(codebook=torch.randn(2, 257, 4))),
    "rows.codebook has 3 branches": lambda a: a.update(
        rows=random_rows("pq8", 30, 8)._replace(codebook=torch.randn(3, 16, 4))
    ),
    "csr_t is None": lambda a: a["x"].requires_grad_(),
    "csr_t has 7 rows": lambda a: a.update(csr_t=random_csr(7, 20, 0)),
    "grad_rows was given": lambda a: a.update(grad_rows=a["rows"]),
    "grad_basis was given": lambda a: a.update(csr_t=random_csr(10, 20, 0), grad_basis=torch.eye(8)),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_say_what_to_do(message):
    arguments = good_arguments()
    aggregate(**arguments)
    BAD[message](arguments)
    with pytest.raises(ValueError, match=message):
        aggregate(**arguments)


def test_no_transposed_matrix_is_needed_without_grad():
    arguments = good_arguments()
    arguments["x"].requires_grad_()
    with torch.no_grad():
        assert not aggregate(**arguments).requires_grad
