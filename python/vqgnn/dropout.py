"""Dropout and stored states: rows are kept without its noise, and what reads them drops them anew."""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch_geometric.nn import MessagePassing

from vqgnn_kernels import hash_dropout

from .graph import version

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_open = threading.local()  # .watch: of the model whose forward runs in this thread


class Dropout(nn.Dropout):
    """nn.Dropout, on a CPU by a kernel: torch's takes a fifth of an epoch there. What `convert` makes of a model's.

    Not F.dropout, too, which the watch sees: where torch.utils.checkpoint runs a part of a forward again, no watch is
    on, and other numbers would be dropped than before.
    """

    def forward(self, input: Tensor) -> Tensor:
        ours = input.device.type == "cpu" and input.dtype in _FLOATS and 0 < self.p < 1 and not self.inplace
        if self.training and ours and not torch.compiler.is_compiling():
            return hash_dropout(input, self.p, draw_seed(self.p, input.device))
        return super().forward(input)


def watch_dropout(model: nn.Module) -> None:
    """Have what every dropout of a model returns know its input and its share, for `dropped`.

    All neighbours read a stored row until its node's next batch, an epoch long. Noise in it does not average out over
    steps as that of fresh dropout does, so states are stored as they were before. A conv then drops the rows that it
    reads with the share that its own rows have had, afresh in every step: as full batch does, and as GNNAutoScale's
    own models do.

    A hook sees an nn.Dropout. F.dropout is seen by a mode that is on while a forward of the model, or of a part of it
    that has parts, runs uncompiled.
    """
    in_convs = {part for conv in model.modules() if isinstance(conv, MessagePassing) for part in conv.modules()}
    for module in model.modules():
        if type(module) is nn.Dropout and module not in in_convs:  # a conv's survey looks for torch's
            module.__class__ = Dropout
        if isinstance(module, nn.Dropout) and _after_dropout not in module._forward_hooks.values():
            module.register_forward_hook(_after_dropout, with_kwargs=True)
        whole = not isinstance(module, MessagePassing) and next(module.children(), None) is not None
        if whole and _begin not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_begin)
            module.register_forward_hook(_end, always_call=True)


def dropped(x: Tensor) -> tuple[Tensor, float]:
    """x before the dropout that it comes from, and what share that dropped.

    (x, 0.0) where it comes from none, or was changed in place since. A compiled step cannot see the latter: there a
    dropout's output must not be changed in place.
    """
    before, version, share = getattr(x, "_before_dropout", (x, None, 0.0))
    return (x, 0.0) if version not in (None, _version(x)) else (before, share)


def undropped(x: Tensor) -> Tensor:
    return dropped(x)[0]


def draw_seed(share: float, device: torch.device) -> Tensor | int:
    """Of a kernel's dropout, anew in every step; drawn where it is used, so that nothing waits for it."""
    return torch.randint(2**31, (), device=device) if share else 0


def _version(x: Tensor) -> int | None:
    """`version`, which a compiled step cannot see."""
    return None if torch.compiler.is_compiling() else version(x)


def _mark(out: Tensor, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> None:
    """With the arguments of F.dropout after its result."""
    if training and p > 0 and not inplace:
        out._before_dropout = x, _version(out), p


def _after_dropout(dropout: nn.Dropout, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
    x = args[0] if args else kwargs["input"]
    _mark(out, x, dropout.p, dropout.training, dropout.inplace)


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function is F.dropout:
            _mark(out, *args, **{"x" if name == "input" else name: value for name, value in kwargs.items()})
        return out


def _begin(model: nn.Module, args: tuple) -> None:
    if model.training and not torch.compiler.is_compiling() and getattr(_open, "watch", None) is None:
        _open.watch = _Watch(model)
        _open.watch.__enter__()


def _end(model: nn.Module, args: tuple, out: object) -> None:
    if not torch.compiler.is_compiling() and (watch := getattr(_open, "watch", None)) and watch.model is model:
        _open.watch = None
        watch.__exit__(None, None, None)
