// at::Tensor -> the structs of arguments.h. Every TORCH_CHECK lives here, and so does every copy that a caller's layout costs:
// inputs whose last axis is not contiguous are copied once; batch, direction, channel, group and state strides are free.
//
// The `Prepared...` structs own what the plain structs point to: keep them alive until the kernel has run.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>

#include <tuple>

#include "arguments.h"

namespace dass {

inline at::ScalarType state_dtype(at::ScalarType io) { return io == at::kDouble ? at::kDouble : at::kFloat; }

inline Dtype to_dtype(at::ScalarType type, const char* name) {
  switch (type) {
    case at::kFloat: return Dtype::float32;
    case at::kDouble: return Dtype::float64;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    default:
      TORCH_CHECK(false, name, " has dtype ", type, "; expected float32, float64, bfloat16 or float16. Convert it with .to().");
  }
}

inline void check_shape(const at::Tensor& tensor, at::IntArrayRef shape, const char* name, const char* axes) {
  TORCH_CHECK(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), "; expected ", axes, " = ", shape, ".");
}

inline void check_dtype(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == type, name, " has dtype ", tensor.scalar_type(), "; expected ", type,
              ". The functions of dass_ops.functional convert; the raw operators do not.");
}

inline void check_device(const at::Tensor& tensor, at::Device device, const char* name) {
  TORCH_CHECK(tensor.device() == device, name, " is on ", tensor.device(), "; expected ", device, ", where u (or x) is.");
}

// Owned contiguous copy (or the tensor itself) of a small state-dtype tensor; null where absent.
struct Parameters {
  at::Tensor held;
  const void* get() const { return held.defined() ? held.const_data_ptr() : nullptr; }
};

inline Parameters parameters(const std::optional<at::Tensor>& tensor, at::IntArrayRef shape, at::ScalarType type,
                             at::Device device, const char* name, const char* axes) {
  if (!tensor.has_value() || !tensor->defined()) return {};
  check_device(*tensor, device, name);
  check_shape(*tensor, shape, name, axes);
  check_dtype(*tensor, type, name);
  return {tensor->contiguous()};
}

