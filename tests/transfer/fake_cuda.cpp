// A CUDA driver without a GPU: the functions that csrc/transfer/driver.cpp loads, plus what tests launch. Streams are
// threads, device memory is host memory, copies take their time. Built by the tests, loaded by VQGNN_LIBCUDA=path.
//
//   FAKE_CUDA_DELAY_US  up to so many microseconds, at random, before or after each operation of a stream
//   FAKE_CUDA_GBPS      bandwidth of the bus in each direction, 10^9 bytes a second
//
// fake_fail(NAME, N) lets the N-th call of that function from then on fail.
//
// It is stricter than a driver: a context must be current, host memory of copies must be pinned, and pinned memory must
// not be freed under a copy.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;

enum Result { kSuccess = 0, kInvalidValue = 1, kInvalidDevice = 101, kInvalidContext = 201, kLaunchFailed = 719 };

double number_of(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? 0 : std::atof(text);
}

struct Settings {
  int delay_us = int(number_of("FAKE_CUDA_DELAY_US"));
  double bytes_per_second = number_of("FAKE_CUDA_GBPS") * 1e9;
};

const Settings& settings() {
  static const Settings settings;
  return settings;
}

std::mutex failing_mutex;
std::string failing;
int calls_left = 0;

bool fails(const char* name) {
  const std::lock_guard lock(failing_mutex);
  return failing == name && --calls_left == 0;
}

// Contexts, streams, events and pinned blocks that were made and not given back.
std::atomic<int> live{0};

thread_local std::vector<void*> contexts;

// One cuEventRecord. Whoever waits keeps the record that was the latest when it began to.
struct Record {
  std::mutex mutex;
  std::condition_variable changed;
  bool completed = false;
  Time time;

  Time wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return completed; });
    return time;
  }
};
using Event = std::shared_ptr<Record>;  // null until recorded

struct Bus {
  std::mutex mutex;
  Time free;
};

// `clock` is when the stream's latest operation ends on an ideal machine. Sleeping up to it, instead of for a duration,
// keeps a thread's late wake-ups from adding up.
class StreamThread {
 public:
  explicit StreamThread(uint64_t seed) : random_(seed), thread_([this] { run(); }) { ++live; }

  ~StreamThread() {
    push([this](Time) { stopping_ = true; });
    thread_.join();
    --live;
  }

  void push(std::function<void(Time)> operation) {
    const std::lock_guard lock(mutex_);
    queue_.push_back({std::move(operation), Clock::now()});
    changed_.notify_one();
  }

  std::shared_ptr<Record> record() {
    auto record = std::make_shared<Record>();
    push([this, record](Time queued) {
      const std::lock_guard lock(record->mutex);
      record->completed = true;
      record->time = std::max(clock_, queued);
      record->changed.notify_all();
    });
    return record;
  }

  void wait(const std::shared_ptr<Record>& record) {
    push([this, record](Time) { clock_ = std::max(clock_, record->wait()); });
  }

  // Runs on the stream's thread: `work`, at some time in a span that a bus or nothing limits.
  void spend(Time queued, std::chrono::nanoseconds duration, Bus* bus, const std::function<void()>& work) {
    clock_ = std::max(clock_, queued);
    if (bus != nullptr) {
      const std::lock_guard lock(bus->mutex);
      clock_ = bus->free = std::max(bus->free, clock_) + duration;
    } else {
      clock_ += duration;
    }
    const bool late = settings().delay_us > 0 && random_() % 2 == 0;
    if (!late) work();
    if (duration.count() > 0) std::this_thread::sleep_until(clock_);
    if (settings().delay_us > 0 && random_() % 4 == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(random_() % uint64_t(settings().delay_us)));
    }
    if (late) work();
  }

 private:
  struct Item {
    std::function<void(Time)> operation;
    Time queued;
  };

  void run() {
    while (!stopping_) {
      Item item;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return !queue_.empty(); });
        item = std::move(queue_.front());
        queue_.pop_front();
      }
      item.operation(item.queued);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  bool stopping_ = false;
  Time clock_;
  std::mt19937_64 random_;
  std::thread thread_;
};

