// Every native function once, with its argument checks. Tensors arrive as raw addresses with shapes, so that one binary
// serves every torch version; vqgnn_kernels/<op>/cpp.py is the only caller.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/attention_aggregate.h"
#include "cpu/dispatch.h"
#include "cpu/dropout.h"
#include "cpu/table.h"
#include "transfer/bindings.h"

namespace py = pybind11;

namespace vqgnn {

static Isa detect_isa() {
  Isa best = Isa::base;
#if defined(VQGNN_HAS_avx2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi2")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
    }
  }
#endif
  const char* wanted = std::getenv("VQGNN_ISA");
  const std::string name(wanted == nullptr ? "" : wanted);
  if (name.empty()) return best;
  if (name != "base" && name != "avx2" && name != "avx512") {
    throw std::invalid_argument("VQGNN_ISA='" + name + "' is unknown; set it to base, avx2 or avx512, or unset it");
  }
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
VQGNN_DECLARE(void codebook_rows(const float* x, int64_t b, int64_t x_stride, int64_t f, const float* g,
                                 int64_t g_stride, int64_t d, int64_t e, float* v, float* mean, float* var))
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

void codebook_rows(uintptr_t x, int64_t b, int64_t x_stride, int64_t f, uintptr_t g, int64_t g_stride, int64_t d,
                   int64_t e, uintptr_t v, uintptr_t mean, uintptr_t var) {
  if (b < 0 || f < 1 || d < 1 || e < 0 || (b > 0 && (x == 0 || v == 0 || (e > 0 && g == 0))) || mean == 0 || var == 0) {
    throw std::invalid_argument("need b >= 0, f >= 1, d >= 1, e >= 0 and addresses of every array");
  }
  py::gil_scoped_release release;
  VQGNN_DISPATCH(codebook_rows, pointer<const float>(x), b, x_stride, f, pointer<const float>(g), g_stride, d, e,
                 pointer<float>(v), pointer<float>(mean), pointer<float>(var));
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

// ---- aggregate, hash_dropout, csr_slice, store_io -------------------------------------------------------------------
// Addresses are integers, 0 for "not there". The kernels return false (csr_slice: -1) for a bad index; the caller then
// finds out which one it was.

VQGNN_DECLARE(bool aggregate(const float* x, int64_t b, int64_t f, const int64_t* rowptr, int64_t num_rows,
                             const int32_t* col, int64_t num_edges, const float* weight, const int64_t* halo,
                             int64_t num_halo, const Table& table, const Dropout& dropout, float* out))
VQGNN_DECLARE(void hash_dropout(const float* x, int64_t num_rows, int64_t f, const Dropout& dropout, float* out))
VQGNN_DECLARE(bool csr_slice_rowptr(const int64_t* rowptr, int64_t n, int64_t num_edges, const int64_t* nodes,
                                    int64_t b, int64_t* rowptr_b))
VQGNN_DECLARE(int64_t csr_slice(const int64_t* rowptr, const int32_t* col, int64_t n, const int64_t* nodes, int64_t b,
                                int32_t* col_b, int64_t* halo))
VQGNN_DECLARE(bool csr_slice_values(const int64_t* rowptr, int64_t n, int64_t num_edges, const int64_t* nodes,
                                    int64_t b, const int64_t* rowptr_b, int64_t num_edges_b, const float* values, float* out))
VQGNN_DECLARE(bool push_rows(const Table& table, const int64_t* n_id, int64_t k, const void* x, int64_t f))
VQGNN_DECLARE(bool pull_rows(const Table& table, const int64_t* n_id, int64_t k, int64_t f, float* out))

namespace {

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("vqgnn_kernels._C: ") + what);
}

