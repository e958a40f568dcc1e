// Dropout whose mask is a hash, so that no kernel stores it (the spec: vqgnn_kernels/_dropout.py).
#pragma once

#include <cstdint>

namespace vqgnn {

struct Dropout {
  bool on;            // p > 0
  uint32_t last;      // what has a hash up to this is dropped
  uint32_t seed;
  float keep_scale;   // 1 / (1 - p)
};

}  // namespace vqgnn

#if defined(VQGNN_ISA)  // the rest is for kernel files
#include "cpu/lanes.h"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

template <typename Word>  // uint32_t, or a vector of them
VQGNN_INLINE Word mix(Word z) {  // lowbias32
  z ^= z >> 16;
  z *= 0x7feb352du;
  z ^= z >> 15;
  z *= 0x846ca68bu;
  return z ^ (z >> 16);
}

}  // namespace
}  // namespace VQGNN_ISA
}  // namespace vqgnn
#endif