StreamThread& stream_of(void* handle) {
  if (handle != nullptr) return *static_cast<StreamThread*>(handle);
  static auto* legacy = new StreamThread(0);  // never ended
  return *legacy;
}

Event& event_of(void* handle) { return *static_cast<Event*>(handle); }

struct Pinned {
  size_t bytes;
  int copies = 0;  // under way
};

std::mutex pinned_mutex;
std::map<uintptr_t, Pinned> pinned;
Bus buses[2];

// The block that holds these bytes, with a copy more (or less) under way; false when they are not pinned.
bool count_copy(const void* address, size_t bytes, int change) {
  const std::lock_guard lock(pinned_mutex);
  const auto start = reinterpret_cast<uintptr_t>(address);
  auto block = pinned.upper_bound(start);
  if (block == pinned.begin()) return false;
  --block;
  if (start + bytes > block->first + block->second.bytes) return false;
  block->second.copies += change;
  return true;
}

int forget(void* address) {
  const std::lock_guard lock(pinned_mutex);
  const auto block = pinned.find(reinterpret_cast<uintptr_t>(address));
  if (block == pinned.end()) return kInvalidValue;
  if (block->second.copies > 0) {
    std::fprintf(stderr, "fake_cuda: pinned memory was given back while it was copied\n");
    std::abort();
  }
  pinned.erase(block);
  --live;
  return kSuccess;
}

int remember(void* address, size_t bytes) {
  const std::lock_guard lock(pinned_mutex);
  if (!pinned.emplace(reinterpret_cast<uintptr_t>(address), Pinned{bytes}).second) return kInvalidValue;
  ++live;
  return kSuccess;
}

int copy(void* to, const void* from, size_t bytes, void* stream, const void* host, Bus& bus) {
  if (contexts.empty()) return kInvalidContext;
  if (!count_copy(host, bytes, 1)) return kInvalidValue;
  const double rate = settings().bytes_per_second;
  const std::chrono::nanoseconds duration(rate > 0 ? int64_t(double(bytes) / rate * 1e9) : 0);
  StreamThread& thread = stream_of(stream);
  thread.push([=, &thread, &bus](Time queued) {
    thread.spend(queued, duration, &bus, [=] { std::memcpy(to, from, bytes); });
    count_copy(host, bytes, -1);
  });
  return kSuccess;
}

}  // namespace

#define FAIL_IF_TOLD(name) \
  if (fails(name)) return kLaunchFailed

EXPORT int cuInit(unsigned) {
  FAIL_IF_TOLD("cuInit");
  return kSuccess;
}

EXPORT int cuGetErrorName(int error, const char** name) {
  *name = error == kLaunchFailed     ? "CUDA_ERROR_LAUNCH_FAILED"
          : error == kInvalidContext ? "CUDA_ERROR_INVALID_CONTEXT"
          : error == kInvalidValue   ? "CUDA_ERROR_INVALID_VALUE"
                                     : nullptr;
  return *name == nullptr ? kInvalidValue : kSuccess;
}

EXPORT int cuGetErrorString(int error, const char** text) {
  *text = error == kLaunchFailed ? "unspecified launch failure" : nullptr;
  return *text == nullptr ? kInvalidValue : kSuccess;
}

EXPORT int cuDeviceGetCount(int* count) {
  *count = 2;
  return kSuccess;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < 2 ? kSuccess : kInvalidDevice;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  FAIL_IF_TOLD("cuDevicePrimaryCtxRetain");
  static int primary[2];
  *context = &primary[device];
  ++live;
  return kSuccess;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int) {
  --live;
  return kSuccess;
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  FAIL_IF_TOLD("cuCtxPushCurrent_v2");
  contexts.push_back(context);
  return kSuccess;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kInvalidContext;
  *context = contexts.back();
  contexts.pop_back();
  return kSuccess;
}

