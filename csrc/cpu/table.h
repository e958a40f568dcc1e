// A table of node state as the kernels see it (vqgnn_kernels/_types.py: Rows), and how they decode its rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if VQGNN_ISA_avx2 || VQGNN_ISA_avx512
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own AVX-512 header trips it
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace vqgnn {

enum class Codec : int { none, fp32, fp16, int8, int4, pq8, pq16 };

struct Table {
  Codec codec;            // none: no table, halo columns are skipped
  const void* data;       // num_rows rows of row_bytes
  int64_t num_rows;
  int64_t row_bytes;
  const uint16_t* scale;  // [num_rows, 2] bf16 (scale, offset): int8, int4
  const float* codebook;  // [m, K, d]: pq8, pq16
  int64_t m, K, d;
};

}  // namespace vqgnn

#if defined(VQGNN_ISA)  // the rest is for kernel files
#include "cpu/lanes.h"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

template <int n>
VQGNN_INLINE Vec<uint32_t, n> load_wide(const uint8_t* p) {  // n bytes, zero-extended
#if VQGNN_ISA_avx2 || VQGNN_ISA_avx512
  // GCC 12 takes __builtin_convertvector apart, value by value.
  if constexpr (n == 8) return (Vec<uint32_t, 8>)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#endif
#if VQGNN_ISA_avx512
  if constexpr (n == 16) return (Vec<uint32_t, 16>)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#endif
  return __builtin_convertvector(load<Vec<uint8_t, n>>(p), Vec<uint32_t, n>);
}

template <int n>
VQGNN_INLINE Vec<uint32_t, n> load_wide(const uint16_t* p) {
#if VQGNN_ISA_avx2 || VQGNN_ISA_avx512
  if constexpr (n == 8) return (Vec<uint32_t, 8>)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#endif
#if VQGNN_ISA_avx512
  if constexpr (n == 16) return (Vec<uint32_t, 16>)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#endif
  return __builtin_convertvector(load<Vec<uint16_t, n>>(p), Vec<uint32_t, n>);
}

VQGNN_INLINE Floats gather(const float* from, Ints place) {
#if VQGNN_ISA_avx512
  return (Floats)_mm512_i32gather_ps((__m512i)place, from, 4);
#elif VQGNN_ISA_avx2
  return (Floats)_mm256_i32gather_ps(from, (__m256i)place, 4);
#else
  Floats values;
  for (int i = 0; i < kLanes; ++i) values[i] = from[place[i]];
  return values;
#endif
}

VQGNN_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

VQGNN_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

VQGNN_INLINE float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

VQGNN_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  // Exponent rebased by a multiplication, which also normalises subnormals; exact.
  float magnitude = bits_to_float(uint32_t(h & 0x7fff) << 13) * 0x1p112f;
  if ((h & 0x7c00) == 0x7c00) magnitude = bits_to_float(0x7f800000 | (uint32_t(h & 0x03ff) << 13));
  return bits_to_float(float_to_bits(magnitude) | sign);
}

VQGNN_INLINE uint16_t float_to_half(float value) {  // round half to even
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal's bits in the low end, rounded
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return uint16_t(half | ((bits >> 16) & 0x8000));
}

// Readers of element-wise codecs: kLanes values from column c on (c a multiple of kLanes), or one value. `row` is the
// row's first byte, `affine` its scale and offset.
struct Affine {
  float scale, offset;
};

struct ReadFloat {
  static VQGNN_INLINE int64_t byte(int64_t c) { return 4 * c; }
  static VQGNN_INLINE Floats vector(const char* row, int64_t c, Affine) { return load<Floats>(row + 4 * c); }
  static VQGNN_INLINE float scalar(const char* row, int64_t c, Affine) { return load<float>(row + 4 * c); }
};

struct ReadHalf {
  static VQGNN_INLINE int64_t byte(int64_t c) { return 2 * c; }
  static VQGNN_INLINE Floats vector(const char* row, int64_t c, Affine) {
#if VQGNN_ISA_avx512
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(row + 2 * c)));
#elif VQGNN_ISA_avx2
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(row + 2 * c)));
#else
    Floats v;
    for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(load<uint16_t>(row + 2 * (c + i)));
    return v;
#endif
  }
  static VQGNN_INLINE float scalar(const char* row, int64_t c, Affine) {
    return half_to_float(load<uint16_t>(row + 2 * c));
  }
};

