// A batch's rows as branches have them, their moments, cluster sizes and sums, and the EMA step of all codebooks.
//
// Moments are added up by blocks of rows, the rest by branches, each in order: no result depends on the thread count.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/lanes.h"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

constexpr int64_t kBlock = 64;     // rows whose moments are taken at once, around their own mean, from the cache
constexpr int64_t kSmall = 1 << 14;  // numbers: below, starting threads costs more than it saves

struct Parts {
  const float* x;
  int64_t x_stride, f;
  const float* g;
  int64_t g_stride, d, e;
};

// Row i of [X || G], branch by branch.
template <int D, int E>
VQGNN_INLINE void pack(const Parts& p, int64_t i, float* out) {
  const int64_t d = D ? D : p.d, e = D ? E : p.e;
  const float *x = p.x + i * p.x_stride, *g = p.g + i * p.g_stride;
  int64_t left = p.f;
  for (; left >= d; left -= d, x += d, g += e, out += d + e) {
    for (int64_t c = 0; c < d; ++c) out[c] = x[c];
    for (int64_t c = 0; c < e; ++c) out[d + c] = g[c];
  }
  if (left == 0) return;
  for (int64_t c = 0; c < d; ++c) out[c] = c < left ? x[c] : 0.0f;
  for (int64_t c = 0; c < e; ++c) out[d + c] = g[c];
}

// mean and sum of squares around it, [width] each, of rows [n, width]
void block_moments(const float* rows, int64_t n, int64_t width, float* __restrict mean, float* __restrict square) {
  std::fill_n(mean, width, 0.0f);
  std::fill_n(square, width, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < width; ++c) mean[c] += rows[i * width + c];
  }
  for (int64_t c = 0; c < width; ++c) mean[c] /= static_cast<float>(n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < width; ++c) {
      const float off = rows[i * width + c] - mean[c];
      square[c] += off * off;
    }
  }
}

template <int D, int E>
void pack_blocks(const Parts& p, int64_t b, int64_t width, float* v, float* moments) {
#pragma omp parallel for schedule(static) if (b * width > kSmall)
  for (int64_t first = 0; first < b; first += kBlock) {
    const int64_t last = std::min(first + kBlock, b);
    for (int64_t i = first; i < last; ++i) pack<D, E>(p, i, v + i * width);
    float* mean = moments + first / kBlock * 2 * width;
    block_moments(v + first * width, last - first, width, mean, mean + width);
  }
}

constexpr int64_t kBranches = 4;  // branches a task: 128 contiguous bytes a row at dv = 8

constexpr int64_t kAhead = 16;    // rows read ahead: they lie too far apart for the hardware to guess
constexpr int kWidth = 4;  // numbers at once: left to itself, GCC shuffles them one by one
using Few = Vec<float, kWidth>;
using FewDoubles = Vec<double, kWidth>;

struct Rows {
  const float* v;
  int64_t b, row_stride, m, K, dv;
  const float *mean, *rstd;
};

// sum [dv] += a whitened row
template <int DV>
VQGNN_INLINE void add(const float* row, const float* mean, const float* rstd, int64_t width, double* sum) {
  const int64_t dv = DV ? DV : width;
  int64_t d = 0;
  for (; d + kWidth <= dv; d += kWidth) {
    const auto value = (load<Few>(row + d) - load<Few>(mean + d)) * load<Few>(rstd + d);
    store(sum + d, load<FewDoubles>(sum + d) + __builtin_convertvector(value, FewDoubles));
  }
  for (; d < dv; ++d) sum[d] += (row[d] - mean[d]) * rstd[d];
}

template <int DV, typename Code>
int64_t stats(const Rows& p, const Code* codes, float* counts, float* sums) {
  const int64_t dv = DV ? DV : p.dv, size = p.K * dv;
  int64_t bad = -1;
#pragma omp parallel
  {
    std::vector<int64_t> count(kBranches * p.K);
    std::vector<double> sum(kBranches * size);
#pragma omp for schedule(dynamic) reduction(max : bad)
    for (int64_t first = 0; first < p.m; first += kBranches) {
      const int64_t branches = std::min(kBranches, p.m - first);
      const float *mean = p.mean + first * dv, *rstd = p.rstd + first * dv;
      std::fill(count.begin(), count.end(), 0);
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t i = 0; i < p.b; ++i) {
        const Code* code = codes + i * p.m + first;
        const float* row = p.v + i * p.row_stride + first * dv;
        for (int64_t d = 0; d < branches * dv; d += 16) __builtin_prefetch(row + kAhead * p.row_stride + d);
        for (int64_t j = 0; j < branches; ++j) {
          if (code[j] >= p.K) {
            bad = std::max<int64_t>(bad, code[j]);
            continue;
          }
          count[j * p.K + code[j]] += 1;
          add<DV>(row + j * dv, mean + j * dv, rstd + j * dv, dv, sum.data() + j * size + code[j] * dv);
        }
      }
      std::copy_n(count.begin(), branches * p.K, counts + first * p.K);
      std::copy_n(sum.begin(), branches * size, sums + first * size);
    }
  }
  return bad;
}

