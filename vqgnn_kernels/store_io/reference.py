"""Push and pull in plain torch: the truth that the kernels are tested against."""

import torch
from torch import Tensor

from .._types import Rows

LEVELS = {"int8": 255, "int4": 15}


def push_rows(rows: Rows, n_id: Tensor, x: Tensor) -> None:
    if rows.codec in LEVELS:
        q, scale = quantise(x.float(), LEVELS[rows.codec])
        rows.data[n_id] = pack_nibbles(q) if rows.codec == "int4" else q
        rows.scale[n_id] = scale
    else:  # a cast, or codes as they are
        rows.data[n_id] = x.to(rows.data.dtype)


def pull_rows(rows: Rows, n_id: Tensor | None, f: int) -> Tensor:
    data = rows.data if n_id is None else rows.data[n_id]
    if rows.codec == "pq":
        branch = torch.arange(data.shape[1], device=data.device)
        return rows.codebook[branch, data.long()].flatten(1)[:, :f].contiguous()
    if rows.codec in LEVELS:
        q = unpack_nibbles(data)[:, :f] if rows.codec == "int4" else data
        scale = (rows.scale if n_id is None else rows.scale[n_id]).float()
        return q.float() * scale[:, :1] + scale[:, 1:]
    return data.to(torch.float32, copy=True)


def quantise(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """x [k, f] fp32 -> q [k, f] uint8, (scale, offset) [k, 2] bf16."""
    low = x.amin(1, keepdim=True) + 0.0 if x.shape[1] else x.new_zeros(x.shape[0], 1)  # + 0.0 turns -0 into 0
    high = x.amax(1, keepdim=True) if x.shape[1] else low
    offset = round_bf16(low, up=False)
    # by a tensor: CUDA would multiply by the reciprocal of a number, which is rounded otherwise
    scale = round_bf16((high - offset) / torch.full_like(high, levels), up=True)
    q = torch.where(scale > 0, (x - offset) / scale, 0.0)
    q = q.nan_to_num(0.0, levels, 0.0).round().clamp(0, levels)
    return q.to(torch.uint8), torch.cat([scale, offset], 1).to(torch.bfloat16)


def round_bf16(x: Tensor, up: bool) -> Tensor:
    """The smallest bf16 >= x (up) or the largest bf16 <= x, as fp32."""
    bits = x.contiguous().view(torch.int32)
    cut = bits & -0x10000  # drops the magnitude's low half: towards zero
    away = (bits != cut) & ((bits >= 0) == up)
    return torch.where(away, cut + 0x10000, cut).view(torch.float32)


def pack_nibbles(q: Tensor) -> Tensor:
    q = torch.nn.functional.pad(q, (0, q.shape[1] % 2))
    return q[:, 0::2] | (q[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1)
