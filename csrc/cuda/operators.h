// The operators of schema.cpp on the kernels of launch.h, for whoever runs those kernels: CUDA (ops_cuda.cpp) or its emulation
// (emulation/ops_emulated.cpp). `Runtime` is made for each call from the first tensor; it gives the Device, allocates scratch
// memory and sees the outputs before they are written.
#pragma once

#include <torch/library.h>

#include "check_arguments.h"
#include "kernels/launch.h"

namespace dass {

template <typename Runtime>
struct Operators {
  using Tensor = at::Tensor;
  using OptionalTensor = std::optional<at::Tensor>;

  static std::tuple<Tensor, Tensor, Tensor> scan_forward(
      const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
      const OptionalTensor& z, const OptionalTensor& delta_bias, const OptionalTensor& initial_state, bool delta_softplus,
      const c10::List<bool>& reverse, int64_t chunk, at::ScalarType out_dtype) {
    const Runtime runtime(u);
    const auto call = prepare_scan_forward({u, delta, A, B, C, D, z, delta_bias, initial_state}, delta_softplus, reverse,
                                           chunk, out_dtype);
    run<ScanKernels>(runtime, call);
    return call.outputs();
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
      const Tensor& d_out, const OptionalTensor& d_last_state, const Tensor& u, const Tensor& delta, const Tensor& A,
      const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
      const OptionalTensor& initial_state, const Tensor& boundary_states, bool delta_softplus, const c10::List<bool>& reverse,
      int64_t chunk) {
    const Runtime runtime(u);
    const auto call = prepare_scan_backward(d_out, d_last_state, {u, delta, A, B, C, D, z, delta_bias, initial_state},
                                            boundary_states, delta_softplus, reverse, chunk);
    run<ScanKernels>(runtime, call);
    return call.outputs();
  }

  static std::tuple<Tensor, Tensor> ss2d_forward(const Tensor& x, const Tensor& x_dbl, const Tensor& dt_weight,
                                                 const Tensor& dt_bias, const Tensor& A_logs, const Tensor& Ds, int64_t chunk,
                                                 at::ScalarType out_dtype) {
    const Runtime runtime(x);
    const auto call = prepare_ss2d_forward({x, x_dbl, dt_weight, dt_bias, A_logs, Ds}, chunk, out_dtype);
    run<Ss2dKernels>(runtime, call);
    return call.outputs();
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ss2d_backward(
      const Tensor& d_y, const Tensor& x, const Tensor& x_dbl, const Tensor& dt_weight, const Tensor& dt_bias,
      const Tensor& A_logs, const Tensor& Ds, const Tensor& boundary_states, int64_t chunk) {
    const Runtime runtime(x);
    const auto call = prepare_ss2d_backward(d_y, {x, x_dbl, dt_weight, dt_bias, A_logs, Ds}, boundary_states, chunk);
    run<Ss2dKernels>(runtime, call);
    return call.outputs();
  }

 private:
  template <template <typename> class Kernels, typename Call>
  static void run(const Runtime& runtime, const Call& call) {
    const auto& arguments = call.prepared.arguments;
    runtime.before(call.outputs());
    for_dtype<Kernels>(arguments.sizes.io, [&](auto kernels) {
      const at::Tensor scratch = runtime.scratch(kernels.workspace(arguments, runtime.device()));
      kernels.run(arguments, runtime.device(), scratch.mutable_data_ptr());
    });
  }
};

}  // namespace dass
