// Nearest codeword of every row in every branch, without an array of distances.
//
// Lanes are rows: a tile of kRows rows is whitened and transposed, then meets kGroup codewords at a time in registers.
// |c|^2 / 2 - x.c orders codewords as |x - c|^2 does, so a score costs dv FMAs and no addition. The pass over the
// codebook only finds the group of the lowest score, which saves most of the index bookkeeping; the codeword inside
// the group is found by scoring the group again, once a row.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/dispatch.h"
#include "cpu/lanes.h"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

constexpr int kVectors = 2;               // row vectors a tile: with kGroup = 4, 8 accumulators in 16 registers
constexpr int kRows = kVectors * kLanes;  // rows a tile
constexpr int kGroup = 4;                 // codewords a group
constexpr int64_t kBlock = 128;           // rows a task: they stay in L2 while all branches pass over them

typedef float Group __attribute__((vector_size(kGroup * 4), aligned(4), may_alias));

struct Problem {
  const float* v;
  int64_t b, row_stride, m, K, dv;
  const float *mean, *rstd;
};

// Codewords of one branch in groups, [ceil(K / kGroup)][1 + dv][kGroup]: half the squared norms first.
// The last group is filled up with codewords of infinite score.
void pack(const float* codebook, int64_t K, int64_t dv, float* out) {
  for (int64_t first = 0; first < K; first += kGroup, out += (1 + dv) * kGroup) {
    for (int c = 0; c < kGroup; ++c) {
      const bool real = first + c < K;
      float norm = 0;
      for (int64_t d = 0; d < dv; ++d) {
        const float value = real ? codebook[(first + c) * dv + d] : 0.0f;
        norm += value * value;
        out[(1 + d) * kGroup + c] = value;
      }
      out[c] = real ? norm / 2 : std::numeric_limits<float>::infinity();
    }
  }
}

// Whitened rows of branch j, from row `first` on, as columns of x [dv][kRows].
template <int DV>
void load_tile(const Problem& p, int64_t first, int64_t count, int64_t j, float* __restrict x) {
  const int64_t dv = DV ? DV : p.dv;
  const float* mean = p.mean + j * dv;
  const float* rstd = p.rstd + j * dv;
  for (int64_t i = 0; i < count; ++i) {
    const float* row = p.v + (first + i) * p.row_stride + j * dv;
    for (int64_t d = 0; d < dv; ++d) x[d * kRows + i] = (row[d] - mean[d]) * rstd[d];
  }
}

inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

// Place of the first lowest score of a group; any place when there are NaNs.
inline int lowest(Group s) {
#if defined(__SSE2__)
  const __m128 score = (__m128)s;  // without branches: half of them would be mispredicted
  __m128 low = _mm_min_ps(score, _mm_shuffle_ps(score, score, 0x4E));
  low = _mm_min_ps(low, _mm_shuffle_ps(low, low, 0xB1));
  return __builtin_ctz(_mm_movemask_ps(_mm_cmpeq_ps(score, low)) | 1 << kGroup) % kGroup;
#else
  int at = 0;
  for (int c = 1; c < kGroup; ++c) at = s[c] < s[at] ? c : at;
  return at;
#endif
}

