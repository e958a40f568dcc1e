"""Few numbers for rows of low rank: coordinates in a basis that is learnt, and followed as the rows change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS = 2048  # of a batch, at most, that say where its rows lie
_DECAY = 0.9  # of the moments, a batch
_RIDGE = 1e-3  # of the mean moment along the basis: directions without rows are left as they are


class Basis(nn.Module):
    """r orthonormal vectors along which rows [b, f] are largest: coordinates y = x V, and x ~ y V^T.

    What is stored by coordinates outlives the basis it was written in, so V must not turn within its own span while it
    follows the rows. A step of block power iteration on their second moments S does both: V + (I - V V^T) S V M^-1,
    M = V^T S V, adds what is new and leaves a V alone whose span is invariant.

    Args:
        dim: f.
        rank: r, at most f.
    """

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.register_buffer("vectors", torch.eye(dim, rank, dtype=torch.float32))
        self.register_buffer("moments", torch.zeros(dim, dim, dtype=torch.float32))
        self.seen = False  # whether there was a batch; of the host: asking a GPU would stall every step

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.seen)

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = bool(state)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Learn from rows x [b, f]; the first batch gives its principal directions."""
        first, self.seen = not self.seen, True
        some = x[:: -(-x.size(0) // _ROWS)]
        moments = some.T @ some
        moments /= moments.trace().clamp(min=1e-30)  # a batch counts by where its rows lie, not by their size
        self.moments.lerp_(moments, 1.0 if first else 1 - _DECAY)
        self.vectors.copy_(self._principal() if first else self._followed())

    def _principal(self) -> Tensor:
        moments = self.moments.double().cpu().nan_to_num(0.0, 0.0, 0.0)  # the CPU's vectors on every device
        _, found = torch.linalg.eigh(moments)
        found = found.flip(1)[:, : self.vectors.size(1)]
        return found * found.gather(0, found.abs().argmax(0, keepdim=True)).sign()

    def _followed(self) -> Tensor:
        v = self.vectors
        image = self.moments @ v
        inside = v.T @ image
        outside = torch.addmm(image, v, inside, alpha=-1)
        inside.diagonal().add_((inside.trace() * (_RIDGE / len(inside))).clamp_(min=1e-30))
        step = torch.linalg.solve_ex(inside, outside.T)[0].T
        v = v + step / step.norm().clamp(min=1.0)
        eye = torch.eye(len(inside), dtype=v.dtype, device=v.device)
        for _ in range(5):  # Newton-Schulz: the nearest orthonormal vectors, by products alone
            v = v @ torch.addmm(eye, v.T, v, beta=1.5, alpha=-0.5)
        return v
