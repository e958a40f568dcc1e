"""Dropout and stored states: rows are kept without its noise, and what reads them drops them anew."""

import torch
from torch import Tensor, nn


def watch_dropout(model: nn.Module) -> None:
    """Have every nn.Dropout of a model leave its input and its share on its output, where `dropped` finds them.

    All neighbours read a stored row until its node's next batch, an epoch long. Noise in it does not average out over
    steps as that of fresh dropout does, so states are stored as they were before. A conv then drops the rows that it
    reads with the share that its own rows have had, afresh in every step: as full batch does, and as GNNAutoScale's
    own models do.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout) and _watch not in module._forward_hooks.values():
            module.register_forward_hook(_watch)


def dropped(x: Tensor) -> tuple[Tensor, float]:
    """x before the nn.Dropout that it comes from, and what share that dropped.

    (x, 0.0) where it comes from none, or was changed in place since. A compiled step cannot see the latter: there a
    dropout's output must not be changed in place.
    """
    before, version, share = getattr(x, "_before_dropout", (x, None, 0.0))
    return (x, 0.0) if version not in (None, _version(x)) else (before, share)


def undropped(x: Tensor) -> Tensor:
    return dropped(x)[0]


def _version(x: Tensor) -> int | None:
    """How often x was changed in place."""
    return None if torch.compiler.is_compiling() else x._version


def _watch(dropout: nn.Dropout, args: tuple[Tensor, ...], out: Tensor) -> None:
    if dropout.training and dropout.p > 0 and not dropout.inplace:
        out._before_dropout = args[0], _version(out), dropout.p
