"""The Triton back-end of hash_dropout."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._dropout_triton import chain, dropout_arguments, first_hash, kept


def hash_dropout(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    x, (num_rows, f) = x.contiguous(), x.shape
    out = torch.empty_like(x)
    arguments = dropout_arguments(dropout, seed)
    del arguments["DROPOUT"]  # always
    _triton.launch(
        hash_dropout_kernel,
        lambda blocks: (triton.cdiv(num_rows * f, blocks["BLOCK"]),),
        {"p_x": x, "p_out": out, "num_rows": num_rows, "f": f, **arguments},
        pure=True,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def hash_dropout_kernel(p_x, p_out, num_rows, f, threshold, p_seed, kept_scale, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_rows.to(tl.int64) * f
    factor = kept(chain(chain(first_hash(tl.load(p_seed)), at // f), at % f), threshold, kept_scale)
    x = tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    out = tl.where(factor > 0, x * factor, 0.0)  # not x * 0, which would keep an infinity
    tl.store(p_out + at, out.to(p_out.dtype.element_ty), mask=mask)
