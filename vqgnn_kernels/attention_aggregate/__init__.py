"""Message passing with an attention score for every edge, over in-batch rows and the halo's stored state."""

import torch
from torch import Tensor

from .._backend import implementation
from .._dropout import check_dropout, seed_tensor
from .._library import register, register_autograd
from .._types import CSR, FLOATS, Rows, bundled, check_csr, check_entries, check_rows, check_tensor
from ..store_io import pull_rows
from . import reference

__all__ = ["attention_aggregate", "code_scores", "row_scores"]

MODES = ("additive", "dot", "gatv2")
_FP32 = (torch.float32,)
_CHUNK = 65_536  # rows of a table decoded at a time for their scores


def attention_aggregate(
    x: Tensor,
    csr: CSR,
    query: Tensor,
    key: Tensor | None = None,
    *,
    heads: int,
    mode: str,
    rows: Rows | None = None,
    csr_t: CSR | None = None,
    grad_rows: Rows | None = None,
    halo_stats: Tensor | None = None,
    attention: Tensor | None = None,
    edge_matrix: Tensor | None = None,
    negative_slope: float = 0.2,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every row over its edges, by head; no array over edges, heads and features exists.

    out[i, h] = sum_j m_ijh / (1 - dropout) p_ijh x_jh,    p_ijh = exp(s_ijh - lse_ih),    lse_ih = log sum_j exp s_ijh

    with the score of the edge from source j to row i
        "additive" (GAT):   s_ijh = leaky_relu(key[j, h] + query[i, h])
        "dot":              s_ijh = scale * <query[i, h], x_jh>
        "gatv2":            s_ijh = <attention[h], leaky_relu(x_jh + query[i, h])>
    To the query of an edge (i, j), an edge with features adds
        "additive":         csr.weight[ij, h], a matrix product of its features that the caller makes: [e, H] is small
        "gatv2":            sum_d csr.weight[ij, d] edge_matrix[d, h], made edge by edge: [e, H, F] would not be
    A row of x or of a table serves as key and as value: x_jh is its columns h*F .. (h+1)*F.

    The gradient of x and key is exact over the batch's own rows. Out-of-batch destinations join it as constants: their
    output gradients from grad_rows, their softmax from halo_stats, their queries from query (equation 7's second term
    for attention); where these are stale and give a weight p above 1, it counts as 1. Tables are read again by the
    backward, which wants those of `rows` unchanged since the forward.
    Second derivatives do not exist.

    Args:
        x: [b, w] fp32/fp16/bf16, the batch's own rows, w = H*F.
        csr: r rows; columns < b are rows of x, the others are halo entries. Its weight is None or, of edges with
            features, [e, H] ("additive") or [e, D] ("gatv2").
        query: [r + h_t, H] ("additive") or [r + h_t, H, F]; the rows from r on belong to csr_t's halo and get no
            gradient. Without grad_rows r rows are enough.
        key: "additive" only, [b + h, H] for x's rows and csr's halo entries; the latter get no gradient. Without rows
            b rows are enough.
        heads: H.
        rows: the table of w columns that csr's halo entries point into; None: they take no part in the softmax.
        csr_t: the transposed matrix, b rows; columns < r are rows of out, the others are entries of csr_t.halo. Needed
            when x or key requires a gradient. Its weight is None or, where csr's is not, as wide; it gets no gradient.
        grad_rows: the table of stored output gradients, H*F columns, that csr_t.halo points into; None skips them.
        halo_stats: [h_t, 2, H] fp32 with grad_rows: lse and D = <grad_out, out> by head, of csr_t's halo entries.
        attention: "gatv2" only, [H, F].
        edge_matrix: "gatv2" with csr.weight only, [D, H, F]. Its gradient, or that of csr.weight in mode "additive", is
            that of the batch's rows; the features of "gatv2" get none.
        negative_slope: of the leaky relu.
        scale: of "dot".
        dropout: share of attention weights set to 0, in [0, 1).
        seed: of the dropout, a number or an int64 tensor [] on x's device (which a compiled step or a CUDA graph can
            draw anew). m_ijh depends on (seed mod 2^32, i, j, h) alone, so duplicate edges share theirs; stored
            destinations have no dropout.
    Returns:
        out [r, H, F] of x's dtype, 0 in rows without edges, and lse [r, H] fp32 (-inf there), which has no gradient.
    Raises:
        ValueError: wrong dtype, shape or argument, csr_t missing, or, on CPU back-ends, a column or halo entry out of
            range. On CUDA looking for these would need a synchronisation; such edges are skipped.
    """
    num_rows, b, w = _check_forward(x, csr, query, key, heads, mode, rows, attention, edge_matrix, dropout)
    wants_columns = x.requires_grad or (key is not None and key.requires_grad)
    if csr_t is None:
        if wants_columns and torch.is_grad_enabled():
            raise ValueError("csr_t is None, but x or key requires a gradient; pass the transposed CSR, or .detach()")
        if grad_rows is not None:
            raise ValueError("grad_rows was given without csr_t, the transposed CSR whose halo reads it; pass both")
    else:
        if check_csr("csr_t", csr_t._replace(weight=None)) != b:
            raise ValueError(f"csr_t has {csr_t.rowptr.shape[0] - 1} rows; it needs one for each of x's {b} rows")
        if (csr_t.weight is None) != (csr.weight is None):
            raise ValueError("csr and csr_t must both have a weight, or none: what their edges bring to the scores")
        _check_edges("csr_t", csr_t, mode, heads, edge_matrix)
    if grad_rows is not None:
        check_rows("grad_rows", grad_rows, w)
        num_halo = _num_halo(csr_t, grad_rows)
        if query.shape[0] != num_rows + num_halo:
            raise ValueError(
                f"query has {query.shape[0]} rows; with grad_rows it needs {num_rows} + {num_halo}, one more for each "
                "halo entry of csr_t"
            )
        if halo_stats is None:
            raise ValueError("halo_stats is None; grad_rows needs the softmax of its rows, [h_t, 2, H] fp32")
        check_tensor("halo_stats", halo_stats, _FP32, (num_halo, 2, heads))
    seed = seed_tensor(seed, x.device)
    out, lse = _attention_aggregate(
        x, *_flat(csr, rows), *_flat(csr_t, grad_rows), halo_stats, query.float(),
        *(None if t is None else t.float() for t in (key, attention, edge_matrix)),
        mode, heads, negative_slope, scale, dropout, seed,
    )  # fmt: skip
    return out, lse.detach()


def code_scores(rows: Rows, n_id: Tensor, table: Tensor) -> Tensor:
    """A linear function of decoded rows, without decoding them: the scores of halo nodes from tables over codewords.

    out[i, h] = sum_j table[j, codes[n_id[i], j], h]

    With table[j, k] = codebook[j, k] @ A[j*d : (j+1)*d] this is pull_rows(rows, n_id, m*d) @ A.

    Args:
        rows: a table of codec "pq", m branches; its codebook is not needed.
        n_id: [k] int64, rows to read.
        table: [m, K, H] fp32.
    Returns:
        [k, H] fp32, without gradient.
    Raises:
        ValueError: wrong codec, dtype or shape, or, on CPU back-ends, an n_id out of range (on CUDA such rows are 0).
            Codes >= K are not looked for; they give unspecified values.
    """
    if rows.codec != "pq":
        raise ValueError(f'rows.codec is {rows.codec!r}; scores from codewords need "pq"')
    check_rows("rows", rows, 0, codebook=False)
    check_tensor("n_id", n_id, (torch.int64,), (None,))
    check_tensor("table", table, _FP32, (rows.data.shape[1], None, None))
    return _code_scores(rows.data, n_id, table.detach())


def row_scores(rows: Rows, n_id: Tensor, weight: Tensor) -> Tensor:
    """A linear function of decoded rows of any codec, pull_rows(rows, n_id, w) @ weight, without all of them at once.

    Codes are not decoded: their scores are sums of table look-ups (`code_scores`).

    Args:
        rows: a table of w columns.
        n_id: [k] int64, rows to read.
        weight: [w, H] fp32.
    Returns:
        [k, H] fp32, without gradient.
    Raises:
        ValueError: as `code_scores` and `pull_rows`.
    """
    check_tensor("weight", weight, _FP32, (None, None))
    check_rows("rows", rows, weight.shape[0])
    check_tensor("n_id", n_id, (torch.int64,), (None,))
    return _row_scores(*rows, n_id, weight.detach())


def _check_forward(x, csr, query, key, heads, mode, rows, attention, edge_matrix, dropout) -> tuple[int, int, int]:
    """(r, b, w) of valid arguments."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; use one of {', '.join(MODES)}")
    check_dropout(dropout)
    check_tensor("x", x, FLOATS, (None, None))
    b, w = x.shape
    if heads < 1 or w % heads:
        raise ValueError(f"heads={heads} must be at least 1 and divide x's {w} columns")
    features = w // heads
    num_rows = check_csr("csr", csr._replace(weight=None))
    if edge_matrix is not None:
        check_tensor("edge_matrix", edge_matrix, FLOATS, (None, heads, features))
    if (edge_matrix is None) != (mode != "gatv2" or csr.weight is None):
        raise ValueError(f'edge_matrix is for mode "gatv2" with csr.weight, and needed there; got mode {mode!r}')
    _check_edges("csr", csr, mode, heads, edge_matrix)
    num_halo = 0
    if rows is not None:
        check_rows("rows", rows, w)
        num_halo = _num_halo(csr, rows)
    check_tensor("query", query, FLOATS, (None, heads) if mode == "additive" else (None, heads, features))
    if query.shape[0] < num_rows:
        raise ValueError(f"query has {query.shape[0]} rows; csr has {num_rows}")
    if (key is None) != (mode != "additive"):
        raise ValueError(f'key is for mode "additive", and needed there; got mode {mode!r}')
    if key is not None:
        check_tensor("key", key, FLOATS, (None, heads))
        if key.shape[0] < b + num_halo:
            raise ValueError(f"key has {key.shape[0]} rows; it needs {b} + {num_halo} for x's rows and csr's halo")
    if (attention is None) != (mode != "gatv2"):
        raise ValueError(f'attention is for mode "gatv2", and needed there; got mode {mode!r}')
    if attention is not None:
        check_tensor("attention", attention, FLOATS, (heads, features))
    return num_rows, b, w


