// Moves rows between tables in host memory (RAM, pinned or memory-mapped) and batches on the device or the host, while
// the caller computes.
//
//   pull, device:  table --worker--> pinned slot --copy stream--> out       the caller's stream waits in wait()
//   push, device:  src --copy stream--> pinned slot --worker--> table
//   host:          table <--worker--> out, src                              wait() blocks
//
// Order. Operations on one table take effect in the order of the calls: a pull returns what the pushes before it wrote,
// and never what a later push writes. Only pulls overlap. Tables are independent of each other, but the copies of one
// direction share a stream: one that waits for its caller's stream holds up those behind it. Calls from several threads
// are in the order in which they come.
//
// Memory. `ids` are copied. `out` and `src` must stay allocated until done(). Who writes `src`, or reads or writes
// `out`, waits first: host code by wait() without a stream, device code by wait() with its own stream.
//
// Errors. Wrong arguments throw std::invalid_argument, and nothing is queued. Once a worker or a copy has failed, the
// engine moves nothing more: what was not finished, and every call from then on, throws Failure with the cause.
// After fork() the child cannot use the engine: calls throw, and close() does nothing.
#pragma once
#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>

#include "transfer/driver.h"

namespace vqgnn::transfer {

// Every wait, so that a test can leave one out and see values go wrong.
enum class Wait {
  none,
  out_free,        // pull: the copy stream waits for the caller's stream, whose earlier work may use `out`
  copy_left,       // pull: a slot is not filled again before its copy to the device has ended
  rows_there,      // wait() for a pull: the caller's stream waits for the copies
  source_filled,   // push: the copy stream waits for the caller's stream, which computes `src`
  rows_arrived,    // push: a slot is not scattered before its copy from the device has ended
  slot_scattered,  // push: a slot is not filled again before it has been scattered
  source_read,     // wait() for a push: the caller's stream waits for the copies
  copies_queued,   // wait(): the host waits until there is a copy to wait for
  order,           // an operation waits for the earlier ones on its table
  done,            // wait() without a stream
  flush,
  close,           // the queue is worked off first
};
constexpr int kNumWaits = int(Wait::close);

struct Options {
  int num_threads = 1;  // workers that gather and scatter
  int slots = 32;  // pinned slots a direction; best enough for two batches' rows
  int64_t slot_bytes = 1 << 20;
  int device = -1;  // CUDA device; -1: host memory only
  Wait skip_wait = Wait::none;  // for tests
  int64_t fail_piece = -1;  // for tests: the work item with this number throws
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Operation;
using Ticket = std::shared_ptr<Operation>;

class Engine {
 public:
  explicit Engine(const Options& options);
  ~Engine();  // close() without its error
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // [num_rows, row_bytes] in host memory, which must outlive the engine; `pin` page-locks it, so that kernels can read
  // it directly. Returns the table's number.
  int add_table(void* data, int64_t num_rows, int64_t row_bytes, bool pin = false);

  // out[i] = table[ids[i]] for i < k. With a stream, `out` is device memory, free to be written once the work so far on
  // that stream is done; without, host memory. out = 0: nothing is copied, but the rows of a mapped file are then in RAM.
  Ticket pull(int table, const int64_t* ids, int64_t k, uintptr_t out, std::optional<Stream> stream);

  // table[ids[i]] = src[i] for i < k; of equal ids the last wins. With a stream, `src` is device memory, valid once the
  // work so far on that stream is done; without, host memory.
  Ticket push(int table, const int64_t* ids, int64_t k, uintptr_t src, std::optional<Stream> stream);

  // With a stream: its further work comes after the copies between device and slots; the host blocks only until these
  // are queued. Without, or for host memory: blocks until done.
  void wait(const Ticket& ticket, std::optional<Stream> stream);

  bool done(const Ticket& ticket) const;  // nothing touches `out`, `src` or the table for it any more
  void flush();  // blocks until everything queued before the call is done
  void close();  // everything queued is done, then the threads end; may be called again
  std::optional<Stream> pull_stream() const;  // on which pulls are copied, to allocate `out` on; none without a device

 private:
  class Impl;
  Impl& impl() const;

  std::unique_ptr<Impl> impl_;
  pid_t process_;
};

}  // namespace vqgnn::transfer
