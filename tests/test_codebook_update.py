from itertools import pairwise

import pytest
import torch

from vqgnn_kernels import codebook_rows, codebook_stats, codebook_update, vq_assign_stats
from vqgnn_kernels.codebook_update import code_dtype, reference

SIZES = [(0, 2, 5, 8), (1, 3, 1, 8), (600, 5, 256, 8), (700, 3, 257, 4), (301, 3, 7, 3), (99, 33, 4, 1), (50, 2, 9, 19)]


def rows(b, m, K, dv, device, dtype=torch.float32):
    """v, codes, mean, rstd"""
    v = (torch.randn(b, m * dv, device=device) * 3 + 1).to(dtype)
    codes = torch.randint(K, (b, m), device=device).to(code_dtype(K))
    return v, codes, torch.randn(m * dv, device=device), torch.rand(m * dv, device=device) + 0.1


def state(m, K, dv, device):
    """codebook, ema_counts, ema_sums: a codebook in the middle of training, some codes nearly dead or unseen."""
    counts = torch.rand(m, K, device=device) * 10
    counts[:, ::3] *= 1e-3
    counts[:, ::5] = 0
    codebook = torch.randn(m, K, dv, device=device)
    return codebook, counts, codebook * counts.unsqueeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stats_agree_with_reference(size, dtype, device):
    v, codes, mean, rstd = rows(*size, device, dtype)
    for whitening in ((None, None), (mean, rstd)):
        counts, sums = codebook_stats(v, codes, size[2], *whitening)
        expected = reference.codebook_stats(v, codes, size[2], *whitening)
        assert torch.equal(counts, expected[0])
        torch.testing.assert_close(sums, expected[1], rtol=1e-5, atol=1e-4)


# b, f, d, e
PARTS = [(0, 8, 4, 1), (1, 5, 4, 1), (200, 128, 4, 1), (130, 30, 4, 0), (64, 8, 2, 2), (65, 7, 3, 5), (33, 3, 16, 0)]


