// Softmax attention over each row's edges. Nothing of size [edges, heads, f] exists.
//
// A thread takes a row and goes over its edges in blocks of kBlock: it decodes the block's halo rows into a small
// buffer, computes the scores of all heads as [heads, kBlock] arrays (exp, masks and maxima are then vector loops over
// edges, whatever the number of heads), and adds the block's messages with the sums in registers. The forward rescales
// its sums when a block raises the maximum; the backward knows the maximum (lse) beforehand. One thread sums a row, in
// edge order, so the result does not depend on the number of threads.
#include "cpu/attention_aggregate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/dispatch.h"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

using Problem = AttentionProblem;

constexpr int kBlock = 32;      // edges at a time
constexpr int kChunkRows = 16;  // rows a thread takes at a time
constexpr int kParts = 256;     // partial sums of a weight's gradient: fixed, so that the threads do not matter
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- One edge, one head ---------------------------------------------------------------------------------------------

VQGNN_INLINE float leaky(float v, float slope) { return v > 0.0f ? v : slope * v; }
VQGNN_INLINE float leaky_slope(float v, float slope) { return v > 0.0f ? 1.0f : slope; }

// Within 2 units in the last place; 0 below the smallest normal number. Plain arithmetic, so that loops vectorise.
VQGNN_INLINE float exponential(float v) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
  const float clamped = v > 88.0f ? 88.0f : v < -87.3f ? -87.3f : v;
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float t = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * t + 1.3981999507e-3f;
  sum = sum * t + 8.3334519073e-3f;
  sum = sum * t + 4.1665795894e-2f;
  sum = sum * t + 1.6666665459e-1f;
  sum = sum * t + 5.0000001201e-1f;
  sum = sum * t * t + t + 1.0f;
  const float result = bits_to_float(float_to_bits(sum) + (float_to_bits(shifted) << 23));
  return v < -87.3f ? 0.0f : v != v ? v : result;
}

VQGNN_INLINE float dot(const float* a, const float* b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < n; ++c) sum += a[c] * b[c];
  return sum;
}

template <Score score>
VQGNN_INLINE float edge_score(const Problem& p, const float* x, const float* query, const float* key, int64_t h) {
  if constexpr (score == Score::additive) return leaky(key[h] + query[h], p.slope);
  x += h * p.f;
  query += h * p.f;
  if constexpr (score == Score::dot) return p.scale * dot(query, x, p.f);
  const float* attention = p.attention + h * p.f;
  const float slope = p.slope;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < p.f; ++c) sum += attention[c] * leaky(x[c] + query[c], slope);
  return sum;
}

// ---- A block of edges -----------------------------------------------------------------------------------------------

// sums[0 .. f - 1] += the sum of weight[k] * row[k][offset + c]
template <int nv>
VQGNN_INLINE void add_vectors(float* sums, const float* const* row, int64_t offset, const float* weight, int count) {
  Floats acc[nv];
  for (int v = 0; v < nv; ++v) acc[v] = load<Floats>(sums + v * kLanes);
  for (int k = 0; k < count; ++k) {
    for (int v = 0; v < nv; ++v) acc[v] += weight[k] * load<Floats>(row[k] + offset + v * kLanes);
  }
  for (int v = 0; v < nv; ++v) store(sums + v * kLanes, acc[v]);
}

void add_rows(float* sums, int64_t f, const float* const* row, int64_t offset, const float* weight, int count) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= f; c += 4 * kLanes) add_vectors<4>(sums + c, row, offset + c, weight, count);
  for (; c + kLanes <= f; c += kLanes) add_vectors<1>(sums + c, row, offset + c, weight, count);
  for (; c < f; ++c) {
    for (int k = 0; k < count; ++k) sums[c] += weight[k] * row[k][offset + c];
  }
}

// A thread's scratch memory. Arrays over heads and edges are [heads, kBlock].
struct Block {
  int count;                   // edges in the block
  int64_t column[kBlock];
  const float* row[kBlock];    // their rows of x or grad_out, or the decoded ones
  const float* query[kBlock];  // csr_t, or edges with features: their destinations' queries, with what they bring
  int64_t edge[kBlock];        // with features: their numbers in col
  std::vector<float> decoded, asked, p, keep, ds, top, total;

  explicit Block(const Problem& problem)
      : decoded(kBlock * problem.heads * problem.f),
        asked(problem.edges ? kBlock * problem.heads * (problem.edge_matrix ? problem.f : 1) : 0),
        p(problem.heads * kBlock),
        keep(problem.heads * kBlock),
        ds(problem.heads * kBlock),
        top(problem.heads),
        total(problem.heads) {}
};

