// The operators of schema.cpp recorded for autograd, for every backend: the name says whose kernels run, forward and back.
//
// In C++: a short sequence would otherwise wait longer for Python than for its scan.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "dispatch.h"

namespace dass {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor given(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }
OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

bool needs_gradient(std::initializer_list<Tensor> inputs) {
  return at::GradMode::is_enabled() &&
         std::any_of(inputs.begin(), inputs.end(), [](const Tensor& t) { return t.defined() && t.requires_grad(); });
}

template <typename Family>
struct Scan : torch::autograd::Function<Scan<Family>> {
  static variable_list forward(AutogradContext* context, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                               const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                               const OptionalTensor& delta_bias, const OptionalTensor& initial_state, bool delta_softplus,
                               const c10::List<bool>& reverse, int64_t chunk, at::ScalarType out_dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, last_state, boundary_states] = operators<Family>().scan_forward.call(
        u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, chunk, out_dtype);
    context->save_for_backward(
        {u, delta, A, B, C, given(D), given(z), given(delta_bias), given(initial_state), boundary_states});
    context->saved_data["delta_softplus"] = delta_softplus;
    context->saved_data["reverse"] = reverse;
    context->saved_data["chunk"] = chunk;
    context->saved_data["out_dtype"] = out_dtype;
    context->set_materialize_grads(false);
    context->mark_non_differentiable({boundary_states});
    return {out, last_state, boundary_states};
  }

  static variable_list backward(AutogradContext* context, const variable_list& d_outputs) {
    const auto saved = context->get_saved_variables();
    const auto& options = context->saved_data;
    const Tensor& u = saved[0];
    Tensor d_out = d_outputs[0];
    if (!d_out.defined()) {
      if (!d_outputs[1].defined()) return variable_list(13);
      d_out = at::zeros_symint(u.sym_sizes(), u.options().dtype(options.at("out_dtype").toScalarType()));
    }
    const auto gradients = operators<Family>().scan_backward.call(
        d_out, optional(d_outputs[1]), u, saved[1], saved[2], saved[3], saved[4], optional(saved[5]), optional(saved[6]),
        optional(saved[7]), optional(saved[8]), saved[9], options.at("delta_softplus").toBool(),
        options.at("reverse").toBoolList(), options.at("chunk").toInt());
    variable_list result = std::apply([](const auto&... each) { return variable_list{each...}; }, gradients);
    for (size_t i = 0; i < result.size(); ++i)
      if (!saved[i].defined()) result[i] = Tensor();  // the kernels return an empty one
    result.resize(13);
    return result;
  }
};

template <typename Family>
std::tuple<Tensor, Tensor, Tensor> scan(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                        const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                                        const OptionalTensor& initial_state, bool delta_softplus,
                                        const c10::List<bool>& reverse, int64_t chunk, at::ScalarType out_dtype) {
  if (!needs_gradient({u, delta, A, B, C, given(D), given(z), given(delta_bias), given(initial_state)})) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return operators<Family>().scan_forward.call(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus,
                                                      reverse, chunk, out_dtype);
  }
  const auto outputs =
      Scan<Family>::apply(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, chunk, out_dtype);
  return {outputs[0], outputs[1], outputs[2]};
}

template <typename Family>
struct Ss2d : torch::autograd::Function<Ss2d<Family>> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& x_dbl, const Tensor& dt_weight,
                               const Tensor& dt_bias, const Tensor& A_logs, const Tensor& Ds, int64_t chunk,
                               at::ScalarType out_dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, boundary_states] =
        operators<Family>().ss2d_forward.call(x, x_dbl, dt_weight, dt_bias, A_logs, Ds, chunk, out_dtype);
    context->save_for_backward({x, x_dbl, dt_weight, dt_bias, A_logs, Ds, boundary_states});
    context->saved_data["chunk"] = chunk;
    context->set_materialize_grads(false);
    context->mark_non_differentiable({boundary_states});
    return {y, boundary_states};
  }

  static variable_list backward(AutogradContext* context, const variable_list& d_outputs) {
    if (!d_outputs[0].defined()) return variable_list(8);
    const auto saved = context->get_saved_variables();
    const auto gradients =
        operators<Family>().ss2d_backward.call(d_outputs[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
                                                    saved[6], context->saved_data.at("chunk").toInt());
    variable_list result = std::apply([](const auto&... each) { return variable_list{each...}; }, gradients);
    result.resize(8);
    return result;
  }
};

