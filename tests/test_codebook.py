import copy
import math

import pytest
import torch

from vqgnn import Codebook

D = 4


def branches(t, m, d):
    """[b, f] -> [b, m, d], padded by zeros."""
    return torch.nn.functional.pad(t, (0, m * d - t.size(1))).view(t.size(0), m, d)


def decoded(codebook, codes, values):
    return torch.cat([values[j, codes[:, j].long()] for j in range(values.size(0))], 1)[:, : codebook.dim]


def splitmix64(seed, index):
    mask = 2**64 - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


class SlowCodebook:
    """Algorithm 2 with whitening, Laplace smoothing and revival, one branch and one codeword at a time, in float64."""

    def __init__(self, codebook: Codebook):
        self.like = codebook
        self.seed = codebook.seed
        self.updates = int(codebook.updates)
        for name in ("codewords", "ema_counts", "ema_sums", "mean", "var"):
            setattr(self, name, getattr(codebook, name).double())
        m, width = codebook.num_branches, codebook.width
        self.mean, self.var = self.mean.view(m, width), self.var.view(m, width)

    def update(self, x, g=None):
        like, gamma, beta = self.like, self.like.decay, self.like.whiten_decay
        m, k_all, d, b = like.num_branches, like.num_codes, like.branch_dim, x.size(0)
        v = branches(x.double(), m, d)
        if like.grad:
            v = torch.cat([v, branches(g.double(), m, d)], 2)
        codes = torch.empty(b, m, dtype=torch.int64)
        revived = set()
        for j in range(m):
            rows = v[:, j]
            self.mean[j] = beta * self.mean[j] + (1 - beta) * rows.mean(0)
            self.var[j] = beta * self.var[j] + (1 - beta) * rows.var(0, correction=0)
            std = self.var[j].sqrt()
            white = torch.where(std > 0, (rows - self.mean[j]) / std, 0.0)
            for i in range(b):
                codes[i, j] = min(range(k_all), key=lambda k: float((white[i] - self.codewords[j, k]).square().sum()))
            for k in range(k_all):
                mine = white[codes[:, j] == k]
                self.ema_counts[j, k] = gamma * self.ema_counts[j, k] + (1 - gamma) * len(mine)
                self.ema_sums[j, k] = gamma * self.ema_sums[j, k] + (1 - gamma) * mine.sum(0)
            total = self.ema_counts[j].sum()
            for k in range(k_all):
                if self.ema_counts[j, k] > 0:
                    size = (self.ema_counts[j, k] + 1e-5) / (total + k_all * 1e-5) * total
                    self.codewords[j, k] = self.ema_sums[j, k] / size
            alive = 0.01 * b / k_all
            for k in range(k_all):
                if self.ema_counts[j, k] < alive:
                    self.codewords[j, k] = white[splitmix64(self.seed + self.updates, j * k_all + k) % b]
                    self.ema_counts[j, k] = alive
                    self.ema_sums[j, k] = self.codewords[j, k] * alive
                    revived.add((j, k))
        self.updates += 1
        return codes, revived

    def values(self):
        return self.codewords * self.var.sqrt()[:, None] + self.mean[:, None]


