import pytest
import torch
from test_vq_assign import check_ties, excess, problem

from vqgnn_kernels import _tiles, codebook_stats, vq_assign, vq_assign_stats
from vqgnn_kernels.vq_assign import reference

# b, m, K, dv: no row, one codeword, K no multiple of a block, both code dtypes, both kernels (FMA to dv = 8, then dot)
SIZES = [(0, 2, 5, 8), (1, 3, 1, 8), (33, 2, 37, 8), (21, 3, 7, 3), (17, 1, 258, 4), (19, 2, 70, 16), (70, 1, 9, 41)]


def check(codes, v, codebook, mean=None, rstd=None):
    """The codes are the reference's, but for codewords whose distances differ by less than the rounding of fp32."""
    expected = reference.vq_assign(v, codebook, mean, rstd)
    assert codes.shape == expected.shape and codes.dtype == expected.dtype
    assert (excess(v, codebook, mean, rstd, codes) <= 1e-6).all()
    assert (codes != expected).sum() <= 0.01 * codes.numel()


@pytest.fixture
def small_tiles(monkeypatch):
    """Several blocks of rows and of codewords where the problem is small."""
    monkeypatch.setitem(
        _tiles.TILES, "vq_assign_fwd_kernel", (_tiles.Tile({"BLOCK_B": 32, "BLOCK_K": 2}, num_warps=1),)
    )
    tile = _tiles.Tile({"BLOCK_B": 32, "BLOCK_K": 16, "BLOCK_D": 16})
    monkeypatch.setitem(_tiles.TILES, "vq_assign_dot_fwd_kernel", (tile,))


@pytest.mark.parametrize("whitened", [False, True], ids=["plain", "whitened"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_reference(size, whitened, device):
    v, codebook, mean, rstd = problem(*size, device)
    whitening = (mean, rstd) if whitened else (None, None)
    check(vq_assign(v, codebook, *whitening), v, codebook, *whitening)


@pytest.mark.parametrize("size", SIZES[:4] + SIZES[5:], ids=str)
def test_several_blocks(size, device, small_tiles):
    v, codebook, mean, rstd = problem(*size, device)
    check(vq_assign(v, codebook, mean, rstd), v, codebook, mean, rstd)


def test_tile_of_many_rows(device, monkeypatch):
    large = _tiles.pick("vq_assign_fwd_kernel", {"rows": 1 << 22, "K": 9, "dv": 4})
    assert large.blocks["BLOCK_B"] > 1000
    monkeypatch.setitem(_tiles.TILES, "vq_assign_fwd_kernel", (large._replace(when=lambda sizes: True),))
    v, codebook, mean, rstd = problem(1500, 1, 9, 4, device)
    check(vq_assign(v, codebook, mean, rstd), v, codebook, mean, rstd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(33, 1, 18, 8), (21, 2, 7, 3), (19, 2, 40, 16)], ids=str)
def test_small_integers_match_exactly_with_ties_to_the_lowest(size, dtype, device, small_tiles):
    check_ties(size, dtype, device)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("size", [(0, 2, 5, 8), (35, 2, 9, 8), (21, 1, 7, 3), (39, 1, 20, 16)], ids=str)
def test_stats_are_those_of_the_codes(size, deterministic, device, small_tiles):
    v, codebook, mean, rstd = problem(*size, device)
    K = size[2]
    codes, counts, sums = vq_assign_stats(v, codebook, mean, rstd, deterministic=deterministic)
    assert torch.equal(codes, vq_assign(v, codebook, mean, rstd))
    expected = codebook_stats(v.cpu(), codes.cpu(), K, mean.cpu(), rstd.cpu(), deterministic=True)
    assert torch.equal(counts.cpu(), expected[0])
    torch.testing.assert_close(sums.cpu(), expected[1], rtol=1e-5, atol=1e-5)


def test_deterministic_follows_torch(device, monkeypatch):
    v, codebook, _, _ = problem(40, 2, 5, 8, device)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    results = [vq_assign_stats(v, codebook, deterministic=choice) for choice in (None, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dv", [8, 16])
def test_strided_rows(dv, device, small_tiles):
    v, codebook, mean, rstd = problem(20, 2, 11, dv, device)
    expected = vq_assign_stats(v, codebook, mean, rstd, deterministic=True)
    wide = torch.full((20, 4 * dv + 3), torch.nan, device=device)
    wide[:, : 4 * dv : 2] = v
    strided = vq_assign_stats(wide[:, : 4 * dv : 2].requires_grad_(), codebook, mean, rstd, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(strided, expected, strict=True))
    mT = vq_assign(v.t().contiguous().t(), codebook.mT.contiguous().mT, mean, rstd)
    assert torch.equal(mT, expected[0])


@pytest.mark.parametrize("dv", [8, 16])
def test_nan_and_infinite_rows_get_codes_in_range(dv, device, small_tiles):
    v, codebook, mean, rstd = problem(24, 2, 10, dv, device)
    expected = vq_assign(v, codebook, mean, rstd)
    v[::4] = torch.nan
    v[1::4] = torch.inf
    v[2::4, 3] = -torch.inf
    codes = vq_assign(v, codebook, mean, rstd)
    assert codes.max() < 10
    assert torch.equal(codes[3::4], expected[3::4])
