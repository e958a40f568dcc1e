// out[i] = sum over the edges of row i of weight * (a row of x, or a row of the table decoded in registers), with dropout
// of the table's rows.
//
// A thread takes a chunk of rows. It resolves the chunk's edges once into two lists (rows of x, rows of the table) of
// addresses and weights, and then goes over the lists once for every slice of columns, whose sums stay in registers and
// whose codewords stay in the L1 cache. One thread sums a row, in edge order, so the result does not depend on the
// number of threads.
#include "cpu/table.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/dispatch.h"
#include "cpu/dropout.h"

namespace vqgnn {
namespace VQGNN_ISA {
namespace {

constexpr int kChunkRows = 64;    // rows a thread takes at a time
constexpr int kPieceEdges = 1024; // edges resolved at a time; a longer row is summed in several pieces
constexpr int kAhead = 16;        // edges between a prefetch and its use

// The resolved edges of up to kChunkRows consecutive rows; row i's are end[i - 1] .. end[i] - 1.
struct List {
  int count = 0;
  int end[kChunkRows];
  const char* row[kPieceEdges + kAhead];  // the tail repeats the last row, so that prefetching needs no bound
  float weight[kPieceEdges];  // with dropout, by 1 / (1 - p)
  Affine affine[kPieceEdges];
  uint32_t chain[kPieceEdges];  // with dropout, the hash of (seed, halo entry)
  uint32_t drop_last = 0;       // with dropout, see Dropout::last
};

VQGNN_INLINE bool kept(uint32_t chain, int64_t unit, uint32_t last) { return mix(chain ^ uint32_t(unit)) > last; }

template <int n>  // the same of n units, as a mask
VQGNN_INLINE Vec<int32_t, n> kept_units(uint32_t chain, int64_t first_unit, uint32_t last) {
  Vec<uint32_t, n> number;
  for (int i = 0; i < n; ++i) number[i] = i;
  return (Vec<int32_t, n>)(mix((number + uint32_t(first_unit)) ^ chain) > last);
}

struct Output {
  float* first;  // the first row's first column
  int64_t f;
  int num_rows;
};

template <typename Read, bool drops, int nv>
void add_vectors(const List& list, const Output& out, int64_t c) {
  int k = 0;
  for (int i = 0; i < out.num_rows; ++i) {
    const int end = list.end[i];
    if (k == end) continue;
    float* sums = out.first + i * out.f + c;
    Floats acc[nv];
    for (int v = 0; v < nv; ++v) acc[v] = load<Floats>(sums + v * kLanes);
    for (; k < end; ++k) {
      const char* ahead = list.row[k + kAhead] + Read::byte(c);
      for (int64_t byte = 0; byte < Read::byte(nv * kLanes); byte += 64) __builtin_prefetch(ahead + byte);
      const char* row = list.row[k];
      const float weight = list.weight[k];
      const Affine affine = list.affine[k];
      for (int v = 0; v < nv; ++v) {
        Floats value = Read::vector(row, c + v * kLanes, affine);
        if (drops) value = (Floats)((Ints)value & kept_units<kLanes>(list.chain[k], c + v * kLanes, list.drop_last));
        acc[v] += weight * value;
      }
    }
    for (int v = 0; v < nv; ++v) store(sums + v * kLanes, acc[v]);
  }
}

template <typename Read, bool drops>
void add_rows(const List& list, const Output& out) {
  if (list.count == 0) return;
  int64_t c = 0;
  for (; c + 8 * kLanes <= out.f; c += 8 * kLanes) add_vectors<Read, drops, 8>(list, out, c);
  for (; c + 2 * kLanes <= out.f; c += 2 * kLanes) add_vectors<Read, drops, 2>(list, out, c);
  for (; c + kLanes <= out.f; c += kLanes) add_vectors<Read, drops, 1>(list, out, c);
  if (c == out.f) return;
  int k = 0;
  for (int i = 0; i < out.num_rows; ++i) {
    float* sums = out.first + i * out.f;
    for (; k < list.end[i]; ++k) {
      for (int64_t t = c; t < out.f; ++t) {
        if (drops && !kept(list.chain[k], t, list.drop_last)) continue;
        sums[t] += list.weight[k] * Read::scalar(list.row[k], t, list.affine[k]);
      }
    }
  }
}

// Up to 8 codes of a row in one or two words, taken apart by shifts: cheaper than one load each.
template <int nb>
struct Codes8 {
  uint64_t word;
  VQGNN_INLINE Codes8(const char* p, uint16_t) {
    word = nb == 8 ? load<uint64_t>(p) : nb == 2 ? load<uint16_t>(p) : uint8_t(*p);
  }
  VQGNN_INLINE uint64_t operator[](int v) const { return (word >> (8 * v)) & 0xff; }
};

template <int nb>
struct Codes16 {  // clamped to the last codeword
  uint64_t word[2];
  VQGNN_INLINE Codes16(const char* p, uint16_t last) {
    if (nb == 8) {
      using Eight = Vec<uint16_t, 8>;
      const Eight codes = load<Eight>(p);
      const auto words = (Vec<uint64_t, 2>)(codes < last ? codes : Eight{} + last);
      word[0] = words[0];
      word[1] = words[1];
    } else {
      word[0] = std::min(load<uint16_t>(p), last);
      if (nb == 2) word[0] |= uint64_t(std::min(load<uint16_t>(p + 2), last)) << 16;
    }
  }
  VQGNN_INLINE uint64_t operator[](int v) const { return (word[v / 4] >> (16 * (v % 4))) & 0xffff; }
};

// nb branches of d dimensions from branch j on. Codes8 needs a codebook of 256 codewords a branch.
template <typename Codes, bool drops, int d, int nb>
void add_branches(const List& list, const Output& out, const Table& table, int64_t j) {
  constexpr int width = d < kLanes ? d : kLanes, parts = d / width;
  using Part = Vec<float, width>;
  constexpr bool bytes = std::is_same<Codes, Codes8<nb>>::value;
  constexpr int64_t code_bytes = bytes ? 1 : 2;
  const int64_t num_codes = bytes ? 256 : table.K;
  const float* codewords = table.codebook + j * num_codes * d;
  const uint16_t last = uint16_t(table.K - 1);
  int k = 0;
  for (int i = 0; i < out.num_rows; ++i) {
    const int end = list.end[i];
    if (k == end) continue;
    float* sums = out.first + i * out.f + j * d;
    Part acc[nb * parts];
    for (int v = 0; v < nb * parts; ++v) acc[v] = load<Part>(sums + v * width);
    for (; k < end; ++k) {
      Vec<float, nb> weight = Vec<float, nb>{} + list.weight[k];
      if (drops) weight = (Vec<float, nb>)((Vec<int32_t, nb>)weight & kept_units<nb>(list.chain[k], j, list.drop_last));
      const Codes codes(list.row[k] + j * code_bytes, last);
      for (int v = 0; v < nb; ++v) {
        const float* codeword = codewords + (v * num_codes + codes[v]) * d;
        for (int t = 0; t < parts; ++t) {
          acc[v * parts + t] += weight[v] * load<Part>(codeword + t * width);
        }
      }
    }
    for (int v = 0; v < nb * parts; ++v) store(sums + v * width, acc[v]);
  }
}

template <template <int> class Codes, bool drops, int d>
int64_t add_whole_branches(const List& list, const Output& out, const Table& table) {
  const int64_t m = std::min(table.m, out.f / d);
  int64_t j = 0;
  for (; j + 8 <= m; j += 8) add_branches<Codes<8>, drops, d, 8>(list, out, table, j);
  for (; j + 2 <= m; j += 2) add_branches<Codes<2>, drops, d, 2>(list, out, table, j);
  for (; j < m; ++j) add_branches<Codes<1>, drops, d, 1>(list, out, table, j);
  return m;
}

// kLanes branches of one dimension from branch j on: their numbers are gathered.
template <typename Code, bool drops>
int64_t add_numbers(const List& list, const Output& out, const Table& table) {
  const int64_t m = std::min(table.m, out.f) / kLanes * kLanes;
  Ints first;  // of each branch's codewords
  for (int v = 0; v < kLanes; ++v) first[v] = int32_t(v * table.K);
  for (int64_t j = 0; j < m; j += kLanes) {
    const float* numbers = table.codebook + j * table.K;
    int k = 0;
    for (int i = 0; i < out.num_rows; ++i) {
      const int end = list.end[i];
      if (k == end) continue;
      float* sums = out.first + i * out.f + j;
      Floats acc = load<Floats>(sums);
      for (; k < end; ++k) {
        Ints code = (Ints)load_wide<kLanes>((const Code*)list.row[k] + j);
        if (sizeof(Code) > 1) code = code < int32_t(table.K) ? code : Ints{} + int32_t(table.K - 1);
        Floats value = gather(numbers, code + first);
        if (drops) value = (Floats)((Ints)value & kept_units<kLanes>(list.chain[k], j, list.drop_last));
        acc += list.weight[k] * value;
      }
      store(sums, acc);
    }
  }
  return m;
}

template <typename Code, template <int> class Codes, bool drops>
void add_codes(const List& list, const Output& out, const Table& table) {
  if (list.count == 0) return;
  const int64_t d = table.d, last = table.K - 1;
  int64_t done = 0;
  if (d == 1) done = add_numbers<Code, drops>(list, out, table);
  if (d == 2) done = add_whole_branches<Codes, drops, 2>(list, out, table);
  if (d == 4) done = add_whole_branches<Codes, drops, 4>(list, out, table);
  if (d == 8) done = add_whole_branches<Codes, drops, 8>(list, out, table);
  if (d == 16) done = add_whole_branches<Codes, drops, 16>(list, out, table);
  for (int64_t j = done; j < table.m && j * d < out.f; ++j) {  // other d, and a branch that f cuts short
    const float* codewords = table.codebook + j * table.K * d;
    const int64_t width = std::min(d, out.f - j * d);
    int k = 0;
    for (int i = 0; i < out.num_rows; ++i) {
      float* sums = out.first + i * out.f + j * d;
      for (; k < list.end[i]; ++k) {
        if (drops && !kept(list.chain[k], j, list.drop_last)) continue;
        const int64_t code = load<Code>(list.row[k] + j * sizeof(Code));
        const float* codeword = codewords + std::min(code, last) * d;
        for (int64_t t = 0; t < width; ++t) sums[t] += list.weight[k] * codeword[t];
      }
    }
  }
}

template <bool drops>
void add_table(const List& list, const Output& out, const Table& table) {
  switch (table.codec) {
    case Codec::none: return;
    case Codec::fp32: return add_rows<ReadFloat, drops>(list, out);
    case Codec::fp16: return add_rows<ReadHalf, drops>(list, out);
    case Codec::int8: return add_rows<ReadByte, drops>(list, out);
    case Codec::int4: return add_rows<ReadNibble, drops>(list, out);
    case Codec::pq8: return add_codes<uint8_t, Codes8, drops>(list, out, table);
    case Codec::pq16: return add_codes<uint16_t, Codes16, drops>(list, out, table);
  }
}

struct Problem {
  const float* x;
  int64_t b, f;
  const int64_t* rowptr;
  const int32_t* col;
  int64_t num_edges;
  const float* weight;
  const int64_t* halo;
  int64_t num_halo;
  Table table;
  Dropout dropout;  // of the table's rows: the hash of (seed, halo entry, column, or branch of codes)
};

void finish_list(List& list) {
  const char* last = list.count > 0 ? list.row[list.count - 1] : nullptr;
  for (int k = 0; k < kAhead; ++k) list.row[list.count + k] = last;
}

// Sorts edges e0 .. e1 - 1 of the rows into the two lists; false when an entry is out of range.
bool resolve(const Problem& p, int64_t row0, int num_rows, int64_t e0, int64_t e1, List& own, List& stored) {
  const int64_t x_bytes = p.f * int64_t(sizeof(float));
  const bool drop = p.table.codec == Codec::none;
  const bool affine = p.table.scale != nullptr;
  const uint32_t first_chain = mix(p.dropout.seed);
  // A piece's short rows fit the L2 cache together, so they can be on their way long before their use.
  const bool fetch = p.table.row_bytes <= 128;
  bool good = true;
  own.count = stored.count = 0;
  int64_t e = e0;
  for (int i = 0; i < num_rows; ++i) {
    const int64_t end = std::min(p.rowptr[row0 + i + 1], e1);
    for (; e < end; ++e) {
      const int64_t c = p.col[e];
      const float weight = p.weight ? p.weight[e] : 1.0f;
      if (c < p.b) {
        if (c < 0) {
          good = false;
          continue;
        }
        own.row[own.count] = (const char*)p.x + c * x_bytes;
        own.weight[own.count++] = weight;
        continue;
      }
      if (drop) continue;
      int64_t row = c - p.b;
      if (p.num_halo >= 0) row = row < p.num_halo ? p.halo[row] : -1;
      if (uint64_t(row) >= uint64_t(p.table.num_rows)) {
        good = false;
        continue;
      }
      const char* address = (const char*)p.table.data + row * p.table.row_bytes;
      if (fetch) {
        for (int64_t byte = 0; byte < p.table.row_bytes; byte += 64) __builtin_prefetch(address + byte, 0, 2);
      }
      stored.row[stored.count] = address;
      if (affine) {
        stored.affine[stored.count] = {bf16_to_float(p.table.scale[2 * row]), bf16_to_float(p.table.scale[2 * row + 1])};
      }
      if (p.dropout.on) stored.chain[stored.count] = mix(first_chain ^ uint32_t(c - p.b));
      stored.weight[stored.count++] = weight * p.dropout.keep_scale;
    }
    own.end[i] = own.count;
    stored.end[i] = stored.count;
  }
  finish_list(own);
  finish_list(stored);
  return good;
}

bool rowptr_is_valid(const Problem& p, int64_t row0, int64_t row1) {
  bool good = p.rowptr[row0] >= 0;
  for (int64_t i = row0; i < row1; ++i) good &= p.rowptr[i] <= p.rowptr[i + 1];
  return good && p.rowptr[row1] <= p.num_edges;
}

bool add_chunk(const Problem& p, int64_t row0, int64_t row1, float* out, List& own, List& stored) {
  std::fill(out + row0 * p.f, out + row1 * p.f, 0.0f);
  if (!rowptr_is_valid(p, row0, row1)) return false;
  bool good = true;
  int64_t first = row0;
  int64_t e = p.rowptr[row0];
  while (e < p.rowptr[row1]) {  // one piece: from edge e of row `first` on
    const int64_t e1 = std::min(e + kPieceEdges, p.rowptr[row1]);
    int64_t last = first;
    while (p.rowptr[last + 1] < e1) ++last;
    const int num_rows = int(last - first + 1);
    good &= resolve(p, first, num_rows, e, e1, own, stored);
    const Output piece{out + first * p.f, p.f, num_rows};
    add_rows<ReadFloat, false>(own, piece);
    if (p.dropout.on) {
      add_table<true>(stored, piece, p.table);
    } else {
      add_table<false>(stored, piece, p.table);
    }
    e = e1;
    first = last;
  }
  return good;
}

// A large fresh output costs more in 4 kB page faults than half of the sums: ask for 2 MB pages.
void ask_for_large_pages(float* out, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t first = (uintptr_t(out) + page - 1) / page * page, end = (uintptr_t(out) + bytes) / page * page;
  if (first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);
#else
  (void)out, (void)bytes;
#endif
}

}  // namespace

// False when rowptr, col or halo holds an entry out of range; out is then unspecified.
bool aggregate(const float* x, int64_t b, int64_t f, const int64_t* rowptr, int64_t num_rows, const int32_t* col,
               int64_t num_edges, const float* weight, const int64_t* halo, int64_t num_halo, const Table& table,
               const Dropout& dropout, float* out) {
  Problem p{x, b, f, rowptr, col, num_edges, weight, halo, num_halo, table, dropout};
  std::vector<float> padded;
  if (table.codec == Codec::pq8 && table.K < 256) {  // repeat the last codeword, so that no byte points outside
    padded.resize(table.m * 256 * table.d);
    for (int64_t k = 0; k < table.m * 256; ++k) {
      const int64_t j = k / 256, code = std::min(k % 256, table.K - 1);
      std::copy_n(table.codebook + (j * table.K + code) * table.d, table.d, padded.data() + k * table.d);
    }
    p.table.codebook = padded.data();
    p.table.K = 256;
  }
  ask_for_large_pages(out, num_rows * f * int64_t(sizeof(float)));
  bool good = rowptr[0] == 0 && rowptr[num_rows] == num_edges;
  const int64_t num_chunks = (num_rows + kChunkRows - 1) / kChunkRows;
#pragma omp parallel reduction(&& : good)
  {
    List own, stored;
    stored.drop_last = p.dropout.last;
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const int64_t row0 = chunk * kChunkRows;
      good = add_chunk(p, row0, std::min(row0 + kChunkRows, num_rows), out, own, stored) && good;
    }
  }
  return good;
}

}  // namespace VQGNN_ISA
}  // namespace vqgnn
