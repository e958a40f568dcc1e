"""The two bundles of tensors that the graph ops share: a sparse matrix and a table of node state; checks."""

from typing import NamedTuple

import torch
from torch import Tensor

CODECS = ("fp32", "fp16", "int8", "int4", "pq")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DATA_DTYPES = {
    "fp32": (torch.float32,),
    "fp16": (torch.float16,),
    "int8": (torch.uint8,),
    "int4": (torch.uint8,),
    "pq": (torch.uint8, torch.int16),
}


class CSR(NamedTuple):
    """A batch's convolution matrix, r rows; its columns are the batch's own nodes and then the halo.

    rowptr: [r + 1] int64. Row i holds the edges rowptr[i] .. rowptr[i + 1] - 1.
    col: [e] int32. c < b is row c of x, any other c is entry c - b of halo.
    weight: [e] fp32, or None for ones; to attention_aggregate [e, columns], what edges bring to their scores.
    halo: [h] int64, the table's row for each halo column; None: the table's row is c - b itself.
    """

    rowptr: Tensor
    col: Tensor
    weight: Tensor | None = None
    halo: Tensor | None = None


class Rows(NamedTuple):
    """A table of node state, N rows of f values in one of five codecs (design.md, section 1).

    codec: "fp32" | "fp16" | "int8" | "int4" | "pq".
    data: [N, f] float32 | [N, f] float16 | [N, f] uint8 | [N, ceil(f/2)] uint8 (low nibble = even column) |
        [N, m] uint8 or int16 codes.
    scale: [N, 2] bfloat16 (scale, offset) for int8 and int4: value = q * scale + offset, q in 0..255 or 0..15. Else
        None.
    codebook: [m, K, d] fp32 for pq: column j*d + i of a row is codebook[j, code_j, i]; m*d >= f, the surplus is
        ignored. Else None.
    """

    codec: str
    data: Tensor
    scale: Tensor | None = None
    codebook: Tensor | None = None


def bundled(rowptr, col, weight, halo, codec, data, scale, codebook) -> tuple[CSR, Rows | None]:
    """Of the eight op arguments of a matrix and its table; codec "" says that there is no table."""
    return CSR(rowptr, col, weight, halo), Rows(codec, data, scale, codebook) if codec else None


def check_csr(name: str, csr: CSR) -> int:
    """Number of rows; raise ValueError unless the dtypes and shapes are those of a CSR."""
    check_tensor(f"{name}.rowptr", csr.rowptr, (torch.int64,), (None,))
    check_tensor(f"{name}.col", csr.col, (torch.int32,), (None,))
    if csr.rowptr.shape[0] < 1:
        raise ValueError(f"{name}.rowptr is empty; r rows need r + 1 entries, the first one 0")
    if csr.weight is not None:
        check_tensor(f"{name}.weight", csr.weight, (torch.float32,), (csr.col.shape[0],))
    if csr.halo is not None:
        check_tensor(f"{name}.halo", csr.halo, (torch.int64,), (None,))
    return csr.rowptr.shape[0] - 1


def check_entries(csr: CSR, b: int, rows: Rows | None) -> None:
    """Raise ValueError when an entry of rowptr, col or halo is out of range."""
    rowptr, col, _, halo = csr
    if rowptr[0] != 0 or rowptr[-1] != col.shape[0] or (rowptr.diff() < 0).any():
        raise ValueError(f"rowptr must rise from 0 to the number of edges, {col.shape[0]}")
    if not col.numel():
        return
    low, high = int(col.min()), int(col.max())
    num_halo = None if rows is None else rows.data.shape[0] if halo is None else halo.shape[0]
    if low < 0 or (num_halo is not None and high >= b + num_halo):
        raise ValueError(
            f"col spans {low}..{high}; with {b} rows in x and {num_halo} halo entries it must lie in "
            f"0..{b + (num_halo or 0) - 1}"
        )
    if rows is not None and halo is not None and halo.numel():
        low, high = int(halo.min()), int(halo.max())
        if low < 0 or high >= rows.data.shape[0]:
            raise ValueError(f"halo spans {low}..{high}; the table has rows 0..{rows.data.shape[0] - 1}")


def check_rows(name: str, rows: Rows, num_columns: int, *, codebook: bool = True) -> None:
    """Raise ValueError unless `rows` can hold rows of num_columns values; `codebook=False`: codes alone are enough."""
    codec, data, scale = rows.codec, rows.data, rows.scale
    if codec not in CODECS:
        raise ValueError(f"{name}.codec is {codec!r}; use one of {', '.join(CODECS)}")
    check_tensor(f"{name}.data", data, _DATA_DTYPES[codec], (None, None))
    if codec == "pq":
        if rows.codebook is None:
            if codebook:
                raise ValueError(f'{name}.codebook is None; codec "pq" needs the codewords, [m, K, d] fp32')
            return
        check_tensor(f"{name}.codebook", rows.codebook, (torch.float32,), (None, None, None))
        m, num_codes, d = rows.codebook.shape
        if m != data.shape[1]:
            raise ValueError(f"{name}.codebook has {m} branches, but {name}.data holds {data.shape[1]} codes a row")
        if m * d < num_columns:
            raise ValueError(f"{name}.codebook covers m*d = {m * d} columns, but rows of {num_columns} are needed")
        limit = 256 if data.dtype == torch.uint8 else 32768
        if not 1 <= num_codes <= limit:
            raise ValueError(f"{name}.codebook has K = {num_codes}; {data.dtype} codes allow 1..{limit}")
        return
    width = (num_columns + 1) // 2 if codec == "int4" else num_columns
    if data.shape[1] != width:
        raise ValueError(
            f"{name}.data has {data.shape[1]} columns; codec {codec!r} stores rows of {num_columns} values in {width}"
        )
    if codec in ("int8", "int4"):
        if scale is None:
            raise ValueError(f"{name}.scale is None; codec {codec!r} needs [N, 2] bfloat16 (scale, offset)")
        check_tensor(f"{name}.scale", scale, (torch.bfloat16,), (data.shape[0], 2))


def check_tensor(name: str, tensor: Tensor, dtypes: tuple, shape: tuple) -> None:
    """Raise ValueError unless the tensor has one of `dtypes` and the shape, in which None matches any size."""
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be {allowed}: convert it with .to()")
    if tensor.dim() != len(shape) or any(
        want is not None and got != want for got, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [{wanted}]")


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, copied only where they are not contiguous; None stays None."""
    return [None if t is None else t.contiguous() for t in tensors]
