#include "transfer/engine.h"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace vqgnn::transfer {
namespace {

constexpr int64_t kMinPieceBytes = 64 << 10;  // less is not worth a worker's wake-up
constexpr int64_t kLine = 64, kPrefetchRows = 12, kPrefetchLines = 4;

// Copies row ids[i] of the table to row i of the batch, or back. kBytes: the size of a row where it is known, else 0.
template <bool kScatter, int64_t kBytes>
void copy_rows(char* table, char* batch, const int64_t* ids, int64_t k, int64_t row_bytes) {
  if (kBytes != 0) row_bytes = kBytes;
  const int64_t lines_end = std::min(row_bytes, kPrefetchLines * kLine);  // the hardware's prefetcher does the rest
  for (int64_t i = 0; i < k; ++i) {
    if (i + kPrefetchRows < k) {
      const char* next = table + ids[i + kPrefetchRows] * row_bytes;
      for (int64_t byte = 0; byte < lines_end; byte += kLine) __builtin_prefetch(next + byte, kScatter);
    }
    char* row = table + ids[i] * row_bytes;
    std::memcpy(kScatter ? row : batch, kScatter ? batch : row, size_t(row_bytes));
    batch += row_bytes;
  }
}

template <bool kScatter>
void copy_rows(char* table, char* batch, const int64_t* ids, int64_t k, int64_t row_bytes) {
  switch (row_bytes) {
    case 32: return copy_rows<kScatter, 32>(table, batch, ids, k, row_bytes);
    case 64: return copy_rows<kScatter, 64>(table, batch, ids, k, row_bytes);
    case 128: return copy_rows<kScatter, 128>(table, batch, ids, k, row_bytes);
    default: return copy_rows<kScatter, 0>(table, batch, ids, k, row_bytes);
  }
}

// Reads a byte of every page that the rows lie in: those of a mapped file are then in RAM.
void touch_rows(const char* table, int64_t num_rows, const int64_t* ids, int64_t k, int64_t row_bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE), offset = int64_t(uintptr_t(table) % uintptr_t(page));
  table -= offset;
  std::vector<bool> seen(size_t((offset + num_rows * row_bytes) / page + 1));
  for (int64_t i = 0; i < k; ++i) {
    const int64_t start = offset + ids[i] * row_bytes, last = (start + row_bytes - 1) / page;
    for (int64_t at = start / page; at <= last; ++at) {
      if (seen[size_t(at)]) continue;
      seen[size_t(at)] = true;
      static_cast<void>(*static_cast<const volatile char*>(table + std::max(start, at * page)));
    }
  }
}

struct Ids {
  std::unique_ptr<int64_t[]> values;
  bool increasing = true;
};

Ids checked(const int64_t* ids, int64_t k, int64_t num_rows) {
  Ids copy{std::unique_ptr<int64_t[]>(new int64_t[size_t(k)])};
  bool good = true;
  int64_t before = -1;
  for (int64_t i = 0; i < k; ++i) {
    const int64_t id = copy.values[i] = ids[i];
    good &= uint64_t(id) < uint64_t(num_rows);
    copy.increasing &= id > before;
    before = id;
  }
  if (good) return copy;
  const int64_t* bad = std::find_if(copy.values.get(), copy.values.get() + k,
                                    [&](int64_t id) { return uint64_t(id) >= uint64_t(num_rows); });
  throw std::invalid_argument("ids must be in 0.." + std::to_string(num_rows - 1) + ", got " + std::to_string(*bad) +
                              " at position " + std::to_string(bad - copy.values.get()));
}

bool distinct(const Ids& ids, int64_t k, int64_t num_rows) {
  if (ids.increasing) return true;
  // calloc: pages that no id touches cost nothing.
  const std::unique_ptr<uint64_t, decltype(&std::free)> seen(
      static_cast<uint64_t*>(std::calloc(size_t(num_rows / 64 + 1), sizeof(uint64_t))), &std::free);
  if (seen == nullptr) throw std::bad_alloc();
  for (int64_t i = 0; i < k; ++i) {
    uint64_t& word = seen.get()[ids.values[i] / 64];
    const uint64_t bit = uint64_t(1) << (ids.values[i] % 64);
    if (word & bit) return false;
    word |= bit;
  }
  return true;
}

