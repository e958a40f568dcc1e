"""Decoding rows of a node-state table inside a Triton kernel, shared by every kernel that reads one."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._types import Rows


def table_arguments(rows: Rows | None) -> dict[str, Any]:
    """The kernel arguments that `load_state` needs, by name; CODEC is "none" and the tensors are None without a table.

    num_table: rows of the table. width: length of a row of p_data in elements. K, D: size of the codebook.
    """
    if rows is None:
        rows = Rows("none", None)
    data, scale, codebook = (t.contiguous() if isinstance(t, Tensor) else None for t in rows[1:])
    num_table, width = (0, 0) if data is None else data.shape
    _, num_codes, d = (0, 0, 1) if codebook is None else codebook.shape
    return {
        "p_data": data,
        "p_scale": scale,
        "p_codebook": codebook,
        "num_table": num_table,
        "width": width,
        "K": num_codes,
        "D": d,
        "CODEC": rows.codec,
    }


@triton.jit
def load_state(
    p_data,
    p_scale,
    p_codebook,
    row,
    m_row,
    first_col,
    width,
    K,
    D: tl.constexpr,
    CODEC: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Columns first_col .. first_col + BLOCK_F - 1 of some rows of a table, fp32 [E, BLOCK_F].

    row [E] int64 must be rows of the table wherever m_row [E] is set; the other rows, and columns beyond the table's,
    are 0 or (masked by the caller when it stores) unspecified. first_col is a multiple of BLOCK_F, a power of 2.
    Codes >= K are taken as K - 1, so that no code reads outside the codebook. Offsets within a row and within a branch
    fit in 32 bits; everything that they are added to is 64 bits wide.
    """
    p_row = p_data + row * width  # [E]
    if CODEC == "pq":
        if BLOCK_F % D == 0:  # the codes of all branches are loaded once, each codeword by one wide load
            branch = first_col // D + tl.arange(0, BLOCK_F // D)
            mask = m_row[:, None] & (branch < width)[None, :]
            code = _clamp_code(tl.load(p_row[:, None] + branch[None, :], mask=mask, other=0), K)
            p_branch = p_codebook + branch.to(tl.int64) * K * D  # [M]
            p_word = (p_branch[None, :] + code * D)[:, :, None] + tl.arange(0, D)[None, None, :]
            word = tl.load(p_word, mask=mask[:, :, None], other=0.0)  # [E, M, D]
            return tl.reshape(word, [row.shape[0], BLOCK_F]).to(tl.float32)
        else:
            col = first_col + tl.arange(0, BLOCK_F)
            branch = col // D
            mask = m_row[:, None] & (branch < width)[None, :]
            code = _clamp_code(tl.load(p_row[:, None] + branch[None, :], mask=mask, other=0), K)
            p_word = p_codebook + branch.to(tl.int64) * K * D + col % D  # [BLOCK_F]
            return tl.load(p_word[None, :] + code * D, mask=mask, other=0.0).to(tl.float32)
    elif CODEC == "int4":
        byte = first_col // 2 + tl.arange(0, BLOCK_F // 2)
        mask = m_row[:, None] & (byte < width)[None, :]
        pair = tl.load(p_row[:, None] + byte[None, :], mask=mask, other=0)
        q = tl.reshape(tl.join(pair & 15, pair >> 4), [row.shape[0], BLOCK_F]).to(tl.float32)
        return _dequantise(q, p_scale, row, m_row)
    else:
        col = first_col + tl.arange(0, BLOCK_F)
        mask = m_row[:, None] & (col < width)[None, :]
        value = tl.load(p_row[:, None] + col[None, :], mask=mask, other=0).to(tl.float32)
        if CODEC == "int8":
            value = _dequantise(value, p_scale, row, m_row)
        return value


@triton.jit
def _clamp_code(code, K):
    return tl.minimum(code.to(tl.int32) & 0xFFFF, K - 1)  # codes are unsigned, whatever torch calls their type


@triton.jit
def _dequantise(q, p_scale, row, m_row):
    scale = tl.load(p_scale + 2 * row, mask=m_row, other=0.0).to(tl.float32)
    offset = tl.load(p_scale + 2 * row + 1, mask=m_row, other=0.0).to(tl.float32)
    return q * scale[:, None] + offset[:, None]
