"""Dropout whose mask is a hash of where a number stands: nothing is stored of it."""

from math import prod

from torch import Tensor

from .._backend import implementation
from .._dropout import check_dropout, seed_tensor
from .._library import register, register_autograd
from .._types import FLOATS, check_tensor


def hash_dropout(x: Tensor, dropout: float, seed: int | Tensor = 0) -> Tensor:
    """Dropout (Srivastava et al.): out = m x / (1 - dropout), m = 0 with probability `dropout`, else 1.

    m depends on (seed mod 2^32, row, column) alone, so that the backward makes it again; torch's stores it, and on a
    CPU draws it several times as slowly.

    Args:
        x: [..., f] fp32/fp16/bf16; all dimensions but the last are rows. x may be differentiated any number of times.
        dropout: share of numbers set to 0, in [0, 1).
        seed: a number or an int64 tensor [] on x's device (which a compiled step or a CUDA graph can draw anew).
    Returns:
        A tensor like x; x itself for dropout 0.
    Raises:
        ValueError: wrong dtype, or a dropout that is not in [0, 1).
    """
    check_dropout(dropout)
    check_tensor("x", x, FLOATS, (None,) * x.dim())
    if dropout == 0:
        return x
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1)
    return _hash_dropout(rows, dropout, seed_tensor(seed, x.device)).view(x.shape)


def _impl(x, dropout, seed):
    return implementation(__name__, x).hash_dropout(x, dropout, seed)


def _fake(x, dropout, seed):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    _, ctx.dropout, seed = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad_out):
    (seed,) = ctx.saved_tensors
    return _hash_dropout(grad_out, ctx.dropout, seed), None, None


_hash_dropout = register("hash_dropout(Tensor x, float dropout, Tensor seed) -> Tensor", _impl, _fake)
register_autograd("hash_dropout", _backward, _setup_context)
