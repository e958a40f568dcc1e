"""Product vector quantisation of node states: algorithm 2 of VQ-GNN, all branches at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import vqgnn_kernels as kernels

from .basis import Basis

_LLOYD_STEPS = 5  # k-means steps on the first batch
_SEEDS_A_CODE = 4  # rows of it that k-means++ chooses from, a code
_REVIVE_SHARE = 0.01  # a code used by less than this share of its fair number of rows a batch is dead


def finite(x: Tensor) -> Tensor:
    """x [b, f] with 0 for rows that are not numbers throughout.

    In half precision, and with a scaled loss, a step overflows every now and then and is skipped
    (torch.amp.GradScaler). What learns by moving averages would not get rid of it, and neighbours would read it.
    """
    whole = x.float().sum(1, keepdim=True).isfinite()
    if whole.device.type == "cpu" and whole.all():  # a GPU would have to be waited for
        return x
    return torch.where(whole, x, 0.0)


class Codebook(nn.Module):
    """m = ceil(dim / branch_dim) codebooks of K codewords, learnt by exponential moving averages.

    Branch j quantises features j*d .. j*d + d - 1 of a node together with a part of its gradient, so one code gives
    both (eq. 7). The part is the same channels of the gradient, or e coordinates of it in a learnt `Basis`: most of a
    gradient lies in few directions, and the fewer numbers a code stands for, the closer it is to them. Channels are
    whitened by their smoothed mean and variance before the search and the codewords are un-whitened for reading
    (appendix E).

    Args:
        dim: f, channels of a node state.
        branch_dim: d, channels a branch.
        num_codes: K, codewords a branch, at most 32768.
        grad: also keep gradient codewords.
        grad_dim: e, coordinates of the gradient a branch, m * e in all. None, or m * e >= f: the d channels themselves,
            as in the paper.
        decay: gamma, of the EMA of cluster sizes and sums.
        whiten_decay: beta, of the EMA of the channels' mean and variance.
        whiten: whether to whiten at all; else distances are those of the channels as they come, whose gradients are
            smaller than their features by orders of magnitude and then do not count. (The first batch's mean is still
            taken off, which changes no distance: the search is more exact near 0.)
        seed: decides the first codewords and the rows that dead codes are revived from.
    """

    def __init__(
        self,
        dim: int,
        branch_dim: int = 4,
        num_codes: int = 256,
        grad: bool = True,
        decay: float = 0.9,
        whiten_decay: float = 0.9,
        whiten: bool = True,
        seed: int = 0,
        grad_dim: int | None = None,
    ):
        super().__init__()
        self.dim, self.branch_dim, self.num_codes, self.grad = dim, branch_dim, num_codes, grad
        self.decay, self.whiten_decay, self.whiten, self.seed = decay, whiten_decay, whiten, seed
        self.num_branches = m = -(-dim // branch_dim)
        if grad_dim is None or m * grad_dim >= dim:
            grad_dim = branch_dim
        self.basis = Basis(dim, m * grad_dim) if grad and grad_dim != branch_dim else None
        self.grad_dim = grad_dim if grad else 0  # e
        self.width = branch_dim + self.grad_dim  # dv: channels a branch quantises together
        channels = m * self.width
        self.register_buffer("codewords", torch.zeros(m, num_codes, self.width, dtype=torch.float32))  # whitened
        self.register_buffer("ema_counts", torch.zeros(m, num_codes, dtype=torch.float32))
        self.register_buffer("ema_sums", torch.zeros(m, num_codes, self.width, dtype=torch.float32))
        self.register_buffer("mean", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("var", torch.zeros(channels, dtype=torch.float32))
        # x_values [m, K, d] and g_values [m, K, e]: the codewords un-whitened, as aggregate reads them
        self.register_buffer("x_values", torch.zeros(m, num_codes, branch_dim, dtype=torch.float32))
        self.register_buffer("g_values", torch.zeros(m, num_codes, grad_dim, dtype=torch.float32) if grad else None)
        # of the last batch: [x, g] x [error, norm]
        self.register_buffer("square_error", torch.zeros(2, 2, dtype=torch.float32))
        # numbers of the host, kept in the state_dict as extra state: asking a GPU for them would stall every step
        self.updates, self.grad_seen = 0, False

    def extra_repr(self) -> str:
        return f"{self.dim}, branch_dim={self.branch_dim}, num_codes={self.num_codes}, grad_dim={self.grad_dim}"

    @property
    def initialised(self) -> bool:
        return self.updates > 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.updates, self.grad_seen])

    def set_extra_state(self, state: Tensor) -> None:
        updates, grad_seen = state.tolist()
        self.updates, self.grad_seen = updates, bool(grad_seen)

    @torch.no_grad()
    def update(self, x: Tensor, g: Tensor | None = None) -> Tensor:
        """Learn from a batch's states x [b, dim] and gradients g [b, dim]; return their codes [b, m].

        Rows that overflowed count as 0. The first call takes its codewords from the batch by k-means. Without g the
        gradient codewords stay as they are.
        """
        x, g = finite(x), None if g is None else finite(g)
        first_grad = g is not None and not self.grad_seen
        if g is not None and self.basis is not None:
            self.basis.update(g)
        v, mean, var = self._rows(x, g)
        self._smooth(mean, var, g is not None, first_grad)
        rstd = self._rstd()
        if not self.initialised:
            self._initialise(v, rstd)
        kept = None
        if g is None and self.grad_seen:  # gradients are known, but not this batch's: they take no part
            kept = self.codewords[..., self.branch_dim :].clone()
            codes = self.assign(x)
            counts, sums = kernels.codebook_stats(v, codes, self.num_codes, self.mean, rstd)
        else:
            codes, counts, sums = kernels.vq_assign_stats(v, self.codewords, self.mean, rstd)
        if first_grad:
            self._start_gradients(counts, sums)
        revive_below = _REVIVE_SHARE * (v.size(0) / self.num_codes)
        self._learn(v, rstd, counts, sums, self.decay, revive_below, self.seed + self.updates)
        if kept is not None:
            self.codewords[..., self.branch_dim :] = kept
            self.ema_sums[..., self.branch_dim :] = kept * self.ema_counts[..., None]
        self._measure(v.size(0), mean, var, counts, sums, g)
        self.updates += 1
        self._decode()
        return codes

    @torch.no_grad()
    def assign(self, x: Tensor) -> Tensor:
        """Codes [b, m] of states x [b, dim] by their features alone; nothing is learnt."""
        d, channels = self.branch_dim, self._features()
        v = self._pad(x)
        return kernels.vq_assign(
            v, self.codewords[..., :d].contiguous(), self.mean[channels].contiguous(), self._rstd()[channels]
        )

    def stats(self) -> dict[str, float]:
        """Relative errors of the last batch, codebook perplexity (mean over branches), share of dead codes, updates."""
        share = self.ema_counts / self.ema_counts.sum(1, keepdim=True).clamp(min=1e-30)
        entropy = -(share * share.clamp(min=1e-30).log()).sum(1)
        error = (self.square_error[:, 0] / self.square_error[:, 1].clamp(min=1e-30)).clamp(min=0).sqrt()
        return {
            "relative_error_x": float(error[0]),
            "relative_error_grad": float(error[1]),
            "perplexity": float(entropy.exp().mean()),
            "dead": float((share < _REVIVE_SHARE / self.num_codes).float().mean()),
            "updates": self.updates,
            "initialised": self.initialised,
        }

    def _features(self) -> Tensor:
        """Which of the m * dv channels are features (the others are gradients)."""
        channels = torch.arange(self.num_branches * self.width, device=self.mean.device)
        return channels.view(self.num_branches, -1)[:, : self.branch_dim].flatten()

    def _pad(self, x: Tensor) -> Tensor:
        missing = self.num_branches * self.branch_dim - x.size(1)
        return nn.functional.pad(x, (0, missing)) if missing else x

    def _rows(self, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[b, m * dv], every branch's features and then its gradients; mean and variance of its columns."""
        if not self.grad:
            g = None
        elif g is None:
            g = self._gradient_means().reshape(1, -1).expand(x.size(0), -1)
        else:
            g = self._pad(g) if self.basis is None else g @ self.basis.vectors
        return kernels.codebook_rows(x, g, self.branch_dim)

    def _gradient_means(self) -> Tensor:
        return self.mean.view(self.num_branches, self.width)[:, self.branch_dim :]

    def _smooth(self, mean: Tensor, var: Tensor, has_grad: bool, first_grad: bool) -> None:
        """EMA of mean and variance; a channel's first batch sets them."""
        kept = self.whiten_decay if self.whiten else 1.0
        beta = torch.full_like(mean, kept if self.initialised else 0.0)
        if self.grad:
            gradients = beta.view(self.num_branches, self.width)[:, self.branch_dim :]
            if not has_grad:
                gradients.fill_(1.0)
            elif first_grad:
                gradients.zero_()
                self.grad_seen = True
        self.mean.mul_(beta).add_((1 - beta) * mean)
        if self.whiten:
            self.var.mul_(beta).add_((1 - beta) * var)
        else:
            self.var.fill_(1.0)

    def _rstd(self) -> Tensor:
        """1 / standard deviation; 0 for a constant channel, which then decodes to its mean."""
        return torch.where(self.var > 1e-30, self.var.rsqrt(), torch.zeros_like(self.var))

    def _initialise(self, v: Tensor, rstd: Tensor) -> None:
        """k-means++ on rows drawn from the batch, then a few k-means steps on all of it."""
        generator = torch.Generator().manual_seed(self.seed)  # the CPU's on every device: the same codewords
        sample = torch.randperm(v.size(0), generator=generator).to(v.device)[
            : max(_SEEDS_A_CODE * self.num_codes, 1024)
        ]
        rows = ((v[sample] - self.mean) * rstd).view(len(sample), self.num_branches, self.width)
        branch = torch.arange(self.num_branches, device=v.device)
        nearest = rows.new_full(rows.shape[:2], torch.inf)  # [rows, m] squared distance to the chosen codewords
        chosen = torch.randint(len(sample), (self.num_branches,), generator=generator).to(v.device)
        for k in range(self.num_codes):
            codeword = rows[chosen, branch]
            self.codewords[:, k] = codeword
            nearest = torch.minimum(nearest, (rows - codeword).square().sum(2))
            # Drawn in proportion to the distance: a row that is a codeword already is drawn again only when all are.
            threshold = torch.rand(self.num_branches, generator=generator, dtype=torch.float64).to(v.device)
            cumulative = nearest.double().cumsum(0)
            chosen = (cumulative < threshold * cumulative[-1]).sum(0).clamp(max=len(sample) - 1)
        for step in range(_LLOYD_STEPS):
            _, counts, sums = kernels.vq_assign_stats(v, self.codewords, self.mean, rstd)
            self._learn(v, rstd, counts, sums, 0.0, 0.5, self.seed - 1 - step)

    def _learn(
        self, v: Tensor, rstd: Tensor, counts: Tensor, sums: Tensor, decay: float, revive_below: float, seed: int
    ) -> None:
        kernels.codebook_update(
            self.codewords,
            self.ema_counts,
            self.ema_sums,
            counts,
            sums,
            decay,
            v=v,
            mean=self.mean,
            rstd=rstd,
            revive_below=revive_below,
            seed=seed,
        )

    def _start_gradients(self, counts: Tensor, sums: Tensor) -> None:
        """Gradient codewords start at the first batch's means, not at the zeros of the warm-up."""
        start = sums[..., self.branch_dim :] / counts.clamp(min=1)[..., None]
        self.ema_sums[..., self.branch_dim :] = start * self.ema_counts[..., None]

    def _measure(self, b: int, mean: Tensor, var: Tensor, counts: Tensor, sums: Tensor, g: Tensor | None) -> None:
        """Squared error of the batch's b rows against the new codewords, without a second pass over the rows.

        With the batch's moments, a channel: sum (x - x~)^2 = sum (x - mu)^2 + s^2 sum_k (n_k c_k^2 - 2 c_k . sum_k),
        mu and s the smoothed mean and deviation, c the whitened codewords, sum_k the whitened rows' sums.

        Without gradients their figures stay those of the last batch that had them. To a gradient's error comes what
        lies outside the basis.
        """
        c = self.codewords
        spread = b * (var + (mean - self.mean).square())
        gain = (counts[..., None] * c * c - 2 * c * sums).sum(1)
        error = spread.view(-1, self.width) + self.var.view(-1, self.width) * gain
        square = (b * (var + mean.square())).view(-1, self.width)
        d = self.branch_dim
        for i, part in enumerate((slice(0, d), slice(d, None))[: 1 if g is None else 2]):
            self.square_error[i, 0] = error[:, part].sum()
            self.square_error[i, 1] = square[:, part].sum()
        if g is not None and self.basis is not None:
            outside = torch.linalg.vector_norm(g).square() - self.square_error[1, 1]
            self.square_error[1] += outside

    def _decode(self) -> None:
        std = self.var.sqrt().view(self.num_branches, 1, self.width)
        values = self.codewords * std + self.mean.view_as(std)
        self.x_values.copy_(values[..., : self.branch_dim])
        if self.grad:
            self.g_values.copy_(values[..., self.branch_dim :])