def _check_edges(name: str, csr: CSR, mode: str, heads: int, edge_matrix: Tensor | None) -> None:
    if csr.weight is None:
        return
    if mode == "dot":
        raise ValueError(f'{name}.weight must be None in mode "dot", whose scores know no edge features')
    columns = heads if edge_matrix is None else edge_matrix.shape[0]
    check_tensor(f"{name}.weight", csr.weight, FLOATS, (csr.col.shape[0], columns))


def _num_halo(csr: CSR, rows: Rows) -> int:
    return (rows.data if csr.halo is None else csr.halo).shape[0]


def _flat(csr: CSR | None, rows: Rows | None) -> tuple:
    """The eight op arguments of a matrix and its table; codec "" says that there is no table."""
    rowptr, col, weight, halo = csr or (None,) * 4
    return (rowptr, col, None if weight is None else weight.float(), halo, *(rows or ("", None, None, None)))


def _forward_impl(x, *args):
    (csr, rows), operands = bundled(*args[:8]), args[17:]
    kernels = implementation(__name__, x, *args)
    if kernels is not reference:
        result = kernels.forward(x, csr, rows, *operands)
        if result is not None:
            return result
    check_entries(csr, x.shape[0], rows)
    return reference.forward(x, csr, rows, *operands)


def _forward_fake(x, rowptr, *args):
    heads = args[21]
    num_rows, features = rowptr.shape[0] - 1, x.shape[1] // heads
    return x.new_empty(num_rows, heads, features), x.new_empty(num_rows, heads, dtype=torch.float32)