struct Table {
  char* data;
  int64_t num_rows, row_bytes;
  bool pinned;
  std::deque<Ticket> queue;  // operations that have yet to read or write it, in the order of the calls
};

struct Slot {
  void* memory;
  Event copied;  // recorded behind its latest copy
};

struct Piece {
  Ticket operation;
  int64_t index;
  Slot* slot;  // null for host memory
};

// One direction between pinned memory and the device.
struct Lane {
  Stream stream = nullptr;
  std::vector<Slot> slots;
  std::vector<Slot*> free;
  std::deque<Piece> in_flight;  // copies on the stream, in its order
  std::condition_variable queued;
};

}  // namespace

struct Operation {
  const void* engine;
  bool is_push, on_device;
  Table* table;
  int table_number;
  int64_t number;  // of the call: a worker takes the oldest piece
  std::unique_ptr<int64_t[]> ids;
  int64_t k;
  uintptr_t memory;  // out or src; 0: the rows are read ahead only
  int64_t piece_rows, pieces;
  bool in_turn;  // a push with equal ids: piece after piece

  // Pieces so far. A pull's are claimed, processed (gathered), queued and copied, a push's queued, copied, claimed and
  // processed (scattered).
  int64_t claimed = 0, processed = 0, queued = 0, copied = 0;
  std::deque<Piece> arrived;    // of a push, copied and not claimed
  Event caller = nullptr;       // behind the caller's earlier work, until the copy stream waits for it
  Event last_copy = nullptr;    // valid while copied < pieces
  bool failed = false, complete = false;
};

class Engine::Impl {
 public:
  explicit Impl(const Options& options) : options_(options) {
    if (options.device >= 0) driver_ = std::make_unique<Driver>(options.device);
    try {
      start();
    } catch (...) {
      stop();
      throw;
    }
  }

  int add_table(void* data, int64_t num_rows, int64_t row_bytes, bool pin) {
    const auto require = [](bool condition, const std::string& what) {
      if (!condition) throw std::invalid_argument(what);
    };
    require(num_rows >= 0 && (data != nullptr || num_rows == 0), "a table needs an address and num_rows >= 0");
    require(row_bytes >= 1 && (options_.device < 0 || row_bytes <= options_.slot_bytes),
            "a row must have 1.." + std::to_string(options_.slot_bytes) + " bytes, the size of a slot (slot_bytes), " +
                "got " + std::to_string(row_bytes));
    require(!pin || options_.device >= 0, "pin needs an engine with a CUDA device");
    std::unique_lock lock(mutex_);
    check_usable();
    pin = pin && num_rows > 0;
    if (pin) {
      const Driver::Scope scope(driver_.get());
      driver_->pin(data, size_t(num_rows * row_bytes));
    }
    tables_.push_back({static_cast<char*>(data), num_rows, row_bytes, pin, {}});
    return int(tables_.size()) - 1;
  }

  Ticket start_operation(bool is_push, int table_number, const int64_t* ids, int64_t k, uintptr_t memory,
                         std::optional<Stream> stream) {
    Table& table = find_table(table_number);
    if (k < 0 || (k > 0 && (ids == nullptr || (memory == 0 && (is_push || stream.has_value()))))) {
      throw std::invalid_argument("k must be >= 0, with addresses of ids and rows, got k=" + std::to_string(k));
    }
    if (stream.has_value() && options_.device < 0) {
      throw std::invalid_argument("a stream needs an engine with a CUDA device; this one moves host memory only");
    }
    Ids checked_ids = checked(ids, k, table.num_rows);
    auto operation = std::make_shared<Operation>();
    operation->engine = this;
    operation->is_push = is_push;
    operation->on_device = stream.has_value();
    operation->table = &table;
    operation->table_number = table_number;
    operation->k = k;
    operation->memory = memory;
    operation->in_turn = is_push && !distinct(checked_ids, k, table.num_rows);
    operation->ids = std::move(checked_ids.values);
    const int64_t smallest = std::max<int64_t>(1, kMinPieceBytes / table.row_bytes);
    const int64_t largest = std::max<int64_t>(1, options_.slot_bytes / table.row_bytes);
    const int64_t even = k / (2 * options_.num_threads) + 1;
    operation->piece_rows = std::min(std::max(even, smallest), largest);
    operation->pieces = (k + operation->piece_rows - 1) / operation->piece_rows;

    std::unique_lock lock(mutex_);
    check_usable();
    if (k == 0) {
      operation->complete = true;
      return operation;
    }
    operation->number = next_number_++;
    active_.insert(operation->number);  // from here close() waits for this call
    if (stream.has_value()) {
      try {
        operation->caller = record(*stream, lock);
      } catch (...) {
        active_.erase(operation->number);
        progress_.notify_all();
        throw;
      }
    }
    table.queue.push_back(operation);
    if (is_push && operation->on_device) {
      to_copy_.push_back(operation);
      queue_pushes();
    }
    work_.notify_all();
    return operation;
  }

