"""One convolution over in-batch rows and the halo's stored state, without materialising the halo."""

import torch
from torch import Tensor

from .._backend import implementation
from .._dropout import check_dropout, seed_tensor
from .._library import register, register_autograd
from .._types import CSR, FLOATS, Rows, bundled, check_csr, check_entries, check_rows, check_tensor
from . import reference

__all__ = ["CSR", "Rows", "aggregate"]


def aggregate(
    x: Tensor,
    csr: CSR,
    rows: Rows | None = None,
    csr_t: CSR | None = None,
    grad_rows: Rows | None = None,
    *,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    grad_basis: Tensor | None = None,
) -> Tensor:
    """Add up every row's messages, from the batch's own rows and from the halo's stored state.

    out = C_BB x + C_BH X~_H                      (VQ-GNN, equation 6)
    grad_x = C_BB^T grad_out + C_HB^T G~_H        (equation 7: this function over csr_t and grad_rows)

    The halo is decoded edge by edge in registers; no [h, f] array exists. Sums are fp32, each row's in a fixed order
    (on the CPU in-batch edges first), so the result depends neither on the number of threads nor on scheduling. Rows,
    weights and codebooks get no gradient. They are read again by the backward as they are then, not as they were:
    writing new state into a table between forward and backward is allowed.

    Args:
        x: [b, f] fp32/fp16/bf16, the batch's own rows; b may be 0.
        csr: r rows; columns < b are rows of x, the others are halo entries.
        rows: the table that the halo entries point into; None skips them ("drop").
        csr_t: the transposed matrix, b rows; columns < r are rows of grad_out, the others are entries of csr_t.halo.
            Needed when x requires a gradient.
        grad_rows: the table of stored output gradients that csr_t.halo points into; None skips them.
        dropout: share of the halo's state X~_H set to 0, in [0, 1); the rest is scaled by 1 / (1 - dropout). What is
            dropped is a channel of a row, or of codes a branch, which is d of them.
        seed: of the dropout, a number or an int64 tensor [] on x's device (which a compiled step or a CUDA graph can
            draw anew). What is dropped depends on (seed mod 2^32, halo entry, channel or branch) alone: not on where
            the table is, and for all edges from a halo node it is the same.
        grad_basis: [f, r] fp32; grad_rows are then coordinates [N, r], and G~_H those times its transpose. As the sum
            is taken in r channels, that costs less than reading f of them.
    Returns:
        [r, f] of x's dtype.
    Raises:
        ValueError: wrong dtype or shape, dropout out of range, a column or halo entry out of range (found while the
            edges are read, at no extra pass), or csr_t or grad_rows missing. Codes >= K are not looked for; they give
            unspecified values. On CUDA entries out of range are skipped without an error, which would need a
            synchronisation.
    """
    check_tensor("x", x, FLOATS, (None, None))
    b, f = x.shape
    check_csr("csr", csr)
    check_dropout(dropout)
    if rows is not None:
        check_rows("rows", rows, f)
    if csr_t is None:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("csr_t is None, but x requires a gradient; pass the transposed CSR, or x.detach()")
        if grad_rows is not None:
            raise ValueError("grad_rows was given without csr_t, the transposed CSR whose halo reads it; pass both")
    else:
        if check_csr("csr_t", csr_t) != b:
            raise ValueError(f"csr_t has {csr_t.rowptr.shape[0] - 1} rows; it needs one for each of x's {b} rows")
        if grad_rows is not None:
            check_rows("grad_rows", grad_rows, f if grad_basis is None else grad_basis.shape[-1])
    if grad_basis is not None:
        check_tensor("grad_basis", grad_basis, (torch.float32,), (f, None))
        if grad_rows is None:
            raise ValueError("grad_basis was given without grad_rows, the coordinates in it; pass both")
    seed = seed_tensor(seed, x.device) if dropout else None
    return _aggregate(x, *_flat(csr, rows), *_flat(csr_t, grad_rows), grad_basis, dropout, seed)


def _flat(csr: CSR | None, rows: Rows | None) -> tuple:
    """The eight op arguments of a matrix and its table; codec "" says that there is no table."""
    return (*(csr or (None,) * 4), *(rows or ("", None, None, None)))


def _impl(x, *args):
    csr, rows = bundled(*args[:8])
    kernels = implementation(__name__, x, *args)
    if kernels is not reference:
        out = kernels.aggregate(x, csr, rows, *args[17:])
        if out is not None:
            return out
    check_entries(csr, x.shape[0], rows)
    return reference.aggregate(x, csr, rows, *args[17:])


def _fake(x, rowptr, *args):
    return x.new_empty(rowptr.shape[0] - 1, x.shape[1])


def _setup_context(ctx, inputs, output):
    # Plain attributes, not save_for_backward: the tables are updated in place between forward and backward on purpose,
    # which autograd's version counter would refuse.
    ctx.forward_matrix = inputs[1:5]
    ctx.backward_matrix, ctx.table, ctx.basis = inputs[9:13], inputs[13:17], inputs[17]


def _backward(ctx, grad_out):
    nothing = (None, 0.0, None)  # basis, dropout, seed
    no_table = ("", None, None, None)  # the table is a constant: a second derivative sees the matrix alone
    forward = (*ctx.forward_matrix, *no_table, *nothing)
    matrix, table, basis = ctx.backward_matrix, ctx.table, ctx.basis
    if basis is None:
        return _aggregate(grad_out, *matrix, *table, *forward), *(None,) * 19
    grad_x = _aggregate(grad_out, *matrix, *no_table, *forward)
    zeros = basis.new_zeros(grad_out.shape[0], basis.shape[1])
    coordinates = _aggregate(zeros, *matrix, *table, *(None,) * 4, *no_table, *nothing)
    if grad_x.dtype == basis.dtype:
        grad_x.addmm_(coordinates, basis.T)
    else:
        grad_x.add_((coordinates @ basis.T).to(grad_x.dtype))
    return grad_x, *(None,) * 19


_aggregate = register(
    "aggregate(Tensor x, Tensor rowptr, Tensor col, Tensor? weight, Tensor? halo,"
    " str codec, Tensor? data, Tensor? scale, Tensor? codebook,"
    " Tensor? t_rowptr, Tensor? t_col, Tensor? t_weight, Tensor? t_halo,"
    " str t_codec, Tensor? t_data, Tensor? t_scale, Tensor? t_codebook,"
    " Tensor? grad_basis, float dropout, Tensor? seed) -> Tensor",
    _impl,
    _fake,
)
register_autograd("aggregate", _backward, _setup_context)
