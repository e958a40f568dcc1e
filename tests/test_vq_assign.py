import os
import subprocess
import sys

import pytest
import torch

from vqgnn_kernels import codebook_rows, codebook_stats, vq_assign, vq_assign_stats
from vqgnn_kernels.codebook_update.reference import whiten
from vqgnn_kernels.vq_assign import reference

# b, m, K, dv: tile edges, both code dtypes, every specialised dv and some that are not
SIZES = [
    (0, 2, 5, 8),
    (1, 3, 1, 8),
    (33, 1, 256, 8),
    (67, 5, 257, 4),
    (300, 2, 1024, 8),
    (41, 3, 7, 1),
    (129, 2, 30, 2),
    (70, 2, 99, 3),
    (65, 4, 13, 5),
    (95, 2, 64, 16),
    (31, 2, 11, 19),
]


def problem(b, m, K, dv, device, dtype=torch.float32):
    v = (torch.randn(b, m * dv, device=device) * 3 + 1).to(dtype)
    mean, rstd = torch.randn(m * dv, device=device), torch.rand(m * dv, device=device) + 0.1
    return v, torch.randn(m, K, dv, device=device), mean, rstd


def excess(v, codebook, mean, rstd, codes):
    """Distance to the chosen codeword minus distance to the nearest one, relative to the terms of the score."""
    m, _, dv = codebook.shape
    rows = whiten(v, mean, rstd).double().view(-1, m, 1, dv)
    distance = (rows - codebook.double()).square().sum(-1)  # [b, m, K]
    chosen = distance.gather(2, codes.long().unsqueeze(-1)).squeeze(-1)
    size = rows.square().sum(-1).squeeze(-1) + codebook.double().square().sum(-1).amax(1)
    return (chosen - distance.amin(2)) / size