  void wait(const Ticket& ticket, std::optional<Stream> stream) {
    const Operation& operation = own(ticket);
    std::unique_lock lock(mutex_);
    if (stream.has_value() && operation.on_device) {
      if (!skipped(Wait::copies_queued)) {
        progress_.wait(lock, [&] { return operation.queued == operation.pieces || operation.complete; });
      }
      check(operation);
      if (operation.last_copy != nullptr && operation.copied < operation.pieces &&
          !skipped(operation.is_push ? Wait::source_read : Wait::rows_there)) {
        const Driver::Scope scope(driver_.get());
        driver_->wait(*stream, operation.last_copy);
      }
    } else {
      if (!skipped(Wait::done)) progress_.wait(lock, [&] { return operation.complete; });
      check(operation);
    }
  }

  bool done(const Ticket& ticket) const {
    const Operation& operation = own(ticket);
    const std::lock_guard lock(mutex_);
    return operation.complete;
  }

  void flush() {
    std::unique_lock lock(mutex_);
    const int64_t end = next_number_;
    if (!skipped(Wait::flush)) {
      progress_.wait(lock, [&] { return active_.empty() || *active_.begin() >= end; });
    }
    check_usable();
  }

  void close() {
    {
      std::unique_lock lock(mutex_);
      const bool first = !std::exchange(closing_, true);
      if (!skipped(Wait::close)) progress_.wait(lock, [&] { return active_.empty(); });
      if (!first) return progress_.wait(lock, [&] { return closed_; });
    }
    stop();
    const std::lock_guard lock(mutex_);
    closed_ = true;
    progress_.notify_all();
    if (!failure_.empty() && !std::exchange(reported_, true)) throw Failure(failure_);
  }

  std::optional<Stream> pull_stream() const {
    if (driver_ == nullptr) return std::nullopt;
    return pulls_.stream;
  }

 private:
  bool skipped(Wait wait) const { return options_.skip_wait == wait; }

  // ---- the life of the threads --------------------------------------------------------------------------------------