// Nearest codewords of the rows x [dv][kRows] of one branch.
template <int DV>
void assign_tile(const float* x, const float* packed, int64_t K, int64_t dv, int32_t* codes) {
  const int64_t width = DV ? DV : dv;
  const auto group = [=](int64_t k) { return packed + k * (1 + width); };  // k a multiple of kGroup
  Floats best[kVectors];
  Ints found[kVectors];
  for (int r = 0; r < kVectors; ++r) {
    best[r] = Floats{} + std::numeric_limits<float>::infinity();
    found[r] = Ints{};
  }
  for (int32_t k = 0; k < K; k += kGroup) {
    const float* half_norm = group(k);
    const float* codewords = half_norm + kGroup;  // [dv][kGroup]
    Floats score[kVectors][kGroup];
    for (int r = 0; r < kVectors; ++r)
      for (int c = 0; c < kGroup; ++c) score[r][c] = Floats{} + half_norm[c];
#pragma GCC unroll 16
    for (int64_t d = 0; d < width; ++d)
      for (int c = 0; c < kGroup; ++c)
        for (int r = 0; r < kVectors; ++r)
          score[r][c] -= load<Floats>(x + d * kRows + r * kLanes) * codewords[d * kGroup + c];
    for (int r = 0; r < kVectors; ++r) {
      const Floats low = smaller(smaller(score[r][0], score[r][1]), smaller(score[r][2], score[r][3]));
      found[r] = low < best[r] ? Ints{} + k : found[r];  // strict: the first of equal groups stays
      best[r] = smaller(low, best[r]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    const int32_t k = found[i / kLanes][i % kLanes];
    const Group* rows = reinterpret_cast<const Group*>(group(k));
    Group score = rows[0];
#pragma GCC unroll 16
    for (int64_t d = 0; d < width; ++d) score -= x[d * kRows + i] * rows[1 + d];
    codes[i] = std::min(k + lowest(score), static_cast<int32_t>(K - 1));  // NaN may have found the filling
  }
}

template <int DV, typename Code>
void assign(const Problem& p, const float* codebook, Code* codes) {
  const int64_t branch = (p.K + kGroup - 1) / kGroup * kGroup * (1 + p.dv);  // floats of one packed branch
  std::vector<float> packed(p.m * branch);
#pragma omp parallel
  {
    std::vector<float> x(p.dv * kRows);
    int32_t tile[kRows];
#pragma omp for schedule(static)
    for (int64_t j = 0; j < p.m; ++j) pack(codebook + j * p.K * p.dv, p.K, p.dv, packed.data() + j * branch);
#pragma omp for schedule(dynamic)
    for (int64_t begin = 0; begin < p.b; begin += kBlock) {
      const int64_t end = std::min(p.b, begin + kBlock);
      for (int64_t j = 0; j < p.m; ++j) {
        for (int64_t first = begin; first < end; first += kRows) {
          const int64_t count = std::min<int64_t>(kRows, end - first);
          load_tile<DV>(p, first, count, j, x.data());
          assign_tile<DV>(x.data(), packed.data() + j * branch, p.K, p.dv, tile);
          for (int64_t i = 0; i < count; ++i) codes[(first + i) * p.m + j] = static_cast<Code>(tile[i]);
        }
      }
    }
  }
}

template <typename Code>
void assign_any(const Problem& p, const float* codebook, Code* codes) {
  switch (p.dv) {
    case 2: return assign<2>(p, codebook, codes);
    case 3: return assign<3>(p, codebook, codes);
    case 4: return assign<4>(p, codebook, codes);
    case 5: return assign<5>(p, codebook, codes);  // a branch's channels and a coordinate of gradients
    case 8: return assign<8>(p, codebook, codes);
    case 9: return assign<9>(p, codebook, codes);
    case 16: return assign<16>(p, codebook, codes);
    default: return assign<0>(p, codebook, codes);
  }
}

}  // namespace

void vq_assign(const float* v, int64_t b, int64_t row_stride, const float* codebook, int64_t m, int64_t K, int64_t dv,
               const float* mean, const float* rstd, void* codes) {
  if (b == 0) return;
  // (x - 0) * 1 is x to the bit: one path for plain and whitened rows.
  const std::vector<float> zeros(mean == nullptr ? m * dv : 0, 0.0f), ones(rstd == nullptr ? m * dv : 0, 1.0f);
  const Problem problem{v, b, row_stride, m, K, dv, mean == nullptr ? zeros.data() : mean,
                        rstd == nullptr ? ones.data() : rstd};
  if (K <= 256) {
    assign_any(problem, codebook, static_cast<uint8_t*>(codes));
  } else {
    assign_any(problem, codebook, static_cast<int16_t*>(codes));
  }
}

}  // namespace VQGNN_ISA
}  // namespace vqgnn