@pytest.mark.parametrize("whitened", [False, True], ids=["plain", "whitened"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_reference(size, whitened, device):
    v, codebook, mean, rstd = problem(*size, device)
    if not whitened:
        mean = rstd = None
    codes = vq_assign(v, codebook, mean, rstd)
    expected = reference.vq_assign(v, codebook, mean, rstd)
    assert codes.shape == expected.shape and codes.dtype == expected.dtype
    gap = excess(v, codebook, mean, rstd, codes)
    assert (gap[codes == expected] <= 1e-6).all()
    assert (gap <= 1e-6).all()
    assert (codes != expected).float().mean() <= 0.01 or codes.numel() == 0


def check_ties(size, dtype, device):
    """Small integers have exact distances and many ties."""
    b, m, K, dv = size
    v = torch.randint(-2, 3, (b, m * dv), device=device).to(dtype)
    codebook = torch.randint(-2, 3, (m, K, dv), device=device).float()
    codebook[:, K // 2 :] = codebook[:, : K - K // 2]  # every codeword of the second half is a duplicate
    mean, rstd = torch.ones(m * dv, device=device), torch.full((m * dv,), 0.5, device=device)
    for whitening in ((None, None), (mean, rstd)):
        codes = vq_assign(v, codebook, *whitening)
        assert torch.equal(codes, reference.vq_assign(v, codebook, *whitening))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_small_integers_match_exactly_with_ties_to_the_lowest(size, dtype, device):
    check_ties(size, dtype, device)


def test_stats_are_those_of_the_codes(device):
    v, codebook, mean, rstd = problem(500, 6, 300, 8, device)
    codes, counts, sums = vq_assign_stats(v, codebook, mean, rstd)
    assert torch.equal(codes, vq_assign(v, codebook, mean, rstd))
    expected = codebook_stats(v, codes, 300, mean, rstd)
    assert torch.equal(counts, expected[0]) and torch.equal(sums, expected[1])


def test_strided_and_differentiable_rows(device):
    v, codebook, mean, rstd = problem(90, 4, 20, 8, device)
    expected = vq_assign(v, codebook, mean, rstd)
    strided = torch.full((90, 64), torch.nan, device=device)
    strided[:, ::2] = v
    codes, _, sums = vq_assign_stats(strided[:, ::2].requires_grad_(), codebook, mean, rstd)
    assert torch.equal(codes, expected) and not sums.requires_grad


def test_nan_and_infinite_rows_get_codes_in_range(device):
    v, codebook, mean, rstd = problem(64, 3, 10, 8, device)
    expected = vq_assign(v, codebook, mean, rstd)
    v[::4] = torch.nan
    v[1::4] = torch.inf
    v[2::4, 3] = -torch.inf
    codes = vq_assign(v, codebook, mean, rstd)
    assert codes.max() < 10
    assert torch.equal(codes[3::4], expected[3::4])


def test_thread_count_does_not_change_a_bit():
    v, codebook, mean, rstd = problem(5003, 5, 300, 8, "cpu")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(vq_assign_stats(v, codebook, mean, rstd))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_baseline_instruction_set_agrees(tmp_path):
    v, codebook, mean, rstd = problem(517, 3, 260, 8, "cpu")
    torch.save((v, codebook, mean, rstd), tmp_path / "problem.pt")
    script = (
        "import sys, torch, vqgnn_kernels as k; v, *rest = torch.load(sys.argv[1]);"
        "torch.save((k.backends()['cpp'], k.vq_assign_stats(v, *rest), k.codebook_rows(v, v[:, :3], 8)), sys.argv[2])"
    )
    files = [str(tmp_path / "problem.pt"), str(tmp_path / "result.pt")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, env={**os.environ, "VQGNN_ISA": "base"})
    state, (codes, counts, sums), parts = torch.load(files[1])
    if state.startswith("off"):
        pytest.skip(f"the C++ back-end is {state}")
    assert state == "used (base)"
    assert (excess(v, codebook, mean, rstd, codes) <= 1e-6).all()
    expected = codebook_stats(v, codes, 260, mean, rstd)
    assert torch.equal(counts, expected[0])
    torch.testing.assert_close(sums, expected[1])
    for got, want in zip(parts, codebook_rows(v, v[:, :3], 8), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_opcheck(device):
    for size in ((20, 2, 9, 3), (20, 2, 300, 8)):
        v, codebook, mean, rstd = problem(*size, device)
        for op in (torch.ops.vqgnn.vq_assign, torch.ops.vqgnn.vq_assign_stats):
            torch.library.opcheck(op, (v, codebook, mean, rstd))
            torch.library.opcheck(op, (v, codebook, None, None))


def test_compiles_as_one_graph(device):
    v, codebook, mean, rstd = problem(50, 2, 16, 4, device)
    compiled = torch.compile(
        lambda v: vq_assign_stats(v * 2, codebook, mean, rstd), fullgraph=True, backend="aot_eager"
    )
    for got, expected in zip(compiled(v), vq_assign_stats(v * 2, codebook, mean, rstd), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"v": a["v"][:, :-1]}, r"v must be \[b, m\*dv\] = \[b, 24\]"),
        (lambda a: {"v": a["v"].int()}, "v must be floating point"),
        (lambda a: {"v": a["v"][0]}, "v must be"),
        (lambda a: {"codebook": a["codebook"].double()}, r"codebook must be .* torch.float32"),
        (lambda a: {"codebook": a["codebook"][:, :0]}, "codebook must be .* not empty"),
        (lambda a: {"codebook": torch.zeros(3, 32769, 8)}, "must be in 1..32768, got 32769"),
        (lambda a: {"mean": None}, "mean and rstd must be given together"),
        (lambda a: {"rstd": a["rstd"][:-1]}, r"rstd must be \[24\]"),
        (lambda a: {"mean": a["mean"].half()}, "mean must be .* torch.float32"),
        (lambda a: {"v": a["v"].to("meta")}, "v must be floating point on cpu .* on meta"),
    ],
)
@pytest.mark.parametrize("function", [vq_assign, vq_assign_stats])
def test_errors_name_the_argument(function, change, message):
    arguments = dict(zip(("v", "codebook", "mean", "rstd"), problem(10, 3, 5, 8, "cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **change(arguments)})
