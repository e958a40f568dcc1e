"""Node states without the noise of dropout."""

import torch
from torch import Tensor, nn


def keep_undropped(model: nn.Module) -> None:
    """Have every nn.Dropout of a model leave its input on its output, where `undropped` finds it.

    All neighbours read a stored row until its node's next batch, an epoch long. Noise in it does not average out over
    steps as that of fresh dropout does, so states are stored as they were before (as GNNAutoScale's own code does).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout) and _keep_input not in module._forward_hooks.values():
            module.register_forward_hook(_keep_input)


def undropped(x: Tensor) -> Tensor:
    """x before the nn.Dropout that it comes from; x itself where it comes from none, or was changed in place since.

    A compiled step cannot see the latter: there a dropout's output must not be changed in place.
    """
    before, version = getattr(x, "_before_dropout", (x, None))
    return x if version not in (None, _version(x)) else before


def _version(x: Tensor) -> int | None:
    """How often x was changed in place."""
    return None if torch.compiler.is_compiling() else x._version


def _keep_input(dropout: nn.Dropout, args: tuple[Tensor, ...], out: Tensor) -> None:
    if dropout.training and dropout.p > 0 and not dropout.inplace:
        out._before_dropout = args[0], _version(out)
