// attention_aggregate as bindings.cpp and the kernels see it (vqgnn_kernels/attention_aggregate).
#pragma once

#include "cpu/dropout.h"
#include "cpu/table.h"

namespace vqgnn {

enum class Score { additive, dot, gatv2 };

// One pass over the rows of csr or of csr_t. A row of csr is a destination and its columns are sources (rows of x, then
// halo entries in `table`); a row of csr_t is a source and its columns are destinations (rows of grad_out, then halo
// entries in `table`, which holds stored gradients).
struct AttentionProblem {
  Score score;
  int64_t heads, f;           // f: columns of one head
  float slope, scale;
  Dropout dropout;            // of attention weights: the hash of (seed, destination, source, head)

  const int64_t* rowptr;
  int64_t num_rows;
  const int32_t* col;
  int64_t num_edges;
  const int64_t* halo;
  int64_t num_halo;
  Table table;
  int64_t num_own;            // columns below are the batch's own: rows of x, or of grad_out
  int64_t max_columns;        // rows of the per-column operand, key or query: no column may reach it

  const float* x;             // [b, heads, f]
  const float* query;         // additive: [.., heads], else [.., heads, f]; indexed by destination
  const float* key;           // additive: [.., heads], indexed by source
  const float* attention;     // gatv2: [heads, f]

  const float* edges;         // null, or what every edge brings: additive [num_edges, heads], gatv2 [num_edges, edge_dim]
  int64_t edge_dim;
  const float* edge_matrix;   // gatv2 with edges: [edge_dim, heads, f]

  const float* grad_out;      // [r, heads, f]
  const float* lse;           // [r, heads]
  const float* delta;         // [r, heads]: grad_out . out
  const float* halo_stats;    // [halo entries, 2, heads]: lse and delta of halo destinations
};

}  // namespace vqgnn
