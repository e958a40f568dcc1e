// Rows of a CSR matrix with their columns relabelled: in-batch neighbours first, then the halo by first appearance.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/dispatch.h"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

// label + 1 of every node of the graph, 0 for none. Kept between calls, all 0 outside of one, so that a call costs
// nothing a node of the graph.
thread_local std::vector<int32_t> t_label;

constexpr int64_t kAhead = 64;  // labels of a row fetched ahead at most

}  // namespace

// Writes rowptr_b [b + 1]; false when a node or its row's bounds are out of range.
bool csr_slice_rowptr(const int64_t* rowptr, int64_t n, int64_t num_edges, const int64_t* nodes, int64_t b,
                      int64_t* rowptr_b) {
  int64_t e = 0;
  rowptr_b[0] = 0;
  for (int64_t i = 0; i < b; ++i) {
    const int64_t node = nodes[i];
    if (uint64_t(node) >= uint64_t(n)) return false;
    const int64_t start = rowptr[node], stop = rowptr[node + 1];
    if (start < 0 || stop < start || stop > num_edges) return false;
    rowptr_b[i + 1] = e += stop - start;
  }
  return true;
}

// Writes col_b [rowptr_b[b]] and the halo; returns the halo's size, or -1 when a node comes twice or a column is out of
// range. csr_slice_rowptr has checked the nodes.
int64_t csr_slice(const int64_t* rowptr, const int32_t* col, int64_t n, const int64_t* nodes, int64_t b, int32_t* col_b,
                  int64_t* halo) {
  if (int64_t(t_label.size()) < n) t_label.resize(n);
  int32_t* label = t_label.data();
  bool good = true;
  int64_t known = 0;
  for (; known < b && good; ++known) {
    good = label[nodes[known]] == 0;
    if (good) label[nodes[known]] = int32_t(known + 1);
  }
  if (!good) --known;  // the repeated node's label belongs to its first occurrence
  int32_t next = int32_t(b);
  for (int64_t i = 0; i < b && good; ++i) {
    // Rows lie far apart: the labels of the next one are fetched while this one is relabelled, its columns a row before.
    if (i + 2 < b) __builtin_prefetch(col + rowptr[nodes[i + 2]]);
    if (i + 1 < b) {
      const int64_t first = rowptr[nodes[i + 1]], last = std::min(rowptr[nodes[i + 1] + 1], first + kAhead);
      for (int64_t e = first; e < last; ++e) __builtin_prefetch(label + uint32_t(col[e]));
    }
    const int64_t stop = rowptr[nodes[i] + 1];
    for (int64_t e = rowptr[nodes[i]]; e < stop; ++e) {
      const int64_t c = col[e];
      if (uint64_t(c) >= uint64_t(n)) {
        good = false;
        break;
      }
      if (label[c] == 0) {
        halo[next - b] = c;
        label[c] = ++next;
      }
      *col_b++ = label[c] - 1;
    }
  }
  for (int64_t i = 0; i < known; ++i) label[nodes[i]] = 0;
  for (int64_t i = 0; i < next - b; ++i) label[halo[i]] = 0;
  return good ? next - b : -1;
}

// out[rowptr_b[i] ..] = values of row nodes[i], num_edges_b in all; false when rowptr_b is not the nodes' degrees summed up.
bool csr_slice_values(const int64_t* rowptr, int64_t n, int64_t num_edges, const int64_t* nodes, int64_t b,
                      const int64_t* rowptr_b, int64_t num_edges_b, const float* values, float* out) {
  int64_t e = 0;
  for (int64_t i = 0; i < b; ++i) {
    const int64_t node = nodes[i];
    if (uint64_t(node) >= uint64_t(n)) return false;
    const int64_t start = rowptr[node], stop = rowptr[node + 1];
    if (start < 0 || stop < start || stop > num_edges) return false;
    if (rowptr_b[i] != e || rowptr_b[i + 1] != e + stop - start || rowptr_b[i + 1] > num_edges_b) return false;
    std::copy(values + start, values + stop, out + e);
    e += stop - start;
  }
  return rowptr_b[b] == e && e == num_edges_b;
}

}  // namespace VQGNN_ISA
}  // namespace vqgnn