VQGNN_INLINE void prefetch(const float* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(row + c);
}

// Takes edges from e on, up to kBlock of them, and moves e behind them; false when an entry is out of range.
template <bool edges>
bool fill(const Problem& p, const float* own, int64_t& e, int64_t end, Block& block) {
  const int64_t width = p.heads * p.f;
  bool good = true;
  block.count = 0;
  for (; e < end && block.count < kBlock; ++e) {
    const int64_t c = p.col[e];
    const int k = block.count;
    if (c < 0) {
      good = false;
      continue;
    }
    if (c < p.num_own) {
      block.row[k] = own + c * width;
      prefetch(block.row[k], width);
    } else {
      if (p.table.codec == Codec::none) continue;
      int64_t row = c - p.num_own;
      if (p.num_halo >= 0) row = row < p.num_halo ? p.halo[row] : -1;
      if (c >= p.max_columns || uint64_t(row) >= uint64_t(p.table.num_rows)) {
        good = false;
        continue;
      }
      float* decoded = block.decoded.data() + k * width;
      decode_row(p.table, row, width, decoded);
      block.row[k] = decoded;
    }
    block.column[k] = c;
    if constexpr (edges) block.edge[k] = e;
    ++block.count;
  }
  return good;
}

// Adds to the query of edge k's destination what the edge brings: the score sees their sum.
template <Score score>
VQGNN_INLINE void ask(const Problem& p, Block& block, int k, const float* query) {
  const int64_t width = p.heads * (score == Score::additive ? 1 : p.f);
  float* asked = block.asked.data() + k * width;
  block.query[k] = asked;
  if constexpr (score == Score::additive) {
    const float* edge = p.edges + block.edge[k] * width;
    for (int64_t h = 0; h < width; ++h) asked[h] = query[h] + edge[h];
  } else {
    const float* edge = p.edges + block.edge[k] * p.edge_dim;
    std::copy_n(query, width, asked);
    for (int64_t d = 0; d < p.edge_dim; ++d) {
      const float feature = edge[d];
      const float* matrix = p.edge_matrix + d * width;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) asked[c] += feature * matrix[c];
    }
  }
}

bool row_is_valid(const Problem& p, int64_t i) {
  return p.rowptr[i] >= 0 && p.rowptr[i] <= p.rowptr[i + 1] && p.rowptr[i + 1] <= p.num_edges;
}

// keep[k] = 1 / (1 - dropout), or 0 where head h drops edge k. chain[k]: the hash of (seed, destination, source).
VQGNN_INLINE void keep_head(const Problem& p, const uint32_t* chain, int64_t h, int count, float* keep) {
  for (int k = 0; k < count; ++k) {
    keep[k] = mix(chain[k] ^ uint32_t(h)) <= p.dropout.last ? 0.0f : p.dropout.keep_scale;
  }
}

template <typename Chain>
void fill_keep(const Problem& p, Block& block, const Chain& chain_of) {
  if (!p.dropout.on) {
    std::fill(block.keep.begin(), block.keep.end(), 1.0f);
    return;
  }
  uint32_t chain[kBlock];
  for (int k = 0; k < block.count; ++k) chain[k] = chain_of(uint32_t(block.column[k]));
  for (int64_t h = 0; h < p.heads; ++h) keep_head(p, chain, h, block.count, block.keep.data() + h * kBlock);
}

// Runs `visit(row, block)` for all rows; false when a row was bad. Rows are handed out in fixed chunks.
template <typename Visit>
bool for_rows(const Problem& p, int64_t chunk_rows, const Visit& visit) {
  bool good = p.rowptr[0] == 0 && p.rowptr[p.num_rows] == p.num_edges;
  const int64_t num_chunks = (p.num_rows + chunk_rows - 1) / chunk_rows;
#pragma omp parallel reduction(&& : good)
  {
    Block block(p);
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const int64_t end = std::min((chunk + 1) * chunk_rows, p.num_rows);
      for (int64_t i = chunk * chunk_rows; i < end; ++i) good = row_is_valid(p, i) && visit(i, chunk, block) && good;
    }
  }
  return good;
}

// out [size] = the sum of kParts arrays of `size` numbers
void add_parts(const std::vector<float>& parts, int64_t size, float* out) {
  std::fill(out, out + size, 0.0f);
  for (int64_t part = 0; part < kParts; ++part) {
    for (int64_t c = 0; c < size; ++c) out[c] += parts[part * size + c];
  }
}

// ---- The three passes over a row ------------------------------------------------------------------------------------