template <typename Family>
std::tuple<Tensor, Tensor> ss2d(const Tensor& x, const Tensor& x_dbl, const Tensor& dt_weight, const Tensor& dt_bias,
                                const Tensor& A_logs, const Tensor& Ds, int64_t chunk, at::ScalarType out_dtype) {
  if (!needs_gradient({x, x_dbl, dt_weight, dt_bias, A_logs, Ds})) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return operators<Family>().ss2d_forward.call(x, x_dbl, dt_weight, dt_bias, A_logs, Ds, chunk, out_dtype);
  }
  const auto outputs = Ss2d<Family>::apply(x, x_dbl, dt_weight, dt_bias, A_logs, Ds, chunk, out_dtype);
  return {outputs[0], outputs[1]};
}

// What a backward returns has no derivative: recorded as an error for whoever asks for one, instead of as a constant.
struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
  struct Gradients {
    variable_list tensors;
  };
  static variable_list forward(AutogradContext*, at::TensorList, const Gradients& gradients) { return gradients.tensors; }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "The gradients of dass_ops cannot be differentiated again (create_graph=True and a second backward): the "
                       "kernels know no second derivatives. Short sequences: backend='reference'.");
  }
};

template <typename Gradients>
Gradients not_differentiable(Gradients gradients, std::initializer_list<Tensor> inputs) {
  if (!needs_gradient(inputs)) return gradients;
  variable_list given;
  std::copy_if(inputs.begin(), inputs.end(), std::back_inserter(given), [](const Tensor& t) { return t.defined(); });
  const variable_list list = NoSecondDerivative::apply(
      at::TensorList(given), NoSecondDerivative::Gradients{std::apply(
                                 [](const auto&... each) { return variable_list{each...}; }, gradients)});
  size_t i = 0;
  std::apply([&](auto&... each) { ((each = list[i++]), ...); }, gradients);
  return gradients;
}

template <typename Family>
auto scan_backward(const Tensor& d_out, const OptionalTensor& d_last_state, const Tensor& u, const Tensor& delta, const Tensor& A,
                   const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                   const OptionalTensor& delta_bias, const OptionalTensor& initial_state, const Tensor& boundary_states,
                   bool delta_softplus, const c10::List<bool>& reverse, int64_t chunk) {
  const auto gradients = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return operators<Family>().scan_backward.call(d_out, d_last_state, u, delta, A, B, C, D, z, delta_bias, initial_state,
                                                  boundary_states, delta_softplus, reverse, chunk);
  };
  return not_differentiable(gradients(), {d_out, given(d_last_state), u, delta, A, B, C, given(D), given(z), given(delta_bias),
                                          given(initial_state)});
}

template <typename Family>
auto ss2d_backward(const Tensor& d_y, const Tensor& x, const Tensor& x_dbl, const Tensor& dt_weight, const Tensor& dt_bias,
                   const Tensor& A_logs, const Tensor& Ds, const Tensor& boundary_states, int64_t chunk) {
  const auto gradients = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return operators<Family>().ss2d_backward.call(d_y, x, x_dbl, dt_weight, dt_bias, A_logs, Ds, boundary_states, chunk);
  };
  return not_differentiable(gradients(), {d_y, x, x_dbl, dt_weight, dt_bias, A_logs, Ds});
}

template <typename Family>
void implement(torch::Library& m) {
  m.impl((std::string("scan_forward") + Family::suffix).c_str(), scan<Family>);
  m.impl((std::string("ss2d_forward") + Family::suffix).c_str(), ss2d<Family>);
  m.impl((std::string("scan_backward") + Family::suffix).c_str(), scan_backward<Family>);
  m.impl((std::string("ss2d_backward") + Family::suffix).c_str(), ss2d_backward<Family>);
}

}  // namespace
}  // namespace dass

TORCH_LIBRARY_IMPL(dass_ops, Autograd, m) {
  dass::implement<dass::Native>(m);
  dass::implement<dass::Emulated>(m);
  dass::implement<dass::Triton>(m);
}