EXPORT int cuStreamCreate(void** stream, unsigned) {
  FAIL_IF_TOLD("cuStreamCreate");
  static std::atomic<uint64_t> seed{1};
  *stream = new StreamThread(seed++);
  return kSuccess;
}

EXPORT int cuStreamSynchronize(void* stream) {
  stream_of(stream).record()->wait();
  return kSuccess;
}

EXPORT int cuStreamWaitEvent(void* stream, void* event, unsigned) {
  FAIL_IF_TOLD("cuStreamWaitEvent");
  if (event_of(event) != nullptr) stream_of(stream).wait(event_of(event));
  return kSuccess;
}

EXPORT int cuStreamDestroy_v2(void* stream) {
  delete static_cast<StreamThread*>(stream);  // after what is queued
  return kSuccess;
}

EXPORT int cuEventCreate(void** event, unsigned) {
  FAIL_IF_TOLD("cuEventCreate");
  if (contexts.empty()) return kInvalidContext;
  *event = new Event();
  ++live;
  return kSuccess;
}

EXPORT int cuEventRecord(void* event, void* stream) {
  FAIL_IF_TOLD("cuEventRecord");
  if (contexts.empty()) return kInvalidContext;
  event_of(event) = stream_of(stream).record();
  return kSuccess;
}

EXPORT int cuEventSynchronize(void* event) {
  FAIL_IF_TOLD("cuEventSynchronize");
  const Event record = event_of(event);
  if (record != nullptr) record->wait();
  return kSuccess;
}

EXPORT int cuEventDestroy_v2(void* event) {
  delete &event_of(event);
  --live;
  return kSuccess;
}

EXPORT int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t bytes, void* stream) {
  FAIL_IF_TOLD("cuMemcpyHtoDAsync_v2");
  return copy(reinterpret_cast<void*>(to), from, bytes, stream, from, buses[0]);
}

EXPORT int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, void* stream) {
  FAIL_IF_TOLD("cuMemcpyDtoHAsync_v2");
  return copy(to, reinterpret_cast<const void*>(from), bytes, stream, to, buses[1]);
}

EXPORT int cuMemHostAlloc(void** address, size_t bytes, unsigned) {
  FAIL_IF_TOLD("cuMemHostAlloc");
  if (contexts.empty()) return kInvalidContext;
  *address = std::malloc(bytes);
  return remember(*address, bytes);
}

EXPORT int cuMemFreeHost(void* address) {
  const int result = forget(address);
  if (result == kSuccess) std::free(address);
  return result;
}

EXPORT int cuMemHostRegister_v2(void* address, size_t bytes, unsigned) {
  FAIL_IF_TOLD("cuMemHostRegister_v2");
  return contexts.empty() ? kInvalidContext : remember(address, bytes);
}

EXPORT int cuMemHostUnregister(void* address) { return forget(address); }

// ---- for tests ------------------------------------------------------------------------------------------

EXPORT int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  StreamThread& thread = stream_of(stream);
  thread.push([=, &thread](Time queued) {
    thread.spend(queued, std::chrono::nanoseconds(0), nullptr, [=] { function(data); });
  });
  return kSuccess;
}

EXPORT void fake_fail(const char* name, int call) {
  const std::lock_guard lock(failing_mutex);
  failing = name;
  calls_left = call;
}

// Keeps the stream busy, and notes when that ended, in nanoseconds.
EXPORT int fake_compute(void* stream, int64_t microseconds, int64_t* ended) {
  StreamThread& thread = stream_of(stream);
  thread.push([=, &thread](Time queued) {
    thread.spend(queued, std::chrono::microseconds(microseconds), nullptr, [] {});
    *ended = Clock::now().time_since_epoch().count();
  });
  return kSuccess;
}

// What is to be zero after the last engine is closed, but for the caller's own streams.
EXPORT int fake_live() { return live; }
