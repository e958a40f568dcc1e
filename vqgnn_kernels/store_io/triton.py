"""The Triton back-end of push_rows and pull_rows: the table, n_id and x on the GPU or in pinned host memory.

Rows whose n_id is out of range are skipped: reporting them would make the host wait for the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._decode import load_state, table_arguments
from .._types import Rows
from .reference import LEVELS


def push_rows(rows: Rows, n_id: Tensor, x: Tensor) -> bool:
    n_id, x = n_id.contiguous(), x.contiguous()
    check_reachable({"rows.data": rows.data, "rows.scale": rows.scale, "n_id": n_id, "x": x})
    k, f = x.shape
    arguments = {"p_data": rows.data, "p_n_id": n_id, "p_x": x, "num_rows": rows.data.shape[0], "k": k, "f": f}
    if rows.codec in LEVELS:
        kernel = push_quantise_kernel
        # the two bf16 of a row as their bits, which the kernel makes itself
        scale = rows.scale.view(torch.int16)
        arguments |= {"p_scale": scale, "width": rows.data.shape[1], "LEVELS": LEVELS[rows.codec]}
    else:
        kernel = push_cast_kernel
    _triton.launch(kernel, lambda blocks: (triton.cdiv(k, blocks["BLOCK_R"]),), arguments, sizes={"f": f}, pure=True)
    return True


def pull_rows(rows: Rows, n_id: Tensor | None, f: int) -> Tensor:
    n_id = None if n_id is None else n_id.contiguous()
    table = table_arguments(rows)
    tensors = {"data": table["p_data"], "scale": table["p_scale"], "codebook": table["p_codebook"]}
    check_reachable({f"rows.{name}": t for name, t in tensors.items()} | {"n_id": n_id})
    k, device = (rows.data.shape[0], rows.data.device) if n_id is None else (n_id.shape[0], n_id.device)
    out = torch.empty(k, f, device=device, dtype=torch.float32)
    _triton.launch(
        pull_rows_kernel,
        lambda blocks: (triton.cdiv(k, blocks["BLOCK_R"]),),
        {"p_out": out, "p_n_id": n_id, "k": k, "f": f, **table},
        sizes={"f": f},
        pure=True,
    )
    return out


def check_reachable(tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError where one of the tensors is on the GPU and another in memory that the GPU cannot address."""
    present = {name: t for name, t in tensors.items() if t is not None and t.numel()}
    device = next((t.device for t in present.values() if t.is_cuda), None)
    for name, tensor in present.items():
        if device is not None and not tensor.is_cuda and not tensor.is_pinned():
            raise ValueError(
                f"{name} lies in pageable host memory, which {device} cannot address; "
                "pin it with .pin_memory() or move all tensors to one device"
            )


@triton.jit(do_not_specialize=["num_rows", "k"])
def push_cast_kernel(p_data, p_n_id, p_x, num_rows, k, f, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """data[n_id] = x, cast to the table's type."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_id = tl.load(p_n_id + row, mask=row < k, other=-1)
    m_row = (b_id >= 0) & (b_id < num_rows)
    for start in range(0, f, BLOCK_F):
        col = start + tl.arange(0, BLOCK_F)
        m_x = m_row[:, None] & (col < f)[None, :]
        b_x = tl.load(p_x + row[:, None] * f + col[None, :], mask=m_x)
        tl.store(p_data + b_id[:, None] * f + col[None, :], b_x.to(p_data.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["num_rows", "k"])
def push_quantise_kernel(
    p_data, p_scale, p_n_id, p_x, num_rows, k, f, width,
    LEVELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """data[n_id], scale[n_id] = quantise(x): one pass over the row for its range, a second, out of cache, to write."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_id = tl.load(p_n_id + row, mask=row < k, other=-1)
    m_row = (b_id >= 0) & (b_id < num_rows)

    low = tl.full([BLOCK_R], float("inf"), tl.float32)
    high = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for start in range(0, f, BLOCK_F):
        col = start + tl.arange(0, BLOCK_F)
        m_x = m_row[:, None] & (col < f)[None, :]
        b_x = tl.load(p_x + row[:, None] * f + col[None, :], mask=m_x, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(m_x, b_x, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(m_x, b_x, float("-inf")), axis=1))
    low = tl.where(low <= high, low, 0.0)  # rows of no column: 0
    high = tl.where(low <= high, high, 0.0)

    offset = _round_bf16(low + 0.0, False)  # + 0.0 turns -0 into 0
    scale = _round_bf16(tl.div_rn(high - offset, LEVELS * 1.0), True)
    # Both are exact bf16: their upper halves are the bits to store.
    tl.store(p_scale + b_id * 2, (scale.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=m_row)
    tl.store(p_scale + b_id * 2 + 1, (offset.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=m_row)

    for start in range(0, f, BLOCK_F):
        col = start + tl.arange(0, BLOCK_F)
        m_x = m_row[:, None] & (col < f)[None, :]
        b_x = tl.load(p_x + row[:, None] * f + col[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_t = tl.div_rn(b_x - offset[:, None], tl.where(scale > 0, scale, 1.0)[:, None])
        b_t = tl.where(m_x & (b_t > 0) & (scale > 0)[:, None], b_t, 0.0)  # drops NaN, too
        b_t = tl.minimum(b_t, LEVELS * 1.0)
        b_q = ((b_t + 12582912.0) - 12582912.0).to(tl.uint8)  # adding 1.5 * 2^23 rounds half to even
        if LEVELS == 15:  # two columns a byte, the even one in the low nibble
            even, odd = tl.split(tl.reshape(b_q, [BLOCK_R, BLOCK_F // 2, 2]))
            byte = start // 2 + tl.arange(0, BLOCK_F // 2)
            m_q = m_row[:, None] & (byte < width)[None, :]
            tl.store(p_data + b_id[:, None] * width + byte[None, :], even | (odd << 4), mask=m_q)
        else:
            tl.store(p_data + b_id[:, None] * width + col[None, :], b_q, mask=m_x)


@triton.jit(do_not_specialize=["num_table", "k"])
def pull_rows_kernel(
    p_out, p_n_id, k, f, p_data, p_scale, p_codebook, num_table, width, K,
    D: tl.constexpr, CODEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out = decode(table[n_id]), table order without n_id; 0 where n_id is out of range."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_id = row if p_n_id is None else tl.load(p_n_id + row, mask=row < k, other=-1)
    m_row = (b_id >= 0) & (b_id < num_table)
    for start in range(0, f, BLOCK_F):
        b_x = load_state(p_data, p_scale, p_codebook, b_id, m_row, start, width, K, D, CODEC, BLOCK_F)
        col = start + tl.arange(0, BLOCK_F)
        tl.store(p_out + row[:, None] * f + col[None, :], b_x, mask=(row < k)[:, None] & (col < f)[None, :])


@triton.jit
def _round_bf16(x, UP: tl.constexpr):
    """The smallest bf16 >= x (UP) or the largest bf16 <= x, as fp32."""
    bits = x.to(tl.int32, bitcast=True)
    cut = bits & -0x10000  # drops the magnitude's low half: towards zero
    away = (bits != cut) & ((bits >= 0) == UP)
    return tl.where(away, cut + 0x10000, cut).to(tl.float32, bitcast=True)
