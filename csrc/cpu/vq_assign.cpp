// Nearest codeword of every row in every branch, without an array of distances.
//
// Lanes are rows: a tile of kRows rows is whitened and transposed, then meets the codewords kGroup at a time in
// registers. |x - c|^2 orders codewords as |c|^2 / 2 - x.c does, so a score costs dv FMAs and no addition.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/dispatch.h"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

#if defined(VQGNN_ISA_avx512)
constexpr int kLanes = 16;
#elif defined(VQGNN_ISA_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = 2;                // row vectors a tile
constexpr int kRows = kVectors * kLanes;   // rows a tile
constexpr int kGroup = 4;                  // codewords a tile
constexpr int64_t kBlock = 8 * 32;         // rows a task: they stay in L2 while all branches pass over them

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

// Codewords of one branch in groups: [ceil(K / kGroup)][1 + dv][kGroup], half the squared norms first.
// The last group is filled up with codewords at infinite score, which no row chooses.
void pack(const float* codebook, int64_t K, int64_t dv, float* out) {
  for (int64_t first = 0; first < K; first += kGroup) {
    for (int c = 0; c < kGroup; ++c) {
      const bool real = first + c < K;
      const float* codeword = codebook + (first + c) * dv;
      float half_norm = 0;
      for (int64_t d = 0; d < dv; ++d) {
        const float value = real ? codeword[d] : 0.0f;
        half_norm += 0.5f * value * value;
        out[(1 + d) * kGroup + c] = value;
      }
      out[c] = real ? half_norm : std::numeric_limits<float>::infinity();
    }
    out += (1 + dv) * kGroup;
  }
}

// Codes of one tile of rows x [dv][kRows] in one branch. DV = dv, or 0 when dv is only known at run time.
template <int DV>
void assign_tile(const float* x, const float* packed, int64_t groups, int64_t dv, int32_t* codes) {
  const int64_t width = DV ? DV : dv;
  Floats best[kVectors];
  Ints code[kVectors];
  for (int r = 0; r < kVectors; ++r) {
    best[r] = Floats{} + std::numeric_limits<float>::infinity();
    code[r] = Ints{};
  }
  for (int32_t k = 0; k < groups * kGroup; k += kGroup) {
    Floats score[kVectors][kGroup];
    for (int r = 0; r < kVectors; ++r)
      for (int c = 0; c < kGroup; ++c) score[r][c] = Floats{} + packed[c];
    packed += kGroup;
    for (int64_t d = 0; d < width; ++d, packed += kGroup) {
      Floats row[kVectors];
      std::memcpy(row, x + d * kRows, sizeof(row));
      for (int c = 0; c < kGroup; ++c)
        for (int r = 0; r < kVectors; ++r) score[r][c] -= row[r] * packed[c];
    }
    for (int c = 0; c < kGroup; ++c) {
      for (int r = 0; r < kVectors; ++r) {
        const Ints better = score[r][c] < best[r];  // strict: the smallest index of equals stays
        best[r] = better ? score[r][c] : best[r];
        code[r] = better ? Ints{} + (k + c) : code[r];
      }
    }
  }
  std::memcpy(codes, code, sizeof(code));
}

struct Problem {
  const float* v;
  int64_t b, row_stride, m, K, dv;
  const float *mean, *rstd;
};

// Whitened rows first to first + count of branch j as x [dv][kRows]; missing rows are zero.
void load_tile(const Problem& p, int64_t first, int64_t count, int64_t j, float* x) {
  for (int64_t i = 0; i < kRows; ++i) {
    const float* row = p.v + (first + i) * p.row_stride + j * p.dv;
    for (int64_t d = 0; d < p.dv; ++d) {
      float value = i < count ? row[d] : 0.0f;
      if (p.mean != nullptr) value = (value - p.mean[j * p.dv + d]) * p.rstd[j * p.dv + d];
      x[d * kRows + i] = value;
    }
  }
}

template <int DV, typename Code>
void assign(const Problem& p, const float* codebook, Code* codes) {
  const int64_t groups = (p.K + kGroup - 1) / kGroup;
  const int64_t branch = groups * kGroup * (1 + p.dv);  // floats of one packed branch
  std::vector<float> packed(p.m * branch);
  const int64_t blocks = (p.b + kBlock - 1) / kBlock;
#pragma omp parallel
  {
    std::vector<float> x(p.dv * kRows);
    int32_t tile[kRows];
#pragma omp for schedule(static)
    for (int64_t j = 0; j < p.m; ++j) pack(codebook + j * p.K * p.dv, p.K, p.dv, packed.data() + j * branch);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t end = std::min(p.b, (block + 1) * kBlock);
      for (int64_t j = 0; j < p.m; ++j) {
        for (int64_t first = block * kBlock; first < end; first += kRows) {
          const int64_t count = std::min<int64_t>(kRows, end - first);
          load_tile(p, first, count, j, x.data());
          assign_tile<DV>(x.data(), packed.data() + j * branch, groups, p.dv, tile);
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
    case 4: return assign<4>(p, codebook, codes);
    case 8: return assign<8>(p, codebook, codes);
    case 16: return assign<16>(p, codebook, codes);
    default: return assign<0>(p, codebook, codes);
  }
}

}  // namespace

void vq_assign(const float* v, int64_t b, int64_t row_stride, const float* codebook, int64_t m, int64_t K, int64_t dv,
               const float* mean, const float* rstd, void* codes) {
  const Problem problem{v, b, row_stride, m, K, dv, mean, rstd};
  if (K <= 256) {
    assign_any(problem, codebook, static_cast<uint8_t*>(codes));
  } else {
    assign_any(problem, codebook, static_cast<int16_t*>(codes));
  }
}

}  // namespace VQGNN_ISA
}  // namespace vqgnn
