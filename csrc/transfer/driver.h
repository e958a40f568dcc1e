// The part of the CUDA driver API that the engine uses, opened at run time: this builds and loads without CUDA.
#pragma once
#include <cstddef>
#include <memory>

namespace vqgnn::transfer {

using Stream = void*;                      // CUstream; torch.cuda.Stream.cuda_stream is one, null the default stream
using Event = void*;                       // CUevent
using DeviceAddress = unsigned long long;  // CUdeviceptr

// The primary context of one device, which torch uses too. Calls throw std::runtime_error with the driver's words.
class Driver {
 public:
  explicit Driver(int device);  // opens $VQGNN_LIBCUDA, or libcuda.so.1
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // Makes the context current on this thread for a scope; the caller may have been using another device.
  class Scope {
   public:
    explicit Scope(const Driver* driver);  // null: nothing to do
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    const Driver* driver_;
  };

  Stream create_stream() const;  // does not wait for the legacy default stream
  void synchronize(Stream stream) const;
  void destroy_stream(Stream stream) const noexcept;

  Event create_event() const;  // without timing; a thread that waits for it sleeps
  void record(Event event, Stream stream) const;
  void wait(Stream stream, Event event) const;
  void wait_on_host(Event event) const;
  void destroy_event(Event event) const noexcept;

  void copy_to_device(DeviceAddress to, const void* from, size_t bytes, Stream stream) const;
  void copy_to_host(void* to, DeviceAddress from, size_t bytes, Stream stream) const;

  void* allocate_pinned(size_t bytes) const;
  void free_pinned(void* address) const noexcept;
  void pin(void* address, size_t bytes) const;  // kernels then read it at the same address
  void unpin(void* address) const noexcept;

 private:
  struct Functions;
  void check(int result, const char* what) const;

  std::unique_ptr<const Functions> cuda_;
  int device_ = 0;
  void* context_ = nullptr;
};

}  // namespace vqgnn::transfer
