"""Attention of every query to the codewords of its head (Graph Transformer; VQ-GNN, table 5 and appendix E)."""

import torch
from torch import Tensor

from .._backend import implementation
from .._library import register, register_autograd
from .._types import FLOATS, check_tensor


def global_attention(
    query: Tensor,  # [b, H, F]
    keys: Tensor,  # [H, K, F]
    values: Tensor,  # [H, K, V]
    counts: Tensor,  # [H, K]
    scale: float | None = None,
) -> Tensor:  # [b, H, V]
    """Every query looks at the whole graph through the K codewords of its head, each as often as it has nodes.

    out[i, h] = sum_k softmax_k(scale * query[i, h] . keys[h, k] + log counts[h, k]) values[h, k]

    That is full attention to the graph's nodes with every node's key and value replaced by those of its codeword. No
    [b, H, K] array exists: the softmax is taken block by block, and the backward computes the scores again. Sums are
    fp32, and each has a fixed order: results are the same in every run and for every number of threads.

    Args:
        query: [b, H, F] fp32/fp16/bf16; b may be 0.
        keys, values: [H, K, F] and [H, K, V], each fp32/fp16/bf16. Under half precision queries the GPU rounds them to
            tf32, which is finer than the queries' own rounding. On a GPU F and V are at most 128.
        counts: [H, K] fp32, number of nodes in each codeword's cluster. A codeword without nodes takes no part,
            whatever its key and value hold; a head without nodes gives 0.
        scale: 1/sqrt(F) if None.

    Returns:
        [b, H, V] of query's dtype. Differentiable once by query, keys and values; counts get no gradient.

    Raises:
        ValueError: wrong dtype, shape or device; F or V > 128 on a GPU. Negative counts are not looked for; they count
            as 0.
    """
    check_tensor("query", query, FLOATS, (None, None, None))
    _, H, F = query.shape
    check_tensor("keys", keys, FLOATS, (H, None, F))
    K = keys.shape[1]
    check_tensor("values", values, FLOATS, (H, K, None))
    check_tensor("counts", counts, (torch.float32,), (H, K))
    if 0 in (H, F, K, values.shape[2]):
        raise ValueError(
            f"keys has shape {list(keys.shape)} and values {list(values.shape)}; every size must be at least 1"
        )
    for name, tensor in (("keys", keys), ("values", values), ("counts", counts)):
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}; move one with .to()")
    return _global_attention(query, keys, values, counts.detach(), F**-0.5 if scale is None else float(scale))[0]


def _impl(query, keys, values, counts, scale):
    return implementation(__name__, query).global_attention(query, keys, values, counts, scale)


def _fake(query, keys, values, counts, scale):
    b, H, _ = query.shape
    return query.new_empty(b, H, values.shape[2]), query.new_empty(b, H, dtype=torch.float32)


def _backward_impl(grad_out, query, keys, values, counts, scale, out, lse):
    kernels = implementation(__name__, query)
    return kernels.global_attention_backward(grad_out, query, keys, values, counts, scale, out, lse)


def _backward_fake(grad_out, query, keys, values, counts, scale, out, lse):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, keys, values))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, _):
    query, keys, values, counts, out, lse = ctx.saved_tensors
    grads = _global_attention_backward(grad_out, query, keys, values, counts, ctx.scale, out, lse)
    return *grads, None, None


# Beside the output, the logarithm of each softmax's sum, [b, H] fp32: from it the backward has any probability at once.
# It is 0 for a head without nodes.
_global_attention = register(
    "global_attention(Tensor query, Tensor keys, Tensor values, Tensor counts, float scale) -> (Tensor, Tensor)",
    _impl,
    _fake,
)
_global_attention_backward = register(
    "global_attention_backward(Tensor grad_out, Tensor query, Tensor keys, Tensor values, Tensor counts, float scale,"
    " Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
register_autograd("global_attention", _backward, _setup_context)