  void start() {
    if (driver_ != nullptr) {
      const Driver::Scope scope(driver_.get());
      for (Lane* lane : {&pulls_, &pushes_}) {
        lane->stream = driver_->create_stream();
        lane->slots.reserve(size_t(options_.slots));
        for (int i = 0; i < options_.slots; ++i) {
          lane->slots.push_back({driver_->allocate_pinned(size_t(options_.slot_bytes)), nullptr});
          lane->slots.back().copied = create_event();
          lane->free.push_back(&lane->slots.back());
        }
      }
      threads_.emplace_back([this] { watch_copies(pulls_); });
      threads_.emplace_back([this] { watch_copies(pushes_); });
    }
    for (int i = 0; i < options_.num_threads; ++i) {
      threads_.emplace_back([this] { work(); });
    }
  }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
      work_.notify_all();
      pulls_.queued.notify_all();
      pushes_.queued.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    if (driver_ == nullptr) return;
    try {
      const Driver::Scope scope(driver_.get());
      for (Lane* lane : {&pulls_, &pushes_}) {
        if (lane->stream != nullptr) driver_->destroy_stream(lane->stream);
        for (const Slot& slot : lane->slots) driver_->free_pinned(slot.memory);
      }
      for (const Event event : events_) driver_->destroy_event(event);
      for (const Table& table : tables_) {
        if (table.pinned) driver_->unpin(table.data);
      }
    } catch (const std::exception&) {  // no context any more, and so nothing to free
    }
    driver_.reset();
  }

  // ---- what a caller needs ------------------------------------------------------------------------------------------

  Table& find_table(int number) {
    const std::lock_guard lock(mutex_);
    if (number >= 0 && size_t(number) < tables_.size()) return tables_[size_t(number)];
    throw std::invalid_argument("there is no table " + std::to_string(number) + "; add_table made " +
                                std::to_string(tables_.size()));
  }

  const Operation& own(const Ticket& ticket) const {
    if (ticket != nullptr && ticket->engine == this) return *ticket;
    throw std::invalid_argument("the ticket must come from this engine's pull or push");
  }

  Event create_event() {
    events_.push_back(driver_->create_event());
    return events_.back();
  }

  // An event behind the work so far on the caller's stream.
  Event record(Stream stream, std::unique_lock<std::mutex>& lock) {
    const Driver::Scope scope(driver_.get());
    if (spare_events_.empty()) spare_events_.push_back(create_event());
    const Event event = spare_events_.back();
    spare_events_.pop_back();
    lock.unlock();  // this call blocks while the stream's launch queue is full
    try {
      driver_->record(event, stream);
    } catch (...) {
      lock.lock();
      spare_events_.push_back(event);
      throw;
    }
    lock.lock();
    return event;
  }

  void check_usable() {
    if (!failure_.empty()) {
      reported_ = true;
      throw Failure(failure_);
    }
    if (closing_) throw std::runtime_error("the transfer engine is closed");
  }

  void check(const Operation& operation) {
    if (!operation.failed) return;
    reported_ = true;
    throw Failure(failure_);
  }

  void fail(const std::string& cause) {
    if (failure_.empty()) failure_ = "the transfer engine stopped: " + cause;
  }

  void fail(Operation& operation, const std::string& cause) {
    operation.failed = true;
    fail(std::string(operation.is_push ? "push to" : "pull from") + " table " + std::to_string(operation.table_number) +
         ": " + cause);
  }

  // ---- workers ------------------------------------------------------------------------------------------------------

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      std::optional<Piece> piece;
      work_.wait(lock, [&] { return (piece = next_piece()).has_value() || stopping_; });
      if (!piece.has_value()) return;
      Operation& operation = *piece->operation;
      std::string error;
      if (!failure_.empty()) {
        operation.failed = true;
      } else {
        const int64_t number = next_piece_number_++;
        lock.unlock();
        try {
          if (number == options_.fail_piece) throw std::runtime_error("a worker was told to fail");
          move_rows(*piece);
        } catch (const std::exception& exception) {
          error = exception.what();
        }
        lock.lock();
      }
      if (!error.empty()) fail(operation, error);
      processed(*piece);
    }
  }

  // The oldest piece that a worker may take now.
  std::optional<Piece> next_piece() {
    Operation* oldest = nullptr;
    Ticket* ticket = nullptr;
    for (Table& table : tables_) {
      for (Ticket& candidate : table.queue) {
        const bool turn = !candidate->is_push || candidate == table.queue.front();
        if (!turn && !skipped(Wait::order)) break;
        if (has_piece(*candidate)) {
          if (oldest == nullptr || candidate->number < oldest->number) {
            oldest = candidate.get();
            ticket = &candidate;
          }
          break;
        }
        if (candidate->is_push && !skipped(Wait::order)) break;
      }
    }
    if (oldest == nullptr) return std::nullopt;
    Piece piece{*ticket, oldest->claimed, nullptr};
    if (oldest->on_device && oldest->is_push) {
      piece = oldest->arrived.front();
      oldest->arrived.pop_front();
    } else if (oldest->on_device) {
      piece.slot = pulls_.free.back();
      pulls_.free.pop_back();
    }
    ++oldest->claimed;
    return piece;
  }

  bool has_piece(const Operation& operation) const {
    if (operation.claimed == operation.pieces) return false;
    if (operation.in_turn && operation.claimed > operation.processed) return false;
    if (!operation.on_device) return true;
    return operation.is_push ? !operation.arrived.empty() : !pulls_.free.empty();
  }

  static int64_t rows_of(const Piece& piece) {
    const Operation& operation = *piece.operation;
    return std::min(operation.piece_rows, operation.k - piece.index * operation.piece_rows);
  }

  static uintptr_t address_of(const Piece& piece) {
    const Operation& operation = *piece.operation;
    return operation.memory + uintptr_t(piece.index * operation.piece_rows * operation.table->row_bytes);
  }

  static size_t bytes_of(const Piece& piece) { return size_t(rows_of(piece) * piece.operation->table->row_bytes); }

  static void move_rows(const Piece& piece) {
    const Operation& operation = *piece.operation;
    const Table& table = *operation.table;
    const int64_t* ids = operation.ids.get() + piece.index * operation.piece_rows;
    if (operation.memory == 0) return touch_rows(table.data, table.num_rows, ids, rows_of(piece), table.row_bytes);
    char* batch = static_cast<char*>(piece.slot != nullptr ? piece.slot->memory
                                                           : reinterpret_cast<void*>(address_of(piece)));
    const auto copy = operation.is_push ? copy_rows<true> : copy_rows<false>;
    copy(table.data, batch, ids, rows_of(piece), table.row_bytes);
  }

  // After a piece was gathered or scattered.
  void processed(const Piece& piece) {
    Operation& operation = *piece.operation;
    if (++operation.processed == operation.pieces) {
      std::deque<Ticket>& queue = operation.table->queue;
      queue.erase(std::find(queue.begin(), queue.end(), piece.operation));
    }
    if (operation.on_device && !operation.is_push) {
      queue_copy(pulls_, piece);
    } else if (operation.on_device && !skipped(Wait::slot_scattered)) {
      pushes_.free.push_back(piece.slot);
    }
    complete_if_done(operation);
    queue_pushes();
    work_.notify_all();
  }

  void complete_if_done(Operation& operation) {
    if (operation.complete || operation.processed < operation.pieces) return;
    if (operation.on_device && operation.copied < operation.pieces) return;
    operation.complete = true;
    operation.ids.reset();  // tickets may be kept for long
    active_.erase(operation.number);
    progress_.notify_all();
  }

  // ---- copies -------------------------------------------------------------------------------------------------------

  // Puts a piece's copy on the lane's stream. The piece has a slot: full for a pull, free for a push.
  void queue_copy(Lane& lane, const Piece& piece) {
    Operation& operation = *piece.operation;
    bool good = failure_.empty();
    try {
      if (good) enqueue(lane, piece);
    } catch (const std::exception& error) {
      good = false;
      fail(operation, error.what());
      drain(lane);
    }
    if (++operation.queued == operation.pieces) progress_.notify_all();
    if (good) {
      lane.in_flight.push_back(piece);
      lane.queued.notify_one();
    } else {
      operation.failed = true;
      copied(lane, piece);
    }
  }

  void enqueue(Lane& lane, const Piece& piece) {
    const Driver::Scope scope(driver_.get());
    Operation& operation = *piece.operation;
    if (operation.caller != nullptr) {
      if (!skipped(operation.is_push ? Wait::source_filled : Wait::out_free)) {
        driver_->wait(lane.stream, operation.caller);
      }
      spare_events_.push_back(std::exchange(operation.caller, nullptr));  // a wait keeps what was recorded before it
    }
    if (operation.is_push) {
      driver_->copy_to_host(piece.slot->memory, address_of(piece), bytes_of(piece), lane.stream);
    } else {
      driver_->copy_to_device(address_of(piece), piece.slot->memory, bytes_of(piece), lane.stream);
    }
    driver_->record(piece.slot->copied, lane.stream);
    operation.last_copy = piece.slot->copied;
  }

  // Copies of pushes, as far as there are free slots; after a failure, all of them are dropped.
  void queue_pushes() {
    while (!to_copy_.empty() && !pushes_.free.empty()) {
      const Ticket operation = to_copy_.front();
      const Piece piece{operation, operation->queued, pushes_.free.back()};
      pushes_.free.pop_back();
      if (operation->queued + 1 == operation->pieces) to_copy_.pop_front();
      queue_copy(pushes_, piece);
    }
  }

  // A thread a lane: waits for each copy in turn.
  void watch_copies(Lane& lane) {
    std::unique_lock lock(mutex_);
    for (;;) {
      lane.queued.wait(lock, [&] { return !lane.in_flight.empty() || stopping_; });
      if (lane.in_flight.empty()) return;
      const Piece piece = lane.in_flight.front();
      lane.in_flight.pop_front();
      if (!skipped(piece.operation->is_push ? Wait::rows_arrived : Wait::copy_left)) {
        lock.unlock();
        std::string error;
        try {
          const Driver::Scope scope(driver_.get());
          driver_->wait_on_host(piece.slot->copied);
        } catch (const std::exception& exception) {
          error = exception.what();
          drain(lane);
        }
        lock.lock();
        if (!error.empty()) fail(*piece.operation, error);
      }
      copied(lane, piece);
      queue_pushes();
    }
  }

  // After the copy of a piece has ended, or was given up.
  void copied(Lane& lane, const Piece& piece) {
    Operation& operation = *piece.operation;
    ++operation.copied;
    if (operation.is_push) operation.arrived.push_back(piece);
    if (!operation.is_push || skipped(Wait::slot_scattered)) lane.free.push_back(piece.slot);
    complete_if_done(operation);
    work_.notify_all();
  }

  // After a driver's error: no copy may touch memory that the caller is about to get back.
  void drain(const Lane& lane) const {
    try {
      const Driver::Scope scope(driver_.get());
      driver_->synchronize(lane.stream);
    } catch (const std::exception&) {  // the first error is the one to report
    }
  }

  const Options options_;
  std::unique_ptr<Driver> driver_;  // null: host memory only
  std::vector<std::thread> threads_;

  // Everything below, and every operation, under the mutex.
  mutable std::mutex mutex_;
  std::condition_variable work_;      // for the workers: there may be a piece
  std::condition_variable progress_;  // for callers: an operation is queued or done
  std::deque<Table> tables_;          // operations point at them
  std::deque<Ticket> to_copy_;        // pushes whose copies are not all queued, in the order of the calls
  Lane pulls_, pushes_;
  std::vector<Event> events_, spare_events_;
  int64_t next_number_ = 0, next_piece_number_ = 0;
  std::set<int64_t> active_;  // numbers of the calls that are not complete
  std::string failure_;
  bool reported_ = false, closing_ = false, stopping_ = false, closed_ = false;
};

