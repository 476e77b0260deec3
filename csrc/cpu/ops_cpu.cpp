// The operators of schema.cpp for CPU tensors: checks, allocation, and which kernels run. The arithmetic is in the other files of
// this folder.

#include <torch/library.h>

#include "check_arguments.h"
#include "cpu/kernels.h"

namespace dass::cpu {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Outputs too large for the C library to keep are taken from the system anew by every call.
constexpr size_t large_output = size_t{4} << 20;

template <typename Outputs>
const Outputs& on_huge_pages(const Outputs& outputs) {
  const auto advise = [](const Tensor& output) {
    if (output.nbytes() >= large_output) advise_huge_pages(output.mutable_data_ptr(), output.nbytes());
  };
  std::apply([&](const auto&... each) { (advise(each), ...); }, outputs);
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor> scan_forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                                const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                                const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                                                bool delta_softplus, const c10::List<bool>& reverse, int64_t chunk,
                                                at::ScalarType out_dtype) {
  const auto call = prepare_scan_forward({u, delta, A, B, C, D, z, delta_bias, initial_state}, delta_softplus, reverse, chunk,
                                         out_dtype);
  const auto outputs = on_huge_pages(call.outputs());
  if (!kernels().scan_forward(call.prepared.arguments)) scan_forward_any(call.prepared.arguments);
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& d_out, const OptionalTensor& d_last_state, const Tensor& u, const Tensor& delta, const Tensor& A,
    const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const OptionalTensor& initial_state, const Tensor& boundary_states, bool delta_softplus, const c10::List<bool>& reverse,
    int64_t chunk) {
  const auto call = prepare_scan_backward(d_out, d_last_state, {u, delta, A, B, C, D, z, delta_bias, initial_state},
                                          boundary_states, delta_softplus, reverse, chunk);
  const auto outputs = on_huge_pages(call.outputs());
  if (!kernels().scan_backward(call.prepared.arguments)) scan_backward_any(call.prepared.arguments);
  return outputs;
}

// The kernels for any size know one layout of a map.
Tensor laid_out_as(const Tensor& x, const Tensor& map) {
  return is_channels_last(x) ? map.contiguous(at::MemoryFormat::ChannelsLast) : map;
}

std::tuple<Tensor, Tensor> ss2d_forward(const Tensor& x, const Tensor& x_dbl, const Tensor& dt_weight, const Tensor& dt_bias,
                                        const Tensor& A_logs, const Tensor& Ds, int64_t chunk, at::ScalarType out_dtype) {
  const Ss2dInputs inputs{x, x_dbl, dt_weight, dt_bias, A_logs, Ds};
  auto call = prepare_ss2d_forward(inputs, chunk, out_dtype, true);
  on_huge_pages(call.outputs());
  if (kernels().ss2d_forward(call.prepared.arguments)) return call.outputs();
  call = prepare_ss2d_forward(inputs, chunk, out_dtype);
  ss2d_forward_any(call.prepared.arguments);
  call.y = laid_out_as(x, call.y);
  return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ss2d_backward(const Tensor& d_y, const Tensor& x,
                                                                         const Tensor& x_dbl, const Tensor& dt_weight,
                                                                         const Tensor& dt_bias, const Tensor& A_logs,
                                                                         const Tensor& Ds, const Tensor& boundary_states,
                                                                         int64_t chunk) {
  const Ss2dInputs inputs{x, x_dbl, dt_weight, dt_bias, A_logs, Ds};
  auto call = prepare_ss2d_backward(d_y, inputs, boundary_states, chunk, true);
  on_huge_pages(call.outputs());
  if (kernels().ss2d_backward(call.prepared.arguments)) return call.outputs();
  call = prepare_ss2d_backward(d_y, inputs, boundary_states, chunk);
  ss2d_backward_any(call.prepared.arguments);
  call.d_x = laid_out_as(x, call.d_x);
  return call.outputs();
}

std::string instruction_set() { return kernels().name; }

Tensor elementary(const Tensor& x, c10::string_view function) {
  const auto names = at::ArrayRef<const char*>(elementary_functions);
  const auto found = std::find(names.begin(), names.end(), function);
  TORCH_CHECK(found != names.end(), "function is '", function, "'; expected one of ", names, ".");
  check_dtype(x, at::kFloat, "x");
  const Tensor from = x.contiguous(), to = at::empty_like(from);
  kernels().elementary(static_cast<int>(found - names.begin()), from.const_data_ptr<float>(), to.mutable_data_ptr<float>(),
                       from.numel());
  return to;
}

}  // namespace
}  // namespace dass::cpu

// What only the CPU has: the instruction set in use, and its elementary functions, for tests.
TORCH_LIBRARY_FRAGMENT(dass_ops, m) {
  m.def("cpu_instruction_set() -> str", dass::cpu::instruction_set);
  m.def("cpu_elementary(Tensor x, str function) -> Tensor", dass::cpu::elementary);
}

TORCH_LIBRARY_IMPL(dass_ops, CPU, m) {
  m.impl("scan_forward", dass::cpu::scan_forward);
  m.impl("scan_backward", dass::cpu::scan_backward);
  m.impl("ss2d_forward", dass::cpu::ss2d_forward);
  m.impl("ss2d_backward", dass::cpu::ss2d_backward);
}
