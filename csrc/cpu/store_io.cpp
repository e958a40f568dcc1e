#include "cpu/dispatch.h"

namespace vqgnn {
namespace VQGNN_ISA {}
}  // namespace vqgnn
