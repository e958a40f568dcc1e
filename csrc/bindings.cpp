// Every native function once, with its argument checks. Tensors arrive as raw addresses with shapes, so that one binary
// serves every torch version; vqgnn_kernels/<op>/cpp.py is the only caller.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace vqgnn {

static Isa detect_isa() {
  Isa best = Isa::base;
#if defined(VQGNN_HAS_avx2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
    }
  }
#endif
  const char* wanted = std::getenv("VQGNN_ISA");
  if (wanted == nullptr) return best;
  const std::string name(wanted);
  const Isa limit = name == "base" ? Isa::base : name == "avx2" ? Isa::avx2 : Isa::avx512;
  return limit < best ? limit : best;
}

Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "base";
  }
}

}  // namespace vqgnn

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of vqgnn_kernels over raw pointers; import torch first";
  m.def("isa", &vqgnn::isa_name, "Instruction set in use: base, avx2 or avx512");
  m.def("set_num_threads", &omp_set_num_threads, "OpenMP threads of work started by the calling thread");
}
