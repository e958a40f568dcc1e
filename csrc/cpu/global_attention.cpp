// Attention of every query to the codewords of its head, weighted by their counts, without the array of scores.
//
// Every product here is C += A B with lanes along B's contiguous rows (codewords for scores, columns for the rest), so
// one register tile serves them all. cpp.py has filled every width up to whole vectors and K to whole blocks, multiplied
// the keys by the scale and stored them also transposed by block. A task is a block of queries of one head, or, for the
// gradients of keys and values, a block of codewords which meets all queries in order: who runs it changes no sum.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/dispatch.h"
#include "cpu/lanes.h"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

constexpr int kQueries = 32;    // queries a block: with kCodewords, 8 kB of scores stay in L1
constexpr int kCodewords = 64;  // BLOCK of cpp.py
constexpr int kRows = 4;        // rows of a register tile; times 2 vectors: 8 sums hide the FMA's latency

typedef Floats Loose __attribute__((aligned(4), may_alias));  // in an array of floats
using Bits = Vec<uint32_t, kLanes>;

inline Loose& vector(float* p) { return *reinterpret_cast<Loose*>(p); }
inline const Loose& vector(const float* p) { return *reinterpret_cast<const Loose*>(p); }

// A block of rows or columns of a matrix.
struct Matrix {
  const float* first;
  int64_t row, column;  // strides
};

template <int rows, int vectors>
inline void multiply_tile(Matrix a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row) {
  Floats sum[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) sum[i][v] = vector(c + i * c_row + v * kLanes);
  for (int64_t k = 0; k < depth; ++k)
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v)
        sum[i][v] += a.first[i * a.row + k * a.column] * vector(b + k * b_row + v * kLanes);
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) vector(c + i * c_row + v * kLanes) = sum[i][v];
}

// c [rows, width] += a [rows, depth] b [depth, width]; width is a multiple of kLanes.
void multiply(Matrix a, int64_t rows, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
              int64_t width) {
  int64_t i = 0;
  const auto columns = [&](auto tile_2, auto tile_1) {
    const Matrix from{a.first + i * a.row, a.row, a.column};
    int64_t j = 0;
    for (; j + 2 * kLanes <= width; j += 2 * kLanes) tile_2(from, b + j, b_row, depth, c + i * c_row + j, c_row);
    for (; j < width; j += kLanes) tile_1(from, b + j, b_row, depth, c + i * c_row + j, c_row);
  };
  for (; i + kRows <= rows; i += kRows) columns(multiply_tile<kRows, 2>, multiply_tile<kRows, 1>);
  for (; i < rows; ++i) columns(multiply_tile<1, 2>, multiply_tile<1, 1>);
}

// e^x for x up to some rounding above 0, within 2 ulp; exactly 0 below the normal numbers, and so for -inf.
inline Floats exponential(Floats x) {
  const Floats shift = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers, kept in the low bits
  const Floats shifted = x * 1.44269504f + shift;
  const Floats n = shifted - shift;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Floats y = r * 1.3981999507e-3f + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Bits power = ((Bits)shifted << 23) + (127u << 23);  // 2^n
  return x < -87.0f ? Floats{} : y * (Floats)power;
}

struct Problem {
  int64_t b, H, K, F, V;
  const float *query, *keys_t, *bias;

  int64_t queries(int64_t first) const { return std::min<int64_t>(kQueries, b - first); }

  // scores [count][kCodewords] of queries first .. and codewords k .. of head h
  void scores(int64_t h, int64_t first, int64_t count, int64_t k, float* out) const {
    for (int64_t i = 0; i < count; ++i) std::copy_n(bias + h * K + k, kCodewords, out + i * kCodewords);
    multiply({query + (first * H + h) * F, H * F, 1}, count, keys_t + (h * K + k) * F, kCodewords, F, out, kCodewords,
             kCodewords);
  }
};

struct Backward : Problem {
  const float *values_t, *grad_out, *mean, *lse;

  // probabilities and gradients of the scores, [count][kCodewords] each
  void gradients(int64_t h, int64_t first, int64_t count, int64_t k, float* probability, float* grad) const {
    scores(h, first, count, k, probability);
    std::fill_n(grad, count * kCodewords, 0.0f);
    multiply({grad_out + (first * H + h) * V, H * V, 1}, count, values_t + (h * K + k) * V, kCodewords, V, grad,
             kCodewords, kCodewords);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (first + i) * H + h;
      for (int64_t c = i * kCodewords; c < (i + 1) * kCodewords; c += kLanes) {
        vector(probability + c) = exponential(vector(probability + c) - lse[at]);
        vector(grad + c) = vector(probability + c) * (vector(grad + c) - mean[at]);
      }
    }
  }
};

}  // namespace