// (codec, data, N, row_bytes, scale, codebook, m, K, d), or None for no table.
vqgnn::Table as_table(const py::object& object, int64_t f) {
  vqgnn::Table table{vqgnn::Codec::none, nullptr, 0, 0, nullptr, nullptr, 0, 0, 0};
  if (object.is_none()) return table;
  const auto fields = object.cast<std::tuple<std::string, uintptr_t, int64_t, int64_t, uintptr_t, uintptr_t, int64_t,
                                             int64_t, int64_t>>();
  uintptr_t data, scale, codebook;
  std::string codec;
  std::tie(codec, data, table.num_rows, table.row_bytes, scale, codebook, table.m, table.K, table.d) = fields;
  table.data = reinterpret_cast<const void*>(data);
  table.scale = reinterpret_cast<const uint16_t*>(scale);
  table.codebook = reinterpret_cast<const float*>(codebook);
  require(table.num_rows >= 0 && (data || table.num_rows == 0 || table.row_bytes == 0), "a table has no data");
  if (codec == "pq") {
    const int64_t code_bytes = table.m > 0 ? table.row_bytes / table.m : 1;
    require(table.m >= 0 && (code_bytes == 1 || code_bytes == 2) && table.row_bytes == table.m * code_bytes,
            "codes must be 1 or 2 bytes");
    table.codec = code_bytes == 1 ? vqgnn::Codec::pq8 : vqgnn::Codec::pq16;
    if (codebook) {
      require(table.K >= 1 && table.K <= (code_bytes == 1 ? 256 : 32768), "K is out of range for the codes' type");
      require(table.d >= 1 && table.m * table.d >= f, "m * d must cover f columns");
    }
    return table;
  }
  table.codec = codec == "fp32"   ? vqgnn::Codec::fp32
                : codec == "fp16" ? vqgnn::Codec::fp16
                : codec == "int8" ? vqgnn::Codec::int8
                : codec == "int4" ? vqgnn::Codec::int4
                                  : vqgnn::Codec::none;
  require(table.codec != vqgnn::Codec::none, "unknown codec");
  const int64_t row_bytes = codec == "fp32" ? 4 * f : codec == "fp16" ? 2 * f : codec == "int8" ? f : (f + 1) / 2;
  require(table.row_bytes == row_bytes, "the table's rows do not have f columns");
  require(codec[0] != 'i' || scale || table.num_rows == 0, "int8 and int4 need scales");
  return table;
}

vqgnn::Dropout as_dropout(double p, uint32_t seed) {
  require(p >= 0.0 && p < 1.0, "dropout must lie in [0, 1)");
  const uint32_t last = p > 0.0 ? uint32_t(uint64_t(std::ceil(p * 0x1p32)) - 1) : 0;
  return {p > 0.0, last, seed, float(1.0 / (1.0 - p))};
}

bool aggregate(uintptr_t x, int64_t b, int64_t f, uintptr_t rowptr, int64_t num_rows, uintptr_t col, int64_t num_edges,
               uintptr_t weight, uintptr_t halo, int64_t num_halo, const py::object& table_object, double dropout,
               uint32_t seed, uintptr_t out) {
  const vqgnn::Table table = as_table(table_object, f);
  const vqgnn::Dropout halo_dropout = as_dropout(dropout, seed);
  require(b >= 0 && f >= 0 && num_rows >= 0 && num_edges >= 0 && num_halo >= -1, "a size is negative");
  require(rowptr && (x || b * f == 0) && (col || num_edges == 0) && (out || num_rows * f == 0), "an address is null");
  require(table.codec < vqgnn::Codec::pq8 || table.codebook || table.num_rows == 0, "codes need a codebook");
  py::gil_scoped_release release;
  return VQGNN_DISPATCH(aggregate, reinterpret_cast<const float*>(x), b, f, reinterpret_cast<const int64_t*>(rowptr),
                        num_rows, reinterpret_cast<const int32_t*>(col), num_edges,
                        reinterpret_cast<const float*>(weight), reinterpret_cast<const int64_t*>(halo), num_halo, table,
                        halo_dropout, reinterpret_cast<float*>(out));
}

void hash_dropout(uintptr_t x, int64_t num_rows, int64_t f, double dropout, uint32_t seed, uintptr_t out) {
  require(num_rows >= 0 && f >= 0, "a size is negative");
  require((x && out) || num_rows == 0 || f == 0, "an address is null");
  const vqgnn::Dropout options = as_dropout(dropout, seed);
  require(options.on, "dropout must be above 0");
  py::gil_scoped_release release;
  VQGNN_DISPATCH(hash_dropout, reinterpret_cast<const float*>(x), num_rows, f, options, reinterpret_cast<float*>(out));
}

