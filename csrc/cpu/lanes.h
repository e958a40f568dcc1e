// Vectors as wide as the registers of the instruction set that a kernel file is compiled for (cpu/dispatch.h).
#pragma once

#include <cstdint>

#define VQGNN_INLINE inline __attribute__((always_inline))
// Vectors wider than the instruction set's registers are split by the compiler; none crosses a function boundary.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

#if VQGNN_ISA_avx512
constexpr int kLanes = 16;
#elif VQGNN_ISA_avx2
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <typename T, int n>
struct VecOf {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};
template <typename T, int n>
using Vec = typename VecOf<T, n>::type;
using Floats = Vec<float, kLanes>;
using Ints = Vec<int32_t, kLanes>;

// Unaligned. A dereference, not memcpy, which GCC 12 may route through general registers.
template <typename V>
VQGNN_INLINE V load(const void* p) {
  typedef V Loose __attribute__((aligned(1), may_alias));
  return *(const Loose*)p;
}

template <typename V>
VQGNN_INLINE void store(void* p, const V& v) {
  typedef V Loose __attribute__((aligned(1), may_alias));
  *(Loose*)p = v;
}

}  // namespace
}  // namespace VQGNN_ISA
}  // namespace vqgnn
