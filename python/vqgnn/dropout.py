"""Dropout and stored states: rows are kept without its noise, and what reads them drops them anew.

On a CPU, a converted model's dropout is a kernel of ours.
"""

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


def watch_dropout(model: nn.Module) -> None:
    """Have what every dropout of a model returns know its input and its share, for `dropped`.

    All neighbours read a stored row until its node's next batch, an epoch long. Noise in it does not average out over
    steps as that of fresh dropout does, so states are stored as they were before. A conv then drops the rows that it
    reads with the share that its own rows have had, afresh in every step: as full batch does, and as GNNAutoScale's
    own models do.

    A hook sees an nn.Dropout. F.dropout is seen by a mode that is on while a forward of the model, or of a part of it
    that has parts, runs uncompiled.
    """
    for module in model.modules():
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


def _mark(out: Tensor, x: Tensor, p: float, training: bool, inplace: bool) -> None:
    if training and p > 0 and not inplace:
        out._before_dropout = x, _version(out), p


def _drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout; on a CPU by a kernel, as torch's takes a fifth of an epoch there."""
    ours = training and 0 < p < 1 and not inplace and input.device.type == "cpu" and input.dtype in _FLOATS
    out = hash_dropout(input, p, draw_seed(p, input.device)) if ours else F.dropout(input, p, training, inplace)
    _mark(out, input, p, training, inplace)
    return out


def _after_dropout(dropout: nn.Dropout, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
    x = args[0] if args else kwargs["input"]
    _mark(out, x, dropout.p, dropout.training, dropout.inplace)


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            return _drop(*args, **kwargs)
        return function(*args, **kwargs)


def _begin(model: nn.Module, args: tuple) -> None:
    if model.training and not torch.compiler.is_compiling() and getattr(_open, "watch", None) is None:
        _open.watch = _Watch(model)
        _open.watch.__enter__()


def _end(model: nn.Module, args: tuple, out: object) -> None:
    if not torch.compiler.is_compiling() and (watch := getattr(_open, "watch", None)) and watch.model is model:
        _open.watch = None
        watch.__exit__(None, None, None)