@pytest.mark.parametrize("grad", [False, True], ids=["x", "x+g"])
@pytest.mark.parametrize(("dim", "d", "k"), [(8, 4, 5), (7, 4, 3), (5, 5, 9), (3, 1, 4), (6, 4, 1)])
def test_updates_follow_algorithm_2(dim, d, k, grad):
    codebook = Codebook(dim, d, k, grad, decay=0.8, whiten_decay=0.7, seed=11)
    scale = torch.rand(dim) * 5 + 0.1
    batch = lambda: (torch.randn(40, dim) * scale + 2, torch.randn(40, dim) * 1e-3 if grad else None)  # noqa: E731
    codebook.update(*batch())
    slow = SlowCodebook(codebook)
    for _ in range(5):
        x, g = batch()
        codes = codebook.update(x, g)
        expected, _ = slow.update(x, g)
        assert torch.equal(codes.long(), expected)
        for name in ("codewords", "ema_counts", "ema_sums"):
            torch.testing.assert_close(getattr(codebook, name), getattr(slow, name).float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(codebook.mean, slow.mean.flatten().float(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(codebook.var, slow.var.flatten().float(), atol=1e-9, rtol=1e-5)
        values = slow.values().float()
        torch.testing.assert_close(codebook.x_values, values[..., :d], atol=1e-4, rtol=1e-4)
        if grad:
            torch.testing.assert_close(codebook.g_values, values[..., d:], atol=1e-7, rtol=1e-4)
        else:
            assert codebook.g_values is None
    assert codebook.stats()["updates"] == 6


def test_few_coordinates_hold_gradients_of_low_rank():
    """The same bytes tell more of features and of gradients where these lie in a quarter as many directions."""
    errors = []
    span = torch.randn(8, 32)
    for grad_dim in (None, 1):
        torch.manual_seed(1)
        codebook = Codebook(32, 4, 64, grad_dim=grad_dim)
        assert codebook.g_values.shape == (8, 64, grad_dim or 4)
        for _ in range(20):
            x, g = torch.randn(2000, 32), torch.randn(2000, 8) @ span * 1e-4
            codebook.update(x)  # a batch without gradients between
            codebook.update(x, g)
        stats = codebook.stats()
        errors.append((stats["relative_error_x"], stats["relative_error_grad"]))
    (x_channels, g_channels), (x_few, g_few) = errors
    assert x_few < 0.9 * x_channels and g_few < 0.95 * g_channels


@pytest.mark.parametrize(("dim", "d", "e"), [(32, 4, 4), (8, 4, 4), (1, 8, 2), (3, 1, 1)])
def test_as_many_coordinates_as_channels_are_the_channels(dim, d, e):
    codebook = Codebook(dim, d, 8, grad_dim=e)
    assert codebook.basis is None and codebook.g_values.shape[2] == d
    assert Codebook(dim, d, 8, grad=False, grad_dim=e).width == d


def test_dead_codes_come_back_as_rows_of_the_batch():
    codebook = Codebook(D, D, 6, grad=True, decay=0.1, seed=3)
    codebook.update(torch.randn(300, D), torch.randn(300, D))
    slow = SlowCodebook(codebook)
    counts = []
    for step in range(4):  # two points only: four of the six codes die and are revived from the batch
        x = torch.tensor([[10.0] * D, [-10.0] * D]).repeat(150, 1) + 0.01 * torch.randn(300, D)
        g = torch.randn(300, D)
        before = codebook.codewords.clone()
        codebook.update(x, g)
        _, revived = slow.update(x, g)
        counts.append(len(revived))
        for j, k in revived:
            white = (torch.cat([x, g], 1) - codebook.mean) * codebook.var.rsqrt()
            assert (white - codebook.codewords[j, k]).abs().amax(1).min() < 1e-5, step
            assert not torch.equal(before[j, k], codebook.codewords[j, k])
            assert codebook.ema_counts[j, k] == pytest.approx(0.01 * 300 / 6)
    assert sum(counts) > 0
    torch.testing.assert_close(codebook.codewords, slow.codewords.float(), atol=1e-4, rtol=1e-4)


def test_the_first_batch_sets_whitening_and_codewords():
    centres = torch.randn(4, 2 * D) * 20 + 100
    label = torch.randint(4, (400,))
    x = centres[label] + 0.1 * torch.randn(400, 2 * D)
    codebook = Codebook(2 * D, D, 16, grad=False)
    assert not codebook.initialised
    codes = codebook.update(x)
    assert codebook.initialised
    torch.testing.assert_close(codebook.mean, x.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(codebook.var, x.var(0, correction=0), rtol=1e-4, atol=0)
    error = (decoded(codebook, codes, codebook.x_values) - x).norm() / (x - x.mean(0)).norm()
    assert error < 0.02  # 16 codes for 4 tight clusters


def test_first_codewords_beat_rows_drawn_at_random():
    x = torch.randn(2000, D)
    codebook = Codebook(D, D, 32, grad=False)
    codes = codebook.update(x)
    ours = (decoded(codebook, codes, codebook.x_values) - x).square().sum()
    drawn = torch.cdist(x, x[:32]).amin(1).square().sum()
    assert ours < 0.8 * drawn


def test_the_seed_decides_the_codewords():
    x = torch.randn(300, D)
    a, b, c = (Codebook(D, D, 16, grad=False, seed=seed) for seed in (1, 1, 2))
    state = torch.get_rng_state()
    assert torch.equal(a.update(x), b.update(x))
    c.update(x)
    assert torch.equal(a.codewords, b.codewords) and not torch.equal(a.codewords, c.codewords)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("grad", [False, True], ids=["x", "x+g"])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_no_more_rows_than_codes_is_exact(rows, grad):
    x, g = torch.randn(rows, 7) + 3, torch.randn(rows, 7) * 1e-4
    codebook = Codebook(7, 4, 16, grad)
    for _ in range(3):
        codes = codebook.update(x, g)
        torch.testing.assert_close(decoded(codebook, codes, codebook.x_values), x, atol=1e-4, rtol=1e-4)
        if grad:
            torch.testing.assert_close(decoded(codebook, codes, codebook.g_values), g, atol=1e-8, rtol=1e-4)


def test_constant_channels_decode_to_their_constant():
    x, g = torch.randn(50, 6), torch.zeros(50, 6)
    x[:, 1], x[:, 4] = 7.25, 0.0
    codebook = Codebook(6, 3, 8, grad=True)
    for _ in range(3):
        codes = codebook.update(x, g)
        out = decoded(codebook, codes, codebook.x_values)
        assert out.isfinite().all()
        assert torch.equal(out[:, [1, 4]], x[:, [1, 4]])
        assert torch.equal(decoded(codebook, codes, codebook.g_values), g)
    x[:, 1] = torch.randn(50)  # and comes alive
    for _ in range(60):
        codes = codebook.update(x, g)
    out = decoded(codebook, codes, codebook.x_values)
    assert (out[:, 1] - x[:, 1]).norm() < 0.8 * x[:, 1].norm()


def test_gradient_codewords_start_at_the_first_means():
    codebook = Codebook(2 * D, D, 8, grad=True)
    x = torch.randn(200, 2 * D)
    for _ in range(3):
        codebook.update(x)  # a warm-up knows no gradients
    assert not codebook.g_values.any()
    g = (torch.randn(200, 2 * D) + 1) * 1e-5
    codes = codebook.update(x, g).long()
    for j in range(2):
        for k in codes[:, j].unique():
            mine = codes[:, j] == k
            expected = g[mine, j * D : (j + 1) * D].mean(0)
            torch.testing.assert_close(codebook.g_values[j, k], expected, atol=1e-9, rtol=1e-3)


def test_updates_without_gradients_leave_gradient_codewords_alone():
    codebook = Codebook(2 * D, D, 8, grad=True)
    for _ in range(3):
        codebook.update(torch.randn(200, 2 * D), torch.randn(200, 2 * D) * 1e-3)
    before, stats = codebook.g_values.clone(), codebook.stats()
    for _ in range(5):
        x = torch.randn(200, 2 * D)
        expected = nearest_by_features(codebook, x, codebook.whiten_decay)
        assert torch.equal(codebook.update(x).long(), expected)
    assert torch.equal(codebook.g_values, before)
    assert codebook.stats()["relative_error_grad"] == stats["relative_error_grad"]
    codebook.update(torch.randn(200, 2 * D), torch.randn(200, 2 * D) * 1e-3)
    change = (codebook.g_values - before).norm() / before.norm()
    assert 0 < change < 0.5  # learning goes on from there


def nearest_by_features(codebook, x, beta=1.0):
    """Codes by the features' whitened codewords; beta < 1: after the whitening has seen x."""
    m, d = codebook.num_branches, codebook.branch_dim
    rows = branches(x.double(), m, d)
    mean, var = (t.double().view(m, -1)[:, :d] for t in (codebook.mean, codebook.var))
    mean = beta * mean + (1 - beta) * rows.mean(0)
    var = beta * var + (1 - beta) * rows.var(0, correction=0)
    white = torch.where(var > 0, (rows - mean) / var.sqrt(), 0.0)
    return torch.stack([torch.cdist(white[:, j], codebook.codewords[j, :, :d].double()).argmin(1) for j in range(m)], 1)


@pytest.mark.parametrize("grad", [False, True], ids=["x", "x+g"])
def test_assign_reads_features_and_changes_nothing(grad):
    codebook = Codebook(7, 4, 16, grad)
    codebook.update(torch.randn(200, 7), torch.randn(200, 7))
    before = copy.deepcopy(codebook.state_dict())
    x = torch.randn(50, 7)
    assert torch.equal(codebook.assign(x).long(), nearest_by_features(codebook, x))
    assert all(torch.equal(before[key], value) for key, value in codebook.state_dict().items())


@pytest.mark.parametrize("grad_dim", [None, 1])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_relative_errors_are_those_of_the_batch(offset, grad_dim):
    codebook = Codebook(10, 4, 16, grad=True, grad_dim=grad_dim)
    for _ in range(4):
        x, g = torch.randn(500, 10) + offset, torch.randn(500, 10) * 1e-6
        codes = codebook.update(x, g)
        stats = codebook.stats()
        g_read = decoded(codebook, codes, codebook.g_values)
        if grad_dim:
            g_read = g_read @ codebook.basis.vectors.T
        x_read = decoded(codebook, codes, codebook.x_values)
        for key, values, truth in (("relative_error_x", x_read, x), ("relative_error_grad", g_read, g)):
            expected = (values - truth).norm() / truth.norm()
            assert stats[key] == pytest.approx(float(expected), rel=2e-3), key


def test_perplexity_and_dead_codes():
    codebook = Codebook(2 * D, D, 4, grad=False)
    codebook.update(torch.randn(100, 2 * D))
    codebook.ema_counts.copy_(torch.tensor([[25.0, 25, 25, 25], [50, 50, 0, 0.1]]))
    share = [50 / 100.1, 50 / 100.1, 0.1 / 100.1]
    entropy = -sum(p * math.log(p) for p in share)
    assert codebook.stats()["perplexity"] == pytest.approx((4 + math.exp(entropy)) / 2, rel=1e-5)
    assert codebook.stats()["dead"] == pytest.approx(2 / 8)


def test_stats_before_the_first_batch():
    stats = Codebook(D, D, 4).stats()
    assert stats["updates"] == 0 and not stats["initialised"]
    assert all(math.isfinite(value) for value in stats.values())


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("grad", [False, True], ids=["x", "x+g"])
def test_a_loaded_codebook_goes_on_bit_for_bit(grad, after):
    batches = [(torch.randn(30, 7), torch.randn(30, 7) if i != 1 else None) for i in range(6)]
    straight = Codebook(7, 4, 12, grad, seed=2)
    resumed = Codebook(7, 4, 12, grad, seed=2)
    for batch in batches[:after]:
        straight.update(*batch)
    resumed.load_state_dict(straight.state_dict())
    assert resumed.initialised == (after > 0)
    for batch in batches[after:]:
        assert torch.equal(straight.update(*batch), resumed.update(*batch))
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_without_whitening_distances_are_those_of_the_channels():
    """A channel a thousand times the other decides alone; whitened, both count."""
    torch.manual_seed(0)
    x = torch.randn(400, 2) * torch.tensor([1000.0, 1.0])
    error = {}
    for whiten in (True, False):
        codebook = Codebook(2, branch_dim=2, num_codes=8, grad=False, whiten=whiten)
        codes = codebook.update(x)
        for _ in range(20):
            codes = codebook.update(x)
        distance = torch.cdist(x / (x.std(0) if whiten else 1), codebook.x_values[0] / (x.std(0) if whiten else 1))
        nearest = distance.argmin(1)
        assert (codebook.assign(x)[:, 0].long() == nearest).float().mean() > 0.99
        error[whiten] = (x - decoded(codebook, codes, codebook.x_values)).square().mean(0) / x.var(0)
    assert error[False][0] < error[True][0] and error[False][1] > 2 * error[True][1]