template <Score score, bool edges>
bool forward_row(const Problem& p, int64_t i, Block& block, float* out, float* lse) {
  const int64_t heads = p.heads, f = p.f;
  const float* query = p.query + i * heads * (score == Score::additive ? 1 : f);
  const uint32_t row_chain = mix(mix(p.dropout.seed) ^ uint32_t(i));
  std::fill(out, out + heads * f, 0.0f);
  std::fill(block.top.begin(), block.top.end(), -kInfinity);
  std::fill(block.total.begin(), block.total.end(), 0.0f);
  bool good = true;
  for (int64_t e = p.rowptr[i]; e < p.rowptr[i + 1];) {
    good &= fill<edges>(p, p.x, e, p.rowptr[i + 1], block);
    const int count = block.count;
    if (count == 0) continue;
    for (int k = 0; k < count; ++k) {
      const float* key = score == Score::additive ? p.key + block.column[k] * heads : nullptr;
      if constexpr (edges) ask<score>(p, block, k, query);
      const float* asked = edges ? block.query[k] : query;
      for (int64_t h = 0; h < heads; ++h) block.p[h * kBlock + k] = edge_score<score>(p, block.row[k], asked, key, h);
    }
    fill_keep(p, block, [=](uint32_t column) { return mix(row_chain ^ column); });
    for (int64_t h = 0; h < heads; ++h) {
      float* weight = block.p.data() + h * kBlock;
      const float* keep = block.keep.data() + h * kBlock;
      const float old = block.top[h];
      float top = old, total = 0.0f;
      for (int k = 0; k < count; ++k) top = std::max(top, weight[k]);
      if (top > old) {
        const float shrink = exponential(old - top);
        block.total[h] *= shrink;
        for (int64_t c = 0; c < f; ++c) out[h * f + c] *= shrink;
        block.top[h] = top;
      }
#pragma omp simd reduction(+ : total)
      for (int k = 0; k < count; ++k) {
        const float value = exponential(weight[k] - top);
        total += value;
        weight[k] = value * keep[k];
      }
      block.total[h] += total;
      add_rows(out + h * f, f, block.row, h * f, weight, count);
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    const float total = block.total[h];
    lse[h] = block.top[h] + std::log(total);
    const float norm = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t c = 0; c < f; ++c) out[h * f + c] *= norm;
  }
  return good;
}

// grad_attention and, of gatv2, grad_edges [edge_dim, heads, f] are added to; else grad_edges is [num_edges, heads].
template <Score score, bool edges>
bool backward_row(const Problem& p, int64_t i, Block& block, float* grad_query, float* grad_attention,
                  float* grad_edges) {
  const int64_t heads = p.heads, f = p.f;
  const int64_t query_width = heads * (score == Score::additive ? 1 : f);
  const float* query = p.query + i * query_width;
  const float slope = p.slope;
  const uint32_t row_chain = mix(mix(p.dropout.seed) ^ uint32_t(i));
  std::fill(grad_query, grad_query + query_width, 0.0f);
  bool good = true;
  for (int64_t e = p.rowptr[i]; e < p.rowptr[i + 1];) {
    good &= fill<edges>(p, p.x, e, p.rowptr[i + 1], block);
    const int count = block.count;
    if constexpr (edges) {
      for (int k = 0; k < count; ++k) ask<score>(p, block, k, query);
    }
    fill_keep(p, block, [=](uint32_t column) { return mix(row_chain ^ column); });
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t offset = h * f;
      const float* grad = p.grad_out + (i * heads + h) * f;
      const float lse = p.lse[i * heads + h], delta = p.delta[i * heads + h];
      float* ds = block.ds.data() + h * kBlock;
      float* weight = block.p.data() + h * kBlock;
      const float* keep = block.keep.data() + h * kBlock;
      for (int k = 0; k < count; ++k) {
        const float* key = score == Score::additive ? p.key + block.column[k] * heads : nullptr;
        weight[k] = edge_score<score>(p, block.row[k], edges ? block.query[k] : query, key, h);
        ds[k] = dot(grad, block.row[k] + offset, f);
      }
      for (int k = 0; k < count; ++k) ds[k] = exponential(weight[k] - lse) * (keep[k] * ds[k] - delta);
      if constexpr (score == Score::additive) {
        for (int k = 0; k < count; ++k) {
          const float asked = edges ? block.query[k][h] : query[h];
          const float by_query = ds[k] * leaky_slope(p.key[block.column[k] * heads + h] + asked, slope);
          grad_query[h] += by_query;
          if constexpr (edges) grad_edges[block.edge[k] * heads + h] = by_query;
        }
      } else if constexpr (score == Score::dot) {
        for (int k = 0; k < count; ++k) ds[k] *= p.scale;
        add_rows(grad_query + h * f, f, block.row, offset, ds, count);
      } else {
        const float* attention = p.attention + h * f;
        for (int k = 0; k < count; ++k) {
          const float* x = block.row[k] + offset;
          const float* q = (edges ? block.query[k] : query) + h * f;
          // the edge's own share, in place of what it asked
          float* share = edges ? block.asked.data() + (k * heads + h) * f : nullptr;
#pragma omp simd
          for (int64_t c = 0; c < f; ++c) {
            const float v = x[c] + q[c];
            const float by_query = ds[k] * attention[c] * leaky_slope(v, slope);
            grad_query[h * f + c] += by_query;
            grad_attention[h * f + c] += ds[k] * leaky(v, slope);
            if constexpr (edges) share[c] = by_query;
          }
        }
      }
    }
    if constexpr (edges && score == Score::gatv2) {
      float feature[kBlock];
      for (int64_t d = 0; d < p.edge_dim; ++d) {
        for (int k = 0; k < count; ++k) feature[k] = p.edges[block.edge[k] * p.edge_dim + d];
        add_rows(grad_edges + d * query_width, query_width, block.query, 0, feature, count);
      }
    }
  }
  return good;
}