template <typename Code>
int64_t stats_any(const Rows& p, const Code* codes, float* counts, float* sums) {
  switch (p.dv) {
    case 2: return stats<2>(p, codes, counts, sums);
    case 3: return stats<3>(p, codes, counts, sums);
    case 4: return stats<4>(p, codes, counts, sums);
    case 5: return stats<5>(p, codes, counts, sums);  // a branch's channels and a coordinate of gradients
    case 8: return stats<8>(p, codes, counts, sums);
    case 9: return stats<9>(p, codes, counts, sums);
    case 16: return stats<16>(p, codes, counts, sums);
    default: return stats<0>(p, codes, counts, sums);
  }
}

// Output number `index` of SplitMix64 seeded with `seed` (codebook_update's docstring).
uint64_t splitmix64(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

}  // namespace

// v [b, m*(d+e)] and the mean and variance of its columns (Chan et al.'s sum of the blocks').
void codebook_rows(const float* x, int64_t b, int64_t x_stride, int64_t f, const float* g, int64_t g_stride, int64_t d,
                   int64_t e, float* v, float* mean, float* var) {
  const int64_t width = (f + d - 1) / d * (d + e);
  std::vector<float> moments((b + kBlock - 1) / kBlock * 2 * width);
  const Parts parts{x, x_stride, f, g, g_stride, d, e};
  if (d == 4 && e == 1) {
    pack_blocks<4, 1>(parts, b, width, v, moments.data());
  } else if (d == 4 && e == 0) {
    pack_blocks<4, 0>(parts, b, width, v, moments.data());
  } else {
    pack_blocks<0, 0>(parts, b, width, v, moments.data());
  }
  std::vector<double> sum(2 * width);  // mean, then squares around it
  double *middle = sum.data(), *square = sum.data() + width;
  for (int64_t first = 0; first < b; first += kBlock) {
    const float* block = moments.data() + first / kBlock * 2 * width;
    const double n = first, more = std::min(kBlock, b - first), share = more / (n + more);
    for (int64_t c = 0; c < width; ++c) {
      const double apart = block[c] - middle[c];
      middle[c] += apart * share;
      square[c] += block[width + c] + apart * apart * n * share;
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    mean[c] = static_cast<float>(middle[c]);
    var[c] = static_cast<float>(b == 0 ? 0.0 : square[c] / static_cast<double>(b));
  }
}

// Returns a code outside 0..K-1 when there is one (counts and sums are then of no use), else -1.
// Negative int16 codes count as 2^16 more.
int64_t codebook_stats(const float* v, int64_t b, int64_t row_stride, const void* codes, int64_t m, int64_t K,
                       int64_t dv, const float* mean, const float* rstd, float* counts, float* sums) {
  // (x - 0) * 1 is x to the bit: one path for plain and whitened rows.
  const std::vector<float> zeros(mean == nullptr ? m * dv : 0, 0.0f), ones(rstd == nullptr ? m * dv : 0, 1.0f);
  const Rows rows{v, b, row_stride, m, K, dv, mean == nullptr ? zeros.data() : mean,
                  rstd == nullptr ? ones.data() : rstd};
  return K <= 256 ? stats_any(rows, static_cast<const uint8_t*>(codes), counts, sums)
                  : stats_any(rows, static_cast<const uint16_t*>(codes), counts, sums);
}

void codebook_update(float* codebook, float* ema_counts, float* ema_sums, const float* counts, const float* sums,
                     int64_t m, int64_t K, int64_t dv, double decay, double eps, const float* v, int64_t b,
                     int64_t row_stride, const float* mean, const float* rstd, double revive_below, uint64_t seed,
                     int64_t* revived) {
  const float keep = static_cast<float>(decay), take = static_cast<float>(1 - decay);
  const float smallest = static_cast<float>(b > 0 ? revive_below : 0);
#pragma omp parallel for schedule(static)
  for (int64_t j = 0; j < m; ++j) {
    double total = 0;
    for (int64_t k = j * K; k < (j + 1) * K; ++k) {
      ema_counts[k] = keep * ema_counts[k] + take * counts[k];
      total += ema_counts[k];
    }
    const float scale = static_cast<float>(total / (total + static_cast<double>(K) * eps));
    revived[j] = 0;
    for (int64_t k = j * K; k < (j + 1) * K; ++k) {
      float* codeword = codebook + k * dv;
      float* sum = ema_sums + k * dv;
      const bool seen = ema_counts[k] > 0;
      const float smoothed = (ema_counts[k] + static_cast<float>(eps)) * scale;
      for (int64_t d = 0; d < dv; ++d) {
        sum[d] = keep * sum[d] + take * sums[k * dv + d];
        if (seen) codeword[d] = sum[d] / smoothed;
      }
      if (b == 0 || !(ema_counts[k] < smallest)) continue;
      const int64_t row = static_cast<int64_t>(splitmix64(seed, static_cast<uint64_t>(k)) % static_cast<uint64_t>(b));
      for (int64_t d = 0; d < dv; ++d) {
        const int64_t column = j * dv + d;
        const float value = v[row * row_stride + column];
        codeword[d] = mean == nullptr ? value : (value - mean[column]) * rstd[column];
        sum[d] = codeword[d] * smallest;
      }
      ema_counts[k] = smallest;
      revived[j] += 1;
    }
  }
}

}  // namespace VQGNN_ISA
}  // namespace vqgnn