void global_attention(int64_t b, int64_t H, int64_t K, int64_t F, int64_t V, const float* query, const float* keys_t,
                      const float* values, const float* bias, float* out, float* lse) {
  const Problem p{b, H, K, F, V, query, keys_t, bias};
  const int64_t blocks = (b + kQueries - 1) / kQueries;
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < H * blocks; ++task) {  // head by head: its codewords stay in the cache
    const int64_t h = task / blocks, first = task % blocks * kQueries, count = p.queries(first);
    float score[kQueries * kCodewords], highest[kQueries], sum[kQueries];
    std::fill_n(highest, kQueries, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, kQueries, 0.0f);
    float* result = out + (first * H + h) * V;
    for (int64_t i = 0; i < count; ++i) std::fill_n(result + i * H * V, V, 0.0f);
    for (int64_t k = 0; k < K; k += kCodewords) {
      p.scores(h, first, count, k, score);
      for (int64_t i = 0; i < count; ++i) {
        float* row = score + i * kCodewords;
        Floats high = vector(row), total{};
        for (int c = kLanes; c < kCodewords; c += kLanes) high = vector(row + c) > high ? vector(row + c) : high;
        float top = highest[i];
        for (int c = 0; c < kLanes; ++c) top = std::max(top, high[c]);
        if (top == -std::numeric_limits<float>::infinity()) top = 0;  // no codeword with nodes so far
        for (int c = 0; c < kCodewords; c += kLanes) total += vector(row + c) = exponential(vector(row + c) - top);
        const float shrink = std::exp(highest[i] - top);
        sum[i] *= shrink;
        for (int c = 0; c < kLanes; ++c) sum[i] += total[c];
        if (shrink != 1)
          for (int64_t c = 0; c < V; c += kLanes) vector(result + i * H * V + c) *= shrink;
        if (sum[i] != 0) highest[i] = top;
      }
      multiply({score, kCodewords, 1}, count, values + (h * K + k) * V, V, kCodewords, result, H * V, V);
    }
    for (int64_t i = 0; i < count; ++i) {
      const bool any = sum[i] != 0;
      lse[(first + i) * H + h] = any ? highest[i] + std::log(sum[i]) : 0;
      if (!any) continue;
      for (int64_t c = 0; c < V; c += kLanes) vector(result + i * H * V + c) /= sum[i];
    }
  }
}

void global_attention_backward(int64_t b, int64_t H, int64_t K, int64_t F, int64_t V, const float* query,
                               const float* keys, const float* keys_t, const float* values_t, const float* bias,
                               const float* grad_out, const float* mean, const float* lse, float* grad_query,
                               float* grad_keys, float* grad_values) {
  const Backward p{{b, H, K, F, V, query, keys_t, bias}, values_t, grad_out, mean, lse};
  const int64_t blocks = (b + kQueries - 1) / kQueries, groups = K / kCodewords;
#pragma omp parallel
  {
    float probability[kQueries * kCodewords], grad[kQueries * kCodewords];
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < H * groups; ++task) {  // the long tasks first
      const int64_t h = task / groups, k = task % groups * kCodewords;
      float* of_keys = grad_keys + (h * K + k) * F;
      float* of_values = grad_values + (h * K + k) * V;
      std::fill_n(of_keys, kCodewords * F, 0.0f);
      std::fill_n(of_values, kCodewords * V, 0.0f);
      for (int64_t first = 0; first < b; first += kQueries) {
        const int64_t count = p.queries(first);
        p.gradients(h, first, count, k, probability, grad);
        multiply({probability, 1, kCodewords}, kCodewords, grad_out + (first * H + h) * V, H * V, count, of_values, V,
                 V);
        multiply({grad, 1, kCodewords}, kCodewords, query + (first * H + h) * F, H * F, count, of_keys, F, F);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < H * blocks; ++task) {
      const int64_t h = task / blocks, first = task % blocks * kQueries, count = p.queries(first);
      float* result = grad_query + (first * H + h) * F;
      for (int64_t i = 0; i < count; ++i) std::fill_n(result + i * H * F, F, 0.0f);
      for (int64_t k = 0; k < K; k += kCodewords) {
        p.gradients(h, first, count, k, probability, grad);
        multiply({grad, kCodewords, 1}, count, keys + (h * K + k) * F, F, kCodewords, result, H * F, F);
      }
    }
  }
}

}  // namespace VQGNN_ISA
}  // namespace vqgnn
