"""The C++ back-end of global_attention: csrc/cpu/global_attention.cpp."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._backend import _C

LANES = 16  # floats of the widest vector: the kernels know no other widths than its multiples
BLOCK = 64  # codewords that the kernels take at a time


def global_attention(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (b, H, _), V = query.shape, values.shape[2]
    q, (k, k_t, v, _, bias) = _rows(query), _tables(keys, values, counts, scale)
    out, lse = torch.empty(b, H, v.shape[2], dtype=torch.float32), torch.empty(b, H, dtype=torch.float32)
    _C.global_attention(
        b, H, *k.shape[1:], v.shape[2], *(t.data_ptr() for t in (q, k_t, v, bias, out, lse))
    )  # fmt: skip
    return out[..., :V].to(query.dtype).contiguous(), lse


def global_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    (b, H, _) = query.shape
    q, grad, (k, k_t, v, v_t, bias) = _rows(query), _rows(grad_out), _tables(keys, values, counts, scale)
    mean = (grad_out.float() * out.float()).sum(-1)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    inputs = (q, k, k_t, v_t, bias, grad, mean, lse.contiguous())
    _C.global_attention_backward(b, H, *k.shape[1:], v.shape[2], *(t.data_ptr() for t in (*inputs, *grads)))
    grads[1].mul_(scale)
    return tuple(
        grad[tuple(map(slice, like.shape))].to(like.dtype).contiguous()
        for grad, like in zip(grads, (query, keys, values), strict=True)
    )


def _rows(x: Tensor) -> Tensor:
    """x in fp32, contiguous, its last axis filled up with zeros to a multiple of LANES."""
    return pad(x.float(), (0, -x.shape[-1] % LANES)).contiguous()


def _tables(keys: Tensor, values: Tensor, counts: Tensor, scale: float) -> list[Tensor]:
    """scale * keys and values, filled up to whole blocks of codewords, each also transposed by block, and log counts.

    [H, K, F], [H, K / BLOCK, F, BLOCK], [H, K, V], [H, K / BLOCK, V, BLOCK], [H, K]. Codewords without nodes and those
    of the filling are 0, with a logarithm of -inf.
    """
    more = -counts.shape[1] % BLOCK
    tables = []
    for table, factor in ((keys, scale), (values, 1)):
        rows = pad(_rows((table.float() * factor).masked_fill(counts[..., None] <= 0, 0)), (0, 0, 0, more)).contiguous()
        tables += [rows, rows.unflatten(1, (-1, BLOCK)).mT.contiguous()]
    return [*tables, pad(counts, (0, more)).clamp(min=0).log().contiguous()]
