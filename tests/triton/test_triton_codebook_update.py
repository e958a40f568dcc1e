import pytest
import torch
from test_codebook_update import PARTS, check_rows, check_update, parts, rows, state

from vqgnn_kernels import codebook_stats, codebook_update
from vqgnn_kernels.codebook_update import code_dtype, reference

# b, m, K, dv
SIZES = [(0, 2, 5, 8), (1, 3, 1, 8), (60, 2, 12, 8), (70, 1, 14, 4), (31, 3, 7, 3), (50, 2, 9, 19)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [*PARTS, (2100, 3, 4, 1)], ids=str)
def test_rows_agree_with_reference(size, dtype, device):
    check_rows(*parts(*size, device, dtype), size[2])


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "sorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stats_agree_with_reference(size, dtype, deterministic, device):
    v, codes, mean, rstd = rows(*size, device, dtype)
    whitening = (None, None) if dtype is torch.bfloat16 else (mean, rstd)
    counts, sums = codebook_stats(v, codes, size[2], *whitening, deterministic=deterministic)
    expected = reference.codebook_stats(v, codes, size[2], *whitening)
    assert torch.equal(counts, expected[0])
    torch.testing.assert_close(sums, expected[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("num_codes", "deterministic"), [(5, False), (5, True), (256, False), (257, False), (257, True)]
)
def test_stats_of_few_codewords_of_many(num_codes, deterministic, device):
    """The ends of the code dtypes; codes out of range are left out, where they fit in the dtype."""
    v = torch.randn(9, 4, device=device)
    codes = torch.tensor([0, num_codes - 1, 3, num_codes - 1, 0, 3, 3, 3, num_codes - 2], device=device)
    codes = codes.to(code_dtype(num_codes)).unsqueeze(1)
    expected = reference.codebook_stats(v[:7], codes[:7], num_codes)
    if num_codes == 256:  # no room for a code out of range
        v, codes = v[:7], codes[:7]
    else:
        codes[7:] = num_codes if num_codes < 256 else torch.tensor([[-1], [num_codes]])
    counts, sums = codebook_stats(v.half(), codes, num_codes, deterministic=deterministic)
    assert torch.equal(counts, expected[0])
    torch.testing.assert_close(sums, expected[1], rtol=1e-2, atol=1e-2)


def test_strided_rows(device):
    v, codes, mean, rstd = rows(30, 2, 5, 8, device)
    wide = torch.full((30, 35), torch.nan, device=device)
    wide[:, :32:2] = v
    for deterministic in (False, True):
        got = codebook_stats(wide[:, :32:2], codes, 5, mean, rstd, deterministic=deterministic)
        expected = reference.codebook_stats(v, codes, 5, mean, rstd)
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [*SIZES, (20, 2, 300, 2)], ids=str)
def test_update_agrees_with_reference(size, device):
    b, m, K, dv = size
    v, codes, mean, rstd = rows(*size, device)
    counts, sums = reference.codebook_stats(v, codes, K, mean, rstd)
    wide = torch.zeros(b, 2 * m * dv, device=device)
    wide[:, ::2] = v
    for options in (
        {"decay": 0.9, "eps": 1e-5},
        {"decay": 0.0, "eps": 0.0},
        {"decay": 1.0, "eps": 0.1},
        {"decay": 0.9, "eps": 1e-5, "v": v, "mean": mean, "rstd": rstd, "revive_below": 0.5, "seed": 11},
        {"decay": 0.9, "eps": 1e-5, "v": wide[:, ::2].half(), "revive_below": 0.5, "seed": -3},
        {"decay": 0.5, "eps": 1e-5, "v": wide[:, ::2], "revive_below": 2.0, "seed": 2**63 - 1},
    ):
        check_update(state(m, K, dv, device), counts, sums, options)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_nothing_seen_keeps_the_codewords(eps, device):
    codebook = torch.randn(2, 1, 8, device=device)
    before = codebook.clone()
    zeros = torch.zeros(2, 1, device=device), torch.zeros(2, 1, 8, device=device)
    codebook_update(codebook, zeros[0].clone(), zeros[1].clone(), *zeros, 0.99, eps=eps)
    assert torch.equal(codebook, before)


def test_revived_codewords_are_rows_bit_for_bit(device):
    m, K, dv = 2, 9, 4
    v, _, mean, rstd = rows(64, m, K, dv, device)
    zeros = torch.zeros(m, K, device=device), torch.zeros(m, K, dv, device=device)
    codebook, ema_counts, ema_sums = torch.zeros(m, K, dv, device=device), *(t.clone() for t in zeros)
    state = codebook, ema_counts, ema_sums
    revived = codebook_update(*state, *zeros, 0.99, v=v, mean=mean, rstd=rstd, revive_below=0.1, seed=5)
    whitened = reference.whiten(v, mean, rstd).view(64, m, dv)
    for i in range(m * K):
        row = reference.splitmix64(5, i) % 64
        assert torch.equal(codebook[i // K, i % K], whitened[row, i // K])
    assert revived.tolist() == [K, K] and (ema_counts == 0.1).all()
