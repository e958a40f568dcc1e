// Random programs of pushes, pulls and kernels against a sequential model, on the driver that VQGNN_LIBCUDA names.
//
//   stress [--programs N | --seconds S] [--seed S] [--runners R] [--skip-wait W] [--until-mismatch]
//
// Every runner is a thread with engines of its own; on some engines two threads run programs at once, each on its own
// tables. A program is a dozen calls; its kernels (host functions on a stream) fill sources and compare pulled rows
// with the model. At its end the tables are compared. Exits with 1 when a value was wrong.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "transfer/engine.h"

using namespace vqgnn::transfer;

namespace {

using Launch = int (*)(void*, void (*)(void*), void*);
using Random = std::mt19937_64;

struct Cuda {
  int (*stream_create)(void**, unsigned);
  int (*stream_synchronize)(void*);
  int (*stream_destroy)(void*);
  Launch launch;

  Cuda() {
    void* library = dlopen(std::getenv("VQGNN_LIBCUDA"), RTLD_NOW);
    if (library == nullptr) throw std::runtime_error("VQGNN_LIBCUDA must name the fake driver");
    stream_create = reinterpret_cast<decltype(stream_create)>(dlsym(library, "cuStreamCreate"));
    stream_synchronize = reinterpret_cast<decltype(stream_synchronize)>(dlsym(library, "cuStreamSynchronize"));
    stream_destroy = reinterpret_cast<decltype(stream_destroy)>(dlsym(library, "cuStreamDestroy_v2"));
    launch = reinterpret_cast<Launch>(dlsym(library, "cuLaunchHostFunc"));
  }
};

struct Settings {
  int64_t programs = 1000, runners = 4;
  double seconds = 0;  // instead of programs
  uint64_t seed = 0;
  Wait skip_wait = Wait::none;
  bool until_mismatch = false;
};

std::atomic<int64_t> programs_begun{0}, programs_ended{0}, pulls{0}, pushes{0}, wrong{0};

int64_t up_to(Random& random, int64_t limit) { return int64_t(random() % uint64_t(limit)); }

// Rows of `words` equal numbers: a torn row shows.
struct Model {
  int number;
  int64_t words;
  std::vector<uint64_t> memory, expected;  // [rows, words], [rows]
};

// Memory of a device or of the host, and what a program still has to wait for before it may use it.
struct Buffer {
  std::optional<Stream> stream;  // that its kernels run on; none: host memory
  std::vector<uint64_t> memory, expected;
  int64_t words = 1;
  std::vector<Ticket> readers;
  Ticket writer;
};

// Programs of one thread, on its own tables and streams.
class Caller {
 public:
  Caller(Engine& engine, const Cuda& cuda, uint64_t seed, bool device) : engine_(engine), cuda_(cuda), random_(seed) {
    for (Model& table : tables_) {
      table.words = 1 + up_to(random_, 8);
      table.expected.assign(size_t(1 + up_to(random_, 150)), 0);
      table.memory.assign(table.expected.size() * size_t(table.words), 0);
      table.number = engine_.add_table(table.memory.data(), int64_t(table.expected.size()), table.words * 8);
    }
    for (void*& stream : streams_) {
      if (device) cuda_.stream_create(&stream, 0);
    }
    for (size_t i = 0; i < buffers_.size(); ++i) {
      if (device && i > 0) buffers_[i].stream = streams_[i % 2];
      buffers_[i].memory.assign(kRows * 8, 0);
    }
  }

  ~Caller() {
    for (void* stream : streams_) {
      if (stream != nullptr) cuda_.stream_destroy(stream);
    }
  }

  void program(bool closing) {
    ++programs_begun;
    for (int i = 0; i < 12; ++i) {
      Buffer& buffer = buffers_[size_t(up_to(random_, int64_t(buffers_.size())))];
      Model& table = tables_[size_t(up_to(random_, int64_t(tables_.size())))];
      switch (up_to(random_, 6)) {
        case 0: fill(buffer, 1 + up_to(random_, kRows), table.words); [[fallthrough]];
        case 1: push(buffer, table); break;
        case 2:
        case 3: pull(buffer, table); break;
        case 4: check(buffer); break;
        default:
          if (up_to(random_, 4) == 0) compare_tables();
      }
    }
    for (Buffer& buffer : buffers_) check(buffer);
    if (closing) {
      engine_.close();
    } else {
      engine_.flush();
    }
    compare_tables(false);
    for (void* stream : streams_) {
      if (stream != nullptr) cuda_.stream_synchronize(stream);  // the kernels count what is wrong
    }
    ++programs_ended;
  }

 private:
  static constexpr int64_t kRows = 200;  // a buffer's, at most

  void launch(const Buffer& buffer, std::function<void()> work) {
    if (!buffer.stream.has_value()) return work();
    cuda_.launch(
        *buffer.stream,
        [](void* data) {
          const std::unique_ptr<std::function<void()>> function(static_cast<std::function<void()>*>(data));
          (*function)();
        },
        new std::function<void()>(std::move(work)));
  }

  void wait_for_writer(Buffer& buffer) {
    if (buffer.writer != nullptr) engine_.wait(buffer.writer, buffer.stream);
    buffer.writer = nullptr;
  }

  void wait_for_readers(Buffer& buffer) {
    for (const Ticket& reader : buffer.readers) engine_.wait(reader, buffer.stream);
    buffer.readers.clear();
  }

