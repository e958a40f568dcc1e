// Run-time choice of instruction set.
//
// csrc/cpu/<op>.cpp defines its entry points inside `namespace vqgnn { namespace VQGNN_ISA { ... } }` and is compiled
// once per instruction set (base, avx2, avx512: see CMakeLists.txt). bindings.cpp declares them with VQGNN_DECLARE and
// calls them through VQGNN_DISPATCH. Kernel files must keep every helper in an anonymous namespace: a template or inline
// function with external linkage compiled for AVX-512 could be the copy that the linker keeps for every caller.
#pragma once

namespace vqgnn {

enum class Isa { base, avx2, avx512 };

// The widest instruction set that this binary has, this CPU offers and VQGNN_ISA (base | avx2 | avx512) allows.
Isa isa();
const char* isa_name();

}  // namespace vqgnn

#if defined(VQGNN_HAS_avx2)
#define VQGNN_DECLARE(...)                         \
  namespace vqgnn {                                \
  namespace base { __VA_ARGS__; }                  \
  namespace avx2 { __VA_ARGS__; }                  \
  namespace avx512 { __VA_ARGS__; }                \
  }
#define VQGNN_DISPATCH(name, ...)                                                   \
  (::vqgnn::isa() == ::vqgnn::Isa::avx512 ? ::vqgnn::avx512::name(__VA_ARGS__)       \
   : ::vqgnn::isa() == ::vqgnn::Isa::avx2 ? ::vqgnn::avx2::name(__VA_ARGS__)         \
                                          : ::vqgnn::base::name(__VA_ARGS__))
#else
#define VQGNN_DECLARE(...) \
  namespace vqgnn {        \
  namespace base { __VA_ARGS__; } \
  }
#define VQGNN_DISPATCH(name, ...) ::vqgnn::base::name(__VA_ARGS__)
#endif