def _rows_impl(grad_out, D, lse, x, *args):
    (csr, rows), operands = bundled(*args[:8]), args[8:]
    kernels = implementation(__name__, x, grad_out, *args)
    result = None
    if kernels is not reference:
        result = kernels.backward_rows(grad_out, D, lse, x, csr, rows, *operands)
    if result is None:
        check_entries(csr, x.shape[0], rows)
        result = reference.backward_rows(grad_out, D, lse, x, csr, rows, *operands)
    return tuple(lse.new_empty(0) if grad is None else grad for grad in result)


def _rows_fake(grad_out, D, lse, x, rowptr, *args):
    weight, query, attention, edge_matrix = args[1], args[7], args[9], args[10]
    like = (attention, weight if edge_matrix is None else edge_matrix)
    grad_query = query.new_empty(rowptr.shape[0] - 1, *query.shape[1:])
    return grad_query, *(query.new_empty(0) if t is None else t.new_empty(t.shape) for t in like)


def _columns_impl(grad_out, D, lse, x, *args):
    (csr_t, grad_rows), constants = bundled(*args[:8]), args[8:]
    kernels = implementation(__name__, x, grad_out, *args)
    result = None
    if kernels is not reference:
        result = kernels.backward_columns(grad_out, D, lse, x, csr_t, grad_rows, *constants)
    if result is None:
        check_entries(csr_t, grad_out.shape[0], grad_rows)
        result = reference.backward_columns(grad_out, D, lse, x, csr_t, grad_rows, *constants)
    grad_x, grad_key = result
    return grad_x, lse.new_empty(0) if grad_key is None else grad_key


def _columns_fake(grad_out, D, lse, x, *args):
    query, key = args[9], args[10]
    grad_key = query.new_empty(0) if key is None else key.new_empty(x.shape[0], key.shape[1])
    return x.new_empty(x.shape), grad_key


def _setup_context(ctx, inputs, output):
    # The tables are plain attributes, not save_for_backward: they may be updated in place between forward and backward,
    # which autograd's version counter would refuse.
    rowptr, col, weight, *ctx.table = inputs[1:9]
    ctx.matrix_t = inputs[9:18]  # with halo_stats
    ctx.options = inputs[22:]
    ctx.save_for_backward(inputs[0], rowptr, col, weight, *inputs[18:22], *output)