  void fill(Buffer& buffer, int64_t rows, int64_t words) {
    wait_for_writer(buffer);
    wait_for_readers(buffer);
    buffer.words = words;
    buffer.expected.resize(size_t(rows));
    for (uint64_t& value : buffer.expected) value = random_();
    launch(buffer, [memory = buffer.memory.data(), values = buffer.expected, words] {
      for (size_t i = 0; i < values.size(); ++i) std::fill_n(memory + i * size_t(words), words, values[i]);
    });
  }

  void push(Buffer& buffer, Model& table) {
    if (buffer.words != table.words) return;
    wait_for_writer(buffer);
    const auto ids = random_ids(buffer.expected.size(), table);
    for (size_t i = 0; i < ids.size(); ++i) table.expected[size_t(ids[i])] = buffer.expected[i];
    buffer.readers.push_back(engine_.push(table.number, ids.data(), int64_t(ids.size()),
                                          reinterpret_cast<uintptr_t>(buffer.memory.data()), buffer.stream));
    ++pushes;
  }

  void pull(Buffer& buffer, Model& table) {
    wait_for_writer(buffer);
    wait_for_readers(buffer);
    const auto ids = random_ids(size_t(up_to(random_, kRows + 1)), table);
    buffer.words = table.words;
    buffer.expected.clear();
    for (int64_t id : ids) buffer.expected.push_back(table.expected[size_t(id)]);
    buffer.writer = engine_.pull(table.number, ids.data(), int64_t(ids.size()),
                                 reinterpret_cast<uintptr_t>(buffer.memory.data()), buffer.stream);
    ++pulls;
  }

  void check(Buffer& buffer) {
    wait_for_writer(buffer);
    launch(buffer, [memory = buffer.memory.data(), values = buffer.expected, words = buffer.words] {
      compare(memory, values, words);
    });
  }

  void compare_tables(bool flush = true) {
    if (flush) engine_.flush();
    for (const Model& table : tables_) compare(table.memory.data(), table.expected, table.words);
  }

  static void compare(const uint64_t* memory, const std::vector<uint64_t>& values, int64_t words) {
    for (size_t i = 0; i < values.size(); ++i) {
      for (int64_t word = 0; word < words; ++word) wrong += memory[i * size_t(words) + size_t(word)] != values[i];
    }
  }

  std::vector<int64_t> random_ids(size_t k, const Model& table) {
    const auto rows = int64_t(table.expected.size());
    std::vector<int64_t> ids(k);
    for (int64_t& id : ids) id = up_to(random_, rows);
    if (up_to(random_, 2) == 0) {  // distinct ones take another path; the caller's k follows
      std::sort(ids.begin(), ids.end());
      const bool distinct = std::adjacent_find(ids.begin(), ids.end()) == ids.end();
      if (!distinct && rows >= int64_t(k)) {
        for (size_t i = 0; i < k; ++i) ids[i] = int64_t(i) + (rows - int64_t(k));
      }
    }
    return ids;
  }

  Engine& engine_;
  const Cuda& cuda_;
  Random random_;
  std::vector<Model> tables_{3};
  std::vector<void*> streams_{nullptr, nullptr};
  std::vector<Buffer> buffers_{5};  // the first in host memory
};

void run(const Settings& settings, const Cuda& cuda, uint64_t seed, std::chrono::steady_clock::time_point end) {
  Random random(seed);
  const auto more = [&] {
    if (settings.until_mismatch && wrong > 0) return false;
    return settings.seconds > 0 ? std::chrono::steady_clock::now() < end : programs_begun < settings.programs;
  };
  while (more()) {
    Options options;
    options.num_threads = 1 + int(up_to(random, 3));
    options.slots = 1 + int(up_to(random, 4));
    options.slot_bytes = 64 << up_to(random, 7);  // a row or more
    options.device = up_to(random, 8) == 0 ? -1 : 0;
    options.skip_wait = settings.skip_wait;
    const int num_callers = up_to(random, 3) == 0 ? 2 : 1;
    std::vector<std::unique_ptr<Caller>> callers;
    std::vector<std::thread> threads;
    Engine engine(options);
    for (int i = 0; i < num_callers; ++i) {
      callers.push_back(std::make_unique<Caller>(engine, cuda, random(), options.device >= 0));
    }
    for (const auto& caller : callers) {
      threads.emplace_back([&] {
        for (int i = 0; i < 10 && more(); ++i) caller->program(i == 9 && num_callers == 1);
      });
    }
    for (std::thread& thread : threads) thread.join();
    engine.close();
  }
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--until-mismatch") {
      settings.until_mismatch = true;
      continue;
    }
    if (i + 1 == argc) break;
    const char* value = argv[++i];
    if (name == "--programs") settings.programs = std::atoll(value);
    if (name == "--seconds") settings.seconds = std::atof(value);
    if (name == "--seed") settings.seed = std::strtoull(value, nullptr, 10);
    if (name == "--runners") settings.runners = std::atoll(value);
    if (name == "--skip-wait") settings.skip_wait = static_cast<Wait>(std::atoi(value));
  }
  const Cuda cuda;
  const auto start = std::chrono::steady_clock::now();
  const auto end = start + std::chrono::microseconds(int64_t(settings.seconds * 1e6));
  std::vector<std::thread> runners;
  for (int64_t i = 0; i < settings.runners; ++i) {
    runners.emplace_back([&, i] { run(settings, cuda, settings.seed + uint64_t(i) * 1000003, end); });
  }
  for (std::thread& runner : runners) runner.join();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("%lld programs, %lld pulls, %lld pushes, %lld wrong values, %.1f s\n",
              static_cast<long long>(programs_ended), static_cast<long long>(pulls), static_cast<long long>(pushes),
              static_cast<long long>(wrong), took.count());
  return wrong == 0 ? 0 : 1;
}