bool csr_slice_rowptr(uintptr_t rowptr, int64_t n, int64_t num_edges, uintptr_t nodes, int64_t b, uintptr_t rowptr_b) {
  require(n >= 0 && num_edges >= 0 && b >= 0, "a size is negative");
  require(rowptr && (nodes || b == 0) && rowptr_b, "an address is null");
  py::gil_scoped_release release;
  return VQGNN_DISPATCH(csr_slice_rowptr, reinterpret_cast<const int64_t*>(rowptr), n, num_edges,
                        reinterpret_cast<const int64_t*>(nodes), b, reinterpret_cast<int64_t*>(rowptr_b));
}

int64_t csr_slice(uintptr_t rowptr, uintptr_t col, int64_t n, uintptr_t nodes, int64_t b, uintptr_t col_b,
                  uintptr_t halo) {
  require(n >= 0 && n < INT32_MAX && b >= 0, "a size is out of range");
  require(rowptr && (nodes || b == 0), "an address is null");
  py::gil_scoped_release release;
  return VQGNN_DISPATCH(csr_slice, reinterpret_cast<const int64_t*>(rowptr), reinterpret_cast<const int32_t*>(col), n,
                        reinterpret_cast<const int64_t*>(nodes), b, reinterpret_cast<int32_t*>(col_b),
                        reinterpret_cast<int64_t*>(halo));
}

bool csr_slice_values(uintptr_t rowptr, int64_t n, int64_t num_edges, uintptr_t nodes, int64_t b, uintptr_t rowptr_b,
                      int64_t num_edges_b, uintptr_t values, uintptr_t out) {
  require(n >= 0 && num_edges >= 0 && b >= 0, "a size is negative");
  require(rowptr && (nodes || b == 0) && rowptr_b && (values || num_edges == 0) && (out || num_edges_b == 0),
          "an address is null");
  py::gil_scoped_release release;
  return VQGNN_DISPATCH(csr_slice_values, reinterpret_cast<const int64_t*>(rowptr), n, num_edges,
                        reinterpret_cast<const int64_t*>(nodes), b, reinterpret_cast<const int64_t*>(rowptr_b), num_edges_b,
                        reinterpret_cast<const float*>(values), reinterpret_cast<float*>(out));
}

bool push_rows(const py::object& table_object, uintptr_t n_id, int64_t k, uintptr_t x, int64_t f) {
  const vqgnn::Table table = as_table(table_object, f);
  require(k >= 0 && f >= 0 && (n_id || k == 0) && (x || k == 0 || table.row_bytes == 0), "an address is null");
  py::gil_scoped_release release;
  return VQGNN_DISPATCH(push_rows, table, reinterpret_cast<const int64_t*>(n_id), k, reinterpret_cast<const void*>(x),
                        f);
}

bool pull_rows(const py::object& table_object, uintptr_t n_id, int64_t k, int64_t f, uintptr_t out) {
  const vqgnn::Table table = as_table(table_object, f);
  require(k >= 0 && f >= 0 && (out || k * f == 0), "an address is null");
  require(table.codec < vqgnn::Codec::pq8 || table.codebook || k * f == 0, "codes need a codebook");
  py::gil_scoped_release release;
  return VQGNN_DISPATCH(pull_rows, table, reinterpret_cast<const int64_t*>(n_id), k, f, reinterpret_cast<float*>(out));
}

void bind_graph_ops(py::module_& m) {
  m.def("aggregate", &aggregate);
  m.def("hash_dropout", &hash_dropout);
  m.def("csr_slice_rowptr", &csr_slice_rowptr);
  m.def("csr_slice", &csr_slice);
  m.def("csr_slice_values", &csr_slice_values);
  m.def("push_rows", &push_rows);
  m.def("pull_rows", &pull_rows);
}

}  // namespace

// ---- global_attention ------------------------------------------------------------------------------------------------
VQGNN_DECLARE(void global_attention(int64_t b, int64_t H, int64_t K, int64_t F, int64_t V, const float* query,
                                    const float* keys_t, const float* values, const float* bias, float* out,
                                    float* lse))
VQGNN_DECLARE(void global_attention_backward(int64_t b, int64_t H, int64_t K, int64_t F, int64_t V, const float* query,
                                             const float* keys, const float* keys_t, const float* values_t,
                                             const float* bias, const float* grad_out, const float* mean,
                                             const float* lse, float* grad_query, float* grad_keys,
                                             float* grad_values))

