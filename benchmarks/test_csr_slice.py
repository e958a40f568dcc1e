"""csr_slice against mask-based subgraph extraction and a plain C++ relabelling, for one random batch of 10 %.

pytest benchmarks/test_csr_slice.py --rows rows.csv
"""

import ctypes
import shutil
import subprocess

import pytest
import torch
from conftest import on_gpu
from graphs import power_law_csr

from vqgnn_kernels import csr_slice, csr_slice_values

# One hop from the batch, relabelled through a hash map, as pyg_autoscale does it: one direction, edges and weights.
RELABEL = r"""
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

extern "C" int64_t relabel(const int64_t* rowptr, const int64_t* col, const float* value, const int64_t* nodes,
                           int64_t b, int64_t* out_rowptr, int64_t* out_col, float* out_value, int64_t* n_id) {
  std::unordered_map<int64_t, int64_t> label;
  for (int64_t i = 0; i < b; ++i) label[nodes[i]] = i;
  std::vector<int64_t> halo;
  int64_t e = 0;
  out_rowptr[0] = 0;
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t k = rowptr[nodes[i]]; k < rowptr[nodes[i] + 1]; ++k, ++e) {
      const auto found = label.emplace(col[k], b + int64_t(halo.size()));
      if (found.second) halo.push_back(col[k]);
      out_col[e] = found.first->second;
      out_value[e] = value[k];
    }
    out_rowptr[i + 1] = e;
  }
  std::memcpy(n_id, nodes, b * 8);
  std::memcpy(n_id + b, halo.data(), halo.size() * 8);
  return int64_t(halo.size());
}
"""


def transposed(rowptr, col, weight):
    num_nodes = rowptr.shape[0] - 1
    row = torch.repeat_interleave(torch.arange(num_nodes), rowptr.diff())
    order = torch.argsort(col, stable=True)
    rowptr_t = torch.zeros_like(rowptr)
    rowptr_t[1:] = torch.bincount(col, minlength=num_nodes).cumsum(0)
    return rowptr_t, row[order].int(), weight[order]


@pytest.fixture(scope="module")
def problem():
    forward = power_law_csr(170_000, 2_300_000)
    torch.manual_seed(1)
    return forward, transposed(*forward), torch.randperm(170_000)[:17_000]


def both_directions(forward, backward, nodes):
    out = []
    for rowptr, col, weight in (forward, backward):
        rowptr_b, col_b, halo = csr_slice(rowptr, col, nodes)
        out.append((rowptr_b, col_b, halo, csr_slice_values(rowptr, nodes, rowptr_b, weight)))
    return out


def label_of(problem):
    forward, _, nodes = problem
    edges = csr_slice(forward[0], forward[1], nodes)[1].numel()
    return f"n=170000 e=2300000 b={nodes.numel()} edges={edges} both directions"


def test_against_masks(versus, problem):
    """The official VQ-GNN's way: a boolean mask of the batch's nodes over every edge, once a direction and part."""
    forward, _, nodes = problem
    row = torch.repeat_interleave(torch.arange(170_000), forward[0].diff())
    col, weight = forward[1].long(), forward[2]

    def masks():
        inside = torch.zeros(170_000, dtype=torch.bool)
        inside[nodes] = True
        label = torch.full((170_000,), -1)
        label[nodes] = torch.arange(nodes.numel())
        parts = []
        for start, end in ((row, col), (col, row)):
            for kept in (inside[start] & inside[end], inside[start] & ~inside[end]):
                parts.append((label[start[kept]], end[kept], weight[kept]))
        return parts

    (_, col_b, halo, weight_b), _ = both_directions(*problem)
    within, beyond = masks()[:2]
    own = col_b < nodes.numel()
    assert own.sum() == within[0].numel() and (~own).sum() == beyond[0].numel()
    torch.testing.assert_close(weight_b[own].double().sum(), within[2].double().sum())
    assert torch.equal(beyond[1].unique(), halo.sort().values)
    versus(lambda: both_directions(*problem), {"masks": masks}, size=label_of(problem), rounds=15)


def test_against_hash_map(versus, problem, tmp_path):
    """The peer builds one direction, we build both."""
    if on_gpu():
        pytest.skip("the peer runs on the CPU only")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("the peer needs a C++ compiler (c++)")
    (tmp_path / "relabel.cpp").write_text(RELABEL)
    library = tmp_path / "librelabel.so"
    command = [compiler, "-O3", "-shared", "-fPIC", "-std=c++17", str(tmp_path / "relabel.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    relabel = ctypes.CDLL(str(library)).relabel
    relabel.restype = ctypes.c_int64

    (rowptr, col, weight), _, nodes = problem
    col = col.long()
    (rowptr_b, col_b, halo, weight_b), _ = both_directions(*problem)

    def hash_map():
        e = int((rowptr[nodes + 1] - rowptr[nodes]).sum())
        out = (torch.empty(nodes.numel() + 1, dtype=torch.int64), torch.empty(e, dtype=torch.int64), torch.empty(e))
        n_id = torch.empty(nodes.numel() + e, dtype=torch.int64)
        tensors = (rowptr, col, weight, nodes)
        h = relabel(
            *(ctypes.c_void_p(t.data_ptr()) for t in tensors), ctypes.c_int64(nodes.numel()),
            *(ctypes.c_void_p(t.data_ptr()) for t in (*out, n_id)),
        )  # fmt: skip
        return (*out, n_id[: nodes.numel() + h])

    theirs = hash_map()
    assert (
        torch.equal(theirs[0], rowptr_b) and torch.equal(theirs[1], col_b.long()) and torch.equal(theirs[2], weight_b)
    )
    assert torch.equal(theirs[3], torch.cat([nodes, halo]))
    versus(lambda: both_directions(*problem), {"hash_map_one_direction": hash_map}, size=label_of(problem), rounds=15)
