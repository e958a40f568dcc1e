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

// ---- vq_assign, codebook_update ------------------------------------------------------------------------------------
VQGNN_DECLARE(void vq_assign(const float* v, int64_t b, int64_t row_stride, const float* codebook, int64_t m, int64_t K,
                             int64_t dv, const float* mean, const float* rstd, void* codes))
VQGNN_DECLARE(int64_t codebook_stats(const float* v, int64_t b, int64_t row_stride, const void* codes, int64_t m,
                                     int64_t K, int64_t dv, const float* mean, const float* rstd, float* counts,
                                     float* sums))
VQGNN_DECLARE(void codebook_update(float* codebook, float* ema_counts, float* ema_sums, const float* counts,
                                   const float* sums, int64_t m, int64_t K, int64_t dv, double decay, double eps,
                                   const float* v, int64_t b, int64_t row_stride, const float* mean, const float* rstd,
                                   double revive_below, uint64_t seed, int64_t* revived))

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// v [b, m*dv] with contiguous columns, codebooks [m, K, dv], mean and rstd [m*dv] or both null
void check_rows(uintptr_t v, int64_t b, int64_t row_stride, int64_t m, int64_t K, int64_t dv, uintptr_t mean,
                uintptr_t rstd) {
  if (b < 0 || m < 1 || K < 1 || K > 32768 || dv < 1 || (b > 1 && row_stride < m * dv)) {
    throw std::invalid_argument("need b >= 0, m >= 1, 1 <= K <= 32768, dv >= 1 and row_stride >= m*dv, got b=" +
                                std::to_string(b) + " m=" + std::to_string(m) + " K=" + std::to_string(K) +
                                " dv=" + std::to_string(dv) + " row_stride=" + std::to_string(row_stride));
  }
  if ((b > 0 && v == 0) || (mean == 0) != (rstd == 0)) throw std::invalid_argument("null address of v, mean or rstd");
}

void vq_assign(uintptr_t v, int64_t b, int64_t row_stride, uintptr_t codebook, int64_t m, int64_t K, int64_t dv,
               uintptr_t mean, uintptr_t rstd, uintptr_t codes) {
  check_rows(v, b, row_stride, m, K, dv, mean, rstd);
  if (codebook == 0 || (b > 0 && codes == 0)) throw std::invalid_argument("null address of codebook or codes");
  py::gil_scoped_release release;
  VQGNN_DISPATCH(vq_assign, pointer<const float>(v), b, row_stride, pointer<const float>(codebook), m, K, dv,
                 pointer<const float>(mean), pointer<const float>(rstd), pointer<void>(codes));
}

void codebook_stats(uintptr_t v, int64_t b, int64_t row_stride, uintptr_t codes, int64_t m, int64_t K, int64_t dv,
                    uintptr_t mean, uintptr_t rstd, uintptr_t counts, uintptr_t sums) {
  check_rows(v, b, row_stride, m, K, dv, mean, rstd);
  if ((b > 0 && codes == 0) || counts == 0 || sums == 0) {
    throw std::invalid_argument("null address of codes, counts or sums");
  }
  int64_t bad;
  {
    py::gil_scoped_release release;
    bad = VQGNN_DISPATCH(codebook_stats, pointer<const float>(v), b, row_stride, pointer<const void>(codes), m, K, dv,
                         pointer<const float>(mean), pointer<const float>(rstd), pointer<float>(counts),
                         pointer<float>(sums));
  }
  if (bad < 0) return;
  if (K > 256) bad = static_cast<int16_t>(bad);
  throw std::invalid_argument("codes must be in 0.." + std::to_string(K - 1) + ", got " + std::to_string(bad));
}

void codebook_update(uintptr_t codebook, uintptr_t ema_counts, uintptr_t ema_sums, uintptr_t counts, uintptr_t sums,
                     int64_t m, int64_t K, int64_t dv, double decay, double eps, uintptr_t v, int64_t b,
                     int64_t row_stride, uintptr_t mean, uintptr_t rstd, double revive_below, uint64_t seed,
                     uintptr_t revived) {
  check_rows(v, b, row_stride, m, K, dv, mean, rstd);
  for (uintptr_t address : {codebook, ema_counts, ema_sums, counts, sums, revived}) {
    if (address == 0) throw std::invalid_argument("null address of an array of codebook_update");
  }
  py::gil_scoped_release release;
  VQGNN_DISPATCH(codebook_update, pointer<float>(codebook), pointer<float>(ema_counts), pointer<float>(ema_sums),
                 pointer<const float>(counts), pointer<const float>(sums), m, K, dv, decay, eps,
                 pointer<const float>(v), b, row_stride, pointer<const float>(mean), pointer<const float>(rstd),
                 revive_below, seed, pointer<int64_t>(revived));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of vqgnn_kernels over raw pointers; import torch first";
  m.def("isa", &vqgnn::isa_name, "Instruction set in use: base, avx2 or avx512");
  m.def("set_num_threads", &omp_set_num_threads, "OpenMP threads of work started by the calling thread");

  // vq_assign, codebook_update
  m.def("vq_assign", &vq_assign);
  m.def("codebook_stats", &codebook_stats);
  m.def("codebook_update", &codebook_update);
}