inline at::Tensor with_contiguous_last(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

inline void* data(const at::Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

inline Sequence sequence(at::Tensor& held, const at::Tensor& tensor, int64_t directions) {
  held = with_contiguous_last(tensor);
  return {data(held), held.stride(0), directions == 1 ? 0 : held.stride(1), held.stride(2)};
}

inline Projection projection(at::Tensor& held, const at::Tensor& tensor, const ScanSizes& sizes, at::ScalarType io,
                             const char* name) {
  TORCH_CHECK(tensor.dim() == 5, name, " has ", tensor.dim(),
              " axes; expected (batch, directions, groups, state, length) or, constant, (1, directions, channels, state, 1).");
  const bool varies = tensor.scalar_type() == io && tensor.size(0) == sizes.batch && tensor.size(4) == sizes.length;
  const bool constant = tensor.size(0) == 1 && tensor.size(4) == 1 && tensor.size(2) == sizes.channels &&
                        tensor.scalar_type() == state_dtype(io) &&
                        !(varies && sizes.batch == 1 && sizes.length == 1);
  TORCH_CHECK(varies || constant, name, " has shape ", tensor.sizes(), " and dtype ", tensor.scalar_type(),
              "; expected (batch, directions, groups, state, length) with batch ", sizes.batch, ", length ", sizes.length,
              " and dtype ", io, ", or (1, directions, channels, state, 1) with dtype ", state_dtype(io), ".");
  TORCH_CHECK(tensor.size(1) == sizes.directions && tensor.size(3) == sizes.state, name, " has shape ", tensor.sizes(),
              "; expected ", sizes.directions, " directions on axis 1 and a state of ", sizes.state, " on axis 3.");
  const int64_t groups = tensor.size(2);
  TORCH_CHECK(groups > 0 && sizes.channels % groups == 0, name, " has ", groups, " groups on axis 2; expected a divisor of the ",
              sizes.channels, " channels.");
  Projection result;
  result.groups = groups;
  result.constant = constant;
  held = constant ? tensor.contiguous() : with_contiguous_last(tensor);
  result.data = data(held);
  if (constant) {
    result.direction = sizes.channels * sizes.state;
    result.group = sizes.state;
    result.state = 1;
  } else {
    result.batch = held.stride(0);
    result.direction = held.stride(1);
    result.group = held.stride(2);
    result.state = held.stride(3);
  }
  return result;
}

inline ScanSizes scan_sizes(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, bool delta_softplus,
                            const c10::List<bool>& reverse, int64_t chunk, at::ScalarType out_dtype) {
  TORCH_CHECK(delta.dim() == 4, "delta has shape ", delta.sizes(), "; expected (batch, directions, channels, length).");
  TORCH_CHECK(A.dim() == 3, "A has shape ", A.sizes(), "; expected (directions, channels, state).");
  ScanSizes sizes;
  sizes.batch = delta.size(0);
  sizes.directions = delta.size(1);
  sizes.channels = delta.size(2);
  sizes.length = delta.size(3);
  sizes.state = A.size(2);
  sizes.io = to_dtype(u.scalar_type(), "u");
  sizes.out = to_dtype(out_dtype, "out_dtype");
  TORCH_CHECK(out_dtype == u.scalar_type() || out_dtype == state_dtype(u.scalar_type()), "out_dtype is ", out_dtype,
              "; expected ", u.scalar_type(), " or ", state_dtype(u.scalar_type()), ".");
  TORCH_CHECK(u.dim() == 4 && u.size(0) == sizes.batch && u.size(2) == sizes.channels && u.size(3) == sizes.length &&
                  (u.size(1) == sizes.directions || u.size(1) == 1),
              "u has shape ", u.sizes(), "; expected delta's shape ", delta.sizes(), ", or that with 1 direction.");
  check_dtype(delta, u.scalar_type(), "delta");
  check_device(delta, u.device(), "delta");
  TORCH_CHECK(sizes.directions >= 1 && sizes.directions <= 64 &&
                  static_cast<int64_t>(reverse.size()) == sizes.directions,
              "reverse has ", reverse.size(), " flags; expected one for each of the ", sizes.directions,
              " directions (at most 64).");
  TORCH_CHECK(chunk >= 0, "chunk is ", chunk, "; expected a number of steps, or 0 to save no states.");
  for (int64_t k = 0; k < sizes.directions; ++k) sizes.reverse |= static_cast<uint64_t>(reverse.get(k)) << k;
  sizes.shared = u.size(1) < sizes.directions;
  sizes.delta_softplus = delta_softplus;
  sizes.chunk = chunk;
  sizes.chunks = chunk == 0 ? 0 : (sizes.length + chunk - 1) / chunk;
  return sizes;
}

// The nine inputs that forward and backward share.
struct ScanInputs {
  const at::Tensor &u, &delta, &A, &B, &C;
  const std::optional<at::Tensor>&D, &z, &delta_bias, &initial_state;
};

template <typename Arguments>
struct Prepared {
  Arguments arguments;
  at::Tensor u, delta, z, B, C, d_out;
  Parameters A, D, delta_bias, initial_state, d_last_state, boundary_states;

  void fill_inputs(const ScanInputs& in) {
    const auto& sizes = arguments.sizes;
    const auto device = in.u.device();
    const auto io = in.u.scalar_type(), state = state_dtype(io);
    const int64_t b = sizes.batch, k = sizes.directions, d = sizes.channels, n = sizes.state;
    for (const auto* tensor : {&in.B, &in.C}) check_device(*tensor, device, tensor == &in.B ? "B" : "C");
    arguments.u = sequence(u, in.u, in.u.size(1));
    arguments.delta = sequence(delta, in.delta, k);
    arguments.B = projection(B, in.B, sizes, io, "B");
    arguments.C = projection(C, in.C, sizes, io, "C");
    A = parameters(in.A, {k, d, n}, state, device, "A", "(directions, channels, state)");
    D = parameters(in.D, {k, d}, state, device, "D", "(directions, channels)");
    delta_bias = parameters(in.delta_bias, {k, d}, state, device, "delta_bias", "(directions, channels)");
    initial_state = parameters(in.initial_state, {b, k, d, n}, state, device, "initial_state",
                               "(batch, directions, channels, state)");
    if (in.z.has_value() && in.z->defined()) {
      TORCH_CHECK(!sizes.shared, "z cannot gate outputs that are summed over directions; multiply the sum by silu(z) instead.");
      check_device(*in.z, device, "z");
      check_shape(*in.z, in.delta.sizes(), "z", "(batch, directions, channels, length)");
      check_dtype(*in.z, io, "z");
      arguments.z = sequence(z, *in.z, k);
    }
    arguments.A = A.get();
    arguments.D = D.get();
    arguments.delta_bias = delta_bias.get();
    arguments.initial_state = initial_state.get();
  }
};

struct ScanForwardCall {
  Prepared<ScanForward> prepared;
  at::Tensor out, last_state, boundary_states;
  std::tuple<at::Tensor, at::Tensor, at::Tensor> outputs() const { return {out, last_state, boundary_states}; }
};

inline ScanForwardCall prepare_scan_forward(const ScanInputs& in, bool delta_softplus, const c10::List<bool>& reverse,
                                            int64_t chunk, at::ScalarType out_dtype) {
  ScanForwardCall call;
  auto& arguments = call.prepared.arguments;
  arguments.sizes = scan_sizes(in.u, in.delta, in.A, delta_softplus, reverse, chunk, out_dtype);
  call.prepared.fill_inputs(in);
  const auto& sizes = arguments.sizes;
  const auto state = in.u.options().dtype(state_dtype(in.u.scalar_type()));
  call.out = at::empty({sizes.batch, sizes.outputs(), sizes.channels, sizes.length}, in.u.options().dtype(out_dtype));
  call.last_state = at::empty({sizes.batch, sizes.directions, sizes.channels, sizes.state}, state);
  call.boundary_states = at::empty({sizes.batch, sizes.directions, sizes.channels, sizes.chunks, sizes.state}, state);
  arguments.out = call.out.mutable_data_ptr();
  arguments.last_state = call.last_state.mutable_data_ptr();
  arguments.boundary_states = call.boundary_states.mutable_data_ptr();
  return call;
}

struct ScanBackwardCall {
  Prepared<ScanBackward> prepared;
  at::Tensor d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_delta_bias, d_initial_state;
  auto outputs() const {
    return std::make_tuple(d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_delta_bias, d_initial_state);
  }
};

inline ScanBackwardCall prepare_scan_backward(const at::Tensor& d_out, const std::optional<at::Tensor>& d_last_state,
                                              const ScanInputs& in, const at::Tensor& boundary_states, bool delta_softplus,
                                              const c10::List<bool>& reverse, int64_t chunk) {
  ScanBackwardCall call;
  auto& arguments = call.prepared.arguments;
  TORCH_CHECK(chunk > 0 || in.u.numel() == 0, "chunk is 0: the forward saved no states, so there is no backward.");
  arguments.sizes = scan_sizes(in.u, in.delta, in.A, delta_softplus, reverse, chunk, d_out.scalar_type());
  call.prepared.fill_inputs(in);
  const auto& sizes = arguments.sizes;
  const int64_t b = sizes.batch, k = sizes.directions, d = sizes.channels, n = sizes.state;
  const auto type = state_dtype(in.u.scalar_type());
  const auto device = in.u.device();
  check_device(d_out, device, "d_out");
  check_shape(d_out, {b, sizes.outputs(), d, sizes.length}, "d_out", "the shape of out");
  arguments.d_out = sequence(call.prepared.d_out, d_out, sizes.outputs());
  call.prepared.d_last_state = parameters(d_last_state, {b, k, d, n}, type, device, "d_last_state", "the shape of last_state");
  call.prepared.boundary_states = parameters(boundary_states, {b, k, d, sizes.chunks, n}, type, device, "boundary_states",
                                             "(batch, directions, channels, chunks, state)");
  arguments.d_last_state = call.prepared.d_last_state.get();
  arguments.boundary_states = call.prepared.boundary_states.get();
  const auto like = [&](const at::Tensor& tensor) { return at::empty(tensor.sizes(), tensor.options()); };
  const auto like_optional = [&](const std::optional<at::Tensor>& tensor, at::ScalarType absent) {
    return tensor.has_value() && tensor->defined() ? like(*tensor) : at::empty({0}, in.u.options().dtype(absent));
  };
  call.d_u = like(in.u);
  call.d_delta = like(in.delta);
  call.d_A = like(in.A);
  call.d_B = like(in.B);
  call.d_C = like(in.C);
  call.d_D = like_optional(in.D, type);
  call.d_z = like_optional(in.z, in.u.scalar_type());
  call.d_delta_bias = like_optional(in.delta_bias, type);
  call.d_initial_state = like_optional(in.initial_state, type);
  arguments.d_u = call.d_u.mutable_data_ptr();
  arguments.d_delta = call.d_delta.mutable_data_ptr();
  arguments.d_A = call.d_A.mutable_data_ptr();
  arguments.d_B = call.d_B.mutable_data_ptr();
  arguments.d_C = call.d_C.mutable_data_ptr();
  arguments.d_D = call.d_D.mutable_data_ptr();
  arguments.d_z = call.d_z.mutable_data_ptr();
  arguments.d_delta_bias = call.d_delta_bias.mutable_data_ptr();
  arguments.d_initial_state = call.d_initial_state.mutable_data_ptr();
  return call;
}

struct Ss2dInputs {
  const at::Tensor &x, &x_dbl, &dt_weight, &dt_bias, &A_logs, &Ds;
};

// Whether the channels of a map lie together, and not the map: then y and d_x do too on a CPU.
inline bool is_channels_last(const at::Tensor& x) {
  return x.dim() == 4 && !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

template <typename Arguments>
struct PreparedSs2d {
  Arguments arguments;
  at::Tensor x, x_dbl, d_y;
  Parameters dt_weight, dt_bias, A_logs, Ds, boundary_states;

  static at::Tensor with_contiguous_map(const at::Tensor& tensor) {  // the last two axes as one
    const int64_t axes = tensor.dim();
    const bool fits = tensor.numel() == 0 || ((tensor.size(axes - 1) == 1 || tensor.stride(axes - 1) == 1) &&
                                              (tensor.size(axes - 2) == 1 || tensor.stride(axes - 2) == tensor.size(axes - 1)));
    return fits ? tensor : tensor.contiguous();
  }

  Map map(at::Tensor& held, const at::Tensor& tensor) const {
    held = arguments.sizes.channels_last ? tensor.contiguous(at::MemoryFormat::ChannelsLast) : with_contiguous_map(tensor);
    return {data(held), held.stride(0), held.stride(1)};
  }
  at::Tensor empty_map(at::ScalarType type) const {
    return at::empty(x.sizes(), x.options().dtype(type),
                     arguments.sizes.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  }

  void fill_inputs(const Ss2dInputs& in, int64_t chunk, at::ScalarType out_dtype, bool keep_layout) {
    auto& sizes = arguments.sizes;
    const auto io = in.x.scalar_type(), state = state_dtype(io);
    const auto device = in.x.device();
    TORCH_CHECK(in.x.dim() == 4, "x has shape ", in.x.sizes(), "; expected (batch, channels, height, width).");
    TORCH_CHECK(in.A_logs.dim() == 2, "A_logs has shape ", in.A_logs.sizes(), "; expected (4 * channels, state).");
    TORCH_CHECK(in.dt_weight.dim() == 3, "dt_weight has shape ", in.dt_weight.sizes(), "; expected (4, channels, rank).");
    TORCH_CHECK(chunk >= 0, "chunk is ", chunk, "; expected a number of steps, or 0 to save no states.");
    sizes.channels_last = keep_layout && is_channels_last(in.x);
    sizes.batch = in.x.size(0);
    sizes.channels = in.x.size(1);
    sizes.height = in.x.size(2);
    sizes.width = in.x.size(3);
    sizes.state = in.A_logs.size(1);
    sizes.rank = in.dt_weight.size(2);
    sizes.chunk = chunk;
    sizes.chunks = chunk == 0 ? 0 : (sizes.length() + chunk - 1) / chunk;
    sizes.io = to_dtype(io, "x");
    sizes.out = to_dtype(out_dtype, "out_dtype");
    TORCH_CHECK(out_dtype == io || out_dtype == state, "out_dtype is ", out_dtype, "; expected ", io, " or ", state, ".");
    check_device(in.x_dbl, device, "x_dbl");
    check_dtype(in.x_dbl, io, "x_dbl");
    check_shape(in.x_dbl, {sizes.batch, 4, sizes.rows(), sizes.height, sizes.width}, "x_dbl",
                "(batch, 4, rank + 2 * state, height, width)");
    const int64_t d = sizes.channels, n = sizes.state;
    dt_weight = parameters(in.dt_weight, {4, d, sizes.rank}, state, device, "dt_weight", "(4, channels, rank)");
    dt_bias = parameters(in.dt_bias, {4, d}, state, device, "dt_bias", "(4, channels)");
    A_logs = parameters(in.A_logs, {4 * d, n}, state, device, "A_logs", "(4 * channels, state)");
    Ds = parameters(in.Ds, {4 * d}, state, device, "Ds", "(4 * channels)");
    arguments.x = map(x, in.x);
    x_dbl = with_contiguous_map(in.x_dbl);
    arguments.x_dbl = {data(x_dbl), x_dbl.stride(0), x_dbl.stride(1), x_dbl.stride(2)};
    arguments.dt_weight = dt_weight.get();
    arguments.dt_bias = dt_bias.get();
    arguments.A_logs = A_logs.get();
    arguments.Ds = Ds.get();
  }
};

struct Ss2dForwardCall {
  PreparedSs2d<Ss2dForward> prepared;
  at::Tensor y, boundary_states;
  std::tuple<at::Tensor, at::Tensor> outputs() const { return {y, boundary_states}; }
};

inline Ss2dForwardCall prepare_ss2d_forward(const Ss2dInputs& in, int64_t chunk, at::ScalarType out_dtype,
                                            bool keep_layout = false) {
  Ss2dForwardCall call;
  auto& arguments = call.prepared.arguments;
  call.prepared.fill_inputs(in, chunk, out_dtype, keep_layout);
  const auto& sizes = arguments.sizes;
  call.y = call.prepared.empty_map(out_dtype);
  call.boundary_states = at::empty({sizes.batch, 4, sizes.channels, sizes.chunks, sizes.state},
                                   in.x.options().dtype(state_dtype(in.x.scalar_type())));
  arguments.y = call.y.mutable_data_ptr();
  arguments.boundary_states = call.boundary_states.mutable_data_ptr();
  return call;
}

struct Ss2dBackwardCall {
  PreparedSs2d<Ss2dBackward> prepared;
  at::Tensor d_x, d_x_dbl, d_dt_weight, d_dt_bias, d_A_logs, d_Ds;
  auto outputs() const { return std::make_tuple(d_x, d_x_dbl, d_dt_weight, d_dt_bias, d_A_logs, d_Ds); }
};

inline Ss2dBackwardCall prepare_ss2d_backward(const at::Tensor& d_y, const Ss2dInputs& in, const at::Tensor& boundary_states,
                                              int64_t chunk, bool keep_layout = false) {
  Ss2dBackwardCall call;
  auto& arguments = call.prepared.arguments;
  TORCH_CHECK(chunk > 0 || in.x.numel() == 0, "chunk is 0: the forward saved no states, so there is no backward.");
  call.prepared.fill_inputs(in, chunk, d_y.scalar_type(), keep_layout);
  const auto& sizes = arguments.sizes;
  check_device(d_y, in.x.device(), "d_y");
  check_shape(d_y, in.x.sizes(), "d_y", "the shape of x");
  arguments.d_y = call.prepared.map(call.prepared.d_y, d_y);
  call.prepared.boundary_states =
      parameters(boundary_states, {sizes.batch, 4, sizes.channels, sizes.chunks, sizes.state},
                 state_dtype(in.x.scalar_type()), in.x.device(), "boundary_states", "(batch, 4, channels, chunks, state)");
  arguments.boundary_states = call.prepared.boundary_states.get();
  const auto like = [&](const at::Tensor& tensor) { return at::empty(tensor.sizes(), tensor.options()); };
  call.d_x = call.prepared.empty_map(in.x.scalar_type());
  call.d_x_dbl = like(in.x_dbl);
  call.d_dt_weight = like(in.dt_weight);
  call.d_dt_bias = like(in.dt_bias);
  call.d_A_logs = like(in.A_logs);
  call.d_Ds = like(in.Ds);
  arguments.d_x = call.d_x.mutable_data_ptr();
  arguments.d_x_dbl = call.d_x_dbl.mutable_data_ptr();
  arguments.d_dt_weight = call.d_dt_weight.mutable_data_ptr();
  arguments.d_dt_bias = call.d_dt_bias.mutable_data_ptr();
  arguments.d_A_logs = call.d_A_logs.mutable_data_ptr();
  arguments.d_Ds = call.d_Ds.mutable_data_ptr();
  return call;
}

}  // namespace dass
