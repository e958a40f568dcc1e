#pragma once
#include <pybind11/pybind11.h>

namespace vqgnn::transfer {

void bind(pybind11::module_& m);

}  // namespace vqgnn::transfer
