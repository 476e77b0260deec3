// The CUDA kernels as operators on CPU tensors, run by the emulation, for tests: dass_ops::scan_forward_emulated and so on.
//
// Outputs and scratch memory are filled with NaN first, so that nothing unwritten passes for a result. The environment changes
// the plan: DASS_OPS_EMULATION_SHARED is the bytes of shared memory that a block may have (default: those of an H100),
// DASS_OPS_EMULATION_FEW_BLOCKS how many blocks are too few to fill the GPU.
#include <cstdlib>
#include <cstring>

#include "cuda/operators.h"

namespace dass {
namespace {

class Emulated {
 public:
  explicit Emulated(const at::Tensor&) {
    const char* shared = std::getenv("DASS_OPS_EMULATION_SHARED");
    device_.shared_bytes = shared ? std::strtoull(shared, nullptr, 10) : 227 << 10;
    if (const char* blocks = std::getenv("DASS_OPS_EMULATION_FEW_BLOCKS")) device_.few_blocks = std::strtoll(blocks, nullptr, 10);
  }

  const Device& device() const { return device_; }

  at::Tensor scratch(size_t bytes) const {
    const auto memory = at::empty({static_cast<int64_t>(bytes)}, at::kByte);
    poison(memory);
    return memory;
  }

  template <typename Outputs>
  void before(const Outputs& outputs) const {
    std::apply([](const auto&... tensor) { (poison(tensor), ...); }, outputs);
  }

 private:
  static void poison(const at::Tensor& tensor) {  // NaN in every floating type
    if (tensor.numel()) std::memset(tensor.mutable_data_ptr(), 0xff, tensor.nbytes());
  }

  Device device_;
};

}  // namespace
}  // namespace dass

TORCH_LIBRARY_IMPL(dass_ops, CPU, m) {
  using Emulated = dass::Operators<dass::Emulated>;
  m.impl("scan_forward_emulated", Emulated::scan_forward);
  m.impl("scan_backward_emulated", Emulated::scan_backward);
  m.impl("ss2d_forward_emulated", Emulated::ss2d_forward);
  m.impl("ss2d_backward_emulated", Emulated::ss2d_backward);
}
