#include "transfer/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vqgnn::transfer {
namespace {

// Values of cuda.h.
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventBlockingSync = 1, kEventDisableTiming = 2;
constexpr unsigned kPortable = 1, kDeviceMap = 2;

}  // namespace

// Member, symbol (the one that CUDA's headers give the plain name) and parameters.
#define VQGNN_CUDA_FUNCTIONS(X)                                                           \
  X(init, "cuInit", (unsigned))                                                           \
  X(error_name, "cuGetErrorName", (int, const char**))                                    \
  X(error_string, "cuGetErrorString", (int, const char**))                                \
  X(device_count, "cuDeviceGetCount", (int*))                                             \
  X(device_get, "cuDeviceGet", (int*, int))                                               \
  X(context_retain, "cuDevicePrimaryCtxRetain", (void**, int))                            \
  X(context_release, "cuDevicePrimaryCtxRelease_v2", (int))                               \
  X(context_push, "cuCtxPushCurrent_v2", (void*))                                         \
  X(context_pop, "cuCtxPopCurrent_v2", (void**))                                          \
  X(stream_create, "cuStreamCreate", (Stream*, unsigned))                                 \
  X(stream_synchronize, "cuStreamSynchronize", (Stream))                                  \
  X(stream_wait_event, "cuStreamWaitEvent", (Stream, Event, unsigned))                    \
  X(stream_destroy, "cuStreamDestroy_v2", (Stream))                                       \
  X(event_create, "cuEventCreate", (Event*, unsigned))                                    \
  X(event_record, "cuEventRecord", (Event, Stream))                                       \
  X(event_synchronize, "cuEventSynchronize", (Event))                                     \
  X(event_destroy, "cuEventDestroy_v2", (Event))                                          \
  X(copy_to_device, "cuMemcpyHtoDAsync_v2", (DeviceAddress, const void*, size_t, Stream)) \
  X(copy_to_host, "cuMemcpyDtoHAsync_v2", (void*, DeviceAddress, size_t, Stream))         \
  X(host_alloc, "cuMemHostAlloc", (void**, size_t, unsigned))                             \
  X(host_free, "cuMemFreeHost", (void*))                                                  \
  X(host_register, "cuMemHostRegister_v2", (void*, size_t, unsigned))                     \
  X(host_unregister, "cuMemHostUnregister", (void*))

struct Driver::Functions {
#define VQGNN_DECLARE(member, symbol, parameters) int(*member) parameters;
  VQGNN_CUDA_FUNCTIONS(VQGNN_DECLARE)
#undef VQGNN_DECLARE

  explicit Functions(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: a driver does not survive that
    if (library == nullptr) throw std::runtime_error(std::string("the CUDA driver could not be opened: ") + dlerror());
    const auto find = [&](const char* symbol) {
      void* found = dlsym(library, symbol);
      if (found == nullptr) throw std::runtime_error("the CUDA driver " + path + " lacks " + symbol);
      return found;
    };
#define VQGNN_LOAD(member, symbol, parameters) member = reinterpret_cast<int(*) parameters>(find(symbol));
    VQGNN_CUDA_FUNCTIONS(VQGNN_LOAD)
#undef VQGNN_LOAD
  }
};

Driver::Driver(int device) {
  const char* path = std::getenv("VQGNN_LIBCUDA");
  cuda_ = std::make_unique<Functions>(path != nullptr && *path != '\0' ? path : "libcuda.so.1");
  check(cuda_->init(0), "cuInit");
  int count = 0;
  check(cuda_->device_count(&count), "cuDeviceGetCount");
  if (device >= count) {
    throw std::invalid_argument("device must be below the number of CUDA devices, " + std::to_string(count) +
                                ", got " + std::to_string(device));
  }
  check(cuda_->device_get(&device_, device), "cuDeviceGet");
  check(cuda_->context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

Driver::~Driver() {
  if (context_ != nullptr) cuda_->context_release(device_);
}

void Driver::check(int result, const char* what) const {
  if (result == 0) return;
  const char *name = nullptr, *text = nullptr;
  cuda_->error_name(result, &name);
  cuda_->error_string(result, &text);
  throw std::runtime_error(std::string(what) + " failed: " + (name ? name : "error " + std::to_string(result)) +
                           (text ? std::string(" (") + text + ")" : ""));
}

Driver::Scope::Scope(const Driver* driver) : driver_(driver) {
  if (driver_) driver_->check(driver_->cuda_->context_push(driver_->context_), "cuCtxPushCurrent");
}

Driver::Scope::~Scope() {
  void* context;
  if (driver_) driver_->cuda_->context_pop(&context);
}

Stream Driver::create_stream() const {
  Stream stream;
  check(cuda_->stream_create(&stream, kStreamNonBlocking), "cuStreamCreate");
  return stream;
}

void Driver::synchronize(Stream stream) const { check(cuda_->stream_synchronize(stream), "cuStreamSynchronize"); }

void Driver::destroy_stream(Stream stream) const noexcept { cuda_->stream_destroy(stream); }

Event Driver::create_event() const {
  Event event;
  check(cuda_->event_create(&event, kEventBlockingSync | kEventDisableTiming), "cuEventCreate");
  return event;
}

void Driver::record(Event event, Stream stream) const { check(cuda_->event_record(event, stream), "cuEventRecord"); }

void Driver::wait(Stream stream, Event event) const {
  check(cuda_->stream_wait_event(stream, event, 0), "cuStreamWaitEvent");
}

void Driver::wait_on_host(Event event) const { check(cuda_->event_synchronize(event), "cuEventSynchronize"); }

void Driver::destroy_event(Event event) const noexcept { cuda_->event_destroy(event); }

void Driver::copy_to_device(DeviceAddress to, const void* from, size_t bytes, Stream stream) const {
  check(cuda_->copy_to_device(to, from, bytes, stream), "cuMemcpyHtoDAsync");
}

void Driver::copy_to_host(void* to, DeviceAddress from, size_t bytes, Stream stream) const {
  check(cuda_->copy_to_host(to, from, bytes, stream), "cuMemcpyDtoHAsync");
}

void* Driver::allocate_pinned(size_t bytes) const {
  void* address;
  check(cuda_->host_alloc(&address, bytes, kPortable), "cuMemHostAlloc");
  return address;
}

void Driver::free_pinned(void* address) const noexcept { cuda_->host_free(address); }

void Driver::pin(void* address, size_t bytes) const {
  check(cuda_->host_register(address, bytes, kPortable | kDeviceMap), "cuMemHostRegister");
}

void Driver::unpin(void* address) const noexcept { cuda_->host_unregister(address); }

}  // namespace vqgnn::transfer
