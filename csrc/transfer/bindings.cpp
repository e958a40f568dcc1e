// The engine for Python. Addresses and streams are integers; vqgnn/transfer.py checks tensors before it calls.
#include "transfer/bindings.h"

#include <pybind11/stl.h>  // std::optional

#include <cstdint>
#include <optional>

#include "transfer/engine.h"

namespace py = pybind11;

namespace vqgnn::transfer {
namespace {

struct Handle {  // pybind11 needs a complete type
  Ticket ticket;
};

std::optional<Stream> as_stream(std::optional<uintptr_t> handle) {
  if (!handle.has_value()) return std::nullopt;
  return reinterpret_cast<Stream>(*handle);
}

auto moving(Ticket (Engine::*operation)(int, const int64_t*, int64_t, uintptr_t, std::optional<Stream>)) {
  return [operation](Engine& engine, int table, uintptr_t ids, int64_t k, uintptr_t rows,
                     std::optional<uintptr_t> stream) {
    return Handle{(engine.*operation)(table, reinterpret_cast<const int64_t*>(ids), k, rows, as_stream(stream))};
  };
}

}  // namespace

void bind(py::module_& m) {
  using unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Handle>(m, "TransferTicket");
  // The last reference may go in a thread that holds the GIL, which no worker needs: close() may block under it.
  py::class_<Engine>(m, "TransferEngine")
      .def(py::init([](int num_threads, int slots, int64_t slot_bytes, int device, int skip_wait, int64_t fail_piece) {
             return std::make_unique<Engine>(
                 Options{num_threads, slots, slot_bytes, device, static_cast<Wait>(skip_wait), fail_piece});
           }),
           py::arg("num_threads"), py::arg("slots"), py::arg("slot_bytes"), py::arg("device") = -1,
           py::arg("skip_wait") = 0, py::arg("fail_piece") = -1)
      .def(
          "add_table",
          [](Engine& engine, uintptr_t data, int64_t num_rows, int64_t row_bytes, bool pin) {
            return engine.add_table(reinterpret_cast<void*>(data), num_rows, row_bytes, pin);
          },
          py::arg("data"), py::arg("num_rows"), py::arg("row_bytes"), py::arg("pin") = false, unlocked())
      .def("pull", moving(&Engine::pull), py::arg("table"), py::arg("ids"), py::arg("k"), py::arg("out"),
           py::arg("stream") = py::none(), unlocked())
      .def("push", moving(&Engine::push), py::arg("table"), py::arg("ids"), py::arg("k"), py::arg("src"),
           py::arg("stream") = py::none(), unlocked())
      .def(
          "wait",
          [](Engine& engine, const Handle& handle, std::optional<uintptr_t> stream) {
            engine.wait(handle.ticket, as_stream(stream));
          },
          py::arg("ticket"), py::arg("stream") = py::none(), unlocked())
      .def(
          "done", [](const Engine& engine, const Handle& handle) { return engine.done(handle.ticket); },
          py::arg("ticket"), unlocked())
      .def("flush", &Engine::flush, unlocked())
      .def("close", &Engine::close, unlocked())
      .def_property_readonly("pull_stream", [](const Engine& engine) -> std::optional<uintptr_t> {
        const std::optional<Stream> stream = engine.pull_stream();
        if (!stream.has_value()) return std::nullopt;
        return reinterpret_cast<uintptr_t>(*stream);
      });
}

}  // namespace vqgnn::transfer
