"""Stored rows that follow the weights: they move as a batch's own rows have moved since they were stored."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 0.01  # of the mean square of each channel
_FLOOR = 1e-6  # of the mean over channels: a constant channel says nothing
_TINY = 1e-12  # where all do


def align(halo: Tensor, stored: Tensor, fresh: Tensor, ridge: float = _RIDGE) -> Tensor:
    """Stored rows of other nodes, moved as the batch's own rows have moved since they were stored.

    halo + mean(fresh - stored) + (halo - mean(stored)) A,    A = argmin |S A - D|^2 + ridge |diag(S'S)^1/2 A|^2

    with S = stored and D = fresh - stored, both centred. A node's state is f(x) with weights that move a little each
    step; most of that is one affine map, which the batch knows at both ends. Where nothing has moved, nothing changes.

    The result is linear in `fresh`: the gradient of out-of-batch messages reaches the batch's rows, as that of the
    nodes that they are like, and nobody needs to store it.

    Args:
        halo: [h, f] decoded rows of out-of-batch nodes.
        stored: [b, f] decoded rows of the batch's nodes, b >= 1.
        fresh: [b, f] what they are now; any float dtype.
        ridge: shrinks towards no change but the mean's, above 0.
    Returns:
        [h, f] of fresh's dtype.
    Raises:
        ValueError: shapes that do not go together, or no rows to learn from.
    """
    if stored.shape != fresh.shape or halo.shape[1:] != stored.shape[1:] or len(stored) == 0 or ridge <= 0:
        raise ValueError(
            f"halo {list(halo.shape)}, stored {list(stored.shape)}, fresh {list(fresh.shape)}, ridge={ridge}: expected "
            "[h, f], [b, f], [b, f] with b >= 1, and ridge > 0"
        )
    with torch.autocast(halo.device.type, enabled=False):
        moved = fresh.float() - stored
        centre, shift = stored.mean(0), moved.mean(0)
        deviation = stored - centre
        gram = deviation.T @ deviation
        penalty = ridge * gram.diagonal() + _FLOOR * gram.diagonal().mean() + _TINY
        factor = torch.linalg.cholesky_ex(gram + penalty.diag()).L  # its success is not asked for: a GPU would stall
        change = torch.cholesky_solve(deviation.T @ (moved - shift), factor)
        return (halo + shift + (halo - centre) @ change).to(fresh.dtype)
