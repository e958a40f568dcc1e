"""codebook_rows, codebook_stats and codebook_update, and assign + update of one layer, against torch and libraries.

The official VQ-GNN allocates an array of distances and a one-hot matrix a branch, so glibc's allocator weighs on it:
run with MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 too, which takes that away.

pytest benchmarks/test_codebook_update.py [-k small] [--device cuda] --rows rows.csv
"""

import pytest
import torch
from conftest import on_gpu

from vqgnn_kernels import codebook_rows, codebook_stats, codebook_update, vq_assign, vq_assign_stats

vector_quantize_pytorch = pytest.importorskip("vector_quantize_pytorch")

M, DV = 32, 8
SIZES = {"small": 2_000, "large": 60_000, "gpu": 85_000}  # rows of codebook_update's
DECAY, EPS = 0.99, 1e-5


def problem(b, K):
    """v [b, m*dv] and a fresh state: codebook, ema_counts, ema_sums."""
    torch.manual_seed(0)
    codebook = torch.randn(M, K, DV)
    return torch.randn(b, M * DV), (codebook, torch.ones(M, K), codebook.clone())


def branches(tensor):
    return tensor.view(len(tensor), M, DV).unbind(1)


def ema_(codebook, ema_counts, ema_sums, counts, sums):
    ema_counts.mul_(DECAY).add_(counts, alpha=1 - DECAY)
    ema_sums.mul_(DECAY).add_(sums, alpha=1 - DECAY)
    n = ema_counts.sum(-1, keepdim=True)
    smoothed = (ema_counts + EPS) / (n + ema_counts.shape[-1] * EPS) * n
    codebook.copy_(ema_sums / smoothed.unsqueeze(-1))


def one_hot_update(v, codes, state):
    """Lines 6 to 8 of algorithm 2 as the official VQ-GNN does them: a one-hot matrix a branch."""
    for x, code, *branch in zip(branches(v), codes.unbind(1), *state, strict=True):
        encodings = torch.zeros(len(x), len(branch[0])).scatter_(1, code.unsqueeze(1), 1)
        ema_(*branch, encodings.sum(0), encodings.T @ x)


def index_add_update(v, slots, state):
    m, K = state[1].shape
    sums = torch.zeros(m * K, DV).index_add_(0, slots, v.view(-1, DV))
    ema_(*state, torch.bincount(slots, minlength=m * K).view(m, K), sums.view(m, K, DV))


def official_step(v, state):
    """The official VQ-GNN's codebook update: a loop over branches with [b, K] distances and one-hot matrices."""
    for x, codebook, ema_counts, ema_sums in zip(branches(v), *state, strict=True):
        distance = x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * x @ codebook.T
        code = distance.argmin(1)
        encodings = torch.zeros(len(x), len(codebook)).scatter_(1, code.unsqueeze(1), 1)
        ema_(codebook, ema_counts, ema_sums, encodings.sum(0), encodings.T @ x)


def our_step(v, state):
    _, counts, sums = vq_assign_stats(v, state[0])
    codebook_update(*state, counts, sums, DECAY, eps=EPS)


def copy(state):
    return tuple(t.clone() for t in state)


@pytest.mark.parametrize("K", [256, 1024])
@pytest.mark.parametrize("size", SIZES)
def test_codebook_update(versus, size, K):
    b = SIZES[size]
    if size != "small" and (size == "gpu") != on_gpu():
        pytest.skip(f"{b} rows are for --device {'cpu' if on_gpu() else 'cuda'}")
    v, start = problem(b, K)
    codes = vq_assign(v, start[0])
    wide = codes.long()
    slots = (wide + K * torch.arange(M)).view(-1)

    def ours(state):
        codebook_update(*state, *codebook_stats(v, codes, K), DECAY, eps=EPS)

    state, by_one_hot, by_index_add = copy(start), copy(start), copy(start)
    ours(state)
    one_hot_update(v, wide, by_one_hot)
    index_add_update(v, slots, by_index_add)
    for mine, theirs, others in zip(state, by_one_hot, by_index_add, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine, others, rtol=1e-4, atol=1e-4)

    versus(
        lambda: ours(state),
        {
            "one_hot": lambda: one_hot_update(v, wide, by_one_hot),
            "index_add": lambda: index_add_update(v, slots, by_index_add),
        },
        size=f"b={b} m={M} K={K} dv={DV}",
        rounds=5,
        slow=() if on_gpu() else ("one_hot",),
        slow_rounds=2 if K == 256 else 1,
        memory=on_gpu(),
    )


@torch.no_grad()
@pytest.mark.parametrize("K", [256, 1024])
@pytest.mark.parametrize("b", [1_000, 17_000], ids=["small", "large"])
def test_assign_and_update_one_layer(versus, b, K):
    v, start = problem(b, K)
    modules = []
    for codewords in start[0]:
        module = vector_quantize_pytorch.VectorQuantize(
            DV, K, decay=DECAY, eps=EPS, use_cosine_sim=False, commitment_weight=0.0
        )
        module.train()._codebook.embed.copy_(codewords.unsqueeze(0))
        modules.append(module)

    def library_step():
        return [module(x.unsqueeze(0))[1] for x, module in zip(branches(v), modules, strict=True)]

    state, official = copy(start), copy(start)
    our_step(v, state)
    official_step(v, official)
    # a row half-way between two codewords, to fp32 rounding, may go either way and move these two
    assert ((state[0] - official[0]).abs() > 1e-4).float().mean() < 1e-3
    theirs = torch.cat(library_step()).T
    chosen = start[0][torch.arange(M), theirs] - v.view(b, M, DV)
    nearest = start[0][torch.arange(M), vq_assign(v, start[0]).long()] - v.view(b, M, DV)
    torch.testing.assert_close(chosen.square().sum(-1), nearest.square().sum(-1), rtol=1e-4, atol=1e-4)

    versus(
        lambda: our_step(v, state),
        {"official": lambda: official_step(v, official), "vector_quantize_pytorch": library_step},
        size=f"b={b} m={M} K={K} dv={DV}",
        rounds=3,
        slow=("official", "vector_quantize_pytorch"),
        slow_rounds=2 if K == 256 else 1,
    )


@pytest.mark.parametrize("b", [17_000, 170_000])
def test_rows_and_moments(versus, b):
    """128 channels and a coordinate of gradients a branch, with the moments that whitening needs."""
    x, g = torch.randn(b, 128), torch.randn(b, M)

    def by_torch():
        v = torch.empty(b, M, 5)
        v[..., :4], v[..., 4] = x.view(b, M, 4), g
        v = v.view(b, 5 * M)
        mean = v.mean(0)  # torch.var_mean over rows takes three times as long on the CPU
        return v, mean, (v - mean).square_().mean(0)

    for ours, theirs in zip(codebook_rows(x, g, 4), by_torch(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    versus(
        lambda: codebook_rows(x, g, 4),
        {"torch": by_torch},
        size=f"b={b} m={M} d=4 e=1",
        moved=2 * (x.nbytes + g.nbytes),
        memory=on_gpu(),
        rounds=9,
    )
