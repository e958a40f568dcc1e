"""Graph diffusion convolution: a graph's edges replaced by its strongest diffusion weights, once, before training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import add_self_loops, coalesce, is_undirected, scatter
from tqdm import tqdm

from vqgnn_kernels import CSR, aggregate

from .disk_graph import MappedData
from .graph import Matrix

METHODS = ("ppr", "heat")
NORMALISATIONS = ("sym", "col", "row")
_TOP_K = 64
_BLOCK_BYTES = 64e6  # of a block of columns of S, beside which half a dozen arrays as large are held for a while
_LANES = 32  # a block's columns are a multiple of it: kernels are up to twice as fast
_MOST_TERMS = 2048


@torch.no_grad()
def gdc(
    data: Data,
    method: str = "ppr",
    alpha: float = 0.15,
    t: float = 5.0,
    top_k: int | None = None,
    eps: float | None = None,
    self_loop_weight: float = 1.0,
    normalization_in: str = "sym",
    normalization_out: str | None = "col",
    tolerance: float = 1e-6,
    block: int | None = None,
    progress: bool = False,
) -> Data:
    """A copy of `data` whose edges are those of a sparsified diffusion matrix S (Gasteiger et al. 2019, eq. 1).

    S = sum_k theta_k T^k,    "ppr": theta_k = alpha (1 - alpha)^k,    "heat": theta_k = e^-t t^k / k!

    What PyG's `transforms.GDC` computes in its exact mode from a dense [n, n] matrix is computed here for a block of
    columns of S at a time: by a Chebyshev series where edge weights are symmetric, which needs a third of the terms,
    else by the series above. Memory is O(n top_k) for the result and about 500 MB for the block; time is O(n e) for
    every term: hours of a core for some 100,000 nodes, so save the result. Train with `GCNConv(normalize=False)`: its
    `edge_weight` is normalised already.

    Args:
        data: with edge_index and, where edges have weights, edge_weight [num_edges] >= 0. edge_attr and edge_type
            belong to the old edges, and are left out of the result.
        method: "ppr" (personalised PageRank) or "heat" (the heat kernel).
        alpha: return probability of "ppr", in (0, 1).
        t: time of "heat", > 0.
        top_k: keep the k largest weights into every node; 64 where eps is not given either.
        eps: keep weights >= eps; with top_k, both must hold.
        self_loop_weight: of the loop that every node gets first; 0 adds none.
        normalization_in: of T: "sym" (D^-1/2 A D^-1/2), "col" (A D^-1) or "row" (D^-1 A); A[i, j] is of edge i to j.
        normalization_out: of the result, the same or None. "col" makes the weights into every node sum to 1.
        tolerance: what may be left out of the series, and below which a weight counts as 0.
        block: columns of S computed at a time; default: as many as take 64 MB.
        progress: show a bar.
    Raises:
        ValueError: an unknown or impossible option, or a graph on disk.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    for name, value, allowed in (
        ("normalization_in", normalization_in, NORMALISATIONS),
        ("normalization_out", normalization_out, (*NORMALISATIONS, None)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")
    for name, value, good, allowed in (
        ("alpha", alpha, 0 < alpha < 1, "in (0, 1)"),
        ("t", t, t > 0, "above 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("eps", eps, eps is None or eps > 0, "above 0"),
        ("self_loop_weight", self_loop_weight, self_loop_weight >= 0, "at least 0"),
        ("tolerance", tolerance, tolerance > 0, "above 0"),
        ("block", block, block is None or block >= 1, "at least 1"),
    ):
        if not good:
            raise ValueError(f"{name}={value} is not allowed; it must be {allowed}")
    if isinstance(data, MappedData):
        raise ValueError("gdc needs a graph in memory, and data is one on disk; load it as a PyG Data")
    n, edge_index, weight = data.num_nodes, data.edge_index, data.get("edge_weight")
    if weight is not None and (weight.shape != edge_index.shape[1:] or bool((weight < 0).any())):
        raise ValueError(f"data.edge_weight {list(weight.shape)} must be one number >= 0 for each edge")
    weight = edge_index.new_ones(edge_index.size(1), dtype=torch.float32) if weight is None else weight.float()
    if self_loop_weight:
        edge_index, weight = add_self_loops(edge_index, weight, fill_value=self_loop_weight, num_nodes=n)
    edge_index, weight = coalesce(edge_index, weight, n)
    symmetric = is_undirected(edge_index, weight, n)
    terms = _series(method, alpha, t, tolerance, symmetric)
    matrix = Matrix.build(edge_index.flip(0), _normalised(edge_index, weight, n, normalization_in), n)
    transition = CSR(matrix.rowptr, matrix.col, matrix.weight, edge_index.new_empty(0))
    if top_k is None and eps is None:
        top_k = _TOP_K
    edges, weights = [], []
    if block is None:
        block = max(1, int(_BLOCK_BYTES / (4 * _LANES * n))) * _LANES
    targets = torch.arange(n, device=edge_index.device).split(block)
    for target in tqdm(targets, disable=not progress, desc="diffusion"):
        into = _columns(transition, target, terms, symmetric).t().contiguous()
        kept = into >= max(eps or 0.0, tolerance)
        if top_k is not None:
            kept &= torch.zeros_like(kept).scatter_(1, into.topk(min(top_k, n)).indices, True)
        row, source = kept.nonzero(as_tuple=True)
        edges.append(torch.stack([source, target[row]]))
        weights.append(into[row, source])
    out = copy.copy(data)
    for name in ("edge_attr", "edge_type"):
        if name in out:
            del out[name]
    out.edge_index = torch.cat(edges, 1)
    out.edge_weight = _normalised(out.edge_index, torch.cat(weights), n, normalization_out)
    return out


def _normalised(edge_index: Tensor, weight: Tensor, num_nodes: int, how: str | None) -> Tensor:
    if how is None:
        return weight
    source, target = edge_index
    ends = (source,) if how == "row" else (target,)
    total = scatter(weight, ends[0], 0, num_nodes, reduce="sum")
    if how == "sym":
        ends, total = (source, target), total.sqrt()
    scale = torch.where(total > 0, 1 / total, 0.0)
    for end in ends:
        weight = weight * scale[end]
    return weight


def _series(method: str, alpha: float, t: float, tolerance: float, chebyshev: bool) -> list[float]:
    """Coefficients of f(T) by Chebyshev polynomials of T, whose eigenvalues lie in [-1, 1], or by powers of it."""
    k = torch.arange(_MOST_TERMS, dtype=torch.float64)
    if chebyshev:
        angle = (k + 0.5) * torch.pi / _MOST_TERMS
        x = angle.cos()
        values = alpha / (1 - (1 - alpha) * x) if method == "ppr" else (t * (x - 1)).exp()
        shift = torch.polar(torch.ones_like(k), -k * torch.pi / (2 * _MOST_TERMS))
        spectrum = torch.fft.fft(values, 2 * _MOST_TERMS)[:_MOST_TERMS]
        terms = 2 / _MOST_TERMS * (spectrum * shift).real  # the cosine transform of f(cos angle)
        terms[0] /= 2
    elif method == "ppr":
        terms = alpha * (1 - alpha) ** k
    else:
        terms = (k * torch.tensor(t, dtype=torch.float64).log() - t - (k + 1).lgamma()).exp()
    if abs(1 - float(terms.sum())) > tolerance:  # f(1) = 1
        raise ValueError(
            f"alpha={alpha}, t={t}, tolerance={tolerance} need more than {_MOST_TERMS} terms; use a larger alpha or "
            "tolerance, or a smaller t"
        )
    rest = terms.abs().flip(0).cumsum(0).flip(0)
    return terms[: max(int((rest > tolerance).sum()), 1)].tolist()


def _columns(transition: CSR, columns: Tensor, terms: list[float], chebyshev: bool) -> Tensor:
    """[n, c] columns of f(T), by as many products with T as there are terms."""
    now = columns.new_zeros(transition.rowptr.numel() - 1, columns.numel(), dtype=torch.float32)
    now[columns, torch.arange(columns.numel(), device=columns.device)] = 1.0
    before, out = None, terms[0] * now
    for term in terms[1:]:
        after = aggregate(now, transition)
        if chebyshev and before is not None:
            after.mul_(2).sub_(before)
        before, now = now, after
        out.add_(now, alpha=term)
    return out