namespace {

// Sizes as cpp.py fills them up; rows: the addresses that b = 0 may leave null.
void check_attention(int64_t b, int64_t H, int64_t K, int64_t F, int64_t V, std::initializer_list<uintptr_t> tables,
                     std::initializer_list<uintptr_t> rows) {
  require(b >= 0 && H >= 1 && K >= 1 && F >= 1 && V >= 1 && K % 64 == 0 && F % 16 == 0 && V % 16 == 0,
          "a size is out of range");
  for (uintptr_t address : tables) require(address, "an address is null");
  for (uintptr_t address : rows) require(address || b == 0, "an address is null");
}

void global_attention(int64_t b, int64_t H, int64_t K, int64_t F, int64_t V, uintptr_t query, uintptr_t keys_t,
                      uintptr_t values, uintptr_t bias, uintptr_t out, uintptr_t lse) {
  check_attention(b, H, K, F, V, {keys_t, values, bias}, {query, out, lse});
  py::gil_scoped_release release;
  VQGNN_DISPATCH(global_attention, b, H, K, F, V, pointer<const float>(query), pointer<const float>(keys_t),
                 pointer<const float>(values), pointer<const float>(bias), pointer<float>(out), pointer<float>(lse));
}

void global_attention_backward(int64_t b, int64_t H, int64_t K, int64_t F, int64_t V, uintptr_t query, uintptr_t keys,
                               uintptr_t keys_t, uintptr_t values_t, uintptr_t bias, uintptr_t grad_out, uintptr_t mean,
                               uintptr_t lse, uintptr_t grad_query, uintptr_t grad_keys, uintptr_t grad_values) {
  check_attention(b, H, K, F, V, {keys, keys_t, values_t, bias, grad_keys, grad_values},
                  {query, grad_out, mean, lse, grad_query});
  py::gil_scoped_release release;
  VQGNN_DISPATCH(global_attention_backward, b, H, K, F, V, pointer<const float>(query), pointer<const float>(keys),
                 pointer<const float>(keys_t), pointer<const float>(values_t), pointer<const float>(bias),
                 pointer<const float>(grad_out), pointer<const float>(mean), pointer<const float>(lse),
                 pointer<float>(grad_query), pointer<float>(grad_keys), pointer<float>(grad_values));
}

}  // namespace

// ---- attention_aggregate -------------------------------------------------------------------------------------------
// A problem arrives as a dict of its fields, addresses as integers. The kernels return false for a bad index.

VQGNN_DECLARE(bool attention_forward(const AttentionProblem& p, float* out, float* lse))
VQGNN_DECLARE(bool attention_backward_rows(const AttentionProblem& p, float* grad_query, float* grad_attention,
                                           float* grad_edges))
VQGNN_DECLARE(bool attention_backward_columns(const AttentionProblem& p, float* grad_x, float* grad_key))
VQGNN_DECLARE(bool code_scores(const Table& table, const int64_t* n_id, int64_t k, const float* lookup,
                               int64_t num_codes, int64_t heads, float* out))

