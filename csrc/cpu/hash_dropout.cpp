// Dropout whose mask is the hash of (seed, row, column): read, multiplied and written in one pass.
#include "cpu/dispatch.h"
#include "cpu/dropout.h"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

using Words = Vec<uint32_t, kLanes>;

constexpr int64_t kSmall = 1 << 14;  // numbers: below, starting threads costs more than it saves

}  // namespace

void hash_dropout(const float* x, int64_t num_rows, int64_t f, const Dropout& dropout, float* out) {
  const uint32_t first = mix(dropout.seed);
  const float scale = dropout.keep_scale;
  Words lanes;
  for (int l = 0; l < kLanes; ++l) lanes[l] = l;
#pragma omp parallel for schedule(static) if (num_rows * f > kSmall)
  for (int64_t i = 0; i < num_rows; ++i) {
    const uint32_t row = mix(first ^ uint32_t(i));
    const float* from = x + i * f;
    float* to = out + i * f;
    int64_t c = 0;
    for (; c + kLanes <= f; c += kLanes) {
      const Ints kept = (Ints)(mix(row ^ (lanes + uint32_t(c))) > dropout.last);
      // & and not * 0, which would keep an infinity
      store(to + c, (Floats)((Ints)(load<Floats>(from + c) * scale) & kept));
    }
    for (; c < f; ++c) to[c] = mix(row ^ uint32_t(c)) > dropout.last ? from[c] * scale : 0.0f;
  }
}

}  // namespace VQGNN_ISA
}  // namespace vqgnn
