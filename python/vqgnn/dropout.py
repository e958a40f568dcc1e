"""Node states without the noise of dropout."""

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
    """x before the nn.Dropout that it comes from; x itself where it comes from none of a converted model."""
    return getattr(x, "_before_dropout", x)


def _keep_input(dropout: nn.Dropout, args: tuple[Tensor, ...], out: Tensor) -> None:
    if dropout.training and dropout.p > 0:
        out._before_dropout = args[0]
