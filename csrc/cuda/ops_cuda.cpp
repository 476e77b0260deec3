// The operators of schema.cpp for CUDA tensors: device, stream, scratch memory. Of torch's CUDA headers only c10's, so that
// neither cuBLAS nor cuSPARSE has to be installed for the build.
//
// Asynchronous: nothing here waits for the device. Scratch memory comes from torch's caching allocator on the current stream,
// so calls can be captured into CUDA graphs.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/operators.h"

namespace dass {
namespace {

class Cuda {
 public:
  explicit Cuda(const at::Tensor& first) : guard_(checked(first)), options_(first.options().dtype(at::kByte)) {
    int shared = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, first.get_device()));
    device_.shared_bytes = shared;
    device_.stream = c10::cuda::getCurrentCUDAStream(first.get_device()).stream();
  }

  const Device& device() const { return device_; }
  at::Tensor scratch(size_t bytes) const { return at::empty({static_cast<int64_t>(bytes)}, options_); }
  template <typename Outputs>
  void before(const Outputs&) const {}

 private:
  static at::Device checked(const at::Tensor& first) {
    TORCH_CHECK(first.is_cuda(), "u (or x) is on ", first.device(), "; expected the CUDA device of the other tensors.");
    return first.device();
  }

  c10::cuda::CUDAGuard guard_;
  at::TensorOptions options_;
  Device device_;
};

}  // namespace
}  // namespace dass

TORCH_LIBRARY_IMPL(dass_ops, CUDA, m) {
  using Cuda = dass::Operators<dass::Cuda>;
  m.impl("scan_forward", Cuda::scan_forward);
  m.impl("scan_backward", Cuda::scan_backward);
  m.impl("ss2d_forward", Cuda::ss2d_forward);
  m.impl("ss2d_backward", Cuda::ss2d_backward);
}