def _backward(ctx, grad_out, grad_lse):
    x, rowptr, col, weight, query, key, attention, edge_matrix, out, lse = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    needs_query, needs_key, needs_attention, needs_matrix = ctx.needs_input_grad[18:22]
    D = (grad_out.float() * out.float()).sum(2)
    operands = (query, key, attention, edge_matrix, *ctx.options)
    grad_x = grad_query = grad_key = grad_attention = grad_edge = None
    if needs_query or needs_attention or needs_weight or needs_matrix:
        grad_query, grad_attention, grad_edge = _backward_rows(
            grad_out, D, lse, x, rowptr, col, weight, *ctx.table, *operands
        )
        grad_query = _with_zeros(grad_query, query)
        if attention is None:
            grad_attention = None
    if needs_x or needs_key:
        grad_x, grad_key = _backward_columns(grad_out, D, lse, x, *ctx.matrix_t, *operands)
        grad_key = None if key is None else _with_zeros(grad_key, key)
    grad_weight = grad_edge if needs_weight and edge_matrix is None else None
    grad_matrix = grad_edge if needs_matrix else None
    before = (grad_x, None, None, grad_weight, *(None,) * 14)
    return *before, grad_query, grad_key, grad_attention, grad_matrix, *(None,) * 7


def _with_zeros(grad, tensor):
    """The gradient of all rows of `tensor`: those of the halo are constants."""
    return torch.cat([grad, grad.new_zeros(tensor.shape[0] - grad.shape[0], *tensor.shape[1:])])


def _scores_impl(data, n_id, table):
    rows = Rows("pq", data)
    kernels = implementation(__name__, data, n_id, table)
    if kernels is not reference:
        out = kernels.code_scores(rows, n_id, table)
        if out is not None:
            return out
    if n_id.numel() and (int(n_id.min()) < 0 or int(n_id.max()) >= data.shape[0]):
        raise ValueError(f"n_id spans {int(n_id.min())}..{int(n_id.max())}; the table has rows 0..{data.shape[0] - 1}")
    return reference.code_scores(rows, n_id, table)


def _scores_fake(data, n_id, table):
    return table.new_empty(n_id.shape[0], table.shape[2])


def _row_scores_impl(codec, data, scale, codebook, n_id, weight):
    rows = Rows(codec, data, scale, codebook)
    num_columns, heads = weight.shape
    with torch.autocast(weight.device.type, enabled=False):  # else products are bf16, and code_scores reads fp32
        if codec == "pq":
            m, _, d = codebook.shape
            padded = torch.nn.functional.pad(weight, (0, 0, 0, m * d - num_columns))
            return _scores_impl(data, n_id, codebook @ padded.view(m, d, heads))
        out = weight.new_empty(n_id.shape[0], heads)
        for chunk, scores in zip(n_id.split(_CHUNK), out.split(_CHUNK), strict=True):
            torch.mm(pull_rows(rows, chunk, num_columns), weight, out=scores)
    return out


def _row_scores_fake(codec, data, scale, codebook, n_id, weight):
    return weight.new_empty(n_id.shape[0], weight.shape[1])


_MATRIX = (
    "Tensor rowptr, Tensor col, Tensor? weight, Tensor? halo, str codec, Tensor? data, Tensor? scales,"
    " Tensor? codebook,"
)
_OPTIONS = (
    " Tensor query, Tensor? key, Tensor? attention, Tensor? edge_matrix, str mode, int heads,"
    " float negative_slope, float scale, float dropout, Tensor seed)"
)
_attention_aggregate = register(
    f"attention_aggregate(Tensor x, {_MATRIX} Tensor? t_rowptr, Tensor? t_col, Tensor? t_weight,"
    " Tensor? t_halo, str t_codec, Tensor? t_data, Tensor? t_scales, Tensor? t_codebook, Tensor? halo_stats,"
    f" {_OPTIONS} -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
_backward_rows = register(
    f"attention_aggregate_rows(Tensor grad_out, Tensor D, Tensor lse, Tensor x, {_MATRIX} {_OPTIONS}"
    " -> (Tensor, Tensor, Tensor)",
    _rows_impl,
    _rows_fake,
)
_backward_columns = register(
    f"attention_aggregate_columns(Tensor grad_out, Tensor D, Tensor lse, Tensor x, {_MATRIX} Tensor? halo_stats,"
    f" {_OPTIONS} -> (Tensor, Tensor)",
    _columns_impl,
    _columns_fake,
)
_row_scores = register(
    "row_scores(str codec, Tensor data, Tensor? scale, Tensor? codebook, Tensor n_id, Tensor weight) -> Tensor",
    _row_scores_impl,
    _row_scores_fake,
)
_code_scores = register("code_scores(Tensor data, Tensor n_id, Tensor table) -> Tensor", _scores_impl, _scores_fake)
register_autograd("attention_aggregate", _backward, _setup_context)
