// The operators of schema.cpp for CPU tensors: checks, allocation, threads. The arithmetic is in the other files of this folder.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>

#include "check_arguments.h"
#include "cpu/kernels.h"

namespace dass::cpu {

void parallel_tasks(int64_t count, const std::function<void(int64_t)>& task) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  });
}

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> scan_forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                                const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                                const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                                                bool delta_softplus, const c10::List<bool>& reverse, int64_t chunk,
                                                at::ScalarType out_dtype) {
  const auto call = prepare_scan_forward({u, delta, A, B, C, D, z, delta_bias, initial_state}, delta_softplus, reverse, chunk,
                                         out_dtype);
  scan_forward_any(call.prepared.arguments);
  return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& d_out, const OptionalTensor& d_last_state, const Tensor& u, const Tensor& delta, const Tensor& A,
    const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const OptionalTensor& initial_state, const Tensor& boundary_states, bool delta_softplus, const c10::List<bool>& reverse,
    int64_t chunk) {
  const auto call = prepare_scan_backward(d_out, d_last_state, {u, delta, A, B, C, D, z, delta_bias, initial_state},
                                          boundary_states, delta_softplus, reverse, chunk);
  scan_backward_any(call.prepared.arguments);
  return call.outputs();
}

std::tuple<Tensor, Tensor> ss2d_forward(const Tensor& x, const Tensor& x_dbl, const Tensor& dt_weight, const Tensor& dt_bias,
                                        const Tensor& A_logs, const Tensor& Ds, int64_t chunk, at::ScalarType out_dtype) {
  const auto call = prepare_ss2d_forward({x, x_dbl, dt_weight, dt_bias, A_logs, Ds}, chunk, out_dtype);
  ss2d_forward_any(call.prepared.arguments);
  return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ss2d_backward(const Tensor& d_y, const Tensor& x,
                                                                         const Tensor& x_dbl, const Tensor& dt_weight,
                                                                         const Tensor& dt_bias, const Tensor& A_logs,
                                                                         const Tensor& Ds, const Tensor& boundary_states,
                                                                         int64_t chunk) {
  const auto call = prepare_ss2d_backward(d_y, {x, x_dbl, dt_weight, dt_bias, A_logs, Ds}, boundary_states, chunk);
  ss2d_backward_any(call.prepared.arguments);
  return call.outputs();
}

}  // namespace
}  // namespace dass::cpu

TORCH_LIBRARY_IMPL(dass_ops, CPU, m) {
  m.impl("scan_forward", dass::cpu::scan_forward);
  m.impl("scan_backward", dass::cpu::scan_backward);
  m.impl("ss2d_forward", dass::cpu::ss2d_forward);
  m.impl("ss2d_backward", dass::cpu::ss2d_backward);
}