template <Score score, bool edges>
bool backward_column(const Problem& p, int64_t j, Block& block, float* grad_x, float* grad_key) {
  const int64_t heads = p.heads, f = p.f, width = heads * f;
  const int64_t query_width = heads * (score == Score::additive ? 1 : f);
  const float* x = p.x + j * width;
  const float* key = score == Score::additive ? p.key + j * heads : nullptr;
  const float slope = p.slope;
  const uint32_t first = mix(p.dropout.seed);
  std::fill(grad_x, grad_x + width, 0.0f);
  if (grad_key) std::fill(grad_key, grad_key + heads, 0.0f);
  bool good = true;
  for (int64_t e = p.rowptr[j]; e < p.rowptr[j + 1];) {
    good &= fill<edges>(p, p.grad_out, e, p.rowptr[j + 1], block);
    const int count = block.count;
    const float *lse[kBlock], *delta[kBlock];
    for (int k = 0; k < count; ++k) {
      const int64_t i = block.column[k], entry = i - p.num_own;
      block.query[k] = p.query + i * query_width;
      prefetch(block.query[k], query_width);
      lse[k] = entry < 0 ? p.lse + i * heads : p.halo_stats + 2 * entry * heads;
      delta[k] = entry < 0 ? p.delta + i * heads : lse[k] + heads;
    }
    if constexpr (edges) {
      for (int k = 0; k < count; ++k) ask<score>(p, block, k, block.query[k]);
    }
    fill_keep(p, block, [=](uint32_t i) { return mix(mix(first ^ i) ^ uint32_t(j)); });
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t offset = h * f;
      float* ds = block.ds.data() + h * kBlock;
      float* weight = block.p.data() + h * kBlock;
      float* keep = block.keep.data() + h * kBlock;
      for (int k = 0; k < count; ++k) {
        if (block.column[k] >= p.num_own) keep[k] = 1.0f;  // what lies outside the batch was not dropped
        // A stored destination's lse may be older than its score here: its weight stays at most 1.
        weight[k] = std::min(edge_score<score>(p, x, block.query[k], key, h) - lse[k][h], 0.0f);
        ds[k] = dot(block.row[k] + h * f, x + offset, f);
      }
      for (int k = 0; k < count; ++k) weight[k] = exponential(weight[k]);
      for (int k = 0; k < count; ++k) {
        ds[k] = weight[k] * (keep[k] * ds[k] - delta[k][h]);
        weight[k] *= keep[k];
      }
      add_rows(grad_x + offset, f, block.row, h * f, weight, count);
      if constexpr (score == Score::additive) {
        for (int k = 0; k < count; ++k) grad_key[h] += ds[k] * leaky_slope(key[h] + block.query[k][h], slope);
      } else if constexpr (score == Score::dot) {
        for (int k = 0; k < count; ++k) ds[k] *= p.scale;
        add_rows(grad_x + offset, f, block.query, h * f, ds, count);
      } else {
        const float* attention = p.attention + h * f;
        for (int k = 0; k < count; ++k) {
          const float* q = block.query[k] + h * f;
#pragma omp simd
          for (int64_t c = 0; c < f; ++c) {
            grad_x[offset + c] += ds[k] * attention[c] * leaky_slope(x[offset + c] + q[c], slope);
          }
        }
      }
    }
  }
  return good;
}

