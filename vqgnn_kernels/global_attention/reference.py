"""The slow obvious truth of global_attention, with the [b, H, K] array that the kernels avoid."""

import torch
from torch import Tensor


def global_attention(
    query: Tensor,  # [b, H, F]
    keys: Tensor,  # [H, K, F]
    values: Tensor,  # [H, K, V]
    counts: Tensor,  # [H, K]
    scale: float,
) -> tuple[Tensor, Tensor]:  # [b, H, V], [b, H]
    keys, values = _live(keys, counts), _live(values, counts)
    scores = _scores(query, keys, counts, scale)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -torch.inf, 0)  # a head without nodes
    out = torch.einsum("bhk,hkv->bhv", (scores - lse[..., None]).exp(), values)
    return out.to(query.dtype).contiguous(), lse.contiguous()


def global_attention_backward(
    grad_out: Tensor,  # [b, H, V]
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scale: float,
    out: Tensor,  # [b, H, V]
    lse: Tensor,  # [b, H]
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = query.dtype, keys.dtype, values.dtype
    keys, values, grad_out = _live(keys, counts), _live(values, counts), grad_out.float()
    probability = (_scores(query, keys, counts, scale) - lse[..., None]).exp()
    grad_values = torch.einsum("bhk,bhv->hkv", probability, grad_out)
    grad_probability = torch.einsum("bhv,hkv->bhk", grad_out, values)
    mean = (grad_out * out.float()).sum(-1, keepdim=True)  # of grad_probability under probability
    grad_scores = probability * (grad_probability - mean)
    grad_query = torch.einsum("bhk,hkf->bhf", grad_scores, keys) * scale
    grad_keys = torch.einsum("bhk,bhf->hkf", grad_scores, query.float()) * scale
    return tuple(g.to(t).contiguous() for g, t in zip((grad_query, grad_keys, grad_values), dtypes, strict=True))


def _live(table: Tensor, counts: Tensor) -> Tensor:
    """keys or values in fp32, 0 for codewords without nodes: theirs may hold NaN."""
    return table.float().masked_fill(counts[..., None] <= 0, 0)


def _scores(query: Tensor, keys: Tensor, counts: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("bhf,hkf->bhk", query.float(), keys) + counts.clamp(min=0).log()
