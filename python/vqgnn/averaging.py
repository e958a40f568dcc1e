"""Averaged weights: what is evaluated of a model that trains on stale states."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import nn

from .conversion import stores


class MovingAverage(nn.Module):
    """Exponential moving average of a model's weights and buffers, for evaluation.

    The last weights of training on stale states jump under exact inference, their average does not (docs/why.md). Like
    torch's `AveragedModel` it takes the model by `update_parameters` after every step and has a copy, `module`, to
    evaluate: `layerwise(averaged.module, data)`. The copy of a converted model shares its stores, and is always in
    evaluation mode, in which it only reads them. Its decay rises to `decay`, so that the first weights do not linger:
    after t steps about the last t / 9 count.

    Raises:
        ValueError: decay outside [0, 1].
    """

    def __init__(self, model: nn.Module, decay: float = 0.98):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay!r} must be between 0 and 1; 0.98 averages about 50 steps")
        self.decay = decay
        self.module = copy.deepcopy(model, {id(store): store for store in stores(model).values()})
        self.module.requires_grad_(False)
        self.register_buffer("n_averaged", torch.tensor(0))
        self.eval()

    def train(self, mode: bool = True) -> MovingAverage:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the model's weights as they are now."""
        t = int(self.n_averaged)  # on the host
        share = 1 - min(self.decay, (1 + t) / (10 + t)) if t else 1.0
        pairs = [*zip(*(chain(m.parameters(), m.buffers()) for m in (self.module, model)), strict=True)]
        numbers = [pair for pair in pairs if pair[0].is_floating_point()]
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*numbers, strict=True)), share)
        for mean, now in counts:
            mean.copy_(now)
        self.n_averaged += 1
