// Push: quantise or cast rows and scatter them into a table. Pull: gather rows and decode them.
#include "cpu/table.h"

#include <algorithm>

#include "cpu/dispatch.h"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

constexpr int64_t kParallelRows = 256;  // fewer rows are not worth waking threads for
constexpr int64_t kTile = 256;          // columns quantised at a time

float round_bf16(float value, bool up) {  // the smallest bf16 >= value, or the largest <= value
  const uint32_t bits = float_to_bits(value);
  const uint32_t cut = bits & 0xffff0000u;  // towards zero
  const bool away = bits != cut && ((bits >> 31) == 0) == up;
  return bits_to_float(away ? cut + 0x10000u : cut);
}

void min_max(const float* x, int64_t f, float& low, float& high) {
  low = high = x[0];
  int64_t c = 0;
  if (f >= kLanes) {
    Floats lows = load<Floats>(x), highs = lows;
    for (; c + kLanes <= f; c += kLanes) {
      const Floats v = load<Floats>(x + c);
      lows = v < lows ? v : lows;
      highs = v > highs ? v : highs;
    }
    for (int i = 0; i < kLanes; ++i) {
      low = std::min(low, lows[i]);
      high = std::max(high, highs[i]);
    }
  }
  for (; c < f; ++c) {
    low = std::min(low, x[c]);
    high = std::max(high, x[c]);
  }
}

void quantise_tile(const float* x, int64_t count, float scale, float offset, float levels, uint8_t* q) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds half to even
  for (int64_t i = 0; i < count; ++i) {
    float t = (x[i] - offset) / scale;
    t = t > 0.0f ? t : 0.0f;  // also NaN
    t = t < levels ? t : levels;
    q[i] = uint8_t(int32_t((t + kRound) - kRound));
  }
}

void push_quantised(const float* x, int64_t f, int levels, uint8_t* row, uint16_t* affine) {
  float low = 0.0f, high = 0.0f;
  if (f > 0) min_max(x, f, low, high);
  const float offset = round_bf16(low + 0.0f, false);  // + 0 turns -0 into 0
  const float scale = round_bf16((high - offset) / float(levels), true);
  affine[0] = uint16_t(float_to_bits(scale) >> 16);
  affine[1] = uint16_t(float_to_bits(offset) >> 16);
  const bool constant = !(scale > 0.0f);
  uint8_t q[kTile + 1];
  for (int64_t c = 0; c < f; c += kTile) {
    const int64_t count = std::min(kTile, f - c);
    if (constant) {
      std::fill(q, q + count, uint8_t(0));
    } else {
      quantise_tile(x + c, count, scale, offset, float(levels), q);
    }
    if (levels == 255) {
      std::copy(q, q + count, row + c);
    } else {
      q[count] = 0;
      for (int64_t i = 0; i < count; i += 2) row[(c + i) / 2] = uint8_t(q[i] | (q[i + 1] << 4));
    }
  }
}

void push_half(const float* x, int64_t f, uint16_t* row) {
  int64_t c = 0;
#if VQGNN_ISA_avx2 || VQGNN_ISA_avx512
  for (; c + 8 <= f; c += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + c), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128((__m128i*)(row + c), half);
  }
#endif
  for (; c < f; ++c) row[c] = float_to_half(x[c]);
}

bool in_range(const int64_t* n_id, int64_t k, int64_t num_rows) {
  bool good = true;
  for (int64_t i = 0; i < k; ++i) good &= uint64_t(n_id[i]) < uint64_t(num_rows);
  return good;
}

}  // namespace

// x: k rows of f floats, or of table.row_bytes bytes for codes. False, and nothing written, when an n_id is no row.
bool push_rows(const Table& table, const int64_t* n_id, int64_t k, const void* x, int64_t f) {
  if (!in_range(n_id, k, table.num_rows)) return false;
#pragma omp parallel for schedule(static) if (k >= kParallelRows)
  for (int64_t i = 0; i < k; ++i) {
    char* row = (char*)table.data + n_id[i] * table.row_bytes;
    uint16_t* affine = table.scale ? (uint16_t*)table.scale + 2 * n_id[i] : nullptr;
    const float* values = (const float*)x + i * f;
    switch (table.codec) {
      case Codec::none: break;
      case Codec::fp32: std::memcpy(row, values, f * sizeof(float)); break;
      case Codec::fp16: push_half(values, f, (uint16_t*)row); break;
      case Codec::int8: push_quantised(values, f, 255, (uint8_t*)row, affine); break;
      case Codec::int4: push_quantised(values, f, 15, (uint8_t*)row, affine); break;
      case Codec::pq8:
      case Codec::pq16: std::memcpy(row, (const char*)x + i * table.row_bytes, table.row_bytes); break;
    }
  }
  return true;
}

// n_id null: rows 0 .. k - 1. False when an n_id is no row.
bool pull_rows(const Table& table, const int64_t* n_id, int64_t k, int64_t f, float* out) {
  if (n_id ? !in_range(n_id, k, table.num_rows) : k > table.num_rows) return false;
#pragma omp parallel for schedule(static) if (k >= kParallelRows)
  for (int64_t i = 0; i < k; ++i) decode_row(table, n_id ? n_id[i] : i, f, out + i * f);
  return true;
}

}  // namespace VQGNN_ISA
}  // namespace vqgnn