namespace {

vqgnn::AttentionProblem as_attention_problem(const py::dict& fields) {
  vqgnn::AttentionProblem p;
  const auto integer = [&](const char* name) { return fields[name].cast<int64_t>(); };
  const auto floats = [&](const char* name) { return pointer<const float>(fields[name].cast<uintptr_t>()); };
  const std::string mode = fields["mode"].cast<std::string>();
  require(mode == "additive" || mode == "dot" || mode == "gatv2", "unknown mode");
  p.score = mode == "additive" ? vqgnn::Score::additive : mode == "dot" ? vqgnn::Score::dot : vqgnn::Score::gatv2;
  p.heads = integer("heads");
  p.f = integer("f");
  p.slope = fields["slope"].cast<float>();
  p.scale = fields["scale"].cast<float>();
  p.dropout = as_dropout(fields["dropout"].cast<double>(), fields["seed"].cast<uint32_t>());
  p.rowptr = pointer<const int64_t>(fields["rowptr"].cast<uintptr_t>());
  p.num_rows = integer("num_rows");
  p.col = pointer<const int32_t>(fields["col"].cast<uintptr_t>());
  p.num_edges = integer("num_edges");
  p.halo = pointer<const int64_t>(fields["halo"].cast<uintptr_t>());
  p.num_halo = integer("num_halo");
  p.num_own = integer("num_own");
  p.max_columns = integer("max_columns");
  p.x = floats("x");
  p.query = floats("query");
  p.key = floats("key");
  p.attention = floats("attention");
  p.edges = floats("edges");
  p.edge_dim = integer("edge_dim");
  p.edge_matrix = floats("edge_matrix");
  p.grad_out = floats("grad_out");
  p.lse = floats("lse");
  p.delta = floats("delta");
  p.halo_stats = floats("halo_stats");
  require(p.heads >= 1 && p.f >= 0 && p.num_rows >= 0 && p.num_edges >= 0 && p.num_halo >= -1 && p.num_own >= 0 &&
              p.edge_dim >= 0,
          "a size is out of range");
  require(!p.edges || (p.score == vqgnn::Score::additive && !p.edge_matrix) ||
              (p.score == vqgnn::Score::gatv2 && (p.edge_matrix || p.edge_dim * p.f == 0)),
          "edges do not go with the mode");
  p.table = as_table(fields["table"], p.heads * p.f);
  require(p.rowptr && (p.col || p.num_edges == 0), "an address is null");
  require(p.table.codec < vqgnn::Codec::pq8 || p.table.codebook || p.table.num_rows == 0, "codes need a codebook");
  return p;
}

bool attention_forward(const py::dict& fields, uintptr_t out, uintptr_t lse) {
  const vqgnn::AttentionProblem p = as_attention_problem(fields);
  py::gil_scoped_release release;
  return VQGNN_DISPATCH(attention_forward, p, pointer<float>(out), pointer<float>(lse));
}

bool attention_backward_rows(const py::dict& fields, uintptr_t grad_query, uintptr_t grad_attention,
                             uintptr_t grad_edges) {
  const vqgnn::AttentionProblem p = as_attention_problem(fields);
  require(!p.edges || grad_edges, "an address is null");
  py::gil_scoped_release release;
  return VQGNN_DISPATCH(attention_backward_rows, p, pointer<float>(grad_query), pointer<float>(grad_attention),
                        pointer<float>(grad_edges));
}

bool attention_backward_columns(const py::dict& fields, uintptr_t grad_x, uintptr_t grad_key) {
  const vqgnn::AttentionProblem p = as_attention_problem(fields);
  require(p.table.codec == vqgnn::Codec::none || p.halo_stats || p.max_columns == p.num_own, "no halo_stats");
  py::gil_scoped_release release;
  return VQGNN_DISPATCH(attention_backward_columns, p, pointer<float>(grad_x), pointer<float>(grad_key));
}

bool code_scores(const py::object& table_object, uintptr_t n_id, int64_t k, uintptr_t lookup, int64_t num_codes,
                 int64_t heads, uintptr_t out) {
  const vqgnn::Table table = as_table(table_object, 0);
  require(table.codec >= vqgnn::Codec::pq8 && num_codes >= 1 && k >= 0 && heads >= 0, "a size is out of range");
  py::gil_scoped_release release;
  return VQGNN_DISPATCH(code_scores, table, pointer<const int64_t>(n_id), k, pointer<const float>(lookup), num_codes,
                        heads, pointer<float>(out));
}

void bind_attention(py::module_& m) {
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward_rows", &attention_backward_rows);
  m.def("attention_backward_columns", &attention_backward_columns);
  m.def("code_scores", &code_scores);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of vqgnn_kernels over raw pointers; import torch first";
  m.def("isa", &vqgnn::isa_name, "Instruction set in use: base, avx2 or avx512");
  m.def("set_num_threads", &omp_set_num_threads, "OpenMP threads of work started by the calling thread");

  // vq_assign, codebook_update
  m.def("vq_assign", &vq_assign);
  m.def("codebook_rows", &codebook_rows);
  m.def("codebook_stats", &codebook_stats);
  m.def("codebook_update", &codebook_update);
  bind_graph_ops(m);
  bind_attention(m);

  // global_attention
  m.def("global_attention", &global_attention);
  m.def("global_attention_backward", &global_attention_backward);

  // the asynchronous engine
  vqgnn::transfer::bind(m);
}