struct ReadByte {
  static VQGNN_INLINE int64_t byte(int64_t c) { return c; }
  static VQGNN_INLINE Floats vector(const char* row, int64_t c, Affine a) {
#if VQGNN_ISA_avx512
    const Ints q = (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(row + c)));
#else
    const Ints q = (Ints)load_wide<kLanes>((const uint8_t*)row + c);
#endif
    return __builtin_convertvector(q, Floats) * a.scale + a.offset;
  }
  static VQGNN_INLINE float scalar(const char* row, int64_t c, Affine a) { return uint8_t(row[c]) * a.scale + a.offset; }
};

struct ReadNibble {
  static VQGNN_INLINE int64_t byte(int64_t c) { return c / 2; }
  static VQGNN_INLINE Floats vector(const char* row, int64_t c, Affine a) {
    // Nibble i of the little-endian word is column c + i.
#if VQGNN_ISA_avx512
    const __m512i word = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(row + c / 2)));
    const __m512i q = _mm512_or_epi64(_mm512_and_epi64(word, _mm512_set1_epi64(15)),
                                      _mm512_slli_epi64(_mm512_srli_epi64(word, 4), 32));
    return __builtin_convertvector((Ints)q, Floats) * a.scale + a.offset;
#elif VQGNN_ISA_avx2
    const __m256i word = _mm256_set1_epi32(load<int32_t>(row + c / 2));
    const __m256i q = _mm256_and_si256(_mm256_srlv_epi32(word, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)),
                                       _mm256_set1_epi32(15));
    return __builtin_convertvector((Ints)q, Floats) * a.scale + a.offset;
#else
    Floats v;
    for (int i = 0; i < kLanes; ++i) v[i] = scalar(row, c + i, a);
    return v;
#endif
  }
  static VQGNN_INLINE float scalar(const char* row, int64_t c, Affine a) {
    return ((uint8_t(row[c / 2]) >> (4 * (c % 2))) & 15) * a.scale + a.offset;
  }
};

template <typename Read>
void decode_values(const Table& table, int64_t row, int64_t width, float* out) {
  const char* data = (const char*)table.data + row * table.row_bytes;
  Affine affine{1.0f, 0.0f};
  if (table.scale) affine = {bf16_to_float(table.scale[2 * row]), bf16_to_float(table.scale[2 * row + 1])};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) store(out + c, Read::vector(data, c, affine));
  for (; c < width; ++c) out[c] = Read::scalar(data, c, affine);
}

template <typename Code>
VQGNN_INLINE const float* codeword(const Table& table, const char* data, int64_t j) {
  const int64_t code = std::min(int64_t(load<Code>(data + j * sizeof(Code))), table.K - 1);
  return table.codebook + (j * table.K + code) * table.d;
}

template <typename Code, int d>
int64_t decode_whole_branches(const Table& table, const char* data, int64_t width, float* out) {
  const int64_t whole = width / d;
  for (int64_t j = 0; j < whole; ++j) store(out + j * d, load<Vec<float, d>>(codeword<Code>(table, data, j)));
  return whole;
}

template <typename Code>
void decode_codes(const Table& table, int64_t row, int64_t width, float* out) {
  const char* data = (const char*)table.data + row * table.row_bytes;
  const int64_t d = table.d;
  int64_t j = 0;
  if (d == 4) j = decode_whole_branches<Code, 4>(table, data, width, out);
  if (d == 8) j = decode_whole_branches<Code, 8>(table, data, width, out);
  for (; j * d < width; ++j) {
    std::copy_n(codeword<Code>(table, data, j), std::min(d, width - j * d), out + j * d);
  }
}

// Columns 0 .. width - 1 of a row of the table; codes beyond the codebook are taken as the last one.
inline void decode_row(const Table& table, int64_t row, int64_t width, float* out) {
  switch (table.codec) {
    case Codec::none: return;
    case Codec::fp32: return decode_values<ReadFloat>(table, row, width, out);
    case Codec::fp16: return decode_values<ReadHalf>(table, row, width, out);
    case Codec::int8: return decode_values<ReadByte>(table, row, width, out);
    case Codec::int4: return decode_values<ReadNibble>(table, row, width, out);
    case Codec::pq8: return decode_codes<uint8_t>(table, row, width, out);
    case Codec::pq16: return decode_codes<uint16_t>(table, row, width, out);
  }
}

}  // namespace
}  // namespace VQGNN_ISA
}  // namespace vqgnn
#endif
