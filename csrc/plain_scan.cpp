// selective_scan as most calls are: dtypes that need no conversion, B and C that vary along the sequence, shapes that fit. It checks
// and shapes in one step what dass_ops/functional.py does in many, each of which costs a short sequence more than its scan when
// Python is not in the caches. Anything else is left to that file, which also knows what to say about it.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "check_arguments.h"

namespace dass {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// As selective_scan's arguments; `chunk`: steps between the states that a backward needs. Returns (out, last_state), or nothing
// where the call is not plain.
std::vector<Tensor> plain_selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                         const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                                         const OptionalTensor& initial_state, bool delta_softplus,
                                         const c10::List<bool>& reverse, int64_t chunk) {
  using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                     const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                                     const OptionalTensor&, bool, const c10::List<bool>&, int64_t, at::ScalarType);
  static const auto forward = c10::Dispatcher::singleton().findSchemaOrThrow("dass_ops::scan_forward", "").typed<Forward>();

  const auto io = u.scalar_type();
  const bool known = io == at::kFloat || io == at::kBFloat16 || io == at::kHalf || io == at::kDouble;
  const int64_t directions = static_cast<int64_t>(reverse.size());
  if (!known || directions == 0 || u.dim() != 3 || A.dim() != 2 || u.size(1) % directions != 0) return {};
  const int64_t batch = u.size(0), channels = u.size(1), length = u.size(2), state = A.size(1), share = channels / directions;

  bool recorded = false;
  const auto fits = [&](const Tensor& t, at::IntArrayRef shape, at::ScalarType type) {
    recorded |= t.requires_grad();
    return t.sizes() == shape && t.scalar_type() == type && t.device() == u.device();
  };
  const auto absent_or_fits = [&](const OptionalTensor& t, at::IntArrayRef shape, at::ScalarType type) {
    return !t.has_value() || fits(*t, shape, type);
  };
  const auto parameter = state_dtype(io);
  if (!fits(u, u.sizes(), io) || !fits(delta, u.sizes(), io) || !fits(A, {channels, state}, parameter) ||
      !absent_or_fits(D, {channels}, parameter) || !absent_or_fits(z, u.sizes(), io) ||
      !absent_or_fits(delta_bias, {channels}, parameter) || !absent_or_fits(initial_state, {batch, channels, state}, parameter))
    return {};

  Tensor projections[] = {B, C};
  for (Tensor& p : projections) {
    if (p.dim() == 3 && fits(p, {batch, state, length}, io)) {
      p = p.unsqueeze(1).unsqueeze(1).expand({batch, directions, 1, state, length});
      continue;
    }
    const int64_t groups = p.dim() == 4 ? p.size(1) : 0;
    if (groups == 0 || groups % directions != 0 || channels % groups != 0 || !fits(p, {batch, groups, state, length}, io)) return {};
    p = p.view({batch, directions, groups / directions, state, length});
  }

  const auto sequence = [&](const Tensor& t) { return t.view({batch, directions, share, length}); };
  const auto split = [&](const OptionalTensor& t) { return t.has_value() ? OptionalTensor(t->view({directions, share})) : t; };
  const auto [out, last_state, boundary_states] = forward.call(
      sequence(u), sequence(delta), A.view({directions, share, state}), projections[0], projections[1], split(D),
      z.has_value() ? OptionalTensor(sequence(*z)) : z, split(delta_bias),
      initial_state.has_value() ? OptionalTensor(initial_state->view({batch, directions, share, state})) : initial_state,
      delta_softplus, reverse, recorded && at::GradMode::is_enabled() ? chunk : 0, io);
  return {out.view({batch, channels, length}), last_state.view({batch, channels, state})};
}

}  // namespace
}  // namespace dass

TORCH_LIBRARY_FRAGMENT(dass_ops, m) {
  m.def(
      "plain_selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "Tensor? initial_state, bool delta_softplus, bool[] reverse, int chunk) -> Tensor[]",
      dass::plain_selective_scan);
}