def parts(b, f, d, e, device, dtype=torch.float32):
    """x and g of other sizes than each other, far from 0 for their spread."""
    x = (torch.randn(b, f, device=device) * 3 + 50).to(dtype)
    g = (torch.randn(b, -(-f // d) * e, device=device) * 1e-4 + 1e-3).to(dtype) if e else None
    return x, g


def check_rows(x, g, d):
    """v is the reference's to the bit, and the moments are close."""
    v, mean, var = codebook_rows(x, g, d)
    expected = reference.codebook_rows(x, g, d)
    assert torch.equal(v, expected[0])
    torch.testing.assert_close(mean, expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(var, expected[2], rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", PARTS, ids=str)
def test_rows_agree_with_reference(size, dtype, device):
    check_rows(*parts(*size, device, dtype), size[2])


def test_rows_done_by_hand():
    x, g = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]]), torch.tensor([[7.0, 8.0], [9.0, 8.0]])
    v, mean, var = codebook_rows(x, g, 2)
    assert v.tolist() == [[1, 2, 7, 3, 0, 8], [3, 2, 9, 5, 0, 8]]
    assert mean.tolist() == [2, 2, 8, 4, 0, 8] and var.tolist() == [1, 0, 1, 1, 0, 0]


def test_rows_of_strided_parts(device):
    x, g = parts(70, 12, 4, 2, device)
    wide = torch.full((70, 24), torch.nan, device=device)
    wide[:, ::2] = x
    one = g[:1]
    for got, want in zip(
        codebook_rows(wide[:, ::2], one.expand(70, -1), 4), codebook_rows(x, one.repeat(70, 1), 4), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("x", "g", "d", "message"),
    [
        (torch.zeros(3, 8), None, 0, "branch_dim=0 must be 1 or more"),
        (torch.zeros(3), None, 4, "x "),
        (torch.zeros(3, 0), None, 4, "x has no columns"),
        (torch.zeros(3, 8).double(), None, 4, "x has dtype"),
        (torch.zeros(3, 8), torch.zeros(2, 2), 4, "g "),
        (torch.zeros(3, 8), torch.zeros(3, 3), 4, r"g must be \[3, m\*e\] on cpu with m = 2 branches"),
        (torch.zeros(3, 8), torch.zeros(3, 0), 4, "e of 1 or more"),
    ],
)
def test_rows_of_bad_parts(x, g, d, message):
    with pytest.raises(ValueError, match=message):
        codebook_rows(x, g, d)


def check_update(ours, counts, sums, options):
    """The update is the reference's, in place and in what it revives."""
    truth = [t.clone() for t in ours]
    revived = codebook_update(*ours, counts, sums, **options)
    defaults = {"v": None, "mean": None, "rstd": None, "revive_below": 0.0, "seed": 0}
    expected = reference.codebook_update(*truth, counts, sums, **{**defaults, **options})
    assert torch.equal(revived, expected) and revived.dtype == torch.int64
    for got, want in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_update_agrees_with_reference(size, device):
    _, m, K, dv = size
    v, codes, mean, rstd = rows(*size, device)
    counts, sums = codebook_stats(v, codes, K, mean, rstd)
    for options in (
        {"decay": 0.9, "eps": 1e-5},
        {"decay": 0.0, "eps": 0.0},
        {"decay": 1.0, "eps": 0.1},
        {"decay": 0.9, "eps": 1e-5, "v": v, "mean": mean, "rstd": rstd, "revive_below": 0.5, "seed": 11},
        {"decay": 0.9, "eps": 1e-5, "v": v, "mean": None, "rstd": None, "revive_below": 0.5, "seed": -3},
    ):
        check_update(state(m, K, dv, device), counts, sums, options)


def test_decay_zero_is_the_centroid_step(device):
    v, codes, _, _ = rows(200, 2, 12, 4, device)
    codes[codes == 7] = 6  # an empty cluster
    codebook, ema_counts, ema_sums = state(2, 12, 4, device)
    before = codebook.clone()
    codebook_update(codebook, ema_counts, ema_sums, *codebook_stats(v, codes, 12), 0.0, eps=0.0)
    for j in range(2):
        for k in range(12):
            members = v[codes[:, j] == k, j * 4 : j * 4 + 4]
            centroid = members.mean(0) if len(members) else before[j, k]
            torch.testing.assert_close(codebook[j, k], centroid)


def test_formula_on_numbers_done_by_hand():
    codebook, ema_counts, ema_sums = (
        torch.tensor([[[5.0], [5.0]]]),
        torch.tensor([[2.0, 0.0]]),
        torch.tensor([[[8.0], [0.0]]]),
    )
    codebook_update(
        codebook, ema_counts, ema_sums, torch.tensor([[4.0, 2.0]]), torch.tensor([[[8.0], [6.0]]]), 0.5, eps=1.0
    )
    assert ema_counts.tolist() == [[3.0, 1.0]] and ema_sums.tolist() == [[[8.0], [3.0]]]
    # N = 4, smoothed = (3 + 1, 1 + 1) / 6 * 4 = 8/3, 4/3
    torch.testing.assert_close(codebook, torch.tensor([[[3.0], [2.25]]]))


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_nothing_seen_keeps_the_codewords(eps, device):
    codebook = torch.randn(2, 1, 8, device=device)
    before = codebook.clone()
    zeros = torch.zeros(2, 1, device=device), torch.zeros(2, 1, 8, device=device)
    codebook_update(codebook, zeros[0].clone(), zeros[1].clone(), *zeros, 0.99, eps=eps)
    assert torch.equal(codebook, before)


def test_nothing_is_revived_without_rows(device):
    """Whatever the counts."""
    counts = torch.tensor([[-1.0, 3.0]], device=device)
    codebook = torch.zeros(1, 2, 2, device=device)
    codebook_update(codebook, counts.clone(), codebook.clone(), counts, codebook.clone(), 0.9)
    assert not codebook.any()


def test_splitmix64_gives_its_published_stream():
    # first outputs of the generator for seed 1234567
    assert [reference.splitmix64(1234567, i) for i in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_revival_takes_rows_of_the_batch_and_resets_the_state(device):
    m, K, dv = 3, 40, 4
    v, codes, mean, rstd = rows(64, m, K, dv, device)
    stats = codebook_stats(v, codes, K, mean, rstd)
    whitened = reference.whiten(v, mean, rstd).view(64, m, dv)

    def step(seed):
        tensors = state(m, K, dv, device)
        tensors[0].copy_(torch.arange(tensors[0].numel(), device=device).view_as(tensors[0]))
        tensors[1][:, 1] = 100.0  # alive
        tensors[1][:, 2] = 0.0  # dead whatever the batch says
        revived = codebook_update(*tensors, *stats, 0.999, v=v, mean=mean, rstd=rstd, revive_below=0.1, seed=seed)
        return *tensors, revived

    torch.manual_seed(3)
    codebook, ema_counts, ema_sums, revived = step(5)
    assert (ema_counts >= torch.tensor(0.1)).all() and (revived > 0).all() and (revived < K).all()
    for j in range(m):
        row = reference.splitmix64(5, j * K + 2) % 64
        assert torch.equal(codebook[j, 2], whitened[row, j])
        assert ema_counts[j, 2] == torch.tensor(0.1)
        torch.testing.assert_close(ema_sums[j, 2], codebook[j, 2] * 0.1)
        assert (codebook[j, 1] != whitened[:, j]).any(1).all()  # the living code is no copy of a row

    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(step(5), (codebook, ema_counts, ema_sums, revived), strict=True))
    torch.manual_seed(3)
    assert not torch.equal(step(6)[0], codebook)


def test_kmeans_error_falls(device):
    v = torch.randn(2000, 16, device=device)
    codebook = v[:32].view(32, 2, 8).transpose(0, 1).contiguous()
    ema_counts, ema_sums = torch.ones(2, 32, device=device), codebook.clone()
    errors = []
    for step in range(8):
        codes, counts, sums = vq_assign_stats(v, codebook)
        decoded = torch.stack([codebook[j][codes[:, j].long()] for j in range(2)], 1).view_as(v)
        errors.append((v - decoded).square().sum().item())
        codebook_update(codebook, ema_counts, ema_sums, counts, sums, 0.0, eps=0.0, v=v, revive_below=0.5, seed=step)
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_thread_count_does_not_change_a_bit():
    v, codes, mean, rstd = rows(5003, 7, 300, 8, "cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            tensors = state(7, 300, 8, "cpu")
            stats = codebook_stats(v, codes, 300, mean, rstd)
            revived = codebook_update(*tensors, *stats, 0.9, v=v, mean=mean, rstd=rstd, revive_below=1.0)
            results.append((*stats, *tensors, revived, *codebook_rows(v, v[:, :14], 8)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck(device):
    x, g = parts(30, 10, 4, 2, device)
    torch.library.opcheck(torch.ops.vqgnn.codebook_rows, (x, g, 4))
    torch.library.opcheck(torch.ops.vqgnn.codebook_rows, (x, None, 4))
    v, codes, mean, rstd = rows(30, 2, 9, 3, device)
    counts, sums = codebook_stats(v, codes, 9)
    torch.library.opcheck(torch.ops.vqgnn.codebook_stats, (v, codes, 9, mean, rstd))
    torch.library.opcheck(torch.ops.vqgnn.codebook_stats, (v, codes, 9, None, None))
    for options in ((None, None, None, 0.0, 0), (v, mean, rstd, 1.0, 7)):
        arguments = (*state(2, 9, 3, device), counts, sums, 0.9, 1e-5, *options)
        torch.library.opcheck(torch.ops.vqgnn.codebook_update, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"codes": a["codes"].short()}, "codes must be .* torch.uint8 for num_codes=9"),
        (lambda a: {"codes": a["codes"][:, 0]}, "codes must be"),
        (lambda a: {"codes": a["codes"] + 9}, r"codes must be in 0\.\.8, got"),
        (lambda a: {"v": a["v"][:-1]}, "v must be .* got"),
        (lambda a: {"v": a["v"][:, :-1]}, "v must be"),
        (lambda a: {"num_codes": 0}, r"must be in 1\.\.32768, got 0"),
        (lambda a: {"mean": a["rstd"]}, "mean and rstd must be given together"),
    ],
)
def test_stats_errors_name_the_argument(change, message):
    v, codes, _, rstd = rows(10, 3, 9, 8, "cpu")
    arguments = {"v": v, "codes": codes, "num_codes": 9, "rstd": None}
    with pytest.raises(ValueError, match=message):
        codebook_stats(**{**arguments, **change({**arguments, "rstd": rstd})})


def test_stats_refuse_negative_codes():
    v, codes, _, _ = rows(10, 3, 300, 8, "cpu")
    codes[4, 1] = -1
    with pytest.raises(ValueError, match=r"codes must be in 0\.\.299, got"):
        codebook_stats(v, codes, 300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"codebook": a["codebook"][0]}, "codebook must be"),
        (lambda a: {"codebook": a["codebook"].mT.contiguous().mT}, "codebook must be contiguous"),
        (lambda a: {"ema_counts": a["ema_counts"].double()}, "ema_counts must be .* torch.float64"),
        (lambda a: {"sums": a["sums"][:, :-1]}, "sums must be"),
        (lambda a: {"counts": a["counts"].to("meta")}, "counts must be .* on meta"),
        (lambda a: {"decay": 1.5}, r"decay must be in \[0, 1.*\], got 1.5"),
        (lambda a: {"decay": float("nan")}, "decay must be"),
        (lambda a: {"eps": -1.0}, "eps must be"),
        (lambda a: {"revive_below": -1.0}, "revive_below must be"),
        (lambda a: {"v": torch.zeros(5, 7)}, r"v must be \[b, 24\]"),
        (lambda a: {"v": torch.zeros(5, 24), "mean": torch.zeros(24)}, "mean and rstd must be given together"),
    ],
)
def test_update_errors_name_the_argument(change, message):
    codebook, ema_counts, ema_sums = state(3, 9, 8, "cpu")
    arguments = {"codebook": codebook, "ema_counts": ema_counts, "ema_sums": ema_sums, "decay": 0.9}
    arguments |= {"counts": torch.zeros(3, 9), "sums": torch.zeros(3, 9, 8)}
    with pytest.raises(ValueError, match=message):
        codebook_update(**{**arguments, **change(arguments)})
