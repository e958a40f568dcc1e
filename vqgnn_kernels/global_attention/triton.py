"""Triton kernels of global_attention: online softmax forward, recomputation backward, all products by tl.dot.

F and V are filled up to powers of two >= 16 by masked loads. Everything is fp32 after the load: products of half
precision inputs are exact in tf32, and fp32 inputs take three tf32 products each. Codewords without nodes are loaded as
zeros with a logarithm of -inf, so that whatever they hold cannot reach a sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton

MAX_WIDTH = 128  # the registers of a block with both halves of its fp32 operands
PART = 8192  # queries whose gradients of keys and values one program adds up; a constant, so that the order is fixed
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(p_rows, o_row, m_row, stride, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Rows of WIDTH columns as fp32 [rows, PAD], zeros outside."""
    o_column = tl.arange(0, PAD)
    mask = m_row[:, None] & (o_column < WIDTH)[None, :]
    return tl.load(p_rows + o_row[:, None].to(tl.int64) * stride + o_column[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def store_rows(p_rows, b_rows, o_row, m_row, stride, WIDTH: tl.constexpr, PAD: tl.constexpr):
    o_column = tl.arange(0, PAD)
    mask = m_row[:, None] & (o_column < WIDTH)[None, :]
    p_out = p_rows + o_row[:, None].to(tl.int64) * stride + o_column[None, :]
    tl.store(p_out, b_rows.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def load_counts(p_counts, o_k, K):
    """(log2 of the counts of one head's codewords, -inf without nodes; which of them have nodes)."""
    b_count = tl.load(p_counts + o_k, mask=o_k < K, other=0.0)
    m_k = b_count > 0
    return tl.where(m_k, tl.log2(tl.where(m_k, b_count, 1.0)), float("-inf")), m_k


@triton.jit(do_not_specialize=["b"])
def global_attention_fwd_kernel(
    p_query, p_keys, p_values, p_counts, p_out, p_lse, b, H, K, scale,
    F: tl.constexpr, V: tl.constexpr, PAD_F: tl.constexpr, PAD_V: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head meets all its codewords."""
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    h = tl.program_id(1).to(tl.int64)
    m_b = o_b < b
    b_query = load_rows(p_query + h * F, o_b, m_b, H * F, F, PAD_F)
    b_max = tl.full([BLOCK_B], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_B], tl.float32)
    b_out = tl.zeros([BLOCK_B, PAD_V], tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_log, m_k = load_counts(p_counts + h * K, o_k, K)
        b_keys = load_rows(p_keys + h * K * F, o_k, m_k, F, F, PAD_F)
        b_values = load_rows(p_values + h * K * V, o_k, m_k, V, V, PAD_V)
        b_score = tl.dot(b_query, tl.trans(b_keys), input_precision=PRECISION) * (scale * LOG2E) + b_log[None, :]
        b_new = tl.maximum(b_max, tl.max(b_score, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # no codeword with nodes so far
        b_p = tl.exp2(b_score - b_shift[:, None])
        b_shrink = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_out = tl.dot(b_p, b_values, b_out * b_shrink[:, None], input_precision=PRECISION)
        b_max = b_new
    m_any = b_max > float("-inf")
    b_sum = tl.where(b_sum == 0, 1.0, b_sum)
    store_rows(p_out + h * V, b_out / b_sum[:, None], o_b, m_b, H * V, V, PAD_V)
    b_lse = tl.where(m_any, b_max + tl.log2(b_sum), 0.0) * LN2
    tl.store(p_lse + o_b.to(tl.int64) * H + h, b_lse, mask=m_b)


@triton.jit(do_not_specialize=["b"])
def global_attention_bwd_query_kernel(
    p_query, p_keys, p_values, p_counts, p_out, p_lse, p_grad_out, p_mean, p_grad_query, b, H, K, scale,
    F: tl.constexpr, V: tl.constexpr, PAD_F: tl.constexpr, PAD_V: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries; also the mean of grad_probability, which the other kernel needs."""
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    h = tl.program_id(1).to(tl.int64)
    m_b = o_b < b
    b_query = load_rows(p_query + h * F, o_b, m_b, H * F, F, PAD_F)
    b_grad_out = load_rows(p_grad_out + h * V, o_b, m_b, H * V, V, PAD_V)
    b_mean = tl.sum(b_grad_out * load_rows(p_out + h * V, o_b, m_b, H * V, V, PAD_V), 1)
    o_scalar = o_b.to(tl.int64) * H + h
    tl.store(p_mean + o_scalar, b_mean, mask=m_b)
    b_lse = tl.load(p_lse + o_scalar, mask=m_b, other=0.0) * LOG2E
    b_grad = tl.zeros([BLOCK_B, PAD_F], tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_log, m_k = load_counts(p_counts + h * K, o_k, K)
        b_keys = load_rows(p_keys + h * K * F, o_k, m_k, F, F, PAD_F)
        b_values = load_rows(p_values + h * K * V, o_k, m_k, V, V, PAD_V)
        b_score = tl.dot(b_query, tl.trans(b_keys), input_precision=PRECISION) * (scale * LOG2E) + b_log[None, :]
        b_p = tl.exp2(b_score - b_lse[:, None])
        b_grad_p = tl.dot(b_grad_out, tl.trans(b_values), input_precision=PRECISION)
        b_grad = tl.dot(b_p * (b_grad_p - b_mean[:, None]), b_keys, b_grad, input_precision=PRECISION)
    store_rows(p_grad_query + h * F, b_grad * scale, o_b, m_b, H * F, F, PAD_F)


@triton.jit(do_not_specialize=["b"])
def global_attention_bwd_codewords_kernel(
    p_query, p_keys, p_values, p_counts, p_lse, p_grad_out, p_mean, p_grad_keys, p_grad_values, b, H, K, scale,
    F: tl.constexpr, V: tl.constexpr, PAD_F: tl.constexpr, PAD_V: tl.constexpr, PRECISION: tl.constexpr,
    PART: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of codewords from one part of the queries, met in order."""
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    h = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    b_log, m_k = load_counts(p_counts + h * K, o_k, K)
    b_keys = load_rows(p_keys + h * K * F, o_k, m_k, F, F, PAD_F)
    b_values = load_rows(p_values + h * K * V, o_k, m_k, V, V, PAD_V)
    b_grad_keys = tl.zeros([BLOCK_K, PAD_F], tl.float32)
    b_grad_values = tl.zeros([BLOCK_K, PAD_V], tl.float32)
    for first in range(part * PART, min(part * PART + PART, b), BLOCK_B):  # PART is a multiple of BLOCK_B
        o_b = first + tl.arange(0, BLOCK_B)
        m_b = o_b < b
        b_query = load_rows(p_query + h * F, o_b, m_b, H * F, F, PAD_F)
        b_grad_out = load_rows(p_grad_out + h * V, o_b, m_b, H * V, V, PAD_V)
        o_scalar = o_b.to(tl.int64) * H + h
        b_lse = tl.load(p_lse + o_scalar, mask=m_b, other=0.0) * LOG2E
        b_mean = tl.load(p_mean + o_scalar, mask=m_b, other=0.0)
        b_score = tl.dot(b_keys, tl.trans(b_query), input_precision=PRECISION) * (scale * LOG2E) + b_log[:, None]
        b_p = tl.exp2(b_score - b_lse[None, :])  # [codewords, queries]
        b_grad_values = tl.dot(b_p, b_grad_out, b_grad_values, input_precision=PRECISION)
        b_grad_p = tl.dot(b_values, tl.trans(b_grad_out), input_precision=PRECISION)
        b_grad_keys = tl.dot(b_p * (b_grad_p - b_mean[None, :]), b_query, b_grad_keys, input_precision=PRECISION)
    row = (part * H + h) * K
    store_rows(p_grad_keys + row * F, b_grad_keys * scale, o_k, o_k < K, F, F, PAD_F)
    store_rows(p_grad_values + row * V, b_grad_values, o_k, o_k < K, V, V, PAD_V)


def global_attention(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    inputs, common, sizes = _arguments(query, keys, values, counts, scale)
    b, H = query.shape[:2]
    out = query.new_empty(b, H, values.shape[2])
    lse = torch.empty(b, H, device=query.device, dtype=torch.float32)
    _triton.launch(
        global_attention_fwd_kernel,
        lambda blocks: (triton.cdiv(b, blocks["BLOCK_B"]), H),
        {**inputs, "p_out": out, "p_lse": lse, **common},
        sizes,
        pure=True,
    )
    return out, lse


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
    inputs, common, sizes = _arguments(query, keys, values, counts, scale)
    (b, H), K = query.shape[:2], keys.shape[1]
    mean = torch.empty(b, H, device=query.device, dtype=torch.float32)
    rows = {**inputs, "p_lse": lse.contiguous(), "p_grad_out": grad_out.contiguous(), "p_mean": mean}
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    _triton.launch(
        global_attention_bwd_query_kernel,
        lambda blocks: (triton.cdiv(b, blocks["BLOCK_B"]), H),
        {**rows, "p_out": out.contiguous(), "p_grad_query": grad_query, **common},
        sizes,
        pure=True,
    )
    # K / BLOCK_K programs a head would leave most of a GPU idle, so parts of the queries go to programs of their own.
    parts = max(1, triton.cdiv(b, PART))
    grads = [torch.empty(parts, *table.shape, device=query.device, dtype=torch.float32) for table in (keys, values)]
    _triton.launch(
        global_attention_bwd_codewords_kernel,
        lambda blocks: (triton.cdiv(K, blocks["BLOCK_K"]), H, parts),
        {**rows, "p_grad_keys": grads[0], "p_grad_values": grads[1], **common, "PART": PART},
        sizes,
        pure=True,
    )
    grad_keys, grad_values = (
        (grad.sum(0) if parts > 1 else grad[0]).to(table.dtype)
        for grad, table in zip(grads, (keys, values), strict=True)
    )
    return grad_query, grad_keys, grad_values


def _arguments(query, keys, values, counts, scale) -> tuple[dict, dict, dict]:
    """(tensors, numbers, what the tile depends on) of all three kernels."""
    (b, H, F), (_, K, V) = query.shape, values.shape
    if max(F, V) > MAX_WIDTH:
        raise ValueError(f"query has F = {F} and values V = {V}; on a GPU both are at most {MAX_WIDTH}: use more heads")
    PAD_F, PAD_V = (max(16, triton.next_power_of_2(width)) for width in (F, V))
    names = ("p_query", "p_keys", "p_values", "p_counts")
    inputs = {name: t.contiguous() for name, t in zip(names, (query, keys, values, counts), strict=True)}
    precision = "tf32x3" if query.dtype == torch.float32 else "tf32"
    common = {"b": b, "H": H, "K": K, "scale": scale, "F": F, "V": V, "PAD_F": PAD_F, "PAD_V": PAD_V}
    return inputs, {**common, "PRECISION": precision}, {"width": max(PAD_F, PAD_V), "bits": 8 * query.element_size()}