// ---- the engine, which belongs to the process that made it ----------------------------------------------------------

Engine::Engine(const Options& options) : process_(getpid()) {
  const auto require = [](int64_t value, const char* name, int64_t low, int64_t high) {
    if (value >= low && value <= high) return;
    throw std::invalid_argument(std::string(name) + " must be in " + std::to_string(low) + ".." + std::to_string(high) +
                                ", got " + std::to_string(value));
  };
  require(options.num_threads, "num_threads", 1, 1024);
  require(options.slots, "slots", 1, 1024);
  require(options.slot_bytes, "slot_bytes", 1, int64_t(1) << 40);
  require(options.device, "device", -1, 1 << 20);
  require(int(options.skip_wait), "skip_wait", 0, kNumWaits);
  impl_ = std::make_unique<Impl>(options);
}

Engine::~Engine() {
  if (getpid() != process_) {
    // The threads were not forked, and a lock may be held for ever by one of them: leave everything as it is.
    static_cast<void>(impl_.release());
    return;
  }
  try {
    impl_->close();
  } catch (const std::exception&) {
  }
}

Engine::Impl& Engine::impl() const {
  if (getpid() == process_) return *impl_;
  throw std::runtime_error("the transfer engine belongs to process " + std::to_string(process_) +
                           ", which forked this one; make a new engine here");
}

int Engine::add_table(void* data, int64_t num_rows, int64_t row_bytes, bool pin) {
  return impl().add_table(data, num_rows, row_bytes, pin);
}

Ticket Engine::pull(int table, const int64_t* ids, int64_t k, uintptr_t out, std::optional<Stream> stream) {
  return impl().start_operation(false, table, ids, k, out, stream);
}

Ticket Engine::push(int table, const int64_t* ids, int64_t k, uintptr_t src, std::optional<Stream> stream) {
  return impl().start_operation(true, table, ids, k, src, stream);
}

void Engine::wait(const Ticket& ticket, std::optional<Stream> stream) { impl().wait(ticket, stream); }

bool Engine::done(const Ticket& ticket) const { return impl().done(ticket); }

void Engine::flush() { impl().flush(); }

void Engine::close() {
  if (getpid() == process_) impl_->close();
}

std::optional<Stream> Engine::pull_stream() const { return impl().pull_stream(); }

}  // namespace vqgnn::transfer