template <Score score, bool edges>
bool forward(const Problem& p, float* out, float* lse) {
  const int64_t heads = p.heads, f = p.f;
  return for_rows(p, kChunkRows, [&](int64_t i, int64_t, Block& block) {
    return forward_row<score, edges>(p, i, block, out + i * heads * f, lse + i * heads);
  });
}

template <Score score, bool edges>
bool backward_rows(const Problem& p, float* grad_query, float* grad_attention, float* grad_edges) {
  const int64_t size = p.heads * p.f, query_width = score == Score::additive ? p.heads : size;
  const int64_t part_rows = std::max<int64_t>(1, (p.num_rows + kParts - 1) / kParts);
  const int64_t chunk_rows = score == Score::gatv2 ? part_rows : kChunkRows;
  const int64_t edge_size = edges && score == Score::gatv2 ? p.edge_dim * size : 0;
  std::vector<float> parts(score == Score::gatv2 ? kParts * size : 0), edge_parts(kParts * edge_size);
  const bool good = for_rows(p, chunk_rows, [&](int64_t i, int64_t part, Block& block) {
    float* grads = score == Score::gatv2 ? edge_parts.data() + part * edge_size : grad_edges;
    return backward_row<score, edges>(p, i, block, grad_query + i * query_width, parts.data() + part * size, grads);
  });
  if constexpr (score == Score::gatv2) {
    add_parts(parts, size, grad_attention);
    if constexpr (edges) add_parts(edge_parts, edge_size, grad_edges);
  }
  return good;
}

template <Score score, bool edges>
bool backward_columns(const Problem& p, float* grad_x, float* grad_key) {
  const int64_t heads = p.heads, width = heads * p.f;
  return for_rows(p, kChunkRows, [&](int64_t j, int64_t, Block& block) {
    return backward_column<score, edges>(p, j, block, grad_x + j * width, grad_key ? grad_key + j * heads : nullptr);
  });
}

template <Score score_, bool edges_>
struct Kind {
  static constexpr Score score = score_;
  static constexpr bool edges = edges_;
};

template <typename Run>
bool with_kind(const Problem& p, const Run& run) {
  switch (p.score) {
    case Score::additive:
      return p.edges ? run(Kind<Score::additive, true>()) : run(Kind<Score::additive, false>());
    case Score::dot: return run(Kind<Score::dot, false>());
    case Score::gatv2: return p.edges ? run(Kind<Score::gatv2, true>()) : run(Kind<Score::gatv2, false>());
  }
  return false;
}

}  // namespace

// All return false when rowptr, col or halo holds an entry out of range; the results are then unspecified.
bool attention_forward(const AttentionProblem& p, float* out, float* lse) {
  return with_kind(p, [&](auto kind) { return forward<kind.score, kind.edges>(p, out, lse); });
}

bool attention_backward_rows(const AttentionProblem& p, float* grad_query, float* grad_attention, float* grad_edges) {
  return with_kind(p, [&](auto kind) {
    return backward_rows<kind.score, kind.edges>(p, grad_query, grad_attention, grad_edges);
  });
}

bool attention_backward_columns(const AttentionProblem& p, float* grad_x, float* grad_key) {
  return with_kind(p, [&](auto kind) { return backward_columns<kind.score, kind.edges>(p, grad_x, grad_key); });
}

// out[i] = the sum over branches j of lookup[j, code of row n_id[i] in branch j]; lookup is [m, K, heads].
bool code_scores(const Table& table, const int64_t* n_id, int64_t k, const float* lookup, int64_t num_codes,
                 int64_t heads, float* out) {
  bool good = true;
#pragma omp parallel for schedule(static) reduction(&& : good)
  for (int64_t i = 0; i < k; ++i) {
    float* sums = out + i * heads;
    std::fill(sums, sums + heads, 0.0f);
    if (uint64_t(n_id[i]) >= uint64_t(table.num_rows)) {
      good = false;
      continue;
    }
    const char* data = (const char*)table.data + n_id[i] * table.row_bytes;
    for (int64_t j = 0; j < table.m; ++j) {
      const int64_t code = table.codec == Codec::pq8 ? int64_t(uint8_t(data[j])) : load<uint16_t>(data + 2 * j);
      const float* row = lookup + (j * num_codes + std::min(code, num_codes - 1)) * heads;
      for (int64_t h = 0; h < heads; ++h) sums[h] += row[h];
    }
  }
  return good;
}

}  // namespace VQGNN_ISA
}  // namespace vqgnn
